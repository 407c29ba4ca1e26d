"""Turn result JSONs into Markdown tables, and keep the ones in a document up to date.

    python benchmarks/table.py benchmarks/results/quality.json
    python benchmarks/table.py --update README.md      # between <!-- bench:NAME --> and <!-- /bench:NAME -->
    python benchmarks/table.py --check README.md       # exit 1 if --update would change it

NAME is a file of benchmarks/results without `.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MARKER = re.compile(r"(<!-- bench:([\w.-]+) -->\n)(.*?)(<!-- /bench:\2 -->)", re.DOTALL)
OPENING = re.compile(r"<!-- bench:([\w.-]+) -->")


class TableError(ValueError):
    """A result or a marker that no table can be made of; the message says which and why."""


def markdown(headings: tuple[str, ...], rows: list[tuple[str, ...]], left: int = 1) -> str:
    """Lay out a Markdown table whose first `left` columns are text and whose others are numbers."""
    rule = [":--" if index < left else "--:" for index in range(len(headings))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (headings, tuple(rule), *rows))


def _with_error(value: dict[str, Any]) -> str:
    if value["error"] is None:
        return f"{value['mean']:.4f}"
    return f"{value['mean']:.4f} ± {value['error']:.4f} [{value['low']:.4f}, {value['high']:.4f}]"


def quality(result: dict[str, Any]) -> str:
    """Averages over texts: one row for each length, setting and mode."""
    headings = (
        "row",
        "mode",
        "tokens",
        "texts",
        "ΔNLL",
        "KL(dense ‖ routed)",
        "top-1",
        "attended",
        "K/V read",
    )
    rows = []
    for entry in result["summary"]:
        shares = [
            f"{100 * entry[key]['mean']:.1f}%" for key in ("top1", "attended", "kv_bytes", "summary_bytes")
        ]
        distances = (
            ("0", "0") if entry["row"] == "dense" else map(_with_error, (entry["delta_nll"], entry["kl"]))
        )
        first = (entry["row"], entry["mode"], str(entry["length"]), str(entry["documents"]))
        rows.append((*first, *distances, *shares))
    note = "nats a token; ± standard error over texts [bootstrap 95%]; bytes as a share of dense K/V."
    names = ", ".join(document["name"] for document in result["documents"])
    return f"{markdown((*headings, 'summaries read'), rows, 2)}\n\nTexts: {names}; {note}"


def cpu_decode(result: dict[str, Any]) -> str:
    """Both lanes of the race, with floors."""
    headings = ("what", "tokens/s", "against dense", "ms a step", "floor, ms", "measured / floor")
    peer = next(iter(result["lanes"].values()))["tokens_per_second"]
    rows = []
    for name, row in result["lanes"].items():
        speed = (f"{row['tokens_per_second']:.2f}", f"{row['tokens_per_second'] / peer:.2f}x")
        times = (row["milliseconds"], row["floor_milliseconds"])
        rows.append((name, *speed, *(f"{t:.1f}" for t in times), f"{row['measured_over_floor']:.2f}"))
    context = f"{result['settings']['length']} tokens in the cache, {result['settings']['threads']} threads"
    bandwidth = max(result["bandwidth"].values()) / 1e9
    return (
        f"{markdown(headings, rows)}\n\n{context}; floor: weights and K/V read once at {bandwidth:.1f} GB/s."
    )


def gpu_memory(result: dict[str, Any]) -> str:
    """Peak memory and K/V on the GPU for each context, dense beside hga."""
    headings = (
        "context",
        "peak, dense",
        "peak, hga",
        "K/V on the GPU, dense",
        "hga",
        "index, hga",
        "host RAM, hga",
    )
    sides: dict[int, dict[str, dict[str, Any]]] = {}
    for point in result["points"]:
        sides.setdefault(point["context"], {})[point["side"]] = point
    rows = []
    for context, both in sorted(sides.items()):
        dense, hga = both["dense"], both["hga"]
        sizes = [dense["peak_bytes"], hga["peak_bytes"], dense["gpu_kv_bytes"], hga["gpu_kv_bytes"]]
        sizes += [hga["gpu_index_bytes"], hga["host_kv_bytes"]]
        rows.append((str(context), *(f"{size / 2**20:.1f}" for size in sizes)))
    return f"{markdown(headings, rows, 0)}\n\nMiB above the weights; K/V tier: {result['settings']['tier']}."


def compile_time(result: dict[str, Any]) -> str:
    """Seconds of compiling with and without hga, and the passes' part of them."""
    names = {"inductor": "Inductor, dense", "hga": "hga", "passes": "of which the passes"}
    rows = [(name, f"{result['seconds'][key]:.1f}") for key, name in names.items()]
    share = f"the passes add {100 * result['passes_over_rest']:.1f}% to the rest of hga's time."
    return f"{markdown(('compiling', 'seconds'), rows)}\n\nPrefill and decode, caches off; {share}"


def decode_attention(result: dict[str, Any]) -> str:
    """One layer's decode step beside dense attention."""
    peers = list(result["cases"][0]["peers"])
    headings = ["batch", "tokens", "K/V in", "hga", "floor", "measured / floor"]
    # Others that read a share of the K/V too; results made before there were any have none.
    sparse = list(dict.fromkeys(name for case in result["cases"] for name in _sparse(case)))
    headings += [f"{peer}, dense" for peer in peers] + ["against cuDNN"]
    headings += [f"{name}, 3%, not routed" for name in sparse]
    places = {"gpu": "GPU memory", "host": "pinned host RAM"}
    rows = []
    for case in result["cases"]:
        times = [case["microseconds"], case["floor_microseconds"]]
        ratios = [f"{case['measured_over_floor']:.1f}"]
        ratios += [f"{case['peers'][peer]:.1f}" if peer in case["peers"] else "-" for peer in peers]
        dense = case["peers"].get("cuDNN")
        ratios.append(f"{dense / times[0]:.2f}x" if dense else "-")
        ratios += [_sparse(case).get(name, "-") for name in sparse]
        first = (str(case["batch"]), str(case["tokens"]), places[case["tier"]])
        rows.append((*first, *(f"{time:.1f}" for time in times), *ratios))
    rates = {place: f"{rate / 1e9:,.0f} GB/s" for place, rate in result["bandwidth"].items()}
    errors = {f"{name}: {why}" for case in result["cases"] for name, why in case.get("errors", {}).items()}
    failed = "".join(f" {error}." for error in sorted(errors))
    if sparse:
        failed = f" {', '.join(sparse)}: as many tokens in blocks of 128 that it is given.{failed}"
    return (
        f"{markdown(tuple(headings), rows, 0)}\n\nMicroseconds a step, routing included, CUDA-graph replay; "
        f"3% of the tokens. Floor: codes and routed K/V read once, at {rates['gpu']} in GPU memory and "
        f"{rates['host']} from the host (measured by {result['bandwidth_from']}).{failed}"
    )


def offload(result: dict[str, Any]) -> str:
    """One layer's decode step by tier and size of the cache, beside dense attention in two places."""
    headings = (
        "tokens",
        "K/V in",
        "cache",
        "hits (LRU)",
        "MB over PCIe",
        "MB from files",
        "hga",
        "floor",
        "measured / floor",
        "dense in HBM",
        "against it",
        "dense, streamed",
        "against it",
    )
    places = {"gpu": "GPU memory", "host": "host RAM", "nvme": "files"}
    rows = []
    for case in result["cases"]:
        dense, took = result["dense"][str(case["tokens"])], case["microseconds"]
        extended = f" ({case['extended']} x)" if case["extended"] > 1 else ""
        share = "-" if case["hot_cache"] is None else f"{case['hot_cache']:.0%}"
        hits = "-" if case["hit_rate"] is None else f"{case['hit_rate']:.1%}"
        hits += "" if case["lru"] is None else f" ({case['lru']:.1%})"
        sizes = (f"{case[name] / 1e6:.2f}" if case[name] else "-" for name in ("pcie_bytes", "file_bytes"))
        times = (f"{took:,.1f}", f"{case['floor_microseconds']:,.1f}", f"{case['measured_over_floor']:.1f}")
        peers = [
            text for name in ("cuDNN", "streamed")
            for text in (f"{dense[name]:,.1f}", f"{dense[name] / took:.2f}x")
        ]  # fmt: skip
        first = (f"{case['tokens']}{extended}", places[case["tier"]], share, hits)
        rows.append((*first, *sizes, *times, *peers))
    rates = ", ".join(f"{rate / 1e9:,.1f} GB/s {place}" for place, rate in result["bandwidth"].items())
    made = "; ".join(
        f"{each['tokens']} tokens of {each['text']['name']} by {each['model']['name']}"
        for each in result["recordings"]
    )
    return (
        f"{markdown(headings, rows, 0)}\n\nMicroseconds a step of one layer: token stored, routed, attended. "
        f"Routed sets replayed from {made}; (n x): n stretches of that length, each with other heads' sets. "
        "Cache: slots on the GPU; for files, RAM. Bytes are a step's. Dense in HBM: cuDNN; streamed: all K/V "
        f"from pinned host memory, the next layer's meanwhile. Floor: all read once, at {rates} (same run)."
    )


def prefill_attention(result: dict[str, Any]) -> str:
    """One layer's prefill beside dense attention."""
    peers = list(dict.fromkeys(name for case in result["cases"] for name in case["peers"]))
    headings = ["tokens", "attended", "hga", "floor", "measured / floor", *peers, "against cuDNN"]
    rows = []
    for case in result["cases"]:
        took, dense = case["milliseconds"], case["peers"].get("cuDNN")
        numbers = (f"{case['attended']:.1%}", f"{took:.2f}", f"{case['floor_milliseconds']:.2f}")
        times = (f"{case['peers'][peer]:.2f}" if peer in case["peers"] else "failed" for peer in peers)
        ratio = f"{dense / took:.2f}x" if dense else "-"
        rows.append((str(case["tokens"]), *numbers, f"{case['measured_over_floor']:.1f}", *times, ratio))
    settings, rate = result["settings"], f"{result['rate'] / 1e12:,.0f} TFLOP/s"
    flex = " FlexAttention: as large a share in blocks of 128 that it is given." if len(peers) > 2 else ""
    return (
        f"{markdown(tuple(headings), rows, 0)}\n\nMilliseconds, every query routed, in tiles of "
        f"{settings['tile']} queries that share a routed set. Floor: the arithmetic that is done, at {rate} "
        f"in bfloat16 (a large product in the same run) and twice that in 8 bits.{flex}"
    )


def summarize(result: dict[str, Any]) -> str:
    """Codes and means of keys beside a copy of as many bytes."""
    headings = ("what", "tokens", "hga", "floor", "measured / floor", "copy", "share of the copy's bandwidth")
    rows = []
    for case in result["cases"]:
        took, floor, copy = case["microseconds"], case["floor_microseconds"], case["peers"]["copy"]
        numbers = (f"{took:.1f}", f"{floor:.1f}", f"{case['measured_over_floor']:.2f}")
        rows.append((case["kind"], str(case["tokens"]), *numbers, f"{copy:.1f}", f"{copy / took:.0%}"))
    return (
        f"{markdown(headings, rows)}\n\nMicroseconds, CUDA-graph replay, nothing cached. Floor: keys read "
        f"and summaries written once, at {result['rate'] / 1e9:,.0f} GB/s (a copy of 2 GiB in the same run); "
        "copy: a kernel that reads half as many bytes and writes the other half."
    )


def headline(result: dict[str, Any]) -> str:
    """Whole models: memory by use, speed and traffic of each system at each context."""
    headings = ["context", "what", "GPU memory", "K/V there", "index", "hot cache", "activations", "staging"]
    headings += ["prefill, tokens/s", "ms a token", "p99", "MB over PCIe a token", "hits"]
    rows = []
    for point in result["points"]:
        plain = ", prefill not compiled" if point.get("prefill_inner") == "eager" else ""
        first = (str(point["context"]), point["label"] + plain)
        if point["status"] != "ok":
            told = point["status"] + (f" in {point['stage']}" if point["reached"] else "")
            rows.append((*first, told, *["-"] * (len(headings) - 3)))
            continue
        sizes = ("reserved", "gpu_kv", "index", "hot", "activations", "staging")
        memory = [f"{point['memory'][name] / 2**30:.2f}" for name in sizes]
        rate = point["prefill"]["tokens_per_second"]
        rows.append((*first, *memory, f"{rate:,.0f}" if rate else "-", *_token_times(point["decode"])))
        if "decode_replayed" in point:
            times = _token_times(point["decode_replayed"])
            rows.append((first[0], "the same, recorded routes", *["-"] * 7, *times))
    cap, weights = result["settings"]["cap"] / 2**30, {
        point["memory"]["weights"] for point in result["points"] if point["status"] == "ok"
    }  # fmt: skip
    size = f" Weights: {max(weights) / 2**30:.2f} GiB, in 8 bits." if weights else ""
    return (
        f"{markdown(tuple(headings), rows, 2)}\n\nIn GiB; GPU memory: the most that PyTorch took, with "
        f"a cap of {cap:g} GiB unless it says without.{size} Recorded routes: lists that a real checkpoint "
        "was routed to in the place of those that random weights come to."
    )


def batch(result: dict[str, Any]) -> str:
    """Several requests at once: memory and speed of each system by their number."""
    headings = ("requests", "what", "GPU memory", "K/V there", "index", "hot cache", "prefill, tokens/s")
    headings += ("ms a step", "p99", "MB over PCIe a step", "hits", "tokens/s", "join, s", "split, s")
    rows = []
    for point in result["points"]:
        first = (str(point["requests"]), point["label"])
        if point["status"] != "ok":
            told = f"{point['status']} in {point['stage']}"
            rows.append((*first, told, *["-"] * (len(headings) - 3)))
            continue
        run, rate = point["decode"], point["prefill"]["tokens_per_second"]
        memory = [f"{point['memory'][name] / 2**30:.2f}" for name in ("reserved", "gpu_kv", "index", "hot")]
        speed = (*_token_times(run), f"{run['tokens_per_second']:,.1f}")
        copies = (f"{point[key]:.1f}" if key in point else "-" for key in ("join_seconds", "split_seconds"))
        rows.append((*first, *memory, f"{rate:,.0f}" if rate else "-", *speed, *copies))
    settings = result["settings"]
    least = min(min(point["lengths"]) for point in result["points"])
    lengths = f"{least:,} to " if least < settings["context"] else ""
    return (
        f"{markdown(headings, rows, 2)}\n\nIn GiB, with a cap of {settings['cap'] / 2**30:g} GiB; prompts of "
        f"{lengths}{settings['context']:,} tokens, read one by one, decoded together. Tokens/s: of all."
    )


def decode_counters(result: dict[str, Any]) -> str:
    """Hardware counters of a decode step's kernels."""
    headings = ("kernel", "batch", "tokens", "us, alone", "of DRAM's peak", "of arithmetic's", "issue slots")
    headings += ("warps there", "waves", "registers")
    rows = []
    for case in result["cases"]:
        for kernel in case["kernels"]:
            shares = [f"{kernel[name]:.0%}" for name in ("dram", "arithmetic", "issued", "occupancy")]
            numbers = [f"{kernel['microseconds']:.1f}", *shares]
            more = [f"{kernel['waves']:.2f}", f"{kernel['registers']:.0f}"]
            rows.append((f"`{kernel['kernel']}`", str(case["batch"]), str(case["tokens"]), *numbers, *more))
    return (
        f"{markdown(headings, rows)}\n\nNsight Compute, clocks as they are, each kernel alone from a cold "
        "start: longer than in a replayed graph, where the next one's start is hidden. Waves: programs over "
        "those that the GPU holds at once."
    )


def _token_times(run: dict[str, Any]) -> tuple[str, ...]:
    hits = "-" if run["hit_rate"] is None else f"{run['hit_rate']:.0%}"
    return (f"{run['median_ms']:.2f}", f"{run['p99_ms']:.2f}", f"{run['pcie_bytes'] / 1e6:.1f}", hits)


def _sparse(case: dict[str, Any]) -> dict[str, str]:
    """Return the times of peers that read a share of the K/V, as text."""
    times = {name: f"{time:.1f}" for name, time in case.get("sparse", {}).items()}
    return times | dict.fromkeys(case.get("errors", {}), "failed")


RENDERERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "quality": quality,
    "cpu_decode": cpu_decode,
    "gpu_memory": gpu_memory,
    "compile_time": compile_time,
    "decode_attention": decode_attention,
    "offload": offload,
    "prefill_attention": prefill_attention,
    "summarize": summarize,
    "headline": headline,
    "batch": batch,
    "decode_counters": decode_counters,
}


def render(path: Path | str) -> str:
    """Return the Markdown of one result: a table, a line of what the columns mean, a line of what ran where.

    Raises
    ------
    TableError
        If the file is missing, is no JSON, or is not of a known benchmark.
    """
    path = Path(path)
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        table = RENDERERS[result["benchmark"]](result)
        model, ran = result["model"], result["environment"]
    except OSError as error:
        raise TableError(
            f"no result {path.name}: run the benchmark that writes it ({error.strerror})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        known = ", ".join(RENDERERS)
        raise TableError(f"{path.name} is no result of {known}: {type(error).__name__} {error}") from error
    versions = f"torch {ran['torch']}, transformers {ran['transformers']}"
    return f"{table} {model['name']}; {ran['device']}, {versions}, {ran['date']}.\n"


def update(text: str, results: Path = RESULTS) -> str:
    """Return a document with every marked table rendered anew."""
    opened, closed = OPENING.findall(text), [match[1] for match in MARKER.findall(text)]
    if opened != closed:
        broken = next((name for name in opened if name not in closed), opened[0])
        raise TableError(f"<!-- bench:{broken} --> wants <!-- /bench:{broken} --> after it, no other between")
    return MARKER.sub(lambda match: f"{match[1]}{render(results / f'{match[2]}.json')}{match[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="result JSONs to print as Markdown")
    parser.add_argument("--update", type=Path, metavar="DOCUMENT", help="render its marked tables anew")
    parser.add_argument("--check", type=Path, metavar="DOCUMENT", help="exit 1 if a table is out of date")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where NAME.json lies")
    options = parser.parse_args(arguments)
    if not (options.results or options.update or options.check):
        parser.error("nothing to do: name a result, --update DOCUMENT or --check DOCUMENT")
    try:
        for path in options.results:
            print(render(path))
        if options.update:
            options.update.write_text(update(options.update.read_text("utf-8"), options.folder), "utf-8")
        if options.check:
            text = options.check.read_text("utf-8")
            if update(text, options.folder) != text:
                print(f"{options.check.name} is out of date: table.py --update it", file=sys.stderr)
                return 1
    except (TableError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
