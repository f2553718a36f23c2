from __future__ import annotations

import pytest
import torch
from torch import nn

from mmbal_fast import OGMGE, GradientBlending
from mmbal_fast.nn import MultiHeadLateFusion
from tests.defaults import default


def build(**options) -> MultiHeadLateFusion:
    torch.manual_seed(0)
    encoders = {"image": nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), "audio": nn.Linear(4, 3)}
    return MultiHeadLateFusion(encoders, {"audio": 3, "image": 5}, num_classes=7, **options)


INPUTS = {"audio": torch.randn(2, 4), "image": torch.randn(2, 3, 4)}


def test_heads_by_hand() -> None:
    model = build()
    logits = model(INPUTS)
    assert list(logits) == list(model.head_names) == ["image", "audio", "fused"]
    image = model.encoders["image"](INPUTS["image"])
    audio = model.encoders["audio"](INPUTS["audio"])
    assert torch.equal(logits["image"], model.heads["image"](image))
    assert torch.equal(logits["audio"], model.heads["audio"](audio))
    assert torch.equal(logits["fused"], model.heads["fused"](torch.cat([image, audio], dim=1)))


def test_own_fused_head_under_another_name() -> None:
    head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7))
    model = build(fused="both", fused_head=head)
    assert model.head_names == ("image", "audio", "both")
    assert model.heads["both"] is head
    assert model(INPUTS)["both"].shape == (2, 7)


def test_an_empty_sequence_is_a_head() -> None:
    model = build(fused_head=nn.Sequential())
    assert model(INPUTS)["fused"].shape == (2, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_defaults_of_torch_do_not_matter(dtype: torch.dtype, device: str) -> None:
    encoders = {"image": nn.Linear(4, 5), "audio": nn.Linear(4, 3)}
    with default(dtype), default(device):
        model = MultiHeadLateFusion(
            encoders, {"audio": 3, "image": 5}, 7, device="cpu", dtype=torch.float32
        )
        logits = model({name: torch.ones(2, 4, device="cpu").float() for name in encoders})
    assert all((each.dtype, each.device.type) == (torch.float32, "cpu") for each in logits.values())


def test_made_on_meta_and_loaded() -> None:
    trained = build()
    with torch.device("meta"):
        model = build().to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    for name, each in trained(INPUTS).items():
        assert torch.equal(model(INPUTS)[name], each)


def test_all_parameters_learn_from_the_blended_loss() -> None:
    model = build()
    blending = GradientBlending(model.head_names)
    blending.loss(model(INPUTS), torch.tensor([0, 6])).backward()
    for name, each in model.named_parameters():
        assert each.grad is not None, name
        assert each.grad.any(), name


def test_encoders_fit_ogm_ge() -> None:
    assert OGMGE(build().encoders, alpha=0.1).names == ("image", "audio")


def test_order_of_the_inputs_does_not_matter() -> None:
    model = build()
    turned = dict(reversed(INPUTS.items()))
    assert torch.equal(model(turned)["fused"], model(INPUTS)["fused"])


def test_bad_arguments_are_refused() -> None:
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"at least 2 encoders \(got 1\)"):
        MultiHeadLateFusion({"a": a}, {"a": 3}, 7)
    with pytest.raises(
        ValueError, match=r"widths must be given for .*\['a', 'b'\] \(got \['a'\]\)"
    ):
        MultiHeadLateFusion({"a": a, "b": b}, {"a": 3}, 7)
    with pytest.raises(ValueError, match=r"called like the fused head \(got 'b'\)"):
        MultiHeadLateFusion({"a": a, "b": b}, {"a": 3, "b": 3}, 7, fused="b")
    with pytest.raises(ValueError, match=r"inputs must be given for .*\(got \['audio'\]\)"):
        build()({"audio": INPUTS["audio"]})
