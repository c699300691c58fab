"""The commands that run on Lightning: ``fit``, ``validate``, ``test``, ``predict`` and ``play``."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from difflib import get_close_matches
from typing import Any, ClassVar, NoReturn

from jsonargparse import set_parsing_settings
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lit_stepwise.rollout.callback import RolloutCallback
from lit_stepwise.trainer import StepwiseTrainer, find_checkpoint
from lit_stepwise.training import RolloutProgressBar, RunSummary, StepwiseModule, TaskDataModule


class Parser(LightningArgumentParser):
    """Refuses abbreviations, and says what is wrong in a line instead of after a page of usage."""

    keys: ClassVar[set[str]] = set()
    """Every key of the chosen command."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message with the closest right keys and leave with exit code 2."""
        if not self.exit_on_error:  # the parser of a class_path: jsonargparse wraps what it says
            super().error(message, ex)
        text = " ".join(line.strip() for line in message.splitlines() if line.strip())
        sys.stderr.write(f"error: {text}{self._suggestions(message)}\n")
        sys.exit(2)

    def _suggestions(self, message: str) -> str:
        named = re.findall(r"--([\w.]+)|[Kk]ey '([\w.]+)'|option '([\w.]+)'", message)
        unknown = dict.fromkeys(word for words in named for word in words if word and word not in self.keys)
        close = [match for word in unknown for match in get_close_matches(word, self.keys, n=1, cutoff=0.6)]
        return f"; did you mean {' or '.join(close)}?" if close else ""


class StepwiseCLI(LightningCLI):
    """Sections: ``trainer``, ``model``, ``data`` and ``rollout``."""

    command: ClassVar[str] = "fit"
    """The only one whose parser is built: the others would cost half a second."""

    def __init__(self, words: list[str]) -> None:
        StepwiseCLI.command = words[0]
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            StepwiseModule,
            TaskDataModule,
            trainer_class=StepwiseTrainer,
            seed_everything_default=0,
            parser_class=Parser,
            auto_configure_optimizers=False,
            args=words if words != sys.argv[1:] else None,
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        Parser.keys = {action.dest for action in parser._actions}
        return parser

    def _parse_ckpt_path(self) -> None:
        """Keep what the command line says: a checkpoint's hyper-parameters must not override it."""

    def after_instantiate_classes(self) -> None:
        """``--ckpt_path last`` finds the newest checkpoint of earlier runs, whose folders Lightning does not search."""
        options = self.config_init[self.command]
        options.ckpt_path = find_checkpoint(options.ckpt_path, self.trainer.default_root_dir)

    def instantiate_trainer(self, **kwargs: Any) -> StepwiseTrainer:
        """Add the progress bar, unless the config brings one, the closing line, and a CSV logger by default."""
        config = self._get(self.config_init, "trainer")
        callbacks = config.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        extra: list[Any] = [RunSummary()]
        if config.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            extra.append(RolloutProgressBar())
        config.callbacks = [*callbacks, *extra]
        if config.logger in (None, True):
            config.logger = CSVLogger(save_dir=config.default_root_dir or ".", name="")
        trainer = super().instantiate_trainer(**kwargs)
        assert isinstance(trainer, StepwiseTrainer)
        return trainer


def run(words: list[str]) -> None:
    """Parse ``words`` and run the command that is their first."""
    _quieten()
    StepwiseCLI(words)


def _quieten() -> None:
    """Keep out what no user can act on."""
    # with manual optimization a checkpoint holds the weights after the step, which is what is wanted here
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    # lightning 2.6 calls it once per run under torch 2.13
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "litlogger" not in record.getMessage()
    )
