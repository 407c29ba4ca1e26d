"""Folders of converted models in the user's cache: built aside, then put in place in one step."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hga_compile.cli.errors import CommandError
from hga_compile.demo.wheel import sha256_of

MANIFEST = "hga-manifest.json"
_WAIT = 1800.0  # seconds for another process that builds the same folder


def cache_root() -> Path:
    """Folder below which the demo keeps models."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("hga-compile", appauthor=False)) / "models"


def is_intact(folder: Path) -> bool:
    """Whether a folder has a manifest, and every file that it lists with its size and SHA-256."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(
            (folder / name).stat().st_size == entry["bytes"] and sha256_of(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_once(
    target: Path, build: Callable[[Path], None], say: Callable[[str], None] = lambda _: None
) -> Path:
    """Return a folder, building it first unless it is there and intact.

    A build happens in a temporary folder beside `target`, which becomes `target` by one rename when all its
    files and their manifest are on disk: what is interrupted leaves nothing that looks finished.

    Parameters
    ----------
    target
        The folder.
    build
        Fills the empty folder that it is given.
    say
        Told about waiting and about a damaged folder.

    Returns
    -------
    pathlib.Path
        `target`.

    Raises
    ------
    CommandError
        If the cache cannot be written, or another process holds it for half an hour.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process is preparing {target.name}; waiting for it")
            lock.acquire(timeout=_WAIT)
    except Timeout:
        raise CommandError(
            f"another process has held {lock.lock_file} for {_WAIT / 60:.0f} minutes"
        ) from None
    except OSError as error:
        raise CommandError(
            f"the cache folder {str(target.parent)!r} cannot be written: {error.strerror} "
            "(set XDG_CACHE_HOME, or pass --model)"
        ) from error
    try:
        if is_intact(target):
            return target
        if target.exists():
            say(f"the cached {target.name} is damaged; building it again")
            shutil.rmtree(target)
        _sweep(target)
        _build(target, build)
        return target
    finally:
        lock.release()


def _build(target: Path, build: Callable[[Path], None]) -> None:
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        build(draft)
        files = {
            str(path.relative_to(draft)): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        }
        (draft / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=2), encoding="utf-8")
        for path in [*(path for path in draft.rglob("*") if path.is_file()), draft]:
            _sync(path)
        draft.rename(target)
    except OSError as error:
        raise CommandError(
            f"{target.name} could not be written to {str(target.parent)!r}: {error}"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sweep(target: Path) -> None:
    # The lock is held, so whatever lies there belongs to a process that died.
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
