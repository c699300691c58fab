"""What the module makes of the phases of a run."""

from __future__ import annotations

from lit_stepwise.training.clock import PhaseClock
from lit_stepwise.training.logs import Logs
from lit_stepwise.types import Rollout


def test_what_stands_under_no_other_name_is_the_rest_of_an_iteration() -> None:
    now = [0.0]
    logs = Logs()
    logs._clock = PhaseClock(lambda: now[0])

    def iteration(number: int, trained: float, evaluated: float, cycle_seconds: float) -> dict[str, float]:
        """10 s of training thread time that are all of another length."""
        spent = {"prepare": 1.0, "train": 3.0, "save": 0.5, "evaluate": 2.0, "sync": 0.75, "play": 2.5, "other": 0.25}
        for phase, seconds in spent.items():
            logs.on_phase(phase)
            now[0] += seconds
        logs._spent = trained + evaluated
        logs.on_rollout_end(Rollout("train", number, 0, [], wait_seconds=2.75, cycle_seconds=cycle_seconds))
        return logs._phases

    assert iteration(0, trained=2.5, evaluated=2.25, cycle_seconds=0.0) == {}
    assert iteration(1, trained=2.875, evaluated=2.25, cycle_seconds=10.0) == {
        "iteration": 10.0,
        "prepare": 1.0,
        "other": 0.625,  # 10 - 1 - 0.5 of saving - 2.75 of waiting - 2.875 - 2.25
    }
    assert logs._spent == 0.0
