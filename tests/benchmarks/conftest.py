import sys
from pathlib import Path

# What the tests share is a plain module beside them.
sys.path.insert(0, str(Path(__file__).resolve().parent))
# The benchmarks are scripts that import each other by name, as Python runs them.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
