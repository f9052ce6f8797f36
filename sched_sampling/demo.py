"""Something to look at: a model that counts, one wrong token forced upon it, and what it says then."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from core.llm.examples import EncodedPair
from core.llm.finetuning import Finetuning
from core.llm.generation import Sampling, generate
from core.llm.modes import one_thread
from sched_sampling.baselines import SupervisedFineTuning
from sched_sampling.bash import BatchScheduledSampling
from sched_sampling.evaluation import recovery_rate
from sched_sampling.mixing import Mixing
from sched_sampling.schedule import linear
from sched_sampling.toys import counting, tiny_gpt

_LENGTH = 12
_FORCED_AT = 3


def demo(console: Console) -> None:
    """Train a plain and a BASH model on counting, derail both, and print where they go."""
    with one_thread():
        _demo(console)


def _demo(console: Console) -> None:
    pairs = counting(512, length=_LENGTH, seed=1)

    def training(num_steps: int) -> Finetuning:
        return Finetuning(num_steps=num_steps, batch_size=32, learning_rate=3e-3, schedule="constant")

    plain = tiny_gpt(16, _LENGTH + 1)
    console.print("\nA model of 100,000 parameters learns to count modulo 16 from the number it is given.\n")
    with console.status("Supervised fine-tuning ..."):
        SupervisedFineTuning(rounds=1, training=training(120)).fit(plain, None, pairs)
    mixed = copy.deepcopy(plain)
    method = BatchScheduledSampling(
        rounds=5,
        schedule=linear(0, 0.5),
        # It hardly errs at temperature 1, and would see no mistake of its own.
        mixing=Mixing(temperature=2.0),
        training=training(40),
    )
    with console.status("Five rounds with its own tokens in the context ..."):
        method.fit(mixed, None, pairs)
    pair = counting(1, length=_LENGTH, seed=5)[0]
    wrong = (pair.target_ids[_FORCED_AT] + 7) % 16
    table = Table("", *(str(t) for t in range(1, _LENGTH + 1)), box=None, padding=(0, 1))
    table.add_row(f"after {pair.prompt_ids[0]} comes", *map(str, pair.target_ids))
    for name, model in (("plain", plain), ("BASH", mixed)):
        forced = (*pair.target_ids[:_FORCED_AT], wrong)
        ((rest,),) = generate(
            model.eval(),
            [(*pair.prompt_ids, *forced)],
            Sampling(),
            max_new_tokens=_LENGTH - len(forced),
            ended=lambda ids: False,
            max_batch_tokens=100,
        )
        table.add_row(name, *_marked(pair, (*forced, *rest.token_ids)))
    console.print(f"Both get the wrong number {wrong} in place {_FORCED_AT + 1} (yellow) and go on by themselves:\n")
    console.print(table)
    every = counting(64, length=_LENGTH, seed=9)
    recovered = {name: recovery_rate(model, every).value for name, model in (("plain", plain), ("BASH", mixed))}
    console.print(
        f"\nOver many prompts and wrong numbers {recovered['plain']:.0%} of what follows is right for the plain model and "
        f"{recovered['BASH']:.0%} for the other.\nOn a task of yours:\n"
        "  python -m sched_sampling train testbed:tiny_llama world:questions:1 --output tuned --learning-rate 1e-3"
    )


def _marked(pair: EncodedPair, said: Sequence[int]) -> list[Text]:
    styles = [
        "bold yellow" if t == _FORCED_AT else "green" if token == gold else "red"
        for t, (token, gold) in enumerate(zip(said, pair.target_ids, strict=True))
    ]
    return [Text(str(token), style) for token, style in zip(said, styles, strict=True)]
