"""The state of one layer of one cache: its pages and its index."""

import torch
from torch import Tensor

from hga_compile.configs.profile import Kernels, Offload
from hga_compile.kernels.attend import attend_window
from hga_compile.kernels.call import Padding
from hga_compile.kernels.device_step import current_step
from hga_compile.kernels.index import LayerIndex, MeanQuery
from hga_compile.kernels.routed import routed_attention
from hga_compile.kernels.scoring import PLAIN, Scoring
from hga_compile.kernels.site import SiteConfig
from hga_compile.kernels.states import STATES
from hga_compile.kernels.stretch import room_of
from hga_compile.store.joined import Joined
from hga_compile.store.lasting import lasting
from hga_compile.store.recent import Recent, check_pair
from hga_compile.store.stepping import attend_at
from hga_compile.store.storage_io import StorageIO
from hga_compile.store.tier import Held, Home, Tier
from hga_compile.store.tiers import is_at, make_tier, moved

__all__ = ["LayerStore"]

# Page size of K/V that no routed site has asked for yet.
_PLAIN_GROUP = 64


class LayerStore:
    """Pages and index of one layer (a `kernels.states.LayerState`).

    The first rows fix batch, heads, channels, dtype and device; the first routed site page size and tier.

    Parameters
    ----------
    tier : {"gpu", "host", "nvme"} or None
        Where pages live before a routed site says so; None: with the K/V.
    place : Offload
        Budgets and sizes of the tier, before a routed site says so.
    io : StorageIO or None
        File system of the `nvme` tier; None: the operating system's.
    """

    def __init__(
        self, tier: Home | None = None, place: Offload | None = None, io: StorageIO | None = None
    ) -> None:
        self.length = 0
        self.version = 0
        """Grows with every change but those of `stepping.stepped`, which leave everything where it lies."""
        self.pages: Tier | None = None
        self.index: LayerIndex | None = None
        self.recent: Recent | None = None
        """The window of a sliding layer, in place of pages."""
        self.batch = 0
        self.tier = tier
        self.place = Offload() if place is None else place
        self.io = io
        self.noted: MeanQuery | None = None
        """Mean of the first queries of K/V that were saved; an index that is made for them begins with it."""
        self.starts: Tensor | None = None
        """First real token of each sequence, ``[batch]`` int64 on the CPU; None: 0, or as masks say alone."""
        self._group_size = _PLAIN_GROUP
        self._layer = 0

    @lasting
    def put(self, key: Tensor, value: Tensor, length: int, kernels: Kernels = "auto") -> None:
        """Store rows as the last ones of `length` tokens; what was stored behind them is forgotten.

        Parameters
        ----------
        key, value : Tensor
            ``[batch, kv_heads, n, dim]`` and ``[..., v_dim]``.
        length : int
            Tokens stored once these are in.
        kernels : {"auto", "triton", "native", "reference"}
            What moves the rows.

        Raises
        ------
        RuntimeError
            Rows that would leave a gap, or whose shape, dtype or device differs from what is stored.
        StoreError
            The tier has no room, or its files failed: the rows before these are still there.
        """
        batch, heads, new, dim = key.shape
        begin = length - new
        self.version += 1
        if self.recent is not None:
            raise RuntimeError(
                f"a layer that keeps only its window of {self.recent.window} tokens cannot give back all of "
                "them; start with a new cache"
            )
        if begin > self.length or begin < 0:
            raise _gap(begin, length, self.length)
        check_pair(key, value)
        if self.pages is None:
            self.batch = batch
            shape = (batch * heads, dim, value.shape[3], self._group_size)
            home: Home = "gpu" if self.tier is None else self.tier
            self.pages = make_tier(
                home, shape, key.dtype, key.device, "auto", self.place, self._layer, self.io
            )
        if kernels != self.pages.kernels:
            self.pages.use(kernels)
        self.check_rows(key, value)
        self.truncate(begin)
        self.pages.write(key.detach().flatten(0, 1), value.detach().flatten(0, 1), begin)
        self.length = length

    def full(self) -> tuple[Tensor, Tensor]:
        """Return all K and V as ``[batch, kv_heads, length, dim]``, contiguous, on the compute device."""
        if self.recent is not None:
            raise RuntimeError(
                f"a layer that keeps only its window of {self.recent.window} tokens cannot give back all"
            )
        if self.pages is None:
            raise RuntimeError("no K/V is stored yet: append before reading")
        key, value = self.pages.read(0, self.length)
        return key.unflatten(0, (self.batch, -1)), value.unflatten(0, (self.batch, -1))

    @lasting
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        key_mask: Tensor | None,
        scale: float,
        site: SiteConfig,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """Store new rows, then routed attention of the last queries (see `kernels.routed`)."""
        step = current_step()
        if step is not None:
            return attend_at(self, step, query, key, value, scale, site, scoring)
        if self.pages is None:
            # The first rows are stored where the site wants them, not moved there afterwards.
            self.tier, self.place, self._layer = site.tier, site.place, site.layer
            self._group_size = site.routing.group_size
        self._check_padding(key_mask, length)
        self.put(key, value, length, site.kernels)
        pages, index = self._settle(site)
        source = Joined(pages, key.detach().flatten(0, 1), value.detach().flatten(0, 1), length)
        return routed_attention(
            query, source, index, length, key_mask, scale, site.routing, site.layer, scoring, site.kernels
        )

    @lasting
    def attend_window(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        length: int,
        key_mask: Tensor | None,
        scale: float,
        window: int,
        scoring: Scoring = PLAIN,
    ) -> Tensor:
        """Store new rows, attend exactly within the window, forget what no later query can see."""
        batch, heads, new, _ = key.shape
        begin = length - new
        if query.shape[:3:2] != (batch, new) or query.shape[1] % heads:
            raise RuntimeError(
                f"queries must be the new rows' own and their heads a multiple of the KV heads, got "
                f"{list(query.shape[:3])} queries and {list(key.shape[:3])} K/V rows"
            )
        if key_mask is not None and key_mask.shape[1] < length:
            raise ValueError(
                f"key_mask must cover every key, got {key_mask.shape[1]} columns and {length} tokens "
                "(pass the attention_mask of the whole sequence)"
            )
        if begin > self.length or begin < 0:
            raise _gap(begin, length, self.length)
        self._check_padding(key_mask, length)
        if self.recent is None:
            # Rows that an honest append stored before become the first window.
            start = max(0, begin - window + 1)
            past = None if self.pages is None or start == begin else self.pages.read(start, begin)
            if self.pages is not None:
                self.pages.close()
            self.pages = self.index = None
            self.recent = Recent(window)
            self.recent.length = start if past is not None else begin
            if past is not None:
                old_key, old_value = (part.unflatten(0, (batch, heads)) for part in past)
                self.recent.put(old_key, old_value, begin)
        self.batch = batch
        keys, values = self.recent.put(key.detach(), value.detach(), length)
        self.length = length
        first = length - keys.shape[2]
        mask = None if key_mask is None else key_mask[:batch, first:length].bool()
        grouped = query.reshape(batch, heads, -1, new, query.shape[3])
        assert first <= max(0, begin - window + 1)  # Recent.put checked it
        out = attend_window(grouped, keys, values, mask, scale, window, scoring)
        return out.reshape(batch, -1, new, values.shape[3])

    def truncate(self, length: int) -> None:
        """Forget tokens from number `length` on.

        Raises
        ------
        RuntimeError
            A sliding layer that has forgotten tokens which would be visible again.
        """
        self.version += 1
        if length < self.length:
            if self.recent is not None:
                self.recent.truncate(length)
            self.length = length
            self.noted = self.noted if length else None
            self.starts = self.starts.clamp(max=length) if length and self.starts is not None else None
            if self.index is not None:
                self.index.truncate(length)
            if self.pages is not None:
                self.pages.truncate(length)

    @lasting
    def select_batch(self, index: Tensor) -> None:
        """Replace the sequences of the batch by those of `index` (int64): reorder, repeat, select."""
        self.version += 1
        if self.starts is not None:
            self.starts = self.starts[index.to("cpu")]
        if self.recent is not None:
            self.recent.select_batch(index)
        if self.pages is None:
            return
        index = index.to("cpu")
        heads = self.pages.rows // self.batch
        rows = (index[:, None] * heads + torch.arange(heads, device="cpu")).flatten()
        self.pages.select_rows(rows)
        if self.index is not None:
            self.index.select_rows(rows)
        self.noted = None if self.noted is None else self.noted.select_rows(rows)
        self.batch = len(index)

    @lasting
    def clone(self) -> "LayerStore":
        """Return an independent copy; its index is made anew when it is needed."""
        other = LayerStore(self.tier, self.place, self.io)
        other.length, other.batch = self.length, self.batch
        other._group_size, other._layer = self._group_size, self._layer
        other.pages = None if self.pages is None else self.pages.clone()
        other.index = None if self.index is None else self.index.emptied()
        other.recent = None if self.recent is None else self.recent.clone()
        other.noted, other.starts = self.noted, self.starts
        return other

    def close(self) -> None:
        """Give all K/V up at once; nothing may be asked afterwards."""
        self.version += 1
        pages, self.pages = self.pages, None
        self.index = self.recent = None
        if pages is not None:
            pages.close()

    @property
    def queries(self) -> MeanQuery | None:
        """Mean of the first queries, as far as routing wants it."""
        return self.noted if self.index is None else self.index.queries

    def expect(self, group_size: int, layer: int) -> None:
        """Store the first rows as a site of this group size and layer will want them."""
        self._group_size, self._layer = group_size, layer

    def nbytes(self) -> Held:
        """Return the bytes that K/V and index take, by place."""
        index = 0 if self.index is None else self.index.nbytes()
        if self.recent is not None:
            return Held(self.recent.nbytes(), index)
        held = Held() if self.pages is None else self.pages.held()
        return held._replace(summaries=index)

    def _settle(self, site: SiteConfig) -> tuple[Tier, LayerIndex]:
        """Bring page size, tier and index in line with the site that reads them."""
        if self.pages is None:
            raise RuntimeError("no K/V is stored yet: append before attending")
        size = site.routing.group_size
        if self.pages.group_size != size or not is_at(self.pages, site.tier, site.place):
            self.tier, self.place, self._layer = site.tier, site.place, site.layer
            former = self.pages
            self.pages = moved(former, site.tier, size, self.length, site.place, site.layer, self.io)
            former.close()
        index = self.index
        if index is None or index.routing != site.routing or index.kernels != site.kernels:
            room = room_of(self.place.reserve_tokens)
            index = self.index = LayerIndex(site.routing, site.kernels, room)
            index.queries = self.noted
        return self.pages, index

    def _check_padding(self, key_mask: Tensor | None, length: int) -> None:
        """Refuse a mask that shows what was put ahead of shorter requests when they were joined."""
        if self.starts is None:
            return
        padding = Padding.of(key_mask, length)
        shown = self.starts if padding is None else self.starts - padding.starts.flatten()
        if bool((shown > 0).any()):
            raise RuntimeError(
                f"the mask must hide {self.starts.tolist()} tokens of padding ahead of the requests that "
                f"were joined, got {'none' if padding is None else 'one that shows some of them'}; "
                "pass attention_mask (HGACache.attention_mask makes one)"
            )

    def check_rows(self, key: Tensor, value: Tensor) -> None:
        """Refuse rows whose shape, dtype or device differs from what is stored."""
        assert self.pages is not None  # put made them
        pages = self.pages
        got = (key.shape[0], key.shape[0] * key.shape[1], key.shape[3], value.shape[3], key.dtype, key.device)
        expected = (self.batch, pages.rows, pages.dim, pages.v_dim, pages.dtype, pages.compute)
        if got != expected:
            names = ("batch", "batch * KV heads", "key channels", "value channels", "dtype", "device")
            wrong = [
                f"{n} {g} (expected {e})" for n, g, e in zip(names, got, expected, strict=True) if g != e
            ]
            raise RuntimeError(f"K/V rows must match what is stored, got {', '.join(wrong)}")


def _gap(begin: int, length: int, stored: int) -> RuntimeError:
    return RuntimeError(
        f"K/V rows must follow on what is stored, got rows {begin} to {length} with {stored} stored; "
        "the cache and the model's own count of tokens differ"
    )


STATES.make = LayerStore
