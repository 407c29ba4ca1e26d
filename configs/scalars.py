"""What an unquoted YAML scalar means: the core schema of YAML 1.2, less its one trap."""

import re
from collections.abc import Callable

# YAML 1.2.2 section 10.3.2. PyYAML's own YAML 1.1 reads `no` as False, 12:30 as 750 and 1e-3 as text.
# A leading zero is 15 in YAML 1.1 and 17 in 1.2 (`017`), so it stays text and fails as a number.
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_NUMBERS: tuple[tuple[re.Pattern[str], Callable[[str], int | float]], ...] = (
    (_INT, int),
    (_OCTAL, lambda text: int(text[2:], 8)),
    (_HEX, lambda text: int(text[2:], 16)),
    (_FLOAT, float),
)
# Converting digits takes quadratic time.
_MOST_DIGITS = 100
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = frozenset({".nan", ".NaN", ".NAN"})


def plain_scalar(text: str) -> str | int | float | bool | None:
    """Return the value of an unquoted scalar.

    Parameters
    ----------
    text : str
        The scalar as written.

    Returns
    -------
    str, int, float, bool or None
        `text` itself unless it is a number, `true`, `false` or null.

    Raises
    ------
    ValueError
        A number of more than 100 characters.
    """
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    for pattern, read in _NUMBERS:
        if pattern.fullmatch(text):
            if len(text) > _MOST_DIGITS:
                raise ValueError(f"expected a number of at most {_MOST_DIGITS} characters, got {len(text)}")
            return read(text)
    if _INFINITY.fullmatch(text):
        return float(text.replace(".", ""))
    return float("nan") if text in _NAN else text
