"""Threads that wait for a device: reads and writes under way at once."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache

__all__ = ["finish", "start"]

Task = Callable[[], None]


def start(tasks: Sequence[Task], threads: int) -> list[Future[None]]:
    """Begin to run tasks; with one thread they are done when this returns."""
    if threads > 1:
        executor = _executor(os.getpid(), threads)
        return [executor.submit(task) for task in tasks]
    futures = []
    for task in tasks:
        future: Future[None] = Future()
        try:
            task()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)
        futures.append(future)
    return futures


def finish(futures: Sequence[Future[None]]) -> None:
    """Wait for all of them, then raise what the first that failed raised.

    None is left running: what they read into may be given to others afterwards.
    """
    wait(futures)
    for future in futures:
        future.result()


@lru_cache(maxsize=8)
def _executor(process: int, threads: int) -> ThreadPoolExecutor:
    # By process: a forked child has none of its parent's threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="hga-nvme")
