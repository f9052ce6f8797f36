"""Toy tasks on token ids whose truth is known, and the tiny GPT-2 that learns them in seconds.

| task | prompt | answer | what it shows |
| --- | --- | --- | --- |
| `counting` | a number a | a + 1, a + 2, ... modulo 16 | a slip is copied forward, or recovered from |
| `parity` | bits | their parity, then every running parity | the first token needs look-ahead, the rest is a local rule |
| `running_sums` | digits | running sums modulo 10 | a scratchpad, which wrong contexts teach to distrust |
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from core.errors import InvalidInput, unknown_name
from core.llm.examples import EncodedPair


def counting(num: int, *, length: int = 12, modulus: int = 16, seed: int = 0) -> list[EncodedPair]:
    """`num` rows: a random start a, and the `length` numbers after it. Tokens are the numbers; there is no end token."""
    starts = np.random.default_rng(seed).integers(0, modulus, _counted(num))
    return [EncodedPair((int(a),), tuple(int(a + t) % modulus for t in range(1, length + 1))) for a in starts]


# The tokens of `parity` besides the bits 0 and 1: the end of an answer, and what separates a draft from its correction.
PARITY_END, PARITY_SEPARATOR, PARITY_VOCABULARY = 2, 3, 4


def parity(
    num: int, *, bits: int = 6, split: str = "train", held_out_share: float = 0.25, seed: int = 0
) -> list[EncodedPair]:
    """`num` rows x in {0, 1}^bits with the answer (s_n, s_1, ..., s_n, end), where s is the running exclusive or.

    The answer comes before its working, so that the first token has to look ahead. `split` is `train` or `test`: a share of
    the 2^bits prompts is held out, always the same ones; rows are drawn from the prompts of the split, as evenly as the
    number allows and in random order.
    """
    if split not in ("train", "test"):
        raise unknown_name("split", split, ("train", "test"))
    order = np.random.default_rng(2410).permutation(2**bits)
    held = round(2**bits * held_out_share)
    prompts = order[:held] if split == "test" else order[held:]
    if not len(prompts):
        raise InvalidInput(f"held_out_share={held_out_share} of {2**bits} prompts leaves none for the split {split}.")
    rng = np.random.default_rng(seed)
    chosen = np.concatenate([rng.permutation(prompts) for _ in range(-(-_counted(num) // len(prompts)))])[:num]
    x = (chosen[:, None] >> np.arange(bits)) & 1
    running = np.bitwise_xor.accumulate(x, axis=1)
    return [
        EncodedPair(tuple(map(int, row)), (int(s[-1]), *map(int, s), PARITY_END))
        for row, s in zip(x, running, strict=True)
    ]


# The tokens of `running_sums` besides the digits.
SUMS_END, SUMS_VOCABULARY = 10, 11


def running_sums(num: int, *, digits: int = 6, seed: int = 0) -> list[EncodedPair]:
    """`num` rows: random digits, and their running sums modulo 10 with an end token behind."""
    x = np.random.default_rng(seed).integers(0, 10, (_counted(num), digits))
    return [
        EncodedPair(tuple(map(int, row)), (*map(int, sums), SUMS_END))
        for row, sums in zip(x, x.cumsum(axis=1) % 10, strict=True)
    ]


def tiny_gpt(vocabulary: int, length: int, seed: int = 0, *, end_id: int | None = None) -> Any:
    """A GPT-2 of two layers of width 64 with learned positions, for sequences of up to `length` tokens, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=length,
        n_embd=64,
        n_layer=2,
        n_head=4,
        # Half of the time of the default, which computes a tanh, and as good here.
        activation_function="relu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=end_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def _counted(num: int) -> int:
    if num < 1:
        raise InvalidInput(f"A task has at least one row; got {num}.")
    return num
