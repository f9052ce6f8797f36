"""Preference tuning (DPO, Rafailov et al. 2023): raise what was chosen over what was rejected, relative to a reference model.

    history = tune_on_preferences(model, [Preference(prompt_ids, chosen_ids, rejected_ids), ...], settings, scale=0.1)

The reference is the model as it is before training; its log-probabilities are computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from core.llm.examples import EncodedPair, collate, supervised_row
from core.llm.finetuning import Finetuning, finetune, target_nll
from core.llm.modes import in_mode
from core.llm.scoring import Scored, score
from core.training import History


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, as token ids; the chosen one is to become more probable than the rejected one."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


def preference_rows(model: Any, preferences: Sequence[Preference]) -> list[dict[str, Any]]:
    """Rows with both answers and by how much (in nats) `model`, the reference, prefers the chosen one."""
    sides = [(p.prompt_ids, ids) for p in preferences for ids in (p.chosen_ids, p.rejected_ids)]
    with in_mode(model, training=False):
        scores = score(model, [Scored((*x, *y), len(x)) for x, y in sides])
    sums = [float(found.double().sum()) for found in scores]
    rows = [supervised_row(EncodedPair(*side)) for side in sides]
    return [
        {"chosen": rows[2 * i], "rejected": rows[2 * i + 1], "reference": sums[2 * i] - sums[2 * i + 1]}
        for i in range(len(preferences))
    ]


def preference_batch(rows: Sequence[Mapping[str, Any]], *, packing: bool = False) -> dict[str, Tensor]:
    """The chosen answers of `rows` and then the rejected ones as tensors, with the number of its answer at every place."""
    answers = [row["chosen"] for row in rows] + [row["rejected"] for row in rows]
    named = [{**answer, "labels": [i] * len(answer["labels"])} for i, answer in enumerate(answers)]
    return {
        **collate(answers, packing=packing),
        "numbers": collate(named, packing=packing)["labels"],
        "reference": torch.tensor([row["reference"] for row in rows]),
    }


def preference_loss(model: Any, batch: Mapping[str, Any], *, scale: float) -> Float[Tensor, ""]:
    """-log sigmoid(scale * (how much `model` prefers the chosen answer - how much the reference does)), as a mean."""
    nll, places = target_nll(model, batch)
    numbers = functional.pad(batch["numbers"][:, 1:], (0, 1)).flatten()[places]
    num_rows = len(batch["reference"])
    log_probs = nll.new_zeros(2 * num_rows).index_add(0, numbers, -nll)
    margins = log_probs[:num_rows] - log_probs[num_rows:] - batch["reference"]
    return -functional.logsigmoid(scale * margins).sum() / batch.get("num_rows", num_rows)


def tune_on_preferences(
    model: Any,
    preferences: Sequence[Preference],
    settings: Finetuning,
    *,
    scale: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> History:
    """Train `model` in place; `options` are those of `core.llm.finetuning.finetune`."""
    return finetune(
        model,
        preference_rows(model, preferences),
        settings,
        seed=seed,
        loss=partial(preference_loss, scale=scale),
        collate=partial(preference_batch, packing=settings.packing),
        **options,
    )
