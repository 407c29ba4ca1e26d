import os
import sys
from pathlib import Path

import pytest
import torch

from hga_compile.kernels.ledger import LEDGER

# The oracle and the shared cases are plain modules beside the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def quick_and_poisoned(monkeypatch: pytest.MonkeyPatch):
    """One thread, since the shapes are tiny; and NaN in memory that nobody has written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.manual_seed(0)
    LEDGER.reset()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def place() -> torch.device:
    """Where Triton's kernels run: on a GPU, or in its interpreter."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device (slow tests run some of these in Triton's interpreter)")
    return torch.device("cpu")
