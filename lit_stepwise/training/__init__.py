"""Learning: the LightningModule, the data module, metrics, progress."""

from lit_stepwise.training.datamodule import TaskDataModule
from lit_stepwise.training.evaluation import pass_at
from lit_stepwise.training.lora import Lora
from lit_stepwise.training.module import StepwiseModule
from lit_stepwise.training.progress import RolloutProgressBar
from lit_stepwise.training.strategies import FSDP2Strategy, FSDPStrategy
from lit_stepwise.training.summary import RunSummary

__all__ = [
    "FSDP2Strategy",
    "FSDPStrategy",
    "Lora",
    "RolloutProgressBar",
    "RunSummary",
    "StepwiseModule",
    "TaskDataModule",
    "pass_at",
]
