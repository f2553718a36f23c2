"""What the operations ask of their arguments, where the native module does not check it itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor, nn
from torch._C._functorch import maybe_current_level

from mmbal_fast.functional._operation import in_graph

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
RULES = ("cvpr2022", "cvpr2022_excess", "tpami2024")
STATISTICS = ("probability", "log_probability", "accuracy")
"""In the order of csrc/operations/scores.h."""


def real(op: str, name: str, value: object) -> float:
    """A number that a float holds."""
    # The protocol's own check takes 9 us: not for a float.
    if type(value) is float:
        return value
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{op}: {name} must be a number (got {value!r})")
    try:
        return float(value)
    except (ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{op}: {name} must be one number ({error})") from error


def number(op: str, name: str, value: float | Tensor) -> float:
    """A finite number that is not negative."""
    as_float = real(op, name, value)
    if not (as_float >= 0 and math.isfinite(as_float)):
        raise ValueError(f"{op}: {name} must be a number from 0 on (got {value})")
    return as_float


def numbers(
    op: str, name: str, values: Tensor | Sequence[float], device: torch.device | None
) -> Tensor:
    """A dense tensor, or numbers put on a device, as float64."""
    if isinstance(values, Tensor):
        if values.is_complex() or values.layout != torch.strided:
            raise TypeError(
                f"{op}: {name} must be dense real numbers (got {values.dtype}, {values.layout})"
            )
        return values.double()
    try:
        return torch.tensor(values, dtype=torch.float64, device=device or "cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(
            f"{op}: {name} must be a tensor or numbers (got {type(values).__name__}: {error})"
        ) from error


def setting(op: str, name: str, value: float | Tensor) -> float | Tensor:
    """A `number`, or a tensor of the host that holds one; a compiled graph checks it as it runs."""
    if not isinstance(value, Tensor):
        return number(op, name, value)
    if value.ndim != 0 or value.dtype != torch.float64 or value.device.type != "cpu":
        raise ValueError(
            f"{op}: {name} must be a number or a float64 tensor [] on the CPU "
            f"(got {value.dtype} of shape {list(value.shape)} on {value.device})"
        )
    return value if in_graph() else number(op, name, value)


def word64(op: str, name: str, value: int) -> int:
    """A 64-bit number from 0 on."""
    if type(value) is not int and not isinstance(value, SupportsIndex):
        raise TypeError(f"{op}: {name} must be an integer (got {value!r})")
    value = operator.index(value)
    if not 0 <= value < 2**64:
        raise ValueError(f"{op}: {name} must be from 0 to 2^64 - 1 (got {value})")
    return value


def device_of(tensors: Sequence[Tensor | None]) -> torch.device:
    """The device of the first of some tensors."""
    return next((each.device for each in tensors if isinstance(each, Tensor)), torch.device("cpu"))


def integer(op: str, name: str, value: object, least: int, most: int) -> int:
    """An integer from ``least`` to ``most``."""
    # The protocol's own check takes 5 us, 50 in a cold cache: not for an int.
    if type(value) is not int and (
        not isinstance(value, SupportsIndex) or isinstance(value, Tensor)
    ):
        raise TypeError(f"{op}: {name} must be an integer (got {type(value).__name__})")
    number = operator.index(value)
    if not least <= number <= most:
        raise ValueError(f"{op}: {name} must be from {least} to {most} (got {number})")
    return number


def word(op: str, name: str, value: object) -> int:
    """A 64-bit integer."""
    return integer(op, name, value, -(2**63), 2**63 - 1)


def tensor_id(op: str, name: str, value: object) -> int:
    """A 32-bit number of the noise."""
    return integer(op, name, value, 0, 2**32 - 1)


def offset(op: str, name: str, value: object, elements: int) -> int:
    """A global index of a first element; those behind it are 64-bit numbers too."""
    first = integer(op, name, value, 0, 2**63 - 1)
    if first + elements >= 2**63:
        raise ValueError(
            f"{op}: {name} must leave room for {elements} elements below 2^63 (got {value})"
        )
    return first


def step(op: str, value: int | Tensor, device: torch.device) -> None:
    """A step number, or an int64 tensor that holds one."""
    if isinstance(value, Tensor):
        tensor(op, "step", value, torch.int64, None, device)
    else:
        word(op, "step", value)


def rule_name(op: str, rule: object) -> str:
    """The name of a published rule."""
    if rule not in RULES:
        raise ValueError(
            f"{op}: rule must be one of {', '.join(RULES)} or a callable (got {rule!r})"
        )
    return str(rule)


def statistic_name(op: str, statistic: object) -> str:
    """What of a sample is summed."""
    if statistic not in STATISTICS:
        raise ValueError(
            f"{op}: statistic must be one of {', '.join(STATISTICS)} (got {statistic!r})"
        )
    return str(statistic)


def vector(op: str, name: str, value: Tensor, least: int) -> None:
    """A one-dimensional floating point tensor of at least ``least`` elements."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        got = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a dense tensor (got {got})")
    if value.ndim != 1 or len(value) < least or not value.is_floating_point():
        raise ValueError(
            f"{op}: {name} must be floating point of shape [M], M >= {least} "
            f"(got {value.dtype} of shape {list(value.shape)})"
        )


def sequence(op: str, name: str, value: object) -> None:
    """Tensors in an order, which can be read more than once."""
    if not isinstance(value, list | tuple):
        raise TypeError(
            f"{op}: {name} must be a list or tuple of tensors (got {type(value).__name__})"
        )


def one_for_each(op: str, name: str, values: Any, each: str, total: int) -> list[Any]:
    """The entries of a sequence, one for ``each`` of ``total``."""
    # As the native module: what can be read more than once and has an order.
    if not hasattr(type(values), "__getitem__") or isinstance(values, str | Mapping):
        raise TypeError(
            f"{op}: {name} must be a sequence of integers (got {type(values).__name__})"
        )
    entries = list(values)
    if len(entries) != total:
        raise ValueError(
            f"{op}: {name} must hold one integer per {each} (got {len(entries)} for {total})"
        )
    return entries


def integers(op: str, name: str, values: Any, each: str, total: int) -> list[int]:
    """One 64-bit integer for ``each`` of ``total``."""
    entries = one_for_each(op, name, values, each, total)
    if set(map(type, entries)) <= {int}:
        return entries
    return [word(op, f"{name}[{index}]", value) for index, value in enumerate(entries)]


def mapping(op: str, name: str, value: object, holds: str) -> None:
    """Something by name, such as a dict or an ``nn.ModuleDict``."""
    if type(value) is not dict and not isinstance(value, Mapping | nn.ModuleDict):
        raise TypeError(
            f"{op}: {name} must be a mapping from modalities to {holds} "
            f"(got {type(value).__name__})"
        )


def by_name(
    op: str, name: str, values: Any, names: Sequence[str], holds: str = "tensors"
) -> list[Any]:
    """One entry for each of ``names``, in their order, of a mapping that holds no others."""
    mapping(op, name, values, holds)
    if len(values) != len(names) or not all(map(values.__contains__, names)):
        raise ValueError(f"{op}: {name} must be given for {list(names)} (got {list(values)})")
    return [values[each] for each in names]


def features(op: str, given: Sequence[object], names: Sequence[str] | None = None) -> None:
    """Dense floating point tensors ``[B, ...]`` of one batch; ``names`` are for errors."""
    tensors = []
    for index, each in enumerate(given):
        what = "features" if names is None else f"features of {names[index]!r}"
        tensors.append(dense_floats(op, what, each))
        if tensors[-1].ndim < 1:
            raise TypeError(f"{op}: {what} must be of shape [B, ...] (got [])")
    first = tensors[0]
    if any(each.shape[0] != first.shape[0] or each.device != first.device for each in tensors):
        raise ValueError(
            f"{op}: features must be of one batch size and device "
            f"(got {[(list(each.shape), str(each.device)) for each in tensors]})"
        )


def batch_of_tensors(op: str, logits: Sequence[Tensor], target: Tensor) -> None:
    """Dense tensors, whatever their shapes."""
    sequence(op, "logits", logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor (got {type(target).__name__})")
    for each in logits:
        if not isinstance(each, Tensor):
            raise TypeError(f"{op}: logits must be tensors (got {type(each).__name__})")
    for name, each in (("target", target), *(("logits", each) for each in logits)):
        if each.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense (got {each.layout})")


def batch(op: str, logits: Sequence[Tensor], target: Tensor, *, multi_label: bool = False) -> None:
    """Logits of one shape ``[B, C, ...]`` on one device, and labels that fit them."""
    batch_of_tensors(op, logits, target)
    if len(logits) == 0:
        raise ValueError(f"{op}: logits must hold at least one tensor (got none)")
    first, device = logits[0], target.device
    for each in logits:
        if each.dtype not in FLOATS:
            raise TypeError(
                f"{op}: logits must be float32, float64, float16 or bfloat16 (got {each.dtype})"
            )
        if each.ndim < 2 or each.shape != first.shape:
            raise ValueError(
                f"{op}: logits must have one shape [B, C] or [B, C, ...] "
                f"(got {[list(x.shape) for x in logits]})"
            )
        if each.shape[1] < (1 if multi_label else 2):
            advice = (
                ""
                if multi_label
                else "; for a single logit x give labels 0.0 and 1.0 of its "
                "shape and multi_label=True, or torch.stack([torch.zeros_like(x), x], 1)"
            )
            raise ValueError(
                f"{op}: logits must be of at least {'one class' if multi_label else 'two classes'}"
                f"{advice} (got {list(each.shape)})"
            )
        if each.device != device:
            raise ValueError(
                f"{op}: logits and target must be on one device (got {each.device} and {device})"
            )
    soft = target.is_floating_point()
    if multi_label and not soft:
        raise TypeError(
            f"{op}: target must be floating point, 0 or 1 for each label, with multi_label=True "
            f"(got {target.dtype})"
        )
    if not soft and target.dtype not in INTEGERS:
        raise TypeError(
            f"{op}: target must be integer labels or floating point soft labels "
            f"(got {target.dtype})"
        )
    expected = first.shape if soft else first.shape[:1] + first.shape[2:]
    if target.shape != expected:
        kind = "soft labels (floating point)" if soft else "integer labels"
        raise ValueError(
            f"{op}: target must have shape {list(expected)} as {kind} for logits of shape "
            f"{list(first.shape)} (got {list(target.shape)}, {target.dtype})"
        )
    if soft and target.device.type == "cpu" and not in_graph():
        if maybe_current_level() is not None:
            return  # a transform of torch.func has no values to read
        if multi_label:
            _truths(op, target.detach())
        else:
            _distributions(op, target.detach())


def _truths(op: str, target: Tensor) -> None:
    """Labels from 0 to 1. Reads them: for the CPU."""
    if not bool(((target >= 0) & (target <= 1)).all()):  # NaN fails too
        raise ValueError(
            f"{op}: target must be from 0 to 1 for each label with multi_label=True "
            f"(got {float(target.min()):.4g} to {float(target.max()):.4g})"
        )


def _distributions(op: str, target: Tensor) -> None:
    """Soft labels that are not negative and add up to 1. Reads them: for the CPU."""
    total = target.sum(1, dtype=torch.float64)
    # Within what bfloat16 rounds; NaN fails too.
    if not bool(((target >= 0).all(1) & ((total - 1).abs() <= 0.05)).all()):
        raise ValueError(
            f"{op}: soft labels must not be negative and must add up to 1 over the classes; give "
            "several true labels of a sample equal shares, or a class index, or multi_label=True "
            f"(got sums from {float(total.min()):.4g} to {float(total.max()):.4g}, least entry "
            f"{float(target.min()):.4g})"
        )


def label(names: Sequence[str] | None, index: int) -> str:
    """What errors call a gradient."""
    return f"gradient '{names[index]}'" if names is not None else f"gradient grads[{index}]"


def dense(op: str, what: str, value: object) -> Tensor:
    """A tensor with memory of its own: what the native module checks itself."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {what} must be a plain dense tensor on cpu or cuda (got {type(value).__name__})"
        )
    elsewhere = not in_graph() and (
        type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ or value._is_zerotensor()
    )
    if value.layout != torch.strided or value.is_meta or elsewhere:
        raise TypeError(
            f"{op}: {what} must be a plain dense tensor on cpu or cuda "
            f"(got {type(value).__name__}, {value.layout}, {value.dtype} on {value.device})"
        )
    return value


def dense_floats(op: str, what: str, value: object) -> Tensor:
    """The same of one of the four types that gradients and logits may have."""
    tensor = dense(op, what, value)
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {what} must be float32, float64, float16 or bfloat16 (got {tensor.dtype})"
        )
    return tensor


def tensor(
    op: str,
    name: str,
    given: object,
    dtype: torch.dtype,
    shape: Sequence[int] | None,
    device: torch.device,
) -> None:
    """A contiguous tensor of one type, of ``shape`` or one element: as the native module asks."""
    value = dense(op, name, given)
    if value.dtype != dtype:
        raise TypeError(
            f"{op}: {name} must be {str(dtype).removeprefix('torch.')} (got {value.dtype})"
        )
    if shape is None and value.numel() != 1:
        raise ValueError(f"{op}: {name} must have one element (got shape {list(value.shape)})")
    if shape is not None and list(value.shape) != list(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)} (got {list(value.shape)})")
    if value.device.type != device.type:
        raise ValueError(
            f"{op}: {name} must be on the device of the gradients (got {value.device} and {device})"
        )
    if in_graph():
        return  # what its memory is, is known when the graph runs
    if not value.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous "
            f"(got shape {list(value.shape)}, strides {list(value.stride())})"
        )
    if value.is_neg():
        raise TypeError(
            f"{op}: {name} must be a plain dense tensor on cpu or cuda "
            "(got negated view, resolve_neg() copies it)"
        )


def gradients(op: str, grads: Sequence[Tensor | None], names: Sequence[str] | None) -> None:
    """Dense floating point gradients: what the native module checks itself."""
    for index, grad in enumerate(grads):
        if grad is not None:
            _gradient(op, label(names, index), grad)


def companions(op: str, names: Sequence[str] | None, **lists: Sequence[Tensor | None]) -> list[int]:
    """Lists that are walked together, by what errors call them: as the native module checks them.

    Args:
        op: who asks.
        names: of the tensors of the first list, or None.
        lists: of tensors that have, where they are in one position, one shape, dtype and device.

    Returns:
        The positions where none of them is None or empty.
    """
    (main, first), *others = lists.items()
    for other, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(
                f"{op}: {main} and {other} must be equally long "
                f"(got {len(first)} and {len(tensors)})"
            )
    complete = []
    for index, (one, *rest) in enumerate(zip(first, *(each for _, each in others), strict=True)):
        for name, each in zip(lists, (one, *rest), strict=True):
            if each is not None:
                own = name == main and names is not None
                _gradient(op, label(names, index) if own else f"{name}[{index}]", each)
        if one is None or any(each is None or not each.numel() for each in (one, *rest)):
            continue
        for name, each in zip(list(lists)[1:], rest, strict=True):
            assert each is not None
            for what, its, wanted in (
                ("shape", list(each.shape), list(one.shape)),
                ("dtype", each.dtype, one.dtype),
            ):
                if its != wanted:
                    raise ValueError(
                        f"{op}: {name}[{index}] must have the {what} of {main}[{index}] "
                        f"(got {its} and {wanted})"
                    )
            if each.device != one.device:
                raise ValueError(
                    f"{op}: {name}[{index}] must be on the device of {main}[{index}] "
                    f"(got {each.device} and {one.device})"
                )
        complete.append(index)
    return complete


def modalities(
    op: str,
    modality: Sequence[int],
    grads: Sequence[Tensor | None],
    used: Iterable[int],
    count: int,
    names: Sequence[str] | None,
) -> None:
    """An index from 0 to ``count`` - 1 for each gradient at the positions ``used``."""
    if len(modality) != len(grads):
        raise ValueError(
            f"{op}: modality must name one modality per gradient "
            f"(got {len(modality)} for {len(grads)})"
        )
    for index in used:
        owner = integer(op, f"modality[{index}]", modality[index], -(2**63), 2**63 - 1)
        if not 0 <= owner < count:
            raise ValueError(
                f"{op}: {label(names, index)} must belong to a modality from 0 to {count - 1} "
                f"(got {owner})"
            )


def _gradient(op: str, what: str, value: object) -> None:
    tensor = dense_floats(op, what, value)
    if overlapping(tensor):
        raise RuntimeError(
            f"{op}: {what} must not share memory between its elements "
            f"(got shape {list(tensor.shape)}, strides {tensor.stride()})"
        )


def overlapping(tensor: Tensor) -> bool:
    """Whether elements may share memory: a stride that does not step over what lies below it."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and tensor.numel() > 0:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False
