"""Queries, keys and values of a dense model on a text: what the cheap stage measures routing on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hga_compile.evaluation.reference import Reference, dense_reference
from hga_compile.kernels.scoring import Scoring
from hga_compile.tuning.listening import Attention, in_place_of_attention

__all__ = ["CaptureError", "Captured", "capture"]


class CaptureError(RuntimeError):
    """A model whose attention cannot be listened to."""


@dataclass(frozen=True)
class Captured:
    """One layer on one text, the last queries of it."""

    layer: int
    query: Tensor
    """``[1, heads, queries, dim]``."""
    key: Tensor
    """``[1, kv_heads, tokens, dim]``, rotated: all tokens, the queries' own last."""
    value: Tensor
    """``[1, kv_heads, tokens, dim]``."""
    scale: float
    scoring: Scoring
    output: Tensor | None
    """``[hidden, heads * dim]``, the projection after attention; None: not found."""
    residual: float
    """Mean square of what attention's output is added to, summed over channels; 0: not found."""
    dense: Tensor
    """``[1, heads, queries, dim]``, what dense attention gives."""


def capture(model: PreTrainedModel, ids: Tensor, scored: int) -> tuple[Reference, list[Captured]]:
    """Run the dense model once and keep what its full-attention layers saw.

    Parameters
    ----------
    model
        Uncompiled.
    ids
        ``[1, tokens]``.
    scored
        How many of the last tokens are predicted: so many queries are kept.

    Returns
    -------
    Reference
        Logits and K/V of the whole text, as `hga_compile.evaluation` uses them.
    list of Captured
        In the order of the layers; keys and values are the reference's own, not copies.

    Raises
    ------
    CaptureError
        A model whose attention does not go through transformers' interface.
    """
    seen: dict[int, dict[str, Any]] = {}
    with _listening(model, seen, scored), torch.no_grad():
        reference = dense_reference(model, ids.to(model.device), scored)
    found = []
    for layer, what in sorted(seen.items()):
        stored = reference.cache.layers[layer]
        if what["sliding"]:
            continue
        kept = Captured(
            layer, what["query"], stored.keys, stored.values, what["scale"], what["scoring"], what["output"],
            what.get("residual", 0.0), what["dense"],
        )  # fmt: skip
        found.append(kept)
    if not found:
        raise CaptureError(
            f"{type(model).__name__}: no full attention was seen; its attention does not go through "
            "transformers' interface, so quality cannot be measured on it (--quality-model)"
        )
    return reference, found


@contextmanager
def _listening(model: PreTrainedModel, seen: dict[int, dict[str, Any]], scored: int) -> Iterator[None]:
    def make(stock: Attention) -> Attention:
        def listen(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any
        ) -> tuple[Tensor, Any]:
            result = stock(module, query, key, value, mask, **more)
            projection = getattr(getattr(module, "o_proj", None), "weight", None)
            seen.setdefault(module.layer_idx, {}).update(
                query=query[:, :, -scored:].detach().clone(),
                # [batch, tokens, heads, dim] -> [batch, heads, tokens, dim]
                dense=result[0][:, -scored:].detach().transpose(1, 2).clone(),
                scale=more.get("scaling") or query.shape[-1] ** -0.5,
                sliding=bool(more.get("sliding_window")),
                scoring=Scoring(more.get("softcap") or 0.0, more.get("s_aux")),
                output=projection if projection is not None and projection.dtype.is_floating_point else None,
            )
            return result

        return listen

    def note_residual(layer: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = arguments[0] if arguments else named.get("hidden_states")
        number = _layer_number(layer)
        if isinstance(states, Tensor) and number is not None:
            energy = states[:, -scored:].float().square().sum(-1).mean()
            seen.setdefault(number, {})["residual"] = float(energy)

    owners = [module for module in model.modules() if _layer_number(module) is not None]
    hooks = [owner.register_forward_pre_hook(note_residual, with_kwargs=True) for owner in owners]
    try:
        with in_place_of_attention(model, make):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _layer_number(module: Any) -> int | None:
    """Return the number of a decoder layer: of what holds an attention module, but is none itself."""
    if hasattr(module, "layer_idx"):
        return None
    numbers = {
        child.layer_idx for child in module.children() if isinstance(getattr(child, "layer_idx", None), int)
    }
    return numbers.pop() if len(numbers) == 1 else None
