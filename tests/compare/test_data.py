from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from sklearn.datasets import load_digits

from mmbal_fast._task import Loaders, check_loader, check_model, encode
from mmbal_fast.compare import _data, colored_digits
from mmbal_fast.compare._data import DATA, PALETTE, Batches, ColoredDigits
from mmbal_fast.compare._files import MissingDataError
from tests.compare import files

SIZES = {"views": (60, 200, 140), "omics": (385, 115, 20)}  # 384, rounded by class


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    files.write_views(path)
    files.write_watch(path)
    files.write_omics(path)
    return path


def parts_of(loaders: Loaders) -> list[Batches]:
    assert all(isinstance(part, Batches) for part in loaders)
    return cast("list[Batches]", list(loaders))


@pytest.mark.parametrize("name", DATA)
def test_model_and_data_fit_together(name, directory):
    task = DATA[name](directory)
    model, loaders = task.model(), task.loaders(0)
    check_model("test", model)
    for part in loaders:
        check_loader("test", name, part, model.encoders)
    inputs, target = next(iter(loaders.train))
    logits = model.fuse(encode(model, inputs))
    assert logits.shape[0] == len(target)
    assert logits.shape[1] > max(part.target.max() for part in parts_of(loaders))
    assert list(model.encoders) == list(inputs)


@pytest.mark.parametrize("name", DATA)
def test_the_seed_decides_on_split_and_order(name, directory):
    task = DATA[name](directory)
    batches = [list(task.loaders(seed).train) for seed in (0, 0, 1)]
    assert torch.equal(batches[0][0][1], batches[1][0][1])
    assert not torch.equal(batches[0][0][1], batches[2][0][1])


@pytest.mark.parametrize("name", SIZES)
def test_no_sample_is_in_two_parts(name, directory):
    parts = parts_of(DATA[name](directory).loaders(0))
    rows = torch.cat([next(iter(part.inputs.values())) for part in parts])
    assert tuple(len(part.target) for part in parts) == SIZES[name]
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.parametrize("name", ["views", "watch", "omics"])
def test_training_columns_have_mean_0_and_deviation_1(name, directory):
    train, *_ = parts_of(DATA[name](directory).loaders(0))
    for x in train.inputs.values():
        columns = x.flatten(0, -2)
        varies = columns.std(dim=0) > 0
        torch.testing.assert_close(columns.mean(dim=0)[varies].abs().max(), torch.tensor(0.0))
        torch.testing.assert_close(columns.std(dim=0)[varies], torch.ones(int(varies.sum())))
        assert x.isfinite().all()


def test_views_train_on_as_many_of_each_digit(directory):
    train, *_ = parts_of(DATA["views"](directory).loaders(3))
    assert train.target.bincount().tolist() == [6] * 10


def test_nobody_wears_the_watch_in_two_parts(directory):
    inputs, label, _ = _data._watch(directory)
    assert inputs["accelerometer"].shape == (len(label), 100, 3)
    parts = parts_of(DATA["watch"](directory).loaders(0))
    assert sum(len(part.target) for part in parts) == len(label)
    people = [part.inputs["accelerometer"][:, 0, 0].unique().tolist() for part in parts]
    assert [len(each) for each in people] == [5, 2, 3]
    assert len(set().union(*people)) == 10


def test_omics_tables_are_joined_by_patient(directory):
    inputs, label = _data._omics(directory)
    means = torch.stack([inputs["mirna"][label == each].mean(dim=0) for each in range(5)])
    within = torch.cat([inputs["mirna"][label == each] - means[each] for each in range(5)])
    assert within.std() < 1.2  # it is 1 in the right order, 1.4 in another
    assert len(label) == 520


@pytest.mark.parametrize("name", ["views", "watch", "omics"])
def test_real_files_if_present(name):
    task = DATA[name](Path("files"))
    try:
        *_, test = parts_of(task.loaders(0))
    except MissingDataError:
        pytest.skip("the package is not installed")
    assert len(test.target) > 200


def test_batches_hold_every_sample_once_and_shuffle_anew():
    batches = Batches({"x": torch.arange(10)}, torch.arange(10), 4, torch.Generator())
    first, second = (torch.cat([target for _, target in batches]) for _ in range(2))
    assert [len(target) for _, target in batches] == [4, 4, 2]
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert not torch.equal(first, second)


# ---- Colored digits ------------------------------------------------------------------------------


def test_images_are_scikit_learns_digits_in_another_order():
    inputs, label = colored_digits(torch.Generator().manual_seed(0))
    digits = load_digits()
    images = torch.tensor(digits.images / 16.0, dtype=torch.float32)
    order = [tuple(each.flatten().tolist()) for each in images]
    places = {image: index for index, image in enumerate(order)}
    for index in (0, 700, 1796):
        place = places[tuple(inputs["gray"][index].flatten().tolist())]
        assert digits.target[place] == label[index]


def tints(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    strongest = inputs["color"].flatten(2).amax(dim=2)
    hue = strongest / strongest.amax(dim=1, keepdim=True)
    return torch.cdist(hue, PALETTE).argmin(dim=1)


@pytest.mark.parametrize("flat", [False, True])
def test_colour_gives_the_label_away_in_training_and_not_in_the_test(flat):
    inputs, label = colored_digits(torch.Generator().manual_seed(0), flat=flat)
    agrees = (tints(inputs) == label).float()
    assert 0.93 < agrees[:1200].mean() < 0.97
    assert agrees[1200:].mean() < 0.15
    varies = inputs["color"].flatten(2).amax(dim=1).std(dim=1) > 0
    assert varies.all() != flat


def test_seeds_of_the_digits_differ_in_split():
    first, second = (parts_of(ColoredDigits().loaders(seed)) for seed in (0, 1))
    assert [len(part.target) for part in first] == [1000, 200, 597]
    assert not torch.equal(first[2].target, second[2].target)
