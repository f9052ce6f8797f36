"""Numbers and time spans as a reader wants them: few digits, common decimals in a column, true minus signs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any


def numbers(column: Sequence[Any]) -> list[str]:
    """The cells of one column, with common decimals where these show every number well in at most five digits."""
    sizes = [abs(cell) for cell in column if cell]
    if sizes and any(isinstance(cell, float) for cell in column):
        largest, smallest = (math.floor(math.log10(size)) for size in (max(sizes), min(sizes)))
        decimals = max(0, 3 - largest, 2 - smallest)
        while decimals and all(round(cell or 0, decimals) == round(cell or 0, decimals - 1) for cell in column):
            decimals -= 1
        if max(largest, 0) + 1 + decimals <= 5:
            return ["–" if cell is None else typeset(f"{cell:,.{decimals}f}") for cell in column]
    return ["–" if cell is None else number(cell) for cell in column]


def number(value: float, *, signed: bool = False) -> str:
    """A number in about four significant digits, typeset: a true minus, thin spaces, powers of ten."""
    sign = "+" if signed else ""
    if isinstance(value, int):
        return typeset(f"{value:{sign},d}")
    if value and not 1e-4 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:{sign}.3g}".partition("e")
        if exponent:
            power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
            return typeset(f"{mantissa} × 10{power}")
    digits = 4 - 1 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{value:{sign},.{max(0, digits)}f}"
    return typeset(text.rstrip("0").rstrip(".") if "." in text else text)


def typeset(text: str) -> str:
    """Digits grouped by thin spaces from five digits on, with a true minus sign."""
    whole = re.sub(r"\D", "", text.partition(".")[0])
    return text.replace("-", "−").replace(",", "\u202f" if len(whole) > 4 else "")


def duration(seconds: float) -> str:
    """A time span in the two units that matter."""
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
