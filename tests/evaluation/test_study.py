import json
from dataclasses import replace

import pytest
import study
import torch
from candidates import DenseCandidate, Outcome, Use
from corpora import Document
from quality import parse, show
from rich.console import Console
from study import Row, Study, dense_reference, dense_row, measure, run_mode, summarise
from transformers import DynamicCache

LENGTH, SCORED = 96, 24
DOCUMENTS = [
    Document(name, name, "CC0-1.0", "test", name * 8, 9, "-") for name in ("first", "second", "third")
]
ROWS = [Row("window only", {}, "w"), Row("default", {}, "d")]
HEADER = {
    "benchmark": "quality",
    "environment": {"code": "c0de", "device": "test"},
    "model": {"name": "tiny"},
    "settings": {"dtype": "float32"},
}


@pytest.fixture
def reference(tiny_model):
    torch.manual_seed(2)
    with torch.no_grad():
        yield dense_reference(tiny_model, torch.randint(97, (1, LENGTH)), SCORED)


class Blurred(DenseCandidate):
    """Dense logits with noise: a candidate that is measurably not dense."""

    def decode(self, dense, prefix, queries):
        outcome = super().decode(dense, prefix, queries)
        return Outcome(outcome.logits + torch.randn_like(outcome.logits), Use(0.03, 0.03, 0.07, {"why": 2}))


def test_reference_predicts_the_last_tokens_from_all_before(tiny_model, reference):
    logits = tiny_model(input_ids=reference.ids).logits[0, -SCORED - 1 : -1]
    torch.testing.assert_close(reference.logits, logits)
    assert reference.cache.get_seq_length() == LENGTH - 1
    assert type(reference.cache) is DynamicCache


@pytest.mark.parametrize("mode", ["decode", "all"])
def test_the_dense_model_in_the_candidates_place_is_at_distance_zero(tiny_model, reference, mode):
    result = measure(DenseCandidate(tiny_model), mode, reference)
    assert abs(result["delta_nll"]) < 1e-5
    assert abs(result["kl"]) < 1e-5
    assert result["top1"] == 1.0
    assert result["nll"] == pytest.approx(dense_row(reference)["nll"], abs=1e-5)


def test_decode_leaves_the_reference_cache_as_it_was(tiny_model, reference):
    before = [layer.keys.clone() for layer in reference.cache.layers]
    run_mode(DenseCandidate(tiny_model), "decode", reference)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, reference.cache.layers, strict=True))


def test_a_candidate_that_differs_is_seen(tiny_model, reference):
    result = measure(Blurred(tiny_model), "decode", reference)
    assert result["kl"] > 0.05
    assert result["kl_error"] > 0
    assert (result["attended"], result["summary_bytes"], result["fallbacks"]) == (0.03, 0.07, {"why": 2})


def run_study(out, reference, model, resume=False, documents=DOCUMENTS, header=HEADER, rows=ROWS, stop=None):
    made = []

    def candidate(row):
        made.append(row.name)
        if stop is not None and len(made) > stop:
            raise KeyboardInterrupt
        return Blurred(model)

    runs = Study(out, header, resume)
    for document in documents:
        runs.text(document, LENGTH, SCORED, rows, ["decode"], lambda: reference, candidate)
    runs.save(finished=True)
    return made, json.loads(out.read_text())


def test_study_writes_rows_averages_and_documents(tmp_path, tiny_model, reference):
    made, result = run_study(tmp_path / "q.json", reference, tiny_model)
    assert made == ["window only", "default"] * 3
    assert [run["row"] for run in result["runs"]] == ["dense", "window only", "default"] * 3
    assert [(e["row"], e["mode"], e["documents"]) for e in result["summary"]] == [
        ("dense", "-", 3),
        ("window only", "decode", 3),
        ("default", "decode", 3),
    ]
    dense, _, default = result["summary"]
    assert dense["kl"]["mean"] == 0.0
    assert default["kl"]["low"] <= default["kl"]["mean"] <= default["kl"]["high"]
    assert result["documents"][0] == DOCUMENTS[0].entry()
    assert "unvisited" not in result


def test_resume_computes_only_what_is_missing(tmp_path, tiny_model, reference):
    out = tmp_path / "q.json"
    with pytest.raises(KeyboardInterrupt):
        run_study(out, reference, tiny_model, stop=3)
    part = json.loads(out.read_text())["runs"]
    assert len(part) == 5
    made, result = run_study(out, reference, tiny_model, resume=True)
    assert made == ["default", "window only", "default"]
    assert result["runs"][:5] == part
    assert run_study(out, reference, tiny_model, resume=True)[0] == []


def test_an_interrupted_resume_loses_no_older_run(tmp_path, tiny_model, reference):
    out = tmp_path / "q.json"
    _, whole = run_study(out, reference, tiny_model)
    changed = [ROWS[0], replace(ROWS[1], identity="other profile")]
    with pytest.raises(KeyboardInterrupt):
        run_study(out, reference, tiny_model, resume=True, rows=changed, stop=0)
    made, result = run_study(out, reference, tiny_model, resume=True)
    assert made == []
    assert result["runs"] == whole["runs"]


@pytest.mark.parametrize("change", ["code", "profile", "text", "model"])
def test_resume_never_takes_runs_of_something_else(tmp_path, tiny_model, reference, change):
    out = tmp_path / "q.json"
    run_study(out, reference, tiny_model, documents=DOCUMENTS[:1])
    header, rows, document = dict(HEADER), list(ROWS), DOCUMENTS[0]
    if change == "code":
        header["environment"] = HEADER["environment"] | {"code": "other"}
    elif change == "model":
        header["model"] = {"name": "other"}
    elif change == "profile":
        rows = [replace(row, identity=row.identity + "2") for row in rows]
    else:
        document = replace(document, sha256="other")
    made, result = run_study(out, reference, tiny_model, True, [document], header, rows)
    assert made == ["window only", "default"]
    assert len(result["runs"]) == 3


def test_without_resume_everything_is_computed_again(tmp_path, tiny_model, reference):
    out = tmp_path / "q.json"
    run_study(out, reference, tiny_model)
    assert len(run_study(out, reference, tiny_model)[0]) == 6


def test_tables_show_every_row(tmp_path, tiny_model, reference):
    _, result = run_study(tmp_path / "q.json", reference, tiny_model)
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    show(summarise(result["runs"]), result["runs"], console)
    text = console.export_text()
    assert all(word in text for word in ("window only", "default", "dense", "third", "95%", "3.0%", "7.0%"))


def test_arguments_are_checked(capsys):
    options = parse(["--lengths", "4096,8192", "--modes", "decode", "--scored", "100"])
    assert (options.lengths, options.modes) == ([4096, 8192], ["decode"])
    for wrong in (["--modes", "decode,prefill"], ["--scored", "8192"], ["--scored", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "--scored must be at least 1 and below every length" in capsys.readouterr().err


def test_run_key_depends_on_everything():
    assert study.run_key(a=1, b={"x": 2}) == study.run_key(b={"x": 2}, a=1) != study.run_key(a=1, b={"x": 3})
