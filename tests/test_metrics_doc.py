"""docs/metrics.md names what is logged, and nothing else."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [*(ROOT / "lit_stepwise").rglob("*.py"), *(ROOT / "callbacks").glob("*.py")]


def documented() -> list[str]:
    """Every name of the first column of every table, as it is written, placeholders in angle brackets."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def matches(name: str, written: str) -> bool:
    return re.fullmatch(re.sub(r"<\w+>", r"\\w+", written), name) is not None


def in_source(names: Iterable[str]) -> set[str]:
    """Those that are written in the code, whole or without their prefix."""
    text = "\n".join(path.read_text() for path in SOURCES)
    words = set(re.findall(r'f?"([\w/{}.]+)"', text)) | set(re.findall(r"^    (\w+): ", text, re.MULTILINE))
    return {
        name
        for name in names
        if {name, name.partition("/")[2], name.partition("/")[2].removesuffix("_fraction")} & words
    }


@pytest.mark.slow
def test_every_name_that_is_logged_is_documented_and_the_other_way_round(
    countdown: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    """Two fits with as many options as go together, and a test."""
    (tmp_path / "spy.py").write_text(
        "import lightning.pytorch as pl\n\n\n"
        "class Spy(pl.Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        with open('shown.txt', 'a') as file:\n"
        "            file.writelines(name + '\\n' for name in trainer.progress_bar_metrics)\n"
    )
    common = ("--trainer.max_epochs", "2", "--rollout.evaluation.samples_per_task", "2")
    ahead = ("--rollout.staleness", "1", "--rollout.deterministic", "false", "--trainer.callbacks+=spy.Spy")
    masks = ("--model.correction.geometric_band", "[0.5, 2]", "--model.correction.outlier_band", "[0.1, 9]")
    asked = ("--model.kl.coefficient", "0.1", "--model.old_logprobs", "trainer", "--model.correction.token_cap", "2.0")
    for words in (
        ("fit", *common, *ahead, "--model.loss", "SAPO"),
        ("fit", *common, *asked, *masks),
        ("test", *common[2:]),
    ):
        code, stderr = main(words[0], countdown, *words[1:])
        assert code == 0, stderr
    logged = set((tmp_path / "shown.txt").read_text().split())
    for path in tmp_path.glob("runs/version_*/metrics.csv"):
        with path.open() as file:
            logged |= set(csv.DictReader(file).fieldnames or ()) - {"step", "epoch"}
    assert len(logged) > 60
    names = documented()
    assert not {name for name in logged if not any(matches(name, written) for written in names)}
    unseen = {written for written in names if "<" not in written and written not in logged}
    assert not unseen - in_source(unseen)
    assert len(unseen) < 20, unseen
