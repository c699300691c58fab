"""A run that was never played: numbers that are all different, and texts that a browser must not believe."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from lit_stepwise.store.write import Lineage, StoredPhase, TrajectoryStore
from lit_stepwise.types import Feedback, MiniBatch, StepSample, StopReason, Trajectory, Turn, VersionSpan

HOSTILE = (
    "<script>window.pwned = 1</script></script><!-- <script> ]]> <img src=x onerror='window.pwned = 2'> "
    '"}],"trajectories":[] \\u003c \\" {{ 7 * 7 }} {% raw %} &lt;b&gt; &amp; \u2028 \u2029 \u202ekcab\u202c '
    "\u0000 \u0007 </style> javascript:alert(1) \ud800 é 漢字 🎈"
)


def turn(text: str, tokenizer: Tokenizer, reward: float = 0.0, step: int = 0, **more: object) -> Turn:
    """One response, its tokens by ``tokenizer``, each less likely than the one before."""
    ids = tokenizer.encode(text.encode("utf-8", "replace").decode()).ids
    feedback = Feedback(
        observation=str(more.get("observation", "")),
        rewards={"outcome": reward * 3 / 4, "format": reward / 4},
        done=not more.get("observation"),
        success=bool(more.get("success")),
        details={"sql": more.get("sql", f"select {text}"), "status": "ok", "rows": 3},
    )
    return Turn(
        prompt_ids=list(range(len(ids) + 5)),
        response_ids=ids,
        rollout_logprobs=[-0.125 * (i + 1) for i in range(len(ids))],
        versions=[VersionSpan(step, len(ids))],
        text=text,
        feedback=feedback,
        engine_seconds=1.5,
        environment_seconds=0.25,
        token_rewards=more.get("token_rewards", ()),  # type: ignore[arg-type]
    )


def attempt(task: str, group: int, sample: int, turns: Sequence[Turn], temperature: float = 0.75) -> Trajectory:
    return Trajectory(task, group, sample, turns, StopReason.DONE, temperature)


def write_run(folder: Path, model: Path, iterations: int = 2) -> Path:
    """Evaluations at step 0 and at the last, and ``iterations`` between, of two groups with two attempts each.

    Iteration i: in group 0 one attempt of two turns earns 1 + i (a quarter of it in its first turn) and solves the
    task, one earns nothing; in group 1 both earn 0.5 in one turn, and solve theirs.
    Validation loses task v0 and wins v1.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    store = TrajectoryStore(folder / "trajectories", decode=lambda ids: f"prompt of {len(ids)} <b>tokens</b>")

    def say(text: str, *numbers: float, **more: object) -> Turn:
        return turn(text, tokenizer, *numbers, **more)  # type: ignore[arg-type]

    for step, solved in ((0, (True, False)), (iterations, (False, True))):
        greedy = [
            attempt(f"v{i}", i, 0, [say(f"answer {i}", float(won), step, success=won)], 0.0)
            for i, won in enumerate(solved)
        ]
        store.write(StoredPhase("evaluate", step, greedy))
    for i in range(iterations):
        _train(store, i, say)
    _describe(folder, model, iterations)
    return folder


def _train(store: TrajectoryStore, i: int, say: Callable[..., Turn]) -> None:
    earned = 1.0 + i
    first = say("look", earned / 4, i, observation="rows: 1", sql="select 1")
    played = [
        attempt("t0", 0, 0, [first, say("found it", earned * 3 / 4, i, success=True, token_rewards=[0.5] + [0.0] * 7)]),
        attempt("t0", 0, 1, [say(HOSTILE, 0.0, i, observation=HOSTILE, sql=HOSTILE), say("no idea", 0.0, i)]),
        attempt("t1", 1, 0, [say("easy", 0.5, i, success=True)]),
        attempt("t1", 1, 1, [say("easier", 0.5, i, success=True)]),
    ]
    advantages = [[1.0, 0.75], [-1.0, -0.5], [0.0], [0.0]]
    store.write(StoredPhase("train", i, played, i, advantages, ["", "", "flat", "flat"]))
    rows = [_row(played[0], 0, i), _row(played[0], 1, i)]
    gaps = ([0.5, 0.0, 0.0, 0.0], [0.25] * 8)
    logprobs = {n: [p - g for p, g in zip(row.rollout_logprobs, gaps[n], strict=True)] for n, row in enumerate(rows)}
    store.learn(MiniBatch(rows, i, 0), logprobs, i)


def _row(trajectory: Trajectory, index: int, step: int) -> StepSample:
    mine = trajectory.turns[index]
    size = len(mine.response_ids)
    return StepSample(
        mine.prompt_ids, mine.response_ids, [True] * size, mine.rollout_logprobs, [0.5] * size, mine.reward,
        trajectory.group, trajectory.sample, index, policy_version=step,
    )  # fmt: skip


def _describe(folder: Path, model: Path, iterations: int) -> None:
    config = {
        "seed_everything": 5,
        "model": {"model_path": str(model), "loss": {"class_path": "a.DualClip", "init_args": {"low": 0.2}}},
        "rollout": {"engine": {"class_path": "a.VLLMServerEngine", "init_args": {"urls": ["http://secret:1"]}}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    names = "rollout/accuracy,rollout/reward,rollout/reward_outcome,train/logprob_gap_max,seconds/wait,seconds/train"
    rows = [f"{i},{i},0.75,{0.75 + i / 4},{0.5 + i},0.5,{2 + i},3" for i in range(iterations)]
    (folder / "metrics.csv").write_text("\n".join([f"epoch,step,{names}", *rows]) + "\n")


__all__ = ["HOSTILE", "Lineage", "attempt", "turn", "write_run"]
