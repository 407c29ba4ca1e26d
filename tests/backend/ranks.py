"""Several processes of one job on this machine, each of them a rank of torch.distributed."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from hga_compile.reporting import report


def run_ranks(
    work: Callable[..., Any], folder: Any, *given: Any, ranks: int = 2, device: str = "cpu"
) -> list[Any]:
    """Run `work(rank, device, *given)` in as many processes, and return what each of them returned.

    `work` is a function of a plain module, since the processes start empty; what it returns is plain data and
    tensors, which travel through files in `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ranks are copies of one process that has imported what takes long.
    get_context("forkserver").set_forkserver_preload(["hga_compile.backend", "transformers.generation"])
    torch.multiprocessing.start_processes(
        _start, (work, ranks, port, device, str(folder), given), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(os.path.join(folder, f"rank{rank}.pt")) for rank in range(ranks)]


def _start(
    rank: int, work: Callable[..., Any], ranks: int, port: int, device: str, folder: str, given: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", device_id=place if device == "cuda" else None
    )
    try:
        with torch.no_grad():
            torch.save(work(rank, place, *given), os.path.join(folder, f"rank{rank}.pt"))
    finally:
        dist.destroy_process_group()


def generate(model: Any, prompt: torch.Tensor, new: int, options: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily with a model compiled by hga, and say what it stored and read."""
    import hga_compile

    hga_compile.reset_report(sites=True)
    out = torch.compile(model, backend="hga", options=options).generate(
        prompt.to(model.device), max_new_tokens=new, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    seen = report()
    return {
        "tokens": out.sequences[:, prompt.shape[1] :].cpu(),
        "logits": torch.stack(out.logits).cpu(),
        "sizes": [list(layer.sizes) for layer in out.past_key_values.layers],
        "kv": [layer.state.pages.rows * layer.seen for layer in out.past_key_values.layers],
        "held": vars(hga_compile.cache_memory(out.past_key_values)),
        "reasons": sorted({str(site.reason) for site in seen.sites}),
        "used": {
            phase: (seen.totals(phase).attended, seen.totals(phase).visible)
            for phase in ("prefill", "decode")
        },
    }


def tensor_parallel(
    rank: int,
    device: torch.device,
    checkpoint: str,
    prompt: torch.Tensor,
    new: int,
    options: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Generate with a model whose heads are split over the ranks, once for each of the options."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, distributed_config=plan).eval()
    model.generation_config.eos_token_id = None
    return [generate(model, prompt, new, part) for part in options]
