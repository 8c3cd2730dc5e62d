"""The largest values alone on the wire: exact top-k, as Aji and Heafield (2017, arXiv 1704.05021) send gradients.

`ExactTopK` is theirs, of a whole vector. `TopK`, of messages, differs: k values of each record, and nothing is kept of
what was not sent. In split learning it is the plain one of the methods that Zheng et al. (2023, arXiv 2305.18469)
compare; their randomized one, which sends some small values too, is not here.

Legend: B records, D values of a record or of a vector, K of them sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final, final

import torch
from torch import Tensor

from milkglass.compression.base import Compressor, Part
from milkglass.compression.peaks import largest
from milkglass.compression.vector import Selected, Selector, check_density, count_of
from milkglass.errors import MessageError, RecipeError

_MOST_VALUES: Final = 2**31 - 1  # an index must fit in an int32


@final
class TopK(Compressor):
    """Sends the ceil(`share` * D) values of each record that are farthest from zero, and where they stand.

    Those come back with the same bits, all others as zero. Of equally large ones, torch.topk chooses. A value costs its
    own bytes and 4 for its index: float32 with a share above a half is larger than without.
    """

    def __init__(self, share: float) -> None:
        if not 0 < share <= 1:
            raise RecipeError(f"top-k: share is {share}; expected a number above 0, at most 1")
        self.share = share

    def __repr__(self) -> str:
        return f"TopK(share={self.share})"

    def describe(self) -> str:
        return f"top-k, share {self.share:g} of each record's values"

    def layout(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Part]:
        sent_shape = (shape[0], self._count(math.prod(shape[1:])))
        return {"values": Part(sent_shape, dtype), "indexes": Part(sent_shape, torch.int32)}

    def _count(self, values: int) -> int:
        if values > _MOST_VALUES:
            raise MessageError(f"top-k: {values} values a record; at most {_MOST_VALUES} have an int32 index")
        return math.ceil(Fraction(str(self.share)) * values)  # in floats, 0.07 * 100 is above 7

    def _compress(self, x: Tensor) -> dict[str, Tensor]:
        count = self._count(math.prod(x.shape[1:]))
        x_BD = x.flatten(1)
        indexes_BK = x_BD.abs().topk(count, dim=1, sorted=False).indices.sort(dim=1).values
        return {"values": x_BD.gather(1, indexes_BK), "indexes": indexes_BK.to(torch.int32)}

    def _decompress(self, parts: Mapping[str, Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        values_BK, indexes_BK = parts["values"], parts["indexes"]
        length = math.prod(shape[1:])
        ascending = bool((indexes_BK[:, 1:] > indexes_BK[:, :-1]).all())
        if not ascending or bool((indexes_BK[:, 0] < 0).any()) or bool((indexes_BK[:, -1] >= length).any()):
            raise MessageError(f"top-k: a record's indexes are not ascending numbers from 0 to {length - 1}")
        x_BD = torch.zeros(shape[0], length, dtype=dtype, device=values_BK.device)
        return x_BD.scatter_(1, indexes_BK.long(), values_BK).reshape(tuple(shape))


@final
class ExactTopK(Selector):
    """Sends the max(1, int(`density` * D)) numbers of a vector that are farthest from zero, and no zeros.

    Of equally large ones, torch.topk chooses. Long vectors are searched by blocks (`peaks.py`), just as exactly.
    """

    def __init__(self, density: float) -> None:
        self.density = check_density(density)

    def __repr__(self) -> str:
        return f"ExactTopK(density={self.density})"

    def describe(self) -> str:
        return f"top-k, density {self.density:g}"

    def _select(self, u_D: Tensor, plus_D: Tensor | None, hint: float | None) -> Selected:  # noqa: ARG002
        return Selected(*largest(u_D, plus_D, count_of(self.density, len(u_D))))
