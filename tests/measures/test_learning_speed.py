"""`ConditionalLearningSpeed` against a plain loop over parameters."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmbal_fast import ConditionalLearningSpeed, _backend
from mmbal_fast.nn import MMTM
from tests.host_reads import host_reads

if TYPE_CHECKING:
    from tests.conftest import Backend


class Net(nn.Module):
    """Two branches of two layers, an MMTM after each."""

    image: Any
    audio: Any
    mmtms: Any

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 3)])
        self.audio = nn.ModuleList([nn.Linear(5, 2), nn.Linear(2, 3)])
        self.mmtms = nn.ModuleList([MMTM([6, 2]), MMTM([3, 3])])

    def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
        for one, two, mmtm in zip(self.image, self.audio, self.mmtms, strict=True):
            x, y = mmtm(one(x), two(y))
        return [x, y]


def backward(model: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 5, generator=generator)
    target = torch.arange(8) % 3
    model.zero_grad()
    sum(nn.functional.cross_entropy(each, target) for each in model(x, y)).backward()  # type: ignore[union-attr]


def loop(model: Net, steps: int) -> list[float]:
    """The speeds, with one float for each parameter, as the formula reads."""
    totals = {(kind, m): 0.0 for kind in ("main", "bypass") for m in (0, 1)}
    for step in range(steps):
        backward(model, step)
        for m, branch in enumerate([model.image, model.audio]):
            bypass = [p for mmtm in model.mmtms for p in mmtm.squeeze.parameters()]
            bypass += [p for mmtm in model.mmtms for p in mmtm.gates[m].parameters()]
            for kind, parameters in (("main", list(branch.parameters())), ("bypass", bypass)):
                gradient = weight = 0.0
                for p in parameters:
                    weight += sum(float(v) ** 2 for v in p.flatten().tolist())
                    if p.grad is not None:
                        gradient += sum(float(v) ** 2 for v in p.grad.flatten().tolist())
                totals[kind, m] += gradient / weight
    return [math.log10(totals["bypass", m] / totals["main", m]) for m in (0, 1)]


def measured(model: nn.Module, measure: ConditionalLearningSpeed, steps: int) -> list[float]:
    for step in range(steps):
        backward(model, step)
        assert measure.update()
    return list(measure.speed.tolist())


def test_is_the_formula_over_steps() -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    found = measured(model, measure, steps=3)
    expected = loop(model, steps=3)
    assert found == pytest.approx(expected, rel=1e-6)
    difference = expected[0] - expected[1]
    assert measure.difference.tolist() == pytest.approx([difference, -difference], rel=1e-5)


def test_difference_of_three_is_to_the_mean_of_the_others() -> None:
    theta = [nn.Parameter(torch.ones(1)) for _ in range(6)]
    measure = ConditionalLearningSpeed(
        main=dict(zip("abc", theta[:3], strict=True)),
        bypass=dict(zip("abc", theta[3:], strict=True)),
    )
    for parameter, gradient in zip(theta, [1.0, 1.0, 1.0, 1.0, 10.0, 1000.0], strict=True):
        parameter.grad = torch.tensor([gradient])
    measure.update()
    assert measure.speed.tolist() == pytest.approx([0, 2, 6])
    assert measure.difference.tolist() == pytest.approx([-4, -1, 5])


def test_frozen_and_missing_gradients_count_as_zero() -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    model.image[0].requires_grad_(False)
    backward(model)
    model.audio[1].bias.grad = None
    expected = loop_once(model)
    assert measure.update()
    assert measure.speed.tolist() == pytest.approx(expected, rel=1e-6)
    assert model.image[0].weight.grad is None


def test_old_gradients_of_frozen_parameters_count_as_zero() -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    backward(model)
    model.image[0].requires_grad_(False)
    assert model.image[0].weight.grad.any()
    measure.update()
    model.image[0].weight.grad = model.image[0].bias.grad = None
    assert measure.speed.tolist() == pytest.approx(loop_once(model), rel=1e-6)


def loop_once(model: Net) -> list[float]:
    def mu(parameters: list[nn.Parameter]) -> float:
        gradient = sum(p.grad.double().square().sum() for p in parameters if p.grad is not None)
        return float(gradient / sum(p.detach().double().square().sum() for p in parameters))

    result = []
    for m, branch in enumerate([model.image, model.audio]):
        bypass = [p for mmtm in model.mmtms for p in mmtm.bypass_parameters(m)]
        result.append(math.log10(mu(bypass) / mu(list(branch.parameters()))))
    return result


def test_unfrozen_parameters_count_again() -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    model.image[0].requires_grad_(False)
    backward(model)
    measure.update()
    measure.reset()
    model.image[0].requires_grad_(True)
    assert measured(model, measure, steps=1) == pytest.approx(loop(model, steps=1), rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_leaves_out_steps_that_are_not_finite(bad: float) -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    expected = measured(model, measure, steps=2)
    backward(model, 2)
    model.audio[1].weight.grad[1, 0] = bad
    assert not measure.update()
    assert measure.speed.tolist() == expected


def test_inactive_steps_add_nothing() -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    expected = measured(model, measure, steps=1)
    backward(model, 1)
    assert measure.update(active=torch.tensor(False))
    assert measure.speed.tolist() == expected
    measure.update(active=torch.tensor(True))
    assert measure.speed.tolist() == pytest.approx(loop(model, steps=2), rel=1e-6)


def test_speed_is_undefined_before_the_first_step() -> None:
    assert ConditionalLearningSpeed.from_model(Net()).speed.isnan().all()


def test_resumes_bit_for_bit() -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    measured(model, measure, steps=2)
    file = io.BytesIO()
    torch.save(measure.state_dict(), file)
    file.seek(0)
    other = ConditionalLearningSpeed.from_model(model)
    other.load_state_dict(torch.load(file))
    backward(model, 2)
    measure.update(), other.update()
    assert torch.equal(measure.speed, other.speed)


def test_refuses_the_state_of_other_branches() -> None:
    model = Net()
    measure = ConditionalLearningSpeed.from_model(model)
    other = ConditionalLearningSpeed.from_model(model, {"a": model.image, "v": model.audio})
    with pytest.raises(ValueError, match=r"names must be \['a', 'v'\] \(got \['image'"):
        other.load_state_dict(measure.state_dict())


def test_branches_may_be_named_and_of_several_parts() -> None:
    model = Net()
    image = [("first", model.image[0].weight), model.image[0].bias, model.image[1]]
    measure = ConditionalLearningSpeed.from_model(
        model, {"video": image, "sound": list(model.audio)}
    )
    assert measure.names == ("video", "sound")
    assert measured(model, measure, steps=2) == pytest.approx(loop(model, steps=2), rel=1e-6)


def test_mmtms_inside_a_branch_stay_bypass() -> None:
    model = Net()
    model.image.append(model.mmtms)
    measure = ConditionalLearningSpeed.from_model(
        model, {"image": model.image, "audio": model.audio}
    )
    del model.image[2]
    assert measured(model, measure, steps=1) == pytest.approx(loop(model, steps=1), rel=1e-6)


def test_names_do_not_matter() -> None:
    """Not even those that say that a parameter belongs elsewhere."""

    class Confusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mmtm_squeeze = model.image
            self.image_audio = model.mmtms
            self.gates_visual = model.audio

        def forward(self, x: Tensor, y: Tensor) -> list[Tensor]:
            return model(x, y)

    model = Net()
    measure = ConditionalLearningSpeed.from_model(Confusing())
    assert measure.names == ("mmtm_squeeze", "gates_visual")
    assert measured(model, measure, steps=1) == pytest.approx(loop(model, steps=1), rel=1e-6)


def test_looks_through_wrappers() -> None:
    model = Net()
    inner = nn.ModuleDict({"net": model})
    wrapped = nn.ModuleDict({"module": inner, "loss": nn.CrossEntropyLoss()})
    measure = ConditionalLearningSpeed.from_model(wrapped)
    assert measure.names == ("image", "audio")
    assert measured(model, measure, steps=1) == pytest.approx(loop(model, steps=1), rel=1e-6)


def test_finds_branches_in_a_container() -> None:
    model = nn.ModuleDict(
        {"parts": nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)}), "m": MMTM([2, 2])}
    )
    assert ConditionalLearningSpeed.from_model(model).names == ("x", "y")


class Refusals:
    """Models and groups that are refused, by message."""

    @staticmethod
    def no_mmtm() -> None:
        ConditionalLearningSpeed.from_model(nn.Linear(2, 2))

    @staticmethod
    def mixed_mmtms() -> None:
        ConditionalLearningSpeed.from_model(nn.ModuleList([MMTM([2, 2]), MMTM([2, 2, 2])]))

    @staticmethod
    def too_many_children() -> None:
        model = Net()
        model.add_module("head", nn.Linear(2, 2))
        ConditionalLearningSpeed.from_model(model)

    @staticmethod
    def too_few_branches() -> None:
        model = Net()
        ConditionalLearningSpeed.from_model(model, {"image": model.image})

    @staticmethod
    def branch_without_parameters() -> None:
        model = Net()
        ConditionalLearningSpeed.from_model(model, {"image": model.image, "audio": nn.ReLU()})

    @staticmethod
    def one_parameter_in_two_branches() -> None:
        model = Net()
        audio = [model.audio, model.image[1].bias]
        ConditionalLearningSpeed.from_model(model, {"image": model.image, "audio": audio})

    @staticmethod
    def main_in_bypass() -> None:
        a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        ConditionalLearningSpeed(main={"a": a, "b": b}, bypass={"a": b.bias, "b": b.bias})

    @staticmethod
    def zero_weights() -> None:
        model = Net()
        for parameter in model.audio.parameters():
            nn.init.zeros_(parameter)
        ConditionalLearningSpeed.from_model(model)

    @staticmethod
    def infinite_weights() -> None:
        model = Net()
        nn.init.constant_(model.mmtms[0].gates[1].bias, torch.inf)
        ConditionalLearningSpeed.from_model(model)

    @staticmethod
    def one_branch() -> None:
        a = nn.Linear(2, 2)
        ConditionalLearningSpeed(main={"a": a}, bypass={"a": a})

    @staticmethod
    def other_names() -> None:
        a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        ConditionalLearningSpeed(main={"a": a, "b": b}, bypass={"a": a, "c": b})

    @staticmethod
    def flattened() -> None:
        model = Net()
        model.audio[1].weight._fsdp_flattened = True  # as FSDP1 does
        ConditionalLearningSpeed.from_model(model)

    @staticmethod
    def partitioned() -> None:
        model = Net()
        model.mmtms[0].squeeze.weight.ds_id = 0  # as DeepSpeed's ZeRO does
        ConditionalLearningSpeed.from_model(model)

    @staticmethod
    def names_for_modules() -> None:
        names: Any = {"image": "image", "audio": "audio"}
        ConditionalLearningSpeed.from_model(Net(), names)

    @staticmethod
    def numbers_for_modules() -> None:
        ConditionalLearningSpeed.from_model(Net(), {"image": [1], "audio": [2]})  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            Refusals.no_mmtm,
            ValueError,
            r"must contain an mmbal.*\(got Linear with none",
        ),
        (Refusals.mixed_mmtms, ValueError, r"same number of branches \(got \[2, 3\]\)"),
        (Refusals.too_many_children, ValueError, r"branches= \(got image, audio, head\)"),
        (Refusals.too_few_branches, ValueError, r"name the 2 branches .*\(got image\)"),
        (Refusals.branch_without_parameters, ValueError, r"main\['audio'\] must hold .*got none"),
        (
            Refusals.one_parameter_in_two_branches,
            ValueError,
            r"\(got \[3\] in main\['image'\] and main\['audio'\]\)",
        ),
        (Refusals.main_in_bypass, ValueError, r"in bypass\['a'\] and main\['b'\]\)"),
        (Refusals.zero_weights, ValueError, r"weights of main\['audio'\] .*\(got 0.0\)"),
        (Refusals.infinite_weights, ValueError, r"bypass\['audio'\] .*\(got (inf|nan)\)"),
        (Refusals.one_branch, ValueError, r"must be at least two \(got \['a'\]\)"),
        (Refusals.other_names, ValueError, r"branches of main, \['a', 'b'\] \(got \['a', 'c'\]\)"),
        (Refusals.flattened, TypeError, r"main\['audio'\] must not be .*use .*fully_shard"),
        (Refusals.partitioned, TypeError, r"bypass\['image'\] must not be .*ZeRO; use"),
        (Refusals.names_for_modules, TypeError, r"branches\['image'\] must be .*got 'image'"),
        (Refusals.numbers_for_modules, TypeError, r"branches\['image'\] must be .*got 1\)"),
    ],
)
def test_refuses(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ConditionalLearningSpeed.*: .*{message}"):
        make()


def test_refuses_an_update_without_gradients() -> None:
    measure = ConditionalLearningSpeed.from_model(Net())
    with pytest.raises(RuntimeError, match=r"zero_grad \(got no gradient on 20"):
        measure.update()


class Operations(TorchDispatchMode):
    """Those of torch that run, views aside."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Watched:
    """A native module, and which of its functions are called."""

    def __init__(self, module: Any, names: list[str]) -> None:
        self.module = module
        self.names = names

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)
        return getattr(self.module, name)


@pytest.mark.parametrize("frozen", [0, 3])
def test_an_update_of_142_tensors_is_two_launches_and_no_host_read(
    native: Backend, frozen: int
) -> None:
    parameters = [nn.Parameter(torch.randn(1 + i % 9, device=native.device)) for i in range(142)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for parameter in parameters[:frozen]:
        parameter.requires_grad_(False)
    groups = [parameters[:10], parameters[10:20], parameters[20:80], parameters[80:]]
    measure = ConditionalLearningSpeed(
        bypass={"a": groups[0], "b": groups[1]}, main={"a": groups[2], "b": groups[3]}
    )
    names: list[str] = []
    with _backend.using(Watched(native.native, names)):  # type: ignore[arg-type]
        measure.update()  # makes the workspace
        names.clear()
        with Operations(names), host_reads() as found:
            measure.update()
    # Each function is one kernel, and `empty` is none.
    assert sorted(names) == ["accumulate_speeds_", "empty", "moments"]
    assert found == []
    if native.emulated:  # so that launches can be counted
        native.native.begin_capture()
        measure.update()
        assert len(native.native.end_capture()) == 2


def test_a_gradient_that_is_gone_is_zero(native: Backend) -> None:
    parameters = [nn.Parameter(torch.randn(3, device=native.device)) for i in range(4)]
    measure = ConditionalLearningSpeed(
        bypass={"a": parameters[:1], "b": parameters[1:2]},
        main={"a": parameters[2:3], "b": parameters[3:]},
    )
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    measure.update()
    measure.reset()
    parameters[3].grad = None
    measure.update()
    assert measure.speed[1] == torch.inf  # not what its row held before
