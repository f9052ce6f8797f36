"""The model card of a pruned model: what was done to it, how it loads, and nothing that is not known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparsity24.model import PruneReport

_CARD = """---
{metadata}
---

# {title}

{base}, with {num_layers} weight matrices pruned to {pattern} sparsity: of every {m} neighbours along the input axis at most {n}
are not zero. It was pruned once, from activations, and not trained afterwards.

| | |
| --- | --- |
| method | {method} |
| settings | {settings} |
| refinement of the kept weights | {refinement} |
| calibration | {num_tokens} tokens{calibration} |
| mean relative loss of a layer | {mean_rel_loss:.4f} |
| layers left dense | {skipped} |

The relative loss of a layer is the squared error of its outputs over the calibration tokens, divided by the square of its dense
outputs. `sparsity24.json` has it for every layer. Embeddings, norms, routers and the head are dense.

## Loading

A folder with `model.safetensors` (or its shards) loads like any other:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```

A folder with `packed.safetensors` takes 9/16 of the space in 16 bits. Turn it into a plain folder with
`sparsity24.export.convert(folder, output_dir, "dense")`, or fill a model with `sparsity24.export.load_packed(folder, model)`.

## Speed

Zeros stored in a dense matrix do not make it faster. On an NVIDIA GPU of compute capability 8.0 or more,
`sparsity24.semi_structured.to_semi_structured(model)` converts the layers that its sparse tensor cores really run faster, which
takes hundreds of tokens at a time; generating one token at a time does not gain.

## License

This card claims none: the terms of the base model apply.

## Method

Kübler et al., *A Proximal Operator for Inducing 2:4-Sparsity*, TMLR 2025, arXiv 2501.18015; `{method}` is one of the methods
compared there or beside it.
"""


def model_card(model: Any, report: PruneReport) -> str:
    """The card as Markdown with its YAML front matter; the base model is named only when its Hub name is known."""
    from huggingface_hub import ModelCardData

    base = _hub_name(str(getattr(model.config, "_name_or_path", "") or ""))
    metadata = ModelCardData(
        base_model=base,
        library_name="transformers",
        tags=["sparse", report.pattern, "pruned", "sparsity24", report.method],
    )
    n, m = report.pattern.split(":")
    listed = ", ".join(f"`{name}`" for name in report.skipped[:20])
    more = f" and {len(report.skipped) - 20} more" if len(report.skipped) > 20 else ""
    return _CARD.format(
        metadata=metadata.to_yaml(),
        title=f"{base.rpartition('/')[2] if base else type(model).__name__}, {report.pattern} sparse",
        base=f"[{base}](https://huggingface.co/{base})" if base else f"A {type(model).__name__}",
        num_layers=len(report.layers),
        pattern=report.pattern,
        n=n,
        m=m,
        method=report.method,
        settings=", ".join(f"{name}={value}" for name, value in report.method_params.items()) or "none",
        refinement=report.refine if report.refine == "none" else f"{report.refine}, at most {report.steps} steps",
        num_tokens=report.num_tokens,
        calibration=f": {report.calibration}" if report.calibration else "",
        mean_rel_loss=report.mean_rel_loss,
        skipped=f"{listed}{more}" or "none",
    )


def _hub_name(name: str) -> str | None:
    """`owner/name`, or None for a folder of this machine and for names that are none of the Hub's."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) is None or name.startswith(".") or Path(name).exists():
        return None
    return name
