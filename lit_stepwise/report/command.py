"""The command ``lit-stepwise report``: one HTML file about a run, or about two beside each other."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from lit_stepwise.errors import ConfigError
from lit_stepwise.report.browse import Album
from lit_stepwise.report.charts import Chart, overlay
from lit_stepwise.report.choose import choose
from lit_stepwise.report.curves import logged_charts
from lit_stepwise.report.page import render
from lit_stepwise.report.pieces import load_tokenizer
from lit_stepwise.report.play import ATTEMPTS, play_charts, tasks_changed
from lit_stepwise.report.run import config_of, facts, name_of, section, tiles, told
from lit_stepwise.store.find import StoredRun, find_run
from lit_stepwise.store.read import open_run

MAX_MB = 4.5
"""Of the trajectories; charts and script add less than half of one."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see lit-stepwise report --help", file=sys.stderr)
        sys.exit(2)


def report_parser() -> argparse.ArgumentParser:
    """Of the command's words."""
    parser = _Parser(
        prog="lit-stepwise report",
        description="Make one HTML file about a run, finished or not: curves, and trajectories turn by turn. It needs "
        "no network and can be passed on; it holds what the model read and wrote.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as runs/tiny; two are compared")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="file to write; by default report.html in the first RUN"
    )
    parser.add_argument(
        "--max_trajectories", metavar="N", type=int, default=600,
        help="of a run that can be read in the report, as far as they fit into about 5 MB: the last evaluation, and of "
        "every iteration good ones, bad ones and some at random; default 600",
    )  # fmt: skip
    return parser


def run(words: Sequence[str]) -> int:
    """Make a report; the exit code. Raises ``StepwiseError``."""
    settings = report_parser().parse_args(list(words))
    if len(settings.runs) > 2:
        raise ConfigError(f"{len(settings.runs)} runs are more than a chart can tell apart; give one or two")
    if settings.max_trajectories < 0:
        raise ConfigError(f"--max_trajectories {settings.max_trajectories} is negative; use 0 for charts alone")
    found = [find_run(path) for path in settings.runs]
    output = settings.output or found[0].folder / "report.html"
    page, said = report(found, settings.max_trajectories)
    _write(output, page)
    print(f"wrote {output} ({len(page) / 1e6:.1f} MB): {said}")
    return 0


def report(runs: Sequence[StoredRun], max_trajectories: int) -> tuple[bytes, str]:
    """The page about ``runs``, and in words what is in it."""
    album = Album()
    heads, charts = [], []
    for i, run in enumerate(runs):
        head, of_run = _look_at(run, i, album, max_trajectories, int(MAX_MB * 1e6 / len(runs)))
        heads.append(head | {"letter": "AB"[i] if len(runs) > 1 else ""})
        charts.append(of_run)
    shown = ("name", "letter", "tasks", "shown", "total", "no_tokens")
    data = {
        "runs": [{key: head[key] for key in shown} for head in heads],
        "charts": [chart.packed() for chart in overlay(charts)],
        "pieces": album.pieces.texts,
        "prompts": album.prompts.texts,
        "trajectories": sorted(album.trajectories, key=_place),
    }
    said = ", ".join(f"{head['shown']} of {head['total']} trajectories of {head['name']}" for head in heads)
    return render(" and ".join(head["name"] for head in heads), heads, data), said


def _look_at(
    run: StoredRun, index: int, album: Album, max_trajectories: int, max_bytes: int
) -> tuple[dict[str, Any], list[Chart]]:
    """What the head of the page says of a run, and its charts; its trajectories go into ``album``."""
    config = config_of(run)
    tokenizer, why_not = load_tokenizer(section(config, "model").get("model_path"))
    with open_run(run, many_questions=True) as connection:
        connection.execute(ATTEMPTS)
        tasks = tasks_changed(connection)
        before = len(album.trajectories)
        chosen = choose(connection, tasks, max_trajectories)
        bar = tqdm(chosen, "reading", unit=" trajectories", delay=2, leave=False)
        album.add(connection, index, bar, tokenizer, max_bytes)
        (total,) = connection.execute("select count(*) from attempts").fetchone()
        head = {
            "name": name_of(run),
            "facts": facts(run, config),
            "tiles": tiles(connection),
            "config": told(config),
            "tasks": tasks,
            "shown": len(album.trajectories) - before,
            "total": total,
            "no_tokens": why_not,
        }
        return head, [*logged_charts(connection), *play_charts(connection)]


def _write(path: Path, page: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(page)
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written ({error.strerror}); name another file") from error


def _place(packed: dict[str, Any]) -> tuple[Any, ...]:
    """Evaluations first: most of what is asked is asked of them."""
    return packed["run"], packed["stage"] != "evaluate", packed["phase"], packed["group"], packed["sample"]
