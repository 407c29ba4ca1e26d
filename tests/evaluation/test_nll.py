import csv
from itertools import pairwise

import pytest
import torch

from hga_compile.evaluation.candidates import Outcome, Use
from hga_compile.evaluation.corpora import Document
from hga_compile.evaluation.files import write_csv
from hga_compile.evaluation.nll import bounds, cases, first_tokens, flat, scores_in, summarise
from hga_compile.evaluation.reference import Reference


class Characters:
    """A tokenizer whose tokens are characters, behind a first token 0; counts what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, text):
        self.given.append(len(text))
        return type("Encoding", (), {"input_ids": [0, *map(ord, text)]})


def document(name, text):
    return Document(name, name, "CC0-1.0", "test", name, len(text), text)


def test_positions_are_divided_without_a_gap():
    assert bounds(100, 40, 4) == [(60, 70), (70, 80), (80, 90), (90, 100)]
    assert bounds(10, 3, 8) == [(7, 8), (8, 9), (9, 10)]
    for scored, buckets in ((7, 3), (1, 1), (99, 4)):
        parts = bounds(100, scored, buckets)
        assert (parts[0][0], parts[-1][1]) == (100 - scored, 100)
        assert all(a[1] == b[0] for a, b in pairwise(parts))


def test_long_texts_are_not_tokenised_whole():
    tokenizer = Characters()
    ids = first_tokens(tokenizer, "x" * 5000, 20)
    assert ids.shape == (1, 20)
    assert tokenizer.given == [200]


def test_a_text_too_short_for_a_length_is_left_out_there_and_said():
    said = []
    texts = [document("long", "a" * 100), document("short", "b" * 30)]
    found = cases(texts, [64, 16], 8, 2, Characters(), said.append)
    assert [(c.where["text"], c.where["length"]) for c in found] == [
        ("long", 16),
        ("short", 16),
        ("long", 64),
    ]
    assert said == ["text 'short' has fewer than 64 tokens: left out at that length"]


@pytest.fixture
def run():
    torch.manual_seed(0)
    reference = Reference(torch.randint(11, (1, 20)), torch.randn(8, 11), None)
    logits = reference.logits.clone()
    logits[:4] += torch.randn(4, 11)
    outcome = Outcome(logits, Use(0.03, 0.03, 0.07, {}))
    found = scores_in([(12, 16), (16, 20)])(reference, outcome)
    return {"text": "one", "length": 20, "row": "default", "mode": "decode", **found, **vars(outcome.use)}


def test_each_bucket_has_its_own_distance(run):
    first, second = run["buckets"]
    assert first["kl"] > 0.05
    assert (second["kl"], second["delta_nll"], second["top1"]) == (0.0, 0.0, 1.0)
    assert run["kl"] == pytest.approx((first["kl"] + second["kl"]) / 2)
    assert run["nll"] == pytest.approx((first["nll"] + second["nll"]) / 2)


def test_summary_averages_over_texts_with_intervals(run, tmp_path):
    other = {
        **run,
        "text": "two",
        "kl": run["kl"] + 1,
        "buckets": [{**b, "kl": b["kl"] + 1} for b in run["buckets"]],
    }
    (entry,) = summary = summarise([run, other])
    assert entry["documents"] == 2
    assert entry["kl"]["mean"] == pytest.approx(run["kl"] + 0.5)
    assert entry["kl"]["low"] < entry["kl"]["mean"] < entry["kl"]["high"]
    assert entry["buckets"][1]["kl"]["mean"] == pytest.approx(0.5)
    write_csv(tmp_path / "nll.csv", flat(summary))
    rows = list(csv.DictReader((tmp_path / "nll.csv").open()))
    assert [(row["part"], row["first"], row["end"]) for row in rows] == [
        ("all", "12", "20"), ("bucket", "12", "16"), ("bucket", "16", "20")
    ]  # fmt: skip
    assert float(rows[0]["kl"]) == entry["kl"]["mean"]
    assert rows[0]["attended"] == "0.03"
    assert rows[1]["attended"] == ""
