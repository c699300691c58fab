"""Lines at the bottom of a terminal, on a real pseudo-terminal with an emulator behind it."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios
from collections.abc import Callable, Iterator
from typing import TextIO

import pyte
import pytest

from lit_stepwise.training.bottom_lines import BottomLines


class Terminal:
    """What a person would see."""

    def __init__(self, columns: int, rows: int) -> None:
        self.master, slave = os.openpty()
        self.file: TextIO = os.fdopen(slave, "w")
        self.screen = pyte.HistoryScreen(columns, rows, history=100)
        self.stream = pyte.ByteStream(self.screen)
        self.resize(columns, rows)
        self.lines: list[BottomLines] = []

    def below(self, num_lines: int) -> BottomLines:
        self.lines.append(BottomLines(self.file, num_lines))
        return self.lines[-1]

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)

    def rows(self) -> list[str]:
        self.file.flush()
        while select.select([self.master], [], [], 0.1)[0]:
            self.stream.feed(os.read(self.master, 1 << 20))
        return [row.rstrip() for row in self.screen.display]


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal(columns=40, rows=14)
    yield made
    for each in made.lines:
        each.close()
    made.file.close()
    os.close(made.master)


def lines(*texts: str) -> Callable[[int], list[str]]:
    return lambda width: list(texts)


def test_what_others_write_scrolls_above_the_lines(terminal: Terminal) -> None:
    terminal.file.write("$ a command\n")
    below = terminal.below(3)
    below.draw(lines("run 1/9", "playing"))
    terminal.file.write("a warning\nof two lines\nhalf of ")
    below.draw(lines("run 2/9", "training"))
    terminal.file.write("a third\n")
    assert terminal.rows() == [
        "$ a command", "a warning", "of two lines", "half of a third", *[""] * 8, "run 2/9", "training"
    ]  # fmt: skip
    for number in range(20):
        terminal.file.write(f"line {number}\n")
    below.draw(lines("run 3/9", "playing"))
    assert terminal.rows() == [*(f"line {number}" for number in range(10, 20)), "", "", "run 3/9", "playing"]


def test_a_full_screen_loses_nothing_when_the_lines_come(terminal: Terminal) -> None:
    for number in range(30):
        terminal.file.write(f"line {number}\n")
    terminal.below(2).draw(lines("run"))
    assert terminal.rows() == [*(f"line {number}" for number in range(19, 30)), "", "", "run"]


def test_in_the_end_the_whole_terminal_is_back_and_empty_below_what_was_written(terminal: Terminal) -> None:
    below = terminal.below(3)
    below.draw(lines("run 1/9"))
    terminal.file.write("the end\n")
    below.close()
    below.close()
    terminal.file.write("$ ")
    assert terminal.rows() == ["the end", "$", *[""] * 12]
    assert terminal.screen.margins is None


def test_a_terminal_of_another_size_gets_its_lines_at_its_bottom(terminal: Terminal) -> None:
    below = terminal.below(2)
    below.draw(lines("run 1/9"))
    terminal.rows()
    terminal.resize(columns=50, rows=20)
    below.draw(lines("run 2/9"))
    terminal.file.write("after\n")
    assert terminal.rows()[-1] == "run 2/9"
    assert terminal.rows()[0] == "after"


def test_a_tiny_terminal_is_left_alone(terminal: Terminal) -> None:
    terminal.resize(columns=40, rows=6)
    terminal.below(3).draw(lines("run 1/9"))
    assert terminal.rows() == [""] * 6
