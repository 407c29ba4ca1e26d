"""A small model whose prefill and decode steps run through the Triton kernels of several settings.

`test_gpu_sanitizer.py` runs it under compute-sanitizer, which reports every access that is out of bounds, and
every race in shared memory.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hga_compile
from hga_compile import HGACache
from hga_compile.configs.loader import resolve_profile

PLACE = "cuda"
DECODED = 14
COMMON = {
    "inner": "eager", "kernels": "triton", "routing.dense_below": 64, "routing.centre_tokens": 32,
    "routing.budget": {"tokens": 40, "fraction": None}, "routing.prefill_budget.tokens": 64,
}  # fmt: skip
CASES = {
    "default": {"routing.centre": "block"},
    "host": {"offload.tier": "host", "offload.hot_cache": 0.3, "routing.bits": 4},
    "one bit": {"routing.bits": 1, "routing.tail": "estimate"},
    "chunks": {"routing.bits": 8, "routing.chunk_stage": "on", "routing.chunk_budget.tokens": 128},
    "mean": {"routing.summary": "mean", "routing.group_size": 16, "routing.tail": "estimate"},
}


def main() -> int:
    torch.manual_seed(0)
    # Of the library's dense attention racecheck reports races, which are none of this package's.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_hidden_layers=1, vocab_size=97, max_position_embeddings=1024,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(PLACE)
    ids = torch.randint(97, (1, 333), device=PLACE)
    for name, case in CASES.items():
        torch.compiler.reset()
        hga_compile.reset_report()
        options = {**COMMON, **case}
        compiled = torch.compile(model, backend="hga", options=options)
        cache = HGACache(model.config, profile=resolve_profile(options))
        with torch.no_grad():
            compiled(ids[:, :2], past_key_values=cache)
            compiled(ids[:, 2:], past_key_values=cache)
            token = ids[:, -1:]
            for _ in range(DECODED):
                token = compiled(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        report = hga_compile.report()
        for phase in ("prefill", "decode"):
            assert report.totals(phase).visible > 0, (name, phase, report.fallbacks)
        print(f"{name}: {int(token)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
