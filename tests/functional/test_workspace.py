"""The memory of the CUDA kernels: threads and graphs do not find each other's numbers in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mmbal_fast import _backend, functional

if TYPE_CHECKING:
    from tests.conftest import Backend

KERNELS = ["cuda-emulated", "cuda-emulated-single", "cuda", "cuda-single"]
on_cuda_kernels = pytest.mark.parametrize("native", KERNELS, indirect=True)


class Gradients:
    """Some of one size, which an update with noise turns into others."""

    def __init__(self, native: Backend, scale: float) -> None:
        self.before = [torch.randn(size, device=native.device) * scale for size in (5, 9000, 4097)]
        self.now = [each.clone() for each in self.before]
        self.k = torch.tensor([0.5], device=native.device)

    def update(self) -> None:
        functional.modulate_(self.now, self.k, [0] * len(self.now), seed=3, step=1)

    def restore(self) -> None:
        for now, before in zip(self.now, self.before, strict=True):
            now.copy_(before)

    def all(self) -> Tensor:
        return torch.cat(self.now)

    def expected(self) -> Tensor:
        """What an update makes of them."""
        self.restore()
        self.update()
        after = self.all()
        self.restore()
        return after


# --- threads


def in_thread(run: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("native", ["cuda-emulated", "cuda"], indirect=True)
def test_threads_have_memory_of_their_own(native: Backend) -> None:
    mine = _backend.workspace(100, 0, 0, False)
    others = in_thread(lambda: _backend.workspace(100, 0, 0, False))
    assert mine.data_ptr() != others.data_ptr()
    assert _backend.workspace(100, 0, 0, False) is mine


@on_cuda_kernels
def test_threads_on_one_stream(native: Backend) -> None:
    """Gradients a million times larger than the other thread's: its moments would show."""
    several = [Gradients(native, scale) for scale in (1e-3, 1e3)]
    expected = [each.expected() for each in several]
    start = threading.Barrier(len(several))
    wrong: list[int] = []

    def repeat(which: int) -> None:
        start.wait()
        for _ in range(20):
            several[which].restore()
            several[which].update()
            if not torch.equal(several[which].all(), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=repeat, args=(which,)) for which in range(len(several))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- graphs


class AbortedError(Exception):
    """What ends a capture before its graph is there."""


@contextmanager
def capture(native: Backend) -> Iterator[list[Callable[[], None]]]:
    """Keeps what is queued meanwhile; the list then holds what replays it."""
    replay: list[Callable[[], None]] = []
    if not native.emulated:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield replay
        replay.append(graph.replay)
        return
    assert native.native is not None
    native.native.begin_capture()
    try:
        yield replay
    finally:
        graph = native.native.end_capture()
    assert graph is not None
    replay.append(graph.replay)


@on_cuda_kernels
@pytest.mark.parametrize("eager_before", [True, False])
@pytest.mark.parametrize("order", ["b", "ab", "ba", "abab"])
def test_graphs_replayed_in_any_order(native: Backend, order: str, eager_before: bool) -> None:
    graphs = {"a": Gradients(native, 1e-3), "b": Gradients(native, 1e3)}
    replays: dict[str, Callable[[], None]] = {}
    for name, gradients in graphs.items():
        if eager_before:
            gradients.expected()
        with capture(native) as replay:
            gradients.update()
        replays[name] = replay[0]
        assert torch.equal(gradients.all(), torch.cat(gradients.before))  # nothing ran
    for name in order:
        replays[name]()
        replayed = graphs[name].all()
        assert torch.equal(graphs[name].expected(), replayed)


@on_cuda_kernels
def test_capture_that_was_aborted(native: Backend) -> None:
    lost, kept = Gradients(native, 1e-3), Gradients(native, 1e3)

    def aborted() -> None:
        with capture(native):
            lost.update()
            raise AbortedError

    with pytest.raises(AbortedError):
        aborted()
    with capture(native) as replay:
        kept.update()
    replay[0]()
    replayed = kept.all()
    assert torch.equal(kept.expected(), replayed)


@on_cuda_kernels
def test_calls_of_one_graph(native: Backend) -> None:
    """Each finds its memory as it must be, whatever the one before was."""
    several = [Gradients(native, scale) for scale in (1.0, 1e3, 1e-3)]
    expected = [each.expected() for each in several]
    logits = [torch.randn(40, 3, device=native.device) for _ in range(2)]
    target = torch.randint(3, (40,), device=native.device)
    scores = functional.contribution_scores(logits, target)
    seen: list[Tensor] = []
    with capture(native) as replay:
        several[0].update()
        seen.append(functional.contribution_scores(logits, target))
        several[1].update()
        seen.append(functional.gradient_moments(several[2].now))
        several[2].update()
    for _ in range(2):
        for each in several:
            each.restore()
        replay[0]()
        assert [torch.equal(x.all(), y) for x, y in zip(several, expected, strict=True)] == [
            True
        ] * 3
        assert torch.equal(seen[0], scores)
        assert torch.equal(seen[1], functional.gradient_moments(several[2].before))
