"""What was decided about an attention site, and why: a closed list of reasons."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Decision", "Reason"]


class Reason(StrEnum):
    """Why a site was routed, or why it stays dense."""

    ROUTED = "routed"
    """Proven causal self-attention: rewritten."""
    SLIDING_WINDOW = "sliding window: exact, only the window is kept"
    """Proven sliding-window attention; already cheap."""
    CONFIGURED = "configured dense"
    """`routing.dense_layers`, or a dense prefill without a cache."""
    REQUIRES_GRAD = "gradients are needed"
    """There is no backward yet."""
    NOT_CAUSAL = "not causal self-attention"
    """Encoder or cross attention."""
    PACKED = "several documents in one sequence"
    """Proven causal inside each document; routing does not tell documents apart."""
    CHUNKED = "chunked attention"
    """Proven causal inside each chunk; already cheap."""
    PREFIX_LM = "keys ahead of the query are visible"
    """Proven causal but for a prefix, or blocks, that are seen as a whole."""
    ALIGNMENT = "is_causal with more keys than queries"
    """PyTorch aligns that mask to the first keys, not to the last."""
    UNPROVEN_MASK = "the mask is not proven to be causal with padding"
    """Built by ops that are not understood, or given from outside."""
    FLOAT_MASK = "additive or learned mask"
    """ALiBi, relative positions and the like."""
    DROPOUT = "dropout"
    """Active dropout."""
    WEIGHTS_USED = "the attention weights are used elsewhere too"
    """Returned (`output_attentions`), or changed: they exist only where attention is dense."""
    TAIL = "no tail estimate with soft-cap or attention sinks"
    """`routing.tail: estimate` does not cover them."""
    SINGLE_QUERY = "one query and no hga cache"
    """Routing would read more than it saves: a static, stock or encoder cache."""
    SHARED_KV = "K or V is used elsewhere too"
    """The graph needs all of K and V anyway."""
    NOT_MATCHED = "no attention over the stored K and V was recognised"
    """The attention is of a form that is not known: all of K and V is read."""
    SHAPE = "unsupported shape"
    """Not four-dimensional, or KV heads that do not divide the query heads."""
    RETRACE_FAILED = "the graph could not be traced to ATen"
    """The graph runs as it came."""


@dataclass(frozen=True)
class Decision:
    """What was decided about one attention site."""

    site: str
    """Name of the node."""
    layer: int | None
    """Number of the layer, where the graph tells."""
    phase: str
    """`decode` for one query, `prefill` for several, `any` where the graph serves both."""
    reason: Reason
    detail: str = ""
    """What exactly stood in the way, or what was proven."""

    @property
    def routed(self) -> bool:
        """Whether the site was rewritten to routed attention."""
        return self.reason is Reason.ROUTED
