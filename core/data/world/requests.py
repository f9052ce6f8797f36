"""What every task asks for, checked in one place, and labels that are balanced yet cannot be guessed from the order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from core.data.world.draws import Draws
from core.data.world.knowledge import SPLITS, Knowledge, Passage
from core.errors import InvalidInput, unknown_name

T = TypeVar("T")
_TASK_KEYS = {"questions": 10, "multiple_choice": 11, "dialogues": 12, "sums": 13, "statements": 14}


def start(world: Knowledge, task: str, num: int, split: str, difficulty: int, highest: int, seed: int) -> Draws:
    """The draws of one request, so that its items depend on nothing else; raises `InvalidInput` on a bad request."""
    if split not in SPLITS:
        raise unknown_name("split of the world", split, SPLITS)
    if num < 0 or seed < 0:
        raise InvalidInput(f"world.{task} takes a number of items and a seed >= 0; got num={num} and seed={seed}.")
    if not 1 <= difficulty <= highest:
        raise InvalidInput(f"world.{task} has the difficulties 1 to {highest}; got {difficulty}.")
    return Draws(world.seed, _TASK_KEYS[task], SPLITS.index(split), difficulty, seed)


def balanced(options: Sequence[T], draws: Draws) -> Iterator[T]:
    """The options in an endless sequence of random permutations: equally often, yet not in turn."""
    while True:
        yield from draws.shuffled(options)


def numbered(passages: Iterable[Passage]) -> str:
    """The passages as they stand in prompts: `[1] ...`, one a line, the numbers that a citation uses."""
    return "".join(f"[{number}] {passage.text}\n" for number, passage in enumerate(passages, 1))
