"""The report: one HTML file with Pareto fronts, importances, history, and quality by text and length."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hga_compile.evaluation.files import write_text

if TYPE_CHECKING:
    from hga_compile.tuning.tune import Found

__all__ = ["write_report"]


def write_report(found: Found, path: Path) -> None:
    """Write the report; the file holds its scripts and needs no network.

    Parameters
    ----------
    found
        What a run of the tuner gave.
    path
        The file.
    """
    import plotly.io

    result = found.result
    figures = [
        _scatter(
            result["trials"]["full"],
            "KL(dense || routed), nats a token",
            "Measured on the full model",
            result,
        ),
        _scatter(result["trials"]["screen"], "change of attention (proxy)", "Cheap stage", None),
        _importances(found.studies[0]),
        _history(result["trials"]["screen"]),
        _by_text(result),
    ]
    parts, first = [], True
    for figure in figures:
        if figure is None:
            continue
        parts.append(plotly.io.to_html(figure, full_html=False, include_plotlyjs=first))
        first = False
    title = f"hga-tune: {result['tuned']['model']} on {result['tuned']['gpu']}"
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in found.facts.items()
    )
    body = f"<h1>{escape(title)}</h1><dl>{facts}</dl>{''.join(parts)}"
    style = "<style>body{font-family:sans-serif;max-width:70em;margin:2em auto}dt{font-weight:bold}</style>"
    head = f'<!doctype html><html><head><meta charset="utf-8"><title>{escape(title)}</title>{style}</head>'
    write_text(path, f"{head}<body>{body}</body></html>\n")


def _scatter(
    trials: Sequence[dict[str, Any]], quality: str, title: str, result: dict[str, Any] | None
) -> Any:
    import plotly.graph_objects as plot

    figure = plot.Figure(layout={"title": title, "xaxis_title": "ms a token", "yaxis_title": quality})
    kinds = {"feasible": True, "not feasible": False}
    for name, wanted in kinds.items():
        these = [trial for trial in trials if trial["feasible"] is wanted]
        if these:
            _points(figure, name, these, "circle" if wanted else "x")
    if result is not None:
        on_front = [trial for trial in trials if trial["number"] in result["front"]]
        on_front.sort(key=lambda trial: trial["values"][1])
        _points(figure, "Pareto front", on_front, "circle-open", mode="lines+markers")
        _points(figure, "chosen", [result["chosen"]], "star")
        if result["default"]:
            _points(figure, "default setting", [result["default"]], "diamond")
    figure.update_yaxes(type="log")
    return figure


def _points(
    figure: Any, name: str, trials: Sequence[dict[str, Any]], symbol: str, mode: str = "markers"
) -> None:
    import plotly.graph_objects as plot

    texts = [
        f"trial {trial['number']}<br>"
        + "<br>".join(f"{key} {value}" for key, value in trial["params"].items())
        for trial in trials
    ]
    figure.add_trace(
        plot.Scatter(
            x=[trial["values"][1] for trial in trials], y=[trial["values"][0] for trial in trials], name=name,
            mode=mode, text=texts, marker={"symbol": symbol, "size": 10},
        )
    )  # fmt: skip


def _importances(study: Any) -> Any:
    """How much each parameter moves the cheap stage's number; None where trials are too few to say."""
    import optuna
    import plotly.graph_objects as plot

    try:
        with warnings.catch_warnings():
            # It reminds that low values are taken for good ones, which they are.
            warnings.simplefilter("ignore", UserWarning)
            found = optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
                target=lambda trial: trial.values[0],
            )
    except (ValueError, RuntimeError):
        return None
    figure = plot.Figure(layout={"title": "What the cheap stage's number depends on (PED-ANOVA)"})
    figure.add_trace(plot.Bar(x=list(found.values()), y=list(found), orientation="h"))
    return figure


def _history(trials: Sequence[dict[str, Any]]) -> Any:
    import plotly.graph_objects as plot

    figure = plot.Figure(
        layout={
            "title": "History of the cheap stage",
            "xaxis_title": "trial",
            "yaxis_title": "change of attention",
        }
    )
    numbers, values = [trial["number"] for trial in trials], [trial["values"][0] for trial in trials]
    best = [min(values[: end + 1]) for end in range(len(values))]
    figure.add_trace(plot.Scatter(x=numbers, y=values, mode="markers", name="trials"))
    figure.add_trace(plot.Scatter(x=numbers, y=best, mode="lines", name="least so far"))
    figure.update_yaxes(type="log")
    return figure


def _by_text(result: dict[str, Any]) -> Any:
    import plotly.graph_objects as plot

    figure = plot.Figure(layout={"title": "Quality by text and length", "yaxis_title": "KL, nats a token"})
    for name in ("default", "chosen"):
        if result[name]:
            texts = sorted(result[name]["by_text"].items(), key=lambda item: int(item[0].rsplit("@", 1)[1]))
            values = [numbers["kl"] for _, numbers in texts]
            figure.add_trace(plot.Bar(x=[text for text, _ in texts], y=values, name=name))
    return figure
