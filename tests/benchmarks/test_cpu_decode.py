import cpu_decode
import pytest
import torch
from common import fill_cache
from cpu_decode import Lane, agreement, decode_step, lane_result, memory_bandwidth, race, step_weight_bytes
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig


def test_lanes_take_turns_in_alternating_order():
    calls = []

    def step(name):
        def run(token):
            calls.append((name, int(token)))
            return token.sum()

        return run

    lanes = [Lane("a", step("a")), Lane("b", step("b"))]
    race(lanes, torch.arange(6), warmup=2, block=2)
    warm = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert calls == [*warm, ("a", 2), ("a", 3), ("b", 2), ("b", 3), ("b", 4), ("b", 5), ("a", 4), ("a", 5)]
    assert [len(lane.seconds) for lane in lanes] == [4, 4]
    assert lanes[0].likeliest == lanes[1].likeliest == [2, 3, 4, 5]


def test_a_step_continues_the_filled_cache(tiny_model):
    ids = torch.randint(97, (1, 20))
    with torch.no_grad():
        dense = DynamicCache()
        tiny_model(input_ids=ids[:, :16], past_key_values=dense, use_cache=True)
        step = decode_step(tiny_model, fill_cache(DynamicCache(), dense, 16))
        found = [int(step(ids[:, at : at + 1])) for at in range(16, 20)]
        wanted = tiny_model(input_ids=ids).logits[0, 16:].argmax(-1).tolist()
    assert found == wanted
    assert dense.get_seq_length() == 16


def test_weights_of_a_step_leave_out_only_an_embedding_of_its_own(tiny_model):
    total = sum(p.nbytes for p in tiny_model.parameters())
    assert step_weight_bytes(tiny_model) == total
    config = LlamaConfig(**(tiny_model.config.to_diff_dict() | {"tie_word_embeddings": False}))
    untied = AutoModelForCausalLM.from_config(config)
    assert step_weight_bytes(untied) == total


def test_floor_is_bytes_over_bandwidth():
    lane = Lane("x", lambda token: token, seconds=[0.2, 0.1, 0.4, 0.2])
    result = lane_result(lane, weights=600, reads=400, bandwidth=10_000)
    assert result["floor_milliseconds"] == pytest.approx(100)
    assert result["measured_over_floor"] == pytest.approx(2)
    assert result["tokens_per_second"] == pytest.approx(5)


def test_agreement_is_a_share():
    assert agreement([1, 2, 3, 4], [1, 2, 3, 5]) == 0.75


def test_bandwidth_is_measured():
    measured = memory_bandwidth(megabytes=4, repeats=2)
    assert 1e8 < measured["copy"] < 1e13
    assert 1e8 < measured["read"] < 1e13


def test_few_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        cpu_decode.main(["--steps", "8"])
    assert "--steps must be at least 32" in capsys.readouterr().err
