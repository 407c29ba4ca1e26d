"""Record what a real model is routed to while it decodes a real text, for `offload.py` to replay.

    python benchmarks/record_routes.py --model DIR --tokens 16384              # 5 minutes on a CPU core
    python benchmarks/record_routes.py --model DIR --tokens 65536 --device cuda

The uncompiled model reads the text densely but for its last `--steps` tokens; these then run one by one
through the compiled model, every layer routed. The text goes on as it was written: nothing is sampled.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, find_model, load_model, model_facts, tokenize
from numpy.typing import NDArray
from recorded import DATA, Recording
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hga_compile
from hga_compile.evaluation import corpora
from hga_compile.evaluation.candidates import RoutedCandidate, fill_cache

PIECE = 1024


def record(model: PreTrainedModel, ids: Tensor, steps: int, profile: str, facts: dict[str, Any]) -> Recording:
    """Decode the last `steps` of the tokens `ids` `[1, tokens]` and keep what every layer was routed to.

    Raises
    ------
    SystemExit
        A step was not routed in every layer.
    """
    prefix = ids.shape[1] - steps
    dense = DynamicCache()
    routed = RoutedCandidate(model, {"profile": profile, "inner": "eager"})
    with torch.no_grad():
        for begin in range(0, prefix, PIECE):
            part = ids[:, begin : min(begin + PIECE, prefix)]
            model(input_ids=part, past_key_values=dense, use_cache=True, logits_to_keep=1)
        cache = fill_cache(routed.cache(), dense, prefix)
        del dense
        with hga_compile.record_routes() as records:
            for at in range(prefix, ids.shape[1]):
                own = ids[:, at : at + 1].clone()
                routed.compiled(input_ids=own, past_key_values=cache, use_cache=True)
    layers = sorted({record.layer for record in records})
    size = routed.profile.routing.group_size
    if not layers or len(records) != steps * len(layers):
        raise SystemExit(f"every step must be routed, got {len(records)} records of {steps} steps")
    groups: NDArray[np.bool_] = np.zeros((steps, 0, -(-ids.shape[1] // size)), np.bool_)
    for layer in layers:
        own_records = [record for record in records if record.layer == layer]
        heads = np.zeros((steps, own_records[0].groups.shape[1], groups.shape[2]), np.bool_)
        for record in own_records:
            found = record.groups[0, :, 0].numpy()
            heads[record.first_query - prefix, :, : found.shape[1]] = found
        groups = np.concatenate([groups, heads], 1)
    return Recording(groups, ids.shape[1], routed.profile.routing, facts | {"layers": layers})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--model", help="checkpoint folder (default: HGA_MODELS/smollm2-135m)")
    add("--tokenizer", type=Path, help="folder of its tokenizer, if the checkpoint has none")
    add("--tokens", type=int, default=16384, help="tokens read and decoded")
    add("--steps", type=int, default=160, help="of these decoded")
    add("--text", default="emma", help="see `hga eval texts`")
    add("--profile", default="default")
    add("--device", default="cpu")
    add("--out", type=Path, help="(default: benchmarks/data/routes_TOKENS.npz)")
    options = parser.parse_args(arguments)
    path = find_model(options.model)
    document = corpora.load(options.text)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = load_model(path, options.device, dtype)
    ids = tokenize(options.tokenizer or path, document.text, options.tokens).to(options.device)
    facts = {
        "model": model_facts(path),
        "text": {"name": options.text, "sha256": document.sha256},
        "profile": options.profile,
        "dtype": str(dtype).removeprefix("torch."),
        "environment": environment(options.device),
    }
    found = record(model, ids, options.steps, options.profile, facts)
    out = options.out or DATA / f"routes_{options.tokens}.npz"
    out.parent.mkdir(parents=True, exist_ok=True)
    found.save(out)
    print(
        f"{found.steps} steps of {found.groups.shape[1]} heads, {out.stat().st_size:,} bytes: "
        f"{os.path.relpath(out)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
