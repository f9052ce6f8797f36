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
    """What a difficulty of statements means: what the passage states about the claim's subject, and the claim's parts."""

    functional: int
    others: int
    atoms: int
    negations: float = 0.0
    same_form: bool = False
    second_subject: bool = False


LEVELS = {
    1: Level(functional=2, others=0, atoms=1, same_form=True),
    2: Level(functional=3, others=1, atoms=1),
    3: Level(functional=1, others=2, atoms=1, negations=0.3, second_subject=True),
    4: Level(functional=2, others=1, atoms=2, negations=0.3, second_subject=True),
    5: Level(functional=3, others=0, atoms=3, negations=0.3, second_subject=True),
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
    # Claims are about functional relations, and what a claim or a passage looks like is drawn alike for all labels:
    # neither alone says anything about the label.
    subject, other = draws.sample(world.names(kind, split), 2)
    functional, several = _by_kind(world, subject)
    parts = _labels_of_parts(label, level.atoms, draws)
    about = draws.sample(functional, len(parts))
    stated = [fact for fact, part in zip(about, parts, strict=True) if part != NOT_ENOUGH_INFO]
    rest = draws.shuffled([fact for fact in functional if fact not in about])
    stated += rest[: min(level.functional, len(rest)) - len(stated)]
    misleading: dict[str, str] = {}
    if level.second_subject:
        stated += _of_second_subject(world, other, stated, about, rest, level.atoms)
        misleading = {fact.relation: fact.value for fact in stated if fact.subject == other}
    stated += draws.sample(several, level.others)
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


def _by_kind(world: Knowledge, subject: str) -> tuple[list[Fact], list[Fact]]:
    """The subject's facts of functional relations, and those of relations with several values."""
    facts = world.facts_about(subject)
    return (
        [fact for fact in facts if RELATIONS[fact.relation].functional],
        [fact for fact in facts if not RELATIONS[fact.relation].functional],
    )


def _of_second_subject(
    world: Knowledge, other: str, stated: Sequence[Fact], about: Sequence[Fact], rest: Sequence[Fact], atoms: int
) -> list[Fact]:
    """Facts of the same relations about another: all that the claim speaks of, and all that is stated of its subject.

    There are twice as many as the claim has parts, whatever its label: what the two subjects share does not tell it.
    """
    relations = dict.fromkeys(fact.relation for fact in (*about, *stated, *rest))
    return [world.facts_of(other, name)[0] for name in list(relations)[: 2 * atoms]]


def _labels_of_parts(label: str, count: int, draws: Draws) -> list[str]:
    """Labels for the parts of a claim that give the whole claim its label."""
    allowed = {SUPPORTED: (SUPPORTED,), REFUTED: LABELS, NOT_ENOUGH_INFO: (SUPPORTED, NOT_ENOUGH_INFO)}[label]
    return draws.shuffled([label, *(draws.pick(allowed) for _ in range(count - 1))])


def _atom(world: Knowledge, fact: Fact, label: str, misleading: str | None, level: Level, draws: Draws) -> Atom:
    negated = draws.chance(level.negations)
    true = draws.chance(0.5) if label == NOT_ENOUGH_INFO else (label == SUPPORTED) != negated
    value = fact.value
    if not true:
        wrong = (fact.value, fact.subject)
        values = draws.sample(world.candidates(RELATIONS[fact.relation], fact.split), 3)
        value = next(value for value in values if value not in wrong)
        if misleading is not None and misleading not in wrong and draws.chance(0.5):
            value = misleading
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
