"""Prints a hash of what each operation computes, for test_same_bits.py to run in processes."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from mmbal_fast import _backend
from mmbal_fast.functional import contribution_scores, gradient_moments, modulate_, noise_like

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def hashes(device: torch.device, size: int) -> dict[str, str]:
    """By operation and type; ``size`` normals are enough work for all threads."""
    found = {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for offset in (0, 3, 2**34 - 11):
            like = torch.empty(size, dtype=dtype, device=device)
            found[f"noise {name} {offset}"] = digest(
                noise_like(like, seed=2**63 + 5, step=7, tensor_id=2**31, offset=offset)
            )
        flat = (random(size + 40) * 3 + 0.5).to(dtype)
        grads = [flat[3:], flat[:1].clone(), flat[:37].clone(), flat[: size // 2].clone() * 1e-3]
        moments = gradient_moments(grads)
        k = torch.tensor([0.3, 1.0], device=device)
        # What takes an eighth of the time is shared by threads from eight times as much on.
        scaled = [grad.repeat(8) for grad in grads]
        found[f"moments {name}"] = digest(moments, gradient_moments(scaled))
        modulate_(scaled, k, [0, 1, 0, 1], noise=0.0)
        found[f"scaled {name}"] = digest(*scaled)
        modulate_(grads, k, [0, 1, 0, 1], seed=3, step=4, moments=moments)
        found[f"modulated {name}"] = digest(*grads)
        logits = [random(500, classes) for classes in (309, 309)]
        labels = (random(500) * 100).long().clamp(0, 308)
        found[f"scores {name}"] = digest(
            contribution_scores([each.to(dtype) for each in logits], labels),
            contribution_scores([each.to(dtype) for each in logits], logits[0].softmax(1)),
            contribution_scores(
                [each.to(dtype) for each in logits], labels, statistic="log_probability"
            ),
            contribution_scores(
                [each.to(dtype) for each in logits], logits[0].sigmoid(), multi_label=True
            ),
        )
    return found


if __name__ == "__main__":
    assert _backend.native is not None, _backend.why_not
    isa = _backend.native.cpu_isa()
    print(json.dumps({"isa": isa, "hashes": hashes(torch.device("cpu"), 300_000)}))
