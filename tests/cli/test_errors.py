import pytest
import torch
import typer

from hga_compile.cli.errors import BadInputError, CommandError, describe, guarded, one_line
from hga_compile.configs.errors import ProfileError
from hga_compile.kernels.dispatch import KernelError


class BackendCompilerFailed(RuntimeError):  # the shape of torch._dynamo's own
    def __init__(self, inner: Exception) -> None:
        super().__init__("backend='hga' raised:")
        self.inner_exception = inner


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadInputError("what"), 2),
        (ProfileError("what"), 2),
        (BackendCompilerFailed(ProfileError("what")), 2),
        (KernelError("what"), 2),
        (CommandError("what"), 1),
        (RuntimeError("what"), 1),
        (torch.OutOfMemoryError("what"), 1),
    ],
)
def test_exit_code_says_whose_fault_it_is(error: Exception, code: int) -> None:
    found, line = describe(error)
    assert found == code
    assert "what" in line


def test_memory_running_out_names_the_knobs() -> None:
    assert "--prefill-step" in describe(MemoryError())[1]


def test_messages_become_one_line() -> None:
    assert one_line(ValueError("a\n  b\n\nc")) == "a b c"
    assert one_line(ValueError("first\n" + "x" * 1000)) == "first"
    assert one_line(ValueError()) == ""


@pytest.mark.parametrize("debug", [True, False])
def test_tracebacks_are_shown_with_debug_only(debug: bool, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command(debug: bool = False) -> None:
        raise BadInputError("bad")

    with pytest.raises(typer.Exit) as exit_:
        command(debug=debug)
    assert exit_.value.exit_code == 2
    said = capsys.readouterr().err
    assert said.endswith("hga: error: bad\n")
    assert ("Traceback" in said) is debug


def test_an_interrupt_exits_with_130() -> None:
    @guarded
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as exit_:
        command()
    assert exit_.value.exit_code == 130
