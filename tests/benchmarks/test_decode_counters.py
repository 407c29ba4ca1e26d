import json
from pathlib import Path

import decode_counters
import pytest
from decode_attention import CASES

HEADER = '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
METRICS = {
    "Duration": ("ns", "5,120"), "DRAM Throughput": ("%", "12.5"), "Compute (SM) Throughput": ("%", "30"),
    "Issue Slots Busy": ("%", "29.5"), "Achieved Occupancy": ("%", "21"), "Waves Per SM": ("", "0.75"),
    "Registers Per Thread": ("register/thread", "128"),
}  # fmt: skip


def printed(kernels: list[str], without: str = "") -> str:
    lines = ["==PROF== Connected", HEADER]
    for number, kernel in enumerate(kernels):
        for metric, (unit, value) in METRICS.items():
            if metric != without:
                lines.append(f'"{number}","{kernel}","a section","{metric}","{unit}","{value}"')
    return "\n".join(lines)


def test_kernels_are_those_of_steps_that_begin_with_the_first() -> None:
    steps = decode_counters.read(printed(["_turn", "_score", "_turn", "_score", "_merge"]).splitlines())
    assert [[kernel["kernel"] for kernel in step] for step in steps] == [
        ["_turn", "_score"], ["_turn", "_score", "_merge"]
    ]  # fmt: skip
    assert steps[0][1] == {
        "kernel": "_score", "microseconds": 5.12, "dram": 0.125, "arithmetic": 0.3, "issued": 0.295,
        "occupancy": 0.21, "waves": 0.75, "registers": 128.0,
    }  # fmt: skip


def test_the_result_is_written_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, other = tmp_path / "step.csv", tmp_path / "out.json", tmp_path / "other.json"
    source.write_text(printed(["_turn", "_score"] * len(CASES)))
    where = {"device": "a GPU", "torch": "2", "transformers": "5", "date": "today"}
    other.write_text(json.dumps({"environment": where}))
    assert decode_counters.main([str(source), "--json", str(target), "--environment", str(other)]) == 0
    assert [(case["batch"], case["tokens"]) for case in json.loads(target.read_text())["cases"]] == [*CASES]
    assert "| `_score` | 1 | 65536 | 5.1 | 12% | 30% |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("==PROF== nothing", "no kernel in it"),
        (printed(["_turn"], without="Achieved Occupancy"), "_turn has no 'Achieved Occupancy'"),
        (printed(["_turn"]), "5 steps expected, got 1"),
        (printed(["_turn"]).replace('"ns"', '"ms"'), "durations in ns expected, got ms"),
    ],
)
def test_what_is_no_such_profile_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    source, target = tmp_path / "step.csv", tmp_path / "out.json"
    source.write_text(text)
    assert decode_counters.main([str(source), "--json", str(target)]) == 1
    assert message in capsys.readouterr().err
    assert not target.exists()
