"""Shares of a linear head add up to the fused logits; masking leaves the model as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmbal_fast.nn import masked_logits, shapley_logits, unimodal_logits

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
    with pytest.raises(
        ValueError, match=r"see masked_logits.* in_features 9 \(got \[2, 5, 3\], sum 10\)"
    ):
        unimodal_logits(features, nn.Linear(9, 6))


def test_sum_of_unequal_widths(features: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"width 5 \(got \[2, 5, 3\]\)"):
        unimodal_logits(features, nn.Linear(5, 6), fusion="sum")


def test_missing_head(features: dict[str, Tensor]) -> None:
    heads = {"audio": nn.Linear(2, 6), "text": nn.Linear(3, 6)}
    with pytest.raises(ValueError, match=r"every name \(got none for \['image'\]\)"):
        unimodal_logits(features, heads, fusion="sum")


class Cosine(nn.Linear):
    """A linear layer by its class, not by what it computes."""

    def forward(self, input: Tensor) -> Tensor:
        normalized = nn.functional.normalize
        return nn.functional.linear(normalized(input, dim=-1), normalized(self.weight, dim=-1))


def patched() -> nn.Linear:
    head = nn.Linear(10, 6)
    head.forward = torch.tanh  # type: ignore[method-assign]
    return head


HERE = re.escape(__name__)
NOT_LINEAR = {
    "a cosine head": (lambda: Cosine(10, 6), f"{HERE}.Cosine"),
    "a forward of the instance": (patched, "torch.nn.modules.linear.Linear"),
    "a sequence": (
        lambda: nn.Sequential(nn.Linear(10, 6)),
        "torch.nn.modules.container.Sequential",
    ),
    "a fusion": (lambda: Gated(), f"{HERE}.Gated"),
    "a function": (lambda: torch.tanh, "builtin_function_or_method"),
}


@pytest.mark.parametrize("fusion", ["concat", "sum"])
@pytest.mark.parametrize(("make", "kind"), NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_heads_that_no_columns_split(
    features: dict[str, Tensor], make: Callable[[], Any], kind: str, fusion: Any
) -> None:
    with pytest.raises(
        TypeError, match=rf"one plain nn\.Linear .* see masked_logits \(got {kind}\)$"
    ):
        unimodal_logits(features, make(), fusion=fusion)


def test_a_linear_layer_by_another_class(features: dict[str, Tensor]) -> None:
    class Named(nn.Linear):
        pass

    head = nn.utils.parametrizations.weight_norm(Named(10, 6))
    fused = head(torch.cat(list(features.values()), dim=1))
    torch.testing.assert_close(total(unimodal_logits(features, head)), fused)


def test_several_heads_with_concatenation(features: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"takes one plain nn\.Linear .* \(got dict\)"):
        unimodal_logits(features, {"audio": nn.Linear(2, 6)})


def test_heads_of_any_kind_for_each_modality(features: dict[str, Tensor]) -> None:
    heads = nn.ModuleDict(
        {"audio": Cosine(2, 6), "image": nn.Sequential(nn.Linear(5, 6)), "text": nn.Linear(3, 6)}
    )
    narrow = {name: each.bfloat16() for name, each in features.items()}
    logits = unimodal_logits(narrow, heads, fusion="sum")
    for name, each in narrow.items():
        assert torch.equal(logits[name], heads[name](each.float()))


@pytest.mark.parametrize("fusion", ["concat", "sum"])
@pytest.mark.parametrize("several", [False, True])
def test_features_of_different_batches(fusion: Any, several: bool) -> None:
    features = {"audio": torch.randn(4, 5), "image": torch.randn(3, 5)}
    heads: Any = nn.ModuleDict({name: nn.Linear(5, 6) for name in features})
    head = heads if several and fusion == "sum" else nn.Linear(5 if fusion == "sum" else 10, 6)
    with pytest.raises(ValueError, match=r"all but the last .*\(got \[4, 5\], \[3, 5\]\)"):
        unimodal_logits(features, head, fusion=fusion)


def test_features_without_dimensions() -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., D\] \(got \[\] for 'b'\)"):
        unimodal_logits({"a": torch.randn(1), "b": torch.tensor(1.0)}, nn.Linear(2, 6))


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


def test_features_that_are_no_tensors() -> None:
    mixed: Any = {"audio": torch.randn(4, 2), "image": [[1.0, 2.0]]}
    for call in (
        lambda: unimodal_logits(mixed, nn.Linear(4, 6)),
        lambda: masked_logits(lambda x: x["audio"], mixed),
    ):
        with pytest.raises(TypeError, match=r"features must be tensors \(got list for 'image'\)"):
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


class TwoArguments(Gated):
    def forward(self, audio: Tensor, image: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward({"audio": audio, "image": image})


class OneTensor(Gated):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        logits: Tensor = self.head(x)
        return logits


class Shapely(Gated):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.reshape(x.shape[0], -1)


class ByNumber(Gated):
    def forward(self, x: list[Tensor]) -> Tensor:  # type: ignore[override]
        return x[0] * x[1]


class Several(Gated):
    def forward(self, x: list[Tensor]) -> Tensor:  # type: ignore[override]
        return torch.cat(list(x), dim=1)


@pytest.mark.parametrize("kind", [TwoArguments, OneTensor, Shapely, ByNumber, Several])
@pytest.mark.parametrize("method", [False, True])
@pytest.mark.parametrize("logits_of", [masked_logits, shapley_logits])
def test_masking_a_fusion_that_takes_no_dict(
    pair: dict[str, Tensor], kind: type[Gated], method: bool, logits_of: Callable[..., Any]
) -> None:
    fusion = kind()
    rule = r"forward must take one dict .*lambda x: fusion\(x\['audio'\], x\['image'\]\).*"
    with pytest.raises(TypeError, match=rf"{rule} \(got {HERE}\.{kind.__name__}.*: .+\)"):
        logits_of(fusion.forward if method else fusion, pair)
    assert fusion.training


def test_masking_leaves_errors_of_the_fusion_as_they_are(pair: dict[str, Tensor]) -> None:
    def broken(x: dict[str, Tensor]) -> Tensor:
        return x["audio"] + None  # type: ignore[operator]

    with pytest.raises(TypeError, match=r"^unsupported operand"):
        masked_logits(broken, pair)


def test_forward_that_returns_no_tensor(pair: dict[str, Tensor]) -> None:
    with pytest.raises(TypeError, match=r"must return a tensor \(got tuple\)"):
        masked_logits(lambda x: (x["audio"],), pair)  # type: ignore[arg-type, return-value]
