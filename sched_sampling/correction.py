"""Self-correction at inference: a direct answer, then n times c(x, previous answer); and what correcting did, good and harm.

corrections = correct(model, tokenizer, prompts, rounds=2, template=RAC_TEXT, max_new_tokens=64)
corrections.texts(0)                # what the plain model says
correction_report(right_before, right_after).broken_share
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidInput
from core.llm.examples import EncodedPair, encode_pairs
from sched_sampling.drafting import Drafting, draft_with_model
from sched_sampling.rounds import context_length
from sched_sampling.templates import Draft, Prompt, Template, chosen_template, prompt_ids


@dataclass(frozen=True)
class Corrections:
    """Every round's answers: `answers[0]` are the direct ones, `answers[k]` those after k corrections."""

    answers: tuple[tuple[Draft, ...], ...]

    def texts(self, round: int = -1) -> list[str]:
        """The texts of a round, by default of the last."""
        return [answer.text for answer in self.answers[round]]


def correct(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rounds: int = 1,
    *,
    max_new_tokens: int,
    template: Template | None = None,
    temperature: float = 0.0,
    drafts: Sequence[Draft] | None = None,
    seed: int = 0,
    **drafting: Any,
) -> Corrections:
    """Answer the prompts and correct the answers `rounds` times; 0 is the plain model, token for token.

    Prompts are texts, messages or token ids; `drafts` are first answers from elsewhere, otherwise the model gives them. Answers
    are drawn as `temperature` and the other fields of `Drafting` say, with fresh randomness in every round. `template` None is
    `RAC_CHAT` for messages and `RAC_TEXT` for texts, as in training. Raises `InvalidInput` before any work on prompts that do
    not fit the model with an answer.
    """
    if isinstance(prompts, str):
        raise InvalidInput("Prompts are a list; for one prompt write [prompt].")
    if rounds < 0:
        raise InvalidInput(f"rounds counts corrections and is at least 0; got {rounds}.")
    if drafts is not None and len(drafts) != len(prompts):
        raise InvalidInput(f"Each prompt needs its draft; got {len(prompts)} and {len(drafts)}.")
    settings = Drafting(temperature=temperature, max_new_tokens=max_new_tokens, **drafting)
    template = chosen_template(template, prompts) if rounds else template
    limit = context_length(model)
    room = None if limit is None else limit - max_new_tokens
    frames = [template.frame(tokenizer, prompt) for prompt in prompts] if template is not None and rounds else []
    for i, frame in enumerate(frames):
        if room is not None and len(frame) > room:
            raise InvalidInput(
                f"Prompt {i} takes {len(frame)} tokens with its correction request, and {max_new_tokens} new tokens do not fit "
                f"behind them: the model reads at most {limit}. Shorten the prompt or lower max_new_tokens."
            )

    def answered(asked: Sequence[Sequence[int]], number: int) -> tuple[Draft, ...]:
        # Round 0 draws with the caller's seed itself: it is what the plain model would say.
        own = seed if number == 0 else int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        return tuple(draft_with_model(model, tokenizer, asked, settings, max_new_tokens=max_new_tokens, seed=own))

    answers = [tuple(drafts) if drafts is not None else answered([prompt_ids(tokenizer, p) for p in prompts], 0)]
    for number in range(1, rounds + 1):
        assert template is not None  # noqa: S101  (chosen above)
        asked = [
            template.fill(tokenizer, frame, answer, max_length=room)
            for frame, answer in zip(frames, answers[-1], strict=True)
        ]
        answers.append(answered(asked, number))
    return Corrections(tuple(answers))


@dataclass(frozen=True)
class CorrectionReport:
    """How many answers became right, became wrong, stayed right and stayed wrong.

    `fixed_share` is of the answers that were wrong, `broken_share` of those that were right; a share of nothing is 0.
    """

    fixed: int
    broken: int
    kept_right: int
    kept_wrong: int

    @property
    def fixed_share(self) -> float:
        """Of the answers that were wrong, how many correction made right."""
        return self.fixed / max(1, self.fixed + self.kept_wrong)

    @property
    def broken_share(self) -> float:
        """Of the answers that were right, how many correction made wrong."""
        return self.broken / max(1, self.broken + self.kept_right)

    @property
    def before(self) -> float:
        """The share of right answers before the correction."""
        return (self.broken + self.kept_right) / self._total

    @property
    def after(self) -> float:
        """The share of right answers after it."""
        return (self.fixed + self.kept_right) / self._total

    @property
    def _total(self) -> int:
        return self.fixed + self.broken + self.kept_right + self.kept_wrong


def correction_report(before: Sequence[Any] | NDArray[Any], after: Sequence[Any] | NDArray[Any]) -> CorrectionReport:
    """Compare which answers were right before and after; both are sequences of true and false, item by item."""
    was, now = (np.asarray(values) for values in (before, after))
    if was.shape != now.shape or was.ndim != 1 or not len(was):
        raise InvalidInput(
            f"Before and after are as long as each other and not empty; got {was.shape} and {now.shape}."
        )
    if not all(np.isin(values, (0, 1)).all() for values in (was, now)):
        raise InvalidInput("An answer is right (1) or not (0); cut scores between them at a threshold first.")
    was, now = was.astype(bool), now.astype(bool)
    counts = (~was & now, was & ~now, was & now, ~was & ~now)
    return CorrectionReport(*(int(count.sum()) for count in counts))


def same_tokens(answer: Draft, pair: EncodedPair) -> bool:
    """Whether an answer is the reference answer, its end included."""
    return answer.ended and answer.token_ids == pair.target_ids[:-1]


def correction_scores(
    model: Any,
    tokenizer: Any,
    pairs: Iterable[Mapping[str, Any] | EncodedPair],
    *,
    right: Callable[[Draft, EncodedPair], bool] = same_tokens,
    **options: Any,
) -> dict[str, float]:
    """Scores for `fit(evaluate=...)`: `direct` and `corrected` accuracy, `fixed` and `broken` shares.

    `right` judges an answer; it is evaluation only, nothing of it reaches training. `options` are those of `correct`;
    `max_new_tokens` is by default the length of the longest reference answer.
    """
    texts = list(pairs)
    encoded = encode_pairs(tokenizer, texts, max_length=context_length(model))
    prompts = [text.prompt_ids if isinstance(text, EncodedPair) else text["prompt"] for text in texts]
    options.setdefault("max_new_tokens", max(len(pair.target_ids) for pair in encoded))
    found = correct(model, tokenizer, prompts, **options).answers
    before, after = (
        [right(answer, pair) for answer, pair in zip(answers, encoded, strict=True)]
        for answers in (found[0], found[-1])
    )
    report = correction_report(before, after)
    return {
        "direct": report.before,
        "corrected": report.after,
        "fixed": report.fixed_share,
        "broken": report.broken_share,
    }
