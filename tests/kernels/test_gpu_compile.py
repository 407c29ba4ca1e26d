"""The Triton kernels compile for a GPU that is not there: a compiler refuses what the interpreter runs."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from gpu_cases import INTERPRETED

from hga_compile.configs.budget import Budget
from hga_compile.configs.routing import Routing
from hga_compile.kernels import gpu, gpu_tiles
from hga_compile.kernels.fp8 import EXTRA
from hga_compile.kernels.hot import HotCache
from hga_compile.kernels.plan import plan_queries
from hga_compile.kernels.rotation import rotation
from hga_compile.kernels.scoring import Scoring
from hga_compile.kernels.tail import TailSummary
from hga_compile.kernels.tiles import plan_tiles

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None or INTERPRETED, reason="needs Triton's compiler"),
]


class Absent:
    """As much of Triton's driver as its compiler asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """Launches compile their kernel and no more; their names are noted."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from hga_compile.kernels import overlap

    names: list[str] = []

    def launch(self: Any, grid: Any) -> Any:
        def run(*given: Any, **named: Any) -> None:
            kernel = self.run(*given, grid=grid, warmup=True, **named)
            # Waiting is in a kernel that is launched early, and in no other.
            assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == named.get("launch_pdl", False)
            names.append(self.fn.__name__)

        return run

    monkeypatch.setattr(type(driver), "active", Absent())
    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    # Nothing is computed: no value may be looked at.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(overlap, "_able", lambda device: True)
    overlap.overlap.cache_clear()
    yield names
    overlap.overlap.cache_clear()


KINDS: dict[str, dict[str, Any]] = {
    "low-bit keys": {},
    "8 bits": {"bits": 8, "group_size": 8},
    "means": {"summary": "mean", "group_size": 16},
    "chunks of means": {"summary": "mean", "chunk_stage": "on", "group_size": 16},
    "chunks of low-bit keys": {"chunk_stage": "on", "vote": "mass_max"},
    "a tail": {"tail": "estimate"},
    "centres of blocks": {"centre": "block"},
    "centres of blocks, chunks, single tokens": {"centre": "block", "chunk_stage": "on", "group_size": 1},
}


@pytest.mark.parametrize("shape", [(4, 128, torch.bfloat16), (1, 80, torch.float16)], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_step(compiled, kind, shape):
    heads, dim, dtype = shape
    tokens, rows = 8000, 8
    routing = Routing(**kind, dense_below=0, chunk_budget=Budget(tokens=512))
    spans = gpu.spans_of(routing, plan_queries(routing, tokens - 1, 1, None), None, torch.device("cpu"))
    assert (spans.chunks is not None) == (routing.chunk_stage == "on")
    size = routing.group_size
    pages = torch.empty(tokens // size, rows, size * 2 * dim, dtype=dtype)
    codes, scales = torch.empty(rows, tokens // size, dim, dtype=torch.bfloat16), None
    if routing.summary == "lowbit":
        codes = torch.empty(rows, tokens, -(-dim * routing.bits // 8), dtype=torch.uint8).transpose(1, 2)
        scales = torch.empty(rows, tokens, dtype=torch.float16)
    tail = None
    if routing.tail == "estimate":
        tail = TailSummary(routing.chunk_size, torch.zeros(rows, heads, dim), dim)
        tail.append(torch.zeros(rows, 7936, dim), torch.zeros(rows, 7936, dim))
    centres = torch.empty(rows, 64, dim, dtype=torch.bfloat16) if routing.centre == "block" else None
    parts = torch.empty(rows, tokens // 16, dim, dtype=torch.bfloat16)
    scoring = Scoring() if tail else Scoring(5.0, torch.zeros(rows * heads))
    gpu.decode_step(
        pages, codes, scales, torch.empty(rows, heads, dim, dtype=dtype), spans, length=tokens,
        routing=routing, scale=1.0, scoring=scoring, kv_heads=rows, parts=parts, tail=tail, centres=centres,
    )  # fmt: skip
    assert {"_score", "_vote", "_attend", "_merge"} <= set(compiled)
    assert ("_multiply" in compiled) == (centres is not None)
    # Few groups are chosen from by one program of a row.
    assert {"_whole"} <= set(compiled) or {"_keep", "_list"} <= set(compiled)
    assert ("_keep" in compiled) == (tokens // size > 1024 and routing.chunk_stage != "on")


@pytest.mark.parametrize("new", [1, 500])
def test_summarising_keys_and_moving_rows(compiled, new):
    keys = torch.empty(8, new * 16, 128, dtype=torch.bfloat16)
    gpu.store_means(keys, torch.empty(8, 600, 128, dtype=torch.bfloat16), 3, 16)
    codes = torch.empty(8, 9000, 32, dtype=torch.uint8).transpose(1, 2)
    rotation(128, keys.device)
    gpu.encode(keys, torch.empty(8, 128), codes, torch.empty(8, 9000, dtype=torch.float16), 7, 2, 1.0)
    pages = torch.empty(3000, 8, 4 * 256, dtype=torch.bfloat16)
    gpu.store_rows(pages, keys[:, :1], keys[:, :1], 5, 4)
    gpu.load_rows(pages, keys[:, :1].clone(), keys[:, :1].clone(), 5, 4)
    assert compiled == ["_store", "_encode" if new == 1 else "_encode_rows", "_copy", "_copy"]


@pytest.mark.parametrize("begin", [7, 128])
@pytest.mark.parametrize("dim", [128, 80])
@pytest.mark.parametrize("new", [1, 3, 500])
def test_coding_keys_about_centres_of_blocks(compiled, new, dim, begin):
    keys = torch.empty(8, new, dim, dtype=torch.bfloat16)
    codes = torch.empty(8, 9000, dim // 4, dtype=torch.uint8).transpose(1, 2)
    rotation(dim, keys.device)
    gpu.encode(
        keys, torch.empty(8, dim), codes, torch.empty(8, 9000, dtype=torch.float16), begin, 2, 1.0, None,
        torch.empty(8, 71, dim, dtype=torch.bfloat16),
    )  # fmt: skip
    assert compiled == [{1: "_encode_one", 3: "_encode", 500: "_encode_rows"}[new]]


def test_storing_at_a_position_that_the_gpu_knows(compiled):
    """As in a recorded decode step."""
    end = torch.tensor([700], dtype=torch.int32)
    keys = torch.empty(8, 1, 128, dtype=torch.bfloat16)
    codes = torch.empty(8, 9000, 32, dtype=torch.uint8).transpose(1, 2)
    rotation(128, keys.device)
    gpu.encode(keys, torch.empty(8, 128), codes, torch.empty(8, 9000, dtype=torch.float16), end, 2, 1.0)
    pages, centres = torch.empty(3000, 8, 4 * 256, dtype=torch.bfloat16), torch.empty(8, 71, 128)
    gpu.store_rows(pages, keys, keys, end, 4)
    gpu.follow_centre(pages, centres.bfloat16(), torch.empty(8, 128), end, 4)
    assert compiled == ["_encode_one", "_copy", "_follow"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_pages_of_each_type_with_and_without_slots(compiled, dtype, cached):
    from hga_compile.kernels.triton_attend import attend_listed

    rows, dim, tokens = 8, 128, 8000
    routing = Routing(dense_below=0)
    spans = gpu.spans_of(routing, plan_queries(routing, tokens - 1, 1, None), None, torch.device("cpu"))
    page = 4 * (2 * dim + (EXTRA if dtype == torch.uint8 else 0))
    pages = torch.empty(tokens // 4, rows, page, dtype=dtype)
    chosen = torch.zeros(rows, spans.width, dtype=torch.int32)
    hot = None
    if cached:
        kept = HotCache(rows, page, 0.1, dtype, torch.device("cpu"))
        entries = kept.place(chosen, spans.table, tokens, 4, rows)  # makes the pool
        hot = kept.pool, entries
    query = torch.empty(rows, 4, dim, dtype=torch.bfloat16)
    attend_listed(
        pages, chosen, spans.table, query, None, group_size=4, scale=1.0, softcap=0.0, rows_of_span=rows,
        kv_heads=rows, hot=hot,
    )  # fmt: skip
    assert compiled == [*(["_place"] if cached else []), "_attend", "_merge"]


@pytest.mark.parametrize("shape", [(4, 128, torch.bfloat16), (2, 80, torch.float16)], ids=str)
@pytest.mark.parametrize(("tail", "size", "moved"), [(0, 4, 0), (1, 4, 0), (0, 4, 1), (0, 1, 1), (0, 32, 1)])
def test_a_prefill_in_tiles(compiled, tail, size, moved, shape):
    heads, dim, dtype = shape
    tokens, rows = 4096, 8
    routing = Routing(
        dense_below=0,
        tail="estimate" if tail else "drop",
        group_size=size,
        centre="block" if moved else "first",
    )
    tiles = plan_tiles(routing, 2048, 2048, None, 64)
    known = tiles.plan.last_window
    codes = torch.empty(rows, tokens, dim // 4, dtype=torch.uint8).transpose(1, 2)
    keys = gpu_tiles.tile_keys(
        codes, torch.empty(rows, tokens, dtype=torch.float16), known, size, 2, dim, None,
        torch.empty(rows, 32, dim, dtype=torch.bfloat16) if moved else None,
    )  # fmt: skip
    rest = None
    if tail:
        rest = TailSummary(routing.chunk_size, torch.zeros(rows, heads, dim), dim)
        rest.append(torch.zeros(rows, tokens, dim), torch.zeros(rows, tokens, dim))
    gpu_tiles.prefill_tiles(
        gpu_tiles.whole(*torch.empty(2, rows, tokens, dim, dtype=dtype)), keys,
        torch.empty(1, rows, heads, 2048, dim, dtype=dtype),
        gpu_tiles.tile_spans(tiles, True, None, torch.device("cpu")), tiles, first=2048, routing=routing,
        scale=1.0, tail=rest,
    )  # fmt: skip
    assert {"_attend"} <= set(compiled) and len(set(compiled)) >= 5
