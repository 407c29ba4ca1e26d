"""How many tokens a query may attend to: a share, a count, or the larger of the two."""

import math
from typing import Annotated, Self

from pydantic import Field, model_validator

from hga_compile.configs.base import Settings, conflict

# A product such as 0.07 * 100 = 7.000000000000001 must not round up to 8.
_ROUNDING = 1.0 - 1e-12

_AT_LEAST_ONE = {
    "anyOf": [
        {"required": ["fraction"], "properties": {"fraction": {"type": "number"}}},
        {"required": ["tokens"], "properties": {"tokens": {"type": "integer"}}},
    ]
}


class _Share(Settings, json_schema_extra=_AT_LEAST_ONE):
    """A share of a number of tokens and a least count, of which at least one is set."""

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share, above 0, at most 1: a budget's of the visible tokens, a window's of the budget. null: none."""

    tokens: Annotated[int, Field(ge=1)] | None = None
    """Least number of tokens, at least 1. null: none, only `fraction` counts."""

    @model_validator(mode="after")
    def _at_least_one(self) -> Self:
        if self.fraction is None and self.tokens is None:
            raise conflict("at least one of fraction and tokens must be set, got neither", ())
        return self

    def _larger(self, whole: int) -> int:
        share = 0 if self.fraction is None else math.ceil(self.fraction * whole * _ROUNDING)
        return max(share, self.tokens or 0)


class Budget(_Share):
    """Tokens that a query attends to, sinks and window included.

    At least one of the two fields is set; with both, the larger count holds.

    Examples
    --------
    >>> Budget(fraction=0.03, tokens=256).tokens_for(65536)
    1967
    >>> Budget(fraction=0.03, tokens=256).tokens_for(2048)
    256
    """

    def tokens_for(self, visible: int) -> int:
        """Return the budget in tokens.

        Parameters
        ----------
        visible : int
            Tokens that the query sees causally, itself included.

        Returns
        -------
        int
            ``max(ceil(fraction * visible), tokens)``. It may exceed `visible`: then everything is attended.
        """
        return self._larger(visible)


class Window(_Share):
    """Most recent tokens that every query attends to, counted inside the budget.

    At least one of the two fields is set; with both, the larger count holds.

    Examples
    --------
    >>> Window(fraction=0.1, tokens=16).tokens_for(1967)
    197
    >>> Window(fraction=0.1, tokens=16).tokens_for(100)
    16
    """

    def tokens_for(self, budget_tokens: int) -> int:
        """Return the window in tokens.

        Parameters
        ----------
        budget_tokens : int
            The query's budget, as `Budget.tokens_for` gives it.

        Returns
        -------
        int
            ``max(ceil(fraction * budget_tokens), tokens)``.
        """
        return self._larger(budget_tokens)
