"""Something to look at: how lambda drives a group to two of four, and what each method makes of one layer."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsity24.layer import prune_layer
from sparsity24.pictures import GROUP
from sparsity24.prox import group_support, prox24
from sparsity24.synthetic import synthetic_layer

_BAR_WIDTH = 8


def demo(console: Console) -> None:
    """Print the path of one group under growing lambda, and the losses of five methods on one correlated layer."""
    _path_of_a_group(console)
    _one_layer(console)


def _path_of_a_group(console: Console) -> None:
    group = torch.tensor([GROUP], dtype=torch.float64)
    console.print(
        "\n[bold]prox of lambda * r on one group of four weights[/]: as lambda grows, four become three become two\n"
    )
    table = Table("lambda", "w1", "w2", "w3", "w4", "kept", box=None, padding=(0, 1))
    for lam in (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2):
        w = prox24(group, lam)
        table.add_row(f"{lam:.1f}", *(_bar(float(value)) for value in w[0]), str(int(group_support(w))))
    console.print(table)
    console.print("With two left the regulariser is zero, and they are back at their full size.")


def _bar(value: float) -> Text:
    filled = round(abs(value) * _BAR_WIDTH)
    return Text.assemble(
        ("█" * filled, "cyan" if value >= 0 else "magenta"), ("·" * (_BAR_WIDTH - filled), "dim"), f" {value:+.2f}"
    )


def _one_layer(console: Console) -> None:
    layer = synthetic_layer("block-correlated", rows=128, width=256)
    console.print(
        "\n[bold]A layer made for the purpose, 128 x 256, inputs correlated inside groups[/]: the squared error of its output "
        "relative to pruning everything (lower is better), from the method alone and after 20 conjugate-gradient steps on the "
        "kept weights. SparseGPT has adapted its weights already, so refinement gains it least\n"
    )
    table = Table("method", "alone", "+ refinement", "alone", box=None)
    for method in ("random", "magnitude", "wanda", "sparsegpt", "prox-fast"):
        with console.status(f"Pruning by {method} ..."):
            raw = prune_layer(layer.weight, layer.hessian, method, refine="none")
            refined = prune_layer(layer.weight, layer.hessian, method, refine="cg")
        bar = "█" * max(1, round(100 * raw.rel_loss))
        table.add_row(method, f"{raw.rel_loss:.4f}", f"{refined.rel_loss:.4f}", Text(bar, "cyan"))
    console.print(table)
    console.print(
        "\nOn a real language model:\n"
        "  python -m sparsity24 prune pretrained:smollm2-135m --output sparse --sequences 8 --window 512"
    )
