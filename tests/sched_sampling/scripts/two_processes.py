"""One process of a `torchrun`: BASH on a tiny model, into the folder given; the first process saves the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from core.llm.finetuning import Finetuning
from sched_sampling.bash import BatchScheduledSampling, bash_dataset
from sched_sampling.processes import processes
from sched_sampling.schedule import constant
from sched_sampling.toys import counting, tiny_gpt

torch.set_num_threads(1)
folder = Path(sys.argv[1])
pairs = counting(40, seed=1)
model = tiny_gpt(16, 13)
bash_dataset(model, None, pairs, 0.5, seed=3, temperature=2.0, output_dir=folder / "data", rows_per_file=8)
# Not AdamW: it makes full steps of gradients that are nothing but rounding, as those of the keys' biases.
training = Finetuning(num_steps=6, batch_size=8, learning_rate=0.3, optimizer=torch.optim.SGD)
method = BatchScheduledSampling(rounds=2, schedule=constant(0.5), training=training)
reports = method.fit(model, None, pairs, seed=4, output_dir=folder / "run")
group = processes()
(folder / f"rank-{group.rank}.txt").write_text(f"{group.world_size} {reports[-1].built['changed']}")
if group.rank == 0:
    save_file({name: tensor.contiguous() for name, tensor in model.named_parameters()}, folder / "final.safetensors")
if distributed.is_initialized():
    distributed.destroy_process_group()
