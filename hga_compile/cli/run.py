"""``hga run``: stream the continuation of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hga_compile.cli import checkpoint, options
from hga_compile.cli.engine import Dense, Engine, Routed
from hga_compile.cli.errors import BadInputError, guarded
from hga_compile.cli.output import note, print_json, progress, quiet_bars, quiet_libraries, status
from hga_compile.cli.planned import Wanted, plan_run
from hga_compile.cli.prompt import Stream, encode, read_prompt
from hga_compile.cli.usage import summary

if TYPE_CHECKING:
    import torch


@guarded
def run(
    model: options.Model,
    prompt_file: Annotated[
        str, typer.Option("--prompt-file", metavar="FILE", help="Text file with the prompt; - is stdin.")
    ],
    profile: options.ProfileName = None,
    dense: Annotated[bool, typer.Option("--dense", help="Run the model uncompiled and dense.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat", help="Use the chat template, or not.", show_default="if the model has one"
        ),
    ] = None,
    prefill_step: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens a forward pass.", show_default="by hga plan")
    ] = None,
    device: options.Device = "auto",
    dtype: options.DTypeChoice = options.DType.auto,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Continue a prompt and stream the text to stdout.

    Where the K/V go, a hot cache, the prefill step, and on a GPU that is too small the layers whose weights
    stay in host RAM: what neither the command nor the profile says is picked so that it fits by `hga plan`.

    A summary with speed, attended tokens and the places of the K/V follows on stderr.
    """
    quiet_bars()
    prompt = read_prompt(prompt_file)
    if dense and profile is not None:
        raise BadInputError("--dense uses no profile, got --profile as well; leave one of them out")
    chosen = None if dense else options.pick_profile(profile)
    place = options.pick_device(device)
    files = checkpoint.find_checkpoint(model, say=note)
    if not debug:
        quiet_libraries()
    kind = options.pick_dtype(dtype, place)
    with status("loading the model"):
        tokenizer = checkpoint.load_tokenizer(files)
        ids = encode(tokenizer, prompt, chat).to(place)
        given = Wanted(chosen, ids.shape[1] + max_new_tokens, prefill_step)
        planned = plan_run(checkpoint.load_config(files), place, kind, given)
        loaded = checkpoint.load_model(files, place, kind, planned.max_memory)
    for line in planned.notes:
        note(line)
    _note_length(loaded, ids.shape[1] + max_new_tokens)
    engine: Engine = Dense(loaded) if planned.profile is None else Routed(loaded, planned.profile)
    stream = None if as_json else Stream(tokenizer)
    result = {
        **generate(engine, tokenizer, ids, limit=max_new_tokens, step=planned.step, stream=stream),
        "device": str(place),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "profile": None if chosen is None else chosen.name,
        "plan": planned.to_dict(),
    }
    if as_json:
        print_json(result)
        return
    for line in summary(result):
        note(line)


def generate(
    engine: Engine, tokenizer: Any, ids: torch.Tensor, *, limit: int, step: int, stream: Stream | None
) -> dict[str, Any]:
    """Continue a prompt greedily and say what it took.

    Parameters
    ----------
    engine
        The model.
    tokenizer
        Its tokenizer.
    ids
        Prompt, ``[1, tokens]`` int64.
    limit
        Tokens to generate, at most.
    step
        Prompt tokens a forward pass.
    stream
        Gets every token as it comes; None for silence.

    Returns
    -------
    dict
        Text, counts, speed, shares read, bytes held, decided sites: plain data.
    """
    import torch

    from hga_compile.cli.decode import Forward, Pace, greedy, prefill, stop_tokens

    forward = Forward(engine.call, engine.model)
    cache, rest = engine.start(ids, limit)
    reading, writing = Pace(str(ids.device)), Pace(str(ids.device))
    tokens: list[int] = []
    with torch.no_grad():
        with progress("prefill", rest.shape[1]) as advance:
            logits = prefill(forward, rest, cache, step=step, pace=reading, advance=advance)
        stop = stop_tokens(engine.model, tokenizer)
        for token in greedy(forward, logits, cache, limit=limit, stop=stop, pace=writing):
            tokens.append(token)
            if stream is not None:
                stream.put(token)
    if stream is not None:
        stream.end()
    return {
        "text": tokenizer.decode(tokens, skip_special_tokens=True),
        "stopped": "length" if len(tokens) == limit else "end of text",
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(tokens),
        "attention": engine.name,
        "prefill": {**reading.to_dict(), **engine.reads("prefill")},
        "decode": {**writing.to_dict(), **engine.reads("decode")},
        "memory": engine.memory(cache),
        "sites": engine.sites(),
    }


def _note_length(model: Any, tokens: int) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most and tokens > most:
        note(f"note: prompt and new tokens make {tokens:,}, the model was made for {most:,}")
