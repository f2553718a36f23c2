"""Shares of a linear head add up to the fused logits; masking leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmbal_fast.nn import masked_logits, unimodal_logits

WIDTHS = {"audio": 2, "image": 5, "text": 3}


@pytest.fixture
def features() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(4, width, requires_grad=True) for name, width in WIDTHS.items()}


def total(logits: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(logits.values())).sum(dim=0)


@pytest.mark.parametrize("bias", [True, False])
def test_concatenation_splits_the_head_by_columns(features: dict[str, Tensor], bias: bool) -> None:
    head = nn.Linear(10, 6, bias=bias)
    logits = unimodal_logits(features, head)

    assert list(logits) == list(WIDTHS)
    expected = features["image"] @ head.weight[:, 2:7].T
    if bias:
        expected = expected + head.bias / 3
    torch.testing.assert_close(logits["image"], expected)
    torch.testing.assert_close(total(logits), head(torch.cat(list(features.values()), dim=1)))


def test_concatenation_follows_the_order_of_the_mapping(features: dict[str, Tensor]) -> None:
    head = nn.Linear(10, 6)
    backwards = dict(reversed(features.items()))
    torch.testing.assert_close(
        total(unimodal_logits(backwards, head)), head(torch.cat(list(backwards.values()), dim=1))
    )


@pytest.mark.parametrize("container", [dict, nn.ModuleDict])
def test_sum_with_a_head_for_each_modality(
    features: dict[str, Tensor], container: type[dict[str, nn.Linear]]
) -> None:
    heads = container({name: nn.Linear(width, 6) for name, width in WIDTHS.items()})
    logits = unimodal_logits(features, heads, fusion="sum")

    assert list(logits) == list(WIDTHS)
    for name in WIDTHS:
        expected = features[name] @ heads[name].weight.T + heads[name].bias
        torch.testing.assert_close(logits[name], expected)


def test_sum_with_one_head() -> None:
    head = nn.Linear(4, 6)
    features = {"audio": torch.randn(2, 4), "image": torch.randn(2, 4)}
    logits = unimodal_logits(features, head, fusion="sum")
    torch.testing.assert_close(total(logits), head(features["audio"] + features["image"]))
    torch.testing.assert_close(logits["audio"], features["audio"] @ head.weight.T + head.bias / 2)


def test_more_dimensions_than_two() -> None:
    head = nn.Linear(3, 2)
    features = {"audio": torch.randn(4, 7, 1), "image": torch.randn(4, 7, 2)}
    fused = head(torch.cat(list(features.values()), dim=-1))
    torch.testing.assert_close(total(unimodal_logits(features, head)), fused)


def test_logits_carry_gradients(features: dict[str, Tensor]) -> None:
    head = nn.Linear(10, 6)
    torch.autograd.backward(unimodal_logits(features, head)["image"].sum())
    assert features["image"].grad is not None
    assert features["audio"].grad is None
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad[:, :2], torch.zeros(6, 2))
    assert head.weight.grad[:, 2:7].abs().min() > 0


def test_widths_that_do_not_add_up(features: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"in_features 9 \(got \[2, 5, 3\], sum 10\)"):
        unimodal_logits(features, nn.Linear(9, 6))


def test_sum_of_unequal_widths(features: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"width 5 \(got \[2, 5, 3\]\)"):
        unimodal_logits(features, nn.Linear(5, 6), fusion="sum")


def test_missing_head(features: dict[str, Tensor]) -> None:
    heads = {"audio": nn.Linear(2, 6), "text": nn.Linear(3, 6)}
    with pytest.raises(ValueError, match=r"every name \(got none for \['image'\]\)"):
        unimodal_logits(features, heads, fusion="sum")


def test_several_heads_with_concatenation(features: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"takes one nn\.Linear as head \(got dict\)"):
        unimodal_logits(features, {"audio": nn.Linear(2, 6)})


def test_unknown_fusion(features: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"'concat' or 'sum' \(got 'film'\)"):
        unimodal_logits(features, nn.Linear(10, 6), fusion="film")  # type: ignore[arg-type]


def test_no_features() -> None:
    with pytest.raises(ValueError, match=r"unimodal_logits: .* \(got none\)"):
        unimodal_logits({}, nn.Linear(10, 6))
    with pytest.raises(ValueError, match=r"masked_logits: .* \(got none\)"):
        masked_logits(lambda x: x["audio"], {})


def test_features_that_are_no_mapping(features: dict[str, Tensor]) -> None:
    head = nn.Linear(10, 6)
    for call in (
        lambda: unimodal_logits(head, features),  # type: ignore[arg-type]
        lambda: masked_logits(features, head),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"features must be a mapping .* \(got Linear\)"):
            call()


@pytest.mark.parametrize("heads", [False, True])
def test_features_made_under_autocast(features: dict[str, Tensor], heads: bool) -> None:
    narrow = {name: each.bfloat16() for name, each in features.items()}
    wide = {name: each.float() for name, each in narrow.items()}
    head: nn.Linear | nn.ModuleDict
    if heads:
        head = nn.ModuleDict({name: nn.Linear(w, 6) for name, w in WIDTHS.items()})
        logits = [unimodal_logits(each, head, fusion="sum") for each in (narrow, wide)]
    else:
        head = nn.Linear(sum(WIDTHS.values()), 6)
        logits = [unimodal_logits(each, head) for each in (narrow, wide)]
    assert all(torch.equal(logits[0][name], logits[1][name]) for name in WIDTHS)


class Gated(nn.Module):
    """A fusion with everything that depends on the mode; its gate is frozen in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.gate = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.train()
        self.gate.eval()

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        gate = torch.sigmoid(self.gate(x["image"]))
        logits: Tensor = self.head(self.dropout(self.norm(x["audio"] * gate)))
        return logits

    def fuse(self, x: dict[str, Tensor]) -> Tensor:
        return self.forward(x)


@pytest.fixture
def pair() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(8, 4, requires_grad=True) for name in ("audio", "image")}


@pytest.mark.parametrize("method", [False, True])
def test_masking_a_module_in_training(pair: dict[str, Tensor], method: bool) -> None:
    fusion = Gated()
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    generator = torch.get_rng_state()
    logits = masked_logits(fusion.fuse if method else fusion, pair)

    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in fusion.state_dict().items())
    modes = {name: each.training for name, each in fusion.named_modules()}
    assert modes == {"": True, "norm": True, "dropout": True, "gate": False, "head": True}

    fusion.eval()
    zeros = torch.zeros(8, 4)
    torch.testing.assert_close(logits["audio"], fusion({"audio": pair["audio"], "image": zeros}))
    torch.testing.assert_close(logits["image"], fusion({"audio": zeros, "image": pair["image"]}))
    assert not any(each.requires_grad for each in logits.values())


def test_masking_restores_the_modes_after_an_error(pair: dict[str, Tensor]) -> None:
    fusion = Gated()
    with pytest.raises(RuntimeError, match="size of tensor"):
        masked_logits(fusion, {**pair, "audio": torch.randn(8, 5)})
    assert fusion.dropout.training


def test_masking_any_callable_and_any_number_of_modalities(features: dict[str, Tensor]) -> None:
    seen = masked_logits(lambda x: torch.cat(list(x.values()), dim=1), features)
    assert list(seen) == list(WIDTHS)
    zeros = [torch.zeros(4, width) for width in WIDTHS.values()]
    for position, name in enumerate(WIDTHS):
        alone = [*zeros[:position], features[name].detach(), *zeros[position + 1 :]]
        assert torch.equal(seen[name], torch.cat(alone, dim=1))


def test_forward_that_returns_no_tensor(pair: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"must return a tensor \(got tuple\)"):
        masked_logits(lambda x: (x["audio"],), pair)  # type: ignore[arg-type, return-value]
