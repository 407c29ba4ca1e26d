"""Whether a profile fits what it meets: another model is refused, another GPU warned about."""

import re
import warnings
from typing import Any

import torch

from hga_compile.configs.catalogue import gpu_of_device
from hga_compile.configs.errors import ProfileError
from hga_compile.configs.profile import Profile

__all__ = ["check_made_for"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_made_for(profile: Profile, config: Any, device: torch.device) -> None:
    """Compare what a profile was made for with what it is used for.

    Parameters
    ----------
    profile : Profile
        Its `model` and `gpu`; null ones match anything.
    config : transformers.PretrainedConfig or None
        Of the model that is compiled, its text part; None: not known, nothing is compared.
    device : torch.device
        Where it runs.

    Raises
    ------
    ProfileError
        A profile of another model: its shape differs, or its name where the profile has nothing but a name.

    Warns
    -----
    UserWarning
        A profile of another GPU, or of a model of this shape with another name.
    """
    if profile.model is not None and config is not None:
        _check_model(profile, config)
    if profile.gpu is None:
        return
    present = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if not _same_gpu(profile.gpu, present):
        warnings.warn(
            f"profile {profile.name!r} was made for {profile.gpu}, this is {present}: its settings are valid "
            "here, but others may be faster or fit better (hga-tune finds them)",
            stacklevel=2,
        )


def _check_model(profile: Profile, config: Any) -> None:
    made = profile.model
    assert made is not None  # the caller checked
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None)
    hidden = getattr(config, "hidden_size", None)
    if dim is None and isinstance(hidden, int) and isinstance(heads, int):
        dim = hidden // heads
    found = {
        "layers": getattr(config, "num_hidden_layers", None),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
    }
    wanted = {name: getattr(made, name) for name in found}
    wrong = [
        f"{name} {found[name]} (made for {wanted[name]})"
        for name in found
        if isinstance(found[name], int) and wanted[name] is not None and found[name] != wanted[name]
    ]
    name = getattr(config, "_name_or_path", None) or ""
    if wrong:
        raise ProfileError(
            f"profile {profile.name!r} was made for another model ({made.hub_id or 'see its field model'}): "
            f"got {', '.join(wrong)}; use a profile of this model, make one with hga-tune, or remove the "
            "field model"
        )
    if made.hub_id is None or not _HUB_ID.fullmatch(name) or name.lower() == made.hub_id.lower():
        return
    if all(value is None for value in wanted.values()):
        raise ProfileError(
            f"profile {profile.name!r} was made for {made.hub_id}, got {name}; use a profile of this model, "
            "make one with hga-tune, or remove the field model"
        )
    warnings.warn(
        f"profile {profile.name!r} was made for {made.hub_id}, this is {name}, of the same shape: what was "
        "measured of quality may not hold",
        stacklevel=3,
    )


def _same_gpu(made_for: str, present: str) -> bool:
    """Say whether two names are of one GPU, whatever form factor and memory size they add."""
    if made_for.lower() == present.lower():
        return True
    one, other = gpu_of_device(made_for), gpu_of_device(present)
    return one is not None and one is other
