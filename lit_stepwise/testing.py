"""What tests of this package, and of what you build on it, may use: models made in a second, an engine and a game."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_stepwise.interfaces import Engine, Environment, Episode, TaskSource
from lit_stepwise.tiny_models import SPECIAL_TOKENS, chat_tokenizer, qwen3_config
from lit_stepwise.types import Completion, Feedback, Message, Request, Task, VersionSpan

if TYPE_CHECKING:
    from torch import Tensor

_MERGES = (("s", "q"), ("sq", "l"), ("<", "/"), (">", "Ċ"), ("Ġ", "s"), ("e", "r"), ("i", "n"), ("a", "n"))
"""Enough for words of several bytes; ``>Ċ`` is a token in which a stop string ends before the token does."""


def save_tiny_model(
    folder: str | Path,
    seed: int = 0,
    tie_word_embeddings: bool = True,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_context_tokens: int = 2048,
) -> Path:
    """Save a random Qwen3 and a byte-level tokenizer that speaks ChatML to ``folder``. Leaves torch's generator alone.

    The weights are larger than a fresh model's, so that its distributions are far from uniform.
    """
    import torch
    from transformers import Qwen3ForCausalLM

    tokenizer = _byte_tokenizer()
    wide = {"tie_word_embeddings": tie_word_embeddings, "initializer_range": 0.3}
    config = qwen3_config(tokenizer, hidden_size, num_layers, max_context_tokens, **wide)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _byte_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(_MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return chat_tokenizer(tokenizer)


def exact_logprobs(
    model: Any, prompt_ids: Sequence[int], response_ids: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """[R, V] What any engine must report: processed logprobs of one full forward pass over the exact ids, uncached."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([[*prompt_ids, *response_ids]]), use_cache=False).logits
    scaled: Tensor = logits[0, len(prompt_ids) - 1 : -1] / temperature
    return scaled.log_softmax(-1)


class ScriptedEngine(Engine):
    """Answers with ``script(request)``: the response ids. Finishes the oldest ``batch`` requests per step.

    ``requests`` keeps all it was asked, ``weights`` what it was last given.
    """

    def __init__(self, script: Callable[[Request], Sequence[int]], batch: int = 1, logprob: float = -0.5) -> None:
        self.script = script
        self.batch = batch
        self.logprob = logprob
        self.requests: list[Request] = []
        self.weights: dict[str, Tensor] = {}
        self.phases: list[int] = []
        self._pending: deque[Request] = deque()
        self._version = -1

    def start(self, model_path: str, max_context_tokens: int, adapter_rank: int = 0) -> None:
        """Nothing to load."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Keep a copy."""
        self.weights = {name: tensor.clone() for name, tensor in weights}
        self._version = policy_version

    def begin_phase(self, seed: int) -> None:
        """Note the seed."""
        self.phases.append(seed)

    def submit(self, request: Request) -> None:
        """Queue it."""
        self.requests.append(request)
        self._pending.append(request)

    def step(self) -> list[Completion]:
        """Answer the oldest."""
        return [self._answer(self._pending.popleft()) for _ in range(min(self.batch, len(self._pending)))]

    def _answer(self, request: Request) -> Completion:
        ids = list(self.script(request))[: request.max_new_tokens]
        return Completion(
            request.request_id, ids, [self.logprob] * len(ids), "stop", [VersionSpan(self._version, len(ids))]
        )

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget them."""
        self._pending = deque(request for request in self._pending if request.request_id not in request_ids)

    @property
    def num_pending(self) -> int:
        """Queued and not answered."""
        return len(self._pending)

    @property
    def policy_version(self) -> int:
        """Of the last ``load_weights``."""
        return self._version

    @property
    def description(self) -> str:
        """For people."""
        return "scripted"

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CountdownTask(Task):
    """Say a shorter response each turn until it has ``goal`` characters or fewer."""

    goal: int


@dataclass
class Countdown(Environment):
    """A game that needs no model to be good: each turn earns 0.5 if the response is shorter than the one before.

    ``crash_on`` is text that makes the environment raise, ``fail_on`` text that makes it report a fault of its own.
    """

    crash_on: str | None = None
    fail_on: str | None = None

    def start(self, task: Task, max_turns: int) -> Episode:
        """Begin."""
        assert isinstance(task, CountdownTask)
        return _CountdownEpisode(task, self)


class _CountdownEpisode(Episode):
    def __init__(self, task: CountdownTask, settings: Countdown) -> None:
        self.task = task
        self.settings = settings
        self.last = 1_000_000

    def prompt(self) -> Sequence[Message]:
        return [Message("user", f"count down to {self.task.goal}")]

    def step(self, response: str) -> Feedback:
        if self.settings.crash_on is not None and self.settings.crash_on in response:
            raise RuntimeError(f"crashed on {response!r}")
        if self.settings.fail_on is not None and self.settings.fail_on in response:
            return Feedback("", done=True, failure="the game is out of order")
        shorter, self.last = len(response) < self.last, len(response)
        done = len(response) <= self.task.goal
        return Feedback(
            observation="" if done else f"{len(response)} is too long",
            rewards={"shorter": 0.5 * shorter, "goal": 1.0 * done},
            done=done,
            success=done,
        )


@dataclass
class CountdownTasks(TaskSource):
    """``read("3")`` gives tasks with the goals 1, 2 and 3."""

    def read(self, file: str) -> list[Task]:
        """As many tasks as ``file`` says."""
        return [CountdownTask(task_id=f"goal-{goal}", goal=goal) for goal in range(1, int(file) + 1)]
