import pytest
from quality import parse, show
from rich.console import Console

from hga_compile.evaluation.nll import summarise


def run(text, row, kl):
    numbers = {"nll": 2.0, "delta_nll": kl / 2, "kl": kl, "top1": 0.97}
    errors = {"delta_nll_error": 0.001, "kl_error": 0.001}
    shares = {"attended": 0.03, "kv_bytes": 0.03, "summary_bytes": 0.07}
    where = {"text": text, "length": 96, "row": row, "mode": "decode"}
    return {**where, **numbers, **errors, **shares, "buckets": [{"first": 72, "end": 96, **numbers}]}


def test_tables_show_every_row(tmp_path):
    runs = [run(text, row, 0.1) for text in ("first", "third") for row in ("window only", "default", "dense")]
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    show(summarise(runs), runs, console)
    text = console.export_text()
    assert all(word in text for word in ("window only", "default", "dense", "third", "95%", "3.0%", "7.0%"))


def test_arguments_are_checked(capsys):
    options = parse(["--lengths", "4096,8192", "--modes", "decode", "--scored", "100"])
    assert (options.lengths, options.modes) == ([4096, 8192], ["decode"])
    for wrong in (["--modes", "decode,prefill"], ["--scored", "8192"], ["--scored", "0"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "--scored must be at least 1 and below every length" in capsys.readouterr().err
