"""GGUF files to folders in transformers' own form, which load in a second."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hga_compile.cli.errors import CommandError


def need_gguf() -> None:
    """Raise unless the package that reads GGUF files is installed.

    Raises
    ------
    CommandError
        Names the command that installs it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise CommandError("converting the model needs the gguf package: pip install 'hga-compile[demo]'")


def convert_gguf(source: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a bfloat16 safetensors folder.

    Parameters
    ----------
    source
        GGUF file of a causal language model.
    target
        Existing folder.

    Raises
    ------
    CommandError
        If the gguf package is missing.
    """
    need_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    named = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    AutoTokenizer.from_pretrained(**named).save_pretrained(target)
    read = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    config = read.config
    # Weights are plain numbers now; transformers would refuse to save them as still being GGUF.
    config.__dict__.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.to(torch.bfloat16).save_pretrained(target)
