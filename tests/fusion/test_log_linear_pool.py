"""The pool against its formula and against another optimizer."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from mmbal_fast.fusion import LogLinearPool

NAMES = ["audio", "image", "text"]


def sample(count: int = 60, classes: int = 4) -> tuple[dict[str, Tensor], Tensor]:
    """Heads that know the label well, a little, and not at all."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(classes, (count,), generator=generator)
    truth = torch.eye(classes, dtype=torch.float64)[target]
    noise = torch.randn(3, count, classes, generator=generator, dtype=torch.float64)
    strengths = zip(NAMES, (2.0, 0.7, 0.0), noise, strict=True)
    return {name: strength * truth + each for name, strength, each in strengths}, target


def by_hand(logits: dict[str, Tensor], weights: np.ndarray) -> np.ndarray:
    total = sum(
        w * scipy.special.log_softmax(logits[name].numpy(), axis=1)
        for name, w in zip(NAMES, weights, strict=True)
    )
    return scipy.special.log_softmax(total, axis=1)


@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_weights_are_those_of_another_optimizer(penalty: float) -> None:
    logits, target = sample()

    def objective(w: np.ndarray) -> float:
        likelihood = by_hand(logits, w)[np.arange(len(target)), target.numpy()]
        return -likelihood.mean() + penalty * (w**2).sum()

    best = scipy.optimize.minimize(objective, np.ones(3), bounds=[(0, None)] * 3, tol=1e-12).x
    pool = LogLinearPool(NAMES, penalty=penalty).fit(logits, target)
    np.testing.assert_allclose(pool.weights.numpy(), best, atol=2e-4)
    assert best[0] > 2 * best[1] > 2 * best[2]
    np.testing.assert_allclose(pool(logits).numpy(), by_hand(logits, best), atol=2e-3)


def test_unfitted_is_the_product() -> None:
    logits, _ = sample()
    np.testing.assert_allclose(
        LogLinearPool(NAMES)(logits).numpy(), by_hand(logits, np.ones(3)), rtol=1e-12
    )


def test_labels_for_every_position_and_some_left_out() -> None:
    logits, target = sample(60)
    wide = {name: each.reshape(12, 5, 4).movedim(2, 1) for name, each in logits.items()}
    expected = LogLinearPool(NAMES).fit(
        {name: each[:50] for name, each in logits.items()}, target[:50]
    )
    ignoring = target.clone()
    ignoring[50:] = -100
    pool = LogLinearPool(NAMES).fit(wide, ignoring.reshape(12, 5))
    torch.testing.assert_close(pool.weights, expected.weights)
    assert pool(wide).shape == (12, 4, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    logits, target = sample()
    pool = LogLinearPool(NAMES).fit(logits, target)
    half = {name: each.to(dtype) for name, each in logits.items()}
    wide = pool({name: each.float() for name, each in half.items()})
    assert wide.dtype == torch.float32
    assert torch.equal(pool(half), wide)
    assert torch.equal(copy.deepcopy(pool).to(dtype)(half), wide)


def test_a_missing_head_has_no_say() -> None:
    logits, target = sample()
    pool = LogLinearPool(NAMES).fit(logits, target)
    two = LogLinearPool(NAMES[:2])
    two.weights.copy_(pool.weights[:2])
    expected = two({name: logits[name] for name in NAMES[:2]})
    torch.testing.assert_close(pool(logits | {"text": None}), expected)


def test_a_head_of_weight_0_has_no_say_even_if_it_is_sure() -> None:
    pool = LogLinearPool(NAMES[:2])
    pool.weights.copy_(torch.tensor([1.0, 0.0]))
    sure = torch.tensor([[0.0, -torch.inf]])
    even = torch.zeros(1, 2)
    assert pool({"audio": even, "image": sure}).exp().tolist() == [[0.5, 0.5]]


def test_state_export_and_compile() -> None:
    logits, target = sample()
    pool = LogLinearPool(NAMES).fit(logits, target)
    other = LogLinearPool(NAMES)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other(logits), pool(logits))
    batch = torch.export.Dim("batch", min=2)
    shapes = ({name: {0: batch} for name in NAMES},)
    program = torch.export.export(pool, (logits,), dynamic_shapes=shapes)
    fewer = {name: each[:7] for name, each in logits.items()}
    torch.testing.assert_close(program.module()(fewer), pool(fewer))
    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), pool(logits))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fits_without_autograd_around_it(mode: type) -> None:
    logits, target = sample()
    expected = LogLinearPool(NAMES).fit(logits, target)
    with mode():
        pool = LogLinearPool(NAMES).fit({name: x + 0 for name, x in logits.items()}, target + 0)
        assert torch.equal(pool.weights, expected.weights)


@pytest.mark.parametrize(
    ("names", "penalty", "message"),
    [
        (["audio"], 0.1, r"at least 2 names \(got \['audio'\]\)"),
        ("audio", 0.1, r"at least 2 names \(got 'audio'\)"),
        (["audio", "audio"], 0.1, r"names must differ \(got \['audio', 'audio'\]\)"),
        (NAMES, -1.0, r"penalty must be a number from 0 on \(got -1.0\)"),
    ],
)
def test_bad_settings(names: list[str], penalty: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"LogLinearPool: .*{message}"):
        LogLinearPool(names, penalty=penalty)


LOGITS, TARGET = sample()


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (
            {"audio": LOGITS["audio"]},
            TARGET,
            ValueError,
            r"logits must be given for .*\(got \['audio'\]\)",
        ),
        (LOGITS | {"text": None}, TARGET, ValueError, r"have logits \(got None for 'text'\)"),
        (LOGITS | {"text": [1.0]}, TARGET, TypeError, r"floating point tensors or None .*list"),
        (LOGITS | {"text": LOGITS["text"][:5]}, TARGET, ValueError, r"logits must have one shape"),
        (
            LOGITS | {"text": LOGITS["text"] / 0},
            TARGET,
            ValueError,
            r"must be finite \(got NaN or inf for 'text'\)",
        ),
        (LOGITS, TARGET[:5], ValueError, r"target must have shape \[60\]"),
        (LOGITS, TARGET * 0 - 100, ValueError, r"a label that counts \(got none\)"),
        (LOGITS, TARGET + 1, IndexError, r"labels must be from 0 to 3 \(got 1 to 4\)"),
        (LOGITS, LOGITS["audio"], TypeError, r"integer labels \(got torch.float64\)"),
    ],
)
def test_bad_data_changes_nothing(
    logits: dict, target: Tensor, error: type[Exception], message: str
) -> None:
    pool = LogLinearPool(NAMES)
    pool.weights.copy_(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(error, match=f"LogLinearPool.fit: .*{message}"):
        pool.fit(logits, target)
    assert pool.weights.tolist() == [1.0, 2.0, 3.0]
