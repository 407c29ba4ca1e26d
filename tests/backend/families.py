"""Model families: a tiny random model of each, what is expected of it, and what is seen when it runs.

`observe` runs a family compiled and uncompiled. The tests of `test_coverage.py` judge what it returns, and
`python tests/backend/families.py --write docs/coverage.md` puts the same into the table of that page.
"""

import argparse
import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import VOCABULARY, WINDOW, largest_error, left_padded, tokens
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedConfig

import hga_compile
from hga_compile.hooks import install_hooks
from hga_compile.kernels.ledger import RouteRecord
from hga_compile.passes.decision import Reason

__all__ = [
    "FAMILIES",
    "OPTIONS",
    "Family",
    "Observed",
    "build",
    "converse",
    "observe",
    "row",
    "table",
    "table_of",
]

PREFILL, CHUNK, STEPS, PADDING = 20, 7, 16, 5
LONG_CHUNK, LONG_STEPS = 76, 8
WARM_UP = 2  # steps until the decode graph holds for every length
# All of the short conversation fits into the budget, so that nothing may differ from dense attention; of the
# long one less than half does.
BUDGET = 48
OPTIONS: dict[str, object] = {
    "inner": "eager",
    "routing.budget": {"fraction": None, "tokens": BUDGET},
    "routing.window": {"fraction": None, "tokens": 8},
    "routing.dense_below": 0,
    "routing.centre_tokens": 8,
}


@dataclass(frozen=True)
class Family:
    """A kind of model and what the backend is expected to decide about its attention."""

    name: str
    config: Callable[[], PreTrainedConfig]
    prefill: frozenset[Reason]
    """Decisions about its full-attention layers when it gets several tokens."""
    decode: frozenset[Reason] = frozenset()
    """And when it gets one; empty for a model that does not generate."""
    sliding: frozenset[Reason] = frozenset()
    """Decisions about its sliding-window layers; empty where there are none."""
    attention: str = "sdpa"
    note: str = ""
    kind: str = "decoder"
    """`decoder`, `encoder-decoder` or `encoder`."""


@dataclass
class Observed:
    """What a family did."""

    errors: dict[str, float] = field(default_factory=dict)
    """Largest difference of the logits to those that are expected, by what was run."""
    generated: tuple[Tensor, Tensor] | None = None
    """Tokens of the compiled and of the uncompiled model."""
    prefill: frozenset[Reason] = frozenset()
    decode: frozenset[Reason] = frozenset()
    sliding: frozenset[Reason] = frozenset()
    graphs: int = 0
    """Graphs compiled while everything ran for the first time."""
    recompiles: int = 0
    """Graphs compiled after that."""
    short_fraction: float = 0.0
    """Attended tokens over visible ones in the conversations that fit into the budget; 0: none is routed."""
    most_attended: int = 0
    """Most tokens that a query of the long conversation was routed to; 0 if none was routed."""
    dense_gap: float = 0.0
    """Largest difference that routing makes to the logits of the long conversation."""


_ROUTED = frozenset({Reason.ROUTED})
_WINDOW = frozenset({Reason.SLIDING_WINDOW})
_NOT_MATCHED = frozenset({Reason.NOT_MATCHED})
_FLOAT_MASK = frozenset({Reason.FLOAT_MASK})
_NOT_CAUSAL = frozenset({Reason.NOT_CAUSAL})

# Weights of this size make attention matter: what it gets wrong shows in logits of about 1.
_ANY = {
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA = _ANY | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_FALCON = _ANY | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GPT2 = _ANY | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# With tied embeddings these repeat one token for ever.
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": False}
_EXPERTS = {"num_experts_per_tok": 2}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}
_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
_SPEAKING = _ANY | {"d_model": 32, "decoder_start_token_id": 2}
_T5 = _SPEAKING | {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
_WHISPER = _SPEAKING | {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "init_std": 0.2,
}


def _config(kind: str, *parts: Mapping[str, Any], **more: Any) -> Callable[[], PreTrainedConfig]:
    """Make configurations of the class ``<kind>Config``."""
    settings: dict[str, Any] = {}
    for part in parts:
        settings |= part
    return partial(getattr(transformers, f"{kind}Config"), **(settings | more))


_DECODERS = (
    Family("Llama", _config("Llama", _LLAMA), _ROUTED, _ROUTED),
    Family("Qwen2", _config("Qwen2", _LLAMA), _ROUTED, _ROUTED),
    Family("Qwen3", _config("Qwen3", _LLAMA, head_dim=16), _ROUTED, _ROUTED),
    Family(
        "Qwen3-MoE",
        _config("Qwen3Moe", _LLAMA, _EXPERTS, head_dim=16, num_experts=4, moe_intermediate_size=16),
        _ROUTED,
        _ROUTED,
    ),
    Family(
        "Mistral", _config("Mistral", _LLAMA, sliding_window=WINDOW), frozenset(), frozenset(), _WINDOW,
        note="every layer slides where the checkpoint sets a window; else as Llama",
    ),
    Family("Mixtral", _config("Mixtral", _LLAMA, _EXPERTS, num_local_experts=4), _ROUTED, _ROUTED),
    Family(
        "Gemma 2", _config("Gemma2", _LLAMA, _SLIDING, _GEMMA, attn_logit_softcapping=2.0),
        _ROUTED, _ROUTED, _WINDOW, "eager", "soft-capped scores, written out as matrix products",
    ),
    Family("Gemma 3", _config("Gemma3Text", _LLAMA, _SLIDING, _GEMMA), _ROUTED, _ROUTED, _WINDOW),
    Family("Phi-3", _config("Phi3", _LLAMA), _ROUTED, _ROUTED),
    Family("GPT-2", _config("GPT2", _GPT2), _ROUTED, _ROUTED),
    Family("GPT-NeoX", _config("GPTNeoX", _NEOX), _ROUTED, _ROUTED),
    Family("Falcon (rotary)", _config("Falcon", _FALCON, alibi=False), _ROUTED, _ROUTED),
    Family(
        "Falcon (ALiBi)", _config("Falcon", _FALCON, alibi=True), _FLOAT_MASK, _FLOAT_MASK,
        note="ALiBi is an additive mask",
    ),
    Family("OLMo 2", _config("Olmo2", _LLAMA), _ROUTED, _ROUTED),
    Family(
        "gpt-oss", _config("GptOss", _LLAMA, _SLIDING, _EXPERTS, _ROPE, head_dim=16, num_local_experts=4),
        _ROUTED, _ROUTED, _WINDOW, "eager", "learned sinks, written out as matrix products",
    ),
    Family(
        "DeepSeek-V3", _config("DeepseekV3", _LLAMA, _MLA, _EXPERTS),
        frozenset({Reason.ROUTED, Reason.NOT_MATCHED}), frozenset({Reason.SINGLE_QUERY, Reason.NOT_MATCHED}),
        note="what is stored is the latent, and all of it is read; keys are made of it in the graph",
    ),
    Family("Cohere", _config("Cohere", _LLAMA), _ROUTED, _ROUTED),
    Family(
        "StarCoder2", _config("Starcoder2", _LLAMA, sliding_window=WINDOW), frozenset(), frozenset(), _WINDOW,
        note="every layer slides where the checkpoint sets a window",
    ),
    Family("GLM-4", _config("Glm4", _LLAMA, head_dim=16), _ROUTED, _ROUTED),
    Family("Granite", _config("Granite", _LLAMA), _ROUTED, _ROUTED),
    Family("SmolLM3", _config("SmolLM3", _LLAMA), _ROUTED, _ROUTED),
    Family(
        "Bloom", _config("Bloom", _ANY, hidden_size=32, n_layer=2, n_head=4),
        _NOT_MATCHED, _NOT_MATCHED, frozenset(), "eager", "ALiBi, written out as matrix products",
    ),
)  # fmt: skip

_OTHERS = (
    Family(
        "BERT", _config("Bert", _ENCODER, vocab_size=VOCABULARY), _NOT_CAUSAL,
        note="encoder; its mask holds padding only", kind="encoder",
    ),
    Family(
        "ViT", _config("ViT", _ENCODER, image_size=16, patch_size=4), _NOT_CAUSAL,
        note="encoder of images", kind="encoder",
    ),
    Family(
        "T5", _config("T5", _T5),
        _FLOAT_MASK | _NOT_CAUSAL, _FLOAT_MASK | {Reason.SINGLE_QUERY},
        note="relative positions are an additive mask; cross attention", kind="encoder-decoder",
    ),
    Family(
        "Whisper",
        _config("Whisper", _WHISPER, num_mel_bins=8, max_source_positions=16, max_target_positions=64),
        _ROUTED | _NOT_CAUSAL, _ROUTED | {Reason.SINGLE_QUERY},
        note="the decoder's own attention is routed; encoder and cross attention stay dense",
        kind="encoder-decoder",
    ),
)  # fmt: skip

FAMILIES: dict[str, Family] = {family.name: family for family in (*_DECODERS, *_OTHERS)}


def observe(family: Family) -> Observed:
    """Run a family compiled and uncompiled and return what was seen."""
    run = {"decoder": _run_decoder, "encoder-decoder": _run_encoder_decoder, "encoder": _run_encoder}
    torch._dynamo.reset()
    install_hooks()
    hga_compile.reset_report(sites=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return run[family.kind](family)
    finally:
        torch.set_num_threads(threads)
        torch._dynamo.reset()


def _run_decoder(family: Family) -> Observed:
    seen = Observed()
    plain = build(family)
    compiled = _compiled(plain)
    whole = tokens(2, PREFILL + CHUNK + STEPS)
    parts = [PREFILL, CHUNK] + [1] * STEPS
    padded, unpadded = left_padded(2, PREFILL, PADDING), torch.ones(2, PREFILL, dtype=torch.int64)
    before = _graphs()
    converse(compiled, whole, parts[: 2 + WARM_UP], padded)
    seen.graphs = _graphs() - before
    _note_decisions(seen, [layer.is_sliding for layer in DynamicCache(config=plain.config).layers])

    def everything() -> None:
        hga_compile.reset_report()
        for name, mask in (("padded", padded), ("unpadded", unpadded)):
            got = converse(compiled, whole, parts, mask)
            expected = converse(plain, whole, parts, mask)
            seen.errors[name] = largest_error(got, expected, mask)
        seen.short_fraction = hga_compile.report().totals().attended_fraction
        settings = {"attention_mask": padded, "max_new_tokens": STEPS, "do_sample": False} | all_logits(plain)
        prompt = whole[:, :PREFILL]
        seen.generated = compiled.generate(prompt, **settings), plain.generate(prompt, **settings)
        for name, mask in (("over budget, padded", padded), ("over budget, unpadded", unpadded)):
            _run_over_budget(seen, name, plain, compiled, mask)

    seen.recompiles = _recompiles_of(everything)
    return seen


def _run_over_budget(seen: Observed, name: str, plain: nn.Module, compiled: Any, padding: Tensor) -> None:
    """Compare a conversation longer than the budget with dense attention masked to the recorded routes."""
    whole = tokens(2, PREFILL + LONG_CHUNK + LONG_STEPS, seed=2)
    with hga_compile.record_routes() as routes:
        got = torch.cat(converse(compiled, whole, [PREFILL, LONG_CHUNK] + [1] * LONG_STEPS, padding), 1)
    mask = _grown(padding, whole.shape[1])
    allowed = _allowed(routes, mask)
    inputs = {"input_ids": whole, **_inputs(plain, mask, whole.shape[1])}
    dense = plain(**inputs).logits
    with _attending_to(plain, allowed):
        expected = plain(**inputs).logits
    seen.errors[name] = largest_error([got], [expected], mask)
    seen.dense_gap = max(seen.dense_gap, largest_error([dense], [expected], mask))
    seen.most_attended = max([seen.most_attended, *(int(table.sum(-1).max()) for table in allowed.values())])


def _run_encoder_decoder(family: Family) -> Observed:
    seen = Observed()
    if family.name == "Whisper":
        plain = build(family, transformers.WhisperForConditionalGeneration)
        source: dict[str, Tensor] = {"input_features": torch.randn(2, 8, 32)}
    else:
        plain = build(family, transformers.AutoModelForSeq2SeqLM)
        source = {"input_ids": tokens(2, PREFILL), "attention_mask": left_padded(2, PREFILL, PADDING)}
    compiled, target = _compiled(plain), tokens(2, CHUNK + STEPS)
    before = _graphs()
    _transcribe(compiled, source, target[:, : CHUNK + WARM_UP])
    seen.graphs = _graphs() - before
    _note_decisions(seen, [])

    def everything() -> None:
        hga_compile.reset_report()
        got, expected = (_transcribe(model, source, target) for model in (compiled, plain))
        seen.errors["forward"] = largest_error(got, expected)
        seen.short_fraction = hga_compile.report().totals().attended_fraction

    seen.recompiles = _recompiles_of(everything)
    return seen


def _run_encoder(family: Family) -> Observed:
    seen = Observed()
    plain = build(family, transformers.AutoModel)
    compiled = _compiled(plain)
    if family.name == "ViT":
        mask, source = None, {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        mask = left_padded(2, PREFILL, PADDING)
        source = {"input_ids": tokens(2, PREFILL), "attention_mask": mask}
    before = _graphs()
    got, expected = (model(**source).last_hidden_state for model in (compiled, plain))
    seen.errors["forward"] = largest_error([got], [expected], mask)
    seen.graphs = _graphs() - before
    _note_decisions(seen, [])
    seen.recompiles = _recompiles_of(lambda: compiled(**source))
    return seen


def build(family: Family, kind: Any = transformers.AutoModelForCausalLM, **more: Any) -> nn.Module:
    """Make a random model of a family; `more` changes its configuration."""
    torch.manual_seed(0)
    make = getattr(kind, "from_config", None) or kind._from_config
    model = make(family.config(**more), attn_implementation=family.attention).eval()
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return model


def _compiled(model: nn.Module) -> Any:
    """Compile a copy."""
    return torch.compile(copy.deepcopy(model), backend="hga", options=OPTIONS)


def converse(model: Any, whole: Tensor, parts: Iterable[int], mask: Tensor) -> list[Tensor]:
    """Feed the first tokens part after part into a new cache, with the arguments that `generate` uses."""
    cache, outputs, end = DynamicCache(config=model.config), [], 0
    for size in parts:
        end += size
        inputs = _inputs(model, _grown(mask, end), size)
        ids = whole[:, end - size : end].contiguous()
        outputs.append(model(input_ids=ids, past_key_values=cache, **inputs).logits)
    return outputs


def _transcribe(model: Any, source: Mapping[str, Tensor], target: Tensor) -> list[Tensor]:
    """Run encoder and decoder on the first tokens of the target, then the decoder on one after another."""
    first = model(**source, decoder_input_ids=target[:, :CHUNK].contiguous(), use_cache=True)
    outputs, cache = [first.logits], first.past_key_values
    encoded = {"encoder_outputs": (first.encoder_last_hidden_state,)}
    if "attention_mask" in source:
        encoded["attention_mask"] = source["attention_mask"]
    for step in range(CHUNK, target.shape[1]):
        ids = target[:, step : step + 1].contiguous()
        outputs.append(model(**encoded, decoder_input_ids=ids, past_key_values=cache, use_cache=True).logits)
    return outputs


def _inputs(model: Any, mask: Tensor, count: int) -> dict[str, Any]:
    """Return what goes with the last `count` tokens."""
    inputs = {"attention_mask": mask, "use_cache": True, "return_dict": True} | all_logits(model)
    if "position_ids" in _parameters(model):
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -count:].contiguous()
    return inputs


def all_logits(model: Any) -> dict[str, int]:
    """Ask for the logits of every position, of models that make those of the last one for `generate`."""
    return {"logits_to_keep": 0} if "logits_to_keep" in _parameters(model) else {}


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def _grown(mask: Tensor, length: int) -> Tensor:
    return nn.functional.pad(mask, (0, length - mask.shape[1]), value=1)


def _allowed(routes: list[RouteRecord], mask: Tensor) -> dict[int, Tensor]:
    """Return what each query may see, per layer: ``[batch, kv_heads, queries, tokens]`` bool.

    A query of which no route was recorded sees every token before it.
    """
    length = mask.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None].bool()
    tables: dict[int, Tensor] = {}
    for route in routes:
        _, kv_heads, queries, _ = route.groups.shape
        table = tables.setdefault(route.layer, visible.repeat(1, kv_heads, 1, 1))
        routed = route.groups.repeat_interleave(route.group_size, -1)[..., :length]
        rows = slice(route.first_query, route.first_query + queries)
        table[:, :, rows] &= nn.functional.pad(routed, (0, length - routed.shape[-1]))
    return tables


@contextmanager
def _attending_to(model: nn.Module, allowed: Mapping[int, Tensor]) -> Iterator[None]:
    """Give the attention of each layer in `allowed` a mask of its own."""
    handles, left = [], set(allowed)

    def masked(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        table = allowed[module.layer_idx]
        table = table.repeat_interleave(model.config.num_attention_heads // table.shape[1], 1)
        left.discard(module.layer_idx)
        lowest = torch.finfo(model.dtype).min
        return args, kwargs | {"attention_mask": torch.where(table, 0.0, lowest).to(model.dtype)}

    for module in model.modules():
        if type(module).__name__.endswith("Attention") and getattr(module, "layer_idx", None) in allowed:
            handles.append(module.register_forward_pre_hook(masked, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if left:
        raise RuntimeError(f"layers {sorted(left)} have no attention module that takes a mask")


def _note_decisions(seen: Observed, sliding: list[bool]) -> None:
    """Sort the decisions about all graphs so far by phase, those about sliding layers apart."""
    found: dict[str, set[Reason]] = {"prefill": set(), "decode": set(), "sliding": set()}
    for site in hga_compile.report().sites:
        slides = site.layer is not None and site.layer < len(sliding) and sliding[site.layer]
        # A graph that could not be traced serves any phase.
        phases = ["sliding"] if slides else ["prefill", "decode"] if site.phase == "any" else [site.phase]
        for phase in phases:
            found[phase].add(Reason(site.reason))
    seen.prefill, seen.decode, seen.sliding = (frozenset(part) for part in found.values())


def _recompiles_of(call: Callable[[], Any]) -> int:
    """Run something and count the graphs that it compiles; at least one where it asks for any."""
    before = _graphs()
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            call()
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        call()
        return max(1, _graphs() - before)
    return _graphs() - before


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def row(family: Family, seen: Observed) -> str:
    """Return the family's line of the table."""
    decisions = (_words(part) for part in (seen.prefill, seen.decode, seen.sliding))
    recompiles = seen.recompiles if seen.decode or seen.sliding else "-"
    cells = (family.name, family.attention, *decisions, seen.graphs, recompiles, family.note)
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _words(reasons: frozenset[Reason]) -> str:
    return (
        "; ".join(_WORDS.get(reason, f"dense: {reason.value}") for reason in Reason if reason in reasons)
        or "-"
    )


_WORDS = {Reason.ROUTED: "routed", Reason.SLIDING_WINDOW: "exact, keeps the window"}
_COLUMNS = "| family | attention | prefill | decode | sliding layers | graphs | recompiles in decode | note |"
_BEGIN, _END = "<!-- coverage -->\n", "<!-- /coverage -->"


def table_of(page: str) -> str:
    """Return the table that stands in the text of a page."""
    return page.split(_BEGIN)[1].split(_END)[0]


def table(rows: Iterable[str]) -> str:
    """Return the whole table."""
    rule = "|" + ":--|" * 5 + "--:|" * 2 + ":--|"
    return "\n".join([_COLUMNS, rule, *rows]) + "\n"


def main() -> None:
    """Observe all families and print the table, or put it into a page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page whose table is replaced")
    page = parser.parse_args().write
    rows = []
    for family in FAMILIES.values():
        rows.append(row(family, observe(family)))
        print(rows[-1], file=sys.stderr)
    if page is None:
        print(table(rows), end="")
    else:
        before, rest = page.read_text().split(_BEGIN)
        page.write_text(before + _BEGIN + table(rows) + _END + rest.split(_END)[1])


if __name__ == "__main__":
    main()
