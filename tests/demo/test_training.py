from __future__ import annotations

from functools import cache
from statistics import mean

import pytest
import torch

from mmbal_fast.demo import _digits, _recorder
from mmbal_fast.demo._learner import Plain, Row, Settings, Setup
from mmbal_fast.demo._recorder import Recorder
from mmbal_fast.demo._rows import ROWS
from mmbal_fast.demo._training import Trial, run, run_all

PER_EPOCH = 19  # batches of 64 in 1200 samples


@cache
def train(row: str, *, seed: int = 0, epochs: int = 1, alpha: float = 1.0) -> Trial:
    return run(row, seed, Settings(epochs=epochs, alpha=alpha), lambda: None)


def test_rows_of_the_table():
    assert list(ROWS)[:5] == ["gray", "color", "joint", "ogm", "ogm-ge"]
    assert all(row.key == key for key, row in ROWS.items())


def test_curves_have_a_point_per_step_or_epoch():
    trial = train("ogm-ge", epochs=2)
    points = {name: len(curve) for name, curve in trial.curves.items()}
    assert points == {
        "accuracy/model": 2,
        "accuracy/gray": 2,
        "accuracy/color": 2,
        "ratio/gray": 2 * PER_EPOCH,
        "ratio/color": 2 * PER_EPOCH,
        "coefficient/gray": 2 * PER_EPOCH,
        "coefficient/color": 2 * PER_EPOCH,
    }
    assert trial.accuracy == trial.curves["accuracy/model"][-1]
    assert 0 < trial.added_seconds < trial.step_seconds


def test_curves_keep_what_the_balancers_buffers_held():
    curves = train("ogm").curves
    ratios, coefficients = curves["ratio/color"], curves["coefficient/color"]
    assert len(set(ratios)) > PER_EPOCH // 2
    for ratio, coefficient in zip(ratios, coefficients, strict=True):
        expected = 1 - torch.tensor(ratio).tanh().item() if ratio > 1 else 1.0
        assert coefficient == pytest.approx(expected, abs=1e-5)


def test_a_single_modality_learns_and_has_nothing_added():
    trial = train("gray", epochs=3)
    assert trial.accuracy > 80
    assert list(trial.curves) == ["accuracy/model"]
    assert trial.added_seconds == 0


def test_without_strength_modulation_is_joint_training():
    joint, ogm = train("joint", epochs=2), train("ogm", epochs=2, alpha=0.0)
    assert ogm.curves["accuracy/model"] == joint.curves["accuracy/model"]


def test_modulation_brings_the_modalities_together():
    joint, ogm = (train(row, epochs=2).curves["ratio/color"] for row in ("joint", "ogm-ge"))
    assert mean(joint[-PER_EPOCH:]) > 1.5
    assert mean(ogm[-PER_EPOCH:]) < 1.3


def test_noise_is_what_tells_ogm_ge_from_ogm():
    assert train("ogm").curves["ratio/color"][0] == train("ogm-ge").curves["ratio/color"][0]
    assert train("ogm").curves["ratio/color"][1:] != train("ogm-ge").curves["ratio/color"][1:]


def test_the_seed_decides_everything_and_the_callers_state_stays():
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    settings = Settings(epochs=1)
    first = run("ogm-ge", 0, settings, lambda: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    torch.rand(3)
    assert run("ogm-ge", 0, settings, lambda: None).curves == first.curves
    assert train("ogm-ge", seed=1).curves != first.curves


def test_a_row_that_validates_holds_out_training_samples(monkeypatch):
    setups: list[Setup] = []
    seen: list[int] = []

    class Watched(Plain):
        def __init__(self, setup):
            setups.append(setup)
            super().__init__(setup)

        def step(self, batch):
            seen.append(len(batch))
            super().step(batch)

        def end_epoch(self):
            self.recorder.measures["epochs"] = self.recorder.measures.get("epochs", 0) + 1

    monkeypatch.setitem(ROWS, "watched", Row("watched", "watched", Watched, held_out=200))
    trial = run("watched", 4, Settings(epochs=2), lambda: None)
    whole, _ = _digits.load(4)
    (setup,) = setups
    assert torch.equal(setup.train.color, whole.color[:1000])
    assert torch.equal(setup.validation.color, whole.color[1000:])
    assert sum(seen) == 2 * 1000
    assert trial.measures == {"epochs": 2}


def test_evaluation_leaves_batch_norm_alone(monkeypatch):
    modes: list[bool] = []

    class Watched(Plain):
        def step(self, batch):
            modes.append(self.model.training)

        def predict(self, samples):
            modes.append(self.model.training)
            return super().predict(samples)

    monkeypatch.setitem(ROWS, "watched", Row("watched", "watched", Watched))
    run("watched", 0, Settings(epochs=2), lambda: None)
    assert modes == 2 * ([True] * PER_EPOCH + [False])


def test_another_process_gives_what_this_one_gives():
    trials, progress = {}, {}
    for jobs in (1, 2):
        done: list[int] = []
        settings = Settings(epochs=2)
        trials[jobs] = run_all(["ogm-ge"], 1, settings, jobs=jobs, progress=done.append)
        progress[jobs] = done
    assert trials[1][0].curves == trials[2][0].curves
    assert progress[1] == [1, 2]
    assert progress[2][-1] == 2


def test_trials_come_by_row_and_seed():
    trials = run_all(["color", "gray"], 2, Settings(epochs=1), jobs=1, progress=lambda done: None)
    assert [(trial.row, trial.seed) for trial in trials] == [
        ("color", 0),
        ("color", 1),
        ("gray", 0),
        ("gray", 1),
    ]


def test_recorder_takes_medians_of_whole_steps_and_of_what_was_added(monkeypatch):
    # In a step of 10, 1 and 2 are added; then 5 with nothing added; then 20 with 4.
    ticks = iter([0, 1, 2, 3, 5, 10, 10, 15, 15, 20, 24, 35])
    monkeypatch.setattr(_recorder, "thread_time", lambda: next(ticks))
    recorder = Recorder()
    for additions in (2, 0, 1):
        with recorder.step():
            for _ in range(additions):
                with recorder.added():
                    pass
    assert recorder.step_seconds() == 10
    assert recorder.added_seconds() == 3


def test_recorder_copies():
    recorder, buffer = Recorder(), torch.tensor([1.0, 2.0])
    for _ in range(2):
        recorder.log("x", buffer, ["a", "b"])
        buffer += 1
    assert recorder.curves() == {"x/a": [1.0, 2.0], "x/b": [2.0, 3.0]}
