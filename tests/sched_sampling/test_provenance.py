"""What a build is known by: weights, configuration, what functions hold, drafts; and the engine that was asked for."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from core.errors import InvalidInput
from core.llm.finetuning import Finetuning
from sched_sampling import bash
from sched_sampling.baselines import SupervisedFineTuning
from sched_sampling.provenance import describe_method, model_digest
from sched_sampling.rac import rac_dataset
from sched_sampling.templates import Draft, TokenTemplate
from sched_sampling.toys import PARITY_END, PARITY_SEPARATOR, PARITY_VOCABULARY, parity, tiny_gpt


def _model():
    return tiny_gpt(PARITY_VOCABULARY, 40, end_id=PARITY_END)


def test_a_model_of_the_same_weights_that_computes_otherwise_is_another():
    model = _model()
    other = copy.deepcopy(model)
    assert model_digest(other) == model_digest(model)
    other.config.layer_norm_epsilon = 1e-2
    assert model_digest(other) != model_digest(model)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda groups: torch.optim.SGD(groups, momentum=0.1), lambda groups: torch.optim.SGD(groups, momentum=0.9)),
        (partial(torch.optim.AdamW, eps=1e-6), partial(torch.optim.AdamW, eps=1e-8)),
    ],
)
def test_functions_with_other_insides_make_other_methods(one, other):
    methods = [SupervisedFineTuning(training=Finetuning(optimizer=optimizer)) for optimizer in (one, one, other)]
    first, again, different = map(describe_method, methods)
    assert first == again
    assert first != different


def test_other_drafts_are_another_data_set(tmp_path):
    pairs = parity(2, seed=0)
    template = TokenTemplate(separator_ids=(PARITY_SEPARATOR,), end_ids=(PARITY_END,))
    for tokens in ((0, 1), (1, 1)):
        drafts = [Draft(tokens, "", True)] * len(pairs)
        if tokens == (1, 1):
            with pytest.raises(InvalidInput, match="another drafts"):
                rac_dataset(_model(), None, pairs, template=template, drafts=drafts, output_dir=tmp_path / "rac")
        else:
            rac_dataset(_model(), None, pairs, template=template, drafts=drafts, output_dir=tmp_path / "rac")


def test_the_engine_that_is_asked_for_mixes(monkeypatch: pytest.MonkeyPatch):
    asked = []
    real = bash.mix_rows
    monkeypatch.setattr(bash, "mix_rows", lambda *a, **o: asked.append(o["engine"]) or real(*a, **o))
    bash.bash_dataset(_model(), None, parity(4, seed=0), 0.5, engine="sequential")
    assert asked == ["sequential"]


def test_modes_are_as_before_when_the_evaluation_fails():
    model = _model().train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    method = SupervisedFineTuning(rounds=1, training=Finetuning(num_steps=1, batch_size=2))
    with pytest.raises(ZeroDivisionError):
        method.fit(model, None, parity(4, seed=0), evaluate=lambda number: {"score": 1 / number})
    assert [module.training for module in model.modules()] == before
