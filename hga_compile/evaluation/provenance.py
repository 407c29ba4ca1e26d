"""What ran where: versions, device, weights and code behind a result."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def model_facts(path: Path) -> dict[str, object]:
    """Return name, shape and SHA-256 of the weights; the folder's place on this machine is left out."""
    folder = path.parent if path.is_file() else path
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    digest = hashlib.sha256()
    files = [path] if path.is_file() else [file for kind in WEIGHTS for file in path.glob(kind)]
    for file in sorted(files):
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
    """Return a digest of the sources that routing depends on: `--resume` never mixes results of two."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parent.parent
    for folder in (".", "store", "passes", "kernels", "configs"):
        # Each by itself: the last three are links in a checkout, which a recursive search does not follow.
        found = (package / folder).glob("*") if folder == "." else (package / folder).resolve().rglob("*")
        for file in sorted(found):
            if file.suffix in (".py", ".cpp", ".yaml") and file.is_file():
                digest.update(f"{folder}/{file.name}".encode() + b"\0" + file.read_bytes())
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
