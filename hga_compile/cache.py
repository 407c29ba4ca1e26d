"""Cache layers for transformers whose K/V live in an hga store, reached through a handle in the graph."""

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from hga_compile.configs.loader import resolve_profile
from hga_compile.configs.profile import Kernels, Offload, Profile
from hga_compile.joining import join_layers, padding_of, split_layers
from hga_compile.kernels import ops
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.states import STATES
from hga_compile.saving import load_layers, save_layers
from hga_compile.store import Held, LayerStore
from hga_compile.store.errors import JoinError
from hga_compile.tracing import traced_for_hga

__all__ = ["CacheMemory", "HGACache", "HGALayer", "HGASlidingLayer", "cache_memory"]


class _Stored:
    """What both kinds of layer share: a handle to a store once there is one, the stock layer until then.

    A layer opens its store when a graph of backend "hga" first updates it, or from the start in an
    `HGACache`. Until then it is the stock layer, so that models not compiled with hga see no difference.
    """

    slides = False
    """Whether queries see a window only."""
    stored = False
    """Whether the layer opens its store on the first update, compiled or not."""
    dtype: torch.dtype
    device: torch.device
    place: Offload | None = None
    """Where a store that is opened by code that is not compiled keeps its rows; None: with the K/V."""
    kernels: Kernels = "auto"
    """What moves rows that are stored by code that is not compiled."""
    expected: tuple[int, int] | None = None
    """Group size and number of the layer in whose pages such rows are stored; None: as a site says later."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.handle: Tensor | None = None
        self._spent: Tensor | None = None
        """Handle of a store that was left while tracing; its store goes with the layer."""
        self.seen = 0
        self._plain_keys: Tensor | None = None
        self._plain_values: Tensor | None = None
        self.sizes = (0, 0, 0, 0)
        """Batch, KV heads, channels of a key, channels of a value."""
        super().__init__(*args, **kwargs)

    @property
    def is_compileable(self) -> bool:
        """True while hga is tracing: transformers then builds the same mask ops at every length."""
        return torch.compiler.is_compiling() and traced_for_hga()

    @property
    def keys(self) -> Tensor | None:
        """All keys, ``[batch, kv_heads, tokens, dim]``; copied out of the store if there is one."""
        return self._plain_keys if self.handle is None else self._read()[0]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._plain_keys = value

    @property
    def values(self) -> Tensor | None:
        """All values, likewise."""
        return self._plain_values if self.handle is None else self._read()[1]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._plain_values = value

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add rows and return what attention reads: all K and V (see `CacheLayerMixin.update`)."""
        needs_grad = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if self.handle is None:
            if needs_grad or not (self.stored or (torch.compiler.is_compiling() and traced_for_hga())):
                return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
            self._open(key_states, value_states)
        elif needs_grad:
            # The store has no backward: go on as the stock layer, with what is stored as history.
            self._to_plain()
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        if not self.stored and not torch.compiler.is_compiling():
            LEDGER.count_fallback("code that is not compiled read all K/V of a layer")
        self.seen = self.seen + key_states.shape[-2]
        if value_states.dtype != key_states.dtype:
            # Under autocast rotated keys are float32, and values are not; a store has one dtype.
            value_states = value_states.to(key_states.dtype)
        return torch.ops.hga.append(
            key_states, value_states, self.handle, self.seen, self.slides, kernels=self.kernels
        )

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return super().get_seq_length() if self.handle is None else self.seen  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that a mask must cover."""
        if self.handle is None and not (self.stored or (torch.compiler.is_compiling() and traced_for_hga())):
            return super().get_mask_sizes(query_length)  # type: ignore[misc,no-any-return]
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        if self.handle is not None:
            self._close()
            # At once: the memory is wanted for what comes next.
            STATES.collect()
            # What the stock layer would overwrite with zeros is in the store, which is gone.
            self._plain_keys = self._plain_values = None
            self.is_initialized = False
        super().reset()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; `tokens_to_remove` is negative, as transformers has it."""
        if self.handle is None:
            super().crop(tokens_to_remove)  # type: ignore[misc]
            return
        # Assisted generation passes a tensor in some versions; the length must stay a number.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the negative number of tokens to remove, got {tokens_to_remove}; "
                f"try {-tokens_to_remove}"
            )
        length = max(0, self.seen + tokens_to_remove)
        self.state.truncate(length)
        self.seen = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace each sequence by sequence ``beam_idx``: beam search."""
        if self.handle is None:
            super().reorder_cache(beam_idx)  # type: ignore[misc]
        else:
            self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        if self.handle is None:
            super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        else:
            self._select(torch.arange(self.sizes[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (numbers or a bool mask)."""
        if self.handle is None:
            super().batch_select_indices(indices)  # type: ignore[misc]
        else:
            self._select(torch.arange(self.sizes[0])[indices.cpu()])

    def offload(self) -> None:
        """Do as the stock layer without a store; a store has its own tier."""
        if self.handle is None:
            super().offload()  # type: ignore[misc]

    def prefetch(self) -> None:
        """Do as the stock layer without a store; a store fetches what is routed to."""
        if self.handle is None:
            super().prefetch()  # type: ignore[misc]

    def memory(self) -> Held:
        """Return bytes of K/V and index, by place."""
        if self.handle is not None:
            return self.state.nbytes()
        plain = [part for part in (self._plain_keys, self._plain_values) if part is not None]
        return Held(sum(part.nbytes for part in plain))

    def restore(
        self,
        state: LayerStore,
        sizes: tuple[int, int, int, int],
        seen: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Take over a store of `seen` tokens; `sizes`: batch, KV heads, channels of a key, of a value."""
        batch, heads, dim, v_dim = sizes
        empty = torch.empty(batch, heads, 0, dim, dtype=dtype, device=device)
        super().lazy_initialization(empty, empty.new_empty(batch, heads, 0, v_dim))  # type: ignore[misc]
        self._plain_keys = self._plain_values = None
        self.sizes, self.seen, self.handle = sizes, seen, STATES.adopt(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        for name, value in self.__dict__.items():
            # Two layers must never write to one store.
            own = name in ("handle", "_spent")
            other.__dict__[name] = None if own else copy.deepcopy(value, memo)
        if self.handle is not None:
            STATES.collect()
            other.handle = STATES.adopt(self.state.clone())
        return other

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.handle is not None:
            # A handle means nothing elsewhere: the rows travel instead.
            state["_plain_keys"], state["_plain_values"] = self._read()
            state["handle"], state["seen"] = None, 0
        return state | {"_spent": None}

    def __del__(self) -> None:
        for name in ("handle", "_spent"):
            handle = self.__dict__.get(name)
            # When the interpreter ends, modules go before what is held in circles; so does their memory.
            if handle is not None and STATES is not None:
                STATES.close(handle)

    def _open(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self.is_initialized:
            super().lazy_initialization(key_states, value_states)  # type: ignore[misc]
        keys, values = self._plain_keys, self._plain_values
        if keys is None or values is None or keys.numel() == 0:
            keys, values = key_states[..., :0, :], value_states[..., :0, :]
        batch, heads, _, dim = key_states.shape
        self.sizes = (batch, heads, dim, value_states.shape[-1])
        self.seen = self.get_seq_length()
        # Should opening fail: memory that nobody has written may hold another store's number, 0 is none's.
        make = torch.empty if torch.compiler.is_compiling() else torch.zeros
        self.handle = make(1, dtype=torch.int64, device="cpu")
        torch.ops.hga.open(keys, values, self.handle, kernels=self.kernels)
        self._plain_keys = self._plain_values = None
        if self.place is not None and not torch.compiler.is_compiling():
            state = self.state
            state.tier, state.place = self.place.home, self.place
            if self.expected is not None:
                state.expect(*self.expected)

    def _read(self) -> tuple[Tensor, Tensor]:
        batch, heads, dim, value_dim = self.sizes
        key, value = torch.ops.hga.read(
            self.handle, [batch, heads, self.seen, dim], value_dim, self.dtype, self.device
        )
        return key, value

    def _to_plain(self) -> None:
        """Leave the store: from here on this is the stock layer."""
        self._plain_keys, self._plain_values = self._read()
        if torch.compiler.is_compiling():
            self._spent, self.handle, self.seen = self.handle, None, 0
        else:
            self._close()

    def _close(self) -> None:
        for handle in (self.handle, self._spent):
            if handle is not None:
                STATES.close(handle)
        self.handle, self._spent, self.seen = None, None, 0

    @property
    def state(self) -> LayerStore:
        """The store; there must be one."""
        assert self.handle is not None  # callers have checked
        state = STATES.get(self.handle)
        assert isinstance(state, LayerStore)  # the only kind that is ever opened
        return state

    def _select(self, index: Tensor) -> None:
        self.state.select_batch(index)
        self.sizes = (len(index), *self.sizes[1:])


class HGALayer(_Stored, DynamicLayer):
    """A full-attention layer of a dynamic cache."""


class HGASlidingLayer(_Stored, DynamicSlidingWindowLayer):
    """A sliding-window layer of a dynamic cache.

    Under hga it tells transformers the length of the whole sequence, so that nothing in the graph changes as
    the window fills up; the rewritten attention keeps and reads the window only.
    """

    slides = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add rows and return what attention reads: all K and V, or as the stock layer."""
        self._leave_window()
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.handle is None and torch.compiler.is_compiling() and traced_for_hga():
            # Gradients are needed: the mask covers the whole sequence, the stock layer's rows do not.
            missing = self.cumulative_length - keys.shape[-2]
            keys, values = (torch.nn.functional.pad(part, (0, 0, missing, 0)) for part in (keys, values))
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset of the keys that a mask must cover."""
        self._leave_window()
        return super().get_mask_sizes(query_length)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return state if self.handle is None else state | {"cumulative_length": self.seen}

    def _leave_window(self) -> None:
        """Go on as the stock layer outside of compiled code: a store of a window cannot return all K, V."""
        if self.handle is not None and not torch.compiler.is_compiling() and self.state.recent is not None:
            self._to_plain()

    def _open(self, key_states: Tensor, value_states: Tensor) -> None:
        seen = self.cumulative_length
        if self._plain_keys is not None and self._plain_values is not None and self._plain_keys.numel() > 0:
            # What the stock layer forgot lies outside every later query's window: any rows do in its place.
            forgotten = seen - self._plain_keys.shape[-2]
            self._plain_keys = torch.nn.functional.pad(self._plain_keys, (0, 0, forgotten, 0))
            self._plain_values = torch.nn.functional.pad(self._plain_values, (0, 0, forgotten, 0))
        super()._open(key_states, value_states)
        self.seen = seen

    def _read(self) -> tuple[Tensor, Tensor]:
        """Return as many of the last rows as the stock layer keeps."""
        recent = None if torch.compiler.is_compiling() else self.state.recent
        if recent is None:
            parts = super()._read()
        elif recent.key is None or recent.value is None:
            batch, heads, dim, value_dim = self.sizes
            empty = torch.empty(batch, heads, 0, dim, dtype=self.dtype, device=self.device)
            parts = empty, empty.new_empty(batch, heads, 0, value_dim)
        else:
            parts = recent.key, recent.value
        first = max(0, parts[0].shape[-2] - self.sliding_window + 1)
        return parts[0][..., first:, :], parts[1][..., first:, :]

    def _to_plain(self) -> None:
        self.cumulative_length = self.seen
        super()._to_plain()


class HGACache(DynamicCache):
    """A transformers cache whose K/V live in hga's store from the first token on.

    `generate()` and `forward()` of a model compiled with backend "hga" make such layers by themselves. Passed
    as `past_key_values`, this explicit form also works with `CompileConfig(backend="hga")`, and with a model
    that is not compiled (then every layer reads all of its K/V: dense, correct, slow).

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the model.
    profile : Profile, str, path or None
        Whose `offload` says where the K/V start, and whose `compile.kernels` move them; None: environment and
        built-in default. A given one is the cache's own: what is reserved for it and kept hot stays as it
        says where the compiled model's profile has the same tier, `offload.kv_dtype` and group size.

    Raises
    ------
    ProfileError
        A profile that cannot be read.
    """

    def __init__(self, config: Any, profile: Any = None) -> None:
        options = None if profile is None else {"profile": profile}
        self.profile: Profile = resolve_profile(options)
        self.config = config
        super().__init__(config=config)
        for number, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[number] = HGALayer()
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[number] = HGASlidingLayer(sliding_window=layer.sliding_window)
        for number, layer in enumerate(self.layers):
            if isinstance(layer, _Stored):
                layer.stored = True
                layer.place = self.profile.offload
                layer.kernels = self.profile.compile.kernels
                if profile is not None:
                    routing = self.profile.routing.for_layer(number, len(self.layers))
                    layer.expected = routing.group_size, number

    def save(self, path: str | os.PathLike[str], model: str | None = None) -> None:
        """Write the cache to a file, which `load` reads in any process.

        Parameters
        ----------
        path : str or path
            The file; what is there is replaced once the new one is whole.
        model : str or None
            Name under which the weights are known; None: where the config was loaded from.

        Raises
        ------
        SnapshotError
            Nothing is stored yet, or a layer is of a kind that cannot be saved.
        StoreFullError, StoreIOError
            The file system has no room, or failed; what was at `path` is still there.
        """
        save_layers(self, os.fspath(path), self.config, model)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        config: Any,
        profile: Any = None,
        *,
        model: str | None = None,
        device: torch.device | str = "cpu",
    ) -> "HGACache":
        """Read a cache that `save` wrote; generation goes on as if it had never stopped.

        Parameters
        ----------
        path : str or path
            The file.
        config, profile
            As for a new cache: of the model, and where the K/V go.
        model : str or None
            As `save` was given it.
        device : torch.device or str
            Where the model computes.

        Raises
        ------
        SnapshotError
            A damaged file, or one of another model, revision, dtype, positions or layout.
        StoreError
            The tier has no room for it.
        """
        cache = cls(config, profile)
        load_layers(cache, os.fspath(path), config, model, torch.empty(0, device=device).device)
        return cache

    @classmethod
    def join(cls, caches: Sequence["HGACache"]) -> "HGACache":
        """Make one cache of a batch out of caches of single requests, or of smaller batches.

        Shorter requests are padded on the left, as a tokenizer pads a batch: go on with inputs that are
        padded so, and with an attention mask (see `attention_mask`). What is stored is copied, whatever tier
        it lives in; summaries are made again.

        Parameters
        ----------
        caches : sequence of HGACache
            Of requests of any length; they stay as they are.

        Returns
        -------
        HGACache
            Sequences in the order of the caches. Routing counts groups from the first column of the batch:
            requests whose lengths differ by whole groups (`routing.group_size`) are routed as by themselves,
            others get their groups cut at other tokens, as in a batch that was padded from the start.

        Raises
        ------
        JoinError
            Caches of different models, profiles, dtypes, devices or layouts, or empty ones.
        StoreError
            The tier has no room for another copy.
        """
        caches = list(caches)
        if not caches:
            raise JoinError("there must be a cache to join, got none (caches)")
        joined = cls(caches[0].config, caches[0].profile)
        join_layers(joined, caches)
        return joined

    def split(self, attention_mask: Tensor | None = None) -> list["HGACache"]:
        """Make a cache of each sequence of the batch, without the padding ahead of it.

        Parameters
        ----------
        attention_mask : Tensor or None
            ``[batch, >= tokens stored]``, 0 for padding, which must be on the left; None: the padding that
            `join` added, and no other.

        Returns
        -------
        list of HGACache
            In order; each is a copy, and this cache stays as it is.

        Raises
        ------
        JoinError
            Nothing is stored yet, or the mask does not fit.
        StoreError
            The tier has no room for another copy.
        """
        padding = self.padding
        if attention_mask is not None:
            padding = padding_of(attention_mask, len(padding), self.get_seq_length())
        parts = [type(self)(self.config, self.profile) for _ in padding]
        split_layers(self, padding, parts)
        return parts

    @property
    def padding(self) -> list[int]:
        """Tokens of padding that `join` put ahead of each sequence; empty where nothing is stored."""
        layer = next((layer for layer in self.layers if getattr(layer, "handle", None) is not None), None)
        if layer is None:
            return []
        starts = layer.state.starts
        return [0] * layer.sizes[0] if starts is None else starts.tolist()

    def attention_mask(self, new: int = 1) -> Tensor:
        """Return the mask to go on with after `join`.

        Parameters
        ----------
        new : int
            Tokens that each sequence goes on with.

        Returns
        -------
        Tensor
            ``[batch, tokens stored + new]`` int64 on the CPU, 0 for padding.
        """
        place = torch.arange(self.get_seq_length() + new, device="cpu")
        return (place >= torch.tensor(self.padding, dtype=torch.int64, device="cpu")[:, None]).long()

    @property
    def is_compileable(self) -> bool:
        """True: `CompileConfig(backend="hga")` compiles decoding with this cache."""
        return True


class CacheMemory:
    """Where the K/V of a cache lie, in bytes.

    Attributes
    ----------
    accelerator_kv : int
        Token K/V on the compute device (on a CPU without an accelerator: held as plain tensors).
    accelerator_index : int
        Summaries.
    host_kv : int
        Token K/V in host RAM.
    nvme_kv : int
        Token K/V in files.
    """

    def __init__(self, accelerator_kv: int, accelerator_index: int, host_kv: int, nvme_kv: int = 0) -> None:
        self.accelerator_kv, self.accelerator_index = accelerator_kv, accelerator_index
        self.host_kv, self.nvme_kv = host_kv, nvme_kv

    def __repr__(self) -> str:
        parts = (f"{name}={value}" for name, value in vars(self).items())
        return f"CacheMemory({', '.join(parts)})"


def cache_memory(cache: Any) -> CacheMemory:
    """Add up where the K/V of a transformers cache lie.

    Parameters
    ----------
    cache : transformers.Cache
        Any cache whose layers have `keys` and `values` or are hga's.

    Returns
    -------
    CacheMemory
        In bytes; capacity, not only what is filled.
    """
    totals = Held()
    for layer in cache.layers:
        if isinstance(layer, _Stored):
            part = layer.memory()
        else:
            plain = (getattr(layer, name, None) for name in ("keys", "values"))
            part = Held(sum(tensor.nbytes for tensor in plain if isinstance(tensor, Tensor)))
        totals = Held(*(total + more for total, more in zip(totals, part, strict=True)))
    return CacheMemory(*totals)


del ops  # imported for the registration of the ops that this module calls
