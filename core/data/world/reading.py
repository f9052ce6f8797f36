"""Questions over passages and multiple choice: chains of one to three facts, with what supports them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from core.data.world.draws import Draws
from core.data.world.knowledge import Fact, Knowledge, Passage, render
from core.data.world.relations import Relation
from core.data.world.requests import balanced, numbered, start
from core.data.world.sentences import same_fact
from core.data.world.vocabulary import RELATIONS

LETTERS = "ABCD"


@dataclass(frozen=True)
class Level:
    """What a difficulty of a reading task means."""

    hops: int
    passages: int
    sentences: int
    names: bool
    several: bool


# Answers are plain words at level 1, also names from level 2; relations with several values come at level 3.
LEVELS = {
    1: Level(hops=1, passages=1, sentences=2, names=False, several=False),
    2: Level(hops=1, passages=1, sentences=4, names=True, several=False),
    3: Level(hops=1, passages=3, sentences=3, names=True, several=True),
    4: Level(hops=2, passages=3, sentences=3, names=True, several=False),
    5: Level(hops=3, passages=5, sentences=3, names=True, several=False),
}


@dataclass(frozen=True)
class Question:
    """A question; any one of `answers` is right. `passages` is empty for a closed-book question.

    `support[i]` says that passage `support[i]` (from 0) states a fact that the answer needs; `facts` are the ids of the
    chain, all true answers included.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...]
    support: tuple[int, ...]
    facts: tuple[int, ...]
    hops: int
    split: str

    @property
    def prompt(self) -> str:
        """Numbered passages, the question, and `Answer:`."""
        return f"{numbered(self.passages)}Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        """A space and the first answer."""
        return f" {self.answers[0]}"


@dataclass(frozen=True)
class MultipleChoice:
    """A question with four options, of which exactly `options[answer]` is right; the rest as in `Question`."""

    question: str
    options: tuple[str, ...]
    answer: int
    passages: tuple[Passage, ...]
    support: tuple[int, ...]
    facts: tuple[int, ...]
    hops: int
    split: str

    @property
    def prompt(self) -> str:
        """Numbered passages, the question, one option a line after its letter, and `Answer:`."""
        options = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, self.options, strict=True))
        return f"{numbered(self.passages)}Question: {self.question}\n{options}Answer:"

    @property
    def completion(self) -> str:
        """A space and the letter."""
        return f" {LETTERS[self.answer]}"


def questions(world: Knowledge, num: int, split: str, difficulty: int, seed: int, context: bool) -> list[Question]:
    """See `World.questions`."""
    draws = start(world, "questions", num, split, difficulty, len(LEVELS), seed)
    level = LEVELS[difficulty]
    result = []
    for chain, asked in islice(_draw_chains(world, level, split, draws), num):
        final = world.facts_of(chain[-1].subject, chain[-1].relation)
        passages = _passages(world, [*chain[:-1], *final], level, split, draws) if context else ()
        needed = [*chain[:-1], *final]
        result.append(
            Question(
                asked,
                tuple(fact.value for fact in _as_first_stated(final, passages)),
                passages,
                support_of(world, passages, needed),
                tuple(fact.id for fact in needed),
                len(chain),
                split,
            )
        )
    return result


def multiple_choice(
    world: Knowledge, num: int, split: str, difficulty: int, seed: int, context: bool
) -> list[MultipleChoice]:
    """See `World.multiple_choice`."""
    draws = start(world, "multiple_choice", num, split, difficulty, len(LEVELS), seed)
    level = LEVELS[difficulty]
    result = []
    positions = balanced(range(4), draws)
    for chain, asked in islice(_draw_chains(world, level, split, draws), num):
        last = chain[-1]
        others = _others_with(world, last, split, draws) if difficulty == 3 else None
        options = [fact.value for fact in others or ()]
        options += _false_values(world, last, options, 3 - len(options), split, draws)
        passages = _passages(world, chain, level, split, draws, others) if context else ()
        answer = next(positions)
        options.insert(answer, last.value)
        result.append(
            MultipleChoice(
                asked,
                tuple(options),
                answer,
                passages,
                support_of(world, passages, chain),
                tuple(fact.id for fact in chain),
                len(chain),
                split,
            )
        )
    return result


def support_of(world: Knowledge, passages: Sequence[Passage], needed: Sequence[Fact]) -> tuple[int, ...]:
    """The positions of the passages that state one of the facts (a symmetric one in either direction)."""
    wanted = {fact.id for fact in needed}
    reversible = [fact.atom for fact in needed if RELATIONS[fact.relation].symmetric]
    return tuple(
        position
        for position, passage in enumerate(passages)
        if not wanted.isdisjoint(passage.stated)
        or any(same_fact(atom, world.facts[number].atom) for atom in reversible for number in passage.stated)
    )


@cache
def _chains(level: Level) -> tuple[tuple[Relation, ...], ...]:
    """Every sequence of relations that fits together at this level: the value of one is the subject of the next."""
    last = [
        (relation,)
        for relation in RELATIONS.values()
        if (level.names or not relation.between_entities) and (level.several or relation.functional)
    ]
    chains: list[tuple[Relation, ...]] = list(last)
    for _ in range(level.hops - 1):
        chains = [
            (relation, *chain)
            for chain in chains
            for relation in RELATIONS.values()
            if relation.functional and relation.phrase and relation.value == chain[0].subject
        ]
    return tuple(chains)


def _draw_chains(world: Knowledge, level: Level, split: str, draws: Draws) -> Iterator[tuple[list[Fact], str]]:
    """Endless chains of facts, every sequence of relations equally often, each with the question for it."""
    for relations in balanced(_chains(level), draws):
        # In a small split a sequence may lead back to where it began from everywhere; then the next one is taken.
        for _ in range(50):
            start_at = name = draws.pick(world.names(relations[0].subject, split))
            chain: list[Fact] = []
            for relation in relations:
                chain.append(draws.pick(world.facts_of(name, relation.name)))
                name = chain[-1].value
            if len({start_at, *(fact.value for fact in chain)}) > len(chain):
                phrase = start_at
                for relation in relations[:-1]:
                    phrase = relation.phrase.format(s=phrase)
                yield chain, draws.pick(relations[-1].questions).format(s=phrase)
                break


def _passages(
    world: Knowledge,
    needed: Sequence[Fact],
    level: Level,
    split: str,
    draws: Draws,
    others: Sequence[Fact] | None = None,
) -> tuple[Passage, ...]:
    """One passage for each subject of the needed facts, and one for each of the `others`, in random order.

    Without `others` they are drawn so that there are `level.passages`, each on the final relation.
    """
    by_subject: dict[str, list[Fact]] = {}
    for fact in needed:
        by_subject.setdefault(fact.subject, []).append(fact)
    kind = RELATIONS[needed[-1].relation].subject
    if others is None:
        names = [name for name in draws.sample(world.names(kind, split), level.passages + 3) if name not in by_subject]
        others = [
            draws.pick(world.facts_of(name, needed[-1].relation)) for name in names[: level.passages - len(by_subject)]
        ]
    groups = [*by_subject.values(), *([fact] for fact in others)]
    return tuple(
        render(draws.shuffled([*group, *_more(world, group, level.sentences, draws)]), draws)
        for group in draws.shuffled(groups)
    )


def _more(world: Knowledge, group: Sequence[Fact], size: int, draws: Draws) -> list[Fact]:
    """Other facts about the same subject, so that the passage has `size` sentences where there are enough."""
    rest = [fact for fact in world.facts_about(group[0].subject) if fact not in group]
    return draws.sample(rest, max(0, size - len(group)))


def _false_values(
    world: Knowledge, fact: Fact, options: Sequence[str], count: int, split: str, draws: Draws
) -> list[str]:
    """Values of the same kind that are false for the fact's subject and not among the options already."""
    taken = {fact.subject, *world.values(fact.subject, fact.relation), *options}
    candidates = draws.sample(world.candidates(RELATIONS[fact.relation], split), count + len(taken))
    return [value for value in candidates if value not in taken][:count]


def _others_with(world: Knowledge, fact: Fact, split: str, draws: Draws) -> list[Fact]:
    """Facts of the same relation about three others, with values that differ and are false for the fact's subject.

    In a small split there may be fewer.
    """
    taken = {fact.subject, *world.values(fact.subject, fact.relation)}
    found: list[Fact] = []
    for name in draws.sample(world.names(RELATIONS[fact.relation].subject, split), 16):
        other = draws.pick(world.facts_of(name, fact.relation))
        if name != fact.subject and other.value not in taken:
            taken.add(other.value)
            found.append(other)
            if len(found) == 3:
                break
    return found


def _as_first_stated(facts: Sequence[Fact], passages: Sequence[Passage]) -> list[Fact]:
    """The facts in the order in which the passages state them, which is how a reader answers."""
    order = {number: position for position, number in enumerate(n for passage in passages for n in passage.stated)}
    return sorted(facts, key=lambda fact: order.get(fact.id, 0))
