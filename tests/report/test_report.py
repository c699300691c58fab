"""One file: what is chosen for it, how large it may be, and that nothing in it can be taken for code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from played_by_hand import HOSTILE
from tokenizers import Tokenizer

from lit_stepwise import cli
from lit_stepwise.report import browse, command
from lit_stepwise.report.browse import Album
from lit_stepwise.report.choose import choose
from lit_stepwise.report.page import as_json
from lit_stepwise.report.pieces import Pieces, load_tokenizer
from lit_stepwise.report.play import ATTEMPTS, tasks_changed
from lit_stepwise.store.read import open_run
from lit_stepwise.store.write import StoredPhase, TrajectoryStore


def data_in(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def keys(folder: Path, most: int) -> list[tuple[str, int, int]]:
    connection = open_run(folder)
    connection.execute(ATTEMPTS)
    return list(choose(connection, tasks_changed(connection), most))


# ---- what a browser is told


def test_the_file_asks_for_nothing_and_runs_its_own_script_alone(html: Path) -> None:
    text = html.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "unsafe" not in policy[1]


@pytest.mark.parametrize(
    "text", ["</script>", "<!--", "<script", "]]>", "\u2028", "\u2029", "\ud800", "\x00", '"', "\\", "&lt;"]
)
def test_json_cannot_end_its_element_whatever_is_in_it(text: str) -> None:
    written = as_json([text])
    assert not set(written) & set("<>&\u2028\u2029\x00")
    assert json.loads(written) == [text]


def test_what_is_not_finite_is_not_said(html: Path) -> None:
    assert browse._round(float("nan")) is None
    assert browse._round(float("inf")) is None
    assert browse._round(2.0) == 2
    assert browse._round(0.123456) == 0.1235


def test_hostile_text_comes_back_as_it_was(html: Path) -> None:
    data = data_in(html)
    (said,) = {
        turn["response"] for each in data["trajectories"] for turn in each["turns"] if "pwned" in turn["response"]
    }
    assert said == HOSTILE.replace("\ud800", "?")  # which the store writes for what cannot be encoded


# ---- tokens


def test_the_pieces_of_a_response_make_its_text(tiny_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    pieces = Pieces()
    found = [pieces.texts[i] for i in pieces.of(tokenizer, tokenizer.encode("né</").ids)]
    assert found == ["n", "", "é", "</"]  # two bytes make one letter, and the second has it
    assert pieces.texts == ["n", "", "é", "</"]
    assert pieces.of(tokenizer, tokenizer.encode("n").ids) == [0]


def test_without_the_models_tokenizer_the_report_says_so(played: Path, tmp_path: Path) -> None:
    assert load_tokenizer(None)[1] == "the run has no config.yaml that names its model"
    assert load_tokenizer("nobody/has-this")[1].startswith("nobody/has-this has no tokenizer.json here")
    (tmp_path / "tokenizer.json").write_text("{")
    assert "cannot be read" in load_tokenizer(str(tmp_path))[1]


def test_tokens_carry_what_is_known_of_them(html: Path) -> None:
    data = data_in(html)
    (turn, other) = next(
        each["turns"] for each in data["trajectories"] if each["phase"] == "train-000001" and each["reward"] == 2
    )
    assert [data["pieces"][i] for i in turn["pieces"]] == list("look")
    assert turn["logprobs"] == [-0.125, -0.25, -0.375, -0.5]
    assert turn["drifts"] == [0.5, 0, 0, 0]
    assert (turn["advantage"], turn.get("advantages")) == (1, None)
    assert other["advantages"] == [1.25, *[0.75] * 7]  # its first token earned 0.5 more
    assert turn["rewards"] == {"outcome": 0.375, "format": 0.125}


# ---- how much


def test_the_last_evaluation_comes_before_what_training_has_too_much_of(tmp_path: Path, attempts: Any) -> None:
    store = TrajectoryStore(tmp_path / "trajectories")
    for i in range(5):
        store.write(StoredPhase("train", i, attempts([[False, True, False, True, False]] * 2, greedy=False), i))
    store.write(StoredPhase("evaluate", 7, attempts([[True], [False], [True]])))
    found = keys(tmp_path, 12)
    assert [key for key in found if key[0].startswith("evaluate")] == [("evaluate-step000007", i, 0) for i in range(3)]
    phases = [phase for phase, _, _ in found if phase.startswith("train")]
    assert len(found) == 12
    # first and last are there, each with its best, its worst and one at random
    assert {"train-000000", "train-000004"} <= {phase for phase in phases if phases.count(phase) >= 2}
    assert len(keys(tmp_path, 1000)) == len(set(keys(tmp_path, 1000))) == 53


def test_the_best_and_the_worst_of_an_iteration_are_kept(tmp_path: Path, attempts: Any) -> None:
    store = TrajectoryStore(tmp_path / "trajectories")
    played = attempts([[False] * 20, [True] + [False] * 19], greedy=False)
    store.write(StoredPhase("train", 0, played, 0))
    assert ("train-000000", 1, 0) in keys(tmp_path, 3)  # the only one that earned something


def test_a_long_text_is_cut_and_the_file_stays_small(tmp_path: Path, attempts: Any, monkeypatch: Any) -> None:
    store = TrajectoryStore(tmp_path / "trajectories")
    store.write(StoredPhase("evaluate", 7, attempts([[True]], text="x" * 1_000_000)))
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "a.html")]) == 0
    (turn,) = data_in(tmp_path / "a.html")["trajectories"][0]["turns"]
    assert turn["response"] == "x" * 20_000 + "\n[the report leaves out 980,000 more characters]"
    assert (tmp_path / "a.html").stat().st_size < 200_000


def test_trajectories_are_left_out_once_the_file_is_full(
    tmp_path: Path, attempts: Any, monkeypatch: Any, capsys: Any
) -> None:
    store = TrajectoryStore(tmp_path / "trajectories")
    store.write(StoredPhase("evaluate", 7, attempts([[True]] * 40, text="y" * 10_000)))
    monkeypatch.setattr(command, "MAX_MB", 0.1)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "a.html")]) == 0
    shown = len(data_in(tmp_path / "a.html")["trajectories"])
    assert shown == 4  # a response is 10 kB, and its statement is as long
    assert f"{shown} of 40 trajectories" in capsys.readouterr().out


def test_charts_alone_can_be_had(played: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(played), "--max_trajectories", "0", "--output", str(tmp_path / "a.html")]) == 0
    data = data_in(tmp_path / "a.html")
    assert data["trajectories"] == []
    assert data["charts"]


def test_a_trajectory_that_failed_before_its_first_turn_is_shown_with_its_reason(played: Path, tmp_path: Path) -> None:
    from lit_stepwise.types import StopReason, Trajectory

    store = TrajectoryStore(tmp_path / "trajectories")
    store.write(StoredPhase("play", 0, [Trajectory("t", 0, 0, [], StopReason.FAILED, failure="disk full")]))
    connection = open_run(tmp_path)
    connection.execute(ATTEMPTS)
    album = Album()
    album.add(connection, 0, [("play", 0, 0)], None, 1000)
    assert [(each["failure"], each["turns"]) for each in album.trajectories] == [("disk full", [])]


# ---- the command


def test_two_runs_make_one_report(played: Path, tmp_path: Path) -> None:
    assert cli.main(["report", str(played), str(played), "--output", str(tmp_path / "two.html")]) == 0
    data = data_in(tmp_path / "two.html")
    (accuracy,) = [chart for chart in data["charts"] if chart["title"] == "Accuracy"]
    assert [series["name"] for series in accuracy["series"]] == [
        "validation A",
        "rollout A",
        "validation B",
        "rollout B",
    ]
    assert {each["run"] for each in data["trajectories"]} == {0, 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "c"], "3 runs are more than a chart can tell apart; give one or two"),
        (["nowhere"], "nowhere does not exist; give the folder of a run"),
        (["a", "--max_trajectories", "-1"], "--max_trajectories -1 is negative; use 0 for charts alone"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(words: list[str], message: str, capsys: Any) -> None:
    assert cli.main(["report", *words]) == 1
    assert message in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said(played: Path, capsys: Any) -> None:
    assert cli.main(["report", str(played), "--output", "/no/such/folder/a.html"]) == 1
    assert "--output /no/such/folder/a.html cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_report_is_made_without_torch(played: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; from lit_stepwise.cli import main; main(['report', {str(played)!r}, '--output', "
        f"{str(tmp_path / 'a.html')!r}]); print({{'torch', 'lightning'}} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
