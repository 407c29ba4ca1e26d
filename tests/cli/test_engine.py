from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from hga_compile.cli.checkpoint import Checkpoint, load_model
from hga_compile.cli.decode import Forward
from hga_compile.cli.engine import PLACES, Dense, Routed
from hga_compile.configs.loader import resolve_profile

SMALL = {
    "routing.dense_below": 0,
    "routing.centre_tokens": 16,
    "routing.budget": {"fraction": 0.25, "tokens": 32},
}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(Checkpoint(tiny_model), torch.device("cpu"), torch.float32)


def test_dense_reads_and_holds_everything(model: Any) -> None:
    engine = Dense(model)
    cache, rest = engine.start(torch.arange(40)[None])
    assert rest.shape == (1, 40)
    with torch.no_grad():
        Forward(engine.call, model)(rest, cache)
    held = engine.memory(cache)
    assert tuple(held) == PLACES
    assert held["host_kv"] == 40 * 2 * 2 * 2 * 8 * 4  # tokens, layers, K and V, heads, channels, bytes
    assert engine.bytes_read("decode") == held["host_kv"]
    assert engine.reads("decode")["attended"] == 1.0
    assert engine.sites() is None


@pytest.mark.parametrize(("said", "room"), [(None, 47), (64, 64)])
def test_room_is_made_for_a_prompt_and_what_follows(model: Any, said: int | None, room: int) -> None:
    engine = Routed(model, resolve_profile({**SMALL, "offload.reserve_tokens": said}), inner="eager")
    for new, reserved in ((7, room), (None, said)):
        cache, _ = engine.start(torch.arange(40)[None], new)
        assert [layer.state.pages.place.reserve_tokens for layer in cache.layers] == [reserved] * 2
    assert engine.profile.offload.reserve_tokens == said


def test_routed_compiles_two_graphs_for_all_lengths_and_counts_what_it_reads(model: Any) -> None:
    engine = Routed(model, resolve_profile(SMALL), inner="eager")
    forward = Forward(engine.call, model)
    graphs = counters["stats"]["unique_graphs"]
    ids = (torch.arange(300) % 200)[None]
    with torch.no_grad():
        for prompt in (ids[:, :20], ids):
            cache, rest = engine.start(prompt)
            for piece in torch.split(rest, 100, dim=1):
                forward(piece, cache, keep=2)
            for _ in range(3):
                forward(ids[:, 7:8], cache)
    assert counters["stats"]["unique_graphs"] - graphs == 2
    assert engine.sites() == {"graphs": 2, "routed": 4, "dense": 0, "fallbacks": {}}
    for phase in ("prefill", "decode"):
        found = engine.reads(phase)
        assert 0 < found["attended"] < 1
        assert 0 < found["kv_bytes_read"] < 1
        assert found["summary_bytes_read"] > 0
        assert engine.bytes_read(phase) > 0
    assert engine.memory(cache)["host_kv"] > 0
    engine.reset()
    assert engine.reads("decode")["attended"] is None


def test_routed_at_full_budget_is_dense(model: Any) -> None:
    engine = Routed(model, resolve_profile({**SMALL, "routing.budget": {"fraction": 1.0}}), inner="eager")
    ids = (torch.arange(100) % 200)[None]
    with torch.no_grad():
        cache, rest = engine.start(ids)
        found = Forward(engine.call, model)(rest, cache, keep=10)
        expected = model(ids).logits[:, -10:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_of_one_token_is_not_opened_apart(model: Any) -> None:
    engine = Routed(model, resolve_profile(SMALL), inner="eager")
    cache, rest = engine.start(torch.tensor([[5]]))
    assert rest.shape == (1, 1)
    assert cache.get_seq_length() == 0


def test_forward_slices_where_a_model_cannot_keep_logits(model: Any) -> None:
    class All(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool) -> Any:
            return model(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    plain = All()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found = Forward(plain, plain)(ids, Dense(model).start(ids)[0], keep=3)
        expected = model(ids).logits[:, -3:]
    torch.testing.assert_close(found, expected)
