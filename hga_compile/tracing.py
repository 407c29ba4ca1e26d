"""Which backend Dynamo is tracing for: lets cache layers stay stock for every other one."""

import torch

__all__ = ["traced_for_hga"]


@torch.compiler.assume_constant_result
def traced_for_hga() -> bool:
    """Say whether the graph being traced goes to backend "hga".

    Dynamo runs this at trace time and takes the answer as a constant. Where a torch version hides the
    backend's name the answer is True: the layer's ops then give any backend correct, dense results.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        compiler = InstructionTranslator.current_tx().output.compiler_fn
    except (AttributeError, RuntimeError):
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
