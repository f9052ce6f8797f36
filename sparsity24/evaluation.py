"""How good a language model is, dense or sparse: perplexity, zero-shot accuracy and its offline proxy (reference 5).

perplexity_on(lm, "wikitext2", window=4096)     # by the protocol of that name; any other data set as it stands
zero_shot(lm)                                   # the tasks of the paper, through lm-eval (extra `eval`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data import catalog
from core.data.catalog import LoadedData
from core.errors import DataUnavailable, InvalidInput, require, unknown_name
from core.llm.causal import CausalLM, Perplexity


def hub_lines(data: LoadedData) -> str:
    """WikiText as the literature has it: lines joined with two newlines.

    The Hub's rows keep the newline that ends a line and leave nothing of a blank one; lines of a raw-text file are
    brought to that form, so both homes give the same text.
    """
    return "\n\n".join(line.rstrip("\n") + "\n" if line.strip() else "" for line in data.documents)


def first_documents(data: LoadedData) -> str:
    """The first 1100 documents joined with a space, as the literature takes of C4's validation part."""
    return " ".join(islice(data.documents, 1100))


@dataclass(frozen=True)
class TextProtocol:
    """What text is scored: the split of a data set, how it becomes one string, and how many windows of it."""

    name: str
    split: str
    text: Callable[[LoadedData], str]
    max_windows: int | None = None


WIKITEXT2 = TextProtocol("WikiText-2", "test", hub_lines)
C4 = TextProtocol("C4", "valid", first_documents, max_windows=256)
AS_IT_STANDS = TextProtocol("", "test", lambda data: data.text)

PROTOCOLS = {"wikitext2": WIKITEXT2, "wikitext2_small": WIKITEXT2, "c4": C4}
"""The protocol of every data set that has one of its own; another is taken as it stands."""


@dataclass(frozen=True)
class TextPerplexity:
    """A perplexity with all that it depends on: the protocol, the text, the windows. `str` says it in one line."""

    measured: Perplexity
    protocol: str
    text: str
    cut: bool = False

    @property
    def value(self) -> float:
        """The perplexity."""
        return self.measured.value

    @property
    def log(self) -> float:
        """Its logarithm: the mean over windows of the mean negative log-likelihood a token."""
        return float(self.measured.window_nll.mean())

    @property
    def window(self) -> int:
        """Tokens a window."""
        return self.measured.window

    def __str__(self) -> str:
        """The perplexity with its window, which it depends on."""
        found = self.measured
        how = "non-overlapping" if found.stride == found.window else f"stride {found.stride}"
        count = f"the first {len(found.window_nll)} windows only" if self.cut else f"{len(found.window_nll)} windows"
        name = f"{self.protocol} perplexity" if self.protocol else "Perplexity"
        return f"{name} {found.value:.3f} over {count} of {found.window} tokens ({how}) of {self.text}"


@dataclass(frozen=True)
class TokenizedText:
    """A text that several models of one tokenizer are scored on: its tokens, and what to say of it."""

    ids: list[int]
    protocol: str
    provenance: str
    max_windows: int | None

    def perplexity(
        self, lm: CausalLM, *, window: int | None = None, stride: int | None = None, max_windows: int | None = None
    ) -> TextPerplexity:
        """The perplexity of `lm` on it; the arguments are those of `perplexity_on`."""
        limit = self.max_windows if max_windows is None else max_windows
        measured = lm.perplexity(self.ids, window=window, stride=stride, max_windows=limit)
        return TextPerplexity(measured, self.protocol, self.provenance, cut=max_windows is not None)


def tokenized(lm: CausalLM, data: str, split: str | None = None, *, protocol: str | None = None) -> TokenizedText:
    """The text of a data set by the protocol that its name has, or by `protocol`, tokenised once."""
    if protocol is not None and protocol not in PROTOCOLS:
        raise unknown_name("perplexity protocol", protocol, PROTOCOLS)
    rules = PROTOCOLS.get(protocol or data, AS_IT_STANDS)
    loaded = load_text(data, split, default=rules.split)
    return TokenizedText(lm.encode(rules.text(loaded)), rules.name, loaded.provenance, rules.max_windows)


def perplexity_on(
    lm: CausalLM,
    data: str,
    split: str | None = None,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    protocol: str | None = None,
) -> TextPerplexity:
    """The perplexity of `lm` on a data set (a spec of `core.data.catalog`), by the protocol that its name has.

    The text is tokenised once and cut into windows that do not overlap, the tail is dropped, and every window scores all
    its tokens but the first (reference 5). `protocol` applies one of `PROTOCOLS` to another copy of its data, such as a
    folder. `split` None is the protocol's; a set without splits is taken whole. `window` None is 2048 or the model's
    context, whichever is less. `stride` and `max_windows` depart from the protocol, and the result says so.
    """
    text = tokenized(lm, data, split, protocol=protocol)
    return text.perplexity(lm, window=window, stride=stride, max_windows=max_windows)


def load_text(data: str, split: str | None, *, default: str) -> LoadedData:
    """The split of a data set; with None the split `default`, or the whole of a set that has no splits."""
    if split is not None:
        return catalog.load(data, split or None)
    try:
        return catalog.load(data, default)
    except InvalidInput:
        # A set without splits is taken whole; one that has others says which, in this second error.
        return catalog.load(data)


@dataclass(frozen=True)
class Cloze:
    """Per item: log-probability of the true choice after a softmax over the four, and whether it scored highest."""

    log_likelihood: NDArray[np.float64]
    correct: NDArray[np.bool_]


def cloze(
    lm: CausalLM, ids: Tensor, num_items: int, *, context: int = 32, choice: int = 8, other_context: int = 0
) -> Cloze:
    """The offline zero-shot proxy (reference section 5): which of four endings belongs to the context?

    Windows of 32 + 8 tokens in an order fixed by a seed; the choices are the window's own ending and those of the next
    three. The score of a choice is the sum of its log-probabilities; all have the same length. `other_context` takes each
    item's context from so many items on.
    """
    windows = ids[: len(ids) // (context + choice) * (context + choice)].view(-1, context + choice)
    if len(windows) < 4 or num_items < 1:
        raise InvalidInput(
            f"A cloze item needs its own window of {context + choice} tokens and three others; {num_items} items were "
            f"asked of a text of {len(windows)} windows. Give more text."
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    windows = windows[order[: num_items + 3]]
    num_items = len(windows) - 3
    contexts = [windows[(i + other_context) % num_items, :context].tolist() for i in range(num_items) for _ in range(4)]
    endings = [windows[i + k, context:].tolist() for i in range(num_items) for k in range(4)]
    scores = torch.stack([log_probs.sum() for log_probs in lm.log_probs(contexts, endings)]).view(num_items, 4).double()
    return Cloze(scores.log_softmax(-1)[:, 0].numpy(), (scores.argmax(-1) == 0).numpy())


ZERO_SHOT_TASKS = (
    "boolq",
    "rte",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "piqa",
)
"""The zero-shot tasks of reference 5, by their names in lm-eval."""


def zero_shot(lm: CausalLM, tasks: Sequence[Any] = ZERO_SHOT_TASKS, *, limit: int | None = None) -> pd.DataFrame:
    """A row a task: `acc`, `acc_norm` where the task defines it (else missing) and the number of items; last their mean.

    Tasks are names in lm-eval, or its task objects and configurations; all are asked without examples. `limit` takes the
    first items of each. The mean of `acc_norm` is over the tasks that define it. Raises `MissingExtra` without lm-eval,
    `InvalidInput` on an unknown task or one that has no accuracy, and `DataUnavailable` when its questions cannot be
    reached.
    """
    evaluator = require("lm_eval.evaluator", "eval")
    manager = _task_manager()
    from sparsity24.harness import HarnessLM

    if not tasks or (limit is not None and limit < 1):
        raise InvalidInput(f"Zero-shot evaluation needs at least one task and one item; got {tasks}, limit={limit}.")
    for task in tasks:
        if isinstance(task, str) and task not in manager.all_tasks:
            raise unknown_name("lm-eval task", task, manager.all_tasks)
    loaded = _loaded(manager, list(tasks))
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    greedy = any(task.get_config("output_type") == "loglikelihood" for task in loaded["tasks"].values())
    found = evaluator.evaluate(
        HarnessLM(lm, greedy=greedy), loaded, limit=limit, bootstrap_iters=0, log_samples=False, verbosity=None
    )
    rows = []
    for name in loaded["tasks"]:
        scores = found["results"][name]
        if "acc,none" not in scores:
            raise InvalidInput(f"The task {name} has no accuracy; it gives {', '.join(map(str, scores))}.")
        norm = scores.get("acc_norm,none", np.nan)
        rows.append((name, float(scores["acc,none"]), float(norm), int(found["n-samples"][name]["effective"])))
    table = pd.DataFrame(rows, columns=["task", "acc", "acc_norm", "items"])
    mean = pd.DataFrame(
        {
            "task": ["mean"],
            "acc": [table["acc"].mean()],
            "acc_norm": [table["acc_norm"].mean()],
            "items": [table["items"].sum()],
        }
    )
    return pd.concat([table, mean], ignore_index=True)


@cache
def _task_manager() -> Any:
    # Indexing its thousands of task files takes lm-eval several seconds.
    return require("lm_eval.tasks", "eval").TaskManager()


def _loaded(manager: Any, tasks: list[Any]) -> Any:
    import datasets

    try:
        return manager.load(tasks)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataUnavailable(
            f"lm-eval could not fetch the questions of {', '.join(map(str, tasks))} from the Hugging Face Hub "
            f"({type(error).__name__}: {error}). With a network, run once without HF_HUB_OFFLINE, which fills the cache "
            "(HF_HOME) for later; without one, use the cloze proxy (sparsity24.evaluation.cloze)."
        ) from error
