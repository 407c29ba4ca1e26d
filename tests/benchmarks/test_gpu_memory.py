import gpu_memory
import pytest
import torch
from gpu_memory import Point, cache_bytes, draw, random_model, run_context, show
from transformers import DynamicCache

POINTS = [
    Point("dense", 4096, 300 << 20, 90 << 20, 0, 0),
    Point("hga", 4096, 210 << 20, 0, 6 << 20, 90 << 20),
    Point("dense", 8192, 400 << 20, 180 << 20, 0, 0),
    Point("hga", 8192, 216 << 20, 0, 12 << 20, 180 << 20),
]


def test_a_context_is_prefilled_in_pieces_and_decoded():
    model = random_model("tiny", "cpu", torch.float32)
    ids = torch.randint(256, (1, 53))
    calls = []

    def recorded(**inputs):
        calls.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    cache = DynamicCache()
    with torch.no_grad():
        run_context(recorded, cache, ids, piece=20, steps=3)
    assert calls == [20, 20, 10, 1, 1, 1]
    assert cache.get_seq_length() == 53
    rows = 2 * 2 * 53 * 16 * 4  # layers, KV heads, tokens, head_dim, fp32
    assert cache_bytes(cache) == {"gpu_kv_bytes": 2 * rows, "gpu_index_bytes": 0, "host_kv_bytes": 0}


def test_picture_and_table(tmp_path, capsys):
    draw(POINTS, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    show(POINTS, "a GPU")
    assert "216.0" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_memory.main(["--random", "tiny"]) == 1
    assert "a CUDA device wanted, got none" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kv_stays_off_the_gpu_as_the_context_grows(tmp_path):
    import json

    out = tmp_path / "memory.json"
    assert gpu_memory.main(["--random", "tiny", "--contexts", "4096,16384", "--json", str(out)]) == 0
    points = json.loads(out.read_text())["points"]
    dense, hga = ([point for point in points if point["side"] == side] for side in ("dense", "hga"))
    assert [point["gpu_kv_bytes"] for point in hga] == [0, 0]
    for offloaded, kept in zip(hga, dense, strict=True):
        assert offloaded["host_kv_bytes"] >= kept["gpu_kv_bytes"] > 0
    assert out.with_suffix(".png").is_file()
