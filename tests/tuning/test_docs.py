"""docs/tuning.md: its numbers are the shipped calibration's."""

from pathlib import Path

from hga_compile.tuning.hardware import calibration

TEXT = (Path(__file__).parents[2] / "docs/tuning.md").read_text(encoding="utf-8")
ROWS = {"step": "decode step of a layer", "gather": "gather from pinned", "dense": "dense decode attention"}


def test_the_table_of_errors_is_the_calibrations():
    for kernel, begin in ROWS.items():
        numbers = calibration()["kernels"][kernel]
        row = next(line for line in TEXT.splitlines() if line.startswith(f"| {begin}"))
        cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        assert cells == [
            str(numbers["settings"]),
            f"{numbers['mean_error']:.1%}",
            f"{numbers['worst_error']:.1%}",
        ]
