import pytest
import torch
from attention_graphs import BATCH, DIM, HEADS, KV_HEADS, dynamo_graph, rows, sites_of, traced
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hga_compile.passes.match import find_attention
from hga_compile.passes.retrace import retrace

TIMES = HEADS // KV_HEADS
HANDLE = torch.zeros(1, dtype=torch.int64)


def grouped(keys: int = 6):
    return rows(keys, keys, KV_HEADS)


def spread(x):
    """`repeat_kv` of transformers."""
    batch, heads, tokens, dim = x.shape
    return (
        x[:, :, None, :, :]
        .expand(batch, heads, TIMES, tokens, dim)
        .reshape(batch, heads * TIMES, tokens, dim)
    )


REPEATS = {
    "expand and reshape": spread,
    "unsqueeze, expand and flatten": lambda x: x.unsqueeze(2).expand(-1, -1, TIMES, -1, -1).flatten(1, 2),
    "unsqueeze from the end": lambda x: x.unsqueeze(-3).expand(-1, -1, TIMES, -1, -1).flatten(1, 2),
    "made contiguous": lambda x: spread(x).contiguous(),
    "cloned before": lambda x: spread(x.clone()),
    "repeat_interleave": lambda x: x.repeat_interleave(TIMES, dim=1),
    "repeat_interleave from the end": lambda x: x.repeat_interleave(TIMES, dim=-3),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_kv_heads_are_seen_through(name):
    repeat = REPEATS[name]
    (site,) = sites_of(lambda q, k, v: sdpa(q, repeat(k), repeat(v), is_causal=True), *grouped())
    assert (site.key.op, site.value.op) == ("placeholder", "placeholder")
    assert site.key.meta["val"].shape[1] == KV_HEADS
    assert site.causal and site.phase == "prefill"


def test_enable_gqa_needs_no_repeat():
    (site,) = sites_of(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), *grouped())
    assert site.key.op == site.value.op == "placeholder"


NEAR_REPEATS = {
    "heads in the other order": lambda x: x.unsqueeze(1).expand(-1, TIMES, -1, -1, -1).flatten(1, 2),
    "repeat": lambda x: x.repeat(1, TIMES, 1, 1),
    "tokens repeated": lambda x: x.unsqueeze(3).expand(-1, -1, -1, TIMES, -1).flatten(2, 3),
    "tokens repeat_interleaved": lambda x: x.repeat_interleave(TIMES, dim=2),
    "a part of the tokens": lambda x: spread(x)[:, :, 1:],
    "a part of the tokens first": lambda x: spread(x[:, :, 1:]),
    "scaled on the way": lambda x: spread(x * 2),
    "another reshape": lambda x: (
        x[:, :, None].expand(BATCH, KV_HEADS, TIMES, 6, DIM).reshape(BATCH, KV_HEADS, TIMES * 6, DIM)
    ),
}


@pytest.mark.parametrize("name", NEAR_REPEATS)
def test_what_is_no_repeat_of_kv_heads_is_left(name):
    repeat = NEAR_REPEATS[name]

    def attend(q, k, v):
        q = q[:, :KV_HEADS] if repeat(k).shape[1] == KV_HEADS else q
        return sdpa(q, repeat(k), repeat(v))

    (site,) = sites_of(attend, *grouped())
    assert (
        site.key.meta["val"].shape == repeat(torch.empty(BATCH, KV_HEADS, 6, DIM)).shape
        or site.key.op != "placeholder"
    )
    assert site.key.op == "call_function"


def _changed_copy(x):
    x = x.clone()
    x[:, :, 0].mul_(2.0)
    return x


INPLACE = {
    "a copy that is changed": _changed_copy,
    "a copy of a changed copy": lambda x: _changed_copy(x).clone(),
    "a repeat that is changed": lambda x: _changed_copy(spread(x)),
    "a repeat of a changed copy": lambda x: spread(_changed_copy(x)),
    "a copied repeat of a changed copy": lambda x: spread(_changed_copy(x)).clone(),
}


@pytest.mark.parametrize("name", INPLACE)
def test_rows_that_are_written_in_place_are_not_taken_from_before_the_write(name):
    change = INPLACE[name]
    graph = traced(lambda q, k, v: sdpa(q, change(k), spread(v), enable_gqa=True, is_causal=True), *grouped())
    (site,) = find_attention(graph.graph)[0]
    assert site.key.op == "call_function"
    assert site.value.op == "placeholder"
    # Whatever was taken instead holds the values that the attention reads.
    given = grouped()
    env = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, node):
            if node is site.node:
                env["taken"] = self.env[site.key].clone()
            return super().run_node(node)

    Keep(graph, garbage_collect_values=False).run(*given)
    taken = env["taken"] if env["taken"].shape[1] == HEADS else spread(env["taken"])
    real = change(given[1])
    assert torch.equal(taken, real if real.shape[1] == HEADS else spread(real))


def cached(form, queries=3, length=9):
    """The only site of an attention over what an append returns, after `form(K, V)`."""

    def attend(q, k, v, handle):
        whole_k, whole_v = form(*torch.ops.hga.append(k, v, handle, length))
        return sdpa(q, whole_k, whole_v, enable_gqa=True)

    return sites_of(attend, *rows(queries, queries, KV_HEADS), HANDLE)[0]


@pytest.mark.parametrize(
    "form",
    [
        lambda k, v: (k, v),
        lambda k, v: (spread(k), spread(v)),
        lambda k, v: (k.contiguous(), v.contiguous()),
        lambda k, v: (k.repeat_interleave(TIMES, 1), spread(v)),
    ],
    ids=["plain", "repeated", "contiguous", "in two ways"],
)
def test_the_append_of_a_cached_attention_is_found(form):
    site = cached(form)
    assert site.append is not None
    assert (site.queries, site.keys) == (3, 9)


@pytest.mark.parametrize(
    "form",
    [
        lambda k, v: (v, k),
        lambda k, v: (k, k),
        lambda k, v: (k * 1.5, v),
        lambda k, v: (k[:, :, 1:], v[:, :, 1:]),
        lambda k, v: (k.flip(2), v),
    ],
    ids=["swapped", "K twice", "scaled", "sliced", "flipped"],
)
def test_what_is_not_all_that_an_append_returns_is_no_cached_attention(form):
    assert cached(form).append is None


def test_k_and_v_of_two_appends_are_no_cached_attention():
    def attend(q, k, v, one, other):
        first, _ = torch.ops.hga.append(k, v, one, 9)
        _, second = torch.ops.hga.append(k, v, other, 9)
        return sdpa(q, first, second, enable_gqa=True)

    graph = traced(attend, *rows(3, 3, KV_HEADS), HANDLE, HANDLE.clone())
    (site,) = find_attention(graph.graph)[0]
    assert site.append is None
    assert len(find_attention(graph.graph)[1]) == 2


def test_rows_that_change_between_append_and_attention_keep_them_apart():
    def attend(q, k, v, handle):
        k = k.clone()
        keys, values = torch.ops.hga.append(k, v, handle, 9)
        k[:, :, 0].zero_()
        return sdpa(q, keys, values, enable_gqa=True), k

    assert sites_of(attend, *rows(3, 3, KV_HEADS), HANDLE)[0].append is None


def test_rows_built_in_place_before_the_append_do_not_matter():
    def attend(q, k, v, handle):
        rotated = torch.empty_like(k)
        rotated[..., :4].copy_(k[..., 4:])
        rotated[..., 4:].copy_(k[..., :4])
        return sdpa(q, *torch.ops.hga.append(rotated, v, handle, 9), enable_gqa=True)

    assert sites_of(attend, *rows(3, 3, KV_HEADS), HANDLE)[0].append is not None


def test_an_append_that_no_attention_reads_is_reported():
    def attend(q, k, v, handle):
        keys, values = torch.ops.hga.append(k, v, handle, 9)
        return torch.softmax(q[:, :KV_HEADS] @ keys.transpose(2, 3), -2) @ values

    graph = traced(attend, *rows(3, 3, KV_HEADS), HANDLE).graph
    assert find_attention(graph)[0] == []
    (left,) = find_attention(graph)[1]
    assert left.phase == "prefill"


@pytest.mark.parametrize(
    ("keywords", "scale"),
    [({}, DIM**-0.5), ({"scale": 1.0}, 1.0), ({"scale": 0.25}, 0.25)],
    ids=["default", "1", "1/4"],
)
def test_the_scale_is_read(keywords, scale):
    (site,) = sites_of(lambda q, k, v: sdpa(q, k, v, is_causal=True, **keywords), *rows(6))
    assert site.scale == pytest.approx(scale)


def test_dropout_and_mask_are_read_wherever_they_are_given():
    mask = torch.ones(6, 6, dtype=torch.bool)
    (site,) = sites_of(lambda q, k, v, m: sdpa(q, k, v, m, 0.5), *rows(6), mask)
    assert site.dropout == 0.5 and not site.causal
    # Brought to four dimensions, it is the mask that was given.
    assert site.mask.args[0].args[0].op == "placeholder"


def test_a_single_query_is_a_decode():
    assert sites_of(lambda q, k, v: sdpa(q, k, v), *rows(1, 9))[0].phase == "decode"


class Block(torch.nn.Module):
    def forward(self, x):
        x = x.unflatten(-1, (2, 4)).transpose(1, 2)
        return sdpa(x, x * 2, x * 3, is_causal=True).transpose(1, 2).flatten(2)


class Stack(torch.nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.layers = torch.nn.ModuleList(blocks)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Wrapped(torch.nn.Module):
    def __init__(self, inside):
        super().__init__()
        self.parts = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity(), inside])

    def forward(self, x):
        return self.parts[2](x)


class Deep(torch.nn.Module):
    """A layer with a numbered part inside, as T5's."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.ModuleList([Block()])

    def forward(self, x):
        return self.layer[0](x)


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        (lambda x, model=Stack([Block(), Block(), Block()]): model(x), [0, 1, 2]),
        (lambda x, model=Wrapped(Stack([Block(), Block()])): model(x), [0, 1]),
        (lambda x, model=Stack([Deep(), Deep()]): model(x), [0, 1]),
        (lambda *given, model=Stack([Block(), Block()]): model(*given), [0, 1]),
        (lambda x, models=([Stack([Block(), Block()])],): models[0][0](x), [0, 1]),
        (lambda x, model=Block(): model(x), [None]),
    ],
    ids=["stack", "wrapped", "numbers inside", "arguments", "in a list", "one module"],
)
def test_layers_are_numbered_by_the_model(function, layers):
    sites = dynamo_graph(
        function, torch.randn(1, 6, 8), use=lambda graph: find_attention(retrace(graph).graph)[0]
    )
    assert [site.layer for site in sites] == layers
