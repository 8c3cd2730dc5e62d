"""Error feedback: what one step leaves over is added to the next (Seide et al. 2014; Karimireddy et al. 2019, arXiv
1901.09847). And, as an option, momentum correction with factor masking (Lin et al. 2018, arXiv 1712.01887).

Where we differ: Karimireddy et al. scale by the learning rate before they compress; here the gradient is compressed, as
in GaussianK-SGD, so a learning rate that changes applies to what is left over too. Momentum correction stops the
momentum of numbers that are sent. What sends every number, only less exactly, has nothing that waits: there the
velocity stays, and without compression at all what is sent is the velocity of momentum SGD. A selector with density 1
stops every momentum, and so is SGD without.

Legend: D numbers of a vector, K of them sent.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from milkglass.compression.base import saturating
from milkglass.compression.vector import Selector, Taken, VectorCompressor
from milkglass.errors import MessageError, RecipeError

_WIDE = (torch.float32, torch.float64)


@final
class ErrorFeedback:
    """A compressor with the memory of one vector.

    left_D: what was left over, float32 or float64; changed in place, here and nowhere else. momentum: 0 = off; else
    `take` sends the sum of velocities, not of gradients, and the optimizer has no momentum of its own. velocity_D:
    zeros at first, None without momentum. hint: what the compressor said last. All three may be set, to resume.
    """

    def __init__(self, compressor: VectorCompressor, left_D: Tensor, momentum: float = 0.0) -> None:
        if left_D.dtype not in _WIDE:
            raise RecipeError(f"error feedback: what is left over is {left_D.dtype}; expected float32 or float64")
        if not 0 <= momentum < 1:
            raise RecipeError(f"error feedback: momentum is {momentum}; expected a number from 0, below 1")
        self.compressor = compressor
        self.left_D = left_D
        self.momentum = momentum
        self.velocity_D = torch.zeros_like(left_D) if momentum else None
        self.hint: float | None = None
        self._stopped: tuple[Tensor, Tensor] | None = None

    def take(self, g_D: Tensor) -> Taken:
        """What is sent of `g_D` and of what was left over; the parts have the dtype of `left_D`. Raises MessageError.

        g_D: the step's gradient, contiguous and finite, of any float dtype; it is not changed.
        """
        if g_D.shape != self.left_D.shape:
            raise MessageError(
                f"error feedback: a gradient of shape {tuple(g_D.shape)}; expected {tuple(self.left_D.shape)}"
            )
        plus_D = g_D
        if self.velocity_D is not None:
            plus_D = self.velocity_D.mul_(self.momentum).add_(g_D)
        taken = self.compressor.take(self.left_D, plus_D, self.hint)
        self.hint = taken.hint
        if self.velocity_D is not None and isinstance(self.compressor, Selector):
            indexes_K = taken.parts["indexes"]
            self._stopped = indexes_K, self.velocity_D[indexes_K]
            self.velocity_D[indexes_K] = 0
        return taken

    def flush(self, g_D: Tensor) -> None:
        """Add to `g_D`, in place, what was left over, for a step that is not compressed: nothing is left.

        With momentum `g_D` becomes the velocity. What a half precision of `g_D` does not hold stays left over.
        """
        self.left_D.add_(g_D if self.velocity_D is None else self.velocity_D.mul_(self.momentum).add_(g_D))
        g_D.copy_(saturating(self.left_D, g_D.dtype))
        self.left_D.sub_(g_D)

    def put_back(self, taken: Taken) -> None:
        """Undo the sending of the last `take`: `left_D` is then all that was to be sent, to one unit in the last place.

        For a step that is sent without compression after all: send `left_D` and set it to zero.
        """
        self.compressor.add_to(self.left_D, taken.parts)
        if self.velocity_D is not None and self._stopped is not None:
            indexes_K, velocity_K = self._stopped
            self.velocity_D[indexes_K] = velocity_K
        self._stopped = None
