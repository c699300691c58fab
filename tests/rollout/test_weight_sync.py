"""The proof that the engine plays the policy that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_stepwise.engines import TransformersEngine
from lit_stepwise.errors import EngineError, MismatchError
from lit_stepwise.rollout.collector import Collector
from lit_stepwise.rollout.weight_sync import Probe, sync_weights
from lit_stepwise.testing import Countdown, ScriptedEngine, exact_logprobs
from lit_stepwise.types import Adapter, Completion, Deadlines, Limits, Request, Sampling

PROMPTS = [[65, 66, 67], [65, 66, 68, 69, 70]]


def collector(engine: Any, **deadlines: float) -> Collector:
    return Collector(
        fabric=Fabric(accelerator="cpu", devices=1),
        engine=engine,
        environment=Countdown(),
        renderer=None,
        limits=Limits(),
        deadlines=Deadlines(**deadlines),
        deterministic=True,
        num_threads=1,
        seed=0,
    )


class FixedPolicy:
    """Scores every token the same."""

    model_path = ""
    adapter_rank = 0
    staleness = 0

    def __init__(self, logprob: float, best: float | None = None) -> None:
        self.logprob = logprob
        self.best = logprob if best is None else best

    def weights(self, merged: bool = True) -> Iterable[tuple[str, Tensor]]:
        yield "w", torch.tensor([2.0 if merged else 3.0])

    def adapter(self) -> Adapter:
        return Adapter({"r": 4}, iter([("a", torch.tensor([5.0]))]))

    def score(self, said: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Tensor, Tensor]]:
        sizes = [len(response_ids) for _, response_ids in said]
        return [(torch.full((size,), self.logprob), torch.full((size,), self.best)) for size in sizes]


def test_a_weight_sync_is_proved_by_a_few_prompts_of_the_run() -> None:
    engine = ScriptedEngine(lambda request: [1, 2, 3], logprob=-0.5)
    probes = sync_weights(collector(engine), FixedPolicy(-0.75, -0.5), 12, PROMPTS, max_gap=0.3)
    assert [probe.gap for probe in probes] == [0.25, 0.25]
    assert [probe.regret for probe in probes] == [0.25, 0.25]
    assert (engine.weights["w"].item(), engine.policy_version, engine.num_pending) == (2.0, 12, 0)
    assert [list(request.prompt_ids) for request in engine.requests] == PROMPTS
    assert {request.sampling.temperature for request in engine.requests} == {0.0}


@pytest.mark.parametrize(
    ("logprob", "best", "cause"),
    [
        (-0.1, -0.1, "0.4000 nats off .*stayed as they were, or engine and trainer compute in different precision"),
        (-0.5, -0.1, "a token it took greedily is 0.4000 nats less likely"),
        (-3.5, -3.5, "some weights are missing or garbled"),
        (math.nan, math.nan, "the weights have diverged"),
    ],
)
def test_an_engine_that_plays_another_policy_stops_the_run(logprob: float, best: float, cause: str) -> None:
    engine = ScriptedEngine(lambda request: [1], logprob=-0.5)
    with pytest.raises(MismatchError, match=rf"^after the weight sync of step 12 .*{cause}"):
        sync_weights(collector(engine), FixedPolicy(logprob, best), 12, PROMPTS, max_gap=0.3)


def test_an_engine_that_says_what_the_weights_before_would_have_said_is_named_stale() -> None:
    engine = ScriptedEngine(lambda request: [1, 2], logprob=-0.5)
    before = sync_weights(collector(engine), FixedPolicy(-0.51), 12, PROMPTS, max_gap=0.3)
    with pytest.raises(MismatchError, match="they equal the trainer's of the sync before"):
        sync_weights(collector(engine), FixedPolicy(-0.9), 13, PROMPTS, max_gap=0.3, before=before)


class Forgetful(ScriptedEngine):
    """Answers the first prompt out of a cache."""

    def _answer(self, request: Request) -> Completion:
        return replace(super()._answer(request), num_cached_tokens=64)


def test_a_cache_that_outlives_a_sync_stops_the_run() -> None:
    with pytest.raises(MismatchError, match=r"64 tokens of a prompt came out of the engine's prefix cache"):
        sync_weights(collector(Forgetful(lambda request: [1])), FixedPolicy(-0.5), 3, PROMPTS, max_gap=0.3)


def test_requests_in_play_go_on_and_what_they_finish_is_kept_for_whoever_plays() -> None:
    engine = ScriptedEngine(lambda request: [7, 8] if request.request_id == "2-0-1" else [1])
    playing = collector(engine)
    engine.submit(Request("2-0-1", [9, 9], 4, Sampling(), seed=0))
    sync_weights(playing, FixedPolicy(-0.5), 4, PROMPTS, max_gap=0.3)
    assert engine.phases == []  # a phase begins only with nothing pending
    (kept,) = playing.turnstile.stash
    assert (kept.request_id, list(kept.response_ids), kept.versions[0].policy_version) == ("2-0-1", [7, 8], 4)


def test_an_engine_that_never_answers_the_probe_ends_in_an_error() -> None:
    engine = ScriptedEngine(lambda request: [1], batch=0)
    with pytest.raises(EngineError, match=r"did not answer a probe within rollout.deadlines.turn_seconds=0\.05"):
        sync_weights(collector(engine, turn_seconds=0.05), FixedPolicy(-0.5), 4, PROMPTS, max_gap=0.3)


class WithAdapters(ScriptedEngine):
    """Takes adapters."""

    takes_adapters = True
    adapters = 0

    def load_adapter(self, adapter: Adapter, policy_version: int) -> None:
        self.adapters += 1
        self.weights |= dict(adapter.weights)
        self._version = policy_version


def test_of_an_adapter_the_weights_below_are_loaded_once_and_merged_ones_where_the_engine_takes_none() -> None:
    policy, engine, plain = FixedPolicy(-0.5), WithAdapters(lambda request: [1]), ScriptedEngine(lambda request: [1])
    policy.adapter_rank = 4
    for version in (2, 5):
        sync_weights(collector(engine), policy, version, PROMPTS, max_gap=0.3)
    sync_weights(collector(plain), policy, 5, PROMPTS, max_gap=0.3)
    assert (engine.weights["w"].item(), engine.weights["a"].item(), engine.adapters) == (3.0, 5.0, 2)
    assert (plain.weights["w"].item(), list(plain.weights)) == (2.0, ["w"])


class ModelPolicy(FixedPolicy):
    """A real model."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def weights(self, merged: bool = True) -> Iterable[tuple[str, Tensor]]:
        yield from ((name, weight.detach()) for name, weight in self.model.named_parameters())

    def score(self, said: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Tensor, Tensor]]:
        return [self._score(*each) for each in said]

    def _score(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        logprobs = exact_logprobs(self.model, prompt_ids, response_ids)
        taken = logprobs.gather(-1, torch.tensor(response_ids)[:, None]).squeeze(-1)
        return taken, logprobs.max(-1).values

    def move(self) -> None:
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += 0.3 * torch.randn_like(weight) * weight.std()


class SkipsTheHead(TransformersEngine):
    """Takes all weights but the head."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        old = self._model.get_output_embeddings().weight.detach().clone()
        super().load_weights(((n, old if n == "lm_head.weight" else w) for n, w in weights), policy_version)


class KeepsTheCache(TransformersEngine):
    """Goes on with what older weights computed."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        cached = self._rows["cached"].copy()
        super().load_weights(weights, policy_version)
        self._rows["cached"] = cached

    def begin_phase(self, seed: int) -> None:
        cached = self._rows["cached"].copy()
        super().begin_phase(seed)
        self._rows["cached"] = cached


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lit_stepwise.testing import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (TransformersEngine, None),
        (SkipsTheHead, r"after the weight sync of step 1 .* nats off"),
        (KeepsTheCache, r"tokens of a prompt came out of the engine's prefix cache"),
    ],
)
def test_the_probe_finds_what_goes_wrong_in_a_sync(
    kind: type[TransformersEngine], fault: str | None, untied: Path
) -> None:
    engine, policy = kind(device="cpu"), ModelPolicy(untied)
    engine.start(str(untied), 64)
    torch.manual_seed(3)
    before: list[Probe] = []

    def sync(version: int) -> None:
        before[:] = sync_weights(collector(engine), policy, version, PROMPTS, 1e-4, before)

    sync(0)
    policy.move()
    if fault is None:
        sync(1)
        assert max(probe.gap for probe in before) < 1e-5
    else:
        with pytest.raises(MismatchError, match=fault):
            sync(1)
    engine.close()
