"""What every backend test starts from: nothing compiled, nothing counted."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tiny.py, shared by these tests alone


@pytest.fixture(autouse=True)
def fresh():
    import hga_compile

    torch._dynamo.reset()
    hga_compile.reset_report(sites=True)
    yield
    torch._dynamo.reset()
