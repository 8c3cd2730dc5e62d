"""Opacus' clipping optimizer and per-record gradients, with a party's own noise. Only `dp.py` makes one.

Legend: B records in a batch; `...` a parameter's own shape.

Where it differs from Opacus 1.6:
- The noise is ChaCha20's under the party's key, not a Mersenne Twister's, whose next outputs follow from its last ones
  (Opacus' own secure mode needs the same). It is bound to the sum that it hides (`NoiseStream`), so that two runs under
  one key do not add the same numbers to two different sums. It is added in float64 and rounded with the sum.
- A record's gradient is taken by a hook on a layer's *output*. Opacus' hook on the layer's backward pass warns at every
  first layer, whose input needs no gradient, and refuses layers that work in place.
- The hooks are at work from `zero_grad` to `step` only: whoever differentiates a stage at another time meets none.
- Before a step it is checked that every parameter has one gradient for each record.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, cast, final

import torch
from opacus.grad_sample.functorch import prepare_layer
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.layers.dp_rnn import DPGRU, DPLSTM, DPRNN
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from milkglass.defenses.base import NoiseStream
from milkglass.errors import CutError
from milkglass.private.dp import Mechanism
from milkglass.randomness import Source
from milkglass.tracing import in_mode

_RECURRENT: Final = (DPRNN, DPLSTM, DPGRU)  # Opacus watches the linear layers inside them


@final
class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """A step of `optimizer` on clipped and noised gradients of `modules`; see `dp.make_private` for its use.

    mechanism: as given. block: how many steps have drawn noise so far, the only state beside the inner optimizer's.
    """

    def __init__(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer, mechanism: Mechanism, source: Source
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.batch_size,
        )
        self.mechanism = mechanism
        self._noise = NoiseStream(source.derive("dp"))
        self._hooks = [RecordHooks(module) for module in modules]
        self.zero_grad()
        self._rest()

    @property
    def block(self) -> int:
        """Steps so far: what a checkpoint must keep, so that no noise is drawn twice, and none skipped."""
        return self._noise.block

    @block.setter
    def block(self, block: int) -> None:
        self._noise.block = block

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, also those of a step that was broken off; from here on records are watched."""
        super().zero_grad(set_to_none)
        for hooks in self._hooks:
            hooks.forget()
            hooks.enable_hooks()

    def pre_step(self, closure: Any = None) -> bool | None:
        """Clip and noise. Raises CutError where a parameter has not one gradient for each record."""
        self._rest()
        records = max((hooks.records for hooks in self._hooks), default=0)
        for parameter in self.params:
            if records == 0 or parameter.grad_sample is None:  # an empty batch, or what the loss does not hang on
                parameter.grad_sample = parameter.new_zeros(records, *parameter.shape)
            elif not isinstance(parameter.grad_sample, Tensor) or len(parameter.grad_sample) != records:
                raise CutError(
                    f"dp: a weight of shape {tuple(parameter.shape)} has not one gradient for each of {records} "
                    "records: it is used once for a whole batch, or several batches came before a step"
                )
        return cast(bool | None, super().pre_step(closure))

    def add_noise(self) -> None:
        """`summed_grad` plus Gaussian noise of standard deviation noise_multiplier x clip, in `grad`."""
        sums = [parameter.summed_grad for parameter in self.params]
        flat = torch.cat([part.reshape(-1) for part in sums])
        noise = self._noise.gaussian_like(flat, "dp", torch.float64)
        noised = flat.double().add_(noise, alpha=self.noise_multiplier * self.max_grad_norm).to(flat.dtype)
        parts = torch.split(noised, [part.numel() for part in sums])
        for parameter, part in zip(self.params, parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()

    def _rest(self) -> None:
        for hooks in self._hooks:
            hooks.disable_hooks()


@final
class RecordHooks(GradSampleHooks):  # type: ignore[misc]
    """Collects `grad_sample` (B, ...) of every parameter of `module` in backward passes of a mean over the batch.

    records: how many records the last forward pass had; 0 since `forget`.
    """

    def __init__(self, module: nn.Module) -> None:
        self.records = 0
        self._layers: list[nn.Module] = []
        with in_mode(module, training=True):  # a layer without a rule of its own is copied as it is now
            super().__init__(module, loss_reduction="mean", strict=True)

    def add_hooks(self, **_: Any) -> None:
        """On the output of every layer that learns, and on the way into the first."""
        handles: list[Any] = []
        self._module.autograd_grad_sample_hooks = self.autograd_grad_sample_hooks = handles
        self._layers = [layer for layer in self.iterate_submodules(self._module) if type(layer) not in _RECURRENT]
        for layer in self._layers:
            if type(layer) not in self.GRAD_SAMPLERS:
                prepare_layer(layer)
            handles.append(layer.register_forward_hook(self._watch))
        handles.append(self._module.register_forward_pre_hook(self._count))
        self.enable_hooks()

    def forget(self) -> None:
        """Drop what a step has left behind that was broken off between its passes."""
        self.records = 0
        for parameter in self._module.parameters():
            parameter.grad_sample = None
            parameter._forward_counter = 0
            if hasattr(parameter, "_current_grad_sample"):
                del parameter._current_grad_sample
        for layer in self._layers:
            layer.activations = []  # type: ignore[assignment]
            if hasattr(layer, "max_batch_len"):
                del layer.max_batch_len

    def taken(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient (B, ...) of each record, as the last backward pass left it."""
        return cast(Tensor | None, parameter.grad_sample)  # type: ignore[attr-defined]

    def _count(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.hooks_enabled and torch.is_grad_enabled() and self._module.training:
            self.records = len(inputs[0])

    def _watch(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not (self.hooks_enabled and layer.training and output.requires_grad):
            return
        self.capture_activations_hook(layer, list(inputs), output)
        output.register_hook(partial(self._collect, layer))  # type: ignore[no-untyped-call]

    def _collect(self, layer: nn.Module, gradient: Tensor) -> None:
        self.capture_backprops_hook(layer, None, (gradient,), self.loss_reduction, self.batch_first)
