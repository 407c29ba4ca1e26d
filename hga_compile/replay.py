"""Decode steps of a compiled graph recorded as one CUDA graph, and replayed while the sequence grows.

A graph is recorded for one cache and a stretch of positions. What it reads of the CPU is what never changes
in it: everything that depends on the length is in GPU memory (see `kernels.device_step`). When another cache
comes, or the stretch is over, or somebody else has written to the cache, the step runs kernel by kernel
again, and a new graph is recorded after a few of these.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any, Protocol, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from hga_compile.kernels.device_step import DeviceStep, NotReplayed, StepCosts, count_steps, stepping
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.states import STATES
from hga_compile.kernels.stretch import last_position
from hga_compile.passes.replayable import StepForm
from hga_compile.store.errors import StoreError
from hga_compile.store.layer import LayerStore
from hga_compile.store.stepping import costs as costs_of
from hga_compile.store.stepping import prepare, stepped

__all__ = ["RECORDER", "Recorder", "Replay"]

log = logging.getLogger(__name__)

# Steps that follow each other on one cache before they are recorded: kernels are compiled by then, and short
# answers are over.
_WAIT = 8
# Bytes of inputs that may be copied before each replay: tokens, positions and embeddings, but no weights.
_COPIED = 2**23


class Recorder(Protocol):
    """What records a run of kernels."""

    def serves(self, device: torch.device) -> bool:
        """Say whether it can record what runs on a device."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return what runs the same kernels again, on the same memory, and what `run` returned."""


class _CUDA:
    """Recorder of CUDA graphs."""

    def serves(self, device: torch.device) -> bool:
        """Say whether it can record what runs on a device."""
        return device.type == "cuda"

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return the replay of a CUDA graph, and the memory that its results are written to."""
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: what they allocate is none of the graph's business.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out


RECORDER: Recorder = _CUDA()
"""What records decode steps."""


@dataclass
class Replayed:
    """A recorded step."""

    inputs: list[Any]
    """What it was recorded with: tensors that it reads where they are, and copies of the others."""
    read: Callable[[Sequence[Any]], tuple[Tensor, ...]]
    """Picks of the inputs of a call those that are read where they are: hundreds of weights."""
    there: tuple[Tensor, ...]
    """What it picked of those that were recorded."""
    addresses: list[int]
    """Where these were."""
    copied: list[int]
    """Numbers of those that are copied before each replay."""
    step: DeviceStep
    states: list[ReferenceType[LayerStore]]
    """Not held: a cache that nobody has any more is gone."""
    versions: list[int]
    costs: list[StepCosts]
    counted: int
    """Position before which the ledger knows of its steps."""
    done: int
    """Position before which it has run."""
    replay: Callable[[], None] = lambda: None
    out: Any = None
    """Memory that results are written to."""


class Replay:
    """A compiled decode graph whose steps are recorded once they follow each other.

    Parameters
    ----------
    call : callable
        The compiled graph.
    form : StepForm
        What of it changes from step to step.
    """

    def __init__(self, call: Callable[..., Any], form: StepForm) -> None:
        self.call, self.form, self.recorder = call, form, RECORDER
        self._kept = {site.handle for site in form.sites}
        self._lengths = tuple(dict.fromkeys(site.length for site in form.sites))  # one for most models
        self._recorded: Replayed | None = None
        self._previous: Sequence[Any] = ()
        self._length = self._streak = 0
        self._wait = _WAIT
        self._refused = False
        self._lock = threading.Lock()
        LEDGER.settle_with(self._settle)

    def __call__(self, *inputs: Any) -> Any:
        """Run a step: replayed if it follows on those before it."""
        # Whoever records a graph of their own gets the kernels; a graph has one place for its inputs.
        if self._refused or _recording() or not self._lock.acquire(blocking=False):
            return self.call(*inputs)
        try:
            return self._step(inputs)
        finally:
            self._lock.release()

    def _step(self, inputs: Sequence[Any]) -> Any:
        lengths = {length.of(inputs) for length in self._lengths}
        length = lengths.pop()
        recorded = self._recorded
        if any(not bool(inputs[i].all()) for i in self.form.masks):
            # Lines of a book know nothing of padding. This waits for the GPU, as whoever wants a token does.
            self._drop()
            self._streak = 0
            return self.call(*inputs)
        if recorded is not None and not lengths:
            states = self._fits(recorded, inputs, length)
            if states is not None:
                return self._replayed(recorded, states, inputs, length)
        self._drop()
        same = len(inputs) == len(self._previous) and all(inputs[i] is self._previous[i] for i in self._kept)
        self._streak = self._streak + 1 if same and not lengths and length == self._length + 1 else 0
        self._length = length
        previous, self._previous = self._previous, inputs
        if self._streak >= self._wait:
            self._streak, self._previous = 0, ()
            try:
                return self._record(inputs, previous, length)
            except (NotReplayed, StoreError) as error:
                # Nothing has been counted as stored: the step runs from its beginning.
                self._wait *= 2
                LEDGER.count_fallback(f"decode steps are not one CUDA graph: {error}")
        return self.call(*inputs)

    def _places(self, inputs: Sequence[Any]) -> set[torch.device]:
        """Return where tensors are that kernels read."""
        others = {*self._kept, *self.form.constants}
        return {v.device for i, v in enumerate(inputs) if isinstance(v, Tensor) and i not in others}

    def _fits(self, recorded: Replayed, inputs: Sequence[Any], length: int) -> list[LayerStore] | None:
        """Return the layers of a recorded step that may stand for this one; None where it may not."""
        if length > recorded.step.last or LEDGER.watched:
            return None
        states = [state for held in recorded.states if (state := held()) is not None]
        if len(states) < len(recorded.states):
            return None
        now = [(state.version, state.length) for state in states]
        if now != [(version, length - 1) for version in recorded.versions]:
            return None
        # The same tensor may have got other memory (``parameter.data = ...``).
        given = recorded.read(inputs)
        if not all(map(is_, given, recorded.there)) or _addresses(given) != recorded.addresses:
            return None
        if any(not torch.equal(inputs[i], recorded.inputs[i]) for i in self.form.constants):
            return None
        alike = all(_like(inputs[i], recorded.inputs[i]) for i in recorded.copied)
        return states if alike else None

    def _record(self, inputs: Sequence[Any], previous: Sequence[Any], length: int) -> Any:
        """Run a step as it is to be recorded, and record it."""
        states = [cast(LayerStore, STATES.get(inputs[site.handle])) for site in self.form.sites]
        places = self._places(inputs)
        device = next(iter(places), None)
        if device is None or len(places) > 1 or not self.recorder.serves(device):
            raise NotReplayed("tensors that are not all on one GPU")
        # What is the same tensor in step after step is read where it is: weights are not copied.
        others = {*self.form.masks, *self.form.constants}
        numbers = [i for i, v in enumerate(inputs) if isinstance(v, Tensor) and i not in others]
        copied = [i for i in numbers if inputs[i] is not previous[i]]
        read = _picker([i for i in numbers if inputs[i] is previous[i]])
        there = read(inputs)
        if sum(inputs[i].nbytes for i in copied) > _COPIED:
            raise NotReplayed("weights that are brought to the GPU at every step")
        last = last_position(length)
        step = DeviceStep(length - 1, last, device)
        for state, site in zip(states, self.form.sites, strict=True):
            prepare(state, step, site.config)
        held = list(inputs)
        with torch.inference_mode(False):  # written to outside of it too
            for i in (*copied, *self.form.constants):
                held[i] = inputs[i].clone()
        step.seek(length - 1)
        with stepping(step):
            first = self.call(*held)
        for state in states:
            stepped(state, length)
        versions, costs = [state.version for state in states], [costs_of(state) for state in states]
        self._recorded = recorded = Replayed(
            held, read, there, _addresses(there), copied, step, [ref(state) for state in states], versions,
            costs, length - 1, length,
        )  # fmt: skip
        try:
            with stepping(step):
                recorded.replay, recorded.out = self.recorder.record(lambda: self.call(*held))
        except RuntimeError as error:
            # The step itself has run; the next ones run as before.
            self._drop()
            self._refused = True
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            log.warning("a decode step could not be recorded as a CUDA graph: %s", reason)
            LEDGER.count_fallback(f"decode steps are not one CUDA graph: {reason}")
            return first
        log.info("recorded a decode step of %d layers for up to %d tokens", len(states), last)
        return first

    def _replayed(
        self, recorded: Replayed, states: list[LayerStore], inputs: Sequence[Any], length: int
    ) -> Any:
        for i in recorded.copied:
            recorded.inputs[i].copy_(inputs[i], non_blocking=True)
        recorded.step.seek(length - 1)
        recorded.replay()
        for state in states:
            stepped(state, length)
        recorded.done = length
        values = (recorded.out,) if self.form.single else recorded.out
        # The next replay writes to the same memory.
        outputs = [
            value.clone() if isinstance(value, Tensor) else value if number is None else number.of(inputs)
            for value, number in zip(values, self.form.outputs, strict=True)
        ]
        return outputs[0] if self.form.single else type(recorded.out)(outputs)

    def _settle(self) -> None:
        """Tell the ledger of steps that it does not know of."""
        recorded = self._recorded
        if recorded is None or recorded.counted == recorded.done:
            return
        first = recorded.step.first
        lines = slice(recorded.counted - first, recorded.done - first)
        recorded.counted = recorded.done
        for costs, site in zip(recorded.costs, self.form.sites, strict=True):
            routing = site.config.routing
            count_steps(recorded.step.book(routing), lines, site.config.layer, routing, costs)

    def _drop(self) -> None:
        """Forget the recorded step."""
        self._settle()
        self._recorded = None


def _recording() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _picker(numbers: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what picks these of a sequence, without a loop in Python."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    return lambda values: tuple(values[i] for i in numbers)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _like(given: Any, own: Tensor) -> bool:
    return isinstance(given, Tensor) and (given.shape, given.dtype, given.device) == (
        own.shape,
        own.dtype,
        own.device,
    )
