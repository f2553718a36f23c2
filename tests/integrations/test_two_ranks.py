"""Two processes train as one process on the same global batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks
from tests.integrations import training

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
)


def train(folder: Path, *names: str, imported: str) -> dict[str, list[dict[str, Any]]]:
    """What the ranks saved, of each training."""
    run = ranks.run(2, f"{__package__}.two_ranks", folder, *names, cwd=folder, imported=imported)
    if run.returncode:
        pytest.fail(run.stdout)
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)] for name in names}


def require_equal_ranks(results: list[dict[str, Any]]) -> dict[str, Any]:
    first, second = results
    assert torch.equal(first["parameters"], second["parameters"])
    assert torch.equal(first["table"], second["table"])
    return first


def require_plain(result: dict[str, Any]) -> None:
    """One process with batches of twice the size, two of which make a step."""
    net = training.Net()
    history = training.train_plainly(net, batch=training.BATCH, accumulate=2)
    expected = training.table(history)
    assert expected[:, 5:].min() < 1
    torch.testing.assert_close(result["table"], expected, atol=1e-4, rtol=1e-5)
    got = result["parameters"]
    torch.testing.assert_close(got, training.parameters(net), atol=2e-6, rtol=1e-5)


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed")
    results = train(tmp_path, "lightning", imported="tests.integrations.test_lightning")[
        "lightning"
    ]
    require_plain(require_equal_ranks(results))
    assert [result["logged"] for result in results] == [[1, 3], []]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """One run for both, which share most of what they import."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    folder = tmp_path_factory.mktemp("ranks")
    both = ("transformers", "accelerate")
    return train(folder, *both, imported="tests.integrations.test_transformers").__getitem__


def test_transformers(hugging_face: Callable[[str], Any]) -> None:
    results = hugging_face("transformers")
    require_plain(require_equal_ranks(results))
    assert [result["logged"] for result in results] == [[1, 3], []]


def test_accelerate(hugging_face: Callable[[str], Any]) -> None:
    result = require_equal_ranks(hugging_face("accelerate"))
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from tests.integrations import recipes

    # Its own loop in one process, with twice the batch.
    alone = recipes.run_accelerate(batch_size=training.BATCH)
    last = alone["balancer"].last
    expected = torch.stack([last.scores, last.ratios, last.coefficients])
    torch.testing.assert_close(result["table"], expected, atol=1e-4, rtol=1e-5)
    parameters = training.parameters(alone["model"])
    torch.testing.assert_close(result["parameters"], parameters, atol=2e-6, rtol=1e-5)
