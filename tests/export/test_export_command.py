"""A checkpoint becomes a folder that others load, and says what the trainer would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_stepwise import cli
from lit_stepwise.export import folder
from lit_stepwise.testing import exact_logprobs

PROMPT, RESPONSE = [5, 6, 7, 31], [8, 9, 250]


def logprobs_in(path: Path) -> torch.Tensor:
    """[R] Of ``RESPONSE`` after ``PROMPT``, by the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return exact_logprobs(model.eval(), PROMPT, RESPONSE)[range(len(RESPONSE)), RESPONSE]


def test_help_lists_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "  export    make a Hugging Face folder of a checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["tiny_model", "qwen2"])
def test_transformers_gives_the_logprobs_of_the_trainer(
    model: str, request: pytest.FixtureRequest, make_run: Any, export: Any, tmp_path: Path
) -> None:
    run = make_run(request.getfixturevalue(model))
    code, said = export(run.checkpoint, tmp_path / "out", "--dtype", "float32")
    assert (code, said) == (0, f"wrote {tmp_path}/out: {run.module.model_path} after 6 optimizer steps, in float32\n")
    expected = run.module.score([(PROMPT, RESPONSE)])[0][0]
    torch.testing.assert_close(logprobs_in(tmp_path / "out"), expected, rtol=0, atol=1e-5)
    before = logprobs_in(Path(run.module.model_path))
    assert float((before - expected).abs().min()) > 0.01


def test_weights_have_the_names_of_hugging_face_and_a_tied_head_is_stored_once(
    tied_run: Any, tiny_model: Path, export: Any, tmp_path: Path
) -> None:
    export(tied_run.checkpoint, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == set(load_file(tiny_model / "model.safetensors"))
    assert "lm_head.weight" not in found
    expected = tied_run.weights()
    assert set(expected) == set(found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_other_files_are_those_of_the_base_model_byte_for_byte(
    tied_run: Any, tiny_model: Path, export: Any, tmp_path: Path
) -> None:
    export(tied_run.checkpoint, tmp_path / "out")
    names = {path.name for path in tiny_model.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"README.md"}
    for name in names - {"model.safetensors"}:
        assert json_or_text(tmp_path / "out" / name) == json_or_text(tiny_model / name)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "config.json").stat().st_mode
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def json_or_text(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def test_the_precision_is_that_of_the_base_model_unless_told_otherwise(
    qwen2: Path, make_run: Any, export: Any, tmp_path: Path
) -> None:
    run = make_run(qwen2)
    for words, dtype in ([], torch.bfloat16), (["--dtype", "float16"], torch.float16):
        output = tmp_path / str(dtype)
        code, said = export(run.checkpoint, output, *words)
        assert (code, said.strip().rpartition(" ")[2]) == (0, str(dtype).removeprefix("torch."))
        found = load_file(output / "model.safetensors")
        assert all(torch.equal(found[name], value.to(dtype)) for name, value in run.weights().items())
        config = json.loads((output / "config.json").read_text())
        assert (config["torch_dtype"], config.get("dtype")) == (str(dtype).removeprefix("torch."), None)
        assert AutoModelForCausalLM.from_pretrained(output).dtype == dtype


def test_a_base_model_that_does_not_say_is_served_in_float32(tied_run: Any, export: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tied_run.module.model_path, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    assert config.pop("dtype") == "float32"
    (base / "config.json").write_text(json.dumps(config))
    assert export(tied_run.checkpoint, tmp_path / "out", "--model_path", base)[1].endswith("in float32\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, "dtype": "float32"}


def test_a_base_model_of_the_hub_is_taken_from_the_cache(
    tied_run: Any, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "models--some--model"
    shutil.copytree(tied_run.module.model_path, cache / "snapshots" / ("5" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("5" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert export(tied_run.checkpoint, tmp_path / "out", "--model_path", "some/model")[0] == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "\nbase_model: some/model\n" in (tmp_path / "out" / "README.md").read_text()


def test_many_weights_go_into_several_files_and_an_index(
    tied_run: Any, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 150_000
    monkeypatch.setattr(folder, "MAX_SHARD_BYTES", limit)
    export(tied_run.checkpoint, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    shards = {file.name: load_file(file) for file in files}
    sizes = [sum(value.nbytes for value in shard.values()) for shard in shards.values()]
    assert max(sizes) <= limit
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == sum(v.nbytes for v in tied_run.weights().values())
    assert index["weight_map"] == {name: file for file, shard in shards.items() for name in shard}
    expected = tied_run.module.score([(PROMPT, RESPONSE)])[0][0]
    torch.testing.assert_close(logprobs_in(tmp_path / "out"), expected, rtol=0, atol=1e-5)


def test_experts_and_what_balances_them_are_written_as_they_are_published(
    make_run: Any, export: Any, tmp_path: Path, tiny_model: Path
) -> None:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 267}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    base = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **heads, **experts))
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    base.get_buffer(bias).copy_(torch.tensor([1.001, 2.002, 3.003, 4.004]))
    base.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((tiny_model / name).read_bytes())
    run = make_run(tmp_path / "base")
    assert export(run.checkpoint, tmp_path / "out", "--dtype", "bfloat16")[0] == 0
    run.module.policy.language_model.save_pretrained(tmp_path / "theirs")
    found, expected = (load_file(tmp_path / each / "model.safetensors") for each in ("out", "theirs"))
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in found
    assert set(found) == set(expected) == set(load_file(tmp_path / "base" / "model.safetensors"))
    for name, value in expected.items():
        assert torch.equal(found[name], value if name == bias else value.bfloat16()), name


def test_the_folder_is_a_model_path(
    tied_run: Any, export: Any, countdown: dict[str, Any], main: Any, tmp_path: Path
) -> None:
    export(tied_run.checkpoint, tmp_path / "out")
    countdown["model"]["model_path"] = str(tmp_path / "out")
    countdown["trainer"]["max_epochs"] = 1
    countdown["trainer"]["callbacks"] = []
    code, stderr = main("fit", countdown)
    assert code == 0, stderr
