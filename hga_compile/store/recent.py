"""The window of a sliding layer: the last tokens of a sequence, and none before them."""

import torch
from torch import Tensor

__all__ = ["Recent", "check_pair"]

# Newest tokens of a first step that can be taken back although the window has moved on.
_SLACK = 16


class Recent:
    """K/V of the last ``window - 1`` tokens and a few before them, on the accelerator.

    Parameters
    ----------
    window : int
        Tokens that a query sees, itself included.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.length = 0
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    @classmethod
    def of(cls, window: int, key: Tensor, value: Tensor, length: int) -> "Recent":
        """Return the window of a sequence of `length` tokens of which these are the last ones."""
        recent = cls(window)
        recent.key, recent.value, recent.length = key, value, length
        return recent

    def put(self, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Add rows as the last ones of `length` tokens.

        Parameters
        ----------
        key, value : Tensor
            ``[batch, kv_heads, n, dim]`` and ``[..., v_dim]``.
        length : int
            Tokens seen once these are in; rows from ``length - n`` on are replaced.

        Returns
        -------
        tuple of Tensor
            K and V of every token that a query among the new rows reaches, the new ones last.

        Raises
        ------
        RuntimeError
            Rows that leave a gap, or that need tokens already forgotten.
        """
        begin = length - key.shape[2]
        if begin > self.length or begin < 0:
            raise RuntimeError(
                f"K/V rows must follow on what is stored, got rows from {begin} on with {self.length} seen"
            )
        check_pair(key, value)
        self._check(key, value)
        self.truncate(begin)
        if self.key is None or self.value is None:
            joined_key, joined_value = key, value
        else:
            joined_key = torch.cat([self.key, key], 2)
            joined_value = torch.cat([self.value, value], 2)
        # Rows that may be run again need what they reached; at the start of a sequence that is nothing.
        keep = self.window - 1 + (key.shape[2] if begin else min(key.shape[2], _SLACK))
        self.length = length
        # Cloned: the operands' memory is the graph's, and a view would hold all of a long prefill.
        self.key, self.value = joined_key[:, :, -keep:].clone(), joined_value[:, :, -keep:].clone()
        reach = self.window - 1 + key.shape[2]
        return joined_key[:, :, -reach:], joined_value[:, :, -reach:]

    def truncate(self, length: int) -> None:
        """Forget tokens from number `length` on.

        Raises
        ------
        RuntimeError
            Tokens that the next query would see are gone already.
        """
        if self.key is None or self.value is None or length >= self.length:
            return
        first = self.length - self.key.shape[2]
        if length <= 0:
            self.key = self.value = None
            self.length = 0
            return
        if first > max(0, length - self.window + 1):
            raise RuntimeError(
                f"a sliding layer with a window of {self.window} cannot go back from {self.length} to "
                f"{length} tokens: it has kept tokens {first} on only"
            )
        self.key, self.value = self.key[:, :, : length - first], self.value[:, :, : length - first]
        self.length = length

    def select_batch(self, index: Tensor) -> None:
        """Replace the sequences of the batch by those of `index` (int64)."""
        if self.key is not None and self.value is not None:
            index = index.to(self.key.device)
            self.key, self.value = self.key[index], self.value[index]

    def clone(self) -> "Recent":
        """Return an independent copy."""
        other = Recent(self.window)
        # The tensors are replaced, never written to: both may hold them.
        other.length, other.key, other.value = self.length, self.key, self.value
        return other

    def nbytes(self) -> int:
        """Return the bytes that the rows in reach take."""
        return sum(part.nbytes for part in (self.key, self.value) if part is not None)

    def _check(self, key: Tensor, value: Tensor) -> None:
        for name, kept, new in (("keys", self.key, key), ("values", self.value, value)):
            if kept is None:
                continue
            # Joining tensors would promote another dtype without a word.
            got, expected = (
                (list(part.shape[:2]), part.shape[3], part.dtype, part.device) for part in (new, kept)
            )
            if got != expected:
                raise RuntimeError(f"{name} must match what is stored, got {got}, expected {expected}")


def check_pair(key: Tensor, value: Tensor) -> None:
    """Refuse new keys and values that do not belong together.

    Raises
    ------
    RuntimeError
        Values of another batch, number of heads or tokens, dtype or device than the keys.
    """
    got, expected = ((list(part.shape[:3]), part.dtype, part.device) for part in (value, key))
    if got != expected:
        raise RuntimeError(
            f"values must match their keys in batch, heads, tokens, dtype, device, got {got}, "
            f"expected {expected}"
        )
