"""Two processes that share a model are one: each strategy in the real Trainer, against one process that has it all."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lit_stepwise.algo import DualClip, KLPenalty
from lit_stepwise.algo.packing import collate
from lit_stepwise.testing import save_tiny_model
from lit_stepwise.training import FSDP2Strategy, FSDPStrategy, Lora, StepwiseModule, attention
from lit_stepwise.training.policy_model import PolicyModel
from lit_stepwise.training.sharding import plain_name
from lit_stepwise.types import Feedback, MiniBatch, StepSample, Turn, VersionSpan

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is spread over the ranks."""

    strategy: str
    what: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the strategy."""
    module: dict[str, Any] = field(default_factory=dict)
    """What the module is told besides."""
    model: str = ""
    """Its folder, if it is not the one of what is trained."""
    num_ranks: int = 2


TRAINED: dict[str, dict[str, Any]] = {
    "tree": {
        "kl": KLPenalty(coefficient=0.3, estimator="k2", place="loss"), "old_logprobs": "trainer",
        "entropy_bonus": 0.05, "activation_checkpointing": True,
    },
    "trajectory": {
        "kl": KLPenalty(coefficient=0.3, estimator="k1", place="reward"), "packing": "trajectory",
        "lora": Lora(rank=3, alpha=5), "activation_checkpointing": True,
    },
    "none": {"kl": KLPenalty(coefficient=0.3, estimator="k1", place="reward"), "packing": "none"},
}  # fmt: skip
MODELS = {"tree": "tied", "trajectory": "tied", "none": "untied"}
ONCE = {"reduce_every_micro_batch": False, "reshard_after_forward": False}
TOGETHER = {"tensor_parallel_size": 2}
OFFLOADED = {"offload_reference": True}
CASES = {
    **{f"{what}, {name}": Case(name, what) for name in ("ddp", "fsdp2", "fsdp") for what in TRAINED},
    "tree, fsdp2, reduced once": Case("fsdp2", "tree", ONCE),
    "trajectory, fsdp, reduced once": Case("fsdp", "trajectory", {"reduce_every_micro_batch": False}),
    "tree, fsdp2, on the CPU": Case("fsdp2", "tree", {"cpu_offload": True}),
    "none, fsdp2, reference on the CPU": Case("fsdp2", "none", module=OFFLOADED),
    "tree, fsdp2, layers together": Case("fsdp2", "tree", TOGETHER),
    "none, fsdp2, layers together": Case("fsdp2", "none", TOGETHER),
    "tree, fsdp2, layers together, reduced once, on the CPU": Case(
        "fsdp2", "tree", {**TOGETHER, **ONCE, "cpu_offload": True}
    ),
    "tree, fsdp2, layers together, twice": Case("fsdp2", "tree", TOGETHER, num_ranks=4),
    "tree, fsdp2, layers together, read whole": Case("fsdp2", "tree", TOGETHER, model="doubled"),
    "tree, fsdp2, read whole": Case("fsdp2", "tree", model="doubled"),
    "tree, fsdp, read whole": Case("fsdp", "tree", model="doubled"),
}
HALF = {name: Case(name, "tree", {"param_dtype": "bfloat16"}) for name in ("fsdp2", "fsdp")}


def samples(seed: int) -> list[StepSample]:
    """Turns of three attempts at two tasks, whose prompts share what came before."""
    generator, made = torch.Generator().manual_seed(seed), []

    def tokens(size: int) -> list[int]:
        return torch.randint(250, (size,), generator=generator).tolist()

    def drawn(size: int) -> list[float]:
        return torch.randn(size, generator=generator).tolist()

    for group in range(2):
        task = tokens(4 + group)
        for attempt in range(3):
            prompt = task
            for turn in range(1 + (attempt + group) % 3):
                response = tokens(2 + turn + attempt)
                size = len(response)
                rollout, advantages = [x - 5 for x in drawn(size)], drawn(size)
                of = (rollout, advantages, 0.0, group, attempt, turn, 0)
                made.append(StepSample(prompt, response, [True] * size, *of, temperature=0.7))
                prompt = [*prompt, *response, *tokens(2)]
    return made


MINI_BATCHES = [MiniBatch(samples(7), 0, 0), MiniBatch(samples(8), 0, 1), MiniBatch(samples(9)[:1], 0, 2)]
"""Of the last, one rank has nothing to do."""


class Reductions(TorchDispatchMode):
    """Counts what sums over ranks."""

    num: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += str(func).startswith("c10d.") and "reduce" in str(func)
        return func(*args, **(kwargs or {}))


class Observed(StepwiseModule):
    """Notes what there is to be seen on its rank."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.noted: dict[str, Any] = {"norms": [], "losses": [], "gradients": [], "reduced": [], "forwards": []}

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return batch

    def on_train_batch_start(self, batch: MiniBatch, batch_idx: int) -> None:
        if batch_idx == 0:
            self.noted["before"] = weights(self)
            self.noted["old"] = [x for each in self.with_old_logprobs(batch.samples) for x in each.old_logprobs]
            asked = [([1, 2], [3]), ([5, 6, 7], [8, 9])][-1 - self.global_rank % 2 :]  # not of all ranks the same
            self.noted["scored"] = [x for each in self.score(asked)[-1] for x in each.tolist()]
            self.noted["alone"] = alone(self.policy, batch.samples[0])
            self.noted["again"] = weights(self)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        (mlp,) = (each for name, each in self.policy.named_modules() if plain_name(name).endswith("layers.0.mlp"))  # type: ignore[union-attr]
        mlp.register_forward_pre_hook(lambda *_: self.noted["forwards"].append(torch.is_grad_enabled()))

    def manual_backward(self, loss: Tensor, *arguments: Any, **settings: Any) -> None:
        with Reductions() as reductions:
            super().manual_backward(loss, *arguments, **settings)
        self.noted["reduced"].append(reductions.num > 0)

    def _clip_gradients(self) -> Tensor:
        self.noted["gradients"].append(gradients(self.policy))
        norm = super()._clip_gradients()
        self.noted["norms"].append(float(norm))
        self.noted["clipped"] = float(sum(each.square().sum() for each in gradients(self.policy).values())) ** 0.5
        return norm

    def log_update(self, values: dict[str, float]) -> None:
        self.noted["losses"].append(self.update_metrics.result()["train/loss"])

    def on_train_end(self) -> None:
        assert self.policy is not None
        spans = [VersionSpan(0, 3)]
        turns = [Turn([3, 1, i], [5 + i, 9, 2], [-2.0, -1.0, -3.0], spans, "", Feedback("")) for i in range(3)]
        self.noted["penalties"] = self.reference_penalties(turns if self.global_rank == 0 else [], 0.7)
        self.noted["after"] = weights(self)
        self.noted["base"] = dict(self.weights(merged=False))
        self.noted["adapter"] = dict(self.adapter().weights) if self.lora else {}
        held = [*self.policy.parameters(), *(self.reference.model.parameters() if self.reference else ())]
        self.noted["held"] = sum(local(each).numel() for each in held)
        self.noted["types"] = {str(local(each).dtype) for each in held}
        self.noted["flops"] = self.policy.flops.per_token + self.policy.flops.per_target


def weights(module: StepwiseModule) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in module.weights()}


def alone(policy: Any, sample: StepSample) -> list[float]:
    """By itself a sample is computed alike on however many ranks, to the last bit."""
    with torch.no_grad():
        logprobs: Tensor = policy(collate([sample], [1.0]))[0]
    return logprobs.tolist()


def local(parameter: Any) -> Tensor:
    found: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return found


def gradients(policy: Any) -> dict[str, Tensor]:
    """All of them, whole, by name."""
    with FSDP1.summon_full_params(policy, with_grads=True) if isinstance(policy, FSDP1) else nullcontext():
        trained = [(plain_name(name), each.grad) for name, each in policy.named_parameters() if each.requires_grad]
        return {name: (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone() for name, grad in trained}


def fitted(case: Case, folder: Path, num_processes: int) -> dict[str, Any]:
    """What this process noted."""
    torch.manual_seed(11)
    module = Observed(
        str(folder / (case.model or MODELS[case.what])),
        loss=DualClip(low=0.99, high=99.0, dual=999.0),  # nearly all of the samples, which are drawn at random, count
        # an eps as large as the gradients, so that steps do not blow up what rounding makes of those near 0
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=0.01),
        max_tokens_per_micro_batch=16,
        max_grad_norm=0.5,
        **TRAINED[case.what] | case.module,
    )
    made = {"fsdp2": FSDP2Strategy, "fsdp": FSDPStrategy}
    strategy: Any = made[case.strategy](**case.settings) if case.strategy in made else case.strategy
    trainer = pl.Trainer(
        accelerator="cpu", devices=num_processes, strategy=strategy, max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(MINI_BATCHES, batch_size=None))  # type: ignore[arg-type]
    return module.noted


def main(rank: int, num_ranks: int, folder: Path) -> None:
    """One of so many processes."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    meeting = f"file://{folder}/meeting-{num_ranks}"
    torch.distributed.init_process_group("gloo", init_method=meeting, world_size=num_ranks, rank=rank)
    types: list[torch.dtype] = []
    test = attention.self_test
    attention.self_test = lambda model, name, device, dtype: [types.append(dtype), test(model, name, device, dtype)]  # type: ignore[func-returns-value]
    read_whole = AutoModelForCausalLM.from_pretrained
    for name, case in {**CASES, **HALF}.items():
        if case.num_ranks != num_ranks:
            continue
        whole = case.strategy == "ddp" or case.model
        AutoModelForCausalLM.from_pretrained = read_whole if whole else None  # type: ignore[assignment]
        torch.save({**fitted(case, folder, num_ranks), "tested": str(types[-1])}, folder / f"{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]) -> Path:
    """Models, and what two processes noted of each case."""
    folder = tmp_path_factory.mktemp("strategies")
    save_tiny_model(folder / "tied")
    untied = AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "large", tie_word_embeddings=False))
    untied.save_pretrained(folder / "untied", max_shard_size="200KB")  # type: ignore[no-untyped-call]
    assert len(list((folder / "untied").glob("*.safetensors"))) > 2
    tensors = load_file(save_tiny_model(folder / "doubled") / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "doubled" / "model.safetensors", {"format": "pt"})
    run_ranks(__file__, folder, "2")
    run_ranks(__file__, folder, "4", codes=[0] * 4)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict[str, Any]]:
    """What one process notes that trains the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's: no validation, few workers
        return {what: fitted(Case("auto", what), folder, 1) for what in TRAINED}


def noted(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    for rank in range({**CASES, **HALF}[name].num_ranks):
        yield torch.load(folder / f"{name}-{rank}.pt", weights_only=True)


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of any tensor, relative to its length."""
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 10
    return max(float((ours[name] - each).norm()) / max(1e-9, float(each.norm())) for name, each in theirs.items())


@pytest.mark.parametrize("name", CASES)
def test_several_processes_train_as_one_does(folder: Path, one: dict[str, dict[str, Any]], name: str) -> None:
    expected = one[CASES[name].what]
    for rank in noted(folder, name):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=1e-5, abs=1e-6)
        assert rank["norms"] == pytest.approx(expected["norms"], rel=3e-5)
        assert max(rank["norms"]) > 1 > rank["clipped"]
        assert rank["clipped"] == pytest.approx(expected["clipped"], rel=1e-5)
        first, *later = [furthest(*pair) for pair in zip(rank["gradients"], expected["gradients"], strict=True)]
        # where a layer's sums are taken in other pieces logprobs are off by rounding, and ratios of them by as much
        assert first < (1e-5 if "together" in name else 1e-6)
        assert max(later) < 5e-5  # by then rounding has moved the weights
        assert rank["old"] == pytest.approx(expected["old"], abs=1e-5)
        assert rank["scored"] == pytest.approx(expected["scored"], abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_gives_all_the_weights(folder: Path, one: dict[str, dict[str, Any]], name: str) -> None:
    expected = one[CASES[name].what]
    first, *others = noted(folder, name)
    for rank in (first, *others):
        assert furthest(rank["before"], expected["before"]) == furthest(rank["again"], expected["before"]) == 0
        for when in ("after", "base"):
            assert furthest(rank[when], expected[when]) < 1e-6
            assert list(rank[when]) == list(first[when])
            assert all(torch.equal(rank[when][of], first[when][of]) for of in first[when])
        moved = {of: each - rank["before"][of] for of, each in rank["after"].items()}
        whole = {of: each - expected["before"][of] for of, each in expected["after"].items()}
        distance = sum(float((moved[of] - each).square().sum()) for of, each in whole.items())
        assert (distance / sum(float(each.square().sum()) for each in whole.values())) ** 0.5 < 1e-5
        if CASES[name].what == "trajectory":
            assert furthest(rank["adapter"], expected["adapter"]) < 1e-6
            assert furthest(rank["base"], expected["before"]) == 0


@pytest.mark.parametrize("name", CASES)
def test_ranks_keep_step_where_one_has_no_turn(folder: Path, one: dict[str, dict[str, Any]], name: str) -> None:
    expected = one[CASES[name].what]["penalties"]
    first, *others = noted(folder, name)
    if expected is None:
        assert all(rank["penalties"] is None for rank in (first, *others))
    else:
        assert first["penalties"] == pytest.approx(expected, abs=1e-4)
        assert all(rank["penalties"] == [] for rank in others)


@pytest.mark.parametrize("name", CASES)
def test_ranks_hold_equal_parts_of_policy_and_reference(
    folder: Path, one: dict[str, dict[str, Any]], name: str
) -> None:
    expected = one[CASES[name].what]
    shares = [rank["held"] / expected["held"] for rank in noted(folder, name)]
    whole = 1 if CASES[name].strategy == "ddp" else CASES[name].num_ranks
    assert shares == pytest.approx([1 / whole] * CASES[name].num_ranks, abs=0.01)
    for rank in noted(folder, name):
        assert rank["flops"] == expected["flops"]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_reduced_once_or_where_that_takes_memory_every_time(folder: Path, name: str) -> None:
    case = CASES[name]
    once = case.strategy == "ddp" or not case.settings.get("reduce_every_micro_batch", True)
    for rank in noted(folder, name):
        reduced = rank["reduced"]
        assert len(reduced) > 4
        assert sum(reduced) == (len(MINI_BATCHES) if once else len(reduced))
        assert reduced[-1]


@pytest.mark.parametrize("name", HALF)
def test_in_half_precision_ranks_compute_what_transformers_does(folder: Path, name: str) -> None:
    language_model = AutoModelForCausalLM.from_pretrained(folder / "tied", dtype=torch.bfloat16)
    policy = PolicyModel(language_model)
    for rank in noted(folder, name):
        assert rank["alone"] == alone(policy, MINI_BATCHES[0].samples[0])
        assert rank["tested"] == "torch.bfloat16"
        assert rank["types"] == {"torch.float32"}
        assert all(each.dtype == torch.float32 for of in ("again", "after") for each in rank[of].values())
        assert furthest(rank["again"], rank["before"]) == 0
        assert all(each.dtype == torch.float32 for each in rank["gradients"][0].values())


@pytest.mark.parametrize("name", CASES)
def test_activations_are_computed_again_where_that_is_wanted(folder: Path, name: str) -> None:
    for rank in noted(folder, name):
        num_micro_batches = len(rank["reduced"])
        assert sum(rank["forwards"]) == num_micro_batches * (1 if CASES[name].what == "none" else 2)


def test_on_a_cpu_everything_is_float32_by_default(folder: Path) -> None:
    for rank in noted(folder, "tree, fsdp2"):
        assert rank["tested"] == "torch.float32"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
