"""The shape that every method has."""

from __future__ import annotations

import dataclasses
import operator
from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from mmbal_fast.functional._operation import in_graph
from mmbal_fast.training import ranks

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.distributed import ProcessGroup
    from torch.optim import Optimizer
    from typing_extensions import Self

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """What one step of a method measured and applied, one entry for each of its `names`.

    A method's record is a frozen dataclass of tensors on the device. Those of shape ``[M]`` are
    what `History` and the callbacks log, under the names of the fields; their metadata says how to
    draw them. A field ``skipped``, bool ``[]``, marks a step that did not count.
    """

    def clone(self) -> Self:
        """A copy that later steps do not change."""
        return type(self)(**{each.name: getattr(self, each.name).clone() for each in _fields(self)})

    def quantities(self, count: int) -> dict[str, Tensor]:
        """The tensors of shape ``[count]``, by the names of their fields."""
        found = {each.name: getattr(self, each.name) for each in _fields(self)}
        return {name: value for name, value in found.items() if value.shape == (count,)}


def _fields(record: Record) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(record)


class Setting(Generic[T]):
    """An attribute of a method that is checked whenever it is set.

    `Method.__repr__` shows it, and ranks must agree on it. A compiled graph gets a number as a
    tensor, see `Method._scalar`, so that a change does not compile the graph again.

    Args:
        check: from who asks, the name and the value to what is kept; raises for what is wrong.

    Example:
        >>> from mmbal_fast.training.method import Setting
        >>> def positive(op, name, value):
        ...     if not value > 0:
        ...         raise ValueError(f"{op}: {name} must be above 0 (got {value})")
        ...     return value
        >>> class Example:
        ...     rate = Setting(positive)
        >>> example = Example()
        >>> example.rate = -1
        Traceback (most recent call last):
        ValueError: Example: rate must be above 0 (got -1)
    """

    def __init__(self, check: Callable[[str, str, Any], T]) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        self._slot = f"_{name}"

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> Self | T:
        if instance is None:
            return self
        value: T = getattr(instance, self._slot)
        return value

    def __set__(self, instance: object, value: T) -> None:
        checked = self._check(type(instance).__name__, self._name, value)
        setattr(instance, self._slot, checked)
        if isinstance(checked, float):
            kept = getattr(instance, f"{self._slot}_tensor", None)
            if kept is None:  # named device and dtype: the defaults may be others
                kept = torch.empty((), dtype=torch.float64, device="cpu")
                setattr(instance, f"{self._slot}_tensor", kept)
            kept.fill_(checked)


class Method(ranks.Member, ABC):
    """A remedy for modalities that learn at different speeds.

    What all methods have: `names` of what they balance, `enabled`, `last`, a state that resumes bit
    for bit, checks, copies. A method's own file says how it measures and acts.

    Subclasses set their `Setting` attributes, and implement `_state` and `_load` if they remember
    something. Attributes that view others are made again in `_restore_views`, because views do not
    survive copying.

    Args:
        names: of the M modalities, heads or branches, in the order of every ``[M]``.
        process_group: whose ranks measure and decide together; default all ranks if
            torch.distributed is initialised, as in DistributedDataParallel.

    Raises:
        ValueError: fewer than two names, or one that is given twice.
        TypeError: names that are not a sequence of text.
    """

    names: tuple[str, ...]
    """Of the modalities, heads or branches, in the order of all ``[M]``."""
    last: Record | None
    """What the last step measured and applied; None before the first."""

    _what = "names"
    """What errors call the `names`."""

    def __init__(self, names: Iterable[str], *, process_group: ProcessGroup | None = None) -> None:
        super().__init__(process_group)
        self.names = checked_names(type(self).__name__, self._what, names)
        self.last = None
        self._enabled = True

    # ---- what users see ------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the method acts; set it to False to train plainly from some epoch on.

        Part of `state_dict`. The window of epochs of a paper is one line:
        ``method.enabled = epoch < 50``.
        """
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"{type(self).__name__}: enabled must be True or False (got {value!r})")
        self._enabled = value
        self._enabled_changed()

    def check(self) -> None:
        """Raises for what was found on the device since the last check. Reads the host."""

    def check_in_sync(self) -> None:
        """Raises if the ranks' settings, names or state differ.

        For debugging: one all-gather of a few numbers, read by the host. Does nothing on a single
        rank.

        Raises:
            RuntimeError: names what differs, with what each rank has.
        """
        self._join()
        if self._group is not None:
            settings = {name: _comparable(value) for name, value in self._settings().items()}
            ranks.require_equal(
                f"{type(self).__name__}.check_in_sync",
                {
                    "enabled": int(self.enabled),
                    f"hash of {' and '.join(settings) or 'no settings'}": ranks.hash_of(settings),
                    "hash of the names": ranks.hash_of(self.names),
                    **self._in_sync(),
                },
                self._group,
            )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit for bit. May read the device."""
        return {"names": list(self.names), "enabled": self.enabled, **self._state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken. What was observed since the last step is dropped.

        Tensors may come as nested lists, as JSON keeps them.

        Raises:
            ValueError: other keys or names, or values that no state has. Nothing changes then.
            TypeError: a value of another type. Nothing changes then.
        """
        op = f"{type(self).__name__}.load_state_dict"
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{op}: state must be a mapping (got {type(state_dict).__name__})")
        remembered = self._state()
        keys = sorted({"names", "enabled", *remembered})
        if set(state_dict) != set(keys):
            raise ValueError(
                f"{op}: state must have the keys {', '.join(keys)} "
                f"(got {sorted(map(str, state_dict))})"
            )
        names, enabled = state_dict["names"], state_dict["enabled"]
        if not isinstance(names, list | tuple) or tuple(names) != self.names:
            raise ValueError(f"{op}: names must be {list(self.names)} (got {names!r})")
        if not isinstance(enabled, bool):
            raise TypeError(f"{op}: enabled must be True or False (got {enabled!r})")
        self._load(op, {name: state_dict[name] for name in remembered})
        self.enabled = enabled

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({', '.join(self.names)}; {settings})"

    # ---- what a method's file says -------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Every `Setting`, by name, in the order of definition."""
        return {
            name: getattr(self, name)
            for owner in reversed(type(self).__mro__)
            for name, value in vars(owner).items()
            if isinstance(value, Setting)
        }

    def _state(self) -> dict[str, Any]:
        """What resuming needs besides `names` and `enabled`: numbers, lists and tensors."""
        return {}

    def _load(self, op: str, state: Mapping[str, Any]) -> None:
        """Takes what `_state` gave; the keys are right already.

        Checks all of it before it writes: a state that is refused changes nothing.
        """

    def _in_sync(self) -> dict[str, int]:
        """What ranks must have alike besides names and settings; integers or hashes."""
        return {}

    def _enabled_changed(self) -> None:
        """Called after `enabled` was set."""

    def _forget(self) -> None:
        """Drops what was observed since the last step."""

    @property
    def _pending(self) -> bool:
        """Whether something was observed in training that no step has used."""
        return False

    # What the callbacks of Lightning and Transformers call, at the place of its name.

    def _before_training(self) -> None:
        """Called when the framework has wrapped or sharded the module."""

    def _before_optimizer(self, scaler: GradScaler | None, optimizer: Optimizer) -> Record | None:
        """Acts before the optimizer's step; returns what is to be logged."""
        return self.last

    def _after_validation(self) -> None:
        """Called at the end of every validation during training."""

    def _scalar(self, name: str) -> float | Tensor:
        """A setting for an operation: a number, or in a compiled graph the tensor that holds it."""
        value: float | Tensor = getattr(self, f"_{name}_tensor" if in_graph() else f"_{name}")
        return value


def _comparable(value: Any) -> str:
    """What ranks can compare of a setting: functions print their address otherwise."""
    return getattr(value, "__qualname__", repr(value))


def checked_names(op: str, what: str, names: Iterable[str]) -> tuple[str, ...]:
    """At least two names, each given once.

    Raises:
        ValueError: fewer, or a name twice.
        TypeError: one text instead of names, or names that are not text.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{op}: {what} must be a sequence of names (got {names!r})")
    names = tuple(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{op}: {what} must have text as names (got {name!r})")
    if len(names) < 2:
        raise ValueError(f"{op}: {what} must be at least two (got {list(names)})")
    if len(set(names)) < len(names):
        raise ValueError(f"{op}: {what} must differ in name (got {list(names)})")
    return names


# ---- what states are checked by -----------------------------------------------------------------


def integer(op: str, name: str, value: Any, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``; a tensor of one element counts.

    Raises:
        TypeError: not a whole number; True and False are none.
        ValueError: out of range.
    """
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be a whole number (got {value!r})") from None
    if not low <= number <= high:
        raise ValueError(f"{op}: {name} must be from {low} to {high} (got {number})")
    return number


def tensor(op: str, name: str, value: Any, like: Tensor, *, finite: bool = True) -> Tensor:
    """A copy of a tensor or nested list, with the shape, dtype and device of another.

    Raises:
        TypeError: no numbers, or numbers of another kind, such as floating for whole ones.
        ValueError: another shape, or NaN or inf where the state is finite.
    """
    if not isinstance(value, Tensor | list | tuple | int | float):
        raise TypeError(f"{op}: {name} must be a tensor or numbers (got {value!r})")
    try:
        given = value if isinstance(value, Tensor) else _numbers(value, like)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: {name} must be a tensor or numbers (got {value!r})") from None
    exact = not like.is_floating_point()
    if given.is_complex() or (exact and given.dtype != like.dtype and given.numel() > 0):
        raise TypeError(f"{op}: {name} must be {like.dtype} (got {given.dtype})")
    if given.shape != like.shape:
        raise ValueError(
            f"{op}: {name} must have shape {list(like.shape)} (got {list(given.shape)})"
        )
    if finite and not bool(given.isfinite().all()):
        raise ValueError(f"{op}: {name} must be finite (got NaN or inf)")
    return given.detach().to(like.device, like.dtype, copy=True)


def _numbers(value: Any, like: Tensor) -> Tensor:
    """float64 for floating state, whole numbers as they are: a default dtype plays no part."""
    dtype = torch.float64 if like.is_floating_point() else None
    return torch.tensor(value, dtype=dtype, device="cpu")
