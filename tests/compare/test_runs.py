from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbal_fast import compare
from mmbal_fast.compare import _runs
from mmbal_fast.compare._corruptions import CORRUPTIONS, Scale, scales
from mmbal_fast.compare._report import lines
from mmbal_fast.compare._rows import ROWS
from mmbal_fast.compare._runs import run_all
from mmbal_fast.compare._trial import Run, train

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "compare_task.py")


def spec(**changes: Any) -> Run:
    return dataclasses.replace(Run(EXAMPLE, "sgd", "unimodal", 0.1, 0, 1), **changes)


def results(runs, directory, *, jobs=1, corrupted=False):
    return run_all(runs, directory, jobs=jobs, corrupted=corrupted, progress=lambda done: None)


def without_times(found):
    return [{key: each[key] for key in each if key != "step_ms"} for each in found.values()]


def test_other_processes_give_what_this_one_gives(tmp_path):
    runs = {spec(seed=seed): ["fused", "mean"] for seed in (1, 0)}
    one = results(runs, tmp_path / "one")
    two = results(runs, tmp_path / "two", jobs=2)
    assert list(one) == list(two) == list(runs)
    assert without_times(one) == without_times(two)


def test_the_callers_generator_and_threads_stay(tmp_path):
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    train(spec(), tmp_path / "run.pt")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    first = results({spec(): ["fused"]}, tmp_path)
    monkeypatch.setattr(_runs, "train", lambda *_: pytest.fail("trained again"))
    both = results({spec(): ["fused", "mean"]}, tmp_path)  # predicts from the weights kept
    assert both[spec()]["ways"]["fused"] == first[spec()]["ways"]["fused"]
    monkeypatch.setattr(_runs, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    assert results({spec(): ["mean", "fused"]}, tmp_path) == both
    with pytest.raises(pytest.fail.Exception, match="evaluated again"):
        results({spec(): ["fused"]}, tmp_path, corrupted=True)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        results({spec(epochs=2): ["fused"]}, tmp_path)


def test_only_what_the_tables_show_is_corrupted(tmp_path):
    rows = [ROWS["alone"], ROWS["joint"]]
    where = {"directory": tmp_path, "files": tmp_path}
    found = compare.run({EXAMPLE: rows}, ["sgd"], 1, **where, jobs=1, epochs=1)
    joint = {run: each for run, each in found.items() if run.training == "joint"}
    assert len(found) == 2 * len(joint) == 4
    (corrupted,) = (run for run, each in found.items() if "told" in each)
    assert corrupted == _runs.best(joint.items(), "fused")[0]
    (line,) = (each for each in lines(found, rows) if each.row == "joint")
    assert line.told


def test_another_text_of_the_module_is_another_run(tmp_path):
    path = tmp_path / "compare_task.py"
    path.write_text(Path(EXAMPLE).read_text())
    run = Run(str(path), "sgd", "joint", 0.1, 0, 1)
    name = run.name
    path.write_text(path.read_text() + "# changed\n")
    assert run.name != name


def test_corruptions_lower_what_they_hit(tmp_path):
    (found,) = results({spec(epochs=5): ["product"]}, tmp_path, corrupted=True).values()
    way = found["ways"]["product"]
    assert set(way["corrupted"]) == set(CORRUPTIONS)
    for each in way["corrupted"].values():
        assert set(each) == {"vibration", "sound"}
    assert way["corrupted"]["noise"]["sound"] < way["test"] - 10
    assert found["told"]["vibration"] == found["own"]["sound"]


def test_corruptions_do_what_they_say():
    x = torch.arange(24.0).reshape(4, 6)
    generator = torch.Generator().manual_seed(0)
    scale = Scale(mean=10.0, deviation=2.0)
    out = {name: corrupt(x, scale, generator) for name, corrupt in CORRUPTIONS.items()}
    assert torch.equal(out["missing"], torch.zeros_like(x))
    assert torch.equal(out["stuck"], torch.full_like(x, 12.0))
    assert torch.equal(out["gain"], 2 * x)
    assert sorted(out["other"].tolist()) == x.tolist()
    many = torch.zeros(10000, 1)
    noise = CORRUPTIONS["noise"](many, scale, generator)
    assert noise.std().item() == pytest.approx(6.0, rel=0.05)


def test_scales_are_of_all_batches():
    x = torch.randn(50, 4) * 3 + 7
    label = torch.zeros(50, dtype=torch.long)
    (scale,) = scales([({"a": x[:20]}, label[:20]), ({"a": x[20:]}, label[20:])]).values()
    assert scale.mean == pytest.approx(x.mean().item(), abs=1e-4)
    assert scale.deviation == pytest.approx(x.std(correction=0).item(), rel=1e-4)
