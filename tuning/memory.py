"""Where the memory of a model under a profile goes: computed as the store and the index allocate it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from hga_compile.configs.cards import GpuCard, ModelCard
from hga_compile.configs.profile import Profile
from hga_compile.kernels.staging import staged_bytes
from hga_compile.tuning.sizes import arrivals, file_sizes, hot_bytes, index_bytes, page_bytes, stored_bytes

__all__ = ["MemoryPlan", "Part", "Place", "layer_bytes", "plan_memory"]

Place = Literal["gpu", "host", "nvme"]


@dataclass(frozen=True)
class Part:
    """One use of memory."""

    name: str
    place: Place
    bytes: int
    how: str
    """Where the number comes from, for a reader."""


@dataclass(frozen=True)
class MemoryPlan:
    """What goes where, and whether it fits."""

    parts: tuple[Part, ...]
    room: dict[Place, int]
    """Bytes that may be used, by place."""
    tier: Place
    context: int
    max_memory: dict[int | str, int] | None = None
    """What `from_pretrained(device_map="auto")` is given so that it places the weights like this; None: all
    are on the GPU."""

    def used(self, place: Place) -> int:
        """Return the bytes used in a place."""
        return sum(part.bytes for part in self.parts if part.place == place)

    def lacks(self, place: Place) -> int:
        """Return the bytes missing in a place; 0 or less: it fits, with so many to spare."""
        return self.used(place) - self.room[place]

    @property
    def fits(self) -> bool:
        """Whether everything fits where it should go."""
        return all(self.lacks(place) <= 0 for place in self.room)

    @property
    def binding(self) -> Place:
        """The place that is fullest, as a share of its room."""
        return max(self.room, key=lambda place: self.used(place) / max(1, self.room[place]))


def plan_memory(
    card: ModelCard,
    gpu: GpuCard,
    profile: Profile,
    context: int,
    *,
    batch: int = 1,
    step: int = 1024,
    weight_bytes: int | None = None,
    ram_layers: int = 0,
) -> MemoryPlan:
    """Plan the memory of one model, profile and context.

    Parameters
    ----------
    card, gpu, profile
        What runs, where, and how.
    context : int
        Tokens of each sequence.
    batch : int
        Sequences.
    step : int
        Prompt tokens of a forward pass.
    weight_bytes : int or None
        Of the checkpoint as it is loaded; None: as the catalogue says.
    ram_layers : int
        Decoder layers whose weights lie in host RAM, from which accelerate brings them to the GPU in every
        pass, one after the other.
    """
    shape, routing, offload = card.geometry, profile.routing, profile.offload
    place, item = _home(profile, gpu), 2 if gpu.kind == "cuda" else 4
    rows, row = batch * shape.kv_heads, 2 * shape.head_dim * item
    stored = stored_bytes(offload, row, shape.head_dim)
    step = min(step, context)
    parts = _weights(card, gpu, weight_bytes, ram_layers)
    pages = index = dense = hot = tails = 0
    slots: dict[int, int] = {}
    tokens, reserved = _arrivals(context, step), offload.reserve_tokens or 0
    for layer in _full_layers(card):
        own = routing.for_layer(layer, shape.layers)
        if routing.is_dense(layer, shape.layers):
            dense += context * rows * row
            continue
        if place == "nvme":
            filed = _file_sizes(tokens, rows, stored, own.group_size, offload)
            pages, tails = pages + filed.file, tails + filed.tail
            slots[filed.page] = slots.get(filed.page, 0) + filed.file // filed.page
        else:
            in_ram = place == "host" or gpu.kind == "cpu"
            pages += _page_bytes(tokens, rows, stored, own.group_size, reserved, in_ram)
        if offload.hot_cache and place == "host":
            hot += _hot_bytes(offload.hot_cache, own, tokens, rows, stored)
        index += _index_bytes(own, tokens, rows, shape.heads // shape.kv_heads, shape.head_dim, reserved)
    slides = shape.layers - shape.full_layers
    if slides:
        kept = min(context, (shape.window or 0) - 1 + step)
        parts.append(
            Part("sliding windows", "gpu", slides * kept * rows * row, f"{slides} layers x {kept:,} tokens")
        )
    token = rows * stored * shape.full_layers
    parts += [
        Part("index", "gpu", index, f"{index / context:,.0f} bytes a token, slack included"),
        Part("token K/V", place, pages, f"{token:,} bytes a token, slack included"),
    ]
    if dense:
        parts.append(Part("K/V of dense layers", "gpu", dense, f"{len(routing.dense_layers)} layers"))
    if hot:
        parts.append(
            Part("hot cache", "gpu", hot, f"{offload.hot_cache:.1%} of the token K/V, tables included")
        )
    # Beside what stays there are either the products of an MLP or attention over one layer's history.
    # Codes of 8 bits are there beside what they are decoded to.
    width = context * (row + (stored if offload.kv_dtype == "fp8" else 0))
    moved = 0 if place == "gpu" else context * rows * row
    history = staged_bytes(rows, width, gpu.kind == "cuda" and place != "nvme", moved)
    mlp, attention = _activations(card, batch * step, item)
    parts.append(Part("activations", "gpu", max(mlp, attention), f"a prefill step of {step:,} tokens"))
    staging = max(0, attention + history - max(mlp, attention))
    if staging:
        parts.append(Part("staging", "gpu", staging, "of one layer's history while a prefill step reads it"))
    room = _room(gpu, profile, place, ram_layers)
    if place == "nvme":
        # A layer's pages on their way, and its last block.
        parts.append(Part("buffers", "host", 2 * context * rows * row, "one layer's history, twice"))
        parts.append(Part("last blocks", "host", tails, "incomplete ones, of all layers"))
        left = max(0, room["host"] - sum(part.bytes for part in parts if part.place == "host"))
        # Each size of pages has a pool of its own; none is larger than what is on the files, or is left.
        cache = sum(min(offload.nvme_cache // size, count) * size for size, count in slots.items())
        parts.append(
            Part("cache of pages", "host", min(cache, left), "offload.nvme_cache, at most what is left")
        )
    given: dict[int | str, int] | None = None
    if ram_layers:
        # accelerate leaves room for the largest layer on a GPU that others are brought to; with a layer more
        # in RAM what it counts otherwise (norms, biases) does not go to a drive.
        there, moving, beside = (part.bytes for part in parts if part.name.startswith("weights"))
        given = {0: there + moving, "cpu": beside + moving}
    return MemoryPlan(tuple(parts), room, place, context, given)


def layer_bytes(card: ModelCard, weight_bytes: int | None = None) -> int:
    """Return the bytes of one decoder layer's weights.

    Parameters
    ----------
    card : ModelCard
        The model.
    weight_bytes : int or None
        Of the checkpoint as it is loaded; None: as the catalogue says.
    """
    shape, whole = card.geometry, card.weight_bytes()
    inside = whole - shape.embedding_parameters * card.weights.other_bits / 8
    return round(inside / shape.layers * (weight_bytes or whole) / whole)


def _weights(card: ModelCard, gpu: GpuCard, size: int | None, ram_layers: int) -> list[Part]:
    """Weights stay as they are stored; a CPU runs in 32 bits."""
    if gpu.kind == "cpu" and size is None:
        size, how = card.geometry.parameters * 4, "all parameters in 32 bits"
    elif size is not None:
        how = "the checkpoint's files"
    else:
        size, how = card.weight_bytes(), f"{card.geometry.parameters / 1e9:.2f}B parameters"
        if card.weights.quantised != "none":
            how += f", {card.weights.bits:g} bits ({card.weights.quantised})"
    if not ram_layers:
        return [Part("weights", "gpu", size, how)]
    layers, layer = card.geometry.layers, layer_bytes(card, size)
    return [
        Part("weights", "gpu", size - ram_layers * layer, f"{how}; {layers - ram_layers} of {layers} layers"),
        Part("weights on their way", "gpu", layer, "one layer's, while it runs"),
        Part("weights in RAM", "host", ram_layers * layer, f"{ram_layers} of {layers} layers"),
    ]


def _home(profile: Profile, gpu: GpuCard) -> Place:
    home = profile.offload.home
    return "gpu" if gpu.kind == "cpu" and home != "nvme" else home  # a CPU has one memory


def _room(gpu: GpuCard, profile: Profile, place: Place, ram_layers: int) -> dict[Place, int]:
    room: dict[Place, int] = {"gpu": gpu.usable}
    if place == "gpu" and not ram_layers:
        return room
    # A quarter is the system's, and whatever loads the weights.
    room["host"] = min(gpu.host_memory.value * 3 // 4, profile.offload.host_budget or gpu.host_memory.value)
    if place == "nvme":
        room["nvme"] = gpu.nvme.value
    return room


def _full_layers(card: ModelCard) -> list[int]:
    shape = card.geometry
    every = shape.full_every or 1
    return [layer for layer in range(shape.layers) if layer % every == every - 1]


def _activations(card: ModelCard, tokens: int, item: int) -> tuple[int, int]:
    """Bytes of a prefill step at their greatest, in an MLP and in attention without the history."""
    shape = card.geometry
    inner = 3 * shape.intermediate * (shape.active_experts or 1)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mlp = tokens * item * (shape.hidden + inner)
    # Queries, output and one copy; scaled and turned queries are 32-bit.
    attention = tokens * (item * (2 * shape.hidden + 3 * query + 2 * key) + 8 * query)
    return mlp, attention


# All layers of a model ask for the same few.
_arrivals = lru_cache(maxsize=64)(arrivals)
_page_bytes = lru_cache(maxsize=256)(page_bytes)
_index_bytes = lru_cache(maxsize=256)(index_bytes)
_hot_bytes = lru_cache(maxsize=256)(hot_bytes)
_file_sizes = lru_cache(maxsize=256)(file_sizes)
