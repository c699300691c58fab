"""Who may import whom. A room that is not in the table, or an import that is not in its row, fails."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lit_stepwise"
SEAMS = {"types", "interfaces", "errors"}
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "types": {"errors"},
    "interfaces": {"types"},
    "algo": SEAMS,
    "engines": SEAMS,
    "sandbox": {"types", "errors"},
    "text2sql": {*SEAMS, "sandbox"},
    "store": SEAMS,
    "checkpoints": {"errors"},
    "viewer": {"errors", "store"},
    "rollout": {*SEAMS, "algo", "store"},
    "training": {*SEAMS, "algo", "checkpoints"},
    "tiny_models": SEAMS,
    "testing": {*SEAMS, "tiny_models"},
    "planning": {*SEAMS, "algo", "engines", "rollout", "training"},
    "trainer": {*SEAMS, "checkpoints", "rollout", "store", "training"},
    "imitation": {*SEAMS, "tiny_models", "rollout"},
    "warmup": {*SEAMS, "imitation", "rollout", "text2sql", "engines"},
    "plan_command": {"errors", "commands", "planning"},
    "loggers": set(),
    "commands": {*SEAMS, "algo", "engines", "text2sql", "rollout", "training", "trainer", "checkpoints", "loggers"},
    "data_commands": {*SEAMS, "text2sql"},
    "export": {*SEAMS, "checkpoints", "training"},
    "serve": {*SEAMS, "engines"},
    "report": {*SEAMS, "store"},
    "cli": {"errors", "commands", "plan_command", "data_commands", "warmup", "serve", "export", "viewer", "report"},
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = (
                [node.module or ""] if node.module != "lit_stepwise" else [f"lit_stepwise.{a.name}" for a in node.names]
            )
            assert node.level == 0, f"{path}: write imports in full"
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("lit_stepwise.")}
    return rooms


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_the_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    assert room in ALLOWED, f"the room {room} is not in the table of tests/test_layers.py"
    assert imported_rooms(path) <= ALLOWED[room] | {room}


@pytest.mark.parametrize("path", sorted((ROOT / "callbacks").glob("*.py")), ids=lambda path: path.name)
def test_the_gallery_uses_public_names_only(path: Path) -> None:
    assert imported_rooms(path) <= {*SEAMS, "algo", "engines", "text2sql", "rollout", "training", "export"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("lit_stepwise", ("torch", "vllm", "wandb", "duckdb", "transformers")),
        ("lit_stepwise.cli", ("torch", "vllm", "wandb", "duckdb", "transformers", "jsonargparse")),
        ("lit_stepwise.text2sql", ("torch", "vllm", "wandb", "duckdb", "transformers", "pandas", "pyarrow", "sqlglot")),
        ("lit_stepwise.engines", ("vllm", "wandb", "duckdb")),
        ("lit_stepwise.viewer.command", ("torch", "duckdb", "pyarrow", "numpy", "jsonargparse", "yaml")),
        ("lit_stepwise.store.read, lit_stepwise.store.write", ("torch", "duckdb", "pyarrow", "numpy")),
        ("lit_stepwise.report.command", ("torch", "duckdb", "pyarrow", "numpy", "jsonargparse", "jinja2")),
        ("lit_stepwise.algo, lit_stepwise.rollout, lit_stepwise.training", ("vllm", "wandb", "duckdb")),
    ],
)
def test_importing_loads_nothing_heavy(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_worker_needs_the_standard_library_alone() -> None:
    modules = "lit_stepwise.sandbox.sqlite_worker, lit_stepwise.sandbox.pool"
    code = f"import sys; sys.path.append({str(ROOT)!r}); import {modules}"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
