"""Checks for two ranks: see test_two_ranks.py."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import mmbal_fast
from tests.distributed.blending import (  # noqa: F401  - run with those below
    check_blending_records_are_of_all_ranks,
)
from tests.distributed.checks import (
    WRAPPERS,
    TwoEncoders,
    alone,
    batch_of,
    counted_collectives,
    ddp_equals_one_process,
    equal_on_all_ranks,
    noise_of,
    parameters_of,
    part_of,
    refusal_where_rank_1_has,
    resume_and_compare,
    run_checks,
    saved_by_two_ranks,
    share,
    train,
    uninitialized,
)
from tests.distributed.greedy import (  # noqa: F401  - run with those below
    check_greedy_balancing_in_sync_names_what_differs,
    check_greedy_balancing_joins_at_its_first_step,
    check_greedy_balancing_saves_and_resumes,
    check_greedy_balancing_under_ddp_equals_one_process,
    check_learning_speeds_are_of_the_whole_parameters,
    check_learning_speeds_of_sums_that_are_still_to_be_taken,
    check_mmtm_averages_are_of_all_ranks_on_request,
    check_ranks_with_other_gradients_decide_alike,
    check_the_communication_of_greedy_balancing,
    check_utilization_is_of_all_data_on_request,
)
from tests.distributed.modulations import (  # noqa: F401  - run with those below
    check_modulations_on_shares_equal_one_process,
)
from tests.distributed.pareto import (  # noqa: F401  - run with those below
    check_mmpareto_on_shares_equals_one_process,
    check_mmpareto_refuses_what_fsdp2_has_not_averaged,
    check_the_communication_of_mmpareto,
)
from tests.host_reads import host_reads
from tests.methods.cases import CASES


def check_ddp_equals_one_process(folder: Path) -> None:
    ddp_equals_one_process()


def check_every_method_decides_alike_on_all_ranks(folder: Path) -> None:
    """And as one process does with the whole batch."""

    def average(grad: Tensor) -> None:
        dist.all_reduce(grad)
        grad /= dist.get_world_size()

    half = slice(0, 4) if dist.get_rank() == 0 else slice(4, 8)
    for case in CASES:
        run = case.run()
        run.part, run.average = half, average
        with uninitialized():
            whole = case.run()
            for number in range(6):
                whole.step(number)
        for number in range(6):
            run.step(number)
            run.method.check_in_sync()
        assert all(equal_on_all_ranks(each) for each in run.model.parameters()), case
        if not case.alike:
            continue
        for mine, other in zip(run.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=str(case))


def check_settings_that_differ_are_named(folder: Path) -> None:
    for case in CASES:
        for name, (value, _) in case.settings.items():
            method = case.run().method
            message = refusal_where_rank_1_has(method, name, value, "hash of .*" + name)
            assert type(method).__name__ + ".check_in_sync" in message


def check_models_that_hold_a_method_are_copied(folder: Path) -> None:
    """Under DDP, in a group of its own or in all of them: deep copies, pickles, averages."""
    own = dist.new_group([0, 1])
    for case in CASES:
        for group in (None, own):
            run = case.run()
            run.method.process_group = group
            run.step(0)
            run.method._join()  # if its step did not
            assert run.method._group is not None
            net: Any = run.model
            net.balancer = run.method
            wrapped = DistributedDataParallel(net)
            copied = copy.deepcopy(net)
            assert copied.balancer.process_group is group
            averaged = torch.optim.swa_utils.AveragedModel(net)
            averaged.update_parameters(net)
            copy.deepcopy(wrapped.module)
            file = io.BytesIO()
            torch.save(net, file)
            file.seek(0)
            torch.load(file, weights_only=False)
            loaded = pickle.loads(pickle.dumps(net))
            if group is None:
                loaded.balancer.check_in_sync()
            else:
                with pytest.raises(RuntimeError, match="process_group must be assigned again"):
                    loaded.balancer.check_in_sync()
                loaded.balancer.process_group = own
                loaded.balancer.check_in_sync()
            copied.balancer.check_in_sync()
            assert copied.balancer._group is not None


def check_the_padding_row_of_a_sharded_table_stays_zero(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for dim in (0, 1):
        for padding in (0, 3, 4):
            table = nn.Embedding(5, 6, padding_idx=padding)
            table.weight = nn.Parameter(
                distribute_tensor(table.weight.detach(), mesh, [Shard(dim)])
            )
            grad = torch.arange(30.0).reshape(5, 6)
            grad[padding] = 0.0
            table.weight.grad = distribute_tensor(grad, mesh, [Shard(dim)])
            other = nn.Linear(2, 2)
            other.weight.grad = torch.ones(2, 2)
            balancer = mmbal_fast.OGMGE(
                {"a": table, "b": other}, alpha=0.5, select=lambda name, p: p.ndim == 2
            )
            balancer.observe(scores=torch.tensor([2.0, 1.0]))
            balancer.step()
            rows = table.weight.grad.full_tensor().abs().sum(1)
            assert [row == 0 for row in rows.tolist()] == [i == padding for i in range(5)]


def check_a_rank_without_samples(folder: Path) -> None:
    """Rank 1 gets no sample, then only labels that are ignored, then all labels are."""
    one = TwoEncoders()
    single = mmbal_fast.OGMGE(one.encoders(), alpha=0.5, process_group=alone())
    net = TwoEncoders()
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    for parameter in [*one.parameters(), *net.parameters()]:
        parameter.grad = torch.ones_like(parameter)
    for step, case in enumerate(["empty", "ignored", "all ignored"]):
        batch, target = part_of(batch_of(step), slice(0, 4))
        with torch.no_grad():
            logits = one(batch)[1]
        if case == "all ignored":
            target = torch.full_like(target, -100)
        expected = single.step(logits, target)
        if dist.get_rank() == 1:
            kept = slice(0, 0) if case == "empty" else slice(0, 4)
            logits = {name: each[kept] for name, each in logits.items()}
            target = torch.full_like(target, -100)[kept]
        record = balancer.step(logits, target)
        assert torch.equal(record.coefficients, expected.coefficients), case
        assert equal_on_all_ranks(record.coefficients)
    assert torch.equal(record.coefficients, torch.ones(2))  # nothing to compare


def check_training_where_a_rank_gets_no_samples(folder: Path) -> None:
    """With a loss that is a sum over samples, as it must be: the mean of none is not a number."""
    one, nets = TwoEncoders(), [TwoEncoders(), TwoEncoders()]
    models = [one, *(wrap(net) for net, wrap in zip(nets, WRAPPERS.values(), strict=True))]
    balancers = [
        mmbal_fast.OGMGE(one.encoders(), alpha=0.5, process_group=alone()),
        *(mmbal_fast.OGMGE(net.encoders(), alpha=0.5) for net in nets),
    ]
    for step in range(6):
        batch, target = batch_of(step)
        target[4:] = -100 if step % 3 == 1 else target[4:]
        cut = 4 if step % 3 == 1 else (8, 0, 5)[step % 3]
        mine = slice(0, cut) if dist.get_rank() == 0 else slice(cut, 8)
        count = (target >= 0).sum()
        for model, balancer in zip(models, balancers, strict=True):
            alone_here = model is one
            inputs, labels = part_of((batch, target), slice(0, 8) if alone_here else mine)
            model.zero_grad()
            fused, logits = model(inputs)
            loss = nn.functional.cross_entropy(fused, labels, reduction="sum") / count
            (loss if alone_here else 2 * loss).backward()  # wrappers take the mean over ranks
            balancer.step(logits, labels)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.05)
    for net in nets:
        found = parameters_of(net)
        assert equal_on_all_ranks(found)
        torch.testing.assert_close(found, parameters_of(one), rtol=1e-3, atol=1e-4)


def check_a_group_of_one_is_alone(folder: Path) -> None:
    net = TwoEncoders()
    balancer = mmbal_fast.OGMGE(
        net.encoders(), alpha=0.5, seed=dist.get_rank(), process_group=alone()
    )
    assert balancer.seed == dist.get_rank()
    with counted_collectives() as calls:
        train(net, balancer, range(2), share)
    assert calls == []


def check_in_sync_names_what_differs(folder: Path) -> None:
    net = TwoEncoders()
    for attribute, value, what in [
        ("seed", 7, r"seed \[0, 7\]"),
        ("enabled", False, r"enabled \[1, 0\]"),
        ("alpha", 0.1, "hash of noise and alpha and rule"),
        ("names", ("a", "b"), "hash of the names"),
    ]:
        balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
        assert "step" not in refusal_where_rank_1_has(balancer, attribute, value, what)


def check_fsdp2_equals_ddp(folder: Path) -> None:
    ddp = TwoEncoders()
    expected = train(
        DistributedDataParallel(ddp), mmbal_fast.OGMGE(ddp.encoders(), alpha=0.5), range(20), share
    )
    net = TwoEncoders()
    late = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)  # made before the parameters are sharded
    for module in (net.audio, net.image, net):
        fully_shard(module)
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    assert balancer._groups.names == late._groups.names
    found = train(net, late, range(10), share)
    balancer.load_state_dict(late.state_dict())
    found += train(net, balancer, range(10, 20), share)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)
    parameters = parameters_of(net)
    assert equal_on_all_ranks(parameters)
    torch.testing.assert_close(parameters, parameters_of(ddp), rtol=1e-3, atol=1e-4)


def check_noise_of_shards_is_that_of_the_whole(folder: Path) -> None:
    """With the very same standard deviation, every element gets the same bits."""
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(5)
    for shape in [(7, 5), (1, 9), (5, 3, 2, 2), (4096, 3), (6, 1)]:
        whole = torch.randn(shape, generator=generator)
        for placement in (Shard(0), Shard(1), Replicate()):
            sharded = distribute_tensor(whole.clone(), mesh, [placement])
            found, expected = noise_of(whole, sharded, "weight")
            assert not torch.equal(expected, whole)
            # The standard deviation is summed in another order; the noise itself is the same.
            torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-7)
        transposed = distribute_tensor(whole.transpose(0, 1).contiguous(), mesh, [Shard(1)])
        found, expected = noise_of(whole, transposed.transpose(0, 1), "weight")
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=1e-7)


def check_zero_gradients_show_the_noise_bit_for_bit(folder: Path) -> None:
    """Where std is 0 the gradient becomes eps times the noise: the bits can be compared."""
    mesh = init_device_mesh("cpu", (2,))
    for shape in [(7, 5), (1, 9), (5, 3, 2, 2), (3, 4)]:
        for placement in (Shard(0), Shard(1)):
            sharded = distribute_tensor(torch.zeros(shape), mesh, [placement])
            found, expected = noise_of(torch.zeros(shape), sharded, "weight")
            assert torch.equal(found, expected)
            assert found.std() > 1e-9


def check_sums_that_are_still_to_be_taken(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.randn(6, 4)
    partial = DTensor.from_local(whole * (0.25 + 0.5 * dist.get_rank()), mesh, [Partial()])
    parameters = [
        nn.Parameter(distribute_tensor(torch.zeros(6, 4), mesh, [Replicate()])),
        nn.Parameter(torch.zeros(2, 2)),
    ]
    parameters[0].grad = partial
    balancer = mmbal_fast.OGMGE({"a": parameters[:1], "b": parameters[1:]}, alpha=0.0, noise=0.0)
    equal = torch.zeros(4, 3)
    balancer.step({"a": equal, "b": equal}, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(parameters[0].grad.full_tensor(), whole)


def check_communication_is_what_is_promised(folder: Path) -> None:
    net = TwoEncoders()
    balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
    model = DistributedDataParallel(net)
    with counted_collectives() as calls:
        train(model, balancer, range(3), share)
    assert calls == [("all_reduce", torch.float32, 2)] * 3
    sharded = TwoEncoders()
    fully_shard(sharded)
    balancer = mmbal_fast.OGMGE(sharded.encoders(), alpha=0.5)
    tensors = len(balancer._groups.names)
    assert tensors == 4
    scores = ("all_reduce", torch.float32, 2)
    with counted_collectives() as plain:
        train(sharded, None, range(3), share)
    with counted_collectives() as balanced:
        train(sharded, balancer, range(3), share)
    assert balanced == plain + [scores, ("all_reduce", torch.float64, 3 * tensors)] * 3


def check_a_step_on_many_ranks_reads_nothing(folder: Path) -> None:
    """And starts the sum over the ranks without waiting for it."""
    ddp, sharded = TwoEncoders(), TwoEncoders()
    fully_shard(sharded)
    waits: list[bool] = []
    all_reduce = dist.all_reduce

    def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.dtype == torch.float32:
            waits.append(not kwargs.get("async_op", False))
        return all_reduce(tensor, *args, **kwargs)

    for net, model in [(ddp, DistributedDataParallel(ddp)), (sharded, sharded)]:
        balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
        train(model, balancer, range(1), share)
        batch, target = share(1)
        fused, logits = model(batch)
        nn.functional.cross_entropy(fused, target).backward()
        dist.all_reduce = watched
        try:
            with host_reads() as found:
                balancer.step(logits, target)
        finally:
            dist.all_reduce = all_reduce
        assert found == []
    assert waits == [False, False]


def check_moments_of_shards_do_not_cancel(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = (1e4 + torch.randn(64, 33, dtype=torch.float64)).float()
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    found, expected = noise_of(whole, sharded, "weight")
    torch.testing.assert_close(found - whole, expected - whole, rtol=0, atol=2e-3)  # ulp of 1e4
    assert 0.9 < (found - whole).std() < 1.1


def check_scaler_with_sharded_gradients(folder: Path) -> None:
    sharded = TwoEncoders()
    fully_shard(sharded)
    balancer = mmbal_fast.OGMGE(sharded.encoders(), alpha=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.05)
    for step in range(3):
        batch, target = share(step)
        optimizer.zero_grad()
        fused, logits = sharded(batch)
        scaler.scale(nn.functional.cross_entropy(fused, target)).backward()
        if step == 1 and dist.get_rank() == 1:  # a shard that one rank alone holds
            shard: Any = next(sharded.parameters()).grad
            shard.to_local().view(-1)[-1] = torch.inf
        before = parameters_of(sharded)
        record = balancer.step(logits, target, grad_scaler=scaler, optimizer=optimizer)
        assert bool(record.skipped) == (step == 1)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(parameters_of(sharded), before) == (step == 1)
    assert balancer.state_dict()["step"] == 2
    balancer.check_in_sync()


def check_joins_at_the_first_step(folder: Path) -> None:
    group = dist.group.WORLD
    net = TwoEncoders()
    with uninitialized():
        balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5, seed=10 + dist.get_rank())
    assert balancer.seed == 10 + dist.get_rank()
    train(DistributedDataParallel(net), balancer, range(2), share)
    assert balancer.seed == 10
    assert balancer._group is group
    balancer.check_in_sync()


def check_compiled_step_equals_eager(folder: Path) -> None:
    """The scores' sum over the ranks is in the graph."""
    nets = [TwoEncoders(), TwoEncoders()]
    for net, compiled in zip(nets, (False, True), strict=True):
        balancer = mmbal_fast.OGMGE(net.encoders(), alpha=0.5)
        if compiled:
            step = torch.compile(balancer.step, fullgraph=True, backend="eager")

            def detached(logits: Any, target: Tensor, step: Any = step) -> Any:
                return step({name: each.detach() for name, each in logits.items()}, target)

            balancer.step = detached  # type: ignore[assignment, method-assign]
        train(DistributedDataParallel(net), balancer, range(3), share)
    assert torch.equal(parameters_of(nets[0]), parameters_of(nets[1]))


def check_saves_and_resumes(folder: Path) -> None:
    """Bit for bit on as many ranks; what is saved here is loaded on one rank and on four."""
    assert isinstance(mmbal_fast.OGMGE(TwoEncoders().encoders(), alpha=0.5), Stateful)
    for name, wrap in WRAPPERS.items():
        saved_by_two_ranks(folder / name, wrap)
        resume_and_compare(folder / name, wrap)


if __name__ == "__main__":
    run_checks(globals())
