"""Routed attention as a whole: against the oracle, and what must hold whatever the routing chooses."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from cases import (
    Inputs,
    attended,
    inputs,
    left_padding,
    opened,
    recorded_groups,
    routing,
    run_steps,
    run_whole,
    site,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from naive import Answer, attend_naively
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import Routing
from hga_compile.kernels import ops, prefill
from hga_compile.kernels.ledger import LEDGER

QUICK = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


Shape = tuple[tuple[str, object], ...]


def dense(given: Inputs) -> Tensor:
    """What attention that is not routed gives, by SDPA in float64; NaN for queries that see nothing."""
    tokens = given.tokens
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=given.key.device).tril()[None, None]
    if given.mask is not None:
        mask = mask & given.mask[:, None, None]
    query, key, value = (part.double() for part in (given.query, given.key, given.value))
    return scaled_dot_product_attention(query, key, value, mask, scale=given.scale, enable_gqa=True)


def seen(given: Inputs) -> Tensor:
    """Queries that are tokens themselves, ``[batch, queries]``."""
    batch, tokens = given.query.shape[0], given.tokens
    return torch.ones(batch, tokens, dtype=torch.bool) if given.mask is None else given.mask


@lru_cache(maxsize=2)
def answer(setting: Routing, shape: Shape) -> tuple[Inputs, Answer]:
    given = inputs(**dict(shape))
    return given, attend_naively(setting, given.query, given.key, given.value, given.scale, given.mask)


def check(setting: Routing, steps: list[int] | None, device: torch.device, **shape: object) -> None:
    """Run and compare output, recorded routes and counts with the oracle."""
    given, want = answer(setting, tuple(shape.items()))
    there = given.to(device)
    with LEDGER.recording() as records:
        got = run_whole(setting, there) if steps is None else run_steps(setting, there, steps)
    assert got.dtype == given.query.dtype and got.is_contiguous()
    groups = recorded_groups(records, given, setting.group_size).numpy()
    routed = np.pad(want.routed, ((0, 0), (0, 0), (0, 0), (0, -given.tokens % setting.group_size)))
    expected = routed.reshape(*routed.shape[:3], -1, setting.group_size).any(-1)
    np.testing.assert_array_equal(groups, expected)
    assert attended() == (want.routed.sum(), want.visible)
    np.testing.assert_allclose(got.cpu().numpy(), want.out, rtol=0, atol=2e-5)
    # The case is worth something only if queries were routed and had something to choose from.
    assert want.routed.sum() < 0.9 * want.visible
    assert any(votes for row in want.votes for head in row for votes in head)


SETTINGS = {
    "default kind": {},
    "1 bit": {"bits": 1},
    "4 bits": {"bits": 4},
    "8 bits": {"bits": 8},
    "means": {"summary": "mean"},
    "means of 16, chunks first (the paper's)": {
        "summary": "mean",
        "group_size": 16,
        "chunk_size": 32,
        "chunk_parts": 1,
        "chunk_stage": "on",
        "budget": Budget(tokens=64),
        "dense_below": 70,
    },
    "tokens alone": {"group_size": 1},
    "tokens alone, means": {"group_size": 1, "summary": "mean"},
    "groups of 16": {"group_size": 16, "budget": Budget(tokens=64), "dense_below": 70},
    "groups of a whole chunk": {
        "group_size": 16,
        "budget": Budget(tokens=64),
        "dense_below": 70,
        "chunk_stage": "on",
    },
    "chunks first": {"chunk_stage": "on"},
    "chunks first where long": {"chunk_stage": "auto"},
    "few chunks": {"chunk_stage": "on", "chunk_budget": Budget(tokens=1), "chunk_parts": 2},
    "votes by maximum": {"vote": "mass_max"},
    "chunks by maximum": {"vote": "mass_max", "chunk_stage": "on"},
    "no sinks": {"sinks": 0},
    "one sink": {"sinks": 1},
    "sinks of two groups": {"sinks": 5},
    "wide window": {"window": Window(fraction=0.5)},
    "window beyond the budget": {"window": Window(tokens=50)},
    "growing budget": {"budget": Budget(fraction=0.4)},
    "budget below sinks and window": {"budget": Budget(fraction=0.02)},
    "late dense_below": {"dense_below": 90},
    "late centre": {"centre_tokens": 64, "dense_below": 0},
    "centres of blocks": {"centre": "block"},
    "centres of blocks, groups across them": {
        "centre": "block",
        "group_size": 3,
        "chunk_size": 12,
        "chunk_parts": 1,
        "vote": "mass_max",
    },
    "tail": {"tail": "estimate"},
    "tail of small chunks": {"tail": "estimate", "chunk_size": 8, "chunk_parts": 1},
    "tail after chunks": {"tail": "estimate", "chunk_stage": "on"},
    "tail of means": {"tail": "estimate", "summary": "mean", "group_size": 8},
}
# `path` varies fastest: the oracle's answer is worked out once for three of them.
PATHS = {"prefill": None, "chunked prefill": [70, 1, 30, 29], "decode": [114] + [1] * 16}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_is_what_the_specification_says(setting: dict, path: list[int] | None, device: torch.device) -> None:
    check(routing(**setting), path, device)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 2, "kv_heads": 1, "heads": 1, "dim": 8},
        {"batch": 1, "kv_heads": 3, "heads": 4, "dim": 20},
        {"batch": 2, "kv_heads": 2, "heads": 3, "dim": 64},
        {"batch": 1, "kv_heads": 1, "heads": 8, "dim": 80},
        {"batch": 3, "kv_heads": 1, "heads": 2, "dim": 20, "v_dim": 12},
        {"batch": 1, "kv_heads": 2, "heads": 1, "dim": 16, "v_dim": 33},
    ],
    ids=lambda shape: "-".join(f"{name}{size}" for name, size in shape.items()),
)
def test_holds_for_any_shape(shape: dict, path: list[int] | None, device: torch.device) -> None:
    check(routing(), path, device, **shape)


@pytest.mark.parametrize("dim", [1, 3, 5])
def test_holds_for_odd_head_dims(dim: int, device: torch.device) -> None:
    check(routing(), PATHS["decode"], device, dim=dim, v_dim=7)


PADDINGS = {
    "left": left_padding([130, 101, 97], 130),
    "left, a short row": left_padding([130, 20, 70], 130),
    "right": left_padding([130, 90, 101], 130).flip(1),
    "gaps": torch.rand(3, 130, generator=torch.Generator().manual_seed(1)) < 0.8,
    "a whole row": left_padding([130, 0, 120], 130),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "setting",
    [{}, {"chunk_stage": "on", "summary": "mean", "group_size": 8}, {"tail": "estimate"}],
    ids=["lowbit", "mean after chunks", "tail"],
)
@pytest.mark.parametrize("mask", PADDINGS.values(), ids=PADDINGS)
def test_padding_is_never_attended_to(
    mask: Tensor, setting: dict, path: list[int] | None, device: torch.device
) -> None:
    check(routing(**setting), path, device, batch=3, kv_heads=1, mask=mask)


@pytest.mark.parametrize("mask", [None, PADDINGS["left"], PADDINGS["gaps"]], ids=["whole", "left", "gaps"])
@pytest.mark.parametrize("tail", ["drop", "estimate"])
def test_does_not_depend_on_the_tile_size(
    tail: str, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(prefill, "_TILE_BYTES", 1)
    check(routing(tail=tail, chunk_stage="on"), None, device, batch=3, kv_heads=1, mask=mask)


def test_a_dense_prefill_leaves_decoding_routed(device: torch.device) -> None:
    setting = routing(prefill="dense")
    given, want = answer(routing(), (("tokens", 130),))
    got = run_steps(setting, given.to(device), [60, 40, *[1] * 30]).cpu()
    torch.testing.assert_close(got[:, :, :100], dense(given)[:, :, :100].float(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(got[:, :, 100:].numpy(), want.out[:, :, 100:], rtol=0, atol=2e-5)


def test_history_stored_before_is_routed_to(device: torch.device) -> None:
    # As after a prefill by a model that is not compiled: no query before number 120 was ever seen here.
    for tail in ("drop", "estimate"):
        setting = routing(tail=tail)
        given = inputs()
        late = given.query[:, :, 120:]
        want = attend_naively(setting, late, given.key, given.value, given.scale, all_queries=late[:, :, :1])
        handle = opened(given.key[:, :, :120].to(device), given.value[:, :, :120].to(device))
        for position in range(120, 130):
            new = slice(position, position + 1)
            row = (part[:, :, new].to(device) for part in (given.query, given.key, given.value))
            got = ops.cached_attention(*row, handle, position + 1, None, given.scale, site(setting))
            np.testing.assert_allclose(
                got[:, :, 0].cpu().numpy(), want.out[:, :, position - 120], rtol=0, atol=2e-5
            )


def test_a_mask_of_ones_changes_nothing(device: torch.device) -> None:
    given = inputs(batch=2).to(device)
    plain = run_whole(routing(), given)
    for ones in (torch.ones(2, 130, dtype=torch.int64), torch.ones(1, 140, dtype=torch.bool)):
        masked = replace(given, mask=ones.to(device))
        assert torch.equal(run_whole(routing(), masked), plain)


def test_padding_by_whole_chunks_changes_nothing(device: torch.device) -> None:
    for setting in (
        routing(chunk_stage="on"),
        routing(tail="estimate"),
        routing(summary="mean", group_size=8),
    ):
        given = inputs()
        pad = torch.full((1, 2, 32, 16), 9.0)
        twice = torch.full((1, 4, 32, 16), 9.0)
        mask = left_padding([130], 162)
        padded = Inputs(
            torch.cat([twice, given.query], 2),
            torch.cat([pad, given.key], 2),
            torch.cat([pad, given.value], 2),
            given.scale,
            mask,
        ).to(device)
        plain = run_whole(setting, given.to(device))
        for got in (run_whole(setting, padded), run_steps(setting, padded, [133, *[1] * 29])):
            torch.testing.assert_close(got[:, :, 32:], plain, rtol=0, atol=1e-5)


# --- properties ---

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "kv_heads": st.integers(1, 2),
        "heads": st.integers(1, 3),
        "dim": st.sampled_from([4, 8, 16, 20]),
        "tokens": st.integers(50, 110),
        "seed": st.integers(0, 5),
    }
)
kinds = st.sampled_from(
    [
        {},
        {"bits": 1, "group_size": 1},
        {"bits": 8, "group_size": 16},
        {"summary": "mean"},
        {"chunk_stage": "on", "chunk_budget": Budget(tokens=16)},
        {"chunk_stage": "auto", "auto_chunk_tokens": 70, "summary": "mean"},
        {"tail": "estimate"},
        {"tail": "estimate", "chunk_stage": "on", "vote": "mass_max"},
    ]
)


@st.composite
def cases(draw: st.DrawFn) -> Inputs:
    shape = draw(shapes)
    given = inputs(**shape)
    batch, tokens = given.query.shape[0], given.tokens
    padding = draw(st.sampled_from(["none", "left", "right", "gaps"]))
    if padding == "none":
        return given
    lengths = [draw(st.integers(tokens // 3, tokens)) for _ in range(batch)]
    mask = left_padding(lengths, tokens)
    if padding == "right":
        mask = mask.flip(1)
    if padding == "gaps":
        mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(shape["seed"])) < 0.7
    return replace(given, mask=mask)


@st.composite
def cuts(draw: st.DrawFn, tokens: int) -> list[int]:
    """Steps of all sizes that add up to `tokens`."""
    ends = [*sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=6))), tokens]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


@QUICK
@given(case=cases(), kind=kinds, data=st.data())
def test_full_budget_is_dense(case: Inputs, kind: dict, data: st.DataObject) -> None:
    # A budget of everything takes the short cut; a window over everything goes through the routing.
    everything = data.draw(
        st.sampled_from(
            [{"budget": Budget(fraction=1.0)}, {"budget": Budget(tokens=200)}, {"window": Window(tokens=200)}]
        )
    )
    setting = routing(**(kind | everything | {"dense_below": 0, "centre_tokens": 4}))
    got = run_steps(setting, case, data.draw(cuts(case.tokens)))
    real = seen(case)[:, None, :, None]
    error = (got - dense(case)).where(real, 0.0).abs().max()
    assert error < 1e-5
    total, visible = attended()
    assert total == visible
    LEDGER.reset()


@QUICK
@given(case=cases(), kind=kinds, data=st.data())
def test_later_tokens_change_nothing_before_them(case: Inputs, kind: dict, data: st.DataObject) -> None:
    setting = routing(**kind)
    at = data.draw(st.integers(1, case.tokens - 1))
    other = inputs(
        case.tokens, case.key.shape[0], case.key.shape[1], case.query.shape[1] // case.key.shape[1],
        case.key.shape[3], seed=77,
    )  # fmt: skip
    # Far larger ones, so that anything they leak into is seen.
    changed = [
        torch.cat([old[:, :, :at], 50 * new[:, :, at:]], 2)
        for old, new in zip(
            (case.query, case.key, case.value), (other.query, other.key, other.value), strict=True
        )
    ]
    mask = None
    if case.mask is not None:
        mask = torch.cat([case.mask[:, :at], ~case.mask[:, at:]], 1)
    before = run_whole(setting, case)[:, :, :at]
    after = run_whole(setting, Inputs(*changed, case.scale, mask))[:, :, :at]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


@QUICK
@given(case=cases(), kind=kinds, data=st.data())
def test_steps_of_any_size_give_the_same(case: Inputs, kind: dict, data: st.DataObject) -> None:
    setting = routing(**kind)
    LEDGER.reset()
    whole = run_whole(setting, case)
    counts = attended()
    LEDGER.reset()
    torch.testing.assert_close(
        run_steps(setting, case, data.draw(cuts(case.tokens))), whole, rtol=0, atol=1e-5
    )
    assert attended() == counts


@QUICK
@given(case=cases(), kind=kinds, data=st.data())
def test_sequences_of_a_batch_do_not_meet(case: Inputs, kind: dict, data: st.DataObject) -> None:
    setting = routing(**kind)
    order = data.draw(st.permutations(range(len(case.query))))
    moved = Inputs(
        case.query[order], case.key[order], case.value[order], case.scale,
        None if case.mask is None else case.mask[order],
    )  # fmt: skip
    path = data.draw(cuts(case.tokens))
    got, want = run_steps(setting, moved, path), run_steps(setting, case, path)
    torch.testing.assert_close(got, want[order], rtol=0, atol=1e-5)


@QUICK
@given(case=cases(), kind=kinds)
def test_query_heads_of_a_kv_head_are_alike(case: Inputs, kind: dict) -> None:
    setting = routing(**kind)
    batch, _, tokens, dim = case.query.shape
    grouped = case.query.view(batch, case.key.shape[1], -1, tokens, dim)
    turned = replace(case, query=grouped.flip(2).reshape(case.query.shape))
    want = run_whole(setting, case).view(batch, case.key.shape[1], -1, tokens, dim).flip(2)
    torch.testing.assert_close(run_whole(setting, turned), want.reshape(case.query.shape), rtol=0, atol=1e-5)


@QUICK
@given(case=cases(), kind=kinds)
def test_no_more_than_the_budget_is_attended(case: Inputs, kind: dict) -> None:
    setting = routing(**(kind | {"dense_below": 0, "budget": Budget(fraction=0.3, tokens=24)}))
    LEDGER.reset()
    with LEDGER.recording() as records:
        run_whole(setting, case)
    groups = recorded_groups(records, case, setting.group_size)
    size = setting.group_size
    # Sinks and window are whole groups, whatever the budget.
    fixed = 6 + 2 * size + (setting.sinks + size - 1) // size * size
    for row, real in enumerate(seen(case)):
        for position in range(case.tokens):
            visible = int(real[: position + 1].sum())
            if visible <= setting.centre_tokens:
                continue
            most = max(setting.budget.tokens_for(visible), fixed)
            tokens = (
                groups[row, :, position].repeat_interleave(size, -1)[:, : position + 1] & real[: position + 1]
            )
            assert int(tokens.sum(-1).max()) <= most


# --- values that break things ---

BROKEN_KINDS = {
    "lowbit": {},
    "8 bits": {"bits": 8},
    "mean": {"summary": "mean"},
    "chunks": {"chunk_stage": "on", "chunk_budget": Budget(tokens=16)},
    "tail": {"tail": "estimate"},
    "maximum": {"vote": "mass_max"},
}


@pytest.mark.parametrize("at", [6, 13, 50, 95, 116])
@pytest.mark.parametrize("kind", BROKEN_KINDS.values(), ids=BROKEN_KINDS)
def test_a_key_that_is_no_number_is_never_lost(kind: dict, at: int, device: torch.device) -> None:
    given = inputs().to(device)
    key = given.key.clone()
    key[:, 0, at, 3] = torch.nan
    got = run_steps(routing(**kind), replace(given, key=key), PATHS["decode"])
    broken = torch.isnan(got).any(-1)[0]
    assert broken[:2, max(at, 114) :].all(), "a query did not attend to the broken key"
    assert not broken[2:].any()
    assert not broken[:, 114 : max(at, 114)].any()
    # In one call the tile of the first broken query may be broken earlier, as with any masked softmax.
    whole = torch.isnan(run_whole(routing(**kind), replace(given, key=key))).any(-1)[0]
    assert whole[:2, at:].all() and not whole[2:].any()


def test_more_broken_keys_than_can_be_attended_still_show(device: torch.device) -> None:
    given = inputs().to(device)
    key = given.key.clone()
    key[:, :, 20:100] = torch.nan
    for kind in BROKEN_KINDS.values():
        assert torch.isnan(
            run_steps(routing(**kind), replace(given, key=key), PATHS["decode"])[:, :, 114:]
        ).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("at", [13, 50])
@pytest.mark.parametrize("kind", BROKEN_KINDS.values(), ids=BROKEN_KINDS)
def test_an_infinite_key_does_what_it_does_to_dense(kind: dict, at: int, sign: int) -> None:
    if kind.get("tail"):
        pytest.skip("the estimate of a chunk with an infinite key is not a number, whatever the query")
    given = inputs()
    key = given.key.clone()
    key[:, 0, at, 3] = sign * torch.inf
    broken = replace(given, key=key)
    got = run_steps(routing(**kind), broken, PATHS["decode"])[:, :, 114:]
    assert torch.equal(torch.isnan(got), torch.isnan(dense(broken)[:, :, 114:]))


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12, 1e30])
@pytest.mark.parametrize("kind", BROKEN_KINDS.values(), ids=BROKEN_KINDS)
def test_a_huge_key_takes_all(kind: dict, size: float) -> None:
    if kind.get("tail") and size > 1e6:
        pytest.skip("scores that float32 rounds by more than 1 cannot be taken out of an estimate again")
    given = inputs()
    key = given.key.clone()
    # Every query has a positive product with it.
    key[:, :, 50] = size
    broken = Inputs(given.query.abs(), key, given.value, given.scale)
    got = run_steps(routing(**kind), broken, PATHS["decode"])[:, :, 114:]
    want = given.value[:, :, 50:51].repeat_interleave(2, 1).expand_as(got)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BROKEN_KINDS.values(), ids=BROKEN_KINDS)
def test_a_huge_key_that_no_query_wants_costs_nothing(kind: dict) -> None:
    given = inputs()
    key = given.key.clone()
    key[:, :, 50] = -1e6
    broken = Inputs(given.query.abs(), key, given.value, given.scale)
    got = run_steps(routing(**kind), broken, PATHS["decode"])
    assert torch.isfinite(got).all()
    # The other keys are routed to as if it were not there.
    want = attend_naively(routing(**kind), broken.query, key, broken.value, broken.scale)
    np.testing.assert_allclose(got.numpy(), want.out, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "fill"), [*((name, 0.5) for name in BROKEN_KINDS), ("lowbit", 0.0)])
def test_equal_keys_share_the_budget(name: str, fill: float, device: torch.device) -> None:
    kind = BROKEN_KINDS[name]
    given = inputs()
    given = replace(given, key=torch.full_like(given.key, fill))
    want = attend_naively(routing(**kind), given.query, given.key, given.value, given.scale)
    for path in PATHS.values():
        LEDGER.reset()
        with LEDGER.recording() as records:
            got = (
                run_whole(routing(**kind), given.to(device))
                if path is None
                else run_steps(routing(**kind), given.to(device), path)
            )
        assert attended() == (want.routed.sum(), want.visible)
        if "tail" in kind:
            continue
        # Any choice is right, but the output must be the mean of what was chosen.
        groups = recorded_groups(records, given, 4).repeat_interleave(4, -1)[..., :130]
        weight = (groups & torch.ones(130, 130, dtype=torch.bool).tril()).float()
        mean = (weight / weight.sum(-1, keepdim=True)) @ given.value
        torch.testing.assert_close(got.cpu(), mean.repeat_interleave(2, 1), rtol=0, atol=1e-5)


def test_a_broken_query_breaks_itself_only(device: torch.device) -> None:
    given = inputs().to(device)
    query = given.query.clone()
    query[:, 0, [70, 110]] = torch.nan
    for kind in BROKEN_KINDS.values():
        for path in PATHS.values():
            steps = path or [130]
            got = run_steps(routing(**kind), replace(given, query=query), steps)
            broken = torch.isnan(got).any(-1)[0]
            assert broken[0, [70, 110]].all() and broken.sum() == 2
            sound = run_steps(routing(**kind), given, steps)
            kept = [position for position in range(130) if position not in (70, 110)]
            torch.testing.assert_close(got[:, :, kept], sound[:, :, kept], rtol=0, atol=1e-5)


# --- precision ---


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "kind", [{}, {"summary": "mean"}, {"tail": "estimate"}], ids=["lowbit", "mean", "tail"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_as_good_as_eager_attention(
    dtype: torch.dtype, kind: dict, path: list[int] | None, device: torch.device
) -> None:
    setting = routing(**kind)
    given, want = answer(setting, (("dtype", dtype), ("dim", 64)))
    there = given.to(device)
    got = run_whole(setting, there) if path is None else run_steps(setting, there, path)
    assert got.dtype == dtype
    plain, exact = answer(routing(**(kind | {"tail": "drop"})), (("dtype", dtype), ("dim", 64)))
    heads = given.query.shape[1] // given.key.shape[1]
    key, value = (part.repeat_interleave(heads, 1) for part in (plain.key, plain.value))
    hidden = torch.from_numpy(~exact.routed).repeat_interleave(heads, 1)
    scores = ((plain.query @ key.mT) * plain.scale).masked_fill(hidden, -torch.inf)
    eager = scores.softmax(-1, dtype=torch.float32).to(dtype) @ value
    allowed = np.abs(eager.double().numpy() - exact.out)
    error = np.abs(got.double().cpu().numpy() - want.out)
    assert np.sqrt((error**2).mean()) <= 1.2 * np.sqrt((allowed**2).mean())
    assert error.max() <= 1.5 * allowed.max()


# --- what is refused ---


def test_says_what_is_wrong_with_the_shapes() -> None:
    given = inputs(batch=2)
    text = site(routing())
    with pytest.raises(ValueError, match="multiple of KV heads, got 3 query heads"):
        ops.attention(given.query[:, :3], given.key, given.value, None, 1.0, text)
    with pytest.raises(ValueError, match="last of the tokens, got 130 queries and 40 tokens"):
        ops.attention(given.query, given.key[:, :, :40], given.value[:, :, :40], None, 1.0, text)
    with pytest.raises(ValueError, match="key_mask must cover every key, got 100 columns and 130 tokens"):
        ops.attention(given.query, given.key, given.value, torch.zeros(2, 100).bool(), 1.0, text)
    given = inputs(batch=3)
    with pytest.raises(ValueError, match="a row a sequence, got 2 rows, expected 3"):
        ops.attention(given.query, given.key, given.value, torch.zeros(2, 130).bool(), 1.0, text)


def test_a_step_over_gaps_is_counted_as_a_fallback() -> None:
    run_steps(routing(), replace(inputs(batch=3, kv_heads=1), mask=PADDINGS["gaps"]), [128, 1, 1])
    assert LEDGER.fallbacks()["padding with gaps: a decode step read all K/V under a mask"] == 2


@pytest.mark.parametrize("default", ["meta", "bfloat16"])
def test_does_not_depend_on_torch_defaults(default: str) -> None:
    setting = routing(tail="estimate", chunk_stage="on", bits=4, group_size=2)
    given = replace(inputs(batch=3), mask=PADDINGS["left"])
    want = run_steps(setting, given, PATHS["decode"])
    try:
        if default == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.bfloat16)
        got = run_steps(setting, given, PATHS["decode"])
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want)
