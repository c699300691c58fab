"""What reaches the disk, and what of it survives a crash."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from by_hand import BAD, EASY, GOOD, LOST, learn, row, train

from lit_stepwise.errors import ConfigError
from lit_stepwise.rollout.samples import joined
from lit_stepwise.store.read import open_run, rows_of
from lit_stepwise.store.schema import LEARNT, TURNS
from lit_stepwise.store.settings import Storage
from lit_stepwise.store.write import StoredPhase
from lit_stepwise.types import Feedback, MiniBatch, StepSample, StopReason, Trajectory, Turn, VersionSpan


def turns(folder: Path, where: str = "true") -> list[dict[str, Any]]:
    return rows_of(open_run(folder), f"select * from turns where {where} order by iteration, group_id, sample, turn")


def test_a_turn_comes_back_as_it_was_played(make_store: Any) -> None:
    store = make_store()
    train(store, 3)
    first, second, *_ = turns(store.folder)
    assert first == {
        "run": "version_0", "phase": "train-000003", "stage": "train", "iteration": 3, "policy_version": 11,
        "versions": [{"policy_version": 12, "num_tokens": 1}, {"policy_version": 11, "num_tokens": 1}],
        "task_id": "a", "group_id": 0, "sample": 0, "turn": 0, "num_turns": 2,
        "prompt": "prompt of 3", "response": "said 10", "observation": "saw 10",
        "prompt_ids": [10, 11, 12], "response_ids": [13, 14], "rollout_logprobs": [-0.5, -0.25],
        "rewards": {"format": 0.25, "outcome": 0.75}, "reward": 1.0, "return": 3.0, "advantage": 0.1,
        "token_advantages": None, "success": True, "format_error": False, "finish_reason": "stop",
        "stop_reason": "done", "failure": "", "sql": "select 10", "status": "ok",
        "details": '{"sql": "select 10", "status": "ok", "rows": 20}',
        "num_prompt_tokens": 3, "num_response_tokens": 2, "num_cached_tokens": 1,
        "engine_seconds": 1.5, "environment_seconds": 0.125, "temperature": 0.75,
        "trained": True, "left_out": None,
        "trained_at": None, "trainer_logprobs": None, "logprob_gap": None, "logprob_gap_max": None,
    }  # fmt: skip
    assert (second["turn"], second["prompt"], second["return"]) == (1, None, 2.0)


def test_the_files_have_the_columns_of_the_schema(make_store: Any) -> None:
    store = make_store()
    train(store, 0)
    learn(store, 0, 7, [-1.0, -1.0])
    for name, columns in (("train-000000", TURNS), ("learnt-000000-000007", LEARNT)):
        file = pyarrow.parquet.ParquetFile(store.folder / f"{name}.parquet")
        assert file.schema_arrow.names == [column.name for column in columns]


def test_only_what_may_rule_a_file_out_has_statistics_and_only_texts_are_lz4(make_store: Any) -> None:
    store = make_store()
    train(store, 0)
    row_group = pyarrow.parquet.read_metadata(store.folder / "train-000000.parquet").row_group(0)
    leaves = {(leaf := row_group.column(i)).path_in_schema: leaf for i in range(row_group.num_columns)}
    found = {name: (leaf.compression, leaf.has_dictionary_page, leaf.is_stats_set) for name, leaf in leaves.items()}
    assert found["phase"] == found["iteration"] == found["advantage"] == ("ZSTD", True, True)
    assert found["prompt"] == found["response"] == found["sql"] == found["details"] == ("LZ4", True, False)
    lists = {name: each for name, each in found.items() if "." in name}
    assert set(lists.values()) == {("ZSTD", False, False)}
    assert {name.split(".")[0] for name in lists} == {
        "versions", "prompt_ids", "response_ids", "rollout_logprobs", "rewards", "token_advantages"
    }  # fmt: skip


def test_a_prompt_that_holds_the_one_before_it_takes_little_more(make_store: Any) -> None:
    draw = random.Random(3)
    sampled, prompts = [0], [[draw.randrange(150_000) for _ in range(4_000)]]
    for _ in range(5):
        prompts.append([*prompts[-1], *(draw.randrange(150_000) for _ in range(100))])

    def size(number: int, prompts: list[list[int]]) -> int:
        turns = [Turn(prompt, sampled, [-0.5], [VersionSpan(0, 1)], "", Feedback("")) for prompt in prompts]
        store = make_store(number)
        return int(train(store, 0, [Trajectory("a", 0, 0, turns, StopReason.DONE)]).stat().st_size)

    assert size(1, prompts) < 1.25 * size(0, prompts[-1:])  # they are 5.6 times as many tokens


def test_it_says_why_a_trajectory_is_not_trained_even_if_it_has_no_turn(make_store: Any) -> None:
    store = make_store()
    train(store, 0)
    query = "select task_id, sample, num_turns, trained, left_out, failure from trajectories order by group_id, sample"
    assert open_run(store.folder).execute(query).fetchall() == [
        ("a", 0, 2, True, None, ""),
        ("a", 1, 1, True, None, ""),
        ("b", 0, 0, False, "failed", "disk full"),
        ("b", 1, 1, False, "uniform", ""),
    ]
    assert len(turns(store.folder)) == 4


def test_the_trainers_logprobs_are_those_of_the_first_time_a_turn_was_trained(make_store: Any) -> None:
    store = make_store()
    train(store, 0)
    learn(store, 0, 8, [-3.5, -3.25], pass_index=1)
    learn(store, 0, 7, [-0.5, -0.75])
    (found,) = turns(store.folder, "trained_at is not null")
    assert (found["sample"], found["turn"], found["trained_at"]) == (0, 0, 7)
    assert found["trainer_logprobs"] == [-0.5, -0.75]
    assert (found["logprob_gap"], found["logprob_gap_max"]) == (0.25, 0.5)


def test_a_row_of_all_turns_is_parted_into_them(make_store: Any) -> None:
    first, second = row(GOOD, 0), row(GOOD, 1)
    (whole,) = joined([first, _following(first, second)])
    assert len(whole.response_ids) == 2 + 1 + 2
    store = make_store()
    train(store, 0)
    store.learn(MiniBatch([whole], 0, 0), {0: [-0.5, -0.5, -1.5, -2.25]}, 7)
    found = turns(store.folder, "trained_at is not null")
    assert [(each["turn"], each["trainer_logprobs"], each["logprob_gap"]) for each in found] == [
        (0, [-0.5, -0.5], 0.125),
        (1, [-1.5, -2.25], 1.5),
    ]


def _following(first: StepSample, second: StepSample) -> StepSample:
    return replace(second, prompt_ids=[*first.prompt_ids, *first.response_ids, 99])


def test_infinite_logprobs_leave_the_gap_to_the_others(make_store: Any) -> None:
    store = make_store()
    train(store, 0)
    learn(store, 0, 7, [float("-inf"), -0.75])
    (found,) = turns(store.folder, "trained_at is not null")
    assert (found["logprob_gap"], found["logprob_gap_max"]) == (0.5, 0.5)


def test_advantages_of_tokens_are_there_where_they_differ(make_store: Any) -> None:
    rewarded = Turn([1], [2, 3], [-0.1, -0.2], [VersionSpan(0, 2)], "x", Feedback(""), token_rewards=[0.5, 0.0])
    store = make_store()
    train(store, 0, [Trajectory("a", 0, 0, [rewarded], StopReason.DONE)])
    assert turns(store.folder)[0]["token_advantages"] == pytest.approx([0.6, 0.1])


def test_less_may_be_kept(make_store: Any) -> None:
    store = make_store(settings=Storage(token_ids=False, logprobs=False, max_text_chars=4))
    train(store, 0)
    learn(store, 0, 7, [-0.5, -0.75])
    first = turns(store.folder)[0]
    assert (first["prompt"], first["response"], first["observation"]) == ("prom", "said", "saw ")
    for name in ("prompt_ids", "response_ids", "rollout_logprobs", "trainer_logprobs"):
        assert first[name] is None
    assert (first["num_prompt_tokens"], first["logprob_gap"]) == (3, 0.25)


def test_beyond_its_room_the_oldest_iterations_go_with_what_was_learnt_from_them(make_store: Any) -> None:
    store = make_store(settings=Storage(max_gib=1e-9))
    store.write(StoredPhase("evaluate", 2, [EASY]))
    for iteration in (8, 9, 10):
        train(store, iteration)
        learn(store, iteration, 2 * iteration, [-0.5, -0.5])
    names = sorted(path.name for path in store.folder.glob("*.parquet"))
    assert names == ["evaluate-step000002.parquet", "learnt-000010-000020.parquet", "train-000010.parquet"]


@pytest.mark.parametrize(("name", "value"), [("max_text_chars", 0), ("max_gib", 0.0)])
def test_settings_that_leave_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.store\.{name}={value} .*null"):
        Storage(**{name: value})  # type: ignore[arg-type]


def test_half_a_character_is_no_reason_to_fail(make_store: Any) -> None:
    store = make_store()
    odd = Turn([1], [2], [-0.1], [VersionSpan(0, 1)], "a\ud800b", Feedback("", details={"sql": "\udfff"}))
    train(store, 0, [Trajectory("a", 0, 0, [odd], StopReason.DONE)])
    (found,) = turns(store.folder)
    assert (found["response"], found["sql"]) == ("a?b", "?")


def test_a_crash_while_writing_leaves_the_last_file_whole(make_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store()
    path = train(store, 0)
    before = path.read_bytes()

    def pull_the_plug(table: Any, file: Any, **_: Any) -> None:
        file.write(b"PAR1 and not much more")
        raise KeyboardInterrupt

    monkeypatch.setattr(pyarrow.parquet, "write_table", pull_the_plug)
    with pytest.raises(KeyboardInterrupt):
        train(store, 0, [BAD])
    with pytest.raises(KeyboardInterrupt):
        train(store, 1)
    assert path.read_bytes() == before
    assert [path.name for path in store.folder.glob("*.part")]
    assert len(turns(store.folder)) == 4
    monkeypatch.undo()
    train(store, 1)
    assert len(turns(store.folder)) == 8


def test_writing_is_timed(make_store: Any) -> None:
    store = make_store()
    train(store, 0)
    assert store.take_seconds() > 0
    assert store.take_seconds() == 0


def test_details_that_are_no_json_become_text(make_store: Any) -> None:
    store = make_store()
    played = Turn([1], [2], [-0.1], [VersionSpan(0, 1)], "x", Feedback("", details={"at": Path("/x")}))
    train(store, 0, [Trajectory("a", 0, 0, [played], StopReason.DONE), LOST])
    assert turns(store.folder)[0]["details"] == '{"at": "/x"}'
