r"""The model class `hga` of lm-eval (EleutherAI's lm-evaluation-harness): its tasks on a routed model.

    python -m hga_compile.evaluation.harness run --model hga --model_args pretrained=DIR,profile=default \
        --tasks niah_single_1 --metadata '{"max_seq_lengths":[4096]}'

is the command ``lm_eval`` with one more name of ``--model``. In Python importing this module registers the
name: ``lm_eval.simple_evaluate(model="hga", model_args={...}, tasks=[...])``.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

import hga_compile
from hga_compile.configs.loader import resolve_profile
from hga_compile.configs.options import SHORTHANDS

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError(
        "the model class `hga` needs lm-eval, which is not installed: pip install 'hga-compile[eval]'",
        name=error.name,
    ) from None

__all__ = ["HGALM"]

_log = logging.getLogger(__name__)


@register_model("hga")
class HGALM(HFLM):
    """lm-eval's Hugging Face model, compiled with ``backend="hga"``.

    Parameters
    ----------
    pretrained
        As `HFLM` takes it: folder, hub id or a loaded model.
    profile
        Built-in name or path of a YAML file.
    **arguments
        Call options of the backend by their names (``budget=0.05``, ``inner=eager``, ``prefill=dense``;
        others with a dot: ``routing.sinks=8``); the rest is that of `HFLM`.

    Raises
    ------
    ProfileError
        If the profile or an option is wrong.
    ValueError
        If remote code is asked for.
    """

    def __init__(self, pretrained: Any, profile: str = "default", **arguments: Any) -> None:
        names = {name for name in arguments if name in SHORTHANDS or "." in name}
        options = {"profile": profile, **{name: arguments.pop(name) for name in names}}
        self.profile = resolve_profile(options)  # a wrong one is said before the weights are read
        if arguments.get("trust_remote_code"):
            raise ValueError("remote code is never run, got trust_remote_code; leave it out (--model_args)")
        super().__init__(pretrained, **arguments)
        # Tasks come in all lengths: one graph for all of them.
        self._model: Any = torch.compile(self._model, backend="hga", dynamic=True, options=options)
        hga_compile.reset_report(sites=True)  # what is told of this model is not another's

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval puts into its results: `HFLM`'s facts, the profile, and what was routed."""
        report = hga_compile.report()
        total = report.totals()
        if not total.visible or total.attended == total.visible:
            reasons = ", ".join(sorted({str(site.reason) for site in report.sites if not site.routed}))
            short = f"sequences of up to {self.profile.routing.dense_below} tokens are dense"
            _log.warning("no query was routed, these are the dense model's scores: %s", reasons or short)
        info: dict[str, Any] = super().get_model_info()
        return info | {
            "hga_profile": self.profile.name,
            "hga_profile_digest": self.profile.digest(),
            "hga_routing": self.profile.model_dump(mode="json")["routing"],
            "hga_attended": total.attended / total.visible if total.visible else 1.0,
            "hga_kv_bytes": total.kv_bytes / total.dense_bytes if total.dense_bytes else 1.0,
            "hga_summary_bytes": total.summary_bytes / total.dense_bytes if total.dense_bytes else 0.0,
            "hga_fallbacks": dict(report.fallbacks),
        }


if __name__ == "__main__":
    cli_evaluate()
