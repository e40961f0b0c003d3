"""A training step beside transformers: tokens per second and peak memory of every rank, on the same model and data.

    python benchmarks/train.py                  # shape 'mid' with 4 layers, bfloat16, 1 rank x 2 threads, 2 x 1
    python benchmarks/train.py --shape mid-qwen --layers 2
    python benchmarks/train.py --peft           # llamaPeft_normBiasLora.json beside full finetuning, both ours
    python benchmarks/train.py --ranks 4 --layers 2 --ep 4 --profile

With --ep experts are spread over data-parallel ranks, and held against the same ranks' data parallelism (fsdp), model
parallelism, and transformers' own expert parallelism: also what all ranks sent one another in a step, by the counter of
the loopback device, and of what the fullest one's memory consists.

Over several ranks ours is measured with the model split over all of them (mp), and with the data (dp, mp 1);
transformers runs under FSDP2 and, where there is one rank, also as plain PyTorch with autocast. All hold float32
weights, compute in bfloat16, add the load-balancing loss, clip and step a fused AdamW; all let the C library give freed
memory back (train/allocator.py), which saves all of them some. transformers runs with each of its experts
implementations; the best counts. The sides take turns within a run, each in processes of its own, so that a noisy
machine slows both; ratios are of medians. Memory is each rank's peak RssAnon, in a process that does nothing else.
"""

import argparse
import itertools
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from machine import cpu_name, free_port, loopback_bytes, rss_anon

IMPLEMENTATIONS = ("eager", "grouped_mm")  # batched_mm copies an expert's matrices for every token that chose it
OURS = "accessory"
BALANCE_WEIGHT, CLIP_GRAD, LR = 0.1, 2.0, 1e-5
# How rows of tokens come to their experts' order and back, but for the sum of each token's.
MOVES = ("aten::sort", "aten::argsort", "aten::searchsorted", "aten::index", "aten::index_copy_")


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
    parser.add_argument("--ep", type=int, help="compare experts spread over so many ranks to other layouts")
    parser.add_argument("--profile", action="store_true", help="with --ep: what a step's time goes to")
    arguments = parser.parse_args()
    import transformers

    print(f"{cpu_name()}, 2 threads in all, {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, {time.strftime('%Y-%m-%d')}")
    tokens = arguments.rows * arguments.length
    print(f"{arguments.shape} with {arguments.layers} layers, ", end="")
    print(f"steps of {arguments.rows} x {arguments.length} tokens, checkpointing {arguments.checkpointing}\n")
    if arguments.ep is None:
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
        if arguments.ep is not None:
            compare_layouts(ranks, arguments.ep, work, arguments.rounds, profiles=arguments.profile)
            continue
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
    found = in_turns(names, ranks, work, rounds)
    for name, own in found.items():
        tokens = work.rows * work.length / own.median
        print(f"{ranks:>5} {name:20}{own.median:>9.2f}{tokens:>10.0f}{own.fullest.peak / 1e6:>18,.0f}", flush=True)
    full, peft = found.values()
    less = peft.fullest.peak / full.fullest.peak
    print(f"{ranks:>5} adapters: {peft.median / full.median:.2f} x the time, {less:.2f} x the memory\n", flush=True)


def compare_layouts(ranks: int, ep_size: int, work: Work, rounds: int, *, profiles: bool) -> None:
    """Print time, bytes sent and memory with spread experts and without, two layouts at a time.

    Gradients are as large as the weights, and come and go; "rest" are activations, what is gathered or exchanged, and
    the process itself.
    """
    ours = f"{OURS} mp 1 ep {ep_size}"
    theirs = [f"{implementation} ep {ep_size}" for implementation in work.implementations]
    print(f"{ranks} ranks of {max(1, 2 // ranks)} threads; sent by all ranks in a step; MB of the fullest rank")
    columns = ("seconds", "tokens/s", "MB sent", "peak", "weights", "experts", "gradients", "optimizer", "rest")
    print(f"{'':24}" + "".join(f"{name:>10}" for name in columns))
    for other in (f"{OURS} mp 1", f"{OURS} mp {ranks}", *theirs):
        found = in_turns((other, ours), ranks, work, rounds, profiled=ours if profiles and other in theirs else None)
        for name, own in found.items():
            full = own.fullest
            rest = full.peak - 2 * full.weights - full.optimizer
            sizes = (statistics.median(own.sent), full.peak, full.weights, full.experts, full.weights, full.optimizer)
            print(f"{name:24}{own.median:>10.2f}{work.rows * work.length / own.median:>10.0f}", end="")
            print("".join(f"{size / 1e6:>10,.1f}" for size in (*sizes, rest)), flush=True)
        print(f"{ours}: {found[ours].median / found[other].median:.2f} x the time of {other}\n", flush=True)
        for line in found[ours].profile:
            print(line, flush=True)


class Parts(NamedTuple):
    """Of what a rank's memory consists, in bytes: its peak, and tensors that stay; experts are among the weights."""

    peak: int
    weights: int
    experts: int
    optimizer: int


@dataclass
class Measured:
    """What a side took: seconds of each step, bytes sent in it by all ranks, and each rank's memory."""

    times: list[float]
    sent: list[int]
    parts: list[Parts]
    profile: list[str]

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def fullest(self) -> Parts:
        return max(self.parts)


def in_turns(
    names: tuple[str, ...], ranks: int, work: Work, rounds: int, *, profiled: str | None = None
) -> dict[str, Measured]:
    """Sides with processes of their own, which step one after the other."""
    sides = {name: Side(name if name.startswith(OURS) else name.partition(" ")[2], ranks, work) for name in names}
    found = {name: Measured([], [], [], []) for name in names}
    try:
        for round_number in range(rounds + 1):
            for name, side in sides.items():
                before = loopback_bytes()
                elapsed = side.step(name)
                if round_number:  # the first round warms up
                    found[name].times.append(elapsed)
                    found[name].sent.append(loopback_bytes() - before)
        for name, side in sides.items():
            found[name].parts = side.parts()
        if profiled is not None:
            found[profiled].profile = sides[profiled].profile()
    finally:
        for side in sides.values():
            side.close()
    return found


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
        return [parts.peak for parts in self.parts()]

    def parts(self) -> list[Parts]:
        return self._ask("parts")

    def profile(self) -> list[str]:
        """Lines on one more step of the first rank."""
        return self._ask("profile")[0]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _ask(self, command: str) -> list[Any]:
        for pipe in self.pipes:
            pipe.send(command)
        return [pipe.recv() for pipe in self.pipes]


class Trained(NamedTuple):
    """A model that is trained: how it steps on rows of tokens, and where its memory is."""

    step: Callable[[torch.Tensor, str], None]
    parameters: dict[str, torch.Tensor]
    optimizer: torch.optim.Optimizer

    def parts(self, peak: int) -> Parts:
        state = (value for own in self.optimizer.state.values() for value in own.values() if torch.is_tensor(value))
        weights = {name: local_bytes(own) for name, own in self.parameters.items()}
        experts = sum(size for name, size in weights.items() if ".experts." in name)
        return Parts(peak, sum(weights.values()), experts, sum(map(local_bytes, state)))


def local_bytes(tensor: Any) -> int:
    """Of a rank's part of a DTensor, or of a tensor."""
    size: int = tensor.to_local().nbytes if hasattr(tensor, "to_local") else tensor.nbytes
    return size


def serve(pipe: Connection, kind: str, rank: int, ranks: int, port: int, work: Work) -> None:
    """A rank: builds its model, then steps when told to."""
    from accessory.train.allocator import return_freed_memory

    return_freed_memory()
    torch.set_num_threads(max(1, 2 // ranks))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    peak, ours = Peak(), kind.startswith(OURS)
    words = kind.split()
    sizes = {name: int(words[words.index(name) + 1]) if name in words else 1 for name in ("mp", "ep")}
    mp_size = sizes["mp"] if ours else 1
    rows, dp_rank = work.rows * mp_size // ranks, rank // mp_size
    trained = (
        our_model(work, mp_size, sizes["ep"], peft="peft" in words) if ours else their_model(work, kind, sizes["ep"])
    )
    generator = torch.Generator().manual_seed(dp_rank)
    while True:
        command = pipe.recv()
        if command == "ready":
            pipe.send(None)
        elif command == "parts":
            pipe.send(trained.parts(peak.value))
        else:
            tokens = torch.randint(3, 32000, (rows, work.length), generator=generator)
            dist.barrier()
            if command == "profile":
                pipe.send(profile_of(lambda tokens=tokens: trained.step(tokens, kind)))
                continue
            start = time.perf_counter()
            trained.step(tokens, command)
            pipe.send(time.perf_counter() - start)


def profile_of(step: Callable[[], None]) -> list[str]:
    """What a step's time goes to by operations: the ways of rows first, then the others that take most."""
    from torch.profiler import ProfilerActivity, profile

    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    whole = (time.perf_counter() - start) * 1e6
    own = {event.key: event.self_cpu_time_total for event in profiled.key_averages()}
    moves = {name: time for name, time in own.items() if name in MOVES}
    lines = [f"sort, permute and unpermute: {sum(moves.values()) / whole:.1%} of {whole / 1e6:.2f} s"]
    others = sorted(own.keys() - moves.keys(), key=lambda name: -own[name])[:20]
    return lines + [f"{own[name] / whole:>8.1%} {name}" for name in (*sorted(moves), *others)]


def our_model(work: Work, mp_size: int, ep_size: int, *, peft: bool) -> Trained:
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

    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
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

    return Trained(step, dict(model.named_parameters()), optimizer)


def their_model(work: Work, way: str, ep_size: int) -> Trained:
    from mid import SHAPES, transformers_config
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    args = SHAPES[work.shape].replace(n_layers=work.layers)
    config = transformers_config(args, router_aux_loss_coef=BALANCE_WEIGHT, output_router_logits=True, use_cache=False)
    torch.manual_seed(0)
    if ep_size > 1:
        model = spread_by_them(config, ep_size)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    if work.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if way == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    parameters = dict(model.named_parameters())
    meshes = [list(group) for _, group in itertools.groupby(sorted(parameters.values(), key=mesh_of), key=mesh_of)]
    settings: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW([{"params": own} for own in meshes], **settings)

    def step(tokens: torch.Tensor, command: str) -> None:
        model.set_experts_implementation(command.split()[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        clip(meshes)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Trained(step, parameters, optimizer)


def spread_by_them(config: Any, ep_size: int) -> Any:
    """transformers' model with experts spread, which only from_pretrained makes."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp(dir=".") if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    try:
        if dist.get_rank() == 0:
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder[0])
        dist.barrier()
        spread = DistributedConfig(
            fsdp_size=dist.get_world_size(),
            ep_size=ep_size,
            ep_implementation="all_to_all",
            fsdp_mixed_precision=True,
        )
        how = {"distributed_config": spread, "dtype": torch.float32, "experts_implementation": "grouped_mm"}
        model = AutoModelForCausalLM.from_pretrained(folder[0], config=config, **how).train()
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(folder[0])
    return model


def mesh_of(parameter: torch.Tensor) -> str:
    """Which ranks a parameter lies on."""
    return str(getattr(parameter, "device_mesh", ""))


def clip(meshes: list[list[torch.Tensor]]) -> None:
    """Scale gradients to a norm, which torch takes of parameters of one mesh alone."""
    norms = []
    for own in meshes:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in own])
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    norm = torch.stack(norms).norm()
    for own in meshes:
        torch.nn.utils.clip_grads_with_norm_(own, CLIP_GRAD, norm)


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
