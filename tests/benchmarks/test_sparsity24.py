"""Speed of the prox, of Algorithm 2, of refinement and of the block loop: medians of ratios within one run, in CPU time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsity24.methods import Magnitude, ProxPruner, SparseGPT
from sparsity24.model import prune_model
from sparsity24.prox import group_support, project24, prox24
from sparsity24.reference_solvers import prox24_alternating
from sparsity24.refinement import refine
from sparsity24.synthetic import synthetic_layer

WIDTH = 1024


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # CPU time of several threads that wait for one another on a busy machine measures the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 7, repeats: int = 1) -> float:
    """The median over rounds of slow / fast, taken in turns; of `repeats` fast runs in a round the median counts.

    What takes milliseconds is at the mercy of whatever else touches the cache; what takes seconds averages that out.
    """
    slow(), fast()
    return statistics.median(
        _cpu_seconds(slow) / statistics.median(_cpu_seconds(fast) for _ in range(repeats)) for _ in range(rounds)
    )


def _weights() -> torch.Tensor:
    return torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))


def test_prox_is_ten_times_faster_than_alternating_sweeps_when_every_group_is_active(record_property: Callable) -> None:
    # Where Algorithm 2 begins, at lam0 = 0.01: nearly every group keeps all four entries.
    z, lam = _weights(), 0.01
    assert float((group_support(prox24(z, lam)) > 2).double().mean()) > 0.9
    ratio = _ratio(lambda: prox24_alternating(z, lam), lambda: prox24(z, lam), repeats=15)
    record_property("alternating / exact, all active", ratio)
    print(f"\nalternating / exact, all active: {ratio:.1f}")
    assert ratio >= 10


def test_prox_is_forty_times_faster_than_alternating_sweeps_on_mostly_sparse_input(record_property: Callable) -> None:
    dense = _weights()
    z = project24(dense)
    active = torch.randperm(z.numel() // 4, generator=torch.Generator().manual_seed(1))[: z.numel() // 400]
    z.view(-1, 4)[active] = dense.view(-1, 4)[active]
    ratio = _ratio(lambda: prox24_alternating(z, 0.1), lambda: prox24(z, 0.1), repeats=15)
    record_property("alternating / exact, 99 % sparse", ratio)
    print(f"\nalternating / exact, 99 % sparse: {ratio:.1f}")
    assert ratio >= 40


def _algorithm_2_over_sparsegpt(width: int, backend: str, rounds: int) -> float:
    layer = synthetic_layer("low-rank", rows=width, width=width, samples_per_feature=2)
    method = ProxPruner(beta=1.05, stop=0.999, backend=backend)
    seconds = [
        (
            _cpu_seconds(lambda: method.prune(layer.weight, layer.hessian)),
            _cpu_seconds(lambda: SparseGPT().prune(layer.weight, layer.hessian)),
        )
        for _ in range(rounds)
    ]
    return statistics.median(slow / fast for slow, fast in seconds)


@pytest.mark.parametrize("width", [1024, pytest.param(4096, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_algorithm_2_takes_at_most_forty_times_as_long_as_sparsegpt(width: int, record_property: Callable) -> None:
    ratio = _algorithm_2_over_sparsegpt(width, "eager", rounds=3 if width == WIDTH else 1)
    record_property("Algorithm 2 / SparseGPT", ratio)
    print(f"\nAlgorithm 2 / SparseGPT at {width}: {ratio:.1f}")
    assert ratio <= 40


# In a process of its own, since the run-time checks of the tests cannot be compiled.
COMPILED = """
import statistics, time, torch
from sparsity24.methods import ProxPruner, SparseGPT
from sparsity24.prox_compiled import compiled_prox
from sparsity24.reference_solvers import prox24_alternating
from sparsity24.synthetic import synthetic_layer

torch.set_num_threads(1)
def seconds(run):
    start = time.process_time()
    run()
    return time.process_time() - start

z = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
planes, lam, compiled = z.view(-1, 4).t().contiguous(), torch.tensor(0.01), compiled_prox()
compiled(planes, lam)
fast = statistics.median(seconds(lambda: compiled(planes, lam)) for _ in range(31))
sweeps = statistics.median(seconds(lambda: prox24_alternating(z, 0.01)) for _ in range(3)) / fast
sort = statistics.median(seconds(lambda: z.view(-1, 4).sort(dim=1)) for _ in range(31)) / fast
layer = synthetic_layer("low-rank", rows=1024, width=1024, samples_per_feature=2)
method = ProxPruner(beta=1.05, stop=0.999, backend="compiled")
method.prune(layer.weight, layer.hessian)
ratios = [
    seconds(lambda: method.prune(layer.weight, layer.hessian)) / seconds(lambda: SparseGPT().prune(layer.weight, layer.hessian))
    for _ in range(3)
]
print(sweeps, sort, statistics.median(ratios))
"""


@pytest.mark.skipif(not os.environ.get("TENFOLD_COMPILE"), reason="compiling takes minutes: set TENFOLD_COMPILE=1")
def test_the_compiled_prox_meets_its_targets(record_property: Callable) -> None:
    output = subprocess.run([sys.executable, "-c", COMPILED], check=True, capture_output=True, text=True).stdout
    sweeps, sort, algorithm = map(float, output.split()[-3:])
    print(
        f"\ncompiled: alternating / prox {sweeps:.0f}, sort / prox {sort:.2f}, Algorithm 2 / SparseGPT {algorithm:.1f}"
    )
    for name, value in (("sweeps", sweeps), ("sort", sort), ("Algorithm 2", algorithm)):
        record_property(f"compiled, {name}", value)
    # The reference's 80 sweeps' worth is against an alternating solver four times slower than ours, so it is only reported.
    assert sort >= 0.7
    assert algorithm <= 18


def test_twenty_cg_steps_cost_at_most_twenty_five_products(record_property: Callable) -> None:
    layer = synthetic_layer("low-rank", rows=WIDTH, width=WIDTH, samples_per_feature=2)
    mask = Magnitude().prune(layer.weight, layer.hessian).mask
    start = layer.weight * mask
    ratio = _ratio(
        lambda: refine(start, mask, layer.weight, layer.hessian, "cg", steps=20, tol=0.0),
        lambda: layer.weight @ layer.hessian,
    )
    record_property("refine(cg, 20) / product", ratio)
    print(f"\nrefine(cg, 20) in products: {ratio:.1f}")
    assert ratio <= 25


def test_the_block_loop_adds_two_forward_passes_and_the_grams(record_property: Callable) -> None:
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [torch.randint(512, (8, 128), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    tokens = torch.randn(8 * 128, 768)

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(batch, use_cache=False)

    def grams() -> None:
        for _ in range(len(batches) * config.num_hidden_layers):
            for width in (256, 256, 256, 768):
                x = tokens[:, :width]
                x.T @ x

    def overhead() -> float:
        model.load_state_dict(dense)
        start = time.process_time()
        # Magnitude, unrefined: what is left beside the solves is calibration.
        report = prune_model(model, batches, Magnitude(), refine="none")
        return time.process_time() - start - report.solve_seconds

    overhead(), forward(), grams()
    ratio = statistics.median((overhead() - _cpu_seconds(grams)) / _cpu_seconds(forward) for _ in range(5))
    record_property("block loop / forward pass", ratio)
    print(f"\nblock loop without solves and Grams, in forward passes: {ratio:.2f}")
    # Two passes for Grams and pruned outputs, and one batch of eight twice more to learn and check the replay.
    assert ratio <= 2.5
