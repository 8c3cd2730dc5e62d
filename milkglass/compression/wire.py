"""Which compressor a recipe names for its messages."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from milkglass.compression.base import Compressor, Identity
from milkglass.compression.cast import Cast
from milkglass.compression.quantize import Int8
from milkglass.compression.topk import TopK
from milkglass.errors import RecipeError, nearest

CompressorKind = Literal["none", "fp16", "bf16", "int8", "topk"]


def compressor_of(kind: CompressorKind, share: float) -> Compressor:
    """The compressor of that name. share: of each record's values, for "topk"; the others do not use it."""
    match kind:
        case "none":
            return Identity()
        case "fp16":
            return Cast(torch.float16)
        case "bf16":
            return Cast(torch.bfloat16)
        case "int8":
            return Int8()
        case "topk":
            return TopK(share)
    raise RecipeError(f"compression {kind!r} is not known; {nearest(kind, get_args(CompressorKind))}")
