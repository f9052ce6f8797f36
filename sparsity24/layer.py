"""One layer from dense to 2:4: a method chooses the mask, a refinement polishes the weights on it.

result = prune_layer(W0, H, "prox", refine="cg")
result.weight, result.mask, result.rel_loss
"""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from core.errors import InvalidInput
from sparsity24 import refinement
from sparsity24.methods import Method, as_method, pattern_of
from sparsity24.problem import ALONE, LayerContext, LayerResult, ProxHistory, local_loss, prepared, relative_loss
from sparsity24.prox import all_finite

__all__ = ["LayerResult", "ProxHistory", "local_loss", "prune_layer", "relative_loss"]


def prune_layer(
    dense: Float[Tensor, "rows width"],
    hessian: Float[Tensor, "width width"],
    method: str | Method = "prox",
    refine: str = "cg",
    *,
    steps: int = 20,
    tol: float = 1e-4,
    context: LayerContext = ALONE,
    name: str = "the layer",
) -> LayerResult:
    """The sparse weight that `method` and then `refine` make of `dense`, with its loss relative to the zero weight.

    `method` is a name of `sparsity24.methods.METHODS` or an instance; `refine` is `none`, `gd`, `nesterov`, `cg` or
    `exact` (see `sparsity24.refinement.refine` for `steps` and `tol`). A weight that follows the method's pattern
    (2:4 unless it has another) already keeps its mask and is only refined, which leaves it as it is: it is its own target.
    Raises `InvalidInput` (a `ValueError`) with `name` in its message on NaN, on a width that is not a multiple of M, and on
    weights that overflow in the dtype of `dense`.
    """
    chosen = as_method(method)
    refinement.check_settings(refine, steps, tol)
    pattern = pattern_of(chosen)
    w0, h = prepared(dense, hessian, pattern=pattern, name=name)
    # Where rows are split over processes, all must agree on whether there is anything to do.
    if context.sum(not pattern.holds(dense), dense.device) == 0:
        return LayerResult(dense.clone(), pattern.mask(dense.abs()), rel_loss=0.0)
    result = _finite(chosen.prune(dense, hessian, context), name)
    if refine != "none":
        weight, info = refinement.refine(result.weight, result.mask, dense, hessian, refine, steps=steps, tol=tol)
        result = replace(
            result, weight=weight, rel_loss=relative_loss(weight, w0, h), relative_residual=info.relative_residual
        )
    return _finite(result, name)


def _finite(result: LayerResult, name: str) -> LayerResult:
    if all_finite(result.weight):
        return result
    raise InvalidInput(
        f"Pruning {name} gave NaN or infinite weights in {result.weight.dtype}: its weights or inputs are too large for it. "
        "Prune it in float32, or leave it dense with skip=[...]."
    )
