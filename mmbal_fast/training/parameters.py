"""Which parameters are whose, followed as modules replace theirs."""

from __future__ import annotations

import operator
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmbal_fast import _backend
from mmbal_fast.functional._operation import in_graph
from mmbal_fast.training.shards import ShardLayout, is_distributed, refuse_flattened

Parameters: TypeAlias = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
"""What belongs to a modality: a module, parameters, or named parameters."""

Select: TypeAlias = Callable[[str, nn.Parameter], bool]
"""Whether a parameter's gradient is modulated, from its name and itself."""


def every(name: str, parameter: nn.Parameter) -> bool:
    """Selects all parameters, for methods whose papers leave none out."""
    return True


_ADDED_BY_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""What goes from names, so that a run may resume with or without the wrapper."""


class Watch:
    """Whether modules still hold the same parameters and submodules; by identity, without a walk.

    Args:
        modules: whose trees to watch.
        parameters: those that matter: modules with none of them below are left out.
        container: a mapping that may get other values.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        parameters: Iterable[Tensor],
        container: object = None,
    ) -> None:
        wanted = set(map(id, parameters))
        registries: list[Any] = []
        for tree in modules:
            _add_registries(tree, wanted, registries)
        if isinstance(container, nn.ModuleDict):
            registries.append(container._modules)
        elif isinstance(container, dict):
            registries.append(container)
        self.registries: list[dict[str, Any]] = registries
        self._entries = [*chain.from_iterable(map(dict.values, registries))]

    def changed(self) -> bool:
        """Whether something was added, replaced or taken away; False in a compiled graph."""
        # A compiled graph guards the parameters by itself.
        if not self.registries or in_graph():
            return False
        if _backend.native is not None:
            return not _backend.native.unchanged(self.registries, self._entries)
        now = [*chain.from_iterable(map(dict.values, self.registries))]
        same = len(now) == len(self._entries) and all(map(operator.is_, now, self._entries))
        return not same


def _add_registries(module: nn.Module, wanted: set[int], registries: list[Any]) -> bool:
    """Adds the dicts of ``module`` that lead to wanted parameters; whether there are any."""
    below = [_add_registries(child, wanted, registries) for child in module.children()]
    own = not wanted.isdisjoint(map(id, module._parameters.values()))
    if own:
        registries.append(module._parameters)
    if any(below):
        registries.append(module._modules)
    return own or any(below)


class ParameterGroups:
    """The selected parameters of each modality, once each, as the modules hold them now.

    A module may replace its parameters (``load_state_dict(assign=True)``, a parametrization,
    ``fully_shard``) or its submodules, and a container that was given its modules: `follow` notices
    by identity and looks again. Of parameters that were given by themselves it keeps those.

    Args:
        op: who asks, for errors.
        modalities: for each its module, parameters, or named parameters.
        select: ``(name, parameter) -> bool``; by default parameters of two or more dimensions
            without the tables of ``nn.Embedding`` and ``nn.EmbeddingBag``, where noise would move
            rows that no sample used.

    Raises:
        ValueError: a modality without selected parameters, a parameter in two modalities, one
            without a shape yet.
        TypeError: a modality that is no module and holds no parameters, or whose parameters are
            flattened by FSDP1 or partitioned by DeepSpeed's ZeRO.
    """

    parameters: list[nn.Parameter]
    names: list[str]
    """Qualified by the modality, as errors and tensor ids have them."""
    owners: list[int]
    """Of each parameter: the position of its modality."""
    tensor_ids: list[int]
    """Of each piece: the noise's 32-bit tensor id."""
    modality: list[int]
    """Of each piece: the position of its modality."""
    piece_names: list[str]
    shards: ShardLayout | None
    """Where the parameters are DTensors; a parameter may then have several pieces."""

    def __init__(
        self,
        op: str,
        modalities: Mapping[str, Parameters] | nn.ModuleDict,
        select: Select | None,
    ) -> None:
        self._op, self._select = op, select
        # What an iterator gives is gone after one look. A container may get other modules later.
        self._container: Mapping[str, Any] | nn.ModuleDict | None = modalities
        self._given = {name: _kept(value) for name, value in modalities.items()}
        if isinstance(modalities, nn.ModuleDict):
            self._container = modalities
        elif not any(isinstance(value, nn.Module) for value in modalities.values()):
            self._container = None
        self._watch: Watch | None = None
        self.look()

    def follow(self) -> None:
        """Looks again if a module holds other parameters or modules than before.

        Raises:
            ValueError: as the constructor; naming the modality where its new module lacks
                parameters.
            TypeError: as the constructor.
        """
        watch = self._watch
        if watch is None or (watch.registries and watch.changed()):
            self.look()

    def gradients(self) -> list[Tensor | None]:
        """This rank's elements of each parameter's gradient; None for none, and for frozen ones.

        A frozen parameter may hold an old gradient.
        """
        if self.shards is not None:
            return self.shards.local_gradients(self.parameters)
        if _backend.native is not None and not in_graph():
            found: list[Tensor | None] = _backend.native.gradients_of(self.parameters)
            return found
        return [each.grad if each.requires_grad else None for each in self.parameters]

    def frozen(self) -> bool:
        """Whether no parameter is trained at present."""
        return not any(each.requires_grad for each in self.parameters)

    def clear_padding_(self, grads: list[Tensor | None]) -> None:
        """Sets the rows of `padding_idx` in embedding tables to 0 again, where noise was added.

        Args:
            grads: as `gradients` gives them.
        """
        for index, row in self._padding:
            grad = grads[index]
            if grad is None:
                continue
            if self.shards is None:
                grad[row].zero_()
            else:
                self.shards.zero_row_(grad, index, row, self.parameters[index].shape)

    def __getstate__(self) -> dict[str, Any]:
        """Without what names parameters: the copy's modules hold others."""
        state = self.__dict__.copy()
        state.update(_watch=None, shards=None)
        return state

    def look(self) -> None:
        """Finds the selected parameters; changes nothing if it raises."""
        given = self._given
        container = self._container
        if container is not None:
            given = {
                name: _kept(container[name]) if isinstance(old, nn.Module) else old
                for name, old in given.items()
                if self._still_there(name)
            }
        before = dict(zip(getattr(self, "names", ()), getattr(self, "parameters", ()), strict=True))
        collected = _Collected(self._op)
        for index, (modality, value) in enumerate(given.items()):
            collected.add(index, modality, value, self._select)
        parameters = [
            # FSDP2 shows the gathered parameter between forward and backward: it has no gradient.
            old if (old := before.get(name)) is not None and _is_gathered(old, found) else found
            for name, found in zip(collected.names, collected.parameters, strict=True)
        ]
        names = collected.names
        ids = _ids(names)
        shards = ShardLayout.of(self._op, parameters, names)
        pieces = range(len(names)) if shards is None else shards.parameters
        self._given, self.parameters, self.names, self.shards = given, parameters, names, shards
        self.owners = collected.owners
        self.modality = [collected.owners[index] for index in pieces]
        self.tensor_ids = [ids[index] for index in pieces]
        self.piece_names = [names[index] for index in pieces]
        self._padding = collected.padding()
        modules = [value for value in given.values() if isinstance(value, nn.Module)]
        self._watch = Watch(modules, parameters, container)

    def _still_there(self, name: str) -> bool:
        assert self._container is not None
        if name not in self._container:
            raise ValueError(
                f"{self._op}: every modality must stay in the container that was given "
                f"(got none for '{name}')"
            )
        return True


def _kept(value: Any) -> Any:
    """A modality's value for more than one look: no wrapper around a module, no iterator."""
    while isinstance(value, DistributedDataParallel | nn.DataParallel):
        value = value.module
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, Tensor):
        return [value]
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _is_gathered(old: Tensor, found: Tensor) -> bool:
    return is_distributed(old) and not is_distributed(found) and old.shape == found.shape


class _Collected:
    """The selected parameters of all modalities so far."""

    def __init__(self, op: str) -> None:
        self._op = op
        self.parameters: list[nn.Parameter] = []
        self.owners: list[int] = []
        self.names: list[str] = []
        self._seen: dict[int, int] = {}
        self._padded: dict[int, int] = {}  # id of a table to its padding_idx

    def add(self, index: int, modality: str, value: Any, select: Select | None) -> None:
        """Adds a modality.

        Raises:
            ValueError: nothing is selected, or it is another modality's, or has no shape.
            TypeError: what is no parameter, or flattened.
        """
        op = self._op
        named = list(_named(op, modality, value))
        refuse_flattened(op, f"modality '{modality}'", value, [each for _, each in named])
        tables = self._tables(value)
        found = False
        for name, parameter in named:
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(
                    f"{op}: parameters must have a shape before the method is made; pass a batch "
                    f"through the model first (got uninitialised '{modality}.{name}')"
                )
            if select is None:
                chosen = parameter.ndim >= 2 and id(parameter) not in tables
            else:
                chosen = select(name, parameter)
            if not chosen:
                continue
            found = True
            qualified = f"{modality}.{name}"
            first = self._seen.setdefault(id(parameter), len(self.parameters))
            if first == len(self.parameters):
                self.parameters.append(parameter)
                self.owners.append(index)
                self.names.append(qualified)
            elif self.owners[first] != index:
                raise ValueError(
                    f"{op}: a parameter must belong to one modality "
                    f"(got '{self.names[first]}' also as '{qualified}')"
                )
        if not found:
            raise ValueError(
                f"{op}: every modality must have a parameter that is selected (got none for "
                f"'{modality}'; by default those of two or more dimensions are, but for the "
                "tables of embeddings)"
            )

    def padding(self) -> list[tuple[int, int]]:
        """Position and `padding_idx` of the selected tables that have one."""
        return [
            (self._seen[table], row) for table, row in self._padded.items() if table in self._seen
        ]

    def _tables(self, value: Any) -> set[int]:
        """Identities of the tables of embeddings, parametrized or not."""
        found: set[int] = set()
        for module in value.modules() if isinstance(value, nn.Module) else ():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                own = [id(each) for each in module.parameters()]
                found.update(own)
                if module.padding_idx is not None and len(own) == 1:
                    self._padded[own[0]] = module.padding_idx
        return found


def _named(op: str, modality: str, value: Any) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            for added in _ADDED_BY_WRAPPERS:
                name = name.replace(added, "")
            yield name, parameter
        return
    if not isinstance(value, list):
        raise TypeError(
            f"{op}: modality '{modality}' must be a module, parameters or named parameters "
            f"(got {value!r})"
        )
    for position, item in enumerate(value):
        name, parameter = (
            item if isinstance(item, tuple) and len(item) == 2 else (str(position), item)
        )
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"{op}: modality '{modality}' must be a module, parameters or named parameters "
                f"(got {type(parameter).__name__} in it)"
            )
        yield name, parameter


def _ids(names: list[str]) -> list[int]:
    """32-bit tensor ids from names: the same on every rank and in every process."""
    ids: dict[int, None] = {}
    for name in names:
        number = zlib.crc32(name.encode())
        while number in ids:  # the next free one, in the order of the names
            number = (number + 1) % 2**32
        ids[number] = None
    return list(ids)
