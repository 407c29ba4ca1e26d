"""Save a cache to a file, and load it in another process: a prefix is read once and used again.

The file holds K/V and what they depend on; summaries are made again from the K/V. It is refused for another
model, revision, dtype or positions than it was made with, as K/V of one model are noise to another.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hga_compile.kernels.index import MeanQuery
from hga_compile.kernels.states import STATES
from hga_compile.store import LayerStore
from hga_compile.store.errors import SnapshotError
from hga_compile.store.recent import Recent
from hga_compile.store.snapshot import DTYPES, Entry, SnapshotReader, SnapshotWriter
from hga_compile.store.storage_io import StorageIO

__all__ = ["cuts", "load_layers", "model_key", "save_layers"]

FORMAT = 1
# Bytes of K/V that are on their way at once.
_PIECE = 2**24
# What a config holds beside what decides K/V.
_VOLATILE = {
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_internal",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}


def save_layers(cache: Any, path: str, config: Any, model: str | None, io: StorageIO | None = None) -> None:
    """Write the layers of a cache to a file.

    Parameters
    ----------
    cache : HGACache
        Whose layers are saved; it stays as it is.
    path : str
        The file; what is there is replaced once the new one is whole.
    config : transformers.PretrainedConfig
        Of the model.
    model : str or None
        Name under which the weights are known; None: where they were loaded from.
    io : StorageIO or None
        The file system; None: the operating system's.

    Raises
    ------
    SnapshotError
        Nothing is stored yet, or a layer is of a kind that cannot be saved.
    StoreFullError, StoreIOError
        The file system has no room, or failed.
    """
    entries: dict[str, Entry] = {}
    layers, states = [], []
    for number, layer in enumerate(cache.layers):
        if getattr(layer, "handle", None) is None:
            raise SnapshotError(
                f"layer {number} must keep its K/V in a store to be saved, got {type(layer).__name__} "
                f"{'without one' if hasattr(layer, 'handle') else ''}; run the model on the HGACache first"
            )
        if layer.dtype not in DTYPES.values():
            raise SnapshotError(f"K/V must be of a common floating-point type to be saved, got {layer.dtype}")
        state = layer.state
        batch, heads, dim, v_dim = layer.sizes
        window = state.recent is not None
        length = _rows(state)
        layers.append(
            {
                "kind": "window" if window else "pages",
                "window": state.recent.window if window else 0,
                "seen": layer.seen,
                "sizes": list(layer.sizes),
                "queries": None if state.queries is None else state.queries.end,
                "starts": None if state.starts is None else state.starts.tolist(),
            }
        )
        states.append(state)
        for name, channels in (("key", dim), ("value", v_dim)):
            entries[f"layers.{number}.{name}"] = Entry(layer.dtype, (length, batch * heads, channels))
        if state.queries is not None:
            total, count = state.queries.total, state.queries.count
            entries[f"layers.{number}.queries"] = Entry(torch.float32, tuple(total.shape))
            entries[f"layers.{number}.counts"] = Entry(torch.int64, tuple(count.shape))
    facts = {"format": FORMAT, "key": model_key(config, model), "layers": layers}
    with SnapshotWriter(path, entries, facts, StorageIO() if io is None else io) as writer:
        for number, state in enumerate(states):
            for key, value in _pieces(state):
                writer.write(f"layers.{number}.key", key.transpose(0, 1))
                writer.write(f"layers.{number}.value", value.transpose(0, 1))
            if state.queries is not None:
                writer.write(f"layers.{number}.queries", state.queries.total)
                writer.write(f"layers.{number}.counts", state.queries.count)


def load_layers(
    cache: Any, path: str, config: Any, model: str | None, device: torch.device, io: StorageIO | None = None
) -> None:
    """Fill the layers of an empty cache from a file.

    Parameters
    ----------
    cache : HGACache
        An empty one, whose profile says where the K/V go.
    path, config, model
        As for `save_layers`.
    device : torch.device
        Where the model computes.
    io : StorageIO or None
        The file system; None: the operating system's.

    Raises
    ------
    SnapshotError
        A damaged file, or one of another model, revision, dtype, or layout.
    StoreError
        The tier has no room for it.
    """
    place, routing = cache.profile.offload, cache.profile.routing
    with SnapshotReader(path, StorageIO() if io is None else io) as reader:
        layers = _checked(reader, cache, config, model)
        STATES.collect()
        states = []
        try:
            for number, about in enumerate(layers):
                state = LayerStore(place.home, place)
                states.append(state)
                size = routing.for_layer(number, len(layers)).group_size
                _fill(state, reader, number, about, device, size, cache.profile.compile.kernels)
        except BaseException:
            for state in states:
                state.close()
            raise
    dtype = reader.entries["layers.0.key"].dtype
    for layer, state, about in zip(cache.layers, states, layers, strict=True):
        layer.restore(state, tuple(about["sizes"]), about["seen"], dtype, device)


def _fill(
    state: LayerStore,
    reader: SnapshotReader,
    number: int,
    about: dict[str, Any],
    device: torch.device,
    group_size: int,
    kernels: Any,
) -> None:
    batch, heads, _, _ = about["sizes"]
    names = [f"layers.{number}.{name}" for name in ("key", "value")]
    rows = reader.entries[names[0]].shape[0]
    state.expect(group_size, number)
    lines = max(1, _PIECE // max(1, sum(reader.entries[name].nbytes for name in names) // max(1, rows)))
    begin = about["seen"] - rows
    if about["kind"] == "window":
        state.recent = Recent(about["window"])
        state.recent.length = state.length = begin
    for parts in zip(*(reader.pieces(name, lines) for name in names), strict=True):
        key, value = (part.transpose(0, 1).unflatten(0, (batch, heads)).to(device) for part in parts)
        begin += key.shape[2]
        if about["kind"] == "window":
            # All at once: a window that is put together from pieces would lose its first ones.
            state.recent = _window(about["window"], state.recent, key, value, begin)
        else:
            state.put(key, value, begin, kernels)
    state.batch, state.length = batch, about["seen"]
    if about.get("starts") is not None:
        state.starts = torch.tensor(about["starts"], dtype=torch.int64, device="cpu")
    if about["queries"] is not None:
        total, count = (reader.whole(f"layers.{number}.{name}").to(device) for name in ("queries", "counts"))
        state.noted = MeanQuery(total, count, about["queries"])


def _window(window: int, former: Recent | None, key: Tensor, value: Tensor, length: int) -> Recent:
    if former is not None and former.key is not None and former.value is not None:
        key, value = torch.cat([former.key, key], 2), torch.cat([former.value, value], 2)
    return Recent.of(window, key.contiguous(), value.contiguous(), length)


def _rows(state: LayerStore) -> int:
    if state.recent is None:
        return state.length
    return 0 if state.recent.key is None else state.recent.key.shape[2]


def _pieces(state: LayerStore) -> Iterator[tuple[Tensor, Tensor]]:
    """K and V as ``[rows, n, dim]``, in order."""
    if state.recent is not None:
        if state.recent.key is not None and state.recent.value is not None:
            yield state.recent.key.flatten(0, 1), state.recent.value.flatten(0, 1)
    elif state.pages is not None:
        pages = state.pages
        for begin, end in cuts(state.length, pages.rows * (pages.dim + pages.v_dim) * pages.dtype.itemsize):
            yield pages.read(begin, end)


def cuts(tokens: int, token_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut tokens into pieces of which one may be on its way at once: begin and end of each."""
    step = max(1, _PIECE // token_bytes)
    for begin in range(0, tokens, step):
        yield begin, min(tokens, begin + step)


def model_key(config: Any, model: str | None) -> dict[str, Any]:
    """Return what K/V depend on, as JSON holds it."""
    text = config.get_text_config()
    known = json.loads(json.dumps(text.to_dict(), sort_keys=True, default=str))
    rope = {name: value for name, value in known.items() if "rope" in name or "rotary" in name}
    rest = {name: value for name, value in known.items() if name not in _VOLATILE and name not in rope}
    return {
        "model": model or getattr(config, "_name_or_path", None) or "",
        "revision": getattr(config, "_commit_hash", None),
        "config": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()[:16],
        "rope": rope,
        # As it was asked for; rows of another one are refused by the store that they are added to.
        "dtype": str(known.get("dtype")).removeprefix("torch."),
    }


def _checked(reader: SnapshotReader, cache: Any, config: Any, model: str | None) -> list[dict[str, Any]]:
    """Return what the file says of its layers, if they are this model's."""
    facts = reader.facts
    if facts.get("format") != FORMAT:
        raise _refused(reader.path, "format", facts.get("format"), FORMAT, "save it anew")
    layers: list[dict[str, Any]] = facts["layers"]
    if len(layers) != len(cache.layers):
        raise _refused(reader.path, "number of layers", len(layers), len(cache.layers), "config")
    knobs = {"model": "model", "revision": "revision of from_pretrained", "dtype": "dtype of from_pretrained"}
    for name, value in model_key(config, model).items():
        if facts["key"].get(name) != value:
            raise _refused(reader.path, name, facts["key"].get(name), value, knobs.get(name, "config"))
    for number, (about, layer) in enumerate(zip(layers, cache.layers, strict=True)):
        sliding = getattr(layer, "slides", None)
        if sliding is None:
            raise _refused(
                reader.path, f"kind of layer {number}", about["kind"], type(layer).__name__, "config"
            )
        window = about["window"] if about["kind"] == "window" else None
        if window is not None and (not sliding or layer.sliding_window != window):
            raise _refused(reader.path, f"window of layer {number}", window, None, "config")
        batch, heads, dim, v_dim = about["sizes"]
        for name, channels in (("key", dim), ("value", v_dim)):
            found = reader.entries.get(f"layers.{number}.{name}")
            rows = found.shape[0] if found is not None else -1
            good = rows == about["seen"] if window is None else 0 <= rows <= about["seen"]
            if found is None or found.shape[1:] != (batch * heads, channels) or not good:
                shape = None if found is None else found.shape
                raise _refused(reader.path, f"{name}s of layer {number}", shape, about["sizes"], "path")
    return layers


def _refused(path: str, what: str, got: object, expected: object, knob: str) -> SnapshotError:
    return SnapshotError(
        f"{path} was saved for another {what}, got {got!r}, expected {expected!r} ({knob}): K/V of one "
        "model are noise to another"
    )
