"""The command line as a person meets it: what helps, and what is said when something is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_stepwise import cli
from lit_stepwise.store.read import open_run


def test_help_lists_the_commands_and_unknown_ones_get_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ("fit", "validate", "test", "predict", "play", "warmup"))
    assert cli.main(["valdate"]) == 2
    assert "unknown command 'valdate'; did you mean 'validate'?" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lit-stepwise 0.")


@pytest.mark.slow
def test_the_help_of_fit_explains_the_settings_in_their_own_words(run: Any) -> None:
    text = " ".join(run("fit", None, "--help").stdout.split())
    assert "--rollout.samples_per_task" in text
    assert "attempts at each task in an iteration; their mean is the baseline" in text
    assert "Nucleus mass; below 1 the sampled distribution is cut" in text


WRONG = {
    "a misspelt option": (["--data.val_file", "x"], "did you mean data.val_files?"),
    "a misspelt option of a class": (["--model.loss.dul", "3"], "Option 'dul' is not accepted; did you mean dual?"),
    "an abbreviation": (["--trainer.max_epoch", "3"], "did you mean trainer.max_epochs?"),
    "an unknown engine": (
        ["--rollout.engine", "Foo"],
        "rollout.engine.* Foo; use one of .*lit_stepwise.engines.VLLMEngine",
    ),
    "an unknown loss": (
        ["--model.loss", "lit_stepwise.algo.DualClp"],
        "model.loss.*DualClp.*use one of .*lit_stepwise.algo.DualClip,",
    ),
    "an unknown executor": (
        ["--rollout.environment", "lit_stepwise.text2sql.Text2SQL", "--rollout.environment.executor", "Foo"],
        "executor.* Foo; use one of lit_stepwise.text2sql.DuckDBExecutor, lit_stepwise.text2sql.SQLiteExecutor, or",
    ),
    "an unknown reward": (
        ["--rollout.environment", "lit_stepwise.text2sql.Text2SQL", "--rollout.environment.rewards.x", "Foo"],
        "rewards.* Foo.*; use one of .*lit_stepwise.text2sql.ProgressReward",
    ),
    "an unknown match": (
        ["--rollout.environment", "lit_stepwise.text2sql.Text2SQL", "--rollout.environment.match", "foo"],
        r"match.*'permuted', 'cover'\]. Got value: foo$",
    ),
    "credit by states without states": (
        ["--rollout.advantage", "GiGPO"],
        "rollout.advantage=GiGPO .*rollout.environment=Countdown offers no state keys; use e.g. TurnReturn",
    ),
    "one sample a task": (["--rollout.samples_per_task", "1"], "rollout.samples_per_task=1 .*; use 2 or more"),
    "no room in the context": (
        ["--rollout.limits.max_prompt_tokens", "999"],
        "rollout.limits.max_prompt_tokens=999 leaves no room .*raise max_context_tokens",
    ),
    "a prompt over budget": (
        ["--rollout.limits.max_prompt_tokens", "20"],
        r"rollout.limits.max_prompt_tokens=20, but the first prompts of 8 of 8 tasks .*raise it to \d\d",
    ),
    "greedy training": (
        ["--rollout.sampling.temperature", "0"],
        r"rollout.sampling.temperature=0.* never explores; use e.g. 1.0",
    ),
    "a model that is not there": (
        ["--model.model_path", "/none"],
        "model.model_path='/none' is no folder.*give a folder",
    ),
    "a file without tasks": (["--data.train_files", "0"], "data.train_files=.*holds no task"),
    "a checkpoint that is not there": (
        ["--ckpt_path", "no.ckpt"],
        "ckpt_path='no.ckpt' does not exist; give a checkpoint",
    ),
    "too many mini-batches": (["--data.mini_batches", "3"], "data.mini_batches=3 .*use at most that many"),
    "a deadline that has run out": (
        ["--rollout.deadlines.turn_seconds", "0"],
        "rollout.deadlines.turn_seconds=0.* has run out at once; use null for no deadline",
    ),
    "play ahead in a fixed order": (["--rollout.staleness", "1"], "staleness=1 .* use deterministic: false, or"),
    "a wrong value of an optional class": (
        ["--model.correction.token_cap", "0.5"],
        "correction.token_cap=0.5 is below 1",
    ),
    "more context than the model has": (
        ["--rollout.limits.max_context_tokens", "5000"],
        "rollout.limits.max_context_tokens=5000 is more than the 2048 .*; use 2048 or less",
    ),
    "an engine over more ranks than there are": (
        ["--rollout.engine", "VLLMEngine", "--rollout.engine.tensor_parallel_size", "2"],
        "rollout.engine.tensor_parallel_size=2 does not divide the 1 ranks of the trainer; use one of 1,",
    ),
    "GPUs that are not there": (
        ["--trainer.accelerator", "gpu", "--trainer.devices", "16"],
        "trainer.accelerator=gpu, trainer.devices=16, .*change what does not fit this machine",
    ),
    "one batch again and again": (
        ["--trainer.overfit_batches", "1"],
        "trainer.overfit_batches=1 would leave step samples .*lower data.tasks_per_iteration",
    ),
    "gradients added up by Lightning": (
        ["--trainer.accumulate_grad_batches", "4"],
        "trainer.accumulate_grad_batches=4 has nothing to add: .*use model.max_tokens_per_micro_batch",
    ),
    "gradients added up by a callback": (
        [
            "--trainer.callbacks+=lightning.pytorch.callbacks.GradientAccumulationScheduler",
            "--trainer.callbacks.scheduling",
            "{1: 3}",
        ],
        "error: GradientAccumulationScheduler has nothing to add",
    ),
    "a folder below a file": (
        ["--trainer.default_root_dir", f"{__file__}/runs"],
        rf"trainer.default_root_dir={__file__}/runs cannot be written, since {__file__} is no folder that may be",
    ),
    "no interval of validation": (
        ["--trainer.check_val_every_n_epoch", "0"],
        "trainer.check_val_every_n_epoch=0 is no interval; use 1 or more, or trainer.limit_val_batches=0",
    ),
    "gradients turned around": (
        ["--model.max_grad_norm", "-0.5"],
        "model.max_grad_norm=-0.5 would turn every gradient around; use e.g. 1.0, or 0",
    ),
    "an optimizer that refuses": (
        ["--model.optimizer.lr", "-0.25"],
        "model.optimizer: Invalid learning rate: -0.25; see",
    ),
    "an evaluation below zero": (
        ["--rollout.evaluation.temperature", "-0.5"],
        "rollout.evaluation.temperature=-0.5 is negative",
    ),
    "fewer samples than none": (
        ["--rollout.evaluation.samples_per_task", "-3"],
        "rollout.evaluation.samples_per_task=-3 is negative; 0 plays greedily alone",
    ),
    "gradients clipped by Lightning": (
        ["--trainer.gradient_clip_val", "0.75"],
        "trainer.gradient_clip_val=0.75 .*use model.max_grad_norm=0.75",
    ),
    "settings that exclude each other": (
        ["--trainer.barebones", "true"],
        r"error: the Trainer does not take these settings: `Trainer\(barebones=True",
    ),
    "more precision than an engine has": (["--trainer.precision", "64-true"], "precision=64-true .*use 32-true"),
    "several machines and no launcher": (
        ["--trainer.num_nodes", "2"],
        "trainer.num_nodes=2, but nothing says which .* this is.*torchrun --nnodes 2 .*--nproc_per_node 1.*srun",
    ),
    "a server that is down": (
        ["--rollout.engine", "VLLMServerEngine", "--rollout.engine.urls", "[http://127.0.0.1:9]"],
        "http://127.0.0.1:9.*lit-stepwise serve",
    ),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line_that_names_it_and_the_way_out(
    words: list[str], message: str, countdown: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    code, stderr = main("fit", countdown, *words)
    assert code in (1, 2)
    assert "Traceback" not in stderr
    (said,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert re.search(message, said), said
    assert not list(tmp_path.glob("runs/**/*.ckpt"))


def test_no_checkpoint_is_written_where_none_is_wanted(countdown: dict[str, Any], main: Any, tmp_path: Path) -> None:
    """Though the configuration has a ModelCheckpoint."""
    code, stderr = main("fit", countdown, "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", "1")
    assert code == 0, stderr
    assert list(tmp_path.glob("runs/**/*.parquet"))
    assert not list(tmp_path.glob("runs/**/*.ckpt"))


def test_a_model_without_its_tokenizer_is_refused(
    countdown: dict[str, Any], tiny_model: Path, main: Any, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    code, stderr = main("fit", countdown, "--model.model_path", "mute")
    assert code == 1
    assert "error: model.model_path='mute' holds no tokenizer; give a folder with a Hugging Face model" in stderr


def test_a_job_of_slurm_that_does_not_fit_the_trainer_is_refused(
    countdown: dict[str, Any], main: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"JOB_ID": "1", "JOB_NAME": "test", "NTASKS": "4", "NTASKS_PER_NODE": "4", "NNODES": "1", "PROCID": "0"}
    for name, value in {**job, "NODEID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    code, stderr = main("fit", countdown)
    assert code == 1
    assert "error: srun started 4 processes, but trainer.num_nodes=1 times trainer.devices=1 are 1;" in stderr
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    code, stderr = main("fit", countdown, "--trainer.devices", "4")
    assert code == 1
    assert "HINT: Use `--ntasks-per-node=4` instead" in stderr


def test_a_misspelt_key_in_a_file_names_the_right_one(countdown: dict[str, Any], main: Any) -> None:
    countdown["rollout"]["sample_per_task"] = countdown["rollout"].pop("samples_per_task")
    code, stderr = main("fit", countdown)
    assert code == 2
    assert "'rollout.sample_per_task'; did you mean rollout.samples_per_task?" in stderr


@pytest.mark.slow
def test_the_console_script_ends_with_the_same_code_and_line(countdown: dict[str, Any], run: Any) -> None:
    done = run("fit", countdown, "--data.passes", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: data.passes=0; use 1 or more"


@pytest.mark.slow
def test_a_second_config_and_dotted_words_override_the_first(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump({"rollout": {"limits": {"max_turns": 2}}, "trainer": {"max_epochs": 7}}))
    done = run("fit", countdown, "--config", str(second), "--trainer.max_epochs", "9", "--print_config")
    printed = yaml.safe_load(done.stdout)
    assert (printed["rollout"]["limits"]["max_turns"], printed["trainer"]["max_epochs"]) == (2, 9)
    assert printed["rollout"]["limits"]["max_new_tokens"] == 8


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    from lit_stepwise.testing import save_tiny_model

    assert run("fit", countdown, "--trainer.max_epochs", "1").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*.ckpt")}
    other = save_tiny_model(tmp_path / "other", num_layers=1)
    done = run("fit", countdown, "--ckpt_path", "last", "--model.model_path", str(other))
    assert done.returncode == 1
    assert "error: ckpt_path holds another architecture than model.model_path=" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/**/*.ckpt")} == before


@pytest.mark.slow
def test_every_command_that_plays_runs_from_the_checkpoint_of_a_fit(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    assert run("fit", countdown, "--trainer.max_epochs", "1").returncode == 0
    for command in ("validate", "test", "predict"):
        done = run(command, countdown, "--ckpt_path", "last")
        assert done.returncode == 0, done.stderr
        assert "ckpt_path=last: resuming from runs/version_0/checkpoints/last.ckpt" in done.stderr
        if command != "predict":  # Lightning's own table
            assert all(
                word in done.stdout for word in ("accuracy", "reward", "step", f"{2.0}", "files     runs/version_")
            )
    for number in (1, 2, 3):
        evaluated = open_run(tmp_path / f"runs/version_{number}")
        assert evaluated.execute("select distinct policy_version from turns").fetchall() == [(2,)]
        assert evaluated.execute("select distinct step from metrics").fetchall() == [(2,)]
    for _ in range(2):
        done = run("play", countdown, "--split", "test", "--samples_per_task", "3", "--output", "played")
        assert done.returncode == 0, done.stderr
    assert "played 6 trajectories of 2 tasks" in done.stderr
    played = open_run(tmp_path / "played-2")  # the first play was not written over
    samples = played.execute("select sample from trajectories order by group_id, sample").fetchall()
    assert samples == [(0,), (1,), (2,), (0,), (1,), (2,)]


@pytest.mark.slow
def test_play_takes_the_weights_of_a_checkpoint_be_it_a_file_or_a_folder_of_shards(
    countdown: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    countdown["model"]["optimizer"]["init_args"]["lr"] = 0.05  # so that other weights say something else
    for strategy in ("auto", "fsdp2"):
        words = ["--trainer.strategy", strategy, "--trainer.default_root_dir", strategy]
        fitted = run("fit", countdown, "--trainer.max_epochs", "1", *words)
        assert fitted.returncode == 0, fitted.stderr
        assert next(tmp_path.glob(f"{strategy}/**/last.ckpt")).is_dir() == (strategy == "fsdp2")
        played = run("play", countdown, *words, "--output", f"played-{strategy}", "--ckpt_path", "last")
        assert played.returncode == 0, played.stderr
    assert run("play", countdown, "--output", "played-untrained").returncode == 0
    query = "select policy_version, prompt_ids, response_ids from turns order by group_id, sample, turn"
    of_file, of_shards, untrained = (
        open_run(tmp_path / f"played-{name}").execute(query).fetchall() for name in ("auto", "fsdp2", "untrained")
    )
    assert of_file == of_shards
    assert {version for version, *_ in of_file} == {2}
    assert {version for version, *_ in untrained} == {0}
    assert [ids for _, *ids in of_file] != [ids for _, *ids in untrained]
