"""The trainer's weights into the engine, and the proof that they arrived."""

from __future__ import annotations

from collections.abc import Sequence

from lit_stepwise.errors import EngineError
from lit_stepwise.interfaces import Engine, Policy
from lit_stepwise.types import Request, Sampling


def sync_weights(
    engine: Engine, policy: Policy, policy_version: int, probe_ids: Sequence[int], max_gap: float, num_tokens: int = 8
) -> float:
    """Load the policy's weights, then let the engine speak greedily and compare its logprobs with the trainer's.

    Args:
        engine: with nothing pending.
        policy: the Lightning module; every rank calls this together.
        policy_version: ``global_step`` of the weights.
        probe_ids: [P] a prompt of the run.
        max_gap: largest mean absolute gap in nats; a stale or garbled weight is far beyond it.
        num_tokens: tokens to compare.

    Returns:
        The mean absolute gap. Raises ``EngineError`` when it exceeds ``max_gap`` or is not a number.
    """
    engine.load_weights(policy.weights(), policy_version)
    engine.begin_phase(seed=0)
    engine.submit(Request("probe", probe_ids, num_tokens, Sampling(temperature=0.0), seed=0))
    completions = engine.step()
    while not completions:
        completions = engine.step()
    probe = completions[0]
    expected: list[float] = policy.score(probe_ids, probe.response_ids).tolist()
    gap = sum(abs(a - b) for a, b in zip(probe.logprobs, expected, strict=True)) / len(expected)
    if not gap <= max_gap:
        raise EngineError(
            f"after the weight sync of step {policy_version} the engine's logprobs are {gap:.4f} nats off the "
            f"trainer's (rollout.max_logprob_gap={max_gap}); the engine does not play the policy that is trained. "
            "Raise the limit only if engine and trainer are meant to run in different precision"
        )
    return gap
