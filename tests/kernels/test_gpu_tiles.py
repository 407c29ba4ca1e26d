"""The Triton kernels of a prefill in tiles against their references: on a GPU, or in Triton's interpreter."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from cases import inputs, left_padding, routing, run_steps, run_whole
from torch import Tensor

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import Routing
from hga_compile.kernels import coarse, gpu_tiles, staging
from hga_compile.kernels.lowbit import LowBitSummary, encode_keys
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.scoring import Scoring
from hga_compile.kernels.tail import TailSummary, attend_masked_with_tail
from hga_compile.kernels.tiles import Tiles, plan_tiles, shared_groups
from hga_compile.store.pages import Pages

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available()
large = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
# The interpreter has no bfloat16: numpy knows none.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


def interpreter_counts() -> bool:
    """Say whether the interpreter runs loops to a count known at run time: old ones need old numpy."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)


@pytest.fixture
def place() -> torch.device:
    if not CUDA and not INTERPRETED:
        pytest.skip("needs a CUDA device (the last test runs some of these in Triton's interpreter)")
    if not CUDA and not interpreter_counts():
        pytest.skip("this Triton's interpreter does not run loops to a count known at run time")
    torch.manual_seed(0)
    return torch.device("cuda", 0) if CUDA else torch.device("cpu")


def spread(tensor: Tensor) -> Tensor:
    """The same values with the heads between tokens and channels, as models make them."""
    return tensor.transpose(-2, -3).contiguous().transpose(-2, -3)


def keep(lists: dict[int, Tensor]) -> Callable[[int, Tensor], None]:
    """Put the lists of a run of tiles into `lists`, by tile."""

    def listed(number: int, groups: Tensor) -> None:
        lists.update({number + place: part.clone() for place, part in enumerate(groups)})

    return listed


def marks_of(tiles: Tiles, lists: dict[int, Tensor], number: int, kv_heads: int) -> Tensor:
    """Mark the groups on a tile's lists, ``[rows, groups]``; checks that they ascend."""
    chosen = lists[number]
    marks = torch.zeros(len(chosen), int(tiles.last[0, number]), dtype=torch.bool, device=chosen.device)
    for row, listed in enumerate(chosen.long()):
        listed = listed[: int(tiles.listed[row // kv_heads if len(tiles.last) > 1 else 0, number])]
        assert bool((listed[1:] > listed[:-1]).all())
        marks[row, listed] = True
    return marks


def check(
    place: torch.device,
    batch: int = 1,
    kv_heads: int = 2,
    heads: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    tokens: int = 200,
    first: int = 70,
    tile: int = 16,
    dtype: torch.dtype = torch.float32,
    size: int = 4,
    bits: int = 2,
    vote: str = "mass_sum",
    fraction: float = 0.2,
    summary: str = "lowbit",
    scoring: Scoring | None = None,
    pads: list[int] | None = None,
    dense_below: int = 0,
    chunk: int | None = None,
    parts: int = 1,
    chunk_tokens: int = 64,
    centre: str = "first",
) -> None:
    """Run a prefill; each tile is routed to groups that no other beats, what it attends to is exact."""
    scoring, rows, scale = scoring or Scoring(), batch * kv_heads, dim**-0.5
    setting = Routing(
        group_size=size, bits=bits, vote=vote, budget=Budget(tokens=8), window=Window(tokens=6),
        prefill_budget=Budget(fraction=fraction, tokens=24), dense_below=dense_below, centre_tokens=8,
        chunk_stage="on" if chunk else "off", chunk_size=chunk or 64, chunk_parts=parts,
        chunk_budget=Budget(tokens=chunk_tokens), centre=centre,
    )  # fmt: skip
    key, value = (spread(torch.randn(rows, tokens, part, device=place).to(dtype)) for part in (dim, v_dim))
    if centre == "block":
        drift = torch.linspace(0, 4, tokens, device=place)[:, None] * torch.randn(rows, 1, dim, device=place)
        key = (key + drift).to(dtype)
    query = spread(2 * torch.randn(batch, kv_heads, heads, tokens - first, dim, device=place)).to(dtype)
    starts = None if pads is None else torch.tensor(pads)[:, None]
    mask = None if starts is None else torch.arange(tokens) >= starts
    tiles = plan_tiles(setting, first, tokens - first, mask, tile)
    known, turn = tiles.plan.last_window, summary == "lowbit"
    rotate = rotation(dim, place) if turn else torch.eye(dim, device=place)
    if turn:
        here = LowBitSummary(setting, torch.zeros(rows, dim, device=place))
        centres, moved = here.centres, torch.zeros(1, device=place)
        if centres is not None:
            centres.append(key[:, slice(*centres.missing(tokens))], None)
            moved = centres.of_tokens(0, tokens)
        codes, scales = encode_keys(key.float() @ rotate - moved, bits)
        here._bytes_last, here.groups = False, known
        here._codes, here.scales = codes, scales
        wide = torch.full((rows, tokens + 3, codes.shape[1]), 255, dtype=torch.uint8, device=place)
        wide[:, :tokens] = codes.transpose(1, 2)
        begun = None
        if starts is not None:
            begun = (starts[:, 0] // size * size).clamp(max=known * size - size).repeat_interleave(kv_heads)
            begun = begun.to(place)
        reference = here.tile_keys(known, begun, False)
        made = gpu_tiles.tile_keys(
            wide.transpose(1, 2), scales, known, size, bits, dim, begun,
            None if centres is None else centres.values,
        )  # fmt: skip
    else:
        means = key.float()[:, : known * size].unflatten(1, (-1, size)).mean(2).to(torch.float16)
        there, here = gpu_tiles.coarse_means(means, known), coarse.exact(means.float())
        made, reference = coarse.TileKeys(there, there), coarse.TileKeys(here, here)
    assert (tiles.chunks is None) == (chunk is None)
    if tiles.chunks is not None:
        count = int(tiles.chunks.chunks.max()) * parts
        means = key.float()[:, : count * (chunk or 1) // parts].unflatten(1, (count, -1)).mean(2)
        made = replace(made, chunks=gpu_tiles.coarse_means(means.to(torch.float16), count))
        reference = replace(reference, chunks=coarse.exact(means.to(torch.float16).float()))
    for there, want in ((made.means, reference.means), (made.anchors, reference.anchors)):
        assert bool((there.values[..., dim:].float() == 0).all())
        count = min(there.steps.shape[1], want.steps.shape[1])
        torch.testing.assert_close(
            (there.values[..., :dim].float() * there.steps[..., None])[:, :count],
            (want.values * want.steps[..., None])[:, :count],
        )

    lists: dict[int, Tensor] = {}
    out = gpu_tiles.prefill_tiles(
        gpu_tiles.whole(key, value), made, query, gpu_tiles.tile_spans(tiles, turn, starts, place), tiles,
        first=first, routing=setting, scale=scale, scoring=scoring, listed=keep(lists),
    )  # fmt: skip
    assert out.dtype == dtype and out.shape == (batch, kv_heads, heads, tokens - first, v_dim)
    straight = (query.float() * scale).flatten(0, 1)
    turned = straight @ rotate
    real = None
    if mask is not None:
        groups = tokens // size
        real = (
            mask.repeat_interleave(kv_heads, 0)[:, : groups * size]
            .unflatten(-1, (groups, size))
            .any(-1)
            .to(place)
        )
    attended = differing = routed = 0
    for number in range(tiles.number):
        begin = max(0, (tiles.first + number) * tile - first)
        stop = min(tokens - first, (tiles.first + number + 1) * tile - first)
        end = first + stop
        marks = marks_of(tiles, lists, number, kv_heads)
        wanted = shared_groups(
            turned[:, :, begin:stop], reference, tiles, number, vote, real, straight[:, :, begin:stop]
        ).expand(rows, -1)
        token = torch.arange(end, device=place)
        visible = token <= torch.arange(first + begin, end, device=place)[:, None]
        visible = (
            visible[None]
            if mask is None
            else visible & mask.to(place).repeat_interleave(kv_heads, 0)[:, None, :end]
        )
        seen = torch.nn.functional.pad(visible.any(1), (0, -end % size)).unflatten(-1, (-1, size)).any(-1)
        differing += int(((marks != wanted) & seen).sum())
        routed += int((wanted & seen).sum())
        allowed = marks.repeat_interleave(size, -1)[:, None, :end] & visible
        attended += int(allowed.sum())
        parts = [query.flatten(0, 1)[:, :, begin:stop], key[:, None, :end], value[:, None, :end]]
        logits = None if scoring.sinks is None else scoring.sinks.view(kv_heads, heads).repeat(batch, 1)
        want, eager = (
            attention(*(part.to(kind) for part in parts), allowed, scale, scoring.softcap, logits)
            for kind in (torch.float64, dtype)
        )
        got = out.flatten(0, 1)[:, :, begin:stop].double()
        bound = (eager.double() - want).abs().max() * 1.5 + 4 * torch.finfo(
            torch.float32
        ).eps * want.abs().max()
        assert (got - want).abs().max() <= bound
    # Rounding of the 8-bit floats may change which of two groups with nearly equal votes is taken.
    assert differing <= 2 + 0.02 * routed
    assert tiles.attended(first, tokens - first, starts) * (rows // len(tiles.last)) == attended


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """Attention to allowed tokens in the dtype that it is given."""
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed[:, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores)[..., None, None].expand(*scores.shape[:3], 1)], -1)
    weight = torch.softmax(scores, -1).nan_to_num()
    return (weight if sinks is None else weight[..., :-1]) @ value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (20, 12), (64, 64)])
def test_a_prefill_is_exact_attention_to_the_groups_with_the_most_votes(place, dtype, dim, v_dim):
    check(place, dtype=dtype, dim=dim, v_dim=v_dim, tokens=150)


@pytest.mark.parametrize(("bits", "vote"), [(1, "mass_sum"), (4, "mass_max"), (8, "mass_sum")])
def test_every_width_of_codes_and_every_vote(place, bits, vote):
    check(place, bits=bits, vote=vote, tokens=150)


@pytest.mark.parametrize(
    "shape",
    [{}, {"size": 1}, {"size": 32}, {"bits": 4, "vote": "mass_max", "dim": 20}, {"chunk": 16, "parts": 2}],
    ids=str,
)
def test_codes_about_centres_of_blocks(place, shape):
    check(place, tokens=290, first=200, centre="block", fraction=0.3, **shape)


def test_centres_of_rows_with_padding(place):
    check(place, batch=3, pads=[0, 75, 140], tokens=290, first=200, centre="block")


@pytest.mark.parametrize("summary", ["lowbit", "mean"])
@pytest.mark.parametrize("size", [1, 16])
def test_every_group_size_and_summary(place, size, summary):
    check(place, size=size, summary=summary, tokens=150, fraction=0.4)


@pytest.mark.parametrize("summary", ["lowbit", "mean"])
@pytest.mark.parametrize(
    ("chunk", "parts", "vote"), [(16, 1, "mass_sum"), (16, 4, "mass_max"), (24, 3, "mass_sum")]
)
def test_groups_are_chosen_inside_the_chunks_with_the_most_votes(place, summary, chunk, parts, vote):
    check(place, summary=summary, chunk=chunk, parts=parts, vote=vote, tokens=240)


def test_chunks_of_rows_with_padding(place):
    check(place, batch=3, pads=[0, 75, 140], chunk=16, parts=2, chunk_tokens=16)


@pytest.mark.parametrize(("heads", "tile"), [(1, 64), (8, 16), (16, 5)])
def test_every_number_of_heads_and_queries_in_a_tile(place, heads, tile):
    check(place, heads=heads, tile=tile, tokens=150)


def test_rows_with_padding_soft_cap_and_sinks(place):
    check(place, batch=3, pads=[0, 75, 140], scoring=Scoring(5.0, torch.randn(6, device=place)))


def test_a_prompt_from_its_beginning_with_dense_queries(place):
    check(place, first=0, dense_below=60)


@large
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "heads"), [(64, 3), (80, 1), (96, 4), (128, 8), (256, 2)])
def test_the_sizes_that_models_have(place, dtype, dim, heads):
    check(place, dim=dim, v_dim=dim, heads=heads, tokens=2500, first=300, tile=64, dtype=dtype, fraction=0.1)


@large
@pytest.mark.parametrize(("dim", "heads"), [(64, 3), (128, 8), (256, 2)])
def test_the_setting_of_the_paper(place, dim, heads):
    check(
        place, dim=dim, v_dim=dim, heads=heads, tokens=2500, first=300, tile=64, dtype=torch.bfloat16,
        fraction=0.1, summary="mean", size=16, chunk=64, chunk_tokens=512,
    )  # fmt: skip


@large
def test_rows_far_apart_in_memory(place):
    tokens, dim, apart = 1100, 64, 2**21
    setting = Routing(prefill_budget=Budget(tokens=64), budget=Budget(tokens=8), dense_below=0)
    near = torch.randn(2, tokens, dim, device=place, dtype=torch.bfloat16)
    far = torch.empty(tokens * apart, device=place, dtype=torch.bfloat16).as_strided(
        (2, tokens, dim), (dim, apart, 1)
    )
    far.copy_(near)
    codes, scales = encode_keys(near.float() @ rotation(dim, place), 2)
    tiles = plan_tiles(setting, 0, tokens, None, 64)
    made = gpu_tiles.tile_keys(
        codes.transpose(1, 2).contiguous().transpose(1, 2), scales, tiles.plan.last_window, 4, 2, dim, None
    )
    query = torch.randn(1, 2, 3, tokens, dim, device=place, dtype=torch.bfloat16)
    spans = gpu_tiles.tile_spans(tiles, True, None, place)
    want, got = (
        gpu_tiles.prefill_tiles(
            gpu_tiles.whole(keys, keys), made, query, spans, tiles, first=0, routing=setting, scale=0.125
        )
        for keys in (near, far)
    )
    assert torch.equal(got, want)


@large
def test_runs_of_tiles_are_joined(place, monkeypatch):
    monkeypatch.setattr(gpu_tiles, "_RUN_BYTES", 12 * 2 * 400 * 3)
    check(place, tokens=1600, first=0, tile=32, dtype=torch.float16, dense_below=100)


@pytest.mark.parametrize(
    "changes", [{"summary": "mean", "chunk_stage": "on"}, {"prefill_tile": 5, "bits": 8}]
)
@pytest.mark.parametrize("pads", [None, [150, 101]])
def test_a_tail_is_estimated_for_each_query(place, changes, pads):
    setting = routing(
        prefill_tile=16, prefill_budget=Budget(fraction=0.2, tokens=32), tail="estimate"
    ).model_copy(update=changes)
    mask = None if pads is None else left_padding(pads, 150)
    given = inputs(tokens=150, batch=2, dim=20, v_dim=12, mask=mask).to(place)
    kept = 1 if mask is None else mask.to(place)[:, None, :, None]
    made, want, dropped = (
        run_whole(one, given, kernels=kernels) * kept
        for one, kernels in (
            (setting, "triton"),
            (setting, "reference"),
            (setting.model_copy(update={"tail": "drop"}), "reference"),
        )
    )
    # A group whose vote is nearly another's may be taken in its place, for one tile of a head.
    same = ((made - want).abs() < 1e-4).float().mean()
    assert same > 0.85 and same > ((dropped - want).abs() < 1e-4).float().mean() + 0.1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tail": "estimate"}, {"prefill": "dense"}])
def test_a_history_that_is_read_row_by_row_gives_the_same_bits(place, monkeypatch, changes, padded):
    setting = routing(prefill_tile=16, prefill_budget=Budget(fraction=0.2, tokens=32), **changes)
    mask = left_padding([150, 115], 150) if padded else None
    given, asked, read = inputs(tokens=150, batch=2, mask=mask).to(place), [], Pages.read
    want = run_steps(setting, given, [70, 80], kernels="triton")

    def noted(self, begin, end, into=None, rows=None):
        if begin == 0:  # not what the index lacks
            asked.append(rows)
        return read(self, begin, end, into, rows)

    monkeypatch.setattr(Pages, "read", noted)
    rows = given.key.shape[0] * given.key.shape[1]
    row_bytes = 150 * 2 * given.key.shape[3] * given.key.element_size()
    for at_once in (1, rows - 1):
        asked.clear()
        monkeypatch.setattr(staging, "STAGED", at_once * row_bytes)
        assert torch.equal(run_steps(setting, given, [70, 80], kernels="triton"), want)
        parts = [slice(begin, min(rows, begin + at_once)) for begin in range(0, rows, at_once)]
        assert asked == parts


@large
@pytest.mark.parametrize(
    ("dtype", "dim", "heads"),
    [
        (torch.bfloat16, 64, 3),
        (torch.bfloat16, 128, 8),
        (torch.float16, 80, 1),
        (torch.bfloat16, 256, 2),
        (torch.float32, 128, 2),
        (torch.float32, 256, 1),
    ],
)
def test_a_tail_of_the_sizes_that_models_have(place, dtype, dim, heads):
    """What is attended to exactly is what was listed; the rest of the complete chunks is estimated."""
    tokens, size, first, tile = 1500, 64, 200, 64
    setting = Routing(
        prefill_budget=Budget(fraction=0.1, tokens=128), budget=Budget(tokens=64), dense_below=0
    )
    key, value = (torch.randn(2, tokens, dim, device=place).to(dtype) for _ in range(2))
    query = torch.randn(1, 2, heads, tokens - first, dim, device=place).to(dtype)
    tail = TailSummary(size, 0.1 * torch.randn(2, heads, dim, device=place), dim)
    whole = tokens // size * size
    tail.append(key[:, :whole], value[:, :whole])
    codes, scales = encode_keys(key.float() @ rotation(dim, place), 2)
    tiles = plan_tiles(setting, first, tokens - first, None, tile)
    made = gpu_tiles.tile_keys(
        codes.transpose(1, 2).contiguous().transpose(1, 2), scales, tiles.plan.last_window, 4, 2, dim, None
    )
    lists: dict[int, Tensor] = {}
    out = gpu_tiles.prefill_tiles(
        gpu_tiles.whole(key, value), made, query, gpu_tiles.tile_spans(tiles, True, None, place), tiles,
        first=first, routing=setting, scale=dim**-0.5, tail=tail, listed=keep(lists),
    )  # fmt: skip
    for number in range(tiles.number):
        begin = max(0, (tiles.first + number) * tile - first)
        stop = min(tokens - first, (tiles.first + number + 1) * tile - first)
        end = first + stop
        position = torch.arange(first + begin, end, device=place)[:, None]
        token = torch.arange(end, device=place)
        marks = marks_of(tiles, lists, number, 2).repeat_interleave(4, -1)[:, None, :end]
        counted = (token // size + 1) * size <= position + 1
        want = attend_masked_with_tail(
            query.flatten(0, 1)[:, :, begin:stop].float() * dim**-0.5, key[:, :end], value[:, :end],
            marks & (token <= position), counted & ~marks, tail,
        )  # fmt: skip
        got = out.flatten(0, 1)[:, :, begin:stop].float()
        # tf32 and the dtype of the result: a few units in the last place of what is summed up.
        bound = 1e-4 if dtype == torch.float32 else 0.02
        assert float((got - want).abs().max()) <= bound * float(want.abs().max())


@large
@pytest.mark.parametrize("changes", [{}, {"summary": "mean"}, {"chunk_stage": "on"}, {"tail": "estimate"}])
def test_the_ops_give_what_they_give_on_a_cpu(place, changes):
    setting = routing(prefill_tile=16, prefill_budget=Budget(fraction=0.2, tokens=32), **changes)
    given = inputs(tokens=300, batch=2, mask=left_padding([300, 215], 300))
    real = given.mask[:, None, :, None]
    for steps in (None, [100, 200]):
        here, there = (
            (run_whole(setting, one) if steps is None else run_steps(setting, one, steps)).cpu()
            for one in (given, given.to(place))
        )
        difference = ((here - there).abs() * real).amax((1, 2, 3))
        # A group whose vote is nearly another's may be taken in its place.
        assert float((difference > 1e-4).float().mean()) <= 0.5
        assert float(((here - there).abs() * real > 1e-4).float().mean()) < 0.02


def test_a_broken_key_is_attended_to(place):
    setting = Routing(
        budget=Budget(tokens=8), prefill_budget=Budget(tokens=48), dense_below=0, centre_tokens=8
    )
    key, value = torch.randn(2, 1, 160, 16, device=place).unbind()
    query = torch.randn(1, 1, 2, 160, 16, device=place)
    key[0, 61, 3] = math.nan
    codes, scales = encode_keys(key @ rotation(16, place), 2)
    scales[0, 61] = math.nan
    tiles = plan_tiles(setting, 0, 160, None, 16)
    lists: dict[int, Tensor] = {}
    made = gpu_tiles.tile_keys(codes.transpose(1, 2).contiguous().transpose(1, 2), scales, 38, 4, 2, 16, None)
    gpu_tiles.prefill_tiles(
        gpu_tiles.whole(key, value), made, query, gpu_tiles.tile_spans(tiles, True, None, place), tiles,
        first=0, routing=setting, scale=0.25, listed=keep(lists),
    )  # fmt: skip
    for number in range(6, 10):
        assert bool(marks_of(tiles, lists, number, 1)[0, 61 // 4])


@pytest.mark.slow
@pytest.mark.skipif(CUDA or INTERPRETED, reason="runs directly")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_kernels_in_the_interpreter():
    if not interpreter_counts():
        pytest.skip("this Triton's interpreter does not run loops to a count known at run time")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        capture_output=True, text=True, env=environment, timeout=900, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
