"""The embedded world: invented people, companies and towns, facts about them, and tasks whose truth is known exactly.

    world = World(seed=0, num_people=400)
    item = world.questions(1000, "train", difficulty=3)[0]
    item.prompt, item.completion            # strings for fine-tuning; every other field is the truth behind them
    world.rows("sums", 1000, "test", difficulty=2)   # the same as dictionaries

Everything is a function of the seed and the sizes, the same in every process and on every platform; `content_hash`
names it. Items depend only on (world, task, split, difficulty, seed), and fewer items are the beginning of more.

| task | what | levels |
| --- | --- | --- |
| passages | all facts as text, with the fact of each sentence | `variants`, `noise` |
| questions | one to three facts from numbered passages, or closed-book | 5: passages, distractors, hops |
| multiple_choice | four options, letters balanced | 5: as questions; 3 has distractors from the passages |
| dialogues | two people tell facts and make a plan; three summaries | 5: turns, short answers, changed plans |
| sums | word problems with worked solutions ending in `#### n` | 8: steps |
| statements | supported / refuted / not enough info against a passage | 5: paraphrase, negation, several parts |

**Splits.** A tenth of the entities of each kind is in valid, a fifth in test. No fact crosses: all entities in a fact are
in one split, and a task's names are all of its split, so open-book tasks hold out names and facts together. Plain words
(jobs, foods, rivers ...) are shared. A calculation of `sums` is in one split whatever its story. A **closed-book** task
(`context=False`) needs the passages of the split that it asks about in its training text; only its questions are held out.

**How hard.** A Llama of 0.4 M parameters (BPE of 768) trained from scratch on 20 000 items of level 1, 32 rows a step: on
held-out items `questions` have exact match 0.78 after 750 steps (one CPU-minute) and 0.85 after 1500; after 750 steps
`dialogues` have ROUGE-L 0.83 (exact match 0.40), `sums` numeric match 0.14, and `multiple_choice` is still at chance (0.27).
One run each, 200 test items, worlds of 1000 people (sums: 400). Other levels and `statements` were not measured.

**Truth.** `world.holds(atom)` looks a fact up; `read(text)` turns sentences in any of the world's forms back into atoms;
`entailment(claim, stated)` says what follows from what. Together they judge generated sentences without a model.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from core.data.world import dialogues, reading, statements, sums
from core.data.world.dialogues import Dialogue, Plan
from core.data.world.knowledge import SPLITS, Entity, Fact, Knowledge, Passage
from core.data.world.reading import LETTERS, MultipleChoice, Question
from core.data.world.relations import Relation
from core.data.world.sentences import (
    LABELS,
    NOT_ENOUGH_INFO,
    REFUTED,
    SUPPORTED,
    Atom,
    Reading,
    entailment,
    read,
    same_fact,
    say,
    say_together,
)
from core.data.world.statements import Statement
from core.data.world.sums import Sum
from core.data.world.vocabulary import RELATIONS
from core.errors import InvalidInput, unknown_name

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "LABELS",
    "LETTERS",
    "NOT_ENOUGH_INFO",
    "REFUTED",
    "RELATIONS",
    "SPLITS",
    "SUPPORTED",
    "TASKS",
    "Atom",
    "Dialogue",
    "Entity",
    "Fact",
    "MultipleChoice",
    "Passage",
    "Plan",
    "Question",
    "Reading",
    "Relation",
    "Statement",
    "Sum",
    "World",
    "entailment",
    "read",
    "same_fact",
    "say",
    "say_together",
]

# The tasks with prompts and completions.
TASKS = ("questions", "multiple_choice", "dialogues", "sums", "statements")
TABLE_ROWS = {"train": 10_000, "valid": 1_000, "test": 1_000}


class World(Knowledge):
    """A closed world: its facts (see `Knowledge` for the seed and the sizes) and the tasks about them.

    Larger worlds are harder to learn by heart and no harder to read. Every task raises `InvalidInput` on an unknown
    split or difficulty and on a negative number or seed.
    """

    def questions(
        self, num: int, split: str = "train", difficulty: int = 1, seed: int = 0, *, context: bool = True
    ) -> list[Question]:
        """Questions with all their right answers, over passages unless `context` is False.

        1: a plain word out of one passage of two sentences. 2: also names, four sentences. 3: also relations with several
        values, three passages of three sentences, of which two are about others but on the same relation. 4: two hops,
        one distractor. 5: three hops, five passages. Sequences of relations are equally frequent.
        """
        return reading.questions(self, num, split, difficulty, seed, context)

    def multiple_choice(
        self, num: int, split: str = "train", difficulty: int = 1, seed: int = 0, *, context: bool = True
    ) -> list[MultipleChoice]:
        """Questions as in `questions` with one right option and three false ones of the same kind.

        At 3 the false options are what the passages say about three others (so four passages); elsewhere they are drawn
        from all values of the split. The right letter is equally often each of the four in every run of four items.
        """
        return reading.multiple_choice(self, num, split, difficulty, seed, context)

    def dialogues(self, num: int, split: str = "train", difficulty: int = 1, seed: int = 0) -> list[Dialogue]:
        """Dialogues that state `difficulty` facts of the two speakers in 4, 8, 12, 16 or 20 turns.

        1: one fact, said in a whole sentence. 2: two facts, half of them asked for and answered in few words, and a plan to
        meet. From 3 on also chatter to be left out, and in half of the plans the day is changed. A plan's day and place
        are drawn for each dialogue: a summary cannot be learned by heart.
        """
        return dialogues.dialogues(self, num, split, difficulty, seed)

    def sums(self, num: int, split: str = "train", difficulty: int = 1, seed: int = 0) -> list[Sum]:
        """Word problems of `difficulty` steps (1 to 8), integers of 1 to 200.

        At one step there are only about five thousand calculations, so larger sets repeat some in other stories.
        """
        return sums.sums(self, num, split, difficulty, seed)

    def statements(self, num: int, split: str = "train", difficulty: int = 1, seed: int = 0) -> list[Statement]:
        """Claims with a passage, the three labels equally often.

        1: the claim in the passage's own form, two sentences. 2: in another form, two to four sentences. 3: also about a
        second subject whose values mislead, and 30 % negations. 4: two parts joined by "and". 5: three parts. Neither the
        claim nor the passage alone says anything about the label.
        """
        return statements.statements(self, num, split, difficulty, seed)

    def rows(
        self, task: str, num: int, split: str = "train", difficulty: int = 1, seed: int = 0, **options: bool
    ) -> list[dict[str, Any]]:
        """The items of a task as dictionaries of plain values: `prompt`, `completion`, then the item's fields."""
        if task not in TASKS:
            raise unknown_name("task of the world", task, TASKS)
        items = getattr(self, task)(num, split, difficulty, seed, **options)
        return [{"prompt": item.prompt, "completion": item.completion, **_plain(item)} for item in items]

    def table(self, task: str, split: str, difficulty: int = 1) -> pyarrow.Table:
        """What `embedded:world:TASK:DIFFICULTY` loads: 10 000 rows of train, 1 000 of valid or test, of seed 0.

        Each row has a column `text`, its prompt with its completion. `passages` gives every passage of the split in two
        wordings (`title`, `text`, `facts`) and has no difficulty but 1.
        """
        import pyarrow

        if split not in SPLITS:
            raise unknown_name("split of the world", split, SPLITS)
        if task not in ("passages", *TASKS):
            raise unknown_name("task of the world", task, ("passages", *TASKS))
        if task != "passages":
            rows = self.rows(task, TABLE_ROWS[split], split, difficulty)
            return pyarrow.Table.from_pylist([{"text": row["prompt"] + row["completion"], **row} for row in rows])
        if difficulty != 1:
            raise InvalidInput(f"The world's passages have no difficulties; got {difficulty}.")
        passages = self.passages(split, variants=2)
        return pyarrow.Table.from_pylist(
            [{"title": each.title, "text": each.text, "facts": list(each.stated)} for each in passages]
        )


def _plain(value: Any) -> Any:
    """Dataclasses and atoms as dictionaries, tuples as lists: what JSON and Arrow take."""
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Atom):
        return value._asdict()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
