"""The ops that graphs hold: `hga::open`, `hga::append`, `hga::read`, and three kinds of attention.

They have a schema and a fake, and are safe to trace. Their meaning is that of the plain-torch reference in
`routed`. Running an op twice with the same arguments gives the same result: `length` says where the new rows
belong, so rows are overwritten, never doubled.
"""

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels
from hga_compile.kernels.device_step import current_step
from hga_compile.kernels.index import LayerIndex
from hga_compile.kernels.registration import register_op
from hga_compile.kernels.routed import routed_attention
from hga_compile.kernels.scoring import Scoring
from hga_compile.kernels.site import SiteConfig
from hga_compile.kernels.states import STATES

__all__ = ["append", "attention", "cached_attention", "number_on", "open_state", "read_state"]
__all__ += ["window_attention"]


def _open_fake(key: Tensor, value: Tensor, handle: Tensor, *, kernels: str = "auto") -> None:
    return None


@register_op(
    "open(Tensor key, Tensor value, Tensor(a!) handle, *, str kernels='auto') -> ()",
    _open_fake,
)
def open_state(key: Tensor, value: Tensor, handle: Tensor, *, kernels: Kernels = "auto") -> None:
    """Open the K/V of a layer.

    Parameters
    ----------
    key, value : Tensor
        ``[batch, kv_heads, tokens, dim]``: rows that it starts with; `tokens` may be 0.
    handle : Tensor
        ``[1]`` int64 on the CPU, written. An operand rather than a result: compilers merge calls with equal
        operands, and two caches would then share one store.
    kernels : {"auto", "triton", "native", "reference"}
        What moves the rows (`compile.kernels`).
    """
    opened = STATES.open()
    try:
        if key.shape[2]:
            STATES.get(opened).put(key, value, key.shape[2], kernels)
    except BaseException:
        STATES.close(opened)
        raise
    handle.copy_(opened)


def _append_fake(
    key: Tensor, value: Tensor, handle: Tensor, length: int, sliding: bool = False, *, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    return (
        key.new_empty((*key.shape[:2], length, key.shape[3])),
        value.new_empty((*value.shape[:2], length, value.shape[3])),
    )


@register_op(
    "append(Tensor key, Tensor value, Tensor(a!) handle, SymInt length, bool sliding=False, *, "
    "str kernels='auto') -> (Tensor, Tensor)",
    _append_fake,
)
def append(
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    length: int,
    sliding: bool = False,
    *,
    kernels: Kernels = "auto",
) -> tuple[Tensor, Tensor]:
    """Store new rows and return all of them: what an attention that stays dense reads.

    Parameters
    ----------
    key, value : Tensor
        ``[batch, kv_heads, n, dim]`` and ``[..., v_dim]``.
    handle : Tensor
        From `open_state`.
    length : int
        Tokens stored once these are in.
    sliding : bool
        Whether the layer has a sliding window. Nothing here depends on it: it tells the passes that a mask
        which they cannot read holds more than padding.
    kernels : {"auto", "triton", "native", "reference"}
        What moves the rows (`compile.kernels`).

    Returns
    -------
    tuple of Tensor
        ``[batch, kv_heads, length, dim]`` and ``[..., v_dim]``, contiguous, on the device of `key`.
    """
    state = STATES.get(handle)
    state.put(key, value, length, kernels)
    return state.full()


def _attended_fake(query: Tensor, key: Tensor, value: Tensor, *others: object) -> Tensor:
    """Shape and dtype of the result of every attention."""
    return query.new_empty((*query.shape[:3], value.shape[3]))


@register_op(
    "cached_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) handle, "
    "SymInt length, Tensor? key_mask, float scale, str site, float softcap=0.0, "
    "Tensor? sinks=None) -> Tensor",
    _attended_fake,
)
def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    length: int,
    key_mask: Tensor | None,
    scale: float,
    site: str,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store new rows and attend from the new queries to what they are routed to.

    Parameters
    ----------
    query : Tensor
        ``[batch, query_heads, n, dim]``, the last `n` positions.
    key, value : Tensor
        ``[batch, kv_heads, n, dim]`` and ``[..., v_dim]``, new rows.
    handle : Tensor
        From `open_state`.
    length : int
        Tokens stored once these are in.
    key_mask : Tensor or None
        ``[1 or >= batch, >= length]``, False or 0 for padding; row ``i`` is that of sequence ``i``.
    scale : float
        Softmax scale.
    site : str
        A `SiteConfig` as text.
    softcap : float
        Soft-cap of the scores; 0: none.
    sinks : Tensor or None
        ``[query_heads]``: logits of attention sinks (see `scoring.Scoring`).

    Returns
    -------
    Tensor
        ``[batch, query_heads, n, v_dim]``, contiguous, dtype of the query.
    """
    config = SiteConfig.from_text(site)
    state = STATES.get(handle)
    scoring = Scoring(softcap, sinks)
    return state.attend(query, key, value, length, key_mask, scale, config, scoring).contiguous()


@register_op(
    "window_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) handle, "
    "SymInt length, Tensor? key_mask, float scale, SymInt window, float softcap=0.0, "
    "Tensor? sinks=None) -> Tensor",
    _attended_fake,
)
def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor,
    length: int,
    key_mask: Tensor | None,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Store new rows, attend exactly within a sliding window, and forget what no later query can see.

    Parameters
    ----------
    query, key, value, handle, length, key_mask, scale
        As for `cached_attention`.
    window : int
        A query sees itself and ``window - 1`` tokens before it.
    softcap, sinks
        As for `cached_attention`.

    Returns
    -------
    Tensor
        ``[batch, query_heads, n, v_dim]``, contiguous, dtype of the query.
    """
    state = STATES.get(handle)
    scoring = Scoring(softcap, sinks)
    return state.attend_window(query, key, value, length, key_mask, scale, window, scoring).contiguous()


def _read_fake(
    handle: Tensor, key_shape: list[int], value_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(key_shape, dtype=dtype, device=device),
        torch.empty((*key_shape[:3], value_dim), dtype=dtype, device=device),
    )


@register_op(
    "read(Tensor(a!) handle, SymInt[] key_shape, int value_dim, ScalarType dtype, "
    "Device device) -> (Tensor, Tensor)",
    _read_fake,
)
def read_state(
    handle: Tensor, key_shape: list[int], value_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return all stored K and V, for code that reads a cache layer's tensors itself.

    Parameters
    ----------
    handle : Tensor
        From `open_state`.
    key_shape : list of int
        ``[batch, kv_heads, length, dim]``, as the cache layer knows them.
    value_dim : int
        Channels of a value.
    dtype, device
        Of the K/V.

    Returns
    -------
    tuple of Tensor
        ``[batch, kv_heads, length, dim]`` and ``[..., value_dim]``, contiguous.
    """
    key, value = STATES.get(handle).full()
    if list(key.shape) != list(key_shape):
        raise RuntimeError(
            f"stored keys must be {list(key_shape)} as the cache counts, got {list(key.shape)}"
        )
    return key, value


@register_op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, float scale, "
    "str site, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    _attended_fake,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    site: str,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Routed causal attention without a cache.

    Parameters
    ----------
    query : Tensor
        ``[batch, query_heads, queries, dim]``, the last positions.
    key, value : Tensor
        ``[batch, kv_heads, tokens, dim]`` and ``[..., v_dim]``, ``tokens >= queries``.
    key_mask : Tensor or None
        ``[1 or >= batch, >= tokens]``, False or 0 for padding; row ``i`` is that of sequence ``i``.
    scale : float
        Softmax scale.
    site : str
        A `SiteConfig` as text.
    softcap : float
        Soft-cap of the scores; 0: none.
    sinks : Tensor or None
        ``[query_heads]``: logits of attention sinks (see `scoring.Scoring`).

    Returns
    -------
    Tensor
        ``[batch, query_heads, queries, v_dim]``, contiguous, dtype of the query.
    """
    config = SiteConfig.from_text(site)
    out = routed_attention(
        query, _Whole(key, value), LayerIndex(config.routing, config.kernels), key.shape[2], key_mask, scale,
        config.routing, config.layer, Scoring(softcap, sinks), config.kernels,
    )  # fmt: skip
    return out.contiguous()


class _Whole:
    """K/V that lie in two tensors, as `routed.KeyValues`."""

    host_pages = gpu_pages = hot = None
    paged = apart = False

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.dtype, self.v_dim = key.dtype, value.shape[3]
        self.key, self.value = key.flatten(0, 1), value.flatten(0, 1)
        self.rows = self.key.shape[0]

    def read(self, begin: int, end: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        own = rows or slice(0, self.rows)
        return self.key[own, begin:end], self.value[own, begin:end]

    @property
    def row_bytes(self) -> int:
        return (self.key.shape[2] + self.value.shape[2]) * self.key.element_size()

    def fetch(self, groups: Tensor) -> Tensor:
        raise NotImplementedError("rows without a cache lie in no pages")  # `paged` says so

    def gather(self, groups: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        token = (groups[..., None] * group_size + torch.arange(group_size, device=groups.device)).flatten(1)
        token = token.clamp(max=self.key.shape[1] - 1)[..., None]
        return (
            self.key.gather(1, token.expand(-1, -1, self.key.shape[2])),
            self.value.gather(1, token.expand(-1, -1, self.value.shape[2])),
        )


def _number_fake(number: int, ahead: int, like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


@register_op("number_on(SymInt number, int ahead, Tensor like) -> Tensor", _number_fake)
def number_on(number: int, ahead: int, like: Tensor) -> Tensor:
    """Return a number that grows with the sequence as a tensor, which a recorded step has on the GPU.

    Parameters
    ----------
    number : int
        The number.
    ahead : int
        By how much it is ahead of the position of the step's token.
    like : Tensor
        Any, on the device where it is wanted.

    Returns
    -------
    Tensor
        ``[]`` int64.
    """
    step = current_step()
    if step is None:
        return torch.full((), number, dtype=torch.int64, device=like.device)
    return step.number(ahead)
