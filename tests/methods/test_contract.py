"""What every method promises, over all of them."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import json
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

import mmbal_fast
from mmbal_fast import _backend
from mmbal_fast.integrations._callback import MethodCallback
from mmbal_fast.training import GradientModulation, Method, Record, Setting
from mmbal_fast.training.history import values_of
from tests.defaults import default
from tests.host_reads import host_reads
from tests.methods.cases import CASES, Case, Run, filled
from tests.methods.test_ogm_ge_stack import captured

if TYPE_CHECKING:
    from tests.conftest import Backend

CLOUD = pytest.importorskip("cloudpickle", reason="cloudpickle is not installed")


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(one, other, strict=True)
    )


def equal_states(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit, NaN included."""
    return repr(plain(one)) == repr(plain(other))


def plain(value: Any) -> Any:
    """Tensors as lists: what they hold, to the last bit."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def trained(case: Case, steps: int = 5) -> Run:
    run = case.run()
    for number in range(steps):
        run.step(number)
    return run


def test_every_public_method_is_here() -> None:
    public = {
        value
        for package in (mmbal_fast, mmbal_fast.fusion)
        for name in package.__all__
        if inspect.isclass(value := getattr(package, name))
        and issubclass(value, Method)
        and not inspect.isabstract(value)
        and value not in (Method, GradientModulation)  # what methods are made of
    }
    assert public == {case.method for case in CASES}


# ---- state


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("form", ["as it is", "torch.save", "JSON"])
def test_resumes_in_the_middle_bit_for_bit(case: Case, enabled: bool, form: str) -> None:
    straight = case.run()
    for number in range(5):
        straight.step(number)
    straight.method.enabled = enabled
    straight.step(5)
    state = straight.method.state_dict()
    if form == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    elif form == "JSON":
        state = json.loads(json.dumps(plain(state)))
    resumed = case.run()
    resumed.model.load_state_dict(copy.deepcopy(straight.model.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    resumed.method.load_state_dict(state)
    assert resumed.method.enabled is enabled
    assert equal_states(resumed.method.state_dict(), straight.method.state_dict())
    for number in range(6, 11):
        straight.step(number)
        resumed.step(number)
    assert same(resumed.bits(), straight.bits())
    assert equal_states(resumed.method.state_dict(), straight.method.state_dict())


def spoiled(value: Any) -> Iterator[Any]:
    """Values of other types and shapes, and numbers that no state has."""
    yield "words"  # not "text", which names a modality
    yield None
    yield {"a": 1}
    if isinstance(value, bool):
        yield 1
    elif isinstance(value, int):
        yield -1
        yield value + 0.7
        yield 2**65
    elif isinstance(value, Tensor):
        yield value[..., None]
        if value.is_floating_point():
            yield torch.full_like(value, torch.nan)
        else:
            yield value - 2**40
            yield value.double() + 0.5
    elif isinstance(value, list) and value and isinstance(value[0], float):
        yield [float("nan"), *value[1:]]
        yield [-1.0, *value[1:]]
        yield value[1:]


def test_states_of_something_else_are_refused_and_change_nothing(case: Case) -> None:
    run = trained(case)
    method = run.method
    before, bits = plain(copy.deepcopy(method.state_dict())), run.bits()
    # Of another step and seed, switched off: a part of it would show.
    state = trained(case, 9).method.state_dict() | {"enabled": False}
    if "seed" in state:
        state["seed"] += 1
    tried = 0

    def refused(other: Any) -> None:
        nonlocal tried
        with pytest.raises((TypeError, ValueError), match=rf"^{type(method).__name__}.load_state"):
            method.load_state_dict(other)
        assert repr(plain(method.state_dict())) == repr(before)
        assert same(run.bits(), bits)
        tried += 1

    refused({})
    refused(None)
    refused({**state, "other": 1})
    refused({**state, "names": list(reversed(state["names"]))})
    for key in state:
        refused({name: value for name, value in state.items() if name != key})
        for wrong in spoiled(state[key]):
            if key == "log" and isinstance(wrong, Tensor) and wrong.shape == state[key].shape:
                continue  # learning speeds are NaN until every branch has moved
            refused({**state, key: wrong})
    assert tried > 10
    method.load_state_dict(state)


def test_states_are_copies(case: Case) -> None:
    run = trained(case)
    state = run.method.state_dict()
    before = repr(plain(state))
    for number in range(5, 8):
        run.step(number)
    assert repr(plain(state)) == before


def test_enabled_is_true_or_false(case: Case) -> None:
    method = case.run().method
    for wrong in (1, None, "yes"):
        with pytest.raises(TypeError, match=r"enabled must be True or False \(got"):
            method.enabled = wrong
    assert method.enabled is True


def test_names_are_names(case: Case) -> None:
    method = case.run().method
    assert isinstance(method.names, tuple)
    assert all(isinstance(name, str) for name in method.names)


@pytest.mark.parametrize("wrong", ["ab", ["a"], [], ["a", "a"], [1, 2], 3])
def test_heads_that_are_no_names_are_refused(wrong: Any) -> None:
    for method in (mmbal_fast.LossWeighting, mmbal_fast.GradientBlending):
        with pytest.raises((TypeError, ValueError), match=rf"^{method.__name__}: heads must "):
            method(wrong)


# ---- settings


def test_settings_are_shown_and_checked_whenever_they_are_set(case: Case) -> None:
    method = case.run().method
    assert set(method._settings()) == set(case.settings)
    for name, (good, bad) in case.settings.items():
        setattr(method, name, good)
        assert f"{name}={good!r}" in repr(method)
        with pytest.raises((TypeError, ValueError), match=rf"^{type(method).__name__}: {name} mu"):
            setattr(method, name, bad)
        assert getattr(method, name) == good
        assert isinstance(getattr(type(method), name), Setting)
    for name in method.names:
        assert name in repr(method)


# ---- steps


def test_bad_calls_change_nothing(case: Case) -> None:
    run = trained(case)
    run.optimizer.zero_grad()
    run.backward(5, lambda loss: loss)
    for call in case.bad_calls:
        state, bits = plain(run.method.state_dict()), run.bits()
        grads = [each.grad.clone() for each in run.model.parameters() if each.grad is not None]
        with pytest.raises((TypeError, ValueError, RuntimeError, IndexError), match=r"\(got"):
            call(run)
        after = [each.grad for each in run.model.parameters() if each.grad is not None]
        assert same(after, grads)
        assert same(run.bits(), bits)
        assert repr(plain(run.method.state_dict())) == repr(state)


def test_steps_that_a_scaler_skips_leave_no_trace(case: Case) -> None:
    if not case.skips:
        pytest.skip("acts before backward")
    run, other = case.run(), case.run()
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for number in range(4):
        run.step(number, scaler)
        other.step(number, None)
    state, parameters = plain(run.method.state_dict()), list(run.model.parameters())
    weights = [each.detach().clone() for each in parameters]

    def spoil() -> None:
        parameters[0].grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]

    run.step(9, scaler, spoil)
    assert same([each.detach() for each in parameters], weights)
    assert repr(plain(run.method.state_dict())) == repr(state)
    assert same([each.detach() for each in parameters], list(other.model.parameters()))


def test_no_step_reads_the_host(case: Case) -> None:
    if _backend.native is None:
        pytest.skip("the reference reads labels on the CPU")
    run = trained(case)
    run.optimizer.zero_grad()
    given = run.backward(6, lambda loss: loss)
    with host_reads() as found:
        run.act(given)
    assert found == []


def test_records_are_tensors_by_name(case: Case) -> None:
    run = case.run()
    assert not isinstance(run.method.last, Record)
    for number in range(3):
        run.step(number)
    record: Any = run.method.last
    assert isinstance(record, Record)
    quantities = record.quantities(len(run.method.names))
    assert quantities
    assert not any(each.requires_grad for each in quantities.values())
    kept: Any = record.clone()
    before = {name: each.clone() for name, each in kept.quantities(len(run.method.names)).items()}
    run.step(3)
    after = kept.quantities(len(run.method.names))
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)
    history = mmbal_fast.History(run.method.names)
    history.record(run.method.last, 4)
    assert list(history.to_dict()) == [
        "step", *(f"{quantity}/{name}" for quantity in quantities for name in run.method.names)
    ]  # fmt: skip
    assert len(values_of(run.method.last, run.method.names)) == len(history.to_dict()) - 1


# ---- modulations: scores of your own, labels of each class, compilers

MODULATIONS = [
    case for case in CASES if issubclass(case.method, mmbal_fast.training.GradientModulation)
]
over_modulations = pytest.mark.parametrize("case", MODULATIONS, ids=str)


@pytest.fixture
def gradients() -> Callable[[Run, int], None]:
    def make(run: Run, number: int) -> None:
        run.optimizer.zero_grad()
        run.backward(number, lambda loss: loss)

    return make


@over_modulations
def test_scores_of_your_own(case: Case, gradients: Callable[[Run, int], None]) -> None:
    """By name and as a tensor, of several micro-batches: higher is better."""
    runs = [case.run(), case.run()]
    table = torch.tensor([[0.2, 0.4, 0.3], [0.6, 0.5, 0.4], [0.7, 0.9, 0.5]])
    for number, row in enumerate(table):
        for by_name, run in zip((False, True), runs, strict=True):
            gradients(run, number)
            for part in (row * 0.5, row * 1.5):
                named = dict(zip(run.method.names, part.tolist(), strict=True))
                run.method.observe(scores=named if by_name else part)
            record = run.method.step()
            shares = record.scores / record.scores.sum()
            torch.testing.assert_close(shares, row / row.sum())
        one, other = (run.method.last.coefficients for run in runs)
        torch.testing.assert_close(one, other)
    assert len(set(one.tolist())) > 1  # the last of the rows was not alike
    leader = int(record.ratios.argmax())
    others = [k for m, k in enumerate(one.tolist()) if m != leader]
    if case.method is mmbal_fast.InfoReg:  # there a coefficient is a pull, not a factor
        assert one[leader] >= max(others)
    else:
        assert one[leader] <= min(others)
    with pytest.raises(ValueError, match=r"scores must be given for .*\(got \['audio'\]\)"):
        run.method.observe(scores={"audio": 1.0})


@over_modulations
def test_labels_of_each_class(case: Case, gradients: Callable[[Run, int], None]) -> None:
    """Binary classification from one logit does what its two classes do."""
    runs = [case.run(), case.run()]
    for number in range(3):
        generator = torch.Generator().manual_seed(number)
        target = (torch.rand(8, 1, generator=generator) > 0.5).float()
        strength = torch.arange(1, len(runs[0].method.names) + 1)
        noise = torch.randn(len(strength), 8, 1, generator=generator)
        logits = {
            name: (2 * target - 1) * k + each
            for name, k, each in zip(runs[0].method.names, strength, noise, strict=True)
        }
        for run in runs:
            gradients(run, number)
        one = runs[0].method.step(logits, target, multi_label=True)
        two = {name: torch.cat([torch.zeros_like(x), x], 1) for name, x in logits.items()}
        other = runs[1].method.step(two, target.flatten().long())
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(one.coefficients, other.coefficients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", [*MODULATIONS, CASES[[str(c) for c in CASES].index("OPM")]], ids=str
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiles_without_a_graph_break(case: Case) -> None:
    """Between eager forward and optimizer, with changing settings: to the bit what eager does."""
    if case.method is mmbal_fast.InfoReg:
        pytest.skip("a step of epochs, eager so far")
    torch._dynamo.reset()
    runs: list[Any] = [case.run(), case.run()]
    forward = case.method is mmbal_fast.OPM
    acts = []
    for run in runs:
        act = functools.partial(fused, run) if forward else run.method.step
        compiled = torch.compile(act, fullgraph=True, backend="aot_eager")
        acts.append(act if run is runs[0] else compiled)
    setting = next(iter(case.settings))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(4):
            grads = []
            for run, act in zip(runs, acts, strict=True):
                setattr(run.method, setting, 0.1 + 0.2 * number)
                run.optimizer.zero_grad()
                if forward:
                    batch, target = run.batch(number)
                    logits = {name: 3 * each[:, :3] for name, each in batch.items()}
                    run.method.observe(logits, target)
                    losses, weight = act(batch, target)
                    (losses * weight).sum().backward()
                else:
                    act(*run.backward(number, lambda loss: loss))
                run.optimizer.step()
                grads.append([each.grad for each in run.model.encoders.parameters()])
            assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert same(runs[0].bits(), runs[1].bits())
    assert equal_states(runs[0].method.state_dict(), runs[1].method.state_dict())


def fused(run: Any, batch: dict[str, Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Encoders, the method, and the fused head's losses."""
    features, weight = run.method(run.model.features(batch))
    return nn.functional.cross_entropy(run.model(features), target, reduction="none"), weight


LAUNCHES = {"OGM-GE": 3, "AGM": 3, "MLB": 2, "metric modulation": 3}
"""Scores; moments, where there is noise; update; memory, where there is one."""


@pytest.mark.parametrize("native", ["cuda-emulated"], indirect=True)
def test_launches_of_a_modulation(native: Backend) -> None:
    for case in MODULATIONS:
        if str(case) not in LAUNCHES:
            continue
        run: Any = case.run()
        if case.method is mmbal_fast.AGM:
            run.method = mmbal_fast.AGM(run.model.encoders)  # the head's columns are torch's work
        run.step(0)
        given = run.backward(1, lambda loss: loss)
        step = functools.partial(run.method.step, *given)
        assert len(captured(native, step)) == LAUNCHES[str(case)]


# ---- copies


def by_pickle(module: Any, dumps: Callable[[Any], bytes]) -> Callable[[Any], Any]:
    return lambda value: module.loads(dumps(value))


def by_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": by_pickle(pickle, pickle.dumps),
    "cloudpickle": by_pickle(pickle, CLOUD.dumps),
    "torch.save": by_torch,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_go_on_as_the_original_does(case: Case, how: str) -> None:
    """Together with the model that holds it, as models are copied; into the copy's parameters."""
    run = trained(case)
    run.model.balancer = run.method
    copied = COPIES[how](run)
    assert copied.method is copied.model.balancer
    assert copied.method is not run.method
    last = run.method.last.clone()
    mine = [each.clone() for each in run.bits()]
    for number in range(5, 8):
        copied.step(number)
    assert same(run.bits(), mine)  # the original's parameters were not touched
    assert same(
        list(last.quantities(len(run.method.names)).values()),
        list(run.method.last.quantities(len(run.method.names)).values()),
    )
    for number in range(5, 8):
        run.step(number)
    assert same(copied.bits(), run.bits())
    assert equal_states(copied.method.state_dict(), run.method.state_dict())
    assert repr(copied.method) == repr(run.method)


def test_a_copied_record_shows_what_the_copys_steps_measure(case: Case) -> None:
    run = trained(case)
    copied = pickle.loads(pickle.dumps(run))
    copied.step(5)
    run.step(5)
    for name, each in run.method.last.quantities(len(run.method.names)).items():
        twin = copied.method.last.quantities(len(run.method.names))[name]
        assert torch.equal(twin.nan_to_num(), each.nan_to_num())


# ---- defaults


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_no_default_dtype_plays_a_part(case: Case, dtype: torch.dtype) -> None:
    plain_run = trained(case, 6)
    with default(dtype):
        run = trained(case, 3)
        run.method.load_state_dict(run.method.state_dict())
        for number in range(3, 6):
            run.step(number)
        assert same(run.bits(), plain_run.bits())
        assert equal_states(run.method.state_dict(), plain_run.method.state_dict())


def test_no_default_device_plays_a_part(case: Case) -> None:
    plain_run = trained(case, 6)
    run = case.run()
    with torch.device("meta"):
        for number in range(3):
            run.step(number)
        run.method.load_state_dict(run.method.state_dict())
    for number in range(3, 6):
        run.step(number)
    assert same(run.bits(), plain_run.bits())


def test_made_with_the_model_on_the_meta_device(case: Case) -> None:
    """As `from_pretrained` makes models: real only when the weights are loaded."""
    plain_run = trained(case, 3)
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.methods.cases.filled", lambda model: model)
        run = case.run()
        assert all(each.is_meta for each in run.model.parameters())
    run.model.to_empty(device="cpu")
    filled(run.model)
    for buffer in run.model.buffers():  # the averages that a checkpoint brings
        buffer.zero_()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        run.step(number)
    assert same(run.bits(), plain_run.bits())


# ---- integrations


def test_callbacks_take_any_method(case: Case) -> None:
    run = trained(case)
    run.model.balancer = run.method
    callback = MethodCallback(epochs=1)
    callback._begin(run.model)
    run.optimizer.zero_grad()
    given = run.backward(6, lambda loss: loss)
    if given is not None and hasattr(run.method, "observe"):
        run.method.observe(*given)
    callback._step(0, None, run.optimizer)
    assert callback.history is not None
    assert callback.history.names == run.method.names
    callback._end_validation()
    callback._begin_epoch(1)
    assert run.method.enabled is False
    assert callback._export()["enabled"] is False


def test_a_module_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must hold its method as 'balancer' \(got a Linear"):
        MethodCallback()._begin(nn.Linear(2, 2))
