from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from mmbal_fast.demo import _digits
from mmbal_fast.demo._digits import Samples


@pytest.fixture(scope="module")
def sets() -> list[tuple[Samples, Samples]]:
    return [_digits.load(seed) for seed in range(5)]


def agreement(samples: Samples) -> float:
    return (samples.tint == samples.label).float().mean().item()


def test_shapes_and_types(sets):
    for samples, count in zip(sets[0], (1200, 597), strict=True):
        assert len(samples) == count
        assert samples.gray.shape == (count, 1, 8, 8)
        assert samples.color.shape == (count, 3, 8, 8)
        assert samples.gray.dtype == samples.color.dtype == torch.float32
        assert samples.label.dtype == torch.int64
        assert samples.gray.min() == 0
        assert samples.gray.max() == 1


def test_every_image_is_in_one_of_the_sets_with_its_label(sets):
    digits = load_digits()
    expected = sorted(map(tuple, zip(digits.data.tolist(), digits.target, strict=True)))
    for train, test in sets:
        images = [*train.gray, *test.gray]
        labels = [*train.label.tolist(), *test.label.tolist()]
        found = [
            ((16 * image).flatten().tolist(), y) for image, y in zip(images, labels, strict=True)
        ]
        assert sorted(found) == expected


def test_color_is_the_gray_image_in_its_tint(sets):
    for samples in sets[0]:
        for index in (0, 17, 596):
            rgb = _digits.PALETTE[samples.tint[index]]
            expected = samples.gray[index] * rgb[:, None, None]
            assert torch.equal(samples.color[index], expected)


def test_palette_has_ten_colors_well_apart():
    distance = torch.cdist(_digits.PALETTE, _digits.PALETTE) + 9 * torch.eye(10)
    assert distance.min() > 0.3


def test_color_agrees_with_the_label_in_training_only(sets):
    # Standard deviations of these means over 5 seeds: 0.003 and 0.0055.
    assert sum(agreement(train) for train, _ in sets) / 5 == pytest.approx(0.95, abs=0.01)
    assert sum(agreement(test) for _, test in sets) / 5 == pytest.approx(0.10, abs=0.02)


def test_a_color_that_disagrees_is_any_of_the_other_nine(sets):
    offsets = torch.cat([(train.tint - train.label) % 10 for train, _ in sets])
    counts = torch.bincount(offsets, minlength=10)[1:]
    assert counts.sum() > 200
    assert counts.min() > counts.sum() / 9 / 2


def test_color_tells_nothing_about_the_label_in_the_test_set(sets):
    table = torch.zeros(10, 10)
    for _, test in sets:
        table.index_put_((test.label, test.tint), torch.ones(len(test)), accumulate=True)
    expected = table.sum(1, keepdim=True) * table.sum(0, keepdim=True) / table.sum()
    chi_squared = ((table - expected).square() / expected).sum()
    assert chi_squared < 127  # 0.999 quantile at 81 degrees of freedom is 126.1


def test_the_seed_decides(sets):
    again = _digits.load(3)
    for samples, same, other in zip(again, sets[3], sets[4], strict=True):
        assert torch.equal(samples.color, same.color)
        assert torch.equal(samples.label, same.label)
        assert not torch.equal(samples.label, other.label)


def test_loading_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    _digits.load(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_indexing_keeps_the_parts_together(sets):
    train, _ = sets[0]
    part = train[torch.tensor([5, 3])]
    assert len(part) == 2
    assert torch.equal(part.gray[1], train.gray[3])
    assert torch.equal(part.color[1], train.color[3])
    assert part.label[1] == train.label[3]
    assert part.tint[1] == train.tint[3]
