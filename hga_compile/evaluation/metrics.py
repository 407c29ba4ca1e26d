"""Distances between a routed model's next-token distributions and the dense model's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 128  # rows a log-softmax takes at once: 128 x 49,152 fp32 is 25 MB


class NotFinite(RuntimeError):
    """A model gave numbers that cannot be compared; the message says which and what to try."""


@dataclass(frozen=True)
class TokenScores:
    """One number a scored token, `[tokens]` fp32 each, in nats (NLL and KL) or 0/1 (agreement)."""

    dense_nll: Tensor
    nll: Tensor
    kl: Tensor
    agree: Tensor


def compare(dense: Tensor, routed: Tensor, targets: Tensor) -> TokenScores:
    """Score next-token logits against the dense model's.

    Parameters
    ----------
    dense, routed
        Logits, `[tokens, vocabulary]`; any floating dtype, the sums are taken in fp32.
    targets
        The tokens that really come next, `[tokens]`.

    Returns
    -------
    TokenScores
        NLL of both, KL(dense || routed), and whether the most likely token is the same.

    Raises
    ------
    NotFinite
        If one of them gives a target no finite likelihood.
    """
    if dense.shape != routed.shape or targets.shape != dense.shape[:1]:
        shapes = f"{tuple(dense.shape)}, {tuple(routed.shape)}, {tuple(targets.shape)}"
        raise ValueError(f"logits [tokens, vocabulary] twice and targets [tokens] expected, got {shapes}")
    parts = []
    for start in range(0, len(targets), CHUNK):
        rows = slice(start, start + CHUNK)
        p = dense[rows].float().log_softmax(-1)
        q = routed[rows].float().log_softmax(-1)
        target = targets[rows, None]
        nll_p, nll_q = -p.gather(1, target)[:, 0], -q.gather(1, target)[:, 0]
        kl = (p.exp() * (p - q)).sum(-1)
        parts.append(torch.stack([nll_p, nll_q, kl, (p.argmax(-1) == q.argmax(-1)).float()]).cpu())
    found = TokenScores(*torch.cat(parts, 1))
    for model, values in (("dense", found.dense_nll), ("routed", found.nll), ("routed", found.kl)):
        if not bool(torch.isfinite(values).all()):
            raise NotFinite(
                f"the {model} model's logits give {int((~torch.isfinite(values)).sum())} of {len(values)} "
                "tokens no finite likelihood; try a wider type: bfloat16 or float32 (--dtype)"
            )
    return found


@dataclass(frozen=True)
class Interval:
    """A mean over documents, its standard error, and a bootstrap 95% interval (None below two documents)."""

    mean: float
    error: float | None
    low: float | None
    high: float | None


def over_documents(values: list[float], resamples: int = 10_000, seed: int = 0) -> Interval:
    """Average one number a document; documents are resampled, for tokens of one text are not independent."""
    data = torch.tensor(values, dtype=torch.float64)
    mean = float(data.mean())
    if len(values) < 2:
        return Interval(mean, None, None, None)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(data[drawn].mean(1), ends).tolist()
    return Interval(mean, float(data.std() / len(values) ** 0.5), low, high)


def token_error(values: Tensor) -> float:
    """Return the standard error of a document's mean, its tokens taken as independent."""
    return float(values.double().std() / len(values) ** 0.5) if len(values) > 1 else 0.0
