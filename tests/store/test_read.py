"""A run is found and read, however it came to be; what cannot be read is said in a line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from by_hand import BAD, EASY, GREEDY, learn, train

from lit_stepwise.errors import StoreError
from lit_stepwise.store.find import find_run
from lit_stepwise.store.read import open_run
from lit_stepwise.store.write import Lineage, StoredPhase, TrajectoryStore, unused


def ask(path: Path, query: str) -> list[Any]:
    return open_run(path).execute(query).fetchall()


# ---- views


def test_groups_are_too_hard_mixed_or_too_easy_whatever_failed(run: Path) -> None:
    columns = "group_id, task_id, attempts, solved, reward, kind, trained"
    assert ask(run, f"select {columns} from groups where iteration = 3 order by 1") == [
        (0, "a", 2, 0.5, 1.5, "mixed", True),
        (1, "b", 2, 1.0, 4.0, "too easy", False),
    ]


def test_a_trajectory_is_the_sum_of_its_turns(run: Path) -> None:
    query = "select num_turns, reward, num_response_tokens, max_advantage, engine_seconds from trajectories"
    assert ask(run, f"{query} where iteration = 3 and task_id = 'a' and sample = 0") == [(2, 3.0, 4, 0.2, 3.0)]
    assert ask(run, f"{query} where stage = 'evaluate'") == [(1, 8.0, 2, None, 1.5)]


def test_metrics_are_those_that_were_logged(run: Path) -> None:
    assert ask(run, "select * from metrics order by step, name") == [
        (11, "train/loss", 0.25), (11, "val/accuracy", 0.5), (12, "train/loss", 0.75),
    ]  # fmt: skip


def test_a_line_that_is_being_written_is_passed_over(run: Path) -> None:
    with (run / "metrics.csv").open("a") as file:
        file.write("4,1")
    assert len(ask(run, "select * from metrics")) == 3


def test_a_mere_evaluation_has_metrics_though_no_epoch(run: Path) -> None:
    (run / "metrics.csv").write_text("seconds/evaluate,step,test/accuracy\n1.5,0,0.625\n")
    assert ask(run, "select * from metrics order by name") == [
        (0, "seconds/evaluate", 1.5),
        (0, "test/accuracy", 0.625),
    ]


def test_without_a_csv_logger_the_metrics_come_from_the_store(run: Path) -> None:
    (run / "metrics.csv").unlink()
    found = dict(ask(run, "select name, value from metrics where step = 11 and name <> 'x' order by step limit 99"))
    # 4 trajectories, of which one failed; the trained turn has a gap of 0.25 before its first update
    assert found["rollout/reward"] == pytest.approx((3 + 0 + 4) / 3)
    assert found["rollout/accuracy"] == pytest.approx(2 / 3)
    assert found["train/logprob_gap"] == 0.25
    assert ask(run, "select value from metrics where name = 'val/accuracy'") == [(1.0,)]


# ---- the way to a run


def test_a_run_is_named_by_its_folder_its_store_or_the_folder_of_runs(run: Path) -> None:
    for path in (run, run / "trajectories", run.parent, run.parent.parent):
        assert find_run(path).folder == run, path


def test_of_several_runs_the_newest_counts(run: Path, make_store: Any) -> None:
    store = make_store(1)
    train(store, 0)
    for path in store.folder.iterdir():
        os.utime(path, (2e9, 2e9))
    assert find_run(run.parent).folder == store.folder.parent


def test_stores_of_several_runs_may_lie_in_one_folder(make_store: Any) -> None:
    first = make_store()
    train(first, 0)
    second = TrajectoryStore(unused(first.folder))
    second.begin(Lineage(first.folder, iteration=0, step=1))
    train(second, 1, [BAD])
    for path in second.folder.iterdir():
        os.utime(path, (2e9, 2e9))
    found = ask(first.folder.parent, "select run, count(*) from turns group by all order by run")
    assert found == [("version_0", 4), ("version_0/trajectories-2", 1)]
    assert unused(first.folder).name == "trajectories-3"


# ---- resumed runs


def resumed(make_store: Any) -> tuple[Any, Any]:
    """Version 1 goes on from version 0 in the middle of its iteration 4, and plays iteration 5 anew."""
    first, second = make_store(0), make_store(1)
    for iteration in (3, 4, 5):
        train(first, iteration)
        learn(first, iteration, 2 * iteration, [-0.5, -0.25 - iteration])
    first.write(StoredPhase("evaluate", 99, [GREEDY]))
    second.begin(Lineage(first.folder, iteration=4, step=8))
    learn(second, 4, 8, [-0.5, -16.25])
    train(second, 5, [BAD, EASY])
    return first, second


def test_a_resumed_run_is_read_with_what_it_went_on_from_and_nothing_twice(make_store: Any) -> None:
    _, second = resumed(make_store)
    query = "select run, phase, count(*), max(logprob_gap) from turns group by all order by phase"
    assert ask(second.folder, query) == [
        ("version_0", "train-000003", 4, 1.5),
        ("version_0", "train-000004", 4, 8.0),  # trained again after the resume
        ("version_1", "train-000005", 2, None),
    ]


def test_the_run_that_was_left_stays_whole(make_store: Any) -> None:
    first, _ = resumed(make_store)
    assert ask(first.folder, "select count(distinct phase), max(trained_at) from turns") == [(4, 10)]


def test_a_chain_is_cut_where_the_earliest_of_its_links_went_on(make_store: Any) -> None:
    _, second = resumed(make_store)
    third = make_store(2)
    third.begin(Lineage(second.folder, iteration=3, step=6))
    train(third, 4, [BAD])
    found = ask(third.folder, "select run, phase, count(*) from turns group by all order by phase")
    assert found == [("version_0", "train-000003", 4), ("version_2", "train-000004", 1)]


def test_runs_may_be_moved_together(make_store: Any, tmp_path: Path) -> None:
    resumed(make_store)
    shutil.move(tmp_path / "runs", tmp_path / "elsewhere")
    assert ask(tmp_path / "elsewhere/version_1", "select count(*) from turns") == [(10,)]


def test_an_ancestor_that_is_gone_is_said_and_the_rest_is_read(make_store: Any) -> None:
    first, second = resumed(make_store)
    shutil.rmtree(first.folder)
    found = find_run(second.folder)
    assert found.missing is not None
    assert found.missing.resolve() == first.folder
    assert ask(second.folder, "select count(*) from turns") == [(2,)]


# ---- what cannot be read


def test_a_half_written_file_is_passed_over(run: Path) -> None:
    path = run / "trajectories" / "train-000004.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    found = find_run(run)
    assert [each.name for each in found.broken] == ["train-000004.parquet"]
    assert ask(run, "select distinct iteration from turns where stage = 'train'") == [(3,)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda store: shutil.rmtree(store.parent), r"version_0 does not exist; give the folder of a run"),
        (lambda store: shutil.rmtree(store), r"version_0 holds no run; give a folder with trajectories/"),
        (lambda store: [path.unlink() for path in store.glob("*.parquet")], r"holds no trajectories yet; wait for"),
        (
            lambda store: [path.write_bytes(b"PAR1") for path in store.glob("*.parquet")],
            r"holds no trajectories yet; evaluate-step000012.parquet is not whole",
        ),
        (
            lambda store: (store / "run.json").write_text(json.dumps({"format": 7})),
            r"has format 7, and this version reads format 1; use the version that wrote it",
        ),
        (lambda store: (store / "run.json").write_text("{"), r"run.json is damaged .*; restore it"),
        (
            lambda store: (
                [path.unlink() for path in store.iterdir()],
                (store / "train-000000.jsonl").write_text("{}\n"),
            ),
            r"was written by an older version, as JSON lines; read it with that version",
        ),
        (
            lambda store: (store / "evaluate-step000012.parquet").write_bytes(b"PAR1 not really, but PAR1"),
            r"version_0 cannot be read: ",
        ),
    ],
)
def test_what_cannot_be_read_is_said_in_a_line(run: Path, spoil: Any, message: str) -> None:
    spoil(run / "trajectories")
    with pytest.raises(StoreError, match=message) as raised:
        open_run(run)
    assert "\n" not in str(raised.value)


def test_a_query_reads_the_run_and_nothing_else_and_writes_nowhere(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    connection = open_run(run)
    for query in (
        f"select * from read_csv('{tmp_path}/secret.csv')",
        f"copy (select 1) to '{tmp_path}/out.csv'",
        "set enable_external_access=true",
    ):
        with pytest.raises(Exception, match=r"disabled|locked|Cannot|Permission"):
            connection.execute(query)
    assert not (tmp_path / "out.csv").exists()
