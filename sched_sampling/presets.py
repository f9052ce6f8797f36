"""The three scales of the claims: toy tasks and the embedded world, a real model on public data, and the paper's own."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput
from core.experiment import Preset


@dataclass(frozen=True, kw_only=True)
class SamplingPreset(Preset):
    """What a scale means here."""

    def __post_init__(self) -> None:
        """Refuse values that no claim could use, before any work."""
        super().__post_init__()
        for name, value in self.values().items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InvalidInput(f"{self.name}: {name} counts something and must be at least 1; got {value}.")


QUICK = SamplingPreset(name="quick")
REAL = SamplingPreset(name="real")
FULL = SamplingPreset(name="full")
