"""The facts of a world: invented entities, typed relations between them, and passages that state them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from core.data.cache import digest
from core.data.world.draws import Draws
from core.data.world.relations import ENTITY_KINDS, Relation
from core.data.world.sentences import FILLERS, Atom, say_somehow
from core.data.world.vocabulary import RELATIONS, WORDS
from core.errors import InvalidInput, unknown_name

SPLITS = ("train", "valid", "test")
# A change of how worlds are made, said so that nothing kept from an older one is mistaken for the new.
_RECIPE = "1"

_VOWELS = "aeiou"
_ONSETS = (*"bdfghjklmnprstvwz", "br", "dr", "gl", "kl", "pl", "st", "tr")
_ENDINGS = {
    "person": ("", "l", "n", "r", "s", "th"),
    "company": ("mill", "tex", "yard", "tron"),
    "town": ("ford", "holm", "wick", "stead"),
    "river": ("ne", "sk"),
    "language": ("ish", "ese"),
}
_SENTENCES_PER_PASSAGE = 4


@dataclass(frozen=True)
class Entity:
    """Somebody or something with a name that nothing else in the world has; all its facts are in one split."""

    name: str
    kind: str
    split: str


@dataclass(frozen=True)
class Fact:
    """One true statement of the world; `id` is its position in `World.facts`."""

    id: int
    subject: str
    relation: str
    value: str
    split: str

    @property
    def atom(self) -> Atom:
        """The fact as something that can be said and judged."""
        return Atom(self.subject, self.relation, self.value)


@dataclass(frozen=True)
class Passage:
    """Sentences about `title`; `facts[i]` is the id of the fact that sentence i states, None when it states none."""

    title: str
    sentences: tuple[str, ...]
    facts: tuple[int | None, ...]

    @property
    def text(self) -> str:
        """The sentences, joined."""
        return " ".join(self.sentences)

    @property
    def stated(self) -> tuple[int, ...]:
        """The ids of the facts that the passage supports."""
        return tuple(fact for fact in self.facts if fact is not None)


@dataclass(frozen=True)
class Knowledge:
    """Entities, facts and passages, all determined by the seed and the sizes (see `core.data.world`)."""

    seed: int = 0
    num_people: int = 400
    num_companies: int = 60
    num_towns: int = 60
    num_values: int = 16

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InvalidInput(f"The seed of a world is an integer >= 0; got {self.seed}.")
        # A tenth is the valid split, in which somebody with three friends still needs three others to be told from.
        for name, least in (("num_people", 80), ("num_companies", 50), ("num_towns", 50)):
            if not least <= getattr(self, name) <= 20_000:
                raise InvalidInput(
                    f"{name} is {least} to 20000, so that every split has enough entities; got {getattr(self, name)}."
                )
        if not 6 <= self.num_values <= 24:
            raise InvalidInput(f"A relation has 6 to 24 values (months at most 12); got num_values={self.num_values}.")

    @cached_property
    def entities(self) -> tuple[Entity, ...]:
        """All entities: a tenth of each kind in valid, a fifth in test, the rest in train."""
        sizes = {"person": self.num_people, "company": self.num_companies, "town": self.num_towns}
        return tuple(
            Entity(name, kind, _split_of_position(position, size))
            for kind, size in sizes.items()
            for position, name in enumerate(self._invented[kind][:size])
        )

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every fact; a fact and all entities in it are in one split."""
        draws = Draws(self.seed, 2)
        triples: list[tuple[str, str, str, str]] = []
        for split in SPLITS:
            friends = _friendships(self.names("person", split), draws)
            for kind in ENTITY_KINDS:
                for name in self.names(kind, split):
                    for relation in RELATIONS.values():
                        if relation.subject == kind:
                            values = (
                                friends[name] if relation.symmetric else self._draw_values(name, relation, split, draws)
                            )
                            triples += [(name, relation.name, value, split) for value in values]
        return tuple(Fact(number, *triple) for number, triple in enumerate(triples))

    @cached_property
    def content_hash(self) -> str:
        """The sha256 of all that tasks are made of: recipe, facts, and the forms of every relation."""
        facts = (f"{fact.subject}\t{fact.relation}\t{fact.value}\t{fact.split}" for fact in self.facts)
        return digest([_RECIPE, repr((*RELATIONS.values(), FILLERS)), *facts])

    def names(self, kind: str, split: str) -> tuple[str, ...]:
        """The names of a kind of entity in a split, or the words of a plain kind (shared by all splits)."""
        if kind in ENTITY_KINDS:
            return self._entity_names[kind, split]
        return self._words[kind]

    def facts_about(self, subject: str) -> tuple[Fact, ...]:
        """The facts with this subject. Raises `InvalidInput` for a name that is not in the world."""
        if subject not in self._by_subject:
            raise unknown_name("entity", subject, self._by_subject)
        return self._by_subject[subject]

    def values(self, subject: str, relation: str) -> tuple[str, ...]:
        """The true values, one for a functional relation; empty when the relation does not apply."""
        return tuple(fact.value for fact in self.facts_of(subject, relation))

    def facts_of(self, subject: str, relation: str) -> tuple[Fact, ...]:
        """The facts with this subject and relation."""
        return self._by_relation.get((subject, relation), ())

    def holds(self, atom: Atom) -> bool:
        """Whether the atom is true in the world (closed: what is no fact is false)."""
        return (atom.value in self.values(atom.subject, atom.relation)) != atom.negated

    def candidates(self, relation: Relation, split: str) -> tuple[str, ...]:
        """Every value that the relation can take in a split."""
        return self.names(relation.value, split)

    def passages(
        self, split: str | None = None, *, variants: int = 1, noise: float = 0.0, seed: int = 0
    ) -> list[Passage]:
        """The split's facts (None: all) as text: each fact stated `variants` times, four to a passage about its subject.

        Variants differ in wording and in which facts stand together. `noise` is the chance of a sentence without a
        fact after each sentence.
        """
        if split is not None and split not in SPLITS:
            raise unknown_name("split of the world", split, SPLITS)
        if variants < 1 or not 0 <= noise <= 1 or seed < 0:
            raise InvalidInput(
                f"Passages take variants >= 1, noise from 0 to 1 and a seed >= 0; got {variants}, {noise} and {seed}."
            )
        result: list[Passage] = []
        for part in SPLITS if split is None else (split,):
            draws = Draws(self.seed, 3, SPLITS.index(part), seed)
            for _ in range(variants):
                for entity in self.entities:
                    if entity.split == part:
                        facts = draws.shuffled(self.facts_about(entity.name))
                        pieces = -(-len(facts) // _SENTENCES_PER_PASSAGE)
                        result += [render(facts[piece::pieces], draws, noise) for piece in range(pieces)]
        return result

    @cached_property
    def _invented(self) -> dict[str, list[str]]:
        draws = Draws(self.seed, 1)
        counts = {
            "person": self.num_people,
            "company": self.num_companies,
            "town": self.num_towns,
            "river": self.num_values,
            "language": self.num_values,
        }
        taken = {word.capitalize() for words in WORDS.values() for word in words}
        invented: dict[str, list[str]] = {}
        for kind, count in counts.items():
            names: list[str] = []
            while len(names) < count:
                name = _invent(kind, draws)
                if name not in taken:
                    taken.add(name)
                    names.append(name)
            invented[kind] = names
        return invented

    @cached_property
    def _words(self) -> dict[str, tuple[str, ...]]:
        draws = Draws(self.seed, 4)
        words = {kind: tuple(draws.shuffled(words)[: self.num_values]) for kind, words in WORDS.items()}
        return {**words, **{kind: tuple(self._invented[kind]) for kind in ("river", "language")}}

    @cached_property
    def _entity_names(self) -> dict[tuple[str, str], tuple[str, ...]]:
        names: dict[tuple[str, str], list[str]] = {(kind, split): [] for kind in ENTITY_KINDS for split in SPLITS}
        for entity in self.entities:
            names[entity.kind, entity.split].append(entity.name)
        return {key: tuple(value) for key, value in names.items()}

    @cached_property
    def _by_subject(self) -> MappingProxyType[str, tuple[Fact, ...]]:
        found: dict[str, list[Fact]] = {entity.name: [] for entity in self.entities}
        for fact in self.facts:
            found[fact.subject].append(fact)
        return MappingProxyType({name: tuple(facts) for name, facts in found.items()})

    @cached_property
    def _by_relation(self) -> MappingProxyType[tuple[str, str], tuple[Fact, ...]]:
        found: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            found.setdefault((fact.subject, fact.relation), []).append(fact)
        return MappingProxyType({key: tuple(facts) for key, facts in found.items()})

    def _draw_values(self, subject: str, relation: Relation, split: str, draws: Draws) -> list[str]:
        count = 1 + draws.below(relation.most)
        others = [name for name in draws.sample(self.candidates(relation, split), count + 1) if name != subject]
        return others[:count]


def render(facts: Iterable[Fact], draws: Draws, noise: float = 0.0) -> Passage:
    """A passage that states the facts in the order given, each in a random form, about the first one's subject."""
    facts = list(facts)
    sentences: list[str] = []
    stated: list[int | None] = []
    for fact in facts:
        sentences.append(say_somehow(fact.atom, draws))
        stated.append(fact.id)
        if noise and draws.chance(noise):
            sentences.append(draws.pick(FILLERS))
            stated.append(None)
    return Passage(facts[0].subject, tuple(sentences), tuple(stated))


def _split_of_position(position: int, size: int) -> str:
    # Names come in random order, so positions are as good as draws and give exact shares.
    valid, test = size // 10, size // 5
    return "valid" if position < valid else "test" if position < valid + test else "train"


def _invent(kind: str, draws: Draws) -> str:
    syllables = "".join(draws.pick(_ONSETS) + draws.pick(_VOWELS) for _ in range(2))
    if kind == "person" and draws.chance(0.3):
        syllables += draws.pick(_ONSETS) + draws.pick(_VOWELS)
    return (syllables + draws.pick(_ENDINGS[kind])).capitalize()


def _friendships(people: Sequence[str], draws: Draws) -> dict[str, list[str]]:
    """Symmetric friendships, one to three for everybody."""
    most = RELATIONS["friend"].most
    friends: dict[str, list[str]] = {name: [] for name in people}
    order = draws.shuffled(people)
    # Pairs first, so that everybody has a friend; chance adds more.
    pairs = [*zip(order[::2], order[1::2], strict=False), (order[-1], order[-2])]
    pairs += [(name, draws.pick(order)) for name in order if draws.chance(0.4)]
    for first, second in pairs:
        room = len(friends[first]) < most and len(friends[second]) < most
        if room and first != second and second not in friends[first]:
            friends[first].append(second)
            friends[second].append(first)
    return friends
