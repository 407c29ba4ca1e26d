"""Hugging Face hub snapshots with a short wait: cached first, and no minute of retries when offline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from hga_compile.cli.errors import BadInputError, CommandError, one_line

# What a causal language model needs; not the ONNX, TensorFlow or duplicate PyTorch files beside it.
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SETTINGS = ["*.json", "*.txt", "*.model", "*.jinja"]
ANSWER_WITHIN = 5.0  # seconds for the hub to answer the first request


def cached_snapshot(repo: str, *, weights: bool = True) -> Path | None:
    """Folder of a hub model that is wholly in the local cache, or None."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, allow_patterns=_patterns(weights), local_files_only=True))
    except (OSError, ValueError):
        return None
    return folder if is_model_folder(folder, weights=weights) else None


def snapshot(repo: str, *, weights: bool = True, say: Callable[[str], None] = lambda _: None) -> Path:
    """Folder of a hub model, downloaded if needed.

    Parameters
    ----------
    repo
        Hub id, such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
    weights
        False to fetch the configuration and tokenizer alone.
    say
        Told before a download starts.

    Returns
    -------
    pathlib.Path

    Raises
    ------
    BadInputError
        If the hub has no such model, or it may not be read.
    CommandError
        If the hub cannot be reached and the model is not in the local cache, or the download fails.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    found = cached_snapshot(repo, weights=weights)
    if found is not None:
        return found
    try:
        HfApi().model_info(repo, timeout=ANSWER_WITHIN)
    except GatedRepoError:
        raise BadInputError(
            f"the hub lets only approved accounts read {repo!r}: accept its licence there, "
            "then run 'hf auth login'"
        ) from None
    except RepositoryNotFoundError:
        raise BadInputError(
            f"MODEL must be a folder, a GGUF file or a hub id, got {repo!r}: no such folder, "
            "and no such model on the hub"
        ) from None
    except Exception as error:
        raise CommandError(
            f"{repo!r} is not in the local hub cache and the Hugging Face hub cannot be reached "
            f"({one_line(error)}); pass a local folder as MODEL"
        ) from error
    say(f"downloading {repo} from the Hugging Face hub")
    try:
        folder = Path(snapshot_download(repo, allow_patterns=_patterns(weights)))
    except Exception as error:
        raise CommandError(
            f"downloading {repo!r} from the Hugging Face hub failed: {one_line(error)}"
        ) from error
    if not is_model_folder(folder, weights=weights):
        raise BadInputError(
            f"the hub's {repo!r} has no config.json with safetensors weights: it cannot be run"
        )
    return folder


def is_model_folder(folder: Path, *, weights: bool = True) -> bool:
    """Whether a folder holds a configuration and, if asked for, every file of its safetensors weights."""
    if not (folder / "config.json").is_file():
        return False
    if not weights or (folder / "model.safetensors").is_file():
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return False
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return bool(shards) and all((folder / shard).is_file() for shard in shards)


def _patterns(weights: bool) -> list[str]:
    return SETTINGS + WEIGHTS if weights else SETTINGS
