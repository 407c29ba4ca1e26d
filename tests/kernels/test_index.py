from collections.abc import Sequence

import pytest
import torch
from cases import Inputs, inputs, left_padding, routing
from torch import Tensor

from hga_compile.kernels.index import LayerIndex

EVERYTHING = {"chunk_stage": "on", "tail": "estimate"}


def feed(index: LayerIndex, given: Inputs, steps: Sequence[int], begin: int = 0) -> LayerIndex:
    """Extend an index as `routed_attention` does, step by step."""
    batch, kv_heads = given.key.shape[:2]
    key, value = given.key.flatten(0, 1), given.value.flatten(0, 1)
    query = given.query.reshape(batch * kv_heads, -1, *given.query.shape[2:])
    mask = None if given.mask is None else given.mask.repeat_interleave(kv_heads, 0)
    for step in steps:
        begin, end = begin + step, begin + step
        index.note_queries(query[:, :, end - step : end], end - step, None if mask is None else mask[:, :end])
        index.extend(
            end,
            lambda low, high: (key[:, low:high], value[:, low:high]),
            None if mask is None else mask[:, :end],
        )
    return index


def same(one: LayerIndex, other: LayerIndex, given: Inputs) -> None:
    """Compare two indexes, but for rows whose few tokens have no centre yet: these are dense."""
    for name in ("groups", "chunks", "tail"):
        assert (getattr(one, name) is None) == (getattr(other, name) is None), name
    batch, kv_heads, _, dim = given.key.shape
    ready = torch.ones(batch, dtype=torch.bool) if given.mask is None else given.mask.sum(1) >= 16
    ready = ready.repeat_interleave(kv_heads)
    query = torch.randn(batch * kv_heads, 2, 9, dim)
    pairs = []
    if one.groups is not None and other.groups is not None:
        count = one.groups.groups
        assert count == other.groups.groups
        pairs.append((one.groups.scorer(count)(query, count), other.groups.scorer(count)(query, count)))
    if one.chunks is not None and other.chunks is not None:
        count = one.chunks.chunks
        assert count == other.chunks.chunks
        pairs.append((one.chunks.scores(query, count), other.chunks.scores(query, count)))
    if one.tail is not None and other.tail is not None:
        count = one.tail.chunks
        assert count == other.tail.chunks
        pairs.append((one.tail.mean_query, other.tail.mean_query))
        for name in ("log_mass", "key", "value"):
            pairs.append((getattr(one.tail, name)[:, :, :count], getattr(other.tail, name)[:, :, :count]))
    for left, right in pairs:
        torch.testing.assert_close(left[ready], right[ready])


MASKS = {
    "whole": None,
    "left": left_padding([130, 60], 130),
    "a late row": left_padding([130, 9], 130),
    "gaps": torch.rand(2, 130, generator=torch.Generator().manual_seed(3)) < 0.5,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("steps", [[16] + [1] * 114, [15, 1, 1, 50, 63], [100, 30], [5, 5, 5, 5, 110]])
def test_does_not_depend_on_how_the_sequence_was_cut(steps: list[int], mask: Tensor | None) -> None:
    setting, given = routing(**EVERYTHING), inputs(batch=2, mask=mask)
    same(feed(LayerIndex(setting), given, steps), feed(LayerIndex(setting), given, [130]), given)


def test_nothing_is_made_before_the_centre_is_known() -> None:
    index = feed(LayerIndex(routing(**EVERYTHING)), inputs(), [15])
    assert index.groups is index.chunks is index.tail is None
    assert index.nbytes() == 0 and index.bytes_per_token() == 0
    feed(index, inputs(), [1], 15)
    assert index.groups is not None and index.groups.groups == 4


def test_only_whole_groups_and_chunks_are_summarised() -> None:
    index = feed(LayerIndex(routing(**EVERYTHING)), inputs(), [47])
    assert index.groups is not None and index.chunks is not None and index.tail is not None
    assert (index.groups.groups, index.chunks.chunks, index.tail.chunks) == (11, 2, 2)


def test_chunks_and_tail_are_made_only_where_asked_for() -> None:
    given = inputs()
    index = feed(LayerIndex(routing(chunk_stage="auto", auto_chunk_tokens=120)), given, [119])
    assert index.chunks is None and index.tail is None
    feed(index, given, [2], 119)
    assert index.chunks is not None and index.chunks.chunks == 7
    assert feed(LayerIndex(routing()), given, [130]).chunks is None


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("length", [1, 8, 15, 16, 17, 31, 50, 80, 129])
def test_going_back_forgets_what_came_after(length: int, mask: Tensor | None) -> None:
    setting, given = routing(**EVERYTHING), inputs(batch=2, mask=mask)
    other = inputs(batch=2, seed=5)
    joined = Inputs(
        given.query,
        torch.cat([given.key[:, :, :length], other.key[:, :, length:]], 2),
        torch.cat([given.value[:, :, :length], other.value[:, :, length:]], 2),
        1.0,
        mask,
    )
    index = feed(LayerIndex(setting), given, [130])
    index.truncate(length)
    feed(index, joined, [130 - length], length)
    same(index, feed(LayerIndex(setting), joined, [length, 130 - length]), joined)


def test_going_back_to_the_start_forgets_the_queries_too() -> None:
    setting, given, other = routing(**EVERYTHING), inputs(), inputs(seed=5)
    for tokens in (10, 130):
        index = feed(LayerIndex(setting), given, [tokens])
        index.truncate(0)
        same(feed(index, other, [130]), feed(LayerIndex(setting), other, [130]), other)


def test_a_step_run_twice_counts_once() -> None:
    setting, given = routing(**EVERYTHING), inputs()
    index = LayerIndex(setting)
    for begin, end in ((0, 7), (7, 12), (12, 100), (100, 130)):
        for _ in range(2):
            if begin:
                index.truncate(begin)
            feed(index, given, [end - begin], begin)
    same(index, feed(LayerIndex(setting), given, [130]), given)


@pytest.mark.parametrize("mask", [MASKS["whole"], MASKS["left"]], ids=["whole", "left"])
def test_rows_can_be_selected_at_any_time(mask: Tensor | None) -> None:
    setting, given = routing(**EVERYTHING), inputs(batch=2, mask=mask)
    batch = torch.tensor([1, 0, 1])
    chosen = Inputs(
        given.query[batch], given.key[batch], given.value[batch], 1.0, None if mask is None else mask[batch]
    )
    rows = (batch[:, None] * 2 + torch.arange(2)).flatten()
    for at in (10, 20, 90):
        index = feed(LayerIndex(setting), given, [at])
        index.select_rows(rows)
        feed(index, chosen, [130 - at], at)
        same(index, feed(LayerIndex(setting), chosen, [at, 130 - at]), chosen)


@pytest.mark.parametrize("at", [10, 20, 130])
def test_an_emptied_index_becomes_the_same_again(at: int) -> None:
    setting, given = routing(**EVERYTHING), inputs(batch=2, mask=MASKS["left"])
    index = feed(LayerIndex(setting), given, [at])
    again = index.emptied()
    assert again.nbytes() == 0
    if at < 130:
        feed(index, given, [130 - at], at)
        feed(again, given, [130 - at], at)
    else:
        # Nothing new: made again from what is stored.
        again.truncate(130)
        key, value = given.key.flatten(0, 1), given.value.flatten(0, 1)
        again.extend(
            130, lambda low, high: (key[:, low:high], value[:, low:high]), given.mask.repeat_interleave(2, 0)
        )
    same(index, again, given)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_key_stays_out_of_the_centre(broken: float) -> None:
    given = inputs()
    key = given.key.clone()
    key[0, 0, 3, 2] = broken
    index = feed(LayerIndex(routing()), Inputs(given.query, key, given.value, 1.0), [130])
    want = torch.cat([given.key[0, 0, :3], given.key[0, 0, 4:16]]).mean(0)
    torch.testing.assert_close(index.groups.centre[0], want)
    assert torch.isfinite(index.groups.scales[0, :128]).sum() == 127


def test_a_broken_query_stays_out_of_the_mean() -> None:
    setting, given = routing(**EVERYTHING), inputs()
    query = given.query.clone()
    query[0, 0, 3, 2] = torch.nan
    index = feed(LayerIndex(setting), Inputs(query, given.key, given.value, 1.0), [130])
    assert torch.isfinite(index.tail.mean_query).all()


def test_counts_its_bytes() -> None:
    index = feed(LayerIndex(routing(**EVERYTHING)), inputs(), [130])
    parts = (index.groups, index.chunks, index.tail)
    assert index.nbytes() == sum(part.nbytes() for part in parts)
    assert index.bytes_per_token() == sum(part.bytes_per_token() for part in parts)
