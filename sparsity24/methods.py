"""The methods by name: `as_method("prox")`, and what a method is.

`ProxPruner` is the paper's Algorithm 2 (reference 3.3); the others are what it is compared with (reference 4). Each is a
frozen dataclass of its settings; a method is anything with `name` and `prune`.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from core.errors import InvalidInput, unknown_name
from sparsity24.admm import Admm, Alps
from sparsity24.baselines import DSnoT, Magnitude, Random, SparseGPT, Wanda
from sparsity24.pattern import TWO_FOUR, Pattern
from sparsity24.problem import ALONE, LayerContext, LayerResult
from sparsity24.prox_pruner import ProxPruner

__all__ = [
    "METHODS",
    "Admm",
    "Alps",
    "DSnoT",
    "Magnitude",
    "Method",
    "ProxPruner",
    "Random",
    "SparseGPT",
    "Wanda",
    "as_method",
    "pattern_of",
]


@runtime_checkable
class Method(Protocol):
    """What prunes a layer: `method.prune(W0, H) -> LayerResult`.

    A method may have a `pattern` (2:4 where it has none) and `splits_rows`, a class attribute: whether pruning some of the
    rows, with `context.total` summing over all holders, gives what pruning the stack gives (False where it has none).
    """

    @property
    def name(self) -> str:
        """How reports call the method."""

    def prune(
        self,
        dense: Float[Tensor, "rows width"],
        hessian: Float[Tensor, "width width"],
        context: LayerContext = ALONE,
    ) -> LayerResult:
        """The pruned weight and its mask, before any refinement."""


METHODS: dict[str, Method] = {
    "prox": ProxPruner(),
    "prox-paper": ProxPruner.variant("paper"),
    "prox-fast": ProxPruner.variant("fast"),
    "prox-quality": ProxPruner.variant("quality"),
    "sparsegpt": SparseGPT(),
    "admm": Admm(),
    "alps": Alps(),
    "dsnot": DSnoT(),
    "wanda": Wanda(),
    "magnitude": Magnitude(),
    "random": Random(),
}


def pattern_of(method: Method) -> Pattern:
    """The pattern of a method's masks: its `pattern`, 2:4 where it has none."""
    return getattr(method, "pattern", TWO_FOUR)


def as_method(method: str | Method, *, seed: int | None = None, pattern: Pattern | None = None) -> Method:
    """The method of that name (`METHODS`), or `method` itself; `seed` replaces that of `Random`, `pattern` its pattern.

    Raises `InvalidInput` on an unknown name and on a pattern that the method cannot make: the prox is of 2:4 only.
    """
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown_name("pruning method", method, METHODS)
        found = METHODS[method]
        if seed is not None and isinstance(found, Random):
            found = replace(found, seed=seed)
    else:
        found = method
    if pattern is None or pattern == pattern_of(found):
        return found
    if not _takes_patterns(found):
        others = ", ".join(name for name, known in METHODS.items() if _takes_patterns(known))
        raise InvalidInput(
            f"{found.name} makes {pattern_of(found)} masks only, not {pattern}: its operator is defined on groups of four. "
            f"Only methods that rank scores take other patterns: {others}."
        )
    return cast(Method, replace(cast(Any, found), pattern=pattern))


def _takes_patterns(method: Method) -> bool:
    return is_dataclass(method) and any(field.name == "pattern" for field in fields(method))
