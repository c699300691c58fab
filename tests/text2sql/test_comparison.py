import math

import pytest

from lit_stepwise.text2sql.comparison import has_top_level_order_by, results_match
from lit_stepwise.types import QueryResult

BIG = 2**53  # from here on a float skips integers


def table(*rows, columns=None, **rest):
    names = columns or tuple(f"c{index}" for index in range(len(rows[0])))
    return QueryResult("ok", columns=names, rows=rows, **rest)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT a FROM t ORDER BY a",
        "select a from t order by a",
        "SELECT a FROM t ORDER\n\t BY a DESC LIMIT 3;",
        "SELECT a FROM t ORDER/* ( */BY a",
        "SELECT a FROM t ORDER -- (\nBY a",
        "SELECT ')' FROM t UNION SELECT '(' FROM u ORDER BY 1",
        "SELECT 'it''s (' FROM t ORDER BY 1",
        'SELECT "a ( b", [c ( d], `e ( f` FROM t ORDER BY 1',
        "WITH x AS (SELECT a FROM t) SELECT a FROM x ORDER BY (SELECT 1)",
        "(SELECT a FROM t ORDER BY a)",
        "((SELECT a FROM t ORDER BY a));",
    ],
)
def test_an_order_by_of_the_whole_statement_is_found(sql):
    assert has_top_level_order_by(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "",
        ";",
        "SELECT a FROM t",
        "SELECT a FROM (SELECT a FROM t ORDER BY a)",
        "WITH x AS (SELECT a FROM t ORDER BY a LIMIT 3) SELECT a FROM x",
        "SELECT rank() OVER (PARTITION BY b ORDER BY a) FROM t",
        "SELECT a FROM t WINDOW w AS (ORDER BY a)",
        "SELECT group_concat(a ORDER BY a) FROM t",
        "SELECT a FROM t WHERE b = 'x ORDER BY y'",
        "SELECT a FROM t WHERE b = 'it''s ORDER BY y'",
        'SELECT "ORDER BY" FROM t',
        "SELECT `ORDER BY` FROM t",
        "SELECT [ORDER BY] FROM t",
        "SELECT a FROM t -- ORDER BY a",
        "SELECT a FROM t /* ORDER BY a",
        "SELECT a FROM t /* x\n ORDER BY a */ LIMIT 2",
        "SELECT 'open ORDER BY a",
        "SELECT a AS reorder, b AS by FROM t",
        "SELECT border, by FROM t",
        "(SELECT a FROM t ORDER BY a) UNION ALL (SELECT b FROM u ORDER BY b)",
    ],
)
def test_an_order_by_of_a_part_or_in_a_text_is_not(sql):
    assert not has_top_level_order_by(sql)


def test_rows_are_a_bag_whose_order_counts_only_when_asked_for():
    gold = table((1, "a"), (2, "b"), (2, "b"), (3, "c"))
    shuffled = table((2, "b"), (3, "c"), (1, "a"), (2, "b"))
    assert results_match(shuffled, gold, ordered=False)
    assert not results_match(shuffled, gold, ordered=True)
    assert results_match(table(*gold.rows), gold, ordered=True)


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
    assert not results_match(table(*rows), table((1, "a"), (2, "b"), (2, "b"), (3, "c")), ordered)


@pytest.mark.parametrize("ordered", [False, True])
def test_no_rows_match_no_rows_only(ordered):
    empty = QueryResult("ok", columns=("a",))
    assert results_match(empty, empty, ordered)
    assert not results_match(empty, table((None,)), ordered)
    assert not results_match(table((None,)), empty, ordered)


def test_the_number_of_columns_must_agree_and_their_names_need_not():
    assert results_match(table((7,), columns=("count(*)",)), table((7,), columns=("n",)), ordered=True)
    assert results_match(QueryResult("ok", columns=("a",)), QueryResult("ok", columns=("b",)), ordered=False)
    assert not results_match(QueryResult("ok", columns=("a", "b")), QueryResult("ok", columns=("a",)), ordered=False)
    assert not results_match(table((7, 8)), table((7,)), ordered=False)


@pytest.mark.parametrize(
    ("value", "other"),
    [
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
        (1234567891, 1234567891.0),  # ten digits, of which a float shows nine
        (1234567891, 1234567894.0),
        (BIG + 1, float(BIG)),
        (10**400, 10**400),
    ],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_equal_values_match(value, other, ordered):
    assert results_match(table((4, value)), table((4, other)), ordered)
    assert results_match(table((4, other)), table((4, value)), ordered)


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (1, "1"),
        (1.5, "1.5"),
        (None, 0),
        (None, ""),
        (None, math.nan),
        (None, "None"),
        (b"a", "a"),
        ("a", "A"),
        (math.inf, -math.inf),
        (math.inf, 1.7e308),
        (False, 1),
        (BIG, BIG + 1),
        (1234567891, 1234567892),  # integers are exact beyond 9 digits too
        (123456.789, 123456.788),
        (0.123456789, 0.123456788),
        (10**400, math.inf),
        (10**400, 10**400 + 1),
    ],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_different_values_do_not_match(value, other, ordered):
    assert not results_match(table((4, value)), table((4, other)), ordered)
    assert not results_match(table((4, other)), table((4, value)), ordered)


def test_a_float_elsewhere_in_the_column_does_not_make_large_integers_inexact():
    assert not results_match(table((BIG + 1,), (0.5,)), table((BIG,), (0.5,)), ordered=False)
    assert results_match(table((BIG + 1,), (0.5,)), table((0.5,), (BIG + 1,)), ordered=False)


def test_integers_that_round_alike_are_told_apart_within_a_bag():
    gold = table((BIG, "x"), (BIG + 1, "x"), (BIG + 1, "x"))
    assert results_match(table((BIG + 1, "x"), (BIG, "x"), (BIG + 1, "x")), gold, ordered=False)
    assert not results_match(table((BIG + 1, "x"), (BIG, "x"), (BIG, "x")), gold, ordered=False)


@pytest.mark.parametrize("status", ["error", "denied", "timeout", "limit", "infra"])
def test_a_result_that_is_not_ok_matches_nothing_not_even_itself(status):
    failed = QueryResult(status, columns=("a",))
    empty = QueryResult("ok", columns=("a",))
    assert not results_match(failed, empty, ordered=False)
    assert not results_match(empty, failed, ordered=False)
    assert not results_match(failed, failed, ordered=True)


def test_a_truncated_result_matches_nothing_not_even_itself():
    cut, whole = table((1,), truncated=True), table((1,))
    assert not results_match(cut, whole, ordered=False)
    assert not results_match(whole, cut, ordered=True)
    assert not results_match(cut, cut, ordered=False)
