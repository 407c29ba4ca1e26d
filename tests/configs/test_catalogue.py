"""The catalogue: every figure has a source, sizes add up to published ones, unknown names get the nearest."""

import json
import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from hga_compile.configs.cards import ModelCard
from hga_compile.configs.catalogue import (
    CatalogueError,
    gpu_card,
    gpu_cards,
    gpu_of_device,
    model_card,
    model_cards,
)
from hga_compile.configs.profile import Profile

# Parameters in millions as the models' authors publish them, rounded as they round them.
PUBLISHED = {
    "smollm2-135m": (135, 1), "smollm2-1.7b": (1711, 1), "qwen3-0.6b": (596, 1), "qwen3-4b": (4022, 2),
    "qwen3-8b": (8191, 2), "qwen3-30b": (30532, 5), "llama3.1-8b": (8030, 2), "llama3.2-1b": (1236, 1),
    "mistral-7b": (7248, 2), "gemma3-270m": (268, 1), "gpt-oss-20b": (20910, 20), "phi-4": (14660, 10),
}  # fmt: skip
MODELS = {*PUBLISHED, "gemma3-4b", "gemma3-27b"}
GPUS = {"rtx3090", "rtx4090", "rtx5090", "rtx-pro-6000", "a100", "h100", "h200", "l40s", "cpu"}


def test_models_and_gpus_that_were_promised_are_there():
    assert set(model_cards()) == MODELS
    assert set(gpu_cards()) == GPUS


def test_every_figure_of_a_gpu_names_a_document_a_measurement_a_derivation_or_an_assumption():
    kinds = re.compile(
        r"whitepaper|datasheet|^measured|^derived|^assumption|^reported|PCI Express|benchmarks/results/"
    )
    for card in gpu_cards().values():
        figures = [value for _, value in card if hasattr(value, "source")]
        assert len(figures) == 11, card.name
        for figure in figures:
            assert kinds.search(figure.source), (card.name, figure)


def test_every_section_of_a_model_names_the_file_on_the_hub():
    for card in model_cards().values():
        for section in (card.geometry, card.context, card.weights):
            assert section.source == f"https://huggingface.co/{card.hub_id}/blob/main/config.json"


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_geometry_adds_up_to_the_published_number_of_parameters(name):
    millions, error = PUBLISHED[name]
    assert model_card(name).geometry.parameters / 1e6 == pytest.approx(millions, abs=error)


def test_names_are_unique():
    for cards in (model_cards(), gpu_cards()):
        names = [name.lower() for card in cards.values() for name in (card.name, *card.aliases)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name", ["qwen3-30b", "QWEN3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", " qwen3-30b "]
)
def test_a_model_goes_by_name_alias_and_hub_id(name):
    assert model_card(name).name == "qwen3-30b"


@pytest.mark.parametrize("name", ["rtx5090", "5090", "NVIDIA GeForce RTX 5090"])
def test_a_gpu_goes_by_name_alias_and_the_drivers_name(name):
    assert gpu_card(name).name == "rtx5090"


@pytest.mark.parametrize(
    ("find", "name", "nearest"),
    [
        (model_card, "qwen3-30bb", "'qwen3-30b'"),
        (model_card, "someone/llama-3.1-8b-instruct-v2", "'llama3.1-8b'"),
        (gpu_card, "rtx50900", "'rtx5090'"),
        (gpu_card, "H-100", "'h100'"),
    ],
)
def test_an_unknown_name_gets_the_nearest(find, name, nearest):
    with pytest.raises(CatalogueError, match=f"did you mean {nearest}"):
        find(name)


def test_a_name_like_no_other_gets_the_list():
    with pytest.raises(CatalogueError, match="known: a100, cpu, h100"):
        gpu_card("zzzz")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_gpu_is_known_by_what_the_driver_calls_it(device, name):
    assert gpu_of_device(device).name == name


@pytest.mark.parametrize("device", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H1000", "Tesla V100-SXM2"])
def test_another_chip_is_not_taken_for_one_that_is_known(device):
    assert gpu_of_device(device) is None


def test_a_mixture_reads_its_active_experts_only():
    card = model_card("qwen3-30b")
    assert card.weight_bytes() / 2**30 == pytest.approx(29.0, abs=0.1)
    # 3.3 thousand million active weights, of which the embedding is not read.
    assert card.active_bytes() / 1e9 == pytest.approx(3.35, abs=0.15)


def test_sliding_layers_are_not_counted_as_full_ones():
    assert model_card("gemma3-27b").geometry.full_layers == 10
    assert model_card("gpt-oss-20b").geometry.full_layers == 12
    assert model_card("llama3.1-8b").geometry.full_layers == 32


def test_a_card_without_a_source_is_refused():
    document = model_card("qwen3-8b").model_dump(mode="json")
    del document["context"]["source"]
    with pytest.raises(ValidationError, match="source"):
        ModelCard.model_validate_json(json.dumps(document))


def test_heads_that_do_not_divide_are_refused():
    document = model_card("qwen3-8b").model_dump(mode="json")
    document["geometry"]["kv_heads"] = 5
    with pytest.raises(ValidationError, match="kv_heads must divide heads, got 5 and 32"):
        ModelCard.model_validate_json(json.dumps(document))


def test_files_are_packaged():
    root = Path(__file__).parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert {"models/*.yaml", "gpus/*.yaml", "profiles/*.yaml"} <= set(data["hga_compile.configs"])
    folder = resources.files("hga_compile.configs")
    for name in ("models", "gpus"):
        for file in folder.joinpath(name).iterdir():
            assert yaml.safe_load(file.read_text())["name"] == file.name.removesuffix(".yaml")


def test_a_gpus_first_device_name_fits_a_profile():
    for card in gpu_cards().values():
        if card.device_names:
            assert Profile(name="x", gpu=card.device_names[0]).gpu == card.device_names[0]
