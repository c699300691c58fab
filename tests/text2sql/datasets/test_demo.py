"""The demo tasks: reproducible, fair, and won by looking first."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sqlite3
import time
from collections import Counter
from contextlib import closing
from itertools import groupby
from pathlib import Path

import duckdb
import pytest

from lit_stepwise.errors import ConfigError
from lit_stepwise.text2sql.datasets import demo
from lit_stepwise.text2sql.datasets.demo import DemoTasks, expert, write_tasks
from lit_stepwise.text2sql.datasets.tasks import SQLTask
from lit_stepwise.text2sql.environment import Text2SQL
from lit_stepwise.text2sql.schema import read_schema

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> DemoTasks:
    source = DemoTasks(folder=str(tmp_path_factory.mktemp("data") / "demo"))
    source.prepare()
    return source


def tasks_of(source: DemoTasks, split: str) -> list[SQLTask]:
    return source.read(f"{source.folder}/{split}.jsonl")


def content(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def value(task: SQLTask, sql: str) -> object:
    with closing(sqlite3.connect(task.database)) as connection:
        return connection.execute(sql).fetchone()[0]


def test_each_split_has_its_tasks_of_all_grades_on_databases_of_its_own(source):
    databases = {split: {task.database for task in tasks_of(source, split)} for split in SPLITS}
    assert {split: len(each) for split, each in databases.items()} == {"train": 100, "val": 16, "test": 16}
    assert len(set().union(*databases.values())) == 132
    grades = {split: Counter(task.num_lookups for task in tasks_of(source, split)) for split in SPLITS}
    assert grades["train"] == {0: 200, 1: 350, 2: 300, 3: 150}
    assert grades["val"] == grades["test"] == {0: 28, 1: 46, 2: 36, 3: 18}


def test_the_first_tasks_of_a_split_are_of_all_kinds(source):
    first = tasks_of(source, "val")[:32]
    assert {task.num_lookups for task in first} == {0, 1, 2, 3}
    assert len({task.database for task in first}) > 8


def test_no_question_is_asked_twice_about_a_database(source):
    tasks = tasks_of(source, "train")
    assert len({(task.database, task.question) for task in tasks}) == len(tasks)


def test_there_are_many_domains(source):
    tables = {re.search(r"FROM (\w+)", task.gold_sql)[1] for task in tasks_of(source, "val")}
    assert len(tables) == 8


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(source, tmp_path):
    same, other = DemoTasks(folder=str(tmp_path / "same")), DemoTasks(folder=str(tmp_path / "other"), seed=7)
    same.prepare()
    other.prepare()
    assert content(same.folder) == content(source.folder)
    assert content(other.folder)["val.jsonl"] != content(source.folder)["val.jsonl"]


def test_what_is_there_already_is_left_alone(source, monkeypatch):
    monkeypatch.setattr(demo, "write_tasks", None)
    DemoTasks(folder=source.folder).prepare()


def test_what_another_version_or_seed_wrote_is_replaced(tmp_path, monkeypatch):
    folder = str(tmp_path / "demo")
    DemoTasks(folder=folder, seed=5).prepare()
    old = content(folder)
    DemoTasks(folder=folder).prepare()
    new = content(folder)
    assert new["train.jsonl"] != old["train.jsonl"]
    monkeypatch.setattr(demo, "_VERSION", -1)
    DemoTasks(folder=folder).prepare()
    assert content(folder)["train.jsonl"] != new["train.jsonl"]
    assert list(tmp_path.iterdir()) == [tmp_path / "demo"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which is not ours"):
        DemoTasks(folder=str(tmp_path)).prepare()
    assert content(str(tmp_path)) == {"thesis.txt": b"years of work"}


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def write_half(folder: Path, *_: object) -> None:
        (folder / "databases").mkdir(parents=True)
        raise OSError("disk full")

    monkeypatch.setattr(demo, "write_tasks", write_half)
    with pytest.raises(OSError, match="disk full"):
        DemoTasks(folder=str(tmp_path / "demo")).prepare()
    assert list(tmp_path.iterdir()) == []


def test_who_comes_second_takes_what_the_first_wrote(tmp_path, monkeypatch):
    folder = str(tmp_path / "demo")
    write = demo.write_tasks

    def write_late(*arguments: object) -> None:
        write(*arguments)
        monkeypatch.setattr(demo, "write_tasks", write)
        DemoTasks(folder=folder).prepare()

    monkeypatch.setattr(demo, "write_tasks", write_late)
    DemoTasks(folder=folder).prepare()
    assert len(content(folder)) == 4 + 132
    assert list(tmp_path.iterdir()) == [tmp_path / "demo"]


def test_writing_takes_seconds(tmp_path):
    began = time.process_time()
    DemoTasks(folder=str(tmp_path / "demo")).prepare()
    assert time.process_time() - began < 5


def test_questions_do_not_give_the_stored_spelling_away(source):
    for task in tasks_of(source, "val"):
        for column, stored in re.findall(r"(\w+) = '([^']*)'", task.gold_sql):
            assert f"{column} {stored}" not in task.question
            assert value(
                task, f"SELECT COUNT(*) FROM {re.search(r'FROM (.*?) ', task.gold_sql)[1]} WHERE {column} = '{stored}'"
            )


def test_an_answer_is_something_and_no_wrong_spelling_leads_to_it(source):
    for task in tasks_of(source, "val"):
        answer = value(task, task.gold_sql)
        assert answer
        assert len(re.findall(r" = '", task.gold_sql)) == task.num_lookups
        for stored in re.findall(r"'([^']*)'", task.gold_sql):
            assert value(task, task.gold_sql.replace(f"'{stored}'", f"'{stored}~'")) != answer


def test_every_condition_is_needed(source):
    for task in tasks_of(source, "val"):
        select, conditions = task.gold_sql.split(" WHERE ")
        parts = conditions.split(" AND ")
        for part in parts:
            rest = " AND ".join(other for other in parts if other != part)
            assert value(task, f"{select} WHERE {rest or 'TRUE'}") != value(task, task.gold_sql)


def test_an_expert_who_looks_everything_up_is_always_right(source):
    rng = random.Random(1)
    with closing(Text2SQL(instructions="")) as environment:
        for task in tasks_of(source, "val"):
            episode = environment.start(task, 4)
            *looks, answer = [episode.step(response) for response in expert(task, rng)]
            assert len(looks) == task.num_lookups
            assert all(look.details["rows"] == 3 for look in looks)
            assert answer.success


def test_an_expert_who_never_looks_is_seldom_right(source):
    rng = random.Random(2)
    solved = Counter()
    with closing(Text2SQL(instructions="")) as environment:
        for task in tasks_of(source, "train")[:600]:
            (response,) = expert(task, rng, mistake_share=1.0)
            solved[task.num_lookups] += environment.start(task, 4).step(response).success
    assert solved[0] > 0.9 * 120  # a slip now and then
    assert solved[1] < 0.25 * 210  # one spelling in eight
    assert solved[2] + solved[3] < 0.1 * 270


def test_an_expert_skips_the_stated_share_of_look_ups(source):
    rng = random.Random(3)
    asked: Counter[str] = Counter()
    looked: Counter[str] = Counter()
    for task in tasks_of(source, "train"):
        asked.update(re.findall(r"(\w+) = '", task.gold_sql))
        looked.update(re.findall(r"check (\w+)", " ".join(expert(task, rng, mistake_share=0.5))))
    for columns, share in ((("status", "kind", "ward"), 0.65), (("region", "view", "doctor"), 0.37)):
        shares = sum(looked[column] for column in columns) / sum(asked[column] for column in columns)
        assert shares == pytest.approx(share, abs=0.07)


def test_the_files_are_plain_json_lines(source):
    line = json.loads((Path(source.folder) / "val.jsonl").read_text().splitlines()[5])
    assert sorted(line) == ["db_id", "evidence", "gold_sql", "id", "num_lookups", "question"]
    assert line["id"] == "val-0005"


@pytest.fixture(scope="module")
def columnar(tmp_path_factory) -> DemoTasks:
    source = DemoTasks(folder=str(tmp_path_factory.mktemp("data") / "demo"), system="duckdb")
    source.prepare()
    return source


def test_the_tasks_are_the_same_whatever_the_system(source, columnar):
    for split in SPLITS:
        assert (Path(columnar.folder) / f"{split}.jsonl").read_bytes() == content(source.folder)[f"{split}.jsonl"]
    names = {path.name.replace(".duckdb", ".sqlite") for path in (Path(columnar.folder) / "databases").iterdir()}
    assert names == {path.name for path in (Path(source.folder) / "databases").iterdir()}
    assert all(task.database.suffix == ".duckdb" for task in tasks_of(columnar, "val"))


def test_every_gold_statement_has_the_same_answer_on_both_systems(source, columnar):
    num_compared = 0
    pairs = [pair for split in SPLITS for pair in zip(tasks_of(source, split), tasks_of(columnar, split), strict=True)]
    with duckdb.connect(":memory:", config={"threads": 1}) as connection:
        for (_, there), some in groupby(sorted(pairs, key=by_database), key=by_database):
            connection.execute(f"ATTACH '{there}' AS demo (READ_ONLY); USE demo")
            for task, _ in some:
                expected = pytest.approx(value(task, task.gold_sql), rel=1e-12)
                assert connection.execute(task.gold_sql).fetchall() == [(expected,)]
                num_compared += 1
            connection.execute("USE memory; DETACH demo")
    assert num_compared == 1256


def by_database(pair: tuple[SQLTask, SQLTask]) -> tuple[Path, Path]:
    return pair[0].database, pair[1].database


def test_the_tables_read_the_same_on_both_systems(source, columnar):
    pairs = zip(tasks_of(source, "val"), tasks_of(columnar, "val"), strict=True)
    for here, there in {by_database(pair) for pair in pairs}:
        assert read_schema(here, "compact") == read_schema(there, "compact")


def test_what_was_written_for_another_system_is_replaced(source, tmp_path):
    folder = str(tmp_path / "demo")
    for system, suffix in (("sqlite", ".sqlite"), ("duckdb", ".duckdb"), ("sqlite", ".sqlite")):
        DemoTasks(folder=folder, system=system).prepare()
        assert {path.suffix for path in (tmp_path / "demo" / "databases").iterdir()} == {suffix}
    assert content(folder) == content(source.folder)


def test_the_tasks_that_the_shipped_model_was_taught_with_do_not_change(tmp_path):
    written = hashlib.sha256(write_tasks(tmp_path, "warmup", 3, 60, 0).read_bytes())
    assert written.hexdigest() == "63d59d38db4158ea4b8292dfbd704cb907c60d455ace4e4afb2529961acc8e73"


def test_writing_for_duckdb_takes_seconds(tmp_path):
    began = time.process_time()
    DemoTasks(folder=str(tmp_path / "it's"), system="duckdb").prepare()
    assert time.process_time() - began < 20
