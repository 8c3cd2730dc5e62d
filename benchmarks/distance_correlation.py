"""Distance correlation, forward and backward, side by side with its peers and with the floor of its three products.

    python -m benchmarks.distance_correlation [--sizes 64 256 1024 4096] [--threads 1 2] [--out results.json]

ours    milkglass.leakage.distance_correlation.distance_correlation
cdist   the plain `torch.cdist` version under autograd
gram    the Gram version of the public repositories, sqrt(max(d2, 1e-7)), under autograd
floor   x x^T, z z^T and W z alone, by `torch.mm`

All four take turns within a run; times are medians. Extra memory is what the allocator held at the most, beyond the
inputs and the gradient, in units of n^2 values. Errors are those of float32 against float64, relative.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.memory import peak_bytes
from benchmarks.setting import machine_line, write_result
from milkglass.leakage.distance_correlation import distance_correlation

PATIENCE_SECONDS = 20.0  # per row of the table, after the first three rounds


def main() -> None:
    parser = argparse.ArgumentParser(description="speed, memory and error of distance correlation")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--record-values", type=int, nargs="+", default=[784, 3072])
    parser.add_argument("--activation-values", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25, help="at most so many; large sizes take fewer")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    settings = parser.parse_args()
    print(machine_line() + "\n")
    print(
        "| threads | n | records | activations | ours, ms | cdist / ours | gram / ours | ours / floor "
        "| extra memory, n^2 | value error | gradient error |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for threads, n, d, e in product(
        settings.threads, settings.sizes, settings.record_values, settings.activation_values
    ):
        torch.set_num_threads(threads)
        row = {"threads": threads, "n": n, "records": d, "activations": e, **_row(n, d, e, settings.rounds)}
        rows.append(row)
        print(
            f"| {threads} | {n} | {d} | {e} | {row['ours_ms']:.2f} | {row['cdist']:.2f} | {row['gram']:.2f} "
            f"| {row['floor']:.2f} | {row['extra']:.2f} | {row['value_error']:.0e} | {row['gradient_error']:.0e} |",
            flush=True,
        )
    if settings.out:
        write_result(settings.out, rows)
    _print_bf16(n=1024, d=784, e=2048)


def _print_bf16(n: int, d: int, e: int) -> None:
    """What products in bf16 would save here, and what they would cost in accuracy."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.rand(n, d, generator=generator)
    z_NE = torch.relu((x_ND - 0.5) @ torch.randn(d, e, generator=generator))
    half_NE = z_NE.bfloat16()
    full, half = _medians((lambda: torch.mm(z_NE, z_NE.T), lambda: torch.mm(half_NE, half_NE.T)), rounds=15)
    rounded = [x_ND.bfloat16().float(), half_NE.float()]
    values, gradients = [], []
    for records, activations in ([x_ND, z_NE], rounded):
        leaf = activations.double().requires_grad_()
        value = distance_correlation(records.double(), leaf)
        value.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        values.append(value.item())
        gradients.append(leaf.grad)
    gradient_error = torch.linalg.vector_norm(gradients[1] - gradients[0]) / torch.linalg.vector_norm(gradients[0])
    print(
        f"\nbf16 products, n = {n}, {d} and {e} values: {half / full:.2f} x the time of float32; inputs rounded to "
        f"bf16 change the value by {abs(values[1] / values[0] - 1):.0e} and the gradient by "
        f"{gradient_error.item():.0e}, relative"
    )


def _row(n: int, d: int, e: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(n + d + e)
    x_ND = torch.rand(n, d, generator=generator)
    z_NE = torch.relu((x_ND - 0.5) @ torch.randn(d, e, generator=generator)).requires_grad_()
    w_NN = torch.randn(n, n, generator=generator)

    def floor() -> None:
        with torch.no_grad():
            torch.mm(x_ND, x_ND.T)
            torch.mm(z_NE, z_NE.T)
            torch.mm(w_NN, z_NE)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run() -> None:
            z_NE.grad = None
            function(x_ND, z_NE).backward()  # type: ignore[no-untyped-call]

        return run

    contenders = (step(distance_correlation), step(_cdist_version), step(_gram_version), floor)
    ours, cdist, gram, lowest = _medians(contenders, rounds)
    forward = peak_bytes(lambda: distance_correlation(x_ND, z_NE)) / 4
    extra = max(forward, peak_bytes(contenders[0]) / 4 - n * e)  # what backward makes itself is the gradient (n, e)
    value_error, gradient_error = _errors(x_ND, z_NE)
    return {
        "ours_ms": ours * 1e3,
        "cdist": cdist / ours,
        "gram": gram / ours,
        "floor": ours / lowest,
        "extra": extra / n**2,
        "value_error": value_error,
        "gradient_error": gradient_error,
    }


def _medians(contenders: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """Median seconds of each; they take turns, so that a busy moment of the machine hits them all."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for run in contenders:
        run()
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - begin > PATIENCE_SECONDS:
            break
        for taken, run in zip(seconds, contenders, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [median(taken) for taken in seconds]


def _cdist_version(x_ND: Tensor, z_NE: Tensor) -> Tensor:
    return _plain(torch.cdist(x_ND, x_ND), torch.cdist(z_NE, z_NE))


def _gram_version(x_ND: Tensor, z_NE: Tensor) -> Tensor:
    def distances(x_ND: Tensor) -> Tensor:
        squares_N = x_ND.square().sum(1)
        return (squares_N[:, None] + squares_N - 2 * x_ND @ x_ND.T).clamp(min=1e-7).sqrt()

    return _plain(distances(x_ND), distances(z_NE))


def _plain(a_NN: Tensor, b_NN: Tensor) -> Tensor:
    def centered(a_NN: Tensor) -> Tensor:
        return a_NN - a_NN.mean(0) - a_NN.mean(1, keepdim=True) + a_NN.mean()

    a_NN, b_NN = centered(a_NN), centered(b_NN)
    return ((a_NN * b_NN).mean() / ((a_NN * a_NN).mean() * (b_NN * b_NN).mean()).sqrt()).sqrt()


def _errors(x_ND: Tensor, z_NE: Tensor) -> tuple[float, float]:
    """Relative error of value and gradient, float32 against float64."""
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf_NE = z_NE.detach().to(dtype, copy=True).requires_grad_()
        value = distance_correlation(x_ND.to(dtype), leaf_NE)
        value.backward()  # type: ignore[no-untyped-call]
        assert leaf_NE.grad is not None
        results.append((value.item(), leaf_NE.grad.double()))
    (value_32, gradient_32), (value_64, gradient_64) = results
    gradient_error = torch.linalg.vector_norm(gradient_32 - gradient_64) / torch.linalg.vector_norm(gradient_64)
    return abs(value_32 / value_64 - 1), gradient_error.item()


if __name__ == "__main__":
    main()
