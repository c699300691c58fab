"""A trained policy as a Hugging Face folder: of a checkpoint by ``lit-stepwise export``, of a run by a callback."""

from lit_stepwise.export.callback import ExportCallback

__all__ = ["ExportCallback"]
