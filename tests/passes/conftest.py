import sys
from pathlib import Path

import pytest
import torch

# The ways to get a graph are a plain module beside the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def same_numbers_and_a_clean_compiler():
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
