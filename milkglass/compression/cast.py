"""Half precision on the wire: float16 (IEEE 754) or bfloat16 (the exponents of float32, three digits fewer).

Where we differ from a plain cast: a value too large for the smaller type is clamped, so that a large activation does
not look like a training that diverged. It matters for float16, whose largest value is 65,504.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor

from milkglass.compression.base import Compressor, Part, saturating
from milkglass.errors import RecipeError

_NAMES: Final = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@final
class Cast(Compressor):
    """Sends every value rounded to `dtype`, float16 or bfloat16.

    Finite values beyond the largest finite one of that dtype are clamped to it (float16: 65,504). NaN stays NaN, and
    an infinity an infinity: the checks for finite values must still find them.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in _NAMES:
            raise RecipeError(f"cast: dtype is {dtype}; expected torch.float16 or torch.bfloat16")
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"Cast({self.dtype})"

    def describe(self) -> str:
        return _NAMES[self.dtype]

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Part]:  # noqa: ARG002
        return {"values": Part(tuple(shape), self.dtype)}

    def _compress(self, x: Tensor) -> dict[str, Tensor]:
        return {"values": saturating(x, self.dtype)}

    def _decompress(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        return saturating(parts["values"], dtype)
