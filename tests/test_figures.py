"""Charts and strips: every mark stands where its number says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from milkglass.figures import (
    BOTTOM,
    LEFT,
    LOWEST,
    RIGHT,
    TOP,
    Bar,
    Chart,
    Measured,
    Row,
    bars,
    chart,
    fit,
    number,
    picture,
    png,
    ticks,
)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.83, 0.97), (-0.01, 0.4), (0, 1234), (3e-5, 4e-5), (0, 0), (5, 5), (-2, -1), (1, 20)]
)
def test_ticks_are_even_and_reach_both_ends(low: float, high: float) -> None:
    marks = ticks(low, high)
    steps = np.diff(marks)
    assert 2 <= len(marks) <= 8
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    assert marks[0] <= low + 1e-9
    assert marks[-1] >= high - 1e-9


def test_numbers_in_words() -> None:
    values = (0.5, -0.004, -0.02, 12345.6, math.inf, -math.inf, math.nan)
    assert [number(v) for v in values] == ["0.50", "0.00", "−0.02", "12,346", "∞", "−∞", "not a number"]


def drawn(made: Chart | None) -> Chart:
    assert made is not None
    return made


def test_a_log_axis_puts_equal_ratios_at_equal_distances() -> None:
    pairs = (50, 100, 200, 800)
    made = drawn(chart("Error", "mse", {"ridge": [(n, 1 / n) for n in pairs]}, across="number of pairs", log=True))
    xs = [x for x, _, _ in made.lines[0][2]]
    assert (xs[0], xs[-1]) == (LEFT, RIGHT)
    np.testing.assert_allclose(np.diff(xs), (RIGHT - LEFT) * np.array([0.25, 0.25, 0.5]), atol=0.11)
    assert [words for _, words in made.x_ticks] == ["50", "100", "200", "800"]
    assert made.across == "number of pairs (log scale)"
    assert made.lines[0][2][1][2] == "ridge, number of pairs 100: 0.010"


def test_numbers_on_a_log_axis_keep_apart_and_the_last_one_stays() -> None:
    made = drawn(chart("Error", "mse", {"a": [(n, 0.1) for n in (50, 100, 3000, 5900, 6000)]}, log=True))
    places = [x for x, _ in made.x_ticks]
    assert made.x_ticks[-1][1] == "6,000"
    assert min(np.diff(places)) > 30
    assert places == sorted(places)


def test_the_level_stands_at_its_height_and_inside_the_box() -> None:
    points = [(1.0, 0.02), (2.0, 0.04)]
    made = drawn(chart("Error", "mse", {"a": points, "b": [(1.0, 0.06)]}, level=(0.06, "answer alone")))
    assert made.level is not None
    assert made.level[0] == made.lines[1][2][0][1]  # as high as the point of the same value
    above = drawn(chart("Error", "mse", {"a": points}, level=(0.3, "answer alone")))
    assert above.level is not None
    assert TOP <= above.level[0] < above.lines[0][2][1][1] < BOTTOM
    assert "answer alone: 0.300" in above.words


def test_the_axis_holds_its_foot_and_what_lies_below() -> None:
    def lowest(*values: float) -> str:
        points = list(enumerate(values, start=1))
        return drawn(chart("Success", "", {"a": points}, foot=0.5)).y_ticks[0][1]

    assert lowest(0.7, 0.9) == "0.5"
    assert lowest(0.5, 0.9) == "0.5"
    assert float(lowest(0.45, 0.9)) <= 0.45


def test_a_line_is_broken_where_a_value_is_no_number() -> None:
    made = drawn(chart("Loss", "", {"a": [(1, 3.0), (2, math.nan), (3, 2.0), (4, 1.0)]}))
    assert made.lines[0][1].count("M") == 2
    assert len(made.lines[0][2]) == 3
    assert chart("Loss", "", {"a": [(1, math.nan)]}) is None
    assert chart("Loss", "", {}) is None


def test_one_point_is_a_chart() -> None:
    for log in (False, True):
        made = drawn(chart("Loss", "", {"a": [(1, 3.0)]}, log=log))
        assert made.lines[0][2][0][0] == LEFT


def made_bars(*measured: Measured, budget: float | None = None) -> tuple[Bar, ...]:
    made = bars(measured, budget)
    assert made is not None
    return made.rows


def test_bars_are_sorted_and_end_at_their_values() -> None:
    made = bars([Measured("b", "fresh", 0.2, (0.1, 0.3)), Measured("a", "repeated", 0.8, (0.7, 0.9))], budget=0.25)
    assert made is not None
    assert [row.label for row in made.rows] == ["a", "b"]
    assert made.zero == 0.0
    assert made.budget == 25.0
    assert [row.bar for row in made.rows] == [(0.0, 80.0), (0.0, 20.0)]
    assert [row.whisker for row in made.rows] == [(70.0, 20.0), (10.0, 20.0)]
    assert [row.interval for row in made.rows] == ["0.70 to 0.90", "0.10 to 0.30"]
    assert made.words == (
        "Bar chart of 2 peeks, highest first: a, repeated, 0.80 to b, fresh, 0.20. "
        "0 is the answer alone, 1 the raw record. The budget is 0.25."
    )


def test_bars_say_what_zero_is() -> None:
    made = bars([Measured("a", "fresh", 0.8)], baseline="the mean record")
    assert made is not None
    assert made.words.endswith("0 is the mean record, 1 the raw record.")


def test_bars_below_zero_go_left_and_far_below_they_stop_at_the_edge() -> None:
    good, weak, bad = made_bars(
        Measured("good", "", 0.5), Measured("weak", "", -0.1, (-0.2, 0.0)), Measured("bad", "", -9.0, (-9.5, -8.5))
    )
    zero = 100 * -LOWEST / (1 - LOWEST)
    assert good.bar == pytest.approx((zero, 50 / (1 - LOWEST)))
    assert weak.bar == pytest.approx((zero - 10 / (1 - LOWEST), 10 / (1 - LOWEST)))
    assert not weak.beyond
    assert bad.bar == (0.0, zero)
    assert bad.beyond
    assert bad.whisker is None
    assert (bad.value, bad.interval) == ("−9.00", "−9.50 to −8.50")


def test_a_peek_that_is_no_number_comes_last_and_has_no_bar() -> None:
    rows = made_bars(Measured("odd", "", math.nan, (math.nan, math.nan)), Measured("low", "", -0.2))
    assert [row.label for row in rows] == ["low", "odd"]
    assert rows[1].bar is rows[1].whisker is None
    assert rows[1].value == "not a number"
    assert bars([]) is None


def test_a_page_of_many_pictures_shows_fewer_and_smaller_ones() -> None:
    noise = np.random.default_rng(0).random((10, 3, 96, 96), dtype=np.float32)
    for rows in (1, 20, 200, 700):
        shown, longest = fit([[Row("a", "", "", noise)] * rows])
        count = rows * shown
        assert count * len(png(picture(noise[0], longest))) * 4 / 3 < 2_700_000
        assert 2 <= shown <= 10
        assert 8 <= longest <= 96
    assert fit([[Row("a", "", "", noise)]]) == (10, 96)
    assert fit([]) == (10, 96)


def test_grey_pictures_may_be_larger_than_colored_ones() -> None:
    grey, colored = (np.zeros((10, channels, 96, 96), np.float32) for channels in (1, 3))
    assert fit([[Row("", "", "", grey)] * 100])[1] > fit([[Row("", "", "", colored)] * 100])[1]


def test_pictures_are_never_enlarged_and_survive_values_that_are_no_numbers() -> None:
    record = np.full((1, 8, 8), np.nan, np.float32)
    record[0, 0, 0] = 2.0
    image = picture(record, 96)
    assert image.size == (8, 8)
    assert isinstance(image, Image.Image)
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == (255, 0)
    assert picture(np.zeros((4, 200, 100), np.float32), 50).size == (25, 50)
