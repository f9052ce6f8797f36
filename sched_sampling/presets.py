"""The three scales of the claims: toy tasks and the embedded world, a real model on public data, and the paper's own."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput
from core.experiment import Preset

# Added to a seed for a run that no preset's seeds give: controls compare a method with itself there.
OTHER_DRAW = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingPreset(Preset):
    """What a scale means here."""

    # Claims 9, 10 and 13: the tasks of the three families, and the model, "world" for one pretrained on each task's texts.
    tasks: tuple[str, ...] = ("world:dialogues:1", "world:questions:1", "world:sums:1")
    task_model: str = "world"
    task_lora_rank: int | None = None
    # Demonstrations a seed, items to be scored on, and the most tokens of a demonstration and of an answer.
    task_pairs: int = 512
    task_valid: int = 200
    task_test: int = 200
    task_context: int | None = None
    task_answer_tokens: int | None = None
    # Updates of the base, then rounds and updates a round of everything that continues it.
    task_base_steps: int = 64
    task_rounds: int = 3
    task_round_steps: int = 32
    task_batch: int = 16
    task_learning_rate: float = 5e-4
    task_packing: bool = True
    task_beta: float = 0.3
    # The task whose valid items show how much beta and the temperature matter.
    sensitivity_task: str = "world:questions:1"
    # Tasks on which preference tuning starts from every method; its updates.
    preference: tuple[str, ...] = ()
    preference_steps: int = 100
    preference_learning_rate: float = 5e-6
    # Claims 5, 6 and 11: parity of so many bits, and the share of the prompts that is never trained on.
    parity_bits: int = 7
    parity_held_out: float = 0.125
    # Drafts for held-out prompts that every round is judged on, and the corrected accuracy at which rounds end.
    parity_drafts: int = 256
    parity_switched: float = 0.99
    # Demonstrations; updates of the base, then at most so many rounds of updates.
    parity_pool: int = 1024
    parity_base_steps: int = 400
    parity_rounds: int = 10
    parity_round_steps: int = 120
    parity_batch: int = 64
    parity_learning_rate: float = 1.5e-3

    def __post_init__(self) -> None:
        """Refuse values that no claim could use, before any work."""
        super().__post_init__()
        for name, value in self.values().items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise InvalidInput(f"{self.name}: {name} counts something and must be at least 1; got {value}.")


QUICK = SamplingPreset(name="quick")
# An update of a real language model on three short demonstrations takes four CPU-seconds and an answer one: what fits into
# forty minutes is small, and shows that the experiment runs on real text rather than what comes out of it.
REAL = SamplingPreset(
    name="real",
    tasks=("dialogsum", "gsm8k"),
    task_model="pretrained:smollm2-135m",
    task_lora_rank=16,
    task_pairs=12,
    task_valid=4,
    task_test=6,
    task_context=128,
    task_answer_tokens=40,
    task_base_steps=4,
    task_rounds=2,
    task_round_steps=2,
    task_batch=3,
    sensitivity_task="dialogsum",
)
FULL = SamplingPreset(
    name="full",
    tasks=("tldr", "squad", "gsm8k"),
    task_model="hub:mistralai/Mistral-7B-v0.1",
    task_lora_rank=16,
    task_pairs=7000,
    task_valid=300,
    task_test=1000,
    task_context=1024,
    task_base_steps=440,
    task_round_steps=220,
    task_batch=32,
    task_learning_rate=2e-4,
    sensitivity_task="gsm8k",
    preference=("tldr", "gsm8k"),
)
