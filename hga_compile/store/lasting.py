"""Methods whose tensors last, whatever mode they are called in."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

__all__ = ["lasting"]

_F = TypeVar("_F", bound=Callable[..., object])


def lasting(method: _F) -> _F:
    """Run a method outside inference mode: outside of it, tensors made inside cannot be written to."""
    outside = torch.inference_mode(False)(torch.no_grad()(method))

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> object:
        # Changing modes costs a decode step more than storing its rows.
        as_is = not (torch.is_inference_mode_enabled() or torch.is_grad_enabled())
        return (method if as_is else outside)(*args, **kwargs)

    return cast(_F, run)
