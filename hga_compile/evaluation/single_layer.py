"""A model with one layer routed and the others dense: what that layer's routing costs by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hga_compile.configs.routing import Routing
from hga_compile.evaluation.candidates import Advance, Outcome, Use, fill_cache
from hga_compile.kernels.ops import attention
from hga_compile.kernels.site import SiteConfig

NAME = "hga_single_layer"


class LayersError(ValueError):
    """A model whose layers cannot be routed one by one; the message says why."""


class OneLayer:
    """Routes one layer of an uncompiled model at a time, so that nothing is compiled for each of them.

    Parameters
    ----------
    model
        Loaded. Its attention function is another one inside `installed` and put back behind it.
    advance
        Told the tokens of each run.

    Raises
    ------
    LayersError
        If the model's attention cannot be replaced.
    """

    def __init__(self, model: PreTrainedModel, advance: Advance = lambda _: None) -> None:
        self.model, self.advance = model, advance
        self.layer: int | None = None
        self.routing = Routing()
        self.seen: list[int] = []
        """Layers with full attention, in the order in which they ran."""

    @contextmanager
    def installed(self) -> Iterator[OneLayer]:
        """Put this attention into the model, and the model's own back at the end."""
        before = self.model.config._attn_implementation
        if before != "sdpa":
            raise LayersError(
                f"the model's attention must be sdpa, got {before!r}: only that one can be stood in for"
            )
        AttentionInterface.register(NAME, self._attend)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        self.model.set_attn_implementation(NAME)
        try:
            yield self
        finally:
            self.model.set_attn_implementation(before)

    def layers(self) -> list[int]:
        """Return the layers with full attention, found by reading one token.

        Raises
        ------
        LayersError
            If there is none.
        """
        self.seen = []
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
            self.model(input_ids=token, past_key_values=DynamicCache(), use_cache=True)
        found = sorted(set(self.seen))
        if not found:
            raise LayersError("the model has no layer of full attention that could be routed")
        return found

    def candidate(self, layer: int, routing: Routing) -> OneLayerCandidate:
        """Return what a study measures."""
        return OneLayerCandidate(self, layer, routing)

    def run(self, layer: int, routing: Routing, cache: DynamicCache, queries: Tensor) -> Outcome:
        """Give the logits of `queries` with one layer routed; shares are that layer's own."""
        import hga_compile

        hga_compile.reset_report()
        self.layer, self.routing = layer, routing
        try:
            output = self.model(input_ids=queries, past_key_values=cache, use_cache=True)
        finally:
            self.layer = None
        self.advance(queries.shape[1])
        total = hga_compile.report().totals()
        shares = (total.attended / total.visible, total.kv_bytes / total.dense_bytes)
        # Plain torch stands for the kernels here: that is no fallback of the model.
        return Outcome(output.logits[0], Use(*shares, total.summary_bytes / total.dense_bytes, {}))

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **more: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        full = more.get("sliding_window") is None and not getattr(module, "is_sliding", False)
        if full:
            self.seen.append(module.layer_idx)
        if not full or module.layer_idx != self.layer:
            dense = ALL_ATTENTION_FUNCTIONS["sdpa"]
            out: Tensor = dense(module, query, key, value, attention_mask, scaling=scaling, **more)[0]
            return out, None
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        site = SiteConfig(module.layer_idx, "gpu", self.routing, "auto").to_text()
        softcap, sinks = more.get("softcap") or 0.0, more.get("s_aux")
        routed = attention(query, key, value, None, scale, site, softcap, sinks)
        return routed.transpose(1, 2).contiguous(), None


class OneLayerCandidate:
    """One layer at one budget, as `study` measures candidates."""

    def __init__(self, owner: OneLayer, layer: int, routing: Routing) -> None:
        self.owner, self.layer, self.routing = owner, layer, routing

    def decode(self, dense: DynamicCache, prefix: int, queries: Tensor) -> Outcome:
        """See `candidates.Candidate.decode`."""
        cache = fill_cache(DynamicCache(), dense, prefix)
        return self.owner.run(self.layer, self.routing, cache, queries)

    def whole(self, ids: Tensor, scored: int) -> Outcome:
        """Not measured: layers are told apart well enough behind a dense prefill."""
        raise NotImplementedError("layers are measured in mode decode")
