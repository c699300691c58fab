"""The trainer's weights into the engine, and the proof that they arrived."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lit_stepwise.errors import EngineError, MismatchError
from lit_stepwise.interfaces import Engine, Policy
from lit_stepwise.rollout.collector import Collector, Replica
from lit_stepwise.types import Completion, Request, Sampling

_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Probe:
    """What the engine said greedily to one prompt, and what the trainer says of that."""

    prompt_ids: Sequence[int]
    completion: Completion
    logprobs: Sequence[float]
    """[R] The trainer's, of what the engine said."""
    best: Sequence[float]
    """[R] The trainer's, of the token that it would have said."""

    @property
    def gap(self) -> float:
        """Mean absolute difference of the logprobs, in nats."""
        return _mean_gap(self.completion.logprobs, self.logprobs)

    @property
    def regret(self) -> float:
        """How much likelier the trainer holds a token than the one that the engine took, at most; in nats."""
        return max(best - taken for best, taken in zip(self.best, self.logprobs, strict=True))


def sync_weights(
    collector: Collector,
    policy: Policy,
    policy_version: int,
    prompts: Sequence[Sequence[int]],
    max_gap: float,
    before: Sequence[Probe] = (),
) -> list[Probe]:
    """Load the policy's weights, then let the engine speak greedily and compare it with the trainer.

    Requests may be pending: they go on with the new weights, and those that finish meanwhile go to the stash of the
    collector's turnstile, which the caller has passed.

    Args:
        collector: with the engine; every rank calls this together.
        policy: the Lightning module.
        policy_version: ``global_step`` of the weights.
        prompts: a few of the run.
        max_gap: largest mean absolute gap in nats; a stale or garbled weight is far beyond it.
        before: what came of the sync before this one.

    Returns:
        What was said and compared. Raises ``MismatchError`` with the likely cause when the two differ.
    """
    engine = collector.engine
    _load(engine, policy, policy_version)
    if engine.policy_version != policy_version:
        raise MismatchError(f"the engine says it has the weights of step {engine.policy_version}, not {policy_version}")
    completions = _speak(collector, prompts)
    said = [(prompt_ids, completion.response_ids) for prompt_ids, completion in zip(prompts, completions, strict=True)]
    probes = [
        Probe(prompt_ids, completion, logprobs.tolist(), best.tolist())
        for prompt_ids, completion, (logprobs, best) in zip(prompts, completions, policy.score(said), strict=True)
    ]
    for index, probe in enumerate(probes):
        if not probe.gap <= max_gap or not probe.regret <= max_gap:
            cause = _likely_cause(engine, probe, before[index] if before else None)
            raise MismatchError(
                f"after the weight sync of step {policy_version} the engine's logprobs are {probe.gap:.4f} nats off "
                f"the trainer's in the mean, and a token it took greedily is {probe.regret:.4f} nats less likely than "
                f"the trainer's (rollout.max_logprob_gap={max_gap}): {cause}"
            )
    return probes


def _load(engine: Engine, policy: Policy, policy_version: int) -> None:
    if not (policy.adapter_rank and engine.takes_adapters):
        engine.load_weights(policy.weights(), policy_version)
        return
    if engine.policy_version < 0:
        engine.load_weights(policy.weights(merged=False), policy_version)
    engine.load_adapter(policy.adapter(), policy_version)


def _speak(collector: Collector, prompts: Sequence[Sequence[int]]) -> list[Completion]:
    """What this rank's engine says; the ranks that share one learn it from the leader."""
    engine, replica = collector.engine, Replica.of(collector.fabric, collector.engine)
    if engine.num_pending:
        return _answers(collector, prompts)
    said: list[Completion] = []
    try:
        engine.begin_phase(seed=0)
        if replica.leads:
            said += _answers(collector, prompts)
            if said[0].num_cached_tokens:
                raise MismatchError(
                    f"after a weight sync {said[0].num_cached_tokens} tokens of a prompt came out of the engine's "
                    "prefix cache, which holds what older weights computed; the engine must reset it when weights "
                    "arrive"
                )
        else:
            engine.follow()
    finally:
        engine.end_phase()
    leader = replica.index * engine.tensor_parallel_size
    return collector.from_all_ranks(said)[leader] if engine.tensor_parallel_size > 1 else said


def _answers(collector: Collector, prompts: Sequence[Sequence[int]]) -> list[Completion]:
    """In the order of ``prompts``."""
    names = [f"probe-{index}" for index in range(len(prompts))]
    found: dict[str, Completion] = {}
    for name, prompt_ids in zip(names, prompts, strict=True):
        collector.engine.submit(Request(name, prompt_ids, _PROBE_TOKENS, Sampling(temperature=0.0), seed=0))
        if name == names[0]:  # alone: only a cache of older weights could have computed its prompt before
            found |= _step(collector, names)
    began, limit = time.monotonic(), collector.deadlines.turn_seconds
    while len(found) < len(names):
        found |= _step(collector, names)
        if limit is not None and time.monotonic() - began > limit:
            raise EngineError(f"the engine did not answer a probe within rollout.deadlines.turn_seconds={limit:g}")
    return [found[name] for name in names]


def _step(collector: Collector, names: Sequence[str]) -> dict[str, Completion]:
    """Those of that name that are finished; others go to the stash."""
    completions = {completion.request_id: completion for completion in collector.engine.step()}
    collector.turnstile.stash += [each for name, each in completions.items() if name not in names]
    return {name: each for name, each in completions.items() if name in names}


def _likely_cause(engine: Engine, probe: Probe, before: Probe | None) -> str:
    if any(value != value for value in (*probe.logprobs, *probe.completion.logprobs)):
        return "logprobs that are no numbers; the weights have diverged, or were garbled on their way"
    if before is not None and list(before.completion.response_ids) == list(probe.completion.response_ids):
        stale = _mean_gap(probe.completion.logprobs, before.logprobs)
        if stale < 0.1 * probe.gap:
            return "they equal the trainer's of the sync before, so the engine did not take the new weights"
    if probe.gap > 1.0:
        return "some weights are missing or garbled, e.g. a head that stayed as it was or a cache that was not reset"
    return (
        f"a few weights may have stayed as they were, or engine and trainer compute in different precision "
        f"({engine.description}); raise the limit only for the latter"
    )


def _mean_gap(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)
