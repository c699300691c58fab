"""Tasks in, mini-batches of step samples out. The playing in between is the ``RolloutCallback``'s."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, cycle
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np

from lit_stepwise.algo.microbatches import cut_at_groups
from lit_stepwise.errors import ConfigError, DataError
from lit_stepwise.interfaces import Player, TaskSource
from lit_stepwise.training.experience import Experience, ExperienceLoader
from lit_stepwise.training.module import StepwiseModule
from lit_stepwise.types import Rollout, StepSample, Task

Files = str | list[str] | None


class TaskDataModule(pl.LightningDataModule):
    """Reads tasks and deals them out, one iteration after the other.

    Args:
        source: how files become tasks.
        train_files: one file or several; their tasks are shuffled together.
        val_files: for ``validate`` and during ``fit``.
        test_files: for ``test`` and ``predict``.
        tasks_per_iteration: groups of one iteration, over all ranks.
        mini_batches: optimizer steps that an iteration's groups are cut into.
        passes: times that each mini-batch is trained before the next play.
        max_val_tasks: use the first so many only.
        seed: of the order of tasks; on the command line it follows ``seed_everything``.
    """

    def __init__(
        self,
        source: TaskSource,
        train_files: Files = None,
        val_files: Files = None,
        test_files: Files = None,
        tasks_per_iteration: int = 16,
        mini_batches: int = 1,
        passes: int = 1,
        max_val_tasks: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in {
            "tasks_per_iteration": tasks_per_iteration,
            "mini_batches": mini_batches,
            "passes": passes,
        }.items():
            if value < 1:
                raise ConfigError(f"data.{name}={value}; use 1 or more")
        if mini_batches > tasks_per_iteration:
            raise ConfigError(
                f"data.mini_batches={mini_batches} cannot each hold a task of data.tasks_per_iteration="
                f"{tasks_per_iteration}; use at most that many"
            )
        self.source = source
        self.files = {"train": train_files, "val": val_files, "test": test_files}
        self.tasks_per_iteration = tasks_per_iteration
        self.max_val_tasks = max_val_tasks
        self.seed = seed
        self.player: Player | None = None  # the RolloutCallback puts itself here
        self.experience = Experience(mini_batches, passes)
        self._read: dict[str, list[Task]] = {}
        self._in_use: tuple[str, ...] = ()

    # ---- Lightning's hooks

    def prepare_data(self) -> None:
        """Once per machine."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Read what the stage needs. Raises ``DataError`` or ``ConfigError``."""
        self._in_use = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}[stage]
        for split in self._in_use:
            required = split == self._in_use[0]
            self._read[split] = self.read(split) if required or self.files[split] else []
        if stage == "fit":
            self._check_limits()

    def train_dataloader(self) -> ExperienceLoader:
        """Mini-batches of the iterations to come; plays when one is used up."""
        return ExperienceLoader(self.experience, self._collect)

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """One batch: the rollout of this rank's share of the validation tasks."""
        return EvaluationLoader(self._evaluate, self._read["val"]) if self._read["val"] else []

    def test_dataloader(self) -> EvaluationLoader:
        """The same for the test tasks."""
        return EvaluationLoader(self._evaluate, self._read["test"])

    predict_dataloader = test_dataloader

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Leave batches on the host; ``training_step`` moves one micro-batch at a time."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream of iterations."""
        return self.experience.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.experience.load_state_dict(state_dict)

    # ---- what the RolloutCallback asks for

    @property
    def tasks(self) -> list[Task]:
        """Every task that the running stage may play."""
        return [task for split in self._in_use for task in self._read[split]]

    @property
    def training_tasks(self) -> list[Task]:
        """Every task that training may play."""
        return self._read["train"]

    def keep(self, tasks: Sequence[Task]) -> None:
        """Play these from now on, and none of the others. Raises ``DataError`` when a split has none of them."""
        kept = {id(task) for task in tasks}
        for split in self._in_use:
            before = self._read[split]
            self._read[split] = [task for task in before if id(task) in kept]
            if before and not self._read[split]:
                raise DataError(
                    f"data.{split}_files={self.files[split]}: none of the {len(before)} tasks can be played; the "
                    "report above says why"
                )

    @property
    def iteration(self) -> int:
        """The one being trained, from 0."""
        return self.experience.iteration

    def ensure_iteration(self) -> None:
        """Collect a new iteration when the last one is used up."""
        self.experience.ensure(self._collect)

    def advance(self) -> None:
        """One mini-batch was trained."""
        self.experience.advance()

    # ---- tasks

    def read(self, split: str) -> list[Task]:
        """The tasks of ``train``, ``val`` or ``test``. Raises ``ConfigError`` when there are none."""
        given = self.files[split] or []
        files = [given] if isinstance(given, str) else given
        if not files:
            raise ConfigError(f"data.{split}_files names no file; give at least one")
        tasks = [task for file in files for task in self.source.read(file)]
        if not tasks:
            raise DataError(f"data.{split}_files={files} holds no task")
        return tasks[: self.max_val_tasks] if split == "val" else tasks

    def tasks_for(self, iteration: int, weights: Sequence[float] | None = None) -> list[Task]:
        """A function of (seed, iteration, weights) alone: shuffled anew in each pass over the tasks.

        ``weights`` are those of a ``Deal``, None: 1 for each, so that none is ever left out.
        """
        return [self._read["train"][place] for place in self._places(iteration, weights)]

    def further_tasks(self, iteration: int, weights: Sequence[float] | None = None) -> Iterator[Task]:
        """The tasks that are not among those of ``iteration``, in an order that is a function of the same."""
        chosen = set(self._places(iteration, weights))
        others = [place for place in self._by_weight(iteration, weights) if place not in chosen]
        return (self._read["train"][place] for place in others)

    def _places(self, iteration: int, weights: Sequence[float] | None) -> list[int]:
        """Of the tasks of ``iteration``: each that is due keeps its turn by chance, or another one gets it."""
        due = self._due(iteration)
        if weights is None:
            return due
        playable, are_due = self._by_weight(iteration, weights), set(due)
        instead = chain((place for place in playable if place not in are_due), cycle(playable))
        draws = np.random.default_rng([self.seed, iteration, 2]).random(len(due))
        return [
            place if draw < weights[place] else next(instead) for place, draw in zip(due, draws.tolist(), strict=True)
        ]

    def _due(self, iteration: int) -> list[int]:
        """Places of the tasks whose turn it is."""
        num, first = len(self._read["train"]), iteration * self.tasks_per_iteration
        turns = [divmod(position, num) for position in range(first, first + self.tasks_per_iteration)]
        orders = {
            sweep: np.random.default_rng([self.seed, sweep]).permutation(num) for sweep in {sweep for sweep, _ in turns}
        }
        return [int(orders[sweep][place]) for sweep, place in turns]

    def _by_weight(self, iteration: int, weights: Sequence[float] | None) -> list[int]:
        """Places of all tasks with a weight, as if drawn one after the other in proportion to it.

        Equal to ordering them by u^(1 / weight) with u uniform (Efraimidis and Spirakis, 2006).
        """
        num = len(self._read["train"])
        given = np.ones(num) if weights is None else np.asarray(weights)
        waits = np.random.default_rng([self.seed, iteration, 1]).exponential(size=num)
        waits = np.divide(waits, given, out=np.full(num, np.inf), where=given > 0)
        order = np.argsort(waits, kind="stable")
        places: list[int] = order[given[order] > 0].tolist()
        return places

    def _collect(self, iteration: int) -> list[StepSample]:
        """The samples of an iteration, with all that its updates will ask of them."""
        samples = self._required_player().collect(iteration)
        assert self.trainer is not None
        module = cast(StepwiseModule, self.trainer.lightning_module)
        if not module.wants_old_logprobs:
            return samples
        parts = cut_at_groups(samples, self.experience.mini_batches)
        return [sample for part in parts for sample in module.with_old_logprobs(part)]

    def _evaluate(self, tasks: Sequence[Task]) -> Rollout:
        return self._required_player().evaluate(tasks)

    def _required_player(self) -> Player:
        if self.player is None:
            raise ConfigError("the TaskDataModule has nobody to play; add a RolloutCallback to the Trainer's callbacks")
        return self.player

    def _check_limits(self) -> None:
        limit = getattr(self.trainer, "limit_train_batches", 1.0)
        if getattr(self.trainer, "fast_dev_run", False):
            return  # what it leaves is not for training
        if limit < (1.0 if isinstance(limit, float) else len(self.experience)):
            # to overfit, Lightning sets the other
            setting = "overfit_batches" if getattr(self.trainer, "overfit_batches", 0) else "limit_train_batches"
            raise ConfigError(
                f"trainer.{setting}={limit} would leave step samples of every iteration untrained; lower "
                "data.tasks_per_iteration instead"
            )


class EvaluationLoader:
    """One batch, played when it is asked for."""

    def __init__(self, evaluate: Callable[[Sequence[Task]], Rollout], tasks: Sequence[Task]) -> None:
        self.evaluate = evaluate
        self.tasks = tasks

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Rollout]:
        yield self.evaluate(self.tasks)
