"""Commands, configurations and Python of README.md and docs/ are parsed, and each command is run, or says why not.

``<!-- long -->``, ``<!-- gpu -->`` and ``<!-- download -->`` on a line before a block mark commands that no test runs
as they stand. All others are in ``RUN`` or ``CHEAP``. What no test knows how to look at fails.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser, capture_parser

import callbacks
from lit_stepwise import cli, data_commands
from lit_stepwise.report.command import report_parser
from lit_stepwise.viewer.command import PARSERS as VIEWER_PARSERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [*sorted((ROOT / "callbacks").glob("*.md")), *sorted((ROOT / "examples").glob("*/*.md"))]
RUNNERS = {
    *("lit-stepwise", "make", "python", "python3", "pip", "uv", "hf", "torchrun", "sbatch", "tensorboard", ".ci/run"),
    ".venv/bin/pre-commit",
}
PARSERS = {**VIEWER_PARSERS, "report": report_parser}
MARKS = {"long", "gpu", "download"}
RUN = {
    ".ci/run": "CI itself",
    "make lint": ".ci/run",
    "make test": ".ci/run",
    "make docs": ".ci/run, and tests/test_site.py",
    "python prepare.py": "tests/test_custom_environments_doc.py",
    "lit-stepwise fit --config config.yaml": "tests/test_custom_environments_doc.py",
    "lit-stepwise fit --help": "tests/test_cli.py",
    "lit-stepwise fit --config configs/qwen3.yaml --config configs/overlays/dry_run.yaml": "tests/e2e/test_recipes.py",
    "lit-stepwise fit --config configs/tiny.yaml --print_config": "tests/test_configs.py",
}
"""Where a command is run as it stands."""
FOLLOWED = {"docs/custom_environments.md": "tests/test_custom_environments_doc.py"}
"""Pages all of whose commands are run, and where."""


@dataclass(frozen=True)
class Block:
    """A fenced or indented piece of code."""

    page: Path
    line: int
    kind: str
    """What stands behind the fence; empty for an indented block."""
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """In order; an indented block begins after an empty line or a heading and is a block of its own."""
    lines = page.read_text().splitlines()
    number, mark = 0, ""
    while number < len(lines):
        line = lines[number]
        if found := re.fullmatch(r"<!-- (\w+) -->", line):
            mark = found[1]
        elif line.startswith("```"):
            end = next(i for i in range(number + 1, len(lines)) if lines[i] == "```")
            yield Block(page, number + 1, line[3:].split(" ")[0], mark, "\n".join(lines[number + 1 : end]) + "\n")
            number, mark = end, ""
        elif line.startswith("    ") and (lines[number - 1] == "" or re.match("#|<!--|```", lines[number - 1])):
            end = next((i for i in range(number, len(lines)) if not re.match("    |$", lines[i])), len(lines))
            text = "".join(f"{each[4:]}\n" for each in lines[number:end])
            yield Block(page, number + 1, "", mark, text)
            number, mark = end - 1, ""
        elif line:
            mark = ""
        number += 1


def titled(page: str) -> dict[str, str]:
    """The files that a page gives, by name."""
    return dict(re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', (ROOT / "docs" / page).read_text(), re.M | re.S))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


@dataclass(frozen=True)
class Command:
    """One command of a block, or of the running text."""

    place: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.place} {self.text}"


def commands_in(block: Block) -> Iterator[Command]:
    """Line by line, or what pipes and lists are made of; without comments, and without the ``[]`` of a choice."""
    if block.kind not in ("", "bash", "yaml"):
        return
    comment = r"^#\s+(?=lit-stepwise )" if block.kind == "yaml" else r"$^"
    for line in block.text.replace("\\\n", " ").replace("|\n", "| ").splitlines():
        line = re.sub(r"(^|\s+)#\s.*", "", re.sub(comment, "", line)).strip()
        parts = [line] if " -c " in line else re.split(r"\s*(?:;|&&|\|)\s+(?=\w+ )", line)
        for part in filter(None, parts):
            ours = part.startswith("lit-stepwise ")
            text = re.sub(r"\s+", " ", re.sub(r"[\[\]]", "", part)) if ours else part
            if block.kind == "bash" or text.split()[0] in RUNNERS:
                yield Command(str(block), block.mark, text)


COMMANDS = [command for block in BLOCKS for command in commands_in(block)]
INLINE = [
    Command(f"{page.relative_to(ROOT)}", "", " ".join(text.split()))
    for page in PAGES
    for text in re.findall(r"`(lit-stepwise \w[^`]*)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))
]


OPTIONS = [
    Command(str(block), block.mark, "lit-stepwise fit --config configs/tiny.yaml " + " ".join(lines))
    for block in BLOCKS
    if (lines := [line for line in block.text.splitlines() if line.startswith("--")])
]
"""Blocks of nothing but settings."""


@cache
def parser_of(command: str, subcommand: str = "") -> ArgumentParser:
    """The real one, caught where the command would have begun."""
    words = [command, *filter(None, [subcommand, subcommand and "x"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit-stepwise", *words])  # LightningCLI warns of any other
        return capture_parser(cli.main)


def parse(text: str) -> Any:
    """What the command line comes to. Leaves through ``SystemExit`` where it is wrong."""
    words = [word for word in shlex.split(text)[1:] if word != "--print_config"]
    if words == ["--help"]:
        return None
    assert words[0] in cli.COMMANDS, f"lit-stepwise has no command {words[0]}"
    assert words[0] != "data" or words[1] in data_commands.COMMANDS
    if "--help" in words or not any(word.startswith("--") for word in words):  # a mention
        return None
    if words[0] in PARSERS:
        return PARSERS[words[0]]().parse_args(words[1:])
    if words[0] == "data":
        return parser_of(*words[:2]).parse_args(words[2:])
    parser = parser_of(words[0])
    with_command = any(action.dest == "subcommand" for action in parser._actions)  # as LightningCLI's has
    return parser.parse_args(words if with_command else words[1:])


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of jsonargparse


@pytest.fixture(scope="module")
def own_parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the path, with the files of docs/extending.md; the callback of docs/callbacks.md where it says."""
    folder = tmp_path_factory.mktemp("parts")
    for name, text in titled("extending.md").items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        longest = ModuleType("callbacks.longest")
        patch.setitem(sys.modules, longest.__name__, longest)
        patch.setattr(callbacks, "longest", longest, raising=False)
        example = next(block for block in BLOCKS if block.page.name == "callbacks.md" and block.kind == "python")
        exec(example.text, vars(longest))
        yield folder


def test_commands_and_marks_are_found_at_all() -> None:
    found = [command.text for command in COMMANDS]
    assert len(found) > 40
    assert "make test" in found
    assert "lit-stepwise fit --config configs/tiny.yaml --model.lora.rank 16" in found
    assert "unzip -n -q -d data/skyrl data/skyrl/data.zip 'data/spider/*'" in found
    assert {block.mark for block in BLOCKS} - {""} == MARKS


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_run_by_a_test_or_says_why_not(command: Command) -> None:
    page = command.place.split(":")[0]
    assert command.mark in MARKS or command.text in RUN or command.text in CHEAP or page in FOLLOWED, (
        f"{command}: put it into RUN or CHEAP of tests/test_docs.py, or <!-- long -->, <!-- gpu --> or "
        "<!-- download --> before its block"
    )


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE, *OPTIONS], ids=str)
@pytest.mark.usefixtures("own_parts")
def test_a_command_is_one_that_there_is(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.text.split()
    if "config.yaml" in words:
        monkeypatch.chdir(ROOT / "examples" / "card_index")
        monkeypatch.syspath_prepend(str(ROOT / "examples" / "card_index"))
    if words[0] == "lit-stepwise":
        try:
            parse(command.text)
        except SystemExit as ended:
            raise AssertionError(f"{command}: {capsys.readouterr().err}") from ended
    elif words[0] == "torchrun":
        parse(command.text[command.text.index("lit-stepwise") :])
    elif words[0] == "sbatch":
        (script,) = [word for word in words if word.endswith(".sbatch")]
        subprocess.run(["bash", "-n", script], check=True)
    elif words[0] == "make":
        subprocess.run(["make", "-n", *shlex.split(command.text)[1:]], check=True, capture_output=True)
    elif words[0] == "python":
        scripts = [word for word in words if word.endswith(".py")]
        assert all((Path.cwd() / name).exists() or (ROOT / "examples/card_index" / name).exists() for name in scripts)
        if "-c" in words:
            ast.parse(shlex.split(command.text)[2])
    else:
        assert command.mark == "download" or words[0] in RUN, f"{command}: nothing here knows how to look at it"


def test_a_command_that_is_wrong_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("fit --config configs/tiny.yaml --model.loss.dul 4", "export a b --adaptor x", "data check --sauce y"):
        with pytest.raises(SystemExit):
            parse(f"lit-stepwise {text}")
    assert "did you mean dual?" in capsys.readouterr().err


# ---- configurations


def whole(piece: dict[str, Any]) -> dict[str, Any]:
    """A piece of a configuration, put where it belongs."""
    return piece if set(piece) <= {"trainer", "model", "data", "rollout", "seed_everything"} else {"rollout": piece}


CONFIGURATIONS = [block for block in BLOCKS if block.kind == "yaml" and "config.yaml" not in block.page.read_text()]


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=str)
@pytest.mark.usefixtures("own_parts")
def test_a_configuration_is_understood(block: Block, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "piece.yaml"
    file.write_text(yaml.safe_dump(whole(yaml.safe_load(block.text))))
    try:
        parse(f"lit-stepwise fit --config configs/tiny.yaml --config {file}")
    except SystemExit as ended:
        raise AssertionError(f"{block}: {capsys.readouterr().err}") from ended


# ---- what is run here

CHEAP = {
    "lit-stepwise --help": "fit      ",
}
"""Commands that are run as they stand, with what they print."""


@pytest.mark.parametrize(("command", "printed"), CHEAP.items())
def test_a_cheap_command_prints_what_it_should(command: str, printed: str) -> None:
    done = subprocess.run(console(command), capture_output=True, text=True, check=True)
    assert printed in done.stdout


def console(command: str) -> list[str]:
    name, *words = shlex.split(command)
    return [str(Path(sys.executable).with_name(name)), *words]


@pytest.mark.slow
def test_an_engine_a_reward_an_advantage_and_a_loss_of_your_own_train_together(own_parts: Path) -> None:
    (setting,) = [block.text for block in BLOCKS if block.page.name == "extending.md" and block.kind == "yaml"]
    (own_parts / "rewards.yaml").write_text(setting)
    words = [
        *("lit-stepwise fit --config", str(ROOT / "configs/tiny.yaml"), "--config rewards.yaml"),
        *("--model.model_path", str(ROOT / "models/tiny-sql")),
        *(line for command in OPTIONS if "extending.md" in command.place for line in command.text.split()[4:]),
        *("--rollout.environment.init_args.instructions=", "--rollout.environment.init_args.schema compact"),
        *("--rollout.samples_per_task 2 --data.tasks_per_iteration 2 --data.max_val_tasks 2", "--trainer.max_epochs 2"),
        *("--rollout.limits.max_new_tokens 32", "--trainer.enable_progress_bar false"),
    ]
    done = subprocess.run(console(" ".join(words)), cwd=own_parts, capture_output=True, text=True, env=one_thread())
    assert done.returncode == 0, done.stderr
    (metrics,) = own_parts.glob("runs/tiny/version_0/metrics.csv")
    head = metrics.read_text().splitlines()[0].split(",")
    assert {"rollout/reward_slow", "train/capped_fraction"} <= set(head)
    assert "engine: plain" in done.stderr


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# ---- figures


@pytest.mark.parametrize(
    ("page", "results"), [("stepwise.md", "stepwise.txt"), ("custom_environments.md", "card_index.txt")]
)
def test_the_figures_of_a_table_are_those_that_a_benchmark_printed(page: str, results: str) -> None:
    printed = set(re.findall(r"[\d,.]+\d", (ROOT / "benchmarks" / "results" / results).read_text()))
    rows = [
        line for line in (ROOT / "docs" / page).read_text().splitlines() if re.search(r"\| [\d,.]+\d( %|;| \|)", line)
    ]
    assert len(rows) >= 5
    for row in rows:
        assert set(re.findall(r"[\d,.]+\d", row.split("|", 2)[2])) <= printed, row


# ---- Python

PYTHON = [block for block in BLOCKS if block.kind == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles_and_imports_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text)
    ours = {path.stem for path in (ROOT / "examples" / "card_index").glob("*.py")}
    for node in tree.body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module not in ours):
            exec(compile(ast.Module([node], []), str(block), "exec"), {})
