"""Dialogues between two people who tell each other facts, with three reference summaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.data.world.draws import Draws
from core.data.world.knowledge import Fact, Knowledge
from core.data.world.requests import start
from core.data.world.sentences import say, say_together
from core.data.world.vocabulary import RELATIONS

HIGHEST = 5

_GREETINGS = (
    ("Hello {b}, how are you?", "Fine, thank you, {a}."),
    ("Good to see you, {b}!", "You too, {a}. It has been a while."),
    ("Is that you, {b}?", "It is! Hello, {a}."),
    ("Good morning, {b}.", "Good morning, {a}. Cold today, is it not?"),
)
_REACTIONS = (
    "Really? I had no idea.",
    "That is good to hear.",
    "I thought so.",
    "My cousin said something like that.",
    "How interesting.",
    "Well, why not?",
    "You told me last year, I think.",
)
_CHATTER = (
    ("The weather has been odd.", "Yes, it never stops raining."),
    ("Did you hear the noise last night?", "I did, but I fell asleep again."),
    ("I am a little tired.", "Then have some tea."),
    ("The road was full of holes.", "They should mend it at last."),
)
_PLACES = ("market", "station", "library", "harbour", "bridge", "theatre", "garden", "museum", "bakery", "school")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_PROPOSALS = (
    "Shall we meet at the {place} on {day}?",
    "Let us meet at the {place} on {day}.",
    "Come to the {place} on {day}, will you?",
)
_AGREEMENTS = ("Yes, gladly.", "I will be there.", "That suits me.")
_CORRECTIONS = (
    "Not on {old}, I am busy. {day} is better.",
    "I cannot on {old}. What about {day}?",
    "{old} is too early for me, let us say {day}.",
)


@dataclass(frozen=True)
class Plan:
    """What the two agree on at the end."""

    place: str
    day: str


@dataclass(frozen=True)
class Dialogue:
    """Turns of (speaker, words) and what they come to: world facts, a plan, and summaries that state exactly these.

    The first summary always has the same wording and order, the other two vary; all three state the same.
    """

    speakers: tuple[str, str]
    turns: tuple[tuple[str, str], ...]
    summaries: tuple[str, str, str]
    facts: tuple[int, ...]
    plan: Plan | None
    split: str

    @property
    def prompt(self) -> str:
        """One turn a line, then `Summary:`."""
        return "".join(f"{speaker}: {words}\n" for speaker, words in self.turns) + "Summary:"

    @property
    def completion(self) -> str:
        """A space and the first summary."""
        return f" {self.summaries[0]}"


def dialogues(world: Knowledge, num: int, split: str, difficulty: int, seed: int) -> list[Dialogue]:
    """See `World.dialogues`."""
    draws = start(world, "dialogues", num, split, difficulty, HIGHEST, seed)
    return [_dialogue(world, split, difficulty, draws) for _ in range(num)]


def _dialogue(world: Knowledge, split: str, difficulty: int, draws: Draws) -> Dialogue:
    first, second = speakers = draws.sample(world.names("person", split), 2)
    told = _told(world, speakers, difficulty, draws)
    greeting, answer = draws.pick(_GREETINGS)
    turns = [(first, greeting.format(b=second)), (second, answer.format(a=first))]
    blocks = [_exchange(fact, speakers, difficulty, draws) for fact in told]
    if difficulty >= 3:
        for words, reply in draws.sample(_CHATTER, difficulty - 2):
            blocks.insert(draws.below(len(blocks) + 1), [(first, words), (second, reply)])
    turns += [turn for block in blocks for turn in block]
    plan = None
    if difficulty >= 2:
        plan, agreed = _plan(speakers, difficulty, draws)
        turns += agreed
    return Dialogue(
        (first, second),
        tuple(turns),
        _summaries(speakers, told, plan, draws),
        tuple(fact.id for fact in told),
        plan,
        split,
    )


def _told(world: Knowledge, speakers: Sequence[str], count: int, draws: Draws) -> list[Fact]:
    """Facts that the speakers tell about themselves in turn, no relation twice by one speaker."""
    relations = [relation.name for relation in RELATIONS.values() if relation.says]
    by_speaker = {speaker: draws.shuffled(relations) for speaker in speakers}
    begins = draws.below(2)
    tellers = [speakers[(begins + number) % 2] for number in range(count)]
    return [draws.pick(world.facts_of(teller, by_speaker[teller].pop())) for teller in tellers]


def _exchange(fact: Fact, speakers: Sequence[str], difficulty: int, draws: Draws) -> list[tuple[str, str]]:
    """Two turns for one fact: told and acknowledged, or (from difficulty 2) asked for and answered in few words."""
    relation = RELATIONS[fact.relation]
    other = speakers[1] if fact.subject == speakers[0] else speakers[0]
    if difficulty >= 2 and draws.chance(0.5):
        return [
            (other, draws.pick(relation.asked)),
            (fact.subject, draws.pick(relation.answers).format(v=fact.value)),
        ]
    return [(fact.subject, draws.pick(relation.says).format(v=fact.value)), (other, draws.pick(_REACTIONS))]


def _plan(speakers: Sequence[str], difficulty: int, draws: Draws) -> tuple[Plan, list[tuple[str, str]]]:
    """A meeting, agreed in two turns; from difficulty 3 on the day may be changed, which takes the same two turns."""
    place, (day, new) = draws.pick(_PLACES), draws.sample(_DAYS, 2)
    proposal = draws.pick(_PROPOSALS).format(place=place, day=day)
    if difficulty >= 3 and draws.chance(0.5):
        correction = draws.pick(_CORRECTIONS).format(old=day, day=new)
        return Plan(place, new), [(speakers[0], proposal), (speakers[1], correction)]
    return Plan(place, day), [(speakers[0], proposal), (speakers[1], draws.pick(_AGREEMENTS))]


def _summaries(speakers: Sequence[str], told: Sequence[Fact], plan: Plan | None, draws: Draws) -> tuple[str, str, str]:
    order = list(RELATIONS)
    fixed = [
        say_together([fact.atom for fact in sorted(own, key=lambda fact: order.index(fact.relation))])
        for speaker in speakers
        if (own := [fact for fact in told if fact.subject == speaker])
    ]
    grouped = [
        say_together([fact.atom for fact in own], 1)
        for speaker in reversed(speakers)
        if (own := [fact for fact in told if fact.subject == speaker])
    ]
    single = [say(fact.atom, draws.below(4)) for fact in told]
    first, second = speakers
    endings = ("", "", "")
    if plan is not None:
        endings = (
            f" They will meet at the {plan.place} on {plan.day}.",
            f" On {plan.day} they will meet at the {plan.place}.",
            f" {first} and {second} agree to meet at the {plan.place} on {plan.day}.",
        )
    fixed_text, grouped_text, single_text = (
        " ".join(sentences) + ending for sentences, ending in zip((fixed, grouped, single), endings, strict=True)
    )
    return fixed_text, grouped_text, single_text
