"""A run by hand, its report, and a browser that says of all it does not like."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from played_by_hand import attempt, turn, write_run
from tokenizers import Tokenizer

from lit_stepwise import cli
from lit_stepwise.types import Trajectory

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a run."""
    return write_run(tmp_path_factory.mktemp("report") / "tiny" / "version_0", tiny_model)


@pytest.fixture(scope="session")
def html(played: Path) -> Path:
    """Its report."""
    assert cli.main(["report", str(played)]) == 0
    return played / "report.html"


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a screen."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no chromium here; apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        # chromium will not make its sandbox for root
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens a file. Whatever the page logs, throws or asks the network for fails the test."""
    complaints: list[str] = []
    contexts = []

    def open_file(path: Path, width: int = 1300, height: int = 900, fragment: str = "", **settings: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: None if _is_own(request.url, path) else complaints.append(request.url))
        page.goto(path.absolute().as_uri() + fragment)
        page.wait_for_selector("#rows tr, #count")
        return page

    yield open_file
    for context in contexts:
        assert context.pages[0].evaluate("window.pwned") is None
        context.close()
    assert complaints == []


def _is_own(url: str, path: Path) -> bool:
    return url.split("#")[0] == path.absolute().as_uri() or url.startswith(("data:", "blob:"))


@pytest.fixture
def attempts(tiny_model: Path) -> Callable[..., Any]:
    """Trajectories of one turn at step 7, by task and attempt: solved or not. The first attempt at a task is greedy."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))

    def make(solved: list[list[bool]], greedy: bool = True, text: str = "an answer") -> list[Trajectory]:
        return [
            attempt(f"task{group}", group, sample, [turn(text, tokenizer, float(won), 7, success=won)], temperature)
            for group, of_group in enumerate(solved)
            for sample, won in enumerate(of_group)
            for temperature in [0.0 if greedy and sample == 0 else 1.0]
        ]

    return make
