"""`CausalLM`: any transformers causal language model with its tokenizer, to generate, score and measure perplexity.

lm = CausalLM.load("testbed:tiny_llama?seed=3")
lm.generate(["Return the"], max_new_tokens=20)[0][0].text
lm.log_probs(["The capital of France is"], [" Paris"])
lm.perplexity(text, window=128).value
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.data.cache import files_digest
from core.errors import DataUnavailable, InvalidInput, unknown_name
from core.llm.generation import Sampling, generate
from core.llm.scoring import Perplexity, Scored, score, window_perplexity

__all__ = ["CausalLM", "Generation", "Perplexity"]

Text = str | Sequence[int]


@dataclass(frozen=True)
class Generation:
    """A generated text and its token ids, with the sum of their log-probabilities under the model (temperature 1).

    `token_ids` holds what was generated, an end token included; `text` leaves out special tokens and ends before a stop
    string.
    """

    text: str
    token_ids: tuple[int, ...]
    log_prob: float


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text as the tokenizer's default has it, but without an end token behind it."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    # Some tokenizers close every text; what follows a closed text is another document.
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]
    return ids


def end_tokens(model: Any, tokenizer: Any | None) -> frozenset[int]:
    """Every token that ends a text of this model: its generation config may name several, its tokenizer one more."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*ends, getattr(tokenizer, "eos_token_id", None)) if token is not None)


class CausalLM:
    """A causal language model in evaluation mode, its tokenizer, and where they came from.

    Everything here takes texts or token ids. Texts become ids as the tokenizer's own default has it (with a start token
    where the model was trained with one, never with an end token).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, provenance: str) -> None:
        _refuse_half_precision_on_cpu(model.dtype, model.device)
        self.model: Any = model
        self.model.train(False)
        self.tokenizer: Any = tokenizer
        self.provenance = provenance

    @classmethod
    def load(
        cls, spec: str, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
    ) -> CausalLM:
        """The model that `spec` names.

        `testbed:tiny_llama[?seed=0]` and `pretrained:smollm2-135m` work offline (`core.testbed`),
        `hub:owner/name[@revision]` loads from the Hugging Face Hub, `folder:PATH` from a folder that `save_pretrained`
        wrote. Weights are read from safetensors only, and no code that comes with a model is run.

        `device` None takes an accelerator when there is one; `dtype` None takes the checkpoint's own on an accelerator
        and float32 on a CPU. Raises `InvalidInput` on a malformed spec and `DataUnavailable` when the home lacks it.
        """
        home, _, rest = spec.partition(":")
        target = torch.device(device) if device is not None else best_device()
        kind = _dtype(dtype)
        if kind is None and target.type == "cpu":
            kind = torch.float32
        _refuse_half_precision_on_cpu(kind, target)
        if home in ("testbed", "pretrained"):
            lm = _load_testbed(home, rest)
        elif home == "hub":
            repository, _, revision = rest.partition("@")
            if repository.count("/") != 1:
                raise InvalidInput(f"A model on the Hub is `hub:owner/name[@revision]`; got `{spec}`.")
            lm = cls._from_hub(repository, revision or None, kind)
        elif home == "folder":
            lm = cls._from_folder(Path(rest).expanduser(), kind)
        else:
            if Path(spec).expanduser().exists():
                raise InvalidInput(f"A model in a folder is written folder:{spec}.")
            raise unknown_name("home of a model", home, ["testbed", "pretrained", "hub", "folder"])
        lm.model.to(device=target, dtype=kind)
        return lm

    @classmethod
    def _from_hub(cls, repository: str, revision: str | None, dtype: torch.dtype | None) -> CausalLM:
        try:
            model, tokenizer = _load_pair(repository, dtype, revision=revision)
        except OSError as error:
            raise DataUnavailable(
                f"The Hugging Face Hub could not give hub:{repository} ({type(error).__name__}: {error}). Without a "
                f"network: fetch it elsewhere (hf download {repository} --local-dir DIR) and use folder:DIR, or use "
                "pretrained:smollm2-135m or testbed:tiny_llama."
            ) from error
        commit = getattr(model.config, "_commit_hash", None) or revision or "main"
        return cls(model, tokenizer, provenance=f"hub:{repository}@{commit}, {model.dtype}")

    @classmethod
    def _from_folder(cls, folder: Path, dtype: torch.dtype | None) -> CausalLM:
        weights = sorted(folder.glob("*.safetensors"))
        if not (folder / "config.json").is_file() or not weights:
            raise DataUnavailable(
                f"`folder:{folder}` is no saved model: it needs config.json and *.safetensors, as save_pretrained writes."
            )
        try:
            model, tokenizer = load_local(folder, dtype)
        except OSError as error:
            raise DataUnavailable(f"`folder:{folder}` could not be loaded: {error}") from error
        return cls(
            model,
            tokenizer,
            provenance=f"the folder {folder.name}, sha256 of its weights {files_digest(weights)[:16]}, {model.dtype}",
        )

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.model.device

    @property
    def context_length(self) -> int | None:
        """How many tokens the model reads at most; None when its positions have no end."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text: see `end_tokens`."""
        return end_tokens(self.model, self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The token ids of a text as the tokenizer's default has it, but without an end token behind it."""
        return encode(self.tokenizer, text)

    def generate(
        self,
        prompts: Sequence[Text],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        num_return: int = 1,
        seed: int = 0,
        stop: Sequence[str] = (),
        max_batch_tokens: int = 8192,
    ) -> list[list[Generation]]:
        """`num_return` continuations of every prompt, in the order of the prompts.

        `temperature` 0 takes the most probable token each time; with `num_return` above 1 it is a beam search of that
        width and the continuations come best first, by total log-probability. Above 0 tokens are drawn from the
        distribution sharpened by 1 / `temperature`, restricted to the `top_k` most probable tokens and to the smallest
        set that holds `top_p` of the mass. A prompt's samples depend on `seed` and the prompt, not on its neighbours: a
        batch gives what its prompts give one by one, and equal prompts give equal samples.

        A continuation ends with the model's end token, with a `stop` string, or after `max_new_tokens`. Raises
        `InvalidInput` when a prompt and the new tokens do not fit the model's context.
        """
        if isinstance(prompts, str):
            raise InvalidInput("Prompts are a list; for one prompt write [prompt].")
        if max_new_tokens < 1 or not all(stop):
            raise InvalidInput(
                f"max_new_tokens must be at least 1 and a stop string not empty; got {max_new_tokens}, {stop}."
            )
        ids = [self._started(self._ids(prompt)) for prompt in prompts]
        for i, prompt in enumerate(ids):
            self._check_length(
                len(prompt) + max_new_tokens, f"Prompt {i} of {len(prompt)} and {max_new_tokens} new tokens"
            )
        ends = self.end_tokens()

        def ended(token_ids: tuple[int, ...]) -> bool:
            return token_ids[-1] in ends or (
                bool(stop) and any(word in self.tokenizer.decode(token_ids) for word in stop)
            )

        found = generate(
            self.model,
            ids,
            Sampling(temperature, top_k, top_p, num_return, seed),
            max_new_tokens=max_new_tokens,
            ended=ended,
            max_batch_tokens=max_batch_tokens,
        )
        return [
            [Generation(self._text_after(prompt, c.token_ids, stop), c.token_ids, c.log_prob) for c in continuations]
            for prompt, continuations in zip(ids, found, strict=True)
        ]

    def log_probs(
        self, contexts: Sequence[Text], continuations: Sequence[Text], *, max_batch_tokens: int | None = None
    ) -> list[Float[Tensor, " _"]]:
        """The log-probability of every token of each continuation, given its context and the tokens before it.

        A pair of texts is tokenized as one text, and the scored tokens are those that the context alone does not begin
        with; so the boundary never gets tokens that the model would not meet in running text. Token ids are taken as
        they are. An empty continuation gives an empty tensor. Raises `InvalidInput` when a pair does not fit the model's
        context, or when there is nothing that the first token could be predicted from.
        """
        if len(contexts) != len(continuations):
            raise InvalidInput(f"Each context needs its continuation; got {len(contexts)} and {len(continuations)}.")
        sequences = [self._joined(*pair) for pair in zip(contexts, continuations, strict=True)]
        for i, sequence in enumerate(sequences):
            self._check_length(len(sequence.token_ids), f"Context and continuation {i}")
        return score(self.model, sequences, max_batch_tokens=max_batch_tokens)

    def perplexity(
        self,
        text: Text,
        *,
        window: int | None = None,
        stride: int | None = None,
        max_windows: int | None = None,
        max_batch_tokens: int | None = None,
    ) -> Perplexity:
        """The perplexity of a long text, tokenized once and cut into windows (`core.llm.scoring.window_perplexity`).

        `window` None is 2048 or the model's context, whichever is less; `stride` None means windows that do not overlap,
        as in the literature on WikiText-2. Raises `InvalidInput` when a window does not fit the model's context or the
        text.
        """
        window = window if window is not None else min(2048, self.context_length or 2048)
        self._check_length(window, "A window")
        return window_perplexity(
            self.model,
            self._ids(text),
            window=window,
            stride=stride,
            max_windows=max_windows,
            max_batch_tokens=max_batch_tokens,
        )

    def _ids(self, text: Text) -> list[int]:
        return self.encode(text) if isinstance(text, str) else [int(token) for token in text]

    def _joined(self, context: Text, continuation: Text) -> Scored:
        if isinstance(context, str) != isinstance(continuation, str):
            raise InvalidInput("A context and its continuation are both texts or both token ids.")
        before = self._ids(context)
        whole = self._ids(context + continuation if isinstance(context, str) else [*before, *continuation])  # type: ignore[operator]
        first = next(
            (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
        )
        if first == 0 and whole:
            return Scored(self._started([]) + whole, first=1)
        return Scored(whole, first)

    def _started(self, ids: list[int]) -> list[int]:
        if ids:
            return ids
        # GPT-2 and its kin separate documents with the end token and have no other start.
        for start in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if start is not None:
                return [start]
        raise InvalidInput(
            "The first token cannot be predicted from nothing: this tokenizer has neither a start nor an end token. Give a "
            "prompt or context of at least one token."
        )

    def _check_length(self, length: int, what: str) -> None:
        limit = self.context_length
        if limit is not None and length > limit:
            raise InvalidInput(f"{what} make {length} tokens; the model reads at most {limit}. Shorten it.")

    def _text_after(self, prompt: list[int], token_ids: tuple[int, ...], stop: Sequence[str]) -> str:
        # Decoded behind its prompt: some tokenizers swallow the space before the first token of a text.
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        text: str = self.tokenizer.decode([*prompt, *token_ids], skip_special_tokens=True)[len(before) :]
        return text[: min((position for word in stop if (position := text.find(word)) >= 0), default=len(text))]


def _load_pair(name: str, dtype: torch.dtype | None, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, **options
    )
    return model, AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def load_local(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The model and the tokenizer that `save_pretrained` wrote into a folder."""
    with without_bars():
        return _load_pair(str(folder), dtype, local_files_only=True)


@contextmanager
def without_bars() -> Iterator[None]:
    """Silence the bars that transformers draws for work of milliseconds, for the `with` block."""
    bars: Any = importlib.import_module("transformers.utils.logging")
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _load_testbed(home: str, rest: str) -> CausalLM:
    from core import testbed

    name, _, query = rest.partition("?")
    if home == "pretrained":
        return testbed.pretrained(name)
    settings = dict(parse_qsl(query))
    if name != "tiny_llama" or not settings.keys() <= {"seed"} or not settings.get("seed", "0").isdecimal():
        raise InvalidInput(
            f"A testbed model is `testbed:tiny_llama` or `testbed:tiny_llama?seed=3`; got `testbed:{rest}`."
        )
    return testbed.tiny_llama(seed=int(settings.get("seed", "0")))


def best_device() -> torch.device:
    """An accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    named = getattr(torch, dtype, None)
    if not isinstance(named, torch.dtype):
        raise unknown_name("dtype", dtype, ["float32", "bfloat16", "float16"])
    return named


def _refuse_half_precision_on_cpu(dtype: torch.dtype | None, device: torch.device) -> None:
    if dtype == torch.float16 and device.type == "cpu":
        raise InvalidInput("float16 on a CPU is tens of times slower than float32; use dtype='float32' or 'bfloat16'.")
