"""Parameters are those that the modules hold when a step is made, and tables are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mmbal_fast
from mmbal_fast.training.parameters import ParameterGroups
from tests.methods.cases import Joined, batch_of, filled

LABELS = torch.tensor([0, 1, 2, 0])
LOGITS = {"a": torch.eye(3)[LABELS] * 5, "b": torch.zeros(4, 3)}


def container() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Sequential(nn.Linear(5, 4), nn.ReLU()) for name in "ab"})


def ascending(parameter: Tensor) -> Tensor:
    return torch.arange(1.0, parameter.numel() + 1).reshape(parameter.shape)


def backward(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = ascending(parameter)


def modulated(module: nn.Module) -> set[str]:
    return {
        name
        for name, each in module.named_parameters()
        if not torch.equal(each.grad, ascending(each))
    }


def assigned(net: Any) -> None:
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def parametrized(net: Any) -> None:
    # Two parameters in place of one: a parametrization by one keeps the one there was.
    nn.utils.parametrizations.weight_norm(net["a"][0])


def replaced_module(net: Any) -> None:
    net["b"] = nn.Sequential(nn.Linear(3, 2))


def replaced_layer(net: Any) -> None:
    net["a"][0] = nn.Linear(7, 4)


def appended(net: Any) -> None:
    net["b"].append(nn.Linear(2, 2))


def deleted(net: Any) -> None:
    net["a"].append(nn.Linear(2, 2))
    del net["a"][0]


CHANGES: list[Callable[[Any], None]] = [
    assigned, parametrized, replaced_module, replaced_layer, appended, deleted,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("given", ["module dict", "dict"])
def test_what_modules_hold_now_is_modulated(change: Callable[[Any], None], given: str) -> None:
    net = container()
    encoders: Any = net if given == "module dict" else dict(net.items())
    balancer = mmbal_fast.OGMGE(encoders, alpha=0.5)
    backward(net)
    balancer.step(LOGITS, LABELS)
    change(net)
    if given == "dict" and change is replaced_module:
        encoders["b"] = net["b"]
    backward(net)
    balancer.step(LOGITS, LABELS)
    assert modulated(net) == {name for name, each in net.named_parameters() if each.ndim >= 2}


def test_a_modality_that_is_gone_is_named() -> None:
    net = container()
    balancer = mmbal_fast.OGMGE(net, alpha=0.5)
    del net["b"]
    backward(net)
    with pytest.raises(ValueError, match=r"stay in the container .*\(got none for 'b'\)"):
        balancer.step(LOGITS, LABELS)
    net["b"] = nn.ReLU()
    with pytest.raises(ValueError, match=r"a parameter that is selected \(got none for 'b'"):
        balancer.step(LOGITS, LABELS)


def test_learning_speeds_follow_too() -> None:
    nets = [filled(Joined()) for _ in range(2)]
    speeds = [mmbal_fast.ConditionalLearningSpeed.from_model(net) for net in nets]
    nets[1].load_state_dict({k: v.clone() for k, v in nets[1].state_dict().items()}, assign=True)
    for net, speed in zip(nets, speeds, strict=True):
        batch, target = batch_of(0)
        losses = [nn.functional.cross_entropy(each, target) for each in net(batch).values()]
        torch.stack(losses).sum().backward()
        speed.update()
    assert torch.equal(speeds[0].speed, speeds[1].speed)


# ---- tables of embeddings


class Text(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.layer = table, nn.Linear(3, 2)


TABLES = [
    lambda: nn.Embedding(6, 3, padding_idx=0),
    lambda: nn.EmbeddingBag(6, 3, padding_idx=2),
    lambda: nn.Embedding(6, 3),
]


@pytest.mark.parametrize("make", TABLES)
def test_tables_are_left_out_by_default(make: Callable[[], nn.Module]) -> None:
    net = nn.ModuleDict({"a": Text(make()), "b": nn.Linear(3, 2)})
    backward(net)
    mmbal_fast.OGMGE(net, alpha=0.5).step(LOGITS, LABELS)
    assert modulated(net) == {"a.layer.weight", "b.weight"}


def test_a_parametrized_table_is_one_still() -> None:
    net: Any = nn.ModuleDict({"a": Text(nn.Embedding(6, 3)), "b": nn.Linear(3, 2)})
    parametrize.register_parametrization(net["a"].table, "weight", nn.Identity())
    backward(net)
    mmbal_fast.OGMGE(net, alpha=0.5).step(LOGITS, LABELS)
    assert modulated(net) == {"a.layer.weight", "b.weight"}


@pytest.mark.parametrize("make", TABLES)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_padding_row_stays_zero_where_tables_are_selected(
    make: Callable[[], nn.Module], transposed: bool
) -> None:
    net: Any = nn.ModuleDict({"a": Text(make()), "b": nn.Linear(3, 2)})
    backward(net)
    table = net["a"].table
    padding = table.padding_idx
    if padding is not None:
        table.weight.grad[padding] = 0.0
    if transposed:
        table.weight.grad = table.weight.grad.t().contiguous().t()
    balancer = mmbal_fast.OGMGE(net, alpha=0.5, select=lambda name, p: p.ndim >= 2)
    balancer.step(LOGITS, LABELS)
    rows = table.weight.grad.abs().sum(1)
    assert [row == 0 for row in rows.tolist()] == [index == padding for index in range(6)]


def test_a_table_shared_with_the_output_layer_is_a_table() -> None:
    text: Any = Text(nn.Embedding(6, 3, padding_idx=0))
    text.layer = nn.Linear(3, 6)
    text.layer.weight = text.table.weight
    net = nn.ModuleDict({"a": nn.ModuleList([text, nn.Linear(2, 2)]), "b": nn.Linear(3, 2)})
    backward(net)
    mmbal_fast.OGMGE(net, alpha=0.5).step(LOGITS, LABELS)
    assert modulated(net) == {"a.1.weight", "b.weight"}


class KeptElsewhere(nn.Parameter):
    """A parameter whose gradient a subclass holds."""

    @property
    def grad(self) -> Tensor:  # type: ignore[override]
        return torch.full_like(self, 3.0, requires_grad=False)


def test_gradients_are_those_that_python_sees() -> None:
    plain, frozen, unused = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    plain.grad, frozen.grad = torch.ones(2, 2), torch.ones(2, 2)
    frozen.requires_grad_(False)
    other = KeptElsewhere(torch.ones(2, 2))
    groups = ParameterGroups("test", {"a": [plain, frozen], "b": [unused, other]}, None)
    first, *rest = groups.gradients()
    assert first is plain.grad
    assert rest[:2] == [None, None]
    assert torch.equal(rest[2], torch.full((2, 2), 3.0))
