"""Sensitive attributes guessed from a model's answers and from its parameters, beside what mutual information allows.

    python -m benchmarks.attribute_information --data DIR [--out DIR]

After Del Grosso et al. 2021 (arXiv 2105.03875), whose theorem on attributes and parameters was not at hand; the safe
inequalities in its place are Fano's and Pinsker's (`leakage/information.py`). They are *upper* bounds: nobody who sees
only that, and has no prior beyond all values alike, guesses better. All success is balanced accuracy: values alike.

Answers (Adult, `sex` and `race`, an `mlp` by milkglass, with the two columns as inputs and without): the attacker sees
the probability of one class, rounded to .05, of a person that was not trained on. Mutual information is measured on the
records that are attacked: the upper end of a bootstrap interval, so the bound holds as a statistic does. `optimum` is
the Bayes guess by the measured frequencies; what lies between it and the bound is the inequality's slack.

Parameters (Adult): a person's attribute flips, and the model is trained on it and 99 others. The column is an input
here: the parameters depend on an attribute that is no input through the person's other columns alone, which the
attacker knows. A model whose sensitivity is known is needed, so it is no network: logistic regression with penalty
lambda, rows of norm 1 at most, Gaussian noise sigma on each weight (output perturbation: Chaudhuri et al., JMLR 2011,
who have Laplace-like noise). One attacker knows the 99 others and compares likelihoods: for a fair bit that is the best
there is. One does not know them, and fits a Gaussian to the parameters of trainings that it simulates. Mutual
information from above: `measured` uses how far the parameters really move for each set of others, `closed form` that
they move by 2 / (n lambda) at most. Both bound what either attacker can do, for they grant it the 99 others.

PenDigits, membership at 100 and 1,000 records, by `milkglass.bounds_files`. Our copy does not say who wrote what, so
the published inference of the writer (.333 among 44 at n = 100) cannot be repeated.

Legend: N records, F columns, G values of an attribute, L levels of an answer, S simulated trainings, D weights.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.nn import functional as F

from benchmarks.setting import command_line, machine_line
from milkglass.bounds_files import Measured, bounds_over_sizes
from milkglass.leakage.classification import balanced_accuracy_over_prior
from milkglass.leakage.estimate import Estimate
from milkglass.leakage.information import exact_fano_upper_bound, pinsker_upper_bound
from milkglass.randomness import public_source
from milkglass.recipe import parse_recipe
from milkglass.replay import load_parties
from milkglass.runs import RunFolder
from milkglass.training.split import Progress, Silence, train

ATTRIBUTES: Final = ("sex", "race")
ROUNDED: Final = 0.05
DRAWS: Final = 400  # of the bootstrap
RECORDS: Final = 100  # of the regression
PENALTY: Final = 0.02
SIGMAS: Final = (0.01, 0.03, 0.1, 0.3, 1.0)
TARGETS: Final = 30
SHADOWS: Final = 300  # sets of others that the second attacker simulates, and as many on which both are judged
LARGEST_ROW: Final = 4.0  # most rows are shorter; all are divided by it, longer ones cut back
LN2: Final = math.log(2)


def main() -> None:
    """Print the three tables, in markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of adult- and pendigits-{train,test}.npz")
    parser.add_argument("--out", type=Path, default=Path("runs/attribute-information"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"<!-- {command_line()}; {machine_line()} -->\n")
    for make in (answers_table, parameters_table, pendigits_table):
        print(make(arguments.data, arguments.out), flush=True)


# From the answers.


def answers_table(data: Path, out: Path) -> str:
    """A row for each attribute, with both as inputs and without."""
    lines = [
        "| Adult, from the answers: inputs | accuracy | attribute | values | attack (95 %) | optimum "
        "| information, bits (at most) | nobody above (Fano) | Pinsker |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for blind in (False, True):
        run = _trained(data, out, blind=blind)
        setup = load_parties(run)
        known, test = setup.records.auxiliary, setup.records.test
        known_L, test_L = (_levels(setup.client.predict(part.x)[0]) for part in (known, test))
        for name in ATTRIBUTES:
            values = 1 + int(max(known.attributes[name].max(), test.attributes[name].max()))
            fitted_GL = _frequencies(known_L, known.attributes[name], values, added=1.0)
            attack = balanced_accuracy_over_prior(fitted_GL.argmax(0)[test_L], test.attributes[name], values)
            found_GL = _frequencies(test_L, test.attributes[name], values)
            bits, most = information(found_GL), _upper_end(test_L, test.attributes[name], values)
            success = _from_prior(attack, values)
            lines.append(
                f"| {'without sex and race' if blind else 'all columns'} | {run.accuracy:.3f} | {name} | {values} "
                f"| {success.value:.3f} ({success.low:.3f} to {success.high:.3f}) "
                f"| {found_GL.max(0).values.sum().item() / values:.3f} | {bits:.4f} ({most:.4f}) "
                f"| {exact_fano_upper_bound(most, values):.3f} "
                f"| {f'{pinsker_upper_bound(most * LN2):.3f}' if values == 2 else '–'} |"
            )
    return "\n".join(lines) + "\n"


def information(frequency_GL: Tensor) -> float:
    """Mutual information in bits of an attribute, all G values alike, and the level that has these frequencies."""
    mixture_L = frequency_GL.mean(0)
    ratio_GL = (frequency_GL / mixture_L.clamp_min(1e-300)).log2()
    return torch.where(frequency_GL > 0, frequency_GL * ratio_GL, 0.0).sum().item() / len(frequency_GL)


def _frequencies(level_N: Tensor, attribute_N: Tensor, values: int, added: float = 0.0) -> Tensor:
    """How often each level comes with each value: (G, L), every row 1 in all."""
    levels = round(1 / ROUNDED) + 1
    count_GL = torch.full((values, levels), added, dtype=torch.float64)
    count_GL.index_put_((attribute_N, level_N), torch.ones(len(level_N), dtype=torch.float64), accumulate=True)
    return count_GL / count_GL.sum(1, keepdim=True)


def _upper_end(level_N: Tensor, attribute_N: Tensor, values: int) -> float:
    """97.5 % point of the information over bootstrap draws, each value's records drawn anew."""
    generator = public_source(0).generator("attribute information")
    rows_of = [(attribute_N == value).nonzero()[:, 0] for value in range(values)]
    drawn = []
    for _ in range(DRAWS):
        rows_N = torch.cat([rows[torch.randint(len(rows), (len(rows),), generator=generator)] for rows in rows_of])
        drawn.append(information(_frequencies(level_N[rows_N], attribute_N[rows_N], values)))
    return float(np.quantile(drawn, 0.975))


def _levels(logits_NK: Tensor) -> Tensor:
    return (logits_NK.double().softmax(1)[:, 1] / ROUNDED).round().long()


def _trained(data: Path, out: Path, *, blind: bool) -> RunFolder:
    """A network on Adult; blind: a copy of the file has the sensitive columns beside the inputs, not among them."""
    paths = {}
    for part in ("train", "test"):
        path = (data / f"adult-{part}.npz").resolve()
        if blind:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            names = [str(name) for name in arrays["categorical_names"]]
            for name in ATTRIBUTES:
                arrays[name] = arrays["categorical"][:, names.index(name)].astype(np.int64)
            kept = [index for index, name in enumerate(names) if name not in ATTRIBUTES]
            arrays |= {key: arrays[key][..., kept] for key in ("categorical", "categorical_names")}
            path = (out / f"adult-blind-{part}.npz").resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **arrays)
        paths[part] = str(path)
    recipe = parse_recipe(
        {
            "data": {
                **{"path": paths["train"], "test_path": paths["test"]},
                **{"train_records": 10_000, "sensitive": list(ATTRIBUTES)},
            },
            "network": {"name": "mlp"},
            "cut": {"at": "hidden1"},
            "training": {"epochs": 8, "batch_size": 128},
            "attacker": {"auxiliary_share": 0.4, "validation_share": 0.1},
        }
    )
    path = out / ("adult-blind" if blind else "adult")
    train(recipe, path, resume=True)
    return RunFolder.open_finished(path)


# From the parameters.


@dataclass(frozen=True)
class Adult:
    """x_NF: rows of norm 1 at most, with a constant last. y_N: -1 or 1. columns: where each attribute's values lie."""

    x_NF: Tensor
    y_N: Tensor
    columns: dict[str, slice]

    def flipped(self, row: int, name: str) -> Tensor:
        """The row with each value of the attribute in turn: (G, F)."""
        columns = self.columns[name]
        unit, width = self.x_NF[row, columns].max(), columns.stop - columns.start
        x_GF = self.x_NF[row].repeat(width, 1)
        x_GF[:, columns] = unit * torch.eye(width, dtype=torch.float64)
        return x_GF


def parameters_table(data: Path, _: Path) -> str:
    """A row for each attribute and sigma."""
    lines = [
        "| Adult, from the parameters: attribute | sigma | accuracy | attack that knows the others (95 %) "
        "| attack that does not (95 %) | information, bits: measured, closed form | nobody above (Fano): measured, "
        "closed form | Pinsker, measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    adult = _adult(data)
    for name in ATTRIBUTES:
        trials = [_Target(adult, row, name) for row in range(TARGETS)]
        values = trials[0].values
        for sigma in SIGMAS:
            scored = [trial.attacked(sigma) for trial in trials]
            knowing, simulating = (_mean([each[k] for each in scored]) for k in (0, 1))
            bits = float(np.mean([trial.bits(sigma) for trial in trials]))
            moved = 2 / (RECORDS * PENALTY) / sigma
            closed = float(fair_bit_information(np.array(moved))) if values == 2 else pairs_information(moved, values)
            accuracy = float(np.mean([trial.accuracy(sigma) for trial in trials]))
            pinsker = f"{pinsker_upper_bound(bits * LN2):.3f}" if values == 2 else "–"
            lines.append(
                f"| {name}, {values} values | {sigma:g} | {accuracy:.3f} | {_words(knowing)} | {_words(simulating)} "
                f"| {bits:.3f}, {closed:.3f} | {exact_fano_upper_bound(bits, values):.3f}, "
                f"{exact_fano_upper_bound(closed, values):.3f} | {pinsker} |"
            )
    return "\n".join(lines) + "\n"


class _Target:
    """One person whose attribute flips: the parameters of trainings with each value, over sets of others."""

    def __init__(self, adult: Adult, row: int, name: str) -> None:
        self._source = public_source(0).derive("attribute", name, row)
        self._adult = adult
        x_GF = adult.flipped(row, name)
        self.values = len(x_GF)
        generator = self._source.generator("others")
        rows_SN = torch.stack(
            [torch.randperm(len(adult.x_NF) - 1, generator=generator)[: RECORDS - 1] for _ in range(2 * SHADOWS)]
        )
        rows_SN += rows_SN >= row  # never the person itself
        others_SNF, y_SN = (
            adult.x_NF[rows_SN],
            torch.cat([adult.y_N[rows_SN], adult.y_N[row].expand(2 * SHADOWS, 1)], 1),
        )
        self._weights_GSD = torch.stack(
            [fit(torch.cat([others_SNF, x_F.expand(2 * SHADOWS, 1, -1)], 1), y_SN) for x_F in x_GF]
        )

    def attacked(self, sigma: float) -> tuple[float, float]:
        """Success of the attacker that knows the others, and of the one that simulates, on the second half of them."""
        generator = self._source.generator("noise", sigma)
        known_GSD, judged_GSD = self._weights_GSD[:, :SHADOWS], self._weights_GSD[:, SHADOWS:]
        seen_GSD = judged_GSD + sigma * torch.randn(judged_GSD.shape, generator=generator, dtype=torch.float64)
        truth_GS = torch.arange(self.values)[:, None].expand(-1, SHADOWS)
        near_GSG = (seen_GSD[:, :, None] - judged_GSD.transpose(0, 1)[None]).square().sum(3)
        knowing = (near_GSG.argmin(2) == truth_GS).double().mean().item()
        mean_GD = known_GSD.mean(1)
        spread_DD = torch.from_numpy(ledoit_wolf((known_GSD - mean_GD[:, None]).flatten(0, 1).numpy())[0])
        spread_DD = spread_DD + sigma**2 * torch.eye(len(spread_DD), dtype=torch.float64)
        solved_DG = torch.linalg.solve(spread_DD, mean_GD.T)
        score_GSG = seen_GSD @ solved_DG - (mean_GD.T * solved_DG).sum(0) / 2
        return knowing, (score_GSG.argmax(2) == truth_GS).double().mean().item()

    def bits(self, sigma: float) -> float:
        """Mutual information of the value and the noised parameters for who knows the others: at most this."""
        moved_GGS = (self._weights_GSD[:, None] - self._weights_GSD[None]).norm(dim=3) / sigma
        if self.values == 2:
            return float(fair_bit_information(moved_GGS[0, 1].numpy()).mean())
        nats_S = moved_GGS.square().mean((0, 1)) / 2  # the mean of all pairs' relative entropies is never less
        return float((nats_S / LN2).clamp(max=math.log2(self.values)).mean())

    def accuracy(self, sigma: float) -> float:
        """Of the noised models, on people of whom few were trained on."""
        weights_SD = self._weights_GSD[0, :SHADOWS]
        noise = torch.randn(weights_SD.shape, generator=self._source.generator("test", sigma), dtype=torch.float64)
        answer_NS = self._adult.x_NF[:1000] @ (weights_SD + sigma * noise).T
        return ((answer_NS > 0) == (self._adult.y_N[:1000, None] > 0)).double().mean().item()


def fit(x_SNF: Tensor, y_SN: Tensor, steps: int = 12) -> Tensor:
    """Penalized logistic regressions, (S, D), by Newton's method: mean log(1 + exp(-y w'x)) + lambda/2 |w|^2."""
    weights_SD = torch.zeros(len(x_SNF), x_SNF.shape[2], dtype=torch.float64)
    penalty_DD = PENALTY * torch.eye(x_SNF.shape[2], dtype=torch.float64)
    count = x_SNF.shape[1]
    for _ in range(steps):
        margin_SN = y_SN * (x_SNF @ weights_SD[..., None])[..., 0]
        wrong_SN = torch.sigmoid(-margin_SN)
        gradient_SD = -((y_SN * wrong_SN)[:, None] @ x_SNF)[:, 0] / count + PENALTY * weights_SD
        curved_SNF = (wrong_SN * (1 - wrong_SN))[..., None] * x_SNF
        step_SD = torch.linalg.solve(x_SNF.mT @ curved_SNF / count + penalty_DD, gradient_SD)
        weights_SD -= step_SD
        if step_SD.abs().max() < 1e-10:
            break
    return weights_SD


def fair_bit_information(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits that a normal number tells of which of two means, so many standard deviations apart, it has."""
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    half = np.asarray(distance)[..., None] / 2
    # 1 - E[log2(1 + exp(-2 h (h + Z)))]
    lost = np.logaddexp(0, -2 * half * (half + node)) / LN2
    return np.asarray(np.clip(1 - (lost * weight).sum(-1) / weight.sum(), 0, 1))


def pairs_information(distance: float, values: int) -> float:
    """Bits at most, where any two of the means are so many standard deviations apart or less."""
    return min(math.log2(values), (values - 1) / values * distance**2 / 2 / LN2)


def _adult(data: Path) -> Adult:
    with np.load(data / "adult-train.npz", allow_pickle=False) as file:
        numeric, codes, labels = file["numeric"].astype(np.float64), file["categorical"], file["labels"]
        names = [str(name) for name in file["categorical_names"]]
    scaled = np.clip((numeric - numeric.mean(0)) / numeric.std(0), -3, 3)
    parts, columns, width = [torch.from_numpy(scaled)], {}, scaled.shape[1]
    for index, name in enumerate(names):
        if name == "native-country":  # as many columns as all others together
            continue
        one_hot = F.one_hot(torch.from_numpy(codes[:, index].astype(np.int64))).double()
        columns[name] = slice(width, width + one_hot.shape[1])
        width += one_hot.shape[1]
        parts.append(one_hot)
    x_NF = torch.cat([*parts, torch.ones(len(labels), 1, dtype=torch.float64)], 1) / LARGEST_ROW
    x_NF /= x_NF.norm(dim=1, keepdim=True).clamp_min(1)
    order = torch.randperm(len(labels), generator=public_source(0).generator("people"))
    y_N = torch.from_numpy(np.where(labels > 0, 1.0, -1.0))
    return Adult(x_NF[order], y_N[order], columns)


def _mean(success: Sequence[float]) -> Estimate:
    """Over the people: the mean, and its 95 % interval."""
    half = 1.96 * float(np.std(success, ddof=1)) / math.sqrt(len(success))
    return Estimate(float(np.mean(success)), float(np.mean(success)) - half, float(np.mean(success)) + half)


def _words(found: Estimate) -> str:
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def _from_prior(found: Estimate, values: int) -> Estimate:
    return Estimate(*(end + 1 / values for end in (found.value, found.low, found.high)))


# PenDigits.


def pendigits_table(data: Path, out: Path) -> str:
    """Membership at 100 and 1,000 records."""
    recipe = parse_recipe(
        {
            "data": {
                **{"path": str((data / "pendigits-train.npz").resolve())},
                **{"test_path": str((data / "pendigits-test.npz").resolve())},
                **{"train_records": 1000, "test_records": 100},
            },
            "network": {"name": "mlp"},
            "cut": {"at": "hidden1"},
            "training": {"epochs": 50, "batch_size": 32},
            "attacker": {"auxiliary_share": 0.4, "validation_share": 0.1},
        }
    )
    train(recipe, out / "pendigits" / "size-1000", resume=True)
    _, made = bounds_over_sizes(
        out / "pendigits" / "size-1000", (100, 1000), out / "pendigits", training=_unwatched, tell=lambda _: None
    )
    lines = [
        "| PenDigits, membership: records | accuracy: members, others | gap (Brier) | bound as published "
        "| clipped bound (95 % sure) | probability > .8 (95 %) | best loss (95 %) | published attack, n not at hand |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_pendigits_row, made)]) + "\n"


def _pendigits_row(found: Measured) -> str:
    proof = found.proof
    sure, best = (_words(Estimate(each.value, each.low, each.high)) for each in proof.attacks[:2])
    return (
        f"| {found.records:,} | {proof.accuracy_on_members:.3f}, {proof.accuracy_on_others:.3f} "
        f"| {proof.gaps[0].value:.3f} | {proof.bounds[0].value:.3f} | {proof.bounds[2].value:.3f} "
        f"({proof.bounds[2].low:.3f}) | {sure} | {best} | .78 |"
    )


@contextlib.contextmanager
def _unwatched(_: int, __: str) -> Iterator[Progress]:
    yield Silence()


if __name__ == "__main__":
    main()
