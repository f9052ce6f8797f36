"""Any trainer that keeps `labels` can take a mixed data set; shown with TRL's SFTTrainer where it is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from core.llm.causal import CausalLM
from sched_sampling.bash import bash_dataset

trl = pytest.importorskip("trl", reason="the extra trl is not installed")


@pytest.mark.slow
def test_the_loss_of_trls_trainer_on_a_mixed_data_set_is_the_objective_of_the_method(tmp_path: Path):
    lm = CausalLM.load("testbed:tiny_llama")
    pairs = [{"prompt": f"{a} plus {a + 2} is", "completion": f" {2 * a + 2}, as one can count."} for a in range(8)]
    data = bash_dataset(lm.model, lm.tokenizer, pairs, 0.5, temperature=1.5)
    assert any(any(row["replaced"]) for row in data)
    # Nothing about padding: TRL takes the tokenizer's, which here is its end token.
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=1,
        learning_rate=0.0,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        shuffle_dataset=False,
        max_length=128,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=lm.model,
        args=arguments,
        train_dataset=data.select_columns(["input_ids", "labels"]),
        processing_class=lm.tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    by_inputs = {tuple(row["input_ids"]): row["labels"] for row in data}
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        assert labels[:length].tolist() == by_inputs[tuple(ids[:length].tolist())]
        assert (labels[length:] == -100).all()
    trainer.train()
    reported = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    total = count = 0.0
    with torch.no_grad():
        for row in data:
            output = lm.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].log_softmax(-1)
            gold = torch.tensor(row["labels"][1:])
            places = (gold != -100).nonzero()[:, 0]
            total -= float(output[places, gold[places]].sum())
            count += len(places)
    assert reported == pytest.approx(total / count, rel=1e-4)
