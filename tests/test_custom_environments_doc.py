"""A newcomer follows docs/custom_environments.md to the letter, in an empty folder, with nothing but the wheel."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "custom_environments.md").read_text()
EXAMPLE = ROOT / "examples" / "card_index"
FILES = dict(re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)).splitlines()


def test_the_files_of_the_page_are_those_of_the_example() -> None:
    assert {name: (EXAMPLE / name).read_text() for name in ("environment.py", "prepare.py", "config.yaml")} == FILES


def wheel(folder: Path) -> Path:
    """Built of a copy, so that nothing is left in the project."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lit_stepwise", source / "lit_stepwise", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source))
    (built,) = folder.glob("*.whl")
    return built


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input", *words]
    subprocess.run(command, check=True, env=without_checkout())


def without_checkout() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """Of a fresh environment that has the wheel, and finds what the wheel depends on where it is installed here."""
    fresh = tmp_path / "fresh"
    venv.create(fresh, symlinks=True)
    python = fresh / "bin" / "python"
    (site_packages,) = fresh.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    build = tmp_path / "build"
    build.mkdir()
    pip("--python", str(python), "install", "--no-deps", "--no-index", "--force-reinstall", str(wheel(build)))
    return python.parent


@pytest.mark.slow
def test_whoever_follows_the_page_trains_a_model_that_looks_first(tmp_path: Path, bin_folder: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name, text in FILES.items():
        (empty / name).write_text(text)
    environment = without_checkout() | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    where = "import lit_stepwise; print(lit_stepwise.__file__)"
    found = subprocess.run(["python", "-c", where], env=environment, cwd=empty, capture_output=True, text=True)
    assert Path(found.stdout).is_relative_to(tmp_path), "the checkout was used, not the wheel"
    said = ""
    for command in COMMANDS:
        done = subprocess.run(["bash", "-c", command], env=environment, cwd=empty, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        said += done.stdout
    with (empty / "runs" / "version_0" / "metrics.csv").open() as file:
        accuracy = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    assert accuracy[0] < 0.6
    assert accuracy[-1] > 0.9
    assert "<look>" in said
