"""K/V stored in 8 bits: every tier, what is read is what was stored, bytes, and what else a tier does."""

import pytest
import torch
from store_cases import attend, place_of, rows_of, run_steps, site_of

from hga_compile.kernels.fp8 import EXTRA, decode_pair, encode_pair
from hga_compile.kernels.ledger import LEDGER
from hga_compile.store import LayerStore
from hga_compile.store.errors import CorruptPageError, StoreFullError
from hga_compile.store.fp8_pages import Fp8Pages
from hga_compile.store.tiers import is_at, make_tier, moved

CPU = torch.device("cpu")
TIERS = ("gpu", "host", "nvme")
STEPS = [200, 1, 1, 60, *[1] * 9]


def stood_for(parts):
    """Queries, and the K/V that coded ones stand for."""
    query, key, value = parts
    return query, *decode_pair(*encode_pair(key, value), key.dtype)


def tier_of(name, group_size=4, dtype=torch.float32, rows=3, **place):
    shape = (rows, 8, 6, group_size)
    return make_tier(name, shape, dtype, CPU, "auto", place_of(name, kv_dtype="fp8", **place))


@pytest.fixture
def some():
    key, value = torch.randn(3, 700, 8), torch.randn(3, 700, 6)
    return key, value, *decode_pair(*encode_pair(key, value), torch.float32)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("tier", TIERS)
def test_attention_is_that_to_what_is_stored(tier, kernels):
    parts = rows_of(280)
    site = site_of(tier, kernels, place_of(tier, kv_dtype="fp8"))
    LEDGER.reset()
    got = run_steps(LayerStore(), parts, STEPS, site)
    used, fallbacks = LEDGER.uses(), LEDGER.fallbacks()
    LEDGER.reset()
    want = run_steps(LayerStore(), stood_for(parts), STEPS, site_of(tier, kernels))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert fallbacks == LEDGER.fallbacks()
    for (place, coded), plain in zip(used.items(), LEDGER.uses().values(), strict=True):
        assert (coded.attended, coded.visible) == (plain.attended, plain.visible), place
        assert (coded.row_bytes, coded.dense_row_bytes) == (128 + EXTRA, 512)
        assert (plain.row_bytes, plain.dense_row_bytes) == (512, 512)


def test_padding_and_a_prefill_in_other_steps_give_the_same(tmp_path):
    parts = rows_of(120)
    mask = torch.arange(120) >= torch.tensor([0, 31])[:, None]
    outs = []
    for steps in ([100, *[1] * 20], [60, 40, *[1] * 20]):
        site = site_of("host", place=place_of("host", kv_dtype="fp8"))
        outs.append(run_steps(LayerStore(), parts, steps, site, mask)[-20:])
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))


@pytest.mark.parametrize("tier", TIERS)
def test_reads_what_was_stored_however_it_came(tier, some):
    key, value, near_key, near_value = some
    made, begin = tier_of(tier), 0
    for end in (1, 3, 4, 300, 301, 700):
        made.write(key[:, begin:end], value[:, begin:end], begin)
        begin = end
    assert isinstance(made, Fp8Pages) and (made.dim, made.v_dim, made.rows) == (8, 6, 3)
    for begin, end in ((0, 700), (5, 6), (299, 420), (700, 700)):
        got = made.read(begin, end)
        assert torch.equal(got[0], near_key[:, begin:end])
        assert torch.equal(got[1], near_value[:, begin:end])
    groups = torch.randint(0, 175, (3, 20))
    token = (groups[..., None] * 4 + torch.arange(4)).flatten(1)
    want = [part.gather(1, token[..., None].expand(-1, -1, part.shape[2])) for part in some[2:]]
    assert all(torch.equal(*pair) for pair in zip(made.gather(groups, 4), want, strict=True))
    pages = made.fetch(groups)
    assert pages.shape == (20, 3, 4 * 14)
    assert torch.equal(pages[:, :, :32].unflatten(2, (4, 8)).permute(1, 0, 2, 3).flatten(1, 2), want[0])
    made.write(-key[:, 690:], value[:, 690:], 690)
    assert torch.equal(made.read(690, 700)[0], -near_key[:, 690:])
    made.close()


@pytest.mark.parametrize("tier", TIERS)
def test_rows_are_chosen_and_copied_as_they_are(tier, some):
    key, value, near_key, near_value = some
    made = tier_of(tier)
    made.write(key, value, 0)
    clone = made.clone()
    made.select_rows(torch.tensor([2, 0, 2, 1]))
    assert made.rows == 4 and torch.equal(made.read(0, 700)[1], near_value[[2, 0, 2, 1]])
    assert torch.equal(clone.read(0, 700)[0], near_key)
    made.close()
    clone.close()


def test_moving_loses_nothing_once_it_is_coded(some):
    key, value, near_key, near_value = some
    made = tier_of("host")
    made.write(key, value, 0)
    for tier, size in (("nvme", 16), ("gpu", 4), ("nvme", 4)):
        place = place_of(tier, kv_dtype="fp8")
        other = moved(made, tier, size, 700, place)
        assert is_at(other, tier, place) and not is_at(other, tier, place_of(tier))
        assert torch.equal(other.read(0, 700)[0], near_key)
        made.close()
        made = other
    plain = moved(made, "host", 4, 700, place_of("host"))
    assert not isinstance(plain, Fp8Pages) and torch.equal(plain.read(0, 700)[1], near_value)
    made.close()


def test_a_store_changes_its_form_with_its_site():
    parts, store = rows_of(120), LayerStore()
    run_steps(store, parts, [60], site_of("host"))
    plain = store.nbytes().host
    attend(store, parts, 60, 61, site_of("host", place=place_of("host", kv_dtype="fp8")))
    assert isinstance(store.pages, Fp8Pages) and store.nbytes().host < plain
    assert torch.equal(store.full()[0], stood_for(parts)[1][:, :, :61])


def test_it_takes_about_half_of_what_16_bits_do():
    for tier, name in (("host", "host"), ("nvme", "nvme")):
        sizes = []
        for kind in ("model", "fp8"):
            place = place_of(tier, kv_dtype=kind, reserve_tokens=9600)
            made = make_tier(tier, (2, 128, 128, 4), torch.bfloat16, CPU, "auto", place)
            made.write(*torch.zeros(2, 2, 3, 128, dtype=torch.bfloat16), 0)
            sizes.append(getattr(made.held(), name))
            made.close()
        assert sizes[1] / sizes[0] == pytest.approx(260 / 512, rel=0.06)  # whole blocks, on a file
    with pytest.raises(StoreFullError) as refused:
        tier_of("host", host_budget=1000, reserve_tokens=100).reserve(100)
    assert refused.value.need == 100 * 3 * (8 + 6 + EXTRA)


@pytest.mark.parametrize("tier", TIERS)
def test_what_is_given_up_is_poisoned(tier, some):
    key, value, near_key, _ = some
    made = tier_of(tier, poison=True)
    made.write(key[:, :333], value[:, :333], 0)
    made.truncate(330)
    group = made.gather(torch.full((3, 1), 82), 4)
    assert torch.equal(group[0][:, :2], near_key[:, 328:330]) and bool(group[0][:, 2:].isnan().all())
    made.write(key[:, 330:], value[:, 330:], 330)
    assert torch.equal(made.read(0, 700)[0], near_key)
    made.close()


def test_damaged_pages_are_errors_as_ever(some, tmp_path):
    key, value, *_ = some
    made = tier_of("nvme", nvme_folder=str(tmp_path), nvme_cache=2**15)
    key, value = key.repeat(1, 8, 1), value.repeat(1, 8, 1)
    made.write(key, value, 0)
    file = made.coded._file  # type: ignore[attr-defined]
    import os

    fd = next(
        fd for fd in os.listdir("/proc/self/fd") if str(tmp_path) in _link(fd) and "(deleted)" in _link(fd)
    )
    with open(f"/proc/self/fd/{fd}", "r+b") as raw:
        raw.seek(5000)
        found = raw.read(1)
        raw.seek(5000)
        raw.write(bytes([found[0] ^ 1]))
    with pytest.raises(CorruptPageError, match="damaged"):
        made.read(0, 2000)
    assert file is not None
    made.close()


def _link(fd):
    import os

    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
