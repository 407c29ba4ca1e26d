"""What all benchmarks share: loading a checkpoint, saying what ran where, writing results whole."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from corpora import write_text
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

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


def fill_cache(cache: Any, dense: DynamicCache, length: int) -> Any:
    """Append the first `length` tokens of a dense cache to `cache`, layer by layer, and return it."""
    for index, layer in enumerate(dense.layers):
        cache.update(layer.keys[:, :, :length].contiguous(), layer.values[:, :, :length].contiguous(), index)
    return cache


def model_facts(path: Path) -> dict[str, object]:
    """Return name, shape and SHA-256 of the weights; the folder's place on this machine is left out."""
    config = json.loads((path / "config.json").read_text())
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    shape = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {
        "name": path.name,
        "architecture": (config.get("architectures") or ["?"])[0],
        "sha256": digest.hexdigest(),
        **{key: config.get(key) for key in shape},
    }


def code_digest() -> str:
    """Return a digest of the package's sources: results of different code are never mixed by `--resume`."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for folder in ("hga_compile", "passes", "kernels", "configs"):
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".yaml") and file.is_file():
                digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, object]:
    """Return versions and device of this run, as every result JSON has them."""
    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "hga_compile": _version("hga-compile"),
        "code": code_digest(),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
