"""MODEL arguments: what they name, and the model and tokenizer loaded from it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga_compile.cli import hub
from hga_compile.cli.errors import BadInputError, one_line

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are."""

    folder: Path
    gguf: str | None = None
    """Name of the GGUF file in `folder`; None for a folder in transformers' own form."""

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained``."""
        named = {"gguf_file": self.gguf} if self.gguf else {}
        return {"pretrained_model_name_or_path": str(self.folder), **named}


def find_checkpoint(
    model: str, *, weights: bool = True, say: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """Find the files that a MODEL argument names.

    Parameters
    ----------
    model
        Hub id, folder in transformers' form, GGUF file, or folder with one GGUF file.
    weights
        False if the configuration is enough.
    say
        Told what takes time.

    Raises
    ------
    BadInputError
        If nothing usable is there.
    CommandError
        If it is on the hub and cannot be fetched.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            return _gguf(path.parent, path.name)
        if path.name == "config.json":
            return Checkpoint(path.parent)
        raise BadInputError(f"MODEL must be a folder, a .gguf file or a hub id, got the file {str(path)!r}")
    if path.is_dir():
        if (path / "config.json").is_file():
            return Checkpoint(path)
        files = sorted(file.name for file in path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(path, files[0])
        if files:
            raise BadInputError(
                f"MODEL names a folder with {len(files)} GGUF files, expected one; name the file, such as "
                f"{path / files[0]}"
            )
        raise BadInputError(f"folder {str(path)!r} has neither a config.json nor a .gguf file (MODEL)")
    if model.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(model):
        raise BadInputError(f"MODEL must be a folder, a .gguf file or a hub id, got {model!r}: no such file")
    return Checkpoint(hub.snapshot(model, weights=weights, say=say))


def load_config(checkpoint: Checkpoint) -> Any:
    """Load the configuration of a causal language model.

    Raises
    ------
    BadInputError
        If there is none that can be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(**checkpoint.source)
    except Exception as error:
        raise _unusable(checkpoint, error) from error


def load_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    max_memory: dict[int | str, int] | None = None,
) -> Any:
    """Load a causal language model for inference; no remote code is ever run.

    Parameters
    ----------
    checkpoint
        What to load.
    device, dtype
        Where and as what the weights are loaded.
    max_memory
        Bytes of weights by place, as accelerate takes it: those that the device has no room for stay in host
        RAM, from which they are brought to it in every pass. None: all of them are on the device.

    Raises
    ------
    BadInputError
        If the files are damaged or describe no causal language model.
    """
    from transformers import AutoModelForCausalLM

    # Straight to the accelerator: the host never holds the whole model.
    placed: dict[str, Any] = {"device_map": {"": device}} if device.type == "cuda" else {}
    if max_memory is not None:
        placed = {"device_map": "auto", "max_memory": max_memory}
    try:
        model = AutoModelForCausalLM.from_pretrained(**checkpoint.source, dtype=dtype, **placed)
    except Exception as error:
        raise _unusable(checkpoint, error) from error
    return model.eval().requires_grad_(False)


def random_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, layers: int | None) -> Any:
    """Build a model from its configuration alone, with random weights.

    Parameters
    ----------
    checkpoint
        Only its configuration is read.
    device, dtype
        Where and as what the weights are made.
    layers
        Keep the first so many layers; all when None.

    Raises
    ------
    BadInputError
        If the configuration describes no causal language model, or has fewer layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(checkpoint)
    text = config.get_text_config(decoder=True)
    if layers is not None:
        if layers > text.num_hidden_layers:
            raise BadInputError(f"the model has {text.num_hidden_layers} layers, got {layers} (--layers)")
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = list(text.layer_types)[:layers]
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, AttributeError) as error:
        raise _unusable(checkpoint, error) from error
    return model.eval().requires_grad_(False)


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the tokenizer of a checkpoint.

    Raises
    ------
    BadInputError
        If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(**checkpoint.source)
    except Exception as error:
        raise _unusable(checkpoint, error) from error


def _gguf(folder: Path, name: str) -> Checkpoint:
    if importlib.util.find_spec("gguf") is None:
        raise BadInputError("reading a GGUF file needs the gguf package: pip install 'hga-compile[demo]'")
    return Checkpoint(folder, name)


def _unusable(checkpoint: Checkpoint, error: Exception) -> Exception:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return error
    name = checkpoint.folder / checkpoint.gguf if checkpoint.gguf else checkpoint.folder
    return BadInputError(
        f"{str(name)!r} is no causal language model that can be loaded: {one_line(error)} (MODEL)"
    )
