"""What the catalogue says of a model and of a GPU; every section and figure names its source."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hga_compile.configs.base import Settings, conflict
from hga_compile.configs.profile import Bytes

__all__ = ["ByteFigure", "Context", "Figure", "Geometry", "GpuCard", "ModelCard", "Weights"]

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0.0)]
Source = Annotated[str, Field(min_length=8)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
# In Python a list may stand for the tuple; what is inside stays strict.
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]


class Geometry(Settings):
    """Shape of a decoder."""

    layers: Count
    """Layers of the decoder."""

    hidden: Count
    """Channels of the residual stream."""

    heads: Count
    """Query heads of a layer."""

    kv_heads: Count
    """KV heads of a layer."""

    head_dim: Count
    """Channels of a head, of keys and of values."""

    intermediate: Count
    """Channels inside the MLP, or inside one expert."""

    vocabulary: Count
    """Rows of the embedding."""

    tied: bool
    """Whether the output layer is the embedding."""

    experts: Count | None = None
    """Experts of a layer. null: a plain MLP."""

    active_experts: Count | None = None
    """Experts that a token runs through."""

    window: Count | None = None
    """Tokens that a sliding-window layer sees. null: there are no such layers."""

    full_every: Count | None = None
    """Of so many consecutive layers the last one attends to everything, the others slide."""

    source: Source
    """Where these figures are from."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.heads % self.kv_heads:
            raise conflict(
                f"kv_heads must divide heads, got {self.kv_heads} and {self.heads} (geometry.kv_heads)",
                ("kv_heads",),
            )
        for one, other in (("experts", "active_experts"), ("window", "full_every")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise conflict(f"{one} and {other} go together, got one of them (geometry.{other})", (one,))
        return self

    @property
    def full_layers(self) -> int:
        """Layers that attend to the whole history: those that can be routed."""
        return self.layers if self.full_every is None else self.layers // self.full_every

    @property
    def attention_parameters(self) -> int:
        """Weights of the projections of all layers."""
        width = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * self.hidden * width

    @property
    def expert_parameters(self) -> int:
        """Weights of one MLP or expert: gate, up and down."""
        return 3 * self.hidden * self.intermediate

    @property
    def mlp_parameters(self) -> int:
        """Weights of the MLPs, or of all experts and their routers."""
        routers = self.hidden * (self.experts or 0)
        return self.layers * (self.expert_parameters * (self.experts or 1) + routers)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding, and of the output layer where that is not the same."""
        return self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights but norms and biases."""
        return self.attention_parameters + self.mlp_parameters + self.embedding_parameters


class Context(Settings):
    """Positions."""

    rope_theta: Positive
    """Base of the rotary positions, of the layers that see everything."""

    max_tokens: Count
    """Longest sequence that the checkpoint was made for."""

    source: Source
    """Where these figures are from."""


class Weights(Settings):
    """How the checkpoint stores its weights."""

    bits: Positive
    """Bits a weight of the projections and MLPs (of the experts, if only these are quantised)."""

    other_bits: Positive = 16.0
    """Bits of the embedding and the output layer (of all but the experts, if only these are quantised)."""

    quantised: Literal["none", "linear", "experts"] = "none"
    """What `bits` holds for: nothing, every linear layer but the output, or the experts alone."""

    source: Source
    """Where these figures are from."""


class ModelCard(Settings):
    """One model of the catalogue."""

    name: Name
    """Name in the catalogue."""

    aliases: Names = ()
    """Other names."""

    hub_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Name on the Hugging Face hub. null: a local folder's."""

    geometry: Geometry
    context: Context
    weights: Weights

    def weight_bytes(self) -> int:
        """Return the bytes of all weights, as the checkpoint stores them."""
        return round(self._bytes(self.geometry.experts or 1))

    def active_bytes(self) -> int:
        """Return the bytes of the weights that one token reads: of a mixture, the active experts' only.

        The embedding is read for one row, which is nothing; the output layer is read as a whole.
        """
        shape = self.geometry
        rows = 0.0 if shape.tied else shape.embedding_parameters / 2 * self.weights.other_bits / 8
        return round(self._bytes(shape.active_experts or 1) - rows)

    def _bytes(self, experts: int) -> float:
        shape, stored = self.geometry, self.weights
        plain = stored.other_bits
        inside = stored.bits if stored.quantised != "none" else plain
        attention = inside if stored.quantised == "linear" else plain
        mlps = shape.layers * shape.expert_parameters * experts
        routers = shape.layers * shape.hidden * (shape.experts or 0)
        bits = shape.attention_parameters * attention + mlps * inside
        bits += (routers + shape.embedding_parameters) * plain
        return bits / 8


class Figure(Settings):
    """A number and where it is from."""

    value: Positive
    source: Source


class ByteFigure(Settings):
    """A size and where it is from."""

    value: Bytes
    source: Source


class GpuCard(Settings):
    """One GPU of the catalogue, or a CPU."""

    name: Name
    """Name in the catalogue."""

    aliases: Names = ()
    """Other names."""

    kind: Literal["cuda", "cpu"] = "cuda"
    """What runs there: Triton, or C++."""

    device_names: Names = ()
    """What the driver calls it, without memory sizes or form factors; profiles name the first."""

    memory: ByteFigure
    """Memory of the device."""

    reserved: ByteFigure
    """What a process cannot have: driver, context, libraries' workspaces."""

    bandwidth: Figure
    """Memory bandwidth, bytes a second."""

    matrix_rate: Figure
    """Dense 16-bit matrix products with 32-bit sums, operations a second."""

    cores: Figure
    """Streaming multiprocessors, or cores of a CPU."""

    clock: Figure
    """Boost clock, hertz."""

    cache: ByteFigure
    """Last-level cache."""

    host_bandwidth: Figure
    """From pinned host memory, bytes a second one way."""

    host_memory: ByteFigure
    """RAM of the machine."""

    nvme: ByteFigure
    """Free space on a local drive."""

    nvme_bandwidth: Figure
    """Random reads of 64 KiB, bytes a second."""

    @property
    def usable(self) -> int:
        """Bytes that a process can have."""
        return self.memory.value - self.reserved.value
