"""What ``hga run`` runs with when the user does not say."""

import pytest
import torch
from transformers import LlamaConfig

from hga_compile.cli import planned
from hga_compile.cli.planned import Wanted, plan_run
from hga_compile.configs.catalogue import gpu_card
from hga_compile.configs.loader import load_profile, resolve_profile

DEFAULT = load_profile("default")
CUDA = torch.device("cuda", 1)
LARGE = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
)  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """A 24 GiB card, as if it were here."""
    monkeypatch.setattr(planned, "_card_of", lambda device: gpu_card("rtx4090"))


def test_a_short_prompt_keeps_its_kv_on_the_gpu(gpu):
    found = plan_run(LARGE, CUDA, torch.bfloat16, Wanted(DEFAULT, 4096, None))
    assert found.profile.offload.tier == "gpu" and found.step == 4096 and found.fits
    assert found.notes == ("plan     K/V in GPU memory, 4,096 prompt tokens a pass",)


def test_a_long_one_goes_to_host_ram_with_a_hot_cache(gpu):
    found = plan_run(LARGE, CUDA, torch.bfloat16, Wanted(DEFAULT, 131072, None))
    assert found.to_dict() == {
        "tier": "host", "hot_cache": 0.1, "prefill_step": found.step, "max_memory": None, "fits": True,
    }  # fmt: skip
    assert "K/V in host RAM, hot cache 10%" in found.notes[0]


def test_what_the_user_says_stays(gpu):
    own = resolve_profile({"profile": "default", "offload.tier": "host", "offload.hot_cache": 0.02})
    found = plan_run(LARGE, CUDA, torch.bfloat16, Wanted(own, 4096, 300))
    assert found.profile.offload == own.offload and found.step == 300


def test_weights_that_do_not_fit_are_split_by_accelerate(gpu):
    found = plan_run(LARGE, CUDA, torch.float32, Wanted(DEFAULT, 16384, None))
    # The device's own number, and room for one layer more than lies there.
    assert set(found.max_memory) == {1, "cpu"}
    assert 0 < found.max_memory[1] < 24 * 2**30 and found.max_memory["cpu"] > 2**30
    assert "in host RAM" in found.notes[1] and found.fits


def test_what_does_not_fit_is_noted_and_tried(gpu):
    found = plan_run(LARGE, CUDA, torch.bfloat16, Wanted(DEFAULT, 2**24, None))
    assert found.fits is False and found.max_memory is None
    assert "too little by the plan; hga plan says what would make it fit" in found.notes[0]


def test_dense_and_unknown_models_run_as_they_are(gpu):
    class Odd:
        def to_dict(self):
            return {"d_model": 3}

    for config, profile in ((LARGE, None), (Odd(), DEFAULT)):
        found = plan_run(config, CUDA, torch.bfloat16, Wanted(profile, 4096, None))
        assert (found.profile, found.step, found.fits, found.notes) == (profile, 1024, None, ())


def test_on_a_cpu_nothing_is_said_as_long_as_it_fits():
    found = plan_run(
        LlamaConfig(num_hidden_layers=1), torch.device("cpu"), torch.float32, Wanted(DEFAULT, 4096, None)
    )
    assert (found.profile, found.step, found.notes) == (DEFAULT, 1024, ())


def test_a_gpu_is_read_with_what_is_free_now(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 2**30, 140 * 2**30))
    card = planned._card_of(CUDA)
    assert card.name == "h200" and card.usable == 100 * 2**30 - 256 * 2**20
