from __future__ import annotations

import pytest
import torch
from torch import nn

from mmbal_fast.demo import _digits
from mmbal_fast.demo._models import CHANNELS, FEATURES, LateFusion
from mmbal_fast.nn import unimodal_logits


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # on busy cores, threads for so little take seconds


@pytest.mark.parametrize("modalities", [("gray",), ("color",), ("gray", "color")])
def test_shapes(modalities):
    batch = _digits.load(0)[0][:5]
    model = LateFusion(modalities)
    features = model.features(batch)
    assert tuple(features) == modalities
    assert all(each.shape == (5, FEATURES) for each in features.values())
    assert model.fuse(features).shape == (5, 10)


def test_each_encoder_has_three_convolutions_and_sees_its_own_modality():
    batch = _digits.load(0)[0][:5]
    model = LateFusion().eval()
    for name, encoder in model.encoders.items():
        convolutions = [each for each in encoder.modules() if isinstance(each, nn.Conv2d)]
        assert len(convolutions) == 3
        assert convolutions[0].in_channels == CHANNELS[name]
        expected = encoder(getattr(batch, name))
        torch.testing.assert_close(model.features(batch)[name], expected)


def test_shares_of_the_modalities_add_up_to_the_prediction():
    batch = _digits.load(0)[0][:5]
    model = LateFusion()
    features = model.features(batch)
    shares = unimodal_logits(features, model.head)
    torch.testing.assert_close(sum(shares.values()), model.fuse(features))
