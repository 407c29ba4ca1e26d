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


def test_weights_in_ram_are_in_the_plan_and_said_as_accelerate_takes_them(capsys):
    arguments = ("qwen3-30b", "--gpu", "rtx4090", "--context", "65536", "--ram-layers", "20")
    code, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    parts = {part["name"]: part for part in found["parts"]}
    assert code == 0 and found["fits"]
    assert parts["weights in RAM"]["place"] == "host"
    assert (
        found["max_memory"]["cpu"]
        == parts["weights in RAM"]["bytes"] + parts["weights on their way"]["bytes"]
    )
    _, out, _ = run(capsys, *arguments)
    assert 'device_map="auto", max_memory={0: "' in out and "'cpu': \"" in out


def test_layers_in_ram_that_make_it_fit_are_said(capsys):
    arguments = ("qwen3-30b", "--gpu", "rtx4090", "--context", "65536")
    _, out, _ = run(capsys, *arguments, "--json")
    found = json.loads(out)
    assert not found["fits"] and found["max_memory"] is None
    (change,) = (remedy["change"] for remedy in found["remedies"] if "--ram-layers" in remedy["change"])
    _, out, _ = run(capsys, *arguments, *change.split(), "--json")
    assert json.loads(out)["fits"]


def test_more_layers_in_ram_than_there_are_is_refused(capsys):
    code, _, err = run(capsys, "qwen3-30b", "--gpu", "rtx4090", "--ram-layers", "49")
    assert (code, "48 layers, got 49 (--ram-layers)" in err) == (2, True)
    code, _, err = run(capsys, "qwen3-0.6b", "--gpu", "cpu", "--ram-layers", "1")
    assert (code, "a CPU has one memory" in err) == (2, True)


def test_without_a_context_it_is_the_models_own(capsys):
    _, out, _ = run(capsys, "phi-4", "--gpu", "h200")
    assert "phi-4 on h200, 16,384 tokens" in out


def test_a_wrong_name_is_one_line_with_the_nearest(capsys):
    code, out, err = run(capsys, "qwen3-30b", "--gpu", "rtx5009")
    assert (code, out) == (2, "")
    assert "did you mean 'rtx5090'?" in err
    assert err.count("\n") == 1
