"""The guides as a site: every link leads somewhere, and nothing is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
OUTSIDE_OF_THE_SITE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "callbacks").glob("*.md"))]
OUTSIDE_OF_THE_SITE += sorted((ROOT / "examples").glob("*/*.md"))


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(folder),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "true"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser loads by itself when it shows a page, and the ids of code blocks."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        loads = given.get("href") if tag == "link" and given.get("rel") != "canonical" else given.get("src")
        self.addresses += [loads] if loads else []


def test_every_page_is_in_the_navigation_and_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert pages < {path.name for path in site.glob("*.html")}
    for page in site.glob("*.html"):
        found = Fetched(page).addresses
        assert len(found) > 3
        assert [each for each in found if re.match(r"(\w+:)?//", each)] == [], page.name


def test_code_blocks_after_a_mark_are_shown_as_code(site: Path) -> None:
    text = (site / "index.html").read_text()
    assert re.search(r"<code>(<[^>]*>)*make fit", text)
    assert "&lt;!--" not in text


@pytest.mark.parametrize(("link", "complaint"), [("credit.md#nowhere", "nowhere"), ("nowhere.md", "nowhere.md")])
def test_a_link_that_leads_nowhere_ends_the_build(link: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"[look]({link})\n")
    (tmp_path / "docs" / "credit.md").write_text("# Credit\n")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**settings, "nav": ["index.md", "credit.md"]}))
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode == 1
    assert complaint in done.stderr


@pytest.mark.parametrize("page", OUTSIDE_OF_THE_SITE, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_outside_of_the_site_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link.split("#")[0]).exists(), link


PAGES = [*OUTSIDE_OF_THE_SITE, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = r"`((?:lit_stepwise|docs|configs|tests|benchmarks|callbacks|examples|models)/[\w./-]+)`"
    missing = [name for name in re.findall(named, page.read_text()) if not (ROOT / name).exists()]
    assert set(missing) <= {"callbacks/longest.py"}  # which that page tells to write
