"""A thousand trajectories while workers die at random."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import pytest

from lit_stepwise.text2sql.datasets.tasks import SQLTask
from lit_stepwise.text2sql.environment import Text2SQL
from lit_stepwise.text2sql.executors import SQLiteExecutor
from tests.waiting import has_open, wait_until

NUM_TRAJECTORIES = 1000


def workers() -> list[int]:
    """Ids of this process's workers."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def num_threads() -> int:
    return sum(type(thread).__name__ != "TMonitor" for thread in threading.enumerate())  # that of tqdm stays


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def task(tmp_path):
    database = tmp_path / "numbers.sqlite"
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("CREATE TABLE number (n INTEGER)")
        connection.executemany("INSERT INTO number VALUES (?)", [(n,) for n in range(200)])
        connection.commit()
    return SQLTask(task_id="t", question="?", database=database, gold_sql="SELECT sum(n) FROM number WHERE n < 100")


@pytest.mark.slow
def test_no_trajectory_is_lost_and_no_reward_is_wrong_while_workers_are_killed(task):
    before = set(workers()), num_files(), num_threads()
    environment = Text2SQL(executor=SQLiteExecutor(num_workers=2, cache_mb=0))
    environment.prepare([task])
    done = threading.Event()
    played: list[tuple[list[str], dict[str, float], bool]] = []
    num_kills = 0

    def kill_at_random() -> None:
        """A worker after every few trajectories, at its first statement or a later one; at times both."""
        nonlocal num_kills
        rng, next_kill = random.Random(0), 0
        while not done.wait(0.001):
            if len(played) >= next_kill:
                next_kill = len(played) + rng.randint(5, 35)
                ours = [pid for pid in set(workers()) - before[0] if has_open(pid, task.database)]
                for victim in rng.sample(ours, k=min(len(ours), rng.choice((1, 1, 2)))):
                    with suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)
                        num_kills += 1

    def play(number: int) -> None:
        episode = environment.start(task, 6)
        looks = [
            f"<sql>SELECT count(*), {number} FROM number a, number b WHERE a.n < b.n + {look}</sql>"
            for look in (1, 2, 3)
        ]
        answer = 100 if number % 3 else 99  # every third is wrong
        responses = [*looks, f"<solution>SELECT sum(n) FROM number WHERE n < {answer}</solution>"]
        feedbacks = [episode.step(response) for response in responses]
        played.append(
            (
                [each.failure for each in feedbacks],
                dict(feedbacks[-1].rewards),
                feedbacks[-1].success == bool(number % 3),
            )
        )

    killer = threading.Thread(target=kill_at_random)
    killer.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(play, range(NUM_TRAJECTORIES)))
    finally:
        done.set()
        killer.join()
    stats = environment.stats()
    environment.close()

    assert len(played) == NUM_TRAJECTORIES
    assert num_kills >= 10
    assert [failures for failures, _, _ in played] == [[""] * 4] * NUM_TRAJECTORIES
    assert all(is_right for _, _, is_right in played)
    outcomes = [rewards["outcome"] for _, rewards, _ in played]
    assert (outcomes.count(1.0), outcomes.count(0.0)) == (666, 334)
    assert {(rewards["format"], rewards["execution"]) for _, rewards, _ in played} == {(0.0, 0.0)}
    assert stats["ok"] >= 4 * NUM_TRAJECTORIES
    assert stats["crashes"] >= 1
    wait_until(lambda: (set(workers()), num_files(), num_threads()) == before)
