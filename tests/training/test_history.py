from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmbal_fast
from mmbal_fast import History, ModulationRecord
from mmbal_fast.training.history import running_mean

NAMES = ("audio", "image")


def record(
    value: float, skipped: bool = False, device: torch.device | str = "cpu", entries: int = 2
) -> ModulationRecord:
    """Scores (v, v + 1), ratios (v + 2, v + 3), coefficients (v + 4, v + 5)."""
    numbers = torch.arange(3 * entries, device=device).reshape(3, entries) + value
    return ModulationRecord(
        numbers[0], numbers[1], numbers[2], torch.tensor(skipped, device=device)
    )


class Board:
    """Has the method of TensorBoard's writer."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.rows.append((tag, scalar_value, global_step))


class Run:
    """Has the method of a Weights & Biases run."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, values: dict[str, float], *, step: int) -> None:
        self.rows.append((step, values))


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_keeps_every_step_whatever_the_size_of_the_buffer(every: int) -> None:
    history = History(NAMES, every=every)
    for step in range(7):
        history.record(record(10.0 * step))
        if step == 3:
            assert len(history) == 4  # reading in between loses nothing
    assert history.to_dict() == {
        "step": [0, 1, 2, 3, 4, 5, 6],
        "scores/audio": [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0],
        "scores/image": [1.0, 11.0, 21.0, 31.0, 41.0, 51.0, 61.0],
        "ratios/audio": [2.0, 12.0, 22.0, 32.0, 42.0, 52.0, 62.0],
        "ratios/image": [3.0, 13.0, 23.0, 33.0, 43.0, 53.0, 63.0],
        "coefficients/audio": [4.0, 14.0, 24.0, 34.0, 44.0, 54.0, 64.0],
        "coefficients/image": [5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0],
    }


def test_copies_what_the_next_step_of_the_balancer_overwrites() -> None:
    encoders = nn.ModuleDict({n: nn.Linear(2, 3) for n in NAMES})
    for parameter in encoders.parameters():
        parameter.grad = torch.ones_like(parameter)
    balancer = mmbal_fast.OGMGE(encoders, alpha=0.5)
    history = History(balancer.names)
    logits = {"audio": torch.randn(4, 3), "image": torch.randn(4, 3)}
    expected = []
    for scale in (1.0, 2.0):
        scaled = {name: each * scale for name, each in logits.items()}
        history.record(balancer.step(scaled, torch.tensor([0, 1, 2, 0])))
        assert balancer.last is not None
        expected.append(balancer.last.clone())
    table = history.to_dict()
    for quantity in ("scores", "ratios", "coefficients"):
        rows = torch.stack([getattr(each, quantity) for each in expected])
        for index, name in enumerate(NAMES):
            assert table[f"{quantity}/{name}"] == rows[:, index].tolist()
    assert table["scores/audio"][0] != table["scores/audio"][1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_leaves_out_steps_without_finite_scores(bad: float) -> None:
    history = History(NAMES, every=2)
    broken = record(5.0)
    broken.scores[1] = bad
    for each in (record(0.0), broken, record(1.0)):
        history.record(each)
    table = history.to_dict()
    assert table["step"] == [0, 2]
    assert table["scores/audio"] == [0.0, 1.0]


def test_leaves_out_steps_that_the_grad_scaler_skips() -> None:
    history = History(NAMES)
    for step in range(4):
        history.record(record(1.0, skipped=step == 2))
    assert history.to_dict()["step"] == [0, 1, 3]


def test_keeps_undefined_ratios_of_finite_scores() -> None:
    # All labels ignored: scores 0, ratios 0/0, coefficients 1.
    history = History(NAMES)
    zeros, undefined = torch.zeros(2), torch.full((2,), torch.nan)
    history.record(ModulationRecord(zeros, undefined, torch.ones(2), torch.tensor(False)))
    table = history.to_dict()
    assert table["coefficients/image"] == [1.0]
    assert math.isnan(table["ratios/image"][0])


def test_takes_the_callers_step_numbers_and_goes_on_from_them() -> None:
    history = History(NAMES)
    history.record(record(0.0), step=500)
    history.record(record(0.0))
    history.record(record(0.0), step=600)
    assert history.to_dict()["step"] == [500, 501, 600]


def test_writes_to_add_scalar_every_n_steps_and_the_rest_when_flushed() -> None:
    board = Board()
    history = History(NAMES, every=2, writer=board)
    history.record(record(0.0), step=7)
    assert board.rows == []
    history.record(record(10.0), step=8)
    assert [row[2] for row in board.rows] == [7] * 6 + [8] * 6
    assert board.rows[:2] == [
        ("balance/scores/audio", 0.0, 7),
        ("balance/scores/image", 1.0, 7),
    ]
    assert board.rows[-1] == ("balance/coefficients/image", 15.0, 8)
    history.record(record(0.0))
    history.flush()
    history.flush()  # nothing twice
    assert len(board.rows) == 18


def test_writes_to_log() -> None:
    run = Run()
    history = History(NAMES, every=1, writer=run)
    history.record(record(0.0), step=3)
    ((step, values),) = run.rows
    assert step == 3
    assert values["balance/ratios/image"] == 3.0
    assert len(values) == 6


def test_writes_what_tensorboard_reads(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        history = History(NAMES, every=2, writer=writer)
        for step in range(3):
            history.record(record(float(step)))
        history.flush()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(events.Tags()["scalars"]) == 6
    ratios = events.Scalars("balance/ratios/audio")
    assert [(each.step, each.value) for each in ratios] == [(0, 2.0), (1, 3.0), (2, 4.0)]


class ReadsOfTheHost(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        copies = "_to_copy" in name or ("copy_" in name and args[0].device != args[1].device)
        self.count += "_local_scalar_dense" in name or "nonzero" in name or copies
        return func(*args, **(kwargs or {}))


def test_records_without_reading_the_device() -> None:
    history = History(NAMES, every=4)
    records = [record(float(step)) for step in range(4)]
    history.record(records[0])
    with ReadsOfTheHost() as reads:
        for each in records[1:3]:
            history.record(each)
    assert reads.count == 0
    with ReadsOfTheHost() as reads:
        history.record(records[3])
    assert reads.count > 0  # the fourth step copies, so the count counts


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_copies_from_cuda_in_the_background() -> None:
    history = History(NAMES, every=3)
    history.record(record(9.0))  # before the model moved
    records = [record(float(step), skipped=step == 4, device="cuda") for step in range(9)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for each in records:
            history.record(each)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert history.to_dict()["scores/audio"] == [9.0, 0.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 8.0]


@pytest.mark.parametrize("modalities", [2, 9])
def test_plots_also_what_is_not_finite(tmp_path: Path, modalities: int) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    history = History([f"m{index}" for index in range(modalities)])
    for step in range(120):
        each = record(1.0 + step % 7, entries=modalities)
        if step == 50:
            each.ratios.fill_(torch.nan)
        if step == 60:
            each.ratios[0] = torch.inf
        history.record(each)
    path = tmp_path / "history.png"
    history.plot(path)
    from matplotlib.image import imread

    picture = imread(path)
    assert picture.shape[1] == 1200
    assert len(set(map(tuple, picture[:, :, :3].reshape(-1, 3)[::7].round(2)))) > 20  # lines
    history.plot(tmp_path / "history.svg", window=1)
    assert (tmp_path / "history.svg").stat().st_size > 1000


def test_plot_draws_every_step_and_the_running_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed").Figure
    drawn: list[Any] = []
    monkeypatch.setattr(figure, "savefig", lambda self, path: drawn.append(self))
    history = History(NAMES)
    for step in range(10):
        history.record(record(1.0 + step % 3), step=5 * step)
    history.plot(tmp_path / "history.png", window=4)
    table = history.to_dict()
    panels = drawn[0].axes
    assert len(panels) == 3
    for axes, quantity in zip(panels, ("scores", "ratios", "coefficients"), strict=True):
        lines = [line for line in axes.lines if len(line.get_xdata()) == 10]
        for index, name in enumerate(NAMES):
            faint, bold = lines[2 * index : 2 * index + 2]
            values = table[f"{quantity}/{name}"]
            assert bold.get_label() == name
            assert list(faint.get_xdata()) == list(bold.get_xdata()) == table["step"]
            assert list(faint.get_ydata()) == values
            assert list(bold.get_ydata()) == running_mean(torch.tensor(values), 4).tolist()


def test_running_mean_takes_the_last_finite_values() -> None:
    values = torch.tensor([1.0, 3.0, torch.nan, 5.0, torch.inf, torch.nan, torch.nan])
    expected = torch.tensor([1.0, 2.0, 2.0, 4.0, 5.0, 5.0, torch.nan])
    torch.testing.assert_close(running_mean(values, 3), expected, equal_nan=True)
    torch.testing.assert_close(running_mean(values[:2], 1), values[:2])


def test_refuses_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"History: names must .* \(got none\)"):
        History([])
    with pytest.raises(ValueError, match=r"every must be at least 1 \(got 0\)"):
        History(NAMES, every=0)
    with pytest.raises(TypeError, match=r"writer must have add_scalar or log \(got list\)"):
        History(NAMES, writer=[])  # type: ignore[arg-type]
    history = History(NAMES)
    with pytest.raises(ValueError, match=r"record must have tensors of 2 entries.*\(got Mod"):
        history.record(record(0.0, entries=3))
    with pytest.raises(ValueError, match=r"plot: needs a recorded step \(got none\)"):
        history.plot(tmp_path / "none.png")
    history.record(record(0.0))
    with pytest.raises(ValueError, match=r"window must be at least 1 \(got 0\)"):
        history.plot(tmp_path / "none.png", window=0)
    assert not (tmp_path / "none.png").exists()


def test_does_not_count_a_record_that_it_refused() -> None:
    history = History(NAMES)
    with pytest.raises(ValueError, match="tensors of 2 entries"):
        history.record(record(0.0, entries=3))
    history.record(record(0.0))
    assert history.to_dict()["step"] == [0]
