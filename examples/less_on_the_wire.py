"""A training loop of your own, with less on the wire: GaussianK-SGD by one line, or adaptive periodic averaging by two.

    torchrun --nproc-per-node 2 examples/less_on_the_wire.py [gaussian_k | adaptive]

Without milkglass this is PyTorch's own example of data-parallel training. Digits, two processes, some seconds.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from milkglass import AdaptivePeriodicAverager, GaussianKState, gaussian_k_hook

EPOCHS, BATCH = 20, 16


def main(way: str) -> None:
    """Train, and let rank 0 print how many of the test records are classified right."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # all ranks begin with the same weights, and draw the same order
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    model: nn.Module = network
    if way == "gaussian_k":
        ddp = model = DistributedDataParallel(network)
        ddp.register_comm_hook(GaussianKState(density=0.01, warmup=[(100, 0.1)]), gaussian_k_hook)
    else:
        steps = EPOCHS * (1500 // (BATCH * ranks))
        optimizer = PostLocalSGDOptimizer(optimizer, AdaptivePeriodicAverager(sampling_steps=steps // 4))
    for _ in range(EPOCHS):
        order = torch.randperm(1500)
        for batch in order.split(BATCH * ranks)[: 1500 // (BATCH * ranks)]:
            mine = batch[rank::ranks]
            loss = nn.functional.cross_entropy(model(x[mine]), y[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if rank == 0:
        right = (network(x[1500:]).argmax(dim=1) == y[1500:]).float().mean()
        print(f"{way}: {right:.3f} of {len(y) - 1500} test records right, {ranks} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "gaussian_k")
