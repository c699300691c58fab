import json
import math
import pickle
import sqlite3
import time
from contextlib import closing
from itertools import permutations
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_stepwise.text2sql import comparison
from lit_stepwise.text2sql.comparison import Gold, Match, results_match
from lit_stepwise.text2sql.statements import has_top_level_order_by
from lit_stepwise.types import QueryResult

BIG = 2**53  # from here on a float skips integers
QUESTIONS = Path(__file__).parents[2] / ".." / "shared" / "data" / "text2sql" / "questions.jsonl"

steady = settings(derandomize=True, database=None, deadline=None, max_examples=150)
every_match = pytest.mark.parametrize("match", get_args(Match))


def table(*rows, columns=None, **rest):
    names = columns or tuple(f"c{index}" for index in range(len(rows[0])))
    return QueryResult("ok", columns=names, rows=rows, **rest)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a statement on a real database of four people, two of them with the same name."""
    from lit_stepwise.text2sql.executors import SQLiteExecutor

    path = tmp_path_factory.mktemp("sqlite") / "people.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("""
            CREATE TABLE person (id INTEGER PRIMARY KEY, name TEXT, age INTEGER, height REAL);
            INSERT INTO person VALUES (1, 'Ada', 36, 1.7), (2, 'Bo', 41, 1.9), (3, 'Ada', 29, 1.65);
            INSERT INTO person VALUES (4, 'Cy', 41, 2.05);
            CREATE TABLE code (digits TEXT);
            INSERT INTO code VALUES ('1');
        """)
    executor = SQLiteExecutor(num_workers=1)
    yield lambda sql: executor.execute(path, sql)
    executor.close()


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ("SELECT DISTINCT name FROM person", "SELECT name FROM person"),
        ("SELECT name FROM person", "SELECT DISTINCT name FROM person"),
        ("SELECT id FROM person ORDER BY age, id", "SELECT id FROM person ORDER BY age DESC, id DESC"),
        ("SELECT id, name FROM person", "SELECT id, name FROM person UNION ALL SELECT id, name FROM person"),
        ("SELECT count(*) FROM person", "SELECT 1000"),
        ("SELECT max(height) FROM person", "SELECT 2.06"),
        ("SELECT name, age FROM person", "SELECT age, name FROM person"),
        ("SELECT digits FROM code", "SELECT 1"),
        ("SELECT 1", "SELECT digits FROM code"),
        ("SELECT name FROM person WHERE age > 99", "SELECT name FROM person WHERE age > 99"),
        ("SELECT name FROM person WHERE age > 99", ""),
        ("SELECT name FROM person WHERE age > 99", "DELETE FROM person"),
        ("SELECT name FROM person WHERE age > 99", "SELECT 1 WHERE 0"),
        ("SELECT name FROM person WHERE age > 99", "SELECT name FROM person"),
        ("SELECT name FROM person WHERE age > 99", "SELECT NULL"),
        ("SELECT name FROM person", "SELECT name FROM person WHERE 0"),
        ("SELECT name FROM person", "SELECT nmae FROM person"),
    ],
)
def test_no_statement_is_paid_that_does_not_answer(run, gold, predicted):
    assert not results_match(run(predicted), Gold(run(gold), has_top_level_order_by(gold)))


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ("SELECT name, age FROM person", "SELECT name AS n, age + 0.0 FROM person ORDER BY age"),
        ("SELECT sum(age) FROM person", "SELECT total(age) FROM person"),
        ("SELECT id FROM person ORDER BY age DESC, id", "SELECT id FROM person ORDER BY -age, id"),
    ],
)
def test_a_right_answer_is_paid_however_it_is_put(run, gold, predicted):
    assert results_match(run(predicted), Gold(run(gold), has_top_level_order_by(gold)))


def test_the_last_digit_of_an_average_does_not_count(run):
    gold = run("SELECT avg(height) FROM person WHERE name <> 'Bo'")
    predicted = run("SELECT sum(height * 100) / 300 FROM person WHERE name <> 'Bo'")
    assert gold.rows != predicted.rows
    assert results_match(predicted, Gold(gold))


def test_each_way_to_compare_forgives_what_it_says(run):
    def paid(predicted, gold):
        result, gold = run(predicted), Gold(run(gold), has_top_level_order_by(gold))
        return [match for match in get_args(Match) if results_match(result, gold, match)]

    gold = "SELECT name, age FROM person ORDER BY id"
    assert paid("SELECT name, age FROM person ORDER BY id", gold) == ["bag_ordered", "set", "permuted", "cover"]
    assert paid("SELECT age, name FROM person ORDER BY id", gold) == ["permuted", "cover"]
    assert paid("SELECT id, age, name FROM person ORDER BY id", gold) == ["cover"]
    assert paid("SELECT name, age FROM person ORDER BY id DESC", gold) == ["set"]
    assert paid("SELECT age, name FROM person ORDER BY id DESC", gold) == []
    assert paid("SELECT age, age FROM person ORDER BY id", gold) == []
    assert paid("SELECT name FROM person ORDER BY id", gold) == []
    assert paid("SELECT DISTINCT name FROM person", "SELECT name FROM person") == ["set"]
    assert paid("SELECT DISTINCT name, 7 FROM person", "SELECT name FROM person") == []


def test_rows_are_a_bag_whose_order_counts_only_when_gold_has_one():
    gold = table((1, "a"), (2, "b"), (2, "b"), (3, "c"))
    shuffled = table((2, "b"), (3, "c"), (1, "a"), (2, "b"))
    assert results_match(shuffled, Gold(gold))
    assert not results_match(shuffled, Gold(gold, ordered=True))
    assert results_match(table(*gold.rows), Gold(gold, ordered=True))


def test_order_counts_as_far_as_gold_determines_it():
    gold = Gold(table((9, "a"), (5, "b"), (5, "c"), (5, "d"), (2, "e")), ordered=True, tie_ends=(1, 4, 5))
    assert results_match(table((9, "a"), (5, "d"), (5, "b"), (5, "c"), (2, "e")), gold)
    assert results_match(table(("a", 9), ("c", 5), ("b", 5), ("d", 5), ("e", 2)), gold, "permuted")
    assert not results_match(table((5, "d"), (9, "a"), (5, "b"), (5, "c"), (2, "e")), gold)
    assert not results_match(table((9, "a"), (5, "d"), (5, "b"), (2, "e"), (5, "c")), gold)
    assert not results_match(table((9, "a"), (5, "b"), (5, "b"), (5, "d"), (2, "e")), gold)
    assert not results_match(table(("a", 9), ("b", 5), ("c", 5), ("e", 2), ("d", 5)), gold, "permuted")
    assert not results_match(table((9, "a", 0), (5, "b", 0), (5, "c", 0), (2, "e", 0), (5, "d", 0)), gold, "cover")


@pytest.mark.parametrize("tie_ends", [(1, 2), (2, 1, 3), (0, 3), (1, 1, 3), (4,)])
def test_ends_of_ties_have_to_rise_to_the_number_of_rows(tie_ends):
    with pytest.raises(ValueError, match="the number of rows, 3"):
        Gold(table((7,), (8,), (9,)), ordered=True, tie_ends=tie_ends)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [(1, "a"), (2, "b"), (2, "b")],  # the last one is missing
        [(1, "a"), (2, "b"), (3, "c")],  # a duplicate is missing
        [(1, "a"), (2, "b"), (2, "b"), (2, "b"), (3, "c")],  # one too many
        [(1, "a"), (2, "b"), (3, "c"), (3, "c")],  # the wrong one twice
        [("a", 1), ("b", 2), ("b", 2), ("c", 3)],  # columns swapped
        [(1, "b"), (2, "a"), (2, "b"), (3, "c")],  # right columns, wrong rows
    ],
)
def test_duplicates_columns_and_pairs_of_values_count(rows, ordered):
    assert not results_match(table(*rows), Gold(table((1, "a"), (2, "b"), (2, "b"), (3, "c")), ordered))


def test_a_set_forgets_duplicates_and_nothing_else():
    gold = Gold(table((1, "a"), (2, "b"), (2, "b")), ordered=True)
    assert results_match(table((2, "b"), (1, "a"), (1, "a"), (1, "a")), gold, "set")
    assert not results_match(table((1, "a")), gold, "set")
    assert not results_match(table((1, "a"), (2, "b"), (2, "a")), gold, "set")
    assert not results_match(table(("a", 1), ("b", 2)), gold, "set")
    assert not results_match(table((1, "a", 0), (2, "b", 0)), gold, "set")


@every_match
def test_an_empty_result_proves_nothing(match):
    empty = QueryResult("ok", columns=("a",))
    assert not results_match(empty, Gold(empty), match)
    assert not results_match(empty, Gold(table((None,))), match)
    assert not results_match(table((None,)), Gold(empty), match)


def test_the_number_of_columns_must_agree_and_their_names_need_not():
    assert results_match(table((7,), columns=("count(*)",)), Gold(table((7,), columns=("n",)), ordered=True))
    assert not results_match(table((7, 8)), Gold(table((7,))))
    assert not results_match(table((7,)), Gold(table((7, 7))))
    assert not results_match(table((7,)), Gold(table((7, 7))), "cover")
    assert not results_match(table((7, 8)), Gold(table((7,))), "permuted")


def test_each_predicted_column_covers_one_gold_column():
    gold = Gold(table((7, 7, 8), (6, 6, 5)))
    assert results_match(table((0, 7, 8, 7), (1, 6, 5, 6)), gold, "cover")
    assert not results_match(table((0, 7, 8, 1), (1, 6, 5, 0)), gold, "cover")


EQUAL = [
    (5, 5.0),
    (True, 1),
    (0.0, -0.0),
    (0, -0.0),
    (None, None),
    (math.nan, -math.nan),
    (math.inf, math.inf),
    (b"\x00\xff", b"\x00\xff"),
    (BIG + 1, BIG + 1),
    (0.1 + 0.2, 0.3),
    (123456.7891, 123456.78912),  # 123456.789 both
    (12345678.150000002, 12345678.15),  # half-way between 12345678.1 and 12345678.2, but for the last bits
    (12345678.149999999, 12345678.15),
    (-12345678.150000002, -12345678.15),
    (1234567891, 1234567891.0),  # ten digits, of which a float shows nine
    (1234567891, 1234567894.0),
    (-1234567891, -1234567894.0),
    (999999999, 999999999.0),
    (BIG + 1, float(BIG)),
    (10**400, 10**400),
    (5e-324, 5e-324),
]
DIFFERENT = [
    (1, "1"),
    (1.5, "1.5"),
    (None, 0),
    (None, ""),
    (None, math.nan),
    (None, "None"),
    (b"a", "a"),
    ("a", "A"),
    ("a", "a "),
    (math.inf, -math.inf),
    (math.inf, 1.7976931348623157e308),
    (False, 1),
    (BIG, BIG + 1),
    (999999999, 999999998.0),
    (1234567891, 1234567892),  # integers are exact beyond 9 digits too
    (-1234567891, -1234567892),
    (123456.789, 123456.788),
    (0.123456789, 0.123456788),
    (10**400, math.inf),
    (10**400, 10**400 + 1),
]


@every_match
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("value", "other"), EQUAL)
def test_equal_values_match(value, other, ordered, match):
    assert results_match(table(("x", value)), Gold(table(("x", other)), ordered), match)
    assert results_match(table(("x", other)), Gold(table(("x", value)), ordered), match)


@every_match
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("value", "other"), DIFFERENT)
def test_different_values_do_not_match(value, other, ordered, match):
    assert not results_match(table(("x", value)), Gold(table(("x", other)), ordered), match)
    assert not results_match(table(("x", other)), Gold(table(("x", value)), ordered), match)


@every_match
def test_a_float_elsewhere_in_the_column_does_not_make_large_integers_inexact(match):
    assert not results_match(table((BIG + 1,), (0.5,)), Gold(table((BIG,), (0.5,))), match)
    assert results_match(table((BIG + 1,), (0.5,)), Gold(table((0.5,), (BIG + 1,))), match)


def test_integers_that_round_alike_are_told_apart_within_a_bag_and_a_set():
    gold = Gold(table((BIG, "x"), (BIG + 1, "x"), (BIG + 1, "x")))
    assert results_match(table((BIG + 1, "x"), (BIG, "x"), (BIG + 1, "x")), gold)
    assert not results_match(table((BIG + 1, "x"), (BIG, "x"), (BIG, "x")), gold)
    assert results_match(table((BIG + 1, "x"), (BIG, "x"), (BIG, "x")), gold, "set")
    assert not results_match(table((BIG + 1, "x"), (BIG + 2, "x"), (BIG, "x")), gold, "set")


def test_columns_of_integers_that_round_alike_are_told_apart():
    gold = Gold(table((BIG, BIG + 1, "x"), (BIG + 2, BIG + 3, "y")))
    assert results_match(table((BIG + 1, "x", BIG), (BIG + 3, "y", BIG + 2)), gold, "permuted")
    assert results_match(table((BIG + 5, BIG + 1, "x", BIG), (BIG, BIG + 3, "y", BIG + 2)), gold, "cover")
    assert not results_match(table((BIG + 1, "x", BIG), (BIG + 2, "y", BIG + 3)), gold, "permuted")
    assert not results_match(table((float(BIG), BIG, "x"), (float(BIG), BIG, "y")), gold, "permuted")
    assert results_match(table((float(BIG), BIG)), Gold(table((BIG + 1,))), "cover")
    assert results_match(table((BIG, float(BIG))), Gold(table((BIG + 1,))), "cover")


@every_match
@pytest.mark.parametrize("status", ["error", "denied", "timeout", "limit", "infra"])
def test_a_result_that_is_not_ok_matches_nothing_not_even_itself(status, match):
    failed, whole = QueryResult(status, columns=("a",), rows=((1,),)), table((1,), columns=("a",))
    assert not results_match(failed, Gold(whole), match)
    assert not results_match(whole, Gold(failed), match)
    assert not results_match(failed, Gold(failed), match)


@every_match
def test_a_truncated_result_matches_nothing_not_even_itself(match):
    cut, whole = table((1,), truncated=True), table((1,))
    assert not results_match(cut, Gold(whole), match)
    assert not results_match(whole, Gold(cut), match)
    assert not results_match(cut, Gold(cut), match)


def test_many_columns_alike_take_no_time():
    def bits(num_rows, shift=0):
        return [[(row * row + column * row + shift) // 3 % 2 for column in range(12)] for row in range(num_rows)]

    start = time.thread_time()
    equal = table(*[(7,) * 30] * 50)
    assert results_match(equal, Gold(equal), "permuted")
    assert not results_match(table(*[(7,) * 29 + (8,)] * 50), Gold(equal), "permuted")
    assert not results_match(table(*[(7,) * 29 + (8,)] * 50), Gold(equal), "cover")
    reversed_bits = table(*[tuple(reversed(row)) for row in reversed(bits(200))])
    assert results_match(reversed_bits, Gold(table(*map(tuple, bits(200)))), "permuted")
    assert time.thread_time() - start < 1.0


def test_a_copy_that_was_compared_before_compares_alike():
    gold = Gold(table((math.nan, 7), (0.5, 8)), ordered=True)
    assert results_match(gold.result, gold)
    copied = pickle.loads(pickle.dumps(gold))
    assert results_match(table((math.nan, 7), (0.5, 8)), copied)
    assert not results_match(table((0.5, 8), (math.nan, 7)), copied)


def test_a_search_that_takes_too_long_finds_nothing(monkeypatch):
    # one column per row holds a 1, so that any choice goes on until the last: 8 factorial ways to fail
    gold = Gold(table(*[tuple(int(row == column) for column in range(8)) for row in range(8)]))
    twice = table(*[(*row[:7], row[6]) for row in gold.result.rows])
    assert not results_match(twice, gold, "permuted")
    assert results_match(gold.result, gold, "permuted")
    monkeypatch.setattr(comparison, "MAX_VISITS", 100)
    assert not results_match(gold.result, gold, "permuted")


CELLS = st.sampled_from([None, 0, 1, 1.0, "1", b"1", 0.5, BIG, BIG + 1])
BITS = st.sampled_from([0, 1])


@st.composite
def tables(draw, cells=CELLS, max_rows=5, max_columns=4):
    num_columns = draw(st.integers(1, max_columns))
    return draw(st.lists(st.tuples(*[cells] * num_columns), min_size=1, max_size=max_rows))


@steady
@given(tables(), st.data())
def test_a_table_matches_itself_with_columns_and_rows_shuffled(rows, data):
    columns = data.draw(st.permutations(range(len(rows[0]))))
    shuffled = [tuple(row[column] for column in columns) for row in data.draw(st.permutations(rows))]
    for match in get_args(Match):
        assert results_match(table(*rows), Gold(table(*rows), ordered=True), match)
    assert results_match(table(*shuffled), Gold(table(*rows)), "permuted")
    wider = [(data.draw(CELLS), *row, data.draw(CELLS)) for row in shuffled]
    assert results_match(table(*wider), Gold(table(*rows)), "cover")


@steady
@given(tables(), st.data())
def test_a_table_with_one_cell_changed_never_matches(rows, data):
    row, column = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, len(rows[0]) - 1))
    changed = [list(values) for values in rows]
    changed[row][column] = "of no other cell"
    for match in get_args(Match):
        assert not results_match(table(*map(tuple, changed)), Gold(table(*rows), ordered=True), match)
        assert not results_match(table(*rows), Gold(table(*map(tuple, changed))), match)


@steady
@given(tables(BITS), tables(BITS), st.booleans(), st.data())
def test_the_search_for_columns_agrees_with_trying_them_all(rows, others, ordered, data):
    num_columns = max(len(rows[0]), len(others[0]))
    rows = [row + (0,) * (num_columns - len(row)) for row in rows]
    if data.draw(st.booleans()):  # as good as never by chance
        columns = data.draw(st.permutations(range(num_columns)))
        others = [tuple(row[column] for column in columns) for row in data.draw(st.permutations(rows))]
    gold = Gold(table(*others), ordered)
    chosen = permutations(range(num_columns), len(others[0]))
    brute = [table(*[tuple(row[column] for column in columns) for row in rows]) for columns in chosen]
    assert results_match(table(*rows), gold, "cover") == any(results_match(one, gold) for one in brute)
    if len(others[0]) == num_columns:
        assert results_match(table(*rows), gold, "permuted") == results_match(table(*rows), gold, "cover")


@pytest.mark.skipif(not QUESTIONS.exists(), reason="needs the shared databases")
def test_the_result_of_every_gold_statement_matches_itself():
    from lit_stepwise.text2sql.datasets.tasks import JSONLTasks
    from lit_stepwise.text2sql.executors import SQLiteExecutor

    keys = {(task.database, task.gold_sql) for task in JSONLTasks().read(str(QUESTIONS))}
    executor = SQLiteExecutor(num_workers=1)
    results = [executor.execute(*key) for key in sorted(keys)]
    executor.close()
    assert len(results) == len({json.dumps([str(path), sql]) for path, sql in keys}) == 752
    for match in get_args(Match):
        assert all(results_match(result, Gold(result, ordered=True), match) for result in results)
