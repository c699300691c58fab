import gc
import os
import socket
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hostile.corpus import CANARY, HEALTH, HEALTHY, World, make_world, marks

from lit_stepwise.text2sql.executors import DuckDBExecutor, SQLiteExecutor

OURS = Path(__file__).with_name("hostile") / "corpus.jsonl"
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "hostile_sql.jsonl"
EXECUTORS = {"sqlite": SQLiteExecutor, "duckdb": DuckDBExecutor}
TIMEOUT = 1.0
GRACE = 1.0  # beyond the timeout, for a statement that has to be killed
REAP = 1.0  # for the machine to take back the memory of a worker that was killed
START = 3.0  # for a worker to come up while all processors are busy
NUM_TRIES = 3
NUM_LANES = 2
CORPORA = [
    pytest.param((system, corpus), id=f"{system}-{name}", marks=[] if corpus.exists() else pytest.mark.skip("not here"))
    for system in EXECUTORS
    for name, corpus in (("ours", OURS), ("shared", SHARED))
]


@dataclass
class Record:
    """What was seen while a corpus ran, by the name of the statement."""

    world: World
    executors: list
    num_statements: int = 0
    statuses: Counter = field(default_factory=Counter)
    wrong: dict = field(default_factory=dict)
    told: dict = field(default_factory=dict)
    uncut: list = field(default_factory=list)
    sick: dict = field(default_factory=dict)
    late: dict = field(default_factory=dict)
    worker_mb: dict = field(default_factory=dict)
    parent_mb: list = field(default_factory=list)
    before: set = field(default_factory=set)
    after: set = field(default_factory=set)
    called: bool = False
    left: dict = field(default_factory=dict)

    def play(self, executor, statement):
        """Run one statement; again where a pause of the whole machine may be why it did not end as it must."""
        for _ in range(NUM_TRIES):
            for notes in (self.wrong, self.late, self.sick):
                notes.pop(statement.name, None)
            status = self.play_once(executor, statement)
            if statement.name not in {**self.wrong, **self.late, **self.sick}:
                break
        self.statuses[status] += 1

    def play_once(self, executor, statement):
        """Run it and the health query, note what is not as it must be, and return its status."""
        before = executor.stats()
        start = time.monotonic()
        result = executor.execute(self.world.database, statement.sql)
        seconds = time.monotonic() - start
        done = {name: value - before[name] for name, value in executor.stats().items()}
        allowed = TIMEOUT + GRACE + REAP * done["kills"]
        if result.status not in statement.must:
            self.wrong[statement.name] = (result.status, result.error)
        if statement.must_truncate and result.status == "ok" and not result.truncated:
            self.uncut.append(statement.name)
        shown = f"{result.columns} {result.rows} {result.error}"
        if told := [text for text in statement.forbidden if text in shown]:
            self.told[statement.name] = told
        if result.seconds > allowed or seconds > allowed * (1 + done["crashes"]) + START * done["starts"]:
            self.late[statement.name] = (result.seconds, seconds, done)
        health = executor.execute(self.world.database, HEALTH)
        if health.rows != HEALTHY:
            self.sick[statement.name] = health
        return result.status


@pytest.fixture(scope="module", params=CORPORA)
def record(request, tmp_path_factory):
    system, corpus = request.param
    world = make_world(tmp_path_factory.mktemp("a world"), system)
    executors = [EXECUTORS[system](num_workers=1, timeout_seconds=TIMEOUT, cache_mb=0) for _ in range(NUM_LANES)]
    record = Record(world, executors, before=marks(world.root))
    before = belongings()
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as server:
        patch.setenv("LIT_STEPWISE_CANARY", CANARY)
        patch.chdir(world.out)
        statements = world.read(corpus, server.getsockname()[1])
        record.num_statements = len(statements)
        run(record, statements)
        server.settimeout(0)
        try:
            server.accept()[0].close()
            record.called = True
        except BlockingIOError:  # nobody did
            pass
    record.after = marks(world.root)
    gc.collect()
    record.left = {name: (there, before[name]) for name, there in belongings().items() if there != before[name]}
    return record


def run(record, statements):
    """Play the statements on as many executors as there are lanes, while memory is watched."""
    ended = threading.Event()
    watch = threading.Thread(target=watch_memory, args=(record, ended))

    def lane(number):
        for statement in statements[number::NUM_LANES]:
            record.play(record.executors[number], statement)

    watch.start()
    try:
        with ThreadPoolExecutor(NUM_LANES) as lanes:
            list(lanes.map(lane, range(NUM_LANES)))
    finally:
        ended.set()
        watch.join()
        for executor in record.executors:
            executor.close()


def watch_memory(record, ended):
    while not ended.wait(0.02):
        record.parent_mb.append(megabytes(os.getpid(), "VmRSS"))
        for pid in filter(is_a_program_of_its_own, children()):
            record.worker_mb[pid] = max(record.worker_mb.get(pid, 0), megabytes(pid, "VmHWM"))


def is_a_program_of_its_own(pid):
    """Between fork and exec a child holds, and shows, the memory of these tests."""
    with suppress(OSError):  # it has just ended
        return Path(f"/proc/{pid}/cmdline").read_bytes() != Path("/proc/self/cmdline").read_bytes()
    return False


def megabytes(pid, name):
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), 0)


def children():
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return sorted(found)


def belongings():
    """What a process can leave behind, on the machine and in its parent."""
    temporary = Path(tempfile.gettempdir()).iterdir()
    return {
        "processes": children(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd)),
        "top": sorted(os.listdir("/")),
        "home": sorted(path.name for path in Path.home().glob(".duckdb*")),
        "temporary": sorted(path.name for path in temporary if any(part in path.name for part in ("duckdb", "etilqs"))),
    }


def is_open(fd):
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize("system", EXECUTORS)
def test_the_corpus_is_large_and_every_line_is_a_statement_of_its_own(system, tmp_path):
    world = World(tmp_path, system)
    statements = world.read(OURS)
    assert len(statements) >= 90
    assert len({statement.name for statement in statements}) == len(statements)
    assert len({statement.sql for statement in statements}) == len(statements)
    for statement in statements:
        assert statement.must, statement.name
        assert statement.must <= {"ok", "error", "denied", "timeout", "limit"}, statement.name
        assert not any(place in statement.sql for place in ("_DIR}", "{ROOT", "{PORT", "#0", "#1", "{1}", "{2}"))
    if SHARED.exists():
        assert not {statement.sql for statement in statements} & {other.sql for other in world.read(SHARED)}


@pytest.mark.slow
class TestWhateverAModelWrites:
    def test_every_statement_ends_as_it_must(self, record):
        assert record.statuses.total() == record.num_statements > 50
        assert record.wrong == {}
        assert record.uncut == []

    def test_nothing_that_is_not_in_the_database_is_told(self, record):
        assert record.told == {}

    def test_the_next_statement_gets_its_right_answer(self, record):
        assert record.sick == {}

    def test_nothing_takes_longer_than_its_time(self, record):
        assert record.late == {}

    def test_no_byte_time_or_name_of_any_file_changes(self, record):
        assert record.after ^ record.before == set()

    def test_nobody_calls_over_the_network(self, record):
        assert not record.called

    def test_no_worker_holds_more_memory_than_its_share(self, record):
        assert max(record.worker_mb.values()) < record.executors[0].memory_mb

    def test_the_parent_holds_no_more_memory_than_before(self, record):
        assert max(record.parent_mb) - record.parent_mb[0] < 64

    def test_no_process_thread_or_file_is_left(self, record):
        assert record.left == {}
