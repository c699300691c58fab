"""What vLLM is told about the process it lives in."""

from __future__ import annotations

import pytest

from lit_stepwise.engines import vllm_process


@pytest.fixture
def fifth_of_eight(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """In a process of a launcher that says nothing itself."""
    monkeypatch.setattr(vllm_process.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(vllm_process.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(vllm_process.dist, "get_world_size", lambda: 8)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def environment() -> dict[str, str | None]:
    with vllm_process.undisturbed():
        vllm_process.set_environment(local=False)
        return {name: vllm_process.os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def test_a_process_of_slurm_has_the_number_that_slurm_gave_it_on_its_machine(
    fifth_of_eight: pytest.MonkeyPatch,
) -> None:
    fifth_of_eight.setenv("SLURM_LOCALID", "1")
    assert environment() == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}


def test_the_engine_is_on_the_gpu_that_the_trainer_has_chosen(fifth_of_eight: pytest.MonkeyPatch) -> None:
    fifth_of_eight.setenv("SLURM_LOCALID", "1")
    fifth_of_eight.setattr(vllm_process, "current_gpu", lambda: 0)  # SLURM may show each task one GPU alone
    assert environment()["LOCAL_RANK"] == "0"


def test_what_torchrun_says_stands(fifth_of_eight: pytest.MonkeyPatch) -> None:
    fifth_of_eight.setenv("LOCAL_RANK", "3")
    assert environment()["LOCAL_RANK"] == "3"


def test_without_a_word_all_ranks_are_on_one_machine(fifth_of_eight: pytest.MonkeyPatch) -> None:
    assert environment() == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5"}
