import sys
from pathlib import Path

import pytest
import torch

# Cases are a plain module beside the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def quick_and_poisoned(monkeypatch: pytest.MonkeyPatch):
    """One thread, since the shapes are tiny; and NaN in memory that nobody has written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
