"""Commands about checkpoint folders: tiny, split, merge, export-adapter, quantize and inspect."""

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

from accessory.arguments import add_threads_argument, given_destination, given_name, given_path, given_seed
from accessory.commands.output import show
from accessory.config.layouts import GGUF_TYPES, LAYOUT_NAMES
from accessory.config.quant import DEFAULT_FORM, QuantArgs, add_quant_flags
from accessory.serve.options import DTYPES

_TO = f"{', '.join(LAYOUT_NAMES[:-1])} or {LAYOUT_NAMES[-1]} (default {LAYOUT_NAMES[0]})"


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the commands."""
    tiny = commands.add_parser(
        "tiny",
        help="train a tiny Mixtral on Python's own documentation",
        description="Train a tiny Mixtral (4 layers, 8 experts) and its tokenizer on the documentation that ships with "
        "Python, and write them as the official release does: consolidated.00.pth, params.json, tokenizer.model.",
        epilog="example: accessory tiny --out runs/tiny",
    )
    tiny.add_argument("--out", type=given_path, required=True, help="folder to write, e.g. runs/tiny")
    tiny.add_argument("--steps", type=int, default=None, help="optimizer steps (default: the full recipe)")
    tiny.add_argument("--seed", type=given_seed, default=0, help="of the weights and of the order (default 0)")
    add_threads_argument(tiny)
    tiny.set_defaults(run=_tiny)

    split = commands.add_parser(
        "split",
        help="write a checkpoint as N shards, ready to load",
        description="Write a checkpoint as N shards, tensor by tensor, without holding more than one of them. A folder "
        "of any number of shards loads on any number of ranks; as many shards as ranks are read fastest.",
        epilog="example: accessory split runs/tiny runs/tiny/converted --mp 8",
    )
    split.add_argument("source", type=given_path, help="folder with consolidated.00.pth, or with other shards")
    split.add_argument("--mp", type=int, default=8, help="number of shards (default 8)")
    add_config_argument(split)
    split.set_defaults(run=_split)

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint in another form",
        description="Write a checkpoint in another form, tensor by tensor: accessory's own shards (base or sparse), "
        "Mistral's, Hugging Face's or llama.cpp's GGUF. Any folder that loads may be the source.",
        epilog="example: accessory convert Mixtral-8x7B-Instruct-v0.1 converted --to accessory --mp 8",
    )
    convert.add_argument("source", type=given_path, help="checkpoint folder of any form")
    convert.add_argument("--to", choices=LAYOUT_NAMES, default=LAYOUT_NAMES[0], metavar="FORM", help=_TO)
    convert.add_argument("--mp", type=int, default=None, help="number of shards of accessory's forms (default 1)")
    convert.add_argument(
        "--dtype", choices=DTYPES[1:], default=None, help="of all weights (default: each keeps its own)"
    )
    convert.add_argument(
        "--type",
        choices=GGUF_TYPES,
        default=None,
        metavar="TYPE",
        help=f"of gguf's matrices: {', '.join(GGUF_TYPES)} (default: that of each one's dtype)",
    )
    convert.add_argument(
        "--safetensors", action="store_true", help="accessory's shards as safetensors files, without pickle"
    )
    convert.add_argument(
        "--overwrite", action="store_true", help="exchange a checkpoint that is there for the new one, once it is whole"
    )
    add_config_argument(convert)
    convert.set_defaults(run=_convert)

    diff = commands.add_parser(
        "diff",
        help="say whether two checkpoints are the same model",
        description="Compare two checkpoints of any forms: of each group of tensors the largest absolute difference. "
        "The exit code is 1 where they differ.",
        epilog="example: accessory diff runs/tiny runs/tiny/converted",
    )
    diff.add_argument("first", type=given_path, help="checkpoint folder")
    diff.add_argument("second", type=given_path, help="the other")
    diff.add_argument("--atol", type=_atol, default=0.0, metavar="X", help="what does not count (default 0)")
    diff.set_defaults(run=_diff)

    merge = commands.add_parser(
        "merge",
        help="write a base and its adapter as one plain checkpoint",
        description="Add an adapter's updates to the weights of its base, matrix by matrix, and write the sum as a "
        "plain checkpoint; says by how much each group of weights moved.",
        epilog="example: accessory merge runs/tiny/converted runs/capitals/epoch59 runs/merged",
    )
    merge.add_argument("base", type=given_path, help="checkpoint folder that the adapter was trained on")
    merge.add_argument("adapter", type=given_path, help="folder of a finetuning run with an adapter, or of peft's")
    merge.add_argument("--to", choices=LAYOUT_NAMES, default=LAYOUT_NAMES[0], metavar="FORM", help=_TO)
    add_config_argument(merge, "the adapter's")
    merge.set_defaults(run=_merge)

    export = commands.add_parser(
        "export-adapter",
        help="write an adapter as a folder of Hugging Face's peft",
        description="Write an adapter as adapter_model.safetensors and adapter_config.json, which Hugging Face's peft "
        "loads above the base in transformers.",
        epilog="example: accessory export-adapter runs/capitals/epoch59 runs/capitals-hf",
    )
    export.add_argument("adapter", type=given_path, help="folder of a finetuning run with llama_type mistral_peft")
    add_config_argument(export)
    export.set_defaults(run=_export_adapter)

    quantize = commands.add_parser(
        "quantize",
        help="write a checkpoint with its matrices in 8 or 4 bits",
        description="Write a checkpoint with the matrices of its attention and experts in 8 or 4 bits (nf4 unless told "
        "otherwise), so that loading needs no further work.",
        epilog="example: accessory quantize runs/tiny/converted runs/tiny/int4 --quant int4 --calibrate README.md",
    )
    quantize.add_argument("source", type=given_path, help="checkpoint folder")
    add_quant_flags(quantize, always=True)
    quantize.add_argument(
        "--calibrate", type=given_path, metavar="FILE", help="text file: int4 is then rounded with an eye on its inputs"
    )
    add_config_argument(quantize)
    quantize.set_defaults(run=_quantize)

    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint folder holds",
        description="Say what a checkpoint folder holds: its form, sizes, dtypes, the bytes that each rank would load, "
        "and what is missing or odd. Every shard's tensors are held against the config.",
        epilog="example: accessory inspect runs/tiny/converted --check-values",
    )
    inspect.add_argument("folder", type=given_path, help="checkpoint folder; or a config.json or params.json alone")
    inspect.add_argument("--verify", action="store_true", help="hold all files against the sums in manifest.json")
    inspect.add_argument(
        "--check-values", action="store_true", help="read all weights: NaN, infinity, unlike copies are errors"
    )
    add_config_argument(inspect)
    inspect.set_defaults(run=_inspect)

    for command in (split, convert, merge, export, quantize):
        command.add_argument("destination", type=given_destination, help="folder to write")
    for command in (tiny, split, convert, diff, merge, export, quantize, inspect):
        # Several would write the same folder at once.
        command.set_defaults(alone=f"{command.prog} works in one process: start it without torchrun")


def add_config_argument(parser: argparse.ArgumentParser, whose: str = "the folder's") -> None:
    """Give a command the argument --llama_config."""
    help_text = f"config files in place of {whose} own, the last rules"
    parser.add_argument("--llama_config", "--llama-config", nargs="+", type=given_name, help=help_text)


def _tiny(arguments: argparse.Namespace) -> None:
    from accessory.tools.tiny import make_tiny

    steps = {} if arguments.steps is None else {"steps": arguments.steps}
    report = make_tiny(arguments.out, seed=arguments.seed, **steps)
    lightest = report.expert_share.min().item()
    show(
        f"wrote {arguments.out}: {report.parameters:,} parameters, loss {report.loss:.2f} on documents that were held "
        f"back from the training, lightest expert {lightest:.1%} of its layer's tokens\n"
    )


def _split(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.convert import split

    split(arguments.source, arguments.destination, mp=arguments.mp, llama_config=arguments.llama_config)
    show(f"wrote {arguments.destination}\n")


def _convert(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.convert import convert
    from accessory.model import dtypes

    try:
        convert(
            arguments.source,
            arguments.destination,
            to=arguments.to,
            mp=arguments.mp,
            dtype=None if arguments.dtype is None else dtypes.DTYPES[arguments.dtype],
            type=arguments.type,
            safetensors=arguments.safetensors,
            overwrite=arguments.overwrite,
            llama_config=arguments.llama_config,
        )
    except FileExistsError as error:
        if arguments.overwrite or not _is_replaceable(arguments.destination):
            raise
        raise FileExistsError(f"{error}, or give --overwrite") from None
    show(f"wrote {arguments.destination}\n")


def _is_replaceable(folder: Path) -> bool:
    from accessory.checkpoint.convert import check_replaceable

    with contextlib.suppress(FileExistsError):
        check_replaceable(folder)
        return True
    return False


def _diff(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.diff import diff

    found = diff(arguments.first, arguments.second, atol=arguments.atol)
    for line in found.lines():
        show(f"{line}\n")
    if not found.same:
        raise SystemExit(1)


def _atol(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given: give a number of 0 or more")
    return value


def _merge(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.merge import merge

    report = merge(
        arguments.base,
        arguments.adapter,
        arguments.destination,
        to=arguments.to,
        llama_config=arguments.llama_config,
    )
    for line in (*report.lines(), f"wrote {arguments.destination}"):
        show(f"{line}\n")


def _export_adapter(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.adapter_export import export_adapter

    export_adapter(arguments.adapter, arguments.destination, llama_config=arguments.llama_config)
    show(f"wrote {arguments.destination}\n")


def _quantize(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.quantize import quantize_checkpoint

    type_ = DEFAULT_FORM if arguments.quant is None else arguments.quant
    quant = QuantArgs(type=type_, group_size=arguments.group_size, head=arguments.quant_head)
    calibration = None
    if arguments.calibrate is not None:
        from accessory.files import check_free
        from accessory.quant import FORMATS, format_of
        from accessory.tools.calibration import calibrate

        if not format_of(quant.type, quant.group_size).calibrated:
            guided = ", ".join(sorted({form.name for form in FORMATS.values() if form.calibrated}))
            raise ValueError(
                f"--calibrate guides the rounding of {guided}; {quant.type} has none to guide: leave it out"
            )
        check_free(arguments.destination)
        calibration = calibrate(arguments.source, arguments.calibrate, quant, llama_config=arguments.llama_config)
    report = quantize_checkpoint(
        arguments.source, arguments.destination, quant, calibration, llama_config=arguments.llama_config
    )
    show(f"{report}\nwrote {arguments.destination}\n")


def _inspect(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.hub import local_path
    from accessory.checkpoint.report import describe

    folder = local_path(arguments.folder)
    if arguments.verify:
        from accessory.checkpoint.manifest import check_manifest
        from accessory.gguf_header import folder_of

        show(f"verified    {check_manifest(folder_of(folder))} files are as they were written\n")
    for line in describe(folder, check_values=arguments.check_values, llama_config=arguments.llama_config):
        show(f"{line}\n")
