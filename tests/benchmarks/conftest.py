import sys
from pathlib import Path

# The benchmarks are scripts that import each other by name, as Python runs them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
