"""The commands that run on Lightning: ``fit``, ``validate``, ``test``, ``predict`` and ``play``."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning.pytorch as pl
import torch.distributed as distributed
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import CheckpointIO

import lit_stepwise.algo
import lit_stepwise.engines  # registers the ready classes, so that YAML and messages may name them shortly
import lit_stepwise.text2sql
from lit_stepwise.checkpoints import AtomicCheckpointIO
from lit_stepwise.checkpoints.finding import find_checkpoint
from lit_stepwise.errors import ConfigError
from lit_stepwise.interfaces import Advantage, Engine, Environment, Executor, PolicyLoss, Reward, TaskSource
from lit_stepwise.loggers import complete, prepare_loggers, with_folders
from lit_stepwise.rollout.callback import RolloutCallback
from lit_stepwise.trainer import StepwiseTrainer, check_launcher, check_optimization
from lit_stepwise.training import FSDPStrategy, RolloutProgressBar, RunSummary, StepwiseModule, TaskDataModule
from lit_stepwise.training.strategies import check_strategy

SEAMS = {
    "engine": Engine,
    "environment": Environment,
    "executor": Executor,
    "rewards": Reward,
    "advantage": Advantage,
    "loss": PolicyLoss,
    "source": TaskSource,
}
"""The settings that take a class, by their last word."""


class Parser(LightningArgumentParser):
    """Refuses abbreviations, and says what is wrong in a line instead of after a page of usage."""

    keys: ClassVar[set[str]] = set()
    """Every key of the chosen command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **settings: Any) -> Any:  # type: ignore[override]
        """Argparse's, but a logger may be named without a folder."""
        return super().parse_args(with_folders(sys.argv[1:] if args is None else args), *others, **settings)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and the closest right key, and leave with exit code 2."""
        if not self.exit_on_error:  # the parser of a class_path: jsonargparse wraps what it says
            super().error(message, ex)
        text = " ".join(message.split())
        sys.stderr.write(f"error: {text}{_way_out(text, self.keys)}\n")
        sys.exit(2)


def _way_out(message: str, keys: set[str]) -> str:
    """What to write instead: the closest right key, or the classes that could stand there."""
    if wrong := re.search(r"class_path '([\w.]+)': .*?[Oo]ption '(\w+)' is not accepted", message):
        module, _, name = wrong[1].rpartition(".")
        keys = set(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
        unknown = [wrong[2]]
        if not get_close_matches(wrong[2], keys, n=1, cutoff=0.6):
            return f"; {name} takes {', '.join(sorted(keys))}"
    elif (places := re.findall(r'key "[\w.]*?(\w+)":', message)) and places[-1] in SEAMS:
        return f"; use one of {', '.join(_classes(SEAMS[places[-1]]))}, or the class_path of your own"
    elif strategy := re.search(r"trainer.strategy.*dot import path string: (\w+).*NestedArg", message):
        return f"; the name {strategy[1]} takes no settings: use FSDP2Strategy or FSDPStrategy, which do"
    else:
        named = re.findall(r"--([\w.]+)|(?:option|[Kk]ey) '([\w.]+)'", message)
        unknown = [key for pair in named for key in pair if key and key not in keys]
    close = [match for key in unknown for match in get_close_matches(key, keys, n=1, cutoff=0.6)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _classes(base: type[Any]) -> list[str]:
    """The ready classes of this package that can stand for ``base``, by their short public paths."""
    rooms = [lit_stepwise.algo, lit_stepwise.engines, lit_stepwise.text2sql]
    public = [(f"{room.__name__}.{name}", getattr(room, name)) for room in rooms for name in room.__all__]
    return sorted(path for path, each in public if isinstance(each, type) and issubclass(each, base))


class SaveConfig(SaveConfigCallback):
    """Lightning's ``config.yaml``; loggers that show settings beside curves get them, too."""

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """On rank 0."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):  # its file would be the same once more
                logger.log_hyperparams(config)


class StepwiseCLI(LightningCLI):
    """Sections: ``trainer``, ``model``, ``data`` and ``rollout``."""

    command: ClassVar[str] = "fit"
    """The only one whose parser is built: the others would cost half a second."""
    runs: ClassVar[bool] = True
    """Whether a Trainer runs the command; else it is left with what the configuration says."""

    def __init__(self, words: list[str]) -> None:
        StepwiseCLI.command = words[0]
        # what classes say of their settings takes as long to read as all the rest, and --help alone shows it
        shown = "-h" in words or any("help" in word for word in words)
        set_parsing_settings(docstring_parse_attribute_docstrings=shown)
        super().__init__(
            StepwiseModule,
            TaskDataModule,
            trainer_class=StepwiseTrainer,
            trainer_defaults={"log_every_n_steps": 1},  # an optimizer step takes long, and 50 of them would hide most
            seed_everything_default=0,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            auto_configure_optimizers=False,
            args=words if words != sys.argv[1:] else None,
            run=self.runs,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The chosen one of Lightning's own and ``play``; with the arguments that are not options."""
        known = {**LightningCLI.subcommands(), "play": {"model", "datamodule"}}
        return {StepwiseCLI.command: known[StepwiseCLI.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The core callback has a section of its own, which no list of ``trainer.callbacks`` can replace."""
        parser.add_lightning_class_args(RolloutCallback, "rollout")
        for target in ("rollout.seed", "data.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)
        parser.link_arguments("rollout.limits.max_new_tokens", "model.max_response_tokens")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        self.note_keys(parser)
        return parser

    @staticmethod
    def note_keys(parser: LightningArgumentParser) -> None:
        """Those of the chosen command, for messages."""
        Parser.keys = {action.dest for action in parser._actions if not action.dest.endswith(".help")}

    def _parse_ckpt_path(self) -> None:
        """Keep what the command line says: a checkpoint's hyper-parameters must not override it."""

    def before_instantiate_classes(self) -> None:
        """Settle where loggers write that were not told."""
        config = self.config[self.command]
        pages = [page.get_content() for page in config.config or []]
        prepare_loggers(config.trainer.logger, config.trainer.default_root_dir or ".", sys.argv, pages)

    def after_instantiate_classes(self) -> None:
        """``--ckpt_path last`` finds the newest checkpoint of earlier runs, whose folders Lightning does not search."""
        options = self.config_init[self.command]
        saving = [each for each in self.trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        folders = [Path(self.trainer.default_root_dir), *(Path(each.dirpath) for each in saving if each.dirpath)]
        found = find_checkpoint(options.ckpt_path, folders, to_train=self.command == "fit")
        if self.command == "play":
            options.ckpt_path = found
        else:  # the Trainer's own, so that hooks know before it is loaded
            self.trainer.ckpt_path, options.ckpt_path = found, None

    def instantiate_trainer(self, **kwargs: Any) -> StepwiseTrainer:
        """Add the progress bar, unless there is one, the last lines, and a logger that names the folder of the run."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        extra: list[Any] = [RunSummary()]
        if config.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            extra.append(RolloutProgressBar())
        # of a dry run Lightning saves none but save_last's, from which --ckpt_path last would then go on
        if config.fast_dev_run or config.enable_checkpointing is False:
            callbacks = [each for each in callbacks if not isinstance(each, Checkpoint)]
        config.callbacks = [*callbacks, *extra]
        config.logger = complete(config.logger, config.default_root_dir or ".")
        plugins = config.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(each, CheckpointIO) for each in plugins):
            config.plugins = [*plugins, AtomicCheckpointIO()]
        if config.strategy == "fsdp":
            config.strategy = FSDPStrategy()  # by its name Lightning takes it on GPUs alone
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise ConfigError(_trainers_reason(str(error), config)) from error
        _check_folder(Path(trainer.default_root_dir))
        check_optimization(trainer)
        check_strategy(trainer)
        check_launcher(trainer)
        assert isinstance(trainer, StepwiseTrainer)
        return trainer


def _check_folder(root: Path) -> None:
    """Raises ``ConfigError`` where no file of the run could be written."""
    there = next((each for each in (root, *root.parents) if each.exists()), root)
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ConfigError(
            f"trainer.default_root_dir={root} cannot be written, since {there} is no folder that may be; name another"
        )


def _trainers_reason(message: str, config: Any) -> str:
    """Why Lightning makes no Trainer of these settings, in a line."""
    if "invalid strategy name" in message:
        return (
            f"trainer.strategy={config.strategy} is unknown; use auto, ddp, fsdp2 or fsdp, or as class_path: one of "
            "lit_stepwise.training.FSDP2Strategy, lit_stepwise.training.FSDPStrategy, with init_args"
        )
    message = " ".join(message.split())
    if not any(word in message.lower() for word in ("accelerator", "device", "strategy", "gpu", "cuda", "install")):
        return f"the Trainer does not take these settings: {message}"
    given = ", ".join(f"trainer.{name}={getattr(config, name)}" for name in ("accelerator", "devices", "strategy"))
    return f"{given}: {message}; change what does not fit this machine"


def run(words: list[str]) -> None:
    """Parse ``words`` and run the command that is their first."""
    _quieten()
    StepwiseCLI(words)
    if distributed.is_initialized():  # what gloo has left aborts a process at its very end now and then: 3 of 50
        distributed.destroy_process_group()


def _quieten() -> None:
    """Keep out what no user can act on."""
    # with manual optimization a checkpoint holds the weights after the step, which is what is wanted here
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    # what is logged is over all ranks already; Lightning cannot know, and sees the process group that vLLM makes
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log.*sync_dist=True")
    # a resumed run has a folder of its own, and leaves what is in the one before alone
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    # torch's own FSDP1 says so of itself
    warnings.filterwarnings("ignore", message="Please use DTensor instead and we are deprecating ShardedTensor")
    # lightning 2.6 calls it once per run under torch 2.13
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
