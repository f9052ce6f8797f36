"""Small Llamas for the embedded tasks, pretrained here once on texts of the world's train split, and cached.

    lm = world_llama("world:sums:1")          # a `CausalLM` of 0.2 M parameters; deepcopy its model before training it

A fine-tuning method starts from a pretrained model. These have read other draws of their own task, whole, for just so long
that supervised fine-tuning on some hundred demonstrations ends at 40 to 80 % of the task's headline score.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from core.data.cache import build_once, digest, files_digest
from core.errors import InvalidInput, unknown_name
from core.llm import examples
from core.llm.causal import CausalLM, load_local, without_bars
from core.llm.examples import IGNORED, EncodedPair, encode_pairs, supervised_row
from core.llm.finetuning import Finetuning, finetune
from core.llm.modes import one_thread
from core.testbed import END_OF_TEXT
from sched_sampling.tasks import world, world_items
from sched_sampling.templates import TokenTemplate

# Stands between a draft and its correction; no text of the world has it.
CORRECTION = "<|correction|>"
# A draw that no seed of a preset gives.
_PRETRAINING_DRAW = 1_000_003
_LARGEST_NUMBER = 200


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a small Llama besides the world and the versions of the libraries.

    `lines` of eight calculations are mixed into the texts of sums, after `fact_steps` on single calculations: arithmetic
    is what takes a model of this size long, and a calculation takes five tokens alone and fifty in a story.
    """

    num_steps: int
    texts: int = 16_000
    batch_size: int = 16
    learning_rate: float = 6e-3
    vocabulary: int = 832
    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_key_value_heads: int = 2
    context_length: int = 256
    fact_steps: int = 0
    lines: int = 0


RECIPES = {
    "questions": Recipe(num_steps=720),
    "dialogues": Recipe(num_steps=600),
    "sums": Recipe(num_steps=1200, batch_size=20, fact_steps=900, lines=24_000),
}


def world_llama(name: str, *, recipe: Recipe | None = None) -> CausalLM:
    """The small Llama of the embedded task `name` (`world:KIND:LEVEL`), always the same one.

    The first use pretrains it (10 to 60 CPU-seconds); later uses load it. `recipe` None is the one of the task's kind.
    """
    _, _, rest = name.partition(":")
    kind, _, level = rest.partition(":")
    if kind not in RECIPES:
        raise unknown_name("task of the world", kind, RECIPES)
    if not level.isdecimal():
        raise InvalidInput(f"A task of the world is `world:{kind}:LEVEL`, the level a number; got `{name}`.")
    recipe = recipe or RECIPES[kind]
    key = digest([json.dumps(asdict(recipe), sort_keys=True), name, _origin()])[:16]
    folder = build_once(
        f"sched_sampling/{kind}-{level}-{key}", lambda partial: _train(partial, recipe, kind, int(level))
    )
    with_calculations = " and plain calculations of all splits" if recipe.lines else ""
    return CausalLM(
        *load_local(folder, torch.float32),
        provenance=f"a Llama of {recipe.num_layers} layers of {recipe.hidden_size}, trained here on texts of the train "
        f"split of {name}{with_calculations} for {recipe.num_steps} steps, key {key}",
    )


def correction_template(tokenizer: Any, prompt: str) -> TokenTemplate | None:
    """How answers to prompts like this one are corrected: a token, and the prompt's last line once more ("Answer:").

    None for a tokenizer without the token, whose model reads words. These models have learned what follows such a line, and
    a hundred updates hardly teach them to answer behind anything else.
    """
    vocabulary = tokenizer.get_vocab()
    if CORRECTION not in vocabulary:
        return None
    _, _, asked = prompt.rpartition("\n")
    return TokenTemplate(
        separator_ids=(vocabulary[CORRECTION],), request_ids=tuple(tokenizer(f"\n{asked}")["input_ids"])
    )


@cache
def _origin() -> str:
    libraries = {name: metadata.version(name) for name in ("numpy", "tokenizers", "torch", "transformers")}
    sources = files_digest([Path(__file__)])
    return json.dumps([libraries, platform.python_version_tuple()[:2], sources, world().content_hash])


def _train(partial: Path, recipe: Recipe, kind: str, level: int) -> None:
    pairs = [item.pair for item in world_items(kind, recipe.texts, "train", level, _PRETRAINING_DRAW)]
    tokenizer = _tokenizer([pair["prompt"] + pair["completion"] for pair in pairs[:4000]], recipe.vocabulary, kind)
    model = _new_model(recipe, tokenizer)
    rows = [_text_row(pair) for pair in encode_pairs(tokenizer, pairs)]
    with one_thread():
        if recipe.fact_steps:
            facts = _facts(tokenizer)
            settings = Finetuning(
                num_steps=recipe.fact_steps, batch_size=256, learning_rate=5e-3, betas=(0.9, 0.98), warmup_steps=50
            )
            description = "Pretraining on calculations (about 30 s, once)"
            finetune(model, [supervised_row(fact) for fact in facts], settings, description=description)
            rows += _lines(facts, recipe.lines)
        settings = Finetuning(
            num_steps=recipe.num_steps,
            batch_size=recipe.batch_size,
            learning_rate=recipe.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.05,
            warmup_steps=min(30, recipe.num_steps),
            packing=True,
        )
        description = f"Pretraining on {kind} of the world (about 20 s, once)"
        finetune(model, rows, settings, loss=_text_and_answer_loss, collate=_collate, description=description)
    with without_bars():
        model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)


def _tokenizer(texts: Sequence[str], vocabulary: int, kind: str) -> Any:
    """A byte-level BPE in which every number of the sums is one token.

    A table of whole numbers is learned in a third of the time that digits take (held-out calculations after 30 seconds:
    0.52 right, with single digits 0.20).
    """
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" ?\d+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    numbers = "".join(f" {number}" for number in range(_LARGEST_NUMBER + 1))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, CORRECTION],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *([numbers] * len(texts) if kind == "sums" else [])], trainer)
    wrapper: Any = transformers.PreTrainedTokenizerFast
    return wrapper(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        additional_special_tokens=[CORRECTION],
    )


def _new_model(recipe: Recipe, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        max_position_embeddings=recipe.context_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        # transformers' 0.02 everywhere is far too small for this width (see `core.testbed`).
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.5 if "embed" in name else parameter.shape[1] ** -0.5)
    return model


def _text_row(pair: EncodedPair) -> dict[str, list[int]]:
    """A row that is learned whole; `answers` are the labels of its answer alone."""
    row = supervised_row(pair)
    # The first token follows another text where rows are packed.
    return {"input_ids": row["input_ids"], "labels": [IGNORED, *row["input_ids"][1:]], "answers": row["labels"]}


def _collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    batch = examples.collate(rows, packing=True)
    answers = examples.collate([{**row, "labels": row["answers"]} for row in rows], packing=True)
    return {**batch, "answers": answers["labels"]}


def _text_and_answer_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
    # Answers are a twelfth of the tokens, and what they need (to copy, to look up) is learned several times sooner when
    # they have half of the weight: questions 0.89 after 23 seconds, without the prompts' loss 0.28 after 12.
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    flat = logits[:, :-1].flatten(0, 1)
    losses = [
        functional.cross_entropy(flat, batch[name][:, 1:].flatten(), ignore_index=IGNORED)
        for name in ("labels", "answers")
    ]
    return losses[0] + losses[1]


def _facts(tokenizer: Any) -> list[EncodedPair]:
    """All calculations that the sums can have, the four operations as frequent as there.

    All splits: that 25 - 13 = 12 is something that a pretrained model knows. What is held out is the story.
    """
    by_sign: dict[str, list[tuple[str, str]]] = {sign: [] for sign in "+-*/"}
    for left in range(2, _LARGEST_NUMBER + 1):
        for sign, operands in (("+", range(2, 41)), ("-", range(2, 41)), ("*", range(2, 6)), ("/", range(2, 6))):
            for right in operands:
                result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
                if left <= 60 and 1 <= result <= _LARGEST_NUMBER and (sign != "/" or left % right == 0):
                    by_sign[sign].append((f" {left} {sign} {right} =", f" {result}"))
    rng = np.random.default_rng(0)
    texts = [
        by_sign[sign][i] for sign in "+-+-*/" for i in rng.permutation(np.resize(np.arange(len(by_sign[sign])), 4000))
    ]
    prompts, answers = zip(*texts, strict=True)
    return [
        EncodedPair(tuple(prompt), tuple(answer))
        for prompt, answer in zip(
            tokenizer(list(prompts))["input_ids"], tokenizer(list(answers))["input_ids"], strict=True
        )
    ]


def _lines(facts: Sequence[EncodedPair], number: int) -> list[dict[str, list[int]]]:
    """Rows of eight calculations each, of which only the results are learned."""
    rng = np.random.default_rng(1)
    made = []
    for chosen in rng.integers(len(facts), size=(number, 8)):
        rows = [supervised_row(facts[i]) for i in chosen]
        labels = [label for row in rows for label in row["labels"]]
        made.append({"input_ids": [i for row in rows for i in row["input_ids"]], "labels": labels, "answers": labels})
    return made
