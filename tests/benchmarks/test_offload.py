import json
from importlib.util import find_spec

import numpy as np
import offload
import pytest
import torch
from drawn_recording import drawn
from offload import case, time_filed
from offload_layer import Layer, Shape, Traffic, layers_for, mean, read_bytes
from offload_peers import disk_rate

from hga_compile.configs.profile import Offload
from hga_compile.store.nvme import NvmePages
from hga_compile.store.tiers import make_tier

SMALL = Shape(2, 3, 16, torch.float32)
CPU = torch.device("cpu")


@pytest.fixture
def layer():
    return Layer(0, SMALL, drawn(), 2048, CPU)


def test_bytes_follow_from_the_lists(layer):
    steps = range(8, 12)
    listed = sum(len(own) for step in layer.steps[8:] for own in step.lists) / 4
    inside = read_bytes(layer, steps, "gpu", None)
    assert (inside.fetched, inside.pcie) == (0, 0) and inside.hit_rate == 1
    assert inside.gpu == layer.index_bytes() + listed * 4 * 2 * 16 * 4
    none = read_bytes(layer, steps, "host", None)
    assert none.hit_rate == 0 and none.pcie == listed * 512 and none.gpu == layer.index_bytes()
    some = read_bytes(layer, steps, "host", 5.0)
    # Three of four lengths end in a group that is not full, in each of the two rows.
    assert some.fetched == 5.0 + 1.5
    assert some.pcie == 6.5 * 512 and some.gpu == layer.index_bytes() + (listed - 6.5) * 512
    both = mean([none, some])
    assert both.fetched == (listed + 6.5) / 2


def test_the_floor_reads_each_place_once():
    bandwidth = {"gpu": 4e12, "host": 5e10, "nvme": 1e9}
    traffic = Traffic(100, 10, 4e6, 5e5, 2e3)
    assert traffic.floor(bandwidth) == pytest.approx(1 + 10 + 2)
    assert Traffic(1, 0, 4e6, 0).floor({"gpu": 4e12}) == pytest.approx(1)
    row = case(16, "host", 0.1, 26.0, traffic, bandwidth, same_bits=True)
    assert row["measured_over_floor"] == pytest.approx(2) and row["hit_rate"] == pytest.approx(0.9)
    assert case(16, "gpu", None, 26.0, traffic, bandwidth)["hit_rate"] is None


def test_layers_together_exceed_what_a_gpu_keeps():
    for tokens in offload.CONTEXTS:
        count = layers_for(tokens, Shape())
        assert 2 <= count <= 20
        assert count in (2, 20) or count * tokens * 4 * (34 + 0.03 * 512) >= 2**28


def test_steps_read_the_same_from_files_as_was_stored(layer, tmp_path, monkeypatch):
    # The lookup itself needs Triton; what it is given does not.
    monkeypatch.setattr(Layer, "step", _plain_step)
    place = Offload(tier="nvme", nvme_folder=str(tmp_path), nvme_cache=2**16)
    tiers = [NvmePages(2, 16, 16, 4, torch.float32, CPU, "auto", place)]
    layer.fill(tiers[0])
    took, (got,), pages = time_filed([layer], tiers)
    host = make_tier("gpu", (2, 16, 16, 4), torch.float32, CPU, "auto", Offload())
    layer.fill(host)
    assert took > 0 and torch.equal(got, _plain_step(layer, 11, host, None))
    assert pages["hits"] + pages["reads"] > 0
    tiers[0].close()


def _plain_step(layer, number, tier, hot):
    step = layer.steps[number]
    tier.write(layer.key, layer.value, step.length - 1)
    least = min(len(own) for own in step.lists)
    return tier.fetch(torch.tensor(np.stack([own[:least] for own in step.lists])).long())


def test_a_disk_has_a_rate(tmp_path):
    assert disk_rate(str(tmp_path), 2**22, 2**18) > 1e6


def test_what_cannot_be_run_is_said(tmp_path, capsys):
    drawn().save(tmp_path / "routes.npz")
    given = ["--recordings", str(tmp_path / "routes.npz"), "--contexts", "1024"]
    with pytest.raises(SystemExit):
        offload.main(given)
    assert "no recording of 64 steps or more fits 1024 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        offload.main(["--tiers", "tape"])
    assert "expected some of gpu, host, nvme, got tape" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    drawn(steps=64, heads=2).save(tmp_path / "routes.npz")
    assert offload.main(["--recordings", str(tmp_path / "routes.npz"), "--contexts", "2048"]) == 1
    assert "a CUDA device wanted, got none" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_all_tiers_give_the_same_bits_on_a_gpu(tmp_path):
    drawn(4096, 70, 24).save(tmp_path / "routes.npz")
    out = tmp_path / "offload.json"
    given = ["--recordings", str(tmp_path / "routes.npz"), "--contexts", "4096,8192", "--json", str(out)]
    assert offload.main([*given, "--folder", str(tmp_path)]) == 0
    cases = json.loads(out.read_text())["cases"]
    assert len(cases) == 2 * (1 + len(offload.SHARES) + 1) and all(row["same_bits"] for row in cases)
    rates = [row["hit_rate"] for row in cases if row["tier"] == "host" and row["hot_cache"]]
    assert rates[0] < rates[2]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_steps_in_the_interpreter(tmp_path):
    import os
    import subprocess
    import sys
    from pathlib import Path

    folder = Path(offload.__file__).parent
    script = (
        f"import sys; sys.path[:0] = [{str(folder)!r}, {str(Path(__file__).parent)!r}]\n"
        "import torch\nfrom offload_layer import Layer, Shape\nfrom drawn_recording import drawn\n"
        "from hga_compile.configs.profile import Offload\nfrom hga_compile.store.tiers import make_tier\n"
        "cpu = torch.device('cpu')\n"
        "layer = Layer(0, Shape(2, 3, 16, torch.float32), drawn(), 2048, cpu)\n"
        "tier = make_tier('gpu', (2, 16, 16, 4), torch.float32, cpu, 'auto', Offload())\n"
        "layer.fill(tier)\n"
        "hot = layer.hot_cache(0.5)\n"
        "plain = [layer.step(n, tier, None) for n in range(4)]\n"
        "near = [layer.step(n, tier, hot) for n in range(4)]\n"
        "assert all(torch.equal(*pair) for pair in zip(plain, near))\n"
        "assert 0 < hot.misses() < sum(layer.steps[n].listed for n in range(4)) + layer.steps[-1].listed\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
