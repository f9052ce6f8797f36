"""Language models: `causal` scores and generates with any transformers causal model."""
