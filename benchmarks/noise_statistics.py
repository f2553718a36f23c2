"""Statistics of the noise, 1e8 samples of it: ``make noise-statistics``, a few minutes.

Samples are spread over tensors, steps and seeds. Asked are the moments, the distribution (1024 bins
of equal probability), the tails beyond 4 and 5 sigma, and correlations: of near elements of a
tensor, and of the same element under neighbouring seeds, steps and tensor ids. Every answer is a
p-value; they are independent enough for the least of N to be compared with 1e-4 / N.

Where dieharder is installed (apt-get install dieharder), its tests that it calls good and that read
less than 1 GB get the samples as well, as 16 uniform bits each.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shutil
import subprocess
from collections import defaultdict
from contextlib import suppress

import torch
from scipy import special, stats
from torch import Tensor

from mmbal_fast.functional import noise_like

BINS = 1024
LAGS = (1, 2, 3, 4, 8, 128, 4096)
LEAST = 1e-4
DIEHARDER = (0, 1, 2, 4, 8, 9, 10, 11, 12, 13, 15, 16, 100, 101, 102)


def samples(count: int, seed: int, step: int, tensor_id: int) -> Tensor:
    """Noise of one tensor."""
    like = torch.empty(count)
    return noise_like(like, seed=seed, step=step, tensor_id=tensor_id).double()


def p_values(tensors: int, elements: int, first_seed: int = 0) -> dict[str, float]:
    """Of every question, over so many tensors of so many elements."""
    counted = torch.zeros(BINS, dtype=torch.float64)
    powers = torch.zeros(4, dtype=torch.float64)
    tails = {4: 0, 5: 0}
    products: dict[str, float] = defaultdict(float)
    pairs: dict[str, int] = defaultdict(int)
    for number in range(tensors):
        # A seed has all 64 bits, and a step and an id all 32: neighbours differ in the lowest.
        seed = (first_seed + number) * 0x9E3779B97F4A7C15 % 2**63
        step, tensor_id = number * 0x61C88647 % 2**31, number * 0x85EBCA6B % 2**32
        z = samples(elements, seed, step, tensor_id)
        uniform = torch.special.ndtr(z)
        counted += torch.histc(uniform, BINS, 0, 1)
        powers += torch.stack([(z**k).sum() for k in range(1, 5)])
        for sigma in tails:
            tails[sigma] += int((z.abs() > sigma).sum())
        neighbours = {
            "seed": samples(elements, seed ^ 1, step, tensor_id),
            "step": samples(elements, seed, step ^ 1, tensor_id),
            "tensor id": samples(elements, seed, step, tensor_id ^ 1),
        }
        for name, other in neighbours.items():
            products[f"neighbouring {name}"] += float(z @ other)
            pairs[f"neighbouring {name}"] += elements
        for lag in LAGS:
            if lag < elements:
                products[f"lag {lag}"] += float(z[:-lag] @ z[lag:])
                pairs[f"lag {lag}"] += elements - lag
    n = tensors * elements
    # Means of z, z^2 - 1, z^3 and z^4 - 3 in units of their standard deviations.
    spreads = (1.0, math.sqrt(2), math.sqrt(15), math.sqrt(96))
    expected = (0.0, 1.0, 0.0, 3.0)
    answers = {
        f"moment {k}": two_sided((float(power) / n - mean) / spread * math.sqrt(n))
        for k, (power, mean, spread) in enumerate(zip(powers, expected, spreads, strict=True), 1)
    }
    chi_squared = float(((counted - n / BINS) ** 2 / (n / BINS)).sum())
    answers["distribution"] = float(stats.chi2.sf(chi_squared, BINS - 1))
    for sigma, found in tails.items():
        share = special.erfc(sigma / math.sqrt(2))
        answers[f"beyond {sigma} sigma"] = float(stats.binomtest(found, n, share).pvalue)
    answers |= {name: two_sided(sum_ / math.sqrt(pairs[name])) for name, sum_ in products.items()}
    return answers


def dieharder(test: int, first_seed: int = 0) -> dict[str, float]:
    """What a test of dieharder says of the samples, as many as it reads."""
    command = ["dieharder", "-g", "200", "-d", str(test)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        for step in itertools.count():
            uniform = torch.special.ndtr(samples(2**20, first_seed, step, test))
            bits = (uniform * 2**16).to(torch.int32).clamp(max=2**16 - 1)
            process.stdin.write(bits.to(torch.uint16).numpy().tobytes())
    rows = [line.decode().split("|") for line in process.stdout]
    process.wait()
    return {
        f"{row[0].strip()} {row[1].strip()}": float(row[4])
        for row in rows
        if len(row) == 6 and row[4].strip().replace(".", "").isdigit()
    }


def two_sided(z: float) -> float:
    """Probability of a standard normal at least as far from 0."""
    return float(special.erfc(abs(z) / math.sqrt(2)))


def main() -> int:
    """Prints a table; 1 if a p-value is too small."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--elements", type=int, default=10**6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    answers = p_values(arguments.tensors, arguments.elements, arguments.seed)
    if shutil.which("dieharder") is None:
        print("dieharder is not installed: its tests are left out")
    else:
        for test in DIEHARDER:
            answers |= dieharder(test, arguments.seed)
    for name, p in answers.items():
        print(f"{name:24} p = {p:.3g}", flush=True)
    least = min(answers.values())
    total = arguments.tensors * arguments.elements
    print(f"{total:.3g} samples, least of {len(answers)}: {least:.3g}")
    return int(least < LEAST / len(answers))


if __name__ == "__main__":
    raise SystemExit(main())
