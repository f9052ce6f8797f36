"""Figures: what a model makes of its own prefixes position by position, and cost against gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from core.plots import COLORS, figure
from sched_sampling.evaluation import PositionCurves

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bias_curves(curves: Mapping[str, PositionCurves], *, least: int = 5) -> Figure:
    """NLL and accuracy of the gold token by position: on gold prefixes dashed, on own prefixes solid; a colour a model.

    Positions that fewer than `least` answers reach are left out (all are kept where no answer is that frequent).
    """
    plot, axes = figure(width=8.0, ncols=2)
    for color, (name, found) in zip(COLORS, curves.items(), strict=False):
        kept = found.count >= min(least, int(found.count.max()))
        positions = np.arange(1, len(found.count) + 1)[kept]
        for ax, gold, own in (
            (axes[0], found.gold_nll, found.own_nll),
            (axes[1], found.gold_accuracy, found.own_accuracy),
        ):
            ax.plot(positions, gold[kept], "--", color=color, label=f"{name}, gold prefixes")
            ax.plot(positions, own[kept], "-", color=color, label=f"{name}, own prefixes")
    axes[0].set(xlabel="position in the answer", ylabel="NLL of the gold token (nats)")
    axes[1].set(xlabel="position in the answer", ylabel="accuracy", ylim=(-0.02, 1.02))
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)
    # Above both: inside either it would hide a curve.
    plot.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return plot


def cost_and_gain(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], gain: str) -> Figure:
    """CPU seconds of a run against a score: for each method the seeds' seconds and scores, and their mean as a cross."""
    plot, axes = figure()
    for color, (name, (seconds, values)) in zip(COLORS, points.items(), strict=False):
        axes.plot(seconds, values, "o", color=color, alpha=0.4, markersize=4)
        axes.plot([np.mean(seconds)], [np.mean(values)], "X", color=color, markersize=9, label=name)
    axes.set(xlabel="CPU seconds, generation included", ylabel=gain)
    axes.legend(fontsize=8)
    return plot


def save(plot: Any, path: Any) -> None:
    """Write a figure as SVG that takes the colours of the page around it."""
    from core.files import write_atomic
    from core.plots import to_svg

    write_atomic(path, to_svg(plot))
