"""Training in rounds: build a data set with the current model, train on it, begin again.

Every method of this package, the baselines included, is a `Method`: it says how a round's data set is built and, where it
must, how a batch is turned into a loss. The rounds, their checkpoints and what is reported of them are the same for all, so
that methods differ in nothing else: equal settings mean equal numbers of updates on equally many rows in the same order.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from core.errors import CheckpointError, InvalidInput
from core.files import sole_writer, write_atomic
from core.llm.causal import end_tokens
from core.llm.examples import EncodedPair, collate, encode_pairs
from core.llm.finetuning import Finetuning, completion_loss, finetune
from core.llm.modes import in_mode
from core.training import History
from core.training.loop import Event, Hook
from sched_sampling.mixing import check_vocabulary
from sched_sampling.processes import processes
from sched_sampling.provenance import describe_method, model_digest, pairs_digest
from sched_sampling.weights import load_trained, save_trained

# A list of dictionaries, or a `datasets.Dataset`, which is no `Sequence` to a type checker.
Rows = Any
Loss = Callable[[Any, Any], Tensor]
Evaluate = Callable[[int], Mapping[str, float]]


@dataclass
class Clock:
    """A hook that knows how many updates of the round are complete, also in a run that was resumed."""

    step: int = 0

    def __call__(self, event: Event) -> None:
        """Take the time of the loop."""
        self.step = event.step


@dataclass(frozen=True)
class RoundJob:
    """What a method may use to build round `round` of `rounds`: the current model and the demonstrations.

    `texts` are the pairs as the user gave them; `seed` is a new one every round; `folder` (None: keep nothing) is where a
    data set is written as it is produced; `clock` counts the updates of the round's training.
    """

    round: int
    rounds: int
    model: Any
    tokenizer: Any
    pairs: Sequence[EncodedPair]
    texts: Sequence[Any]
    seed: int
    folder: Path | None = None
    clock: Clock = field(default_factory=Clock)


@dataclass(frozen=True)
class Built:
    """A round's data set, and the numbers worth reporting about how it was made."""

    rows: Rows
    report: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundReport:
    """One round: what was built, how training went, the caller's scores, and the CPU seconds of either half."""

    round: int
    built: dict[str, float]
    history: History
    scores: dict[str, float]
    build_seconds: float
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to train on demonstrations in rounds. `training` are the settings of each round, whose optimizer is new."""

    rounds: int = 3
    training: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        """Refuse a method without rounds."""
        if self.rounds < 1:
            raise InvalidInput(f"A method trains for at least one round; got rounds={self.rounds}.")

    @abstractmethod
    def build(self, job: RoundJob) -> Built:
        """The data set of a round: rows with `input_ids` and `labels`."""

    def loss(self, job: RoundJob) -> Loss:
        """The loss of a batch; the mean over target tokens unless a method needs another."""
        return completion_loss

    def batch(self, rows: Rows) -> Any:
        """Rows as tensors."""
        return collate(rows, packing=self.training.packing)

    def around_training(self, model: Any) -> AbstractContextManager[object]:
        """What is in force while a round trains, and only then."""
        return nullcontext()

    def fit(
        self,
        model: Any,
        tokenizer: Any,
        pairs: Iterable[Any],
        *,
        seed: int = 0,
        output_dir: str | Path | None = None,
        evaluate: Evaluate | None = None,
        stop: Callable[[Mapping[str, float]], bool] | None = None,
        hooks: Sequence[Hook] = (),
    ) -> list[RoundReport]:
        """Train `model` in place and return what happened in each round.

        `pairs` are dictionaries with `prompt` and `completion` (texts or messages), or `EncodedPair`s, which need no
        tokenizer. `evaluate(round)` is called after every round with the model in evaluation mode; training ends early
        when `stop` says so of its scores. With an `output_dir` data sets are written as they are produced, every round's
        weights (those that were trained) are kept, and the same call goes on where it was killed.

        Raises `InvalidInput` before any work on pairs that cannot be used, `CheckpointError` when `output_dir` holds
        another run, `RunInProgress` when another process writes there, and `TrainingDiverged` when the loss is not
        finite.
        """
        texts = list(pairs)
        encoded = encode_pairs(tokenizer, texts, max_length=context_length(model), end_ids=end_tokens(model, tokenizer))
        if not encoded:
            raise InvalidInput("There are no pairs to train on.")
        check_vocabulary(model, encoded)
        folder = None if output_dir is None else Path(output_dir)
        reports: list[RoundReport] = []
        group = processes()
        with ExitStack() as stack:
            start = 0
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                if group.rank == 0:
                    stack.enter_context(sole_writer(folder / ".lock", f"Another process trains into {folder}."))
                identity = {
                    "method": describe_method(self),
                    "model": model_digest(model),
                    "pairs": pairs_digest(encoded),
                    "seed": seed,
                }
                _same_run(folder, identity, first=group.rank == 0)
                group.wait()
                reports = _finished_rounds(folder)
                start = len(reports)
                if start:
                    load_trained(model, _round_folder(folder, start - 1) / "model.safetensors")
            for number in range(start, self.rounds):
                if reports and stop is not None and stop(reports[-1].scores):
                    break
                home = None if folder is None else _round_folder(folder, number)
                job = RoundJob(number, self.rounds, model, tokenizer, encoded, texts, _round_seed(seed, number), home)
                reports.append(self._round(job, evaluate, hooks))
                if home is not None and group.rank == 0:
                    save_trained(model, home / "model.safetensors")
                    write_atomic(home / "report.json", json.dumps(asdict(reports[-1])))
                group.wait()
        return reports

    def _round(self, job: RoundJob, evaluate: Evaluate | None, hooks: Sequence[Hook]) -> RoundReport:
        begin = time.process_time()
        built = self.build(job)
        middle = time.process_time()
        with self.around_training(job.model):
            history = finetune(
                job.model,
                built.rows,
                self.training,
                seed=job.seed,
                loss=self.loss(job),
                collate=self.batch,
                checkpoint_dir=None if job.folder is None else job.folder / "checkpoint",
                checkpoint_every=None if job.folder is None else 100,
                hooks=[job.clock, *hooks],
                description=f"Round {job.round + 1} of {job.rounds}",
            )
        end = time.process_time()
        with in_mode(job.model, training=False):
            scores = {} if evaluate is None else {name: float(value) for name, value in evaluate(job.round).items()}
        report = {name: float(value) for name, value in built.report.items()}
        return RoundReport(job.round, report, history, scores, middle - begin, end - middle)


def context_length(model: Any) -> int | None:
    """How many tokens a model reads at most; None when its positions have no end."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _round_seed(seed: int, number: int) -> int:
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def _round_folder(folder: Path, number: int) -> Path:
    return folder / f"round-{number:02d}"


def _same_run(folder: Path, identity: Mapping[str, Any], *, first: bool) -> None:
    record = folder / "run.json"
    wanted = json.loads(json.dumps(identity))
    if not record.exists():
        if first:
            write_atomic(record, json.dumps(wanted, indent=1))
        return
    found = json.loads(record.read_text())
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise CheckpointError(
            f"{folder} holds a run with another {' and '.join(different)}. Choose another output_dir, or repeat that run "
            "exactly to go on with it."
        )


def _finished_rounds(folder: Path) -> list[RoundReport]:
    reports: list[RoundReport] = []
    while (record := _round_folder(folder, len(reports)) / "report.json").exists():
        values = json.loads(record.read_text())
        reports.append(RoundReport(**{**values, "history": History(**values["history"])}))
    return reports
