"""A profile made for another model is refused when it is compiled, one for another GPU warned about."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_model, tokens

from hga_compile.configs.errors import ProfileError
from hga_compile.configs.profile import CompileSettings, ModelMatch, Profile
from hga_compile.made_for import check_made_for

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(
    num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, hidden_size=256, _name_or_path="org/a"
)


def profile(model=None, gpu=None):
    match = None if model is None else ModelMatch(**model)
    return Profile(name="mine", model=match, gpu=gpu, compile=CompileSettings(inner="eager"))


def compile_and_run(made_for):
    torch._dynamo.reset()
    model = make_model("llama").eval()
    with torch.no_grad():
        return torch.compile(model, backend="hga", options={"profile": made_for})(tokens(1, 20)).logits


def test_another_models_profile_is_refused_when_the_model_is_compiled():
    with pytest.raises(Exception) as caught:
        compile_and_run(profile({"hub_id": "org/other", "layers": 48, "kv_heads": 4}))
    error = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(error, ProfileError)
    assert "made for another model (org/other): got layers 2 (made for 48)" in str(error)


def test_its_own_models_profile_runs(recwarn):
    config = make_model("llama").config
    made_for = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads}
    assert torch.isfinite(compile_and_run(profile(made_for, "cpu"))).all()
    assert not [warning for warning in recwarn if "made for" in str(warning.message)]


def test_another_gpus_profile_runs_with_a_warning():
    with pytest.warns(UserWarning, match="made for NVIDIA GeForce RTX 5090, this is cpu"):
        compile_and_run(profile(gpu="NVIDIA GeForce RTX 5090"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"layers": 5}, r"layers 4 \(made for 5\)"),
        ({"heads": 4}, r"heads 8 \(made for 4\)"),
        ({"kv_heads": 8}, r"kv_heads 2 \(made for 8\)"),
        ({"head_dim": 64}, r"head_dim 32 \(made for 64\)"),
        ({"hub_id": "org/b"}, "made for org/b, got org/a"),
    ],
)
def test_what_differs_is_named(model, words):
    with pytest.raises(ProfileError, match=words):
        check_made_for(profile(model), CONFIG, CPU)


def test_another_name_of_the_same_shape_is_a_warning():
    with pytest.warns(UserWarning, match="made for org/b, this is org/a, of the same shape"):
        check_made_for(profile({"hub_id": "org/b", "layers": 4}), CONFIG, CPU)


@pytest.mark.parametrize("name", ["org/a", "ORG/A", "/home/me/models/b", ""])
def test_a_folders_name_says_nothing_against_a_profile(name, recwarn):
    config = SimpleNamespace(**{**vars(CONFIG), "_name_or_path": name})
    check_made_for(profile({"hub_id": "org/a", "layers": 4, "heads": 8}), config, CPU)
    assert not recwarn


def test_what_is_not_known_is_not_compared(recwarn):
    check_made_for(profile({"layers": 5}), None, CPU)
    check_made_for(profile({"layers": 5}), SimpleNamespace(hidden_size=8), CPU)
    assert not recwarn


@pytest.mark.parametrize(
    ("made_for", "present", "warns"),
    [
        ("NVIDIA A100", "NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA H200", "NVIDIA H200", False),
        ("NVIDIA H200", "NVIDIA H100 80GB HBM3", True),
        ("cpu", "NVIDIA H200", True),
    ],
)
def test_one_gpu_has_several_names(made_for, present, warns, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: present)
    check_made_for(profile(gpu=made_for), None, torch.device("cuda", 0))
    assert bool(recwarn) is warns
