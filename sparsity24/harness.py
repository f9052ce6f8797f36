"""A `CausalLM` as lm-eval sees one, so that a sparse model in memory is asked without a second load (extra `eval`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from core.errors import InvalidInput
from core.llm.causal import CausalLM

_DEFAULT_CONTEXT = 2048
_DEFAULT_NEW_TOKENS = 256
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


class HarnessLM(TemplateLM):  # type: ignore[misc]
    """Answers the three kinds of requests of lm-eval from a `CausalLM`.

    Text becomes tokens as lm-eval's own transformers adapter has it. What does not fit the model's context loses its
    beginning. `greedy` False leaves out whether a continuation is the greedy one (it is then said not to be): finding out
    takes a generation, and multiple choice never asks.
    """

    def __init__(self, lm: CausalLM, *, greedy: bool = True) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.greedy = lm, lm.tokenizer, greedy
        self.max_length = lm.context_length or _DEFAULT_CONTEXT

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: the start token, or the end token where there is none."""
        start = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if start is None else start
        if found is None:
            raise InvalidInput("This tokenizer has neither a start nor an end token, and lm-eval needs one of them.")
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text; a start token that it already spells out is not doubled."""
        start = self.tokenizer.bos_token
        if add_special_tokens is None and start and string.startswith(start):
            add_special_tokens = False
        if add_special_tokens is False:
            return list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])
        return self.lm.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        contexts, continuations = [], []
        for _names, context, continuation in requests:
            room = self.max_length - len(continuation)
            if room < 1:
                raise InvalidInput(
                    f"A continuation of {len(continuation)} tokens leaves no room for a context; the model reads at most "
                    f"{self.max_length}."
                )
            contexts.append(context[-room:])
            continuations.append(continuation)
        sums = [float(log_probs.double().sum()) for log_probs in self.lm.log_probs(contexts, continuations)]
        return list(zip(sums, self._is_greedy(contexts, continuations), strict=True))

    def _is_greedy(self, contexts: Sequence[list[int]], continuations: Sequence[list[int]]) -> list[bool]:
        flags = [False] * len(contexts)
        if not self.greedy:
            return flags
        for length in {len(continuation) for continuation in continuations if continuation}:
            chosen = [i for i, continuation in enumerate(continuations) if len(continuation) == length]
            found = self.lm.generate([contexts[i] for i in chosen], max_new_tokens=length)
            for i, (best,) in zip(chosen, found, strict=True):
                flags[i] = list(best.token_ids) == continuations[i]
        return flags

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of every whole text, in windows that score each token once with the most context."""
        windows, owners = [], []
        for i, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # A window is read with its last token, which lm-eval does not count.
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for piece in pieces:
                windows.append((None, *make_disjoint_window(piece)))
                owners.append(i)
        sums = [0.0] * len(requests)
        contexts, continuations = [window[1] for window in windows], [window[2] for window in windows]
        for i, log_probs in zip(owners, self.lm.log_probs(contexts, continuations), strict=True):
            sums[i] += float(log_probs.double().sum())
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of every context, up to a stop string; greedy unless the task asks for samples."""
        texts = [""] * len(requests)
        asked: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            asked.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        for places in asked.values():
            options = normalize_gen_kwargs(requests[places[0]].args[1], _DEFAULT_NEW_TOKENS)
            found = self._continuations([requests[i].args[0] for i in places], options)
            for i, text in zip(places, found, strict=True):
                texts[i] = text
        return texts

    def _continuations(self, contexts: Sequence[str], options: Mapping[str, Any]) -> list[str]:
        if not options.keys() <= _GENERATION:
            raise InvalidInput(
                f"A task asks for generation with {', '.join(sorted(options.keys() - _GENERATION))}; known here are "
                f"{', '.join(sorted(_GENERATION))}."
            )
        room = self.max_length - options["max_gen_toks"]
        if room < 1:
            raise InvalidInput(
                f"{options['max_gen_toks']} new tokens leave no room for a context; the model reads at most "
                f"{self.max_length}."
            )
        sampled = options["do_sample"]
        found = self.lm.generate(
            [self.tok_encode(context)[-room:] for context in contexts],
            max_new_tokens=options["max_gen_toks"],
            temperature=options["temperature"] if sampled else 0.0,
            top_k=options.get("top_k") if sampled else None,
            top_p=options.get("top_p") if sampled else None,
            stop=options["until"],
        )
        return [best.text for (best,) in found]
