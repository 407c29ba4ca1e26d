"""The benchmark of several requests at once: its systems, what it measures, and the command on a CPU."""

import json

import pytest
import torch
from table import render
from wholemodel.attention import static_cache
from wholemodel.batch_measuring import measure_batch
from wholemodel.batches import BATCHES, UNIT, BatchSetup, DenseBatch, HgaBatch, lengths_of
from wholemodel.measuring import OPENING, Plan
from wholemodel.picture import draw_batches
from wholemodel.results import Results
from wholemodel.shape import build, config_of
from wholemodel.systems import Entry

from hga_compile import HGACache
from hga_compile.configs.loader import resolve_profile
from hga_compile.kernels.states import STATES

CPU = torch.device("cpu")
STEPS = 4
LENGTHS = (512, 384, 256)


@pytest.fixture(scope="module")
def tiny():
    return build(config_of("tiny"), CPU, torch.float32)


@pytest.fixture(scope="module")
def kept():
    """The compiled code of all tests that run hga: two graphs, and one for each batch without padding."""
    return {}


def setup_of(lengths, kept=None, **routing):
    settings = {"budget": {"fraction": 0.1, "tokens": 16}, "dense_below": 64, "centre_tokens": 32} | routing
    profile = resolve_profile({"offload.tier": "host"} | {f"routing.{k}": v for k, v in settings.items()})
    kept = {} if kept is None else kept
    return BatchSetup(max(lengths), STEPS, profile, {}, "eager", "eager", kept, lengths=lengths)


def prompts_of(lengths, first=0):
    ids = torch.randint(128, (8, 1024), generator=torch.Generator().manual_seed(0))
    return [row[None, -length:] for row, length in zip(ids[first:], lengths, strict=False)]


def decoded(kind, model, setup, prompts):
    """Greedy tokens of every request, ``[requests, STEPS]``."""
    system = kind(model, setup)
    with torch.no_grad():
        for number, ids in enumerate(prompts):
            system.begin(number)
            for begin, end in ((0, OPENING), (OPENING, 200), (200, ids.shape[1] - 1)):
                system.prefill(ids[:, begin:end], begin)
        system.join()
        found = [torch.cat([ids[:, -1:] for ids in prompts])]
        for _ in range(STEPS):
            found.append(system.decode(found[-1]))
    system.close()
    return torch.cat(found[1:], 1)


def test_prompts_reach_from_the_context_to_a_share_of_it_in_whole_units():
    assert lengths_of(32768, 3, 0.5) == (32768, 24576, 16384)
    assert lengths_of(32768, 1, 0.5) == (32768,)
    assert lengths_of(1000, 2, 1.0) == (1000, 1000)
    found = lengths_of(5000, 7, 0.5)
    assert all((5000 - length) % UNIT == 0 for length in found) and 2500 <= min(found) < 2500 + UNIT
    assert list(found) == sorted(found, reverse=True) and len(set(found)) == 7


def test_requests_of_hga_get_the_tokens_that_they_get_by_themselves(tiny, kept):
    together = decoded(HgaBatch, tiny, setup_of(LENGTHS, kept), prompts_of(LENGTHS))
    for number, length in enumerate(LENGTHS):
        alone = decoded(HgaBatch, tiny, setup_of((length,), kept), prompts_of((length,), number))
        assert torch.equal(together[number : number + 1], alone)
    dense = decoded(DenseBatch, tiny, setup_of(LENGTHS), prompts_of(LENGTHS))
    assert not torch.equal(together, dense)  # they are those of routing


def test_the_dense_batch_gives_each_request_the_tokens_that_it_gets_by_itself(tiny):
    together = decoded(DenseBatch, tiny, setup_of(LENGTHS), prompts_of(LENGTHS))
    for number, length in enumerate(LENGTHS):
        alone = decoded(DenseBatch, tiny, setup_of((length,)), prompts_of((length,), number))
        assert torch.equal(together[number : number + 1], alone)


def test_attention_reads_no_padding_of_a_static_cache():
    query, starts = torch.randn(2, 4, 1, 8), (0, 5)
    key, value = torch.randn(2, 2, 2, 16, 8).unbind()
    with static_cache(None, starts):
        got = torch.ops.wholemodel.attend(query, key, value, 0.3)
    hidden = torch.arange(16) < torch.tensor(starts)[:, None, None, None]
    key, value = (part.repeat_interleave(2, 1) for part in (key, value))
    want = torch.softmax((query @ key.mT * 0.3).masked_fill(hidden, -torch.inf), -1) @ value
    torch.testing.assert_close(got, want)


def test_joined_requests_are_given_up_at_once(tiny, kept):
    STATES.collect()
    before, layers = STATES.count(), tiny.config.num_hidden_layers
    system = HgaBatch(tiny, setup_of(LENGTHS, kept))
    with torch.no_grad():
        for number, ids in enumerate(prompts_of(LENGTHS)):
            system.begin(number)
            system.prefill(ids[:, :-1], 0)
    assert STATES.count() == before + 3 * layers
    system.join()
    assert STATES.count() == before + layers
    assert system.split() == [length - 1 for length in LENGTHS]
    assert STATES.count() == before + layers
    system.close()


PLAN = Plan(step=200, steps=3, warmup=1, limit=120)


def measured(model, name, setup, kind=None):
    entry = BATCHES[name] if kind is None else Entry("it", kind)
    return measure_batch(entry, model, prompts_of(setup.lengths), setup, PLAN)


def test_what_is_measured_of_hga(tiny, kept):
    found = measured(tiny, "hga", setup_of(LENGTHS, kept))
    assert (found["status"], found["reached"]) == ("ok", sum(LENGTHS) - 3)
    assert found["prefill"]["tokens"] == sum(LENGTHS) - 3 * (1 + OPENING)
    run = found["decode"]
    assert run["steps"] == 3 and run["tokens_per_second"] == pytest.approx(3e3 / run["median_ms"])
    assert found["join_seconds"] > 0 and found["split_seconds"] > 0
    assert 0 < found["routed"]["attended"] < 0.5
    assert found["memory"]["host_kv"] > 0 and found["memory"]["index"] > 0
    assert 0 < run["pcie_bytes"] < found["memory"]["host_kv"] / 2
    assert "C++ kernels do not cover padding: plain torch" in found["routed"]["fallbacks"]


def test_what_is_measured_of_dense(tiny):
    found = measured(tiny, "dense", setup_of(LENGTHS))
    assert found["status"] == "ok" and "join_seconds" not in found and "routed" not in found
    assert found["memory"]["gpu_kv"] == 3 * (512 + STEPS) * 2 * 2 * 2 * 16 * 4


def test_a_split_that_loses_tokens_fails_the_point(tiny, kept, monkeypatch):
    whole = HGACache.split
    monkeypatch.setattr(HGACache, "split", lambda cache: whole(cache)[:2])
    found = measured(tiny, "hga", setup_of(LENGTHS, kept))
    assert (found["status"], found["stage"]) == ("failed", "split")


def test_running_out_of_memory_says_at_which_request(tiny):
    class Full(DenseBatch):
        def begin(self, number):
            if number == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            super().begin(number)

    found = measured(tiny, "dense", setup_of(LENGTHS), Full)
    assert (found["status"], found["stage"]) == ("out of memory", "prefill")
    assert (found["request"], found["reached"]) == (2, 511)


HEADER = {
    "benchmark": "batch",
    "environment": {"device": "a GPU", "torch": "2", "transformers": "5", "date": "2026-11-24"},
    "model": {"name": "tiny"},
    "settings": {"cap": 40 << 30, "context": 32768},
}


def point(system="hga", requests=4, status="ok"):
    found = {
        "system": system, "label": BATCHES[system].label, "order": list(BATCHES).index(system),
        "requests": requests, "lengths": [32768, 16384], "status": status, "reason": "", "stage": "start",
        "reached": 0, "code": "c", "prefill": {"tokens_per_second": 9000.0},
        "decode": {
            "median_ms": 16.0, "p99_ms": 17.5, "pcie_bytes": 5e6, "hit_rate": 0.9, "tokens_per_second": 250.0,
        },
        "memory": {"gpu_kv": 0, "index": 1 << 29, "hot": 1 << 28, "reserved": 30 << 30, "spare": 10 << 30},
    }  # fmt: skip
    if system == "hga":
        found |= {"join_seconds": 3.25, "split_seconds": 4.5}
    if status != "ok":
        del found["decode"], found["memory"], found["prefill"]
    return found


def test_points_are_merged_by_number_of_requests(tmp_path):
    path = tmp_path / "out.json"
    results = Results(path, HEADER, by="requests")
    results.add(point(requests=16, status="time limit"))
    results.add(point("dense", 16, "out of memory"))
    again = Results(path, HEADER, by="requests")
    again.add(point(requests=4))
    assert again.has("hga", 4, "c") and again.has("dense", 16, "c") and not again.has("hga", 16, "c")
    again.add(point(requests=16))
    found = json.loads(path.read_text())["points"]
    assert [(one["system"], one["requests"]) for one in found] == [("hga", 4), ("hga", 16), ("dense", 16)]
    assert [one["status"] for one in found] == ["ok", "ok", "out of memory"]


def test_table_and_picture(tmp_path):
    points = [point(), point("dense", 4, "out of memory")]
    path = tmp_path / "batch.json"
    path.write_text(json.dumps({**HEADER, "points": points}))
    lines = render(path).splitlines()
    assert lines[2].split("|")[1:4] == [" 4 ", " hga, K/V in host RAM ", " 30.00 "]
    assert " 16.00 " in lines[2] and " 250.0 | 3.2 | 4.5 |" in lines[2]
    assert "out of memory in start" in lines[3]
    assert "16,384 to 32,768 tokens" in lines[-1]
    draw_batches(points, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    draw_batches(points[1:], tmp_path / "none.png")
    assert (tmp_path / "none.png").read_bytes() != (tmp_path / "out.png").read_bytes()


def test_the_whole_command_on_a_cpu(tmp_path, capsys, monkeypatch):
    import batch

    out, made = tmp_path / "out.json", DenseBatch.new_cache

    def short(system):
        if len(system.setup.lengths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return made(system)

    monkeypatch.setattr(DenseBatch, "new_cache", short)
    command = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--inner", "eager", "--steps", "2",
               "--warmup", "1", "--step", "128", "--context", "384", "--json", str(out),
               "--set", "routing.dense_below=128"]  # fmt: skip
    assert batch.main([*command, "--systems", "dense", "--requests", "1,3"]) == 0
    assert batch.main([*command, "--requests", "1,3"]) == 0
    points = json.loads(out.read_text())["points"]
    assert {(one["system"], one["requests"]): (one["status"], one["lengths"]) for one in points} == {
        ("hga", 1): ("ok", [384]), ("dense", 1): ("ok", [384]),
        ("hga", 3): ("ok", [384, 384, 256]), ("dense", 3): ("out of memory", [384, 384, 256]),
    }  # fmt: skip
    said = capsys.readouterr()
    assert said.err.count("dense, ") == 2 and "plain torch" in said.out
    assert "out of memory in start" in render(out) and out.with_suffix(".png").is_file()
    with pytest.raises(SystemExit, match="points of another settings"):
        batch.main([*command, "--shortest", "1"])


def test_a_gpu_that_is_not_there_and_wrong_shares_are_named(capsys, monkeypatch):
    import batch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert batch.main([]) == 1
    assert "a CUDA device wanted, got none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--shortest is a share"):
        batch.main(["--device", "cpu", "--shortest", "0"])
