"""The routing part of a profile: which tokens a query attends to."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from hga_compile.configs.base import Settings, conflict, plain_int
from hga_compile.configs.budget import Budget, Window

SummaryKind = Literal["lowbit", "mean"]
Bits = Annotated[Literal[1, 2, 4, 8], BeforeValidator(plain_int)]
ChunkStage = Literal["auto", "on", "off"]
Centre = Literal["first", "block"]
Vote = Literal["mass_sum", "mass_max"]
Tail = Literal["drop", "estimate"]
Prefill = Literal["routed", "dense"]
PrefillTile = Literal["auto"] | Annotated[int, Field(ge=1, le=128)]
CENTRE_BLOCK = 128
"""Keys that are coded about the same centre with `centre: block`."""
# In Python a list may stand for the tuple; what is inside stays strict.
LayerIndices = Annotated[tuple[int, ...], Field(strict=False)]


class LayerOverride(Settings):
    """Routing settings of some layers; null or absent fields keep the profile's value.

    A budget, chunk budget or window replaces the profile's as a whole.
    """

    layers: Annotated[LayerIndices, Field(min_length=1)]
    """The layers it holds for; negative numbers count from the end. Of several overrides the last wins."""

    budget: Budget | None = None
    """As `routing.budget`."""

    prefill_budget: Budget | None = None
    """As `routing.prefill_budget`."""

    chunk_budget: Budget | None = None
    """As `routing.chunk_budget`."""

    window: Window | None = None
    """As `routing.window`."""

    sinks: Annotated[int, Field(ge=0)] | None = None
    """As `routing.sinks`."""

    summary: SummaryKind | None = None
    """As `routing.summary`."""

    bits: Bits | None = None
    """As `routing.bits`."""

    centre: Centre | None = None
    """As `routing.centre`."""

    dense_below: Annotated[int, Field(ge=0)] | None = None
    """As `routing.dense_below`."""

    tail: Tail | None = None
    """As `routing.tail`."""

    vote: Vote | None = None
    """As `routing.vote`."""

    chunk_stage: ChunkStage | None = None
    """As `routing.chunk_stage`."""

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.changes():
            raise conflict(f"an override must set a field beside layers, got only layers {self.layers}", ())
        return self

    def changes(self) -> dict[str, Any]:
        """Return the fields that differ from the profile's, by name."""
        pairs = ((name, getattr(self, name)) for name in type(self).model_fields if name != "layers")
        return {name: value for name, value in pairs if value is not None}


class Routing(Settings):
    """Which tokens each query attends to, per layer and KV head.

    The words (group, chunk, summary, budget, sinks, window, tail) are those of the documentation of the
    method: sinks, window and the best groups up to the budget are attended exactly, the rest is the tail.
    """

    summary: SummaryKind = "lowbit"
    """What a group is scored by: `lowbit`, its keys in `bits` bits, or `mean`, their mean (the paper's)."""

    bits: Bits = 2
    """Bits per key channel of the `lowbit` summary: 1, 2, 4 or 8. `mean` does not use it."""

    centre: Centre = "first"
    """What `lowbit` keys are coded about: `first`, the mean of the first `centre_tokens` keys of the head, or
    `block`, for each block of 128 keys the mean of the block before it."""

    group_size: Annotated[int, Field(ge=1, le=64)] = 4
    """Tokens of a group, the smallest unit that is routed to and fetched: 1 to 64, divides `chunk_size`."""

    chunk_size: Annotated[int, Field(ge=1, le=1024)] = 64
    """Tokens of a chunk, the unit of the first level: a multiple of `group_size`, at most 1024."""

    chunk_stage: ChunkStage = "auto"
    """Whether chunks are chosen before groups: `on`, `off`, or `auto`, on where the index scan is long."""

    auto_chunk_tokens: Annotated[int, Field(ge=1)] = 262144
    """With `chunk_stage: auto`, chunks are chosen first where a query sees more tokens than this."""

    chunk_parts: Annotated[int, Field(ge=1)] = 4
    """Means that stand for one chunk at the first level; divides `chunk_size`. 1 is the paper's."""

    chunk_budget: Budget = Budget(fraction=0.25, tokens=4096)
    """Tokens inside the chunks that the first level keeps; never fewer than `budget`."""

    budget: Budget = Budget(fraction=0.03, tokens=256)
    """Tokens that a query attends to, sinks and window included."""

    sinks: Annotated[int, Field(ge=0)] = 4
    """First tokens of the sequence, attended to by every query."""

    window: Window = Window(fraction=0.1, tokens=16)
    """Most recent tokens, attended to by every query; a share of the budget."""

    vote: Vote = "mass_sum"
    """How the query heads of a KV head merge their scores: sum or maximum of their softmax masses."""

    tail: Tail = "drop"
    """What happens to the tokens outside: `drop` them, or `estimate` their part from the summaries."""

    prefill: Prefill = "routed"
    """Whether the queries of a prefill are `routed` too or `dense`."""

    prefill_tile: PrefillTile = "auto"
    """Queries of a prefill that share a routed set, 1 to 128; `auto`: 64 where a GPU's kernels run, else 1.

    The queries of a tile keep the same chunks too, if chunks are chosen.
    """

    prefill_budget: Budget = Budget(fraction=0.055, tokens=512)
    """Tokens that the queries of a shared set attend to, in the place of `budget`; never fewer than it."""

    centre_tokens: Annotated[int, Field(ge=1)] = 256
    """First keys of the sequence whose mean centres the head's codes; queries before are dense."""

    dense_below: Annotated[int, Field(ge=0)] = 1024
    """Queries that see at most so many tokens attend to all of them."""

    dense_layers: LayerIndices = ()
    """Layers that stay dense; negative numbers count from the end."""

    overrides: Annotated[tuple[LayerOverride, ...], Field(strict=False)] = ()
    """Settings of single layers."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        group, chunk, parts = self.group_size, self.chunk_size, self.chunk_parts
        if group > chunk:
            raise conflict(
                f"group_size must not exceed chunk_size, got {group} and {chunk}; "
                "lower it or raise routing.chunk_size (routing.group_size)",
                ("group_size",),
            )
        if chunk % group:
            raise conflict(
                f"group_size must divide chunk_size, got {group} and {chunk}; "
                f"try {_near_divisors(chunk, group, most=64)} (routing.group_size)",
                ("group_size",),
            )
        if chunk % parts:
            raise conflict(
                f"chunk_parts must divide chunk_size, got {parts} and {chunk}; "
                f"try {_near_divisors(chunk, parts, most=chunk)} (routing.chunk_parts)",
                ("chunk_parts",),
            )
        _check_sinks(self.sinks, self.budget, ("budget", "tokens"))
        _check_centre(self.centre, self.summary, ())
        for place, override in enumerate(self.overrides):
            sinks = self.sinks if override.sinks is None else override.sinks
            field = ("sinks",) if override.budget is None else ("budget", "tokens")
            _check_sinks(sinks, override.budget or self.budget, ("overrides", place, *field))
            _check_centre(
                override.centre or self.centre, override.summary or self.summary, ("overrides", place)
            )
        return self

    def chunk_tokens_for(self, visible: int) -> int:
        """Return the tokens inside the chunks that level 1 keeps, never fewer than the budget.

        Parameters
        ----------
        visible : int
            Tokens that the query sees causally.
        """
        return max(self.chunk_budget.tokens_for(visible), self.budget.tokens_for(visible))

    def shared(self) -> "Routing":
        """Return the routing of queries that share a routed set: `prefill_budget` is the budget."""
        own, wide = self.budget, self.prefill_budget
        fraction = max((part for part in (own.fraction, wide.fraction) if part is not None), default=None)
        tokens = max((part for part in (own.tokens, wide.tokens) if part is not None), default=None)
        return self.model_copy(update={"budget": Budget(fraction=fraction, tokens=tokens)})

    def uses_chunks(self, visible: int) -> bool:
        """Say whether chunks are chosen before groups for a query that sees `visible` tokens."""
        if self.chunk_stage == "auto":
            return visible > self.auto_chunk_tokens
        return self.chunk_stage == "on"

    def is_dense(self, index: int, layers: int | None = None) -> bool:
        """Say whether layer `index` is one of `dense_layers`.

        Parameters
        ----------
        index : int
            The layer, from 0.
        layers : int or None
            Layers of the model; needed once `dense_layers` counts from the end.

        Raises
        ------
        ValueError
            A layer that the model does not have, or a count from the end with `layers` None.
        """
        return _names_layer(self.dense_layers, index, layers, "routing.dense_layers")

    def for_layer(self, index: int, layers: int | None = None) -> "Routing":
        """Return the routing of one layer, with the overrides merged.

        Parameters
        ----------
        index : int
            The layer, from 0.
        layers : int or None
            Layers of the model; needed once an override counts from the end.

        Returns
        -------
        Routing
            Without overrides; `dense_layers` is kept.

        Raises
        ------
        ValueError
            A layer that the model does not have, or a count from the end with `layers` None.
        """
        merged = {name: getattr(self, name) for name in Routing.model_fields}
        merged["overrides"] = ()
        for place, override in enumerate(self.overrides):
            if _names_layer(override.layers, index, layers, f"routing.overrides[{place}].layers"):
                merged.update(override.changes())
        return Routing(**merged) if self.overrides else self


def _near_divisors(whole: int, wanted: int, *, most: int) -> str:
    """Name the divisors of `whole` just below and above `wanted`."""
    divisors = [number for number in range(1, min(whole, most) + 1) if whole % number == 0]
    below = [number for number in divisors if number < wanted][-1:]
    above = [number for number in divisors if number > wanted][:1]
    return " or ".join(map(str, below + above))


def _check_sinks(sinks: int, budget: Budget, path: Sequence[str | int]) -> None:
    """Refuse a fixed budget that the sinks alone exceed."""
    if budget.fraction is None and budget.tokens is not None and sinks > budget.tokens:
        raise conflict(
            f"sinks must fit the budget, got {sinks} sinks and a budget of {budget.tokens} tokens; raise the "
            "budget (routing.budget.tokens; the whole context is fraction 1.0) or lower routing.sinks",
            path,
        )


def _check_centre(centre: Centre, summary: SummaryKind, path: Sequence[str | int]) -> None:
    """Refuse centres of codes where there are no codes."""
    if centre == "block" and summary != "lowbit":
        raise conflict(
            f"centre block needs summary lowbit, got summary {summary}, which has no codes to centre; "
            "expected centre first or summary lowbit (routing.centre)",
            (*path, "centre"),
        )


def _names_layer(entries: Sequence[int], index: int, layers: int | None, field: str) -> bool:
    """Say whether `entries` name layer `index`, and refuse layers that the model does not have."""
    if index < 0 or (layers is not None and index >= layers):
        raise ValueError(f"layer index must be in 0..layers-1, got {index} of {layers} layers")
    for entry in entries:
        if layers is None and entry < 0:
            raise ValueError(f"{field} has {entry}, counted from the end: the number of layers is needed")
        if layers is not None and not -layers <= entry < layers:
            raise ValueError(f"{field} has {entry}, but the model has {layers} layers; change {field}")
    return index in entries or (layers is not None and index - layers in entries)
