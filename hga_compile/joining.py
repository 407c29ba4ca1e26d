"""Join caches of several requests into one of a batch, and split a batch into caches of its requests.

Shorter requests get padding ahead of their first token, as a batch that is padded on the left has it; what
each one has stored is copied, a layer and a piece at a time, whatever tier it lives in.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from hga_compile.configs.profile import Kernels
from hga_compile.kernels.index import MeanQuery
from hga_compile.saving import cuts, model_key
from hga_compile.store import LayerStore
from hga_compile.store.errors import JoinError
from hga_compile.store.recent import Recent

__all__ = ["join_layers", "padding_of", "split_layers"]


@torch.inference_mode(False)
@torch.no_grad()
def join_layers(joined: Any, caches: Sequence[Any]) -> None:
    """Fill the layers of an empty cache with what several caches have stored, one after the other.

    Parameters
    ----------
    joined : HGACache
        An empty one, of the model and profile of the others.
    caches : sequence of HGACache
        They stay as they are.

    Raises
    ------
    JoinError
        They are not of one model, profile, dtype, device and layout, or one is empty.
    StoreError
        The tier has no room for another copy.
    """
    _check(caches)
    filled = []
    try:
        for number in range(len(joined.layers)):
            layers = [cache.layers[number] for cache in caches]
            state = _empty(joined, number)
            filled.append(state)
            _join(state, layers, joined.profile.compile.kernels)
    except BaseException:
        _close(filled)
        raise
    for layer, state, like in zip(joined.layers, filled, caches[0].layers, strict=True):
        layer.restore(state, (state.batch, *like.sizes[1:]), state.length, like.dtype, like.device)


@torch.inference_mode(False)
@torch.no_grad()
def split_layers(cache: Any, padding: Sequence[int], parts: Sequence[Any]) -> None:
    """Fill an empty cache for each sequence with what a batch has stored, without its padding.

    Parameters
    ----------
    cache : HGACache
        It stays as it is.
    padding : sequence of int
        Tokens of padding ahead of each sequence.
    parts : sequence of HGACache
        Empty ones, of the same model and profile.

    Raises
    ------
    JoinError
        Nothing is stored yet.
    StoreError
        The tier has no room for another copy.
    """
    _check([cache])
    if any(skip >= layer.seen for layer in cache.layers for skip in padding):
        raise JoinError(f"each sequence must hold a token to be split, got padding of {list(padding)} tokens")
    filled: list[list[LayerStore]] = []
    try:
        for number, layer in enumerate(cache.layers):
            filled.append([_empty(cache, number) for _ in parts])
            _split(layer, padding, filled[-1], cache.profile.compile.kernels)
    except BaseException:
        _close([state for states in filled for state in states])
        raise
    for place, part in enumerate(parts):
        for layer, states, like in zip(part.layers, filled, cache.layers, strict=True):
            state = states[place]
            layer.restore(state, (1, *like.sizes[1:]), state.length, like.dtype, like.device)


def padding_of(attention_mask: Tensor, batch: int, tokens: int) -> list[int]:
    """Return how many tokens of padding a mask has ahead of each sequence.

    Parameters
    ----------
    attention_mask : Tensor
        ``[batch, >= tokens]``, 0 for padding.
    batch, tokens : int
        Of the cache.

    Raises
    ------
    JoinError
        Another shape, padding that is not ahead of a sequence, or a sequence of nothing else.
    """
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < tokens:
        raise JoinError(
            f"attention_mask must cover what is stored, got {list(attention_mask.shape)}, expected "
            f"[{batch}, {tokens}] (the mask of the whole sequence)"
        )
    mask = attention_mask[:, :tokens].bool().cpu()
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask.any(1).all()):
        raise JoinError(
            "sequences must be padded on the left, and hold a token each, to be split, got a mask with "
            "padding elsewhere (attention_mask)"
        )
    return (~mask).sum(1).tolist()


def _empty(cache: Any, number: int) -> LayerStore:
    place, routing = cache.profile.offload, cache.profile.routing
    state = LayerStore(place.home, place)
    state.expect(routing.for_layer(number, len(cache.layers)).group_size, number)
    return state


def _close(states: Sequence[LayerStore]) -> None:
    for state in states:
        state.close()


def _join(state: LayerStore, layers: Sequence[Any], kernels: Kernels) -> None:
    sources = [layer.state for layer in layers]
    batches = [layer.sizes[0] for layer in layers]
    length = max(layer.seen for layer in layers)
    ahead = [length - layer.seen for layer in layers]
    if sources[0].recent is not None:
        state.recent = _joined_window(layers)
    else:
        _join_pages(state, layers, ahead, kernels)
    starts = [
        skip
        + (torch.zeros(batch, dtype=torch.int64, device="cpu") if source.starts is None else source.starts)
        for source, batch, skip in zip(sources, batches, ahead, strict=True)
    ]
    state.batch, state.length = sum(batches), length
    state.starts = torch.cat(starts) if any(bool(part.any()) for part in starts) else None
    state.noted = _noted(sources, [batch * layers[0].sizes[1] for batch in batches], length)


def _join_pages(state: LayerStore, layers: Sequence[Any], ahead: Sequence[int], kernels: Kernels) -> None:
    heads, dim, v_dim = layers[0].sizes[1:]
    batch, length = sum(layer.sizes[0] for layer in layers), ahead[0] + layers[0].seen
    like = torch.empty(0, dtype=layers[0].dtype, device=layers[0].device)
    for begin, end in cuts(length, batch * heads * (dim + v_dim) * like.dtype.itemsize):
        key, value = (like.new_zeros(batch * heads, end - begin, size) for size in (dim, v_dim))
        row = 0
        for layer, skip in zip(layers, ahead, strict=True):
            rows, start = slice(row, row + layer.sizes[0] * heads), max(begin, skip)
            if start < end:
                read = layer.state.pages.read(start - skip, end - skip)
                key[rows, start - begin :], value[rows, start - begin :] = read
            row = rows.stop
        state.put(key.unflatten(0, (batch, heads)), value.unflatten(0, (batch, heads)), end, kernels)


def _joined_window(layers: Sequence[Any]) -> Recent:
    """Put windows beside each other: what is ahead of a shorter one is padding, or out of every reach."""
    windows = [layer.state.recent for layer in layers]
    most, length = max(part.key.shape[2] for part in windows), max(layer.seen for layer in layers)
    key, value = (
        torch.cat([pad(part, (0, 0, most - part.shape[2], 0)) for part in parts])
        for parts in ([part.key for part in windows], [part.value for part in windows])
    )
    return Recent.of(windows[0].window, key, value, length)


def _noted(sources: Sequence[LayerStore], rows: Sequence[int], length: int) -> MeanQuery | None:
    found = [source.queries for source in sources]
    like = next((queries for queries in found if queries is not None), None)
    if like is None:
        return None
    # A request that no query was noted of begins with none.
    total = [
        like.total.new_zeros(count, *like.total.shape[1:]) if queries is None else queries.total
        for queries, count in zip(found, rows, strict=True)
    ]
    count = [
        like.count.new_zeros(number) if queries is None else queries.count
        for queries, number in zip(found, rows, strict=True)
    ]
    return MeanQuery(torch.cat(total), torch.cat(count), length)


def _split(layer: Any, padding: Sequence[int], states: Sequence[LayerStore], kernels: Kernels) -> None:
    source, (_, heads, dim, v_dim) = layer.state, layer.sizes
    if source.recent is None:
        for begin, end in cuts(layer.seen, source.batch * heads * (dim + v_dim) * layer.dtype.itemsize):
            key, value = (part.unflatten(0, (-1, heads)) for part in source.pages.read(begin, end))
            for number, (state, skip) in enumerate(zip(states, padding, strict=True)):
                if skip < end:
                    own = slice(number, number + 1), slice(None), slice(max(0, skip - begin), None)
                    state.put(key[own], value[own], end - skip, kernels)
    for number, (state, skip) in enumerate(zip(states, padding, strict=True)):
        state.batch, state.length = 1, layer.seen - skip
        if source.recent is not None:
            state.recent = _own_window(source.recent, number, state.length)
        if source.queries is not None:
            rows = torch.arange(number * heads, (number + 1) * heads, device="cpu")
            state.noted = replace(source.queries.select_rows(rows), end=state.length)


def _own_window(recent: Recent, number: int, length: int) -> Recent:
    assert recent.key is not None and recent.value is not None  # something is stored
    begin = max(0, recent.key.shape[2] - length)
    key, value = (part[number : number + 1, :, begin:].clone() for part in (recent.key, recent.value))
    return Recent.of(recent.window, key, value, length)


def _check(caches: Sequence[Any]) -> None:
    """Refuse caches that do not fit together, or hold nothing."""
    if not caches:
        raise JoinError("there must be a cache to join, got none (caches)")
    first = caches[0]
    for place, cache in enumerate(caches):
        for number, layer in enumerate(cache.layers):
            if getattr(layer, "handle", None) is None or layer.seen == 0:
                raise JoinError(
                    f"layer {number} of cache {place} must keep its K/V in a store, got "
                    f"{type(layer).__name__} without any; run the model on the HGACache first"
                )
        for what, got, expected, knob in _facts(cache, first):
            if got != expected:
                raise JoinError(
                    f"caches must be of one {what} to be joined, got {got!r} for cache {place}, expected "
                    f"{expected!r} as for cache 0 ({knob})"
                )


def _facts(cache: Any, first: Any) -> list[tuple[str, Any, Any, str]]:
    """Return what must be the same: its name, that of the one and of the other, the knob."""
    facts: list[tuple[str, Any, Any, str]] = [
        (f"model ({name})", got, model_key(first.config, None)[name], "config")
        for name, got in model_key(cache.config, None).items()
    ]
    profile, other = cache.profile.model_dump(), first.profile.model_dump()
    facts += [(f"profile ({name})", profile[name], other[name], name) for name in profile]
    facts.append(("number of layers", len(cache.layers), len(first.layers), "config"))
    for number, (layer, like) in enumerate(zip(cache.layers, first.layers, strict=False)):
        window, expected = (
            None if each.state.recent is None else each.state.recent.window for each in (layer, like)
        )
        facts += [
            (f"window of layer {number}", window, expected, "run all of them compiled, or none"),
            (f"shape of layer {number}", layer.sizes[1:], like.sizes[1:], "tensor parallelism, config"),
            (f"dtype of layer {number}", layer.dtype, like.dtype, "dtype of from_pretrained"),
            (f"device of layer {number}", layer.device, like.device, "device_map"),
        ]
    return facts
