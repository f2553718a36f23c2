"""What an operation is: one declaration that eager calls and compiled graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from mmbal_fast import _backend

Result = TypeVar("Result")


def in_graph() -> bool:
    """Whether torch.compile or torch.export is tracing: then no value can be read."""
    return is_compiling()


def without_grad(function: Callable[..., Result], *arguments: Any, **named: Any) -> Result:
    """Calls with gradients switched off; the context manager takes 35 us in a cold cache."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        return function(*arguments, **named)
    finally:
        torch._C._set_grad_enabled(before)


class Operation(Generic[Result]):
    """An operation: what runs it, and what a compiled graph knows of it.

    An eager call runs the native kernels or, where there are none, the reference. It does not go
    through torch's dispatcher: for a list of a thousand tensors that alone takes longer than the
    kernels' whole host side. While torch.compile traces, the same call becomes one node of the
    graph, ``torch.ops.mmbal.<name>``, which runs the same code. Results are without autograd graph,
    unless there is a ``backward``. Transforms of `torch.func` see the reference of those that have
    one, and are refused by the others.

    Calls give the arguments of the schema by position. In a list of tensors there may be None, a
    64-bit word may be unsigned, and a number may stand for a ``Tensor``: a setting that changes
    from step to step is a ``Tensor`` in the schema, so that a graph is not compiled for each value
    (float64 ``[]`` on the CPU; see `_checks.setting`). Arguments by name are for eager calls only,
    such as what errors call the tensors; a graph does not have them.

    Args:
        schema: ``name(arguments) -> results`` as in `torch.library.custom_op`; what is written has
            an alias, ``Tensor(a!)``.
        device: where the arguments are, from the arguments.
        native: from the native module and the arguments.
        reference: from the arguments.
        fake: results of the right shape, type and device without values, from the arguments.
        check: refuses bad arguments of a call in a graph, where an eager call leaves that to the
            native kernels.
        backward: the operation that gives the gradients of the first argument, a list of tensors.
            Its reference must be differentiable where gradients are enabled.
        save: keeps what ``backward`` needs, from ``(ctx, inputs, output)``.
        saved: the arguments of ``backward``, from ``ctx`` and the gradients of the results.
    """

    def __init__(
        self,
        schema: str,
        *,
        device: Callable[..., torch.device],
        native: Callable[..., Result],
        reference: Callable[..., Result],
        fake: Callable[..., object] = lambda *arguments: None,
        check: Callable[..., None] | None = None,
        backward: Operation[list[Tensor]] | None = None,
        save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        saved: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        self.name = schema.split("(")[0]
        self._device, self._native, self._reference = device, native, reference
        self._check = check
        self._backward, self._save, self._saved = backward, save, saved
        inside = schema[len(self.name) + 1 : schema.index(") ->")]
        self._arguments = [each.split() for each in inside.split(", ")]  # type, name
        written = [name for type_, name in self._arguments if "!" in type_]
        self._written = [
            (index, type_.endswith("[]"))
            for index, (type_, _) in enumerate(self._arguments)
            if "!" in type_
        ]
        # Replaces what a reload, or a purge of sys.modules, has left registered.
        definition = torch.library.custom_op(
            f"mmbal::{self.name}",
            self.run,
            mutates_args=written,
            schema=schema[len(self.name) :],
        )
        definition.register_fake(fake)
        if not written:
            definition.register_autograd(self._gradients, setup_context=self._set_up)
        self._node = getattr(torch.ops.mmbal, self.name).default

    def __call__(self, *arguments: Any, **eager: Any) -> Result:
        if is_compiling():
            return self._in_graph(arguments)
        if maybe_current_level() is not None:
            return self._in_transform(arguments)
        if self._backward is not None:
            nesting = _Nesting()
            output = _Differentiable.apply(  # type: ignore[no-untyped-call]
                self, nesting, arguments[1:], *arguments[0]
            )
            return nesting.restored(output)  # type: ignore[no-any-return]
        if self._written:
            self._check_mode(arguments)
        result = without_grad(self.run, *arguments, **eager)
        if self._written:
            self._bump_versions(arguments)
        return result

    def run(self, *arguments: Any, **eager: Any) -> Result:
        """Runs the native kernels or, where there are none, the reference."""
        native = _backend.runs(self._device(*arguments))
        if native is None:
            return self._reference(*arguments, **eager)
        return self._native(native, *arguments, **eager)

    def _check_mode(self, arguments: tuple[Any, ...]) -> None:
        """Refuses what is written and no tensors, and inference tensors as torch does.

        Of a list the first one is asked: a list is made in one mode.
        """
        for index, is_list in self._written:
            first = value = arguments[index]
            if is_list:
                if not isinstance(value, (list, tuple)):  # a union would be made anew
                    raise TypeError(
                        f"{self.name}: {self._arguments[index][1]} must be a list or tuple of "
                        f"tensors (got {type(value).__name__})"
                    )
                first = value[0] if value else None
                if first is None:
                    first = next((each for each in value if each is not None), None)
            if first is None or not isinstance(first, Tensor):  # which kernels and reference refuse
                continue
            if first.is_inference() and not torch.is_inference_mode_enabled():
                raise RuntimeError(
                    f"{self.name}: {self._arguments[index][1]} must not be inference tensors "
                    "outside of inference mode (got one that torch.inference_mode() made)"
                )

    def _bump_versions(self, arguments: tuple[Any, ...]) -> None:
        """As torch's own operations do, for a backward that saved what was written."""
        written: list[Tensor] = []
        for index, is_list in self._written:
            value = arguments[index]
            if is_list and _backend.native is not None:
                written += _backend.native.present(value)
            elif is_list:
                written += [each for each in value if each is not None]
            elif value is not None:
                written.append(value)
        increment_version(written)

    def _in_transform(self, arguments: tuple[Any, ...]) -> Result:
        """Within `torch.func.grad` and its like."""
        if self._backward is not None:
            return self._reference(*arguments)
        raise NotImplementedError(
            f"{self.name}: must not be called within a transform of torch.func, kernels cannot see "
            "through it; mmbal_fast.reference has it in plain PyTorch (got a call within one)"
        )

    def _in_graph(self, arguments: tuple[Any, ...]) -> Result:
        if self._check is not None:
            self._check(*arguments)
        detached = self._backward is None
        result: Result = self._node(
            *(
                _for_schema(type_, value, detached)
                for (type_, _), value in zip(self._arguments, arguments, strict=True)
            )
        )
        return result

    def _set_up(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if self._save is not None:
            self._save(ctx, inputs, output)
        else:
            ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))

    def _gradients(self, ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        assert self._backward is not None  # else nothing that it returned is differentiable
        assert self._saved is not None
        others = [None] * (len(self._arguments) - 1)
        return self._backward._node(*self._saved(ctx, *grads)), *others


def _for_schema(type_: str, value: Any, detached: bool) -> Any:
    """A value as a node of a graph takes it."""
    if type_ == "int" and value >= 2**63:
        return value - 2**64
    if type_ == "Tensor" and not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    if type_ in ("Tensor[]", "Tensor(a!)[]"):
        # Empty tensors are skipped as None is.
        like = next(
            (each for each in value if each is not None),
            torch.empty(0, dtype=torch.float32, device="cpu"),
        )
        value = [like.new_empty(0) if each is None else each for each in value]
    if not detached or "!" in type_:
        return value
    # Not no_grad: where a node raises, the graph does not switch gradients on again.
    if isinstance(value, Tensor):
        return value.detach()
    return [each.detach() for each in value] if type_ == "Tensor[]" else value


class _Nesting:
    """A list at the head of results, which autograd does not look into."""

    def __init__(self) -> None:
        self._length = -1

    def flat(self, output: Any) -> Any:
        """The results one by one."""
        if isinstance(output, tuple) and isinstance(output[0], list):
            self._length = len(output[0])
            return (*output[0], *output[1:])
        return output

    def restored(self, values: Any) -> Any:
        """The results, or their gradients, as the operation has them."""
        if self._length < 0:
            return values
        return [*values[: self._length]], *values[self._length :]


class _Differentiable(torch.autograd.Function):
    """An eager call of an operation that has a backward."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation[Any],
        nesting: _Nesting,
        others: tuple[Any, ...],
        *tensors: Tensor,
    ) -> Any:
        output = operation.run(tensors, *others)
        operation._set_up(ctx, (tensors, *others), output)
        ctx.operation, ctx.nesting = operation, nesting
        return nesting.flat(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        operation = ctx.operation
        arguments = operation._saved(ctx, *ctx.nesting.restored(grads))
        if torch.is_grad_enabled():  # create_graph=True: PyTorch differentiates the reference
            return None, None, None, *operation._backward._reference(*arguments)
        return None, None, None, *operation._backward.run(*arguments)
