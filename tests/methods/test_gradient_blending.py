from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn import functional as F

from mmbal_fast import GradientBlending, SuperEpoch, WeightingRecord

if TYPE_CHECKING:
    from tests.conftest import Backend

NAN = math.nan
HEADS = ("audio", "image", "fused")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def measure(blending: GradientBlending, train: list[float], validation: list[float]) -> SuperEpoch:
    blending.record("train", train, samples=700)
    blending.record("validation", validation, samples=90)
    return blending.update()


def logits(batch: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, 5, generator=generator).requires_grad_() for name in HEADS}


# --- the loss ------------------------------------------------------------------------------------


def test_loss_weighs_the_heads_by_name() -> None:
    blending = GradientBlending(HEADS, weights=[0.5, 0.2, 0.3])
    heads, target = logits(6), torch.tensor([0, 1, 2, 3, 4, 0])
    turned = dict(reversed(heads.items()))
    loss = blending.loss(turned, target)
    audio, image, fused = each = [F.cross_entropy(heads[name], target) for name in HEADS]
    torch.testing.assert_close(loss, 0.5 * audio + 0.2 * image + 0.3 * fused)
    loss.backward()
    assert all(x.grad is not None for x in heads.values())
    assert blending.last is not None
    torch.testing.assert_close(blending.last.losses, torch.stack(each).detach())
    assert blending.last.samples == 6


def test_loss_passes_its_options_on() -> None:
    blending = GradientBlending(HEADS, label_smoothing=0.1, ignore_index=4)
    heads, target = logits(6), torch.tensor([0, 1, 2, 3, 4, 0])
    blending.loss(heads, target)
    wanted = [
        F.cross_entropy(heads[name], target, label_smoothing=0.1, ignore_index=4) for name in HEADS
    ]
    assert blending.last is not None
    torch.testing.assert_close(blending.last.losses, torch.stack(wanted).detach())
    assert blending.last.samples == 5


def test_samples_that_count(backend: Backend) -> None:
    blending = GradientBlending(HEADS)
    maps = {name: torch.randn(2, 5, 3, device=backend.device) for name in HEADS}
    target = torch.tensor([[0, -100, 4], [-100, -100, 1]], device=backend.device)
    for labels, samples in (
        (target, 3),
        (torch.full_like(target, -100), 0),
        (torch.rand(2, 5, 3, device=backend.device).softmax(1), 6),
    ):
        blending.loss(maps, labels)
        assert blending.last is not None
        assert blending.last.samples == samples
        assert blending.last.samples.dtype == torch.int64


def test_loss_compiles_without_a_graph_break() -> None:
    blending, eager = GradientBlending(HEADS), GradientBlending(HEADS)
    heads, target = logits(6), torch.tensor([0, 1, 2, 3, 4, 0])
    compiled = torch.compile(blending.loss, fullgraph=True, backend="aot_eager")
    for weights in ([0.5, 0.2, 0.3], [0.0, 0.2, 0.8]):
        blending.weights = eager.weights = weights
        torch.testing.assert_close(compiled(heads, target), eager.loss(heads, target))
    assert blending.last is not None
    assert eager.last is not None
    torch.testing.assert_close(blending.last.losses, eager.last.losses)


def test_loss_refuses_other_heads() -> None:
    blending = GradientBlending(HEADS)
    heads, target = logits(2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"logits must be given for .*\(got \['audio', 'image'\]"):
        blending.loss({"audio": heads["audio"], "image": heads["image"]}, target)
    with pytest.raises(ValueError, match="logits must be given for"):
        blending.loss({**heads, "text": heads["audio"]}, target)
    for wrong in (1.0, None, "text"):
        with pytest.raises(TypeError, match=r"^GradientBlending.loss: logits must be tensors"):
            blending.loss({**heads, "audio": wrong}, target)  # type: ignore[dict-item]
    assert blending.last is None


# --- records -------------------------------------------------------------------------------------


def test_records_are_means_over_samples() -> None:
    # 64 + 64 + 1 samples: the mean of the three means would be far off.
    blending = GradientBlending(HEADS)
    target = torch.arange(129) % 5
    heads = {name: each.detach() for name, each in logits(129).items()}
    for piece in (slice(0, 64), slice(64, 128), slice(128, 129)):
        blending.loss({name: 3 * each[piece] for name, each in heads.items()}, target[piece])
        assert blending.last is not None
        blending.record("train", blending.last)
    blending.record("validation", [1.0, 2.0, 3.0], samples=2)
    blending.record(
        "validation", {"fused": 6.0, "audio": 4.0, "image": 5.0}, samples=torch.tensor(1)
    )
    measured = blending.update()
    wanted = torch.stack([F.cross_entropy(3 * heads[name], target) for name in HEADS])
    torch.testing.assert_close(measured.train, wanted.double())
    torch.testing.assert_close(measured.validation, f64(2.0, 3.0, 4.0))


def test_samples_without_label_do_not_count() -> None:
    blending = GradientBlending(HEADS)
    heads = logits(4)
    for target in ([-100, -100, -100, -100], [1, -100, -100, -100], [1, 2, 3, 4]):
        blending.loss(heads, torch.tensor(target))
        assert blending.last is not None
        blending.record("train", blending.last)
    blending.record("validation", [NAN, NAN, NAN], samples=0)
    blending.record("validation", [1.0, 2.0, 3.0], samples=7)
    measured = blending.update()
    wanted = [
        (
            F.cross_entropy(heads[name][:1], torch.tensor([1]))
            + 4 * F.cross_entropy(heads[name], torch.tensor([1, 2, 3, 4]))
        )
        / 5
        for name in HEADS
    ]
    torch.testing.assert_close(measured.train, torch.stack(wanted).detach().double())
    torch.testing.assert_close(measured.validation, f64(1.0, 2.0, 3.0))


def test_records_work_in_inference_mode_and_out_of_it() -> None:
    blending = GradientBlending(HEADS)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.inference_mode()):
        with mode:
            blending.loss(logits(4), torch.tensor([0, 1, 2, 3]))
            assert blending.last is not None
            blending.record("train", blending.last)
            blending.record("validation", blending.last)
    blending.update()
    blending.loss(logits(4), torch.tensor([0, 1, 2, 3])).backward()


def test_bad_records_are_refused() -> None:
    blending = GradientBlending(HEADS)
    good = [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match=r"split must be .* \(got 'test'\)"):
        blending.record("test", good, samples=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"number of samples is needed \(got None\)"):
        blending.record("train", good)
    with pytest.raises(ValueError, match=r"samples must not be negative \(got -1\)"):
        blending.record("train", good, samples=-1)
    with pytest.raises(ValueError, match=r"has its own samples \(got 3 beside it\)"):
        blending.record(
            "train", WeightingRecord(f64(*good), f64(*good), torch.tensor(3)), samples=3
        )
    with pytest.raises(ValueError, match=r"losses must be \[3\] \(got \[2\]\)"):
        blending.record("train", [1.0, 2.0], samples=1)
    with pytest.raises(ValueError, match=r"losses must be given for .*\(got \['audio'\]\)"):
        blending.record("train", {"audio": 1.0}, samples=1)
    with pytest.raises(ValueError, match=r"recorded first \(got none for 'train'\)"):
        blending.update()
    blending.record("train", good, samples=1)
    blending.record("validation", good, samples=0)
    with pytest.raises(ValueError, match=r"recorded first \(got none for 'validation'\)"):
        blending.update()
    # What was recorded is still there.
    blending.record("validation", good, samples=1)
    torch.testing.assert_close(blending.update().train, f64(*good))


# --- updates -------------------------------------------------------------------------------------


def test_updates_by_hand() -> None:
    blending = GradientBlending(HEADS)
    uniform = f64(1 / 3, 1 / 3, 1 / 3)
    assert torch.equal(blending.weights, uniform)

    # The end of the warm-up: nothing to compare with, weights stay.
    first = measure(blending, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    assert torch.equal(blending.weights, uniform)
    assert torch.equal(first.weights, uniform)
    assert first.generalization.isnan().all()
    assert first.overfitting.isnan().all()
    assert first.ratio.isnan().all()

    # dG = 0.5, 0.5, -0.2 and dO = 0.1, 0.2, 0.8: dG / dO^2 = 50, 12.5, nothing.
    second = measure(blending, [0.4, 0.3, 0.4], [0.5, 0.5, 1.2])
    torch.testing.assert_close(second.generalization, f64(0.5, 0.5, -0.2))
    torch.testing.assert_close(second.overfitting, f64(0.1, 0.2, 0.8))
    torch.testing.assert_close(second.ratio, f64(0.2, 0.4, 4.0))
    torch.testing.assert_close(second.weights, f64(0.8, 0.2, 0.0))
    assert torch.equal(blending.weights, second.weights)

    # Increments since the second measurement, not since the first: dG = 0.1, 0.2, 0.2 and dO = 0.1,
    # 0.1, 0.1, so 10, 20, 20.
    third = measure(blending, [0.2, 0.0, 0.1], [0.4, 0.3, 1.0])
    torch.testing.assert_close(third.weights, f64(0.2, 0.4, 0.4))
    assert blending.history == [first, second, third]


def test_head_that_diverged_gets_0_and_may_come_back() -> None:
    blending = GradientBlending(["audio", "fused"])
    measure(blending, [1.0, 1.0], [1.0, 1.0])
    measure(blending, [0.4, NAN], [0.5, NAN])
    assert torch.equal(blending.weights, f64(1.0, 0.0))
    measure(blending, [0.3, 1.0], [0.45, 1.0])
    assert torch.equal(blending.weights, f64(1.0, 0.0))
    measure(blending, [0.2, 0.4], [0.4, 0.5])
    assert blending.weights[1] > 0


def test_no_head_gained_gives_uniform_weights_and_a_warning() -> None:
    blending = GradientBlending(["audio", "fused"], weights=[0.9, 0.1])
    measure(blending, [1.0, 1.0], [1.0, 1.0])
    assert torch.equal(blending.weights, f64(0.9, 0.1))
    with pytest.warns(RuntimeWarning, match="no head gained"):
        measure(blending, [0.5, 0.5], [1.0, 1.1])
    assert torch.equal(blending.weights, f64(0.5, 0.5))


def test_floor_is_passed_on() -> None:
    blending = GradientBlending(["audio", "fused"], floor=0.5)
    measure(blending, [1.0, 1.0], [1.0, 1.0])
    # dG = 0.5 for both, dO = 0.1 and 0.5; the first is floored to 0.25.
    measure(blending, [0.4, 0.0], [0.5, 0.5])
    torch.testing.assert_close(blending.weights, f64(0.8, 0.2))


def test_weights_change_in_place_for_captured_graphs() -> None:
    blending = GradientBlending(["audio", "fused"])
    buffer = blending._weights
    measure(blending, [1.0, 1.0], [1.0, 1.0])
    measure(blending, [0.4, 0.3], [0.5, 0.5])
    blending.load_state_dict(blending.state_dict())
    blending.weights = [0.25, 0.75]
    assert blending._weights is buffer
    assert torch.equal(buffer, f64(0.25, 0.75))


def test_weights_handed_out_are_a_copy() -> None:
    blending = GradientBlending(["audio", "fused"])
    blending.weights.zero_()
    assert torch.equal(blending.weights, f64(0.5, 0.5))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"heads must be at least two \(got \['fused'\]\)"):
        GradientBlending(["fused"])
    with pytest.raises(ValueError, match=r"differ in name \(got \['a', 'b', 'a'\]\)"):
        GradientBlending(["a", "b", "a"])
    with pytest.raises(ValueError, match=r"floor must be a positive number \(got 0\)"):
        GradientBlending(HEADS, floor=0)
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 to 1 \(got 2\)"):
        GradientBlending(HEADS, label_smoothing=2)
    with pytest.raises(ValueError, match=r"weights must have shape \[3\] \(got \[2\]\)"):
        GradientBlending(HEADS, weights=[0.5, 0.5])
    for bad in ([0.0, 0.0, 0.0], [-0.1, 0.6, 0.5], [NAN, 0.5, 0.5], [math.inf, 0.5, 0.5]):
        with pytest.raises(ValueError, match="weights must be finite"):
            GradientBlending(HEADS, weights=bad)


# --- resuming ------------------------------------------------------------------------------------


def numbers(seed: int) -> list[float]:
    return torch.rand(3, generator=torch.Generator().manual_seed(seed)).tolist()


def advance(blending: GradientBlending, epochs: range) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for epoch in epochs:
            for batch in range(3):
                blending.record("train", numbers(100 * epoch + batch), samples=5 - batch)
            blending.record("validation", numbers(100 * epoch + 50), samples=11)
            blending.update()


def reloaded(state: dict) -> dict:
    """Through a file, as with the loader's default of trusting nothing but plain data."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal(one: GradientBlending, other: GradientBlending) -> None:
    assert torch.equal(one.weights, other.weights)
    assert len(one.history) == len(other.history)
    for a, b in zip(one.history, other.history, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resumes_bit_for_bit(stop: int) -> None:
    whole = GradientBlending(HEADS)
    advance(whole, range(5))

    first = GradientBlending(HEADS)
    advance(first, range(stop))
    # In the middle of a measurement, after the first of the batches.
    first.record("train", numbers(100 * stop), samples=5)
    second = GradientBlending(HEADS)
    second.load_state_dict(reloaded(first.state_dict()))
    for batch in (1, 2):
        second.record("train", numbers(100 * stop + batch), samples=5 - batch)
    second.record("validation", numbers(100 * stop + 50), samples=11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        second.update()
    advance(second, range(stop + 1, 5))
    assert_equal(second, whole)
    assert len(set(map(tuple, (each.weights.tolist() for each in whole.history)))) > 2


def test_loading_drops_what_was_there() -> None:
    blending = GradientBlending(HEADS)
    fresh = blending.state_dict()
    advance(blending, range(3))
    blending.record("train", [9.0, 9.0, 9.0], samples=9)
    blending.load_state_dict(fresh)
    advance(blending, range(3, 5))
    other = GradientBlending(HEADS)
    advance(other, range(3, 5))
    assert_equal(blending, other)


def test_resumes_from_a_distributed_checkpoint(tmp_path: Path) -> None:
    saved, loaded = GradientBlending(HEADS), GradientBlending(HEADS)
    advance(saved, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it runs without a process group
        save({"blending": saved}, checkpoint_id=str(tmp_path))
        load({"blending": loaded}, checkpoint_id=str(tmp_path))
    assert_equal(loaded, saved)


def test_state_of_other_heads_is_refused() -> None:
    blending = GradientBlending(["audio", "fused"])
    with pytest.raises(
        ValueError, match=r"names must be \['audio', 'fused'\] \(got \['audio', 'im"
    ):
        blending.load_state_dict(GradientBlending(HEADS).state_dict())


# --- the plot ------------------------------------------------------------------------------------


def test_plot_draws_every_head(tmp_path: Path) -> None:
    blending = GradientBlending(HEADS)
    advance(blending, range(4))
    figure = blending.plot()
    ratio, weight = figure.axes
    assert [line.get_label() for line in weight.get_lines()] == list(HEADS)
    for k, (left, right) in enumerate(zip(ratio.get_lines(), weight.get_lines(), strict=True)):
        weights, ratios = np.asarray(right.get_ydata()), np.asarray(left.get_ydata())
        assert weights.tolist() == [each.weights[k] for each in blending.history]
        assert ratios.tolist()[1:] == [each.ratio[k] for each in blending.history[1:]]
    figure.savefig(tmp_path / "blending.png")
    assert (tmp_path / "blending.png").stat().st_size > 1000


# ---- prediction


def test_predicts_with_the_weights() -> None:
    torch.manual_seed(0)
    logits = {name: 2 * torch.randn(6, 4) for name in ("audio", "image", "fused")}
    blending = GradientBlending(list(logits), weights=[0.6, 0.4, 0.0])
    expected = 0.6 * logits["audio"].softmax(1).log() + 0.4 * logits["image"].softmax(1).log()
    torch.testing.assert_close(blending.predict(logits), expected.log_softmax(1))
    assert torch.equal(
        blending.predict(logits | {"fused": None}), blending.predict(logits)
    )  # of weight 0
    half = {name: each.half() for name, each in logits.items()}
    assert blending.predict(half).dtype == torch.float32


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ({"audio": torch.zeros(2, 3)}, r"logits must be given for \['audio', 'fused'\] \(got"),
        ({"audio": None, "fused": None}, r"logits must hold at least one tensor"),
        ({"audio": torch.zeros(2, 3), "fused": torch.zeros(2, 4)}, r"logits must have one shape"),
    ],
)
def test_prediction_of_other_logits(logits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"GradientBlending.predict: {message}"):
        GradientBlending(["audio", "fused"]).predict(logits)
