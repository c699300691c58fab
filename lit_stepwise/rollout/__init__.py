"""Play: the agent loop on Fabric's ranks, weight sync, the store, and the callback that ties them to a Trainer."""

from lit_stepwise.rollout.callback import RolloutCallback
from lit_stepwise.rollout.collector import Collector

__all__ = ["Collector", "RolloutCallback"]
