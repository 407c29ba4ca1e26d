import threading

import pytest
import torch

from hga_compile.kernels.ledger import Ledger, RouteRecord, Use


def record(layer: int = 0, first: int = 0) -> RouteRecord:
    return RouteRecord(layer, first, 4, torch.ones(1, 1, 2, 3, dtype=torch.bool))


def test_counters_are_kept_by_layer_and_phase() -> None:
    ledger = Ledger()
    ledger.use(3, "prefill").calls += 1
    ledger.use(3, "decode").calls += 5
    ledger.use(1, "prefill").calls += 2
    assert {place: use.calls for place, use in ledger.uses().items()} == {
        (1, "prefill"): 2,
        (3, "decode"): 5,
        (3, "prefill"): 1,
    }
    assert list(ledger.uses()) == sorted(ledger.uses())
    ledger.reset()
    assert ledger.uses() == {}


def test_attended_adds_up_numbers_and_tensors(device: torch.device) -> None:
    use = Use()
    use.add_attended(5)
    count = torch.tensor(7, device=device)
    use.add_attended(count)
    use.add_attended(count)
    count += 100  # what the caller does with it later is its own affair
    use.add_attended(torch.tensor(2**40, device=device))
    assert use.attended == 19 + 2**40
    assert use.attended == 19 + 2**40


def test_attended_goes_on_after_inference_mode() -> None:
    use = Use()
    with torch.inference_mode():
        use.add_attended(torch.ones(3).bool().sum())
    use.add_attended(torch.ones(4).bool().sum())
    with torch.inference_mode():
        use.add_attended(torch.ones(5).bool().sum())
        assert use.attended == 12


def test_fallbacks_are_counted_by_reason() -> None:
    ledger = Ledger()
    for reason in ("gaps", "gaps", "other"):
        ledger.count_fallback(reason)
    fallbacks = ledger.fallbacks()
    assert fallbacks == {"gaps": 2, "other": 1}
    fallbacks["gaps"] = 0
    assert ledger.fallbacks()["gaps"] == 2
    ledger.reset()
    assert ledger.fallbacks() == {}


def test_records_go_to_those_who_asked_for_the_layer() -> None:
    ledger = Ledger()
    assert not ledger.wants(0)
    with ledger.recording() as everything, ledger.recording([2, 4]) as some:
        assert ledger.wants(0) and ledger.wants(4)
        for layer in range(5):
            ledger.record(record(layer))
    assert [each.layer for each in everything] == [0, 1, 2, 3, 4]
    assert [each.layer for each in some] == [2, 4]
    with ledger.recording([]) as none:
        assert not ledger.wants(0)
        ledger.record(record())
    assert none == [] and not ledger.wants(0)
    ledger.record(record())
    assert len(everything) == 5


def test_recordings_of_the_same_layers_end_each_for_itself() -> None:
    ledger = Ledger()
    with ledger.recording() as outer:
        with ledger.recording() as inner:
            pass
        ledger.record(record())
        assert (len(outer), len(inner)) == (1, 0)
        with ledger.recording() as inner:
            ledger.record(record(first=0))
        ledger.record(record(first=1))
        assert (len(outer), len(inner)) == (3, 1)


def test_a_recording_ends_with_an_error_too() -> None:
    ledger = Ledger()
    with pytest.raises(KeyError), ledger.recording():
        raise KeyError
    assert not ledger.wants(0)


def test_threads_do_not_lose_counts() -> None:
    ledger = Ledger()

    def work() -> None:
        for number in range(300):
            ledger.count_fallback("many")
            ledger.use(number % 7, "decode")
            with ledger.recording() as mine:
                ledger.record(record())
            assert mine

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.fallbacks() == {"many": 1200}
    assert len(ledger.uses()) == 7 and not ledger.wants(0)


def test_hits_on_a_device_are_counted_once_and_those_of_a_cache_that_is_gone_too():
    class Owner:
        pass

    ledger, owner, counts = Ledger(), Owner(), torch.tensor([[3, 1], [4, 0]])
    ledger.count_on_device(5, owner, counts)
    counts[0] += torch.tensor([10, 2])
    for _ in range(2):
        use = ledger.uses()[5, "decode"]
        assert (use.hits, use.misses) == (17, 3)
    counts[1, 1] += 1
    del owner
    use = ledger.uses()[5, "decode"]
    assert (use.hits, use.misses) == (17, 4)
    counts += 100
    assert ledger.uses()[5, "decode"].misses == 4 and not ledger._devices


def test_hits_before_a_reset_are_not_counted_after_it():
    ledger, counts = Ledger(), torch.tensor([[3, 1]])
    ledger.count_on_device(0, ledger, counts, told=(1, 1))
    ledger.reset()
    counts += 1
    use = ledger.uses()[0, "decode"]
    assert (use.hits, use.misses) == (1, 1)


def test_caches_that_come_and_go_do_not_pile_up():
    ledger = Ledger()
    for _ in range(700):
        ledger.count_on_device(0, {1}, torch.tensor([[1, 0]]))
    assert len(ledger._devices) < 300
    assert ledger.uses()[0, "decode"].hits == 700
