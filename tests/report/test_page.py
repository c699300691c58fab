"""The report in a real browser: every test also fails on any message, error, dialog or request of the page."""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from played_by_hand import HOSTILE

Visit = Callable[..., Any]


def titles(page: Any) -> list[str]:
    """Task and attempt of the rows that are listed."""
    return [f"{row.locator('td').nth(1).inner_text()}-{row.locator('td').nth(2).text_content()}" for row in rows(page)]


def rows(page: Any) -> list[Any]:
    return list(page.locator("#rows tr").all())


def choose(page: Any, **filters: str) -> None:
    for name, value in filters.items():
        page.select_option(f"#{name}", label=value)


def open_row(page: Any, index: int) -> Any:
    page.locator("#rows tr").nth(index).locator("button").click()
    page.wait_for_selector("#reader .turn")
    return page.locator("#reader")


def background(page: Any, selector: str) -> list[str]:
    return list(page.eval_on_selector_all(selector, "all => all.map(each => getComputedStyle(each).backgroundColor)"))


# ---- finding


def test_filters_choose_phase_task_and_outcome(visit: Visit, html: Path) -> None:
    page = visit(html)
    assert page.inner_text("#count") == "12 of 12 trajectories"
    choose(page, phase="iteration 1")
    assert titles(page) == ["t0-0", "t0-1", "t1-0", "t1-1"]
    choose(page, outcome="solved")
    assert titles(page) == ["t0-0", "t1-0", "t1-1"]
    choose(page, phase="all of evaluation")
    assert titles(page) == ["v0-0", "v1-0"]
    page.click("text=Clear")
    page.wait_for_selector("#count:has-text('12 of')")  # what polls a script is refused by the page's policy
    choose(page, task="t1")
    assert titles(page) == ["t1-0", "t1-1"] * 2


def test_search_looks_into_prompts_responses_statements_and_observations(visit: Visit, html: Path) -> None:
    page = visit(html)
    for words, expected in (("found IT", ["t0-0"] * 2), ("rows: 1", ["t0-0"] * 2), ("select easier", ["t1-1"] * 2)):
        page.fill("#search", words)
        assert titles(page) == expected, words
    page.fill("#search", "<script>window.pwned")
    assert titles(page) == ["t0-1"] * 2
    page.fill("#search", "not to be found")
    assert page.inner_text("#count") == "0 of 12 trajectories"


def test_columns_sort_both_ways(visit: Visit, html: Path) -> None:
    page = visit(html)
    choose(page, phase="iteration 1")
    page.click("th >> text=Reward")
    assert titles(page) == ["t0-1", "t1-0", "t1-1", "t0-0"]
    page.click("th >> text=Reward")
    assert titles(page) == ["t0-0", "t1-0", "t1-1", "t0-1"]
    assert page.get_attribute("th:has-text('Reward')", "aria-sort") == "descending"


# ---- reading


def test_a_trajectory_is_read_turn_by_turn(visit: Visit, html: Path) -> None:
    page = visit(html)
    choose(page, phase="iteration 1", task="t0", outcome="solved")
    reader = open_row(page, 0)
    text = reader.inner_text()
    for part in (
        "prompt of 9 <b>tokens</b>", "select 1", "rows: 1", "outcome +0.375", "format +0.125", "reward +0.5",
        "return +2", "advantage +1", "drift 0.125, at most 0.5", "engine 1.5 s, environment 0.25 s",
    ):  # fmt: skip
        assert part in text, part
    assert reader.locator(".turn h4").all_inner_texts() == ["Turn 0", "Turn 1"]  # as the store counts
    assert reader.locator(".turn pre.none, .turn .said.model pre").all_inner_texts() == ["look", "found it"]


def test_other_attempts_and_neighbours_are_a_click_away(visit: Visit, html: Path) -> None:
    page = visit(html)
    choose(page, phase="iteration 0")
    open_row(page, 0)
    page.click(".attempts button >> nth=1")
    page.wait_for_selector("#reader :text('attempt 1')")
    assert "train-000000/0/1" in page.inner_text("#reader .chips >> nth=0")
    page.click("#reader >> text=Next")
    page.wait_for_selector("#reader h3:text('t1')")
    page.go_back()
    page.wait_for_selector("#reader h3:text('t0')")


def test_a_link_opens_a_trajectory(visit: Visit, html: Path) -> None:
    page = visit(html, fragment="#trajectory-4")
    assert page.inner_text("#reader h3") == "t0"


def test_tasks_that_changed_open_before_and_after(visit: Visit, html: Path) -> None:
    page = visit(html)
    assert re.findall("worse|better", page.inner_text("#changes table")) == ["worse", "better"]
    page.click("#changes tr:has-text('v0') >> text=last")
    page.wait_for_selector("#reader :text('evaluation, step 2')")
    assert "not solved" in page.inner_text("#reader .chips >> nth=0")


def test_tokens_are_coloured_by_what_is_chosen_and_say_their_numbers(visit: Visit, html: Path) -> None:
    page = visit(html)
    choose(page, phase="iteration 1", task="t0", outcome="solved")
    open_row(page, 0)
    none = "rgba(0, 0, 0, 0)"
    of_second = ".turn:nth-of-type(2) .token"
    assert page.locator("#reader .token").count() == 12
    by_advantage = background(page, of_second)
    assert by_advantage[0] != by_advantage[1] == by_advantage[7] != none  # the first token has an advantage of its own
    page.check("input[value=drift]")
    assert [color == none for color in background(page, ".turn:nth-of-type(1) .token")] == [False, True, True, True]
    page.check("input[value=doubt]")
    assert len(set(background(page, of_second))) == 8
    assert "the engine gave the token 100" in page.inner_text(".scale")
    page.check("input[value=none]")
    assert set(background(page, of_second)) == {none}
    page.hover(".turn:nth-of-type(1) .token >> nth=0")
    said = page.inner_text("#readout")
    for part in (
        "token 1 of 4",
        "log-probability \N{MINUS SIGN}0.125 (88.2\N{NO-BREAK SPACE}%)",
        "trainer \N{MINUS SIGN}0.625, drift 0.5 nats",
        "advantage +1",
    ):
        assert part in said, said


def test_what_an_evaluation_does_not_have_cannot_be_chosen(visit: Visit, html: Path) -> None:
    page = visit(html)
    choose(page, phase="evaluation, step 2")
    open_row(page, 0)
    assert page.is_disabled("input[value=advantage]")
    assert page.is_disabled("input[value=drift]")
    assert page.is_checked("input[value=doubt]")
    choose(page, phase="iteration 1")
    open_row(page, 0)
    assert page.is_checked("input[value=advantage]")  # what was wanted before


def test_without_a_tokenizer_whole_turns_are_coloured(visit: Visit, played: Path, tmp_path: Path) -> None:
    from lit_stepwise import cli

    (tmp_path / "trajectories").symlink_to(played / "trajectories")
    assert cli.main(["report", str(tmp_path)]) == 0
    page = visit(tmp_path / "report.html")
    choose(page, phase="iteration 0")
    open_row(page, 0)
    assert page.locator(".token").count() == 0
    assert "Whole turns are coloured: the run has no config.yaml that names its model" in page.inner_text("fieldset")
    assert len(set(background(page, ".said.model pre"))) == 2


# ---- safety


def test_hostile_text_stays_text(visit: Visit, html: Path) -> None:
    page = visit(html)
    page.fill("#search", "pwned")
    reader = open_row(page, 0)
    shown = reader.locator(".said.model pre").first.inner_text()
    assert "<script>window.pwned = 1</script></script><!-- <script> ]]> <img src=x" in shown
    assert "U+202Ekcab" in shown  # what would turn the text around is spelled out
    assert "{{ 7 * 7 }}" in shown
    assert "漢字 🎈" in shown
    assert "javascript:alert(1)" in HOSTILE
    assert page.locator("#reader script, #reader img").count() == 0


def test_a_script_that_got_in_would_not_run(browser: Any, html: Path) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(html.as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 3'}))")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/a.png'}))"
    )
    assert page.evaluate("window.pwned") is None
    while len(said) < 2:  # ended by pytest-timeout where they never come
        page.wait_for_timeout(10)
    assert ["Content Security Policy" in each for each in said] == [True, True]
    page.close()


# ---- everywhere


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit: Visit, html: Path, scheme: str) -> None:
    page = visit(html, width=360, height=740, color_scheme=scheme, has_touch=True, is_mobile=True)
    page.fill("#search", "pwned")
    open_row(page, 0)
    page.tap(".token >> nth=3")
    assert "token 4 of" in page.inner_text("#readout")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    beyond = "e => e.getBoundingClientRect().right > 361 && !e.closest('.scroll')"
    found = page.evaluate(
        f"[...document.querySelectorAll('body *')].filter({beyond}).map(e => e.outerHTML.slice(0, 80))"
    )
    assert found == []


def test_all_of_it_works_from_the_keyboard(visit: Visit, html: Path) -> None:
    page = visit(html)
    page.focus("figure svg >> nth=0")
    page.keyboard.press("ArrowRight")
    tip = page.inner_text("figure .tip >> nth=0")
    assert re.sub(r"\s+", " ", tip) == "optimizer step 0 validation 50 % rollout 75 %"
    page.keyboard.press("Escape")
    assert page.is_hidden("figure .tip >> nth=0")
    page.focus("#rows button >> nth=4")
    page.keyboard.press("Enter")
    page.wait_for_selector("#reader .turn")
    assert page.evaluate("document.activeElement.id") == "reader"
    page.focus("#reader .said.model pre >> nth=0")
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert "token 2 of" in page.inner_text("#readout")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(visit: Visit, html: Path, scheme: str) -> None:
    page = visit(html, color_scheme=scheme)
    page.fill("#search", "found it")
    open_row(page, 0)
    for color in ("advantage", "drift", "doubt"):
        page.check(f"input[value={color}]")
        contrasts = page.evaluate((Path(__file__).parent / "contrast.js").read_text())
        assert len(contrasts) > 200
        assert [each for each in contrasts if each[0] < 4.5] == [], color


# ---- taking something out of it


def test_a_chart_can_be_saved_as_a_figure_and_as_a_table(visit: Visit, html: Path) -> None:
    page = visit(html, color_scheme="dark")
    with page.expect_download() as figure:
        page.click("text=Save SVG >> nth=0")
    with page.expect_download() as table:
        page.click("text=Save CSV >> nth=0")
    assert (figure.value.suggested_filename, table.value.suggested_filename) == ("accuracy.svg", "accuracy.csv")
    root = ElementTree.fromstring(Path(figure.value.path()).read_text())
    texts = {each.text: each for each in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Accuracy", "% solved", "optimizer step", "validation", "rollout"} <= texts.keys()
    assert texts["Accuracy"].get("fill") == "rgb(26, 29, 33)"  # dark on white, whatever the page looks like
    assert not [each for each in root.iter() if each.get("class")]
    lines = Path(table.value.path()).read_text().splitlines()
    assert lines == [
        '"series","optimizer step","fraction solved"', '"validation",0,0.5', '"validation",2,0.5', '"rollout",0,0.75',
        '"rollout",1,0.75',
    ]  # fmt: skip


def test_two_runs_are_told_apart(visit: Visit, played: Path, tmp_path: Path) -> None:
    from lit_stepwise import cli

    assert cli.main(["report", str(played), str(played), "--output", str(tmp_path / "two.html")]) == 0
    page = visit(tmp_path / "two.html")
    assert page.inner_text("#count") == "24 of 24 trajectories"
    page.select_option("#run", index=2)
    assert {row.locator("td").first.inner_text() for row in rows(page)} == {"B"}
    assert page.locator("figure >> nth=0 >> .second").count() >= 2


@pytest.mark.skipif("REPORT_FOR_DOCS" not in os.environ, reason="REPORT_FOR_DOCS names no report to take pictures of")
def test_pictures_for_the_docs(visit: Visit) -> None:
    docs = Path(__file__).parent.parent.parent / "docs"
    report = Path(os.environ["REPORT_FOR_DOCS"])
    page = visit(report, width=1180, height=930)
    page.screenshot(path=docs / "report.png")
    for picture, width, height, more in (("trajectory", 1280, 860, {}), ("phone", 360, 720, {"has_touch": True})):
        page = visit(report, width, height, **more)
        choose(page, phase="iteration 2", outcome="solved")
        for _ in range(2):
            page.click("th >> text=Turns")
        open_row(page, 0)
        page.check("input[value=doubt]")
        page.evaluate("document.querySelector('.said.model').scrollIntoView({ block: 'center' })")
        page.locator(".token").nth(2).click()
        page.screenshot(path=docs / f"report-{picture}.png")
