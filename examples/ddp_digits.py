"""Balanced training on several processes with DistributedDataParallel.

    torchrun --standalone --nproc-per-node 2 examples/ddp_digits.py --epochs 3

Without GPUs the processes share the CPU. Needs scikit-learn. The first process prints:

    epoch 1: loss 0.04, test accuracy 49.2 %, coefficients gray 0.98, color 0.44
    ...
    all processes in sync
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from _digits import Net, accuracy, coefficients, datasets
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import mmbal_fast


def main() -> None:
    """Trains."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group()
    torch.manual_seed(0)

    train, test = datasets()
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(train)
    loader = DataLoader(train, batch_size=32, sampler=sampler)

    net = Net().to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # The scores are summed over all processes, so that all scale by the same coefficients.
    balancer = mmbal_fast.OGMGE(net.encoders, alpha=0.5)
    history = mmbal_fast.History(balancer.names)

    for epoch in range(1, options.epochs + 1):
        sampler.set_epoch(epoch)
        for batch in loader:
            gray, color, label = (each.to(device) for each in batch)
            fused, logits = model(gray, color)
            loss = cross_entropy(fused, label)
            optimizer.zero_grad()
            loss.backward()
            history.record(balancer.step(logits, label))  # after backward, before the optimizer
            optimizer.step()
        if dist.get_rank() == 0:
            print(
                f"epoch {epoch}: loss {loss.item():.2f}, "
                f"test accuracy {accuracy(net, test, device)}, "
                f"coefficients {coefficients(history, len(loader))}"
            )

    balancer.check_in_sync()  # raises if they differ
    if dist.get_rank() == 0:
        print("all processes in sync")
    dist.barrier()  # nobody leaves while a thread of gloo still holds tensors of Python
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
