"""Kernels: one step of an optimizer on a slice, by torch's own code: its fused CPU kernels where it has one.

torch computes most of a tensor in vectors and the last few elements one by one, and the two may round
differently in the last bit. Here every element is computed in a vector: slices end at multiples of
``ALIGN`` elements and what is left over is computed in a buffer of that size. So the bits depend
neither on slices, nor on threads, nor on which keys lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.rmsprop import rmsprop

from .pool import OneTorchThread

# A multiple of what torch's vector loops take at a time, for every dtype and instruction set.
ALIGN = 64
# torch 2.12 and 2.13 leave float16 and bfloat16 values of sgd as they are and write noise into their momentum
# (pytorch issue 191763), so those dtypes go through torch.optim's single-tensor code.
DTYPES = (torch.float32, torch.float64)
FUSED = frozenset({"sgd", "adam", "adamw", "adagrad"})
NAMES = FUSED | {"rmsprop"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One step of one optimizer with its numbers.

    Args:
        name: one of ``NAMES``.
        numbers: hyperparameters of the torch.optim class.
        first: whether this is the first step of sgd's momentum, which is then the gradient itself.
    """

    name: str
    numbers: dict[str, Any]
    first: bool = False

    @property
    def columns(self) -> list[str]:
        """Names of the state tensors of the value's shape, in the order that ``__call__`` takes them."""
        if self.name == "sgd":
            return ["momentum_buffer"] if self.numbers["momentum"] else []
        if self.name == "adagrad":
            return ["sum"]
        if self.name == "rmsprop":
            used = {"momentum_buffer": self.numbers["momentum"] > 0, "grad_avg": self.numbers["centered"]}
            return ["square_avg", *(name for name, is_used in used.items() if is_used)]
        return ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if self.numbers["amsgrad"] else [])]

    def fresh(self, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state before the first step."""
        fill = self.numbers["initial_accumulator_value"] if self.name == "adagrad" else 0
        state = {name: torch.full_like(value, fill) for name in self.columns}
        return state if self.name == "sgd" else {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **state}

    def __call__(
        self, value: torch.Tensor, grad: torch.Tensor, columns: Sequence[torch.Tensor], step: torch.Tensor | None
    ) -> None:
        """Step in place on flat, contiguous tensors of one length; ``step`` counts this step already."""
        whole = value.numel() - value.numel() % ALIGN
        if whole:
            self._call(value[:whole], grad[:whole], [column[:whole] for column in columns], step)
        if whole < value.numel():
            self.at_once(value[whole:], grad[whole:], [column[whole:] for column in columns], step, None)

    def at_once(
        self,
        value: torch.Tensor,
        grad: torch.Tensor,
        columns: Sequence[torch.Tensor],
        step: torch.Tensor | None,
        counter: torch.Tensor | None,
    ) -> None:
        """Step a small value beside itself, then copy everything back in one call, which no interrupt divides.

        Args:
            value, grad, columns, step: as for ``__call__``.
            counter: to become ``step`` in the same moment (None: nothing).
        """
        count = value.numel()
        missing = (0, -count % ALIGN)
        padded = [torch.constant_pad_nd(tensor, missing) for tensor in (value, *columns)]
        with OneTorchThread():
            self._call(padded[0], torch.constant_pad_nd(grad, missing), padded[1:], step)
        sources = [tensor[:count] for tensor in padded]
        if counter is None or step is None:
            torch._foreach_copy_([value, *columns], sources)
        else:
            torch._foreach_copy_([value, *columns, counter], [*sources, step])

    def _call(
        self, value: torch.Tensor, grad: torch.Tensor, columns: Sequence[torch.Tensor], step: torch.Tensor | None
    ) -> None:
        numbers = self.numbers
        if self.name == "sgd":
            torch._fused_sgd_(
                [value],
                [grad],
                [*columns],
                weight_decay=numbers["weight_decay"],
                momentum=numbers["momentum"],
                lr=numbers["lr"],
                dampening=numbers["dampening"],
                nesterov=numbers["nesterov"],
                maximize=numbers["maximize"],
                is_first_step=self.first,
            )
        elif self.name == "adagrad":
            torch._fused_adagrad_(
                [value],
                [grad],
                [columns[0]],
                [step],  # type: ignore[list-item]
                lr=numbers["lr"],
                lr_decay=numbers["lr_decay"],
                weight_decay=numbers["weight_decay"],
                eps=numbers["eps"],
                maximize=numbers["maximize"],
            )
        elif self.name == "rmsprop":
            of = dict(zip(self.columns, columns, strict=True))
            rmsprop(
                [value],
                [grad],
                [of["square_avg"]],
                [of["grad_avg"]] if "grad_avg" in of else [],
                [of["momentum_buffer"]] if "momentum_buffer" in of else [],
                # Which torch counts itself.
                [step - 1],  # type: ignore[list-item,operator]
                foreach=False,
                maximize=numbers["maximize"],
                lr=numbers["lr"],
                alpha=numbers["alpha"],
                eps=numbers["eps"],
                weight_decay=numbers["weight_decay"],
                momentum=numbers["momentum"],
                centered=numbers["centered"],
            )
        else:
            decoupled = self.name == "adamw" or numbers["decoupled_weight_decay"]
            kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
            kernel(
                [value],
                [grad],
                [columns[0]],
                [columns[1]],
                [*columns[2:]],
                [step],  # type: ignore[list-item]
                lr=numbers["lr"],
                beta1=numbers["betas"][0],
                beta2=numbers["betas"][1],
                weight_decay=numbers["weight_decay"],
                eps=numbers["eps"],
                amsgrad=numbers["amsgrad"],
                maximize=numbers["maximize"],
            )
