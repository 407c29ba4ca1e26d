import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from transformers import AutoTokenizer

from hga_compile.cli.errors import BadInputError
from hga_compile.configs.routing import Routing
from hga_compile.demo.routes import check_picture, draw_routes
from hga_compile.demo.text import build_document
from hga_compile.kernels.ledger import RouteRecord


def causal(layer: int, first: int, queries: int, size: int = 4) -> RouteRecord:
    """Random routes of two KV heads."""
    groups = -(-(first + queries) // size)
    seen = torch.arange(groups) * size <= torch.arange(first, first + queries)[:, None]
    return RouteRecord(layer, first, size, (torch.rand(1, 2, queries, groups) < 0.1) & seen)


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_picture_is_drawn_and_replaced(tiny_model: Path, tmp_path: Path, sinks: int) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_model)
    document = build_document(tokenizer, tokens=900, depth=0.5)
    answer = tokenizer("7421 $x$\n", add_special_tokens=False).input_ids
    question = document.text.end - 1
    path = tmp_path / "routes.png"
    path.write_bytes(b"an older picture")
    draw_routes(
        path,
        [causal(layer, first, 300) for layer in (0, 1) for first in (0, 300, 600)],
        [causal(layer, question, 900 - question) for layer in (0, 1)]
        + [causal(layer, 900 + step, 1) for layer in (0, 1) for step in range(len(answer) - 1)],
        document=document,
        tokenizer=tokenizer,
        routing=Routing(sinks=sinks),
        attended=(0.07, 0.03),
        answer=answer,
    )
    image = imread(path)
    assert image.shape == (1008, 1800, 4)
    assert image[..., :3].std() > 0.05, "the picture is not blank"
    assert list(tmp_path.iterdir()) == [path]


def test_paths_that_cannot_be_drawn_to_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_picture(tmp_path / "routes.png")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "routes.jpg", tmp_path / "missing" / "routes.png", tmp_path / "folder.png"):
        with pytest.raises(BadInputError, match="--out"):
            check_picture(path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r"pip install 'hga-compile\[demo\]'"):
        check_picture(tmp_path / "routes.png")
