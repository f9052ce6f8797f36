"""What the blocks' weights see: Grams and means of their inputs, from running one block on all batches (reference 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from core.errors import InvalidInput
from sparsity24.blocks import Stack
from sparsity24.capture import GramAccumulator, Use, WeightWatch
from sparsity24.prox import all_finite
from sparsity24.ranks import Ranks
from sparsity24.weights import WeightRef

Group = tuple[WeightRef, ...]


@dataclass(frozen=True)
class LayerInputs:
    """The inputs of a group of weights: mean of x x^T, mean of x, how many tokens came.

    `shift` is the mean of (x_dense - x) x^T, where x_dense is what the dense model gives for the same token; None unless
    it was asked for.
    """

    gram: Float[Tensor, "width width"]
    mean: Float[Tensor, " width"]
    num_tokens: int
    shift: Float[Tensor, "width width"] | None = None


def collect(
    stack: Stack, index: int, groups: Sequence[Group], *, ranks: Ranks, dense: Stack | None = None
) -> dict[Group, LayerInputs]:
    """Run block `index`, which must be resident and still dense, on every batch, and gather each group's inputs.

    With `dense`, the same block also runs on the dense model's hidden states, which are advanced by it; experts have no
    `shift`, since a token may take another way there. Experts that saw fewer tokens than they have inputs are filled up
    with the mean over all experts of their parameter. Raises `InvalidInput` on weights that no token reached and on NaN.
    """
    block = list(stack.blocks.values())[index]
    parameters = {
        ref.parameter: block.get_parameter(ref.parameter.removeprefix(f"{list(stack.blocks)[index]}."))
        for group in groups
        for ref in group[:1]
    }
    leaders = {(group[0].parameter, group[0].expert): group for group in groups}
    sums = {group: GramAccumulator() for group in groups}
    shifts: dict[Group, Tensor] = {}

    def watch(calls: Stack, number: int) -> tuple[list[tuple[Group, Tensor]], Tensor]:
        uses: list[tuple[Group, Tensor]] = []

        def seen(use: Use) -> None:
            group = leaders.get((use.parameter, use.expert))
            if group is not None:
                uses.append((group, use.x.reshape(-1, use.x.shape[-1])))

        with WeightWatch(parameters, seen):
            output = calls.calls[number][index].run(block, calls.hidden[number])
        return uses, output

    for number in range(len(stack.calls)):
        uses, _ = watch(stack, number)
        for group, x in uses:
            sums[group].add(x)
        if dense is not None:
            others, dense.hidden[number] = watch(dense, number)
            _add_shifts(shifts, uses, others)
    found = {}
    for group, accumulator in sums.items():
        width = group[0].of(parameters[group[0].parameter]).shape[1]
        _sum_over_ranks(accumulator, width, parameters[group[0].parameter].device, ranks)
    pools = _pools(sums)
    for group, accumulator in sums.items():
        inputs = _filled(accumulator, pools.get(group[0].parameter), group)
        if group in shifts or (dense is not None and group[0].expert is None):
            shift = ranks.total(shifts.get(group, torch.zeros_like(inputs.gram, dtype=torch.float64)))
            mean_shift = (shift / accumulator.num_tokens).float()
            inputs = LayerInputs(inputs.gram, inputs.mean, inputs.num_tokens, mean_shift)
        found[group] = inputs
    return found


def _add_shifts(
    shifts: dict[Group, Tensor], uses: Sequence[tuple[Group, Tensor]], others: Sequence[tuple[Group, Tensor]]
) -> None:
    plain = [(group, x) for group, x in uses if group[0].expert is None]
    for (group, x), (_, x_dense) in zip(plain, [other for other in others if other[0][0].expert is None], strict=True):
        product = ((x_dense.float() - x.float()).T @ x.float()).double()
        shifts[group] = product if group not in shifts else shifts[group].add_(product)


def _sum_over_ranks(accumulator: GramAccumulator, width: int, device: torch.device, ranks: Ranks) -> None:
    if ranks.size == 1:
        return
    # A process may have seen no token of an expert; it takes part in the sum all the same.
    accumulator.add_sums(torch.zeros(width, width, device=device), torch.zeros(width, device=device), 0)
    for total in (accumulator.sum, accumulator.sum_x):
        if total is not None:
            ranks.total(total)
    accumulator.num_tokens = int(ranks.total(torch.tensor(accumulator.num_tokens, device=device)))


def _pools(sums: dict[Group, GramAccumulator]) -> dict[str, GramAccumulator]:
    """By fused parameter, the inputs of all its experts."""
    pools: dict[str, GramAccumulator] = {}
    for group, own in sums.items():
        if group[0].expert is not None and own.sum is not None and own.sum_x is not None:
            pool = pools.setdefault(group[0].parameter, GramAccumulator())
            pool.add_sums(own.sum.clone(), own.sum_x.clone(), own.num_tokens)
    return pools


def _filled(own: GramAccumulator, pool: GramAccumulator | None, group: Group) -> LayerInputs:
    if own.num_tokens == 0 and (pool is None or pool.num_tokens == 0):
        names = ", ".join(ref.name for ref in group)
        raise InvalidInput(f"No token went through {names}. Leave them dense with skip=[...].")
    if pool is None:
        gram, mean = own.gram(), own.mean()
    else:
        width = pool.mean().shape[0]
        missing = max(0, width - own.num_tokens)
        filled = GramAccumulator()
        if own.sum is not None and own.sum_x is not None:
            filled.add_sums(own.sum.clone(), own.sum_x.clone(), own.num_tokens)
        if missing:
            filled.add_sums(pool.gram() * missing, pool.mean() * missing, missing)
        gram, mean = filled.gram(), filled.mean()
    if not all_finite(gram):
        raise InvalidInput(f"The inputs of `{group[0].name}` have NaN or infinite entries.")
    return LayerInputs(gram, mean, own.num_tokens)


def shifted_target(dense: Float[Tensor, "rows width"], inputs: LayerInputs, mix: float) -> Float[Tensor, "rows width"]:
    """The weights around which to prune when the target lies `mix` of the way to the dense model's output (reference 3.5).

    W_t = W0 + W0 (mix E[(x_dense - x) x^T]) (E[x x^T] + 0.01 mean-diag I)^-1: the least-squares weights that give
    W0 (x + mix (x_dense - x)) from x, under the reference's damping.
    """
    if inputs.shift is None or mix == 0 or not bool(inputs.gram.diagonal().any()):
        return dense
    ridge = 0.01 * inputs.gram.diagonal().mean()
    system = inputs.gram + ridge * torch.eye(len(inputs.gram), device=inputs.gram.device)
    return dense + torch.linalg.solve(system, (mix * (dense @ inputs.shift)).T).T
