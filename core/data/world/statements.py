"""Statements to be checked against a passage: supported, refuted, or not enough info, with the exact truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from core.data.world.draws import Draws
from core.data.world.knowledge import Fact, Knowledge, Passage, render
from core.data.world.relations import ENTITY_KINDS
from core.data.world.requests import balanced, start
from core.data.world.sentences import LABELS, NOT_ENOUGH_INFO, REFUTED, SUPPORTED, Atom, say, say_together
from core.data.world.vocabulary import RELATIONS


@dataclass(frozen=True)
class Level:
    """What a difficulty of statements means."""

    sentences: int
    subjects: int
    atoms: int
    negations: float
    same_form: bool = False


LEVELS = {
    1: Level(sentences=2, subjects=1, atoms=1, negations=0.0, same_form=True),
    2: Level(sentences=4, subjects=1, atoms=1, negations=0.0),
    3: Level(sentences=6, subjects=2, atoms=1, negations=0.3),
    4: Level(sentences=6, subjects=2, atoms=2, negations=0.3),
    5: Level(sentences=8, subjects=2, atoms=3, negations=0.3),
}


@dataclass(frozen=True)
class Statement:
    """A claim, the passage it is checked against, and the label that follows (`sentences.entailment`).

    `atoms` is what the claim says; `evidence` are the positions of the passage's sentences that support it all, or that
    refute a part of it; there is none where the passage leaves the claim open.
    """

    claim: str
    passage: Passage
    label: str
    atoms: tuple[Atom, ...]
    evidence: tuple[int, ...]
    split: str

    @property
    def prompt(self) -> str:
        """The passage, the claim, and `Verdict:`."""
        return f"{self.passage.text}\nClaim: {self.claim}\nVerdict:"

    @property
    def completion(self) -> str:
        """A space and the label."""
        return f" {self.label}"


def statements(world: Knowledge, num: int, split: str, difficulty: int, seed: int) -> list[Statement]:
    """See `World.statements`."""
    draws = start(world, "statements", num, split, difficulty, len(LEVELS), seed)
    level = LEVELS[difficulty]
    # Only people have facts enough for claims of several parts.
    kinds = balanced(ENTITY_KINDS if level.atoms == 1 else ENTITY_KINDS[:1], draws)
    return [
        _statement(world, label, next(kinds), level, split, draws) for label in islice(balanced(LABELS, draws), num)
    ]


def _statement(world: Knowledge, label: str, kind: str, level: Level, split: str, draws: Draws) -> Statement:
    # What a claim speaks of, its values and negations are drawn alike for all labels, and passages are equally long:
    # neither a claim nor a passage alone says anything about the label.
    subject, *others = draws.sample(world.names(kind, split), level.subjects)
    parts = _labels_of_parts(label, level.atoms, draws)
    about = draws.sample(
        [fact for fact in world.facts_about(subject) if RELATIONS[fact.relation].functional], len(parts)
    )
    stated = [fact for fact, part in zip(about, parts, strict=True) if part != NOT_ENOUGH_INFO]
    size = level.sentences // level.subjects
    rest = [fact for fact in world.facts_about(subject) if fact not in about]
    stated += draws.sample(rest, min(size, len(rest)) - len(stated))
    misleading: dict[str, str] = {}
    for other in others:
        same = [fact for each in about for fact in world.facts_of(other, each.relation)]
        misleading = {fact.relation: fact.value for fact in same}
        stated += (same + draws.shuffled([fact for fact in world.facts_about(other) if fact not in same]))[:size]
    passage = render(draws.shuffled(stated), draws)
    atoms = tuple(
        _atom(world, fact, part, misleading.get(fact.relation), level, draws)
        for fact, part in zip(about, parts, strict=True)
    )
    deciding = {fact.id for fact, part in zip(about, parts, strict=True) if part == label != NOT_ENOUGH_INFO}
    return Statement(
        _claim(atoms, about, passage, level, draws),
        passage,
        label,
        atoms,
        tuple(position for position, number in enumerate(passage.facts) if number in deciding),
        split,
    )


def _labels_of_parts(label: str, count: int, draws: Draws) -> list[str]:
    """Labels for the parts of a claim that give the whole claim its label."""
    allowed = {SUPPORTED: (SUPPORTED,), REFUTED: LABELS, NOT_ENOUGH_INFO: (SUPPORTED, NOT_ENOUGH_INFO)}[label]
    return draws.shuffled([label, *(draws.pick(allowed) for _ in range(count - 1))])


def _atom(world: Knowledge, fact: Fact, label: str, misleading: str | None, level: Level, draws: Draws) -> Atom:
    negated = draws.chance(level.negations)
    true = draws.chance(0.5) if label == NOT_ENOUGH_INFO else (label == SUPPORTED) != negated
    value = fact.value
    if not true:
        values = [
            value
            for value in world.candidates(RELATIONS[fact.relation], fact.split)
            if value not in (fact.value, fact.subject)
        ]
        value = misleading if misleading in values and draws.chance(0.5) else draws.pick(values)
    return Atom(fact.subject, fact.relation, value, negated)


def _claim(atoms: Sequence[Atom], about: Sequence[Fact], passage: Passage, level: Level, draws: Draws) -> str:
    """The claim in words: in the passage's own form where the level says so, else in another."""
    if len(atoms) > 1:
        return say_together(atoms, draws.below(2))
    fact, forms = about[0], range(len(RELATIONS[about[0].relation].sentences))
    used = [form for form in forms if say(fact.atom, form) in passage.sentences]
    if used and level.same_form:
        return say(atoms[0], used[0])
    return say(atoms[0], draws.pick([form for form in forms if form not in used]))
