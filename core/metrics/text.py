"""How well texts match their references, one number per item: ROUGE, exact match, token F1, and the number of an answer.

Every metric returns a vector over the items, so that two systems can be compared item by item. A reference is one text,
or several of which any may be met.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, InvalidOperation

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidInput, require

References = Sequence[str | Sequence[str]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

# A number that does not continue a word or number: the 3 of "5-3" is 3, that of "is -3" is -3.
_NUMBER = r"(?:(?<![\w.)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)"
_MARKED = re.compile(r"####\s*(-?[\d.,]+)")
_ANNOUNCED = re.compile(rf"(?:\b[Aa]nswer is|\bA:)[\s:*]*({_NUMBER})")
_ANY = re.compile(f"({_NUMBER})")


def rouge(
    predictions: Sequence[str],
    references: References,
    *,
    variants: Sequence[str] = ("rouge1", "rouge2", "rougeL"),
    multi: str = "mean",
    stemmer: bool = True,
) -> dict[str, NDArray[np.float64]]:
    """F-measures of `rouge_score`, 0 to 1, one vector per variant (`rouge1` to `rouge9`, `rougeL`, `rougeLsum`).

    `multi` joins several references of one item: the mean of their scores, or each variant's best. An empty text
    scores 0, also against an empty reference. `rougeLsum` takes lines as sentences. Raises `MissingExtra` without
    rouge-score, and `InvalidInput` on unequal lengths, an item without references or an unknown variant.
    """
    pairs = _paired(predictions, references)
    if multi not in ("mean", "max"):
        raise InvalidInput(f"multi is 'mean' or 'max' over an item's references; got {multi!r}.")
    for variant in variants:
        if not re.fullmatch("rouge([1-9]|L|Lsum)", variant):
            raise InvalidInput(f"ROUGE has the variants rouge1 to rouge9, rougeL and rougeLsum; got {variant!r}.")
    scorer = require("rouge_score.rouge_scorer", "sched_sampling").RougeScorer(list(variants), use_stemmer=stemmer)
    join = max if multi == "max" else np.mean
    scores = np.zeros((len(variants), len(pairs)))
    for column, (prediction, golds) in enumerate(pairs):
        each = [scorer.score(gold, prediction) for gold in golds]
        for row, variant in enumerate(variants):
            scores[row, column] = join([score[variant].fmeasure for score in each])
    return dict(zip(variants, scores, strict=True))


def normalise_answer(text: str) -> str:
    """Lower case without ASCII punctuation, articles (a, an, the) and repeated white space: SQuAD's normalisation."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: References) -> NDArray[np.float64]:
    """1 where the normalised prediction equals a normalised reference, else 0 (SQuAD)."""
    return _best(predictions, references, lambda prediction, gold: float(prediction == gold))


def token_f1(predictions: Sequence[str], references: References) -> NDArray[np.float64]:
    """F1 of the normalised words, counted with repetitions, against the best reference (SQuAD).

    Two texts without words score 1, one without against one with words 0.
    """
    return _best(predictions, references, _word_f1)


def final_number(text: str) -> Decimal | None:
    """The number that a worked answer ends in, by GSM8K's rules; None when there is none.

    The last `#### n`; else the last number after `answer is` or `A:`; else the last number. Commas, `$`, `%` and a
    final full stop are dropped.
    """
    for pattern in (_MARKED, _ANNOUNCED, _ANY):
        for found in reversed(pattern.findall(text)):
            if re.search(r"\d", found):
                return _decimal(found)
    return None


def numeric_match(predictions: Sequence[str], references: References) -> NDArray[np.float64]:
    """1 where the final number of the prediction equals that of a reference, as numbers (18 = 18.0); else 0.

    A prediction without a number is wrong. Raises `InvalidInput` on a reference without one.
    """
    scores = []
    for row, (prediction, golds) in enumerate(_paired(predictions, references)):
        numbers = [final_number(gold) for gold in golds]
        if None in numbers:
            raise InvalidInput(f"Reference {row} has no final number: {golds[numbers.index(None)][-80:]!r}.")
        scores.append(float(final_number(prediction) in numbers))
    return np.array(scores, dtype=np.float64)


def _decimal(digits: str) -> Decimal | None:
    try:
        return Decimal(re.sub(r"[,$%\s]", "", digits).rstrip("."))
    except InvalidOperation:
        return None


def _word_f1(prediction: str, gold: str) -> float:
    predicted, wanted = prediction.split(), gold.split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = (Counter(predicted) & Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted))


def _best(
    predictions: Sequence[str], references: References, score: Callable[[str, str], float]
) -> NDArray[np.float64]:
    scores: Iterable[float] = (
        max(score(normalise_answer(prediction), normalise_answer(gold)) for gold in golds)
        for prediction, golds in _paired(predictions, references)
    )
    return np.fromiter(scores, dtype=np.float64)


def _paired(predictions: Sequence[str], references: References) -> list[tuple[str, Sequence[str]]]:
    if isinstance(predictions, str) or isinstance(references, str) or len(predictions) != len(references):
        raise InvalidInput(
            "Text metrics take one list of predictions and an equally long list of references; got "
            f"{_described(predictions)} and {_described(references)}."
        )
    pairs = [
        (prediction, (gold,) if isinstance(gold, str) else gold)
        for prediction, gold in zip(predictions, references, strict=True)
    ]
    for row, (_, golds) in enumerate(pairs):
        if len(golds) == 0:
            raise InvalidInput(f"Item {row} has no reference; every prediction is compared with at least one.")
    return pairs


def _described(texts: object) -> str:
    return "a single text" if isinstance(texts, str) else f"{len(texts)} items"  # type: ignore[arg-type]
