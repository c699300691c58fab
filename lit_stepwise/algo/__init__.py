"""Pure mathematics: no Lightning, no files, nothing that changes."""

from lit_stepwise.algo.advantages import GroupRelative, TurnReturn
from lit_stepwise.algo.losses import DualClip

__all__ = ["DualClip", "GroupRelative", "TurnReturn"]
