"""What every part of a profile shares: strict types, no unknown keys, no NaN, immutable values."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """Base of the profile's models: frozen, hashable, unknown keys refused, types never coerced."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=False,
        use_attribute_docstrings=True,
    )


def conflict(message: str, path: Sequence[str | int]) -> PydanticCustomError:
    """Build the error of fields that contradict each other.

    Parameters
    ----------
    message : str
        What is wrong, both values, and the knob that changes it.
    path : sequence of str or int
        The field to point at, below the model whose validator raises.

    Returns
    -------
    pydantic_core.PydanticCustomError
        To raise inside a validator; the loader finds the line of `path` in its context.
    """
    return PydanticCustomError("conflict", "{message}", {"message": message, "path": tuple(path)})


def plain_int(value: object) -> object:
    """Refuse what equals an integer without being one.

    Pydantic's ``Literal[1, 2]`` takes ``true`` and ``2.0``, also when strict, because they compare equal.
    """
    if type(value) is not int:
        raise PydanticCustomError("int_type", "Input should be a valid integer")
    return value
