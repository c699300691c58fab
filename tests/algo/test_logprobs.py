"""Log-probabilities without the whole matrix of logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lit_stepwise.algo.logprobs import likeliest, token_logprobs

NUM, HIDDEN, VOCABULARY = 11, 6, 9
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logprobs": lambda logprobs, entropies: logprobs,
    "entropies": lambda logprobs, entropies: entropies,
    "both": lambda logprobs, entropies: 2 * logprobs - 0.3 * entropies,
}


def inputs(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden, head, targets, and temperatures of which one is greedy."""
    torch.manual_seed(seed)
    hidden, head = torch.randn(NUM, HIDDEN, dtype=dtype), torch.randn(VOCABULARY, HIDDEN, dtype=dtype)
    temperatures = torch.rand(NUM) + 0.5
    temperatures[3] = 0.0
    return hidden.requires_grad_(), head.requires_grad_(), torch.randint(VOCABULARY, (NUM,)), temperatures


def all_at_once(hidden: Tensor, head: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """By the formulas, with nothing but autograd."""
    logits = nn.functional.linear(hidden, head)
    scaled = (
        logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperatures.where(temperatures > 0, 1)[:, None]
    )
    probabilities = scaled.softmax(-1)
    return probabilities.log()[range(len(targets)), targets], -(probabilities * probabilities.log()).sum(-1)


class Operations(TorchDispatchMode):
    """Notes what is computed, and how many matrices of so many numbers or more exist at a time."""

    def __init__(self, large: int = 0) -> None:
        super().__init__()
        self.num_bytes = 4 * large
        self.names: list[str] = []
        self.large: dict[int, StorageWeakRef] = {}
        self.most_large = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.detach.default:
            self.names.append(str(function))
        if isinstance(found, Tensor) and found.untyped_storage().nbytes() >= self.num_bytes:
            self.large[found.untyped_storage().data_ptr()] = StorageWeakRef(found.untyped_storage())
        self.large = {key: each for key, each in self.large.items() if not each.expired()}
        self.most_large = max(self.most_large, len(self.large))
        return found

    @property
    def num_products(self) -> int:
        return sum("mm" in name for name in self.names)


def test_two_tokens_worked_by_hand() -> None:
    # logits of the first row: 0 and log 3, so probabilities 1/4 and 3/4; at temperature 0.5: 1/10 and 9/10
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    head = torch.tensor([[0.0, 5.0], [math.log(3), 7.0]])
    logprobs, entropies = token_logprobs(hidden, head, torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.5, 0.0]))
    assert logprobs.exp().tolist() == pytest.approx([3 / 4, 1 / 10, 3 / 4])  # temperature 0 counts as 1
    assert float(entropies[0]) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_gradients_of_two_tokens_worked_by_hand() -> None:
    # p = 1/4 and 3/4: d log p[1] / dz = (-1/4, 1/4), and at temperature 0.5, p = 1/10 and 9/10: (-1/10, 1/10) / 0.5
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[0.0, 5.0], [math.log(3), 7.0]], dtype=torch.float64, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([1, 1]), torch.tensor([1.0, 0.5]))
    (logprobs * torch.tensor([1.0, 3.0])).sum().backward()
    assert hidden.grad is not None
    assert head.grad is not None
    assert hidden.grad[:, 1].tolist() == pytest.approx([2 / 4, 3 * 2 / 5])  # times 7 - 5, the difference of the rows
    assert head.grad.tolist() == [[pytest.approx(-(1 / 4 + 3 / 5)), 0], [pytest.approx(1 / 4 + 3 / 5), 0]]


def test_log_probabilities_near_0_are_exact_however_large_the_logits() -> None:
    hidden, head = torch.tensor([[1.0], [3.0]]), torch.tensor([[40.0], [32.0]])
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([0, 0]), torch.ones(2))
    assert float(logprobs[0]) == pytest.approx(-math.log1p(math.exp(-8)), abs=1e-7)


@pytest.mark.parametrize("chunk", [100, 4, 1])
def test_chunks_change_neither_values_nor_gradients(chunk: int) -> None:
    given, weights = inputs(1), torch.linspace(-1, 2, NUM)
    results = []
    for logprobs, entropies in (all_at_once(*given), token_logprobs(*given, chunk)):
        results.append([logprobs, entropies, *torch.autograd.grad((logprobs * weights).sum(), given[:2])])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("asked", LOSSES)
@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("chunk", [4, 100])
def test_gradients_are_those_of_finite_differences(asked: str, trained: tuple[int, ...], chunk: int) -> None:
    *pair, targets, temperatures = inputs(2)
    leaves = [pair[i].requires_grad_(i in trained) for i in range(2)]

    def compute(hidden: Tensor, head: Tensor) -> Tensor:
        return LOSSES[asked](*token_logprobs(hidden, head, targets, temperatures, chunk, entropy_gradient=True))

    assert torch.autograd.gradcheck(compute, leaves, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("chunk", [100, 4, 1])
def test_entropies_carry_a_gradient_when_asked_to_and_none_otherwise(chunk: int) -> None:
    given, weights = inputs(3), torch.linspace(-1, 2, NUM)
    _, expected = all_at_once(*given)
    _, entropies = token_logprobs(*given, chunk, entropy_gradient=True)
    gradients = [torch.autograd.grad((each * weights).sum(), given[:2]) for each in (expected, entropies)]
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not token_logprobs(*given, chunk)[1].requires_grad
    assert not token_logprobs(*given, chunk, entropy_gradient=True, summary=likeliest)[1].requires_grad
    with torch.no_grad():
        without = token_logprobs(*given, chunk, entropy_gradient=True)
    assert [each.requires_grad for each in without] == [False, False]


@pytest.mark.parametrize("chunk", [100, 2])
def test_the_likeliest_token_may_stand_in_the_place_of_the_entropy(chunk: int) -> None:
    # probabilities 1/4 and 3/4, at temperature 0.5 1/10 and 9/10, and the other way round
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    head, temperatures = torch.tensor([[0.0, 5.0], [math.log(3), 7.0]]), torch.tensor([1.0, 0.5, 1.0])
    targets = torch.tensor([0, 1, 1])
    logprobs, best = token_logprobs(hidden, head, targets, temperatures, chunk, summary=likeliest)
    assert logprobs.exp().tolist() == pytest.approx([1 / 4, 9 / 10, 1 / 4])
    assert best.exp().tolist() == pytest.approx([3 / 4, 9 / 10, 3 / 4])


@pytest.mark.parametrize(
    ("hidden", "head", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_results_are_at_least_float32_and_gradients_of_the_dtype_of_what_they_are_for(
    hidden: torch.dtype, head: torch.dtype, expected: torch.dtype
) -> None:
    given = torch.ones(1, 2, dtype=hidden, requires_grad=True), torch.ones(3, 2, dtype=head, requires_grad=True)
    values = token_logprobs(*given, torch.tensor([2]), torch.ones(1))
    assert [each.dtype for each in values] == [expected] * 2
    assert [each.dtype for each in torch.autograd.grad(values[0].sum(), given)] == [hidden, head]


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32() -> None:
    # two tokens of probability 1/2 each: every row adds 1/2, which bfloat16 loses from 128 on
    hidden, head = torch.ones(600, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(hidden, head, torch.ones(600, dtype=torch.long), torch.ones(600), chunk_tokens=1)
    logprobs.sum().backward()
    assert head.grad is not None
    assert head.grad.flatten().tolist() == [-300.0, 300.0]


def test_autocast_multiplies_as_for_a_linear_layer_and_rounds_nothing_else() -> None:
    given, weights = inputs(4, torch.float32), torch.linspace(-1, 2, NUM)
    with torch.autocast("cpu", torch.bfloat16):
        expected, (logprobs, _) = all_at_once(*given)[0], token_logprobs(*given, chunk_tokens=4)
        inside = torch.autograd.grad((logprobs * weights).sum(), given[:2], retain_graph=True)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(logprobs, all_at_once(*given)[0], rtol=0, atol=1e-3)  # it did round
    outside = torch.autograd.grad((logprobs * weights).sum(), given[:2])
    exact = torch.autograd.grad((all_at_once(*given)[0] * weights).sum(), given[:2])
    for again, ours, reference in zip(inside, outside, exact, strict=True):
        assert torch.equal(again, ours)
        assert 1e-4 < float((ours - reference).norm() / reference.norm()) < 1e-2


def test_autocast_of_the_backward_pass_alone_changes_nothing() -> None:
    given = inputs(12, torch.float32)
    logprobs, _ = token_logprobs(*given, chunk_tokens=4)
    outside = torch.autograd.grad(logprobs.sum(), given[:2], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(logprobs.sum(), given[:2])
    assert all(torch.equal(*pair) for pair in zip(outside, inside, strict=True))


def test_autocast_leaves_float64_alone() -> None:
    given = inputs(5)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, _ = token_logprobs(*given, chunk_tokens=4)
        gradients = torch.autograd.grad(logprobs.sum(), given[:2])
    expected, _ = all_at_once(*given)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), given[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_without_a_row_the_gradients_are_zeros() -> None:
    hidden, head = torch.ones(0, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    logprobs, entropies = token_logprobs(hidden, head, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    assert [logprobs.shape, entropies.shape] == [(0,), (0,)]
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 2)
    assert head.grad is not None
    assert head.grad.tolist() == [[0, 0]] * 3


def test_states_may_lie_anyhow_in_memory() -> None:
    hidden, head, targets, temperatures = inputs(6)
    across = hidden.detach().T.contiguous().T.requires_grad_()
    assert not across.is_contiguous()
    for each in (across, hidden):
        logprobs, _ = token_logprobs(each, head, targets, temperatures, chunk_tokens=4)
        (logprobs * torch.linspace(-1, 2, NUM)).sum().backward()
    torch.testing.assert_close(across.grad, hidden.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("trained", "expected"), [((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_nothing_is_multiplied_for_a_gradient_that_nobody_asks_for(trained: tuple[int, ...], expected: int) -> None:
    given = inputs(7, torch.float32)
    for i in range(2):
        given[i].requires_grad_(i in trained)
    with Operations() as forward:
        logprobs, _ = token_logprobs(*given, chunk_tokens=4)
    with Operations() as backward:
        logprobs.sum().backward()
    assert forward.num_products == 3  # one a chunk
    assert backward.num_products == 3 * expected  # one of them is of the logits, again


def test_entropies_that_the_loss_leaves_out_cost_nothing_in_the_backward_pass() -> None:
    counts = []
    for num_used, entropy_gradient in ((1, False), (1, True), (2, True)):
        found = token_logprobs(*inputs(8, torch.float32), 4, entropy_gradient)
        with Operations() as operations:
            torch.autograd.backward(found[:num_used], [torch.ones(NUM)] * num_used)
        counts.append(len(operations.names))
    without, left_out, used = counts
    assert without == left_out < used


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_two_chunks_of_logits_exist_at_a_time(dtype: torch.dtype) -> None:
    hidden, head = torch.randn(20, 2, dtype=dtype, requires_grad=True), torch.randn(64, 2, dtype=dtype)
    with Operations(4 * 64) as operations:
        logprobs, entropies = token_logprobs(hidden, head, torch.zeros(20, dtype=torch.long), torch.ones(20), 4, True)
        assert len(operations.large) == 0  # nothing is kept
        (logprobs - entropies).sum().backward()
    assert operations.most_large == 2


def test_a_cpu_widens_a_part_of_what_it_adds_to_the_gradient_of_a_bfloat16_head() -> None:
    hidden, head = torch.randn(1, 64, dtype=torch.bfloat16), torch.randn(10_000, 64, dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(hidden, head.requires_grad_(), torch.ones(1, dtype=torch.long), torch.ones(1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        logprobs.sum().backward()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    # the gradient, of 4096 rows the product in two bytes and in four, and less than four rows of logits
    assert max(accumulate(nbytes for _, nbytes in changes)) < 4 * 10_000 * 64 + (2 + 4) * 4096 * 64 + 4 * 4 * 10_000
    wide = head.detach().double().requires_grad_()
    all_at_once(hidden.double(), wide, torch.ones(1, dtype=torch.long), torch.ones(1))[0].backward()
    assert head.grad is not None
    assert wide.grad is not None
    assert float((head.grad.double() - wide.grad).norm() / wide.grad.norm()) < 1e-2


def test_a_second_derivative_is_refused() -> None:
    given = inputs(9)
    logprobs, _ = token_logprobs(*given)
    (gradient,) = torch.autograd.grad((logprobs**2).sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Tied(nn.Module):
    """A language model of one layer whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(10)
        self.weight = nn.Parameter(torch.randn(VOCABULARY, HIDDEN))
        self.layer = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, token_ids: Tensor) -> Tensor:
        hidden = self.layer(nn.functional.embedding(token_ids[:-1], self.weight))
        temperatures = torch.full(hidden.shape[:1], 0.7)
        logprobs, entropies = token_logprobs(hidden, self.weight, token_ids[1:], temperatures, 4, entropy_gradient=True)
        return logprobs.sum() - 0.1 * entropies.sum()


TOKENS = [
    [torch.arange(NUM) * 5 % VOCABULARY, torch.arange(7) * 4 % VOCABULARY],
    [torch.tensor([3, 1]), torch.tensor([6])],
]
"""Of each rank, in two micro-batches; the last predicts nothing."""


def work(rank: int, folder: str) -> None:
    """What each process does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = Tied()
    fully_shard(model.layer)
    fully_shard(model, reshard_after_forward=True)
    for token_ids in TOKENS[rank]:
        model(token_ids).backward()
    found = {name: each.grad.full_tensor() for name, each in model.named_parameters()}  # type: ignore[union-attr]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_of_a_tied_head_get_the_gradients_of_one_process(tmp_path: Path) -> None:
    model = Tied()
    for token_ids in (each for tokens in TOKENS for each in tokens):
        (model(token_ids) / 2).backward()  # ranks take the mean
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sums_the_gradient_of_a_bfloat16_head_in_float32() -> None:
    torch.manual_seed(11)
    hidden, head = torch.randn(300, 64, dtype=torch.bfloat16), torch.randn(500, 64, dtype=torch.bfloat16)
    given = hidden.cuda().requires_grad_(), head.cuda().requires_grad_(), torch.arange(300, device="cuda")
    exact = hidden.double().requires_grad_(), head.double().requires_grad_(), torch.arange(300)
    gradients = []
    for each in (given, exact):
        logprobs, _ = token_logprobs(*each, torch.full((300,), 0.7, device=each[2].device), chunk_tokens=16)
        gradients.append([x.cpu().double() for x in torch.autograd.grad(logprobs.sum(), each[:2])])
    for ours, expected in zip(*gradients, strict=True):
        assert float((ours - expected).norm() / expected.norm()) < 1e-2
