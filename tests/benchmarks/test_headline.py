"""The whole-model benchmark: its 8-bit model, its systems, what it measures, and the command on a CPU."""

import json
import time

import pytest
import torch
from table import render
from transformers import DynamicCache
from wholemodel import eight_bit, measuring
from wholemodel.attention import static_cache
from wholemodel.measuring import Plan, measure, percentile
from wholemodel.picture import draw
from wholemodel.results import Results
from wholemodel.shape import build, config_of, weight_bytes
from wholemodel.systems import SYSTEMS, Entry, Setup, System, Unavailable

from hga_compile.configs.loader import resolve_profile
from hga_compile.configs.profile import Profile

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny():
    return build(config_of("tiny"), CPU, torch.float32)


def plain(model):
    """The model as transformers has it, with the 8-bit weights' values in 32 bits."""
    from transformers import AutoModelForCausalLM

    def values(weight, scale):
        return torch.nn.Parameter(weight.float() * scale[..., None], requires_grad=False)

    other = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    for mine, theirs in zip(model.model.layers, other.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            part = getattr(mine.self_attn, name)
            getattr(theirs.self_attn, name).weight = values(part.weight, part.scale)
        experts = mine.mlp.experts
        theirs.mlp.experts.gate_up_proj = values(experts.up, experts.up_scale)
        theirs.mlp.experts.down_proj = values(experts.down, experts.down_scale)
    return other


def test_the_eight_bit_model_computes_what_transformers_does_with_the_same_values(tiny):
    ids = torch.randint(128, (2, 37))
    with torch.no_grad():
        want, got = plain(tiny)(ids).logits, tiny(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_layers_are_in_eight_bits_and_the_rest_is_not(tiny):
    stored = {name: part.dtype for name, part in tiny.named_buffers() if part.element_size() == 1}
    assert len(stored) == 2 * (4 + 2)
    config = tiny.config
    heads = config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    experts = 3 * config.num_experts * config.moe_intermediate_size
    assert sum(tiny.get_buffer(name).nbytes for name in stored) == 2 * config.hidden_size * (heads + experts)
    assert weight_bytes(tiny) > 4 * 2 * config.vocab_size * config.hidden_size
    assert not any(part.is_meta for part in (*tiny.parameters(), *tiny.buffers()))


def test_a_shape_may_have_fewer_layers_but_not_more():
    assert config_of("qwen3-30b", 3).num_hidden_layers == 3
    with pytest.raises(SystemExit, match="48 layers, got 49"):
        config_of("qwen3-30b", 49)


def test_eight_bits_are_as_near_as_their_mantissa():
    weight = torch.randn(5, 7, 64)
    packed, scale = eight_bit.quantise(weight)
    assert packed.element_size() == 1 and scale.shape == (5, 7)
    error = (packed.float() * scale[..., None] - weight).abs()
    # Three bits behind the point, and what lies below the smallest normal number.
    assert bool((error <= weight.abs() / 16 + scale[..., None] * 2**-10).all())


@pytest.mark.parametrize(("begin", "new"), [(0, 9), (9, 6), (20, 1)])
def test_attention_of_a_static_cache_reads_what_is_filled(begin, new):
    length, buffer = begin + new, 32
    query = torch.randn(1, 4, new, 8)
    key, value = torch.randn(2, 1, 2, buffer, 8).unbind()
    with static_cache(length):
        got = torch.ops.wholemodel.attend(query, key, value, 0.3)
    key, value = (part[:, :, :length].repeat_interleave(2, 1) for part in (key, value))
    seen = torch.arange(length) <= begin + torch.arange(new)[:, None]
    want = torch.softmax((query @ key.mT * 0.3).masked_fill(~seen, -torch.inf), -1) @ value
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["dense", "dynamic"])
def test_a_dense_system_decodes_as_transformers_does(tiny, name):
    ids = torch.randint(128, (1, 60))
    tiny.set_attn_implementation("sdpa")
    with torch.no_grad():
        cache = DynamicCache(config=tiny.config)
        tiny(ids, past_key_values=cache)
        want = tiny(ids[:, -1:], past_key_values=cache).logits.argmax(-1)
        system = SYSTEMS[name].make(tiny, Setup(60, 1, inner="eager"))
        for begin in (0, 2, 31):
            system.prefill(ids[:, begin : {0: 2, 2: 31, 31: 60}[begin]], begin)
        assert torch.equal(system.decode(ids[:, -1:]), want)
    assert system.held().gpu_kv == 2 * 2 * 61 * 2 * 16 * 4


def test_contexts_share_compiled_code_but_not_what_is_reserved(tiny):
    kept, held = {}, []
    profile = resolve_profile({"offload.tier": "host"})
    for context in (96, 160):
        ids = torch.randint(128, (1, context))
        with torch.no_grad():
            system = SYSTEMS["hga"].make(tiny, Setup(context, 4, profile, inner="eager", kept=kept))
            system.prefill(ids[:, :2], 0)
            system.prefill(ids[:, 2:], 2)
        held += [layer.state.pages.place.reserve_tokens for layer in system.cache.layers]
    assert held == [100, 100, 164, 164] and len(kept) == 1


class Broken(System):
    """Runs into something at its third piece of the prompt."""

    error: Exception = RuntimeError("CUDA out of memory. Tried to allocate")

    def new_cache(self):
        return DynamicCache()

    def prefill(self, ids, begin):
        if begin > 20:
            raise self.error
        super().prefill(ids, begin)


PLAN = Plan(step=16, steps=3, warmup=1, limit=60)


def run(tiny, kind, plan=PLAN):
    return measure(Entry("it", kind), tiny, torch.randint(128, (1, 64)), Setup(64, 8, inner="eager"), plan)


def test_running_out_of_memory_is_a_result(tiny):
    found = run(tiny, Broken)
    assert (found["status"], found["stage"], found["reached"]) == ("out of memory", "prefill", 34)


def test_what_fails_otherwise_says_what_it_was(tiny):
    class Wrong(Broken):
        error = ValueError("no such thing")

    found = run(tiny, Wrong)
    assert (found["status"], found["reason"]) == ("failed", "ValueError: no such thing")


def test_a_system_that_is_not_here_says_what_it_wants(tiny):
    class Absent(Broken):
        def new_cache(self):
            raise Unavailable("it wants a package")

    assert run(tiny, Absent) | {"seconds": 0} == {
        "status": "unavailable", "reason": "it wants a package", "stage": "start", "reached": 0, "seconds": 0,
    }  # fmt: skip


def test_a_point_ends_when_its_time_is_up(tiny):
    class Slow(Broken):
        def prefill(self, ids, begin):
            time.sleep(5)

    began = time.perf_counter()
    found = run(tiny, Slow, Plan(step=16, steps=3, warmup=1, limit=0.2))
    assert found["status"] == "time limit" and time.perf_counter() - began < 4


def test_what_is_measured(tiny):
    found = run(tiny, SYSTEMS["dynamic"].make)
    assert found["status"] == "ok" and found["reached"] == 64
    assert found["prefill"]["tokens"] == 62 and found["prefill"]["tokens_per_second"] > 0
    assert found["decode"]["steps"] == 3
    assert 0 < found["decode"]["median_ms"] <= found["decode"]["p99_ms"]
    assert found["memory"]["gpu_kv"] == 2 * 2 * 68 * 2 * 16 * 4


def test_a_slow_system_decodes_fewer_tokens(tiny):
    found = run(tiny, SYSTEMS["dynamic"].make, Plan(step=16, steps=40, warmup=1, limit=60, patience=0.0))
    assert found["status"] == "ok" and found["decode"]["steps"] == 16


def test_percentiles_are_values_that_occurred():
    values = [float(number) for number in range(1, 201)]
    assert percentile(values, 0.99) == 198 and percentile(values, 0.5) == 100
    assert percentile([7.0], 0.99) == 7.0


HEADER = {
    "benchmark": "headline",
    "environment": {"device": "a GPU", "torch": "2", "transformers": "5", "date": "2026-11-23"},
    "model": {"name": "tiny"},
    "settings": {"cap": 2**35, "steps": 3, "replay": ["routes_16384.npz"]},
}


def point(system="hga", context=65536, status="ok", **more):
    found = {
        "system": system, "label": SYSTEMS[system].label, "order": list(SYSTEMS).index(system),
        "context": context, "status": status, "reason": "", "stage": "decode", "reached": context,
        "code": "c", "capped": True, "prefill": {"tokens_per_second": 9000.0, "step": 2048},
        "decode": {"median_ms": 8.25, "p99_ms": 9.5, "pcie_bytes": 5e6, "hit_rate": 0.9},
        "memory": {
            "weights": 29 << 30, "gpu_kv": 0, "index": 1 << 29, "hot": 1 << 28, "activations": 1 << 27,
            "staging": 1 << 26, "host_kv": 6 << 30, "reserved": 30 << 30, "spare": 2 << 30,
        },
    }  # fmt: skip
    if status != "ok":
        del found["decode"], found["memory"]
    return found | more


def test_points_are_kept_and_replaced(tmp_path):
    path = tmp_path / "out.json"
    results = Results(path, HEADER)
    results.add(point(status="time limit"))
    results.add(point("dense", status="out of memory"))
    again = Results(path, HEADER)
    assert again.has("dense", 65536, "c") and not again.has("dense", 65536, "other code")
    assert not again.has("hga", 65536, "c")
    again.add(point())
    assert Results(path, HEADER).has("hga", 65536, "c") and len(json.loads(path.read_text())["points"]) == 2
    assert Results(path, HEADER, fresh=True).points == []
    with pytest.raises(SystemExit, match="points of another settings"):
        Results(path, {**HEADER, "settings": {"cap": 1}})


def test_table_and_picture(tmp_path):
    replayed = {"median_ms": 5.5, "p99_ms": 6.0, "pcie_bytes": 2e6, "hit_rate": 0.94}
    points = [point(decode_replayed=replayed), point("dense", status="out of memory", stage="prefill")]
    path = tmp_path / "headline.json"
    path.write_text(json.dumps({**HEADER, "points": points}))
    lines = render(path).splitlines()
    assert lines[2].split("|")[1:4] == [" 65536 ", " hga, K/V in host RAM ", " 30.00 "]
    assert " 8.25 " in lines[2] and " 5.50 " in lines[3] and "recorded routes" in lines[3]
    assert "out of memory in prefill" in lines[4]
    draw(points, tmp_path / "out.png", 2**35)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_whole_command_on_a_cpu(tmp_path, capsys):
    import headline

    out = tmp_path / "out.json"
    command = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--inner", "eager", "--steps", "2",
               "--warmup", "1", "--step", "64", "--json", str(out)]  # fmt: skip
    peers = "dense,dynamic,offloaded"
    assert headline.main([*command, "--systems", peers, "--contexts", "96"]) == 0
    assert headline.main([*command, "--systems", peers, "--contexts", "96,160"]) == 0
    points = json.loads(out.read_text())["points"]
    status = {(one["system"], one["context"]): one["status"] for one in points}
    assert status == {
        ("dense", 96): "ok", ("dynamic", 96): "ok", ("offloaded", 96): "unavailable",
        ("dense", 160): "ok", ("dynamic", 160): "ok", ("offloaded", 160): "unavailable",
    }  # fmt: skip
    assert capsys.readouterr().err.count("at 96 tokens") == 3
    assert "HF dynamic cache" in render(out) and out.with_suffix(".png").is_file()
    assert headline.main([*command, "--systems", "dense", "--contexts", "96"]) == 0
    assert "every point is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_hga_in_the_whole_command(tmp_path):
    import headline

    out = tmp_path / "out.json"
    command = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--inner", "eager", "--steps", "4",
               "--warmup", "2", "--step", "256", "--json", str(out), "--systems", "hga",
               "--contexts", "768,1024", "--set", "routing.budget.fraction=0.1",
               "--set", "routing.dense_below=256"]  # fmt: skip
    assert headline.main(command) == 0
    found, longer = json.loads(out.read_text())["points"]
    assert found["prefill"]["compiled_steps"] == 1 and longer["prefill"]["compiled_steps"] == 0
    assert found["status"] == "ok" and found["routed"]["attended"] < 0.5
    assert found["memory"]["index"] > 0 and found["memory"]["host_kv"] > 0
    assert 0 < found["decode"]["pcie_bytes"] < found["memory"]["host_kv"] / 2


def test_the_plan_picks_what_hga_runs_with_under_the_cap():
    import headline

    options = headline.parser().parse_args([])
    config = config_of("qwen3-30b")

    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.all = torch.nn.Buffer(torch.empty(29 * 2**30, dtype=torch.uint8, device="meta"))

    profile, step = headline._settings(options, Weights(), config, 65536, 32 * 2**30)
    assert isinstance(profile, Profile) and profile.offload.tier == "host"
    assert profile.offload.hot_cache and 1024 <= step <= 4096
    _, whole = headline._settings(options, Weights(), config, 131072, None)
    assert whole == headline.WHOLE


def test_a_gpu_that_is_not_there_is_named(capsys, monkeypatch):
    import headline

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert headline.main([]) == 1
    assert "a CUDA device wanted, got none" in capsys.readouterr().err
    assert measuring.Meter().peak() == 0
