"""The command line of the main job: `python -m sparsity24 prune | evaluate | compare | convert | verify`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from sparsity24.methods import Method
    from sparsity24.model import PruneReport

app = typer.Typer(
    name="sparsity24",
    help="Prune a trained language model to 2:4 sparsity, without retraining it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

MODEL_HELP = "`testbed:tiny_llama`, `pretrained:smollm2-135m` (both offline), `hub:OWNER/NAME` or `folder:PATH`."
DATA_HELP = (
    "`embedded:corpus` (offline), `hub:OWNER/NAME:CONFIG`, `folder:PATH` (or a file), or a name such as `wikitext2`."
)
METHOD_HELP = (
    "prox-fast, prox, prox-quality, prox-paper, sparsegpt, alps, admm, dsnot, wanda, magnitude, random; or learned: masks "
    "trained end to end."
)
DEVICE_HELP = "cpu, cuda, ...; default: an accelerator when there is one."

Device = Annotated[str | None, typer.Option(help=DEVICE_HELP)]
Window = Annotated[int, typer.Option(help="Tokens a window; capped by the model's context.")]
Skip = Annotated[
    list[str] | None, typer.Option(help="Leave matching weights dense, such as '*.down_proj'; repeatable.")
]


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help=f"The dense model: {MODEL_HELP}")],
    output: Annotated[Path, typer.Option(help="A new folder for the sparse model, its tokenizer, report and card.")],
    calibration: Annotated[str, typer.Option(help=f"Text to calibrate on: {DATA_HELP}")] = "embedded:corpus",
    split: Annotated[
        str | None, typer.Option(help="Split of the text; default: train, or the whole if it has none.")
    ] = None,
    method: Annotated[str, typer.Option(help=METHOD_HELP)] = "prox-fast",
    pattern: Annotated[str, typer.Option(help="N:M; other than 2:4 for methods that score weights.")] = "2:4",
    refine: Annotated[str, typer.Option(help="Polish the kept weights: cg, gd, nesterov, exact or none.")] = "cg",
    steps: Annotated[int, typer.Option(help="Steps of the refinement.")] = 20,
    target_mix: Annotated[
        float, typer.Option(help="Aim so far from the pruned model's outputs to the dense one's; 0.5 is half-way.")
    ] = 0.0,
    learning_steps: Annotated[int, typer.Option(help="Training steps of `--method learned`.")] = 400,
    sequences: Annotated[int, typer.Option(help="Calibration sequences, at random places of the text.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens a sequence; capped by the model's context.")] = 2048,
    skip: Skip = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse weights whose width does not fit.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the calibration draw.")] = 0,
    format: Annotated[str, typer.Option(help="dense, packed (9/16 of the size) or sparse-24-bitmask.")] = "dense",
    stream: Annotated[
        bool | None,
        typer.Option(help="Keep one block in memory at a time; default: yes for folder: and hub:.", show_default=False),
    ] = None,
    device: Device = None,
) -> None:
    """Prune MODEL and save the sparse one. The same call goes on after an interruption, and torchrun shares the work."""
    from core.errors import InvalidInput
    from sparsity24.export import check_format
    from sparsity24.methods import as_method
    from sparsity24.model import Job
    from sparsity24.pattern import Pattern

    # Before hours of work, not after.
    chosen = as_method("magnitude" if method == "learned" else method, seed=seed, pattern=Pattern.parse(pattern))
    Job(chosen, refine, steps, target_mix=target_mix)
    check_format(format, pattern)
    if output.exists():
        raise InvalidInput(f"{output} exists. Choose another folder with --output, or remove it first.")
    _check_device(device)
    streamed = model.startswith(("folder:", "hub:")) if stream is None else stream
    if streamed and not model.startswith(("folder:", "hub:")):
        raise InvalidInput(f"Only folder: and hub: models are streamed; {model} is loaded as a whole (--no-stream).")
    if streamed and method == "learned":
        raise InvalidInput("Masks are learned on a whole model: add --no-stream.")
    settings: dict[str, Any] = {
        "refine": refine,
        "steps": steps,
        "skip": skip or (),
        "strict": strict,
        "target_mix": target_mix,
    }
    draw = _Draw(calibration, split, sequences, window, seed)
    with _processes() as (first, own_device):
        target = device or own_device
        if streamed:
            report = _from_files(model, output, chosen, draw, settings, target, format, first=first)
        else:
            learning = learning_steps if method == "learned" else 0
            report = _in_memory(model, output, chosen, draw, settings, target, format, learning, first=first)
        if first:
            if all(layer.mask_rel_loss == 0 for layer in report.layers):
                _say(f"All {len(report.layers)} matrices are {report.pattern} already: nothing was changed.")
            else:
                _say(
                    f"{len(report.layers)} matrices pruned by {report.method} in {report.seconds:.0f} s, {len(report.skipped)} "
                    f"left dense; the squared error of their outputs is {report.mean_rel_loss:.2%} of the outputs (mean)."
                )
            _say(
                f"Calibrated on {report.calibration}.\nSaved to {output}. Next: python -m sparsity24 evaluate folder:{output}"
            )


@dataclass(frozen=True)
class _Draw:
    """Which calibration sequences are drawn."""

    data: str
    split: str | None
    sequences: int
    window: int
    seed: int

    def batches(self, tokenizer: Any, context_length: int | None) -> tuple[list[Tensor], str]:
        """The sequences, and in words what they are."""
        import torch

        from core.llm.causal import encode
        from sparsity24.calibration import excerpt, random_sequences
        from sparsity24.evaluation import load_text

        text = load_text(self.data, self.split, default="train").text
        window = min(self.window, context_length or self.window)
        text = excerpt(text, num_tokens=self.sequences * window, seed=self.seed)
        if window < self.window:
            _say(f"Windows of {self.window} tokens are cut to the model's context of {window}.")
        drawn = random_sequences(encode(tokenizer, text), num_sequences=self.sequences, window=window, seed=self.seed)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if len(drawn) < processes:
            # Smaller batches, so that every process has one.
            drawn = list(torch.split(torch.cat(drawn), max(1, self.sequences // processes)))
        part = f" ({self.split})" if self.split else ""
        return drawn, f"{self.sequences} sequences of {window} tokens of {self.data}{part}, seed {self.seed}"


def _check_device(device: str | None) -> None:
    import torch

    from core.errors import InvalidInput

    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidInput(f"There is no CUDA device here; leave --device {device} out.")


def _going_on(output: Path) -> Path:
    """Where a run into `output` keeps what it has; says so when there is something already."""
    from sparsity24.resume import unfinished

    if (found := unfinished(output)).exists():
        _say(f"Going on with the unfinished run in {found}.")
    return found


def _from_files(
    model: str,
    output: Path,
    method: Method,
    draw: _Draw,
    settings: dict[str, Any],
    device: str | None,
    format: str,
    *,
    first: bool,
) -> PruneReport:
    """Prune one block at a time, from the model's files to those of `output`."""
    import shutil

    from transformers import AutoConfig, AutoTokenizer

    from core.errors import InvalidInput
    from core.llm.causal import best_device
    from sparsity24.export import convert
    from sparsity24.model import PruneReport
    from sparsity24.places import REPORT_NAME
    from sparsity24.streaming import local_folder, prune_checkpoint

    folder = local_folder(model)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{folder} has no tokenizer that loads. Save it beside the model with tokenizer.save_pretrained({str(folder)!r})."
        ) from error
    batches, said = draw.batches(tokenizer, getattr(config, "max_position_embeddings", None))
    dense = output if format == "dense" else output.with_name(f".{output.name}.dense")
    if dense.exists():
        # What an interruption just before the conversion left.
        report = PruneReport.from_dict(json.loads((dense / REPORT_NAME).read_text()))
    else:
        _going_on(dense)
        where = device or best_device()
        report = prune_checkpoint(folder, dense, batches, method, device=where, calibration=said, **settings)
    if first and dense != output:
        convert(dense, output, format)
        shutil.rmtree(dense)
    return report


def _in_memory(
    model: str,
    output: Path,
    method: Method,
    draw: _Draw,
    settings: dict[str, Any],
    device: str | None,
    format: str,
    learning_steps: int,
    *,
    first: bool,
) -> PruneReport:
    """Prune a model that is loaded as a whole; with `learning_steps`, to masks learned end to end."""
    import shutil

    from core.llm.causal import CausalLM
    from sparsity24.export import save
    from sparsity24.model import prune_model

    lm = CausalLM.load(model, device=device)
    batches, said = draw.batches(lm.tokenizer, lm.context_length)
    unfinished = _going_on(output)
    if learning_steps:
        from sparsity24.mask_learning import learn_masks

        method = learn_masks(
            lm.model,
            batches,
            num_steps=learning_steps,
            skip=settings["skip"],
            seed=draw.seed,
            checkpoint_dir=unfinished / "learning",
            checkpoint_every=50,
        )
    report = prune_model(lm.model, batches, method, resume_dir=unfinished / "blocks", **settings)
    report = replace(report, calibration=said)
    if first:
        save(lm.model, lm.tokenizer, output, report, format=format)
        shutil.rmtree(unfinished)
    return report


@contextmanager
def _processes() -> Iterator[tuple[bool, str | None]]:
    """Join the others under torchrun: whether this process is the first, and its own GPU where there are some."""
    if "RANK" not in os.environ:
        yield True, None
        return
    import torch
    from torch import distributed as dist

    cuda = torch.cuda.is_available()
    # Counts and barriers are on the CPU, whatever the rows are on.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    own = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else None
    if own is not None:
        torch.cuda.set_device(own)
    try:
        yield dist.get_rank() == 0, own
    finally:
        dist.destroy_process_group()


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help=f"A model, dense or sparse: {MODEL_HELP}")],
    data: Annotated[
        str, typer.Option(help=f"Text to evaluate on: {DATA_HELP} wikitext2 and c4 follow the literature's protocol.")
    ] = "embedded:corpus",
    split: Annotated[
        str | None, typer.Option(help="Split of the text; default: test, or the whole if it has none.")
    ] = None,
    window: Window = 2048,
    stride: Annotated[
        int | None, typer.Option(help="Slide by so many tokens; default: windows do not overlap.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Use the first windows only.")] = None,
    zero_shot: Annotated[
        bool, typer.Option("--zero-shot", help="The zero-shot tasks through lm-eval instead (extra `eval`).")
    ] = False,
    cloze: Annotated[
        int, typer.Option(help="Also so many items of the offline zero-shot proxy: which of four endings belongs?")
    ] = 0,
    limit: Annotated[int | None, typer.Option(help="With --zero-shot: the first items of each task only.")] = None,
    device: Device = None,
) -> None:
    """Print the perplexity of MODEL on a text, with the window that it depends on, or its zero-shot accuracy."""
    from sparsity24 import evaluation
    from sparsity24.export import load_model

    _check_device(device)
    lm = load_model(model, device=device)
    if zero_shot:
        scores = evaluation.zero_shot(lm, limit=limit)
        _say(scores.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    else:
        length = min(window, lm.context_length or window)
        text = evaluation.tokenized(lm, data, split)
        _say(f"{text.perplexity(lm, window=length, stride=stride, max_windows=max_windows)}.")
        if cloze:
            import torch

            found = evaluation.cloze(lm, torch.tensor(text.ids), cloze)
            _say(
                f"Cloze accuracy {found.correct.mean():.1%} (chance 25 %), log-likelihood of the true choice "
                f"{found.log_likelihood.mean():.3f}, over {len(found.correct)} items."
            )
    _say(f"Model: {lm.provenance}.")


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help=f"The dense model: {MODEL_HELP}")],
    output: Annotated[Path, typer.Option(help="A folder for the runs, tables and page; the same call goes on in it.")],
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="A method and its refinement, such as wanda+gd:100 or prox-fast+cg; wanda alone is not refined. Repeatable; "
            "default: all methods, the strong ones refined too."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Calibration draws of every recipe.")] = 3,
    calibration: Annotated[str, typer.Option(help=f"Text to calibrate on: {DATA_HELP}")] = "embedded:corpus",
    split: Annotated[str | None, typer.Option(help="Split of it; default: train, or the whole if it has none.")] = None,
    sequences: Annotated[int, typer.Option(help="Calibration sequences a draw.")] = 128,
    calibration_window: Annotated[int, typer.Option(help="Tokens a sequence; capped by the model's context.")] = 2048,
    text: Annotated[list[str] | None, typer.Option(help="A text to evaluate on; repeatable.")] = None,
    window: Window = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Use the first windows of each text only.")] = None,
    cloze_items: Annotated[int, typer.Option(help="Items of the offline zero-shot proxy; 0 for none.")] = 0,
    skip: Skip = None,
    device: Device = None,
) -> None:
    """Prune MODEL by all methods on the same draws; print and plot perplexity, loss per layer and time."""
    from sparsity24 import comparison
    from sparsity24.comparison_page import shown_table
    from sparsity24.export import load_model

    _check_device(device)
    lm = load_model(model, device=device)
    found = comparison.compare(
        lambda: lm,
        output,
        recipes=recipe or comparison.DEFAULT_RECIPES,
        draws=range(draws),
        calibration=calibration,
        calibration_split=split,
        num_sequences=sequences,
        calibration_window=min(calibration_window, lm.context_length or calibration_window),
        texts=text or ("embedded:corpus",),
        window=min(window, lm.context_length or window),
        max_windows=max_windows,
        cloze_items=cloze_items,
        skip=skip or (),
    )
    page = found.write(output)
    shown = shown_table(found).map(
        lambda cell: "–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else cell
    )
    _say(shown.to_string(index=False))
    known = {path.stem.rpartition("-")[0] for path in (output / "runs").glob("*.json")}
    if others := sorted(known - {run.recipe for run in found.runs}):
        _say(
            f"Not shown, for want of being asked for: {', '.join(others)}. Name them with --recipe to have them beside these."
        )
    _say(f"The page with plots and the table of layers: {page}")


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="The folder of a saved model.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    format: Annotated[str, typer.Option(help="dense, packed or sparse-24-bitmask.")] = "dense",
) -> None:
    """Write a saved model in another format: packed takes 9/16 of the size, dense loads everywhere."""
    from sparsity24.export import convert

    before = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    convert(folder, output, format)
    after = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    _say(
        f"Saved to {output}: {before / 2**20:.2f} -> {after / 2**20:.2f} MiB ({after / before:.0%}; what was not pruned stays "
        "as it is)."
    )


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="The folder of a saved model, ours or anyone's, in any of our formats.")],
    pattern: Annotated[str | None, typer.Option(help="N:M; default: what its report says, else 2:4.")] = None,
) -> None:
    """Say which weights of a saved model follow the pattern; exit code 1 when one that should does not."""
    from rich.console import Console
    from rich.table import Table

    from sparsity24.places import REPORT_NAME
    from sparsity24.verification import verify

    found = verify(path, pattern)
    console = Console()
    console.print(f"{len(found.sparse)} of {len(found.shares)} weights are {found.pattern} throughout.")
    if found.dense:
        table = Table("weight", f"{found.pattern} groups", box=None, pad_edge=False)
        for name in found.dense:
            table.add_row(name, f"{found.shares[name]:.1%}")
        console.print(table)
    if found.changed:
        console.print(f"Other masks than the report's: {', '.join(found.changed)}.")
    wanted = pattern is not None or (path / REPORT_NAME).exists()
    if not found.sparse and not wanted:
        console.print(f"{path} is not {found.pattern}: no matrix follows it, and no report says which should.")
    raise typer.Exit(1 if not found.sparse or ((found.dense or found.changed) and wanted) else 0)


def _say(text: str) -> None:
    from rich.console import Console

    Console().print(text, highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Run the command line."""
    from core.cli import run

    run(app, "sparsity24")


if __name__ == "__main__":
    main()
