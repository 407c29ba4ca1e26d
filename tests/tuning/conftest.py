import sys
from pathlib import Path

import pytest

pytest.importorskip("optuna", minversion="5")
# Helpers beside the tests, found by name.
sys.path.insert(0, str(Path(__file__).resolve().parent))
