"""Cross-fitting for RAC: who drafts for whom, and the drafting models that have never seen the answers of their own fold.

The drafting model of a fold is a plain run of the same method on all other folds, with its own drafts. So its drafts do not
depend on the answers of its fold in any round, not even through another model's drafts; it costs one more run a fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from core.data.cache import digest
from core.errors import InvalidInput
from core.llm.finetuning import finetune
from sched_sampling.drafting import places_of
from sched_sampling.processes import processes
from sched_sampling.rounds import RoundJob
from sched_sampling.weights import load_trained, restore, save_trained, trained_state

if TYPE_CHECKING:
    from sched_sampling.rac import ReferenceAnswerCorrection


@dataclass(frozen=True)
class Split:
    """Numbers of pairs, in ascending order: those of every fold, and those that are never trained on."""

    folds: tuple[tuple[int, ...], ...]
    held_out: tuple[int, ...]

    @property
    def train(self) -> tuple[int, ...]:
        """All folds."""
        return tuple(sorted(number for fold in self.folds for number in fold))

    def outside(self, fold: int) -> tuple[int, ...]:
        """All folds but one."""
        own = set(self.folds[fold])
        return tuple(number for number in self.train if number not in own)


def split(prompts: Sequence[tuple[int, ...]], folds: int, held_out_share: float) -> Split:
    """Deal the distinct prompts out in the order of their hashes; pairs of one prompt stay together.

    The same prompts are always dealt alike, whatever the seed and the round. Raises `InvalidInput` when a part of the split
    would be empty.
    """
    groups = places_of(prompts)

    def hashed(group: list[int]) -> str:
        return digest([np.asarray(prompts[group[0]], dtype=np.int64).tobytes()])

    groups.sort(key=hashed)
    count = round(len(groups) * held_out_share)
    if len(groups) - count < folds or (held_out_share > 0) != (count > 0):
        raise InvalidInput(
            f"{len(groups)} different prompts are too few for folds={folds} and held_out_share={held_out_share}: each part "
            "needs one at least."
        )
    held, rest = groups[:count], groups[count:]
    dealt = [rest[fold::folds] for fold in range(folds)]
    return Split(tuple(map(_flat, dealt)), _flat(held))


def _flat(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted(number for group in groups for number in group))


@contextmanager
def drafting_model(method: ReferenceAnswerCorrection, job: RoundJob, parts: Split, fold: int) -> Iterator[None]:
    """Turn `job.model` into the drafting model of a fold for the `with` block; its own weights are back afterwards.

    In round 0 that is the model itself, which has seen nothing yet. In a later round it is the drafting model of the round
    before after one more round of training outside the fold; what was trained is kept in the round's folder.
    """
    assert job.folder is not None, "folds keep their models in a folder"  # noqa: S101  (`fit` sees to it)
    job.folder.mkdir(parents=True, exist_ok=True)
    start = job.folder.with_name("start.safetensors")
    group = processes()
    if job.round == 0:
        if not start.exists() and group.rank == 0:
            save_trained(job.model, start)
        group.wait()
        yield
        return
    path = job.folder / f"fold-{fold:02d}.safetensors"
    before = start if job.round == 1 else job.folder.with_name(f"round-{job.round - 1:02d}") / path.name
    own = trained_state(job.model)
    try:
        if path.exists():
            load_trained(job.model, path)
        else:
            load_trained(job.model, before)
            _train_outside(method, job, parts, fold)
            if group.rank == 0:
                save_trained(job.model, path)
            group.wait()
        yield
    finally:
        restore(job.model, own)


def _train_outside(method: ReferenceAnswerCorrection, job: RoundJob, parts: Split, fold: int) -> None:
    """One round of the method on the other folds, as the round before would have been without this one."""
    assert job.folder is not None  # noqa: S101
    folder = job.folder / f"fold-{fold:02d}"
    seed = int(np.random.SeedSequence([job.seed, fold]).generate_state(1)[0])
    inner = replace(job, seed=seed, folder=folder)
    rows = method.rows(inner, parts.outside(fold), "data")
    with method.around_training(job.model):
        finetune(
            job.model,
            rows,
            method.training,
            seed=seed,
            loss=method.loss(inner),
            collate=method.batch,
            checkpoint_dir=folder / "checkpoint",
            checkpoint_every=100,
            description=f"Round {job.round} without fold {fold + 1} of {len(parts.folds)}",
        )
