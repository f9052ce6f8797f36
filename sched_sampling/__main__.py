"""The command line of the main jobs: `python -m sched_sampling mix | train | correct | evaluate | bias`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from core.llm.causal import CausalLM
    from core.llm.finetuning import Finetuning
    from sched_sampling.rounds import Method
    from sched_sampling.tasks import Task

app = typer.Typer(
    name="sched_sampling",
    help="Fine-tune a language model on contexts with its own tokens (BASH), or to correct its own answers (RAC).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)

MODEL_HELP = (
    "`world:sums:1` (a small Llama pretrained on texts of that task, offline), `pretrained:smollm2-135m` (offline), "
    "`testbed:tiny_llama`, `hub:OWNER/NAME` or `folder:PATH`."
)
DATA_HELP = (
    "A task (`world:sums:1`, `world:questions:1`, `world:dialogues:1` offline; `gsm8k`, `dialogsum`, `squad`, ...), or "
    "`folder:FILE` with columns prompt and completion."
)

Model = Annotated[str, typer.Argument(help=f"The model: {MODEL_HELP}")]
Data = Annotated[str, typer.Argument(help=f"The demonstrations: {DATA_HELP}")]
Rows = Annotated[int | None, typer.Option(help="How many of them; default: all (1000 of a world task).")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: an accelerator when there is one.")]


@app.command()
def mix(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="A folder for the data set: Arrow files and what they were made with.")],
    method: Annotated[str, typer.Option(help="bash: mixed contexts; rac: answers to correct.")] = "bash",
    beta: Annotated[float, typer.Option(help="bash: how probable the model's own token is at a position.")] = 0.2,
    proposal: Annotated[str, typer.Option(help="bash: mixed, gold, rollout or random (the control).")] = "mixed",
    temperature: Annotated[float, typer.Option(help="Of the model's own tokens; 0 takes the most probable.")] = 1.0,
    engine: Annotated[str, typer.Option(help="auto, parallel or sequential; all give the same tokens.")] = "auto",
    server: Annotated[
        str | None,
        typer.Option(help="Who answers freely instead of MODEL (rac, rollout): openai:NAME@http://HOST:PORT/v1."),
    ] = None,
    rows: Rows = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Make the data set of one round. The same call goes on after an interruption, and torchrun shares the work."""
    from core.errors import InvalidInput
    from sched_sampling.bash import bash_dataset, mixing_shares
    from sched_sampling.drafting import Drafting, draft_with_chat
    from sched_sampling.mixing import Mixing
    from sched_sampling.rac import rac_dataset

    if method not in ("bash", "rac"):
        raise InvalidInput(f"--method is bash or rac; got {method}. Other methods make their data while they train.")
    if server is not None and method == "bash" and proposal != "rollout":
        raise InvalidInput(
            f"A server answers freely; --proposal {proposal} needs the model's own next-token probabilities."
        )
    mixing = Mixing(proposal=proposal, temperature=temperature, engine=engine)
    pairs = _pairs(data, rows, seed)
    lm = _load(model, device)
    chat = None if server is None else _cached_chat(server, output)
    if method == "rac":
        built = rac_dataset(
            lm.model,
            lm.tokenizer,
            pairs,
            template=_template(lm, pairs[0]["prompt"]),
            chat=chat,
            temperature=temperature,
            seed=seed,
            output_dir=output,
        )
        kinds = built["kind"]
        _say(f"{len(built)} rows, {sum(kind == 'correction' for kind in kinds)} of them corrections, in {output}.")
    else:
        rollouts = None
        if chat is not None:
            prompts = [pair["prompt"] for pair in pairs]
            drafts = draft_with_chat(
                chat,
                lm.tokenizer,
                prompts,
                Drafting(temperature=temperature),
                max_new_tokens=_longest(lm, pairs),
                seed=seed,
            )
            rollouts = [draft.token_ids for draft in drafts]
        built = bash_dataset(
            lm.model,
            lm.tokenizer,
            pairs,
            beta,
            seed=seed,
            rollouts=rollouts,
            output_dir=output,
            **{name: value for name, value in vars(mixing).items() if name != "protected_ids"},
        )
        shares = mixing_shares(built)
        _say(
            f"{len(built)} rows in {output}: {shares['replaced']:.1%} of the answer tokens in the contexts are the model's "
            f"own, {shares['changed']:.1%} differ from the data's."
        )
    _say(f"Next: python -m sched_sampling train {model} folder:{output} --output tuned")


# What a data set that `mix` wrote has decided already.
_DECIDED = ("method", "rounds", "beta", "temperature", "proposal", "direct_share", "folds", "rows")


@app.command()
def train(
    model: Model,
    data: Annotated[str, typer.Argument(help=f"{DATA_HELP} Or `folder:DIR` that `mix` wrote, with this model.")],
    output: Annotated[Path, typer.Option(help="A folder for the trained model, its tokenizer and report.json.")],
    method: Annotated[
        str, typer.Option(help="bash, rac; sft, random, online, two-pass, neftune, spin (baselines).")
    ] = "bash",
    rounds: Annotated[int, typer.Option(help="Rounds of building data and training on it.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Updates a round; default: one pass over the rows.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows an update.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of each round.")] = 2e-5,
    beta: Annotated[float, typer.Option(help="Mixing probability of the last round; the first has 0.")] = 0.3,
    temperature: Annotated[float, typer.Option(help="Of the model's own tokens.")] = 1.0,
    proposal: Annotated[str, typer.Option(help="bash: mixed, gold or rollout.")] = "mixed",
    direct_share: Annotated[float, typer.Option(help="rac: share of the rows that are not corrections.")] = 0.5,
    folds: Annotated[int, typer.Option(help="rac: draft with models that have not seen the answer, one a fold.")] = 1,
    lora: Annotated[
        int | None, typer.Option(help="Train LoRA adapters of this rank, and merge them at the end.")
    ] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Several rows a line: faster where lengths differ.")
    ] = False,
    rows: Rows = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train MODEL on DATA in rounds. The same call goes on after an interruption; start it with torchrun for more GPUs."""
    from core.errors import InvalidInput
    from core.llm.finetuning import Finetuning, add_lora, finetune
    from sched_sampling.processes import processes
    from sched_sampling.provenance import model_digest, tokenizer_digest
    from sched_sampling.storage import is_built, load_mixed

    if (output / "config.json").exists():
        raise InvalidInput(f"{output} holds a trained model. Choose another folder with --output, or remove it.")
    training = Finetuning(
        num_steps=steps, batch_size=batch_size, learning_rate=learning_rate, packing=packing, warmup_steps=0
    )
    folder = Path(data.removeprefix("folder:")).expanduser()
    made = is_built(folder)
    if made:
        given = {**locals()}
        for name in _DECIDED:
            if given[name] != inspect.signature(train).parameters[name].default:
                raise InvalidInput(
                    f"{data} is a data set that is trained on as it is; leave out --{name.replace('_', '-')}."
                )
    pairs = [] if made else _pairs(data, rows, seed)
    options: dict[str, Any] = {
        "beta": beta,
        "temperature": temperature,
        "proposal": proposal,
        "direct_share": direct_share,
        "folds": folds,
    }
    chosen = None if made else make_method(method, rounds, training, **options)
    lm = _load(model, device)
    if method == "rac" and chosen is not None:
        chosen = replace(chosen, template=_template(lm, pairs[0]["prompt"]))  # type: ignore[call-arg]
    expected = {"model": model_digest(lm.model), "tokenizer": tokenizer_digest(lm.tokenizer)} if made else {}
    tuned = lm.model if lora is None else add_lora(lm.model, rank=lora, seed=seed)
    reports: list[Mapping[str, Any]] = []
    if chosen is None:
        built = load_mixed(folder, expected)
        history = finetune(
            tuned, built, training, seed=seed, checkpoint_dir=output / "checkpoint", checkpoint_every=100, device=device
        )
        reports = [{"round": 0, "loss": history.train[-1]["loss"]}]
    else:
        found = chosen.fit(tuned, lm.tokenizer, pairs, seed=seed, output_dir=output / "rounds")
        reports = [
            {
                "round": report.round,
                **{
                    name: value
                    for name, value in report.built.items()
                    if not name.endswith(("_rows", "unended_drafts"))
                },
                "loss": report.history.train[-1]["loss"],
                "build_seconds": report.build_seconds,
                "train_seconds": report.train_seconds,
            }
            for report in found
        ]
    if processes().rank == 0:
        whole = tuned if lora is None else tuned.merge_and_unload()
        _save(
            whole,
            lm,
            output,
            {"model": model, "data": data, "method": None if made else method, "seed": seed, "rounds": reports},
        )
        _table("The data set as it is" if made else f"{method} on {data}", reports)
        _say(f"Saved to {output}. Next: python -m sched_sampling evaluate folder:{output} {'TASK' if made else data}")


@app.command()
def correct(
    model: Model,
    data: Data,
    output: Annotated[Path, typer.Option(help="A .jsonl file: a prompt a line, with the answer of every round.")],
    corrections: Annotated[int, typer.Option(help="How often an answer is corrected; 0 is the plain model.")] = 1,
    split: Annotated[str, typer.Option(help="Of the task: test, valid or train.")] = "test",
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; default: the task's.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 0.0,
    rows: Rows = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Answer prompts and let the model correct its answers, as one that was trained with `--method rac` has learned to."""
    from core.files import write_atomic
    from sched_sampling.correction import correct as run

    task = _task(data, rows, seed)
    items = task.items(split)[:rows]
    lm = _load(model, device)
    found = run(
        lm.model,
        lm.tokenizer,
        [item.prompt for item in items],
        corrections,
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        template=_template(lm, items[0].prompt),
        temperature=temperature,
        seed=seed,
    )
    texts = [found.texts(number) for number in range(corrections + 1)]
    lines = [
        json.dumps({"prompt": item.prompt, "answers": list(answers), "references": list(item.references)})
        for item, answers in zip(items, zip(*texts, strict=True), strict=True)
    ]
    write_atomic(output, "".join(f"{line}\n" for line in lines))
    changed = [sum(a != b for a, b in zip(texts[k], texts[k + 1], strict=True)) for k in range(corrections)]
    _say(
        f"{len(items)} answers in {output}"
        + (f"; changed by correcting: {', '.join(map(str, changed))}." if changed else ".")
    )


@app.command()
def evaluate(
    model: Model,
    data: Data,
    corrections: Annotated[int, typer.Option(help="Score the answers after each of so many corrections too.")] = 0,
    split: Annotated[str, typer.Option(help="Of the task: test, valid or train.")] = "test",
    max_new_tokens: Annotated[int | None, typer.Option(help="Of an answer; default: the task's.")] = None,
    rows: Annotated[int | None, typer.Option(help="How many items; default: all (200 of a world task).")] = None,
    output: Annotated[Path | None, typer.Option(help="A .json file for the scores.")] = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Score greedy and sampled answers, with 95 % intervals over the items, and what correcting fixed and broke."""
    import numpy as np

    from core.files import write_atomic
    from sched_sampling.correction import correct as run
    from sched_sampling.correction import correction_report

    task = _task(data, rows, seed)
    items = task.items(split)[:rows]
    lm = _load(model, device)
    table, scores = [], {}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        found = run(
            lm.model,
            lm.tokenizer,
            [item.prompt for item in items],
            corrections,
            max_new_tokens=max_new_tokens or task.max_new_tokens,
            template=_template(lm, items[0].prompt),
            temperature=temperature,
            seed=seed,
        )
        for number in range(corrections + 1):
            scores[name, number] = task.score(found.texts(number), items)
            row: dict[str, Any] = {"answers": name, "corrections": number}
            for metric, values in scores[name, number].items():
                half = 1.96 * float(np.std(values)) / max(1, len(values)) ** 0.5
                row[metric] = f"{float(np.mean(values)):.3f} ± {half:.3f}"
            if number and set(np.unique(scores[name, number][task.headline])) <= {0.0, 1.0}:
                report = correction_report(*(scores[name, k][task.headline] for k in (number - 1, number)))
                row |= {"fixed": f"{report.fixed_share:.1%}", "broken": f"{report.broken_share:.1%}"}
            table.append(row)
    _table(f"{model} on {data} ({split}, {len(items)} items)", table)
    if output is not None:
        means = [
            {"answers": name, "corrections": number, **{metric: float(v.mean()) for metric, v in by_item.items()}}
            for (name, number), by_item in scores.items()
        ]
        write_atomic(
            output,
            json.dumps({"model": model, "data": data, "provenance": task.provenance, "scores": means}, indent=1),
        )


@app.command()
def bias(
    models: Annotated[list[str], typer.Argument(help=f"One model or several to compare: {MODEL_HELP}")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    output: Annotated[Path, typer.Option(help="A folder for curves.svg and bias.json.")],
    split: Annotated[str, typer.Option(help="Of the task: test, valid or train.")] = "test",
    rows: Annotated[int, typer.Option(help="How many answers.")] = 64,
    positions: Annotated[int, typer.Option(help="Places of each answer at which a wrong token is forced.")] = 4,
    temperature: Annotated[float, typer.Option(help="Of the model's own prefixes.")] = 1.0,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Show what a model makes of its own prefixes: exposure gap, recovery from a wrong token, accuracy under noise, curves.

    The gold answer is taken for right at its position whatever stands before it, so on open text a gap is an upper bound.
    """
    from core.errors import InvalidInput
    from core.files import write_atomic
    from core.llm.examples import encode_pairs
    from sched_sampling.evaluation import exposure_gap, noisy_accuracy, position_curves, recovery_rate
    from sched_sampling.pictures import bias_curves, save

    task = _task(data, rows, seed)
    table: list[dict[str, Any]] = []
    curves = {}
    for spec in models:
        lm = _load(spec, device)
        pairs = encode_pairs(lm.tokenizer, task.pairs(split)[:rows], max_length=lm.context_length)
        long = [pair for pair in pairs if len(pair.target_ids) >= 4]
        if not long:
            raise InvalidInput(f"Every answer of {data} has fewer than four tokens: nothing to recover in.")
        gap = exposure_gap(lm.model, pairs, temperature=temperature, tokenizer=lm.tokenizer, seed=seed)
        curves[spec] = position_curves(lm.model, pairs, temperature=temperature, tokenizer=lm.tokenizer, seed=seed)
        table.append(
            {
                "model": spec,
                "exposure gap (nats a token)": gap.value,
                "recovery rate": recovery_rate(
                    lm.model, long, positions=positions, tokenizer=lm.tokenizer, seed=seed
                ).value,
                "noisy-decoding accuracy": noisy_accuracy(
                    lm.model, pairs, draws=2, tokenizer=lm.tokenizer, seed=seed
                ).value,
            }
        )
    save(bias_curves(curves), output / "curves.svg")
    found = {name: {field: values.tolist() for field, values in vars(curve).items()} for name, curve in curves.items()}
    write_atomic(output / "bias.json", json.dumps({"data": data, "split": split, "models": table, "curves": found}))
    _table(f"{data} ({split}, {len(pairs)} answers)", table)
    _say(f"Curves by position in {output / 'curves.svg'}, numbers in {output / 'bias.json'}.")


def make_method(
    name: str,
    rounds: int,
    training: Finetuning,
    *,
    beta: float = 0.3,
    temperature: float = 1.0,
    proposal: str = "mixed",
    direct_share: float = 0.5,
    folds: int = 1,
) -> Method:
    """The method of this name; beta grows from 0 in equal steps. SPIN is trained with RMSprop, as published."""
    import torch

    from core.errors import unknown_name
    from sched_sampling import baselines as b
    from sched_sampling.bash import BatchScheduledSampling
    from sched_sampling.drafting import Drafting
    from sched_sampling.mixing import Mixing
    from sched_sampling.rac import ReferenceAnswerCorrection
    from sched_sampling.schedule import linear

    common: dict[str, Any] = {"rounds": rounds, "training": training}
    grows, drafting = linear(0, beta), Drafting(temperature=temperature)
    mixing = Mixing(proposal=proposal, temperature=temperature)
    makers: Mapping[str, Any] = {
        "bash": lambda: BatchScheduledSampling(schedule=grows, mixing=mixing, **common),
        "rac": lambda: ReferenceAnswerCorrection(drafting=drafting, direct_share=direct_share, folds=folds, **common),
        "sft": lambda: b.SupervisedFineTuning(**common),
        "random": lambda: b.RandomTokenReplacement(schedule=grows, **common),
        "online": lambda: b.OnlineScheduledSampling(schedule=grows, mixing=mixing, **common),
        "two-pass": lambda: b.TwoPassScheduledSampling(schedule=grows, **common),
        "neftune": lambda: b.NEFTune(**common),
        "spin": lambda: b.SPIN(
            drafting=drafting, rounds=rounds, training=replace(training, optimizer=torch.optim.RMSprop)
        ),
    }
    if name not in makers:
        raise unknown_name("method", name, makers)
    method: Method = makers[name]()
    return method


def _load(model: str, device: str | None) -> CausalLM:
    from core.llm.causal import CausalLM

    if not model.startswith("world:"):
        return CausalLM.load(model, device)
    from sched_sampling.world_models import world_llama

    lm = world_llama(model)
    lm.model.to(device or "cpu")
    return lm


def _template(lm: CausalLM, prompt: Any) -> Any:
    """How this model's answers are corrected: the small Llamas have a token for it, others get a text or a turn."""
    from sched_sampling.world_models import correction_template

    return correction_template(lm.tokenizer, prompt) if isinstance(prompt, str) else None


def _pairs(data: str, rows: int | None, seed: int) -> list[dict[str, Any]]:
    return _task(data, rows, seed).pairs("train")[:rows]


def _task(data: str, rows: int | None, seed: int) -> Task:
    from sched_sampling.tasks import load_task

    if data.startswith("world:"):
        return load_task(data, num_train=rows, num_valid=rows, num_test=rows, seed=seed)
    return load_task(data, seed=seed)


def _longest(lm: CausalLM, pairs: Sequence[Mapping[str, Any]]) -> int:
    from core.llm.examples import encode_pairs

    return max(len(pair.target_ids) for pair in encode_pairs(lm.tokenizer, pairs, max_length=lm.context_length))


def _cached_chat(server: str, output: Path) -> Any:
    from core.llm.chat import load_chat

    # Beside the folder, which may hold nothing but the data set: what was answered is never asked for again.
    return load_chat(server, cache=output.with_name(f"{output.name}.replies.jsonl"))


def _save(model: Any, lm: CausalLM, output: Path, report: Mapping[str, Any]) -> None:
    import shutil

    from core.files import write_atomic
    from core.llm.causal import without_bars

    partial = output.with_name(f".{output.name}.partial")
    with without_bars():
        model.save_pretrained(partial)
    lm.tokenizer.save_pretrained(partial)
    write_atomic(partial / "report.json", json.dumps(report, indent=1))
    output.mkdir(parents=True, exist_ok=True)
    # config.json last: its presence says that the model is whole.
    for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(output / file.name)
    partial.rmdir()
    for leftover in ("rounds", "checkpoint"):
        shutil.rmtree(output / leftover, ignore_errors=True)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = list(dict.fromkeys(name for row in rows for name in row))
    _say(f"\n{title}")
    table = Table(*(name.replace("_", " ") for name in columns), box=None, padding=(0, 1))
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _say(text: str) -> None:
    from rich.console import Console

    Console(highlight=False).print(text, markup=False, soft_wrap=True)


if __name__ == "__main__":
    from core.cli import run

    run(app, "sched_sampling")
