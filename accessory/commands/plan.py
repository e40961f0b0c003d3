"""The command plan: how a model may be trained on so many devices."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any, get_args

from accessory.arguments import given_path
from accessory.commands.output import show
from accessory.train.options import OptimizerName, Precision

if TYPE_CHECKING:
    from accessory.config import ModelArgs
    from accessory.train.planner import Planned

_SHOWN = 5
_TOKENS = 2**20  # of a micro-batch; which experts take each of them is gone through, in seconds for 2**17


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    plan = commands.add_parser(
        "plan",
        help="say how a model may be trained on, or served from, so many GPUs",
        description="Compute, for every layout that the sizes allow, the memory of the fullest rank, what a step sends "
        "and about how long it takes; print the fastest that fit. Nothing is loaded and no GPU is asked.",
        epilog="example: accessory plan config.json --gpus 64 --memory 80",
    )
    plan.add_argument("model", type=given_path, metavar="MODEL|CONFIG", help="checkpoint folder, or a config file")
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in all")
    plan.add_argument("--memory", type=float, required=True, metavar="GIB", help="of each GPU, in GiB")
    help_text = "what trains, or serve: answer requests (default full)"
    plan.add_argument("--task", choices=("full", "lora", "qlora", "serve"), default="full", help=help_text)
    plan.add_argument("--lora_rank", type=int, default=16, metavar="R", help="of lora and qlora (default 16)")
    help_text = "tokens of a row, or of a served dialogue (default 4096)"
    plan.add_argument("--max_words", type=int, default=4096, help=help_text)
    plan.add_argument("--slots", type=int, default=16, help="of serve: answers written at once (default 16)")
    plan.add_argument("--batch_size", type=int, default=1, help="rows of a micro-batch (default 1)")
    plan.add_argument("--accum_iter", type=int, default=1, help="micro-batches of a step (default 1)")
    plan.add_argument("--optimizer", choices=get_args(OptimizerName), default="adamw", help="default adamw")
    plan.add_argument("--precision", choices=get_args(Precision), default="bf16", help="default bf16")
    plan.add_argument("--gpus_per_host", type=int, default=8, metavar="N", help="default 8")
    plan.add_argument("--tflops", type=float, default=400.0, help="10^12 operations/s that a GPU reaches (default 400)")
    plan.add_argument("--fast", type=float, default=300.0, help="GB/s that a GPU sends within a host (default 300)")
    plan.add_argument("--interconnect", type=float, default=40.0, help="GB/s that it sends to others (default 40)")
    help_text = "of serve: GB/s that a GPU reads of its memory (default 3000)"
    plan.add_argument("--bandwidth", type=float, default=3000.0, help=help_text)
    plan.add_argument("--json", action="store_true", help="print all that fit, as JSON")
    plan.set_defaults(run=_plan, alone="accessory plan is no work for several ranks: start one process")


def _plan(arguments: argparse.Namespace) -> None:
    from accessory.train.memory import Layout
    from accessory.train.planner import Rates, described, options_of, plan

    counts = ("gpus", "memory", "max_words", "batch_size", "accum_iter", "gpus_per_host", "slots", "lora_rank")
    for name in (*counts, "tflops", "fast", "interconnect", "bandwidth"):
        if not 0 < getattr(arguments, name) < 2**31:
            raise ValueError(f"--{name} is {getattr(arguments, name)}: give a number above 0")
    if arguments.task != "serve" and (tokens := arguments.max_words * arguments.batch_size) > _TOKENS:
        raise ValueError(f"--max_words x --batch_size is {tokens:,} tokens: at most {_TOKENS:,} are planned")
    args = _args(arguments)
    if arguments.task == "serve":
        _plan_serving(arguments, args)
        return
    common = Layout(
        precision=arguments.precision,
        optimizer=arguments.optimizer,
        rows=arguments.batch_size,
        length=arguments.max_words,
        accum=arguments.accum_iter,
    )
    rates = Rates(
        flops=arguments.tflops * 1e12,
        fast=arguments.fast * 1e9,
        slow=arguments.interconnect * 1e9,
        per_host=arguments.gpus_per_host,
    )
    found = plan(args, arguments.gpus, arguments.memory * 2**30, common, rates)
    if arguments.json:
        show(json.dumps([_record(own) for own in found], indent=1) + "\n")
        return
    for own in found[:_SHOWN]:
        show(f"{described(own.layout)}: {_parts(own.memory)}\n")
        show(
            f"  a step sends {own.fast / 1e9:.3g} GB within a host, {own.slow / 1e9:.3g} GB to others; about "
            f"{own.seconds:.3g} s, {own.tokens_per_s:,.0f} tokens/s\n"
        )
    best = options_of(found[0].layout) | {"optimizer": arguments.optimizer}
    if arguments.task != "full":
        best["lora_rank"] = arguments.lora_rank
    if arguments.task == "qlora":
        best["quant"] = "nf4"
    flags = " ".join(f"--{name} {value}" for name, value in best.items())
    show(f"{_launch(arguments)} --pretrained_path {_model(arguments)} --data_config DATA.yaml {flags}\n")


def _plan_serving(arguments: argparse.Namespace, args: "ModelArgs") -> None:
    from accessory.train.precision import COMPUTE_DTYPES
    from accessory.train.serving import ServingRates, described, plan_serving, serve_options

    found = plan_serving(
        args,
        arguments.gpus,
        arguments.memory * 2**30,
        slots=arguments.slots,
        length=arguments.max_words,
        dtype=COMPUTE_DTYPES[arguments.precision],
        per_host=arguments.gpus_per_host,
        rates=ServingRates(read=arguments.bandwidth * 1e9, fast=arguments.fast * 1e9),
    )
    if arguments.json:
        records = [
            {
                **serve_options(own.server),
                "servers": own.servers,
                "memory_bytes": {**own.memory._asdict(), "total": own.memory.total},
                "sent_bytes": own.sent,
                "step_seconds": own.seconds,
                "tokens_per_s": own.tokens_per_s,
            }
            for own in found
        ]
        show(json.dumps(records, indent=1) + "\n")
        return
    best = {own.server.quant: own for own in reversed(found)}  # quality is for the reader to weigh
    for own in (own for own in found if best[own.server.quant] is own):
        times = f"{own.servers} times " if own.servers > 1 else ""
        show(f"{times}{described(own.server)}: {_parts(own.memory)}\n")
        show(
            f"  {own.server.slots} tokens send {own.sent / 1e6:.3g} MB and take about {own.seconds * 1e3:.3g} ms, "
            f"{own.tokens_per_s:,.0f} tokens/s in all\n"
        )
    flags = " ".join(f"--{name} {value}" for name, value in serve_options(found[0].server).items())
    show(f"run: accessory serve {_model(arguments)} {flags}\n")


def _launch(arguments: argparse.Namespace) -> str:
    """The beginning of the command that trains, on one host or on several."""
    own = arguments.gpus
    if own > arguments.gpus_per_host:
        own = math.gcd(own, arguments.gpus_per_host)  # each host starts as many
    hosts = arguments.gpus // own
    if hosts == 1:
        return f"run: accessory finetune --nproc {own}"
    meeting = "--rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500"
    return f"run on each host: torchrun --nnodes {hosts} --nproc-per-node {own} {meeting} -m accessory finetune"


def _model(arguments: argparse.Namespace) -> str:
    """Where its weights are, if that is known."""
    return str(arguments.model) if arguments.model.is_dir() else "MODEL"


def _parts(memory: Any) -> str:
    """The whole of a named tuple of bytes, and what it consists of."""
    parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in memory._asdict().items() if size)
    return f"{memory.total / 2**30:.3g} GiB ({parts})"


def _args(arguments: argparse.Namespace) -> "ModelArgs":
    from accessory.checkpoint.folder import config_files
    from accessory.checkpoint.layouts import load_args
    from accessory.config import PEFT_TYPES, QuantArgs

    (path,) = config_files([arguments.model])
    peft = arguments.task in ("lora", "qlora")
    adapters = {"lora_rank": arguments.lora_rank} if peft else None
    args = load_args([path], PEFT_TYPES[0] if peft else None, adapters)
    if args.vocab_size == -1:
        raise ValueError(f"{path} leaves vocab_size open: give a config that says it")
    if args.quant is not None and arguments.task == "full":
        raise ValueError(f"{path} is quantized, and such weights do not train: give --task qlora")
    return args.replace(quant=QuantArgs(type="nf4")) if arguments.task == "qlora" and args.quant is None else args


def _record(own: "Planned") -> dict[str, Any]:
    from accessory.train.planner import options_of

    return {
        **options_of(own.layout),
        "data_parallel_size": own.layout.dp_size,
        "memory_bytes": {**own.memory._asdict(), "total": own.memory.total},
        "sent_bytes": {"fast": own.fast, "slow": own.slow},
        "step_seconds": own.seconds,
        "tokens_per_s": own.tokens_per_s,
    }
