"""The picture that explains the method: one group of four weights under growing lambda (reference 3.2).

python -m sparsity24.pictures sparsity24/path.svg     # draws the picture of the README again
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from core.errors import InvalidInput
from core.files import write_atomic
from core.plots import COLORS, figure, to_svg
from sparsity24.prox import group_support, prox24, prox24_candidates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUP = (1.0, -0.94, 0.88, 0.81)
"""A group whose path has both jumps well apart: from four weights to three, and from three to two."""

# At least 4 : 1 on the white and on the near-black page of a README, whose theme an image cannot ask for.
_NEUTRAL = "#6e7781"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"
_LARGEST_LAM = 1.4


@dataclass(frozen=True)
class GroupPath:
    """What the proximal operator makes of a group at every lambda.

    `objectives` are those of the best point with two, three and four weights, less that of two; NaN where no such minimum
    exists. `jumps` are the lambdas at which the support shrinks, found to 1e-9.
    """

    lams: NDArray[np.float64]
    magnitudes: Float[np.ndarray, "lams 4"]
    supports: NDArray[np.int64]
    objectives: dict[int, NDArray[np.float64]]
    jumps: tuple[float, ...]


def group_path(group: tuple[float, ...] = GROUP, num_lams: int = 561) -> GroupPath:
    """The path of a group of four over lambda from 0.001 to 1.4, in float64."""
    lams = torch.linspace(1e-3, _LARGEST_LAM, num_lams, dtype=torch.float64)
    z = torch.tensor([group], dtype=torch.float64).expand(num_lams, 4).contiguous()
    w = prox24(z, lams[:, None])
    supports = group_support(w).squeeze(1)
    values = prox24_candidates(z, lams[:, None]).objectives.squeeze(-1)
    differences = torch.where(values.isfinite(), values - values[0], torch.nan)
    changes = (supports[1:] != supports[:-1]).nonzero().squeeze(1).tolist()
    return GroupPath(
        lams.numpy(),
        w.abs().numpy(),
        supports.numpy(),
        {support: differences[support - 2].numpy() for support in (2, 3, 4)},
        tuple(_jump(z[:1], float(lams[i]), float(lams[i + 1])) for i in changes),
    )


def _jump(z: Float[torch.Tensor, "1 4"], low: float, high: float) -> float:
    """The lambda between two at which the support changes, by halving."""
    before = group_support(prox24(z, low))
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if torch.equal(group_support(prox24(z, middle)), before) else (low, middle)
    return high


def path_of_a_group() -> Figure:
    """The picture: above the four magnitudes, which jump to zero one after the other; below why they jump.

    For each number of kept weights the problem is convex and has one best point. The lowest of the three objectives
    wins, and where two of them cross the solution leaps from one to the other.
    """
    path = group_path()
    made, (above, below) = figure(7.2, 5.0, nrows=2)
    above.get_gridspec().set_height_ratios([1.75, 1])
    edges = (0.0, *path.jumps, _LARGEST_LAM)
    tints = (COLORS[5], COLORS[4], COLORS[2])
    names = ("all 4 kept", "3 kept", "2 kept: 2:4-sparse")
    for left, right, tint, name in zip(edges[:-1], edges[1:], tints, names, strict=True):
        for ax in (above, below):
            ax.axvspan(left, right, color=tint, alpha=0.13, linewidth=0)
        above.text((left + right) / 2, 1.12, name, ha="center", va="center", fontsize=10, weight="bold")
    for ax in (above, below):
        for lam in path.jumps:
            ax.axvline(lam, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
        ax.set_xlim(0, _LARGEST_LAM)
        ax.grid(visible=False)
    for index, (value, color) in enumerate(zip(GROUP, COLORS, strict=False)):
        curve = path.magnitudes[:, index].copy()
        # Pen up at a jump: nothing lies between its two sides.
        curve[1:][path.supports[1:] != path.supports[:-1]] = np.nan
        above.plot(path.lams, curve, color=color, linewidth=2.4)
        label = f"w{'₁₂₃₄'[index]} = {value:.2f}".replace("-", "−")
        above.text(-0.012, abs(value), label, color=color, ha="right", va="center", fontsize=9.5, weight="bold")
    above.set(ylim=(-0.03, 1.2), yticks=[], xticklabels=[])
    above.set_ylabel("magnitude of each weight", labelpad=82)
    _draw_objectives(below, path)
    return made


def _draw_objectives(ax: Axes, path: GroupPath) -> None:
    styles = {4: (COLORS[5], "4 kept"), 3: (COLORS[4], "3 kept"), 2: (COLORS[2], "2 kept")}
    for support, (color, _) in styles.items():
        curve = path.objectives[support]
        ax.plot(path.lams, curve, color=color, linewidth=1.3, linestyle=(0, (3, 2)))
        ax.plot(path.lams, np.where(path.supports == support, curve, np.nan), color=color, linewidth=3.2)
    lowest = float(np.nanmin(path.objectives[4]))
    # Each name stands beside the left end of its curve: above those that run flat, right of the steep one.
    start = float(path.objectives[3][0])
    for support, x, y in ((2, 0.02, -0.03 * lowest), (3, 0.02, start - 0.19 * lowest), (4, 0.075, 0.86 * lowest)):
        color, name = styles[support]
        ax.text(x, y, name, color=color, fontsize=9.5, weight="bold", va="bottom" if support != 4 else "center")
    ax.set(yticks=[], xlabel="λ, the weight of the regulariser r", ylim=(1.08 * lowest, -0.22 * lowest))
    ax.set_ylabel("objective of the best\npoint with so many", labelpad=68)


def path_svg() -> str:
    """The picture as an SVG file of its own, in colours that stand on a light and on a dark page."""
    svg = to_svg(path_of_a_group()).replace("currentColor", _NEUTRAL)
    title = "Magnitudes of four weights under growing lambda: four are kept, then three, then two"
    return svg.replace("<svg ", f'<svg font-family="{_FONT}" role="img" aria-label="{title}" ', 1) + "\n"


def main(arguments: list[str]) -> None:
    """Write the picture to the path given."""
    if len(arguments) != 1:
        raise InvalidInput("Give the file to write: python -m sparsity24.pictures sparsity24/path.svg")
    write_atomic(Path(arguments[0]), path_svg())


if __name__ == "__main__":
    main(sys.argv[1:])
