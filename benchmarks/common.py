"""What the benchmarks share: finding and loading a checkpoint, cutting a text, where results go."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hga_compile.evaluation.candidates import fill_cache
from hga_compile.evaluation.files import write_json
from hga_compile.evaluation.provenance import environment, model_facts

__all__ = [
    "RESULTS",
    "environment",
    "fill_cache",
    "find_model",
    "load_model",
    "model_facts",
    "tokenize",
    "write_json",
]

RESULTS = Path(__file__).parent / "results"
DEFAULT_MODEL = "smollm2-135m"


def find_model(folder: str | None) -> Path:
    """Return the checkpoint folder: the argument, else `smollm2-135m` in the folder `HGA_MODELS` names."""
    root = os.environ.get("HGA_MODELS")
    path = Path(folder) if folder else Path(root) / DEFAULT_MODEL if root else None
    if path is None or not (path / "config.json").is_file():
        got = "no --model and no HGA_MODELS" if path is None else f"{path} has no config.json"
        raise SystemExit(f"checkpoint folder wanted (--model DIR, or HGA_MODELS/{DEFAULT_MODEL}), got: {got}")
    return path


def load_model(path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a local checkpoint for inference."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.to(device).eval()


def tokenize(path: Path, text: str, length: int) -> torch.Tensor:
    """Return the first `length` token ids of `text`, `[1, length]`, without a template's special tokens."""
    # Ten characters a token is more than any text here has: no need to tokenise a whole novel.
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    ids: torch.Tensor = tokenizer(text[: 10 * length], return_tensors="pt").input_ids
    if ids.shape[1] < length:
        raise ValueError(f"text too short: {length} tokens wanted, got {ids.shape[1]}; choose a longer text")
    return ids[:, :length]
