import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_stepwise.text2sql import result_cache
from lit_stepwise.text2sql.result_cache import ContentHashes, ResultCache
from lit_stepwise.types import QueryResult
from tests.waiting import wait_until

OK = QueryResult("ok", ("a", "b"), ((1, 2), (3, 4), (5, 6)))
WEIGHT = 2000 + 3 * 64 + 6 * 40  # of its objects


def test_a_result_that_is_kept_comes_back_itself():
    cache = ResultCache(10_000)
    assert cache.get("key") is None
    assert cache.get_or_run("key", lambda: (OK, 10)) == (OK, False)
    assert cache.get("key") is OK
    assert cache.get_or_run("key", None) == (OK, True)
    assert cache.get("other") is None
    cache.clear()
    assert cache.get("key") is None


@pytest.mark.parametrize(
    ("status", "kept"),
    [("ok", True), ("error", True), ("denied", True), ("timeout", False), ("limit", False), ("infra", False)],
)
def test_only_what_would_come_out_again_is_kept(status, kept):
    cache = ResultCache(10_000)
    cache.get_or_run("key", lambda: (QueryResult(status), 0))
    assert (cache.get("key") is not None) is kept
    assert cache.get_or_run("key", lambda: (QueryResult(status), 0)) == (QueryResult(status), kept)


def test_a_result_without_a_size_is_not_kept():
    cache = ResultCache(10_000)
    assert cache.get_or_run("key", lambda: (OK, None)) == (OK, False)
    assert cache.get("key") is None


def test_the_results_used_last_are_kept_within_the_bytes():
    cache = ResultCache(2 * WEIGHT + 30)
    cache.get_or_run("a", lambda: (OK, 10))
    cache.get_or_run("b", lambda: (OK, 20))
    assert cache.get("a") is OK
    cache.get_or_run("c", lambda: (OK, 20))  # a and c take exactly what there is
    assert [cache.get(key) for key in "abc"] == [OK, None, OK]
    cache.get_or_run("d", lambda: (OK, 21))
    assert [cache.get(key) for key in "acd"] == [None, None, OK]


def test_a_result_larger_than_all_is_not_kept_and_frees_what_it_took():
    cache = ResultCache(WEIGHT + 10)
    cache.get_or_run("large", lambda: (OK, 11))
    cache.get_or_run("small", lambda: (OK, 10))
    assert [cache.get(key) for key in ("large", "small")] == [None, OK]
    cache.clear()
    cache.get_or_run("again", lambda: (OK, 10))
    assert cache.get("again") is OK


class Runs:
    """Counts how often it is called, and holds the first call up until it is let go."""

    def __init__(self, *outcomes):
        self.outcomes = outcomes
        self.num_calls = 0
        self.first_may_end = threading.Event()

    def __call__(self):
        self.num_calls += 1
        number = self.num_calls
        if number == 1:
            assert self.first_may_end.wait(60)
        outcome = self.outcomes[min(number, len(self.outcomes)) - 1]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome, 0


def ask_at_once(cache, runs, number):
    with ThreadPoolExecutor(number) as threads:
        asked = [threads.submit(cache.get_or_run, "key", runs) for _ in range(number)]
        wait_until(lambda: runs.num_calls)
        time.sleep(0.3)  # for the others to wait
        assert runs.num_calls == 1
        runs.first_may_end.set()
        return [one.exception() or one.result() for one in asked]


@pytest.mark.parametrize("status", ["ok", "error", "timeout"])
def test_who_asks_while_it_runs_waits_for_it(status):
    runs = Runs(QueryResult(status, error="of the first"), QueryResult("ok", error="of another"))
    answers = ask_at_once(ResultCache(10_000), runs, 8)
    assert runs.num_calls == 1
    assert {result.error for result, _ in answers} == {"of the first"}
    assert sorted(hit for _, hit in answers) == [False] + [True] * 7


@pytest.mark.parametrize("fault", [QueryResult("infra"), KeyError("fault"), KeyboardInterrupt()])
def test_who_waited_for_a_fault_of_ours_runs_it_himself(fault):
    cache = ResultCache(10_000)
    runs = Runs(fault, OK)
    answers = ask_at_once(cache, runs, 4)
    assert runs.num_calls == 4
    assert answers.count((OK, False)) == 3
    assert cache.get_or_run("key", lambda: (OK, 0)) == (OK, False)  # nobody waits for ever


def test_other_keys_do_not_wait():
    cache = ResultCache(10_000)
    runs = Runs(OK)
    with ThreadPoolExecutor(1) as threads:
        held_up = threads.submit(cache.get_or_run, "key", runs)
        wait_until(lambda: runs.num_calls)
        assert cache.get_or_run("other", lambda: (OK, 0)) == (OK, False)
        assert not held_up.done()
        runs.first_may_end.set()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "pets.sqlite"
    path.write_bytes(b"cats")
    return str(path)


@pytest.fixture
def num_reads(monkeypatch):
    reads, real = [], hashlib.file_digest

    def file_digest(file, name):
        reads.append(file.name)
        time.sleep(0.02)  # for other threads to come
        return real(file, name)

    monkeypatch.setattr(result_cache.hashlib, "file_digest", file_digest)
    return lambda: len(reads)


def test_a_file_is_read_once_until_it_changes(path, num_reads):
    hashes = ContentHashes(())
    assert hashes.of(path) == hashes.of(path) == hashlib.sha256(b"cats").digest()
    assert num_reads() == 1
    Path(path).write_bytes(b"dogs and")
    assert hashes.of(path) == hashlib.sha256(b"dogs and").digest()
    os.utime(path, ns=(1, 1))
    assert hashes.of(path) == hashlib.sha256(b"dogs and").digest()
    assert num_reads() == 3


def test_many_threads_read_a_file_once(path, num_reads):
    hashes = ContentHashes(())
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(hashes.of, [path] * 50)) == {hashlib.sha256(b"cats").digest()}
    assert num_reads() == 1


def test_a_file_with_a_journal_has_no_contents_of_its_own(path):
    hashes = ContentHashes(("-wal", "-journal"))
    Path(f"{path}-wal").touch()
    assert hashes.of(path) == hashlib.sha256(b"cats").digest()
    Path(f"{path}-journal").write_bytes(b"x")
    assert hashes.of(path) is None
    assert ContentHashes(("-wal",)).of(path) is not None


def test_a_file_that_changes_while_it_is_read_has_no_contents_yet(path, monkeypatch):
    real = hashlib.file_digest

    def file_digest(file, name):
        found = real(file, name)
        os.utime(path, ns=(1, 1))
        return found

    hashes = ContentHashes(())
    monkeypatch.setattr(result_cache.hashlib, "file_digest", file_digest)
    assert hashes.of(path) is None
    assert hashes.of(path) is not None


@pytest.mark.parametrize("name", ["none.sqlite", "", "a\0b"])
def test_what_cannot_be_read_has_no_contents(path, name):
    assert ContentHashes(()).of(path.replace("pets.sqlite", name)) is None
