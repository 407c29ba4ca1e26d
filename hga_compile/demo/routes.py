"""The demo's picture: which tokens each query was routed to."""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hga_compile.cli.errors import BadInputError
from hga_compile.cli.output import percent
from hga_compile.demo.density import Route, density, fact_share, pooled
from hga_compile.demo.text import Document, Span

CELLS = 512  # of the large panel, in each direction
CONTRAST = 0.75  # below 1: what few queries read stays visible
AROUND = 16  # tokens shown on each side of the fact
INK, FAINT, FACT_COLOUR = "#23263a", "#8a8fa3", "#d1345b"
UNSEEN, SKIPPED, SINKS, WINDOW = "#ffffff", "#eceef4", "#f2a03d", "#2a9d8f"
ROUTED = ("#eceef4", "#b9c3f2", "#6f7fe0", "#3a3fb0", "#1b1464")


def check_picture(path: Path) -> None:
    """Raise unless a picture can be drawn to a path, before an hour of work is lost to it.

    Raises
    ------
    BadInputError
        If the path is no PNG in a writable folder, or matplotlib is missing.
    """
    if path.suffix.lower() != ".png":
        raise BadInputError(f"the picture must be a .png file, got {str(path)!r} (--out)")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise BadInputError(f"folder {str(path.parent)!r} must exist and be writable (--out)")
    if path.is_dir():
        raise BadInputError(f"the picture must be a file, got the folder {str(path)!r} (--out)")
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInputError("drawing needs matplotlib: pip install 'hga-compile[demo]' (--out)")


def draw_routes(
    path: Path,
    some_layers: Sequence[Route],
    all_layers: Sequence[Route],
    *,
    document: Document,
    tokenizer: Any,
    routing: Any,
    attended: tuple[float, float],
    answer: Sequence[int],
) -> None:
    """Draw the routes of a reading to a PNG.

    Parameters
    ----------
    path
        File; replaced in one step.
    some_layers
        Routes of all queries, of some layers.
    all_layers
        Routes of all layers while the question was read and answered.
    document
        The prompt.
    tokenizer
        Turns tokens into labels.
    routing
        Routing settings of the profile, for sinks and window.
    attended
        Share of the visible tokens that was attended to in prefill and decode, for the title.
    answer
        Decoded tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    prompt, total = len(document.ids), len(document.ids) + max(0, len(answer) - 1)
    figure = Figure(figsize=(15, 8.4), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.2, 1), left=0.055, right=0.962, top=0.885, bottom=0.085,
                               wspace=0.2, hspace=0.42)  # fmt: skip
    whole = figure.add_subplot(grid[:, 0])
    question = figure.add_subplot(grid[0, 1])
    zoom = figure.add_subplot(grid[1, 1])

    shares = fact_share(all_layers, prompt - 1, document.fact.start, document.fact.end)
    drawn = {record.layer for record in some_layers}
    layer = max(drawn, key=lambda number: (shares.get(number, 0.0), -number))
    _whole(whole, [record for record in some_layers if record.layer == layer], total, document.fact, routing)
    whole.set_title(
        f"Layer {layer}: every query of the prompt and the answer", loc="left", color=INK, fontsize=11
    )

    first = document.text.end - 1
    _question(question, all_layers, first, prompt, total, document.fact)
    _zoom(zoom, all_layers, document, tokenizer, prompt, total, answer)

    figure.suptitle(
        f"Which tokens were routed to: {percent(attended[0])} of the visible ones in prefill, "
        f"{percent(attended[1])} in decode",
        x=0.055, ha="left", fontsize=15, fontweight="bold", color=INK,
    )  # fmt: skip
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        figure.savefig(draft, format="png")
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _whole(axes: Any, records: Sequence[Route], total: int, fact: Span, routing: Any) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    cell = max(1, -(-total // CELLS))
    shares = pooled(density(records, first=0, end=total, cell=cell), cell)
    image = _colours()(shares**CONTRAST)[..., :3]
    row, column = np.arange(len(shares))[:, None], np.arange(shares.shape[1])[None]
    last = np.minimum(total, (row + 1) * cell)  # tokens visible to the last query of a row of cells
    window = np.array([routing.window.tokens_for(routing.budget.tokens_for(int(n))) for n in last[:, 0]])[
        :, None
    ]
    image[np.broadcast_to((column + 1) * cell > last - window, image.shape[:2])] = to_rgb(WINDOW)
    if routing.sinks:
        image[np.broadcast_to(column * cell < routing.sinks, image.shape[:2])] = to_rgb(SINKS)
    image[np.broadcast_to(column > row, image.shape[:2])] = to_rgb(UNSEEN)
    extent = (0, shares.shape[1] * cell, len(shares) * cell, 0)
    axes.imshow(image, extent=extent, interpolation="nearest", aspect="auto")
    axes.set_xlim(0, total)
    axes.set_ylim(total, 0)
    axes.axvline((fact.start + fact.end) / 2, color=FACT_COLOUR, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "planted fact", xy=(fact.end, fact.start * 0.5), xytext=(fact.end + total * 0.05, fact.start * 0.42),
        color=FACT_COLOUR, fontsize=10, arrowprops={"arrowstyle": "-", "color": FACT_COLOUR},
    )  # fmt: skip
    keys = [
        Patch(color=ROUTED[3], label="routed to (darker: by more queries and heads)"),
        Patch(color=WINDOW, label="local window"),
        Patch(color=SKIPPED, label="visible, not read"),
    ]
    if routing.sinks:
        keys.insert(1, Patch(color=SINKS, label=f"{routing.sinks} sinks"))
    axes.legend(handles=keys, loc="upper right", frameon=False, fontsize=9.5, labelcolor=INK)
    if 0 < routing.dense_below < total:
        axes.axhline(routing.dense_below, color=FAINT, linewidth=0.8, linestyle=":")
        axes.text(total * 0.99, routing.dense_below, f"dense up to {routing.dense_below:,} visible tokens ",
                  ha="right", va="top", color=FAINT, fontsize=8.5)  # fmt: skip
    axes.set_ylabel("query (token)", color=INK)
    axes.set_xlabel("position of the token that is read", color=INK)
    _plain(axes)


def _question(axes: Any, records: Sequence[Route], first: int, prompt: int, total: int, fact: Span) -> None:
    cell = max(1, -(-total // CELLS))
    shares = density(records, first=first, end=total, cell=cell)
    extent = (0, shares.shape[1] * cell, total, first)
    axes.imshow(_colours()(shares**CONTRAST), extent=extent, interpolation="nearest", aspect="auto")
    axes.set_xlim(0, total)
    axes.axhline(prompt - 0.5, color=INK, linewidth=0.8)
    for label, low, high in (("question", first, prompt), ("answer", prompt, total)):
        axes.text(total * 0.012, (low + high) / 2, label, va="center", color=INK, fontsize=9.5,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2})  # fmt: skip
    for side in (fact.start, fact.end):
        axes.axvline(side, color=FACT_COLOUR, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.annotate("planted fact", xy=(fact.start, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                  textcoords="offset points", ha="center", color=FACT_COLOUR, fontsize=9)  # fmt: skip
    axes.set_title(
        "Question and answer: share of all layers and KV heads\n", loc="left", color=INK, fontsize=11
    )
    axes.set_ylabel("query (token)", color=INK)
    axes.set_xlabel("position of the token that is read", color=INK)
    _plain(axes)


def _zoom(
    axes: Any, records: Sequence[Route], document: Document, tokenizer: Any, prompt: int, total: int,
    answer: Sequence[int],
) -> None:  # fmt: skip
    fact = document.fact
    left, right = max(0, fact.start - AROUND), min(prompt, fact.end + AROUND)
    written = min(len(answer) - 1, 20, _end(tokenizer, answer))
    shares = density(records, first=prompt - 1, end=prompt + written, cell=1)[:, left:right]
    shown = axes.imshow(
        shares, cmap=_colours(), vmin=0, vmax=max(0.05, shares.max()), interpolation="nearest", aspect="auto"
    )
    axes.set_xticks(range(right - left), [_label(tokenizer, token) for token in document.ids[left:right]],
                    rotation=90, fontsize=7.5)  # fmt: skip
    nexts = [_label(tokenizer, token) for token in answer[: written + 1]]
    axes.set_yticks(range(len(nexts)), nexts, fontsize=8, color=INK)
    axes.set_ylabel("next token written", color=INK)
    axes.set_title("Around the planted fact, while the answer is written", loc="left", color=INK, fontsize=11)
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.035, pad=0.015)
    bar.set_label("share of layers and KV heads", color=INK, fontsize=8.5, labelpad=4)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, labelcolor=INK, length=0)
    _plain(axes)
    for position, tick in enumerate(axes.get_xticklabels(), left):
        tick.set_color(FACT_COLOUR if fact.start <= position < fact.end else FAINT)


def _end(tokenizer: Any, answer: Sequence[int]) -> int:
    """Count the tokens before the first that ends the text."""
    special = set(tokenizer.all_special_ids)
    return next((index for index, token in enumerate(answer) if token in special), len(answer))


def _label(tokenizer: Any, token: int) -> str:
    text: str = tokenizer.decode([token]).strip(" ") or "\u2423"
    if not (text.isprintable() and max(text) < "\u2500"):  # what the font has no sign for
        text = text.encode("unicode_escape").decode("ascii")
    return text.replace("$", r"\$")  # a dollar would start a formula


def _colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("routed", ROUTED)


def _plain(axes: Any) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
