"""Put a model, its optimizer and the random generators back to where they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Stateful(Protocol):
    """An optimizer, scheduler, gradient scaler or anything else that can be checkpointed."""

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Go back to that state."""


class Snapshot:
    """The state of a training run, to be restored any number of times, bit for bit.

    Of the model: values, gradients and ``requires_grad`` of parameters, all buffers (also those
    that are not persistent), tensors in plain attributes, extra state, and the mode of each module.
    Tensors are written in place, so that optimizers and captured graphs keep theirs; what replaced
    them is dropped. Of the generators: Python's, NumPy's, torch's on the CPU and on every CUDA
    device.

    Args:
        model: the model.
        others: what else to restore: optimizers, schedulers, generators of data loaders.
    """

    def __init__(self, model: nn.Module, others: Sequence[Stateful | torch.Generator]) -> None:
        self._undo: list[Callable[[], object]] = []
        tensors: set[Tensor] = set()
        for module in model.modules():
            for registry in (module._parameters, module._buffers):
                self._undo.append(_registry(registry))
                tensors.update(each for each in registry.values() if each is not None)
            attributes = vars(module)
            for name in [n for n, each in attributes.items() if isinstance(each, Tensor)]:
                self._undo.append(_attribute(module, name))
                tensors.add(attributes[name])
            self._undo.append(_attribute(module, "training"))
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                self._undo.append(_copied(module.get_extra_state(), module.set_extra_state))
        self._undo += [_tensor(each) for each in tensors]
        for other in others:
            if isinstance(other, torch.Generator):
                self._undo.append(_copied(other.get_state(), other.set_state))
            else:
                self._undo.append(_copied(other.state_dict(), other.load_state_dict))
        self._undo.append(_copied(random.getstate(), random.setstate))
        self._undo.append(_copied(torch.get_rng_state(), torch.set_rng_state))
        if torch.cuda.is_available():
            self._undo.append(_copied(torch.cuda.get_rng_state_all(), torch.cuda.set_rng_state_all))
        try:
            import numpy as np
        except ImportError:
            return
        self._undo.append(_copied(np.random.get_state(), np.random.set_state))

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for undo in self._undo:
                undo()


def _copied(state: Any, load: Callable[[Any], object]) -> Callable[[], object]:
    """Loads a fresh copy each time: what is loaded may be changed in place by the next run."""
    kept = copy.deepcopy(state)
    return lambda: load(copy.deepcopy(kept))


def _registry(registry: dict[str, Any]) -> Callable[[], object]:
    kept = dict(registry)

    def undo() -> None:
        registry.clear()
        registry.update(kept)

    return undo


def _attribute(owner: object, name: str) -> Callable[[], object]:
    kept = getattr(owner, name)
    return lambda: setattr(owner, name, kept)


def _tensor(tensor: Tensor) -> Callable[[], object]:
    values, requires_grad, grad = tensor.detach().clone(), tensor.requires_grad, tensor.grad
    grad_values = None if grad is None else grad.detach().clone()

    def undo() -> None:
        tensor.copy_(values)
        if tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        tensor.grad = grad
        if grad is not None and grad_values is not None:
            grad.copy_(grad_values)

    return undo
