"""What error feedback remembers, with momentum correction and without, and how a step is put back.

Legend: D numbers of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from milkglass.compression.cast import Cast
from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.gaussian_k import GaussianK
from milkglass.compression.quantize import Int8
from milkglass.compression.rounding import Rounding
from milkglass.compression.topk import ExactTopK
from milkglass.compression.vector import Dense, Selector, VectorCompressor
from milkglass.errors import MessageError, RecipeError
from tests.suites.compressor import gaussian, ulp


def test_without_momentum_the_memory_is_what_was_left() -> None:
    feedback = ErrorFeedback(ExactTopK(0.4), torch.zeros(5))
    assert feedback.take(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])).parts["values"].tolist() == [5.0, 4.0]
    assert feedback.left_D.tolist() == [0.0, 0.0, 3.0, 2.0, 1.0]
    second = feedback.take(torch.tensor([1.0, -1.0, 0.0, 2.5, -1.0]))
    assert sorted(second.parts["values"].tolist()) == [3.0, 4.5]
    assert feedback.left_D.tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
    assert feedback.velocity_D is None


def test_half_gradients_are_kept_in_full() -> None:
    feedback = ErrorFeedback(ExactTopK(0.01), torch.zeros(100))
    small_D = torch.full((100,), 1e-3, dtype=torch.bfloat16)
    for _ in range(1000):
        small_D[0] = 1.0  # always sent: the others wait
        feedback.take(small_D)
    assert float(feedback.left_D[50]) == pytest.approx(1000 * float(small_D[50]), rel=1e-4)  # in bfloat16, it sticks


def test_without_compression_momentum_correction_is_momentum() -> None:
    makers: list[Callable[[], VectorCompressor]] = [Dense, lambda: Rounding(Cast(torch.bfloat16))]
    for make in makers:
        x_D = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
        sgd = torch.optim.SGD([x_D], lr=1.0, momentum=0.9)
        feedback = ErrorFeedback(make(), torch.zeros(30, dtype=torch.float64), momentum=0.9)
        went_D = torch.zeros(30, dtype=torch.float64)
        for step in range(20):
            g_D = gaussian(30, dtype=torch.float64, seed=step)
            x_D.grad = g_D.clone()
            sgd.step()
            feedback.compressor.add_to(went_D, feedback.take(g_D).parts)
        assert torch.allclose(went_D + feedback.left_D, -x_D.detach(), atol=1e-12)


def test_the_momentum_of_what_is_sent_stops() -> None:
    feedback = ErrorFeedback(ExactTopK(0.5), torch.zeros(4), momentum=0.5)
    feedback.take(torch.tensor([8.0, 4.0, 1.0, 1.0]))
    assert feedback.velocity_D is not None
    assert feedback.velocity_D.tolist() == [0.0, 0.0, 1.0, 1.0]
    taken = feedback.take(torch.tensor([0.0, 0.0, 0.0, 1.0]))  # velocities 0, 0, .5, 1.5
    assert dict(zip(*(taken.parts[name].tolist() for name in ("indexes", "values")), strict=True)) == {2: 1.5, 3: 2.5}
    assert feedback.velocity_D.tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "compressor", [ExactTopK(0.1), GaussianK(0.001), Dense(), Rounding(Int8(), width=100)], ids=repr
)
def test_a_step_can_be_put_back(compressor: VectorCompressor, momentum: float) -> None:
    one, other = (ErrorFeedback(compressor, torch.zeros(70_000), momentum) for _ in range(2))
    for step in range(3):
        one.take(gaussian(70_000, seed=step))
        other.take(gaussian(70_000, seed=step))
    g_D = gaussian(70_000, seed=9)
    if other.velocity_D is None:
        other.left_D += g_D
    else:
        other.left_D += other.velocity_D.mul_(momentum).add_(g_D)
    one.put_back(one.take(g_D))
    assert bool(((one.left_D - other.left_D).abs() <= ulp(other.left_D)).all())
    if isinstance(compressor, Selector | Dense):
        assert torch.equal(one.left_D, other.left_D)
    if one.velocity_D is not None and other.velocity_D is not None:
        assert torch.equal(one.velocity_D, other.velocity_D)


def test_error_feedback_refuses_what_does_not_fit() -> None:
    with pytest.raises(RecipeError, match="expected float32 or float64"):
        ErrorFeedback(Dense(), torch.zeros(3, dtype=torch.float16))
    for momentum in (-0.1, 1.0, math.nan):
        with pytest.raises(RecipeError, match="expected a number from 0, below 1"):
            ErrorFeedback(Dense(), torch.zeros(3), momentum)
    for momentum in (0.0, 0.9):
        feedback = ErrorFeedback(Dense(), torch.zeros(3), momentum)
        for wrong in (torch.ones(1), torch.ones(4), torch.ones(3, 1)):
            with pytest.raises(MessageError, match=r"expected \(3,\)"):
                feedback.take(wrong)
