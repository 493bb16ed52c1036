"""The PyTorch contender of the distributed benchmark: DistributedDataParallel over Gloo.

Runs in .venv-torch. LOCAL_RANK, RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the
orchestrator, as from torchrun.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist

from benchmarks.turns import Turns
from benchmarks.workloads import (
    IMAGE_SHAPE,
    LEARNING_RATE,
    NUM_BLOCKS,
    NUM_CLASSES,
    NUM_HEADS,
    NUM_TOKENS,
    PIXELS,
    SEED,
    WIDTH,
    WORKLOADS,
    Workload,
    check_equal_weights,
    check_size,
    examples,
    local_rank,
    measure_slices,
    pin_to_core,
)


class Block(nn.Module):
    """Attention and a feed-forward part, each after its normalisation, each with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, NUM_HEADS, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.feed_forward(self.norm_2(x))


class Mean(nn.Module):
    """The mean over the positions of a text."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def make_model(workload: Workload) -> nn.Module:
    """The model that `keras_model` makes, with the same layers and sizes."""
    torch.manual_seed(SEED)
    make = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer, "dense": _dense}[workload.name]
    model = make()
    check_size(workload, sum(parameter.numel() for parameter in model.parameters()))
    return model


def _hidden(*widths: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i in range(len(widths) - 1):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], NUM_CLASSES))


def _mlp() -> nn.Module:
    return _hidden(PIXELS, 512, 512)


def _dense() -> nn.Module:
    return _hidden(PIXELS, 2048, 2048, 2048, 2048)


def _cnn() -> nn.Module:
    height, width, channels = IMAGE_SHAPE
    layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, _hidden(64 * (height // 4) * (width // 4), 128))


def _transformer() -> nn.Module:
    blocks = [Block() for _ in range(NUM_BLOCKS)]
    return nn.Sequential(
        nn.Embedding(NUM_TOKENS, WIDTH), *blocks, Mean(), nn.Linear(WIDTH, NUM_CLASSES)
    )


def mean_over_ranks(value: float) -> float:
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor) / dist.get_world_size()


def measure(workload: Workload, turns: Turns) -> None:
    """Reports examples per second over all ranks, in slices."""
    inputs_of_rank, classes = examples(workload, workload.num_examples, dist.get_rank())
    x = torch.from_numpy(inputs_of_rank)
    y = torch.from_numpy(classes).long()
    if workload.kind == "texts":
        x = x.long()
    elif workload.kind == "images":
        x = x.permute(0, 3, 1, 2).contiguous()
    parts = zip(x.split(workload.batch_size), y.split(workload.batch_size), strict=True)
    batches = list(parts)

    model = nn.parallel.DistributedDataParallel(make_model(workload))
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    loss = nn.CrossEntropyLoss()
    num_done = 0

    def run(steps: int) -> None:
        nonlocal num_done
        for _ in range(steps):
            inputs, labels = batches[num_done % len(batches)]
            optimizer.zero_grad(set_to_none=True)
            loss(model(inputs), labels).backward()
            optimizer.step()
            num_done += 1

    measure_slices(run, workload, turns)
    weights = [parameter.detach().numpy() for parameter in model.parameters()]
    check_equal_weights(weights, mean_over_ranks)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, required=True)
    parser.add_argument("--turns", type=Path, required=True)
    parser.add_argument("--slices", type=int, required=True)
    options = parser.parse_args(arguments)
    pin_to_core(local_rank())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    turns = Turns(options.turns, options.slices, dist.get_rank() == 0, mean_over_ranks)
    for name in options.models:
        measure(WORKLOADS[name], turns)
    dist.barrier()  # the first to leave takes the store with it
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
