"""Which features go where, and that they do so everywhere alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmbal_fast import _backend
from mmbal_fast.functional import noise_like
from mmbal_fast.fusion import ShuffleModality
from tests.conftest import Backend

NAMES = ("audio", "image", "text")


def numbered(count: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Features that tell whose they are."""
    column = torch.arange(count, dtype=torch.float32, device=device)[:, None]
    return {name: column + torch.zeros(1, 3, device=device) for name in NAMES}


def sources(features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each[:, 0].long() for name, each in features.items()}


def test_the_anchor_stays_and_the_others_move_together() -> None:
    shuffle = ShuffleModality(NAMES, anchor="image", probability=0.5, seed=3)
    here = torch.arange(4000)
    found = sources(shuffle(numbered(4000)))
    assert torch.equal(found["image"], here)
    moved = found["audio"] != here
    assert torch.equal(moved, found["text"] != here)  # one draw for each sample ...
    assert not torch.equal(found["audio"][moved], found["text"][moved])  # ... a partner for each
    assert abs(moved.double().mean().item() - 0.5) < 0.03
    torch.testing.assert_close(
        shuffle.last.shuffled, torch.tensor([1.0, 0.0, 1.0]) * moved.float().mean()
    )


@pytest.mark.parametrize("count", [2, 3, 64])
def test_nobody_is_its_own_partner_and_everybody_is_taken_once(count: int) -> None:
    shuffle = ShuffleModality(NAMES, anchor="text", probability=1.0)
    for _ in range(20):
        found = sources(shuffle(numbered(count)))["audio"]
        assert (found != torch.arange(count)).all()
        assert found.sort().values.tolist() == list(range(count))


def test_partners_are_uniform_among_the_others() -> None:
    shuffle = ShuffleModality(NAMES, anchor="text", probability=1.0)
    times = torch.zeros(4, 4)
    for _ in range(3000):
        times[range(4), sources(shuffle(numbered(4)))["audio"]] += 1
    expected = (1 - torch.eye(4)) * 1000
    assert ((times - expected).abs() < 5 * (1000 * 2 / 3) ** 0.5).all()


def test_the_draws_are_the_noise_of_seed_step_and_modality() -> None:
    shuffle = ShuffleModality(NAMES, anchor="image", probability=0.3, seed=9)
    shuffle(numbered(50))
    found = sources(shuffle(numbered(50)))  # the second step
    like = torch.empty(50)
    taken = noise_like(like, seed=9, step=1, tensor_id=0) < torch.special.ndtri(torch.tensor(0.3))
    order = noise_like(like, seed=9, step=1, tensor_id=3).argsort()
    partner = {order[j].item(): order[j - 1].item() for j in range(50)}
    expected = [partner[i] if taken[i] else i for i in range(50)]
    assert found["text"].tolist() == expected


def test_every_device_moves_the_same_features(backend: Backend) -> None:
    shuffle, other = (ShuffleModality(NAMES, anchor="image", seed=5) for _ in range(2))
    for count in (7, 64):
        found = shuffle(numbered(count, backend.device))
        with _backend.using(None):
            expected = other(numbered(count))
        for name, each in expected.items():
            assert torch.equal(found[name].cpu(), each)


def test_gradients_go_where_the_features_came_from() -> None:
    shuffle = ShuffleModality(NAMES, anchor="image", probability=1.0)
    features = {name: each.requires_grad_() for name, each in numbered(5).items()}
    mixed = shuffle(features)
    weight = torch.arange(5.0)[:, None]
    (mixed["audio"] * weight).sum().backward()
    expected = torch.zeros(5).index_add_(0, sources(mixed)["audio"], torch.arange(5.0))
    assert torch.equal(features["audio"].grad[:, 0], expected)


@pytest.mark.parametrize(
    ("options", "count"),
    [({"anchor": "image", "probability": 0.0}, 9), ({"anchor": None}, 9), ({"anchor": "text"}, 1)],
)
def test_nothing_to_do(options: dict, count: int) -> None:
    shuffle = ShuffleModality(NAMES, **options)
    for name, each in shuffle(numbered(count)).items():
        assert torch.equal(each, numbered(count)[name])
    assert shuffle.last.shuffled.tolist() == [0, 0, 0]


def test_switched_off() -> None:
    shuffle, other = (ShuffleModality(NAMES, anchor="image") for _ in range(2))
    shuffle.enabled = False
    features = numbered(9)
    assert all(each is features[name] for name, each in shuffle(features).items())
    shuffle.enabled = True  # goes on as if it had not been asked
    assert torch.equal(shuffle(numbered(9))["audio"], other(numbered(9))["audio"])


def test_any_shape_and_dtype() -> None:
    shuffle = ShuffleModality(["a", "b"], anchor="a", probability=1.0)
    maps = torch.arange(4.0)[:, None, None].expand(4, 2, 3).to(torch.bfloat16)
    mixed = shuffle({"a": torch.zeros(4, 5), "b": maps})["b"]
    assert (mixed.shape, mixed.dtype) == (maps.shape, maps.dtype)
    assert (mixed != maps).all()


def test_the_slowest_to_learn_becomes_the_anchor() -> None:
    shuffle = ShuffleModality(NAMES)
    sure, unsure = 5 * torch.eye(3), torch.zeros(3, 3)
    target = torch.arange(3)
    with pytest.raises(ValueError, match=r"choose_anchor: .*observed first \(got none\)"):
        shuffle.choose_anchor()
    shuffle.observe({"audio": sure, "image": unsure, "text": sure}, target)
    for _ in range(2):  # more batches than the one in which the image was slower
        shuffle.observe({"audio": sure, "image": sure, "text": -sure}, target)
    assert shuffle.choose_anchor() == shuffle.anchor == "text"
    assert sources(shuffle(numbered(30)))["text"].tolist() == list(range(30))
    resumed = ShuffleModality(NAMES)
    resumed.load_state_dict(shuffle.state_dict())
    assert resumed.anchor == "text"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"anchor": "smell"}, ValueError, r"anchor must be one of \['audio', 'image', 'text'\] .*"),
        ({"probability": 1.5}, ValueError, r"probability must be from 0 to 1 \(got 1.5\)"),
        ({"probability": "1"}, TypeError, r"probability must be a number \(got '1'\)"),
        ({"probability": float("nan")}, ValueError, r"probability must be from 0 to 1 \(got nan\)"),
        ({"seed": 2**64}, ValueError, r"seed must be from 0 to"),
    ],
)
def test_bad_settings(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ShuffleModality: {message}"):
        ShuffleModality(NAMES, **options)


def test_observe_asks_for_every_modality() -> None:
    with pytest.raises(
        ValueError, match=r"observe: logits must be given for .*\(got \['audio'\]\)"
    ):
        ShuffleModality(NAMES).observe({"audio": torch.zeros(1, 2)}, torch.zeros(1).long())
