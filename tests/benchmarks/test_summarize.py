import json

import pytest
import summarize
import torch
from summarize import DIM, KINDS, ROWS, Kind, main
from table import render

from hga_compile.tuning import uncached
from hga_compile.tuning.uncached import CALLS, copies, microseconds


@pytest.mark.parametrize(
    ("kind", "a_token"),
    [(Kind(bits=2), 256 + 32 + 2), (Kind(bits=8), 256 + 128 + 2), (Kind(group=16), 256 + 16)],
)
def test_bytes_are_those_of_keys_and_of_their_summary(kind, a_token):
    assert (ROWS, DIM) == (4, 128)
    assert kind.bytes_of(1000) == 4 * 1000 * a_token


def test_each_call_has_another_input(monkeypatch):
    seen = []

    def graph(step, calls):
        for _ in range(calls):
            step()
        return 1.0

    monkeypatch.setattr(uncached, "graph_microseconds", graph)
    assert microseconds(seen.append, [(torch.tensor(i),) for i in range(3)]) == 1.0
    assert [int(given) for given in seen] == [i % 3 for i in range(CALLS)]


def test_more_is_read_than_a_cache_holds():
    assert copies(2**29) == 1 and copies(2**26) == 4
    assert copies(2**22) == CALLS and CALLS * 2**22 > 64e6


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 1
    assert "a CUDA device wanted, got none" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_kind_is_checked_and_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(summarize, "TOKENS", (4096,))
    out = tmp_path / "summarize.json"
    assert main(["--json", str(out)]) == 0
    cases = json.loads(out.read_text())["cases"]
    assert [case["kind"] for case in cases] == [kind.name for kind in KINDS]
    assert all(case["microseconds"] > 0 for case in cases)
    assert "2-bit codes" in render(out)
