r"""Tail estimate: what the tokens outside the routed set would add, from per-chunk summaries.

A plain mean (n tokens at the mean key with the mean value) ruins the result: a chunk's mass often sits on
tokens with tiny values. The log-sum-exp of a chunk is therefore expanded about the head's mean query ``m``
instead of about 0: with ``a = log sum_j exp(m.k_j)``, ``w_j = exp(m.k_j - a)``, ``kt = sum_j w_j k_j`` and
``vt = sum_j w_j v_j``, a chunk adds mass ``exp(a + (q - m).kt)`` with value ``vt``. That is the same as
giving token ``j`` the score ``m.k_j + (q - m).kt`` of its chunk, so routed tokens are taken out of their
chunk's estimate exactly. Only complete chunks count; the rest of the tail is dropped.
"""

import torch
from torch import Tensor

from hga_compile.kernels.summaries import grown

__all__ = ["TailSummary", "attend_gathered_with_tail", "attend_masked_with_tail"]


class TailSummary:
    """First-order expansions of the chunks of one layer, one per query head.

    Parameters
    ----------
    chunk_size : int
        Tokens of a chunk.
    mean_query : Tensor
        ``[rows, heads, dim]`` float32, softmax scale applied; fixed for the life of the layer.
    v_dim : int
        Channels of a value.
    """

    def __init__(self, chunk_size: int, mean_query: Tensor, v_dim: int) -> None:
        self.chunk_size, self.mean_query = chunk_size, mean_query
        self.chunks = 0
        rows, heads, dim = mean_query.shape
        self.log_mass = mean_query.new_empty(rows, heads, 0)
        self.key, self.value = (
            mean_query.new_empty(rows, heads, 0, dim),
            mean_query.new_empty(rows, heads, 0, v_dim),
        )

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add complete chunks: ``[rows, tokens, dim]`` and ``[rows, tokens, v_dim]``."""
        score = torch.einsum("rhd,rtd->rht", self.mean_query, keys.float()).unflatten(
            -1, (-1, self.chunk_size)
        )
        log_mass = score.logsumexp(-1)
        weight = (score - log_mass[..., None]).exp()
        chunked_k = keys.float().unflatten(1, (-1, self.chunk_size))
        chunked_v = values.float().unflatten(1, (-1, self.chunk_size))
        used, total = self.chunks, self.chunks + log_mass.shape[-1]
        for name, part in (
            ("log_mass", log_mass),
            ("key", torch.einsum("rhct,rctd->rhcd", weight, chunked_k)),
            ("value", torch.einsum("rhct,rctd->rhcd", weight, chunked_v)),
        ):
            buffer = grown(getattr(self, name), used, total, 2)
            buffer[:, :, used:total] = part
            setattr(self, name, buffer)
        self.chunks = total

    def truncate(self, chunks: int) -> None:
        """Forget every chunk from number `chunks` on."""
        self.chunks = min(self.chunks, chunks)

    def select_rows(self, rows: Tensor) -> None:
        """Replace the rows by `rows`."""
        rows = rows.to(self.key.device)
        self.mean_query = self.mean_query[rows]
        self.log_mass, self.key, self.value = self.log_mass[rows], self.key[rows], self.value[rows]

    def shifts(self, query: Tensor, chunks: int) -> Tensor:
        """Return ``(q - m).kt`` of the first `chunks` chunks: ``[rows, heads, queries, chunks]``."""
        return torch.einsum("rhqd,rhcd->rhqc", query - self.mean_query[:, :, None], self.key[:, :, :chunks])

    def nbytes(self) -> int:
        """Return the bytes allocated."""
        return self.log_mass.nbytes + self.key.nbytes + self.value.nbytes + self.mean_query.nbytes

    def bytes_per_token(self) -> float:
        """Return the bytes of one token's share in one row."""
        heads, dim, v_dim = self.key.shape[1], self.key.shape[3], self.value.shape[3]
        return 4.0 * heads * (1 + dim + v_dim) / self.chunk_size


def attend_masked_with_tail(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, unrouted: Tensor, tail: TailSummary
) -> Tensor:
    """Exact attention over the routed tokens plus the estimate of the unrouted ones.

    Parameters
    ----------
    query : Tensor
        ``[rows, heads, queries, dim]`` float32 with the softmax scale applied.
    key, value : Tensor
        ``[rows, tokens, dim]`` and ``[rows, tokens, v_dim]``.
    mask : Tensor
        ``[rows, queries, tokens]`` bool: routed tokens.
    unrouted : Tensor
        Same shape: tokens that the estimate stands for; they lie in complete chunks.
    tail : TailSummary
        Expansions of at least those chunks.

    Returns
    -------
    Tensor
        ``[rows, heads, queries, v_dim]`` float32.
    """
    key, value = key.float(), value.float()
    exact = torch.einsum("rhqd,rtd->rhqt", query, key)
    # Later tiles' chunks lie past these tokens.
    chunks = min(tail.chunks, -(-key.shape[1] // tail.chunk_size))
    covered = min(chunks * tail.chunk_size, key.shape[1])
    shift = tail.shifts(query, chunks).repeat_interleave(tail.chunk_size, -1)[..., :covered]
    base = torch.einsum("rhd,rtd->rht", tail.mean_query, key[:, :covered])
    estimate = torch.full_like(exact, -torch.inf)
    estimate[..., :covered] = base[:, :, None] + shift
    scores = torch.where(mask[:, None], exact, estimate.masked_fill_(~unrouted[:, None], -torch.inf))
    nothing = torch.isneginf(scores).all(-1, keepdim=True)
    weight = torch.softmax(scores, -1).masked_fill_(nothing, 0.0)
    return torch.einsum("rhqt,rtd->rhqd", weight, value)


def attend_gathered_with_tail(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, chunk: Tensor, counted: Tensor, tail: TailSummary
) -> Tensor:
    """Do what `attend_masked_with_tail` does for one query a row, reading only routed rows and summaries.

    Parameters
    ----------
    query : Tensor
        ``[rows, heads, dim]`` float32 with the softmax scale applied.
    key, value : Tensor
        ``[rows, gathered, dim]`` and ``[rows, gathered, v_dim]``.
    mask : Tensor
        ``[rows, gathered]`` bool: rows that are routed tokens.
    chunk : Tensor
        ``[rows, gathered]`` int64: the chunk each lies in.
    counted : Tensor
        ``[rows, chunks]`` bool: chunks whose unrouted tokens are estimated.
    tail : TailSummary
        Expansions of at least `chunks` chunks.

    Returns
    -------
    Tensor
        ``[rows, heads, v_dim]`` float32.
    """
    rows, heads, _ = query.shape
    chunks = counted.shape[1]
    key, value = key.float(), value.float()
    exact = torch.einsum("rhd,rnd->rhn", query, key).masked_fill_(~mask[:, None], -torch.inf)
    shift = tail.shifts(query[:, :, None], chunks)[:, :, 0]
    mass = (tail.log_mass[:, :, :chunks] + shift).masked_fill_(~counted[:, None], -torch.inf)
    inside = chunk.clamp(max=max(chunks - 1, 0))
    taken = mask & (chunk < chunks) & counted.gather(1, inside)
    again = torch.einsum("rhd,rnd->rhn", tail.mean_query, key)
    again = again + shift.gather(2, inside[:, None].expand(rows, heads, -1))
    again = again.masked_fill_(~taken[:, None], -torch.inf)
    peak = torch.cat([exact, mass, again], -1).amax(-1, keepdim=True)
    peak = torch.where(torch.isinf(peak), torch.zeros_like(peak), peak)
    exact, mass, again = ((part - peak).exp() for part in (exact, mass, again))
    # What is left of the chunks once their routed tokens are taken out; rounding must not make it negative.
    rest = (mass.sum(-1) - again.sum(-1)).clamp(min=0.0)
    rest_value = torch.einsum("rhc,rhcd->rhd", mass, tail.value[:, :, :chunks])
    rest_value = rest_value - torch.einsum("rhn,rnd->rhd", again, value)
    rest_value = rest_value.masked_fill(rest[..., None] == 0, 0.0)
    total = exact.sum(-1) + rest
    out = torch.einsum("rhn,rnd->rhd", exact, value) + rest_value
    return (out / total[..., None]).masked_fill(total[..., None] == 0, 0.0)
