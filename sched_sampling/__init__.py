"""Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens (Cen et al., TMLR 2025, arXiv 2410.14655).

    from core.llm.causal import CausalLM
    from core.llm.finetuning import Finetuning
    from sched_sampling import BatchScheduledSampling, linear

    lm = CausalLM.load("testbed:tiny_llama")
    pairs = [{"prompt": "Question: 2 + 3?", "completion": " 5"}, {"prompt": "Question: 4 + 1?", "completion": " 5"}]
    method = BatchScheduledSampling(rounds=3, schedule=linear(0, 0.3), training=Finetuning(num_steps=10, batch_size=2))
    method.fit(lm.model, lm.tokenizer, pairs)

`bash_dataset` and `rac_dataset` make the data set alone, for the trainer that you already use.
"""
