"""Log-probabilities without the whole matrix of logits."""

from __future__ import annotations

import math

import pytest
import torch

from lit_stepwise.algo.logprobs import likeliest, token_logprobs


def test_two_tokens_worked_by_hand() -> None:
    # logits of the first row: 0 and log 3, so probabilities 1/4 and 3/4; at temperature 0.5: 1/10 and 9/10
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    head = torch.tensor([[0.0, 5.0], [math.log(3), 7.0]])
    logprobs, entropies = token_logprobs(hidden, head, torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.5, 0.0]))
    assert logprobs.exp().tolist() == pytest.approx([3 / 4, 1 / 10, 3 / 4])  # temperature 0 counts as 1
    assert float(entropies[0]) == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))


def test_chunks_change_neither_values_nor_gradients() -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(11, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    targets, temperatures, weights = torch.randint(9, (11,)), torch.rand(11) + 0.5, torch.randn(11)
    results = []
    for chunk in (100, 4, 1):
        inputs = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        logprobs, entropies = token_logprobs(*inputs, targets, temperatures, chunk)
        (logprobs * weights).sum().backward()
        results.append([logprobs.detach(), entropies, *(x.grad for x in inputs)])
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [100, 4, 1])
def test_entropies_carry_the_gradient_of_the_formula_when_asked_to_and_none_otherwise(chunk: int) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets, temperatures, weights = torch.randint(9, (11,)), torch.rand(11) + 0.5, torch.randn(11)
    probabilities = (hidden @ head.T / temperatures[:, None]).softmax(-1)
    expected = -(probabilities * probabilities.log()).sum(-1)
    _, entropies = token_logprobs(hidden, head, targets, temperatures, chunk, entropy_gradient=True)
    gradients = [torch.autograd.grad((each * weights).sum(), [hidden, head]) for each in (expected, entropies)]
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert not token_logprobs(hidden, head, targets, temperatures, chunk)[1].requires_grad
    with torch.no_grad():
        assert not token_logprobs(hidden, head, targets, temperatures, chunk, entropy_gradient=True)[1].requires_grad


@pytest.mark.parametrize("chunk", [100, 2])
def test_the_likeliest_token_may_stand_in_the_place_of_the_entropy(chunk: int) -> None:
    # probabilities 1/4 and 3/4, at temperature 0.5 1/10 and 9/10, and the other way round
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    head, temperatures = torch.tensor([[0.0, 5.0], [math.log(3), 7.0]]), torch.tensor([1.0, 0.5, 1.0])
    targets = torch.tensor([0, 1, 1])
    logprobs, best = token_logprobs(hidden, head, targets, temperatures, chunk, summary=likeliest)
    assert logprobs.exp().tolist() == pytest.approx([1 / 4, 9 / 10, 1 / 4])
    assert best.exp().tolist() == pytest.approx([3 / 4, 9 / 10, 3 / 4])


@pytest.mark.parametrize(("given", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_logprobs_are_at_least_float32(given: torch.dtype, expected: torch.dtype) -> None:
    hidden, head = torch.ones(1, 2, dtype=given), torch.ones(3, 2, dtype=given)
    values = token_logprobs(hidden, head, torch.tensor([2]), torch.ones(1))
    assert [each.dtype for each in values] == [expected] * 2
