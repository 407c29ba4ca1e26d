import random

import pytest
import torch

from hga_compile.evaluation.candidates import Outcome, Use
from hga_compile.evaluation.needles import Haystack, HaystackError, Plan, build, flat, plans, summarise
from hga_compile.evaluation.reference import Reference
from hga_compile.evaluation.tasks import TASKS

TEXT = "\n\n".join(f"Paragraph {number} tells of nothing much and ends." for number in range(80))


class Characters:
    """A tokenizer whose tokens are characters."""

    chat_template = None
    bos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [ord(character) for character in text]})


class Opening(Characters):
    """One that opens every text with token 1."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(character) for character in text]
        return type("Encoding", (), {"input_ids": [1, *ids] if add_special_tokens else ids})


@pytest.fixture(scope="module")
def haystack():
    return Haystack.of(TEXT, Characters())


def text_of(case):
    return "".join(map(chr, case.ids[0].tolist()))


def test_plans_are_every_cell_short_lengths_first():
    found = plans([("single", 1), ("multi-key", 4)], [512, 256], [0.0, 1.0], 2)
    assert len(found) == 2 * 2 * 2 * 2
    assert [plan.length for plan in found] == [256] * 8 + [512] * 8


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_case_has_its_length_its_facts_and_its_answer(haystack, task, depth):
    case = build(Plan(task, 1 if task == "single" else 3, 2000, depth, 0), haystack, Characters())
    assert case.ids.shape == (1, 2000)
    text = text_of(case)
    body, closing = text[: -case.scored], text[-case.scored :]
    assert closing.startswith("\n\nQuestion: ")
    answers = closing.rpartition(
        " are:" if task == "variables" else " is" if "key" in task or task == "single" else " are"
    )[2]
    for answer in answers.split(","):
        assert body.count(answer.strip()) >= 1
    assert body.count("One of the special magic numbers" if task != "variables" else "VAR ") >= (
        1 if task == "single" else 3
    )


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_fact_lies_at_its_depth(haystack, depth):
    text = text_of(build(Plan("single", 1, 3000, depth, 0), haystack, Characters()))
    start, end = text.index("them.") + 7, text.rindex("\n\nQuestion")
    place = text.index("One of the special")
    assert abs((place - start) / (end - start) - depth) < 0.05
    assert text[place - 2 : place] == "\n\n" or depth == 1.0


def test_columns_of_a_map_differ_in_the_place_alone(haystack):
    cases = [build(Plan("multi-key", 3, 2000, depth, 0), haystack, Characters()) for depth in (0.0, 1.0)]
    first, last = map(text_of, cases)
    assert sorted(first) == sorted(last)
    assert first[-cases[0].scored :] == last[-cases[1].scored :]
    again = build(Plan("multi-key", 3, 2000, 0.0, 0), haystack, Characters())
    assert torch.equal(again.ids, cases[0].ids)
    assert text_of(build(Plan("multi-key", 3, 2000, 0.0, 1), haystack, Characters())) != first


def test_values_and_variables_are_asked_for_in_the_order_of_the_text(haystack):
    for task in ("multi-value", "variables"):
        draw = random.Random(1)
        made = TASKS[task](draw, 0.3, 4)
        depths = [needle.depth for needle in made.needles]
        assert depths == sorted(depths)
        assert depths[0] == 0.3
        text = text_of(build(Plan(task, 4, 3000, 1.0, 0), haystack, Characters()))
        answers = [
            part.strip() for part in text.rpartition(" are:" if task == "variables" else " are")[2].split(",")
        ]
        places = [text.index(f"VAR {a} =" if task == "variables" else a) for a in answers]
        assert places == sorted(places)


def test_a_base_model_reads_its_opening_token(haystack):
    case = build(Plan("single", 1, 2000, 0.5, 0), haystack, Opening())
    assert case.ids[0, 0] == 1
    assert (case.ids == 1).sum() == 1
    assert case.ids.shape == (1, 2000)


def test_lengths_without_room_and_short_texts_are_refused(haystack):
    with pytest.raises(HaystackError, match=r"must have room .* got 300 tokens; try 1024 \(--lengths\)"):
        build(Plan("single", 1, 300, 0.5, 0), haystack, Characters())
    with pytest.raises(HaystackError, match=r"give a longer one \(--text\)"):
        build(Plan("single", 1, 100_000, 0.5, 0), haystack, Characters())


def run_of(case, wrong=()):
    """Score a run whose likeliest tokens are right but at places `wrong` of the scored ones."""
    targets = case.ids[0, -case.scored :]
    logits = torch.nn.functional.one_hot(targets, 256).float() * 20
    for place in wrong:
        logits[place] = torch.randn(256)
        logits[place, targets[place]] = -20
    reference = Reference(case.ids, torch.nn.functional.one_hot(targets, 256).float() * 20, None)
    return case.scores(reference, Outcome(logits, Use(0.03, 0.03, 0.07, {})))


def test_exact_is_every_token_of_the_answer_and_no_other(haystack):
    case = build(Plan("multi-value", 2, 2000, 0.5, 0), haystack, Characters())
    right, question, last = run_of(case), run_of(case, [0, 1]), run_of(case, [-1])
    assert (right["exact"], right["found"]) == (1.0, 1.0)
    assert (question["exact"], question["kl"]) == (1.0, 0.0)
    assert (last["exact"], last["found"]) == (0.0, 0.5)
    assert last["nll"] > right["nll"]
    assert last["delta_nll"] > 0.5


def test_summary_has_each_depth_and_all_of_them(haystack):
    runs = []
    for depth, wrong in ((0.0, []), (1.0, [-1])):
        case = build(Plan("single", 1, 2000, depth, 0), haystack, Characters())
        shares = {"attended": 0.03, "kv_bytes": 0.03, "summary_bytes": 0.07}
        runs.append({**case.where, "row": "default", "mode": "decode", **run_of(case, wrong), **shares})
    summary = summarise(runs)
    exact = {entry["depth"]: (entry["exact"]["mean"], entry["trials"]) for entry in summary}
    assert exact == {0.0: (1.0, 1), 1.0: (0.0, 1), None: (0.5, 2)}
    assert {row["depth"] for row in flat(summary)} == {0.0, 1.0, "all"}
