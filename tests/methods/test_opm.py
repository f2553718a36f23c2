"""OPM against worked values and a literal transcription of the published mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import mmbal_fast
from tests.host_reads import host_reads

if TYPE_CHECKING:
    from tests.conftest import Backend

NAMES = ("audio", "image")


def observed(ratio: float, device: torch.device | str = "cpu", **options: float) -> mmbal_fast.OPM:
    """With ratios (r, 1 / r): the probabilities of the label are p and p / r."""
    opm = mmbal_fast.OPM(NAMES, **options)  # type: ignore[arg-type]
    other = 0.5 / ratio

    def logits(probability: float) -> Tensor:
        return torch.tensor([[probability, 1 - probability]]).log().to(device)

    opm.observe(
        {"audio": logits(0.5), "image": logits(other)}, torch.zeros(1, dtype=torch.int64).to(device)
    )
    return opm


def test_worked_values(backend: Backend) -> None:
    """q = 0.690399 for rho = 2, theta = 0.345199 and a factor of 1.527182 for equal widths."""
    opm = observed(2.0, backend.device, apply=1.0)
    ones = {name: torch.ones(4000, 3, device=backend.device) for name in NAMES}
    features, weight = opm(ones)
    assert opm.last is not None
    assert opm.last.probabilities.tolist() == pytest.approx([0.690399, 0.0], abs=1e-6)
    assert opm.last.ratios.tolist() == pytest.approx([2.0, 0.5], rel=1e-6)
    audio, image = features["audio"], features["image"]
    assert image.unique().tolist() == pytest.approx([1.527182], abs=2e-6)
    assert audio.unique().tolist() == pytest.approx([0.0, 1.527182], abs=2e-6)
    assert bool((audio[:, :1] == audio).all())  # whole samples
    dropped = (audio[:, 0] == 0).double().mean().item()
    assert abs(dropped - 0.690399) < 4 * (0.69 * 0.31 / 4000) ** 0.5
    assert bool((weight == 1).all())  # the image is never dropped


def test_equals_the_published_mask() -> None:
    """Rows scaled by what is kept over 1 - theta, written as the paper has it."""
    opm = observed(3.0, apply=1.0, base=0.6, strength=0.2)
    features = {"audio": torch.randn(50, 4), "image": torch.randn(50, 7)}
    found, _ = opm(features)
    q = [0.6 * (1 + 0.2 * torch.tanh(torch.tensor(2.0)).item()), 0.0]
    theta = (4 * q[0] + 7 * q[1]) / 11
    for name, each in features.items():
        mask = (found[name].abs().sum(1) > 0).float()
        expected = each * mask[:, None] * (1 / (1 - theta))
        torch.testing.assert_close(found[name], expected)


def test_launches_and_host_reads(native: Backend) -> None:
    """Scores and ratios are one launch, the features one each way."""
    opm = observed(2.0, native.device, apply=1.0)
    features = {name: torch.ones(9, 3, device=native.device, requires_grad=True) for name in NAMES}
    logits = {name: torch.randn(9, 3, device=native.device) for name in NAMES}
    target = torch.zeros(9, dtype=torch.int64, device=native.device)

    def forward() -> Tensor:
        found, weight = opm(features)
        return torch.stack([each.sum() for each in found.values()]).sum() + weight.sum()

    forward().backward()
    with host_reads() as reads:
        opm.observe(logits, target)
        forward().backward()
    assert reads == []
    if native.emulated:
        loss = forward()
        for run in (lambda: opm.observe(logits, target), forward, loss.backward):
            native.native.begin_capture()
            run()
            assert len(native.native.end_capture()) == 1


def test_labels_of_each_class_and_tokens() -> None:
    opm = mmbal_fast.OPM(NAMES, apply=1.0)
    logits = {"audio": torch.full((2, 5, 1), 3.0), "image": torch.zeros(2, 5, 1)}
    opm.observe(logits, torch.ones(2, 5, 1), class_dim=-1, multi_label=True)
    opm({name: torch.ones(2, 1) for name in NAMES})
    assert opm.last is not None
    ratio = torch.tensor(3.0).sigmoid().item() / 0.5
    assert opm.last.ratios.tolist() == pytest.approx([ratio, 1 / ratio], rel=1e-5)


def test_no_modality_dominates_and_nothing_happens() -> None:
    opm = mmbal_fast.OPM(NAMES, apply=1.0)
    features = {name: torch.randn(5, 3) for name in NAMES}
    found, weight = opm(features)  # nothing was observed
    assert all(torch.equal(found[name], features[name]) for name in NAMES)
    assert weight.tolist() == [1.0] * 5
    opm.observe({name: torch.zeros(2, 3) for name in NAMES}, torch.full((2,), -100))
    found, _ = opm(features)  # no label counted
    assert all(torch.equal(found[name], features[name]) for name in NAMES)


def test_batches_are_left_alone_with_the_rest_of_the_probability() -> None:
    opm = observed(4.0, base=1.0, apply=0.7)
    features = {name: torch.ones(3, 2) for name in NAMES}
    applied = [bool((opm(features).features["audio"] == 0).all()) for _ in range(400)]
    assert abs(sum(applied) / 400 - 0.7) < 4 * (0.7 * 0.3 / 400) ** 0.5


def test_three_modalities() -> None:
    opm = mmbal_fast.OPM(["a", "b", "c"], base=0.5, apply=1.0)
    confident = torch.tensor([[9.0, 0.0, 0.0]])
    unsure = torch.tensor([[0.0, 0.0, 5.0]])
    opm.observe({"a": confident, "b": confident, "c": unsure}, torch.tensor([0]))
    features, weight = opm({name: torch.ones(1000, 2) for name in "abc"})
    assert opm.last is not None
    q = opm.last.probabilities
    assert 0.5 < q[0] < 1
    assert 0.5 < q[1] < 1
    assert q[2] == 0
    assert bool((weight == 1).all())
    assert not torch.equal(features["a"], features["b"])  # drawn for each by itself


def test_gradients_flow_where_features_do() -> None:
    opm = observed(3.0, apply=1.0)
    features = {name: torch.randn(40, 3, requires_grad=True) for name in NAMES}
    found, _ = opm(features)
    torch.stack([each.sum() for each in found.values()]).sum().backward()
    for name in NAMES:
        grad = features[name].grad
        assert grad is not None
        assert torch.equal(grad == 0, found[name] == 0)


def test_half_precision_keeps_its_type() -> None:
    opm = observed(3.0, apply=1.0)
    found, weight = opm({name: torch.ones(4, 3, dtype=torch.bfloat16) for name in NAMES})
    assert found["audio"].dtype == weight.dtype == torch.bfloat16


def test_the_same_draws_whatever_the_threads_and_again_after_resuming() -> None:
    features = {name: torch.ones(500, 2) for name in NAMES}
    opm = observed(2.0, apply=1.0)
    opm(features)
    state = opm.state_dict()
    expected = opm(features).features["audio"]
    again = mmbal_fast.OPM(NAMES, apply=1.0)
    again.load_state_dict(state)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(again(features).features["audio"], expected)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(again(features).features["audio"], expected)
