"""Decide: what may be rewritten, and why the rest stays as it is."""

from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from hga_compile.configs.routing import Routing
from hga_compile.passes.decision import Decision, Reason
from hga_compile.passes.index_algebra import lookups
from hga_compile.passes.mask_proof import MaskProof, prove_mask
from hga_compile.passes.mask_values import MaskValues
from hga_compile.passes.match import Site

__all__ = ["Plan", "decide"]


@dataclass(frozen=True)
class Plan:
    """How one site is rewritten."""

    site: Site
    decision: Decision
    padding: Node | None = None
    """Table ``[batch, >= keys]``, not zero for real tokens."""
    single_query_mask: Node | None = None
    """Mask ``[batch or 1, 1, 1, keys]`` of one query: it is a padding table as it is."""
    window: int | None = None


def decide(site: Site, layer: int, layers: int, routing: Routing, values: MaskValues) -> Plan:
    """Decide about one site.

    Parameters
    ----------
    site : Site
        As matched.
    layer, layers : int
        Its layer's number and the number of layers, for per-layer settings.
    routing : Routing
        Of the profile.
    values : MaskValues
        Formulas of the graph's nodes.

    Returns
    -------
    Plan
        Its decision says whether the site is rewritten.
    """

    def verdict(reason: Reason, detail: str = "") -> Decision:
        return Decision(site.node.name, site.layer, site.phase, reason, detail)

    shape = _check_shape(site)
    if shape is not None:
        return Plan(site, verdict(Reason.SHAPE, shape))
    if not (isinstance(site.dropout, (int, float)) and site.dropout == 0):
        return Plan(site, verdict(Reason.DROPOUT, f"p = {site.dropout}"))
    if site.weights_used:
        return Plan(site, verdict(Reason.WEIGHTS_USED))
    one_query = site.phase == "decode"
    if site.append is None and one_query:
        return Plan(site, verdict(Reason.SINGLE_QUERY, _source_of(site.key)))
    if site.append is not None:
        new = site.append.args[0].meta["val"].shape[2]  # type: ignore[union-attr]
        if not statically_known_true(new == site.queries):
            return Plan(site, verdict(Reason.NOT_CAUSAL, f"{site.queries} queries, {new} new keys"))
        if _shared(site):
            return Plan(site, verdict(Reason.SHARED_KV))

    padding, single, window, detail = None, None, None, "causal"
    if site.mask is None:
        if site.causal and not statically_known_true(site.queries == site.keys):
            return Plan(site, verdict(Reason.ALIGNMENT, f"{site.queries} queries, {site.keys} keys"))
        if not site.causal and not one_query:
            return Plan(site, verdict(Reason.NOT_CAUSAL, "no mask"))
    else:
        mask = site.mask.meta["val"]
        if mask.dtype is not torch.bool:
            return Plan(site, verdict(Reason.FLOAT_MASK, f"{mask.dtype}"))
        if not _covers(mask, site):
            return Plan(site, verdict(Reason.UNPROVEN_MASK, f"a mask of {list(mask.shape)} is broadcast"))
        proof = prove_mask(site.mask, values)
        form = _dense_form(proof)
        if proof.proven and proof.causal and form is None:
            padding, window = proof.padding, proof.window
            detail = "causal" + (f" with padding from {padding.name}" if padding is not None else "")
        elif proof.proven and not proof.causal and not one_query:
            return Plan(site, verdict(Reason.NOT_CAUSAL, "a mask that hides no later key"))
        elif one_query and _one_row(mask) and not _slides(site):
            # Whatever made it, the mask of a single query is a table of the keys that it may see.
            single, detail = site.mask, "the mask of one query"
        elif form is not None:
            return Plan(site, verdict(*form))
        elif one_query and _slides(site):
            return Plan(site, verdict(Reason.UNPROVEN_MASK, "a sliding window from outside"))
        else:
            return Plan(site, verdict(Reason.UNPROVEN_MASK, proof.unknown or "not causal"))
    if window is not None:
        if site.append is None:
            return Plan(site, verdict(Reason.SLIDING_WINDOW, f"window {window}, no cache"))
        return Plan(site, verdict(Reason.SLIDING_WINDOW, f"window {window}"), padding, window=window)
    if routing.tail == "estimate" and (site.softcap or site.sinks is not None):
        return Plan(site, verdict(Reason.TAIL, "routing.tail"))
    if routing.is_dense(layer, layers):
        return Plan(site, verdict(Reason.CONFIGURED, f"layer {layer} (routing.dense_layers)"))
    if site.append is None and routing.prefill == "dense":
        return Plan(site, verdict(Reason.CONFIGURED, "no cache (routing.prefill)"))
    return Plan(site, verdict(Reason.ROUTED, detail), padding, single)


def _check_shape(site: Site) -> str | None:
    shapes = [node.meta["val"].shape for node in (site.query, site.key, site.value)]
    if any(len(shape) != 4 for shape in shapes):
        return f"operands of {[len(shape) for shape in shapes]} dimensions, expected 4"
    query, key, value = shapes
    if not all(isinstance(size, int) for size in (query[1], key[1], value[1], query[3], key[3], value[3])):
        return "heads or channels that are not constant"
    if query[1] % key[1] or key[1] != value[1] or query[3] != key[3]:
        return f"{query[1]} query heads of {query[3]} channels, {key[1]} KV heads of {key[3]}"
    if not (statically_known_true(query[0] == key[0]) and statically_known_true(key[2] == value[2])):
        return "K and V are broadcast over the batch"
    if site.scale is None:
        return "a scale that is not constant"
    return None


def _dense_form(proof: MaskProof) -> tuple[Reason, str] | None:
    """Return why a mask that was proven to be of a causal form stays dense; None if it need not."""
    if proof.ahead:
        tables = {lookup.source for option in proof.ahead for lookup in lookups(option)}
        names = sorted(table.name for table in tables if table is not proof.padding)
        return Reason.PREFIX_LM, f"keys picked by {', '.join(names)}" if names else "the first keys"
    if proof.documents is not None and proof.causal:
        return Reason.PACKED, f"documents in {proof.documents.name}"
    if proof.chunk is not None and proof.causal:
        size, start = proof.chunk
        return Reason.CHUNKED, f"chunks of {size}" + (f" from {start.name}" if start is not None else "")
    return None


def _slides(site: Site) -> bool:
    """Say whether the cache layer has a sliding window: a mask that is not read may hold it."""
    return site.append is not None and len(site.append.args) > 4 and bool(site.append.args[4])


def _shared(site: Site) -> bool:
    """Say whether something beside this site reads the K or V that the append returns."""
    assert site.append is not None  # the caller has checked
    reached = _reaches(site.key, site) and _reaches(site.value, site)
    if not reached or any(user not in (site.key, site.value) for user in site.append.users):
        return True
    # The rewritten op stores the rows where the attention is: nothing in between may look at the store.
    handle = site.append.args[2]
    assert isinstance(handle, Node)
    return any(site.append < user < site.node for user in handle.users)


def _reaches(node: Node, site: Site) -> bool:
    """Say whether every use of a node leads to the site, over views alone."""
    for user in node.users:
        if user in site.inside and node not in (site.query, site.mask):
            continue
        view = str(user.target) in _VIEWS
        if not view or not _reaches(user, site):
            return False
    return True


_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "unsqueeze.default",
        "transpose.int",
        "permute.default",
        "mT.default",
        "expand.default",
        "reshape.default",
        "view.default",
        "_unsafe_view.default",
        "flatten.using_ints",
        "slice.Tensor",
        "clone.default",
        "contiguous.default",
        "alias.default",
        "repeat_interleave.self_int",
    )
)


def _covers(mask: torch.Tensor, site: Site) -> bool:
    """Say whether a mask has a row for every query and a column for every key, none of them broadcast."""
    if mask.dim() != 4:
        return True  # refused by the proof, with its reason
    batch = site.query.meta["val"].shape[0]
    return (
        (statically_known_true(mask.shape[0] == 1) or statically_known_true(mask.shape[0] == batch))
        and statically_known_true(mask.shape[2] == site.queries)
        and statically_known_true(mask.shape[3] == site.keys)
    )


def _one_row(mask: torch.Tensor) -> bool:
    """Say whether a mask is ``[batch or 1, 1, 1, keys]``."""
    return mask.dim() == 4 and all(isinstance(size, int) and size == 1 for size in mask.shape[1:3])


def _source_of(key: Node) -> str:
    """Say in a word where K comes from, for the report."""
    seen = key
    for _ in range(8):
        name = str(seen.target)
        if "index_copy" in name:
            return "a static cache"
        if "cat" in name:
            return "a stock dynamic cache"
        if not seen.args or not isinstance(seen.args[0], Node):
            break
        seen = seen.args[0]
    return "keys computed in the graph" if seen.op != "placeholder" else "keys given from outside"
