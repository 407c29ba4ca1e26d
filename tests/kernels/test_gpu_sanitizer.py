"""The Triton kernels under compute-sanitizer: no access out of bounds, no race in shared memory."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sanitized import CASES

SANITIZER = shutil.which("compute-sanitizer")
SCRIPT = Path(__file__).parent / "sanitized.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer (it comes with the CUDA toolkit)")
@pytest.mark.timeout(580)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_error(tool: str) -> None:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, str(SCRIPT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=570)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    # A sanitizer that saw nothing run would be content too.
    assert sum(line.split(": ")[-1].isdigit() for line in run.stdout.splitlines()) == len(CASES), run.stdout
