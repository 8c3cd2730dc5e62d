"""Public numbers repeat for everybody; private ones for the holder of the key alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import scipy.stats
import torch

from milkglass.errors import RecipeError
from milkglass.randomness import Source, drawing_from, public_source, read_key, rehearsal_source, write_key


def test_streams_repeat_and_are_independent() -> None:
    one, again, other = Source(b"a" * 32), Source(b"a" * 32), Source(b"b" * 32)
    assert torch.equal(torch.rand(9, generator=one.generator("x", 1)), torch.rand(9, generator=again.generator("x", 1)))
    draws = [
        torch.rand(9, generator=generator)
        for generator in (one.generator("x"), one.generator("y"), other.generator("x"), one.derive("x").generator("x"))
    ]
    for index, draw in enumerate(draws):
        assert all(not torch.isclose(draw, later).any() for later in draws[index + 1 :])
    assert not torch.equal(one.gaussian((5,), 0), one.gaussian((5,), 1))


def test_torch_keeps_32_bits_of_a_seed_and_we_do_not() -> None:
    # why `Source.generator` fills the whole state: torch's own seeding could be tried out, all of it
    low, high = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5 + 2**32)
    assert torch.equal(torch.rand(9, generator=low), torch.rand(9, generator=high))
    words = Source(b"a" * 32).generator("x").get_state().view(torch.int64)[3 : 3 + 624]
    assert len(torch.unique(words)) == 624
    assert words.max() < 2**32
    assert words.float().mean() == pytest.approx(2**31, rel=0.1)


def test_generators_draw_uniform_and_fair_numbers() -> None:
    generator = Source(b"a" * 32).generator("x")
    assert scipy.stats.kstest(torch.rand(20_000, generator=generator).numpy(), "uniform").pvalue > 1e-3
    assert sorted(torch.randperm(100, generator=generator).tolist()) == list(range(100))


def test_gaussian_is_standard_normal_to_the_tails() -> None:
    drawn = Source(b"k" * 32).gaussian((400_001,), 0, torch.float64)
    assert scipy.stats.kstest(drawn.numpy(), "norm").pvalue > 1e-3
    assert 4 < drawn.abs().max() < 7
    assert torch.isfinite(drawn).all()
    halves = drawn[:200_000], drawn[200_000:400_000]
    assert abs(torch.corrcoef(torch.stack(halves))[0, 1]) < 0.01  # the two numbers of one Box-Muller pair


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)])
def test_gaussian_shapes_and_dtypes(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.float64):
        drawn = public_source(0).gaussian(shape, 0, dtype)
        assert drawn.shape == shape
        assert drawn.dtype == dtype


def test_drawing_from_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    generator = public_source(1).generator("x")
    with drawing_from(generator):
        first = torch.rand(3)
    with drawing_from(generator):
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.cat([first, second]), torch.rand(6, generator=public_source(1).generator("x")))


def test_keys(tmp_path: Path) -> None:
    path = tmp_path / "key"
    made = write_key(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert torch.equal(read_key(path).gaussian((3,), 0), made.gaussian((3,), 0))
    with pytest.raises(FileExistsError):
        write_key(path)
    path.write_bytes(b"short")
    with pytest.raises(RecipeError, match="5 bytes; a key is 32 raw bytes"):
        read_key(path)
    with pytest.raises(RecipeError, match="No such file"):
        read_key(tmp_path / "none")
    with pytest.raises(RecipeError, match="32 raw bytes, this one has 3"):
        Source(b"abc")
    assert path.name not in repr(made)
    assert repr(made) == "Source(<32 bytes, not shown>)"


def test_rehearsal_keys_differ_by_party_and_seed() -> None:
    draws = [
        source.gaussian((4,), 0)
        for source in (rehearsal_source(0, "a"), rehearsal_source(0, "b"), rehearsal_source(1, "a"))
    ]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
