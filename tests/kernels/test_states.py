import gc
import threading

import pytest
import torch

from hga_compile.kernels.states import States


class State:
    length = 0


def states() -> States:
    made = States()
    made.make = State  # type: ignore[assignment]
    return made


def test_a_handle_names_its_state() -> None:
    open_states = states()
    first, second = open_states.open(), open_states.open()
    assert first.shape == (1,) and first.dtype == torch.int64 and first.device.type == "cpu"
    assert int(first) != int(second)
    assert open_states.get(first) is open_states.get(first.clone())
    assert open_states.get(first) is not open_states.get(second)
    kept = State()
    assert open_states.get(open_states.adopt(kept)) is kept  # type: ignore[arg-type]
    assert open_states.count() == 3


def test_a_handle_is_made_on_the_cpu_whatever_the_default_is() -> None:
    with torch.device("meta"):
        handle = states().open()
    assert handle.device.type == "cpu" and int(handle) > 0


def test_a_closed_handle_is_never_valid_again() -> None:
    open_states = states()
    first = open_states.open()
    open_states.close(first)
    assert open_states.count() == 0
    second = open_states.open()
    with pytest.raises(RuntimeError, match=f"K/V of handle {int(first)} is gone"):
        open_states.get(first)
    open_states.close(first)  # a second time: nothing happens
    assert open_states.count() == 1 and open_states.get(second)


def test_a_state_is_freed_at_the_next_open() -> None:
    freed = []

    class Heavy(State):
        def __del__(self) -> None:
            freed.append(self)

    open_states = states()
    open_states.close(open_states.adopt(Heavy()))  # type: ignore[arg-type]
    assert not freed
    open_states.open()
    gc.collect()
    assert len(freed) == 1


@pytest.mark.parametrize("number", [0, -1, 12345])
def test_a_number_that_was_never_a_handle_is_refused(number: int) -> None:
    with pytest.raises(RuntimeError, match="is gone: its cache was freed or belongs to another process"):
        states().get(torch.tensor([number]))


def test_says_when_no_store_is_loaded() -> None:
    with pytest.raises(RuntimeError, match="import hga_compile"):
        States().open()


def test_threads_open_and_close_at_once() -> None:
    open_states, errors = states(), []

    def work() -> None:
        try:
            for _ in range(300):
                handle = open_states.open()
                assert open_states.get(handle)
                open_states.close(handle)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and open_states.count() == 0


def test_who_watches_sees_what_its_thread_opens_and_no_more() -> None:
    open_states = states()
    before = open_states.open()
    with open_states.watch() as outer:
        first = open_states.open()
        with pytest.raises(ZeroDivisionError), open_states.watch() as inner:
            second = open_states.open()
            thread = threading.Thread(target=open_states.open)
            thread.start()
            thread.join()
            1 / 0  # noqa: B018 - what raises is not the watch
    after = open_states.open()
    assert [int(handle) for handle in inner] == [int(second)]
    assert [int(handle) for handle in outer] == [int(first), int(second)]
    assert int(before) < int(first) < int(second) < int(after)
