"""The demo's document: a novel with a fact planted in it, and a question about the fact."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

from hga_compile.cli.errors import BadInputError

FACT = "The secret passcode of the library is 7421."
ANSWER = "7421"
QUESTION = "What number is the secret passcode of the library?"
TASK = "Read the text and answer the question at its end."

_MARK = "<<document>>"


@dataclass(frozen=True)
class Span:
    """Tokens ``start <= token < end``."""

    start: int
    end: int


@dataclass(frozen=True)
class Document:
    """A prompt: task, text with the planted fact, question."""

    ids: tuple[int, ...]
    """All tokens, up to where the answer begins."""
    text: Span
    """The novel with the fact in it."""
    fact: Span
    """The planted sentence."""


def paragraphs() -> list[str]:
    """Paragraphs of the bundled text, each on one line."""
    raw = resources.files("hga_compile.demo").joinpath("persuasion.txt").read_text(encoding="utf-8")
    return [" ".join(block.split()) for block in raw.split("\n\n") if block.strip()]


def build_document(tokenizer: Any, *, tokens: int, depth: float, fact: str = FACT) -> Document:
    """Fill a context with the novel, plant a fact between paragraphs, and end with the question.

    Parameters
    ----------
    tokenizer
        Of transformers; its chat template is used if it has one.
    tokens
        Length of the whole document in tokens, exactly.
    depth
        Where the fact is planted: 0 before the text, 1 behind it.
    fact
        The planted sentence.

    Returns
    -------
    Document

    Raises
    ------
    BadInputError
        If the bundled text is too short or the context has no room for text.
    """

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    opening, closing = (encode(part) for part in frame(tokenizer, TASK, QUESTION))
    planted = encode(fact + "\n\n")
    room = tokens - len(opening) - len(closing) - len(planted)
    if room < len(planted):
        raise BadInputError(
            f"the context must have room for a text, got {tokens} tokens; try 8192 (--tokens)"
        )
    body: list[int] = []
    boundaries = [0]
    for paragraph in paragraphs():
        body += encode(paragraph + "\n\n")[: room - len(body)]
        boundaries.append(len(body))
        if len(body) == room:
            break
    if len(body) < room:
        most = tokens - room + len(body)
        raise BadInputError(f"the bundled text fills {most:,} tokens, got {tokens:,} (--tokens)")
    place = min(boundaries, key=lambda boundary: abs(boundary - depth * room))
    start = len(opening) + place
    return Document(
        ids=(*opening, *body[:place], *planted, *body[place:], *closing),
        text=Span(len(opening), tokens - len(closing)),
        fact=Span(start, start + len(planted)),
    )


def frame(tokenizer: Any, task: str, question: str) -> tuple[str, str]:
    """Text before and behind a document, with the chat template if the tokenizer has one."""
    before, behind = f"{task}\n\n", f"\n\n{question}"
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": before + _MARK + behind}]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        opening, _, closing = text.partition(_MARK)
        return opening, closing
    return before, f"\n\nQuestion: {question}\nAnswer:"
