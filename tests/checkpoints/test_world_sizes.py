"""A run goes on from the middle of an iteration on another number of processes, and nothing is different."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_stepwise.algo import TurnReturn
from lit_stepwise.checkpoints import AsyncCheckpointIO, AtomicCheckpointIO
from lit_stepwise.engines import TransformersEngine
from lit_stepwise.errors import StepwiseError
from lit_stepwise.rollout import RolloutCallback
from lit_stepwise.testing import Countdown, CountdownTasks, save_tiny_model
from lit_stepwise.training import FSDP2Strategy, FSDPStrategy, StepwiseModule, TaskDataModule
from lit_stepwise.types import Limits, MiniBatch, Rollout

pytestmark = pytest.mark.slow

STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp2": FSDP2Strategy,
    "fsdp2 in one file": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
    "fsdp2, layers together": lambda: FSDP2Strategy(tensor_parallel_size=2),
    "fsdp2, layers together, in one file": lambda: FSDP2Strategy(
        tensor_parallel_size=2, save_distributed_checkpoint=False
    ),
    "fsdp": FSDPStrategy,
}
MIDDLE = 3
"""The first optimizer step of the second of three iterations."""
GROWN = ("ddp", "fsdp2", "fsdp2, layers together", "fsdp")
"""Go on from the file of one process on two."""
SHRUNK = {
    "ddp": "auto", "fsdp2": "fsdp2", "fsdp2 in one file": "auto", "fsdp": "fsdp",
    "fsdp2, layers together": "fsdp2", "fsdp2, layers together, in one file": "auto",
}  # fmt: skip
"""By whom what two processes wrote is read by one."""
FOUR = "fsdp2, layers together"
"""Written by four, two by two, and read by one."""


class Noted(pl.Callback):
    """What was played and trained."""

    def __init__(self) -> None:
        self.played: list[Any] = []
        self.trained: list[Any] = []

    def on_rollout_end(self, rollout: Rollout) -> None:
        turns = sorted(turn.response_ids for each in rollout.trajectories for turn in each.turns)
        self.played.append((rollout.stage, turns, rollout.policy_version))

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: MiniBatch, batch_idx: int) -> None:
        rows = [(each.group, each.sample, each.turn, each.response_ids, each.policy_version) for each in batch.samples]
        self.trained.append((trainer.global_step, batch.iteration, batch.index, rows))


def fitted(
    folder: Path,
    name: str,
    strategy: str,
    num_processes: int,
    start: Path | None = None,
    max_steps: int = -1,
    model: str = "model",
) -> None:
    """Run, and write what became of it to ``name``-<rank>.pt; checkpoints are in the folder ``name``."""
    where = folder / name
    noted, io = Noted(), AsyncCheckpointIO() if strategy == "ddp" else AtomicCheckpointIO()
    rollout = RolloutCallback(
        TransformersEngine(), Countdown(), TurnReturn(), samples_per_task=4, deterministic=True,
        limits=Limits(max_prompt_tokens=100, max_context_tokens=200, max_new_tokens=8, max_turns=3),
    )  # fmt: skip
    saving = ModelCheckpoint(
        where, "{step}", every_n_train_steps=1, save_top_k=-1, save_last="link", enable_version_counter=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=num_processes, strategy=STRATEGIES[strategy](), max_epochs=3, max_steps=max_steps,
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, plugins=[io],
        callbacks=[rollout, noted, saving], default_root_dir=where,
    )  # fmt: skip
    module = StepwiseModule(
        str(folder / model),
        # an eps as large as the gradients, so that steps do not blow up what rounding makes of those near 0
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=6),
    )
    data = TaskDataModule(CountdownTasks(), "5", "3", tasks_per_iteration=2, mini_batches=2)
    trainer.fit(module, datamodule=data, ckpt_path=None if start is None else str(start))
    content = {
        "weights": dict(module.weights()),
        "lr": trainer.optimizers[0].param_groups[0]["lr"],
        "step": trainer.global_step,
        "played": json.dumps(noted.played),
        "trained": json.dumps(noted.trained),
    }
    torch.save(content, folder / f"{name}-{trainer.global_rank}.pt")


def refused(folder: Path, strategy: str, start: Path, model: str = "model") -> str:
    """What two processes say of ``start``."""
    try:
        fitted(folder, "refused", strategy, 2, start, model=model)
    except StepwiseError as error:
        return str(error)
    return "nothing"


def main(rank: int, num_processes: int, folder: Path) -> None:
    """One of the processes."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    meeting = f"file://{folder}/meeting-{num_processes}"
    torch.distributed.init_process_group("gloo", init_method=meeting, world_size=num_processes, rank=rank)
    if num_processes == 2:
        for strategy in SHRUNK:
            fitted(folder, f"two {strategy}", strategy, 2, max_steps=MIDDLE)
        for strategy in GROWN:
            fitted(folder, f"grown {strategy}", strategy, 2, folder / "one" / f"step={MIDDLE}.ckpt")
        of_fsdp = folder / "two fsdp" / "last.ckpt"
        said = {"of the other strategy": refused(folder, "fsdp2", of_fsdp)}
        for strategy in ("fsdp2", "fsdp"):
            for what, start in {"folder": f"two {strategy}", "file": "one"}.items():
                said[f"{what} by {strategy}"] = refused(folder, strategy, folder / start / "last.ckpt", "other")
        (folder / f"said-{rank}.json").write_text(json.dumps(said))
    elif num_processes == 4:
        fitted(folder, f"four {FOUR}", FOUR, 4, max_steps=MIDDLE)
    else:
        fitted(folder, "shrunk from four", "fsdp2", 1, folder / f"four {FOUR}" / "last.ckpt")
        for written, strategy in SHRUNK.items():
            fitted(folder, f"shrunk {written}", strategy, 1, folder / f"two {written}" / "last.ckpt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> Path:
    """What one process did from beginning to end, what two did with its checkpoint, and what one did with theirs."""
    folder = tmp_path_factory.mktemp("world_sizes")
    save_tiny_model(folder / "model")
    save_tiny_model(folder / "other", hidden_size=32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's: few workers, a module in eval mode
        fitted(folder, "one", "auto", 1)
    run_ranks(__file__, folder, "2")
    run_ranks(__file__, folder, "4", codes=[0] * 4)
    run_ranks(__file__, folder, "1", codes=[0])
    return folder


def outcome(folder: Path, name: str, num_processes: int) -> dict[str, Any]:
    """Of all ranks together."""
    ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(num_processes)]
    played = [json.loads(rank["played"]) for rank in ranks]
    phases = [
        (parts[0][0], sorted(turn for _, turns, _ in parts for turn in turns), parts[0][2])
        for parts in zip(*played, strict=True)
    ]
    assert all(rank["trained"] == ranks[0]["trained"] for rank in ranks)
    return {**ranks[0], "played": phases, "trained": json.loads(ranks[0]["trained"])}


@pytest.mark.parametrize(
    ("name", "num_processes"),
    [*((f"grown {each}", 2) for each in GROWN), *((f"shrunk {each}", 1) for each in SHRUNK), ("shrunk from four", 1)],
)
def test_a_run_goes_on_as_if_nothing_had_happened(name: str, num_processes: int, folder: Path) -> None:
    expected, found = outcome(folder, "one", 1), outcome(folder, name, num_processes)
    assert (found["step"], found["lr"]) == (6, pytest.approx(expected["lr"], rel=1e-9)) == (6, pytest.approx(0.0025))
    assert found["trained"] == expected["trained"][MIDDLE:]
    # two plays of training and one of evaluation are behind the checkpoint
    assert found["played"] == expected["played"][3:]
    assert [(stage, version) for stage, _, version in found["played"]] == [
        ("evaluate", 4),
        ("train", 4),
        ("evaluate", 6),
    ]
    for key, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], weight, rtol=0, atol=2e-5)


def test_what_one_and_two_processes_have_after_the_same_steps_is_not_the_end(folder: Path) -> None:
    """Else the tests above could not fail."""
    middle, end = outcome(folder, "two ddp", 2), outcome(folder, "one", 1)
    assert middle["step"] == MIDDLE
    apart = [float((middle["weights"][key] - weight).abs().max()) for key, weight in end["weights"].items()]
    assert max(apart) > 100 * 2e-5


def test_checkpoints_are_whole_and_no_more_than_those(folder: Path) -> None:
    for name in SHRUNK:
        found = sorted(path.name for path in (folder / f"two {name}").glob("*.ckpt*"))
        assert found == ["last.ckpt", "step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
        assert (folder / f"two {name}" / "step=3.ckpt").is_dir() == (
            name in ("fsdp2", "fsdp2, layers together", "fsdp")
        )


def test_what_does_not_fit_is_refused_on_all_ranks_in_a_line(folder: Path) -> None:
    said = [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1]
    assert "two fsdp/last.ckpt' was written by the other strategy that shards; resume with" in said[0].pop(
        "of the other strategy"
    )
    assert len(said[0]) == 4
    for message in said[0].values():
        assert "holds another architecture than model.model_path=" in message
        assert "lm_head.weight with shape (267, 64) there and (267, 32) here" in message


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
