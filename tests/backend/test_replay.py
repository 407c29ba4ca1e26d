"""Decode steps recorded once and replayed: on a GPU as a CUDA graph; in Triton's interpreter by running again
what was recorded, with every number that the CPU held then."""

import contextvars
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

import hga_compile
from hga_compile import HGACache
from hga_compile import replay as replay_module
from hga_compile.kernels import stretch
from hga_compile.kernels.device_step import current_step
from hga_compile.kernels.ledger import LEDGER

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS = {
    "inner": "eager", "kernels": "triton", "compile.cuda_graph": True, "prefill": "dense",
    "routing.dense_below": 64, "routing.centre_tokens": 32, "routing.sinks": 4,
    "routing.budget": {"tokens": 40, "fraction": None},
}  # fmt: skip


class Again:
    """Runs the recorded call again, as a graph of kernels would: nothing that the CPU knows is new to it."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def serves(self, device: torch.device) -> bool:
        return True

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        out, context = run(), contextvars.copy_context()

        def again() -> None:
            self.replays += 1
            current_step().begin()
            for old, new in zip(tree_leaves(out), tree_leaves(run()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return lambda: context.run(again), out


class Graphs(Again):
    """Counts what is recorded and replayed on a GPU."""

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        replay, out = replay_module._CUDA().record(run)
        self.recorded += 1

        def counted() -> None:
            self.replays += 1
            replay()

        return counted, out


@pytest.fixture
def place() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not INTERPRETED:
        pytest.skip("needs a CUDA device (slow tests run this file in Triton's interpreter)")
    return torch.device("cpu")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, place: torch.device) -> Again:
    found = Graphs() if place.type == "cuda" else Again()
    monkeypatch.setattr(replay_module, "RECORDER", found)
    monkeypatch.setattr(replay_module, "_WAIT", 2)
    monkeypatch.setattr(stretch, "_ROOM", 4)
    monkeypatch.setattr(stretch, "_STRETCH", 8)
    return found


@pytest.fixture
def model(place: torch.device) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=1, vocab_size=97, max_position_embeddings=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().to(place)
    yield model
    torch.compiler.reset()


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="hga", options={**OPTIONS, **options})


def generate(model: Any, ids: torch.Tensor, tokens: int, **more: Any) -> torch.Tensor:
    more.setdefault("past_key_values", HGACache(model.config))
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **more)


def prompt(place: torch.device, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (batch, 90), generator=torch.Generator().manual_seed(1)).to(place)


@pytest.mark.parametrize(("tier", "batch", "hot"), [("gpu", 1, None), ("host", 2, None), ("host", 1, 0.3)])
def test_replayed_steps_give_the_tokens_and_counts_of_steps_that_are_not(
    model: Any, place: torch.device, recorder: Again, tier: str, batch: int, hot: float | None
) -> None:
    if hot is not None and place.type != "cuda":
        pytest.skip("a hot cache needs pinned memory")
    ids, offload = prompt(place, batch), {"offload.tier": tier, "offload.hot_cache": hot}
    plain = generate(compiled(model, **offload, **{"compile.cuda_graph": False}), ids, 12)
    want = hga_compile.report()
    torch.compiler.reset()
    hga_compile.reset_report(sites=True)
    cache = HGACache(model.config)
    routed = compiled(model, **offload)
    got = generate(routed, ids, 12, past_key_values=cache)
    assert torch.equal(got, plain)
    assert recorder.recorded == 1
    assert recorder.replays >= 6
    found = hga_compile.report()
    assert found.fallbacks == want.fallbacks
    assert found.layers == want.layers
    assert cache.get_seq_length() == 101
    key, _ = cache.layers[0].state.full()
    assert key.shape == (batch, 2, 101, 16)
    # What is counted begins anew, and the steps go on.
    hga_compile.reset_report()
    before = recorder.replays
    generate(routed, got, 2, past_key_values=cache)
    total = hga_compile.report().totals("decode")
    assert recorder.replays == before + 2
    assert total.kv_bytes == total.attended * 2 * 16 * 4 > 0


def test_a_cache_goes_on_after_replays_in_every_other_way(
    model: Any, place: torch.device, recorder: Again
) -> None:
    def conversation(routed: Any) -> list[torch.Tensor]:
        ids, cache = prompt(place), HGACache(model.config)
        texts = [generate(routed, ids, 6, past_key_values=cache)]
        # Several tokens at once, then steps again.
        texts.append(generate(routed, torch.cat([texts[0], ids[:, :5]], 1), 6, past_key_values=cache))
        length = cache.get_seq_length()
        # Back by some tokens: they are replaced.
        cache.crop(-4)
        assert cache.get_seq_length() == length - 4
        texts.append(generate(routed, texts[1][:, :-4], 6, past_key_values=cache))
        return texts

    want = conversation(compiled(model, **{"compile.cuda_graph": False}))
    torch.compiler.reset()
    got = conversation(compiled(model))
    assert recorder.recorded >= 3
    assert recorder.replays > 0
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def test_another_cache_is_recorded_anew_and_a_freed_one_is_not_held(
    model: Any, place: torch.device, recorder: Again
) -> None:
    from hga_compile.kernels.states import STATES

    gc.collect()
    others = STATES.count()  # of tests before it
    routed, ids = compiled(model), prompt(place)
    first = generate(routed, ids, 7)
    once = recorder.recorded
    second = generate(routed, ids.flip(1), 7)
    assert recorder.recorded > once
    assert not torch.equal(first, second)
    del routed
    gc.collect()
    assert STATES.count() == others


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_model_that_is_given_no_positions_counts_them(
    model: Any, place: torch.device, recorder: Again, dynamic: bool | None
) -> None:
    """It adds the length to a tensor, which must not stay that of the recording."""

    def logits(graph: bool) -> list[torch.Tensor]:
        torch.compiler.reset()
        options = {**OPTIONS, "compile.cuda_graph": graph}
        routed = torch.compile(model, backend="hga", dynamic=dynamic, options=options)
        cache = HGACache(model.config)
        found = []
        with torch.no_grad():
            model(prompt(place), past_key_values=cache)
            for number in range(14):
                token = torch.full((1, 1), number, device=place)
                found.append(routed(token, past_key_values=cache).logits.clone())
        return found

    want = logits(False)
    assert recorder.recorded == 0
    got = logits(True)
    assert recorder.replays >= 4
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_models_float_is_that_of_the_step(model: Any, place: torch.device, recorder: Again) -> None:
    """With ``dynamic=True`` floats are inputs, whose values a recorded step has been launched with."""

    def logits(graph: bool) -> list[torch.Tensor]:
        torch.compiler.reset()
        options = {**OPTIONS, "compile.cuda_graph": graph}
        routed, cache = (
            torch.compile(model, backend="hga", dynamic=True, options=options),
            HGACache(model.config),
        )
        found = []
        with torch.no_grad():
            model(prompt(place), past_key_values=cache)
            for number in range(10):
                model.model.norm.variance_epsilon = 1e-6 if number < 7 else 0.5
                at = torch.full((1, 1), 90 + number, device=place)
                found.append(routed(at % 97, position_ids=at, past_key_values=cache).logits.clone())
        return found

    want, got = logits(False), logits(True)
    assert recorder.replays > 0
    assert not torch.equal(want[6], want[7])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def steps_with_other_weights(
    model: Any, place: torch.device, graph: bool, change: Callable[[Any], None]
) -> Any:
    """Logits of steps before the seventh of which a weight is changed."""
    torch.compiler.reset()
    torch.manual_seed(0)
    weight = model.lm_head.weight
    before = weight.data.clone()
    options = {**OPTIONS, "compile.cuda_graph": graph}
    routed, cache = torch.compile(model, backend="hga", options=options), HGACache(model.config)
    found = []
    with torch.no_grad():
        model(prompt(place), past_key_values=cache)
        for number in range(10):
            if number == 7:
                change(weight)
            at = torch.full((1, 1), 90 + number, device=place)
            found.append(routed(at % 97, position_ids=at, past_key_values=cache).logits.clone())
        weight.data = before
    return found


CHANGES = {
    "in place": lambda weight: weight.mul_(-2),
    "other memory": lambda weight: setattr(weight, "data", -weight),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_weights_are_those_of_the_step(model: Any, place: torch.device, recorder: Again, change: str) -> None:
    replays = []

    def noted(weight: Any) -> None:
        replays.append(recorder.replays)
        CHANGES[change](weight)

    want = steps_with_other_weights(model, place, False, noted)
    got = steps_with_other_weights(model, place, True, noted)
    assert replays[1] > replays[0] == 0
    # A recorded step reads memory where it was.
    assert (recorder.replays > replays[1]) == (change == "in place")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_weights_that_are_brought_at_every_step_are_not_copied(
    model: Any, place: torch.device, recorder: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "_COPIED", 4)
    ids = prompt(place)
    want = generate(compiled(model, **{"compile.cuda_graph": False}), ids, 7)
    torch.compiler.reset()
    hga_compile.reset_report()
    assert torch.equal(generate(compiled(model), ids, 7), want)
    assert recorder.recorded == 0
    assert any("brought to the GPU" in reason for reason in hga_compile.report().fallbacks)


def test_steps_whose_routes_are_recorded_run_as_they_are(
    model: Any, place: torch.device, recorder: Again
) -> None:
    routed, ids = compiled(model), prompt(place)
    with hga_compile.record_routes() as records:
        generate(routed, ids, 7)
    assert recorder.replays == 0
    assert len([record for record in records if record.groups.shape[2] == 1]) == 6
    assert any("recorded routes" in reason for reason in hga_compile.report().fallbacks)


@pytest.mark.parametrize("size", [1, 4])
def test_replayed_steps_make_the_centres_of_blocks_that_begin(
    model: Any, place: torch.device, recorder: Again, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(stretch, "_ROOM", 16)
    options = {"routing.centre": "block", "routing.group_size": size}
    ids = torch.randint(0, 97, (1, 121), generator=torch.Generator().manual_seed(1)).to(place)
    caches = [HGACache(model.config) for _ in range(2)]
    want = generate(
        compiled(model, **options, **{"compile.cuda_graph": False}), ids, 14, past_key_values=caches[0]
    )
    torch.compiler.reset()
    hga_compile.reset_report()
    # Replays begin before token 128, and are over after it.
    assert torch.equal(generate(compiled(model, **options), ids, 14, past_key_values=caches[1]), want)
    assert recorder.recorded == 1 and recorder.replays >= 8
    assert hga_compile.report().fallbacks == {}
    plain, replayed = (cache.layers[0].state.index.groups for cache in caches)
    assert plain.centres.blocks == replayed.centres.blocks == 2
    one, other = (summary.centres.values[:, :2].float() for summary in (plain, replayed))
    assert bool(one[:, 1].abs().sum() > 0)
    torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)
    tokens = plain.groups * size
    assert plain.groups == replayed.groups and tokens > 128
    differing = plain.codes[:, :, :tokens] != replayed.codes[:, :, :tokens]
    assert float(differing.float().mean()) < 0.01
    torch.testing.assert_close(plain.scales[:, :tokens], replayed.scales[:, :tokens], rtol=0.02, atol=1e-3)


def test_a_recording_that_fails_costs_no_token(
    model: Any, place: torch.device, recorder: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(place)
    want = generate(compiled(model, **{"compile.cuda_graph": False}), ids, 7)
    torch.compiler.reset()
    hga_compile.reset_report()

    def broken(run: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorder, "record", broken)
    assert torch.equal(generate(compiled(model), ids, 7), want)
    reasons = [reason for reason in hga_compile.report().fallbacks if "one CUDA graph" in reason]
    assert reasons == [
        "decode steps are not one CUDA graph: RuntimeError: operation not permitted when stream is capturing"
    ]
    use = LEDGER.uses()[0, "decode"]
    assert use.calls == 6


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="for the interpreter, outside of it")
@pytest.mark.parametrize(
    "some",
    [
        "counts and gpu",
        "every_other_way",
        "weights",
        "positions or float",
        "not counts and not every_other_way and not weights and not positions and not float",
    ],
)
def test_in_the_interpreter(some: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", some]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=550
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
