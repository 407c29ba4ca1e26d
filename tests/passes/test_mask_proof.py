import pytest
import torch
from attention_graphs import BATCH, assert_claim_holds, masked, rows, traced
from torch import Tensor
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask, sdpa_mask

from hga_compile.passes.decision import Reason
from hga_compile.passes.mask_proof import prove_mask
from hga_compile.passes.mask_values import MaskValues
from hga_compile.passes.match import find_attention

PADDING = torch.ones(BATCH, 12, dtype=torch.bool)
PADDING[0, :3] = False
PADDING[1, 5] = False


def query(queries: int, keys: int) -> Tensor:
    return (torch.arange(queries) + (keys - queries))[None, None, :, None]


def key(keys: int) -> Tensor:
    return torch.arange(keys)[None, None, None, :]


def causal(queries: int = 12, keys: int = 12) -> Tensor:
    return key(keys) <= query(queries, keys)


def config(window: int | None = None) -> LlamaConfig:
    made = LlamaConfig(num_hidden_layers=1, attn_implementation="sdpa")
    made.sliding_window = window
    return made


def transformers_mask(
    queries: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    build = create_causal_mask if window is None else create_sliding_window_causal_mask
    return build(
        config=config(window),
        inputs_embeds=torch.empty(BATCH, queries, 0),
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=position_ids,
    )


def chunk(queries: int, keys: int, **more: object) -> Tensor:
    return sdpa_mask(
        batch_size=BATCH,
        q_length=queries,
        kv_length=keys,
        q_offset=keys - queries,
        allow_is_causal_skip=False,
        **more,
    )


def window_mask(queries: int, keys: int, window: int) -> Tensor:
    return causal(queries, keys) & (key(keys) > query(queries, keys) - window)


PROVEN = {
    "causal": (lambda: causal(), 12, 12, ()),
    "the same, written with ge": (lambda: query(12, 12) >= key(12), 12, 12, ()),
    "the same, written with lt": (lambda: key(12) < query(12, 12) + 1, 12, 12, ()),
    "the same, as a difference": (lambda: query(12, 12) - key(12) >= 0, 12, 12, ()),
    "logical_not of the complement": (lambda: torch.logical_not(key(12) > query(12, 12)), 12, 12, ()),
    "expanded": (lambda: causal().expand(BATCH, 1, 12, 12), 12, 12, ()),
    "sliced out of a larger one": (lambda: causal(20, 20)[:, :, 8:, 8:], 12, 12, ()),
    "rows sliced out of a larger one": (lambda: causal(12, 12)[:, :, 7:], 5, 12, ()),
    "as integers and back": (lambda: causal().to(torch.int64).to(torch.bool), 12, 12, ()),
    "chunked prefill": (lambda: causal(5, 12), 5, 12, ()),
    "chunked prefill of transformers": (lambda: chunk(5, 12), 5, 12, ()),
    "bool padding": (lambda t: causal() & t[:, None, None, :], 12, 12, (PADDING,)),
    "integer padding": (lambda t: causal() & t[:, None, None, :].bool(), 12, 12, (PADDING.long(),)),
    "padding of a float mask": (
        lambda t: causal() & t.to(torch.bool)[:, None, None, :],
        12,
        12,
        (PADDING.float(),),
    ),
    "padding of a longer table": (lambda t: causal(5, 8) & t[:, None, None, :8], 5, 8, (PADDING,)),
    "padding in a chunk": (lambda t: chunk(5, 12, attention_mask=t), 5, 12, (PADDING,)),
    "padding looked up by indices": (
        lambda t: (
            causal() & t[torch.arange(BATCH)[:, None, None, None], torch.arange(12)[None, None, None, :]]
        ),
        12,
        12,
        (PADDING,),
    ),
    "one padding row for all sequences": (lambda t: causal() & t[:, None, None, :], 12, 12, (PADDING[:1],)),
    "padding turned round": (lambda t: causal() & (~t)[:, None, None, :], 12, 12, (PADDING,)),
    "a padding table that was computed": (
        lambda t: causal() & (t != 7)[:, None, None, :],
        12,
        12,
        (PADDING.long(),),
    ),
    "a table of ops that are not understood": (
        lambda: (
            causal()
            & (torch.diff(torch.arange(11), prepend=torch.arange(2) * 5 - 6) == 1)[None, None, None, :]
        ),
        12,
        12,
        (),
    ),
    "transformers, bool mask": (lambda t: transformers_mask(12, t), 12, 12, (PADDING,)),
    "transformers, integer mask": (lambda t: transformers_mask(12, t), 12, 12, (PADDING.long(),)),
    "transformers, packed-sequence ops over arange": (
        lambda: transformers_mask(12, position_ids=torch.arange(12)[None]),
        12,
        12,
        (),
    ),
    "transformers, packed-sequence ops over a shifted arange": (
        lambda: transformers_mask(12, position_ids=torch.arange(3, 15)[None].expand(BATCH, -1)),
        12,
        12,
        (),
    ),
}
SLIDING = {
    "sliding": (lambda: window_mask(12, 12, 4), 12, 12, (), 4),
    "sliding in a chunk": (lambda: window_mask(5, 12, 4), 5, 12, (), 4),
    "sliding with padding": (lambda t: window_mask(12, 12, 4) & t[:, None, None, :], 12, 12, (PADDING,), 4),
    "a window as long as the sequence": (lambda: window_mask(12, 12, 12), 12, 12, (), 12),
    "transformers, sliding": (lambda: transformers_mask(12, window=5), 12, 12, (), 5),
    "transformers, sliding with padding": (
        lambda t: transformers_mask(12, t, window=5),
        12,
        12,
        (PADDING,),
        5,
    ),
    "one query": (lambda: window_mask(1, 12, 4), 1, 12, (), 4),
    "one query that sees all": (lambda: window_mask(1, 6, 8), 1, 6, (), 8),
}


@pytest.mark.parametrize("name", PROVEN)
def test_a_causal_mask_is_proven(name):
    build, queries, keys, tables = PROVEN[name]
    plan, graph, inputs = masked(build, queries, keys, *tables)
    assert plan.decision.reason is Reason.ROUTED, plan.decision
    assert plan.single_query_mask is None
    assert_claim_holds(plan, graph, inputs)


@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_is_proven(name):
    build, queries, keys, tables, window = SLIDING[name]
    plan, graph, inputs = masked(build, queries, keys, *tables, cached=True)
    assert plan.decision.reason is Reason.SLIDING_WINDOW, plan.decision
    assert plan.window == window
    assert_claim_holds(plan, graph, inputs)


@pytest.mark.parametrize("name", SLIDING)
def test_a_sliding_window_without_a_cache_is_left_alone(name):
    build, queries, keys, tables, window = SLIDING[name]
    plan, *_ = masked(build, queries, keys, *tables)
    assert plan.decision.reason is (Reason.SLIDING_WINDOW if queries > 1 else Reason.SINGLE_QUERY)
    assert plan.window is None


@pytest.mark.parametrize("offset", [0, 7])
def test_sizes_may_be_dynamic(offset):
    def attend(q, k, v, table):
        queries, keys = q.shape[2], k.shape[2]
        rows = torch.arange(queries) + (keys - queries)
        mask = torch.arange(keys)[None, None, None, :] <= rows[None, None, :, None]
        mask = mask & table[:, None, None, :].bool()
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    inputs = (*rows(5, 5 + offset), PADDING[:, : 5 + offset].long())
    graph = traced(attend, *inputs, mode="symbolic")
    (site,) = find_attention(graph.graph)[0]
    proof = prove_mask(site.mask, MaskValues(graph.graph))
    assert proof.proven and proof.causal and proof.window is None
    assert proof.padding is not None


def test_dynamic_sizes_that_are_not_the_attention_s_are_no_proof():
    def attend(q, k, v, other):
        rows = torch.arange(q.shape[2]) + other.shape[0]
        mask = torch.arange(k.shape[2])[None, None, None, :] <= rows[None, None, :, None]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    graph = traced(attend, *rows(5, 12), torch.zeros(3), mode="symbolic")
    (site,) = find_attention(graph.graph)[0]
    proof = prove_mask(site.mask, MaskValues(graph.graph))
    assert not proof.proven and "inequality" in proof.unknown


def _inplace(write):
    def build(*tables):
        mask = causal().clone()
        write(mask, *tables)
        return mask

    return build


def _later(t: Tensor) -> Tensor:
    mask = causal() & t[:, None, None, :]
    t.fill_(True)
    return mask


def sequence() -> Tensor:
    return torch.arange(BATCH)[:, None, None, None]


UNPROVEN = {
    "off by one: a query sees the next key": (lambda: key(12) <= query(12, 12) + 1, 12, 12, ()),
    "off by one: a query does not see itself": (lambda: key(12) < query(12, 12), 12, 12, ()),
    "a chunk aligned to the first keys": (lambda: key(12) <= torch.arange(5)[None, None, :, None], 5, 12, ()),
    "a chunk sliced from the front": (lambda: causal(12, 12)[:, :, :5], 5, 12, ()),
    "the mirror image: keys after the query": (lambda: key(12) >= query(12, 12), 12, 12, ()),
    "queries and keys swapped": (lambda: causal().transpose(2, 3), 12, 12, ()),
    "positions scaled": (lambda: key(12) * 2 <= query(12, 12) * 3, 12, 12, ()),
    "every second key": (lambda: key(12) * 2 <= query(12, 12), 12, 12, ()),
    "a window that looks ahead": (lambda: key(12) > query(12, 12) - 4, 12, 12, ()),
    "two windows": (lambda: window_mask(12, 12, 4) & window_mask(12, 12, 6), 12, 12, ()),
    "a placeholder": (lambda m: m, 12, 12, (torch.ones(BATCH, 1, 12, 12, dtype=torch.bool).tril(),)),
    "tril of ones": (lambda: torch.ones(12, 12, dtype=torch.bool).tril()[None, None], 12, 12, ()),
    "one row for all queries": (lambda: key(12) <= 11, 12, 12, ()),
    "one row that says True": (lambda: torch.ones(1, 1, 1, 12, dtype=torch.bool), 12, 12, ()),
    "one column for all keys": (lambda: query(12, 12) >= 0, 12, 12, ()),
    "the first row repeated": (lambda: causal() & causal()[:, :, :1], 12, 12, ()),
    "the first column repeated": (lambda: causal() & causal()[:, :, :, 3:4], 12, 12, ()),
    "positions given from outside": (
        lambda p: transformers_mask(12, position_ids=p),
        12,
        12,
        (torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]),),
    ),
    "positions with a gap": (
        lambda: transformers_mask(12, position_ids=torch.arange(12)[None] * 2),
        12,
        12,
        (),
    ),
    "padding looked up by the query": (lambda t: causal() & t[:, None, :, None], 12, 12, (PADDING,)),
    "padding looked up by the query's index": (
        lambda t: causal() & t[sequence(), torch.arange(12)[None, None, :, None]],
        12,
        12,
        (PADDING,),
    ),
    "padding looked up with a shift": (lambda t: causal(11, 11) & t[:, None, None, 1:], 11, 11, (PADDING,)),
    "padding looked up with a shifted index": (
        lambda t: causal(5, 5) & t[sequence(), key(5) + 1],
        5,
        5,
        (PADDING,),
    ),
    "padding looked up with negative indices": (
        lambda t: causal() & t[sequence(), key(12) - 12],
        12,
        12,
        (PADDING,),
    ),
    "padding of a slice from the end": (lambda t: causal(5, 5) & t[:, None, None, -5:], 5, 5, (PADDING,)),
    "padding of the first sequence for all": (
        lambda t: causal() & t[0][None, None, None, :],
        12,
        12,
        (PADDING,),
    ),
    "padding of the sequences in another order": (
        lambda t: causal() & t[1 - sequence(), key(12)],
        12,
        12,
        (PADDING,),
    ),
    "two padding tables": (
        lambda t, u: causal() & t[:, None, None, :] & u[:, None, None, :],
        12,
        12,
        (PADDING, PADDING.flip(0)),
    ),
    "bits of an integer table": (
        lambda t: (causal() & t[:, None, None, :]).bool(),
        12,
        12,
        (PADDING.long() * 2,),
    ),
    "a segment table compared": (
        lambda t: causal() & (t[:, None, None, :] == t[:, None, :, None]),
        12,
        12,
        (PADDING.long().cumsum(1),),
    ),
    "or: a prefix that all see": (lambda: causal() | (key(12) < 4), 12, 12, ()),
    "or: a prefix given from outside": (lambda t: causal() | t[:, None, None, :], 12, 12, (PADDING,)),
    "or of two causal masks": (lambda: causal() | causal(), 12, 12, ()),
    "not: padding turned round": (lambda t: causal() & ~t[:, None, None, :], 12, 12, (PADDING,)),
    "not: a causal mask turned round": (lambda: ~causal(), 12, 12, ()),
    "a mask per head": (lambda m: causal() & m, 12, 12, (torch.rand(1, 4, 1, 12) > 0.3,)),
    "a table per head": (lambda m: causal() & m[None, :, None, :], 12, 12, (torch.rand(4, 12) > 0.3,)),
    "chunks of eight": (
        lambda: causal() & (key(12) // 8 == query(12, 12) // 8),
        12,
        12,
        (),
    ),
    "where": (lambda: torch.where(causal(), True, key(12) < 2), 12, 12, ()),
    "flipped": (lambda: causal().flip(3), 12, 12, ()),
    "rolled": (lambda: causal().roll(1, 3), 12, 12, ()),
    "every second row of a larger one": (lambda: causal(24, 12)[:, :, ::2], 12, 12, ()),
    "narrow integers that wrap": (
        lambda: (
            torch.arange(12, dtype=torch.uint8)[None, :] - torch.arange(12, dtype=torch.uint8)[:, None] <= 0
        )[None, None],
        12,
        12,
        (),
    ),
    "written in place: a column": (_inplace(lambda mask: mask[..., 0].fill_(False)), 12, 12, ()),
    "written in place: a slice": (_inplace(lambda mask: mask[:, :, :4].logical_or_(key(12) < 2)), 12, 12, ()),
    "written in place: all of it": (_inplace(lambda mask: mask.logical_not_()), 12, 12, ()),
    "written in place: copied over": (
        _inplace(lambda mask, t: mask[0].copy_(t[:1, None])),
        12,
        12,
        (PADDING,),
    ),
    "a table written in place after its use": (_later, 12, 12, (PADDING.clone(),)),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_a_near_miss_stays_unproven(name):
    build, queries, keys, tables = UNPROVEN[name]
    plan, *_ = masked(build, queries, keys, *(t.clone() for t in tables))
    assert plan.decision.reason is Reason.UNPROVEN_MASK, plan.decision
    assert plan.decision.detail


def test_a_mask_of_padding_alone_is_not_causal():
    plan, *_ = masked(lambda t: t[:, None, None, :].expand(BATCH, 1, 12, 12), 12, 12, PADDING)
    assert plan.decision.reason is Reason.NOT_CAUSAL


@pytest.mark.parametrize("shape", [(12, 12), (1, 12, 12)])
def test_a_mask_of_fewer_dimensions_is_broadcast(shape):
    plan, graph, inputs = masked(lambda: causal().reshape(shape), 12, 12)
    assert plan.decision.routed
    assert_claim_holds(plan, graph, inputs)
