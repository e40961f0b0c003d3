"""Steps with examples that share rows beside steps with rows of like length: learned tokens a second, and memory.

    python benchmarks/packing.py

Lengths are lognormal (median 900, sigma 0.7, at most 4,096 tokens), of each example the last half is learned. A packed
micro-batch is one row of 4,096 tokens, the other one four examples in rows of their own, which are about as many. Of an
epoch of all examples a turn takes a few steps, evenly spread over its steps by their size. The sides take turns, each
in a process of its own; ratios are of medians. Memory is the process's peak RssAnon, its longest micro-batch included.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from machine import cpu_name, free_port
from train import CLIP_GRAD, LR, Peak

ROOM = 4096
SIDES = {"padded": 4, "packed": 1}  # rows of a micro-batch
SIZES = {"dim": 256, "hidden_dim": 512, "n_layers": 4, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{cpu_name()}, {os.cpu_count()} threads, {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(time.strftime("%Y-%m-%d"))
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, side, arguments.examples, arguments.steps), daemon=True).start()
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(arguments.rounds + 1):
        for side, pipe in pipes.items():
            pipe.send(number)
            seconds, learned, filled, peak = pipe.recv()
            if number:  # the first round warms up
                speeds[side].append(learned / seconds)
                print(
                    f"{side}: {learned / seconds:,.0f} learned tokens/s, rows {filled:.1%} filled, {peak / 1e6:,.0f} MB"
                )
    own, other = (statistics.median(speeds[side]) for side in ("packed", "padded"))
    print(f"packed: {own / other:.2f} x the learned tokens/s of padded rows")


def serve(pipe: Connection, side: str, examples: int, count: int) -> None:
    """Train so many steps of an epoch each time that its number comes, of the first one the longest too."""
    from accessory.config import ModelArgs, MoEArgs
    from accessory.data.collate import collate
    from accessory.data.packing import PackedSampler
    from accessory.data.sampler import StepSampler
    from accessory.model.factory import build_transformer
    from accessory.model.meta import MetaModel
    from accessory.parallel.state import ParallelState
    from accessory.train.allocator import return_freed_memory
    from accessory.train.init import init_weights
    from accessory.train.optim import adamw
    from accessory.train.sharding import device_mesh, shard_model
    from accessory.train.trainer import train_step

    return_freed_memory()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    args = ModelArgs(**SIZES, vocab_size=8000, max_seq_len=ROOM, moe=MoEArgs())
    state = ParallelState.init(1, "cpu")
    llma = build_transformer(args, state, dtype=torch.float32, device=torch.device("meta"))
    shard_model(llma, device_mesh(state), data_parallel="fsdp", compute_dtype=torch.float32)
    llma.to_empty(device="cpu")
    init_weights(llma, seed=0)
    model = MetaModel(llma, tokenizer=None).train()  # type: ignore[arg-type]
    optimizer = adamw(model.named_parameters(), lr=LR, weight_decay=0.0)
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(900), 0.7, examples).astype(int), 3, ROOM)
    data: list[Any] = []
    for length in lengths:
        tokens = rng.integers(3, 8000, length)
        data.append((tokens, np.where(np.arange(length) >= length // 2, tokens, 0)))
    packed = side == "packed"
    sampler = PackedSampler(lengths, SIDES[side], room=ROOM) if packed else StepSampler(lengths, SIDES[side])
    peak = Peak()
    while True:
        try:
            epoch = pipe.recv()
        except EOFError:  # the last round has been asked for
            return
        learned, tokens, places = 0, 0, 0.0
        steps = sorted(sampler.steps(epoch), key=lambda step: lengths_of(sampler, lengths, step))
        spread = [steps[round((number + 0.5) * len(steps) / count - 0.5)] for number in range(count)]
        start = time.perf_counter()
        for step in spread if epoch else [steps[-1], *spread]:
            (rows,) = sampler.micro_batches(step, dp_rank=0, dp_size=1, accum=1)
            batch = collate([[data[index] for index in sampler.row(row)] for row in rows])
            result = train_step(model, optimizer, [batch], lr=LR, clip_grad=CLIP_GRAD)
            learned, tokens = learned + result.learned, tokens + result.tokens
            places += result.tokens / (1 - result.padding)
        pipe.send((time.perf_counter() - start, learned, tokens / places, peak.value))


def lengths_of(sampler: Any, lengths: Any, step: Any) -> int:
    return sum(int(lengths[index]) for row in step for index in sampler.row(row))


if __name__ == "__main__":
    main()
