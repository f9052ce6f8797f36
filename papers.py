"""The table of contents: ten papers, and the `papers` command that reproduces their claims."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from core.report import PaperCard


@dataclass(frozen=True)
class Paper:
    """One of the ten papers and the package that holds its method."""

    package: str
    title: str
    venue: str
    arxiv: str
    summary: str

    @property
    def built(self) -> bool:
        """Whether the package is there; the ten come in batches."""
        spec = importlib.util.find_spec(self.package)
        # Another distribution may own the name (the authors' own code imports as `omg`): ours has presets.
        return spec is not None and spec.origin is not None and Path(spec.origin).with_name("presets.py").exists()

    @property
    def card(self) -> PaperCard:
        """What the page shows of it."""
        from core.report import PaperCard

        return PaperCard(self.package, self.title, self.venue, self.arxiv, self.summary, self.built)


PAPERS = (
    Paper(
        "sdc",
        "Understanding Silent Data Corruption in LLM Training",
        "ACL 2025",
        "2502.12340",
        "A processor can return a wrong number and say nothing. The paper pairs nodes that failed production tests with "
        "healthy ones, runs the same compiled, bit-deterministic program on both, and so isolates what corruption does "
        "to one submodule, to one optimizer step and to a whole training period.",
    ),
    Paper(
        "omg",
        "Open Materials Generation with Stochastic Interpolants",
        "ICML 2025",
        "2502.02582",
        "Generates inorganic crystals, either for a given composition or from nothing. Atom positions on the torus, "
        "lattice and species each follow a stochastic interpolant between noise and data, of which diffusion and flow "
        "matching are special cases, so that the whole design space can be searched.",
    ),
    Paper(
        "sparsity24",
        "A Proximal Operator for Inducing 2:4-Sparsity",
        "TMLR 2025",
        "2501.18015",
        "Accelerators multiply matrices faster when two of every four weights are zero. A regulariser that vanishes "
        "exactly on such weights has a cheap proximal operator, so the mask emerges while the layer's loss is being "
        "minimised and the correlations between its inputs are seen; gradient steps on the kept weights then polish any "
        "mask.",
    ),
    Paper(
        "autog",
        "AutoG: Towards Automatic Graph Construction from Tabular Data",
        "ICLR 2025",
        "2501.15282",
        "Turns plain tables into the graph that a graph neural network should see. A language model proposes schema "
        "actions such as connecting two columns or splitting off an entity, and a validation score decides which of "
        "them stay.",
    ),
    Paper(
        "sched_sampling",
        "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens",
        "TMLR 2025",
        "2410.14655",
        "A model is trained on perfect prefixes and then has to live with its own. Two remedies at a known cost: mix the "
        "model's own tokens into the training contexts, a whole batch at a time, or show it its own answer and let it "
        "learn to correct it towards the reference.",
    ),
    Paper(
        "cic_mtl",
        "Fine-Tuning Language Models on Multiple Datasets for Citation Intention Classification",
        "Findings of EMNLP 2024",
        "2410.13332",
        "Labelled citation contexts are scarce, and each set has its own labels. One encoder is trained on several sets "
        "at once, each weighted by how related its task is to the one that matters, estimated from data and not by a "
        "grid search.",
    ),
    Paper(
        "agentoccam",
        "AgentOccam: A Simple Yet Strong Baseline for LLM-Based Web Agents",
        "ICLR 2025",
        "2410.13825",
        "A web agent with one call to a language model a step and no examples, roles or search: only what it reads of "
        "the page and what it may do there are brought close to what language models know.",
    ),
    Paper(
        "uncurl",
        "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning",
        "ENLSP-IV workshop at NeurIPS 2024",
        "2409.01483",
        "A mixture of experts is served for one task on a device with room for few experts. Experts are grouped by their "
        "router logits on that task and merged, and the paper asks when that beats pre-training with few experts.",
    ),
    Paper(
        "inference_opt",
        "Inference Optimization of Foundation Models on AI Accelerators",
        "KDD 2024",
        "2407.09111",
        "A tutorial on making inference fast, from attention tiles and paged caches to quantisation and speculative "
        "decoding. Here each technique is a short exact implementation with a cost model, and each statement of the "
        "tutorial an experiment.",
    ),
    Paper(
        "citations_fcm",
        "Learning to Generate Answers with Citations via Factual Consistency Models",
        "ACL 2024",
        "2406.13124",
        "Answers with citations that really support them, learned from a handful of labelled examples: the model samples "
        "cited answers, a factual-consistency model keeps the good ones and says which of their tokens matter, and the "
        "loss listens.",
    ),
)
BY_PACKAGE = {paper.package: paper for paper in PAPERS}


class Scale(StrEnum):
    """The three presets."""

    quick = "quick"
    real = "real"
    full = "full"


app = typer.Typer(
    name="papers",
    help="Ten machine-learning papers as packages, and experiments that say which of their claims hold.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
)
Out = Annotated[Path, typer.Option(help="Folder of the results; its index.html is the page.")]
Name = Annotated[str, typer.Argument(help="A package, for example sparsity24.")]


@app.command("list")
def list_papers() -> None:
    """List the ten papers and say which are built."""
    from rich.table import Table

    table = Table("package", "paper", "venue", "state", box=None, pad_edge=False)
    for paper in PAPERS:
        state = "[green]built[/]" if paper.built else "[dim]not built yet[/]"
        table.add_row(f"[bold]{paper.package}[/]", paper.title, paper.venue, state)
    _console().print(table)


@app.command()
def show(
    name: Name,
    out: Out = Path("results"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the verdicts as a table for a README.")] = False,
) -> None:
    """Say what a paper is about, which claims it makes and what came of them here."""
    from rich.table import Table

    from core.records import load_records
    from core.runner import describe

    paper, console = _paper(name), _console()
    if markdown:
        print("| # | claim | kind | verdict | what came out |\n| --- | --- | --- | --- | --- |")
        for row in sorted((r for r in load_records(out) if r.package == name), key=lambda r: r.number):
            evidence = row.evidence or {}
            found = evidence.get("not_run_reason") or evidence.get("headline") or row.status
            verdict = row.verdict or row.status
            print(f"| {row.number} | {row.statement} | {row.kind} | {verdict} | {found} |")
        return
    console.print(f"[bold]{paper.title}[/]\n{paper.venue} · arXiv {paper.arxiv} · `import {paper.package}`\n")
    console.print(paper.summary + "\n")
    if not paper.built:
        console.print("Not built yet.")
        return
    found = {(record.package, record.number): record for record in load_records(out)}
    table = Table("claim", "kind", "statement", "expected", "here", box=None, pad_edge=False)
    for entry in sorted(describe(name), key=lambda entry: entry.number):
        record = found.get((name, entry.number))
        here = (str(record.verdict or record.status) + f" ({record.preset})") if record else "[dim]not yet run[/]"
        table.add_row(f"{name}/{entry.number}", entry.kind, entry.statement, entry.expected["quick"], here)
    console.print(table)
    console.print(f"\nRun them:    papers reproduce {name}\nOne of them: papers reproduce {name}/1")


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(help="Packages or single claims (sparsity24/8); none means all.")
    ] = None,
    preset: Annotated[
        Scale, typer.Option(help="quick: embedded data, offline. real: public data, a laptop. full: the paper's scale.")
    ] = Scale.quick,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the preset; repeatable.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; a verdict needs at least five.")] = None,
    jobs: Annotated[int | None, typer.Option(help="Packages run at once; default: one for every two cores.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster; `local` starts one.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Run claims also when their record is up to date.")] = False,
    out: Out = Path("results"),
) -> None:
    """Run claims and write the page; an interrupted run goes on where it stopped.

    Exit code: 0 when nothing contradicts what is expected, 1 when a claim does or could not be run to its end,
    2 when the request makes no sense.
    """
    from core.errors import InvalidInput
    from core.runner import run_claims, select

    settings = {}
    for assignment in assignments or []:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise InvalidInput(f"--set {assignment}: write it as KEY=VALUE.")
        settings[key] = value
    built = [paper.package for paper in PAPERS if paper.built]
    for name in names or []:
        if (package := name.partition("/")[0]) not in built and not _paper(package).built:
            raise InvalidInput(f"{package} is not built yet. Built: {', '.join(built)}.")
    console = _console()
    selections = select(names or [], built, preset.value, settings, seeds)
    summary = run_claims(
        selections, [paper.card for paper in PAPERS], out=out, jobs=jobs, ray_address=ray, again=again, console=console
    )
    counts: dict[str, int] = {}
    for record in summary.records:
        word = str(record.verdict or record.status)
        counts[word] = counts.get(word, 0) + 1
    console.print("\n" + ", ".join(f"{count} {word}" for word, count in counts.items()))
    for record in summary.contradictions:
        console.print(
            f"[bold red]{record.package}/{record.number} {record.verdict}, expected {record.expected}:[/] {record.statement}"
        )
    for record in summary.failures:
        where = out / "logs" / f"{record.package}.log"
        console.print(f"[bold red]{record.package}/{record.number} {record.status}[/]; what it printed: {where}")
    console.print(f"The page: {summary.page}", soft_wrap=True)
    raise typer.Exit(0 if summary.ok else 1)


@app.command()
def report(out: Out = Path("results")) -> None:
    """Write the page again from the records in the results folder, running nothing."""
    from core.runner import write_report

    _console().print(f"The page: {write_report([paper.card for paper in PAPERS], out, _console())}", soft_wrap=True)


@app.command()
def demo(name: Name) -> None:
    """Show a method at work, within about fifteen seconds."""
    paper = _paper(name)
    if not paper.built:
        from core.errors import InvalidInput

        raise InvalidInput(f"{name} is not built yet. See `papers list`.")
    importlib.import_module(f"{name}.demo").demo(_console())


@app.command()
def doctor() -> None:
    """Say what this machine can run and what is missing."""
    from rich.table import Table

    from core.doctor import findings

    table = Table("", "what", "state", "what to do", box=None, pad_edge=False)
    for finding in findings(PAPERS):
        mark = "[green]✓[/]" if finding.ok else "[yellow]![/]"
        table.add_row(mark, finding.what, finding.state, "" if finding.ok else finding.remedy)
    _console().print(table)


def _paper(name: str) -> Paper:
    if name not in BY_PACKAGE:
        from core.errors import unknown_name

        raise unknown_name("package", name, BY_PACKAGE)
    return BY_PACKAGE[name]


def _console() -> Console:
    from rich.console import Console

    return Console()


def main() -> None:
    """Run the command line."""
    from core.cli import run

    run(app, "papers")


if __name__ == "__main__":
    main()
