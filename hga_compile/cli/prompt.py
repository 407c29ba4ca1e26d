"""Text in and out of ``hga run``: prompt files, chat templates, streamed tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga_compile.cli.errors import BadInputError

if TYPE_CHECKING:
    import torch


def read_prompt(name: str) -> str:
    """Text of a prompt file, ``-`` for stdin.

    Raises
    ------
    BadInputError
        If it cannot be read, is not UTF-8 or holds nothing but blanks.
    """
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).expanduser().read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise BadInputError(
            f"prompt file {name!r} cannot be read: {error.strerror} (--prompt-file)"
        ) from None
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"prompt file {name!r} must be UTF-8 text, got byte 0x{raw[error.start]:02x} at offset "
            f"{error.start} (--prompt-file)"
        ) from None
    if not text.strip():
        raise BadInputError(f"prompt file {name!r} is empty, expected text (--prompt-file)")
    return text


def encode(tokenizer: Any, prompt: str, chat: bool | None) -> torch.Tensor:
    """Token ids of a prompt, ``[1, tokens]``; `chat` None means: if there is a chat template."""
    import torch

    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise BadInputError("the model's tokenizer has no chat template; use --no-chat")
    if template and chat is not False:
        messages = [{"role": "user", "content": prompt.strip()}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    return torch.tensor([tokenizer(prompt).input_ids])


class Stream:
    """Writes tokens to stdout as text, whole characters only."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers import TextStreamer

        class Stdout(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                sys.stdout.write(text + ("\n" if stream_end else ""))
                sys.stdout.flush()

        self._streamer = Stdout(tokenizer, skip_special_tokens=True)

    def put(self, token: int) -> None:
        """Write the text that a token completes."""
        import torch

        self._streamer.put(torch.tensor([token]))

    def end(self) -> None:
        """Write what is left, and a line break."""
        self._streamer.end()
