"""The three families of tasks: summarisation, question answering and mathematics, embedded or from public data sets.

    task = load_task("world:questions:1", num_train=1000, num_test=200, seed=3)
    task.pairs("train")                        # dictionaries with `prompt` and `completion`
    task.score(answers, task.test)[task.headline].mean()

| name | family | score | train / valid / test |
| --- | --- | --- | --- |
| world:dialogues:LEVEL | summarisation | ROUGE-1, -2, -L against the first summary | drawn, entities held out |
| world:questions:LEVEL | question answering | exact match, F1 | drawn, entities held out |
| world:sums:LEVEL | mathematics | numeric match | drawn, entities and calculations held out |
| dialogsum | summarisation | ROUGE, mean over the references | the Hub's; of the folder, four fifths of dev / the rest / test |
| tldr | summarisation | ROUGE | the Hub's |
| squad | question answering | exact match, F1, best of the references | 95 % of train / the rest / the Hub's validation |
| ultrachat | question answering | F1 and ROUGE-L against the reference | 95 % of train_sft / the rest / test_sft |
| gsm8k | mathematics | numeric match | 95 % of train / the rest / test |
| math | mathematics | math-verify | 95 % of train / the rest / test |
| folder:PATH, hub:OWNER/NAME | your own | F1 and ROUGE-L against the completion | 80 % / 10 % / 10 %, by prompt |
| metamath | mathematics | math-verify | 90 % / 5 % / 5 %, by original question |

Splits that are made here go by a hash of what is asked, so that they depend neither on order nor on numbers of rows.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.data import catalog
from core.data.world import World
from core.errors import DataUnavailable, InvalidInput, require, unknown_name
from core.metrics.text import exact_match, numeric_match, rouge, token_f1
from sched_sampling import task_rows
from sched_sampling.task_rows import Item

SUMMARISATION, QUESTION_ANSWERING, MATHEMATICS = "summarisation", "question answering", "mathematics"
# Pairs of the user's, of which nothing else is known.
OWN = "own"
SPLITS = ("train", "valid", "test")

Scores = dict[str, NDArray[np.float64]]
References = Sequence[Sequence[str]]

# With the world's usual 400 people a small model learns the names of the train split by heart and copies none that is new:
# after 950 steps of 16 dialogues it has a loss of 0.002 and no exact match on valid, with 2000 people 0.54.
WORLD_PEOPLE = 2000
# Rows of the world that are drawn when no number is given.
WORLD_SIZES = {"train": 1000, "valid": 200, "test": 200}

SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


@dataclass(frozen=True)
class Task:
    """Items by split, and how answers to them are scored.

    `headline` names the score that stands for the task; `max_new_tokens` is enough for almost every reference, in tokens
    of a usual tokenizer; `provenance` has a line for every source.
    """

    name: str
    family: str
    train: tuple[Item, ...]
    valid: tuple[Item, ...]
    test: tuple[Item, ...]
    headline: str
    max_new_tokens: int
    provenance: tuple[str, ...]
    metric: Callable[[Sequence[str], References], Scores] = field(repr=False)

    def items(self, split: str) -> tuple[Item, ...]:
        """The items of `train`, `valid` or `test`."""
        if split not in SPLITS:
            raise unknown_name(f"split of {self.name}", split, SPLITS)
        found: tuple[Item, ...] = getattr(self, split)
        return found

    def pairs(self, split: str = "train") -> list[dict[str, Any]]:
        """Demonstrations for training, which hold nothing of what predictions are scored by."""
        return [item.pair for item in self.items(split)]

    def score(self, predictions: Sequence[str], items: Sequence[Item]) -> Scores:
        """Every score of the family, one number from 0 to 1 an item."""
        return self.metric(predictions, [item.references for item in items])


def load_task(
    name: str,
    *,
    num_train: int | None = None,
    num_valid: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
    calculator_marks: bool = True,
) -> Task:
    """The task `name` (see the module's head), with as many items as asked for.

    For the world `seed` is that of the draw, and None means 1000, 200 and 200 items, without calculator marks. For data
    sets `seed` decides which items are taken and in which order, and None means all. `calculator_marks` False leaves the
    `<<...>>` out of GSM8K's solutions. Raises `InvalidInput` on an unknown name and on more items than there are.
    """
    sizes = {"train": num_train, "valid": num_valid, "test": num_test}
    for split, size in sizes.items():
        if size is not None and size < 1:
            raise InvalidInput(f"num_{split} counts items and is at least 1; got {size}.")
    home, _, rest = name.partition(":")
    if home == "world":
        return _world_task(name, rest, {split: sizes[split] or WORLD_SIZES[split] for split in SPLITS}, seed)
    if home in ("folder", "hub"):
        found, provenance = _own_splits(name)
        chosen = {split: _some(found[split], sizes[split], seed, f"{name} [{split}]") for split in SPLITS}
        # A token is a character at least, so that this is room for every completion and no more than a usual answer.
        longest = min(256, max(len(item.references[0]) for items in found.values() for item in items) + 2)
        return Task(
            name, OWN, **chosen, headline="F1", max_new_tokens=longest, provenance=provenance, metric=chat_scores
        )
    if name not in SOURCES and Path(name).expanduser().exists():
        raise InvalidInput(f"Pairs in a file or folder are written folder:{name}.")
    if name not in SOURCES:
        raise unknown_name("task", name, [*SOURCES, *(f"world:{kind}:1" for kind in _WORLD_TASKS)])
    source = SOURCES[name]
    found, provenance = source.read(calculator_marks)
    train, valid, test = (_some(found[split], sizes[split], seed, f"{name} [{split}]") for split in SPLITS)
    return Task(
        name,
        source.family,
        train,
        valid,
        test,
        headline=source.headline,
        max_new_tokens=source.max_new_tokens,
        provenance=provenance,
        metric=source.metric,
    )


def _own_splits(spec: str) -> tuple[dict[str, list[Item]], tuple[str, ...]]:
    """Rows with `prompt` and `completion` from a file, a folder without splits, or the train split of one with them."""
    data = catalog.load(spec, "train" if spec.startswith("hub:") or _has_splits(spec) else None)
    items = task_rows.demonstrations(data.dataset)
    if not items:
        raise InvalidInput(f"{spec} has no rows.")
    shares = {"train": 0.8, "valid": 0.1, "test": 0.1}
    return shared_out(items, shares), (data.provenance, "here 80% are train, 10% valid and 10% test")


def _has_splits(spec: str) -> bool:
    folder = Path(spec.removeprefix("folder:")).expanduser()
    return folder.is_dir() and any(folder.glob("train*"))


def _some(items: Sequence[Item], number: int | None, seed: int, what: str) -> tuple[Item, ...]:
    if number is None:
        return tuple(items)
    if number > len(items):
        raise InvalidInput(f"{what} has {len(items)} items; {number} were asked for.")
    order = np.random.default_rng(seed).permutation(len(items))[:number]
    return tuple(items[i] for i in order)


def rouge_scores(predictions: Sequence[str], references: References) -> Scores:
    """ROUGE-1, -2 and -L, the mean over an item's references."""
    return rouge(predictions, references, multi="mean")


def answer_scores(predictions: Sequence[str], references: References) -> Scores:
    """Exact match and F1 of SQuAD, against the best reference."""
    return {"exact match": exact_match(predictions, references), "F1": token_f1(predictions, references)}


def chat_scores(predictions: Sequence[str], references: References) -> Scores:
    """How near an open answer is to the reference; a benchmark of chat models is `lm-eval`, of which this is no substitute."""
    return {"F1": token_f1(predictions, references), **rouge(predictions, references, variants=("rougeL",))}


def number_scores(predictions: Sequence[str], references: References) -> Scores:
    """Whether the final number is right, by GSM8K's rules."""
    return {"accuracy": numeric_match(predictions, references)}


def expression_scores(predictions: Sequence[str], references: References) -> Scores:
    """Whether the final expression equals the reference's, as math-verify reads both.

    Raises `MissingExtra` without math-verify.
    """
    library = require("math_verify", "sched_sampling")

    def right(prediction: str, golds: Sequence[str]) -> float:
        answer = library.parse(prediction)
        return float(any(library.verify(library.parse(gold), answer) for gold in golds))

    return {
        "accuracy": np.array(
            [right(prediction, golds) for prediction, golds in zip(predictions, references, strict=True)]
        )
    }


@dataclass(frozen=True)
class _WorldTask:
    family: str
    headline: str
    metric: Callable[[Sequence[str], References], Scores]
    max_new_tokens: int


_WORLD_TASKS = {
    "dialogues": _WorldTask(SUMMARISATION, "rougeL", rouge_scores, 32),
    "questions": _WorldTask(QUESTION_ANSWERING, "exact match", answer_scores, 12),
    "sums": _WorldTask(MATHEMATICS, "accuracy", number_scores, 32),
}


@cache
def world() -> World:
    """The world that the embedded tasks are about."""
    return World(seed=0, num_people=WORLD_PEOPLE)


def _world_task(name: str, rest: str, sizes: Mapping[str, int], seed: int) -> Task:
    kind, _, level = rest.partition(":")
    if kind not in _WORLD_TASKS:
        raise unknown_name("task of the world", kind, _WORLD_TASKS)
    if not level.isdecimal():
        raise InvalidInput(f"A task of the world is `world:{kind}:LEVEL`, the level a number; got `{name}`.")
    made = _WORLD_TASKS[kind]
    train, valid, test = (world_items(kind, sizes[split], split, int(level), seed) for split in SPLITS)
    where = world()
    return Task(
        name,
        made.family,
        train,
        valid,
        test,
        headline=made.headline,
        max_new_tokens=made.max_new_tokens * int(level),
        provenance=(
            f"{name} of the generated world of seed {where.seed} with {where.num_people} people (content "
            f"{where.content_hash[:16]}), draw {seed}",
        ),
        metric=made.metric,
    )


def world_items(kind: str, number: int, split: str, level: int, seed: int) -> tuple[Item, ...]:
    """`number` items of a draw of the world's `dialogues`, `questions` or `sums` (these without calculator marks)."""
    items: Iterable[Any] = getattr(world(), kind)(number, split, level, seed)
    if kind == "questions":
        return tuple(Item(each.prompt, each.completion, each.answers, each.prompt) for each in items)
    if kind == "dialogues":
        # The two other summaries say the same in other words, which nobody can guess.
        return tuple(Item(each.prompt, each.completion, each.summaries[:1], each.prompt) for each in items)
    return tuple(Item(each.prompt, f" {each.plain_solution}", (each.solution,), each.prompt) for each in items)


@dataclass(frozen=True)
class Source:
    """A public data set: where its rows are, how they become items, and which of them make a split.

    `parts` are the specs that `core.data.catalog.load` takes, put together; `splits` names the split there that train,
    valid and test come from. Splits with the same origin share it out by `shares`.
    """

    family: str
    parts: tuple[str, ...]
    convert: Callable[..., list[Item]]
    metric: Callable[[Sequence[str], References], Scores]
    headline: str
    max_new_tokens: int
    splits: Mapping[str, str]
    shares: Mapping[str, float] = field(default_factory=lambda: {"train": 0.95, "valid": 0.05})

    def read(self, calculator_marks: bool = True) -> tuple[dict[str, list[Item]], tuple[str, ...]]:
        """The items of every split, and the provenance."""
        options = {} if calculator_marks or self.convert is not task_rows.gsm8k else {"calculator_marks": False}
        origins = self._origins()
        lines: list[str] = []
        converted: dict[str, list[Item]] = {}
        for origin in dict.fromkeys(origins.values()):
            loaded = [catalog.load(part, origin) for part in self.parts]
            lines += [data.provenance for data in loaded]
            converted[origin] = self.convert((row for data in loaded for row in data.dataset), **options)
        items: dict[str, list[Item]] = {}
        for origin, rows in converted.items():
            takers = [split for split in SPLITS if origins[split] == origin]
            if len(takers) == 1:
                items[takers[0]] = rows
                continue
            shares = {split: self._share(split, origins) for split in takers}
            items |= shared_out(rows, shares)
            lines.append("here " + ", ".join(f"{share:.0%} of {origin} are {split}" for split, share in shares.items()))
        return items, tuple(lines)

    def _share(self, split: str, origins: Mapping[str, str]) -> float:
        # DialogSum's dev alone is small: a twentieth of it would be 25 dialogues.
        return {"train": 0.8, "valid": 0.2}[split] if origins["train"] == "valid" else self.shares[split]

    def _origins(self) -> Mapping[str, str]:
        if self.splits["train"] == self.splits["valid"] or not _lacks_train(self.parts[0]):
            return self.splits
        return {**self.splits, "train": self.splits["valid"]}


def _lacks_train(spec: str) -> bool:
    """Whether the folder of a data set in PAPERS_DATA is there and has no file for the train split."""
    folder = Path(os.environ.get("PAPERS_DATA", "")) / spec
    return bool(os.environ.get("PAPERS_DATA")) and folder.is_dir() and not any(folder.glob("train*"))


def shared_out(items: Iterable[Item], shares: Mapping[str, float]) -> dict[str, list[Item]]:
    """Items dealt to splits by a hash of their group; the last split takes what the shares before it leave."""
    bounds = np.cumsum(list(shares.values()))
    found: dict[str, list[Item]] = {split: [] for split in shares}
    for item in items:
        place = zlib.crc32(item.group.encode()) / 2**32
        found[list(shares)[min(int(np.searchsorted(bounds, place, side="right")), len(bounds) - 1)]].append(item)
    return found


_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_HELD_OUT = {"train": "train", "valid": "train", "test": "test"}

SOURCES: dict[str, Source] = {
    "dialogsum": Source(
        SUMMARISATION,
        ("dialogsum",),
        task_rows.dialogsum,
        rouge_scores,
        "rougeL",
        96,
        {split: split for split in SPLITS},
    ),
    # 53 tokens is the length of a response in summarize-from-feedback.
    "tldr": Source(
        SUMMARISATION,
        ("hub:vwxyzjn/summarize_from_feedback_tldr_3_filtered",),
        task_rows.tldr,
        rouge_scores,
        "rougeL",
        53,
        {split: split for split in SPLITS},
    ),
    "squad": Source(
        QUESTION_ANSWERING,
        ("hub:rajpurkar/squad",),
        task_rows.squad,
        answer_scores,
        "exact match",
        32,
        {"train": "train", "valid": "train", "test": "valid"},
    ),
    "ultrachat": Source(
        QUESTION_ANSWERING,
        ("hub:HuggingFaceH4/ultrachat_200k",),
        task_rows.ultrachat,
        chat_scores,
        "F1",
        512,
        {"train": "train_sft", "valid": "train_sft", "test": "test_sft"},
    ),
    "gsm8k": Source(MATHEMATICS, ("gsm8k",), task_rows.gsm8k, number_scores, "accuracy", 256, _HELD_OUT),
    "math": Source(
        MATHEMATICS,
        tuple(f"hub:EleutherAI/hendrycks_math:{subject}" for subject in _MATH_SUBJECTS),
        task_rows.competition,
        expression_scores,
        "accuracy",
        768,
        _HELD_OUT,
    ),
    "metamath": Source(
        MATHEMATICS,
        ("hub:meta-math/MetaMathQA",),
        task_rows.metamath,
        expression_scores,
        "accuracy",
        512,
        dict.fromkeys(SPLITS, "train"),
        shares={"train": 0.9, "valid": 0.05, "test": 0.05},
    ),
}


@dataclass(frozen=True)
class RecordedDraft:
    """An answer that another model gave to a question of GSM8K's test set, and whether its authors counted it right."""

    item: Item
    text: str
    right: bool


def recorded_drafts(solver: str) -> list[RecordedDraft]:
    """The 1,319 answers of one of `SOLVERS`: drafts for a correction, or for a judge to be tested on.

    They belong to test questions, so nothing may be trained on them. Only the folder gsm8k in PAPERS_DATA has them; raises
    `DataUnavailable` without it.
    """
    if solver not in SOLVERS:
        raise unknown_name("solver of GSM8K", solver, SOLVERS)
    path = Path(os.environ.get("PAPERS_DATA", "")) / "gsm8k" / "example_model_solutions.jsonl"
    if not os.environ.get("PAPERS_DATA") or not path.is_file():
        raise DataUnavailable(
            "The recorded answers are the file gsm8k/example_model_solutions.jsonl of openai/grade-school-math; set "
            "PAPERS_DATA to the folder that holds gsm8k."
        )
    drafts = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            (item,) = task_rows.gsm8k([{"question": row["question"], "answer": row["ground_truth"]}])
            drafts.append(RecordedDraft(item, row[solver]["solution"], row[solver]["is_correct"]))
    return drafts
