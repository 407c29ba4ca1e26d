"""A tuned profile as a file."""

from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import load_profile
from hga_compile.tuning.outcome import command_line
from hga_compile.tuning.writing import made_for, write_profile


def test_it_says_what_it_was_made_for_and_reads_back(tmp_path):
    base = load_profile("default")
    profile = made_for(base, model_card("qwen3-30b"), gpu_card("rtx5090"), "mine", "for a test", "0" * 64)
    facts = {"Quality": "KL 0.01 " + "and so on " * 30, "Where": "here"}
    write_profile(profile, tmp_path / "mine.yaml", facts)
    text = (tmp_path / "mine.yaml").read_text()
    assert load_profile(tmp_path / "mine.yaml") == profile
    assert profile.gpu == "NVIDIA GeForce RTX 5090"
    assert (profile.model.layers, profile.model.kv_heads) == (48, 4)
    assert text.startswith("# yaml-language-server: $schema=../profile.schema.json\n# Quality: KL 0.01")
    assert "# Where: here\nschema_version: 1\n" in text
    assert max(map(len, text.splitlines())) <= 110


def test_a_cpus_profile_names_no_gpu():
    profile = made_for(load_profile("default"), model_card("smollm2-135m"), gpu_card("cpu"), "x", "", None)
    assert profile.gpu == "cpu"


def test_the_command_is_without_this_machines_folders():
    arguments = ["--model", "/home/me/m/qwen", "--gpu", "h200", "--out", "/tmp/x", "--resume", "--json"]
    assert command_line(arguments) == "hga-tune --model qwen --gpu h200"
