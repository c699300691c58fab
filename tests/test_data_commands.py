"""``lit-stepwise data`` as a person meets it, and its guide: every command and snippet of it is run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import duckdb
import pytest
import yaml
from jsonargparse import ArgumentParser

import lit_stepwise.text2sql
from lit_stepwise import cli, data_commands
from lit_stepwise.interfaces import Environment, TaskSource
from lit_stepwise.text2sql import JSONLTasks

GUIDE = Path(__file__).parent.parent / "docs" / "data.md"
FARM = "SynSQL-2.5M/databases/farm/farm.sqlite"
ZOO = "spider/database/zoo/zoo.sqlite"
USER = "{db_details}:CREATE TABLE pig (id INT);\n {external_knowledge}: pigs;\n {question}: How many?"


def make_database(path: Path, num_pigs: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE pig (id INTEGER)")
        connection.executemany("INSERT INTO pig VALUES (?)", [(number,) for number in range(num_pigs)])
        connection.commit()
    return path


def write_parquet(path: Path, *rows: tuple[str, str, str]) -> Path:
    """Rows of SkyRL: db_id, data, gold statement."""
    prompt = json.dumps([{"role": "system", "content": "Answer."}, {"role": "user", "content": USER}])
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect() as connection:
        connection.execute("CREATE TABLE rows (db_id TEXT, data TEXT, gold TEXT, prompt TEXT)")
        connection.executemany("INSERT INTO rows VALUES (?, ?, ?, ?)", [(*row, prompt) for row in rows])
        connection.execute(
            f"""COPY (SELECT db_id, data, {{'method': 'rule', 'ground_truth': gold}} AS reward_spec,
                from_json(prompt, '[{{"role": "VARCHAR", "content": "VARCHAR"}}]') AS prompt FROM rows)
            TO '{path}' (FORMAT parquet)"""
        )
    return path


@pytest.fixture
def sky(tmp_path: Path) -> Path:
    rows = [
        ("farm", "synsql", "SELECT count(*) FROM pig"),
        ("zoo", "spider", "SELECT id FROM pig WHERE id > 7"),
        ("farm", "synsql", "SELECT id FROM pig"),
    ]
    write_parquet(tmp_path / "train.parquet", *rows)
    return tmp_path


def run(*words):
    try:
        return cli.main(["data", *map(str, words)])
    except SystemExit as ended:
        return ended.code


# ---- the command line


def test_help_lists_the_commands_and_an_unknown_one_gets_the_closest(capsys):
    assert run("--help") == run() == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("needs", "check", "convert"))
    assert cli.main(["--help"]) == 0
    assert "  data " in capsys.readouterr().out
    assert run("chek") == 2
    assert "error: unknown command 'data chek'; did you mean 'check'?" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = "import sys; from lit_stepwise import cli; cli.main(['data', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "duckdb", "ijson", "pandas", "pyarrow", "sqlglot", "lightning"} & set(done.stdout.split())


@pytest.mark.parametrize("command", data_commands.COMMANDS)
def test_every_command_explains_its_settings(command, capsys):
    assert run(command, "--help") == 0
    assert f"lit-stepwise data {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nams"], "unrecognized arguments: --nams; did you mean 'names'?"),
        (["--source", "SkyRTasks"], "--source SkyRTasks is no class; use one of BIRDTasks, DemoTasks, JSONLTasks, Omn"),
        (["--source", "SkyRLTasks", "--source.databas_root", "x"], "not accepted; did you mean 'database_root'?"),
        (["--source", "lit_stepwise.testing.CountdownTasks"], "--source CountdownTasks says nothing of databases; use"),
        (["--source", "OmniSQLTasks", "--source.max_tasks", "0"], "data.source.max_tasks=0 keeps no task"),
    ],
)
def test_what_is_wrong_is_one_line_with_the_way_out(sky, words, message, capsys):
    assert run("needs", sky / "train.parquet", *words) in (1, 2)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert message in said


# ---- needs


def test_needs_lists_every_database_of_all_files_while_none_is_there(sky, capsys):
    more = write_parquet(sky / "validation.parquet", ("zoo", "spider", "SELECT 1"))
    assert run("needs", sky / "train.parquet", more, "--source", "SkyRLTasks") == 0
    assert capsys.readouterr().out.splitlines() == [
        "SynSQL-2.5M/databases/farm/farm.sqlite       2 tasks  missing",
        "spider/database/zoo/zoo.sqlite               2 tasks  missing",
        "2 databases of 4 tasks: 2 missing, 0 present (0.0 MB)",
    ]


def test_needs_says_the_size_of_those_that_are_there(sky, capsys):
    make_database(sky / "files" / FARM, num_pigs=4000)
    size = (sky / "files" / FARM).stat().st_size / 1e6
    source = ["--source", "SkyRLTasks", "--source.database_root", sky / "files"]
    assert run("needs", sky / "train.parquet", *source) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"{size:.2f} MB")
    assert lines[2] == f"2 databases of 3 tasks: 1 missing, 1 present ({size:.1f} MB)"
    assert run("needs", sky / "train.parquet", *source, "--names") == 0
    assert capsys.readouterr().out == f"{ZOO}\n"
    make_database(sky / "files" / ZOO)
    assert run("needs", sky / "train.parquet", *source, "--names") == 0
    assert capsys.readouterr().out == ""


# ---- check


def test_check_reports_what_is_wrong_and_writes_what_passes(sky, capsys):
    make_database(sky / "data" / FARM, num_pigs=5)
    make_database(sky / "data" / ZOO)
    written = sky / "checked.jsonl"
    assert run("check", sky / "train.parquet", "--source", "SkyRLTasks", "--write", written) == 0
    said = capsys.readouterr().out
    assert re.search(r"empty +1 task  left out", said)
    assert "\n2 of 3 tasks can be trained on\n" in said
    assert f"wrote {written}, to be read by JSONLTasks with database_root: {sky}/data\n" in said
    before = lit_stepwise.text2sql.SkyRLTasks().read(str(sky / "train.parquet"))
    assert JSONLTasks(database_root=str(sky / "data")).read(str(written)) == [before[0], before[2]]
    assert json.loads(written.read_text().splitlines()[0])["db_id"] == "SynSQL-2.5M/databases/farm"


def test_check_keeps_what_the_policy_keeps(sky, capsys):
    make_database(sky / "data" / FARM)
    make_database(sky / "data" / ZOO)
    assert run("check", sky / "train.parquet", "--source", "SkyRLTasks", "--gold_policy.empty", "keep") == 0
    assert "3 of 3 tasks can be trained on" in capsys.readouterr().out


def test_check_fails_when_no_task_is_left_or_a_database_is_missing(sky, capsys):
    assert run("check", sky / "train.parquet", "--source", "SkyRLTasks") == 1
    assert "no database file for 'farm' (2 tasks), 'zoo' (1 task)" in capsys.readouterr().err
    make_database(sky / "data" / ZOO)
    file = write_parquet(sky / "empty.parquet", ("zoo", "spider", "SELECT id FROM pig WHERE id > 7"))
    assert run("check", file, "--source", "SkyRLTasks", "--write", sky / "none.jsonl") == 1
    assert "error: none of 1 tasks can be played" in capsys.readouterr().err
    assert not (sky / "none.jsonl").exists()


def test_what_is_known_of_columns_is_written_once_per_database(tmp_path, capsys):
    make_database(tmp_path / "train_databases/farm/farm.sqlite")
    description = tmp_path / "train_databases/farm/database_description/pig.csv"
    description.parent.mkdir()
    description.write_text("original_column_name,column_name,column_description\nid,,number of a pig\n")
    tasks = [{"db_id": "farm", "question": f"{n}?", "evidence": f"e{n}", "SQL": f"SELECT {n}"} for n in (4, 5)]
    (tmp_path / "train.json").write_text(json.dumps(tasks))
    source = ["--source", "BIRDTasks", "--source.database_root", tmp_path / "train_databases"]
    assert run("check", tmp_path / "train.json", *source, "--write", tmp_path / "a.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert lines == [
        {
            "id": "farm-0",
            "db_id": "farm",
            "question": "4?",
            "evidence": "e4",
            "gold_sql": "SELECT 4",
            "comments": {"pig": {"id": "number of a pig"}},
        },
        {"id": "farm-1", "db_id": "farm", "question": "5?", "evidence": "e5", "gold_sql": "SELECT 5"},
    ]
    read = JSONLTasks(database_root=str(tmp_path / "train_databases")).read(str(tmp_path / "a.jsonl"))
    assert [task.comments for task in read] == [{("pig", "id"): "number of a pig"}] * 2
    assert read[0].comments is read[1].comments


def test_what_check_wrote_of_databases_beside_a_file_is_read_beside_it(tmp_path, capsys):
    make_database(tmp_path / "databases/farm/farm.sqlite")
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"id": "a", "db_id": "farm", "question": "How many?", "gold_sql": "SELECT 3"}\n')
    assert run("check", questions, "--write", tmp_path / "checked.jsonl") == 0
    assert f"with database_root: {tmp_path}/databases\n" in capsys.readouterr().out
    assert JSONLTasks().read(str(tmp_path / "checked.jsonl")) == JSONLTasks().read(str(questions))


def test_check_writes_nothing_that_could_not_be_read_again(sky, tmp_path_factory, capsys):
    make_database(sky / "data" / FARM)
    file = write_parquet(sky / "a.parquet", ("farm", "synsql", "SELECT 1"))
    words = ["--source", "SkyRLTasks", "--write"]
    assert run("check", file, *words, file) == 1
    assert f"--write {file} would replace a file that is read" in capsys.readouterr().err
    assert run("check", file, shutil.copy(file, sky / "b.parquet"), *words, sky / "a.jsonl") == 1
    assert "two tasks have the id 'farm-0'" in capsys.readouterr().err
    assert run("check", file, *words, sky / "none" / "a.jsonl") == 1
    assert "none/a.jsonl cannot be written: No such file or directory" in capsys.readouterr().err
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(sky / "data" / "SynSQL-2.5M", elsewhere)
    (sky / "data" / "SynSQL-2.5M").symlink_to(elsewhere / "SynSQL-2.5M")
    assert run("check", file, *words, sky / "a.jsonl") == 1
    assert "set --source.database_root to a folder that holds them all" in capsys.readouterr().err
    assert not (sky / "a.jsonl").exists()


def test_a_source_that_makes_its_files_makes_them_first(tmp_path, capsys):
    folder = tmp_path / "demo"
    assert run("needs", folder / "val.jsonl", "--source", "DemoTasks", "--source.folder", folder) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("16 databases of 128 tasks: 0 missing, 16 present")


# ---- convert


def test_convert_writes_tasks_and_databases_that_are_read_without_a_setting(sky, capsys):
    make_database(sky / "data" / FARM, num_pigs=5)
    make_database(sky / "data" / ZOO)
    assert run("convert", sky / "train.parquet", "--source", "SkyRLTasks", "--target", sky / "duck") == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" -> ")[0] for line in said[:2]] == [str(sky / "data" / FARM), str(sky / "data" / ZOO)]
    assert said[2] == (
        f"{sky}/duck/train.jsonl: 3 of 3 tasks have the same answer on DuckDB and are written; "
        "0 have another one, 0 have none"
    )
    tasks = JSONLTasks().read(str(sky / "duck" / "train.jsonl"))
    assert [task.database.relative_to(sky) for task in tasks] == [
        Path(f"duck/databases/{name}/{name}.duckdb") for name in ("farm", "zoo", "farm")
    ]
    with duckdb.connect(str(tasks[0].database), read_only=True) as connection:
        assert connection.execute(tasks[0].gold_sql).fetchall() == [(5,)]


def test_convert_leaves_what_is_there_alone_unless_told_otherwise(sky, capsys):
    databases = [make_database(sky / "loose" / "farm.sqlite"), make_database(sky / "more" / "a" / "zoo.db")]
    words = [databases[0], sky / "more", "--target", sky / "duck"]
    for extra, status in ([], "converted"), ([], "kept"), (["--overwrite"], "converted"):
        assert run("convert", *words, *extra) == 0
        assert [f": {status}" in line for line in capsys.readouterr().out.splitlines()] == [True, True]
    assert not list((sky / "duck").glob("*.jsonl"))


def test_convert_goes_on_without_a_database_that_fails(sky, capsys):
    make_database(sky / "data" / FARM)
    (sky / "data" / ZOO).parent.mkdir(parents=True)
    (sky / "data" / ZOO).write_bytes(b"SQLite format 3\0 and nothing more")
    words = ["--source", "SkyRLTasks", "--target", sky / "duck"]
    assert run("convert", sky / "train.parquet", *words) == 0
    said = capsys.readouterr().out
    assert "zoo.duckdb: failed" in said
    assert f"{sky}/duck/train.jsonl: 1 task left out with databases that failed" in said
    assert "2 of 2 tasks have the same answer" in said
    zoo = write_parquet(sky / "zoo.parquet", ("zoo", "spider", "SELECT 1"))
    assert run("convert", zoo, *words) == 1


def test_convert_needs_a_target_and_writes_no_two_files_to_one(sky, capsys):
    make_database(sky / "data" / FARM)
    make_database(sky / "data" / ZOO)
    words = ["--source", "SkyRLTasks", "--source.database_root", sky / "data"]
    assert run("convert", sky / "train.parquet", *words) == 2
    assert "target" in capsys.readouterr().err
    other = write_parquet(sky / "other" / "train.parquet", ("zoo", "spider", "SELECT 1"))
    assert run("convert", sky / "train.parquet", other, *words, "--target", sky / "duck") == 1
    assert f"{other} would be written over another as {sky}/duck/train.jsonl; use another" in capsys.readouterr().err
    assert not (sky / "duck").exists()
    (sky / "a_file").touch()
    assert run("convert", sky / "data" / FARM, "--target", sky / "a_file") == 1
    assert "--target " in (said := capsys.readouterr().err)
    assert "a_file/databases is no folder and cannot be made one (Not a directory)" in said


# ---- the guide


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_every_snippet_of_the_guide_names_classes_and_settings_that_exist(block):
    config = yaml.safe_load(block)
    for section, name, kind in (("data", "source", TaskSource), ("rollout", "environment", Environment)):
        if section in config:
            assert set(config[section]) <= {name, "train_files", "val_files"}
            given = config[section][name]
            room, _, class_name = given["class_path"].rpartition(".")
            assert room == "lit_stepwise.text2sql"
            parser = ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(kind, name)
            made = parser.instantiate(parser.parse_object({name: given}))[name]
            assert type(made).__name__ == class_name


def test_the_guide_shows_every_reader():
    named = set(re.findall(r"class_path: lit_stepwise\.text2sql\.(\w+Tasks)", "".join(blocks("yaml"))))
    assert named == {"SkyRLTasks", "SpiderTasks", "BIRDTasks", "OmniSQLTasks", "JSONLTasks"}


@pytest.mark.skipif(shutil.which("unzip") is None, reason="needs unzip")
def test_the_commands_of_the_guide_unpack_just_what_is_needed_and_check_it(tmp_path):
    folder = tmp_path / "data" / "skyrl"
    write_parquet(folder / "train.parquet", ("farm", "synsql", "SELECT 3"), ("zoo", "spider", "SELECT 4"))
    write_parquet(folder / "validation.parquet", ("zoo", "spider", "SELECT 5"))
    database = make_database(tmp_path / "any.sqlite")
    members = [FARM, ZOO, "SynSQL-2.5M/databases/idle/idle.sqlite", "spider/dev.json", "bird/train/train.json"]
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for member in members:
            archive.write(database, f"data/{member}")
    unpack, spider, check, convert = [each for each in blocks("bash") if "hf download" not in each]
    assert "0 missing, 2 present" in shell(unpack, tmp_path)
    assert unpacked(folder) == {FARM, ZOO}
    shell(unpack, tmp_path)  # with nothing missing, nothing is unpacked
    assert unpacked(folder) == {FARM, ZOO}
    assert "2 of 2 tasks can be trained on" in shell(check, tmp_path)
    assert "2 of 2 tasks have the same answer" in shell(convert, tmp_path)
    assert len(JSONLTasks().read(str(tmp_path / "data/duckdb/train.jsonl"))) == 2
    shell(spider, tmp_path)
    assert unpacked(folder) == {FARM, ZOO, "spider/dev.json"}


def unpacked(folder: Path) -> set[str]:
    return {str(path.relative_to(folder / "data")) for path in (folder / "data").rglob("*") if path.is_file()}


def shell(command: str, folder: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
