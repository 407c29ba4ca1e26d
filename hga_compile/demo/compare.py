"""Distance of two models' predictions over the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Comparison:
    """Keeps the first model's predictions, and compares the second's with them step by step.

    The log-probabilities wait in host memory: tokens x vocabulary x 4 bytes.
    """

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._next = 0
        self._divergence = 0.0
        self._tokens = 0
        self._agreed = 0

    def keep(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """Keep a step of the first model.

        Parameters
        ----------
        logits
            ``[tokens, vocabulary]``.
        targets
            ``[tokens]`` int64.

        Returns
        -------
        float
            Sum of the negative log-likelihoods, in nats.
        """
        found = logits.float().log_softmax(-1)
        self._kept.append(found.cpu())
        return _nll(found, targets)

    def compare(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        """Compare a step of the second model with the first's; arguments and result as of `keep`."""
        found = logits.float().log_softmax(-1)
        first = self._kept[self._next].to(found.device)
        self._next += 1
        self._divergence += float((first.exp() * (first - found)).sum())
        self._agreed += int((first.argmax(-1) == found.argmax(-1)).sum())
        self._tokens += len(found)
        return _nll(found, targets)

    @property
    def divergence(self) -> float:
        """Mean KL(first || second) of a token, in nats."""
        return self._divergence / self._tokens

    @property
    def agreement(self) -> float:
        """Share of tokens at which both models' first choice is the same."""
        return self._agreed / self._tokens


def _nll(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    return -float(log_probabilities.gather(-1, targets[:, None]).sum())
