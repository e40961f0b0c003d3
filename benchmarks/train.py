"""A training step beside transformers: tokens per second and peak memory of every rank, on the same model and data.

    python benchmarks/train.py                  # shape 'mid' with 4 layers, bfloat16, 1 rank x 2 threads, 2 x 1
    python benchmarks/train.py --shape mid-qwen --layers 2
    python benchmarks/train.py --peft           # llamaPeft_normBiasLora.json beside full finetuning, both ours

Over several ranks ours is measured with the model split over all of them (mp), and with the data (dp, mp 1);
transformers runs under FSDP2 and, where there is one rank, also as plain PyTorch with autocast. All hold float32
weights, compute in bfloat16, add the load-balancing loss, clip and step a fused AdamW; all let the C library give freed
memory back (train/allocator.py), which saves all of them some. transformers runs with each of its experts
implementations; the best counts. The sides take turns within a run, each in processes of its own, so that a noisy
machine slows both; ratios are of medians. Memory is each rank's peak RssAnon, in a process that does nothing else.
"""

import argparse
import multiprocessing
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from machine import cpu_name, free_port, rss_anon

IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies an expert's matrices for every token that chose it
OURS = "accessory"
BALANCE_WEIGHT, CLIP_GRAD, LR = 0.1, 2.0, 1e-5


@dataclass(frozen=True)
class Work:
    """What a step is made of: a model, and examples over all ranks."""

    shape: str
    layers: int
    rows: int
    length: int
    checkpointing: bool
    implementations: tuple[str, ...]  # of transformers' experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4, help="examples of a step, over all ranks")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again, on both sides")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--peft", action="store_true", help="compare finetuning with adapters to full finetuning")
    parser.add_argument("--shape", choices=("mid", "mid-qwen"), default="mid", help="a shape of benchmarks/mid.py")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--layers", type=int, default=4, help="of the shape")
    arguments = parser.parse_args()
    import transformers

    print(f"{cpu_name()}, 2 threads in all, {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}")
    tokens = arguments.rows * arguments.length
    print(f"{arguments.shape} with {arguments.layers} layers, ", end="")
    print(f"steps of {arguments.rows} x {arguments.length} tokens, checkpointing {arguments.checkpointing}\n")
    print(f"{'ranks':>5} {'':22}{'seconds':>9}{'tokens/s':>10}{'peak MB per rank':>18}")
    for ranks in arguments.ranks:
        work = Work(
            arguments.shape,
            arguments.layers,
            arguments.rows,
            arguments.length,
            arguments.checkpointing,
            tuple(arguments.implementations),
        )
        if arguments.peft:
            for mp_size in range(ranks, 0, -1):
                compare_peft(mp_size, ranks, work, arguments.rounds)
            continue
        ways = ("fsdp2", "autocast") if ranks == 1 else ("fsdp2",)
        theirs = [f"{implementation} {way}" for way in ways for implementation in work.implementations]
        memory = {side: peak_memory(side, ranks, work) for side in theirs}
        for mp_size in range(ranks, 0, -1):
            ours = f"{OURS} mp {mp_size}"
            memory[ours] = peak_memory(ours, ranks, work)
            # Two sides at a time fit the memory.
            rounds = [compare(ours, way, ranks, work, arguments.rounds) for way in ways]
            ratios = {}
            for speeds in rounds:
                own = statistics.median(speeds[ours])
                for side, times in speeds.items():
                    median, peak = statistics.median(times), max(memory[side]) / 1e6
                    ratios[side] = median / own
                    print(f"{ranks:>5} {side:22}{median:>9.2f}{tokens / median:>10.0f}{peak:>18,.0f}", flush=True)
            best = min(theirs, key=lambda side: ratios[side])
            leanest = min(theirs, key=lambda side: max(memory[side]))
            share = max(memory[ours]) / max(memory[leanest])
            print(
                f"{ranks:>5} {ratios[best]:.2f} x the speed of {best}, {share:.2f} x the memory of {leanest}\n",
                flush=True,
            )


def compare(ours: str, way: str, ranks: int, work: Work, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step by side; the sides take turns."""
    our_side, their_side = Side(ours, ranks, work), Side(way, ranks, work)
    theirs = [f"{implementation} {way}" for implementation in work.implementations]
    times: dict[str, list[float]] = {name: [] for name in (ours, *theirs)}
    try:
        for round_number in range(rounds + 1):
            for name in theirs:
                for side, command in ((their_side, name), (our_side, ours)):
                    elapsed = side.step(command)
                    if round_number:  # the first round warms up
                        times[command].append(elapsed)
    finally:
        our_side.close()
        their_side.close()
    return times


def compare_peft(mp_size: int, ranks: int, work: Work, rounds: int) -> None:
    """Print time and memory of a step with adapters and of a full one; the sides take turns."""
    names = (f"{OURS} mp {mp_size}", f"{OURS} mp {mp_size} peft")
    sides = [Side(name, ranks, work) for name in names]
    times: dict[str, list[float]] = {name: [] for name in names}
    try:
        for round_number in range(rounds + 1):
            for name, side in zip(names, sides, strict=True):
                elapsed = side.step(name)
                if round_number:
                    times[name].append(elapsed)
        peaks = {name: max(side.peaks()) / 1e6 for name, side in zip(names, sides, strict=True)}
    finally:
        for side in sides:
            side.close()
    for name in names:
        median = statistics.median(times[name])
        print(
            f"{ranks:>5} {name:20}{median:>9.2f}{work.rows * work.length / median:>10.0f}{peaks[name]:>18,.0f}",
            flush=True,
        )
    full, peft = names
    slower = statistics.median(times[peft]) / statistics.median(times[full])
    print(f"{ranks:>5} adapters: {slower:.2f} x the time, {peaks[peft] / peaks[full]:.2f} x the memory\n", flush=True)


def peak_memory(side: str, ranks: int, work: Work) -> list[int]:
    """Peak private memory of each rank over three steps, in bytes."""
    processes = Side(side if side.startswith(OURS) else side.split()[1], ranks, work)
    try:
        for _ in range(3):
            processes.step(side)
        return processes.peaks()
    finally:
        processes.close()


class Side:
    """The ranks of one side, each a process that waits for commands."""

    def __init__(self, kind: str, ranks: int, work: Work) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(ranks):
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, kind, rank, ranks, port, work), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)
        self._ask("ready")

    def step(self, command: str) -> float:
        """Seconds of the slowest rank."""
        return max(self._ask(command))

    def peaks(self) -> list[int]:
        return self._ask("peak")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _ask(self, command: str) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(command)
        return [pipe.recv() for pipe in self.pipes]


def serve(pipe: Connection, kind: str, rank: int, ranks: int, port: int, work: Work) -> None:
    """A rank: builds its model, then steps when told to."""
    from accessory.train.allocator import return_freed_memory

    return_freed_memory()
    torch.set_num_threads(2 // ranks)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    peak, ours = Peak(), kind.startswith(OURS)
    mp_size = int(kind.split()[2]) if ours else 1
    rows, dp_rank = work.rows * mp_size // ranks, rank // mp_size
    step = our_step(work, mp_size, peft=kind.endswith("peft")) if ours else their_step(work, kind)
    generator = torch.Generator().manual_seed(dp_rank)
    while True:
        command = pipe.recv()
        if command == "ready":
            pipe.send(None)
        elif command == "peak":
            pipe.send(peak.value)
        else:
            tokens = torch.randint(3, 32000, (rows, work.length), generator=generator)
            dist.barrier()
            start = time.perf_counter()
            step(tokens, command)
            pipe.send(time.perf_counter() - start)


def our_step(work: Work, mp_size: int, *, peft: bool) -> Callable[[torch.Tensor, str], None]:
    from mid import SHAPES

    from accessory.config import PeftArgs
    from accessory.model.factory import build_transformer
    from accessory.model.meta import MetaModel
    from accessory.parallel.state import ParallelState
    from accessory.train.init import init_weights
    from accessory.train.optim import adamw
    from accessory.train.recompute import recompute_activations
    from accessory.train.sharding import device_mesh, shard_model
    from accessory.train.trainer import train_step

    state = ParallelState.init(mp_size, "cpu")
    adapters = PeftArgs(lora_rank=16, bias_tuning=True, norm_tuning=True) if peft else None
    args = SHAPES[work.shape].replace(n_layers=work.layers, load_balancing_weight=BALANCE_WEIGHT, peft=adapters)
    dtypes = {"dtype": torch.bfloat16, "trained_dtype": torch.float32}  # as build_for_training has them
    llma = build_transformer(args, state, **dtypes, device=torch.device("meta"))
    recompute_activations(llma, "full" if work.checkpointing else "none")
    shard_model(llma, device_mesh(state), data_parallel="fsdp", compute_dtype=torch.bfloat16)
    llma.to_empty(device="cpu")
    init_weights(llma, seed=0)
    model = MetaModel(llma, tokenizer=None).train()  # type: ignore[arg-type]
    optimizer = adamw(model.named_parameters(), lr=LR, weight_decay=0.0)

    def step(tokens: torch.Tensor, _: str) -> None:
        train_step(model, optimizer, [(tokens, tokens)], lr=LR, clip_grad=CLIP_GRAD)

    return step


def their_step(work: Work, way: str) -> Callable[[torch.Tensor, str], None]:
    from mid import SHAPES, transformers_config
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    args = SHAPES[work.shape].replace(n_layers=work.layers)
    config = transformers_config(args, router_aux_loss_coef=BALANCE_WEIGHT, output_router_logits=True, use_cache=False)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if work.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if way == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(tokens: torch.Tensor, command: str) -> None:
        model.set_experts_implementation(command.split()[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Peak:
    """The largest RssAnon of this process since it was made, looked at every 5 ms."""

    def __init__(self) -> None:
        self.value = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.value = max(self.value, rss_anon())
            time.sleep(0.005)


if __name__ == "__main__":
    main()
