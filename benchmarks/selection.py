"""What it takes to choose what is sent of a gradient: Gaussian-k against torch.topk, fair DGC, and the memory itself.

    python -m benchmarks.selection [--sizes 1e5 1e6 1e7 1e8] [--threads 1 2] [--device cpu] [--out FILE.json]
    python -m benchmarks.selection --real [--data DIR] [--out FILE.json]

One process; the contenders take turns, each with what itself left over, on a new gradient of normal numbers at every
repetition. Timed is all of it: adding the gradient to what was left over, choosing, taking the chosen numbers out. The
floor is two passes over memory, `u.add_(g)` and the dot product of u with itself, and chooses nothing. "Cold" is told
nothing of the step before. `torch.topk` is the plain call; ours is exact too, and searches by blocks. Ratios are
medians over the repetitions, with the middle half.

--real trains a perceptron with error feedback, once for each way and density, and counts the steps that send from 2/3
to 4/3 of what was asked. Digits, and with --data Fashion-MNIST. "By the guard": just the count asked for.

Legend: D numbers of a vector.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.setting import command_line, machine_line, write_result
from benchmarks.turns import Ratio, ratio
from milkglass.compression.error_feedback import ErrorFeedback
from milkglass.compression.gaussian_k import GaussianK, PublishedGaussianK, too_few, too_many
from milkglass.compression.sampled_topk import SampledTopK
from milkglass.compression.topk import ExactTopK
from milkglass.compression.vector import Selected, Selector, count_of, squares
from milkglass.networks import mlp

_DENSITY: Final = 0.001
_LONGEST: Final = 2e8  # numbers in all repetitions of a size
_REPETITIONS: Final = (7, 200)
_FLOOR: Final = "two passes over memory"
_PLAIN: Final = "torch.topk"
_STEPS: Final = 300
_BATCH: Final = 64

Step = Callable[[Tensor], int]
"""Takes a gradient (D,); returns how many numbers were sent."""


@final
class PlainTopK(Selector):
    """Exact top-k in one call of torch's."""

    def __init__(self, density: float) -> None:
        self.density = density

    def describe(self) -> str:
        return _PLAIN

    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:  # noqa: ARG002
        assert plus_D is not None
        u_D.add_(plus_D)
        indexes = u_D.abs().topk(count_of(self.density, len(u_D)), sorted=False).indices
        return Selected(indexes, squares(u_D))


def main() -> None:
    """Time the contenders, or train, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--real", action="store_true", help="train in place of timing")
    parser.add_argument("--data", type=Path, help="with --real: a folder with fashion-mnist-train.npz")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is at hand; expected one that torch can use")
    print(f"{command_line()}\n{machine_line()}\n")
    if arguments.real:
        rows = list(_real_rows(arguments.data))
    else:
        threads = arguments.threads if arguments.device == "cpu" else [torch.get_num_threads()]
        rows = list(_timed_rows([int(size) for size in arguments.sizes], threads, torch.device(arguments.device)))
    if arguments.out:
        write_result(arguments.out, rows)


def _timed_rows(sizes: Sequence[int], threads: Sequence[int], device: torch.device) -> Iterator[dict[str, Any]]:
    print("| numbers | threads | way | times as fast as torch.topk | times the floor | sent / asked |")
    print("|---|---|---|---|---|---|")
    for length in sizes:
        for count in threads:
            torch.set_num_threads(count)
            repetitions = max(_REPETITIONS[0], min(_REPETITIONS[1], int(_LONGEST / length)))
            times, sent = measure(length, repetitions, device)
            asked = count_of(_DENSITY, length)
            for name, seconds in times.items():
                faster, floors = ratio(times[_PLAIN], seconds), ratio(seconds, times[_FLOOR])
                row = {"numbers": length, "threads": count, "device": str(device), "way": name}
                row |= {"repetitions": repetitions, "faster": vars(faster), "floors": vars(floors)}
                row |= {"asked": asked, "sent": [min(sent[name]), max(sent[name])]}
                yield row
                print(
                    f"| {length:.0e} | {count} | {name} | {_cells(name, faster, floors, sent[name], asked)} |",
                    flush=True,
                )


def measure(length: int, repetitions: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """By contender: seconds and counts for each repetition. One before them is not counted."""
    steps = _contenders(length, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    sent: dict[str, list[int]] = {name: [] for name in steps}
    names, generator = list(steps), torch.Generator(device).manual_seed(0)
    g_D = torch.empty(length, device=device)
    for repetition in range(repetitions + 1):
        g_D.normal_(generator=generator)
        shift = repetition % len(names)  # nobody is always behind the same one
        for name in names[shift:] + names[:shift]:
            seconds, count = _timed(steps[name], g_D)
            if repetition:
                times[name].append(seconds)
                sent[name].append(count)
    del steps
    gc.collect()
    return times, sent


def _timed(step: Step, g_D: Tensor) -> tuple[float, int]:
    if not g_D.is_cuda:
        began = time.perf_counter()
        count = step(g_D)
        return time.perf_counter() - began, count
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    first.record()
    count = step(g_D)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, count


def _contenders(length: int, device: torch.device) -> dict[str, Step]:
    def compressed(selector: Selector, *, cold: bool = False) -> Step:
        feedback = ErrorFeedback(selector, torch.zeros(length, device=device))

        def step(g_D: Tensor) -> int:
            if cold:
                feedback.hint = None
            return len(feedback.take(g_D).parts["indexes"])

        return step

    u_D = torch.zeros(length, device=device)

    def floor(g_D: Tensor) -> int:
        u_D.add_(g_D)
        torch.dot(u_D, u_D).item()
        return 0

    return {
        _FLOOR: floor,
        "Gaussian-k": compressed(GaussianK(_DENSITY)),
        "Gaussian-k, cold": compressed(GaussianK(_DENSITY), cold=True),
        "Gaussian-k as published": compressed(PublishedGaussianK(_DENSITY)),
        _PLAIN: compressed(PlainTopK(_DENSITY)),
        "exact top-k by blocks": compressed(ExactTopK(_DENSITY)),
        "DGC, fair": compressed(SampledTopK(_DENSITY, torch.Generator(device).manual_seed(1))),
    }


def _cells(name: str, faster: Ratio, floors: Ratio, sent: Sequence[int], asked: int) -> str:
    counts = "" if name == _FLOOR else f"{min(sent) / asked:.2f}-{max(sent) / asked:.2f}"
    return f"{faster.words()} | {floors.words()} | {counts}"


def _real_rows(data: Path | None) -> Iterator[dict[str, Any]]:
    print("| data | numbers | density | way | steps in the band, % | sent / asked | by the guard, % |")
    print("|---|---|---|---|---|---|---|")
    for name, (x, labels) in _data(data).items():
        for density in (0.001, 0.01):
            for selector in (GaussianK(density), PublishedGaussianK(density)):
                length, counts = train(x, labels, selector)
                asked = count_of(density, length)
                inside = sum(not too_few(count, asked) and not too_many(count, asked) for count in counts) / len(counts)
                row = {"data": name, "numbers": length, "density": density, "way": selector.describe()}
                row |= {"asked": asked, "in_band": inside, "sent": counts}
                yield row
                guarded = f"{100 * counts.count(asked) / len(counts):.1f}" if isinstance(selector, GaussianK) else ""
                spread = f"{min(counts) / asked:.2f}-{max(counts) / asked:.2f}"
                cells = f"{name} | {length} | {density:g} | {selector.describe().partition(',')[0]}"
                print(f"| {cells} | {100 * inside:.1f} | {spread} | {guarded} |", flush=True)


def train(x: Tensor, labels: Tensor, selector: Selector) -> tuple[int, list[int]]:
    """Train a perceptron on records x (N, ...); its number of parameters, and how many numbers each step sent."""
    torch.manual_seed(0)
    model = mlp(x.shape[1:], 10, hidden=(512, 256))
    parameters = list(model.parameters())
    feedback = ErrorFeedback(selector, torch.zeros(sum(parameter.numel() for parameter in parameters)))
    sgd, counts = torch.optim.SGD(parameters, lr=0.1), []
    for _ in range(_STEPS):
        batch = torch.randint(len(x), (_BATCH,))
        sgd.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(x[batch]), labels[batch]))
        taken = feedback.take(torch.cat([_gradient(parameter).flatten() for parameter in parameters]))
        sent_D = torch.zeros_like(feedback.left_D)
        selector.add_to(sent_D, taken.parts)
        for parameter, part in zip(parameters, torch.split(sent_D, [p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)
        sgd.step()
        counts.append(len(taken.parts["indexes"]))
    return len(feedback.left_D), counts


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _data(folder: Path | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Records and labels by name."""
    digits = load_digits()
    sets = {"digits": (torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target))}
    if folder is not None:
        with np.load(folder / "fashion-mnist-train.npz", allow_pickle=False) as file:
            images, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
        sets["Fashion-MNIST"] = images.float().flatten(1) / 255, labels
    return sets


if __name__ == "__main__":
    main()
