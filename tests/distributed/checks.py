"""What the scripts of this folder share: a model, batches, and how checks are run."""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mmbal_fast


class TwoEncoders(nn.Module):
    """Late fusion of sounds and images. No size divides by the number of ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.audio = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
        self.image = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))
        self.head = nn.Linear(10, 3)

    def features(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"audio": self.audio(batch["audio"]), "image": self.image(batch["image"])}

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        features = self.features(batch)
        fused = self.head(torch.cat(list(features.values()), dim=1))
        return fused, mmbal_fast.nn.unimodal_logits(features, self.head)

    def encoders(self) -> dict[str, nn.Module]:
        return {"audio": self.audio, "image": self.image}


def batch_of(step: int, size: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    """The batch of a step: sounds say more about the class than images do."""
    generator = torch.Generator().manual_seed(1000 + step)
    target = torch.randint(3, (size,), generator=generator)
    audio = torch.randn(size, 6, generator=generator)
    audio[:, 0] += 3.0 * target
    image = torch.randn(size, 2, 4, 4, generator=generator)
    return {"audio": audio, "image": image}, target


def part_of(batch: tuple[dict[str, Tensor], Tensor], part: slice) -> Any:
    return {name: each[part] for name, each in batch[0].items()}, batch[1][part]


def share(step: int, size: int = 8) -> Any:
    """This rank's part of a step's batch."""
    count = size // dist.get_world_size()
    first = dist.get_rank() * count
    return part_of(batch_of(step, size), slice(first, first + count))


def train(
    model: nn.Module,
    balancer: mmbal_fast.OGMGE | None,
    steps: range,
    batches: Callable[[int], Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> list[Tensor]:
    """Trains a `TwoEncoders`, wrapped or not; gives the coefficients of every step."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    coefficients = []
    for step in steps:
        batch, target = batches(step)
        optimizer.zero_grad()
        fused, logits = model(batch)
        nn.functional.cross_entropy(fused, target).backward()
        if balancer is not None:
            coefficients.append(balancer.step(logits, target).coefficients.clone())
        optimizer.step()
    return coefficients


def alone() -> dist.ProcessGroup:
    """A group of this rank, which leaves what is given it out of the others' sums."""
    group: Any = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return group  # type: ignore[no-any-return]


@contextmanager
def uninitialized() -> Iterator[None]:
    """As before torch.distributed is initialised."""
    original = dist.is_initialized
    dist.is_initialized = lambda: False
    try:
        yield
    finally:
        dist.is_initialized = original


def equal_on_all_ranks(tensor: Tensor) -> bool:
    """Whether every rank holds the same bits."""
    ranks = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, tensor.detach().contiguous())
    return all(torch.equal(ranks[0], each) for each in ranks)


def parameters_of(model: nn.Module) -> Tensor:
    """All parameters of a model, whole on every rank."""

    def whole(parameter: Any) -> Tensor:
        sharded = isinstance(parameter, DTensor)
        return (parameter.full_tensor() if sharded else parameter).detach().flatten()

    return torch.cat([whole(parameter) for parameter in model.parameters()])


def noise_of(whole: Tensor, gradient: Any, name: str) -> tuple[Tensor, Tensor]:
    """A sharded gradient after a step that scales by 1, and the same without shards."""
    results = []
    for grad in (gradient, whole.clone()):
        parameters = [nn.Parameter(torch.zeros_like(grad)), nn.Parameter(torch.zeros(2, 2))]
        parameters[0].grad = grad
        balancer = mmbal_fast.OGMGE({"a": [(name, parameters[0])], "b": parameters[1:]}, alpha=0.5)
        equal = torch.zeros(4, 3)
        balancer.step({"a": equal, "b": equal}, torch.zeros(4, dtype=torch.int64))
        results.append(parameters[0].grad)
    sharded: Any = results[0]
    return sharded.full_tensor(), results[1]


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """Every collective of torch.distributed that Python code calls, with its size."""
    calls: list[tuple[str, torch.dtype, int]] = []
    names = ("all_reduce", "all_gather", "broadcast", "all_gather_into_tensor", "reduce_scatter")
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, args[0].dtype, args[0].numel()))
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def ddp_equals_one_process() -> None:
    """50 steps on shares of the batches as on the whole batches, and the same noise."""
    one = TwoEncoders()
    single = mmbal_fast.OGMGE(one.encoders(), alpha=0.5, seed=3, process_group=alone())
    expected = train(one, single, range(50), batch_of)
    net = TwoEncoders()
    seed = 3 if dist.get_rank() == 0 else 99  # the first rank's is broadcast
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5, seed=seed)
    assert balancer.seed == 3
    found = train(DistributedDataParallel(net), balancer, range(50), share)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert (torch.stack(found) < 1).any()
    parameters = parameters_of(net)
    assert equal_on_all_ranks(parameters)
    torch.testing.assert_close(parameters, parameters_of(one), rtol=1e-3, atol=1e-4)
    balancer.check_in_sync()
    # Zeros become eps times the noise of step 50: the bits can be compared.
    noise = []
    for model, each, batches in [(one, single, batch_of), (net, balancer, share)]:
        logits, target = model(batches(50)[0])[1], batches(50)[1]
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        each.step(logits, target)
        noise.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
    assert torch.equal(noise[0], noise[1])
    assert noise[0].std() > 1e-9
    assert equal_on_all_ranks(noise[1])


def saved_by_two_ranks(folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """A checkpoint after 5 steps, what `resume_and_compare` is to find, and what 5 more give."""
    net = TwoEncoders()
    model = wrap(net)
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5, seed=2**63 + 5)
    train(model, balancer, range(5), share)
    dcp.save({"model": net.state_dict(), "balancer": balancer}, checkpoint_id=folder)
    state = balancer.state_dict()
    train(model, balancer, range(5, 10), share)
    whole = parameters_of(net)
    if dist.get_rank() == 0:
        torch.save({"balancer": state, "parameters": whole}, folder / "expected.pt")
    dist.barrier()


def resume_and_compare(folder: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Goes on where the checkpoint of two ranks was taken, and ends where they did.

    Bit for bit on as many ranks.
    """
    net = TwoEncoders(seed=1)
    model = wrap(net)
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    dcp.load({"model": net.state_dict(), "balancer": balancer}, checkpoint_id=folder)
    expected = torch.load(folder / "expected.pt")
    state = {"names": ["audio", "image"], "seed": 2**63 + 5, "step": 5, "enabled": True}
    assert balancer.state_dict() == expected["balancer"] == state
    train(model, balancer, range(5, 10), share)
    found = parameters_of(net)
    assert equal_on_all_ranks(found)
    if dist.get_world_size() == 2:
        assert torch.equal(found, expected["parameters"])
    torch.testing.assert_close(found, expected["parameters"], rtol=1e-4, atol=1e-5)


def sharded(net: nn.Module) -> nn.Module:
    """By FSDP2."""
    fully_shard(net)
    return net


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp2": sharded,
}


def refusal_where_rank_1_has(balancer: Any, attribute: str, value: object, what: str) -> str:
    """What `check_in_sync`, content before, says once rank 1 has another value."""
    balancer.check_in_sync()
    if dist.get_rank() == 1:
        setattr(balancer, attribute, value)
    with pytest.raises(RuntimeError, match=what) as raised:
        balancer.check_in_sync()
    return str(raised.value)


def run_checks(checks: Mapping[str, Any]) -> None:
    """Calls every function named check_* in order, on every rank, and writes which passed.

    The first that fails ends the run: the ranks are no longer in step.
    """
    warnings.simplefilter("error")
    # What torch warns of where it shards a module whose output is a view.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    report = Path(f"{sys.argv[1]}.{dist.get_rank()}")
    outcomes = {}
    for name in [name for name in checks if name.startswith("check_")]:
        torch.manual_seed(0)
        try:
            checks[name](report.parent)
            outcomes[name] = ""
        except SystemExit:  # a rank that dies as the check wants it to
            report.write_text(json.dumps(outcomes | {name: ""}))
            os._exit(13)
        except BaseException:  # a CheckpointException is no Exception
            outcomes[name] = traceback.format_exc()
            raise
        finally:
            report.write_text(json.dumps(outcomes))
    dist.destroy_process_group()
