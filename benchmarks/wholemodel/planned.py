"""What `hga run` would pick for a model under a cap on GPU memory, and what is told of the model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hga_compile.configs.cards import ModelCard
from hga_compile.configs.catalogue import gpu_card
from hga_compile.configs.profile import Profile
from hga_compile.tuning.defaults import pick_defaults
from hga_compile.tuning.target import card_of_config
from wholemodel.shape import weight_bytes

__all__ = ["facts", "planned"]


def planned(
    model: PreTrainedModel, config: Any, shape: str, profile: Profile, context: int, cap: int,
    step: int | None = None,
) -> tuple[Profile, int]:  # fmt: skip
    """Return the profile with its hot cache, and the prefill step, that fit into `cap` bytes.

    Parameters
    ----------
    model, config, shape
        The model, its config, and the name of its shape.
    profile
        With its tier.
    context
        Tokens whose K/V are kept: of one sequence, or of several together.
    cap
        Bytes of GPU memory.
    step
        Prompt tokens of a forward pass; None: to be picked.
    """
    memory = gpu_card("rtx5090").memory.model_copy(update={"value": cap})
    reserved = gpu_card("rtx5090").reserved.model_copy(update={"value": 1})
    # The host memory is this machine's own affair: what it has not got is found out by running.
    card = gpu_card("rtx5090").model_copy(update={"memory": memory, "reserved": reserved})
    host = card.host_memory.model_copy(update={"value": 2**40})
    card = card.model_copy(update={"host_memory": host})
    picked = pick_defaults(
        _card(config, shape), card, profile, context, step=step, weight_bytes=weight_bytes(model)
    )
    return picked.profile, picked.step


def facts(config: Any, shape: str, layers: int | None) -> dict[str, Any]:
    """Return name and geometry of the model."""
    first = "" if layers is None else f", {layers} layers"
    geometry = _card(config, shape).geometry.model_dump(mode="json")
    return {"name": f"random weights, the shape of {shape}{first}", **geometry}


def _card(config: Any, name: str) -> ModelCard:
    return card_of_config(config.to_dict(), name, "the benchmark's own config")
