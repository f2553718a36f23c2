"""What `diagnose` and ``compare --module`` refuse, and what they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmbal_fast import _task
from mmbal_fast.nn import MultiHeadLateFusion

BATCH = ({"audio": torch.zeros(4, 3), "image": torch.zeros(4, 2)}, torch.zeros(4).long())


class Fusing(nn.Module):
    def __init__(self, encoders: object) -> None:
        super().__init__()
        self.encoders = encoders

    def fuse(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(features.values())).sum(dim=0)


def two() -> dict[str, nn.Module]:
    return {"audio": nn.Linear(3, 2), "image": nn.Linear(2, 2)}


def model() -> MultiHeadLateFusion:
    return MultiHeadLateFusion(two(), {"audio": 2, "image": 2}, 5)


def test_a_model_with_many_heads_is_one() -> None:
    multi = model()
    _task.check_model("op", multi)
    features = _task.encode(multi, BATCH[0])
    assert list(features) == ["audio", "image"]
    assert torch.equal(multi.fuse(features), multi(BATCH[0])["fused"])
    swapped = dict(reversed(features.items()))
    assert torch.equal(multi.fuse(swapped), multi.fuse(features))


@pytest.mark.parametrize("encoders", [two(), nn.ModuleDict(two())])
def test_encoders_in_a_mapping_of_either_kind(encoders: object) -> None:
    _task.check_model("op", Fusing(encoders))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda x: x, TypeError, r"op: model must be an nn.Module \(got function\)"),
        (nn.Linear(2, 2), TypeError, r"op: model.encoders .*\(got none\)"),
        (Fusing([nn.Linear(2, 2)]), TypeError, r"op: model.encoders .*\(got list\)"),
        (Fusing({"a": 1, "b": 2}), TypeError, r"op: model.encoders .*\(got dict\)"),
        (Fusing({"a": nn.Flatten()}), ValueError, r"at least 2 \(got \['a'\]\)"),
    ],
)
def test_another_model(wrong: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _task.check_model("op", wrong)


def test_a_model_without_fusion() -> None:
    without = nn.Module()
    without.encoders = nn.ModuleDict(two())
    with pytest.raises(TypeError, match=r"op: model.fuse .*\(got NoneType\)"):
        _task.check_model("op", without)


def test_a_list_of_batches_is_a_loader() -> None:
    _task.check_loader("op", "train_loader", [BATCH], two())


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (iter([BATCH]), TypeError, r"op: loader .*anew each time.*\(got list_iterator\)"),
        ([], ValueError, r"op: loader .*at least one batch"),
        ([BATCH[0]], TypeError, r"inputs by modality, target\) \(got dict\)"),
        ([(*BATCH, 1)], TypeError, r"got \['dict', 'Tensor', 'int'\]"),
        ([({"audio": BATCH[0]["audio"]}, BATCH[1])], ValueError, r"none for \['image'\]"),
        ([(BATCH[0], torch.zeros(4, 5))], ValueError, r"int64 labels \[B\] \(got torch.float32"),
        ([(BATCH[0], torch.zeros(4).int())], ValueError, r"int64 labels \[B\] \(got torch.int32"),
        ([(BATCH[0], torch.zeros(3).long())], ValueError, r"as many inputs as labels .*and 3\)"),
    ],
)
def test_another_loader(wrong: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _task.check_loader("op", "loader", wrong, two())
