"""What happens to scores beside their scale: a soft-cap, and attention sinks with a learned logit."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PLAIN", "Scoring"]


@dataclass(frozen=True)
class Scoring:
    """How attention weights follow from scores, where that is not a plain softmax.

    Soft-cap: a score ``s`` becomes ``cap * tanh(s / cap)`` before the mask (Gemma 2, arXiv 2408.00118).
    Sink logits: the softmax of each head has one more entry, which has no value (gpt-oss, arXiv 2508.10925).
    """

    softcap: float = 0.0
    """0: none."""
    sinks: Tensor | None = None
    """``[query_heads]``: a logit a head; None: none."""

    @property
    def plain(self) -> bool:
        """Whether this is a softmax and nothing else."""
        return self.softcap == 0 and self.sinks is None

    def logits(self, kv_heads: int) -> Tensor | None:
        """Return the sink logits as ``[kv_heads, heads]``."""
        return None if self.sinks is None else self.sinks.reshape(kv_heads, -1)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        logits: Tensor | None,
    ) -> Tensor:
        """Attend with this scoring, written out.

        Parameters
        ----------
        query, key, value : Tensor
            ``[..., queries, dim]``, ``[..., tokens, dim]`` and ``[..., tokens, v_dim]``.
        mask : Tensor or None
            Broadcastable to ``[..., queries, tokens]``, bool; None: everything is seen.
        scale : float
            Softmax scale.
        logits : Tensor or None
            Of the sinks, broadcastable to ``[..., queries, 1]``.

        Returns
        -------
        Tensor
            ``[..., queries, v_dim]``, dtype of the query; 0 for a query that sees nothing.
        """
        work = torch.promote_types(query.dtype, torch.float32)
        scores = (query.to(work) @ key.to(work).transpose(-1, -2)).mul_(scale)
        if self.softcap:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf)
        peak = scores.amax(-1, keepdim=True)
        if logits is not None:
            peak = torch.maximum(peak, logits.to(work))
        peak = torch.where(torch.isneginf(peak), torch.zeros_like(peak), peak)
        weight = scores.sub_(peak).exp_()
        total = weight.sum(-1, keepdim=True)
        if logits is not None:
            total = total + (logits.to(work) - peak).exp()
        out = (weight @ value.to(work)) / total
        return out.masked_fill_(total == 0, 0.0).to(query.dtype)


PLAIN = Scoring()
"""A softmax and nothing else."""
