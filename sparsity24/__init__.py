"""sparsity24."""
