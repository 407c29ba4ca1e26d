"""Host RAM: a budget for the process, the control group's limit, growth without a copy, refusals."""

import gc
from pathlib import Path

import pytest
import torch
from store_cases import attend, place_of, rows_of, run_steps, site_of

from hga_compile.store import Held, LayerStore, Pages, host_memory, host_range
from hga_compile.store.errors import StoreFullError
from hga_compile.store.host_memory import HostMemory, Lease, available_bytes
from hga_compile.store.host_range import HostRange

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Return the process's count, made anew, with 8 MiB of RAM left."""
    gc.collect()
    memory = HostMemory(lambda: 8 * MIB)
    monkeypatch.setattr(host_memory, "HOST", memory)
    return memory


# --- counting ---


def test_leases_share_one_budget(memory: HostMemory) -> None:
    one, other = Lease(5 * MIB), Lease(5 * MIB)
    one.resize(3 * MIB)
    other.resize(2 * MIB)
    with pytest.raises(
        StoreFullError, match=r"budget .* used up: got a need for 1 bytes, expected at most 0"
    ):
        other.resize(2 * MIB + 1)
    assert (one.held, other.held, memory.taken) == (3 * MIB, 2 * MIB, 5 * MIB)
    one.resize(MIB)
    other.resize(4 * MIB)
    del one
    assert memory.taken == 4 * MIB


def test_without_a_budget_it_is_what_the_machine_has_left(memory: HostMemory) -> None:
    lease = Lease(None)
    lease.resize(5 * MIB)
    # The machine still says 8, as nobody has touched the 5 yet.
    with pytest.raises(
        StoreFullError, match=r"host RAM is full: .* at most 3,145,728 \(offload.host_budget\)"
    ):
        Lease(None).resize(4 * MIB)
    lease.resize(8 * MIB)


@pytest.mark.parametrize(
    ("version", "inner", "outer", "expected"),
    [
        (2, ("max", 100), ("1000", 400), 600),
        (2, ("300", 100), ("1000", 400), 200),
        (2, ("300", 350), ("1000", 400), 0),
        (1, ("9223372036854771712", 100), ("1000", 400), 600),
        (1, ("250", 100), ("1000", 400), 150),
    ],
)
def test_control_groups_bound_it(
    version: int, inner: tuple[str, int], outer: tuple[str, int], expected: int, tmp_path: Path
) -> None:
    group = "0::/a/b\n" if version == 2 else "5:cpu:/\n4:cpuset,memory:/a/b\n0::/\n"
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group)
    base = tmp_path / "sys/fs/cgroup" / ("" if version == 2 else "memory")
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    (base / "a/b").mkdir(parents=True)
    for folder, (limit, used) in ((base / "a/b", inner), (base / "a", outer)):
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
    assert available_bytes(str(tmp_path)) == expected


def test_file_pages_of_a_control_group_count_as_free(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 300\ninactive_file 600\n")):
        (group / f"memory.{name}").write_text(text)
    assert available_bytes(str(tmp_path)) == 700


def test_this_machine_has_some_left() -> None:
    assert 0 < available_bytes() <= host_memory.psutil.virtual_memory().total


# --- growing ---


def test_a_range_grows_where_it_is_and_keeps_its_bytes() -> None:
    memory = HostRange()
    first = memory.resized(10_000, 0)
    first[:] = torch.arange(10_000).to(torch.uint8)
    larger = memory.resized(50_000_000, 10_000)
    assert larger.data_ptr() == first.data_ptr() and larger.numel() == 50_000_000
    assert torch.equal(larger[:10_000], first)
    larger[20_000:30_000] = 1
    memory.resized(10_000, 10_000)
    again = memory.resized(40_000, 10_000)
    assert again.data_ptr() == first.data_ptr() and torch.equal(again[:10_000], first)
    assert not again[20_480:30_000].any(), "the system had it meanwhile"


def test_a_range_whose_addresses_are_used_up_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_range, "_SPAN", 2**16)
    memory = HostRange()
    first = memory.resized(10_000, 0)
    first[:] = torch.arange(10_000).to(torch.uint8)
    want = first.clone()
    del first
    system = memory._memory
    larger = memory.resized(50_000_000, 10_000)
    assert memory._memory is system, "nothing was copied"
    assert torch.equal(larger[:10_000], want) and larger.numel() == 50_000_000
    # Somebody holds a view: it must stay what it was.
    held = larger[:10_000]
    largest = memory.resized(60_000_000, 10_000)
    assert torch.equal(largest[:10_000], want) and torch.equal(held, want)
    assert memory._memory is not system


def test_a_range_that_the_system_does_not_have() -> None:
    memory = HostRange()
    memory.resized(5000, 0)[:] = 3
    with pytest.raises(StoreFullError, match=r"host RAM is full.*offload\.host_budget"):
        memory.resized(2**60, 5000)
    assert torch.equal(memory.bytes[:5000], torch.full((5000,), 3, dtype=torch.uint8))


def test_room_is_made_at_once_where_the_profile_knows_the_length(memory: HostMemory) -> None:
    place = place_of("host", reserve_tokens=1000)
    made = Pages(2, 8, 8, 4, torch.float32, CPU, CPU, "auto", place)
    assert made.held() == Held()
    key = torch.randn(2, 1000, 8)
    made.write(key[:, :3], key[:, :3], 0)
    exact = 1000 * 2 * 16 * 4
    assert made.held().host == exact == memory.taken
    made.write(key[:, 3:], key[:, 3:], 3)
    assert made.held().host == exact
    made.write(key[:, :1], key[:, :1], 1000)
    assert exact < made.held().host <= 1.26 * exact + 65 * 2 * 64 * 4
    assert torch.equal(made.read(0, 1000)[0], key)


def test_room_of_tokens_that_were_given_up_is_given_back(memory: HostMemory) -> None:
    made = Pages(2, 8, 8, 4, torch.float32, CPU, CPU)
    key = torch.randn(2, 4000, 8)
    made.write(key, key, 0)
    made.truncate(3000)
    assert made.held().host >= 4000 * 2 * 16 * 4
    made.truncate(1000)
    assert made.held().host == 1000 * 2 * 16 * 4 == memory.taken
    assert torch.equal(made.read(0, 1000)[0], key[:, :1000])
    made.write(key[:, :500], -key[:, :500], 1000)
    assert torch.equal(made.read(1000, 1500)[1], -key[:, :500])
    made.truncate(0)
    assert made.held() == Held() and memory.taken == 0


# --- refusing ---


def test_a_used_up_budget_leaves_the_cache_as_it_was(memory: HostMemory) -> None:
    parts = rows_of(600)
    exact = 2 * 2 * 2 * 64 * 4
    place = place_of("host", host_budget=350 * exact)
    site, store = site_of("host", place=place), LayerStore()
    outs = run_steps(store, parts, [200, 1, 1], site)
    with pytest.raises(
        StoreFullError, match=r"budget for K/V is used up.*\(offload.host_budget\)"
    ) as refused:
        attend(store, parts, 202, 600, site)
    assert refused.value.need > refused.value.free and refused.value.knob == "offload.host_budget"
    assert store.length == 202 and store.nbytes().host <= 350 * exact
    assert torch.equal(store.full()[0], parts[1][:, :, :202])
    # Steps that fit go on, up to the last token that does.
    outs += [attend(store, parts, at, at + 1, site) for at in range(202, 348)]
    fresh = LayerStore()
    want = run_steps(fresh, parts, [200, *[1] * 148], site_of("gpu"))
    fresh.close()
    assert all(torch.equal(one, other) for one, other in zip(outs, want, strict=True))
    del store, refused  # its traceback has the store
    assert memory.taken == 0
    assert run_steps(LayerStore(), parts, [200], site)[0].shape[2] == 200


def test_no_layer_takes_room_that_others_need(memory: HostMemory) -> None:
    """Sixteen layers fill a budget to the last token, step by step."""
    place = place_of("host", host_budget=16 * 100 * 4 * 2 * 16 * 4)
    layers = [Pages(2, 8, 8, 4, torch.float32, CPU, CPU, "auto", place) for _ in range(16)]
    key = torch.randn(2, 404, 8)
    for at in range(400):
        for layer in layers:
            layer.write(key[:, at : at + 1], key[:, at : at + 1], at)
    with pytest.raises(StoreFullError):
        layers[0].write(key[:, :1], key[:, :1], 400)
    assert all(torch.equal(layer.read(0, 400)[0], key[:, :400]) for layer in layers)


def test_more_sequences_than_fit_leave_those_that_were_there(memory: HostMemory) -> None:
    parts = rows_of(100)
    place = place_of("host", host_budget=250 * 2 * 2 * 2 * 64 * 4)
    store = LayerStore()
    run_steps(store, parts, [100], site_of("host", place=place))
    with pytest.raises(StoreFullError):
        store.select_batch(torch.tensor([0, 1] * 4))
    assert store.batch == 2 and torch.equal(store.full()[1], parts[2])


def test_memory_of_a_cache_that_is_gone_counts_no_more(memory: HostMemory) -> None:
    from hga_compile.kernels.states import STATES

    parts, place = rows_of(300), place_of("host", host_budget=400 * 2 * 2 * 2 * 64 * 4)
    first = STATES.open()
    run_steps(STATES.get(first), parts, [300], site_of("host", place=place))
    STATES.close(first)  # as a finaliser does: nothing is dropped yet
    store = LayerStore()
    run_steps(store, parts, [300], site_of("host", place=place))
    assert store.length == 300


def test_the_nvme_tier_takes_its_ram_from_the_budget_and_goes_on_without(memory: HostMemory) -> None:
    parts, want = rows_of(300), run_steps(LayerStore(), rows_of(300), [299, 1], site_of("gpu"))
    for budget, most in ((2**19, 2**19), (1, 0)):
        place = place_of("nvme", nvme_cache=2**30, host_budget=budget)
        store = LayerStore()
        got = run_steps(store, parts, [299, 1], site_of("nvme", place=place))
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        assert memory.taken <= most + 2**20
        store.close()
