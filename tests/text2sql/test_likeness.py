import sqlite3
import time
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_stepwise.text2sql.comparison import Gold, results_match
from lit_stepwise.text2sql.likeness import likeness
from lit_stepwise.types import QueryResult

BIG = 2**53
GOLD = [(1, "a"), (2, "b"), (3, "c"), (4, "d")]


def table(*rows, **rest):
    return QueryResult("ok", columns=tuple(f"c{index}" for index in range(len(rows[0]))), rows=rows, **rest)


@pytest.mark.parametrize(
    ("rows", "in_rows", "in_columns"),
    [
        (GOLD, 1, 1),
        (GOLD[::-1], 1, 1),
        (GOLD[:3], 2 * 3 / 7, (3 + 3) / 8),
        ([*GOLD, (5, "e")], 2 * 4 / 9, (4 + 4) / 10),
        ([*GOLD, *GOLD], 2 * 4 / 12, (4 + 4) / 16),
        ([*GOLD[:3], (4, "x")], 2 * 3 / 8, (4 + 3) / 8),
        ([(1, "b"), (2, "c"), (3, "d"), (4, "a")], 0, (4 + 4) / 8),  # right columns, wrong rows
        ([("a", 1), ("b", 2), ("c", 3), ("d", 4)], 0, (4 + 4) / 8),  # and in the wrong order
        ([(1,), (2,), (3,), (9,)], 0, (3 + 0) / 8),
        ([(1, "a", 7, 8), (2, "b", 7, 8)], 0, (2 + 2) / 16),
        ([(1,)], 0, 1 / 8),
        ([(7,)], 0, 0),
        ([(None, None)] * 4, 0, 0),
    ],
)
def test_likeness_is_the_mean_of_rows_and_columns_worked_by_hand(rows, in_rows, in_columns):
    assert likeness(table(*rows), Gold(table(*GOLD))) == pytest.approx((in_rows + in_columns) / 2, abs=1e-12)


def test_each_column_is_in_one_pair_and_the_best_pairs_come_first():
    gold = Gold(table((1, 1), (2, 2), (3, 9)))
    assert likeness(table((1, 0), (2, 0), (3, 0)), gold) == pytest.approx((0 + 3 / 6) / 2)
    assert likeness(table((1, 1), (2, 2), (9, 3)), gold) == pytest.approx((2 * 2 / 6 + 6 / 6) / 2)


def test_more_of_the_answer_is_worth_more():
    gold = Gold(table(*GOLD))
    ladder = [
        [(7,)],
        [(1,)],
        [(1,), (2,), (3,), (4,)],
        [(1, "b"), (2, "c"), (3, "d"), (4, "a")],
        [*GOLD, *((5 + index, "e") for index in range(3))],
        [*GOLD, (5, "e")],
        GOLD,
    ]
    values = [likeness(table(*rows), gold) for rows in ladder]
    assert values == sorted(set(values))
    assert (values[0], values[-1]) == (0, 1)


def test_a_constant_is_worth_little_next_to_a_table():
    assert likeness(table((1,)), Gold(table(*[(number, number % 2) for number in range(20)]))) == 1 / 40 / 2


def test_order_does_not_count():
    assert likeness(table(*GOLD[::-1]), Gold(table(*GOLD), ordered=True)) == 1


@pytest.mark.parametrize("status", ["error", "denied", "timeout", "limit", "infra"])
def test_a_result_that_cannot_be_compared_is_worth_nothing(status):
    gold = Gold(table((1,)))
    assert likeness(QueryResult(status, columns=("a",), rows=((1,),)), gold) == 0
    assert likeness(table((1,), truncated=True), gold) == 0
    assert likeness(QueryResult("ok", columns=("a",)), gold) == 0
    assert likeness(QueryResult("ok", columns=("a",)), Gold(QueryResult("ok", columns=("a",)))) == 0
    assert likeness(table((1,)), Gold(QueryResult("ok", columns=("a",)))) == 0


def test_values_are_equal_as_they_are_in_a_comparison():
    assert likeness(table((0.1 + 0.2, 5.0, BIG + 1)), Gold(table((0.3, 5, float(BIG))))) == 1
    assert likeness(table((BIG, "x"), (7, "y")), Gold(table((BIG + 1, "x"), (7, "y")))) == (1 / 2 + 3 / 4) / 2
    assert likeness(table((0.1 + 0.2, "x"), (7, "y")), Gold(table((0.3, "x"), (8, "y")))) == (1 / 2 + 3 / 4) / 2
    assert likeness(table((7,), (BIG + 1,)), Gold(table((float(BIG),), (7,)), ordered=True)) == 1
    assert likeness(table(("1",)), Gold(table((1,)))) == 0


CELLS = st.sampled_from([None, 0, 1, 1.0, "1", 0.5, BIG, BIG + 1, float(BIG)])
TABLES = st.integers(1, 3).flatmap(lambda width: st.lists(st.tuples(*[CELLS] * width), min_size=1, max_size=4))


@settings(derandomize=True, database=None, deadline=None, max_examples=200)
@given(TABLES, TABLES)
def test_likeness_is_1_exactly_for_the_same_bag_of_rows(rows, others):
    value = likeness(table(*rows), Gold(table(*others), ordered=True))
    assert 0 <= value <= 1
    assert (value == 1) == results_match(table(*rows), Gold(table(*others)))
    assert value == pytest.approx(likeness(table(*others), Gold(table(*rows))))


def test_columns_beyond_twenty_are_not_looked_for_and_lower_the_rest():
    wide = [tuple(range(row, row + 30)) for row in (0, 100)]
    assert likeness(table(*wide), Gold(table(*wide))) == 1
    assert likeness(table(*[(*row[:29], -1) for row in wide]), Gold(table(*wide))) == pytest.approx(20 / 30 / 2)


def test_large_results_are_judged_in_a_moment():
    rows = [(row, row % 7, f"name {row}", row / 3, None) for row in range(5000)]
    gold = Gold(table(*rows))
    start = time.thread_time()
    assert likeness(table(*[row[::-1] for row in rows]), gold) == 0.5
    assert time.thread_time() - start < 1


def test_progress_on_a_real_database_grows_towards_the_answer(tmp_path):
    from lit_stepwise.text2sql.executors import SQLiteExecutor

    path = tmp_path / "pets.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("""
            CREATE TABLE pet (name TEXT, kind TEXT, weight REAL);
            INSERT INTO pet VALUES ('Ada', 'dog', 31.5), ('Bo', 'cat', 4.25), ('Cy', 'dog', 12.0), ('Di', 'cat', 5.5);
        """)
    executor = SQLiteExecutor(num_workers=1)
    gold = Gold(executor.execute(path, "SELECT name, weight FROM pet WHERE kind = 'dog' ORDER BY weight"))
    statements = [
        "SELECT nmae FROM pet",
        "SELECT kind FROM pet LIMIT 1",
        "SELECT * FROM pet",
        "SELECT name FROM pet WHERE kind = 'dog'",
        "SELECT name, weight FROM pet",
        "SELECT name, weight FROM pet WHERE kind = 'dog'",
    ]
    values = [likeness(executor.execute(path, sql), gold) for sql in statements]
    executor.close()
    expected = [0, 0, 4 / 12 / 2, 2 / 4 / 2, (2 * 2 / 6 + 4 / 8) / 2, 1]
    assert values == pytest.approx(expected)
