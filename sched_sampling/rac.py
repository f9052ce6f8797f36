"""Reference-answer-based correction (RAC, Algorithm 2): the model learns to answer, and to correct its own answer.

Every pair (x, y) gives a direct row x -> y and a correction row c(x, draft) -> y, where the draft is the model's own answer.
Both have the same targets: only tokens of y are ever trained towards, the draft is context. Built from prompts, reference
answers and the model, from nothing else: there is no reward, filter or judge to pass.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InvalidInput
from core.llm.base import Chat
from core.llm.causal import end_tokens
from core.llm.examples import EncodedPair, encode_pairs, supervised_row
from sched_sampling.crossfit import Split, drafting_model, split
from sched_sampling.drafting import Drafting, check_room, draft_with_chat, draft_with_model, places_of
from sched_sampling.mixing import check_vocabulary
from sched_sampling.provenance import ids_digest, model_digest, pairs_digest, tokenizer_digest
from sched_sampling.rounds import Built, Method, RoundJob, RoundReport, Rows, context_length
from sched_sampling.storage import build_dataset
from sched_sampling.templates import Draft, Prompt, Template, chosen_template, is_conversation


class LeakageWarning(UserWarning):
    """Drafts for training prompts are better than those for new prompts: the model remembers the answers."""


def rac_dataset(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[Mapping[str, Any] | EncodedPair],
    *,
    template: Template | None = None,
    direct_share: float = 0.5,
    drop_unended: bool = False,
    drafts: Sequence[Draft] | None = None,
    chat: Chat | None = None,
    seed: int = 0,
    row_ids: Sequence[int] | None = None,
    output_dir: str | Path | None = None,
    rows_per_file: int = 1024,
    **drafting: Any,
) -> Any:
    """Direct and correction rows of `pairs` as a `datasets.Dataset`.

    Columns: `input_ids`, `labels`, `row` (the pair, by `row_ids`), `kind` ("direct" or "correction"), `ended` (whether the
    draft came to an end; true in direct rows) and `draft_quality` (likeness of the draft to the reference answer; 0 in direct
    rows). `direct_share` of the rows are direct, which is 1 - rho of the loss: up to a half every pair has its correction and
    some pairs a direct row too, above it is the other way round. Drafts that are right are kept: a model that sees only
    wrong ones learns to change every answer. `drop_unended` leaves out corrections of drafts that ran into the length limit.

    Drafts come from `model`, drawn as `drafting` says (the fields of `Drafting`), else from `chat`, or they are `drafts`, one
    for each pair. Where a correction prompt is too long for the model its draft is cut off at the left. With an `output_dir`
    the data set is written as it is produced and the same call goes on where it was killed.

    Raises `InvalidInput` before any work on pairs or options that cannot be used, and when `output_dir` holds a data set that
    was made with anything else.
    """
    texts = list(pairs)
    encoded = encode_pairs(tokenizer, texts, max_length=context_length(model), end_ids=end_tokens(model, tokenizer))
    if not encoded:
        raise InvalidInput("There are no pairs to correct.")
    _check_share(direct_share)
    check_vocabulary(model, encoded)
    if drafts is not None and (chat is not None or len(drafts) != len(encoded)):
        raise InvalidInput(f"Give one draft for each of {len(encoded)} pairs, or a chat model, not both.")
    settings = Drafting(**drafting)
    prompts = [_prompt(text, pair) for text, pair in zip(texts, encoded, strict=True)]
    template = chosen_template(template, [_given_prompt(text) for text in texts])
    frames = [template.frame(tokenizer, prompt) for prompt in prompts]
    limit = context_length(model)
    room = [None if limit is None else limit - len(pair.target_ids) for pair in encoded]
    for i, frame in enumerate(frames):
        if (most := room[i]) is not None and len(frame) > most:
            raise InvalidInput(
                f"Pair {i}: question, correction request and answer take {len(frame) + len(encoded[i].target_ids)} tokens "
                f"without any draft, and the model reads at most {limit}. Shorten them or leave the pair out."
            )
    max_new_tokens = settings.limit([pair.target_ids for pair in encoded])
    if drafts is None and chat is None:
        check_room(model, [pair.prompt_ids for pair in encoded], max_new_tokens)
    direct, corrected = row_shares(len(encoded), direct_share, seed)
    groups = places_of([pair.prompt_ids for pair in encoded])
    names = range(len(encoded)) if row_ids is None else row_ids

    def drafted(places: list[int]) -> dict[int, Draft]:
        if drafts is not None:
            return {i: drafts[i] for i in places}
        if not places:
            return {}
        how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
        if chat is not None:
            made = draft_with_chat(chat, tokenizer, [_given_prompt(texts[i]) for i in places], settings, **how)
        else:
            made = draft_with_model(model, tokenizer, [encoded[i].prompt_ids for i in places], settings, **how)
        return dict(zip(places, made, strict=True))

    def build(numbers: Sequence[int]) -> list[dict[str, Any]]:
        # All pairs of a prompt stand in one file, so that its samples are drawn together.
        places = [i for number in numbers for i in groups[number]]
        own = drafted([i for i in places if i in corrected])
        rows = []
        for i in places:
            if i in direct:
                row = {"row": int(names[i]), "kind": "direct", "ended": True, "draft_quality": 0.0}
                rows.append({**supervised_row(encoded[i]), **row})
            if i in own and (own[i].ended or not drop_unended):
                context = template.fill(tokenizer, frames[i], own[i], max_length=room[i])
                pair = EncodedPair(context, encoded[i].target_ids)
                quality = likeness(own[i].token_ids, encoded[i].target_ids[:-1])
                row = {"row": int(names[i]), "kind": "correction", "ended": own[i].ended, "draft_quality": quality}
                rows.append({**supervised_row(pair), **row})
        return rows

    drafted_by: Any = "own" if chat is None else dict(chat.source)
    if drafts is not None:
        drafted_by = ids_digest([[int(draft.ended), *draft.token_ids] for draft in drafts])
    stamp = {
        "kind": "rac",
        "direct_share": direct_share,
        "drop_unended": drop_unended,
        "template": str(template),
        "seed": seed,
        "drafts": drafted_by,
        "row_ids": ids_digest([names]),
        **{name: getattr(settings, name) for name in ("temperature", "top_k", "top_p")},
        "max_new_tokens": max_new_tokens,
        "model": model_digest(model),
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "pairs": pairs_digest(encoded),
        "rows_per_file": rows_per_file,
    }
    return build_dataset(build, len(groups), stamp, output_dir, rows_per_file=rows_per_file)


def row_shares(num_pairs: int, direct_share: float, seed: int) -> tuple[frozenset[int], frozenset[int]]:
    """The pairs with a direct row and those with a correction, so that `direct_share` of all rows are direct.

    No pair has two rows of a kind; the kind that needs fewer rows gets them from pairs chosen at random.
    """
    _check_share(direct_share)
    rarer = min(direct_share, 1 - direct_share)
    some = round(num_pairs * rarer / (1 - rarer))
    order = np.random.default_rng(seed).permutation(num_pairs).tolist()
    every, few = frozenset(range(num_pairs)), frozenset(order[:some])
    return (few, every) if direct_share <= 0.5 else (every, few)


def likeness(a: Sequence[int], b: Sequence[int]) -> float:
    """How much of two token sequences is their longest common subsequence (ROUGE-L's F-measure on tokens); 1 if equal."""
    if not a or not b:
        return float(tuple(a) == tuple(b))
    places: dict[int, int] = {}
    for i, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << i
    # Bit-parallel (Hyyrö 2004): zeros of `free` count the common subsequence, one integer operation a token of b.
    full = (1 << len(a)) - 1
    free = full
    for token in b:
        match = free & places.get(token, 0)
        free = (free + match | free - match) & full
    return 2 * (len(a) - free.bit_count()) / (len(a) + len(b))


@dataclass(frozen=True, kw_only=True)
class ReferenceAnswerCorrection(Method):
    """RAC: in every round draft with the model as it then is, and train on direct and correction rows.

    `direct_share` is 1 - rho. `template` None takes the chat form for messages and the text form for texts. `chat(round)` gives
    the server that drafts in a round instead of the model itself, for example one that was given the new weights.

    After a round the model has seen the reference answers, and its drafts for the same prompts are better than those for
    new ones (reference, "Draft leakage"). `folds` of at least 2 draws them from models that have not: one model a fold, each
    trained in every round on the other folds alone, for that many times the work. `held_out_share` of the prompts are kept
    from training to measure it: every round reports the likeness of drafts to their reference answers (`draft_quality`)
    and the same for the held-out prompts, and a `LeakageWarning` says when the difference exceeds `leakage_threshold`.
    Prompts are dealt out by their hash, equal ones together.
    """

    template: Template | None = None
    direct_share: float = 0.5
    drafting: Drafting = field(default_factory=Drafting)
    drop_unended: bool = False
    chat: Callable[[int], Chat] | None = None
    folds: int = 1
    held_out_share: float = 0.0
    leakage_threshold: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing, before any work."""
        super().__post_init__()
        _check_share(self.direct_share)
        if self.folds < 1 or not 0 <= self.held_out_share < 1:
            raise InvalidInput(
                f"folds is at least 1 and held_out_share in [0, 1); got {self.folds} and {self.held_out_share}."
            )
        if self.folds > 1 and self.chat is not None:
            raise InvalidInput(
                "A server drafts with one model; folds need models of their own. Leave out folds or chat."
            )

    def fit(
        self, model: Any, tokenizer: Any, pairs: Iterable[Any], *, output_dir: str | Path | None = None, **options: Any
    ) -> list[RoundReport]:
        """Train `model` in place; see `Method.fit`. Folds keep their models in `output_dir`, else in a temporary folder."""
        if output_dir is not None or self.folds == 1:
            return super().fit(model, tokenizer, pairs, output_dir=output_dir, **options)
        with tempfile.TemporaryDirectory() as folder:
            return super().fit(model, tokenizer, pairs, output_dir=folder, **options)

    def build(self, job: RoundJob) -> Built:
        """The data set of the round, its make-up, and the leakage where prompts are held out."""
        import datasets

        parts = split([pair.prompt_ids for pair in job.pairs], self.folds, self.held_out_share)
        if self.folds == 1:
            rows = self.rows(job, parts.train, "data")
        else:
            made = []
            for fold in range(self.folds):
                with drafting_model(self, job, parts, fold):
                    made.append(self.rows(job, parts.folds[fold], f"data-{fold:02d}"))
            rows = datasets.concatenate_datasets(made)
        report = _make_up(rows)
        if parts.held_out and report["correction_rows"]:
            report |= self._leakage(job, parts, report["draft_quality"])
        return Built(rows, report)

    def rows(self, job: RoundJob, members: Sequence[int], name: str) -> Rows:
        """The data set of some of the pairs, drafted by the model as it is now."""
        rows: Rows = rac_dataset(
            job.model,
            job.tokenizer,
            [job.texts[i] for i in members],
            template=self.template,
            direct_share=self.direct_share,
            drop_unended=self.drop_unended,
            chat=None if self.chat is None else self.chat(job.round),
            seed=job.seed,
            row_ids=members,
            output_dir=None if job.folder is None else job.folder / name,
            **self._drafting_options(job),
        )
        return rows

    def _drafting_options(self, job: RoundJob) -> dict[str, Any]:
        # The longest answer of all, so that no fold and no draft for a held-out prompt has another limit.
        limit = self.drafting.limit([pair.target_ids for pair in job.pairs])
        return {**vars(self.drafting), "max_new_tokens": limit}

    def _leakage(self, job: RoundJob, parts: Split, quality: float) -> dict[str, float]:
        chat = None if self.chat is None else self.chat(job.round)
        held = [job.pairs[i] for i in parts.held_out]
        options = self._drafting_options(job)
        how: dict[str, Any] = {"max_new_tokens": options["max_new_tokens"], "seed": job.seed}
        if chat is not None:
            prompts = [_given_prompt(job.texts[i]) for i in parts.held_out]
            drafts = draft_with_chat(chat, job.tokenizer, prompts, self.drafting, **how)
        else:
            prompts = [pair.prompt_ids for pair in held]
            drafts = draft_with_model(job.model, job.tokenizer, prompts, self.drafting, **how)
        new = float(
            np.mean([likeness(draft.token_ids, pair.target_ids[:-1]) for draft, pair in zip(drafts, held, strict=True)])
        )
        if quality - new > self.leakage_threshold:
            warnings.warn(
                f"Round {job.round}: drafts for training prompts are nearer to their reference answers ({quality:.3f}) than "
                f"drafts for held-out prompts ({new:.3f}), by more than {self.leakage_threshold}. The corrector will meet "
                "worse drafts than it learns from; use folds=2 or more, or fewer steps a round.",
                LeakageWarning,
                stacklevel=2,
            )
        return {"held_out_draft_quality": new, "leakage": quality - new}


def _make_up(rows: Rows) -> dict[str, float]:
    kinds = np.asarray([row["kind"] == "correction" for row in rows])
    quality = np.asarray([row["draft_quality"] for row in rows])[kinds]
    ended = np.asarray([row["ended"] for row in rows])[kinds]
    counts = {"direct_rows": float((~kinds).sum()), "correction_rows": float(kinds.sum())}
    if not len(quality):
        return counts
    means = {"draft_quality": quality.mean(), "right_drafts": (quality == 1).mean(), "unended_drafts": (~ended).mean()}
    return {**counts, **{name: float(value) for name, value in means.items()}}


def _check_share(direct_share: float) -> None:
    if not (0 <= direct_share <= 1 and math.isfinite(direct_share)):
        raise InvalidInput(f"direct_share is a share of rows, from 0 to 1; got {direct_share}.")


def _given_prompt(text: Mapping[str, Any] | EncodedPair) -> Any:
    return text.prompt_ids if isinstance(text, EncodedPair) else text["prompt"]


def _prompt(text: Mapping[str, Any] | EncodedPair, pair: EncodedPair) -> Prompt:
    """What a template frames: messages as they are, and else the very token ids of the direct row."""
    given: Prompt = _given_prompt(text)
    return given if is_conversation(given) else pair.prompt_ids
