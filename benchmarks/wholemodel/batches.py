"""Several requests at once: each prompt is read by itself, then all of them are decoded in one batch.

A system is asked to `begin` a request and to `prefill` its prompt, for each of them, to `join` them, and then
to `decode`. Shorter requests have padding ahead of them, so that all go on at the same place. The last token
of a prompt is what the first decode step reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from wholemodel.attention import static_cache
from wholemodel.systems import Dense, Entry, Hga, Setup

__all__ = ["BATCHES", "UNIT", "Batch", "BatchSetup", "DenseBatch", "HgaBatch", "lengths_of"]

# Whole groups, chunks and blocks of centres: hga cuts each request in the batch as it does by itself.
UNIT = 128


def lengths_of(context: int, requests: int, shortest: float) -> tuple[int, ...]:
    """Return the tokens of each prompt, longest first, from the context down to about a share of it.

    Differences from the longest are multiples of `UNIT`.
    """
    gap = context * (1 - shortest) / max(1, requests - 1)
    return tuple(context - int(gap * number) // UNIT * UNIT for number in range(requests))


@dataclass(frozen=True)
class BatchSetup(Setup):
    """What a system is given besides the model; the context is that of the longest prompt."""

    lengths: tuple[int, ...] = ()
    """Tokens of each prompt."""

    @property
    def padding(self) -> tuple[int, ...]:
        """Tokens of padding ahead of each request; empty where there is none."""
        found = tuple(self.context - length for length in self.lengths)
        return found if any(found) else ()


class HgaBatch(Hga):
    """The model compiled by this package; an `HGACache` for each request, joined to decode them."""

    setup: BatchSetup

    def __init__(self, model: PreTrainedModel, setup: BatchSetup) -> None:
        super().__init__(model, setup)
        self._sources: list[Any] = []
        ahead = setup.padding or (0,) * len(setup.lengths)
        self._ahead = torch.tensor(ahead, device=model.device)[:, None]
        self._mask: Tensor | None = None

    def begin(self, number: int) -> None:
        """Have `prefill` read another request, into a cache of its own."""
        self.cache = self.new_cache()
        self._sources.append(self.cache)

    def join(self) -> None:
        """Make one cache of all; those of single requests are given up at once."""
        from hga_compile import HGACache

        self.cache = HGACache.join(self._sources)
        self._give_up()
        if self.setup.padding:
            # Made once, in transformers' type: its first columns are `attention_mask(new=1)` of a step.
            self._mask = self.cache.attention_mask(new=self.setup.new).bool().to(self.model.device)

    def decode(self, token: Tensor) -> Tensor:
        """Read a token a request, ``[requests, 1]``; return the likeliest next ones."""
        length = self.cache.get_seq_length()
        given = {"input_ids": token, "position_ids": length - self._ahead}
        if self._mask is not None:
            # Strides of its own, not those of the whole: they would be another graph at every step.
            own = self._mask[:, : length + 1].clone(memory_format=torch.contiguous_format)
            given["attention_mask"] = own
        else:
            # Such steps are recorded as one CUDA graph, if the batch is a number: a graph for each, then.
            for part in given.values():
                torch._dynamo.mark_static(part, 0)
        found = self._call(past_key_values=self.cache, use_cache=True, **given)
        return found.logits[:, -1:].argmax(-1)

    def split(self) -> list[int]:
        """Make a cache of each request again, and give it up; return their lengths."""
        self._sources = self.cache.split()
        lengths = [part.get_seq_length() for part in self._sources]
        self._give_up()
        return lengths

    def close(self) -> None:
        """Give all caches up."""
        self._give_up()
        super().close()

    def _give_up(self) -> None:
        for cache in self._sources:
            cache.reset()
        self._sources = []


class DenseBatch(Dense):
    """A static cache of the whole batch; a prompt is read into its row, where its padding ends.

    There is nothing to be joined, no padding is computed, and none is attended to.
    """

    setup: BatchSetup

    def __init__(self, model: PreTrainedModel, setup: BatchSetup) -> None:
        super().__init__(model, setup)
        self._whole = self.cache
        self._at = torch.tensor(setup.lengths, device=model.device)[:, None] - 1

    def new_cache(self) -> Any:
        """Return a `StaticCache` with its buffers: what does not fit is found out before it is read."""
        cache, model = super().new_cache(), self.model
        shape = (len(self.setup.lengths), model.config.num_key_value_heads, 0, model.config.head_dim)
        for layer in cache.layers:
            empty = torch.empty(shape, dtype=model.dtype, device=model.device)
            layer.lazy_initialization(empty, empty)
        return cache

    def begin(self, number: int) -> None:
        """Have `prefill` read another request, into its row."""
        length, context = self.setup.lengths[number], self.setup.context
        self.cache = StaticCache(config=self.model.config, max_cache_len=length)
        own = (slice(number, number + 1), slice(None), slice(context - length, context))
        for layer, whole in zip(self.cache.layers, self._whole.layers, strict=True):
            layer.lazy_initialization(whole.keys[own][:, :, :0], whole.values[own][:, :, :0])
            layer.keys, layer.values = whole.keys[own], whole.values[own]

    def join(self) -> None:
        """Have the next token of each request go to the same place."""
        self.cache = self._whole
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.setup.context - 1)

    def decode(self, token: Tensor) -> Tensor:
        """Read a token a request, ``[requests, 1]``; return the likeliest next ones."""
        at, self._at = self._at, self._at + 1
        with static_cache(None, self.setup.padding):
            found = self._decode(input_ids=token, position_ids=at, past_key_values=self.cache, use_cache=True)
            # A graph's output is overwritten by its next replay.
            return found.logits[:, -1:].argmax(-1).clone()

    def close(self) -> None:
        """Give the buffers up."""
        self._whole = None
        super().close()


Batch = HgaBatch | DenseBatch

BATCHES: dict[str, Entry] = {
    "hga": Entry("hga, K/V in host RAM", HgaBatch, routed=True),
    "dense": Entry("dense, static cache, CUDA graph", DenseBatch),
}
"""By name, in the order in which they run."""
