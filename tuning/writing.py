"""A tuned profile as a file: YAML with what was measured, where and with what in its first lines."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.loader import load_profile, save_profile
from hga_compile.configs.profile import ModelMatch, Profile
from hga_compile.evaluation.files import write_text

__all__ = ["made_for", "write_profile"]


def made_for(
    profile: Profile, card: ModelCard, gpu: GpuCard, name: str, description: str, sha256: str | None
) -> Profile:
    """Return a profile that says what it was made for.

    Parameters
    ----------
    profile
        Of a trial.
    card, gpu
        What it was made for.
    name, description
        Its own.
    sha256
        Of the checkpoint, if quality was measured on it.
    """
    shape = card.geometry
    match = ModelMatch(
        hub_id=card.hub_id,
        sha256=sha256,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    device = gpu.device_names[0] if gpu.device_names else gpu.kind
    update = {"name": name, "description": description, "model": match, "gpu": device}
    return profile.model_copy(update=update)


def write_profile(profile: Profile, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a profile with its facts as comments; it is read back before it counts as written.

    Parameters
    ----------
    profile
        What to write.
    path
        The file, replaced whole.
    facts
        Lines of the comment: a name, and what there is to say.
    """
    lines = ["yaml-language-server: $schema=../profile.schema.json"]
    for name, value in facts.items():
        lines += textwrap.wrap(f"{name}: {value}", 108, subsequent_indent="    ", break_long_words=False)
    save_profile(profile, path)
    body = path.read_text(encoding="utf-8")
    write_text(path, "".join(f"# {line}\n" for line in lines) + body)
    if load_profile(path) != profile:
        raise RuntimeError(f"{path.name} does not read back as it was written")
