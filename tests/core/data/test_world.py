"""The world's truth, recomputed: by look-up, from the words alone, and by enumerating possible worlds."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.data.world import (
    LABELS,
    RELATIONS,
    SPLITS,
    TASKS,
    Atom,
    World,
    entailment,
    read,
    same_fact,
    say,
    say_together,
)
from core.data.world.draws import Draws
from core.data.world.sentences import FILLERS
from core.errors import InvalidInput

LEVELS = {"questions": 5, "multiple_choice": 5, "dialogues": 5, "sums": 8, "statements": 5}
EVERY_LEVEL = [(task, level) for task, highest in LEVELS.items() for level in range(1, highest + 1)]
PHRASES = {name: relation.phrase for name, relation in RELATIONS.items() if relation.phrase}


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def large():
    """So many entities that no value is frequent by chance."""
    return World(num_people=2000, num_companies=1000, num_towns=1000)


def names(world, split):
    return {entity.name for entity in world.entities if entity.split == split}


def solve(question, atoms):
    """Every answer that the atoms give to the question; parses the question with nothing but its templates."""
    for relation in RELATIONS.values():
        for template in relation.questions:
            if match := re.fullmatch(re.escape(template).replace(r"\{s\}", "(.+)"), question):
                return {value for subject in resolve(match[1], atoms) for value in follow(subject, relation, atoms)}
    raise AssertionError(f"cannot parse {question!r}")


def resolve(phrase, atoms):
    for name, form in PHRASES.items():
        if match := re.fullmatch(re.escape(form).replace(r"\{s\}", "(.+)"), phrase):
            return {value for subject in resolve(match[1], atoms) for value in follow(subject, RELATIONS[name], atoms)}
    assert " " not in phrase, phrase
    return {phrase}


def follow(subject, relation, atoms):
    found = {atom.value for atom in atoms if (atom.subject, atom.relation) == (subject, relation.name)}
    if relation.symmetric:
        found |= {atom.subject for atom in atoms if (atom.value, atom.relation) == (subject, relation.name)}
    return found


def test_relations_are_typed_and_functional_ones_have_one_value(world):
    kinds = {entity.name: entity.kind for entity in world.entities}
    assert len(kinds) == len(world.entities)
    for name, kind in kinds.items():
        for relation in RELATIONS.values():
            values = world.values(name, relation.name)
            if relation.subject != kind:
                assert not values
                continue
            assert 1 <= len(values) <= relation.most
            assert len(set(values)) == len(values)
            assert name not in values
            for value in values:
                assert kinds.get(value, relation.value) == relation.value
                assert not relation.symmetric or name in world.values(value, relation.name)
    assert {relation.name for relation in RELATIONS.values() if relation.functional} > {"job", "home", "seat", "river"}
    assert [fact.id for fact in world.facts] == list(range(len(world.facts)))


def test_a_fact_and_all_entities_in_it_are_in_one_split(world):
    split = {entity.name: entity.split for entity in world.entities}
    shares = Counter(entity.split for entity in world.entities if entity.kind == "person")
    assert shares == {"train": 280, "valid": 40, "test": 80}
    for fact in world.facts:
        assert split[fact.subject] == fact.split == split.get(fact.value, fact.split)


def test_sizes_are_those_asked_for():
    world = World(seed=3, num_people=90, num_companies=70, num_towns=55, num_values=7)
    assert Counter(entity.kind for entity in world.entities) == {"person": 90, "company": 70, "town": 55}
    assert {len(world.names(kind, "train")) for kind in ("job", "river", "language", "month")} == {7}


def test_holds_is_the_list_of_facts(world):
    true = {fact.atom for fact in world.facts}
    for atom in itertools.islice(true, 500):
        assert world.holds(atom)
        assert not world.holds(atom._replace(negated=True))
    for first, second in itertools.pairwise(fact.atom for fact in world.facts[:500]):
        swapped = first._replace(value=second.value)
        assert world.holds(swapped) == (swapped in true)
    with pytest.raises(InvalidInput, match="Unknown entity 'Nobody'"):
        world.facts_about("Nobody")


@pytest.mark.parametrize("relation", RELATIONS.values(), ids=RELATIONS)
def test_every_form_is_read_back_as_what_it_says(relation):
    atom = Atom("Belor", relation.name, "march")
    texts = [say(atom, form) for form in range(len(relation.sentences))]
    assert len(set(texts)) == 4
    for text in texts:
        assert read(text).atoms == (atom,)
        assert text.endswith(".")
    denied = atom._replace(negated=True)
    assert read(say(denied)).atoms == (denied,)


def test_atoms_joined_by_and_are_read_back(world):
    for subject in ("Belor",):
        for relations in itertools.permutations([r.name for r in RELATIONS.values() if r.subject == "person"], 3):
            atoms = tuple(
                Atom(subject, name, "ruby", negated) for name, negated in zip(relations, (0, 1, 0), strict=True)
            )
            for form in (0, 1):
                assert read(say_together(atoms, form)).atoms == atoms


def test_what_says_nothing_is_reported_unread():
    assert read(" ".join(FILLERS)).unread == FILLERS
    reading = read("Belor lives in Tamford. Belor flies to Tamford and lives in Rudholm!\nBelor speaks Mish")
    assert reading.atoms == (Atom("Belor", "home", "Tamford"), Atom("Belor", "language", "Mish"))
    assert reading.unread == ("Belor flies to Tamford and lives in Rudholm!",)
    assert read("") == read(" \n") == type(reading)((), ())


PEOPLE, TOWNS, TONGUES = ("Ann", "Bo", "Cy"), ("Ham", "Rix", "Tor", "Ulm"), ("Nish", "Obish")


def possible_worlds():
    """Everything that three people can be like: one of four towns, any languages, any friendships (all symmetric)."""
    pairs = list(itertools.combinations(PEOPLE, 2))
    for homes in itertools.product(TOWNS, repeat=2):
        for spoken in itertools.product((False, True), repeat=4):
            for met in itertools.product((False, True), repeat=3):
                true = {Atom(name, "home", town) for name, town in zip(PEOPLE, homes, strict=False)}
                true |= {
                    Atom(name, "language", tongue)
                    for (name, tongue), yes in zip(itertools.product(PEOPLE[:2], TONGUES), spoken, strict=True)
                    if yes
                }
                for (one, other), yes in zip(pairs, met, strict=True):
                    true |= {Atom(one, "friend", other), Atom(other, "friend", one)} if yes else set()
                yield true


WORLDS = list(possible_worlds())
ATOMS = [
    *(Atom(name, "home", town) for name in PEOPLE[:2] for town in TOWNS),
    *(Atom(name, "language", tongue) for name in PEOPLE[:2] for tongue in TONGUES),
    *(Atom(one, "friend", other) for one, other in itertools.permutations(PEOPLE, 2)),
]


@given(
    st.sampled_from(WORLDS),
    st.lists(st.sampled_from(ATOMS), max_size=4),
    st.lists(
        st.tuples(st.sampled_from(ATOMS), st.booleans()), min_size=1, max_size=3, unique_by=lambda part: part[0][:2]
    ),
)
def test_entailment_is_truth_in_all_possible_worlds(actual, said, parts):
    stated = [atom._replace(negated=atom not in actual) for atom in said]
    # More than two denied towns would leave one by exclusion, which takes counting and is not claimed.
    denied = Counter(atom.subject for atom in set(stated) if atom.negated and atom.relation == "home")
    claim = [atom._replace(negated=negated) for atom, negated in parts]
    # A claim that says one fact twice may contradict itself, which is not asked about either.
    positive = [atom._replace(negated=False) for atom in claim]
    if max(denied.values(), default=0) > 2 or any(itertools.starmap(same_fact, itertools.combinations(positive, 2))):
        return
    left = [true for true in WORLDS if all((atom._replace(negated=False) in true) != atom.negated for atom in stated)]
    truths = {all((atom._replace(negated=False) in true) != atom.negated for atom in claim) for true in left}
    assert entailment(claim, stated) == ("not enough info" if len(truths) == 2 else LABELS[not truths.pop()])


def test_nothing_claimed_is_not_supported():
    assert entailment([], [ATOMS[0]]) == "not enough info"


def test_passages_state_every_fact_of_the_split_as_often_as_asked(world):
    for variants in (1, 3):
        passages = world.passages("test", variants=variants)
        stated = Counter(number for passage in passages for number in passage.stated)
        assert stated == Counter({fact.id: variants for fact in world.facts if fact.split == "test"})
    assert len(world.passages()) == sum(len(world.passages(split)) for split in SPLITS)
    texts = [passage.text for passage in passages]
    assert len(set(texts)) > 0.99 * len(texts)


def test_passages_say_what_they_state_and_nothing_else(world):
    passages = world.passages("valid", noise=0.25)
    blank = sum(number is None for passage in passages for number in passage.facts)
    assert 0.2 < blank / sum(len(passage.stated) for passage in passages) < 0.3
    for passage in passages:
        reading = read(passage.text)
        assert reading.atoms == tuple(world.facts[number].atom for number in passage.stated)
        assert set(reading.unread) <= set(FILLERS)
        assert all(atom.subject == passage.title for atom in reading.atoms)


@pytest.mark.parametrize("level", range(1, 6))
@pytest.mark.parametrize("task", ["questions", "multiple_choice"])
def test_answers_follow_from_the_passages_alone_and_from_the_facts(world, task, level):
    every = [fact.atom for fact in world.facts]
    shown = {1: (1, 1, 1), 2: (1, 1, 1), 3: (1, 3, 4), 4: (2, 3, 3), 5: (3, 5, 5)}[level]
    for item in getattr(world, task)(60, "test", level):
        assert (item.hops, len(item.passages)) == (shown[0], shown[1 + (task == "multiple_choice")])
        atoms = [read(passage.text).atoms for passage in item.passages]
        found = solve(item.question, sum(atoms, ()))
        right = {item.options[item.answer]} if task == "multiple_choice" else set(item.answers)
        true = solve(item.question, every)
        assert right <= found <= true
        if task == "questions":
            assert found == true == right
        assert all(answer not in item.question and answer in item.prompt for answer in right)
        # The supporting passages are enough; without any one of them a chain breaks.
        assert solve(item.question, sum((atoms[i] for i in item.support), ())) >= right
        if RELATIONS[world.facts[item.facts[-1]].relation].functional:
            assert len(item.support) == item.hops
            for gone in item.support:
                assert not solve(item.question, sum(atoms[:gone] + atoms[gone + 1 :], ()))
        assert {world.facts[number].value for number in item.facts} >= right
        if task == "multiple_choice":
            assert len(set(item.options)) == 4
            assert set(item.options) & true == right
            kind = RELATIONS[world.facts[item.facts[-1]].relation].value
            assert set(item.options) <= set(world.names(kind, "test"))
            if level == 3:
                assert all(
                    f" {option}" in item.prompt.split("Question:")[0] or option in str(atoms) for option in item.options
                )


def test_the_first_answer_is_the_one_stated_first(world):
    several = [item for item in world.questions(300, "train", 3) if len(item.answers) > 1]
    assert len(several) > 10
    for item in several:
        if "friend" not in item.question:
            text = " ".join(passage.text for passage in item.passages if item.passages.index(passage) in item.support)
            assert [text.index(answer) for answer in item.answers] == sorted(
                text.index(answer) for answer in item.answers
            )


@pytest.mark.parametrize("level", [1, 3, 5])
def test_closed_book_items_are_answered_by_the_passages_of_their_split(world, level):
    atoms = read(" ".join(passage.text for passage in world.passages("test"))).atoms
    for item in world.questions(40, "test", level, context=False):
        assert item.passages == item.support == ()
        assert item.prompt.startswith("Question: ")
        assert solve(item.question, atoms) == set(item.answers)
    for item in world.multiple_choice(40, "test", level, context=False):
        assert item.passages == ()
        assert solve(item.question, atoms) & set(item.options) == {item.options[item.answer]}


def test_the_right_letter_is_balanced_and_not_in_turn(world):
    letters = [item.answer for item in world.multiple_choice(4000, "train", 1, context=False)]
    assert all(sorted(letters[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 4000, 4))
    after = Counter((second - first) % 4 for first, second in itertools.pairwise(letters[3::4]))
    assert min(after.values()) > 200


def naive_bayes_accuracy(train, test):
    """How well labels are told from words alone, each item being (text, label)."""
    labels = sorted({label for _, label in train})
    counts = {label: Counter() for label in labels}
    for text, label in train:
        counts[label].update(set(re.findall(r"\w+", text)))

    def score(text, label):
        return sum(
            np.log((counts[label][word] + 1) / (len(train) / len(labels) + 2)) for word in set(re.findall(r"\w+", text))
        )

    return np.mean([max(labels, key=lambda label: score(text, label)) == label for text, label in test])


def shape(world, passage):
    """What can be counted in a passage: sentences, relations, and relations that are stated twice."""
    relations = Counter(world.facts[number].relation for number in passage.stated)
    subjects = Counter(world.facts[number].subject for number in passage.stated)
    functional = sum(RELATIONS[name].functional for name in relations)
    return f"n{len(passage.stated)} r{len(relations)} f{functional} s{sorted(subjects.values())} t{sorted(relations.values())}"


@pytest.mark.parametrize("level", [1, 2, 3, 5])
def test_neither_claim_nor_passage_alone_gives_the_label_away(large, level):
    train = large.statements(3000, "train", level)
    test = large.statements(1500, "test", level)
    for part in (
        lambda item: item.claim,
        lambda item: item.passage.text,
        lambda item: shape(large, item.passage),
    ):
        pairs = [[(part(item), item.label) for item in items] for items in (train, test)]
        # Three standard errors above chance.
        assert naive_bayes_accuracy(*pairs) < 1 / 3 + 0.037
    assert Counter(item.label for item in train) == dict.fromkeys(LABELS, 1000)


@pytest.mark.parametrize("level", [1, 3, 4])
def test_the_right_option_cannot_be_told_without_the_question(large, level):
    train, test = (large.multiple_choice(2500, split, level, context=False) for split in ("train", "test"))
    right, offered = Counter(), Counter()
    for item in train:
        right[item.options[item.answer]] += 1
        offered.update(item.options)
    guesses = {
        "frequent": lambda item: [right[option] / max(1, offered[option]) for option in item.options],
        "long": lambda item: [len(option) for option in item.options],
        "late": lambda item: item.options,
    }
    for score in guesses.values():
        hits = [np.argmax(np.unique(score(item), return_inverse=True)[1]) == item.answer for item in test]
        assert abs(np.mean(hits) - 0.25) < 0.045


@pytest.mark.parametrize("level", range(1, 6))
def test_labels_of_statements_follow_from_the_words(world, level):
    items = world.statements(300, "test", level)
    assert {item.passage.title for item in items} <= names(world, "test")
    for item in items:
        assert read(item.claim) == type(read(""))(item.atoms, ())
        said = {(atom.subject, atom.relation): atom.value for atom in read(item.passage.text).atoms}
        judged = [
            None if key not in said else (said[key] == atom.value) != atom.negated
            for atom in item.atoms
            if (key := (atom.subject, atom.relation))
        ]
        label = "refuted" if False in judged else "not enough info" if None in judged else "supported"
        assert item.label == label
        assert len(item.atoms) == {4: 2, 5: 3}.get(level, 1)
        chosen = read(" ".join(item.passage.sentences[i] for i in item.evidence)).atoms
        assert entailment(item.atoms, chosen) == label
        assert len(chosen) == {"supported": len(judged), "refuted": judged.count(False)}.get(label, 0)
        if level == 1 and label == "supported":
            assert item.claim in item.passage.sentences
        if level == 2:
            assert item.claim not in item.passage.sentences
    assert any(atom.negated for item in items for atom in item.atoms) == (level >= 3)


TELLING = [
    (re.compile(re.escape(form).replace(r"\{v\}", r"(\w+)")), relation)
    for relation in RELATIONS.values()
    for form in (*relation.says, *relation.answers)
]


@pytest.mark.parametrize("level", range(1, 6))
def test_summaries_state_exactly_what_is_told(world, level):
    kinds = {relation.value: {*world.names(relation.value, "test")} for relation in RELATIONS.values()}
    changed = 0
    for item in world.dialogues(150, "test", level):
        assert len(item.turns) == 4 * level
        assert {speaker for speaker, _ in item.turns} == set(item.speakers)
        told = {
            Atom(speaker, relation.name, match[1])
            for speaker, words in item.turns
            for pattern, relation in TELLING
            if (match := pattern.fullmatch(words)) and match[1] in kinds[relation.value]
        }
        assert told == {world.facts[number].atom for number in item.facts}
        assert len(told) == level
        assert all(map(world.holds, told))
        for summary in item.summaries:
            reading = read(summary)
            assert set(reading.atoms) == told
            assert len(reading.atoms) == level
            assert len(reading.unread) == (level > 1)
            if item.plan:
                assert f"at the {item.plan.place}" in summary
                assert f"n {item.plan.day}" in summary
        days = re.findall(r"\w+day", " ".join(words for _, words in item.turns[-2:]))
        assert (item.plan is not None) == bool(days) == (level > 1)
        if days:
            assert item.plan.day == days[-1]
            changed += len(days) - 1
    assert (0 < changed < 150 * 2) == (level >= 3)


SIGNS = (
    ("/", r"equal|one part in"),
    ("*", r" times"),
    ("+", r"more|another|finds|adds|Another|arrive"),
    ("-", r"gives|loses|sells|spends|costs|returns|takes over|cancelled|finishes"),
)


@pytest.mark.parametrize("steps", range(1, 9))
def test_sums_are_solved_by_their_story_and_by_their_working(world, steps):
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: divmod(a, b)[0]}
    for item in world.sums(200, "test", steps):
        begin, *story = re.findall(r"[^.?]+[.?]", item.question)
        value = int(*re.findall(r"\d+", begin))
        *lines, last = item.solution.split("\n")
        assert len(lines) == len(story) - 1 == steps
        for sentence, line in zip(story[:-1], lines, strict=True):
            sign = next(sign for sign, words in SIGNS if re.search(words, sentence))
            operand = int(*re.findall(r"\d+", sentence))
            result = compute[sign](value, operand)
            assert sign != "/" or result * operand == value
            assert line.startswith(f"{value} {sign} {operand} = <<{value}{sign}{operand}={result}>>{result} ")
            value = result
            assert 1 <= value <= 200
        assert last == f"#### {value}"
        assert item.answer == value
        assert "<" not in item.plain_solution
        assert item.plain_solution.split("\n")[0] == re.sub("<<.*>>", "", lines[0])


def test_no_calculation_is_in_two_splits(world):
    seen = {
        split: {"".join(re.findall(r"<<.*?>>", item.solution)) for item in world.sums(2000, split, 1)}
        for split in SPLITS
    }
    assert len(seen["train"]) > 1000
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["valid"]
    assert not seen["valid"] & seen["test"]


@pytest.mark.parametrize("task", TASKS)
def test_no_name_of_another_split_occurs_in_a_prompt_or_completion(world, task):
    for split in SPLITS:
        foreign = {entity.name for entity in world.entities} - names(world, split)
        for level in (1, LEVELS[task]):
            for item in getattr(world, task)(100, split, level):
                assert item.split == split
                assert not foreign & set(re.findall(r"\w+", item.prompt + item.completion))


@pytest.mark.parametrize(("task", "level"), EVERY_LEVEL)
def test_items_depend_on_nothing_but_the_request(world, task, level):
    make = getattr(world, task)
    items = make(40, "train", level, 5)
    assert make(15, "train", level, 5) == items[:15]
    assert make(40, "train", level, 6) != items
    assert len({item.prompt for item in items}) > 35
    assert make(0, "train", level) == []
    assert all(item.completion[0] == " " and item.prompt[-1] == ":" for item in items)


def test_prompts_grow_with_the_level(world):
    for task, highest in LEVELS.items():
        sizes = [
            np.mean([len(item.prompt) for item in getattr(world, task)(100, "train", level)])
            for level in range(1, highest + 1)
        ]
        assert sizes[-1] > 1.8 * sizes[0]
        # The third level of multiple choice has one passage more than the fourth.
        assert all(second > 0.7 * first for first, second in itertools.pairwise(sizes))


def test_sequences_of_relations_are_equally_frequent(world):
    items = world.questions(1700, "train", 3)
    asked = Counter(world.facts[item.facts[-1]].relation for item in items)
    assert set(asked) == set(RELATIONS)
    assert max(asked.values()) - min(asked.values()) <= 1
    answers = Counter(item.answers[0] for item in world.questions(4000, "train", 1) if "job" in item.question)
    assert max(answers.values()) < 2.5 * np.mean(list(answers.values()))


def test_the_smallest_world_has_enough_for_every_task():
    for seed in range(2):
        small = World(seed, num_people=80, num_companies=50, num_towns=50, num_values=6)
        for split in SPLITS:
            assert min(len(small.values(name, "friend")) for name in small.names("person", split)) >= 1
            for task, level in EVERY_LEVEL:
                items = getattr(small, task)(15, split, level)
                assert len(items) == 15
                if task == "multiple_choice":
                    assert all(len(set(item.options)) == 4 for item in items)


FINGERPRINT = """
from core.data.world import TASKS, World
from core.data.cache import digest
world = World(seed=1, num_people=80, num_companies=50, num_towns=50, num_values=8)
parts = [repr(world.rows(task, 20, "valid", level)) for task in TASKS for level in (1, 3, 5)]
print(world.content_hash, digest([*parts, repr(world.passages(noise=0.5))]))
"""


def test_everything_is_the_same_in_another_process_and_as_it_always_was():
    outputs = [
        subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1]
    # A new value here means new data: say so with a new `_RECIPE` in core.data.world.knowledge.
    assert [value[:16] for value in outputs[0]] == ["c7453733b8ff721f", "2f938ee2da68c385"]


def test_the_content_hash_is_of_the_content(world):
    assert World().content_hash == world.content_hash
    assert len({world.content_hash, World(seed=1).content_hash, World(num_values=17).content_hash}) == 3


def test_draws_are_uniform_and_samples_differ():
    draws = Draws(1, 2)
    counts = np.bincount([draws.below(7) for _ in range(70_000)])
    # The chi-square of six degrees of freedom is below 22.5 in 999 of 1000 cases.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5
    assert 0.29 < np.mean([draws.chance(0.3) for _ in range(20_000)]) < 0.31
    assert not any(draws.chance(0.0) for _ in range(1000))
    assert all(draws.chance(1.0) for _ in range(1000))
    orders = Counter(tuple(draws.shuffled("abc")) for _ in range(6000))
    assert len(orders) == 6
    assert min(orders.values()) > 850
    for count, size in ((3, 100), (3, 5), (9, 5)):
        sample = draws.sample(range(size), count)
        assert len(set(sample)) == len(sample) == min(count, size)
    positions = Counter(number for _ in range(4000) for number in draws.sample(range(40), 2))
    assert min(positions.values()) > 130
    first, second = Draws(1, 2), Draws(2, 1)
    assert [first.below(1000) for _ in range(9)] != [second.below(1000) for _ in range(9)]


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_plain_and_begin_with_what_fine_tuning_needs(world, task):
    items, rows = getattr(world, task)(5, "test", 2), world.rows(task, 5, "test", 2)
    assert json.loads(json.dumps(rows)) == rows
    for item, row in zip(items, rows, strict=True):
        assert list(row)[:2] == ["prompt", "completion"]
        assert (row["prompt"], row["completion"], row["split"]) == (item.prompt, item.completion, "test")
        assert set(row) == {"prompt", "completion", *vars(item)}
    table = world.table(task, "valid", 2)
    assert table.num_rows == 1000
    assert table["text"][0].as_py() == table["prompt"][0].as_py() + table["completion"][0].as_py()
    assert table.slice(0, 5).drop_columns("text").to_pylist() == world.rows(task, 5, "valid", 2)


def test_the_table_of_passages_is_text_with_its_facts(world):
    table = world.table("passages", "test")
    assert table.column_names == ["title", "text", "facts"]
    for row in table.slice(0, 50).to_pylist():
        assert read(row["text"]).atoms == tuple(world.facts[number].atom for number in row["facts"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (lambda world: world.questions(1, "dev"), "Unknown split of the world 'dev'"),
        (lambda world: world.sums(1, "train", 9), "world.sums has the difficulties 1 to 8; got 9"),
        (lambda world: world.dialogues(1, "train", 0), "difficulties 1 to 5; got 0"),
        (lambda world: world.statements(-1), "num=-1"),
        (lambda world: world.multiple_choice(1, seed=-1), "seed=-1"),
        (lambda world: world.rows("question", 1), "Unknown task of the world 'question'. Did you mean questions"),
        (lambda world: world.table("passage", "test"), "Did you mean passages"),
        (lambda world: world.table("sums", "dev"), "split of the world 'dev'"),
        (lambda world: world.table("passages", "test", 2), "no difficulties"),
        (lambda world: world.passages("all"), "Unknown split"),
        (lambda world: world.passages(variants=0), "variants >= 1"),
        (lambda world: world.passages(noise=1.5), "noise from 0 to 1"),
        (lambda world: World(seed=-1), "seed of a world"),
        (lambda world: World(num_people=79), "num_people is 80 to 20000"),
        (lambda world: World(num_towns=20_001), "num_towns is 50 to 20000"),
        (lambda world: World(num_values=25), "6 to 24 values"),
    ],
)
def test_bad_requests_say_what_is_allowed(world, request_, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        request_(world)
