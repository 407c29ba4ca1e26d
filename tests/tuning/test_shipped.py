"""Profiles that the tuner made and the package ships: what their heads say must hold."""

import re
import shlex
from importlib import resources

import pytest

from hga_compile.backend import _check_offload
from hga_compile.configs.catalogue import gpu_card, model_card
from hga_compile.configs.loader import builtin_names, load_profile
from hga_compile.tuning.memory import plan_memory

TUNED = [name for name in builtin_names() if load_profile(name).model is not None]


def head(name):
    text = (resources.files("hga_compile.configs") / "profiles" / f"{name}.yaml").read_text()
    lines = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    return re.sub(r"\n {4}", " ", "\n".join(lines))


def asked_for(name):
    found = re.search(r"^Made by: hga-tune (.*)$", head(name), re.MULTILINE)
    words = shlex.split(found[1])
    return dict(zip(words[::2], words[1::2], strict=False))


@pytest.mark.parametrize("name", TUNED)
def test_it_is_named_and_made_for_what_its_command_says(name):
    asked, profile = asked_for(name), load_profile(name)
    assert name == f"{asked['--model']}.{asked['--gpu']}" == profile.name
    card, gpu = model_card(asked["--model"]), gpu_card(asked["--gpu"])
    shape = card.geometry
    assert (profile.model.layers, profile.model.heads) == (shape.layers, shape.heads)
    assert (profile.model.kv_heads, profile.model.head_dim) == (shape.kv_heads, shape.head_dim)
    assert profile.gpu == (gpu.device_names[0] if gpu.device_names else gpu.kind)


@pytest.mark.parametrize("name", TUNED)
def test_its_head_says_what_was_measured_where_and_with_what(name):
    text = head(name)
    for line in ("Quality", "Texts", "Decode", "Memory", "Compiled model", "Trial", "Where"):
        assert re.search(rf"^{line}: ", text, re.MULTILINE), line
    # What was not measured on the model itself must say so, and carries no checkpoint's hash.
    own = load_profile(name).model.sha256 is not None
    assert ("TRANSFERRED, not measured on" in text) is not own
    assert re.search(r"SHA-256 [0-9a-f]{16}", text)
    assert re.search(r"torch \d.*transformers \d", text)


@pytest.mark.parametrize("name", TUNED)
def test_its_numbers_keep_the_rule_it_was_chosen_by(name):
    text, prefer = head(name), asked_for(name).get("--prefer", "balanced")
    assert load_profile(name).description.endswith(f"preferring {prefer}.")
    took = float(re.search(r"^Decode: ([\d.]+) ms", text, re.MULTILINE)[1])
    kl = float(re.search(r"^Quality: .*KL ([\d.]+),", text, re.MULTILINE)[1])
    default = re.search(r"^Default setting: KL ([\d.]+), .*, ([\d.]+) ms", text, re.MULTILINE)
    assert kl <= float(default[1])
    # Both are rounded.
    assert took <= {"quality": float("inf"), "balanced": 1.1, "speed": 1.0}[prefer] * float(default[2]) + 0.02
    verified = float(re.search(r"^Compiled model: KL ([\d.]+),", text, re.MULTILINE)[1])
    assert verified == pytest.approx(kl, rel=0.05)


@pytest.mark.parametrize("name", TUNED)
def test_it_fits_what_it_was_made_for_and_this_version_runs_it(name):
    asked, profile = asked_for(name), load_profile(name)
    _check_offload(profile)
    assert plan_memory(
        model_card(asked["--model"]), gpu_card(asked["--gpu"]), profile, int(asked["--context"])
    ).fits
