"""SPIN, self-play fine-tuning (Chen et al. 2024, arXiv 2401.01335): tell the reference answers from the model's own.

Every iteration samples an answer to every prompt and trains the preference loss with the reference answer chosen and the sample
rejected, relative to the model that the iteration began with.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from core.errors import InvalidInput
from core.files import write_atomic
from core.llm.finetuning import Finetuning
from sched_sampling.baselines.preference import Preference, preference_batch, preference_loss, preference_rows
from sched_sampling.drafting import Drafting, draft_with_model
from sched_sampling.processes import processes
from sched_sampling.rounds import Built, Loss, Method, RoundJob, RoundReport, Rows

_SAMPLES = "samples.json"


@dataclass(frozen=True, kw_only=True)
class SPIN(Method):
    """An iteration is a round; from the second on the samples of the one before are rejected as well.

    `scale` is the paper's lambda. Defaults are published (rate, RMSprop, lambda, iterations).
    """

    training: Finetuning = field(
        default_factory=lambda: Finetuning(learning_rate=5e-7, schedule="linear", optimizer=torch.optim.RMSprop)
    )
    scale: float = 0.1
    drafting: Drafting = field(default_factory=Drafting)

    def __post_init__(self) -> None:
        """Refuse a loss without a slope."""
        super().__post_init__()
        if not self.scale > 0:
            raise InvalidInput(f"scale is above 0; got {self.scale}.")

    def fit(
        self, model: Any, tokenizer: Any, pairs: Iterable[Any], *, output_dir: str | Path | None = None, **options: Any
    ) -> list[RoundReport]:
        """Train `model` in place; see `Method.fit`. Samples are kept in `output_dir`, else in a temporary folder."""
        if output_dir is not None or self.rounds == 1:
            return super().fit(model, tokenizer, pairs, output_dir=output_dir, **options)
        if processes().world_size > 1:
            raise InvalidInput(
                "Several processes need one output_dir, where SPIN keeps its samples between iterations."
            )
        with tempfile.TemporaryDirectory() as folder:
            return super().fit(model, tokenizer, pairs, output_dir=folder, **options)

    def build(self, job: RoundJob) -> Built:
        """Preferences of this round's samples and the last round's, and which share of the new ones is the reference answer."""
        drafts = draft_with_model(
            job.model,
            job.tokenizer,
            [pair.prompt_ids for pair in job.pairs],
            self.drafting,
            max_new_tokens=self.drafting.limit([pair.target_ids for pair in job.pairs]),
            seed=job.seed,
        )
        # A sample that ended does so as the reference answer does.
        samples = [
            [*draft.token_ids, *(pair.target_ids[-1:] if draft.ended else ())]
            for draft, pair in zip(drafts, job.pairs, strict=True)
        ]
        rejected = [samples]
        if job.folder is not None:
            if job.round:
                before = job.folder.parent / f"round-{job.round - 1:02d}" / _SAMPLES
                rejected.append(json.loads(before.read_text()))
            if processes().rank == 0:
                job.folder.mkdir(parents=True, exist_ok=True)
                write_atomic(job.folder / _SAMPLES, json.dumps(samples))
        preferences = [
            Preference(pair.prompt_ids, pair.target_ids, tuple(sample))
            for some in rejected
            for pair, sample in zip(job.pairs, some, strict=True)
        ]
        same = sum(tuple(sample) == pair.target_ids for sample, pair in zip(samples, job.pairs, strict=True))
        return Built(preference_rows(job.model, preferences), {"same": same / len(samples)})

    def loss(self, job: RoundJob) -> Loss:
        """The preference loss."""
        return partial(preference_loss, scale=self.scale)

    def batch(self, rows: Rows) -> Any:
        """Chosen and rejected answers as tensors."""
        return preference_batch(rows, packing=self.training.packing)
