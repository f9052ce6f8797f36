"""Atoms of meaning, how they are said, how sentences are read back, and what follows from what: exactly.

Reading inverts saying on every form of `relations`, so a generated sentence can be judged without a model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from core.data.world.draws import Draws
from core.data.world.vocabulary import RELATIONS

SUPPORTED, REFUTED, NOT_ENOUGH_INFO = "supported", "refuted", "not enough info"
LABELS = (SUPPORTED, REFUTED, NOT_ENOUGH_INFO)

# Sentences that say nothing about any fact.
FILLERS = (
    "It rained for most of that week.",
    "Nobody remembers when this began.",
    "The old records agree on this.",
    "Much has been written about it.",
    "Few visitors ever ask.",
    "The winters there are long.",
    "This has been so for years.",
    "Some people would rather not discuss it.",
)


class Atom(NamedTuple):
    """One thing said: a relation between a subject and a value, or its negation."""

    subject: str
    relation: str
    value: str
    negated: bool = False


@dataclass(frozen=True)
class Reading:
    """What a text says: its atoms in order, and the sentences that match no form."""

    atoms: tuple[Atom, ...]
    unread: tuple[str, ...]


def say(atom: Atom, form: int = 0) -> str:
    """The atom as a sentence, in one of its relation's forms (a negation has only one)."""
    relation = RELATIONS[atom.relation]
    template = relation.negation if atom.negated else relation.sentences[form % len(relation.sentences)]
    return template.format(s=atom.subject, v=atom.value)


def say_somehow(atom: Atom, draws: Draws) -> str:
    """The atom as a sentence in a random form."""
    return say(atom, draws.below(len(RELATIONS[atom.relation].sentences)))


def say_together(atoms: Iterable[Atom], form: int = 0) -> str:
    """Atoms with one subject as one sentence, joined by "and"; `form` is 0 or 1, the forms that start with the subject."""
    first, *rest = (say(atom, form % 2).removesuffix(".") for atom in atoms)
    return " and ".join([first, *(part.split(" ", 1)[1] for part in rest)]) + "."


def read(text: str) -> Reading:
    """What `text` says, sentence by sentence, "and" included; the inverse of `say` and `say_together`.

    Names and values are not compared with any world: `World.holds` does that.
    """
    atoms: list[Atom] = []
    unread: list[str] = []
    for sentence in re.findall(r"\S[^.?!\n]*[.?!]?", text):
        found = _read_sentence(sentence.strip())
        atoms += found
        if not found:
            unread.append(sentence.strip())
    return Reading(tuple(atoms), tuple(unread))


def entailment(claim: Collection[Atom], stated: Collection[Atom]) -> str:
    """Whether the `stated` atoms support or refute all of a claim together, or leave it open: one of `LABELS`.

    Another value refutes a functional relation and leaves others open; a symmetric relation is read both ways. One
    refuted atom refutes the claim; otherwise one open atom leaves it open.
    """
    verdicts = [_judge(atom, stated) for atom in claim]
    if REFUTED in verdicts:
        return REFUTED
    return NOT_ENOUGH_INFO if NOT_ENOUGH_INFO in verdicts or not verdicts else SUPPORTED


def same_fact(first: Atom, second: Atom) -> bool:
    """Whether two positive atoms state the same fact."""
    if first == second:
        return True
    return (
        first.relation == second.relation
        and RELATIONS[first.relation].symmetric
        and (first.subject, first.value) == (second.value, second.subject)
    )


def _judge(atom: Atom, stated: Collection[Atom]) -> str:
    positive = atom._replace(negated=False)
    label = NOT_ENOUGH_INFO
    for other in stated:
        if other.relation != atom.relation:
            continue
        if same_fact(positive, other._replace(negated=False)):
            label = REFUTED if other.negated else SUPPORTED
            break
        if other.subject == atom.subject and RELATIONS[atom.relation].functional and not other.negated:
            label = REFUTED
            break
    if atom.negated and label != NOT_ENOUGH_INFO:
        label = REFUTED if label == SUPPORTED else SUPPORTED
    return label


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], str, bool], ...]:
    def pattern(template: str) -> re.Pattern[str]:
        escaped = re.escape(template).replace(r"\{s\}", r"(?P<s>\w+)").replace(r"\{v\}", r"(?P<v>\w+)")
        return re.compile(escaped)

    return tuple(
        (pattern(template), relation.name, negated)
        for relation in RELATIONS.values()
        for template, negated in [*((form, False) for form in relation.sentences), (relation.negation, True)]
    )


@cache
def _form_of_words() -> dict[str, list[tuple[re.Pattern[str], str, bool]]]:
    """The patterns by their longest fixed word, so that few are tried on a sentence."""
    index: dict[str, list[tuple[re.Pattern[str], str, bool]]] = {}
    for pattern, name, negated in _patterns():
        words = re.findall(r"\w+", re.sub(r"\(\?P<.>\\w\+\)", "", pattern.pattern).replace("\\", ""))
        index.setdefault(max(words, key=len), []).append((pattern, name, negated))
    return index


def _read_simple(sentence: str) -> list[Atom]:
    index = _form_of_words()
    for word in dict.fromkeys(re.findall(r"\w+", sentence)):
        for pattern, name, negated in index.get(word, ()):
            if match := pattern.fullmatch(sentence):
                return [Atom(match["s"], name, match["v"], negated)]
    return []


def _read_sentence(sentence: str) -> list[Atom]:
    sentence = sentence if sentence.endswith(".") else f"{sentence}."
    if (atoms := _read_simple(sentence)) or " and " not in sentence:
        return atoms
    subject = sentence.split(" ", 1)[0]
    first, *rest = sentence.removesuffix(".").split(" and ")
    parts = [_read_simple(f"{part}.") for part in [first, *(f"{subject} {part}" for part in rest)]]
    return [part[0] for part in parts] if all(parts) else []
