"""The demo: one document, one model, read twice: with dense attention and with HGA."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hga_compile.cli.checkpoint import load_model, load_tokenizer
from hga_compile.cli.engine import Dense, Engine, Routed
from hga_compile.cli.errors import BadInputError
from hga_compile.cli.output import progress, status
from hga_compile.demo.compare import Comparison
from hga_compile.demo.measure import ANSWER_TOKENS, Parts, Reader, Score, cut
from hga_compile.demo.recording import Recording
from hga_compile.demo.result import Result, Settings, Side
from hga_compile.demo.text import Document, build_document

SCORED = 1024  # tokens at the end of the text whose predictions are compared
Say = Callable[[str], None]


def run_demo(settings: Settings, say: Say = lambda _: None) -> Result:
    """Read the document with dense attention and with HGA, and compare.

    Parameters
    ----------
    settings
        What to run.
    say
        Told what takes time.

    Raises
    ------
    BadInputError
        If the context does not fit the model or the text.
    """
    start = time.perf_counter()
    with status("loading the model"):
        tokenizer = load_tokenizer(settings.checkpoint)
        model = load_model(settings.checkpoint, settings.device, settings.dtype)
    _check_length(model, settings.tokens)
    document = build_document(tokenizer, tokens=settings.tokens - ANSWER_TOKENS, depth=settings.depth)
    scored = min(SCORED, (document.text.end - document.text.start) // 4)
    parts = cut(document, scored, settings.device)
    comparison = Comparison()

    say("dense: reading the text")
    dense = _side(Dense(model), tokenizer, parts, comparison.keep, Recording(None, 0))

    engine = Routed(model, settings.profile, inner=settings.inner)
    say("hga: compiling")
    compiling = time.perf_counter()
    with status("compiling"):
        Reader(engine, tokenizer).warm_up(parts)
    compiling = time.perf_counter() - compiling
    engine.reset()
    say("hga: reading the text")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    recording = Recording(settings.picture, layers)
    hga = _side(engine, tokenizer, parts, comparison.compare, recording)
    _draw(settings.picture, recording, document, tokenizer, settings.profile.routing, hga)
    return Result(
        settings=settings,
        document=document,
        scored=scored,
        dense=dense,
        hga=hga,
        divergence=comparison.divergence,
        agreement=comparison.agreement,
        compile_seconds=compiling,
        sites=engine.sites(),
        seconds=time.perf_counter() - start,
    )


def _side(engine: Engine, tokenizer: Any, parts: Parts, score: Score, recording: Recording) -> Side:
    reader = Reader(engine, tokenizer)
    total = sum(part.shape[1] for part in (parts.body, parts.scored, parts.question))
    with progress(engine.name, total) as advance, recording.of_prompt():
        reading = reader.read(parts, score=score, advance=advance, around_question=recording.of_question)
    # Dense attention is not counted step by step: it reads the whole cache for every token.
    steps = 1 if engine.name == "dense" else max(1, len(reading.decode.steps))
    side = Side(
        reading=reading,
        memory=engine.memory(reading.cache),
        prefill_reads=engine.reads("prefill"),
        decode_reads=engine.reads("decode"),
        read_per_token=engine.bytes_read("decode") / steps,
    )
    reading.cache = None  # one side's K/V must not count as the other's memory
    return side


def _draw(
    picture: Path | None,
    recording: Recording,
    document: Document,
    tokenizer: Any,
    routing: Any,
    hga: Side,
) -> None:
    if picture is None:
        return
    from hga_compile.demo.routes import draw_routes

    draw_routes(
        picture,
        recording.some_layers,
        recording.all_layers,
        document=document,
        tokenizer=tokenizer,
        routing=routing,
        attended=(hga.prefill_reads["attended"] or 0.0, hga.decode_reads["attended"] or 0.0),
        answer=hga.reading.tokens,
    )


def _check_length(model: Any, tokens: int) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most and tokens > most:
        raise BadInputError(
            f"the context must be at most {most:,} tokens for this model, got {tokens:,} (--tokens)"
        )
