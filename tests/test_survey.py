"""The survey's tables: our amounts from counts by hand, and verdicts that can go either way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from milkglass.cuts import cut, cut_costs, forward_flops
from milkglass.errors import CutError, RecipeError
from milkglass.survey import BANDWIDTH, COMPUTE, HEADS, bandwidth_rows, compute_rows, cut_fits, verdicts
from milkglass.survey_networks import records, resnet50, vgg16

# one record: every output number of a 3 x 3 convolution takes 9 multiply-adds for each channel that comes in
CONV1 = 2 * (64 * 32 * 32) * (9 * 3)
CONV2 = 2 * (64 * 32 * 32) * (9 * 64)


def by_hand(layers: list[tuple[int, int, int]], dense: list[tuple[int, int]]) -> int:
    """FLOPs forward of (channels in, out, side) convolutions and (in, out) layers."""
    return 2 * sum(9 * a * b * side * side for a, b, side in layers) + 2 * sum(a * b for a, b in dense)


VGG = [
    *[(3, 64, 32), (64, 64, 32), (64, 128, 16), (128, 128, 16)],
    *[(128, 256, 8), (256, 256, 8), (256, 256, 8)],
    *[(256, 512, 4), (512, 512, 4), (512, 512, 4)],
    *[(512, 512, 2)] * 3,
]


@pytest.mark.parametrize("head", HEADS)
def test_vgg_16_has_the_flops_of_a_count_by_hand(head: str) -> None:
    dense = {"10": [(512, 10)], "4096-4096-10": [(512, 4096), (4096, 4096), (4096, 10)]}[head]
    model = vgg16(10, HEADS[head])
    assert forward_flops(model, records()) == by_hand(VGG, dense)
    assert forward_flops(cut(model, "conv1").bottom, records()) == CONV1
    assert forward_flops(cut(model, "conv2").bottom, records()) == CONV1 + CONV2
    assert all(parameter.is_meta for parameter in model.parameters())


def test_compute_per_epoch_is_a_count_by_hand() -> None:
    """Three passes over 50,000 / K records."""
    fit = next(fit for fit in cut_fits() if (fit.head, fit.cut, fit.counting) == ("10", "conv1", "three times forward"))
    rows = {(row.way, row.clients): row for row in compute_rows(fit)}
    whole = by_hand(VGG, [(512, 10)])
    for clients in (100, 500):
        assert rows["split", clients].ours * 1e12 == pytest.approx(3 * CONV1 * 50_000 / clients)
        for way in ("federated", "large-batch"):
            assert rows[way, clients].ours * 1e12 == pytest.approx(3 * whole * 50_000 / clients)
    assert fit.share == pytest.approx(CONV1 / whole)


def test_a_first_layer_as_counted_has_two_passes_and_not_three() -> None:
    fits = {(fit.head, fit.cut, fit.counting): fit for fit in cut_fits()}
    whole = by_hand(VGG, [(512, 10)])
    assert fits["10", "conv1", "as counted"].share == pytest.approx(2 * CONV1 / (3 * whole - CONV1))


def test_the_first_layer_fits_best_and_no_other_cut_comes_near() -> None:
    fits = cut_fits()
    assert [abs(fit.off) for fit in fits] == sorted(abs(fit.off) for fit in fits)
    assert {fit.cut for fit in fits[:4]} == {"conv1"}
    assert abs(fits[0].off) < 0.02
    assert not fits[0].within_rounding
    assert all(fit.off > 10 for fit in fits if fit.cut != "conv1")


@pytest.mark.parametrize(("stem", "conv1"), [("cifar", 9 * 3 * 64), ("imagenet", 49 * 3 * 64)])
def test_resnet_50_has_its_parameters_and_its_cut(stem: str, conv1: int) -> None:
    """25,557,032 with 1,000 classes and a 7 x 7 stem, as published code has it; 100 classes, either stem."""
    model = resnet50(100, stem)  # type: ignore[arg-type]
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == 25_557_032 - 900 * (2048 + 1) - 49 * 3 * 64 + conv1
    shapes = {cost.name: cost.shape for cost in cut_costs(model, records())}
    assert shapes["conv1"] == ((64, 32, 32) if stem == "cifar" else (64, 16, 16))
    assert shapes["stage1"] == ((256, 32, 32) if stem == "cifar" else (256, 8, 8))


def test_the_networks_compute_when_they_have_weights() -> None:
    for model, classes in ((vgg16(10, (32,)), 10), (resnet50(100, "imagenet"), 100)):
        real = model.to_empty(device="cpu").eval()
        for tensor in (*real.parameters(), *real.buffers()):
            nn.init.constant_(tensor, 0.01)
        assert real(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_bandwidth_per_epoch_round_and_step_by_hand() -> None:
    rows = {(row.way, row.clients): row for row in bandwidth_rows()}
    numbers = 25_557_032 - 900 * 2049 - 49 * 3 * 64 + 27 * 64
    handed_on = 27 * 64 + 2 * 64
    for clients in (100, 500):
        q = 64 * 32 * 32
        assert rows["split", clients].ours * 1e9 == pytest.approx(4 * (2 * 50_000 * q / clients + handed_on))
        assert rows["federated", clients].ours * 1e9 == pytest.approx(8 * numbers)
        assert rows["large-batch", clients].ours * 1e9 == pytest.approx(16 * numbers * (clients - 1) / clients)


def test_a_row_says_the_published_figure_and_what_it_implies() -> None:
    for rows, table in ((compute_rows(), COMPUTE), (bandwidth_rows(), BANDWIDTH)):
        assert {(row.way, row.clients, row.published) for row in rows} == {
            (way, clients, float(told))
            for way, figures in table.items()
            for clients, told in zip((100, 500), figures, strict=True)
        }
        for row in rows:
            assert row.implied * row.ours == pytest.approx(row.published)
            assert row.low < row.implied < row.high
    split = next(row for row in compute_rows() if (row.way, row.clients) == ("split", 500))
    assert (split.low * split.ours, split.high * split.ours) == pytest.approx((0.025, 0.035))  # .03, as printed


def test_verdicts_tell_what_a_formula_explains_and_what_not() -> None:
    told = {(verdict.table, verdict.rows): verdict for verdict in verdicts([*compute_rows(), *bandwidth_rows()])}
    assert len(told) == 5 + 3
    inconsistent = [key for key, verdict in told.items() if not verdict.consistent]
    assert inconsistent == [("bandwidth", ("federated, 100 clients", "federated, 500 clients"))]
    assert told[inconsistent[0]].off == pytest.approx(2.4 / 3 - 1)
    assert "15.8 and 12.7 rounds" in told[inconsistent[0]].words
    assert told["compute", ("federated, 100 clients", "split, 100 clients")].off == pytest.approx(-0.012, abs=0.001)


def test_a_cut_that_does_not_fit_makes_the_split_column_inconsistent() -> None:
    fit = next(fit for fit in cut_fits() if (fit.head, fit.cut) == ("10", "conv2"))
    told = {verdict.rows[1]: verdict.consistent for verdict in verdicts(compute_rows(fit))}
    assert not told["split, 100 clients"]
    assert told["large-batch, 500 clients"]
    other = replace(cut_fits()[0], counting="as counted", share=cut_fits()[0].share * 2 / 3)
    assert not {v.rows[1]: v.consistent for v in verdicts(compute_rows(other))}["split, 100 clients"]


def test_unknown_stems_and_cuts_are_refused_in_a_line() -> None:
    with pytest.raises(RecipeError, match="stem 'cifr' is not known; did you mean 'cifar'"):
        resnet50(100, "cifr")  # type: ignore[arg-type]
    with pytest.raises(CutError, match="stage9"):
        bandwidth_rows(at="stage9")
