"""The data, in the order in which it comes to be.

    Task --Environment.start--> Episode --agent loop--> Turn... = Trajectory --Advantage--> StepSample --plan-->
    MicroBatch --module--> logprobs --PolicyLoss--> optimizer --weight sync--> Engine --> next Trajectory

Letters in shapes:  P prompt tokens, R response tokens, B rows, S tokens of the longest row, N response tokens of a
micro-batch.  All token ids are those the engine read and sampled; nothing that was sampled is ever re-tokenised.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lit_stepwise.errors import ConfigError

if TYPE_CHECKING:  # importing torch here would cost every light command a second
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One thing to solve: a row of the data set. An environment adds the fields it needs in a subclass."""

    task_id: str
    """Unique within a file of tasks; it appears in stored trajectories."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What came of checking tasks before any is played."""

    tasks: Sequence[Task]
    """Those that can be played, in their order."""
    report: str = ""
    """For a person: what was found and what was left out, with the reason; empty when there is nothing to say."""


@dataclass(slots=True)
class Deal:
    """What the next iteration is about to play. The hook ``on_deal`` may change ``weights`` and ``max_turns``."""

    iteration: int
    tasks: Sequence[Task]
    """All that training may play."""
    prompt_tokens: Sequence[int]
    """Of each task: the length of its first prompt."""
    weights: list[float]
    """Of each task, from 0 to 1: the chance that it is played when its turn comes. Else another one is, drawn in
    proportion to the weights."""
    max_turns: int
    """Of each trajectory; ``limits.max_turns`` at most."""

    def check(self, limits: Limits) -> None:
        """Raises ``ConfigError`` for what cannot be played."""
        if len(self.weights) != len(self.tasks):
            raise ConfigError(
                f"on_deal of a callback left {len(self.weights)} weights for {len(self.tasks)} tasks; give one each"
            )
        wrong = next((weight for weight in self.weights if not 0 <= weight <= 1), None)
        if wrong is not None or not any(self.weights):
            raise ConfigError(
                f"on_deal of a callback left {f'the weight {wrong}' if wrong is not None else 'no weight above 0'} in "
                f"iteration {self.iteration}; give each task 0 to 1, and one of them more than 0"
            )
        if not 1 <= self.max_turns <= limits.max_turns:
            raise ConfigError(
                f"on_deal of a callback set max_turns={self.max_turns} in iteration {self.iteration}; use 1 to "
                f"rollout.limits.max_turns={limits.max_turns}, or raise that"
            )


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation, before it is rendered to tokens."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)  # no slots: jsonargparse reads the defaults from __dict__
class Sampling:
    """How the engine draws tokens. Ratios in the loss are exact only with ``top_p = 1``."""

    temperature: float = 1.0
    """Softmax temperature; 0 is greedy. The trainer divides its logits by the same number."""
    top_p: float = 1.0
    """Nucleus mass; below 1 the sampled distribution is cut and importance ratios are biased, which is said once."""
    stop: Sequence[str] = ()
    """Strings that end a response, besides those of the environment. They stay in the text, their tokens in the ids."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"rollout.sampling.temperature={self.temperature} is negative; 1 is the model as it is")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.sampling.top_p={self.top_p} is outside (0, 1]; 1 samples from all tokens")


@dataclass(frozen=True)  # no slots: jsonargparse reads the defaults from __dict__
class Limits:
    """Three token budgets, each checked before the engine is called, and the number of turns."""

    max_prompt_tokens: int = 1024
    """The first prompt of a trajectory. A task beyond it is refused before anything is played."""
    max_context_tokens: int = 2048
    """Prompt plus response of any turn; the engine is built for this many. A trajectory that has no room left ends."""
    max_new_tokens: int = 256
    """The response of one turn."""
    max_turns: int = 6
    """Turns of one trajectory."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_context_tokens", "max_new_tokens", "max_turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.limits.{name}={getattr(self, name)} leaves no room; use 1 or more")
        if self.max_prompt_tokens >= self.max_context_tokens:
            raise ConfigError(
                f"rollout.limits.max_prompt_tokens={self.max_prompt_tokens} leaves no room for a response within "
                f"max_context_tokens={self.max_context_tokens}; raise max_context_tokens"
            )


@dataclass(frozen=True)  # no slots: jsonargparse reads the defaults from __dict__
class Deadlines:
    """How long play may take. What runs out fails, is masked and counted, and the others go on; null never runs out.

    The deadline of a query is the executor's (``rollout.environment.executor``).
    """

    turn_seconds: float | None = 900.0
    """From the request for a response to the environment's answer; waiting for the engine counts, for a thread not."""
    trajectory_seconds: float | None = 3600.0
    """From the start to the end of a trajectory, waiting included."""
    phase_seconds: float | None = None
    """All of a phase of play; trajectories that are unfinished then have failed."""
    heartbeat_seconds: float | None = 300.0
    """With no sign of life for so long, the stacks of all threads go to stderr, once until there is another."""

    def __post_init__(self) -> None:
        for name in ("turn_seconds", "trajectory_seconds", "phase_seconds", "heartbeat_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"rollout.deadlines.{name}={value} has run out at once; use null for no deadline")


@dataclass(frozen=True)  # no slots: jsonargparse reads the defaults from __dict__
class Evaluation:
    """How validation, test and prediction play; stop strings and ``top_p`` are those of training unless given."""

    greedy: bool = True
    """One greedy attempt at each task: the accuracy."""
    samples_per_task: int = 0
    """Attempts drawn at random besides, for pass@k with k = 1, 2, 4 ... and this number."""
    temperature: float = 1.0
    """Of those."""
    top_p: float | None = None
    """Of those; null takes ``rollout.sampling.top_p``."""

    def __post_init__(self) -> None:
        if self.samples_per_task < 0:
            raise ConfigError(
                f"rollout.evaluation.samples_per_task={self.samples_per_task} is negative; 0 plays greedily alone"
            )
        if not self.greedy and not self.samples_per_task:
            raise ConfigError(
                "rollout.evaluation.samples_per_task=0 with greedy=False plays nothing; use greedy: true, or 1 sample "
                "or more"
            )
        if self.temperature < 0:
            raise ConfigError(f"rollout.evaluation.temperature={self.temperature} is negative; 1 is the model as it is")
        if self.samples_per_task and not self.temperature > 0:
            raise ConfigError(
                f"rollout.evaluation.temperature={self.temperature} draws the same response every time; use e.g. 1.0, "
                "or samples_per_task: 0 for greedy play alone"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout.evaluation.top_p={self.top_p} is outside (0, 1]; 1 samples from all tokens")

    def samplings(self, training: Sampling) -> list[Sampling]:
        """That of every attempt at a task, in the order of ``Trajectory.sample``."""
        top_p = training.top_p if self.top_p is None else self.top_p
        drawn = replace(training, temperature=self.temperature, top_p=top_p)
        return [replace(training, temperature=0.0)] * self.greedy + [drawn] * self.samples_per_task


@dataclass(frozen=True, slots=True)
class Request:
    """One response wanted from the engine."""

    request_id: str
    """Unique among the requests that are pending."""
    prompt_ids: Sequence[int]
    """[P] The full context, exactly as the engine is to read it."""
    max_new_tokens: int
    sampling: Sampling
    seed: int
    """A function of (seed, iteration, task, sample, turn); an engine that can, draws this response from it alone."""
    session: str = ""
    """Requests whose prompts begin alike have the same one, so that one cache can serve them all."""

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise ValueError(f"request {self.request_id} has an empty prompt")
        if self.max_new_tokens < 1:
            raise ValueError(f"request {self.request_id} asks for max_new_tokens={self.max_new_tokens}; use 1 or more")


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens of a response, one after the other, that the same weights sampled."""

    policy_version: int
    """``global_step`` of those weights."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled for one request."""

    request_id: str
    response_ids: Sequence[int]
    """[R] Every sampled token, the end-of-turn token and stop strings included."""
    logprobs: Sequence[float]
    """[R] Processed log-probability of each sampled token: after temperature and truncation."""
    finish_reason: Literal["stop", "length"]
    """``stop``: a stop string or the end-of-turn token; ``length``: a token budget ran out."""
    versions: Sequence[VersionSpan]
    """Of all its tokens in order; more than one where weights came in while it was sampled."""
    num_cached_tokens: int = 0
    """Prompt tokens that came out of the prefix cache."""

    def __post_init__(self) -> None:
        _same_length("response_ids", self.response_ids, "logprobs", self.logprobs)
        _cover(self.versions, self.response_ids)


class StopReason(str, Enum):
    """Why a trajectory ended."""

    DONE = "done"
    """The environment said so."""
    MAX_TURNS = "max_turns"
    """``limits.max_turns`` was reached before the environment was done."""
    CONTEXT = "context"
    """The next prompt would have left no room in ``limits.max_context_tokens``."""
    FAILED = "failed"
    """A fault of ours (``Trajectory.failure`` says which): never a reward, never a gradient."""


@dataclass(frozen=True, slots=True)
class SpanReward:
    """A reward for a part of a response: for its tokens alone, on top of what the turn earns."""

    start: int
    """First character of the part, from 0."""
    end: int
    """The character after its last."""
    reward: float
    """Of each token that has a character in the part."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What the environment says to one response."""

    observation: str
    """Text of the next user message; empty when ``done``."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Components of this turn's reward, by name; their sum is the reward."""
    span_rewards: Sequence[SpanReward] = ()
    """Rewards for parts of the response, where they stand."""
    done: bool = False
    success: bool = False
    """Only with ``done``: the task was solved. Its mean over tasks is the accuracy."""
    format_error: bool = False
    """The response held no action that could be understood."""
    failure: str = ""
    """Not empty: the environment itself failed (never the model's doing), and the trajectory is masked."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Whatever a person would want to read in the store (for SQL: statement, status, row count)."""
    state_key: str | None = None
    """What the episode knows after this turn, by content: equal keys are equal states. None where the environment
    offers none."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The model spoke once and the environment answered once."""

    prompt_ids: Sequence[int]
    """[P] The full context, exactly as the engine saw it."""
    response_ids: Sequence[int]
    """[R] The tokens the engine sampled."""
    rollout_logprobs: Sequence[float]
    """[R] Log-probability of each response token under the weights that sampled it."""
    versions: Sequence[VersionSpan]
    """Of all response tokens in order; more than one where weights came in while it was sampled."""
    text: str
    """The response as the environment read it."""
    feedback: Feedback
    finish_reason: Literal["stop", "length"] = "stop"
    environment_seconds: float = 0.0
    engine_seconds: float = 0.0
    """From the request to the response, waiting included."""
    num_cached_tokens: int = 0
    """Prompt tokens that came out of the engine's prefix cache."""
    token_rewards: Sequence[float] = ()
    """[R] What ``feedback.span_rewards`` come to at each response token; empty when there are none."""

    def __post_init__(self) -> None:
        _same_length("response_ids", self.response_ids, "rollout_logprobs", self.rollout_logprobs)
        _cover(self.versions, self.response_ids)
        if self.token_rewards:
            _same_length("response_ids", self.response_ids, "token_rewards", self.token_rewards)

    @property
    def policy_version(self) -> int:
        """``global_step`` of the oldest weights that sampled any of it."""
        return min(span.policy_version for span in self.versions)

    @property
    def reward(self) -> float:
        """Sum of the reward components of this turn."""
        return sum(self.feedback.rewards.values())


@dataclass(frozen=True, slots=True)
class Trajectory:
    """All turns of one attempt at one task."""

    task_id: str
    group: int
    """Index of the task within the iteration; trajectories of equal group are attempts at one task."""
    sample: int
    """Index of the attempt within its group."""
    turns: Sequence[Turn]
    stop_reason: StopReason
    temperature: float = 1.0
    """Of the sampling that played it."""
    failure: str = ""
    """Why it failed; only with ``StopReason.FAILED``."""

    def __post_init__(self) -> None:
        if bool(self.failure) != (self.stop_reason is StopReason.FAILED):
            raise ValueError(f"stop_reason={self.stop_reason.value} with failure={self.failure!r}; say both or neither")

    @property
    def reward(self) -> float:
        """Sum of the rewards of all turns."""
        return sum(turn.reward for turn in self.turns)

    @property
    def reward_components(self) -> dict[str, float]:
        """The same by component."""
        totals: dict[str, float] = {}
        for turn in self.turns:
            for name, reward in turn.feedback.rewards.items():
                totals[name] = totals.get(name, 0.0) + reward
        return totals

    @property
    def success(self) -> bool:
        """Whether the task was solved."""
        return bool(self.turns) and self.turns[-1].feedback.success

    @property
    def failed(self) -> bool:
        """Whether a fault of ours ended it; such a trajectory earns nothing and trains nothing."""
        return self.stop_reason is StopReason.FAILED


@dataclass(frozen=True, slots=True)
class Rollout:
    """What one rank played in one phase of play."""

    stage: Literal["train", "evaluate"]
    iteration: int
    """-1 when evaluating."""
    policy_version: int
    trajectories: Sequence[Trajectory]
    engine_seconds: float | None = 0.0
    """Wall time inside the engine; None on ranks whose engine follows another's."""
    environment_seconds: float = 0.0
    """Time inside the environment, summed over its threads, so it may exceed ``play_seconds``."""
    sync_seconds: float = 0.0
    """Wall time of the weight sync before this phase; 0 when the engine was up to date."""
    play_seconds: float = 0.0
    """Wall time of the whole phase without the sync."""
    wait_seconds: float = 0.0
    """Wall time in which the trainer had nothing to do but wait for this phase; all of it unless play runs ahead."""
    cycle_seconds: float = 0.0
    """Wall time from the moment that the iteration before was handed to the trainer; 0 for the first and in
    evaluation."""
    busy_seconds: float | None = None
    """What of ``cycle_seconds`` the engine was at work, whatever it played; None where ``engine_seconds`` is, and where
    there is no cycle."""
    num_cached_tokens: int = 0
    """Prompt tokens that came out of the engine's prefix cache."""
    environment_stats: Mapping[str, float] = field(default_factory=dict)
    """What ``Environment.stats`` grew by in this phase."""
    engine_failure: str = ""
    """What ended the engine, and with it the phase; empty when nothing did."""

    @property
    def num_generated_tokens(self) -> int:
        """Every token sampled, those of failed trajectories too."""
        return sum(len(turn.response_ids) for trajectory in self.trajectories for turn in trajectory.turns)


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank adapter on frozen weights, as PEFT saves one."""

    config: Mapping[str, Any]
    """What PEFT writes to ``adapter_config.json``."""
    weights: Iterable[tuple[str, Tensor]]
    """By the names of ``adapter_model.safetensors``, lazily and in the same order on every rank."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """A training row: one turn, or in the standard mode (``rollout.samples: trajectory``) all turns of a trajectory.

    ::

        one turn       prompt_ids  p0 p1      response_ids  r0 r1                response_mask  1 1
        all turns      prompt_ids  p0 p1      response_ids  r0 r1 o0 o1 r2       response_mask  1 1 0 0 1
    """

    prompt_ids: Sequence[int]
    """[P] Before the first sampled token."""
    response_ids: Sequence[int]
    """[R] Everything from the first sampled token on."""
    response_mask: Sequence[bool]
    """[R] True on sampled tokens, which are trained; False on what the environment said between them."""
    rollout_logprobs: Sequence[float]
    """[R] 0 where the mask is False, as are the next two."""
    advantages: Sequence[float]
    """[R] Of each token: that of its turn, and what token rewards add to it."""
    reward: float
    """Sum over the turns of this row."""
    group: int
    sample: int
    turn: int
    """0-based, of the first turn of this row."""
    policy_version: int
    """``global_step`` of the oldest weights that sampled any of it."""
    temperature: float = 1.0
    """Of the sampling; the trainer divides its logits by the same number."""
    old_logprobs: Sequence[float] = ()
    """[R] Of the trainer before the first update of the iteration; empty as long as nobody has asked it."""

    def __post_init__(self) -> None:
        for name in ("response_mask", "rollout_logprobs", "advantages"):
            _same_length("response_ids", self.response_ids, name, getattr(self, name))
        if self.old_logprobs:
            _same_length("response_ids", self.response_ids, "old_logprobs", self.old_logprobs)

    @property
    def num_tokens(self) -> int:
        """P + R, what a forward pass has to read."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_response_tokens(self) -> int:
        """Sampled tokens."""
        return sum(self.response_mask)


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The step samples of one optimizer step, on all ranks together (every rank holds the same)."""

    samples: Sequence[StepSample]
    iteration: int
    index: int
    """0-based position within the iteration."""
    pass_index: int = 0
    """How often these samples were trained before."""

    @property
    def num_response_tokens(self) -> int:
        """Tokens that the loss is a mean over."""
        return sum(sample.num_response_tokens for sample in self.samples)


class Segment(NamedTuple):
    """A chain of nodes of a ``TokenTree`` without a fork inside it, as long as it can be."""

    start: int
    stop: int
    """One past its last node."""
    end: int
    """One past the last node below it: ``stop`` where nothing follows."""
    parent: int
    """Index of the segment that it continues; -1 for a root."""


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Token sequences as a forest: a prefix that several have in common is there once.

    ::

        sequences      a b c            nodes, depth first   a b c d e
                       a b d e          positions            0 1 2 2 3
                                        ends                 5 5 3 5 5
        segments       a b | c | d e    (start, stop, end, parent)   (0 2 5 -1) (2 3 3 0) (3 5 5 0)

    All below node k are the nodes up to ``ends[k]``, so node q sees node k if and only if k <= q < ends[k].
    """

    token_ids: Tensor
    """[T] int64"""
    positions: Tensor
    """[T] int64, how many tokens come before."""
    ends: Tensor
    """[T] int64"""
    segments: Sequence[Segment]
    """In the order of their nodes."""

    def to(self, device: Any) -> TokenTree:
        """The same on another device."""
        return TokenTree(self.token_ids.to(device), self.positions.to(device), self.ends.to(device), self.segments)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Step samples that are forwarded together.

    What they share is computed once: T nodes of the tree for all tokens of all samples. A sampled token that is the
    same node in several samples is one of U targets, which is read at the node before it; but each of these N sampled
    tokens has an advantage, and with it a loss, of its own.

    ::

        samples   p0 p1 -> r0          tree      p0 p1 r0 r1     sources  1 2     targets  0 0 1
                  p0 p1 -> r0 r1                                 labels  r0 r1    turns    0 1 1
    """

    tree: TokenTree
    sources: Tensor
    """[U] int64, the node whose distribution each target is drawn from."""
    labels: Tensor
    """[U] int64, the token ids of the targets."""
    temperatures: Tensor
    """[U] float32"""
    targets: Tensor
    """[N] int64, which target each sampled token is; sample by sample, as are the next five."""
    turns: Tensor
    """[N] int64, the step sample of each sampled token."""
    rollout_logprobs: Tensor
    """[N] float32"""
    old_logprobs: Tensor
    """[N] float32, those of the samples, or of the rollout where they have none."""
    advantages: Tensor
    """[N] float32"""
    weights: Tensor
    """[N] float32, of each token's loss in the mini-batch (``algo.reductions.token_weights``)."""
    lengths: Sequence[int]
    """Of the step samples, in tokens."""

    def __post_init__(self) -> None:
        for name in ("turns", "rollout_logprobs", "old_logprobs", "advantages", "weights"):
            _same_size("targets", self.targets, name, getattr(self, name))
        for name in ("sources", "temperatures"):
            _same_size("labels", self.labels, name, getattr(self, name))

    def to(self, device: Any) -> MicroBatch:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in self.__slots__ if name != "lengths"}
        return MicroBatch(**moved, lengths=self.lengths)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What a policy loss says of N response tokens."""

    losses: Tensor
    """[N] Loss of each token, before any mean; 0 where the mask is False."""
    fractions: Mapping[str, Tensor] = field(default_factory=dict)
    """Per branch of the objective, [N] bool: True where that branch holds. Logged as ``train/<name>_fraction``."""


QueryStatus = Literal["ok", "error", "denied", "timeout", "limit", "infra"]


@dataclass(frozen=True, slots=True)
class QueryResult:
    """What one SQL statement came to. Whatever the model wrote, this is a result and never an exception."""

    status: QueryStatus
    """``ok``; ``error`` (the engine refused it); ``denied`` (we refused it); ``timeout``; ``limit`` (too much memory or
    too long a statement); ``infra`` (our fault: never becomes a reward)."""
    columns: Sequence[str] = ()
    rows: Sequence[tuple[Any, ...]] = ()
    truncated: bool = False
    """More rows or bytes existed than the limits allow; such a result is shown but never compared."""
    error: str = ""
    """For the model to read: one line, without paths."""
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class SQLTurn:
    """One turn of text-to-SQL as a reward sees it."""

    query: QueryResult | None
    """Of the statement that ran in this turn, final answers included; None when there was none."""
    is_solution: bool
    """The statement was given as the final answer."""
    correct: bool
    """It was, and its result equals the gold result."""
    format_error: bool
    """No action could be understood, or the conversation ended against the rules of the protocol."""
    last: bool
    """The trajectory ends with this turn."""
    repeated: bool = False
    """The same statement, but for blanks, comments and case, ran in an earlier turn of this trajectory."""
    progress: float = 0.0
    """How near the best result of this trajectory so far, this turn's included, is to the gold result: 0 to 1."""
    previous_progress: float = 0.0
    """The same before this turn."""
    response: str = ""
    """What the model wrote."""


def _same_length(name: str, values: Sequence[Any], other: str, others: Sequence[Any]) -> None:
    if len(values) != len(others):
        raise ValueError(
            f"{len(values)} {name} but {len(others)} {other}; ask the engine for exactly one logprob per sampled token"
        )


def _cover(versions: Sequence[VersionSpan], response_ids: Sequence[int]) -> None:
    if sum(span.num_tokens for span in versions) != len(response_ids):
        raise ValueError(f"the spans {versions} do not cover {len(response_ids)} response_ids; say of each token which")


def _same_size(name: str, values: Tensor, other: str, others: Tensor) -> None:
    if values.shape != others.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)} but {other} {tuple(others.shape)}")
