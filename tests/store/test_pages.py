import pytest
import torch
from torch import Tensor

from hga_compile.configs.profile import Offload
from hga_compile.store import Held, Pages, tiers

ROWS, DIM, V_DIM = 3, 5, 7


def pages_of(
    group_size: int, device: torch.device, home: str | None = None, dtype: torch.dtype = torch.float32
) -> Pages:
    place = device if home is None else torch.device(home)
    return Pages(ROWS, DIM, V_DIM, group_size, dtype, device, place)


def rows(tokens: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    key = torch.arange(ROWS * tokens * DIM, device=device).view(ROWS, tokens, DIM)
    value = -torch.arange(ROWS * tokens * V_DIM, device=device).view(ROWS, tokens, V_DIM)
    return key.to(dtype), value.to(dtype)


@pytest.fixture(params=["compute", "cpu"])
def home(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "compute" else request.param


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_reads_what_was_written_at_every_place(
    group_size: int, device: torch.device, home: str | None
) -> None:
    key, value = rows(40, device)
    for begin in range(0, 20):
        for end in (begin + 1, begin + 2, begin + group_size, begin + 17, 40):
            pages = pages_of(group_size, device, home)
            pages.write(key[:, :begin], value[:, :begin], 0)
            pages.write(key[:, begin:end], value[:, begin:end], begin)
            got_key, got_value = pages.read(0, end)
            assert torch.equal(got_key, key[:, :end]) and torch.equal(got_value, value[:, :end])
            assert got_key.is_contiguous() and got_value.is_contiguous() and got_key.device == device


@pytest.mark.parametrize("group_size", [1, 4, 16])
def test_reads_any_range(group_size: int, device: torch.device, home: str | None) -> None:
    key, value = rows(40, device)
    pages = pages_of(group_size, device, home)
    pages.write(key, value, 0)
    for begin in range(41):
        for end in range(begin, 41):
            got_key, got_value = pages.read(begin, end)
            assert torch.equal(got_key, key[:, begin:end]) and torch.equal(got_value, value[:, begin:end])


@pytest.mark.parametrize("group_size", [1, 4])
def test_writing_again_replaces_these_tokens_only(group_size: int, device: torch.device) -> None:
    key, value = rows(40, device)
    for begin in range(0, 12):
        for end in range(begin, begin + 10):
            pages = pages_of(group_size, device)
            pages.write(key, value, 0)
            pages.write(key[:, begin:end] + 0.5, value[:, begin:end] - 0.5, begin)
            want_key, want_value = key.clone(), value.clone()
            want_key[:, begin:end] += 0.5
            want_value[:, begin:end] -= 0.5
            got_key, got_value = pages.read(0, 40)
            assert torch.equal(got_key, want_key) and torch.equal(got_value, want_value)


def test_takes_rows_of_any_layout(device: torch.device) -> None:
    key, value = rows(12, device)
    pages = pages_of(4, device)
    pages.write(key.transpose(1, 2).contiguous().transpose(1, 2), value[:, :1].expand(-1, 12, -1), 0)
    got_key, got_value = pages.read(0, 12)
    assert torch.equal(got_key, key) and torch.equal(got_value, value[:, :1].expand(-1, 12, -1))


@pytest.mark.parametrize("steps", [[1] * 700, [500, 1, 199], [3, 64, 633]])
def test_growing_keeps_what_is_stored(steps: list[int], device: torch.device, home: str | None) -> None:
    key, value = rows(700, device)
    pages, begin, copies = pages_of(4, device, home), 0, 0
    for step in steps:
        before = pages.buffer.data_ptr()
        pages.write(key[:, begin : begin + step], value[:, begin : begin + step], begin)
        copies += pages.buffer.data_ptr() != before
        begin += step
    got_key, got_value = pages.read(0, 700)
    assert torch.equal(got_key, key) and torch.equal(got_value, value)
    assert copies <= 6, "growing must not copy everything for each token"


def test_reserving_says_how_much_is_allocated(device: torch.device) -> None:
    pages = pages_of(4, device, dtype=torch.bfloat16)
    assert pages.held() == Held()
    pages.reserve(1000)
    assert sum(pages.held()) == 250 * ROWS * 4 * (DIM + V_DIM) * 2
    pages.reserve(900)
    assert sum(pages.held()) == 250 * ROWS * 4 * (DIM + V_DIM) * 2
    pages.reserve(1001)
    assert 251 <= pages.buffer.shape[0] <= 250 * 1.25 + 65


@pytest.mark.parametrize("group_size", [1, 4])
def test_gathers_other_groups_for_each_row(group_size: int, device: torch.device, home: str | None) -> None:
    key, value = rows(24, device)
    pages = pages_of(group_size, device, home)
    pages.write(key, value, 0)
    groups = torch.randint(0, 24 // group_size, (ROWS, 9)).to(device)
    got_key, got_value = pages.gather(groups, group_size)
    assert got_key.shape == (ROWS, 9 * group_size, DIM) and got_value.shape == (ROWS, 9 * group_size, V_DIM)
    assert got_key.device == device
    for row in range(ROWS):
        tokens = (groups[row, :, None] * group_size + torch.arange(group_size, device=device)).flatten()
        assert torch.equal(got_key[row], key[row, tokens]) and torch.equal(got_value[row], value[row, tokens])
    nothing, _ = pages.gather(groups[:, :0], group_size)
    assert nothing.shape == (ROWS, 0, DIM)


def test_gathers_a_group_that_is_not_full(device: torch.device) -> None:
    key, value = rows(6, device)
    pages = pages_of(4, device)
    pages.write(key, value, 0)
    got_key, _ = pages.gather(torch.ones(ROWS, 1, dtype=torch.int64, device=device), 4)
    assert torch.equal(got_key[:, :2], key[:, 4:])


def test_gathering_groups_of_another_size_is_an_error(device: torch.device) -> None:
    with pytest.raises(ValueError, match="groups of 4 tokens, got a request for 8"):
        pages_of(4, device).gather(torch.zeros(ROWS, 1, dtype=torch.int64), 8)


@pytest.mark.parametrize("tokens", [4, 10])
@pytest.mark.parametrize("group_size", [4, 16])
def test_what_was_read_never_changes(group_size: int, tokens: int, device: torch.device) -> None:
    key, value = torch.ones(1, tokens, DIM, device=device), torch.ones(1, tokens, V_DIM, device=device)
    pages = Pages(1, DIM, V_DIM, group_size, torch.float32, device, device)
    pages.write(key, value, 0)
    read, gathered = (
        pages.read(0, tokens),
        pages.gather(torch.zeros(1, 1, dtype=torch.int64, device=device), group_size),
    )
    pages.write(0 * key, 0 * value, 0)
    for part in (*read, gathered[0][:, :4], gathered[1][:, :4]):
        assert torch.equal(part, torch.ones_like(part))
    read[0].fill_(9.0)
    assert not pages.read(0, tokens)[0].any()


def test_selects_rows(device: torch.device, home: str | None) -> None:
    key, value = rows(10, device)
    pages = pages_of(4, device, home)
    pages.write(key, value, 0)
    chosen = torch.tensor([2, 0, 2, 1], device=device)
    pages.select_rows(chosen)
    assert pages.rows == 4
    got_key, got_value = pages.read(0, 10)
    assert torch.equal(got_key, key[chosen]) and torch.equal(got_value, value[chosen])
    pages.write(torch.zeros(4, 300, DIM, device=device), torch.zeros(4, 300, V_DIM, device=device), 10)
    assert torch.equal(pages.read(0, 10)[0], key[chosen])


@pytest.mark.parametrize(("old", "new"), [(4, 16), (16, 4), (4, 1), (4, 4)])
def test_moves_to_another_group_size(old: int, new: int, device: torch.device, home: str | None) -> None:
    key, value = rows(37, device)
    pages = pages_of(old, device)
    pages.write(key, value, 0)
    moved = tiers.moved(pages, "host" if home else "gpu", new, 33, Offload())
    assert moved.group_size == new
    got_key, got_value = moved.read(0, 33)
    assert torch.equal(got_key, key[:, :33]) and torch.equal(got_value, value[:, :33])
    moved.write(0 * key, 0 * value, 0)
    assert torch.equal(pages.read(0, 37)[0], key)
    assert tiers.moved(pages, "gpu", new, 0, Offload()).held() == Held()


def test_a_clone_is_independent(device: torch.device, home: str | None) -> None:
    key, value = rows(10, device)
    pages = pages_of(4, device, home)
    pages.write(key, value, 0)
    clone = pages.clone()
    clone.write(0 * key, 0 * value, 0)
    pages.write(key[:, :1] + 1, value[:, :1], 3)
    assert torch.equal(pages.read(0, 3)[0], key[:, :3])
    assert not clone.read(0, 10)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_keeps_every_bit(dtype: torch.dtype, device: torch.device) -> None:
    key = torch.randn(ROWS, 9, DIM, device=device).to(dtype)
    key[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -0.0], device=device)
    value = torch.randn(ROWS, 9, V_DIM, device=device).to(dtype)
    pages = pages_of(4, device, dtype=dtype)
    pages.write(key, value, 0)
    got, _ = pages.read(0, 9)
    assert got.dtype == dtype and torch.equal(got.view(torch.uint8), key.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_host_pages_of_a_gpu_stay_pinned() -> None:
    gpu = torch.device("cuda", torch.cuda.current_device())
    pages = pages_of(4, gpu, "cpu")
    key, value = rows(10, gpu)
    pages.write(key, value, 0)
    assert pages.buffer.is_pinned()
    pages.select_rows(torch.tensor([1, 0]))
    assert pages.buffer.is_pinned() and pages.clone().buffer.is_pinned()
