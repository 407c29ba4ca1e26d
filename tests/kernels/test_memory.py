"""What a routed prefill takes of the process's memory: grows with its length, not with the square of it."""

import subprocess
import sys

import pytest

TOKENS, ROWS = 16384, 2
PROGRAM = f"""
import resource
import torch
from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels.ops import attention
from hga_compile.kernels.site import SiteConfig

torch.set_num_threads(1)
routing = Routing(summary="mean", group_size=64, budget=Budget(tokens=256), dense_below=0, centre_tokens=64)

def peak(tokens):
    query, key, value = (torch.randn(1, {ROWS}, tokens, 16) for _ in range(3))
    padding = torch.ones(1, tokens, dtype=torch.bool)
    padding[:, :50] = False
    attention(query, key, value, padding, 0.25, SiteConfig(0, "host", routing).to_text())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak(1024)
print(peak({TOKENS}) - before)
"""


@pytest.mark.slow
def test_tiles_of_growing_length_leave_no_holes_in_the_heap():
    """Each tile once was a little longer than the one before: at 64K tokens the holes took 3 GiB."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(ran.stdout) * 1024 < ROWS * TOKENS * TOKENS // 4
