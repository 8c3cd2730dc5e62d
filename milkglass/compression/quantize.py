"""Eight-bit integers on the wire: symmetric uniform quantization (Jacob et al. 2018, arXiv 1712.05877, without their
zero point), with a scale that is measured on the values to be sent.

Where we differ from the usual scale, largest value / 127: ours is rounded up, so that no value needs more than 127
steps and the error stays within half a step down to the smallest numbers. And there is no scale for the whole batch: it
would tell each record something of the others.

Legend: B records, C channels, D values of a record, P values of a channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, final

import torch
from torch import Tensor

from milkglass.compression.base import Compressor, Part
from milkglass.errors import MessageError

_STEPS: Final = 127  # either side of zero; -128 is not used


@final
class Int8(Compressor):
    """Sends each value as a whole number of steps from -127 to 127, and the step, `scales` in float32.

    A record has a scale for each channel: dimension 1 of (B, C, ...) with three dimensions or more; one in all for
    (B, D). A scale takes 4 bytes, so it pays where a channel has many values. The error is at most half a step beside
    the rounding to the tensor's own dtype; a channel of zeros comes back as zeros. Values so large that the step is no
    float32 (above 4e40, in float64 only) are clamped. NaN and infinities cannot be sent.
    """

    def __repr__(self) -> str:
        return "Int8()"

    def describe(self) -> str:
        return "int8, a scale for each record and channel"

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Part]:  # noqa: ARG002
        scales_shape = (shape[0], _channels(shape))
        return {"values": Part(tuple(shape), torch.int8), "scales": Part(scales_shape, torch.float32)}

    def _compress(self, x: Tensor) -> dict[str, Tensor]:
        wide = _wide(x.dtype)
        x_BCP = x.reshape(len(x), _channels(x.shape), -1).to(wide)
        scales_BC = _scales(x_BCP)
        steps_BC1 = torch.where(scales_BC > 0, scales_BC, 1).to(wide).unsqueeze(2)  # 0/0 has no integer
        values_BCP = (x_BCP / steps_BC1).round_().clamp_(-_STEPS, _STEPS).to(torch.int8)
        return {"values": values_BCP.reshape(x.shape), "scales": scales_BC}

    def _decompress(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        scales_BC = parts["scales"]
        if not bool(((scales_BC >= 0) & (scales_BC < math.inf)).all()):  # not so for NaN either
            raise MessageError("int8: a scale is negative or not finite; expected numbers from 0 on")
        wide = _wide(dtype)
        values_BCP = parts["values"].reshape(*scales_BC.shape, -1).to(wide)
        limit = torch.finfo(wide).max  # 127 steps rounded up may be above the largest value by a hair
        x_BCP = values_BCP.mul_(scales_BC.to(wide).unsqueeze(2)).clamp_(-limit, limit)
        return x_BCP.to(dtype).reshape(tuple(shape))


def _scales(x_BCP: Tensor) -> Tensor:
    """The smallest float32 step (B, C) of which 127 reach the channel's largest value; 0 for a channel of zeros."""
    low_BC, high_BC = torch.aminmax(x_BCP, dim=2)
    largest_BC = torch.maximum(low_BC.abs(), high_BC.abs()).double()
    if not bool(torch.isfinite(largest_BC).all()):
        raise MessageError("int8: values to be sent are not finite (NaN or infinity); training has diverged")
    near_BC = (largest_BC / _STEPS).float()
    above_BC = torch.nextafter(near_BC, near_BC.new_tensor(math.inf))
    short_BC = near_BC.double() * _STEPS < largest_BC  # the product is exact
    return torch.where(short_BC, above_BC, near_BC).clamp(max=torch.finfo(torch.float32).max)


def _channels(shape: Sequence[int]) -> int:
    return shape[1] if len(shape) > 2 else 1


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
