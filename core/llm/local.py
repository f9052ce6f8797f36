"""`LocalChat`: conversations with a `CausalLM` on this machine, through the chat template of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.data.cache import digest
from core.errors import InvalidInput
from core.llm.base import Chat
from core.llm.batching import length_buckets
from core.llm.causal import CausalLM, Generation
from core.llm.replies import Answer, Conversation, Prices, Reply, Settings, Usage


class LocalChat(Chat):
    """Conversations with a `CausalLM`, in batches of at most `max_batch_tokens` tokens, prompt and replies together.

    A tokenizer without a chat template, as a base model has, gets a plain one: each message is its role, a colon, its text
    and an empty line ("User: Which?"), "Assistant:" ends the prompt, and "User:" after an empty line ends the reply.

    Control tokens that stand in a message as text are read as control tokens, as servers do: check texts that are not
    yours.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        max_batch_tokens: int = 8192,
        cache: Path | str | None = None,
        prices: Prices | None = None,
    ) -> None:
        super().__init__(cache=cache, prices=prices)
        self.lm, self.max_batch_tokens = lm, max_batch_tokens

    @property
    def source(self) -> Mapping[str, str]:
        """Where the weights came from, and the hash of the template that makes one text of a conversation."""
        return {"model": self.lm.provenance, "template": digest([str(self._template)])[:16]}

    @property
    def _template(self) -> Any:
        return self.lm.tokenizer.chat_template

    def answers(self, conversations: Sequence[Conversation], settings: Settings) -> Iterator[tuple[int, Answer]]:
        """Each conversation's position and answer, batch by batch.

        Raises `InvalidInput` when a conversation does not fit the model's context or its template.
        """
        prompts = [self._prompt(conversation) for conversation in conversations]
        self._check_lengths(prompts, settings.max_tokens)
        sizes = [(len(prompt) + settings.max_tokens) * settings.n for prompt in prompts]
        stop = settings.stop if self._template else (*settings.stop, "\n\nUser:")
        for batch in length_buckets(sizes, self.max_batch_tokens):
            generated = self.lm.generate(
                [prompts[i] for i in batch],
                max_new_tokens=settings.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p if settings.top_p < 1 else None,
                num_return=settings.n,
                seed=settings.seed or 0,
                stop=stop,
                max_batch_tokens=self.max_batch_tokens,
            )
            for i, generations in zip(batch, generated, strict=True):
                replies = tuple(self._reply(generation, settings.max_tokens, stop) for generation in generations)
                total = sum(len(generation.token_ids) for generation in generations)
                yield i, Answer(replies, Usage(1, prompt_tokens=len(prompts[i]), completion_tokens=total))

    def _prompt(self, conversation: Conversation) -> list[int]:
        if not self._template:
            text = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in conversation)
            return self.lm.encode(f"{text}Assistant:")
        try:
            text = self.lm.tokenizer.apply_chat_template(
                [dict(message) for message in conversation], tokenize=False, add_generation_prompt=True
            )
        # Templates raise what their authors chose to, for a system message or two turns of one side.
        except Exception as error:
            raise InvalidInput(
                f"The chat template of {self.lm.provenance} refuses this conversation: {error}. Roles: "
                f"{', '.join(message['role'] for message in conversation)}."
            ) from error
        # The template writes the start token itself.
        ids: list[int] = self.lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _check_lengths(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        limit = self.lm.context_length
        longest = max(map(len, prompts))
        if limit is not None and longest + max_tokens > limit:
            raise InvalidInput(
                f"A conversation of {longest} tokens and max_tokens={max_tokens} do not fit the model, which reads at most "
                f"{limit} tokens. Shorten the conversation or lower max_tokens."
            )

    def _reply(self, generation: Generation, max_tokens: int, stop: Sequence[str]) -> Reply:
        ids = generation.token_ids
        ended = (
            len(ids) < max_tokens
            or ids[-1] in self.lm.end_tokens()
            or any(word in self.lm.tokenizer.decode(ids) for word in stop)
        )
        text = generation.text if self._template else generation.text.removeprefix(" ")
        return Reply(text, "stop" if ended else "length", generation.log_prob)
