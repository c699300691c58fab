"""What ranks compute for each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import Precision

from lit_stepwise.algo import KLPenalty
from lit_stepwise.algo.flops import Flops
from lit_stepwise.algo.packing import collate
from lit_stepwise.training import StepwiseModule
from lit_stepwise.training.evaluation import EvaluationMetrics
from lit_stepwise.training.metrics import UpdateMetrics
from lit_stepwise.training.play_metrics import RolloutMetrics
from lit_stepwise.types import Feedback, MicroBatch, Rollout, StepSample, StopReason, Trajectory, Turn, VersionSpan

pytestmark = pytest.mark.slow


def samples() -> list[StepSample]:
    made = []
    for i in range(5):
        size, ids = 2 + i, [(31 * i + 7 * k) % 250 for k in range(6 + i)]
        rest = ([True] * size, [-0.5] * size, [1.0] * size, 0.0, i, 0, 0, 0)
        made.append(StepSample(ids[:4], ids[4:], *rest))
    return made


def turns(num_turns: int) -> list[Turn]:
    spans = [VersionSpan(0, 3)]
    return [Turn([3, 1, i], [5 + i, 9, 2], [-2.0, -1.0, -3.0], spans, "", Feedback("")) for i in range(num_turns)]


def module_of(model_path: str, world_size: int, rank: int) -> StepwiseModule:
    module = StepwiseModule(
        model_path,
        kl=KLPenalty(coefficient=0.5, estimator="k1", place="reward"),
        old_logprobs="trainer",
        max_tokens_per_micro_batch=12,
    )
    module.configure_model()
    trainer = {"world_size": world_size, "global_rank": rank, "precision_plugin": Precision()}
    module._trainer = SimpleNamespace(**trainer)  # type: ignore[assignment]
    return module


def work(rank: int, model_path: str, folder: str) -> None:
    """What each process does; the second has nothing to play."""
    where = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, world_size=2, rank=rank)
    module = module_of(model_path, 2, rank)
    scored = [list(each.old_logprobs) for each in module.with_old_logprobs(samples())]
    assert module.reference is not None
    ask, num_asked = module.reference, 0

    def count(batch: MicroBatch) -> torch.Tensor:
        nonlocal num_asked
        num_asked += 1
        return ask(batch)

    module.reference = count  # type: ignore[assignment]
    penalties = module.reference_penalties(turns(5) if rank == 0 else [], 1.0)
    module.update_metrics.update(torch.zeros(()), {}, torch.zeros(0))
    kl = module.update_metrics.result()["train/kl"]
    found = {"scored": scored, "penalties": penalties, "asked": num_asked, "kl": kl, "measured": measured(rank)}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def attempt(group: int, success: bool, temperature: float, *spans: VersionSpan, **components: float) -> Trajectory:
    size = sum(span.num_tokens for span in spans)
    feedback = Feedback("", components, done=True, success=success)
    made = [Turn([1], [2] * size, [-0.5] * size, spans, "", feedback)]
    return Trajectory(f"t{group}", group, 0, made, StopReason.DONE, temperature)


def measured(rank: int) -> list[dict[str, float]]:
    """What two ranks log whose shares differ in all that can differ; of the second optimizer step one has no token."""
    found = []
    update = UpdateMetrics()
    for differences in ([[0.5, -0.25, 2.0], [-1.0]][rank], [[0.75, -0.25], []][rank]):
        update.update(torch.tensor(1.0 + rank), {}, torch.tensor(differences))
        count = len(differences)
        update.count(collate(samples()[:count], [1.0] * count), num_forwarded=20, flops=Flops(100.0, 10.0, 1.0))
        found += [{"gap": update.logprob_gap()}, update.result()]
    play = RolloutMetrics()
    played = [attempt(0, True, 1.0, VersionSpan(6, 3), VersionSpan(4, 1), goal=0.75)] if rank == 0 else []
    seconds: dict[str, Any] = {"wait_seconds": 0.5 - rank / 4, "cycle_seconds": 4.0}
    # the engine of the second rank follows that of the first
    seconds |= {"engine_seconds": 1.5, "busy_seconds": 0.5} if rank == 0 else {"engine_seconds": None}
    for trajectories in (played, [attempt(0, False, 1.0, VersionSpan(6, 2), extra=0.25)] if rank == 1 else []):
        play.update(Rollout("train", 0, 6, trajectories, **seconds), began=6, num_steps=2, max_age=1)
        found.append(play.result())
    evaluation = EvaluationMetrics()
    outcomes = [(0, "+", "+--"), (2, "-", "+++")] if rank == 0 else [(1, "-", "---")]
    of_now = VersionSpan(6, 1)
    greedy = [attempt(group, best == "+", 0.0, of_now) for group, best, _ in outcomes]
    drawn = [attempt(group, each == "+", 0.5, of_now) for group, _, rest in outcomes for each in rest]
    evaluation.update(Rollout("evaluate", -1, 6, [*greedy, *drawn]))
    return [*found, evaluation.result("val")]


def results(folder: Path) -> Sequence[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_ranks_score_like_one_and_keep_step_where_one_has_nothing_to_do(tiny_model: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tiny_model), str(tmp_path)), nprocs=2)
    first, second = results(tmp_path)
    alone = module_of(str(tiny_model), 1, 0)
    assert first["scored"] == second["scored"]
    expected = [each.old_logprobs for each in alone.with_old_logprobs(samples())]
    for got, one in zip(first["scored"], expected, strict=True):
        assert got == pytest.approx(one, abs=1e-5)
    assert first["penalties"] == pytest.approx(alone.reference_penalties(turns(5), 1.0), abs=1e-5)
    assert second["penalties"] == []
    assert first["asked"] == second["asked"] == 3
    alone.update_metrics.update(torch.zeros(()), {}, torch.zeros(0))
    assert first["kl"] == second["kl"] == pytest.approx(alone.update_metrics.result()["train/kl"], rel=1e-5)
    assert first["measured"] == second["measured"]
    check_what_was_measured(*first["measured"])


def check_what_was_measured(*found: dict[str, float]) -> None:
    gap, step, later_gap, later_step, play, later_play, evaluation = found
    assert gap == {"gap": 3.75 / 4}
    assert step["train/loss"] == later_step["train/loss"] == 3.0
    assert step["train/logprob_gap"] == 3.75 / 4
    assert step["train/logprob_gap_p99"] == step["train/logprob_gap_max"] == 2.0
    assert step["train/rollout_kl"] == pytest.approx(
        sum(math.exp(d) - 1 - d for d in (0.5, -0.25, 2.0, -1.0)) / 4, rel=1e-6
    )
    assert later_gap == {"gap": 0.5}
    assert (later_step["train/logprob_gap"], later_step["train/logprob_gap_max"]) == (0.5, 0.75)
    expected = {
        "rollout/reward": 0.75, "rollout/reward_goal": 0.75, "rollout/accuracy": 1.0, "rollout/staleness": 2 * 1 / 4,
        "rollout/staleness_max": 2.0, "rollout/stale_0": 3 / 4, "rollout/stale_1": 1 / 4, "seconds/engine": 1.5,
        "idle/trainer": (0.5 + 0.25) / 8, "idle/engine": 3.5 / 4, "tokens/generated": 4.0,
    }  # fmt: skip
    assert {name: play[name] for name in expected} == pytest.approx(expected)
    assert later_play["rollout/reward_extra"] == 0.25
    assert "rollout/reward_goal" not in later_play
    assert later_play["rollout/stale_0"] == 1.0
    assert evaluation["val/accuracy"] == pytest.approx(1 / 3)
    assert evaluation["val/pass_at_1"] == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert evaluation["val/pass_at_2"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert evaluation["val/pass_at_3"] == pytest.approx(2 / 3)
