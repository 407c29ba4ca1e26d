"""Which model a name means, and the present device as a card."""

import json
import sys
from types import SimpleNamespace

import pytest

from hga_compile.configs.catalogue import CatalogueError, model_card
from hga_compile.tuning import present
from hga_compile.tuning.target import TargetError, card_of_config, find_gpu, find_model

QWEN_MOE = {
    "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "vocab_size": 151936, "rope_theta": 10000000, "sliding_window": None,
    "max_position_embeddings": 262144, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def test_a_configuration_gives_the_card_that_the_catalogue_has():
    found, known = card_of_config(QWEN_MOE, "x", "Qwen/x"), model_card("qwen3-30b")
    source = {"source": known.geometry.source}
    assert found.geometry.model_copy(update=source) == known.geometry
    assert found.context.model_copy(update=source) == known.context
    assert found.weight_bytes() == known.weight_bytes()


def test_sliding_layers_are_read_from_layer_types_in_a_nested_configuration():
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 3
    text = {"num_hidden_layers": 18, "hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 256, "intermediate_size": 2048, "vocab_size": 262144, "sliding_window": 512,
            "layer_types": kinds, "rope_parameters": {"rope_theta": 1e6}}  # fmt: skip
    card = card_of_config({"text_config": text, "tie_word_embeddings": True}, "x", "y")
    assert (card.geometry.window, card.geometry.full_every, card.geometry.full_layers) == (512, 6, 3)
    assert card.geometry.tied
    assert card.context.rope_theta == 1e6


def test_a_window_that_is_switched_off_is_none():
    card = card_of_config({**QWEN_MOE, "sliding_window": 4096, "use_sliding_window": False}, "x", "y")
    assert card.geometry.full_layers == 48


def test_a_folder_wins_over_a_name(tmp_path, monkeypatch):
    folder = tmp_path / "qwen3-8b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN_MOE))
    monkeypatch.chdir(tmp_path)
    assert find_model("qwen3-8b").card.geometry.layers == 48
    assert find_model(str(folder)).folder is None


def test_weights_are_found_in_the_folder_of_checkpoints(tmp_path, monkeypatch):
    folder = tmp_path / "SmolLM2-135M-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    monkeypatch.setenv("HGA_MODELS", str(tmp_path))
    assert find_model("smollm2-135m").folder == folder


def test_a_folder_without_a_decoder_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"has no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(TargetError, match="no num_hidden_layers, num_attention_heads, vocab_size"):
        find_model(str(tmp_path))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(CatalogueError, match="did you mean 'smollm2-135m'"):
        find_model("smollm-135m")


class FakeNVML:
    """What the driver's library answers for one GPU."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, name, count=1):
        self.name, self.count = name, count

    def nvmlInit(self): ...  # the library's own names

    def nvmlShutdown(self): ...

    def __getattr__(self, name):
        answers = {
            "nvmlDeviceGetCount": self.count,
            "nvmlDeviceGetHandleByIndex": 0,
            "nvmlDeviceGetName": self.name,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=20 * 2**30, used=2**30),
            "nvmlDeviceGetCudaComputeCapability": (8, 9),
            "nvmlDeviceGetNumGpuCores": 9728,
            "nvmlDeviceGetMemoryBusWidth": 256,
            "nvmlDeviceGetMaxPcieLinkWidth": 8,
            "nvmlDeviceGetMaxPcieLinkGeneration": 4,
        }
        if name == "nvmlDeviceGetMaxClockInfo":
            return lambda device, kind: {1: 2505, 2: 11201}[kind]
        return lambda *arguments: answers[name]


def test_auto_reads_a_gpu_that_the_catalogue_does_not_know(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML("NVIDIA GeForce RTX 4080"))
    card = find_gpu("auto")
    assert card.device_names == ("NVIDIA GeForce RTX 4080",)
    assert card.usable == 19 * 2**30 - 768 * 2**20
    assert card.cores.value == 76
    assert card.bandwidth.value == pytest.approx(716.9e9, rel=1e-3)
    assert card.host_bandwidth.value == 31.5e9 / 2


def test_auto_takes_the_catalogues_rates_and_the_machines_memory(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNVML("NVIDIA GeForce RTX 4090"))
    card = find_gpu("auto")
    assert card.name == "rtx4090"
    assert card.memory.value == 20 * 2**30
    assert card.bandwidth.value == 1008e9
    assert card.host_memory.value == present.host_memory()


@pytest.mark.parametrize("nvml", [None, FakeNVML("x", count=0)])
def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch, nvml):
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    card = find_gpu("auto")
    assert (card.name, card.kind) == ("cpu", "cpu")
    assert card.memory.value == present.host_memory()
