"""The command line of the main job: `python -m sparsity24 prune | evaluate | verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from core.data.catalog import LoadedData

app = typer.Typer(
    name="sparsity24",
    help="Prune a trained language model to 2:4 sparsity, without retraining it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

MODEL_HELP = "`testbed:tiny_llama`, `pretrained:smollm2-135m` (both offline), `hub:OWNER/NAME` or `folder:PATH`."
DATA_HELP = "`embedded:corpus` (offline), `hub:OWNER/NAME:CONFIG`, `folder:PATH`, or a name such as `wikitext2`."


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help=f"The dense model: {MODEL_HELP}")],
    output: Annotated[Path, typer.Option(help="A new folder for the sparse model, its tokenizer and the report.")],
    calibration: Annotated[str, typer.Option(help=f"Text to calibrate on: {DATA_HELP}")] = "embedded:corpus",
    split: Annotated[
        str | None, typer.Option(help="Split of the text; default: train, or the whole if it has none.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="prox, prox-fast, prox-quality, prox-paper, sparsegpt, wanda, magnitude, random.")
    ] = "prox-fast",
    refine: Annotated[str, typer.Option(help="Polish the kept weights: cg, gd, nesterov, exact or none.")] = "cg",
    steps: Annotated[int, typer.Option(help="Steps of the refinement.")] = 20,
    sequences: Annotated[int, typer.Option(help="Calibration sequences, at random places of the text.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens a sequence; capped by the model's context.")] = 2048,
    skip: Annotated[
        list[str] | None, typer.Option(help="Leave matching layers dense, for example '*.down_proj'; repeatable.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse layers whose width does not fit.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the calibration draw.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: an accelerator when there is one.")
    ] = None,
) -> None:
    """Prune MODEL and save the sparse one, which loads with transformers anywhere."""
    from rich.console import Console

    from core.errors import InvalidInput
    from core.llm.causal import CausalLM
    from sparsity24.calibration import random_sequences
    from sparsity24.export import save
    from sparsity24.methods import as_method
    from sparsity24.model import prune_model
    from sparsity24.refinement import check_settings

    # Before hours of work, not after.
    as_method(method)
    check_settings(refine, steps, tol=0.0)
    if output.exists():
        raise InvalidInput(f"{output} exists. Choose another folder with --output, or remove it first.")
    lm = CausalLM.load(model, device=device)
    text = _text(calibration, split, "train")
    length = min(window, lm.context_length or window)
    batches = random_sequences(lm.encode(text.text), num_sequences=sequences, window=length, seed=seed)
    report = prune_model(lm.model, batches, method, refine=refine, steps=steps, skip=skip or (), strict=strict)
    save(lm.model, lm.tokenizer, output, report)
    Console().print(
        f"{len(report.layers)} layers pruned by {method} in {report.seconds:.0f} s, mean relative loss "
        f"{report.mean_rel_loss:.4f}; {len(report.skipped)} left dense. Calibrated on {report.num_tokens} tokens, "
        f"{length} a sequence, of {text.provenance}.\nSaved to {output}. "
        f"Next: python -m sparsity24 evaluate folder:{output} --window {length}",
        highlight=False,
    )


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=f"A model, dense or sparse: {MODEL_HELP}")],
    data: Annotated[str, typer.Option(help=f"Text to evaluate on: {DATA_HELP}")] = "embedded:corpus",
    split: Annotated[
        str | None, typer.Option(help="Split of the text; default: test, or the whole if it has none.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window; capped by the model's context.")] = 2048,
    stride: Annotated[
        int | None, typer.Option(help="Slide by so many tokens; default: windows do not overlap.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Use the first windows only.")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...; default: an accelerator when there is one.")
    ] = None,
) -> None:
    """Print the perplexity of MODEL on a text, with the window that it depends on."""
    from rich.console import Console

    from core.llm.causal import CausalLM

    lm = CausalLM.load(model, device=device)
    text = _text(data, split, "test")
    length = min(window, lm.context_length or window)
    found = lm.perplexity(text.text, window=length, stride=stride, max_windows=max_windows)
    how = "non-overlapping" if stride is None else f"stride {stride}"
    Console().print(
        f"Perplexity {found.value:.3f} over {len(found.window_nll)} windows of {length} tokens ({how}) of "
        f"{text.provenance}.\nModel: {lm.provenance}.",
        highlight=False,
    )


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="The folder of a saved model, ours or anyone's.")]) -> None:
    """Say which weights of a saved model are 2:4; exit code 1 when one that should be is not."""
    from rich.console import Console
    from rich.table import Table

    from sparsity24.export import REPORT_NAME, verify

    found = verify(path)
    table = Table("weight", "2:4 groups", box=None, pad_edge=False)
    for name in found.dense:
        table.add_row(name, f"{found.shares[name]:.1%}")
    console = Console()
    console.print(f"{len(found.sparse)} of {len(found.shares)} weights are 2:4 throughout.")
    if found.dense:
        console.print(table)
    raise typer.Exit(1 if found.dense and (path / REPORT_NAME).exists() else 0)


def _text(spec: str, split: str | None, default: str) -> LoadedData:
    from core.data import catalog
    from core.errors import InvalidInput

    if split is not None:
        return catalog.load(spec, split or None)
    try:
        return catalog.load(spec, default)
    except InvalidInput:
        # A set without splits is taken whole; one that has others says which, in this second error.
        return catalog.load(spec)


def main() -> None:
    """Run the command line."""
    from core.cli import run

    run(app, "sparsity24")


if __name__ == "__main__":
    main()
