from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hga_compile.cli.errors import BadInputError
from hga_compile.demo.text import FACT, QUESTION, TASK, build_document, paragraphs


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def test_the_bundled_text_is_whole_and_plain() -> None:
    found = paragraphs()
    assert found[0] == "Chapter 1"
    assert found[1].startswith(
        "Sir Walter Elliot, of Kellynch Hall, in Somersetshire, was a man who, for his own"
    )
    assert 60_000 < sum(len(paragraph) + 2 for paragraph in found) < 75_000
    assert not any("\n" in paragraph or "  " in paragraph for paragraph in found)
    assert not any("passcode" in paragraph or "7421" in paragraph for paragraph in found)


@pytest.mark.parametrize("tokens", [700, 4000])
@pytest.mark.parametrize("depth", [0.0, 0.35, 1.0])
def test_a_document_has_the_length_and_the_fact_where_it_says(
    tokenizer: Any, tokens: int, depth: float
) -> None:
    document = build_document(tokenizer, tokens=tokens, depth=depth)
    assert len(document.ids) == tokens
    assert tokenizer.decode(document.ids[document.fact.start : document.fact.end]) == FACT + "\n\n"
    assert document.text.start <= document.fact.start < document.fact.end <= document.text.end
    share = (document.fact.start - document.text.start) / (document.text.end - document.text.start)
    assert share == pytest.approx(depth, abs=0.5 if tokens == 700 else 0.1)


def test_task_and_question_frame_the_text_in_the_chat_template(tokenizer: Any) -> None:
    document = build_document(tokenizer, tokens=700, depth=1.0)
    text = tokenizer.decode(document.ids)
    assert text.startswith(f"<s>{TASK}\n\nChapter 1\n\nSir Walter")
    assert text.endswith(f"{FACT}\n\n\n\n{QUESTION}</s><s>")


def test_without_a_chat_template_question_and_answer_are_named(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    text = tokenizer.decode(build_document(tokenizer, tokens=700, depth=0.5).ids)
    assert text.startswith(f"{TASK}\n\n")
    assert text.endswith(f"\n\nQuestion: {QUESTION}\nAnswer:")


@pytest.mark.parametrize("tokens", [100, 200_000])
def test_contexts_that_do_not_fit_are_refused(tokenizer: Any, tokens: int) -> None:
    with pytest.raises(BadInputError, match="--tokens"):
        build_document(tokenizer, tokens=tokens, depth=0.5)
