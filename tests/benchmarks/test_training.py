"""The price of the loop: `fit` around a `TorchStep`, against the bare loop that anybody would write, on a tiny Llama."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from core.training import Batches, Event, Moment, fit
from core.training.torch import TorchStep

_NUM_ROUNDS, _STEPS_A_ROUND = 10, 3
_STATISTICS: dict[str, Callable[[list[float]], float]] = {
    "median": lambda values: float(np.median(values)),
    "lower quartile": lambda values: float(np.quantile(values, 0.25)),
}
_TOKENS = torch.randint(0, 1024, (64, 128), generator=torch.Generator().manual_seed(0))


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return transformers.LlamaForCausalLM(config).train()


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def _bare() -> Callable[[int], list[float]]:
    model = _llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    scheduler = transformers.get_scheduler("cosine", optimizer, 0, 1000)
    batches = Batches(len(_TOKENS), 16)

    def run(num_steps: int) -> list[float]:
        seconds, before = [], time.perf_counter()
        for position in range(num_steps):
            _loss(model, _TOKENS[batches.indices(position)]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            now = time.perf_counter()
            seconds.append(now - before)
            before = now
        return seconds

    return run


def _fitted() -> Callable[[int], list[float]]:
    step = TorchStep(_llama(), _loss, learning_rate=1e-3, num_steps=1000, device="cpu")
    batches = Batches(len(_TOKENS), 16)

    def run(num_steps: int) -> list[float]:
        moments: list[float] = []

        def stamp(event: Event) -> None:
            if event.moment in (Moment.START, Moment.STEP):
                moments.append(time.perf_counter())

        # One more step than is timed: a step is charged with everything up to the next one.
        fit(step, lambda indices: _TOKENS[indices], batches, num_steps=num_steps, log_every=2, hooks=[stamp])
        return np.diff(moments).tolist()

    return run


@pytest.mark.slow
def test_the_loop_costs_at_most_five_percent_of_a_bare_loop() -> None:
    contenders = {"bare": _bare(), "fit": _fitted()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run(1)
    gc.collect()
    for number in range(_NUM_ROUNDS):
        # Interleaved, and each first in turn: a change of the machine's load meets both.
        for name in sorted(contenders, reverse=number % 2 == 1):
            seconds[name] += contenders[name](_STEPS_A_ROUND)
    ratios = {
        statistic: function(seconds["fit"]) / function(seconds["bare"]) for statistic, function in _STATISTICS.items()
    }
    print(f"\nfit + TorchStep over a bare loop: {ratios}")
    # Noise only ever adds time, so the lower quartile is as fair to both and steadier than the median on a busy machine.
    assert min(ratios.values()) <= 1.05, ratios
