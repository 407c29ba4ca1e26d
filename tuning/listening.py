"""Standing in for a model's attention for a while: what the quality of routing is measured through."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["Attention", "in_place_of_attention"]

Attention = Callable[..., tuple[Tensor, Any]]
"""As transformers' attention functions: takes module, query, key, value, mask and more; returns
``[batch, tokens, heads, dim]`` and weights or None."""

_NAME = "hga_tuning"


@contextmanager
def in_place_of_attention(model: PreTrainedModel, make: Callable[[Attention], Attention]) -> Iterator[None]:
    """Let a function run in the place of a model's attention for as long as the context is open.

    Parameters
    ----------
    model
        Uncompiled; its attention goes through transformers' interface.
    make
        Gets the stock function and returns the one to run.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before in ALL_ATTENTION_FUNCTIONS:
        stock = ALL_ATTENTION_FUNCTIONS[before]
    else:  # eager attention is a function of each model's own file
        stock = sys.modules[type(model).__module__].eager_attention_forward
    functions = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    ALL_ATTENTION_FUNCTIONS.register(_NAME, make(stock))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS[before])
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        for registry in functions:
            registry._global_mapping.pop(_NAME, None)
