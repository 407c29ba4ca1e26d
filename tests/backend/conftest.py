import contextlib
import gc
import os
import sys
from pathlib import Path

# Tiny shapes: threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

with contextlib.suppress(ImportError):
    # Inductor's C++ builder needs it loaded before anything loads Python's own distutils.
    import setuptools  # noqa: F401

import pytest
import torch

# The tiny models are a plain module beside the tests.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_models import Pair, make_model

import hga_compile
from hga_compile.hooks import install_hooks
from hga_compile.kernels.states import STATES

# Models of one class share code, and compiled forms of one code beyond the limit would run uncompiled.
torch._dynamo.config.recompile_limit = 128


def pytest_itemcollected(item):
    """Tests that share compiled models go into one process."""
    names = getattr(item, "fixturenames", ())
    group = "pairs" if "pairs" in names else item.path.name if "results" in names else None
    if "seen" in names:
        group = item.callspec.params["seen"]
    if group is not None:
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items):
    """Tests that forget what is compiled go last."""
    items.sort(key=lambda item: "recompile" in getattr(item, "fixturenames", ()))


@pytest.fixture(autouse=True)
def hooks_and_a_clean_report():
    """As after the first look-up of the backend, whatever a test did before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    install_hooks()
    hga_compile.reset_report(sites=True)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_gradients(request):
    with torch.set_grad_enabled(request.node.get_closest_marker("gradients") is not None):
        yield


@pytest.fixture
def recompile():
    """Let a test compile anew: compiled code of other tests is forgotten."""
    torch._dynamo.reset()
    yield torch._dynamo.reset
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def pairs():
    """Every model compiled once for all tests of the session, at full budget."""
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            torch.manual_seed(0)
            made[name] = Pair(make_model(name))
        return made[name]

    return get


@pytest.fixture
def open_states():
    """Count of open stores, those of dead caches not among them."""

    def count() -> int:
        gc.collect()
        return STATES.count()

    return count
