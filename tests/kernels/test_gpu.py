"""The Triton kernels against their references: on a GPU, and a small set in Triton's interpreter on a CPU."""

import math
from importlib.util import find_spec

import pytest
import torch
from cases import inputs, left_padding, routing, run_steps
from gpu_cases import CUDA, DTYPES, INTERPRETED, attention, coded, interpret, large, pages_of, token_marks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels import call as call_module
from hga_compile.kernels import decode, dispatch, gpu, lowbit
from hga_compile.kernels import steps as steps_module
from hga_compile.kernels.launch import Score, Select, trying
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import _STEP, encode_keys
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.route import merge_votes
from hga_compile.kernels.scoring import Scoring
from hga_compile.store import pages as pages_module
from hga_compile.store.host_range import HostRange
from hga_compile.store.pages import Pages


def check(
    place: torch.device,
    rows: int = 2,
    heads: int = 3,
    dim: int = 16,
    v_dim: int = 16,
    tokens: int = 500,
    dtype: torch.dtype = torch.float32,
    size: int = 4,
    bits: int = 2,
    vote: str = "mass_sum",
    fraction: float = 0.1,
    scoring: Scoring | None = None,
    home: str | None = None,
    pads: list[int] | None = None,
) -> None:
    """Run a step; what it routes to is what the reference would, what it attends to is exact."""
    scoring = scoring or Scoring()
    routing = Routing(
        group_size=size, bits=bits, vote=vote, budget=Budget(fraction=fraction, tokens=max(24, 3 * size)),
        dense_below=0, centre_tokens=8,
    )  # fmt: skip
    key = torch.randn(rows, tokens, dim, device=place).to(dtype)
    value = torch.randn(rows, tokens, v_dim, device=place).to(dtype)
    query = (2 * torch.randn(rows, heads, dim, device=place)).to(dtype)
    pages, (codes, scales, keys) = pages_of(key, value, size, home), coded(key, bits)
    starts = torch.tensor(pads or [0])[:, None]
    mask = torch.arange(tokens) >= starts
    plan = plan_queries(routing, tokens - 1, 1, mask if pads else None)
    lines = len(plan.window)
    spans = gpu.spans_of(routing, plan, starts if pads else None, place)
    scale = dim**-0.5
    out, groups = gpu.decode_step(
        pages.buffer, codes, scales, query, spans, length=tokens, routing=routing, scale=scale,
        scoring=scoring, kv_heads=rows // lines,
    )  # fmt: skip
    assert out.dtype == dtype and out.shape == (rows, heads, v_dim)
    marks = token_marks(groups, spans.listed(rows), size, tokens, spans.starts(rows))
    real = int(marks[:: rows // lines].sum())
    assert real == spans.attended

    scores = (query.double() * scale) @ rotation(dim, place).double() @ keys.transpose(1, 2)
    known = plan.last_window
    votes = scores[:, :, : known * size].unflatten(-1, (known, size))[:, :, None]
    number = torch.arange(known)
    seen = ((number >= plan.sink_start) & (number < plan.window)).repeat_interleave(rows // lines, 0)
    votes = merge_votes(votes.clone(), seen[:, None].to(place), vote)[:, 0]
    for row in range(rows):
        line = row // (rows // lines)
        first, window = int(plan.sink_end[line]), int(plan.window[line])
        wanted = int(spans.table[line, 3])
        of_row = marks[row].unflatten(0, (-1, size)).any(1) if tokens % size == 0 else None
        if of_row is None:
            of_row = torch.nn.functional.pad(marks[row], (0, -tokens % size)).unflatten(0, (-1, size)).any(1)
        chosen = of_row[first:window]
        assert int(chosen.sum()) == wanted
        assert bool(of_row[window:].all()) and bool(of_row[int(plan.sink_start[line]) : first].all())
        if 0 < wanted < window - first:
            best = votes[row, first:window]
            # Which of two groups with nearly equal votes is taken does not matter here.
            assert float(best[chosen].min()) >= float(best[~chosen].max()) * (1 - 2e-3)

    want = attention(query.double(), key.double(), value.double(), marks, scale, scoring)
    eager = attention(query, key, value, marks, scale, scoring)
    bound = (eager.double() - want).abs().max() * 1.5 + 4 * torch.finfo(torch.float32).eps * want.abs().max()
    assert (out.double() - want).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (20, 12), (64, 64)])
def test_a_step_is_exact_attention_to_the_groups_with_the_most_votes(place, dtype, dim, v_dim):
    check(place, dtype=dtype, dim=dim, v_dim=v_dim)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("vote", ["mass_sum", "mass_max"])
def test_every_width_of_codes_and_every_vote(place, bits, vote):
    check(place, bits=bits, vote=vote)


@pytest.mark.parametrize(("bits", "heads"), [(2, 3), (8, 16)])
def test_blocks_that_are_summed_together_give_the_same_groups(place, bits, heads):
    with trying(Score(64, 4, 4)):
        check(place, bits=bits, heads=heads)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_every_group_size(place, size):
    check(place, size=size, tokens=700)


@pytest.mark.parametrize("heads", [1, 8, 16])
def test_every_number_of_heads(place, heads):
    check(place, heads=heads)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_soft_cap_and_sinks(place, softcap, sinks):
    logits = torch.randn(6, device=place) if sinks else None
    check(place, scoring=Scoring(softcap, logits))


def test_rows_with_padding_have_spans_of_their_own(place):
    check(place, rows=6, pads=[0, 137, 451])


def test_a_row_of_padding_gives_zero(place):
    routing = Routing(dense_below=0, centre_tokens=8, budget=Budget(fraction=0.1))
    key, value = torch.randn(2, 2, 300, 16, device=place).unbind()
    starts = torch.tensor([[0], [300]])
    plan = plan_queries(routing, 299, 1, torch.arange(300) >= starts)
    codes, scales, _ = coded(key, 2)
    out, _ = gpu.decode_step(
        pages_of(key, value, 4).buffer, codes, scales, torch.randn(2, 2, 16, device=place),
        gpu.spans_of(routing, plan, starts, place), length=300, routing=routing, scale=1.0, kv_heads=1,
    )  # fmt: skip
    assert bool((out[1] == 0).all()) and bool((out[0] != 0).all())


@settings(max_examples=8 if not CUDA else 40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 5, 9]),
    tokens=st.integers(60, 900),
    fraction=st.sampled_from([0.02, 0.2, 0.6]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(place, rows, heads, tokens, fraction, seed):
    torch.manual_seed(seed)
    check(place, rows=rows, heads=heads, tokens=tokens, fraction=fraction)


def choose(
    place: torch.device, votes: Tensor, count: int, sinks: int = 0, window: int = 0
) -> list[list[int]]:
    """Run the selection alone: groups behind the sinks, and the window after all groups."""
    from hga_compile.kernels.triton_select import Votes, select_groups

    rows, groups = votes.shape
    held = votes.to(place).clone()
    held[:, :sinks] = -1.0
    table = torch.tensor([[0, sinks, groups, count, groups + window, 0]], dtype=torch.int32, device=place)
    return select_groups(Votes(held), table, sinks + count + window, rows).tolist()


def best_of(votes: Tensor, count: int, sinks: int = 0) -> list[int]:
    """Return what must be chosen of one row's votes, of equals the first."""
    known = votes.tolist()
    return sorted(sorted(range(sinks, len(known)), key=lambda group: (-known[group], group))[:count])


# One program a row in registers; several, with and without room for all near the least; one, part by part.
WAYS = {
    "whole": (Select(whole=2**11), 8),
    "split": (Select(whole=64, part=64, held=2**10), 8),
    "crowded": (Select(whole=64, part=64, held=16), 8),
    "in turn": (Select(whole=64, part=64, held=2**8), 2),
    "in turn, crowded": (Select(whole=64, part=64, held=16), 2),
}


@pytest.fixture(params=list(WAYS))
def way(request, monkeypatch):
    """Run the selection in one of its ways."""
    from hga_compile.kernels import triton_select

    parameters, programs = WAYS[request.param]
    monkeypatch.setattr(triton_select, "_PROGRAMS", programs)
    monkeypatch.setattr(triton_select, "_MOST_PART", 64)
    with trying(parameters):
        yield


@pytest.mark.parametrize("count", [0, 1, 7, 60, 197])
def test_selection_is_top_k_of_which_equals_come_first(place, way, count):
    votes = torch.randint(0, 40, (2, 200)) / 7
    got = choose(place, votes, count, sinks=3, window=5)
    for row in range(2):
        assert got[row] == [0, 1, 2, *best_of(votes[row], count, 3), *range(200, 205)]


HARD = {
    "equal": lambda: torch.full((300,), 0.25),
    "zero": lambda: torch.zeros(300),
    "infinite": lambda: torch.full((300,), math.inf),
    "broken": lambda: torch.rand(300).index_fill(0, torch.tensor([7, 120, 250]), math.inf),
    "two": lambda: torch.tensor([1.0, 1.0 + 2**-23]).repeat(150),
    "near": lambda: 1.0 + torch.randint(0, 300, (300,)) * 2.0**-23,
    "denormal": lambda: torch.randint(0, 300, (300,)) * 1e-44,
    "tiny": lambda: torch.rand(300) * 1e-30,
    "huge": lambda: torch.rand(300) * 1e30,
    "wide": lambda: torch.exp(20 * torch.randn(300)),
    "log-normal": lambda: torch.exp(2 * torch.randn(300)) / 1000,
    "ascending": lambda: torch.arange(300.0),
    "clumped": lambda: torch.cat([torch.rand(200), 0.9 + torch.rand(70) / 100, torch.rand(30)]),
    "one": lambda: torch.zeros(300).index_fill(0, torch.tensor([299]), 1.0),
}


@pytest.mark.parametrize("votes", list(HARD))
@pytest.mark.parametrize("count", [9, 150, 300])
def test_no_votes_are_too_hard(place, way, votes, count):
    given = HARD[votes]()
    assert choose(place, given[None], count) == [best_of(given, count)]


def test_the_same_votes_may_be_selected_by_again(place, way):
    from hga_compile.kernels.triton_bins import count_votes
    from hga_compile.kernels.triton_select import Votes, select_groups

    votes = torch.rand(2, 200)
    table = torch.tensor([[0, 0, 200, 40, 203, 0]], dtype=torch.int32, device=place)
    given = votes.to(place)
    counted = Votes(given, count_votes(given, table, 2, 1024.0))
    first, second = (select_groups(counted, table, 43, 2).tolist() for _ in range(2))
    want = [[*best_of(row, 40), 200, 201, 202] for row in votes]
    assert first == second == want


def test_names_are_listed_of_candidates(place, way):
    from hga_compile.kernels.triton_select import Votes, select_groups

    votes = torch.rand(2, 200)
    votes[:, 150:] = -1.0
    names = 1000 + 3 * torch.arange(200, dtype=torch.int32).repeat(2, 1)
    table = torch.tensor([[0, 2, 5000, 40, 5003, 0]], dtype=torch.int32, device=place)
    got = select_groups(Votes(votes.to(place)), table, 45, 2, names.to(place)).tolist()
    for row in range(2):
        chosen = [1000 + 3 * group for group in best_of(votes[row], 40)]
        assert got[row] == [0, 1, *chosen, 5000, 5001, 5002]


@pytest.mark.parametrize("count", [1, 20, 150])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 2.0, 8.0])
def test_votes_are_counted_by_size(place, count, spread):
    """Fewer than are chosen lie in bins above that of the least, enough in it and above."""
    from hga_compile.kernels.triton_bins import BINS
    from hga_compile.kernels.triton_score import Masses
    from hga_compile.kernels.triton_select import votes_of

    masses = Masses(2, 8, 150, 32, place)
    masses.mass.copy_(torch.exp(spread * torch.randn(2, 150, 8)))
    parts = torch.nn.functional.pad(masses.mass, (0, 0, 0, 10)).unflatten(1, (5, 32)).sum(2)
    masses.sums[:, 0], masses.sums[:, 1] = 0.0, parts
    masses.bins.zero_()
    table = torch.tensor([[0, 0, 150, count, 150, 0]], dtype=torch.int32, device=place)
    votes = votes_of(masses, table, 5, False, 2)
    assert votes.bins[:, :BINS].sum(1).tolist() == [150, 150]
    want = masses.mass[..., :5] / masses.mass.sum(1, keepdim=True)[..., :5]
    torch.testing.assert_close(votes.votes, want.sum(-1))
    for row in range(2):
        order = votes.votes[row].sort(descending=True).values
        reached = votes.bins[row].cumsum(0).tolist()
        edge = sum(number < count for number in reached)
        above = reached[edge - 1] if edge else 0
        assert above < count <= reached[edge]
        if 0 < edge < BINS - 1:
            assert float(order[reached[edge] - 1]) > float(order[above]) * 0.88
        if above > 0:
            assert float(order[above - 1]) > float(order[above])


@pytest.mark.parametrize("value", [0.0, 1.0, math.inf, 1e-38])
def test_of_equal_votes_the_first_groups_are_taken(place, value):
    assert choose(place, torch.full((1, 100), value), 9) == [list(range(9))]


def test_broken_groups_are_taken_before_all_others(place):
    votes = torch.rand(1, 300)
    votes[0, [7, 250]] = math.inf
    assert {7, 250} <= set(choose(place, votes, 5)[0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_group_with_a_broken_key_is_attended_to_and_breaks_its_row_alone(place, value):
    routing = Routing(dense_below=0, centre_tokens=8, budget=Budget(tokens=32))
    key, data = torch.randn(2, 2, 400, 16, device=place).unbind()
    codes, scales, _ = coded(key, 2)
    scales[1, 200] = value
    spans = gpu.spans_of(routing, plan_queries(routing, 399, 1, None), None, place)
    _, groups = gpu.decode_step(
        pages_of(key, data, 4).buffer, codes, scales, torch.randn(2, 2, 16, device=place).abs(), spans,
        length=400, routing=routing, scale=1.0, kv_heads=2,
    )  # fmt: skip
    assert 50 in groups[1].tolist()


def test_one_huge_key_is_found(place):
    routing = Routing(dense_below=0, centre_tokens=8, budget=Budget(tokens=32))
    key, value = torch.randn(2, 1, 400, 16, device=place).unbind()
    query = torch.randn(1, 2, 16, device=place)
    key[0, 123] = 1e4 * query[0, 0]
    codes, scales, _ = coded(key, 2)
    spans = gpu.spans_of(routing, plan_queries(routing, 399, 1, None), None, place)
    out, groups = gpu.decode_step(
        pages_of(key, value, 4).buffer, codes, scales, query, spans, length=400, routing=routing, scale=1.0,
        kv_heads=1,
    )  # fmt: skip
    assert 123 // 4 in groups[0].tolist()
    torch.testing.assert_close(out[0, 0], value[0, 123])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dim", [16, 20, 64])
def test_codes_are_those_of_the_reference(place, bits, dim):
    keys = torch.randn(2, 37, dim, device=place) + 3 * torch.randn(2, 1, dim, device=place)
    keys[0, 5] = 0.0
    keys[1, 6, 2] = 1e20
    centre = keys[:, 7:30].mean(1)
    want, want_scales = encode_keys((keys - centre[:, None]) @ rotation(dim, place), bits)
    codes = torch.full((2, 60, want.shape[1]), 7, dtype=torch.uint8, device=place).transpose(1, 2)
    scales = torch.full((2, 60), 7.0, dtype=torch.float16, device=place)
    gpu.encode(keys, centre, codes, scales, 11, bits, _STEP[bits])
    # A value on the border of two levels may be rounded either way.
    assert float((codes[:, :, 11:48] != want).float().mean()) < 0.01
    torch.testing.assert_close(scales[:, 11:48], want_scales, rtol=0.02, atol=1e-3)
    assert bool((codes[:, :, :11] == 7).all()) and bool((codes[:, :, 48:] == 7).all())
    assert bool((scales[:, :11] == 7).all()) and bool((scales[:, 48:] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("bits", "dim"), [(1, 64), (2, 20), (2, 128), (4, 80), (8, 64)])
def test_codes_of_many_keys_of_16_bits(place, bits, dim, dtype):
    new = 333 if CUDA else 101
    keys = (torch.randn(2, new, dim, device=place) + 3 * torch.randn(2, 1, dim, device=place)).to(dtype)
    keys[0, 5] = 0.0
    keys[1, 6, 2] = 6e4
    keys[0, 70, 1] = math.inf
    centre = keys[:, 7:30].float().mean(1)
    want, want_scales = encode_keys((keys.float() - centre[:, None]) @ rotation(dim, place), bits)
    codes = torch.full((2, new + 20, want.shape[1]), 7, dtype=torch.uint8, device=place).transpose(1, 2)
    scales = torch.full((2, new + 20), 7.0, dtype=torch.float16, device=place)
    # Rows as a model's are: the other heads' lie between.
    apart = keys.transpose(0, 1).contiguous().transpose(0, 1)
    gpu.encode(apart, centre, codes, scales, 11, bits, _STEP[bits])
    finite = torch.isfinite(want_scales)
    assert torch.equal(torch.isfinite(scales[:, 11 : 11 + new]), finite) and not bool(finite[0, 70])
    # A value on the border of two levels may be rounded either way.
    wrong = (codes[:, :, 11 : 11 + new] != want).float().mean(1)
    assert float(wrong[finite].mean()) < 0.01
    torch.testing.assert_close(scales[:, 11 : 11 + new][finite], want_scales[finite], rtol=0.02, atol=1e-3)
    assert bool((codes[:, :, :11] == 7).all()) and bool((codes[:, :, 11 + new :] == 7).all())
    assert bool((scales[:, :11] == 7).all()) and bool((scales[:, 11 + new :] == 7).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_key_that_is_not_finite_has_no_scale(place, value):
    keys = torch.randn(1, 8, 16, device=place)
    keys[0, 3, 5] = value
    codes = torch.zeros(1, 8, 4, dtype=torch.uint8, device=place).transpose(1, 2)
    scales = torch.zeros(1, 8, dtype=torch.float16, device=place)
    gpu.encode(keys, torch.zeros(1, 16, device=place), codes, scales, 0, 2, _STEP[2])
    assert torch.isfinite(scales[0]).tolist() == [token != 3 for token in range(8)]


@pytest.mark.parametrize(("begin", "new"), [(0, 5), (3, 1), (6, 9)])
def test_rows_come_back_from_their_pages(place, begin, new):
    key, value = torch.randn(2, 15, 20, device=place), torch.randn(2, 15, 12, device=place)
    pages = pages_of(key, value, 4)
    newer = torch.randn(2, new, 20, device=place), torch.randn(2, new, 12, device=place)
    gpu.store_rows(pages.buffer, *newer, begin, 4)
    key[:, begin : begin + new], value[:, begin : begin + new] = newer
    got = torch.empty(2, 14, 20, device=place), torch.empty(2, 14, 12, device=place)
    gpu.load_rows(pages.buffer, *got, 1, 4)
    for part, want in zip(got, (key, value), strict=True):
        assert torch.equal(part, want[:, 1:])


class Pretended(Pages):
    """Pages of the interpreter's CPU as if it were a GPU that they are pinned for."""

    def use(self, kernels):
        super().use("reference")
        self._triton = self._pinned = True


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8])
def test_many_rows_go_through_packed_pages(place, monkeypatch, dtype):
    """Pieces, borders between pinned ones, and groups that are not whole."""
    monkeypatch.setattr(pages_module, "_FEW", 6)
    monkeypatch.setattr(pages_module, "PIECE", 5 * 2 * 4 * 32 * dtype.itemsize)
    kind = Pages if CUDA else Pretended
    made = kind(2, 20, 12, 4, dtype, place, torch.device("cpu"))
    if not CUDA:
        # Borders that groups know nothing of.
        monkeypatch.setattr(
            HostRange,
            "parts",
            lambda _, begin, end: (slice(i, min(i + 1000, end)) for i in range(begin, end, 1000)),
        )
    key, value = ((100 * torch.randn(2, 90, dim, device=place)).to(dtype) for dim in (20, 12))
    begin = 0
    made.reserve(90)
    for end in (3, 30, 31, 39, 40, 90):
        made.write(key[:, begin:end], value[:, begin:end], begin)
        begin = end
    made.write(key[:, 50:], value[:, 50:], 50)
    for begin, end in ((0, 90), (1, 90), (3, 11), (8, 12), (37, 61), (40, 80), (60, 64)):
        got = made.read(begin, end)
        assert torch.equal(got[0], key[:, begin:end]) and torch.equal(got[1], value[:, begin:end])
        for rows in (slice(0, 1), slice(1, 2)):
            got = made.read(begin, end, rows=rows)
            assert torch.equal(got[0], key[rows, begin:end]) and torch.equal(got[1], value[rows, begin:end])
    plain = Pages(2, 20, 12, 4, dtype, torch.device("cpu"), torch.device("cpu"))
    plain.write(key.cpu(), value.cpu(), 0)
    made._settle()
    assert torch.equal(made.buffer[:22], plain.buffer[:22])


@pytest.mark.parametrize("padded", [False, True])
def test_a_conversation_through_the_store_is_the_references(place, monkeypatch, padded):
    given = inputs(mask=left_padding([130, 20, 97], 130) if padded else None, batch=3)
    steps = (124, *[1] * 6)
    with LEDGER.recording() as plain:
        want = run_steps(routing(), given, steps)
    uses = LEDGER.uses()[0, "decode"].attended
    LEDGER.reset()
    taken = []
    monkeypatch.setattr(decode, "decode_step", lambda *a, **k: taken.append(1) or gpu.decode_step(*a, **k))
    if not CUDA:
        # As if the CPU were a GPU: what the kernels do not cover runs in plain torch.
        monkeypatch.setattr(dispatch, "preferred", lambda kernels, device: "triton")
        for module in (call_module, steps_module, lowbit):
            monkeypatch.setattr(module, "preferred", dispatch.preferred)
    with LEDGER.recording() as ours:
        got = run_steps(routing(), given.to(place), steps)
    assert len(taken) == 6
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)
    assert LEDGER.uses()[0, "decode"].attended == uses
    for one, other in zip(plain[-6:], ours[-6:], strict=True):
        assert torch.equal(one.groups, other.groups)


@pytest.mark.gpu
@large
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_large_heads(place, dim):
    check(place, rows=4, heads=8, dim=dim, v_dim=dim, tokens=4099, dtype=torch.bfloat16)


@pytest.mark.gpu
@large
def test_pages_in_pinned_host_memory(place):
    check(place, rows=4, heads=4, dim=64, v_dim=64, tokens=9000, dtype=torch.bfloat16, home="cpu")


@pytest.mark.gpu
@large
def test_a_million_tokens(place):
    check(place, rows=8, heads=4, dim=128, v_dim=128, tokens=1_000_003, dtype=torch.bfloat16, fraction=0.01)


@pytest.mark.gpu
@large
def test_pages_are_not_given_away_while_kernels_read_them(place):
    key, value = torch.randn(2, 4, 4000, 64, device=place).unbind()
    for _ in range(20):
        pages = pages_of(key, value, 4, "cpu")
        assert pages.gpu_pages is not None
        got = torch.empty(2, 4, 30, 64, device=place).unbind()
        gpu.load_rows(pages.buffer, *got, 100, 4)
        del pages
        torch.empty(4000, 4, 128, pin_memory=True).fill_(0.0)
        assert torch.equal(got[0], key[:, 100:130])


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="runs the others")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_small_set_in_the_interpreter():
    names = "exact_attention or width or spans or selection or codes or rows_come or conversation"
    interpret(__file__, names)
