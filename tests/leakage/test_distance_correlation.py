"""Distance correlation against outside oracles: the `dcor` package, a slow twin under autograd, and its invariances."""

from __future__ import annotations

import math
from collections.abc import Callable

import dcor
import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_bytes
from milkglass.errors import DataError
from milkglass.leakage import distance_correlation as dc
from milkglass.leakage.streaming import streaming_distance_correlation

Statistic = Callable[[Tensor, Tensor], Tensor]

STATISTICS: dict[str, Statistic] = {
    "distance_covariance": dc.distance_covariance,
    "distance_covariance_sqr": dc.distance_covariance_sqr,
    "distance_correlation": dc.distance_correlation,
    "distance_correlation_sqr": dc.distance_correlation_sqr,
    "u_distance_covariance_sqr": dc.u_distance_covariance_sqr,
    "u_distance_correlation_sqr": dc.u_distance_correlation_sqr,
}
every_statistic = pytest.mark.parametrize("name", STATISTICS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _related(n: int, d: int, e: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Records and activations that depend on them, partly and not linearly, in float64."""
    generator = _generator(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(d, e, generator=generator, dtype=torch.float64) / math.sqrt(d)
    return x, torch.relu(x @ weight) + 0.5 * torch.randn(n, e, generator=generator, dtype=torch.float64)


def _twin(name: str, x: Tensor, z: Tensor) -> Tensor:
    """Each definition written out, slowly, for autograd to differentiate."""

    def distances(x: Tensor) -> Tensor:
        squares = (x[:, None] - x[None]).square().sum(-1)
        return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)

    def centered(a: Tensor) -> Tensor:
        n = len(a)
        if name.startswith("u_"):
            rows = a.sum(0) / (n - 2)
            a = a - rows - rows[:, None] + a.sum() / ((n - 1) * (n - 2))
            return a * (1 - torch.eye(n, dtype=a.dtype))
        return a - a.mean(0) - a.mean(0)[:, None] + a.mean()

    n = len(x)
    a, b = centered(distances(x)), centered(distances(z))
    count = n * (n - 3) if name.startswith("u_") else n * n
    value = (a * b).sum() / count
    if "correlation" in name:
        value = value / ((a * a).sum() / count * ((b * b).sum() / count)).sqrt()
    return value if name.endswith("_sqr") else value.sqrt()


def _value_and_gradient(statistic: Statistic, x: Tensor, z: Tensor) -> tuple[float, Tensor]:
    leaf = z.clone().requires_grad_()
    value = statistic(x, leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.item(), gradient


def _relative_error(value: Tensor, truth: Tensor) -> float:
    error: Tensor = torch.linalg.vector_norm(value.double() - truth) / torch.linalg.vector_norm(truth)
    return error.item()


@every_statistic
@pytest.mark.parametrize("shape", [(4, 2, 3), (5, 1, 1), (33, 20, 7), (70, 3, 300), (150, 784, 10)])
def test_agrees_with_dcor(name: str, shape: tuple[int, int, int]) -> None:
    x, z = _related(*shape)
    expected = getattr(dcor, name)(x.numpy(), z.numpy())
    assert STATISTICS[name](x, z).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert STATISTICS[name](x.float(), z.float()).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@every_statistic
def test_pictures_are_flattened(name: str) -> None:
    x, z = _related(12, 48, 32)
    pictures, maps = x.reshape(12, 3, 4, 4), z.reshape(12, 2, 4, 4)
    assert STATISTICS[name](pictures, maps).item() == STATISTICS[name](x, z).item()
    assert STATISTICS[name](pictures, maps.float()).dtype == torch.float32


@every_statistic
@pytest.mark.parametrize(("n", "offset"), [(4, 0.0), (9, 100.0)])
def test_gradcheck(name: str, n: int, offset: float) -> None:
    x, z = _related(n, 3, 5)
    assert torch.autograd.gradcheck(lambda z: STATISTICS[name](x, z), (z + offset).requires_grad_())


@every_statistic
@pytest.mark.parametrize("shape", [(4, 2, 3), (64, 30, 40), (100, 8, 2)])
def test_value_and_gradient_of_the_slow_twin(name: str, shape: tuple[int, int, int]) -> None:
    x, z = _related(*shape)
    value, gradient = _value_and_gradient(STATISTICS[name], x, z)
    truth, slope = _value_and_gradient(lambda x, z: _twin(name, x, z), x, z)
    assert value == pytest.approx(truth, rel=1e-10)
    assert _relative_error(gradient, slope) < 1e-9


@every_statistic
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("twins", ["none", "equal", "near"])
def test_float32_keeps_its_digits(name: str, offset: float, twins: str) -> None:
    x, z = _related(96, 50, 200)
    if twins != "none":
        z[48:80] = z[:32]
        x[90:] = x[:6]
    if twins == "near":
        z[48:80] += 1e-3 * torch.randn(32, 200, generator=_generator(1), dtype=torch.float64)
    x, z = (x + offset).float(), (z + offset).float()
    value, gradient = _value_and_gradient(STATISTICS[name], x, z)
    truth, slope = _value_and_gradient(lambda x, z: _twin(name, x, z), x.double(), z.double())
    assert value == pytest.approx(truth, rel=1e-5)
    assert _relative_error(gradient, slope) < 1e-4


def test_float32_keeps_its_digits_where_both_sides_agree_almost_wholly() -> None:
    generator = _generator()
    x = torch.rand(512, 100, generator=generator)
    z = torch.relu((x - 0.5) @ torch.randn(100, 2000, generator=generator))
    value, gradient = _value_and_gradient(dc.distance_correlation, x, z)
    truth, slope = _value_and_gradient(dc.distance_correlation, x.double(), z.double())
    assert value == pytest.approx(truth, rel=1e-5)
    assert _relative_error(gradient, slope) < 2e-5


@every_statistic
@every_dtype
@pytest.mark.parametrize("n", [4, 20])
def test_constant_activations_give_zero_and_a_zero_gradient(name: str, dtype: torch.dtype, n: int) -> None:
    x = torch.randn(n, 6, generator=_generator(), dtype=dtype)
    for constant in (0.0, 0.1, 100.3):
        value, gradient = _value_and_gradient(STATISTICS[name], x, torch.full((n, 9), constant, dtype=dtype))
        assert value == 0.0
        assert torch.equal(gradient, torch.zeros_like(gradient))


@every_dtype
@pytest.mark.parametrize("name", [name for name in STATISTICS if "correlation" in name])
def test_records_and_activations_without_spread_give_zero(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 6, generator=_generator(), dtype=dtype)
    value, gradient = _value_and_gradient(STATISTICS[name], torch.full_like(x, 0.1), x)
    assert value == 0.0
    assert not gradient.any()
    if name.startswith("u_"):  # all rows equally far from each other: nothing is left after U-centering but rounding
        value, gradient = _value_and_gradient(STATISTICS[name], x, 0.1 + 0.7 * torch.eye(6, dtype=dtype))
        assert value == 0.0
        assert not gradient.any()


@every_statistic
@every_dtype
def test_gradients_are_finite_where_rows_are_equal(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(8, 3, generator=_generator(), dtype=dtype)
    for rows in ([0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1]):
        z = torch.randn(3, 5, generator=_generator(1), dtype=dtype)[rows]
        value, gradient = _value_and_gradient(STATISTICS[name], x, z)
        assert math.isfinite(value)
        assert gradient.isfinite().all()
        assert gradient.any() or value <= 0


@every_dtype
def test_equal_records_are_exactly_alike(dtype: torch.dtype) -> None:
    for n in (20, 200):
        x = torch.randn(n, 30, generator=_generator(), dtype=dtype) + 100
        assert dc.distance_correlation(x, x).item() == pytest.approx(1, abs=1e-6)
        assert dc.u_distance_correlation_sqr(x, x).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in STATISTICS if "correlation" in name])
def test_shift_turn_and_scale_change_nothing(name: str) -> None:
    x, z = _related(40, 6, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=_generator(), dtype=torch.float64))
    expected = STATISTICS[name](x, z).item()
    for changed in (z + 37.0, z @ turn, z * 1e-3, z * 1e6, torch.cat([z, torch.zeros_like(z)], 1)):
        assert STATISTICS[name](x, changed).item() == pytest.approx(expected, rel=1e-9)
    assert STATISTICS[name](z, x).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "expected"), [(32, 0.994), (256, 0.951)])
def test_bias_on_independent_gaussians(n: int, expected: float) -> None:
    biased, unbiased = [], []
    for seed in range(5):
        generator = _generator(seed)
        x, z = torch.randn(n, 784, generator=generator), torch.randn(n, 500, generator=generator)
        biased.append(dc.distance_correlation(x, z).item())
        unbiased.append(dc.u_distance_correlation_sqr(x, z).item())
    assert sum(biased) / 5 == pytest.approx(expected, abs=0.002)
    assert abs(sum(unbiased) / 5) < 3 * math.sqrt(2 / 5) / n  # its standard deviation is near sqrt(2) / n


def test_the_linear_variant_is_the_root_of_linear_cka_and_misses_a_parabola() -> None:
    x, z = _related(60, 5, 9)
    cross, own_x, own_z = (
        torch.linalg.matrix_norm((a - a.mean(0)).T @ (b - b.mean(0))).item() for a, b in ((x, z), (x, x), (z, z))
    )
    assert dc.linear_distance_correlation(x, z).item() == pytest.approx(math.sqrt(cross**2 / (own_x * own_z)), rel=1e-9)
    assert torch.autograd.gradcheck(dc.linear_distance_correlation, (x[:6], z[:6].clone().requires_grad_()))

    line = torch.randn(1024, 1, generator=_generator(), dtype=torch.float64)
    assert dc.linear_distance_correlation(line, line**2).item() < 0.15
    assert dc.distance_correlation(line, line**2).item() > 0.45


def test_the_linear_variant_of_a_constant_is_zero_with_a_zero_gradient() -> None:
    x, _ = _related(6, 3, 3)
    value, gradient = _value_and_gradient(dc.linear_distance_correlation, x, torch.zeros(6, 4, dtype=torch.float64))
    assert value == 0.0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_permutation_floor_is_what_wrong_pairings_read() -> None:
    x, z = _related(40, 5, 6)
    floor = dc.permutation_floor(x, z, generator=_generator(7), permutations=20)
    generator = _generator(7)
    dealt = [dc.u_distance_correlation_sqr(x, z[torch.randperm(40, generator=generator)]) for _ in range(20)]
    values = torch.stack(dealt)
    assert floor.mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert floor.quantile_95 == pytest.approx(values.quantile(0.95).item(), abs=1e-12)
    assert floor.permutations == 20
    assert dc.u_distance_correlation_sqr(x, z).item() > floor.quantile_95


def test_a_twentieth_of_independent_pairs_passes_the_floor() -> None:
    passed = 0
    for seed in range(100):
        generator = _generator(seed)
        x, z = torch.randn(20, 3, generator=generator), torch.randn(20, 2, generator=generator)
        floor = dc.permutation_floor(x, z, generator=generator, permutations=60)
        passed += dc.u_distance_correlation_sqr(x, z).item() > floor.quantile_95
    assert 0 < passed <= 13  # binomial(100, .05): more than 13 is one in a thousand


def test_measure_holds_the_three_functions_values() -> None:
    x, z = _related(50, 12, 6)
    result = dc.measure(x.requires_grad_(), z.requires_grad_(), _generator(3))
    assert result.n == 50
    x, z = x.detach(), z.detach()
    assert result.squared_unbiased == pytest.approx(dc.u_distance_correlation_sqr(x, z).item(), rel=1e-12)
    assert result.biased == pytest.approx(dc.distance_correlation(x, z).item(), rel=1e-12)
    assert result.permutation_floor == dc.permutation_floor(x, z, generator=_generator(3)).quantile_95


@every_dtype
@pytest.mark.parametrize("block_rows", [1, 7, 64, 1000])
def test_streaming_is_the_direct_form(dtype: torch.dtype, block_rows: int) -> None:
    x, z = _related(70, 12, 6)
    x[3], z[3], z[60] = x[50], z[50], z[61]
    x, z = (x + 100).to(dtype), z.to(dtype)
    result = streaming_distance_correlation(x, z, block_rows=block_rows)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    assert result.n == 70
    assert result.biased == pytest.approx(dc.distance_correlation(x, z).item(), abs=tolerance)
    assert result.squared_unbiased == pytest.approx(dc.u_distance_correlation_sqr(x, z).item(), abs=tolerance)


def test_streaming_is_the_direct_form_at_four_thousand_records() -> None:
    x, z = (values.float() for values in _related(4000, 40, 30))
    result = streaming_distance_correlation(x, z, block_rows=1024)
    for records, activations in ((x, z), (x.double(), z.double())):
        biased = dc.distance_correlation(records, activations).item()
        unbiased = dc.u_distance_correlation_sqr(records, activations).item()
        assert result.biased == pytest.approx(biased, abs=1e-5)
        assert result.squared_unbiased == pytest.approx(unbiased, abs=1e-5)


@pytest.mark.parametrize(
    ("n", "offset", "near"), [(64, 0.0, False), (64, 100.0, False), (256, 0.0, True), (256, 100.0, True)]
)
def test_memory_beyond_inputs_and_gradient_is_under_four_tables_of_distances(n: int, offset: float, near: bool) -> None:
    generator = _generator()
    x = torch.randn(n, 3000, generator=generator) + offset
    z = torch.randn(n, 2048, generator=generator) + offset
    if near:
        z[n // 2 :] = z[: n // 2] + 1e-3
    z.requires_grad_()
    forward = peak_bytes(lambda: dc.distance_correlation(x, z))
    both = peak_bytes(lambda: torch.autograd.grad(dc.distance_correlation(x, z), z))
    table = 4 * n * n
    assert forward <= 4 * table
    assert both - 4 * z.numel() <= 4 * table
    assert forward > 2 * table  # both sides' distances were seen: the measurement measures


POWERS_OF_TWO = [(torch.float32, power) for power in (-90, -60, 60, 90)] + [
    (torch.float64, power) for power in (-900, -250, 250, 900)
]


@pytest.mark.parametrize("name", [name for name in STATISTICS if "correlation" in name])
@pytest.mark.parametrize(("dtype", "power"), POWERS_OF_TWO)
def test_very_large_and_very_small_tables_give_the_same_bits(name: str, dtype: torch.dtype, power: int) -> None:
    x, z = (values.to(dtype) for values in _related(30, 6, 8))
    value, gradient = _value_and_gradient(STATISTICS[name], x, z)
    assert 0.01 < value < 1
    for factor in (1.0, 2.0**power, 2.0**-power):
        scaled_value, scaled_gradient = _value_and_gradient(STATISTICS[name], x * factor, z * 2.0**power)
        assert scaled_value == value
        assert torch.equal(scaled_gradient * 2.0**power, gradient)


@pytest.mark.parametrize("name", [name for name in STATISTICS if "covariance" in name])
@pytest.mark.parametrize(("dtype", "power"), POWERS_OF_TWO)
def test_covariances_grow_with_their_tables(name: str, dtype: torch.dtype, power: int) -> None:
    x, z = (values.to(dtype) for values in _related(30, 6, 8))
    value, gradient = _value_and_gradient(STATISTICS[name], x, z)
    squared = name.endswith("_sqr")
    scaled_value, scaled_gradient = _value_and_gradient(STATISTICS[name], x * 2.0**power, z)
    assert scaled_value == value * 2.0 ** (power if squared else power // 2)
    assert torch.equal(scaled_gradient * 2.0 ** -(power if squared else power // 2), gradient)
    scaled_value, scaled_gradient = _value_and_gradient(STATISTICS[name], x * 2.0**power, z * 2.0**power)
    if squared:  # the value itself may be out of the type's range: its derivative is not
        assert torch.equal(scaled_gradient * 2.0**-power, gradient)
        back, _ = _value_and_gradient(STATISTICS[name], x * 2.0**-power, z * 2.0**power)
        assert back == value
    else:
        assert scaled_value == value * 2.0**power
        assert torch.equal(scaled_gradient, gradient)


@every_dtype
@pytest.mark.parametrize("factor", [1e-35, 1e-23, 1e-15, 1e15, 1e18, 1e20, 1e35])
def test_a_scaled_copy_is_not_independent(dtype: torch.dtype, factor: float) -> None:
    x = torch.randn(32, 6, generator=_generator(), dtype=dtype)
    if dtype == torch.float64:
        factor **= 8  # as far out in this type
    for records, z in ((x, factor * x), (factor * x, x), (factor * x, factor * x)):
        for statistic in (dc.distance_correlation, dc.u_distance_correlation_sqr, dc.linear_distance_correlation):
            assert statistic(records, z).item() == pytest.approx(1, abs=1e-5)
        result = dc.measure(records, z, _generator())
        assert result.squared_unbiased == pytest.approx(1, abs=1e-5)
        assert 0 < result.permutation_floor < 0.5
        assert streaming_distance_correlation(records, z, block_rows=10).biased == pytest.approx(1, abs=1e-5)


def test_records_of_float64_beyond_float32_are_scaled_before_they_are_converted() -> None:
    x, z = _related(30, 6, 8)
    expected = dc.distance_correlation(x.float(), z.float()).item()
    for power in (-300, 300):
        assert dc.distance_correlation(x * 2.0**power, z.float()).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "factor"), [(64, 1e-22), (4, 1e-20), (64, 1e-30), (64, 1e30)])
@pytest.mark.parametrize("name", [name for name in STATISTICS if "correlation" in name])
def test_gradients_by_very_small_and_very_large_activations(name: str, n: int, factor: float) -> None:
    x, z = (values.float() for values in _related(n, 5, 7))
    z *= factor
    _, gradient = _value_and_gradient(STATISTICS[name], x, z)
    _, slope = _value_and_gradient(STATISTICS[name], x.double(), z.double())
    assert _relative_error(gradient.double() / slope.abs().max(), slope / slope.abs().max()) < 1e-4


def test_gradients_by_the_smallest_numbers_are_finite() -> None:
    x, z = (values.float() for values in _related(16, 5, 7))
    value, gradient = _value_and_gradient(dc.distance_correlation, x, z * 1e-42)
    assert 0 < value < 1
    assert gradient.isfinite().all()
    assert gradient.any()


@every_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(8, 3, generator=_generator(), dtype=dtype)
    broken = x.clone()
    broken[5, 1] = bad
    calls: list[Callable[[Tensor, Tensor], object]] = [
        *STATISTICS.values(),
        dc.linear_distance_correlation,
        lambda x, z: dc.measure(x, z, _generator()),
        lambda x, z: dc.permutation_floor(x, z, generator=_generator()),
        streaming_distance_correlation,
    ]
    for call in calls:
        with pytest.raises(DataError, match="the activations hold NaN or infinite values"):
            call(x, broken)
        with pytest.raises(DataError, match="the records hold NaN or infinite values"):
            call(broken, x)


@pytest.mark.parametrize("factor", [1e3, 1e4])
def test_one_outlier_does_not_spoil_the_reports_in_float32(factor: float) -> None:
    x, z = (values.float() for values in _related(200, 20, 30))
    z[17] *= factor
    exact = dc.u_distance_correlation_sqr(x.double(), z.double()).item()
    biased = dc.distance_correlation(x.double(), z.double()).item()
    result = dc.measure(x, z, _generator(1))
    assert result.squared_unbiased == pytest.approx(exact, rel=1e-9)
    assert result.biased == pytest.approx(biased, rel=1e-9)
    floor = dc.permutation_floor(x, z, generator=_generator(1))
    assert floor == dc.permutation_floor(x.double(), z.double(), generator=_generator(1))
    assert result.permutation_floor == floor.quantile_95
    streamed = streaming_distance_correlation(x, z, block_rows=64)
    assert streamed.squared_unbiased == pytest.approx(exact, rel=1e-6)
    assert streamed.biased == pytest.approx(biased, rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_streaming_never_holds_a_whole_table_in_float64(offset: float) -> None:
    x = torch.randn(2000, 400, generator=_generator()) + offset
    z = torch.randn(2000, 300, generator=_generator(1)) + offset
    peak = peak_bytes(lambda: streaming_distance_correlation(x, z, block_rows=100))
    assert peak < 8 * x.numel() / 2


def test_backward_twice_and_scaled() -> None:
    x, z = _related(10, 4, 5)
    leaf = z.clone().requires_grad_()
    value = dc.distance_correlation_sqr(x, leaf)
    (once,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(-3 * value, leaf)
    torch.testing.assert_close(again, -3 * once)


@every_statistic
def test_bad_input_is_refused_in_one_line(name: str) -> None:
    x, z = _related(10, 4, 5)
    statistic = STATISTICS[name]
    with pytest.raises(DataError, match="3 records; at least 4"):
        statistic(x[:3], z[:3])
    with pytest.raises(DataError, match="10 records, but activations of 9"):
        statistic(x, z[:9])
    with pytest.raises(DataError, match="bfloat16; expected float32 or float64"):
        statistic(x, z.bfloat16())
    with pytest.raises(DataError, match=r"the activations hold no values, shape \(10, 0\)"):
        statistic(x, z[:, :0])
    with pytest.raises(DataError, match=r"x\.detach\(\)"):
        statistic(x.requires_grad_(), z)
    with pytest.raises(DataError, match="block_rows is 0"):
        streaming_distance_correlation(x, z, block_rows=0)
    with pytest.raises(DataError, match="0 permutations"):
        dc.permutation_floor(x, z, generator=_generator(), permutations=0)
