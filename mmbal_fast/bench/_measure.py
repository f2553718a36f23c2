"""How it is timed: in turn, in a new order each round, so that what slows hits all, and medians."""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mmbal_fast import _backend

EVICTING_BYTES = 256 << 20
"""More than the last cache of a GPU or of most servers holds."""


KERNELS = {"moments", "modulate_", "noise_", "scores_", "derive_", "gradient_dots"}
KERNELS |= {"remember_", "drop_features", "drop_features_backward"}
KERNELS |= {"pull_", "pareto_"}
"""Functions of the native module that start kernels."""


@dataclass
class Provider:
    """One way to do a workload."""

    name: str
    run: Callable[[], object]
    restore: Callable[[], object] = lambda: None
    """Puts the inputs back before each run, untimed."""


@dataclass(frozen=True)
class Timing:
    """Seconds of the repetitions of one provider."""

    seconds: Sequence[float]

    def quantile(self, q: float) -> float:
        """The ``q``-quantile, by linear interpolation."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(q))

    @property
    def median(self) -> float:
        """The middle of the repetitions."""
        return self.quantile(0.5)


def interleaved(
    providers: Sequence[Provider],
    device: torch.device,
    seconds: float,
    cold: bool = False,
) -> dict[str, Timing]:
    """Times providers in turn until each has had its share of ``seconds``.

    Args:
        providers: what to time; each is run twice before to warm up.
        device: on CUDA device events measure, elsewhere the host's clock.
        seconds: about how long to measure for, at least 5 repetitions.
        cold: write more memory than the cache holds before each run, untimed. Else what takes
            under 1 ms runs once more before, so that it finds its own code and data in the cache
            and not what another provider left there.

    Returns:
        Timings by provider's name.
    """
    spent: dict[str, list[float]] = {provider.name: [] for provider in providers}
    longest = 0.0
    short: set[str] = set()
    evicting = torch.empty(EVICTING_BYTES if cold else 0, dtype=torch.uint8, device=device)

    def prepare(provider: Provider) -> None:
        provider.restore()
        evicting.zero_()

    for provider in providers:
        for _ in range(2):
            prepare(provider)
            longest_of_two = _once(provider, device)
        longest += longest_of_two
        if not cold and longest_of_two < 1e-3:
            short.add(provider.name)
    repetitions = max(5, min(200, int(seconds / max(longest, 1e-6) / 2)))
    # In one order the same provider would always find the cache that the slowest one left.
    orders = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(repetitions):
            for provider in orders.sample(providers, len(providers)):
                if provider.name in short:
                    prepare(provider)
                    provider.run()
                prepare(provider)
                spent[provider.name].append(_once(provider, device))
    finally:
        gc.enable()
    return {name: Timing(times) for name, times in spent.items()}


def _once(provider: Provider, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        provider.run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    provider.run()
    return time.perf_counter() - began


@dataclass
class Counts:
    """What one run did, beside taking time."""

    launches: int = 0
    """Kernels started: operations of torch that compute, and calls of the native module."""
    synchronisations: int = 0
    """Times the host read a value of a tensor."""
    extra_bytes: int = 0
    """Peak of the memory it allocated."""


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation that torch runs."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts
        self.held = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.counts.synchronisations += 1
        elif not func.is_view and not name.startswith(("empty", "new_empty", "detach", "alias")):
            self.counts.launches += 1
        inputs = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if _owns(x)}
        for tensor in tree_iter(result):
            if _owns(tensor) and id(tensor.untyped_storage()) not in inputs and not func.is_view:
                self._hold(tensor)
        return result

    def _hold(self, tensor: Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        self.held += size
        self.counts.extra_bytes = max(self.counts.extra_bytes, self.held)
        weakref.finalize(tensor, self._release, size)

    def _release(self, size: int) -> None:
        self.held -= size


def _owns(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


class _CountedModule:
    """The native module, counting the calls of its operations."""

    def __init__(self, module: Any, counts: Counts) -> None:
        self._module = module
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._module, name)
        if name in KERNELS:
            self._counts.launches += 1
        return function


def count(run: Callable[[], object]) -> Counts:
    """Counts what one call of ``run`` does.

    Native CUDA kernels are counted by call here; the profiler counts launches in `gpu_check`.
    """
    counts = Counts()
    with _backend.using(_CountedModule(_backend.native, counts)), _Counter(counts):  # type: ignore[arg-type]
        run()
    return counts
