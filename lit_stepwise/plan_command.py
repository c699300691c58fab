"""The command ``lit-stepwise plan``: what a run costs, and whether it fits, before anything is loaded."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from lit_stepwise.commands import StepwiseCLI
from lit_stepwise.errors import ConfigError
from lit_stepwise.planning.assumptions import Assumptions, Rates
from lit_stepwise.planning.plan import Settings, make_plan
from lit_stepwise.planning.report import as_json, show


class PlanCLI(StepwiseCLI):
    """Reads what ``fit`` reads and makes no Trainer: the machine that a configuration is for is another one."""

    runs = False

    def __init__(self, words: list[str]) -> None:
        self.words = words[1:]
        super().__init__(words)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """None: no method of a Trainer is called."""
        return {}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Of this command alone."""
        return super().init_parser(prog="lit-stepwise plan", **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What stands behind the name of the command."""
        self.config = parser.parse_args(self.words)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Those of ``fit``, and what planning is told besides."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--gpu_memory_gib",
            type=float | None,
            default=None,
            help="Of one GPU; null is that of the GPU of this machine, or 80 where there is none.",
        )
        parser.add_argument(
            "--model_config",
            type=str | None,
            default=None,
            help="A config.json, where that of model.model_path is not on this machine.",
        )
        parser.add_argument("--json", action="store_true", help="Print everything as JSON.")
        parser.add_class_arguments(Assumptions, "assume")
        parser.add_class_arguments(Rates, "rates")
        self.note_keys(parser)

    def before_instantiate_classes(self) -> None:
        """There will be nothing to log, and nobody to call."""
        self.config.trainer.callbacks, self.config.trainer.logger = None, False

    def instantiate_classes(self) -> None:
        """The objects of a run but for its Trainer."""
        self.config_init = self.parser.instantiate_classes(self.config)

    def after_instantiate_classes(self) -> None:
        """There is no checkpoint to look for."""

    @property
    def settings(self) -> Settings:
        """For ``make_plan``."""
        names = ("data", "rollout", "trainer", "gpu_memory_gib", "model_config", "assume", "rates")
        given: dict[str, Any] = {name: self.config_init.get(name) for name in names}
        return Settings(module=self.config_init.model, **given)


def run(words: list[str]) -> None:
    """Print the plan of ``words``. Raises ``ConfigError`` with the setting to change where a run would not work."""
    cli = PlanCLI(words)
    plan = make_plan(cli.settings)
    if cli.config.json:
        print(as_json(plan))
    else:
        show(plan, Console(highlight=False, soft_wrap=True))
    if plan.problem:
        raise ConfigError(plan.problem)
