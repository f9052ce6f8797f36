"""Batch-scheduled sampling (BASH, Algorithm 1): contexts with the model's own tokens, targets that stay gold.

A row is `input_ids = x + z` and `labels = [-100] * len(x) + y`. A causal model of transformers scores position i against
`labels[i + 1]`, so the stock loss of such rows is the objective of the method (reference, "BASH", step 5), and any trainer
that does not make its own labels can take them. One that rebuilds labels from `input_ids` would train the model to imitate its
own mistakes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InvalidInput
from core.llm.causal import end_tokens
from core.llm.examples import EncodedPair, encode_pairs, supervised_row
from sched_sampling.mixing import MixedRow, Mixing, check_vocabulary, mix_rows, position_betas
from sched_sampling.provenance import ids_digest, model_digest, pairs_digest, tokenizer_digest
from sched_sampling.rounds import Built, Method, RoundJob, context_length
from sched_sampling.schedule import Schedule, linear
from sched_sampling.storage import build_dataset


def protected_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that may not appear in the middle of an answer: ends, starts, padding and every other special token."""
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            special |= set(value) if isinstance(value, (list, tuple)) else {value}
    return frozenset(int(token) for token in special if token is not None)


def mixed_row(pair: EncodedPair, mixed: MixedRow, number: int) -> dict[str, Any]:
    """The training row of a mixed answer; `replaced` says of every token of `input_ids` whether it is the model's own."""
    start = len(pair.prompt_ids)
    return {
        **supervised_row(pair),
        "input_ids": [*pair.prompt_ids, *mixed.tokens],
        "replaced": [False] * start + list(mixed.replaced),
        "row": number,
    }


def bash_dataset(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[Mapping[str, Any] | EncodedPair],
    beta: float | Sequence[float],
    *,
    seed: int = 0,
    rollouts: Sequence[Sequence[int]] | None = None,
    output_dir: str | Path | None = None,
    rows_per_file: int = 1024,
    **options: Any,
) -> Any:
    """The mixed data set of `pairs` as a `datasets.Dataset` with `input_ids`, `labels`, `replaced` and `row`.

    `options` are those of `sched_sampling.mixing.Mixing`; special tokens of the tokenizer and of the model's configuration
    are protected besides. `rollouts` are the answers of the proposal `rollout`, from any server (`sched_sampling.drafting`),
    as token ids without an end; None lets `model` answer. With an `output_dir` the data set is written in Arrow files of
    `rows_per_file` rows as it is produced, with its provenance: the same call goes on where it was killed, processes of a
    `torchrun` share the files, and `load_mixed(output_dir)` reads it later.

    Raises `InvalidInput` before any work on pairs or options that cannot be used, and when `output_dir` holds a data set
    that was made with anything else.
    """
    encoded = encode_pairs(tokenizer, pairs, max_length=context_length(model), end_ids=end_tokens(model, tokenizer))
    if not encoded:
        raise InvalidInput("There are no pairs to mix.")
    if rollouts is not None and len(rollouts) != len(encoded):
        raise InvalidInput(f"rollouts has one answer for each pair; got {len(rollouts)} for {len(encoded)} pairs.")
    protected = protected_ids(model, tokenizer) | frozenset(options.pop("protected_ids", ()))
    mixing = Mixing(protected_ids=protected, **options)
    position_betas(beta, encoded)
    check_vocabulary(model, encoded)
    settings = {name: getattr(mixing, name) for name in ("proposal", "temperature", "top_k", "top_p", "engine")}

    def build(numbers: Sequence[int]) -> list[dict[str, Any]]:
        part = [encoded[i] for i in numbers]
        answers = None if rollouts is None else [rollouts[i] for i in numbers]
        mixed = mix_rows(
            model, part, beta, seed=seed, row_ids=numbers, rollouts=answers, protected_ids=protected, **settings
        )
        return [mixed_row(pair, row, number) for pair, row, number in zip(part, mixed, numbers, strict=True)]

    stamp = {
        "kind": "bash",
        "beta": beta if isinstance(beta, (int, float)) else list(beta),
        "seed": seed,
        # Every engine gives the same tokens.
        **{name: value for name, value in settings.items() if name != "engine"},
        "protected_ids": sorted(protected),
        "model": model_digest(model),
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "pairs": pairs_digest(encoded),
        "rollouts": None if rollouts is None else ids_digest(rollouts),
        "rows_per_file": rows_per_file,
    }
    return build_dataset(build, len(encoded), stamp, output_dir, rows_per_file=rows_per_file)


@dataclass(frozen=True, kw_only=True)
class BatchScheduledSampling(Method):
    """BASH: in round k mix with beta = schedule(k, rounds) and the model as it then is, and train on the mixed rows.

    The default schedule begins at 0, so that the first round is supervised fine-tuning, and ends at 0.3. `mixing` says how
    tokens are drawn.
    """

    schedule: Schedule = field(default_factory=linear)
    mixing: Mixing = field(default_factory=Mixing)

    def build(self, job: RoundJob) -> Built:
        """The mixed data set of the round, and which share of its answer tokens was replaced and changed."""
        beta = self.schedule(job.round, job.rounds)
        folder = None if job.folder is None else job.folder / "data"
        data = bash_dataset(
            job.model, job.tokenizer, job.pairs, beta, seed=job.seed, output_dir=folder, **vars(self.mixing)
        )
        return Built(data, {"beta": beta, **mixing_shares(data)})


def mixing_shares(data: Any) -> dict[str, float]:
    """The share of target tokens whose place in the context was drawn, and that differ from gold."""
    replaced = changed = total = 0
    for row in data:
        labels, ids = np.asarray(row["labels"]), np.asarray(row["input_ids"])
        replaced += int(np.sum(row["replaced"]))
        changed += int(((labels != -100) & (labels != ids)).sum())
        total += int((labels != -100).sum())
    return {"replaced": replaced / total, "changed": changed / total}
