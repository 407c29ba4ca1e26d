"""A cache saved and loaded: generation goes on as if it had never stopped, and in its own model only."""

import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tiny_models import TIGHT, Pair, make_config, make_model, run, tokens

import hga_compile
from hga_compile.cache import HGACache, HGALayer, HGASlidingLayer, cache_memory
from hga_compile.configs.loader import load_profile
from hga_compile.configs.profile import Offload, Profile
from hga_compile.store.errors import SnapshotError, StoreFullError
from hga_compile.store.snapshot import SnapshotReader
from hga_compile.store.storage_io import StorageIO

PROMPT, MORE = 150, 4


def profile_of(tier: str = "host", **routing: object) -> Profile:
    settings = {name.removeprefix("routing."): value for name, value in TIGHT.items() if "." in name}
    return Profile.model_validate(
        {
            "name": "tight",
            "routing": settings | routing,
            "offload": {"tier": tier, "nvme_cache": 2**17},
            "compile": {"inner": "eager"},
        }
    )


def pair_of(name: str, profile: Profile) -> Pair:
    # Heads of 64 channels, where they can be had: a page of the nvme tier is then 60 tokens.
    return Pair(make_model(name, **({"hidden_size": 256} if name == "llama" else {})), {"profile": profile})


def steps(pair: Pair, cache: HGACache, count: int = MORE) -> list[torch.Tensor]:
    return run(pair.compiled, cache, list(tokens(2, count, seed=2).split(1, 1)))


@pytest.mark.parametrize(
    ("name", "tiers"),
    [
        ("llama", ("gpu", "nvme")),
        pytest.param("llama", ("nvme", "host"), marks=pytest.mark.slow),
        pytest.param("gemma3", ("host", "gpu"), marks=pytest.mark.slow),
    ],
)
def test_a_loaded_cache_goes_on_with_the_same_bits(name, tiers, tmp_path, recompile):
    before, after = (profile_of(tier) for tier in tiers)
    pair = pair_of(name, before)
    cache = HGACache(pair.plain.config, profile=before)
    run(pair.compiled, cache, [tokens(2, PROMPT)])
    cache.save(tmp_path / "cache")
    loaded = HGACache.load(tmp_path / "cache", pair.plain.config, profile=after)
    assert loaded.get_seq_length() == PROMPT
    for tier, place in zip(tiers, (cache, loaded), strict=True):
        assert (cache_memory(place).nvme_kv > 0) == (tier == "nvme")
    expected = steps(pair, cache)
    recompile()
    got = steps(Pair(pair.plain, {"profile": after}), loaded)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    for layer, other in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


def test_codes_about_centres_that_move_are_made_again(tmp_path):
    profile = profile_of(centre="block")
    pair = pair_of("llama", profile)
    cache = HGACache(pair.plain.config, profile=profile)
    run(pair.compiled, cache, [tokens(2, PROMPT)])
    cache.save(tmp_path / "cache")
    loaded = HGACache.load(tmp_path / "cache", pair.plain.config, profile=profile)
    got, expected = steps(pair, loaded), steps(pair, cache)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    for each in (cache, loaded):
        each.crop(-30)  # back into the first block
    again = [run(pair.compiled, each, [tokens(2, 30, seed=5)])[0] for each in (cache, loaded)]
    assert torch.equal(*again)


@pytest.mark.slow
def test_estimates_of_the_tail_go_on_too(tmp_path, recompile):
    profile = profile_of(tail="estimate", chunk_size=16)
    pair = pair_of("llama", profile)
    cache = HGACache(pair.plain.config, profile=profile)
    run(pair.compiled, cache, [tokens(2, PROMPT)])
    cache.save(tmp_path / "cache")
    loaded = HGACache.load(tmp_path / "cache", pair.plain.config, profile=profile)
    loaded.save(tmp_path / "again")
    for source in (loaded, HGACache.load(tmp_path / "again", pair.plain.config, profile=profile)):
        fresh = HGACache.load(tmp_path / "cache", pair.plain.config, profile=profile)
        assert all(
            torch.equal(one, other)
            for one, other in zip(steps(pair, source), steps(pair, fresh), strict=True)
        )
    expected = steps(pair, cache)
    fresh = HGACache.load(tmp_path / "cache", pair.plain.config, profile=profile)
    assert all(torch.equal(one, other) for one, other in zip(steps(pair, fresh), expected, strict=True))


GO_ON = """
    import sys
    import torch
    from tiny_models import make_model, tokens
    from hga_compile import HGACache, Profile
    path, out = sys.argv[1:]
    profile = Profile.model_validate_json(open(f"{path}.json").read())
    model = torch.compile(make_model("llama"), backend="hga", options={"profile": profile})
    cache = HGACache.load(path, model.config, profile=profile)
    ids = torch.cat([tokens(1, 150), tokens(1, 1, seed=5)], 1)
    torch.save(model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False), out)
"""


@pytest.mark.slow
def test_generation_goes_on_in_another_process(tmp_path, recompile):
    profile = profile_of()
    model = make_model("llama")
    compiled = torch.compile(model, backend="hga", options={"profile": profile})
    cache = HGACache(model.config, profile=profile)
    with torch.no_grad():
        compiled(tokens(1, PROMPT), past_key_values=cache)
    path = tmp_path / "cache"
    cache.save(path)
    Path(f"{path}.json").write_text(profile.model_dump_json())
    ids = torch.cat([tokens(1, PROMPT), tokens(1, 1, seed=5)], 1)
    expected = compiled.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    root = Path(hga_compile.__file__).parents[1]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)])}
    command = [sys.executable, "-c", textwrap.dedent(GO_ON), str(path), str(tmp_path / "out")]
    subprocess.run(command, env=environ, check=True)
    assert torch.equal(torch.load(tmp_path / "out"), expected)


# --- what is refused ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A cache of a tiny model, filled without compiling anything, and the folder that it was saved to."""
    config, folder = make_config("llama"), tmp_path_factory.mktemp("saved")
    cache = HGACache(config)
    for number, layer in enumerate(cache.layers):
        torch.manual_seed(number)
        layer.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16))
    cache.save(folder / "cache", model="mine")
    return cache, folder / "cache"


def changed(**changes):
    return make_config("llama", **changes)


@pytest.mark.parametrize(
    ("config", "model", "words"),
    [
        (changed(), "yours", ["another model", "'mine'", "'yours'", "(model)"]),
        (changed(), None, ["another model"]),
        (changed(num_hidden_layers=4), "mine", ["another number of layers", "2", "4"]),
        (changed(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "mine", ["another rope"]),
        (changed(num_key_value_heads=1), "mine", ["another config"]),
        (changed(intermediate_size=128), "mine", ["another config"]),
        (changed(dtype="bfloat16"), "mine", ["another dtype", "bfloat16"]),
        (make_config("qwen3"), "mine", ["another"]),
    ],
)
def test_another_model_is_refused(saved, config, model, words):
    with pytest.raises(SnapshotError) as refused:
        HGACache.load(saved[1], config, model=model)
    text = str(refused.value)
    assert [word for word in words if word not in text] == [], text
    assert "\n" not in text


def test_another_revision_is_refused(saved, tmp_path):
    config = make_config("llama")
    config._commit_hash = "abc"
    with pytest.raises(SnapshotError, match=r"another revision, got None, expected 'abc'"):
        HGACache.load(saved[1], config, model="mine")


def test_the_same_model_is_not_refused(saved):
    cache = HGACache.load(saved[1], make_config("llama"), model="mine")
    for layer, other in zip(cache.layers, saved[0].layers, strict=True):
        assert torch.equal(layer.keys, other.keys)


def test_a_format_of_the_future_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("hga_compile.saving.FORMAT", 2)
    with pytest.raises(SnapshotError, match=r"another format, got 1, expected 2 \(save it anew\)"):
        HGACache.load(saved[1], make_config("llama"), model="mine")


def test_a_damaged_file_is_refused_and_nothing_of_it_stays(saved, tmp_path, open_states):
    raw, before = bytearray(saved[1].read_bytes()), open_states()
    raw[-5] ^= 1
    (tmp_path / "bad").write_bytes(raw)
    with pytest.raises(SnapshotError, match=r"another checksum for layers\.1\.value.*save it anew"):
        HGACache.load(tmp_path / "bad", make_config("llama"), model="mine")
    assert open_states() == before


def test_a_cache_that_does_not_fit_is_refused_and_nothing_of_it_stays(saved, open_states):
    before = open_states()
    profile = Profile(name="small", offload=Offload(tier="host", host_budget=6000))
    with pytest.raises(StoreFullError, match=r"offload\.host_budget"):
        HGACache.load(saved[1], make_config("llama"), profile=profile, model="mine")
    assert open_states() == before


def test_an_empty_cache_cannot_be_saved(tmp_path):
    with pytest.raises(SnapshotError, match=r"layer 0 must keep its K/V in a store"):
        HGACache(make_config("llama")).save(tmp_path / "cache")
    assert os.listdir(tmp_path) == []


def test_the_file_holds_rows_as_they_are_and_no_pickle(saved):
    with SnapshotReader(str(saved[1]), StorageIO()) as reader:
        assert sorted(reader.entries) == [f"layers.{n}.{what}" for n in (0, 1) for what in ("key", "value")]
        rows = reader.whole("layers.1.key")
    assert torch.equal(rows.transpose(0, 1)[None], saved[0].layers[1].keys)
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(saved[1].read_bytes()[8:])


def test_kinds_of_layers_come_back(tmp_path):
    config = make_config("gemma3")
    cache = HGACache(config)
    for layer in cache.layers:
        layer.update(torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16))
    cache.save(tmp_path / "cache")
    loaded = HGACache.load(tmp_path / "cache", config)
    assert [type(layer) for layer in loaded.layers] == [HGASlidingLayer, HGALayer]
    assert [layer.get_seq_length() for layer in loaded.layers] == [30, 30]
    loaded.crop(-3)
    assert loaded.get_seq_length() == 27
    assert load_profile("default").offload.home == "host"
