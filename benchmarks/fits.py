"""The table "How much context fits on my GPU", computed by the memory model of `hga plan`.

python benchmarks/fits.py                      # print it
python benchmarks/fits.py --update README.md   # between <!-- fits --> and <!-- /fits -->
python benchmarks/fits.py --check README.md    # exit 1 if --update would change it
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from table import markdown

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.catalogue import gpu_cards, model_cards
from hga_compile.configs.loader import load_profile
from hga_compile.tuning.fit import longest_context, with_tier
from hga_compile.tuning.memory import Place

MODELS = (
    "llama3.2-1b",
    "qwen3-4b",
    "llama3.1-8b",
    "qwen3-8b",
    "phi-4",
    "gpt-oss-20b",
    "gemma3-27b",
    "qwen3-30b",
)
GPUS = ("rtx3090", "rtx4090", "rtx5090", "l40s", "a100", "rtx-pro-6000", "h200")
MARKER = re.compile(r"(<!-- fits -->\n)(.*?)(<!-- /fits -->)", re.DOTALL)


def short(tokens: int) -> str:
    """Write a number of tokens as 96K or 1.2M; a dash for none."""
    if tokens == 0:
        return "-"
    return f"{tokens / 2**20:.1f}M" if tokens >= 2**20 else f"{tokens // 1024}K"


def fits(card: ModelCard, gpu: GpuCard, tier: Place) -> int:
    """Return the longest context that fits with the default profile, its K/V in a tier."""
    return longest_context(card, gpu, with_tier(load_profile("default"), tier))


def render() -> str:
    """Return the table: a row a model, a column a GPU, K/V in GPU memory and in host RAM."""
    cards, gpus = model_cards(), [gpu_cards()[name] for name in GPUS]
    rows = []
    for name in MODELS:
        card = cards[name]
        cells = [f"{short(fits(card, gpu, 'gpu'))} / **{short(fits(card, gpu, 'host'))}**" for gpu in gpus]
        made_for = short(card.context.max_tokens)
        rows.append((name, f"{card.weight_bytes() / 2**30:.1f} GiB", made_for, *cells))
    headings = ("model", "weights", "made for", *(_heading(gpu) for gpu in gpus))
    note = (
        "Longest context in tokens with the K/V in GPU memory / **in host RAM** (the default), one sequence, "
        "default profile, prefill in steps of 1,024; a dash: the weights alone do not fit. GPU memory + RAM "
        "for K/V, which is assumed, are in the headings. Computed by `hga plan`, not measured; a model that "
        "is given more than it was made for does not get good at it by that."
    )
    return f"{markdown(headings, rows)}\n\n{note}\n"


def _heading(gpu: GpuCard) -> str:
    sizes = (gpu.memory.value / 2**30, gpu.host_memory.value * 3 / 4 / 2**30)
    return f"{gpu.name}: {sizes[0]:.0f} + {sizes[1]:.0f} GiB"


def update(text: str) -> str:
    """Return a document with its marked table rendered anew.

    Raises
    ------
    ValueError
        A document without the marks.
    """
    if not MARKER.search(text):
        raise ValueError("no table to update: <!-- fits --> and <!-- /fits --> wanted")
    return MARKER.sub(lambda match: f"{match[1]}{render()}{match[3]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", type=Path, metavar="DOCUMENT")
    parser.add_argument("--check", type=Path, metavar="DOCUMENT")
    options = parser.parse_args(arguments)
    try:
        if options.update:
            options.update.write_text(update(options.update.read_text("utf-8")), "utf-8")
        if options.check:
            text = options.check.read_text("utf-8")
            if update(text) != text:
                print(f"{options.check.name} is out of date: fits.py --update it", file=sys.stderr)
                return 1
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    if not (options.update or options.check):
        print(render(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
