"""The paper's claims as experiments: on the operator, on single layers, and on language models."""

from sparsity24.claims import layers, models, operator

__all__ = ["layers", "models", "operator"]
