"""The three scales of the claims: toy tasks and the embedded world, a real model on public data, and the paper's own."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput
from core.experiment import Preset

# Threads that wait by spinning cost tens of times their work as soon as anything else runs on the machine.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}

# Added to a seed for a run that no preset's seeds give: controls compare a method with itself there.
OTHER_DRAW = 1000


@dataclass(frozen=True, kw_only=True)
class SamplingPreset(Preset):
    """What a scale means here."""

    # Claims 1 to 3, 7 and 12: counting. Rows, updates of the base, then rounds and updates a round of what continues it.
    toy_pairs: int = 512
    toy_batch: int = 64
    toy_base_steps: int = 100
    toy_rounds: int = 8
    toy_round_steps: int = 50
    toy_learning_rate: float = 3e-3
    toy_beta: float = 0.5
    # A model that counts nearly perfectly errs too rarely at temperature 1 to see a mistake of its own.
    toy_temperature: float = 2.0
    # Besides `mixed`, in the table of claim 1.
    toy_proposals: tuple[str, ...] = ()
    # Answers decoded under noise, for each of the sixteen prompts; more where a curve by position is to be told from noise.
    toy_draws: int = 64
    law_draws: int = 192
    # Claim 2: running sums, where contexts with wrong tokens do harm.
    scratchpad_digits: int = 3
    scratchpad_pairs: int = 2000
    scratchpad_test: int = 200
    scratchpad_batch: int = 32
    scratchpad_base_steps: int = 300
    scratchpad_rounds: int = 3
    scratchpad_round_steps: int = 40
    scratchpad_beta: float = 0.3
    # Claim 4: rows of a data set with two answers.
    bias_pairs: int = 8192
    # Claim 7: tokens of an answer, rows of a batch and updates of the timed runs.
    timing_length: int = 96
    timing_batch: int = 8
    timing_steps: int = 12
    # Claim 8: draws of a model, a mixing probability, a temperature and masks.
    sampler_draws: int = 20
    # Claim 12: open text, cut into prompts and answers of so many tokens.
    text_model: str = "testbed:tiny_llama"
    text: tuple[str, str] = ("embedded:corpus:scipy", "test")
    text_pairs: int = 64
    text_prompt: int = 32
    text_answer: int = 64
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
# A real language model takes a CPU-second for an update on one short demonstration, one for an answer and three for its
# exposure. What fits into forty CPU-minutes shows that the experiment runs on real text, not what comes out of it.
REAL = SamplingPreset(
    name="real",
    text_model="pretrained:smollm2-135m",
    text=("wikitext2_small", "test"),
    text_pairs=16,
    tasks=("dialogsum", "gsm8k"),
    task_model="pretrained:smollm2-135m",
    task_lora_rank=16,
    task_pairs=8,
    task_valid=4,
    task_test=4,
    task_context=128,
    task_answer_tokens=40,
    task_base_steps=4,
    task_rounds=2,
    task_round_steps=2,
    task_batch=2,
    sensitivity_task="dialogsum",
)
FULL = SamplingPreset(
    name="full",
    toy_proposals=("gold", "rollout"),
    scratchpad_digits=6,
    scratchpad_batch=64,
    scratchpad_base_steps=900,
    scratchpad_rounds=6,
    scratchpad_round_steps=150,
    text_model="hub:mistralai/Mistral-7B-v0.1",
    text=("wikitext2", "test"),
    text_pairs=256,
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
