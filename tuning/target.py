"""What is tuned for: the model that a name, hub id or folder means, and the GPU that is present or named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hga_compile.configs.cards import Context, Geometry, GpuCard, ModelCard, Weights
from hga_compile.configs.catalogue import gpu_card, gpu_of_device, known_model, model_card
from hga_compile.tuning.present import present_device

__all__ = ["Target", "TargetError", "card_of_config", "find_gpu", "find_model", "local_weights"]


class TargetError(ValueError):
    """A model or GPU that nothing can be planned for; the message says what is missing."""


@dataclass(frozen=True)
class Target:
    """A model, and where its weights are on this machine."""

    card: ModelCard
    folder: Path | None
    """Folder with the weights; None: they are not here."""


def find_model(name: str, say: Callable[[str], None] = lambda _: None) -> Target:
    """Find a model by catalogue name, local folder or hub id.

    Parameters
    ----------
    name
        Tried in this order: a folder that is there, a name of the catalogue, a hub id.
    say
        Told before something is fetched (a configuration, never weights).

    Raises
    ------
    CatalogueError
        A name that is none of them.
    TargetError
        A folder or hub model whose configuration describes no decoder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TargetError(f"folder {str(path)!r} has no config.json (MODEL)")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return Target(card_of_config(config, path.name, str(path.name)), _with_weights(path))
    card = known_model(name)
    if card is not None:
        return Target(card, local_weights(card))
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return Target(model_card(name), None)  # raises, with the nearest name
    from hga_compile.cli.hub import snapshot

    folder = snapshot(name, weights=False, say=say)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    short = name.rsplit("/", 1)[1].lower().replace("_", "-")
    return Target(card_of_config(config, short, name), _with_weights(folder))


def find_gpu(name: str) -> GpuCard:
    """Return the card of a named GPU, or with ``auto`` of the present device.

    Raises
    ------
    CatalogueError
        A name that the catalogue does not have.
    """
    if name.strip().lower() != "auto":
        return gpu_card(name)
    present = present_device()
    known = gpu_of_device(present.device_names[0]) if present.kind == "cuda" else None
    # What the catalogue knows of the chip, with this machine's own memory.
    if known is None:
        return present
    own = {"memory": present.memory, "host_memory": present.host_memory, "nvme": present.nvme}
    return known.model_copy(update={**own, "device_names": present.device_names})


def local_weights(card: ModelCard) -> Path | None:
    """Return the folder of a model's weights in `HGA_MODELS` or the hub's cache; None if neither has them."""
    root = os.environ.get("HGA_MODELS")
    names = [card.name, *card.aliases, *([card.hub_id.split("/")[1]] if card.hub_id else [])]
    for name in names if root else []:
        folder = _with_weights(Path(root or "", name))
        if folder is not None:
            return folder
    if card.hub_id is None:
        return None
    from hga_compile.cli.hub import cached_snapshot

    return cached_snapshot(card.hub_id)


def card_of_config(config: Mapping[str, Any], name: str, source: str) -> ModelCard:
    """Read a model's card from the content of its config.json.

    Parameters
    ----------
    config
        As transformers writes it; what is nested under `text_config` counts.
    name
        For the card.
    source
        Hub id or folder, for the sources.

    Raises
    ------
    TargetError
        A configuration that lacks what a decoder has.
    """
    text = {**config, **(config.get("text_config") or {})}
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not text.get(key)]
    if missing:
        raise TargetError(
            f"{source}: config.json has no {', '.join(missing)}: no decoder that can be planned for (MODEL)"
        )
    heads, experts = text["num_attention_heads"], text.get("num_experts") or text.get("num_local_experts")
    inner = text.get("moe_intermediate_size") if experts else None
    rope = text.get("rope_parameters") or {}
    theta = text.get("rope_theta") or rope.get("rope_theta") or 10_000.0
    origin = f"{source}: config.json"
    window, every = _sliding(text)
    geometry = Geometry(
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=inner or text.get("intermediate_size") or 4 * text["hidden_size"],
        vocabulary=text["vocab_size"],
        tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
        experts=experts,
        active_experts=text.get("num_experts_per_tok") if experts else None,
        window=window,
        full_every=every,
        source=origin,
    )
    quantised = config.get("quantization_config") or {}
    method = str(quantised.get("quant_method"))
    bits = {"fp8": 8.0, "mxfp4": 4.25}.get(method) or float(quantised.get("bits") or 16)
    kind: Literal["none", "linear", "experts"]
    kind = "none" if bits >= 16 else "experts" if method == "mxfp4" else "linear"
    wide = 32.0 if (text.get("dtype") or text.get("torch_dtype")) == "float32" else 16.0
    return ModelCard(
        name="".join(c if c.isalnum() or c in ".-" else "-" for c in name.lower()).strip("-.") or "model",
        hub_id=source if source.count("/") == 1 and not source.startswith(("/", ".")) else None,
        geometry=geometry,
        context=Context(
            rope_theta=float(theta),
            max_tokens=text.get("max_position_embeddings") or 4096,
            source=origin,
        ),
        weights=Weights(
            bits=bits if kind != "none" else wide, other_bits=wide, quantised=kind, source=origin
        ),
    )


def _sliding(text: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the window of the sliding layers, and of how many consecutive layers one sees everything."""
    window = text.get("sliding_window")
    if not window or text.get("use_sliding_window") is False:
        return None, None
    kinds = text.get("layer_types")
    if not kinds:
        pattern = text.get("sliding_window_pattern")
        # A window without a pattern holds for all layers: none is routed, and one in none cannot be said.
        return (window, pattern) if pattern else (window, text["num_hidden_layers"] + 1)
    full = sum(kind == "full_attention" for kind in kinds)
    if full == len(kinds):
        return None, None
    return window, len(kinds) // full if full else len(kinds) + 1


def _with_weights(folder: Path) -> Path | None:
    from hga_compile.cli.hub import is_model_folder

    return folder if folder.is_dir() and is_model_folder(folder) else None
