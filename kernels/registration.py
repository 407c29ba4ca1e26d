"""Registering an op with torch's dispatcher, with as little as possible between a call and the kernel.

`torch.library.custom_op` passes three Python layers on every call, half a millisecond on a slow core: as much
as the attention of a decode step itself.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["register_op"]

F = TypeVar("F", bound=Callable[..., Any])


def register_op(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Make an op ``hga::name`` of a function.

    Parameters
    ----------
    schema : str
        As PyTorch writes it, ``name(Tensor x, Tensor(a!) handle) -> Tensor``.
    fake : callable
        What tracing calls instead: shapes and dtypes of the result.

    Returns
    -------
    decorator
        The function then calls the op. There is no backward: an input that needs a gradient is an error.
    """
    name = "hga::" + schema.partition("(")[0]

    def add(function: F) -> F:
        torch.library.define(name, schema.partition("(")[1] + schema.partition("(")[2])
        # A kernel is not traced, whoever calls it.
        kernel = torch.compiler.disable(function)
        torch.library.impl(name, "CompositeExplicitAutograd")(kernel)
        torch.library.register_fake(name)(fake)
        op = getattr(torch.ops.hga, name.partition("::")[2]).default

        def below_autograd(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
                raise RuntimeError(
                    f"{name} has no backward, got an input that requires a gradient; call it under "
                    "torch.no_grad()"
                )
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args, **kwargs)

        torch.library.impl(name, "Autograd")(below_autograd)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return op(*args, **kwargs)

        return cast(F, call)

    return add
