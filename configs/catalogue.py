"""The catalogue of models and GPUs: finding a card by name, alias, hub id or the driver's name."""

import difflib
import json
from collections.abc import Callable, Iterable
from functools import cache
from importlib import resources
from typing import TypeVar

from pydantic import ValidationError

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.errors import ProfileError, first_line
from hga_compile.configs.yaml_source import parse_yaml

__all__ = [
    "CatalogueError",
    "gpu_card",
    "gpu_cards",
    "gpu_of_device",
    "known_model",
    "model_card",
    "model_cards",
]

_Card = TypeVar("_Card", GpuCard, ModelCard)


class CatalogueError(ValueError):
    """A name that the catalogue does not have; the message has the nearest one."""


@cache
def model_cards() -> dict[str, ModelCard]:
    """Return all models by name, sorted."""
    return _read("models", ModelCard)


@cache
def gpu_cards() -> dict[str, GpuCard]:
    """Return all GPUs by name, sorted."""
    return _read("gpus", GpuCard)


def known_model(name: str) -> ModelCard | None:
    """Return the card of a model by name, alias or hub id; None if there is none."""
    return _find(name, model_cards().values(), lambda one: [one.hub_id] if one.hub_id else [])


def model_card(name: str) -> ModelCard:
    """Return the card of a model by name, alias or hub id.

    Raises
    ------
    CatalogueError
        An unknown name.
    """
    card = known_model(name)
    if card is None:
        raise _unknown("model", name, model_cards().values(), "any hub id or local folder works too")
    return card


def gpu_card(name: str) -> GpuCard:
    """Return the card of a GPU by name, alias or the driver's name.

    Raises
    ------
    CatalogueError
        An unknown name.
    """
    card = _find(name, gpu_cards().values(), lambda one: one.device_names)
    if card is None:
        raise _unknown("gpu", name, gpu_cards().values(), "`auto` reads the present device")
    return card


def gpu_of_device(device: str) -> GpuCard | None:
    """Return the card of a GPU by what the driver calls it, form factor and memory size included or not.

    Parameters
    ----------
    device : str
        Such as ``NVIDIA A100-SXM4-80GB``.
    """
    exact = [card for card in gpu_cards().values() if device in card.device_names]
    begun = [
        card
        for card in gpu_cards().values()
        if any(device.startswith((f"{name} ", f"{name}-")) for name in card.device_names)
    ]
    # "NVIDIA GeForce RTX 4090 Laptop GPU" is another chip.
    begun = [] if "laptop" in device.lower() or "max-q" in device.lower() else begun
    return next(iter(exact or begun), None)


def _find(name: str, cards: Iterable[_Card], more: Callable[[_Card], Iterable[str]]) -> _Card | None:
    wanted = name.strip().lower()
    return next((one for one in cards if wanted in _names(one, more(one))), None)


def _names(card: GpuCard | ModelCard, more: Iterable[str]) -> list[str]:
    return [word.lower() for word in (card.name, *card.aliases, *more)]


def _unknown(kind: str, name: str, cards: Iterable[GpuCard | ModelCard], advice: str) -> CatalogueError:
    known = {alias.lower(): card.name for card in cards for alias in (card.name, *card.aliases)}
    # The end of a hub id is what resembles a name.
    word = name.strip().lower().rsplit("/", 1)[-1][:100]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    knob = "--gpu" if kind == "gpu" else "MODEL"
    hint = f"did you mean {known[near[0]]!r}?" if near else f"known: {', '.join(sorted(set(known.values())))}"
    return CatalogueError(f"no {kind} of the catalogue is called {name[:100]!r}; {hint}; {advice} ({knob})")


def _read(folder: str, kind: type[_Card]) -> dict[str, _Card]:
    found = {}
    for file in resources.files("hga_compile.configs").joinpath(folder).iterdir():
        if not file.name.endswith(".yaml"):
            continue
        document = parse_yaml(file.read_bytes(), f"{folder}/{file.name}")
        try:
            card = kind.model_validate_json(json.dumps(document.data))
        except ValidationError as failure:
            raise ProfileError(first_line(failure, kind, document.where)) from None
        found[card.name] = card
    return dict(sorted(found.items()))
