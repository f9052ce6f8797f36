"""How rows of public data sets become items: a prompt, the demonstration, and the references that a prediction is scored by.

Each function takes rows with the columns of one data set, as the Hub or the repository of its authors has them, and is pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidInput

Messages = tuple[Mapping[str, str], ...]

_CALCULATOR_MARKS = re.compile(r"<<[^>]*>>")


@dataclass(frozen=True)
class Item:
    """A demonstration and what it takes to score another answer to its prompt.

    `group` is equal for items that ask the same thing in other words: a split that is made here keeps them together.
    """

    prompt: str | Messages
    completion: str | Messages
    references: tuple[str, ...]
    group: str

    @property
    def pair(self) -> dict[str, Any]:
        """The demonstration alone, in the prompt-completion format."""
        return {"prompt": self.prompt, "completion": self.completion}


def dialogsum(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """DialogSum: a dialogue and its summary; the test set has three summaries a dialogue.

    The authors' files have them as `summary1` to `summary3` of one row, the Hub as three rows with one dialogue. The first
    is the demonstration, all are references.
    """
    found: dict[str, list[str]] = {}
    for row in rows:
        several = [row[name] for name in ("summary1", "summary2", "summary3") if row.get(name)]
        found.setdefault(row["dialogue"], []).extend(several or [row["summary"]])
    return [
        Item(f"{dialogue}\nSummary:", f" {summaries[0]}", tuple(summaries), dialogue)
        for dialogue, summaries in found.items()
    ]


def tldr(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """TL;DR: a post of Reddit, in the query format of summarize-from-feedback, and its author's summary."""
    items = []
    for row in rows:
        prompt = f"SUBREDDIT: r/{row['subreddit']}\n\nTITLE: {row['title']}\n\nPOST: {row['post']}\n\nTL;DR:"
        summary = row["summary"].strip()
        items.append(Item(prompt, f" {summary}", (summary,), row["post"]))
    return items


def squad(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """SQuAD: a passage with a question; the demonstration is the first annotator's answer, the references are all of them."""
    items = []
    for row in rows:
        answers = tuple(dict.fromkeys(row["answers"]["text"]))
        if not answers:
            raise InvalidInput(
                f"The question {row['question']!r} has no answer; unanswerable questions need squad_v2's metric."
            )
        prompt = f"{row['context']}\nQuestion: {row['question']}\nAnswer:"
        items.append(Item(prompt, f" {answers[0]}", answers, row["context"]))
    return items


def ultrachat(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """UltraChat: a conversation up to the assistant's last turn, which is the demonstration."""
    items = []
    for number, row in enumerate(rows):
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if len(messages) < 2:
            raise InvalidInput(f"Row {number} holds no answer of an assistant to anything. Leave the row out.")
        *asked, answer = messages
        items.append(Item(tuple(asked), (answer,), (answer["content"],), messages[0]["content"]))
    return items


def demonstrations(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """Anybody's rows with `prompt` and `completion`, both texts or both messages; the completion is the reference.

    Raises `InvalidInput`, naming the row, where a column is missing or empty.
    """
    items = []
    for number, row in enumerate(rows):
        prompt, completion = row.get("prompt"), row.get("completion")
        if not prompt or not completion:
            missing = "prompt" if not prompt else "completion"
            raise InvalidInput(f"Row {number} has no {missing}; its columns are {', '.join(row)}. Rename or fill them.")
        if isinstance(prompt, str):
            items.append(Item(prompt, completion, (completion.strip(),), prompt))
        else:
            asked, answer = ([dict(turn) for turn in turns] for turns in (prompt, completion))
            items.append(Item(tuple(asked), tuple(answer), (answer[-1]["content"],), str(asked)))
    return items


def gsm8k(rows: Iterable[Mapping[str, Any]], *, calculator_marks: bool = True) -> list[Item]:
    """GSM8K: a word problem and its worked solution, which ends in `#### n`.

    Without `calculator_marks` the `<<48/2=24>>` that a calculator was to be called by are left out.
    """
    items = []
    for row in rows:
        solution = row["answer"] if calculator_marks else without_marks(row["answer"])
        items.append(Item(f"Question: {row['question']}\nAnswer:", f" {solution}", (row["answer"],), row["question"]))
    return items


def without_marks(solution: str) -> str:
    """A worked solution without its calculator marks."""
    return _CALCULATOR_MARKS.sub("", solution)


def competition(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    r"""MATH: a problem of a competition and its solution, with the answer in the last `\boxed{}`."""
    return [
        Item(f"Problem: {row['problem']}\nSolution:", f" {row['solution']}", (row["solution"],), row["problem"])
        for row in rows
    ]


def metamath(rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    """MetaMathQA: rewritten questions of GSM8K and MATH; all that come from one original question are one group."""
    return [
        Item(f"Question: {row['query']}\nAnswer:", f" {row['response']}", (row["response"],), row["original_question"])
        for row in rows
    ]
