"""Fine-tune a language model on contexts with its own tokens (BASH), or to correct its own answers (RAC).

Cen, Liu, Zeng, Chaudhari, Rangwala, Karypis, Fakoor: Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated
Tokens. Transactions on Machine Learning Research, 2025. arXiv 2410.14655.

    from core.llm.causal import CausalLM
    from core.llm.finetuning import Finetuning
    from sched_sampling import BatchScheduledSampling, linear

    lm = CausalLM.load("testbed:tiny_llama")
    pairs = [{"prompt": "2 + 3 =", "completion": " 5"}, {"prompt": "4 + 2 =", "completion": " 6"}]
    method = BatchScheduledSampling(rounds=3, schedule=linear(0, 0.3), training=Finetuning(num_steps=5, learning_rate=1e-3))
    print(method.fit(lm.model, lm.tokenizer, pairs)[-1].built)

`bash_dataset` and `rac_dataset` make the data set alone, for the trainer that you already use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
