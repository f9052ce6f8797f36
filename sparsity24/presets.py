"""The three scales of the claims: embedded data, public data on a laptop, and the paper's own."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidInput, unknown_name
from core.experiment import Preset

# Spelt out, since naming them where they are defined would load torch; a test compares.
LAYER_SOURCES = ("iid", "block-correlated", "low-rank", "power-law", "model")
REFINEMENTS = ("gd", "nesterov", "cg", "exact")

# Added to a seed for a draw that no preset's seeds give: controls compare a method with itself there.
OTHER_DRAW = 1000


@dataclass(frozen=True, kw_only=True)
class SparsityPreset(Preset):
    """What a scale means here. `{seed}` in `model` is the seed of a verdict; without it the model is the same for all
    seeds and only the calibration draw differs. Data are (spec, split); an empty split means the set has none.
    """

    # Claims 1 to 5: groups of four drawn for each family of inputs, and steps of a sweep over lambda.
    num_groups: int = 2000
    num_lams: int = 120
    timing_groups: int = 131072
    # Claims 6 and 14: draws of a correlation matrix a seed, rows of weights a draw.
    toy_draws: int = 5
    toy_rows: int = 64
    # Claims 7 and 9: the reference's synthetic layers, or "model" for the layers of the model's first blocks
    # whose names match the pattern.
    layer_kinds: tuple[str, ...] = ("iid", "block-correlated", "low-rank", "power-law")
    layer_pattern: str = "*"
    layer_rows: int = 128
    layer_width: int = 256
    # Claims 8, 10, 12 and 13.
    model: str = "testbed:tiny_llama?seed={seed}"
    calibration: tuple[str, str] = ("embedded:corpus:scipy", "train")
    in_distribution: tuple[str, str] = ("embedded:corpus:scipy", "test")
    out_of_distribution: tuple[str, str] = ("embedded:corpus:pandas", "test")
    calibration_sequences: int = 128
    calibration_window: int = 128
    window: int = 128
    max_windows: int = 200
    num_blocks: int | None = None
    # Masked refinement: the paper's gradient steps, or CG where 100 steps are too dear.
    refinement: str = "gd"
    refinement_steps: int = 100
    cloze_items: int = 600

    def __post_init__(self) -> None:
        """Refuse values that no claim could use, before any work."""
        super().__post_init__()
        for name, value in self.values().items():
            if isinstance(value, int) and value < 1:
                raise InvalidInput(f"{self.name}: {name} counts something and must be at least 1; got {value}.")
        if self.window < 2:
            raise InvalidInput(f"{self.name}: a window of {self.window} tokens has nothing to predict; 2 is the least.")
        for kind in self.layer_kinds:
            if kind not in LAYER_SOURCES:
                raise unknown_name("kind of layer", kind, LAYER_SOURCES)
        if not self.layer_kinds or self.refinement not in REFINEMENTS:
            raise InvalidInput(
                f"{self.name}: name at least one kind of layer, and a refinement among {', '.join(REFINEMENTS)}; got "
                f"{self.layer_kinds} and {self.refinement!r}."
            )


QUICK = SparsityPreset(name="quick")

# The first blocks of a real language model: every method on five calibration draws would take hours on all thirty
# (`--set num_blocks=null` does that).
REAL = SparsityPreset(
    name="real",
    num_groups=10000,
    layer_kinds=("model",),
    model="pretrained:smollm2-135m",
    calibration=("wikitext2_small", "train"),
    in_distribution=("wikitext2_small", "test"),
    out_of_distribution=("tinyshakespeare", ""),
    calibration_sequences=8,
    calibration_window=512,
    window=512,
    max_windows=8,
    num_blocks=2,
    refinement="cg",
    refinement_steps=20,
    cloze_items=60,
)

# Reference section 5: 2 million tokens of C4, perplexity on C4 validation and WikiText-2, window 2048.
FULL = SparsityPreset(
    name="full",
    num_groups=1_000_000,
    timing_groups=1 << 22,
    layer_kinds=("model",),
    model="hub:openlm-research/open_llama_7b_v2",
    calibration=("c4", "train"),
    in_distribution=("c4", "valid"),
    out_of_distribution=("wikitext2", "test"),
    calibration_sequences=977,
    calibration_window=2048,
    window=2048,
    max_windows=256,
    cloze_items=1500,
)

# Two threads are the laptop that every figure here was measured on. Threads that wait by spinning make the many small
# operations of the prox fifty times slower as soon as anything else runs on the machine.
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
