import pytest
import torch
from attention_graphs import BATCH, assert_claim_holds, compiled_plan, masked, rows, traced
from torch import Tensor
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import (
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
    find_packed_sequence_indices,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from hga_compile.passes.decision import Reason
from hga_compile.passes.mask_proof import MaskProof, prove_mask
from hga_compile.passes.mask_values import MaskValues
from hga_compile.passes.match import find_attention

PADDING = torch.ones(BATCH, 12, dtype=torch.bool)
PADDING[0, :3] = False
PADDING[1, 5] = False
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7], [3, 4, 0, 1, 2, 3, 4, 5, 0, 0, 1, 2]])
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [4, 4, 1, 1, 1, 1, 1, 1, 1, 1, 9, 9]])
BLOCKS = torch.tensor(
    [[-1, -1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1], [0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1]]
)


def query(queries: int, keys: int) -> Tensor:
    return (torch.arange(queries) + (keys - queries))[None, None, :, None]


def key(keys: int) -> Tensor:
    return torch.arange(keys)[None, None, None, :]


def causal(queries: int = 12, keys: int = 12) -> Tensor:
    return key(keys) <= query(queries, keys)


def config(window: int | None = None, chunk: int | None = None) -> LlamaConfig:
    made = LlamaConfig(num_hidden_layers=1, attn_implementation="sdpa")
    made.sliding_window, made.attention_chunk_size = window, chunk
    return made


def transformers_mask(
    queries: int,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    window: int | None = None,
    chunk: int | None = None,
    **more: object,
) -> Tensor:
    build = create_causal_mask if window is None else create_sliding_window_causal_mask
    return (create_chunked_causal_mask if chunk else build)(
        config=config(window, chunk),
        inputs_embeds=torch.empty(BATCH, queries, 0),
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=position_ids,
        **more,
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


def same_chunk(queries: int, keys: int, size: int) -> Tensor:
    return query(queries, keys) // size == key(keys) // size


def same_document(documents: Tensor, queries: int, keys: int) -> Tensor:
    return (
        documents[:, None, keys - queries : keys, None] == documents[:, None, None, :keys]
        if documents.dim() == 2
        else documents[None, None, keys - queries : keys, None] == documents[None, None, None, :keys]
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
    "the same twice, with or": (lambda: causal() | causal(), 12, 12, ()),
    "or of nothing": (lambda: torch.zeros((), dtype=torch.bool) | causal(), 12, 12, ()),
    "padding turned round": (lambda t: causal() & (~t)[:, None, None, :], 12, 12, (PADDING,)),
    "a padding table that was computed": (
        lambda t: causal() & (t != 7)[:, None, None, :],
        12,
        12,
        (PADDING.long(),),
    ),
    "a padding table that was compared": (
        lambda t: causal() & (t > 0)[:, None, None, :],
        12,
        12,
        (PADDING.long() * 3 - 1,),
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

PACKED = {
    "documents": (lambda d: causal() & same_document(d, 12, 12), 12, 12, (DOCUMENTS,)),
    "documents, the other way round": (
        lambda d: (d[:, None, None, :] == d[:, None, :, None]) & causal(),
        12,
        12,
        (DOCUMENTS,),
    ),
    "documents of narrow integers": (
        lambda d: causal() & same_document(d, 12, 12),
        12,
        12,
        (DOCUMENTS.to(torch.int32),),
    ),
    "documents in a chunk": (lambda d: causal(5, 12) & same_document(d, 5, 12), 5, 12, (DOCUMENTS,)),
    "documents with padding": (
        lambda d, t: causal() & same_document(d, 12, 12) & t[:, None, None, :],
        12,
        12,
        (DOCUMENTS, PADDING),
    ),
    "documents with padding in a chunk": (
        lambda d, t: causal(5, 12) & same_document(d, 5, 12) & t[:, None, None, :],
        5,
        12,
        (DOCUMENTS, PADDING),
    ),
    "documents with a window": (
        lambda d: window_mask(12, 12, 3) & same_document(d, 12, 12),
        12,
        12,
        (DOCUMENTS,),
    ),
    "documents with chunks": (
        lambda d: causal() & same_chunk(12, 12, 5) & same_document(d, 12, 12),
        12,
        12,
        (DOCUMENTS,),
    ),
    "documents of all sequences": (
        lambda d: causal() & same_document(d, 12, 12),
        12,
        12,
        (DOCUMENTS[:1],),
    ),
    "documents of one dimension": (lambda d: causal() & same_document(d, 12, 12), 12, 12, (DOCUMENTS[0],)),
    "a mask of two dimensions": (
        lambda d: (d[:, None] == d[None, :]) & causal()[0, 0],
        12,
        12,
        (DOCUMENTS[0],),
    ),
    "documents that are counted": (
        lambda p: causal() & same_document(find_packed_sequence_indices(p), 12, 12),
        12,
        12,
        (POSITIONS,),
    ),
    "transformers": (lambda p: transformers_mask(12, position_ids=p), 12, 12, (POSITIONS,)),
    "transformers, one row of positions": (
        lambda p: transformers_mask(12, position_ids=p),
        12,
        12,
        (POSITIONS[:1],),
    ),
    "transformers, sliding": (
        lambda p: transformers_mask(12, position_ids=p, window=3),
        12,
        12,
        (POSITIONS,),
    ),
    "transformers, positions with gaps": (
        lambda p: transformers_mask(12, position_ids=p),
        12,
        12,
        (POSITIONS * 2,),
    ),
}
CHUNKED = {
    "chunks": (lambda: causal() & same_chunk(12, 12, 5), 12, 12, (), 5),
    "chunks, the other way round": (
        lambda: (key(12) // 5 == query(12, 12) // 5) & causal(),
        12,
        12,
        (),
        5,
    ),
    "chunks by div": (
        lambda: causal() & (torch.div(query(12, 12), 5, rounding_mode="floor") == key(12) // 5),
        12,
        12,
        (),
        5,
    ),
    "chunks numbered before they are spread": (
        lambda: causal() & ((torch.arange(12) // 5)[:, None] == (torch.arange(12) // 5)[None, :]),
        12,
        12,
        (),
        5,
    ),
    "chunks in a chunk of the prompt": (lambda: causal(5, 12) & same_chunk(5, 12, 4), 5, 12, (), 4),
    "chunks with padding": (
        lambda t: causal() & same_chunk(12, 12, 5) & t[:, None, None, :],
        12,
        12,
        (PADDING,),
        5,
    ),
    "chunks from a token of each sequence": (
        lambda s: (
            causal()
            & ((query(12, 12) - s[:, None, None, None]) // 5 == (key(12) - s[:, None, None, None]) // 5)
        ),
        12,
        12,
        (torch.tensor([3, 1]),),
        5,
    ),
    "one chunk": (lambda: causal() & same_chunk(12, 12, 64), 12, 12, (), 64),
    "chunks with a window": (lambda: window_mask(12, 12, 3) & same_chunk(12, 12, 5), 12, 12, (), 5),
    "transformers": (lambda: transformers_mask(12, chunk=5), 12, 12, (), 5),
    "transformers, with positions": (
        lambda: transformers_mask(12, chunk=5, position_ids=torch.arange(12)[None]),
        12,
        12,
        (),
        5,
    ),
    "transformers, with padding": (lambda t: transformers_mask(12, t, chunk=5), 12, 12, (PADDING,), 5),
    "transformers, with integer padding": (
        lambda t: transformers_mask(12, t, chunk=5),
        12,
        12,
        (PADDING.long(),),
        5,
    ),
    "transformers, in a chunk of the prompt": (
        lambda s, t: chunk(5, 12, mask_function=chunked_causal_mask_function(4, s), attention_mask=t),
        5,
        12,
        (torch.tensor([3, 0]), PADDING),
        4,
    ),
}
PREFIX = {
    "a prefix": (lambda: causal() | (key(12) < 4), 12, 12, ()),
    "a prefix and padding": (lambda t: (causal() | (key(12) < 4)) & t[:, None, None, :], 12, 12, (PADDING,)),
    "a prefix in a chunk": (lambda: causal(5, 12) | (key(12) < 10), 5, 12, ()),
    "a prefix of each sequence": (
        lambda n: causal() | (key(12) < n[:, None, None, None]),
        12,
        12,
        (torch.tensor([4, 7]),),
    ),
    "a prefix of a length": (lambda n: causal() | (key(12) < n), 12, 12, (torch.tensor(4),)),
    "a prefix given as a table": (lambda t: causal() | t[:, None, None, :], 12, 12, (PADDING,)),
    "a prefix that its own queries see": (
        lambda t: causal() | (t[:, None, None, :] & t[:, None, :, None]),
        12,
        12,
        (PADDING,),
    ),
    "token types": (
        lambda t: causal() | ((t[:, None, None, :] == 0) & (t[:, None, :, None] == 0)),
        12,
        12,
        (BLOCKS,),
    ),
    "two prefixes": (
        lambda t: (key(12) < 3) | causal() | t[:, None, None, :],
        12,
        12,
        (PADDING,),
    ),
    "a prefix under a window": (
        lambda: (causal() | (key(12) < 6)) & (key(12) > query(12, 12) - 4),
        12,
        12,
        (),
    ),
    "transformers, a prefix": (
        lambda t: chunk(
            5,
            12,
            mask_function=or_masks(causal_mask_function, lambda b, h, q, k: k < 9),
            attention_mask=t,
        ),
        5,
        12,
        (PADDING,),
    ),
    "transformers, a prefix beside a window": (
        lambda: chunk(
            12,
            12,
            mask_function=or_masks(sliding_window_causal_mask_function(3), lambda b, h, q, k: k < 4),
        ),
        12,
        12,
        (),
    ),
    "transformers, blocks": (
        lambda i, t: transformers_mask(12, t, block_sequence_ids=i),
        12,
        12,
        (BLOCKS, PADDING),
    ),
    "transformers, blocks without padding": (
        lambda i: transformers_mask(12, block_sequence_ids=i),
        12,
        12,
        (BLOCKS,),
    ),
    "transformers, blocks in a chunk": (
        lambda i, t: chunk(
            5,
            12,
            mask_function=or_masks(causal_mask_function, blockwise_overlay(i)),
            attention_mask=t,
        ),
        5,
        12,
        (BLOCKS, PADDING),
    ),
    "transformers, blocks beside a window": (
        lambda i: transformers_mask(12, window=4, block_sequence_ids=i),
        12,
        12,
        (BLOCKS,),
    ),
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


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_are_proven_and_stay_dense(name, cached):
    build, queries, keys, tables = PACKED[name]
    plan, graph, inputs = masked(build, queries, keys, *tables, cached=cached)
    assert plan.decision.reason is Reason.PACKED, plan.decision
    assert plan.window is plan.padding is plan.single_query_mask is None
    assert_claim_holds(plan, graph, inputs)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_are_proven_and_stay_dense(name, cached):
    build, queries, keys, tables, size = CHUNKED[name]
    plan, graph, inputs = masked(build, queries, keys, *tables, cached=cached)
    assert plan.decision.reason is Reason.CHUNKED, plan.decision
    assert plan.decision.detail.startswith(f"chunks of {size}")
    assert plan.window is plan.padding is plan.single_query_mask is None
    assert_claim_holds(plan, graph, inputs)


# transformers spreads functions that it does not know by vmap.
WINDOW = {"and_mask_function": sliding_window_overlay(4)}
FEW_KEYS = {"or_mask_function": lambda b, h, q, k: k < 4}
NEXT_KEY = {"or_mask_function": lambda b, h, q, k: k == q + 1}
BLOCKWISE = {"or_mask_function": blockwise_overlay(BLOCKS)}
FUNCTIONS = {
    "and: a window": (WINDOW, {}, Reason.SLIDING_WINDOW),
    "and: a window of packed documents": (WINDOW, {"position_ids": POSITIONS}, Reason.PACKED),
    "or: a prefix": (FEW_KEYS, {"attention_mask": PADDING}, Reason.PREFIX_LM),
    "or: a prefix of packed documents": (FEW_KEYS, {"position_ids": POSITIONS}, Reason.PREFIX_LM),
    "or: blocks, and a window": (BLOCKWISE | WINDOW, {"attention_mask": PADDING}, Reason.PREFIX_LM),
    "or: the next key": (NEXT_KEY, {}, Reason.UNPROVEN_MASK),
    "or: the next key of packed documents": (NEXT_KEY, {"position_ids": POSITIONS}, Reason.UNPROVEN_MASK),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_given_to_transformers_are_proven(name):
    functions, tables, reason = FUNCTIONS[name]
    given = dict.fromkeys(("attention_mask", "position_ids", "past_key_values")) | functions
    made, names = config(), list(tables)

    def attend(q, k, v, *tables):
        more = given | dict(zip(names, tables, strict=True))
        mask = create_causal_mask(config=made, inputs_embeds=torch.empty(BATCH, 12, 0), **more)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    plan = compiled_plan(attend, *rows(12), *tables.values())
    assert plan.decision.reason is reason, plan.decision


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", PREFIX)
def test_keys_ahead_of_the_query_are_proven_and_stay_dense(name, cached):
    build, queries, keys, tables = PREFIX[name]
    plan, graph, inputs = masked(build, queries, keys, *tables, cached=cached)
    assert plan.decision.reason is Reason.PREFIX_LM, plan.decision
    assert plan.window is plan.padding is plan.single_query_mask is None
    assert_claim_holds(plan, graph, inputs)


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


def by_hand(form):
    """Build a mask of sizes that the operands say, from a form of query and key tokens."""

    def build(queries, keys, *tables):
        here = (torch.arange(queries) + (keys - queries))[None, None, :, None]
        there = torch.arange(keys)[None, None, None, :]
        return (there <= here) & form(here, there, *tables)

    return build


DYNAMIC = {
    "documents": (
        by_hand(lambda q, k, d: d[:, None, :, None] == d[:, None, None, :]),
        (DOCUMENTS,),
        {"documents"},
    ),
    "documents with padding": (
        by_hand(lambda q, k, d, t: (d[:, None, :, None] == d[:, None, None, :]) & t[:, None, None, :]),
        (DOCUMENTS, PADDING),
        {"documents", "padding"},
    ),
    "documents of transformers": (
        lambda queries, keys, p: transformers_mask(queries, position_ids=p),
        (POSITIONS,),
        {"documents"},
    ),
    "chunks": (by_hand(lambda q, k: q // 5 == k // 5), (), {"chunk"}),
    "chunks of transformers": (lambda queries, keys: transformers_mask(queries, chunk=5), (), {"chunk"}),
    "chunks of transformers with padding": (
        lambda queries, keys, t: transformers_mask(queries, t, chunk=5),
        (PADDING,),
        {"chunk", "padding"},
    ),
    "blocks of transformers": (
        lambda queries, keys, i: transformers_mask(queries, block_sequence_ids=i),
        (BLOCKS,),
        {"ahead"},
    ),
    "blocks of transformers with padding": (
        lambda queries, keys, i, t: transformers_mask(queries, t, block_sequence_ids=i),
        (BLOCKS, PADDING),
        {"ahead", "padding"},
    ),
    "a prefix": (
        lambda queries, keys: (
            (key(keys) <= torch.arange(queries)[None, None, :, None] + (keys - queries)) | (key(keys) < 4)
        ),
        (),
        {"ahead"},
    ),
    "a prefix as long as another tensor": (
        lambda queries, keys, t: (
            (key(keys) <= torch.arange(queries)[None, None, :, None] + (keys - queries))
            | (key(keys) < t.shape[0])
        ),
        (torch.zeros(5),),
        {"ahead"},
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_forms_of_dynamic_sizes_are_proven(name):
    build, tables, wanted = DYNAMIC[name]

    def attend(q, k, v, *tables):
        mask = build(q.shape[2], k.shape[2], *tables)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    graph = traced(attend, *rows(12), *tables, mode="symbolic")
    (site,) = find_attention(graph.graph)[0]
    proof = prove_mask(site.mask, MaskValues(graph.graph))
    assert proof.proven and proof.causal, proof.unknown
    assert {
        name for name in ("documents", "chunk", "padding", "window", "ahead") if getattr(proof, name)
    } == wanted


@pytest.mark.parametrize("offset", [0, 7])
def test_chunks_in_a_chunk_of_dynamic_sizes_are_proven(offset):
    def attend(q, k, v):
        queries, keys = q.shape[2], k.shape[2]
        here = (torch.arange(queries) + (keys - queries))[None, None, :, None]
        mask = (key(keys) <= here) & (key(keys) // 4 == here // 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    graph = traced(attend, *rows(5, 5 + offset), mode="symbolic")
    (site,) = find_attention(graph.graph)[0]
    assert prove_mask(site.mask, MaskValues(graph.graph)) == MaskProof(True, chunk=(4, None))


ONE_QUERY = {
    "documents": (lambda d: same_document(d, 1, 12), (DOCUMENTS,)),
    "chunks": (lambda: causal(1, 12) & same_chunk(1, 12, 5), ()),
    "chunks with padding": (
        lambda s, t: chunk(1, 12, mask_function=chunked_causal_mask_function(4, s), attention_mask=t),
        (torch.tensor([3, 0]), PADDING),
    ),
    "a prefix": (lambda: causal(1, 12) | (key(12) < 4), ()),
    "blocks with padding": (
        lambda i, t: chunk(
            1, 12, mask_function=or_masks(causal_mask_function, blockwise_overlay(i)), attention_mask=t
        ),
        (BLOCKS, PADDING),
    ),
}


@pytest.mark.parametrize("name", ONE_QUERY)
def test_one_query_is_routed_to_what_its_mask_shows(name):
    build, tables = ONE_QUERY[name]
    plan, graph, inputs = masked(build, 1, 12, *tables, cached=True)
    assert plan.decision.reason is Reason.ROUTED, plan.decision
    assert plan.single_query_mask is plan.site.mask or plan.padding is not None
    assert_claim_holds(plan, graph, inputs)


@pytest.mark.parametrize("name", ["documents", "chunks", "chunks with padding"])
def test_one_query_of_a_sliding_layer_is_not_routed_by_such_a_mask(name):
    build, tables = ONE_QUERY[name]
    plan, *_ = masked(build, 1, 12, *tables, cached=True, slides=True)
    assert plan.decision.reason in (Reason.PACKED, Reason.CHUNKED, Reason.UNPROVEN_MASK)
    assert plan.window is plan.padding is plan.single_query_mask is None


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
        lambda p: p[:, None, None, :] <= p[:, None, :, None],
        12,
        12,
        (POSITIONS,),
    ),
    "positions within documents that they do not make": (
        lambda p, d: (p[:, None, None, :] <= p[:, None, :, None]) & same_document(d, 12, 12),
        12,
        12,
        (POSITIONS, DOCUMENTS),
    ),
    "positions within documents of other positions": (
        lambda p, q: (
            (p[:, None, None, :] <= p[:, None, :, None])
            & same_document(find_packed_sequence_indices(q), 12, 12)
        ),
        12,
        12,
        (POSITIONS, POSITIONS.flip(0)),
    ),
    "positions within documents counted by steps of two": (
        lambda p: (
            (p[:, None, None, :] <= p[:, None, :, None])
            & same_document((torch.diff(p, prepend=p[:, :1] - 2) != 2).cumsum(-1), 12, 12)
        ),
        12,
        12,
        (POSITIONS * 2,),
    ),
    "positions within documents whose breaks are shifted": (
        lambda p: (
            (p[:, None, None, :] <= p[:, None, :, None])
            & same_document(
                (torch.diff(p[:, :-1], prepend=torch.cat([p[:, :1] - 2, p[:, :1] - 1], 1)) != 1).cumsum(-1),
                12,
                12,
            )
        ),
        12,
        12,
        (POSITIONS,),
    ),
    "positions within documents counted across sequences": (
        lambda p: (
            (p[:, None, None, :] <= p[:, None, :, None])
            & same_document((torch.diff(p, prepend=p[:, :1] - 1) != 1).cumsum(0), 12, 12)
        ),
        12,
        12,
        (POSITIONS,),
    ),
    "transformers, chunks of packed documents": (
        lambda p: transformers_mask(12, position_ids=p, chunk=5),
        12,
        12,
        (POSITIONS,),
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
    "documents of the query and the key after": (
        lambda d: causal(11, 11) & (d[:, None, :11, None] == d[:, None, None, 1:]),
        11,
        11,
        (DOCUMENTS,),
    ),
    "documents in a chunk, aligned to the first queries": (
        lambda d: causal(5, 12) & (d[:, None, :5, None] == d[:, None, None, :]),
        5,
        12,
        (DOCUMENTS,),
    ),
    "documents numbered on": (
        lambda d: causal() & (d[:, None, :, None] + 1 == d[:, None, None, :]),
        12,
        12,
        (DOCUMENTS,),
    ),
    "documents of two tables": (
        lambda d, e: causal() & (d[:, None, :, None] == e[:, None, None, :]),
        12,
        12,
        (DOCUMENTS, DOCUMENTS.flip(0)),
    ),
    "two tables of documents": (
        lambda d, e: causal() & same_document(d, 12, 12) & same_document(e, 12, 12),
        12,
        12,
        (DOCUMENTS, DOCUMENTS.flip(0)),
    ),
    "documents of the first sequence for all": (
        lambda d: causal() & same_document(d[0], 12, 12),
        12,
        12,
        (DOCUMENTS,),
    ),
    "the query's own key within its document": (
        lambda p: (
            (p[:, None, None, :] == p[:, None, :, None])
            & same_document(find_packed_sequence_indices(p), 12, 12)
        ),
        12,
        12,
        (POSITIONS,),
    ),
    "documents that differ": (
        lambda d: causal() & (d[:, None, :, None] != d[:, None, None, :]),
        12,
        12,
        (DOCUMENTS,),
    ),
    "documents as bytes with a number added": (
        lambda d: causal() & (d[:, None, :, None] + 255 == d[:, None, None, :] + 255),
        12,
        12,
        (DOCUMENTS.to(torch.uint8),),
    ),
    "or: of a window that is causal, and a longer one": (
        lambda: window_mask(12, 12, 4) | window_mask(12, 12, 6),
        12,
        12,
        (),
    ),
    "or: the next key too": (lambda: causal() | (key(12) <= query(12, 12) + 1), 12, 12, ()),
    "or: a prefix of no causal mask": (lambda: (key(12) < 4) | (key(12) > 7), 12, 12, ()),
    "or: a prefix beside chunks": (lambda: (key(12) < 4) | same_chunk(12, 12, 4), 12, 12, ()),
    "or: a prefix as far as a table of the next keys says": (
        lambda t: causal(11, 11) | ((key(11) < 8) & t[:, None, None, 1:]),
        11,
        11,
        (PADDING,),
    ),
    "or: bytes that are compared with -1": (
        lambda t: causal() | (t[:, None, None, :] == -1),
        12,
        12,
        (torch.full((BATCH, 12), 255, dtype=torch.uint8),),
    ),
    "or: integers that are compared with too large a number": (
        lambda t: causal() | (t[:, None, None, :] == 2**32),
        12,
        12,
        (torch.zeros(BATCH, 12, dtype=torch.int32),),
    ),
    "or: the last keys": (lambda: causal() | (key(12) >= 8), 12, 12, ()),
    "or: of a prefix alone": (lambda t: (key(12) < 4) | t[:, None, None, :], 12, 12, (PADDING,)),
    "or: every second key": (lambda: causal() | (key(12) * 2 < 8), 12, 12, ()),
    "or: a table looked up with a shift": (
        lambda t: causal(11, 11) | t[:, None, None, 1:],
        11,
        11,
        (PADDING,),
    ),
    "or: a table by the query only": (lambda t: causal() | t[:, None, :, None], 12, 12, (PADDING,)),
    "or: chunks seen as a whole": (lambda: causal() | same_chunk(12, 12, 4), 12, 12, ()),
    "or: padding of the causal part only": (
        lambda t, u: (causal() & (t & u)[:, None, :, None]) | (key(12) < 3),
        12,
        12,
        (PADDING, PADDING.flip(0)),
    ),
    "or, twice": (lambda: (causal() | (key(12) < 4)) & (causal() | (key(12) < 6)), 12, 12, ()),
    "or of bits": (
        lambda t: (causal().long() | t[:, None, None, :]).bool(),
        12,
        12,
        (PADDING.long() * 2,),
    ),
    "not: padding turned round": (lambda t: causal() & ~t[:, None, None, :], 12, 12, (PADDING,)),
    "not: a causal mask turned round": (lambda: ~causal(), 12, 12, ()),
    "a mask per head": (lambda m: causal() & m, 12, 12, (torch.rand(1, 4, 1, 12) > 0.3,)),
    "a table per head": (lambda m: causal() & m[None, :, None, :], 12, 12, (torch.rand(4, 12) > 0.3,)),
    "chunks of two sizes": (lambda: causal() & (key(12) // 4 == query(12, 12) // 5), 12, 12, ()),
    "chunks of four, and of five": (
        lambda: causal() & same_chunk(12, 12, 4) & same_chunk(12, 12, 5),
        12,
        12,
        (),
    ),
    "chunks that start later": (
        lambda: causal() & ((key(12) + 1) // 4 == (query(12, 12) + 1) // 4),
        12,
        12,
        (),
    ),
    "chunks that start differently": (
        lambda: causal() & ((key(12) + 1) // 4 == query(12, 12) // 4),
        12,
        12,
        (),
    ),
    "chunks from twice a number": (
        lambda s: causal() & ((query(12, 12) - s - s) // 5 == (key(12) - s - s) // 5),
        12,
        12,
        (torch.tensor(3),),
    ),
    "chunks from two tables": (
        lambda s, t: (
            causal()
            & ((query(12, 12) - s[:, None, None, None]) // 5 == (key(12) - t[:, None, None, None]) // 5)
        ),
        12,
        12,
        (torch.tensor([1, 3]), torch.tensor([3, 1])),
    ),
    "chunks from the number of the next sequence": (
        lambda s: (
            causal()
            & (
                (query(12, 12) - s.flip(0)[:, None, None, None]) // 5
                == (key(12) - s[:, None, None, None]) // 5
            )
        ),
        12,
        12,
        (torch.tensor([1, 3]),),
    ),
    "chunks of neighbours": (
        lambda: causal() & (key(12) // 4 <= query(12, 12) // 4),
        12,
        12,
        (),
    ),
    "chunks rounded to zero": (
        lambda s: (
            causal()
            & (
                torch.div(query(12, 12) - s, 4, rounding_mode="trunc")
                == torch.div(key(12) - s, 4, rounding_mode="trunc")
            )
        ),
        12,
        12,
        (torch.tensor(6),),
    ),
    "chunks in a chunk, aligned to the first queries": (
        lambda: causal(5, 12) & (key(12) // 4 == torch.arange(5)[None, None, :, None] // 4),
        5,
        12,
        (),
    ),
    "remainders": (lambda: causal() & (key(12) % 4 == query(12, 12) % 4), 12, 12, ()),
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


# In transformers 5.17 documents keep the places of the whole sequence, which is proven, and dense as well.
REMAPPED = {"transformers, chunks of packed documents", "positions with a gap"}


@pytest.mark.parametrize("name", UNPROVEN)
def test_a_near_miss_stays_unproven(name):
    build, queries, keys, tables = UNPROVEN[name]
    plan, *_ = masked(build, queries, keys, *(t.clone() for t in tables))
    remaps = hasattr(masking_utils, "packed_sequence_compatibility_function")
    expected = Reason.PACKED if name in REMAPPED and not remaps else Reason.UNPROVEN_MASK
    assert plan.decision.reason is expected, plan.decision
    assert plan.decision.detail


def test_a_mask_of_padding_alone_is_not_causal():
    plan, *_ = masked(lambda t: t[:, None, None, :].expand(BATCH, 1, 12, 12), 12, 12, PADDING)
    assert plan.decision.reason is Reason.NOT_CAUSAL


@pytest.mark.parametrize("shape", [(12, 12), (1, 12, 12)])
def test_a_mask_of_fewer_dimensions_is_broadcast(shape):
    plan, graph, inputs = masked(lambda: causal().reshape(shape), 12, 12)
    assert plan.decision.routed
    assert_claim_holds(plan, graph, inputs)
