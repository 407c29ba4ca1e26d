"""Tensor parallelism: heads, their K/V and their index split over the ranks of torch.distributed."""

import pytest
import torch
from ranks import generate, run_ranks, tensor_parallel
from tiny_models import FULL, TIGHT, make_model, tokens

pytestmark = pytest.mark.usefixtures("recompile")

# The ranks share the vocabulary too.
_VOCABULARY = 96
_PROMPT = 40


def compare(name, folder, options, new=5, device="cpu", **config):
    """Generate in one process and on two ranks, and return what each of them said."""
    model = make_model(name, vocab_size=_VOCABULARY, **config)
    model.save_pretrained(folder)
    prompt = tokens(2, _PROMPT) % _VOCABULARY
    split = run_ranks(tensor_parallel, folder, str(folder), prompt, new, options, device=device)
    whole = [generate(model.to(device), prompt, new, part) for part in options]
    return whole, split


def check(whole, split):
    for place, one in enumerate(whole):
        ranks = [rank[place] for rank in split]
        for rank in ranks:
            assert rank["reasons"] == one["reasons"] == ["routed"]
            assert torch.equal(rank["tokens"], one["tokens"])
            torch.testing.assert_close(rank["logits"], one["logits"], atol=1e-4, rtol=1e-4)
            # Half of the KV heads: half of the rows, of the bytes of K/V and of the index.
            assert [size[1] for size in rank["sizes"]] == [size[1] // 2 for size in one["sizes"]]
            assert [2 * rows for rows in rank["kv"]] == one["kv"]
            assert 2 * rank["held"]["accelerator_index"] == one["held"]["accelerator_index"]
            assert 2 * rank["held"]["host_kv"] == one["held"]["host_kv"] > 0
        for phase, used in one["used"].items():
            assert tuple(sum(rank["used"][phase][part] for rank in ranks) for part in (0, 1)) == used


@pytest.mark.slow
def test_two_ranks_route_their_own_heads_to_the_tokens_of_one_process(tmp_path):
    whole, split = compare("llama", tmp_path, [TIGHT], new=2, num_hidden_layers=1)
    check(whole, split)
    attended, visible = whole[0]["used"]["decode"]
    assert 0 < attended < visible


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3_moe"])
def test_two_ranks_are_one_process_at_any_budget(tmp_path, name):
    check(*compare(name, tmp_path, [FULL, TIGHT]))


@pytest.mark.slow
@pytest.mark.inductor
def test_two_ranks_are_one_process_through_inductor(tmp_path):
    check(*compare("llama", tmp_path, [TIGHT | {"inner": "inductor"}]))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_two_gpus_are_one_gpu(tmp_path, inner):
    options = [FULL | {"inner": inner}, TIGHT | {"inner": inner}]
    check(*compare("llama", tmp_path, options, device="cuda"))
