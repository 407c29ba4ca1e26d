"""Which routes the demo records for its picture."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any


class Recording:
    """Routes of some layers over the whole prompt, and of all layers while the question is answered.

    All layers of all queries would take gigabytes.

    Parameters
    ----------
    picture
        Where the picture goes; None records nothing.
    layers
        Layers of the model.
    """

    def __init__(self, picture: Path | None, layers: int) -> None:
        self.picture = picture
        self.layers = layers
        self.some_layers: list[Any] = []
        self.all_layers: list[Any] = []

    def of_prompt(self) -> AbstractContextManager[object]:
        """Record four layers, spread over the depth, for as long as the context is open."""
        if self.picture is None:
            return nullcontext()
        import hga_compile

        stack = ExitStack()
        chosen = sorted({self.layers * eighth // 8 for eighth in (1, 3, 5, 7)})
        self.some_layers = stack.enter_context(hga_compile.record_routes(chosen))
        return stack

    def of_question(self) -> AbstractContextManager[object]:
        """Record every layer for as long as the context is open."""
        if self.picture is None:
            return nullcontext()
        import hga_compile

        stack = ExitStack()
        self.all_layers = stack.enter_context(hga_compile.record_routes())
        return stack
