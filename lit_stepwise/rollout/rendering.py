"""Conversations to token ids, without ever re-tokenising what was sampled."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout.chat_template import first_difference, frame, opening, plain_tokens, render, tokens
from lit_stepwise.types import Feedback, Message, SpanReward, Turn, VersionSpan

History = Literal["append", "keep_think", "strip_think"]

_THOUGHT = re.compile(r".*</think>\n*", re.DOTALL)
"""Up to the last end of a thought, as the templates of models that think cut it."""


@dataclass(frozen=True, slots=True)
class ChatRenderer:
    """Puts together what the chat template writes around messages, the observations and the ids that were sampled.

    ::

        first prompt     <messages, up to where the assistant speaks>
        append           <last prompt> <sampled> <end of turn, header> <observation> <end of turn, header>
        keep_think       <messages> <opening, sampled> <between> <observation> <between> <opening, sampled> ...
        strip_think      the same with only what follows the thought of each <opening, sampled>

    ``append`` never changes what the model has read. The others write each prompt as the template writes the whole
    conversation then; of a thought that never ended ``strip_think`` strips nothing, as the templates do.
    """

    tokenizer: Any
    """A Hugging Face tokenizer with a chat template."""
    after_response: tuple[int, ...]
    """What closes the assistant's turn and opens the user's; its first id is the end-of-turn token."""
    after_observation: tuple[int, ...]
    """What closes the user's turn and lets the assistant speak."""
    history: History = "append"
    opening: tuple[int, ...] = ()
    """What a prompt ends with beyond the header of an old answer: a thought that it opens, or an empty one."""
    difference: str = ""
    """For a person: where the chat template would write old turns differently than ``append``; empty: nowhere."""

    @classmethod
    def of(cls, tokenizer: Any, history: History = "append") -> ChatRenderer:
        """Read off the chat template what is needed, and compare with it.

        Raises ``ConfigError`` for a template that turns cannot be put into, or that writes them in another way than
        ``history`` says.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"model.model_path: the tokenizer of {tokenizer.name_or_path} has no chat template; "
                "use an instruction-tuned model, or save its tokenizer with a chat_template"
            )
        messages = [Message("user", "hi")]
        _, after_response, after_observation = (tokens(tokenizer, text) for text in frame(tokenizer, messages, 1))
        opened = tokens(tokenizer, opening(tokenizer, messages))
        return cls(tokenizer, after_response, after_observation, history, opened)._compared(messages)

    def first_prompt(self, messages: Sequence[Message]) -> list[int]:
        """[P] The ids of ``messages``, ready for the assistant to speak."""
        return [*tokens(self.tokenizer, render(self.tokenizer, messages))]

    def next_prompt(self, messages: Sequence[Message], turns: Sequence[Turn]) -> list[int]:
        """[P'] What the model reads after ``turns``, whose conversation began with ``messages``."""
        if self.history == "append":
            return self.append(turns[-1].prompt_ids, turns[-1].response_ids, turns[-1].feedback.observation)
        first, *pieces = (tokens(self.tokenizer, text) for text in frame(self.tokenizer, messages, len(turns)))
        ids = [*first]
        for turn, before, after in zip(turns, pieces[::2], pieces[1::2], strict=True):
            ids += self._exchange(self._remembered(turn.response_ids), before, turn.feedback.observation, after)
        return ids

    def append(self, prompt_ids: Sequence[int], response_ids: Sequence[int], observation: str) -> list[int]:
        """[P'] The exact ids of a turn followed by ``observation`` as the user's message."""
        return [*prompt_ids, *self._exchange(response_ids, self.after_response, observation, self.after_observation)]

    def text(self, response_ids: Sequence[int]) -> str:
        """The response as the environment reads it, without the end-of-turn token."""
        ended = bool(response_ids) and response_ids[-1] in (self.after_response[0], self.tokenizer.eos_token_id)
        decoded: str = self.tokenizer.decode(response_ids[:-1] if ended else response_ids)
        return decoded

    def token_rewards(self, response_ids: Sequence[int], spans: Sequence[SpanReward]) -> list[float]:
        """[R] What rewards for parts of ``text(response_ids)`` come to at each token; empty when there are none."""
        if not spans:
            return []
        rewards = [0.0] * len(response_ids)
        for span in spans:
            first = self._num_tokens_up_to(span.start + 1, response_ids) - 1
            last = self._num_tokens_up_to(span.end, response_ids)
            for position in range(first, last):
                rewards[position] += span.reward
        return rewards

    def _exchange(
        self, response_ids: Sequence[int], before: Sequence[int], observation: str, after: Sequence[int]
    ) -> list[int]:
        """A response and an observation, with the ids ``before`` and ``after`` the latter."""
        if response_ids and response_ids[-1] == before[0]:  # the model closed its turn itself
            before = before[1:]
        # a database cell may spell <|im_start|>: it must stay text
        return [*response_ids, *before, *plain_tokens(self.tokenizer, observation), *after]

    def _remembered(self, response_ids: Sequence[int]) -> list[int]:
        """What a later prompt shows of a response."""
        ids = [*self.opening, *response_ids]
        text: str = self.tokenizer.decode(ids)
        thought = _THOUGHT.match(text)
        if self.history == "keep_think" or thought is None:
            return ids
        count = self._num_tokens_up_to(thought.end(), ids)
        while not text.startswith(leading := self.tokenizer.decode(ids[:count])):  # half a character
            count += 1
        return [*tokens(self.tokenizer, leading[thought.end() :]), *ids[count:]]

    def _num_tokens_up_to(self, num_chars: int, response_ids: Sequence[int]) -> int:
        """The least number of leading tokens whose text has ``num_chars`` characters."""
        return bisect_left(
            range(len(response_ids)), num_chars, key=lambda count: len(self.tokenizer.decode(response_ids[:count]))
        )

    def _compared(self, messages: Sequence[Message]) -> ChatRenderer:
        """The same, once a sample conversation was compared with the template's."""
        ours, theirs = self._sample(messages)
        difference = first_difference(self.tokenizer, ours, tokens(self.tokenizer, theirs))
        if not difference:
            return self
        if self.history == "append":
            told = f"the chat template would write old turns differently ({difference})"
            return replace(self, difference=f"{told}; rollout.history=append keeps what was sampled")
        dropped = self.history == "keep_think" and "thought 1" not in theirs
        does = "leaves the thoughts of old turns out" if dropped else "writes old turns differently"
        way_out = "append or strip_think" if self.history == "keep_think" else "append"
        raise ConfigError(
            f"rollout.history={self.history}, but the chat template of {self.tokenizer.name_or_path} {does} "
            f"({difference}); use {way_out}"
        )

    def _sample(self, messages: Sequence[Message]) -> tuple[list[int], str]:
        """The prompt after two turns with thoughts, and what the template makes of the same conversation."""
        opened = self.tokenizer.decode(self.opening)
        conversation = [*messages]
        turns: list[Turn] = []
        prompt_ids = self.first_prompt(messages)
        for number in (1, 2):
            thought, answer = f"<think>\nthought {number}\n</think>\n\n", f"answer {number}"
            response = (thought + answer).removeprefix(opened)
            ids = [*tokens(self.tokenizer, response), self.after_response[0]]
            spans, feedback = [VersionSpan(0, len(ids))], Feedback(f"observation {number}")
            turns.append(Turn(prompt_ids, ids, [0.0] * len(ids), spans, response, feedback))
            remembered = answer if self.history == "strip_think" else opened + response
            conversation += [Message("assistant", remembered), Message("user", feedback.observation)]
            prompt_ids = self.next_prompt(messages, turns)
        return prompt_ids, render(self.tokenizer, conversation)
