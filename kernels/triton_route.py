"""Triton: which groups one query a head is routed to, by one level or two (reference: `route`)."""

from torch import Tensor

from hga_compile.configs.routing import Routing
from hga_compile.kernels.gpu import Spans
from hga_compile.kernels.triton_chunks import kept_spans, sequence_groups
from hga_compile.kernels.triton_mean import mean_masses
from hga_compile.kernels.triton_score import Kept, Masses, group_masses
from hga_compile.kernels.triton_select import select_groups, votes_of
from hga_compile.kernels.triton_turn import turn

__all__ = ["route"]


def route(
    codes: Tensor,
    scales: Tensor | None,
    query: Tensor,
    spans: Spans,
    *,
    routing: Routing,
    scale: float,
    rows_of_span: int,
    parts: Tensor | None,
    centres: Tensor | None = None,
) -> Tensor:
    """List the groups that each row attends to.

    Parameters
    ----------
    codes, scales, parts, centres
        Summaries of groups and of chunks, as `gpu.decode_step` takes them.
    query : Tensor
        ``[rows, heads, dim]``, contiguous.
    spans : Spans
        From `gpu.spans_of`.
    routing : Routing
        Settings of the layer.
    scale : float
        Softmax scale.
    rows_of_span : int
        Rows that a line of the spans is for.

    Returns
    -------
    Tensor
        ``[rows, width]`` int32, ascending; entries past a row's own list are not written.
    """
    heads, most = query.shape[1], routing.vote == "mass_max"

    def masses(groups: int, kept: Kept | None) -> Masses:
        if scales is None:
            return mean_masses(
                codes, query, spans.table, groups=groups, scale=scale, rows_of_span=rows_of_span, kept=kept
            )
        return group_masses(
            codes, scales, turn(query, scale, routing.bits), spans.table, groups=groups,
            group_size=routing.group_size, rows_of_span=rows_of_span, kept=kept, centres=centres,
        )  # fmt: skip

    level = spans.chunks
    if level is None or parts is None:
        votes = votes_of(masses(spans.groups, None), spans.table, heads, most, rows_of_span)
        return select_groups(votes, spans.table, spans.width, rows_of_span)
    scored = mean_masses(
        parts, query, level.table, groups=level.chunks, scale=scale, rows_of_span=rows_of_span,
        parts=routing.chunk_parts,
    )  # fmt: skip
    votes = votes_of(scored, level.table, heads, most, rows_of_span)
    per_chunk = routing.chunk_size // routing.group_size
    kept = Kept(select_groups(votes, level.table, level.width, rows_of_span), per_chunk)
    # Groups of kept chunks are chosen from as if they were all there are.
    own = kept_spans(kept, spans.table, level.table, rows_of_span)
    votes = votes_of(masses(level.groups, kept), own, heads, most, 1)
    chosen = select_groups(votes, own, level.chosen, 1)
    return sequence_groups(chosen, kept, spans.table, spans.width, rows_of_span)
