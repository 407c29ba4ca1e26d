"""What Dynamo is tracing, and for which backend: lets cache layers stay stock for every other one."""

from typing import Any

import torch

__all__ = ["model_layers", "traced_config", "traced_for_hga", "traced_layer"]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # torch's own
def traced_for_hga() -> bool:
    """Say whether the graph being traced goes to backend "hga".

    Dynamo runs this at trace time and takes the answer as a constant. Where something else traces, such as
    `torch.export`, the answer is False. Where a torch version hides the backend's name it is True: the
    layer's ops then give any backend correct, dense results.
    """
    tx = _tracer()
    if tx is None:
        return False
    try:
        compiler = tx.output.compiler_fn
    except AttributeError:
        return True
    seen = set()
    while compiler is not None and id(compiler) not in seen:
        seen.add(id(compiler))
        name = getattr(compiler, "compiler_name", None) or getattr(compiler, "__name__", "")
        if name == "hga":
            return True
        compiler = (
            getattr(compiler, "_torchdynamo_orig_backend", None)
            or getattr(compiler, "_torchdynamo_orig_callable", None)
            or getattr(compiler, "compiler_fn", None)
        )
    return False


def model_layers() -> int | None:
    """Return the number of layers of the model whose code is traced, as its configuration says.

    Returns
    -------
    int or None
        None where the traced function holds no model with a configuration.
    """
    layers: int | None = getattr(traced_config(), "num_hidden_layers", None)
    return layers


def traced_config() -> Any:
    """Return the text configuration of the model whose code is traced.

    Returns
    -------
    transformers.PretrainedConfig or None
        Of the largest one, if there are several; None where the traced function holds no model with one.
    """
    tx = _tracer()
    found: list[Any] = []
    for module in _traced_modules(tx):
        # A layer by itself, as hooks around it leave it, has none; its attention has.
        configs = (getattr(part, "config", None) for part in module.modules())
        config = next((config for config in configs if config is not None), None)
        to_text = getattr(config, "get_text_config", None)
        text = config if to_text is None else to_text()
        if isinstance(getattr(text, "num_hidden_layers", None), int):
            found.append(text)
    return max(found, key=lambda text: int(text.num_hidden_layers)) if found else None


def traced_layer() -> int | None:
    """Return the number of the layer whose own code is traced, after a graph break inside of it.

    Returns
    -------
    int or None
        None where the traced function holds no module with a `layer_idx`, as transformers' attention has, or
        modules with several.
    """
    parts = (part for module in _traced_modules(_tracer()) for part in module.modules())
    numbers = {number for part in parts if isinstance(number := getattr(part, "layer_idx", None), int)}
    return numbers.pop() if len(numbers) == 1 else None


def _traced_modules(tx: Any) -> list[torch.nn.Module]:
    scope = getattr(getattr(tx, "output", None), "local_scope", {})
    return [value for value in scope.values() if isinstance(value, torch.nn.Module)]


def _tracer() -> Any:
    """Return Dynamo's translator of the code being traced; None where Dynamo traces nothing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except (AttributeError, RuntimeError):
        return None
