import re
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
from hostile.corpus import HEALTH, HEALTHY, World, make_world, marks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_stepwise.text2sql.executors import DuckDBExecutor, SQLiteExecutor

CORPUS = Path(__file__).with_name("hostile") / "corpus.jsonl"
TIMEOUT = 0.25
GRACE = 1.0  # beyond the timeout, for a statement that has to be killed
NUM_TRIES = 3  # of which one has to be in time: a pause of the whole machine is no fault of a statement
HEALTH_EVERY = 50
NOWHERE = "/nowhere"  # so that the same statements are drawn wherever the tests run
TOKEN = re.compile(r"\s+|\w+|'[^']*'|\"[^\"]*\"|.", re.DOTALL)
COLUMNS = {
    "number": ("a.ID", "a.Population", "1", "0", "-7", "0.5", "NULL"),
    "text": ("a.Name", "a.District", "'a%'", "''"),
}
OPERATORS = {"number": ("+", "-", "*", "/", "%", "&", "<<"), "text": ("||",)}
TESTS = ("=", "<>", "<", ">=", "IS NOT", "LIKE", "GLOB", "IS NOT DISTINCT FROM")
JOINS = (
    "",
    ", city b",
    " JOIN country b ON a.CountryCode = b.Code",
    " LEFT JOIN big b ON a.ID < b.ID",
    " CROSS JOIN country",
)
ENDS = ("", " ORDER BY 1 DESC", " LIMIT 3", " LIMIT 2 OFFSET 9000000000", " ORDER BY 2, 1 LIMIT 5")
EXTREMES = {
    "sqlite": {
        "": (
            *("NULL", "0", "-1", "63", "9223372036854775807", "-9223372036854775808", "1e308", "9e999", "-0.0", "''"),
            *("'a'", "'%'", "'\u00e9\U0001f5ff'", "'2024-02-30'", "'+9 years'", "'%*d%n%s'", "'[1,[2,{\"a\":3}]]'"),
            *("'$.a[0]'", "'$[#-1]'", "'{'", "x''", "x'ff00'", "zeroblob(9000000)", "printf('%.*c', 3000000, 'a')"),
            *("char(0, 1114111)", "replace(hex(zeroblob(300000)), '0', '[')", "CAST(x'c328' AS TEXT)", "Name", "ID"),
            *("*", "DISTINCT Name", "ID ORDER BY Name", "(SELECT max(ID) FROM city)", "1, 2, 3, 4, 5", "?", "note"),
        ),
    },
    "duckdb": {
        "LAMBDA": ("lambda x: x", "lambda x, y: x || y", "lambda x: repeat('a', 999999)"),
        "[]": ("[]", "[1, NULL]", "[[1], []]", "range(300000)", "['a', '']", "NULL::INTEGER[]", "list(ID)"),
        "MAP": ("MAP {}", "MAP {1: 'b'}", "MAP {'a': NULL}"),
        "STRUCT": ("{'a': 1}", "row(1, 'x')", "{'a': {'b': []}}"),
        "JSON": ("'{\"a\": [1]}'::JSON", "repeat('[', 9999)", "'nonsense'", "json_serialize_sql('SELECT 1')"),
        "INTERVAL": ("INTERVAL 999999 YEARS", "INTERVAL '-1 day'", "INTERVAL 0 SECONDS"),
        "INT": ("0", "-1", "2147483647", "9223372036854775807", "(-9223372036854775808)", "NULL", "ID"),
        "DOUBLE": ("0.0", "'nan'::DOUBLE", "'-inf'::DOUBLE", "1e308", "5e-324", "ID"),
        "DECIMAL": ("0.1::DECIMAL(38, 37)", "99999999999999999999999999999999999999::DECIMAL(38, 0)"),
        "VARCHAR": ("''", "'a'", "'%'", "'[1,{\"a\":2}]'", "'$.a[0]'", "repeat('ab', 1500000)", "Name"),
        "BLOB": ("''::BLOB", "'\\xff\\x00'::BLOB", "encode(repeat('x', 99999))"),
        "DATE": ("DATE 'infinity'", "DATE '-290000-01-01'", "DATE '2024-02-29'"),
        "TIME": ("TIMESTAMP '294246-01-01'", "TIME '24:00:00'", "TIMESTAMPTZ '-infinity'", "TIMESTAMP 'epoch'"),
        "BIT": ("'1'::BIT", "repeat('10', 9999)::BIT"),
        "": (
            *(
                "NULL",
                "1",
                "'hour'",
                "'UTC'",
                "true",
                "*",
                "DISTINCT ID",
                "ID ORDER BY Name",
                "COLUMNS(*)",
                "(SELECT 3)",
            ),
        ),
    },
}
"""Arguments at the ends of what a type holds, by a part of the name that the type has in a function's signature."""
CALLS = (
    *(
        "SELECT {0}({1})",
        "SELECT {0}({1})",
        "SELECT {0}({1}) FROM city",
        "SELECT * FROM {0}({1})",
        "SELECT {0}({0}({1}))",
    ),
    *("SELECT {0}({1}) OVER (ORDER BY ID ROWS 3 PRECEDING) FROM city", "SELECT {0}({1}) FILTER (WHERE 1=1) FROM city"),
    *("SELECT Name FROM city WHERE {0}({1}) = {2} ORDER BY {0}({1})", "SELECT CAST({0}({1}) AS VARCHAR) FROM country"),
    *("SELECT count(*) FROM city a, big b WHERE {0}({1}) IS NULL", "EXPLAIN SELECT {0}({1})", 'SELECT "{0}"({1})'),
    *("PRAGMA {0}({1})", "PRAGMA {0} = {1}", "CALL {0}({1})", "WITH x AS ({0}({1})) SELECT * FROM x"),
)


def signatures(system):
    """The types of the arguments that each name takes which a statement can call."""
    if system == "sqlite":
        with closing(sqlite3.connect(":memory:")) as connection:
            found = connection.execute("SELECT name, narg FROM pragma_function_list").fetchall()
            for others in ("pragma_module_list", "pragma_pragma_list"):
                found += connection.execute(f"SELECT name, 1 FROM {others}").fetchall()
        found = [(name, ("",) * count) for name, most in found for count in ([most] if most >= 0 else range(4))]
    else:
        import duckdb

        with duckdb.connect() as connection:
            found = connection.execute("SELECT function_name, parameter_types FROM duckdb_functions()").fetchall()
        found = [(name, tuple(map(str, types or ()))) for name, types in found if re.match(r"(?!.*collate)[a-z]", name)]
    overloads = {}
    for name, types in sorted(set(found)):
        overloads.setdefault(name, []).append(types)
    return overloads


def calls(system):
    """Every function with arguments at their ends, in every place."""
    extremes = EXTREMES[system]

    def arguments(overload):
        name, types = overload
        keys = [next((key for key in extremes if key in kind), "") for kind in types]
        return st.tuples(st.just(name), st.tuples(*(st.sampled_from((*extremes[key], *extremes[""])) for key in keys)))

    def overload(item):
        return st.tuples(st.just(item[0]), st.sampled_from(item[1]))

    drawn = st.sampled_from(list(signatures(system).items())).flatmap(overload).flatmap(arguments)
    parts = st.tuples(st.sampled_from(CALLS), drawn, st.sampled_from(extremes[""]))
    return parts.map(lambda drawn: drawn[0].format(drawn[1][0], ", ".join(drawn[1][1]), drawn[2]))


def terms(kind):
    """Expressions over the table ``a`` that give numbers or text."""
    pairs = [f"({x} {operator} {y})" for x in COLUMNS[kind] for operator in OPERATORS[kind] for y in COLUMNS[kind]]
    wrappers = ("{}", "coalesce({0}, {0})", "(SELECT {} FROM city c WHERE c.ID = 4)", "CASE WHEN a.ID > 4 THEN {} END")
    return st.sampled_from([wrapper.format(term) for wrapper in wrappers for term in (*COLUMNS[kind], *pairs)])


def selects():
    """Queries that are right, or nearly so."""
    tests = [st.tuples(terms(kind), st.sampled_from(TESTS), terms(kind)).map(" ".join) for kind in COLUMNS]
    parts = st.tuples(terms("number"), terms("text"), st.sampled_from(JOINS), st.one_of(tests))
    plain = parts.map(lambda drawn: "SELECT {}, {} FROM city a{} WHERE {}".format(*drawn))
    pairs = st.tuples(plain, st.sampled_from((" UNION ", " UNION ALL ", " EXCEPT ", " INTERSECT ")), plain)
    return st.tuples(st.one_of(plain, pairs.map("".join)), st.sampled_from(ENDS)).map("".join)


def mutations(corpus, fragments):
    """Statements of the corpus, with some of their tokens taken out, moved, doubled or replaced."""

    @st.composite
    def mutate(draw):
        tokens = TOKEN.findall(draw(corpus))[:600]
        for _ in range(draw(st.integers(0, 4))):
            start = draw(st.integers(0, max(0, len(tokens) - 1)))
            end = start + draw(st.integers(0, 3))
            kind = draw(st.sampled_from(("drop", "double", "replace", "insert", "splice", "reverse", "upper")))
            if kind == "drop":
                tokens[start:end] = []
            elif kind == "double":
                tokens[start:start] = tokens[start:end] * 3
            elif kind == "reverse":
                tokens[start:end] = reversed(tokens[start:end])
            elif kind == "upper":
                tokens[start:end] = [token.swapcase() for token in tokens[start:end]]
            elif kind == "splice":
                tokens[start:] = TOKEN.findall(draw(corpus))[start:600]
            else:
                tokens[start : end if kind == "replace" else start] = [draw(fragments)]
        return "".join(tokens)

    return mutate()


def statements(system):
    """Everything that a model might write, and more; the paths are those of a world at ``NOWHERE``."""
    corpus = [each.sql for each in World(Path(NOWHERE), system).read(CORPUS) if len(each.sql) < 4000]
    text = st.text(st.characters(exclude_categories=()), max_size=60)
    tokens = sorted({token for sql in corpus for token in TOKEN.findall(sql) if len(token) < 60})
    fragments = st.one_of(st.sampled_from(tokens), st.sampled_from(tokens), text)
    return st.one_of(
        calls(system),
        calls(system),
        selects(),
        mutations(st.sampled_from(corpus), fragments),
        mutations(selects(), fragments),
        text,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("executor_class", "num_statements"), [(SQLiteExecutor, 1500), (DuckDBExecutor, 1000)], ids=["sqlite", "duckdb"]
)
def test_whatever_is_written_comes_to_a_result_and_harms_nothing(executor_class, num_statements, tmp_path):
    world = make_world(tmp_path, executor_class.system.lower())
    before = marks(tmp_path)
    statuses = Counter()
    with closing(executor_class(num_workers=1, timeout_seconds=TIMEOUT, cache_mb=0)) as executor:

        @settings(
            max_examples=num_statements,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(statements(world.system))
        def play(sql):
            for _ in range(NUM_TRIES):
                result = executor.execute(world.database, sql.replace(NOWHERE, str(tmp_path)))
                statuses[result.status] += 1
                assert result.status in ("ok", "error", "denied", "timeout", "limit"), result
                if result.seconds < TIMEOUT + GRACE:
                    break
            assert result.seconds < TIMEOUT + GRACE
            if statuses.total() % HEALTH_EVERY == 0:
                tries = [executor.execute(world.database, HEALTH) for _ in range(3)]
                sound = [each for each in tries if each.status != "timeout"]  # on a busy machine that time is short
                assert {each.rows for each in sound} == {HEALTHY}

        play()
    print(dict(statuses))
    assert statuses.total() >= num_statements
    assert marks(tmp_path) == before
