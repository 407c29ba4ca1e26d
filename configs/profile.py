"""A profile: one validated document with model, GPU, routing, offload and compile settings."""

import hashlib
import json
import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from hga_compile.configs.base import Settings
from hga_compile.configs.budget import Budget, Window
from hga_compile.configs.routing import LayerOverride, Routing

__all__ = [
    "SCHEMA_VERSION",
    "Budget",
    "CompileSettings",
    "Kernels",
    "LayerOverride",
    "ModelMatch",
    "Offload",
    "Profile",
    "Routing",
    "Window",
]

SCHEMA_VERSION = 1

Kernels = Literal["auto", "triton", "native", "reference"]

_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BYTES_PATTERN = r"^([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([KMGT]i?B|B)$"


def _parse_bytes(value: object) -> object:
    """Turn "64GiB" into bytes; what is not text is left to the integer check."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(_BYTES_PATTERN, value)
    if found is None:
        raise PydanticCustomError(
            "bytes_text", 'Input should be a number of bytes or a size such as "64GiB" or "512MB"'
        )
    return int(Decimal(found[1]) * _UNITS[found[2]])


def _known_version(value: object) -> object:
    """Refuse a document of another schema, and whatever only compares equal to its number."""
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    if value > SCHEMA_VERSION:
        raise PydanticCustomError(
            "newer_schema",
            f"Input should be at most {SCHEMA_VERSION}, the newest that this hga-compile reads "
            "(upgrade hga-compile)",
        )
    return value


Bytes = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_parse_bytes),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": _BYTES_PATTERN}]}
    ),
]
Count = Annotated[int, Field(ge=1)]


class ModelMatch(Settings):
    """The model that a profile was made for; null fields match anything."""

    hub_id: Annotated[str, Field(min_length=1)] | None = None
    """Name on the Hugging Face hub, such as `HuggingFaceTB/SmolLM2-135M-Instruct`."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 of the checkpoint, 64 lower-case hexadecimal digits."""

    layers: Count | None = None
    """Number of layers."""

    heads: Count | None = None
    """Query heads of a layer."""

    kv_heads: Count | None = None
    """KV heads of a layer."""

    head_dim: Count | None = None
    """Channels of a head."""


class Offload(Settings):
    """Where the token K/V lives."""

    tier: Literal["auto", "gpu", "host", "nvme"] = "auto"
    """Home of the token K/V: `gpu`, `host` (pinned RAM), `nvme` (files); `auto` is `host`."""

    hot_cache: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the tokens kept in GPU slots, above 0 and at most 1. null: no hot cache."""

    kv_dtype: Literal["model", "fp8"] = "model"
    """How token K/V are stored, in every tier: as the model computes them, or in 8 bits (e4m3)."""

    host_budget: Bytes | None = None
    """Most host RAM of the process for K/V: bytes, or a size such as `64GiB`. null: what is free, of the
    machine or of its control group."""

    reserve_tokens: Count | None = None
    """Tokens that a layer makes room for at once. null: it grows by a quarter whenever it is full."""

    nvme_folder: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]+$")] | None = None
    """Folder of the `nvme` tier's files. null: the system's temporary folder."""

    nvme_cache: Bytes = 2**30
    """Most RAM that keeps pages of the `nvme` tier, of all layers together: bytes, or a size."""

    nvme_page: Annotated[Bytes, Field(ge=2**15)] = 2**15
    """Unit in which the `nvme` tier reads and writes, from `32KiB`; rounded up to 4 KiB and to a group."""

    nvme_threads: Annotated[int, Field(ge=1, le=256)] = 8
    """Reads and writes of the `nvme` tier that are under way at once."""

    poison: bool = False
    """For debugging: K/V that are given up are overwritten with NaN, and so is memory nobody has written."""

    @property
    def home(self) -> Literal["gpu", "host", "nvme"]:
        """The tier, `auto` resolved."""
        return "host" if self.tier == "auto" else self.tier


class CompileSettings(Settings):
    """What happens to the rest of the graph."""

    inner: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """Backend that compiles everything but the attention."""

    strict: bool = False
    """Whether an attention site that stays dense is an error."""

    kernels: Kernels = "auto"
    """What routed attention runs in: `auto` takes `triton` on CUDA, `native` (C++) on a CPU, and else, as
    `reference` does always, plain torch. `triton` and `native` by name are an error where they cannot run."""

    cuda_graph: bool = True
    """Whether decode steps on a GPU are recorded as one CUDA graph and replayed while the sequence grows: no
    work of the CPU for single layers. A step that cannot be recorded runs without, with a reason."""


class Profile(Settings):
    """One complete description of how a model runs.

    Immutable and hashable. In Python it is built from these models or by
    `hga_compile.configs.loader.load_profile`.

    Examples
    --------
    >>> profile = Profile(name="short", routing=Routing(budget=Budget(fraction=0.05)))
    >>> profile.routing.budget.tokens_for(8192)
    410
    """

    schema_version: Annotated[Literal[1], BeforeValidator(_known_version)] = 1
    """Version of this document's layout."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """Name shown in reports."""

    description: str = ""
    """What the profile is for."""

    model: ModelMatch | None = None
    """The model it was made for. null: any."""

    gpu: Annotated[str, Field(min_length=1)] | None = None
    """The GPU it was made for, as the driver names it. null: any."""

    routing: Routing = Routing()
    """Which tokens a query attends to."""

    offload: Offload = Offload()
    """Home of the token K/V, and how much memory it may take."""

    compile: CompileSettings = CompileSettings()
    """Inner backend, strictness and kernels."""

    def digest(self) -> str:
        """Return 16 hexadecimal digits that identify the profile's content.

        Returns
        -------
        str
            The start of the SHA-256 of the profile as JSON with sorted keys and no spaces.
        """
        document = self.model_dump(mode="json")
        canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
