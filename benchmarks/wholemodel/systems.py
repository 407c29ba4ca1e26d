"""The systems that are compared: how each keeps K/V, and what of the model each compiles.

All run one model with one set of weights. The peers' attention is that of `attention.py`; hga's is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

from wholemodel.attention import NAME, static_cache

__all__ = ["SYSTEMS", "Held", "Setup", "System", "Unavailable"]

OPENING = 2  # tokens that the uncompiled model reads into a new cache: filling an empty one is another graph

# Nobody changes the model's modules meanwhile, so that no system looks whether they did at every token.
_STILL = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}


class Unavailable(RuntimeError):
    """A system that cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Held:
    """Bytes of a cache by use."""

    gpu_kv: int = 0
    """Token K/V on the device that computes."""
    index: int = 0
    hot: int = 0
    host_kv: int = 0


@dataclass(frozen=True)
class Setup:
    """What a system is given besides the model."""

    context: int
    """Tokens of the prompt."""
    new: int
    """Tokens decoded after it, warm-up included."""
    profile: Any = None
    """hga's profile."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """hga's settings beside the profile."""
    inner: str = "inductor"
    """What compiles the rest of the model: inductor, or eager for none."""
    dense_prefill: str = "inductor"
    """The same for the prefill of the static cache, whose compilation takes minutes."""
    kept: dict[str, Any] = field(default_factory=dict)
    """Compiled code that a system leaves for itself at the next context."""


class System:
    """A cache of one kind, and a model that fills it.

    Attributes
    ----------
    cache
        The transformers cache.
    """

    attention = NAME
    """Name of the attention function, in transformers' terms."""

    def __init__(self, model: PreTrainedModel, setup: Setup) -> None:
        model.set_attn_implementation(self.attention)
        self.model, self.setup = model, setup
        self.cache = self.new_cache()

    def new_cache(self) -> Any:
        """Return an empty cache."""
        raise NotImplementedError

    def prefill(self, ids: Tensor, begin: int) -> None:
        """Read the prompt's tokens ``[1, n]``, which begin at `begin`."""
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self, token: Tensor) -> Tensor:
        """Read one token ``[1, 1]``; return the likeliest next one, ``[1, 1]``."""
        found = self.model(input_ids=token, past_key_values=self.cache, use_cache=True)
        return found.logits[:, -1:].argmax(-1)

    def held(self) -> Held:
        """Return where the cache's bytes lie."""
        pairs = ((layer.keys, layer.values) for layer in self.cache.layers)
        tensors = [part for pair in pairs for part in pair if isinstance(part, Tensor)]
        near = self.model.device
        gpu = sum(part.nbytes for part in tensors if part.device == near)
        return Held(gpu_kv=gpu, host_kv=sum(part.nbytes for part in tensors) - gpu)

    def traffic(self, steps: int) -> dict[str, float | None]:
        """Return bytes from host memory a decoded token, and the hit rate of the hot cache, after `steps`."""
        return {"pcie_bytes": 0.0, "hit_rate": None}

    def close(self) -> None:
        """Give the cache up."""
        self.cache = None


class Dynamic(System):
    """transformers' cache that grows by a copy, eager."""

    def new_cache(self) -> Any:
        """Return an empty `DynamicCache`."""
        return DynamicCache(config=self.model.config)


class Offloaded(Dynamic):
    """transformers' cache in host memory, a layer of which is brought to the GPU as it is needed."""

    def new_cache(self) -> Any:
        """Return an empty `DynamicCache` that is offloaded."""
        if self.model.device.type != "cuda":
            raise Unavailable("an offloaded cache lies in host memory, which needs a GPU to be brought to")
        return DynamicCache(config=self.model.config, offloading=True)

    def traffic(self, steps: int) -> dict[str, float | None]:
        """Return all K/V: every step brings every layer to the GPU."""
        held = self.held()
        return {"pcie_bytes": float(held.gpu_kv + held.host_kv), "hit_rate": None}


class Quantised(System):
    """transformers' cache in 4 bits by optimum-quanto, eager."""

    def new_cache(self) -> Any:
        """Return an empty `QuantizedCache`."""
        try:
            return QuantizedCache("quanto", self.model.config, nbits=4)
        except ImportError as error:
            why = str(error).splitlines()[0]
            raise Unavailable(f"a quantised cache needs optimum-quanto: {why}") from None

    def held(self) -> Held:
        """Return what is quantised, and the last tokens, which are not."""
        names = ("_quantized_keys", "_quantized_values")
        packed = (getattr(layer, name, None) for layer in self.cache.layers for name in names)
        return Held(gpu_kv=super().held().gpu_kv + sum(_bytes(part) for part in packed if part is not None))


class Dense(System):
    """transformers' static cache; prefill by Inductor, decode in one CUDA graph of the whole model.

    Attention of a decode step reads all of the buffer, the few slots that are not filled yet included.
    """

    def __init__(self, model: PreTrainedModel, setup: Setup) -> None:
        super().__init__(model, setup)
        self._prefill: Any = model
        self._decode: Any = model
        if setup.inner == "inductor":
            if setup.dense_prefill == "inductor":
                self._prefill = torch.compile(model, dynamic=True)
            # The mode ``reduce-overhead``; a mode and options do not go together.
            graphs = {"triton.cudagraphs": True} if model.device.type == "cuda" else {}
            options: Any = graphs | _STILL
            self._decode = torch.compile(model, options=options, fullgraph=True, dynamic=False)

    def new_cache(self) -> Any:
        """Return an empty `StaticCache` of the final length."""
        return StaticCache(config=self.model.config, max_cache_len=self.setup.context + self.setup.new)

    def prefill(self, ids: Tensor, begin: int) -> None:
        """See `System.prefill`; buffers are made by code that is not compiled."""
        call = self._prefill if begin else self.model
        # Strides of its own: where a piece lies in the prompt would be another graph for each.
        own = ids.clone(memory_format=torch.contiguous_format)
        with static_cache(begin + ids.shape[1]):
            call(input_ids=own, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self, token: Tensor) -> Tensor:
        """See `System.decode`."""
        with static_cache(None):
            found = self._decode(input_ids=token, past_key_values=self.cache, use_cache=True)
            # A graph's output is overwritten by its next replay.
            return found.logits[:, -1:].argmax(-1).clone()


class Hga(System):
    """The model compiled by this package, K/V where the profile says."""

    attention = "sdpa"
    tier: str | None = None

    def __init__(self, model: PreTrainedModel, setup: Setup) -> None:
        from hga_compile.configs.loader import resolve_profile

        given = {"profile": setup.profile, "compile.inner": setup.inner, **setup.options}
        given["offload.reserve_tokens"] = setup.context + setup.new
        if self.tier is not None:
            given |= {"offload.tier": self.tier, "offload.hot_cache": None}
        self.profile = resolve_profile(given)
        super().__init__(model, setup)
        self.fallbacks: dict[str, int] = {}
        """Reasons, with their counts until counting began."""
        # What is reserved and kept hot is the cache's own affair: graphs do not depend on it.
        graphs = resolve_profile({**given, "offload.reserve_tokens": None, "offload.hot_cache": None})
        if graphs.digest() not in setup.kept:
            # One graph for prefill steps of every length, and one for decoding.
            setup.kept[graphs.digest()] = torch.compile(
                self.model, backend="hga", dynamic=True, options={"profile": graphs, **_STILL}
            )
        self._call: Any = setup.kept[graphs.digest()]

    def new_cache(self) -> Any:
        """Return an empty `HGACache`."""
        from hga_compile import HGACache

        return HGACache(self.model.config, profile=self.profile)

    def prefill(self, ids: Tensor, begin: int) -> None:
        """See `System.prefill`."""
        call = self._call if begin else self.model
        own = ids.clone(memory_format=torch.contiguous_format)
        call(input_ids=own, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def decode(self, token: Tensor) -> Tensor:
        """See `System.decode`; positions are given, as `generate` gives them."""
        at = torch.full_like(token, self.cache.get_seq_length())
        found = self._call(input_ids=token, position_ids=at, past_key_values=self.cache, use_cache=True)
        return found.logits[:, -1:].argmax(-1)

    def held(self) -> Held:
        """Return where the cache's bytes lie, the hot cache apart."""
        import hga_compile

        memory = hga_compile.cache_memory(self.cache)
        hot = sum(part.nbytes() for part in self._hot())
        host = memory.host_kv + memory.nvme_kv
        return Held(memory.accelerator_kv - hot, memory.accelerator_index, hot, host)

    def traffic(self, steps: int) -> dict[str, float | None]:
        """Return what crossed PCIe: what the hot cache missed, or all that was routed to without one.

        Everything since the last `hga_compile.reset_report`.
        """
        import hga_compile

        read = hga_compile.report().totals("decode").kv_bytes
        if self.profile.offload.home != "host" or not steps:
            return {"pcie_bytes": 0.0, "hit_rate": None}
        hot = self._hot()
        if not hot:
            return {"pcie_bytes": read / steps, "hit_rate": None}
        missed = sum((part.misses() - self._missed[at]) * part.page for at, part in enumerate(hot))
        missed *= self.model.dtype.itemsize
        return {"pcie_bytes": missed / steps, "hit_rate": 1 - missed / read if read else None}

    def record_anew(self) -> None:
        """Have the next steps recorded anew, if they are recorded as one CUDA graph."""
        for layer in self.cache.layers:
            layer.crop(0)  # nothing is removed, but whoever recorded a step must look again

    def begin_counting(self) -> None:
        """Forget what was counted so far, but for the fallbacks."""
        import hga_compile

        self.fallbacks |= dict(hga_compile.report().fallbacks)
        hga_compile.reset_report()
        self._missed = [part.misses() for part in self._hot()]

    def _hot(self) -> list[Any]:
        # Layers that have opened their store, and of these the ones whose pages keep slots on the GPU.
        pages = [
            layer.state.pages for layer in self.cache.layers if getattr(layer, "handle", None) is not None
        ]
        return [page.hot for page in pages if getattr(page, "hot", None) is not None]


class HgaGpu(Hga):
    """The same, K/V in GPU memory."""

    tier = "gpu"


def _bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, or of a wrapper's inner ones."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return int(tensor.nbytes)


@dataclass(frozen=True)
class Entry:
    """One row of the comparison."""

    label: str
    make: Callable[[PreTrainedModel, Setup], System]
    capped: bool = True
    """Whether it runs under the cap on GPU memory."""
    routed: bool = False


SYSTEMS: dict[str, Entry] = {
    "hga": Entry("hga, K/V in host RAM", Hga, routed=True),
    "dense": Entry("dense, static cache, CUDA graph", Dense),
    "dense-uncapped": Entry("the same without a cap", Dense, capped=False),
    "hga-gpu": Entry("hga, K/V in GPU memory, without a cap", HgaGpu, capped=False, routed=True),
    "dynamic": Entry("HF dynamic cache", Dynamic),
    "offloaded": Entry("HF offloaded cache", Offloaded),
    "quantized": Entry("HF quantized cache, 4 bits", Quantised),
}
"""By name, in the order in which they run."""
