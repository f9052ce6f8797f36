"""Word problems with worked solutions in the style of GSM8K, one line a step, ending in `#### n`."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from core.data.world.draws import Draws
from core.data.world.knowledge import Knowledge
from core.data.world.requests import start

HIGHEST = 8
# Every intermediate result is an integer of 1 .. _LARGEST.
_LARGEST = 200

_FRAMES = (
    {
        "items": ["apples", "shells", "stamps", "cards", "nuts", "marbles"],
        "start": ("{n} has {x} {i}.", "There are {x} {i} in the bag of {n}.", "{n} owns {x} {i}."),
        "+": ("Then {n} buys {k} more {i}.", "{m} gives {n} another {k} {i}.", "After that {n} finds {k} {i}."),
        "-": ("Then {n} gives {k} {i} to {m}.", "After that {n} loses {k} {i}.", "{n} sells {k} {i} to {m}."),
        "*": (
            "A dealer takes them all and gives {n} {k} times as many {i}.",
            "Then {n} wins a game and has {k} times as many {i}.",
        ),
        "/": (
            "{n} puts the {i} into {k} equal heaps and keeps one heap.",
            "Then {n} shares the {i} equally among {k} people, {n} included.",
        ),
        "end": ("How many {i} does {n} have now?", "How many {i} are left with {n}?"),
    },
    {
        "items": ["coins", "dollars", "pennies"],
        "start": ("{n} earns {x} {i} for a day of work.", "{n} starts the week with {x} {i}.", "{m} pays {n} {x} {i}."),
        "+": ("{m} adds a tip of {k} {i}.", "Then {n} is paid {k} {i} more.", "{n} also finds {k} {i}."),
        "-": ("Then {n} spends {k} {i} at a shop.", "A ticket costs {n} {k} {i}.", "{n} returns {k} {i} to {m}."),
        "*": ("A lucky bet makes it {k} times as much.", "{n} invests it all and gets back {k} times the sum."),
        "/": (
            "{n} divides the {i} equally among {k} people, {n} included.",
            "{n} lays the {i} into {k} equal rows and keeps one row.",
        ),
        "end": ("How many {i} does {n} hold in the end?", "How many {i} does {n} have now?"),
    },
    {
        "items": ["pages", "bricks", "stones", "planks"],
        "start": ("{n} plans to move {x} {i}.", "An order of {x} {i} reaches {n}.", "{n} has {x} {i} to look through."),
        "+": ("{m} asks for {k} {i} more.", "Another {k} {i} arrive.", "Then {n} is sent {k} more {i}."),
        "-": ("{m} takes over {k} {i}.", "{k} {i} are cancelled.", "{n} finishes {k} {i} at once."),
        "*": ("Then the order grows to {k} times its size.", "By mistake the whole order comes {k} times."),
        "/": (
            "The {i} are shared equally by {k} helpers, {n} being one of them.",
            "{n} needs to do only one part in {k}.",
        ),
        "end": ("How many {i} remain for {n}?", "How many {i} does {n} still have to do?"),
    },
)


@dataclass(frozen=True)
class Sum:
    """A word problem; `solution` has one line a step, with calculator marks `<<12+5=17>>`, and the last line `#### n`."""

    question: str
    solution: str
    answer: int
    steps: int
    split: str

    @property
    def plain_solution(self) -> str:
        """The solution without the calculator marks, which make it about a third longer."""
        return re.sub(r"<<[^>]*>>", "", self.solution)

    @property
    def prompt(self) -> str:
        """The question and `Answer:`."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def completion(self) -> str:
        """A space and the solution."""
        return f" {self.solution}"


def sums(world: Knowledge, num: int, split: str, difficulty: int, seed: int) -> list[Sum]:
    """See `World.sums`."""
    draws = start(world, "sums", num, split, difficulty, HIGHEST, seed)
    return [_sum(world, split, difficulty, draws) for _ in range(num)]


def split_of(begin: int, operations: list[tuple[str, int]]) -> str:
    """The split that a calculation belongs to, whatever story is told about it: 70 % train, 10 % valid, 20 % test."""
    text = str(begin) + "".join(f"{sign}{operand}" for sign, operand in operations)
    share = zlib.crc32(text.encode()) % 10
    return "train" if share < 7 else "valid" if share < 8 else "test"


def _sum(world: Knowledge, split: str, steps: int, draws: Draws) -> Sum:
    while True:
        begin = 2 + draws.below(59)
        operations = _operations(begin, steps, draws)
        if split_of(begin, operations) == split:
            break
    frame = draws.pick(_FRAMES)
    name, other = draws.sample(world.names("person", split), 2)
    items = draws.pick(frame["items"])
    sentences = [draws.pick(frame["start"]).format(n=name, m=other, x=begin, i=items)]
    lines = []
    value = begin
    for sign, operand in operations:
        sentences.append(draws.pick(frame[sign]).format(n=name, m=other, k=operand, i=items))
        result = _apply(value, sign, operand)
        lines.append(f"{value} {sign} {operand} = <<{value}{sign}{operand}={result}>>{result} {items}.")
        value = result
    sentences.append(draws.pick(frame["end"]).format(n=name, i=items))
    return Sum(" ".join(sentences), "\n".join([*lines, f"#### {value}"]), value, steps, split)


def _operations(begin: int, steps: int, draws: Draws) -> list[tuple[str, int]]:
    """Operations whose results all are integers of 1 .. `_LARGEST`; never a product after a product."""
    operations: list[tuple[str, int]] = []
    value = begin
    while len(operations) < steps:
        sign = draws.pick("+-+-*/")
        operand = 2 + draws.below(4 if sign in "*/" else 39)
        result = _apply(value, sign, operand)
        whole = sign != "/" or value % operand == 0
        if whole and 1 <= result <= _LARGEST and not (sign == "*" and operations and operations[-1][0] == "*"):
            operations.append((sign, operand))
            value = result
    return operations


def _apply(value: int, sign: str, operand: int) -> int:
    if sign == "+":
        return value + operand
    if sign == "-":
        return value - operand
    return value * operand if sign == "*" else value // operand
