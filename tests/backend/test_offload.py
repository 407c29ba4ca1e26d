"""Compiled models whose K/V lie on files, and what is left of a request that found no room."""

import gc
import os

import pytest
import torch
from tiny_models import TIGHT, make_model, tokens

from hga_compile.cache import HGACache, cache_memory
from hga_compile.kernels.states import STATES
from hga_compile.store import host_memory
from hga_compile.store.errors import StoreFullError

# Heads of 64 channels: a page of the nvme tier is 60 tokens.
LARGE = {"hidden_size": 256}
PROMPT, MORE = 200, 6
NVME = {"tier": "nvme", "offload.nvme_cache": 2**17}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Count host RAM from here on: what other tests still hold is not a matter of these."""
    monkeypatch.setattr(host_memory, "HOST", host_memory.HostMemory(host_memory.available_bytes))


def generated(model, options, prompt, cache=None):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="hga", options={**TIGHT, **options})
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": MORE, "do_sample": False}
    return compiled.generate(prompt, past_key_values=cache, output_logits=True,
                             return_dict_in_generate=True, **settings)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model("llama", **LARGE)


def test_generation_from_files_gives_the_bits_of_generation_from_ram(model, tmp_path, recompile):
    prompt = tokens(1, PROMPT)
    files = len(os.listdir("/proc/self/fd"))
    want = generated(model, {"tier": "host"}, prompt)
    got = generated(model, NVME | {"offload.nvme_folder": str(tmp_path)}, prompt)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(one, other) for one, other in zip(got.logits, want.logits, strict=True))
    held = cache_memory(got.past_key_values)
    assert held.nvme_kv >= 3 * 2 * 2 * 2**15 and held.accelerator_kv == 0 and held.host_kv > 0
    assert os.listdir(tmp_path) == [] and len(os.listdir("/proc/self/fd")) > files
    # All of it goes with the cache.
    got.past_key_values.reset()
    assert cache_memory(got.past_key_values).nvme_kv == 0
    assert len(os.listdir("/proc/self/fd")) == files


def test_an_explicit_cache_keeps_its_rows_on_files_from_the_first_token_on(model, recompile):
    from hga_compile.configs.loader import resolve_profile

    cache = HGACache(model.config, profile=resolve_profile(NVME))
    with torch.no_grad():
        model(tokens(1, PROMPT), past_key_values=cache)
    assert cache_memory(cache).nvme_kv > 0 and cache_memory(cache).accelerator_kv == 0
    states = {type(STATES.get(layer.handle).pages).__name__ for layer in cache.layers}
    assert states == {"NvmePages"}


@pytest.mark.parametrize("given", [True, False])
def test_what_is_reserved_is_the_caches_own_affair_if_it_was_given_a_profile(
    model, given, monkeypatch, recompile
):
    from hga_compile.configs.loader import resolve_profile

    own = resolve_profile({**TIGHT, "tier": "host", "offload.reserve_tokens": 512})
    if not given:
        monkeypatch.setattr("hga_compile.cache.resolve_profile", lambda _: own)
    cache = HGACache(model.config, profile=own if given else None)
    options = {**TIGHT, "tier": "host", "offload.reserve_tokens": 1024}
    compiled = torch.compile(model, backend="hga", dynamic=True, options=options)
    prompt = tokens(1, PROMPT)
    with torch.no_grad():
        model(prompt[:, :2], past_key_values=cache)
        opened = [layer.state.pages for layer in cache.layers]
        compiled(prompt[:, 2:], past_key_values=cache)
    pages = [layer.state.pages for layer in cache.layers]
    assert [one.place.reserve_tokens for one in pages] == [512 if given else 1024] * len(pages)
    # Nor were the rows copied to other pages.
    assert given == all(one is before for one, before in zip(pages, opened, strict=True))


@pytest.mark.parametrize("tier", ["host", pytest.param("nvme", marks=pytest.mark.slow)])
def test_a_request_without_room_ends_and_the_next_one_is_right(model, tier, tmp_path, monkeypatch, recompile):
    short, long = tokens(1, 64, seed=3), tokens(1, 600)
    options = {"offload.nvme_folder": str(tmp_path), **NVME, "tier": tier}
    want = generated(model, options, short)
    files, states = len(os.listdir("/proc/self/fd")), STATES.count()
    if tier == "host":
        # Room for 300 tokens of two layers.
        options["offload.host_budget"] = 300 * 2 * 2 * 2 * 64 * 4
    else:
        from hga_compile.store.storage_io import StorageIO

        def refuse(self, fd, begin, end):
            if end > 2**18:
                raise OSError(28, os.strerror(28))
            os.posix_fallocate(fd, begin, end - begin)

        monkeypatch.setattr(StorageIO, "allocate", refuse)
    sequences, logits = want.sequences, want.logits
    del want
    with pytest.raises(StoreFullError) as refused:
        generated(model, options, long)
    assert ("offload." in str(refused.value) and refused.value.need > refused.value.free) or tier == "nvme"
    refused = None
    got = generated(model, options, short)
    assert torch.equal(got.sequences, sequences)
    assert all(torch.equal(one, other) for one, other in zip(got.logits, logits, strict=True))
    del got
    gc.collect()  # the traceback had the cache
    assert STATES.count() <= states and len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.slow
def test_a_cache_that_found_no_room_goes_on_where_it_was(model, recompile):
    """Compiled code counts tokens once a step is through: the same step can be taken again, shorter."""
    budget = 300 * 2 * 2 * 2 * 64 * 4
    options = {**TIGHT, "tier": "host", "offload.host_budget": budget}
    compiled = torch.compile(model, backend="hga", dynamic=True, options=options)
    ids = tokens(1, 600)
    with torch.no_grad():
        cache = HGACache(model.config)
        outs = [compiled(ids[:, :100], past_key_values=cache).logits]
        with pytest.raises(StoreFullError):
            compiled(ids[:, 100:], past_key_values=cache)
        assert cache.get_seq_length() == 100
        outs.append(compiled(ids[:, 100:150], past_key_values=cache).logits)
        torch._dynamo.reset()
        other = torch.compile(model, backend="hga", dynamic=True, options={**TIGHT, "tier": "host"})
        fresh = HGACache(model.config)
        again = [other(ids[:, :100], past_key_values=fresh).logits,
                 other(ids[:, 100:150], past_key_values=fresh).logits]  # fmt: skip
    assert all(torch.equal(one, two) for one, two in zip(outs, again, strict=True))
