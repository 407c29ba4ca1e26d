from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from hga_compile.cli.checkpoint import Checkpoint, load_model, load_tokenizer
from hga_compile.cli.decode import Forward, Pace, greedy, prefill, stop_tokens


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return load_model(Checkpoint(tiny_model), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("step", [1, 7, 50, 1000])
def test_prefill_in_steps_is_the_same_as_at_once(model: torch.nn.Module, step: int) -> None:
    ids = torch.arange(50)[None]
    pace, seen = Pace(), []
    with torch.no_grad():
        logits = prefill(
            Forward(model, model), ids, DynamicCache(), step=step, pace=pace, advance=seen.append
        )
        expected = model(ids).logits[:, -1:]
    torch.testing.assert_close(logits, expected)
    assert sum(seen) == pace.tokens == 50
    assert max(seen) == min(step, 50)


def test_greedy_is_what_generate_does(model: torch.nn.Module) -> None:
    ids = torch.arange(20)[None]
    expected = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 20:].tolist()
    pace, forward, cache = Pace(), Forward(model, model), DynamicCache()
    with torch.no_grad():
        logits = prefill(forward, ids, cache, step=8, pace=Pace())
        tokens = list(greedy(forward, logits, cache, limit=12, stop=frozenset(), pace=pace))
    assert tokens == expected
    assert pace.tokens == 11
    assert cache.get_seq_length() == 31


def test_greedy_stops_before_a_stop_token(model: torch.nn.Module) -> None:
    ids = torch.arange(20)[None]
    forward = Forward(model, model)
    with torch.no_grad():
        first = int(model(ids).logits[0, -1].argmax())
        cache = DynamicCache()
        logits = prefill(forward, ids, cache, step=20, pace=Pace())
        stop = frozenset({first})
        assert list(greedy(forward, logits, cache, limit=5, stop=stop, pace=Pace())) == []


def test_stop_tokens_come_from_settings_and_tokenizer(model: torch.nn.Module, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(Checkpoint(tiny_model))
    assert stop_tokens(model, tokenizer) == {1}


def test_pace_leaves_compilation_out_of_the_rate() -> None:
    pace = Pace(steps=[(10, 9.0, True), (10, 0.5, False), (10, 0.5, False)])
    assert (pace.tokens, pace.seconds, pace.rate) == (30, 10.0, 20.0)
    assert pace.to_dict()["compiled_steps"] == 1
    assert Pace().rate is Pace(steps=[(1, 1.0, True)]).rate is None


def test_pace_notices_that_a_step_compiled() -> None:
    function = torch.compile(lambda x: x + 1, backend="eager")
    pace = Pace()
    for _ in range(2):
        with pace.step(1):
            function(torch.ones(3))
    assert [compiled for _, _, compiled in pace.steps] == [True, False]
