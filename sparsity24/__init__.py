"""2:4 sparsity by a proximal operator: prune a trained language model so that of every four weights two are zero.

Kübler, Wang, Sabach, Ansari, Kleindessner, Budhathoki, Cevher, Karypis: A Proximal Operator for Inducing 2:4-Sparsity.
Transactions on Machine Learning Research, 2025. arXiv 2501.18015.

    import torch
    from core.llm.causal import CausalLM
    from sparsity24 import prune_model

    lm = CausalLM.load("testbed:tiny_llama")
    text = "Return the sum of two arrays, element by element."
    report = prune_model(lm.model, [torch.tensor([lm.encode(text)])], "prox-fast")
    print(report.mean_rel_loss)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
