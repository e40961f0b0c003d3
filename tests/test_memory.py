"""What is said of memory before a run, held against what runs take."""

import argparse
import ctypes
import dataclasses
import gc
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from accessory.checkpoint.layouts import load_args
from accessory.cli import main
from accessory.commands import serve
from accessory.config import PEFT_TYPES, QUANT_FORMS, QuantArgs
from accessory.data.collate import Batch
from accessory.errors import shown_bytes
from accessory.generation.engine import PREFILL_TOKENS
from accessory.launch.memory import DeviceMemory, host_memory
from accessory.model.factory import build_transformer
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.parallel.state import ParallelState, Ranks
from accessory.train import fit
from accessory.train.build import build_for_training
from accessory.train.memory import Layout, most_bytes, state_bytes, training_memory
from accessory.train.muon import Muon, matrix_step_bytes
from accessory.train.optim import OPTIMIZERS
from accessory.train.options import FinetuneOptions
from accessory.train.planner import layouts
from accessory.train.recompute import recompute_activations
from accessory.train.serving import Server, serving_memory
from accessory.train.sharding import device_mesh
from accessory.train.trainer import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]

MODEL = {
    "dim": 384,
    "n_layers": 3,
    "n_heads": 6,
    "n_kv_heads": 2,
    "hidden_dim": 1024,
    "moe": {"num_experts": 8, "num_experts_per_tok": 2},
}
# Of which peaks are measured: large enough that pages of the interpreter and of gloo are little of them.
MEASURED = {**MODEL, "dim": 320, "n_layers": 2, "n_heads": 4, "hidden_dim": 768}
LORA = {"lora_rank": 16}
ROWS, LENGTH = 2, 512
M_MMAP_THRESHOLD = -3  # glibc's name for it (malloc.h)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list whose one number is the most that the process has of anonymous memory."""
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.001):
            most[0] = max(most[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def peak_on_rank(tokenizer: Path, configs: list[Path], layout: Layout, peft: dict[str, Any]) -> int:
    """The peak of a run of two steps, less what the process has once it has imported all.

    Args:
        configs: of a model that is trained for the imports alone, and of the one to measure.
    """
    # Freed blocks go back to the system, so that what is measured is what is there, and no holes on the heap.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    _train(tokenizer, configs[0], layout, peft)
    imported = _at_rest()
    with watched() as most:
        _train(tokenizer, configs[1], layout, peft)
    return most[0] - imported


def _at_rest() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return anonymous_bytes()


def _train(tokenizer: Path, config: Path, layout: Layout, peft: dict[str, Any]) -> None:
    state = ParallelState.init(layout.mp_size, "cpu", ep_size=layout.ep_size)
    pretrained = Pretrained.untrained(
        llama_type="mistral_peft" if peft else None,
        llama_config=config,
        tokenizer_path=tokenizer,
        max_seq_len=layout.length,
        adapters=peft,
    )
    llma = build_for_training(
        pretrained,
        state,
        device_mesh(state),
        data_parallel=layout.data_parallel,
        compute_dtype=layout.dtype,
        expert_placement=layout.placement,
        before_sharding=lambda llma: recompute_activations(llma, layout.policy),
    )
    model = MetaModel(llma, pretrained.tokenizer, pretrained.llama_type).train()
    optimizer = OPTIMIZERS[layout.optimizer].build(model.named_parameters(), lr=1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(dist.get_rank() // layout.mp_size)
    tokens = torch.randint(3, llma.args.vocab_size, (layout.rows, layout.length), generator=generator)
    for _ in range(2):
        train_step(model, optimizer, [Batch(tokens, tokens)] * layout.accum, lr=1e-4, clip_grad=1.0)


# Layouts of two ranks are for `make soak`; of one and of four each is there once.
STEP = {"rows": 1, "length": 16, "optimizer": "muon"}  # so few tokens that the optimizer's step is the fullest moment
LAYOUTS = [
    (Layout(), {}),
    (Layout(**STEP), {}),
    (Layout(mp_size=2), {}),
    (Layout(dp_size=2, data_parallel="fsdp"), {}),
    (Layout(dp_size=2, data_parallel="ddp", accum=2), {}),
    (Layout(dp_size=2, ep_size=2), {}),
    (Layout(dp_size=4, ep_size=2, data_parallel="fsdp"), {}),
    (Layout(dp_size=2, policy="full", data_parallel="sdp"), {}),
    (Layout(dp_size=2, data_parallel="ddp"), LORA),
    (Layout(dp_size=2, ep_size=2, **STEP), {}),
    (Layout(mp_size=2, placement="tensor", **STEP), {}),
]


def ranks_of(layout: Layout) -> int:
    return layout.dp_size * layout.mp_size


@pytest.mark.parametrize(
    ("layout", "peft"),
    [pytest.param(*row, marks=[pytest.mark.soak] if ranks_of(row[0]) == 2 else []) for row in LAYOUTS],
)
def test_planned_memory_is_what_runs_take(
    layout: Layout, peft: dict[str, Any], ranks: Pools, small_tokenizer: Path, tmp_path: Path
) -> None:
    configs = [tmp_path / "small.json", tmp_path / "config.json"]
    for config, sizes in zip(configs, ({"dim": 48, "hidden_dim": 32}, {}), strict=True):
        config.write_text(json.dumps({**MEASURED, **sizes}))
    if layout.optimizer == "adamw":
        layout = dataclasses.replace(layout, rows=ROWS, length=LENGTH)
    layout = dataclasses.replace(layout, precision="fp32", gpu=False)
    peak = max(ranks(ranks_of(layout)).run(peak_on_rank, small_tokenizer, configs, layout, peft))
    args = Pretrained.untrained(
        llama_type="mistral_peft" if peft else None,
        llama_config=configs[1],
        tokenizer_path=small_tokenizer,
        max_seq_len=layout.length,
        adapters=peft,
    ).args
    planned = training_memory(args, layout)
    assert planned.total < most_bytes(args, layout)
    assert 0.9 <= planned.total / peak <= 1.1, (planned, peak)


def step_peaks_on_rank(cases: list[tuple[tuple[int, ...], int]]) -> list[int]:
    """Of Muon's steps of parameters of some shapes, each cut along an axis: the peak, less what there is before."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    size = dist.get_world_size()
    mesh, found = init_device_mesh("cpu", (size,)), []
    for shape, axis in cases:
        own = [length // size if number == axis else length for number, length in enumerate(shape)]
        parameter, gradient = (DTensor.from_local(torch.ones(own), mesh, [Shard(axis)]) for _ in range(2))
        parameter = nn.Parameter(parameter)
        parameter.grad = gradient
        optimizer = Muon([{"params": [parameter]}], [], lr=1e-3)
        optimizer.step()  # states are made, and what it imports is there
        before = _at_rest()
        with watched() as most:
            optimizer.step()
        found.append(most[0] - before)
    return found


def test_muon_s_step_takes_what_is_planned(ranks: Pools) -> None:
    """Of a matrix that is made whole; of experts that are dealt out anew, which are tall, and wide; of whole ones."""
    cases = [((1024, 512), 0), ((7, 512, 512), 1), ((8, 2, 1024, 384), 2), ((8, 384, 1024), 2), ((8, 384, 512), 0)]
    measured = [max(each) for each in zip(*ranks(2).run(step_peaks_on_rank, cases), strict=True)]
    for (shape, axis), peak in zip(cases, measured, strict=True):
        own = [length // 2 if number == axis else length for number, length in enumerate(shape)]
        planned = matrix_step_bytes(shape, own, [(2, axis)], gpu=False)
        assert 0.9 <= planned / peak <= 1.1, (shape, axis, planned, peak)
    # On a GPU there is an exchange: the update, what came of it, that once more since it is tall, and three on the way.
    assert matrix_step_bytes((8, 2, 1024, 384), (8, 2, 512, 384), [(2, 2)], gpu=True) == 6 * 8 * 2 * 512 * 384 * 4


def serving_peaks_on_rank(config: Path, servers: list[Server]) -> list[int]:
    """The same of servers that read prompts into all their slots."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    small = dataclasses.replace(servers[0], slots=2, length=8)
    _read(config, small)
    found = []
    for server in servers:
        before = _at_rest()
        with watched() as most:
            _read(config, server)
        found.append(most[0] - before)
    return found


@torch.no_grad()
def _read(config: Path, server: Server) -> None:
    args = load_args([config]).replace(max_seq_len=server.length, quant=server.quant)
    llma = build_transformer(args, ParallelState.single("cpu"), dtype=server.dtype)
    for parameter in llma.parameters():
        parameter.fill_(0)
    cache = llma.new_cache(server.slots, server.length, routes=True)
    lengths = [PREFILL_TOKENS // server.slots if server.length > 8 else 8] * server.slots
    llma.prefill(torch.ones(sum(lengths), dtype=torch.int64), lengths, range(server.slots), cache)


def test_planned_memory_is_what_a_server_takes(ranks: Pools, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MEASURED, "vocab_size": 384}))
    one = Server(
        mp_size=1, placement="expert", quant=None, dtype=torch.float32, slots=4, length=2 * PREFILL_TOKENS, gpu=False
    )
    servers = [
        one,
        dataclasses.replace(one, quant=QuantArgs(type="int8"), slots=16, dtype=torch.bfloat16),
    ]
    (measured,) = ranks(1).run(serving_peaks_on_rank, config, servers)
    args = load_args([config])
    planned = [serving_memory(args, server) for server in servers]
    off = [memory.total / peak for memory, peak in zip(planned, measured, strict=True)]
    assert all(0.9 <= ratio <= 1.1 for ratio in off), (off, planned, measured)


# -- what a run asks before it begins


@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        ("", {}, None),
        ("0::/", {"memory.max": 5000}, 5000),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": 6000, "memory.max": 7000}, 6000),
        ("0::/not/mounted/here", {"memory.max": 5000}, 5000),
        ("3:cpu:/x\n4:cpuset,memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": 4000}, 4000),
        ("4:memory:/a", {"memory/memory.limit_in_bytes": 9223372036854771712}, None),
    ],
)
def test_memory_of_the_host(groups: str, limits: dict[str, Any], least: int | None, tmp_path: Path) -> None:
    for name, content in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{k}": v for k, v in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n" if content else "")
    whole = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    assert host_memory(tmp_path) == (least or whole)


@pytest.mark.parametrize(
    ("memory", "flags", "level", "says"),
    [
        (16e9, "", None, ""),
        (800e6, "", "WARNING", r"a step may take .*weights 119.* MB.* host h has 800.00 MB: --grad_ckpt_policy moe "),
        (500e6, "", "WARNING", r"a step may take .*: more ranks, a smaller --max_words, or adapters"),
        (400e6, "", "ERROR", r"^the run cannot fit: weights, gradients and optimizer take 476.77 MB, and host h has "),
        (400e6, "", "ERROR", r"; what would: --optimizer adamw8bit \(.* a rank\), or --lora_rank 8 \(.* a rank\)$"),
        (90e6, "--lora_rank 8", "ERROR", r"; what would: --quant nf4 \([0-9.]+ MB a rank\), or 2 ranks that have 90.0"),
    ],
)
def test_a_run_asks_for_its_memory(
    memory: float,
    flags: str,
    level: str | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MODEL, "vocab_size": 384}))
    asked = ["--llama_config", str(config), "--data_config", "x", "--precision", "fp32", *flags.split()]
    options = FinetuneOptions.parse(asked)
    args = load_args([config], PEFT_TYPES[0] if flags else None, options.adapters)
    monkeypatch.setattr(fit, "device_memory", lambda _: DeviceMemory("host h", "h", int(memory)))
    caplog.set_level("WARNING", "accessory")

    def ask() -> None:
        fit.ask_memory(options, args, ParallelState.single("cpu"), Ranks(), per_host=1)

    if level == "ERROR":
        with pytest.raises(ValueError, match=says):
            ask()
    else:
        ask()
        assert [record.levelname for record in caplog.records] == ([level] if level else [])
        assert re.search(says, caplog.text)


@pytest.mark.parametrize(
    ("memory", "flags", "ep_size"),
    [
        # Of a layer 6 bytes of 8 x 3 x 384 x 128 numbers against 4 x 2 rows of 384 numbers of 2 bytes: 1,152 tokens.
        (16e9, "--batch_size 1 --max_words 64", 4),
        (16e9, "--batch_size 2 --max_words 1024", 1),
        (16e9, "--batch_size 1 --max_words 64 --data_parallel ddp", 4),
        (16e9, "--max_words 64 --model_parallel_size 4", 1),
        (16e9, "--max_words 64 --model_parallel_size 2 --expert_placement tensor", 2),
        (1e6, "--data_parallel ddp", 4),
    ],
)
def test_auto_is_what_the_planner_would_choose(
    memory: float, flags: str, ep_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MODEL, "vocab_size": 384, "hidden_dim": 128, "n_kv_heads": 4, "n_heads": 8}))
    asked = ["--llama_config", str(config), "--data_config", "x", "--expert_parallel_size", "auto", *flags.split()]
    options, args = FinetuneOptions.parse(asked), load_args([config])
    monkeypatch.setattr(fit, "device_memory", lambda _: DeviceMemory("host h", "h", int(memory)))
    assert fit.chosen_ep_size(options, args, torch.device("cpu"), ranks=4, per_host=4) == ep_size


def test_ranks_hold_together_what_one_would(tmp_path: Path) -> None:
    """Also where nothing divides: axes of 384 and 8 over 5 ranks."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MODEL, "vocab_size": 384}))
    args = load_args([config])
    for layout in (Layout(dp_size=5), Layout(dp_size=8, ep_size=4), Layout(dp_size=6, ep_size=2, data_parallel="fsdp")):
        parts = [state_bytes(args, layout, rank=rank) for rank in range(layout.dp_size)]
        assert tuple(map(sum, zip(*parts, strict=True))) == state_bytes(args, Layout())


# -- the planner


def test_plan_names_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MODEL, "vocab_size": 384}))
    asked = ["plan", str(config), "--gpus", "2", "--max_words", "128", "--precision", "fp32", "--memory"]
    assert main([*asked, "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(own["memory_bytes"]["total"] <= 2**29 for own in found)
    speeds = [own["tokens_per_s"] for own in found]
    assert speeds == sorted(speeds, reverse=True)
    # As docs/scaling.md has it: 4 exchanges of top-k rows of a token and layer, half of them to the other rank; of the
    # rest of the model's 3 layers, embedding, head and norms the gradients alone are summed, and sent there and back.
    spread = next(
        own
        for own in found
        if (own["expert_parallel_size"], own["data_parallel"], own["grad_ckpt_policy"]) == (2, "ddp", "none")
    )
    attention = 384 * 384 * 2 + 384 * 128 * 2
    dense = 3 * (attention + 8 * 384 + 2 * 384) + 2 * 384 * 384 + 384
    assert spread["sent_bytes"] == {"fast": 4 * 128 * 2 * 384 * 4 * 3 / 2 + 2 * dense * 4 / 2, "slow": 0}
    assert main([*asked, "0.5"]) == 0
    _, told = (
        capsys.readouterr().out.splitlines()[-1].split("run: accessory finetune --nproc 2 --pretrained_path MODEL ")
    )
    options = FinetuneOptions.parse(["--pretrained_path", "MODEL", *told.split()])
    assert {name: getattr(options, name) for name in ("expert_parallel_size", "data_parallel", "max_words")} == {
        **{name: found[0][name] for name in ("expert_parallel_size", "data_parallel")},
        "max_words": 128,
    }
    # The routers, 8 x 384, and norms are too small for codes; of a matrix muon keeps its momentum alone.
    experts, small = 3 * 8 * 3 * 384 * 1024, 3 * 8 * 384 + 7 * 384
    whole = dense + experts
    kept = {
        "adamw": 8 * whole,
        "adamw8bit": 2 * (1 + 4 / 64) * (whole - small) + 8 * small,
        "muon": 8 * whole - 4 * (3 * attention + experts),
    }
    for optimizer in OPTIMIZERS:
        assert main([*asked, "8", "--json", "--optimizer", optimizer]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert {
            own["memory_bytes"]["optimizer"]
            for own in planned
            if (own["expert_parallel_size"], own["data_parallel_size"], own["data_parallel"]) == (1, 2, "ddp")
        } == {kept[optimizer]}
    assert main([*asked, "0.01"]) == 1
    assert "no layout fits 0.01 GiB: the smallest (dp" in capsys.readouterr().err
    assert main(["plan", str(config), "--gpus", "0", "--memory", "80"]) == 1
    assert "--gpus is 0: give a number above 0" in capsys.readouterr().err
    assert main([*asked, "80", "--batch_size", "10000"]) == 1
    assert "--max_words x --batch_size is 1,280,000 tokens: at most 1,048,576 are planned" in capsys.readouterr().err
    # A folder is named, and several hosts meet.
    assert main(["plan", str(tmp_path), *asked[2:], "8", "--gpus_per_host", "1"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("run on each host: torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d ")
    assert f" -m accessory finetune --pretrained_path {tmp_path} --data_config" in told


def test_planning_makes_nothing_as_long_as_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models have positions by the million, and a rotary table of all would be gigabytes."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MODEL, "vocab_size": 384, "max_seq_len": 2**31 - 1}))
    asked = ["plan", str(config), "--gpus", "2", "--memory", "80", "--max_words"]
    assert main([*asked, "128"]) == 0
    assert main([*asked, "100000000", "--task", "serve", "--slots", "1"]) == 0
    assert "run: accessory serve MODEL " in capsys.readouterr().out


def test_plan_of_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MODEL, "vocab_size": 384}))
    asked = ["plan", str(config), "--task", "serve", "--gpus", "4", "--max_words", "128", "--slots", "5", "--memory"]
    assert main([*asked, "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(own["nproc"], own["expert_placement"]) for own in found} == {
        (1, "expert"),
        (2, "expert"),
        (2, "tensor"),
    }, "4 ranks would share 6 heads"
    assert {own.get("quant") for own in found} == {None, *QUANT_FORMS}
    assert all(own["servers"] * own["nproc"] == 4 for own in found)
    assert main(["inspect", str(config)]) == 0
    inspected = capsys.readouterr().out
    for own in found:
        # Keys and values of 3 layers in bfloat16, the 2 experts of each token, lengths, and counts of experts.
        heads = 2 // min(2, own["nproc"])
        sizes = own["memory_bytes"]
        assert sizes["cache"] == 3 * 5 * 128 * (2 * heads * 64 * 2 + 2 * 2) + 5 * 8 + 3 * 8 * 8
        if own["expert_placement"] == "expert":
            (line,) = (line for line in inspected.splitlines() if line.startswith(f"at mp {own['nproc']} "))
            assert f"{own.get('quant', 'bf16')} {shown_bytes(sizes['weights'])}" in line
    assert main([*asked, "1"]) == 0
    *_, command = capsys.readouterr().out.splitlines()
    _, told = command.split("run: accessory ")
    parser = argparse.ArgumentParser()
    serve.add_commands(parser.add_subparsers())
    given = parser.parse_args(told.split())
    assert (given.ranks, given.slots, given.max_seq_len) == (found[0]["nproc"], 5, 128)
    assert main([*asked, "0.001"]) == 1
    assert "no server fits 0.00 GiB: the smallest (2 ranks " in capsys.readouterr().err


def test_no_layout_is_planned_that_the_optimizer_refuses(tmp_path: Path) -> None:
    """Of rows of 192 numbers each of 2 ranks would have 96, and blocks of 8-bit moments have 64."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**MODEL, "vocab_size": 384, "hidden_dim": 192}))
    args = load_args([config])
    placements = {
        optimizer: {own.placement for own in layouts(args, 2, Layout(optimizer=optimizer)) if own.mp_size == 2}
        for optimizer in OPTIMIZERS
    }
    assert placements == {"adamw": {"expert", "tensor"}, "muon": {"expert", "tensor"}, "adamw8bit": {"expert"}}
    # Nor does such a run load a model first.
    flags = "--model_parallel_size 2 --expert_placement tensor --optimizer adamw8bit"
    options = FinetuneOptions.parse(["--llama_config", str(config), "--data_config", "x", *flags.split()])
    with pytest.raises(
        ValueError, match=r"^--optimizer adamw8bit has blocks of 64 numbers, and of a parameter of shape "
    ):
        fit.ask_memory(options, args, ParallelState.single("cpu"), Ranks(None, 0, 2), per_host=2)
