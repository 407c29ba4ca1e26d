import json
from pathlib import Path

import pytest
from table import TableError, main, render, update

RAN = {
    "environment": {"device": "A CPU", "torch": "2.13.0", "transformers": "5.23.0", "date": "2026-11-22"},
    "model": {"name": "smollm2"},
}
SPREAD = {"mean": 0.0231, "error": 0.004, "low": 0.0152, "high": 0.0301}
ONE = {"mean": 1.0, "error": None, "low": None, "high": None}
SHARES = {
    "top1": ONE,
    "attended": {"mean": 0.031},
    "kv_bytes": {"mean": 0.0305},
    "summary_bytes": {"mean": 0.0664},
}
LANE = {"milliseconds": 100.0, "floor_milliseconds": 40.0, "measured_over_floor": 2.5}
RESULTS = {
    "quality": {
        "benchmark": "quality",
        "documents": [{"name": "emma"}, {"name": "asyncio"}],
        "summary": [
            {
                "row": "dense",
                "mode": "-",
                "length": 8192,
                "documents": 2,
                "delta_nll": ONE,
                "kl": ONE,
                **SHARES,
            },
            {
                "row": "default",
                "mode": "decode",
                "length": 8192,
                "documents": 2,
                "delta_nll": SPREAD,
                "kl": SPREAD,
            }
            | SHARES,
        ],
    },
    "cpu_decode": {
        "benchmark": "cpu_decode",
        "settings": {"length": 8192, "threads": 2},
        "bandwidth": {"copy": 1.5e10, "read": 2e10},
        "lanes": {
            "dense, Inductor": {"tokens_per_second": 5.0, **LANE},
            "hga, default": {"tokens_per_second": 10.0, **LANE},
        },
    },
    "gpu_memory": {
        "benchmark": "gpu_memory",
        "settings": {"tier": "host"},
        "points": [
            {"side": "hga", "context": 4096, "peak_bytes": 2 << 20, "gpu_kv_bytes": 0}
            | {"gpu_index_bytes": 1 << 20, "host_kv_bytes": 7 << 20},
            {"side": "dense", "context": 4096, "peak_bytes": 9 << 20, "gpu_kv_bytes": 7 << 20}
            | {"gpu_index_bytes": 0, "host_kv_bytes": 0},
        ],
    },
}


STEP = {"batch": 1, "tokens": 65536, "tier": "gpu", "microseconds": 40.0, "floor_microseconds": 4.0}
STEP |= {"measured_over_floor": 10.0, "peers": {"cuDNN": 50.0, "flash": 60.0}}
RESULTS["decode_attention"] = {
    "benchmark": "decode_attention",
    "bandwidth": {"gpu": 4e12, "host": 5e10},
    "bandwidth_from": "the same run",
    "cases": [STEP, STEP | {"tier": "host", "peers": {}}],
}

PREFILL = {"tokens": 65536, "tile": 64, "attended": 0.057, "milliseconds": 30.0, "floor_milliseconds": 10.0}
PREFILL |= {"measured_over_floor": 3.0, "errors": {"FlexAttention": "E: no"}}
RESULTS["prefill_attention"] = {
    "benchmark": "prefill_attention",
    "settings": {"tile": 64},
    "rate": 7e14,
    "cases": [
        PREFILL | {"peers": {"cuDNN": 60.0, "flash": 90.0}},
        PREFILL | {"peers": {"cuDNN": 60.0, "flash": 90.0, "FlexAttention": 12.0}, "errors": {}},
    ],
}

OFFLOADED = {"tokens": 65536, "tier": "host", "hot_cache": 0.1, "microseconds": 40.0, "extended": 8}
OFFLOADED |= {"floor_microseconds": 10.0, "measured_over_floor": 4.0, "hit_rate": 0.941, "lru": 0.95}
OFFLOADED |= {"pcie_bytes": 2.5e5, "file_bytes": 0.0}
RESULTS["offload"] = {
    "benchmark": "offload",
    "bandwidth": {"gpu": 4e12, "host": 5e10},
    "dense": {"65536": {"cuDNN": 50.0, "flash": 60.0, "streamed": 2400.0}},
    "recordings": [{"tokens": 8192, "text": {"name": "emma"}, "model": {"name": "smollm2"}}],
    "cases": [OFFLOADED, OFFLOADED | {"tier": "gpu", "hot_cache": None, "hit_rate": None, "lru": None}],
}

RESULTS["summarize"] = {
    "benchmark": "summarize",
    "rate": 4e12,
    "cases": [
        {"kind": "2-bit codes", "tokens": 65536, "microseconds": 25.0, "floor_microseconds": 20.0}
        | {"measured_over_floor": 1.25, "peers": {"copy": 21.0}},
    ],
}


@pytest.fixture
def results(tmp_path):
    for name, result in RESULTS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(RAN | result))
    return tmp_path


ROWS = {
    "quality": "| default | decode | 8192 | 2 | 0.0231 ± 0.0040 [0.0152, 0.0301] |",
    "cpu_decode": "| hga, default | 10.00 | 2.00x | 100.0 | 40.0 | 2.50 |",
    "gpu_memory": "| 4096 | 9.0 | 2.0 | 7.0 | 0.0 | 1.0 | 7.0 |",
    "prefill_attention": "| 65536 | 5.7% | 30.00 | 10.00 | 3.0 | 60.00 | 90.00 | failed | 2.00x |",
    "offload": "| 65536 (8 x) | host RAM | 10% | 94.1% (95.0%) | 0.25 | - | 40.0 | 10.0 | 4.0 |",
    "summarize": "| 2-bit codes | 65536 | 25.0 | 20.0 | 1.25 | 21.0 | 84% |",
    "decode_attention": "| 1 | 65536 | GPU memory | 40.0 | 4.0 | 10.0 | 50.0 | 60.0 | 1.25x |",
}


@pytest.mark.parametrize("name", RESULTS)
def test_each_result_is_a_table_with_what_ran_where(results, name):
    text = render(results / f"{name}.json")
    assert ROWS[name] in text
    lines = text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert lines[-1].endswith("smollm2; A CPU, torch 2.13.0, transformers 5.23.0, 2026-11-22.")


def test_a_sparse_peer_has_a_column_with_its_time_or_its_failure(results):
    path = results / "decode_attention.json"
    assert "FlexAttention" not in render(path)
    result = json.loads(path.read_text())
    first, second = result["cases"]
    cases = [
        first | {"sparse": {"FlexAttention": 123.4}},
        first | {"errors": {"FlexAttention": "NoValidChoicesError: none"}},
        second,
    ]
    path.write_text(json.dumps(result | {"cases": cases}))
    text = render(path)
    assert "| against cuDNN | FlexAttention, 3%, not routed |" in text
    assert "| 1.25x | 123.4 |\n" in text and "| 1.25x | failed |\n" in text and "| - | - |\n" in text
    assert "FlexAttention: NoValidChoicesError: none." in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_the_readme_is_up_to_date():
    assert main(["--check", str(Path(__file__).parents[2] / "README.md")]) == 0


def test_update_replaces_only_between_markers(results):
    text = "a\n<!-- bench:cpu_decode -->\nold\n<!-- /bench:cpu_decode -->\nb <!-- other -->\n"
    text += "<!-- bench:quality -->\n<!-- /bench:quality -->\n"
    new = update(text, results)
    assert new.startswith("a\n<!-- bench:cpu_decode -->\n| what |")
    assert "old" not in new
    assert "<!-- /bench:cpu_decode -->\nb <!-- other -->\n<!-- bench:quality -->\n| row |" in new
    assert update(new, results) == new


@pytest.mark.parametrize(
    "text",
    [
        "<!-- bench:quality -->\nno end",
        "<!-- bench:quality -->\n<!-- bench:cpu_decode -->\n"
        "<!-- /bench:cpu_decode -->\n<!-- /bench:quality -->",
    ],
)
def test_markers_without_their_end_are_refused(results, text):
    with pytest.raises(TableError, match=r"<!-- /bench:(quality|cpu_decode) --> after it"):
        update(text, results)


def test_missing_broken_and_foreign_results_are_named(tmp_path):
    with pytest.raises(TableError, match=r"no result none\.json: run the benchmark"):
        render(tmp_path / "none.json")
    for content in ("{", "[]", '{"benchmark": "speed"}', '{"benchmark": "quality"}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(TableError, match=r"bad\.json is no result of quality, cpu_decode, gpu_memory"):
            render(tmp_path / "bad.json")


def test_cli_updates_checks_and_prints(results, tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_text("<!-- bench:quality -->\n<!-- /bench:quality -->\n")
    folder = ["--folder", str(results)]
    assert main(["--check", str(document), *folder]) == 1
    assert "README.md is out of date" in capsys.readouterr().err
    assert main(["--update", str(document), *folder]) == 0
    assert main(["--check", str(document), *folder]) == 0
    assert main([str(results / "quality.json")]) == 0
    assert ROWS["quality"] in capsys.readouterr().out
    assert main([str(results / "other.json")]) == 1
    with pytest.raises(SystemExit):
        main([])
