"""The full-model stage: KL and delta NLL of a profile on the real checkpoint, on whole texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hga_compile.configs.profile import Profile
from hga_compile.evaluation.candidates import NothingRouted, Outcome, RoutedCandidate, Use, fill_cache
from hga_compile.evaluation.metrics import compare
from hga_compile.evaluation.reference import Reference, run_mode
from hga_compile.kernels.scoring import Scoring
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore
from hga_compile.tuning.listening import Attention, in_place_of_attention

__all__ = ["Quality", "measure"]

MODE = "decode"


@dataclass(frozen=True)
class Quality:
    """Distance from dense in nats a token, means over texts; shares of what dense attention reads."""

    kl: float
    delta_nll: float
    top1: float
    attended: float
    kv_bytes: float
    summary_bytes: float
    by_text: Mapping[str, Mapping[str, float]]

    def numbers(self) -> dict[str, float]:
        """Return the means alone."""
        return {name: value for name, value in vars(self).items() if name != "by_text"}


def measure(
    model: PreTrainedModel, profile: Profile, texts: Sequence[tuple[str, Reference]], compiled: bool = False
) -> Quality:
    """Measure a profile on texts: dense prefill, every scored query routed by itself.

    Parameters
    ----------
    model
        The uncompiled model.
    profile
        Its routing, with overrides.
    texts
        Names and dense references.
    compiled
        True: through the model compiled with backend "hga" (`inner: eager`). False: the same store, index,
        routing and kernels in the place of the uncompiled model's attention; it gives the same numbers and
        takes no time to compile.
    """
    found: dict[str, dict[str, float]] = {}
    profile = _plain(profile)
    with torch.no_grad():
        outcomes = _compiled(model, profile, texts) if compiled else _direct(model, profile, texts)
        for (name, reference), outcome in zip(texts, outcomes, strict=True):
            scores = compare(reference.logits, outcome.logits, reference.targets)
            found[name] = {
                "kl": float(scores.kl.mean()),
                "delta_nll": float((scores.nll - scores.dense_nll).mean()),
                "top1": float(scores.agree.mean()),
                "attended": outcome.use.attended,
                "kv_bytes": outcome.use.kv_bytes,
                "summary_bytes": outcome.use.summary_bytes,
            }
    names = next(iter(found.values()))
    means = {name: sum(text[name] for text in found.values()) / len(found) for name in names}
    return Quality(**means, by_text=found)


def _compiled(
    model: PreTrainedModel, profile: Profile, texts: Sequence[tuple[str, Reference]]
) -> Iterator[Outcome]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
        candidate = RoutedCandidate(model, {"profile": profile, "inner": "eager"}, dynamic=True)
        for _, reference in texts:
            yield run_mode(candidate, MODE, reference)
    torch._dynamo.reset()


def _direct(
    model: PreTrainedModel, profile: Profile, texts: Sequence[tuple[str, Reference]]
) -> Iterator[Outcome]:
    import hga_compile

    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    routing = [
        None if profile.routing.is_dense(layer, layers) else profile.routing.for_layer(layer, layers)
        for layer in range(layers)
    ]

    def make(stock: Attention) -> Attention:
        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
        ) -> tuple[Tensor, Any]:
            own = routing[module.layer_idx]
            if own is None or more.get("sliding_window"):
                return stock(module, query, key, value, mask, **more)
            tokens, body = key.shape[2], key.shape[2] - query.shape[2]
            store = LayerStore("gpu")
            store.put(key[:, :, :body], value[:, :, :body], body)
            out = store.attend(
                query, key[:, :, body:], value[:, :, body:], tokens, None,
                more.get("scaling") or query.shape[-1] ** -0.5,
                SiteConfig(module.layer_idx, "gpu", own, profile.compile.kernels),
                Scoring(more.get("softcap") or 0.0, more.get("s_aux")),
            )  # fmt: skip
            return out.transpose(1, 2), None

        return attend

    for _, reference in texts:
        queries = reference.ids[:, :-1]
        prefix = queries.shape[1] - reference.scored
        cache = fill_cache(DynamicCache(), reference.cache, prefix)
        hga_compile.reset_report()
        with in_place_of_attention(model, make):
            logits = model(input_ids=queries[:, prefix:], past_key_values=cache, use_cache=True).logits[0]
        total = hga_compile.report().totals()
        if not total.visible:
            raise NothingRouted("no layer was routed: the profile keeps all of them dense")
        use = Use(
            total.attended / total.visible,
            total.kv_bytes / total.dense_bytes,
            total.summary_bytes / total.dense_bytes,
            dict(hga_compile.report().fallbacks),
        )
        yield Outcome(logits, use)


def _plain(profile: Profile) -> Profile:
    """Leave out what the measurement runs without: where K/V lie does not change the result."""
    routing = profile.routing.model_copy(update={"prefill": "routed", "prefill_tile": 1})
    update = {"model": None, "gpu": None, "offload": type(profile.offload)(), "routing": routing}
    return profile.model_copy(update=update)
