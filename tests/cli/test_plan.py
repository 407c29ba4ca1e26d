"""``hga plan``: the plan as a table and as JSON, and its errors."""

import json

from hga_compile.cli import main


def run(capsys, *arguments):
    code = main(["plan", *arguments])
    return code, *capsys.readouterr()


def test_the_plan_as_json(capsys):
    code, out, _ = run(capsys, "qwen3-30b", "--gpu", "rtx5090", "--context", "65536", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"]
    assert {part["name"] for part in found["parts"]} >= {
        "weights",
        "index",
        "token K/V",
        "activations",
        "staging",
    }
    for place, numbers in found["places"].items():
        assert numbers["used"] == sum(part["bytes"] for part in found["parts"] if part["place"] == place)
        assert numbers["spare"] == numbers["room"] - numbers["used"]
    assert found["longest_context"] > 65536
    assert found["remedies"] == []


def test_what_would_make_it_fit_is_said(capsys):
    code, out, _ = run(capsys, "llama3.1-8b", "--gpu", "rtx4090", "--context", "131072", "--tier", "gpu")
    assert code == 0
    assert "GiB too much" in out
    assert "--tier host: token K/V in host RAM" in out
    assert "--gpu l40s" in out


def test_without_a_context_it_is_the_models_own(capsys):
    _, out, _ = run(capsys, "phi-4", "--gpu", "h200")
    assert "phi-4 on h200, 16,384 tokens" in out


def test_a_wrong_name_is_one_line_with_the_nearest(capsys):
    code, out, err = run(capsys, "qwen3-30b", "--gpu", "rtx5009")
    assert (code, out) == (2, "")
    assert "did you mean 'rtx5090'?" in err
    assert err.count("\n") == 1
