"""A layer in decode steps whose position the GPU knows (`kernels.device_step`), which are replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hga_compile.kernels.call import Call
from hga_compile.kernels.device_step import DeviceStep, NotReplayed, StepCosts, attend_step, unfit
from hga_compile.kernels.ledger import LEDGER
from hga_compile.kernels.lowbit import LowBitSummary
from hga_compile.kernels.scoring import Scoring
from hga_compile.kernels.site import SiteConfig
from hga_compile.store.fp8_pages import Fp8Pages
from hga_compile.store.joined import Joined
from hga_compile.store.lasting import lasting
from hga_compile.store.tiers import is_at

if TYPE_CHECKING:
    from hga_compile.store.layer import LayerStore

__all__ = ["attend_at", "costs", "prepare", "stepped"]


@lasting
def prepare(layer: LayerStore, step: DeviceStep, site: SiteConfig) -> None:
    """Make room for the tokens of a `DeviceStep`, and bring the index up to date.

    Raises
    ------
    NotReplayed
        K/V or index are not as a site that was routed on a GPU leaves them.
    StoreError
        The tier has no room.
    """
    pages, index, size = layer.pages, layer.index, site.routing.group_size
    if pages is None or index is None or layer.recent is not None or layer.length != step.first:
        raise NotReplayed("a layer that has not been routed yet")
    settled = pages.group_size == size and is_at(pages, site.tier, site.place)
    if not settled or (index.routing, index.kernels) != (site.routing, site.kernels):
        raise NotReplayed("a layer whose settings have changed")
    if isinstance(pages, Fp8Pages):
        raise NotReplayed("K/V in 8 bits (offload.kv_dtype)")
    if pages.gpu_pages is None or not isinstance(index.groups, LowBitSummary):
        raise NotReplayed("K/V or summaries that kernels of the GPU cannot read where they lie")
    layer.version += 1
    pages.reserve(step.last)
    done = index.groups.groups * size
    if not layer.length - size < done <= layer.length:
        raise NotReplayed("an index that is not up to date")
    centres = index.groups.centres
    if centres is not None:
        # Tokens of a group that is not complete may be of a block that none has been coded of.
        first, last = centres.missing(layer.length)
        if first < last:
            centres.append(pages.read(first, last)[0], None)
        centres.reserve(step.last)
    index.groups.reserve(pages.read(done, layer.length)[0], step.last)


def attend_at(
    layer: LayerStore,
    step: DeviceStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    site: SiteConfig,
    scoring: Scoring,
) -> Tensor:
    """Store new rows and attend at the position that `step` is at; `stepped` counts them.

    Parameters
    ----------
    layer : LayerStore
        That `prepare` has made ready.
    step : DeviceStep
        The step.
    query, key, value, scale, site, scoring
        As `LayerStore.attend` takes them: one new row a sequence.

    Raises
    ------
    NotReplayed
        The call needs what such a step does not do.
    """
    assert layer.pages is not None and layer.index is not None  # prepared
    layer.check_rows(key, value)
    batch, heads, _, dim = key.shape
    grouped = query.reshape(batch, heads, -1, 1, dim)
    key, value = key.detach().flatten(0, 1), value.detach().flatten(0, 1)
    source, use = Joined(layer.pages, key, value, step.last), LEDGER.use(site.layer, "decode")
    call = Call(
        grouped, source, layer.index, step.last, None, scale, site.routing, site.layer, use, scoring,
        site.kernels,
    )  # fmt: skip
    reason = unfit(call, step)
    if reason is not None:
        raise NotReplayed(reason)
    return attend_step(call, key, value, step).reshape(batch, -1, 1, value.shape[2])


def stepped(layer: LayerStore, length: int) -> None:
    """Count a token that a run of a `DeviceStep` has stored, as the last of `length`."""
    assert layer.pages is not None and layer.index is not None and layer.index.groups is not None  # prepared
    layer.length = length
    layer.index.groups.groups = length // layer.pages.group_size
    if layer.index.groups.centres is not None:
        layer.index.groups.centres.know(length)
    _ = layer.pages.gpu_pages  # which kernels are at work on


def costs(layer: LayerStore) -> StepCosts:
    """Return what replayed steps of a layer are counted by."""
    assert layer.pages is not None and layer.index is not None  # prepared
    return StepCosts(layer.pages.rows, layer.batch, layer.index.bytes_per_token(), layer.pages.row_bytes)
