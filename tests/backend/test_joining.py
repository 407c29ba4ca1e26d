"""Caches of requests joined to a batch and split again: each request goes on as by itself."""

import gc

import pytest
import torch
from tiny_models import FULL, TIGHT, Pair, make_config, make_model, run, tokens

from hga_compile.cache import HGACache, cache_memory
from hga_compile.configs.profile import Profile
from hga_compile.kernels.site import SiteConfig
from hga_compile.kernels.states import STATES
from hga_compile.store.errors import JoinError, SnapshotError, StoreFullError
from hga_compile.store.host_memory import HOST

RAGGED = (37, 60, 22)
MORE = 3


def profile_of(settings=FULL, tier="host", **more) -> Profile:
    routing = {name.removeprefix("routing."): value for name, value in settings.items() if "." in name}
    offload = {"tier": tier, "nvme_cache": 2**17, **more.pop("offload", {})}
    fields = {"routing": routing | more, "offload": offload, "compile": {"inner": "eager"}}
    return Profile.model_validate({"name": "test", **fields})


@pytest.fixture(scope="module")
def pair_of():
    """Each model compiled once for each profile of this file."""
    made = {}

    def get(name, profile) -> Pair:
        key = name, profile.model_dump_json()
        if key not in made:
            made[key] = Pair(model_of(name), {"profile": profile})
        return made[key]

    return get


def model_of(name, **more):
    # Heads of 64 channels, where they can be had: a page of the nvme tier is then 60 tokens.
    sizes = {"llama": {"hidden_size": 256, "num_hidden_layers": 1}, "gemma3": {}}[name]
    return make_model(name, **sizes | more)


def prompts(lengths=RAGGED):
    return [tokens(1, length, seed=length) for length in lengths]


def prefilled(model, profile, lengths=RAGGED):
    """A cache for each prompt, which the model has read."""
    caches = [HGACache(model.config, profile) for _ in lengths]
    for cache, prompt in zip(caches, prompts(lengths), strict=True):
        model(prompt, past_key_values=cache)
    return caches


def next_steps(batch, count=MORE, seed=3):
    return list(tokens(batch, count, seed=seed).split(1, 1))


def alone(pair, caches, steps):
    """Logits of every step, ``[batch, steps, vocabulary]``, of one request after the other."""
    logits = [
        torch.cat(run(pair.compiled, cache, [step[place : place + 1] for step in steps]), 1)
        for place, cache in enumerate(caches)
    ]
    return torch.cat(logits)


def together(pair, cache, steps):
    return torch.cat([step_of(pair.compiled, cache, step, cache.attention_mask(1)) for step in steps], 1)


def step_of(model, cache, step, mask):
    place = mask.cumsum(1)[:, -step.shape[1] :] - 1
    return model(step, past_key_values=cache, attention_mask=mask, position_ids=place.clamp(min=0)).logits


def stored(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_requests_of_any_length_go_on_in_a_batch_and_alone_again(name, pair_of):
    profile = profile_of()
    pair = pair_of(name, profile)
    model = pair.compiled if name == "gemma3" else pair.plain  # so that windows alone are kept
    caches, reference = prefilled(model, profile), prefilled(model, profile)
    joined = HGACache.join(caches)
    assert joined.get_seq_length() == 60 and joined.padding == [23, 0, 38]
    assert_same(together(pair, joined, next_steps(3)), alone(pair, reference, next_steps(3)))
    assert [cache.get_seq_length() for cache in caches] == list(RAGGED)
    parts = joined.split()
    assert [part.get_seq_length() for part in parts] == [length + MORE for length in RAGGED]
    assert [part.padding for part in parts] == [[0]] * 3
    more = next_steps(3, seed=4)
    assert_same(alone(pair, parts, more), alone(pair, reference, more))


@pytest.mark.parametrize(
    "routing",
    [
        {"chunk_size": 16},
        pytest.param({"chunk_size": 16, "chunk_stage": "on"}, marks=pytest.mark.slow),
        pytest.param({"chunk_size": 16, "tail": "estimate"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_requests_that_differ_by_whole_chunks_are_routed_as_alone(routing, pair_of):
    profile = profile_of(TIGHT, **routing)
    pair, lengths = pair_of("llama", profile), (70, 102, 86)
    caches = prefilled(pair.compiled if "tail" in routing else pair.plain, profile, lengths)
    dense = prefilled(pair.plain, profile, lengths)
    steps = next_steps(3, 6)
    joined = HGACache.join(caches)
    got, expected = together(pair, joined, steps), alone(pair, caches, steps)
    assert_same(got, expected)
    read_all = torch.cat(
        [
            torch.cat(run(pair.plain, cache, [step[place : place + 1] for step in steps]), 1)
            for place, cache in enumerate(dense)
        ]
    )
    assert not torch.allclose(expected, read_all, atol=1e-3)
    more = next_steps(3, seed=4)
    assert_same(alone(pair, joined.split(), more), alone(pair, caches, more))


def test_requests_that_differ_by_whole_blocks_have_the_centres_that_they_have_alone(pair_of):
    profile = profile_of(TIGHT, chunk_size=16, centre="block")
    pair, lengths = pair_of("llama", profile), (140, 268)
    caches, steps = prefilled(pair.plain, profile, lengths), next_steps(2, 6)
    got, expected = together(pair, joined := HGACache.join(caches), steps), alone(pair, caches, steps)
    assert_same(got, expected)
    more = next_steps(2, seed=4)
    assert_same(alone(pair, joined.split(), more), alone(pair, caches, more))


@pytest.mark.parametrize("tier", ["host", "gpu", "nvme"])
def test_splitting_gives_the_bits_back_that_were_joined(tier):
    profile, model = profile_of(tier=tier), model_of("llama")
    caches = prefilled(model, profile, (137, 160, 122))
    pairs = HGACache.join([HGACache.join(caches[:2]), caches[2]])
    assert pairs.padding == [23, 0, 38]
    parts = pairs.split()
    for part, cache in zip(parts, caches, strict=True):
        for (key, value), (own_key, own_value) in zip(stored(part), stored(cache), strict=True):
            assert torch.equal(key, own_key) and torch.equal(value, own_value)
    for cache in (pairs, *parts):
        assert (cache_memory(cache).nvme_kv > 0) == (tier == "nvme")
        assert {type(layer.state.pages).__name__ for layer in cache.layers} == {
            "NvmePages" if tier == "nvme" else "Pages"
        }
    mask = pairs.attention_mask(1)
    assert_same(
        step_of(model, pairs, tokens(3, 1), mask)[:, 0],
        torch.cat(
            [model(tokens(3, 1)[[i]], past_key_values=cache).logits[:, 0] for i, cache in enumerate(parts)]
        ),
    )


def test_generation_goes_on_with_a_joined_cache(pair_of):
    profile = profile_of()
    pair = pair_of("llama", profile)
    settings = {"max_new_tokens": 4, "do_sample": False}
    caches = prefilled(pair.plain, profile)
    joined, whole = HGACache.join(caches), [torch.cat([p, tokens(1, 1, seed=9)], 1) for p in prompts()]
    expected = [
        pair.compiled.generate(ids, past_key_values=cache, **settings)[0, -4:]
        for ids, cache in zip(whole, caches, strict=True)
    ]
    padded = torch.stack([torch.nn.functional.pad(ids[0], (61 - ids.shape[1], 0)) for ids in whole])
    got = pair.compiled.generate(
        padded, past_key_values=joined, attention_mask=joined.attention_mask(1), **settings
    )
    assert torch.equal(got[:, -4:], torch.stack(expected))


def test_a_batch_that_was_padded_from_the_start_is_split_by_its_mask(pair_of):
    profile = profile_of()
    pair, longest = pair_of("llama", profile), max(RAGGED)
    padded = [torch.nn.functional.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts()]
    mask = torch.stack([(torch.arange(longest) >= longest - length).long() for length in RAGGED])
    cache = HGACache(pair.plain.config, profile)
    step_of(pair.plain, cache, torch.cat(padded), mask)
    assert cache.padding == [0, 0, 0]
    steps = next_steps(3)
    assert_same(alone(pair, cache.split(mask), steps), alone(pair, prefilled(pair.plain, profile), steps))
    for wrong, match in [(mask[:2], r"\[2, 60\], expected \[3, 60\]"), (mask.flip(1), "padded on the left")]:
        with pytest.raises(JoinError, match=match):
            cache.split(wrong)


def test_padding_follows_what_is_done_to_the_batch(pair_of, tmp_path):
    profile = profile_of()
    pair = pair_of("llama", profile)
    joined = HGACache.join(prefilled(pair.plain, profile))
    joined.save(tmp_path / "cache")
    assert HGACache.load(tmp_path / "cache", pair.plain.config, profile).padding == [23, 0, 38]
    joined.batch_select_indices(torch.tensor([2, 0]))
    assert joined.padding == [38, 23] and joined.attention_mask(2).tolist()[0] == 38 * [0] + 24 * [1]
    joined.batch_repeat_interleave(2)
    assert joined.padding == [38, 38, 23, 23]
    joined.reorder_cache(torch.tensor([3, 0, 1, 2]))
    assert joined.padding == [23, 38, 38, 23]
    joined.crop(-30)
    assert joined.get_seq_length() == 30 and joined.padding == [23, 30, 30, 23]
    with pytest.raises(JoinError, match="hold a token"):
        joined.split()
    joined.reset()
    assert joined.padding == []


def test_windows_of_requests_are_joined_and_split():
    """As they are kept by a compiled model: gemma3's layers with a window, run by their ops."""
    config = make_config("gemma3")
    torch.manual_seed(0)
    key, value, query = torch.randn(3, 3, 2, 40, 16)
    lengths, more = (30, 5, 17), 4

    def attend(cache, length, rows, new, mask=None):
        """Store the last `new` of `length` tokens of each row in every layer; what the windows return."""
        outs = []
        for layer in cache.layers:
            k, v, q = (
                torch.stack([part[row, :, end - new : end] for row, end in rows])
                for part in (key, value, query)
            )
            if not layer.slides:
                layer.update(k, v)
                continue
            if layer.handle is None:
                layer._open(k, v)
            layer.seen = length
            given = (q, k, v, layer.handle, length, mask, 0.25, layer.sliding_window)
            outs.append(torch.ops.hga.window_attention(*given))
        return torch.stack(outs, 2)

    def made():
        caches = [HGACache(config, profile_of()) for _ in lengths]
        for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            attend(cache, length, [(row, length)], length)
        return caches

    joined = HGACache.join(made())
    assert joined.padding == [0, 25, 13]
    rows = [(row, length + more) for row, length in enumerate(lengths)]
    got = attend(joined, 30 + more, rows, more, joined.attention_mask(more))
    alone = made()
    expected = [attend(cache, end, [(row, end)], more) for cache, (row, end) in zip(alone, rows, strict=True)]
    torch.testing.assert_close(got, torch.cat(expected))
    parts = joined.split()
    for part, cache in zip(parts, alone, strict=True):
        for layer, other in zip(part.layers, cache.layers, strict=True):
            assert layer.seen == other.seen and torch.equal(layer.keys, other.keys)
    with pytest.raises(RuntimeError, match=r"hide \[0, 25, 13\] tokens of padding"):
        attend(joined, 30 + more, rows, more, torch.ones(3, 34, dtype=torch.int64))
    kept = HGACache(config, profile_of())
    for layer in kept.layers:
        layer.update(key[:1], value[:1])
    with pytest.raises(JoinError, match="window of layer 0"):
        HGACache.join([alone[0], kept])


def test_a_joined_cache_refuses_a_mask_that_shows_its_padding():
    model, profile = model_of("llama"), profile_of()
    joined = HGACache.join(prefilled(model, profile))
    (layer,) = joined.layers
    query, rows = torch.randn(3, 4, 1, 64), torch.randn(3, 2, 1, 64)
    site = SiteConfig(0, "host", profile.routing).to_text()
    for mask in (None, torch.ones(3, 61, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"hide \[23, 0, 38\] tokens of padding"):
            torch.ops.hga.cached_attention(query, rows, rows, layer.handle, 61, mask, 0.125, site)
    mask = joined.attention_mask(1)
    out = torch.ops.hga.cached_attention(query, rows, rows, layer.handle, 61, mask, 0.125, site)
    assert bool(torch.isfinite(out).all())


def test_caches_that_do_not_fit_are_refused(pair_of):
    profile = profile_of()
    pair = pair_of("llama", profile)
    (cache,) = prefilled(pair.plain, profile, (22,))

    def filled(name="llama", profile=profile, **more):
        model = model_of(name, **more)
        other = HGACache(model.config, profile)
        model(tokens(1, 22), past_key_values=other)
        return other

    wider = filled(num_key_value_heads=4)
    for other, match in [
        (HGACache(pair.plain.config, profile), "layer 0 of cache 1 must keep its K/V in a store"),
        (wider, r"one model \(config\)"),
        (filled(profile=profile_of(tier="gpu")), r"one profile \(offload\)"),
        (filled(profile=profile_of(TIGHT)), r"one profile \(routing\)"),
    ]:
        with pytest.raises(JoinError, match=match):
            HGACache.join([cache, other])
    # Ranks of tensor parallelism have one config, and heads of their own.
    wider.config = cache.config
    with pytest.raises(JoinError, match=r"shape of layer 0.*\(4, 64, 64\).*\(2, 64, 64\)"):
        HGACache.join([cache, wider])
    with pytest.raises(JoinError, match="got none"):
        HGACache.join([])
    with pytest.raises(SnapshotError):
        HGACache(make_config("llama"), profile).save("nowhere")


def test_a_batch_that_finds_no_room_leaves_nothing_behind(pair_of, open_states):
    # The budget is the process's: other tests' caches may be there still, or gone and not cleared away.
    gc.collect()
    STATES.collect()
    profile = profile_of(offload={"host_budget": HOST.taken + 2**18})
    pair = pair_of("llama", profile)
    caches = prefilled(pair.plain, profile, (22, 30))
    before, held = open_states(), [cache_memory(cache).host_kv for cache in caches]
    many = caches * 4
    with pytest.raises(StoreFullError):
        HGACache.join(many)
    assert open_states() == before and [cache_memory(cache).host_kv for cache in caches] == held
