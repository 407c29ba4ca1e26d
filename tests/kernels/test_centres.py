"""Codes about centres that move: each block of keys is coded about the mean of the block before it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import Inputs, inputs, left_padding, opened, routing, run_steps, site, store_of
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import attend_naively, hadamard
from test_index import feed
from torch import Tensor

from hga_compile.configs.profile import Offload
from hga_compile.kernels import native, ops
from hga_compile.kernels.centres import BlockCentres, block_centres
from hga_compile.kernels.index import LayerIndex
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import LowBitSummary, decode_keys, encode_keys
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.route import merge_votes
from hga_compile.kernels.site import SiteConfig
from hga_compile.store import LayerStore
from hga_compile.store.pages import Pages

TOKENS = 420
MASKS = {
    "whole": None,
    "left": left_padding([TOKENS, 150], TOKENS),
    "a row that begins in a later block": left_padding([250, TOKENS - 128], TOKENS),
    "gaps": torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.5,
}


def moving(**changes: object):
    return routing(**({"centre": "block"} | changes))


def coded_index(given: Inputs, steps: Sequence[int], **changes: object) -> LowBitSummary:
    index = feed(LayerIndex(moving(**changes)), given, steps)
    assert isinstance(index.groups, LowBitSummary)
    return index.groups


def stored(summary: LowBitSummary) -> tuple[Tensor, ...]:
    """Codes, scales and centres of all complete groups."""
    tokens = summary.groups * summary.group_size
    assert summary.centres is not None
    blocks = -(-tokens // 128)
    assert summary.centres.blocks == blocks
    return summary.codes[:, :, :tokens], summary.scales[:, :tokens], summary.centres.values[:, :blocks]


def same(one: LowBitSummary, other: LowBitSummary, rows: slice | Tensor = slice(None)) -> None:
    """Compare all bits."""
    for left, right in zip(stored(one), stored(other), strict=True):
        assert torch.equal(left[rows], right[rows])


def known_keys(summary: LowBitSummary) -> np.ndarray:
    """Keys as codes and centres have them, rotated, in float64."""
    codes, scales, centres = stored(summary)
    keys = decode_keys(codes, scales, summary.bits, summary.dim).double()
    moved = centres.double().repeat_interleave(128, 1)[:, : keys.shape[1]]
    return (keys + moved).numpy()


def drifting(tokens: int = 1500, dim: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys whose mean turns as rotary embedding turns it, and queries that turn along: in a row each."""
    random = torch.Generator().manual_seed(seed)
    angle = torch.arange(tokens)[:, None] * 0.01 * torch.rand(dim // 2, generator=random)
    turn = torch.polar(torch.ones_like(angle), angle)
    mean = 4 * torch.randn(dim // 2, dtype=torch.complex64, generator=random)
    keys = torch.view_as_real(mean * turn).flatten(1) + torch.randn(tokens, dim, generator=random)
    query = torch.randn(32, dim, generator=random) * 0.3
    return keys[None], query[None]


@pytest.mark.parametrize("dim", [7, 16, 64])
def test_a_centre_is_the_mean_of_a_block_less_that_of_the_first_keys(dim: int) -> None:
    keys, middle = torch.randn(2, 256, dim), torch.randn(2, dim)
    counted = torch.rand(2, 256) < 0.7
    counted[1, :128] = False
    keys[0, 5, 3], counted[0, 5] = torch.nan, True
    got = block_centres(keys, counted, middle)
    for row in range(2):
        for block in range(2):
            part = slice(block * 128, block * 128 + 128)
            used = keys[row, part][counted[row, part] & torch.isfinite(keys[row, part]).all(-1)]
            want = (used.double().mean(0) - middle[row].double()).numpy() @ hadamard(dim)
            want = np.zeros(dim) if len(used) == 0 else want
            # Rounded to 8 bits.
            np.testing.assert_allclose(got[row, block].double().numpy(), want, rtol=2**-8, atol=1e-7)


@pytest.mark.parametrize("value", [1e38, 3e38])
def test_huge_keys_have_a_finite_centre(value: float) -> None:
    keys = torch.full((1, 128, 64), value)
    assert torch.isfinite(block_centres(keys, None, torch.zeros(1, 64)).float()).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(1, 150), min_size=1, max_size=40),
    size=st.sampled_from([1, 3, 4, 16]),
    bits=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_codes_never_change_as_keys_are_appended(cuts: list[int], size: int, bits: int, seed: int) -> None:
    setting = moving(group_size=size, bits=bits, chunk_size=48, chunk_parts=1)
    random = torch.Generator().manual_seed(seed)
    keys = (torch.randn(2, sum(cuts), 20, generator=random) + 3).bfloat16()
    index, before, end = LayerIndex(setting), None, 0
    for cut in cuts:
        end += cut
        index.extend(end, lambda low, high: (keys[:, low:high], keys[:, low:high]), None)
        if index.groups is None:
            continue
        assert isinstance(index.groups, LowBitSummary)
        now = tuple(part.clone() for part in stored(index.groups))
        if before is not None:
            for was, part, dim in zip(before, now, (2, 1, 1), strict=True):
                assert torch.equal(part.narrow(dim, 0, was.shape[dim]), was)
        before = now
    whole = LayerIndex(setting)
    whole.extend(end, lambda low, high: (keys[:, low:high], keys[:, low:high]), None)
    if whole.groups is not None:
        assert isinstance(whole.groups, LowBitSummary) and isinstance(index.groups, LowBitSummary)
        same(index.groups, whole.groups)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("steps", [[100] + [1] * 320, [128, 128, 1, 163], [5, 5, 300, 110]])
def test_bits_do_not_depend_on_how_the_sequence_was_cut(steps: list[int], mask: Tensor | None) -> None:
    made = inputs(TOKENS, batch=2, mask=mask)
    same(coded_index(made, steps), coded_index(made, [TOKENS]))


@pytest.mark.parametrize("length", [17, 127, 128, 129, 131, 132, 255, 256, 300])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_going_back_forgets_centres_made_of_what_came_after(length: int, size: int) -> None:
    setting = moving(group_size=size, chunk_size=48, chunk_parts=1)
    made, other = inputs(TOKENS, batch=2), inputs(TOKENS, batch=2, seed=5)
    joined = Inputs(
        made.query,
        torch.cat([made.key[:, :, :length], other.key[:, :, length:]], 2),
        torch.cat([made.value[:, :, :length], other.value[:, :, length:]], 2),
        1.0,
    )
    index = feed(LayerIndex(setting), made, [TOKENS])
    index.truncate(length)
    feed(index, joined, [TOKENS - length], length)
    fresh = feed(LayerIndex(setting), joined, [TOKENS])
    assert isinstance(index.groups, LowBitSummary) and isinstance(fresh.groups, LowBitSummary)
    same(index.groups, fresh.groups)


@pytest.mark.parametrize("at", [100, 200, 256])
def test_rows_are_selected_with_their_centres(at: int) -> None:
    made, batch = inputs(TOKENS, batch=2), torch.tensor([1, 0, 1])
    rows = (batch[:, None] * 2 + torch.arange(2)).flatten()
    chosen = Inputs(made.query[batch], made.key[batch], made.value[batch], 1.0)
    index = feed(LayerIndex(moving()), made, [at])
    index.select_rows(rows)
    feed(index, chosen, [TOKENS - at], at)
    assert isinstance(index.groups, LowBitSummary)
    same(index.groups, coded_index(chosen, [TOKENS]))


def test_an_emptied_index_becomes_the_same_again() -> None:
    made = inputs(TOKENS)
    index = feed(LayerIndex(moving()), made, [300, 120])
    again = index.emptied()
    feed(again, made, [TOKENS])
    assert isinstance(index.groups, LowBitSummary) and isinstance(again.groups, LowBitSummary)
    same(index.groups, again.groups)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_broken_key_stays_out_of_the_next_centre(broken: float) -> None:
    made = inputs(TOKENS)
    key = made.key.clone()
    key[0, 0, 140, 2] = broken
    summary = coded_index(Inputs(made.query, key, made.value, 1.0), [TOKENS])
    assert torch.isfinite(stored(summary)[2].float()).all()
    assert torch.isfinite(summary.scales[0, :TOKENS]).sum() == TOKENS - 1


def test_the_first_block_is_coded_as_about_one_centre() -> None:
    made = inputs(TOKENS)
    one = feed(LayerIndex(routing()), made, [TOKENS]).groups
    assert isinstance(one, LowBitSummary) and one.centres is None
    other = coded_index(made, [TOKENS])
    assert torch.equal(one.codes[:, :, :128], other.codes[:, :, :128])
    assert torch.equal(one.scales[:, :128], other.scales[:, :128])
    # The rest is not, and takes a byte more at 64 channels.
    assert not torch.equal(one.scales[:, 128:TOKENS], other.scales[:, 128:TOKENS])
    assert other.bytes_per_token() - one.bytes_per_token() == 2 * 16 / 128
    assert other.nbytes() == one.nbytes() + other.centres.values.nbytes


def test_one_centre_takes_the_bits_and_bytes_that_it_took() -> None:
    made = inputs(TOKENS)
    key = made.key.flatten(0, 1)
    summary = feed(LayerIndex(routing()), made, [200, 220]).groups
    assert isinstance(summary, LowBitSummary)
    codes, scales = encode_keys((key - key[:, :16].mean(1)[:, None]) @ rotation(16, key.device), 2)
    assert torch.equal(summary.codes[:, :, :TOKENS], codes) and torch.equal(
        summary.scales[:, :TOKENS], scales
    )
    assert summary.bytes_per_token() == 4 + 2
    assert summary.nbytes() == summary.codes.nbytes + summary.scales.nbytes + 2 * 16 * 4


def test_the_report_counts_the_bytes_of_centres() -> None:
    run_steps(moving(), inputs(200), [199, 1])
    use = LEDGER.uses()[0, "decode"]
    assert use.scored > 0 and use.summary_bytes == use.scored * (16 * 2 / 8 + 2 + 2 * 16 / 128)


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("size", [1, 3, 4, 16])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_scores_are_those_of_codes_and_centres(bits: int, size: int, kernels: str) -> None:
    setting = moving(bits=bits, group_size=size, chunk_size=48, chunk_parts=1)
    index = feed(LayerIndex(setting, kernels), inputs(TOKENS, dim=20), [TOKENS])
    summary = index.groups
    assert isinstance(summary, LowBitSummary)
    keys = known_keys(summary)
    for queries in (1, 5):
        query = torch.randn(2, 3, queries, 20)
        scorer = summary.scorer(summary.groups)
        for limit in (summary.groups, 256 // size, 7):
            want = np.einsum("rhqd,rtd->rhqt", query.double().numpy() @ hadamard(20), keys[:, : limit * size])
            got = scorer(query, limit).flatten(3).double().numpy()
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1, np.abs(want).max()))


@pytest.mark.skipif(native._library() is None, reason="needs a C++ compiler")
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 3),
    heads=st.sampled_from([1, 3, 5]),
    dim=st.sampled_from([7, 16, 64, 80]),
    tokens=st.integers(20, 600),
    size=st.sampled_from([1, 2, 3, 4, 8]),
    bits=st.sampled_from([1, 2, 4, 8]),
    vote=st.sampled_from(["mass_sum", "mass_max"]),
    seed=st.integers(0, 2**16),
)
def test_cpp_routes_as_the_reference_does(
    rows: int, heads: int, dim: int, tokens: int, size: int, bits: int, vote: str, seed: int
) -> None:
    torch.manual_seed(seed)
    groups = tokens // size
    known = groups * size
    middle = torch.randn(rows, dim)
    centres = BlockCentres(middle)
    keys = torch.randn(rows, tokens, dim) + torch.linspace(0, 3, tokens)[:, None] * torch.randn(rows, 1, dim)
    begin, end = centres.missing(known)
    if end > begin:
        centres.append(keys[:, begin:end], None)
    moved = centres.of_tokens(0, known)
    codes, scales = encode_keys(
        (keys[:, :known] - middle[:, None]) @ rotation(dim, keys.device) - moved, bits
    )
    codes, scales = codes.contiguous(), scales.float()
    turned, query = torch.randn(2, rows, heads, dim)
    exact = decode_keys(codes, scales.half(), bits, dim).double() + moved.double()
    want = turned.double() @ exact.transpose(1, 2)
    got = native.scan_scores(codes, scales, turned, bits, centres.values)
    assert got is not None
    torch.testing.assert_close(got.double(), want, atol=1e-4 * 2**bits / 4, rtol=1e-4)

    length = known + 1
    span = native.Span(0, 1, groups, seed % 7 + 1, length)
    votes = merge_votes(want.view(rows, heads, 1, groups, size).clone(), None, vote)[:, 0, 1:]
    best = votes.topk(min(span.chosen, groups - 1)).indices.sort().values + 1
    ranked = torch.nn.functional.pad(votes.sort(descending=True).values, (1, 1), value=-1.0)
    last, next_one = ranked[:, best.shape[1]], ranked[:, best.shape[1] + 1]
    setting = {"bits": bits, "group_size": size, "vote": vote, "centres": centres.values}
    listed = native.routed_groups(codes, scales, turned, torch.tensor(span), **setting)
    assert listed is not None
    if best.shape[1] and bool((last > 1.001 * next_one + 1e-30).all()):
        assert torch.equal(listed[:, 1 : 1 + best.shape[1]], best)
    pages = Pages(rows, dim, dim, size, torch.float32, torch.device("cpu"), torch.device("cpu"))
    pages.write(torch.randn(rows, length, dim), torch.randn(rows, length, dim), 0)
    out = native.routed_steps(
        pages.buffer,
        codes,
        scales,
        turned[:, None],
        query[:, None],
        torch.tensor([span]),
        scale=0.3,
        **setting,
    )
    there = (listed.shape[1] * size) - -length % size
    same_groups = native.attend_pages(pages.buffer, listed, query, there, size, 0.3)
    assert out is not None and same_groups is not None
    torch.testing.assert_close(out[:, 0], same_groups)


@pytest.mark.parametrize("path", [None, [200, 90, *[1] * 40], [1] * 330], ids=["prefill", "pieces", "decode"])
@pytest.mark.parametrize("mask", [None, *list(MASKS.values())[1:]], ids=MASKS)
@pytest.mark.parametrize("stage", ["off", "on"])
def test_attention_is_what_the_specification_says(
    mask: Tensor | None, path: list[int] | None, stage: str
) -> None:
    setting, tokens = moving(chunk_stage=stage), 330
    own = None if mask is None else mask[:, -tokens:]
    made = inputs(tokens, batch=2, kv_heads=1, mask=own)
    want = attend_naively(setting, made.query, made.key, made.value, made.scale, own)
    got = run_steps(setting, made, path or [tokens])
    np.testing.assert_allclose(got.numpy(), want.out, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_every_tier_gives_the_same_answer(kernels: str, tmp_path: Path) -> None:
    made, outs = inputs(330, dim=16), []
    place = Offload(nvme_folder=str(tmp_path), nvme_cache=2**17)
    for tier in ("gpu", "host", "nvme"):
        store, length, parts = LayerStore(tier, place), 0, []
        for step in (200, 50, *[1] * 80):
            begin, length = length, length + step
            parts.append(
                store.attend(
                    *(part[:, :, begin:length] for part in (made.query, made.key, made.value)),
                    length,
                    None,
                    made.scale,
                    SiteConfig(0, tier, moving(), kernels, place),
                )
            )
        outs.append(torch.cat(parts, 2))
        store.close()
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-5)


def test_a_copied_and_cut_store_goes_on_as_the_first_did() -> None:
    made = inputs(330)
    whole = run_steps(moving(), made, [300, *[1] * 30])
    handle = opened(made.key[:, :, :0], made.value[:, :, :0])

    def step(where: Tensor, begin: int, end: int) -> Tensor:
        parts = (made.query, made.key, made.value)
        query, key, value = (part[:, :, begin:end] for part in parts)
        return ops.cached_attention(query, key, value, where, end, None, made.scale, site(moving()))

    step(handle, 0, 300)
    for at in range(300, 330):
        torch.testing.assert_close(step(handle, at, at + 1), whole[:, :, at : at + 1], atol=1e-5, rtol=1e-5)
    store_of(handle).truncate(310)
    copy = store_of(handle).clone()
    got = copy.attend(
        *(part[:, :, 310:311] for part in (made.query, made.key, made.value)), 311, None, made.scale,
        SiteConfig.from_text(site(moving())),
    )  # fmt: skip
    torch.testing.assert_close(got, whole[:, :, 310:311], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step(handle, 310, 311), whole[:, :, 310:311], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 4])
def test_keys_that_drift_are_routed_to_better(size: int) -> None:
    keys, query = drifting()
    tokens, chosen = keys.shape[1] // size * size, 96 // size
    true = torch.softmax(query @ keys[:, :tokens].transpose(1, 2), -1).unflatten(-1, (-1, size)).sum(-1)

    def captured(scores: Tensor) -> float:
        best = scores.logsumexp(-1).topk(chosen, -1).indices
        return float(true.gather(-1, best).sum(-1).mean())

    def summary_of(centre: str) -> LowBitSummary:
        setting = routing(centre=centre, group_size=size, centre_tokens=256, bits=2)
        index = LayerIndex(setting, "reference")
        index.extend(tokens, lambda low, high: (keys[:, low:high], keys[:, low:high]), None)
        assert isinstance(index.groups, LowBitSummary)
        return index.groups

    found = {}
    for centre in ("first", "block"):
        summary = summary_of(centre)
        found[centre] = captured(summary.scorer(tokens // size)(query[:, None], tokens // size)[:, 0])
        if centre == "block":
            assert summary.centres is not None
            summary.centres.values.zero_()  # as if scores were those of the codes alone
            found["codes alone"] = captured(
                summary.scorer(tokens // size)(query[:, None], tokens // size)[:, 0]
            )
    assert found["block"] > found["first"] + 0.1
    assert found["codes alone"] < found["first"]


@pytest.mark.parametrize("size", [1, 4])
def test_means_of_groups_have_the_centres_in_them(size: int) -> None:
    keys, _ = drifting(seed=1)
    setting = routing(centre="block", group_size=size, centre_tokens=256, bits=4)
    index = LayerIndex(setting, "reference")
    index.extend(1500, lambda low, high: (keys[:, low:high], keys[:, low:high]), None)
    summary = index.groups
    assert isinstance(summary, LowBitSummary)
    made = summary.tile_keys(1500 // size, None, False)
    assert made.centres is not None
    want = torch.from_numpy(known_keys(summary)).float()
    means = made.means.values * made.means.steps[..., None]
    exact_means = want[:, : 1500 // size * size].unflatten(1, (-1, size)).mean(2)
    assert (means - exact_means).norm() < 0.05 * exact_means.norm()
