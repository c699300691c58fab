"""Learning: the LightningModule, the data module, metrics, progress."""

from lit_stepwise.training.datamodule import TaskDataModule
from lit_stepwise.training.lora import Lora
from lit_stepwise.training.module import StepwiseModule
from lit_stepwise.training.progress import RolloutProgressBar
from lit_stepwise.training.summary import RunSummary

__all__ = ["Lora", "RolloutProgressBar", "RunSummary", "StepwiseModule", "TaskDataModule"]
