"""What `compare` shows: figures in the house style, one self-contained page, and the tables as CSV and Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from core.files import write_atomic
from core.plots import COLORS, figure, to_svg
from core.report import Section, render_page
from core.typeset import numbers
from sparsity24.comparison import DEFAULT_STEPS, DENSE
from sparsity24.evaluation import PROTOCOLS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sparsity24.comparison import Comparison

_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def write_page(comparison: Comparison, output_dir: Path) -> Path:
    """Write the page and its tables into a folder; the path of the page."""
    page = output_dir / "index.html"
    shown = shown_table(comparison)
    write_atomic(output_dir / "table.csv", comparison.table().to_csv(index=False))
    write_atomic(output_dir / "layers.csv", comparison.layer_table().to_csv(index=False))
    write_atomic(output_dir / "table.md", f"{_markdown(shown)}\n{_conditions(comparison)}\n")
    write_atomic(page, render(comparison))
    return page


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    draws = len({run.draw for run in comparison.runs})
    table = shown_table(comparison)
    split = 1 + next(
        i for i, name in reversed(list(enumerate(table.columns))) if "perplexity" in name or "against" in name
    )
    details = table.iloc[1:, [0, *range(split, len(table.columns))]]
    plots = {_label(text): perplexities(comparison, text) for text in comparison.texts}
    sections = [
        Section(
            "Perplexity",
            _reading(comparison, draws),
            table.iloc[:, :split],
            {
                f"Perplexity on {name}: a dot a calibration draw, a bar at their mean.": to_svg(plot)
                for name, plot in plots.items()
            },
        ),
        Section(
            "Layers",
            "The loss of a layer is the error of its output relative to that of the zero weight, on the calibration inputs "
            "that the pruned blocks before it give. In the table: mean over the layers, of the method's own weights and of "
            "those after refinement. Every layer's value is in layers.csv." + _about_cloze(comparison),
            details,
            {
                "By kind of layer, mean over blocks and draws.": to_svg(losses(comparison, kind_of, "kind of layer")),
                "By block, mean over its layers and draws.": to_svg(losses(comparison, block_of, "block")),
            },
        ),
        Section(
            "Time",
            f"Measured on {comparison.settings['device']}. Forward passes and Grams, about the same for every recipe, count "
            "in the table's last column only.",
            figures={"Time in the methods and the refinements, against perplexity.": to_svg(times(comparison))},
        ),
        Section("Settings", _conditions(comparison)),
    ]
    intro = (
        "Every recipe pruned the same dense model, block by block, on the same calibration draws. A recipe is a method, "
        "followed by the refinement of the weights it kept."
    )
    return render_page(f"{len(comparison.recipes)} ways to prune one model", intro, sections)


def shown_table(comparison: Comparison) -> pd.DataFrame:
    """The table as a reader wants it: estimates with their intervals in one cell, ratios in per cent."""
    found = comparison.table()
    shown: dict[str, Sequence[Any]] = {"recipe": found["recipe"].tolist()}
    for text in comparison.texts:
        shown[f"perplexity, {_label(text)}"] = found[f"perplexity {text}"].tolist()
        if f"log ratio {text}" in found:
            cells = [found.get(f"{part} {text}", [math.nan] * len(found)) for part in ("log ratio", "low", "high")]
            which = f", {_label(text)}" if len(comparison.texts) > 1 else ""
            shown[f"against {comparison.reference}{which}"] = [_ratio(*row) for row in zip(*cells, strict=True)]
    names = {
        "mask_rel_loss": "loss, mask",
        "rel_loss": "loss, refined",
        "cloze accuracy": "cloze, accuracy",
        "cloze log-likelihood": "log-likelihood",
        "solve_s": "solve, s",
        "total_s": "in all, s",
    }
    for name, label in names.items():
        if name in found:
            shown[label] = [None if math.isnan(value) else value for value in found[name]]
    return pd.DataFrame(shown, dtype=object)


def perplexities(comparison: Comparison, text: str) -> Figure:
    """Perplexity on a text by recipe: a dot a draw, a bar at the mean, the dense model as a line."""
    recipes = comparison.recipes
    made, ax = figure(6.4, 1.1 + 0.28 * len(recipes))
    values = {recipe: [math.exp(run.nll[text]) for run in comparison.of(recipe)] for recipe in recipes}
    dense = math.exp(comparison.dense.nll[text])
    for position, recipe in enumerate(recipes):
        mean = math.exp(np.mean(np.log(values[recipe])))
        ax.plot(values[recipe], [position] * len(values[recipe]), "o", color=COLORS[0], alpha=0.55, markersize=5)
        ax.plot([mean, mean], [position - 0.32, position + 0.32], color=COLORS[1], linewidth=2)
    ax.axvline(dense, color="black", linewidth=1, linestyle="--")
    ax.text(dense, 1.01, "dense", transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=9)
    _maybe_log(ax, "x", [dense, *(value for found in values.values() for value in found)])
    ax.set(xlabel=f"perplexity, {_label(text)}", ylim=(len(recipes) - 0.4, -0.6))
    ax.grid(axis="x", color="black", alpha=0.12, linewidth=0.8)
    ax.set_yticks(range(len(recipes)), recipes)
    return made


def losses(comparison: Comparison, group_of: Callable[[str], str], label: str) -> Figure:
    """Relative loss of the layers in groups, a line a recipe."""
    groups = [group_of(name) for name in comparison.layer_table()["layer"]]
    order = list(dict.fromkeys(groups))
    made, ax = figure(6.4, 4.4)
    for index, recipe in enumerate(comparison.recipes):
        by_layer = comparison.layer_losses(recipe)
        means = [np.mean([loss for loss, own in zip(by_layer, groups, strict=True) if own == group]) for group in order]
        style = index // len(COLORS) % len(_LINES)
        ax.plot(
            range(len(order)),
            means,
            _LINES[style],
            marker=_MARKERS[style],
            markersize=4,
            linewidth=1.3,
            color=COLORS[index % len(COLORS)],
            label=recipe,
        )
    ax.set(yscale="log", xlabel=label, ylabel="relative loss")
    _plain_ticks(ax, "y")
    # Of many groups, as the blocks of a large model are, every so many have room for a name.
    shown = range(0, len(order), max(1, len(order) // 12))
    ax.set_xticks(shown, [order[i] for i in shown])
    made.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return made


def times(comparison: Comparison) -> Figure:
    """Time in the methods and refinements against perplexity on the first text, labelled beside the points."""
    text = comparison.texts[0]
    table = comparison.table()
    table = table[table["recipe"] != DENSE].sort_values(f"perplexity {text}", ascending=False)
    x, y = table["solve_s"].to_numpy(), table[f"perplexity {text}"].to_numpy()
    made, ax = figure(7.2, max(3.4, 1.0 + 0.24 * len(table)))
    ax.plot(x, y, "o", color=COLORS[0])
    ax.set(xscale="log", xlabel="time in methods and refinements, s", ylabel=f"perplexity, {_label(text)}")
    _maybe_log(ax, "y", y.tolist())
    _plain_ticks(ax, "x")
    # Names stand in one column, from the highest to the lowest, so that none covers another.
    heights = np.linspace(0.97, 0.03, len(table)) if len(table) > 1 else [0.5]
    for name, left, height, value in zip(table["recipe"], x, heights, y, strict=True):
        ax.annotate(
            name,
            (left, value),
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": COLORS[5], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3},
        )
    return made


def kind_of(layer: str) -> str:
    """What a layer is called without its place: `q_proj` of `model.layers.3.self_attn.q_proj`."""
    return re.sub(r"\[\d+\]$", "", layer).rpartition(".")[2]


def block_of(layer: str) -> str:
    """The number of a layer's block: the first number in its name."""
    found = re.search(r"\d+", layer)
    return found[0] if found else ""


def _maybe_log(ax: Any, axis: str, values: Sequence[float]) -> None:
    if max(values) > 4 * min(values):
        ax.set(**{f"{axis}scale": "log"})
        _plain_ticks(ax, axis)


def _plain_ticks(ax: Any, axis: str) -> None:
    """Numbers such as 0.02 in place of powers of ten, about half a dozen of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    which = ax.xaxis if axis == "x" else ax.yaxis
    which.set_major_locator(LogLocator(subs=(1, 2, 5)))
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    which.set_minor_formatter(NullFormatter())


def _ratio(estimate: float, low: float, high: float) -> str:
    if math.isnan(estimate):
        return "–"
    centre = _percent(estimate)
    return (
        centre
        if math.isnan(low)
        else f"{centre} [{_percent(low)}, {_percent(high)}]".replace(" ", "\N{NO-BREAK SPACE}")
    )


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):+.1f} %".replace("-", "−")


def _label(text: str) -> str:
    if text in PROTOCOLS:
        return PROTOCOLS[text].name
    return Path(text).name if text.startswith("folder:") else text.removeprefix("embedded:corpus:")


def _window(comparison: Comparison) -> str:
    windows = ", ".join(f"{_label(text)} {count}" for text, count in comparison.dense.num_windows.items())
    return f"Windows of {comparison.settings['window']} tokens: {windows}."


def _reading(comparison: Comparison, draws: int) -> str:
    reading = f"Means over {draws} calibration draw{'' if draws == 1 else 's'}. {_window(comparison)}"
    if len(comparison.recipes) > 1:
        reading += f" The change against {comparison.reference} is that of perplexity; below zero is better"
        reading += (
            "; in brackets a 95 % t-interval over the draws." if draws >= 3 else "; an interval needs three draws."
        )
    return reading


def _about_cloze(comparison: Comparison) -> str:
    if not comparison.settings["cloze_items"]:
        return ""
    return "\n\nThe cloze task asks which of four endings belongs to a passage, a proxy of zero-shot tasks: chance is 0.25."


def _conditions(comparison: Comparison) -> str:
    settings = comparison.settings
    skipped = f" Left dense: {', '.join(settings['skip'])}." if settings["skip"] else ""
    steps = ", ".join(f"{how} {count}" for how, count in DEFAULT_STEPS.items() if count)
    cut = "" if settings["max_windows"] is None else f" At most {settings['max_windows']} windows of each text."
    return (
        f"Model: {settings['model']}.\n\nCalibration: {settings['num_sequences']} sequences of "
        f"{settings['calibration_window']} tokens from random places of {settings['calibration']}.{skipped}\n\n"
        f"Perplexity: {'; '.join(settings['texts'].values())}. {_window(comparison)}{cut}\n\n"
        f"Steps of a refinement where the recipe does not give them: {steps}.\n\n"
        f"Versions: {', '.join(f'{name} {version}' for name, version in settings['versions'].items())}."
    )


def _markdown(table: pd.DataFrame) -> str:
    columns = [
        column if any(isinstance(cell, str) for cell in column) else numbers(column)
        for column in (table[name].tolist() for name in table.columns)
    ]
    lines = [list(map(str, table.columns)), ["---"] * len(columns), *(list(row) for row in zip(*columns, strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
