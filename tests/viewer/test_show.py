"""What a person sees of a run; whatever a field holds, the terminal obeys none of it."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_stepwise import cli
from lit_stepwise.store.write import Lineage, StoredPhase, TrajectoryStore
from lit_stepwise.types import Feedback, MiniBatch, StepSample, StopReason, Trajectory, Turn, VersionSpan
from lit_stepwise.viewer.screen import _cut

HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] \x9b2J \u202eright\u200b\r:smile: \x00"
Look = Callable[..., tuple[int, str, str]]


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Look:
    """Run a command in this process: gives (exit code, stdout, stderr)."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def run_it(*words: object) -> tuple[int, str, str]:
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run_it


def turn(
    text: str, reward: float, sql: str = "select 1", last: bool = False, success: bool = False, step: int = 3
) -> Turn:
    return Turn(
        prompt_ids=[1, 2],
        response_ids=[7, 8],
        rollout_logprobs=[-0.5, -0.25],
        versions=[VersionSpan(step, 2)],
        text=text,
        feedback=Feedback(
            "" if last else f"rows of {sql}", {"outcome": reward}, done=last, success=success,
            details={"sql": sql, "status": "ok"},
        ),
    )  # fmt: skip


def attempt(task: str, group: int, sample: int, *turns: Turn, temperature: float = 1.0) -> Trajectory:
    return Trajectory(task, group, sample, turns, StopReason.DONE, temperature)


def greedy(step: int, **solved: bool) -> list[Trajectory]:
    """An evaluation that solved these tasks."""
    return [
        attempt(task, i, 0, turn("x", float(on), last=True, success=on, step=step), temperature=0.0)
        for i, (task, on) in enumerate(solved.items())
    ]


def make_run(folder: Path, name: str = "ok", reward: float = 4.0, settings: str = "seed_everything: 0\n") -> Path:
    """Two groups in iteration 3, one optimizer step, evaluations at steps 3 and 9."""
    store = TrajectoryStore(folder / "trajectories", decode=lambda ids: f"question of {name}")
    played = [
        attempt("mixed", 0, 0, turn("look", 0.5), turn("answer", reward, "select 2", last=True, success=True)),
        attempt("mixed", 0, 1, turn(f"guess {name}", 0.0, last=True)),
        attempt("hard", 1, 0, turn("wrong", -1.0, last=True)),
    ]
    store.write(StoredPhase("train", 3, played, 3, [[1.5, 1.25], [-1.5], [0.0]], ["", "", "flat"]))
    row = StepSample([1, 2], [7, 8], [True] * 2, [-0.5, -0.25], [1.5] * 2, 0.5, 0, 0, turn=0, policy_version=3)
    rows = [row, replace(row, turn=1)]
    store.learn(MiniBatch(rows, 3, 0), {0: [-0.5, -0.25], 1: [-0.5, -8.25]}, 3)
    store.write(StoredPhase("evaluate", 3, greedy(3, lost=True, won=False, same=True)))
    store.write(StoredPhase("evaluate", 9, greedy(9, lost=False, won=True, same=True)))
    (folder / "config.yaml").write_text(settings)
    (folder / "metrics.csv").write_text(
        "epoch,step,val/accuracy,seconds/play,seconds/train\n3,3,0.25,,\n3,4,,6.0,2.0\n4,9,0.75,,\n"
    )
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "runs" / "version_0")


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


# ---- overview


def test_the_overview_says_how_it_went_and_what_took_the_time(run: Path, look: Look) -> None:
    code, out, _ = look("show", run.parent)
    assert code == 0
    assert "version_0: 1 iterations, 9 trajectories, 10 turns; store of" in " ".join(out.split())  # a long path wraps
    assert lines_with(out, "val/accuracy", "0.25", "0.75", "▁█")
    assert lines_with(out, "seconds/play", "6", "75%")
    assert re.search(r"train-000003 +2 +0 +1 +1 +0 +1", out)  # groups, too easy, mixed, too hard, failed, trained
    assert "seed_everything=0" in out


def test_where_play_went_on_beside_training_what_the_trainer_waited_is_told(run: Path, look: Look) -> None:
    (run / "metrics.csv").write_text(
        "step,seconds/play,seconds/wait,seconds/sync,seconds/train\n3,9.0,2.5,0.5,6.0\n4,8.0,1.5,0.5,4.0\n"
    )
    _, out, _ = look("show", run)
    assert lines_with(out, "seconds/wait", " 3 ", "21%")  # 4 - 1 of 3 + 1 + 10
    assert not lines_with(out, "seconds/play")


def test_the_overview_answers_what_one_asks_after_a_run(run: Path, look: Look) -> None:
    _, out, _ = look("show", run)
    # of a reward of 3.5 in all the second turn earned 4
    assert re.search(r"^ +1 +1 +4 +1.25 +1.143", out, re.MULTILINE)
    assert lines_with(out, "train-000003/0/0", "1", "8", "4")
    assert "from evaluate-step000003 to evaluate-step000009: 1 tasks got better, 1 worse" in out
    assert "worse: lost\n" in out


def test_the_overview_follows_a_run_through_a_resume(run: Path, look: Look) -> None:
    resumed = TrajectoryStore(run.parent / "version_1" / "trajectories")
    resumed.begin(Lineage(run / "trajectories", iteration=3, step=4))
    resumed.write(StoredPhase("train", 4, [attempt("t", 0, 0, turn("x", 1.0, last=True))], 4, [[0.0]], [""]))
    _, out, _ = look("show", run.parent / "version_1")
    assert "2 iterations" in out
    assert "version_1 went on from version_0 at step 4" in out
    (run / "trajectories").rename(run / "elsewhere")
    _, out, _ = look("show", run.parent / "version_1")
    assert "the run that it went on from is not at" in out


# ---- rows


def test_groups_can_be_listed(run: Path, look: Look) -> None:
    _, out, _ = look("show", run, "--groups", "--stage", "train")
    assert re.search(r"train-000003 +0 +mixed +2 +0\.5 +2\.25 +1\.5 +yes +mixed", out)
    assert re.search(r"train-000003 +1 +hard +1 +0 +-1 +1 +no +too hard", out)


def rows(look: Look, run: Path, *words: object) -> list[dict[str, str]]:
    code, out, err = look("show", run, *words, "--format", "csv")
    assert code == 0, err
    return list(csv.DictReader(io.StringIO(out)))


@pytest.mark.parametrize(
    "words", [["--sort", "gap desc nulls last, trajectory, turn"], ["--where", "turn = 0"], ["--stage", "train"]]
)
def test_a_limit_cuts_and_changes_nothing_else(words: list[str], run: Path, look: Look) -> None:
    every = rows(look, run, *words)
    assert len(every) > 3
    assert rows(look, run, *words, "--limit", 3) == every[:3]


def test_turns_can_be_filtered_and_sorted(run: Path, look: Look) -> None:
    found = rows(look, run, "--where", "advantage > 1 or advantage < -1", "--sort", "advantage", "--iteration", 3)
    assert [(row["trajectory"], row["turn"], row["advantage"]) for row in found] == [
        ("train-000003/0/1", "0", "-1.5"), ("train-000003/0/0", "1", "1.25"), ("train-000003/0/0", "0", "1.5"),
    ]  # fmt: skip
    assert [row["task"] for row in rows(look, run, "--task", "won")] == ["won", "won"]
    assert [
        row["task"] for row in rows(look, run, "--stage", "evaluate", "--where", "policy_version = 3", "--limit", 2)
    ]
    assert len(rows(look, run, "--sort", "reward desc")) == 10


def test_a_table_says_that_there_is_more(run: Path, look: Look) -> None:
    _, out, _ = look("show", run, "--stage", "evaluate", "--limit", 2)
    assert out.splitlines()[-1] == "... and more; --limit shows how many you like (these are 2)"
    assert len(out.splitlines()) == 4
    _, out, _ = look("show", run, "--stage", "evaluate")
    assert "and more" not in out


def test_any_query_can_be_asked_in_three_formats(run: Path, look: Look) -> None:
    query = "select stage, count(*) as n from turns group by all order by n"
    assert lines_with(look("show", run, "--sql", query)[1], "evaluate", "6")
    assert look("show", run, "--sql", query, "--format", "csv")[1].splitlines() == ["stage,n", "train,4", "evaluate,6"]
    _, out, _ = look("show", run, "--sql", query, "--format", "json")
    assert json.loads(out) == [{"stage": "train", "n": 4}, {"stage": "evaluate", "n": 6}]


# ---- one trajectory


def test_a_trajectory_is_told_turn_by_turn(run: Path, look: Look) -> None:
    _, out, _ = look("show", run, "--trajectory", "train-000003/0/0")
    assert "task mixed, solved, reward 4.5, 2 turns, ended by done, trained" in out
    first, second = out.split("turn 1, which earned the most")
    assert "question of ok" in first
    assert "rows of select 1" in first
    assert lines_with(first, "reward", "0.5 (outcome 0.5); 4.5 from here on")
    assert lines_with(second, "sql", "select 2")
    assert lines_with(second, "advantage", "1.25")
    assert lines_with(second, "drift", "4 nats in the mean, 8 at most, at token 2 of 2 (id 8)")


def test_a_task_stands_for_its_newest_trajectory(run: Path, look: Look) -> None:
    _, out, _ = look("show", run, "--trajectory", "lost")
    assert out.startswith("evaluate-step000009/0/0, task lost, not solved")
    assert "task lost has 1 more" in out
    _, out, _ = look("show", run, "--trajectory", "lost", "--where", "policy_version < 9")
    assert out.startswith("evaluate-step000003/0/0, task lost, solved")


# ---- two runs


def test_two_runs_are_compared_by_curves_tasks_lengths_and_settings(run: Path, look: Look) -> None:
    other = make_run(run.parent / "version_1", reward=2.0, settings="seed_everything: 7\nmodel: {loss: GSPO}\n")
    store = TrajectoryStore(other / "trajectories")
    store.write(StoredPhase("evaluate", 9, greedy(9, lost=True, won=False, new=True)))
    _, out, _ = look("compare", run, other)
    assert re.search(r"val/accuracy +0\.75 +0\.75 +0 ", out)
    assert "of 2 tasks of both, B is worse at 1 and better at 1" in out
    assert re.search(r"worse +won +1 +0", out)
    assert re.search(r"better +lost +0 +1", out)
    assert re.search(r"worse +mixed +2\.25 +1\.25", out)  # (4.5 + 0) / 2 and (2.5 + 0) / 2
    assert re.search(r"train, newest +turns +1\.333 +1\.333", out)
    assert re.search(r"seed_everything +0 +7", out)
    assert re.search(r"model.loss +GSPO", out)


def test_lengths_are_of_what_is_played_greedily_and_a_token_counts_as_often_as_it_was_said(
    tmp_path: Path, look: Look
) -> None:
    long = replace(
        turn("x", 0.0), response_ids=list(range(8)), rollout_logprobs=[-0.5] * 8, versions=[VersionSpan(3, 8)]
    )
    store = TrajectoryStore(tmp_path / "trajectories")
    played = [attempt("a", 0, 0, turn("y", 0.0), turn("y", 0.0), turn("y", 0.0)), attempt("a", 0, 1, long)]
    store.write(StoredPhase("train", 3, played, 0))
    drawn = attempt("a", 0, 1, long, long)
    store.write(StoredPhase("evaluate", 3, [*greedy(3, a=True), drawn]))
    _, out, _ = look("compare", tmp_path, tmp_path)
    assert re.search(r"train, newest +response tokens a turn +3\.5 +3\.5", out)  # 3 * 2 + 8 of four turns
    assert re.search(r"evaluate, newest +turns +1 +1", out)
    assert re.search(r"evaluate, newest +response tokens a trajectory +2 +2", out)


# ---- whatever a field holds


def test_what_is_long_leaves_room_for_every_other_column(run: Path, look: Look) -> None:
    other = make_run(run.parent / "version_1", name="a" * 300, settings=f"data: {{files: {'b' * 300}}}\n")
    _, out, _ = look("show", other, "--where", "turn = 0 and stage = 'train'")
    head = out.splitlines()[0].split()
    assert head == ["trajectory", "turn", "task", "reward", "advantage", "gap", "status", "response"]
    assert lines_with(out, "train-000003/0/1", "mixed", "-1.5", "guess aaa", "…")
    _, out, _ = look("compare", run, other)
    assert lines_with(out, "data.files", "bbb", "…")


@pytest.mark.parametrize(
    ("widths", "room", "cut"),
    [
        ([5, 9, 30], 20, [5, 9, 6]),  # what the others leave
        ([5, 9, 3], 20, [5, 9, 3]),
        ([5, 30, 20], 29, [5, 12, 12]),  # the widest, where that is nothing
        ([9, 9, 9], 21, None),  # 7 each say nothing
    ],
)
def test_the_last_column_is_cut_first_and_then_the_widest(widths: list[int], room: int, cut: list[int] | None) -> None:
    assert _cut(widths, room) == cut


def test_of_more_columns_than_a_line_holds_each_value_has_its_own(run: Path, look: Look) -> None:
    _, out, _ = look("show", run, "--sql", "select * from turns where stage = 'train' order by group_id, sample, turn")
    lines = [line.strip().split(maxsplit=1) for line in out.splitlines()]
    assert lines[0] == ["row", "0"]
    assert ["num_response_tokens", "2"] in lines
    assert [values for name, *values in lines if name == "response"] == [["look"], ["answer"], ["guess ok"], ["wrong"]]


def test_columns_of_one_name_are_told_apart_in_json(run: Path, look: Look) -> None:
    _, out, _ = look("show", run, "--sql", "select 1 as a, 2 as b, 3 as a", "--format", "json")
    assert json.loads(out) == [{"a": 1, "b": 2, "a_1": 3}]


def test_no_field_can_steer_the_terminal(tmp_path: Path, look: Look) -> None:
    run = make_run(tmp_path / "bad", HOSTILE, settings=f"seed_everything: {json.dumps(HOSTILE)}\n")
    for words in (
        (), ("--groups",), ("--trajectory", "train-000003/0/1"), ("--stage", "train"),
        ("--sql", "select response, prompt from turns"), ("--sql", f"select 1 as \"{HOSTILE[:20]}\""),
        ("--sql", "select response from turns", "--format", "json"), ("--sql", "select response::int from turns"),
    ):  # fmt: skip
        _, out, err = look("show", run, *words)
        assert not set("\x1b\x07\x9b\u202e\u200b\r\x00") & set(out + err), words
    _, out, _ = look("show", run, "--trajectory", "train-000003/0/1")
    assert r"\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] \x9b2J \u202eright\u200b\r:smile: \x00" in " ".join(
        out.split()
    )


def test_csv_is_safe_on_a_terminal_and_exact_in_a_pipe(tmp_path: Path, look: Look) -> None:
    run = make_run(tmp_path / "bad", HOSTILE)
    words = ["show", str(run), "--sql", "select response from turns where response like 'guess%'", "--format", "csv"]
    (row,) = csv.DictReader(io.StringIO(look(*words)[1], newline=""))
    assert row["response"] == f"guess {HOSTILE}"
    ours, theirs = pty.openpty()
    script = str(Path(sys.executable).with_name("lit-stepwise"))
    subprocess.run([script, *words], stdout=theirs, check=True)
    shown = os.read(ours, 10_000)
    assert b"\\x1b[31mred" in shown
    assert b"\x1b" not in shown


# ---- what cannot be


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["show"], "the following arguments are required: RUN; see lit-stepwise show --help", 2),
        (["show", "RUN", "--group"], "unrecognized arguments: --group", 2),
        (["show", "nowhere"], "nowhere does not exist; give the folder of a run", 1),
        (["show", "RUN", "--sql", "drop view turns"], "the store is read with one SELECT", 1),
        (["show", "RUN", "--sql", "select 1; select 2"], "the store is read with one SELECT", 1),
        (["show", "RUN", "--sql", "copy (select 1) to 'x.csv'"], "the store is read with one SELECT", 1),
        (["show", "RUN", "--where", "true) to 'x'"], "Parser Error", 1),
        (["show", "RUN", "--where", "advantag > 1"], '"advantag" not found in FROM clause!; Candidate bindings', 1),
        (["show", "RUN", "--sql", "select 1", "--task", "x"], "--sql asks for all that it wants itself", 1),
        (["show", "RUN", "--sql", ""], "--sql is empty; give what it names, or leave it out", 1),
        (["show", "RUN", "--where", " "], "--where is empty", 1),
        (["show", "RUN", "--trajectory", "train-000003/0/0", "--stage", "evaluate"], "leave out the filters", 1),
        (["show", "RUN", "--format", "csv"], "--format csv is for rows", 1),
        (["show", "RUN", "--groups", "--limit", "0"], "argument --limit: 0 shows nothing; use 1 or more", 2),
        (["show", "RUN", "--trajectory", "train-000003/9/9"], "there is no trajectory 'train-000003/9/9'", 1),
        (["show", "RUN", "--trajectory", "won", "--where", "x > 1"], '"x" not found', 1),
        (["compare", "RUN", "RUN", "--limit", "-1"], "argument --limit: -1 shows nothing", 2),
        (["compare", "RUN", "nowhere"], "nowhere does not exist", 1),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    words: list[str], message: str, code: int, run: Path, look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    given = [str(run) if word == "RUN" else word for word in words]
    found, out, err = look(*given)
    assert (found, out) == (code, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(run.parent.glob("x*"))


def test_a_file_that_is_not_whole_is_noted(run: Path, look: Look) -> None:
    path = run / "trajectories" / "evaluate-step000009.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    code, out, err = look("show", run, "--groups")
    assert (code, err) == (0, "note: evaluate-step000009.parquet is not whole and is passed over\n")
    assert "step000003" in out
    assert "evaluate-step000009.parquet is not whole and is passed over" in look("show", run)[1]


def test_a_file_that_is_damaged_within_is_said_in_a_line(run: Path, look: Look) -> None:
    path = run / "trajectories" / "train-000003.parquet"
    path.write_bytes(b"PAR1" + bytes(200) + b"PAR1")
    code, _, err = look("show", run)
    assert code == 1
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1


def test_whoever_reads_may_stop(run: Path) -> None:
    script = str(Path(sys.executable).with_name("lit-stepwise"))
    query = "select repeat('x', 1000) from range(20000)"
    command = f"'{script}' show '{run}' --sql \"{query}\" --format csv | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_showing_loads_nothing_heavy(run: Path) -> None:
    heavy = ("torch", "lightning", "transformers", "pyarrow", "pandas", "jsonargparse", "vllm")
    code = (
        "import sys; from lit_stepwise import cli; "
        f"code = cli.main(['show', {str(run)!r}]); print('loaded', *[n for n in {heavy!r} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_help_names_every_way_to_look(look: Look) -> None:
    code, out, _ = look("show", "--help")
    assert code == 0
    for option in ("groups", "trajectory", "sql", "iteration", "stage", "task", "where", "sort", "limit", "format"):
        assert f"--{option} " in out


def test_numbers_of_any_kind_fit_a_cell(run: Path, look: Look) -> None:
    query: Any = "select 'nan'::double as a, 1e300 as b, null as c, [1, 2] as d, true as e, date '2020-01-02' as f"
    assert re.search(r"nan +1e\+300 +\[1, 2\] +yes +2020-01-02", look("show", run, "--sql", query)[1])
