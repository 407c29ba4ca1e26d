"""lm-eval's tasks through the model class `hga`, on a task of local files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hga_compile.passes.decision import Decision, Reason
from hga_compile.reporting import note_graph

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'hga-compile[eval]'")

SMALL = {"routing.dense_below": 64, "routing.centre_tokens": 32, "inner": "eager"}
TASK = """
task: local_{kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list:
  - metric: {metric}
"""
CHOICES = 'doc_to_choice: ["w1", "w2"]\n'
GENERATION = "generation_kwargs:\n  until: []\n  max_gen_toks: 6\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    torch.compiler.reset()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(95)} | {"<s>": 95, "</s>": 96}
    raw = Tokenizer(models.WordLevel(words, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def tasks(tmp_path: Path) -> Any:
    """Two tasks of three texts of 120 to 200 tokens: one of choices, one of generation."""
    draw = torch.Generator().manual_seed(3)
    data = tmp_path / "data.jsonl"
    with data.open("w") as file:
        for length in (120, 160, 200):
            numbers = torch.randint(95, (length,), generator=draw).tolist()
            text = " ".join(f"w{number}" for number in numbers)
            file.write(json.dumps({"text": text, "answer": "w1"}) + "\n")
    kinds = {
        "multiple_choice": ("acc", CHOICES),
        "generate_until": ("exact_match", GENERATION),
    }
    for kind, (metric, more) in kinds.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, data=data, metric=metric) + more)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def evaluate(tasks: Any, names: list[str], model: Any, **arguments: Any) -> dict[str, Any]:
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=names, task_manager=tasks, batch_size=1, device="cpu",
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    return found


def answers(result: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in sorted(result["samples"][task], key=lambda s: s["doc_id"])]


def likelihoods(result: dict[str, Any]) -> torch.Tensor:
    found = answers(result, "local_multiple_choice")
    return torch.tensor([[float(choice[0][0]) for choice in document] for document in found])


def test_the_name_hga_is_registered_and_full_budget_is_the_dense_model(
    tiny_model: Any, tokenizer: Any, tasks: Any
) -> None:
    import hga_compile.evaluation.harness  # noqa: F401  # registers the name

    names = ["local_multiple_choice", "local_generate_until"]
    common = {"pretrained": tiny_model, "tokenizer": tokenizer}
    dense = evaluate(tasks, names, "hf", **common)
    full = evaluate(tasks, names, "hga", **common, budget=1.0, **SMALL)
    torch.testing.assert_close(likelihoods(full), likelihoods(dense), rtol=1e-4, atol=1e-4)
    assert answers(full, names[1]) == answers(dense, names[1])
    assert full["config"]["hga_attended"] == 1.0


def test_a_small_budget_is_routed_and_told_in_the_results(
    tiny_model: Any, tokenizer: Any, tasks: Any
) -> None:
    import hga_compile.evaluation.harness  # noqa: F401  # registers the name

    names = ["local_multiple_choice", "local_generate_until"]
    common = {"pretrained": tiny_model, "tokenizer": tokenizer}
    budget = {"routing.budget": {"tokens": 24, "fraction": None}}
    found = evaluate(tasks, names, "hga", **common, **budget, **SMALL)
    dense = evaluate(tasks, names, "hf", **common)
    assert (likelihoods(found) - likelihoods(dense)).abs().max() > 1e-3
    config = found["config"]
    assert 0.1 < config["hga_attended"] < 0.8
    assert config["hga_kv_bytes"] < 0.8
    assert config["hga_summary_bytes"] > 0
    assert config["hga_routing"]["budget"] == {"tokens": 24, "fraction": None}


def test_short_texts_are_said_to_be_dense(
    tiny_model: Any, tokenizer: Any, tasks: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from hga_compile.evaluation.harness import HGALM

    other = Decision("sdpa", 0, "prefill", Reason.SLIDING_WINDOW, "of a model compiled before")
    note_graph([other])
    with caplog.at_level("WARNING", "hga_compile.evaluation.harness"):
        model = HGALM(tiny_model, tokenizer=tokenizer, batch_size=1, inner="eager")
        lm_eval.simple_evaluate(
            model=model, tasks=["local_multiple_choice"], task_manager=tasks, bootstrap_iters=0
        )
    assert "no query was routed" in caplog.text
    assert "1024 tokens are dense" in caplog.text
    assert "sliding window" not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"routing.nothing": 1}, "routing.nothing"), ({"trust_remote_code": True}, "remote code is never run")],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(
    arguments: dict[str, Any], message: str
) -> None:
    from hga_compile.evaluation.harness import HGALM

    with pytest.raises(ValueError, match=message):
        HGALM("no-such-folder", **arguments)
