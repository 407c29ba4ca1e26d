import json
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from hga_compile.evaluation.candidates import DenseCandidate, Outcome, Use
from hga_compile.evaluation.nll import bounds, scores_in
from hga_compile.evaluation.reference import dense_reference, run_mode
from hga_compile.evaluation.rows import Row
from hga_compile.evaluation.study import Case, Study, StudyError, run_key

LENGTH, SCORED = 96, 24
ROWS = [Row("window only", {}, "w", {}), Row("default", {}, "d", {})]
HEADER = {
    "environment": {"code": "c0de", "device": "test"},
    "model": {"name": "tiny"},
    "settings": {"dtype": "float32"},
}


def case(name, seed):
    ids = torch.randint(97, (1, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Case({"text": name, "length": LENGTH}, ids, SCORED, scores_in(bounds(LENGTH, SCORED, 3)))


CASES = [case(name, seed) for seed, name in enumerate(("first", "second", "third"))]


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
    score = CASES[0].scores
    result = score(reference, run_mode(DenseCandidate(tiny_model), mode, reference))
    assert abs(result["delta_nll"]) < 1e-5
    assert abs(result["kl"]) < 1e-5
    assert result["top1"] == 1.0
    assert result["nll"] == pytest.approx(score(reference, None)["nll"], abs=1e-5)


def test_decode_leaves_the_reference_cache_as_it_was(tiny_model, reference):
    before = [layer.keys.clone() for layer in reference.cache.layers]
    run_mode(DenseCandidate(tiny_model), "decode", reference)
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, reference.cache.layers, strict=True))


def run_study(out, model, resume=False, cases=CASES, header=HEADER, rows=ROWS, stop=None):
    """Return the rows that were computed, the result, and the tokens that were skipped."""
    made, skipped = [], []

    def candidate(row, mode):
        made.append(row.name)
        if stop is not None and len(made) > stop:
            raise KeyboardInterrupt
        return Blurred(model)

    study = Study(header, out, resume)
    for each in cases:
        study.case(each, rows, ["decode"], model, candidate, skipped.append)
    study.save({"summary": []})
    return made, json.loads(out.read_text()), sum(skipped)


def test_a_study_has_a_dense_row_and_every_other_of_every_case(tmp_path, tiny_model):
    made, result, _ = run_study(tmp_path / "q.json", tiny_model)
    assert made == ["window only", "default"] * 3
    assert [run["row"] for run in result["runs"]] == ["dense", "window only", "default"] * 3
    dense, _, default = result["runs"][:3]
    assert (dense["kl"], dense["attended"]) == (0.0, 1.0)
    assert default["kl"] > 0.05
    assert (default["attended"], default["summary_bytes"], default["fallbacks"]) == (0.03, 0.07, {"why": 2})
    assert (default["text"], default["length"], default["scored"]) == ("first", LENGTH, SCORED)
    assert "unvisited" not in result


def test_resume_computes_only_what_is_missing(tmp_path, tiny_model):
    out = tmp_path / "q.json"
    with pytest.raises(KeyboardInterrupt):
        run_study(out, tiny_model, stop=3)
    part = json.loads(out.read_text())["runs"]
    assert len(part) == 5
    made, result, skipped = run_study(out, tiny_model, resume=True)
    assert made == ["default", "window only", "default"]
    assert result["runs"][:5] == part
    assert skipped == 3 * SCORED
    assert run_study(out, tiny_model, resume=True)[0] == []


def test_an_interrupted_resume_loses_no_older_run(tmp_path, tiny_model):
    out = tmp_path / "q.json"
    _, whole, _ = run_study(out, tiny_model)
    changed = [ROWS[0], replace(ROWS[1], identity="other profile")]
    with pytest.raises(KeyboardInterrupt):
        run_study(out, tiny_model, resume=True, rows=changed, stop=0)
    made, result, _ = run_study(out, tiny_model, resume=True)
    assert made == []
    assert result["runs"] == whole["runs"]


@pytest.mark.parametrize("change", ["code", "profile", "text", "model", "scored"])
def test_resume_never_takes_runs_of_something_else(tmp_path, tiny_model, change):
    out = tmp_path / "q.json"
    run_study(out, tiny_model, cases=CASES[:1])
    header, rows, one = dict(HEADER), list(ROWS), CASES[0]
    if change == "code":
        header["environment"] = HEADER["environment"] | {"code": "other"}
    elif change == "model":
        header["model"] = {"name": "other"}
    elif change == "profile":
        rows = [replace(row, identity=row.identity + "2") for row in rows]
    elif change == "text":
        one = replace(one, ids=CASES[1].ids)
    else:
        one = replace(one, scored=SCORED - 3, scores=scores_in(bounds(LENGTH, SCORED - 3, 3)))
    made, result, _ = run_study(out, tiny_model, True, [one], header, rows)
    assert made == ["window only", "default"]
    assert len(result["runs"]) == 3


def test_without_resume_everything_is_computed_again(tmp_path, tiny_model):
    out = tmp_path / "q.json"
    run_study(out, tiny_model)
    assert len(run_study(out, tiny_model)[0]) == 6


@pytest.mark.parametrize("damage", ["{", "[]", '{"runs": [1]}'])
def test_a_damaged_result_is_refused_and_kept(tmp_path, damage):
    out = tmp_path / "q.json"
    out.write_text(damage)
    with pytest.raises(StudyError, match=r"q.json is no result to go on from: .*leave out --resume"):
        Study(HEADER, out, resume=True)
    assert out.read_text() == damage


def test_run_key_depends_on_everything():
    assert run_key(a=1, b={"x": 2}) == run_key(b={"x": 2}, a=1) != run_key(a=1, b={"x": 3})
