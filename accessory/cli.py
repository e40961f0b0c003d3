"""The command line: ``accessory COMMAND``.

Under torchrun, commands that run a model share it among the ranks; results come from rank 0 alone. Bad input ends
with one line on standard error and exit code 1 on every rank.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accessory.config.quant import DEFAULT_FORM, QuantArgs, add_quant_flags, quant_of_flags
from accessory.launch import Launch
from accessory.log import RankParser, global_rank, setup_logging

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    setup_logging()
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as error:
        if error.code and "RANK" in os.environ and Launch.find().world_size > 1:
            from accessory.parallel.rendezvous import refuse_together

            refuse_together("its arguments are wrong")
        raise
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        return int(error.code or 0)
    except (OSError, ValueError, FloatingPointError) as error:
        from accessory.parallel.state import raised_on_all_ranks

        if global_rank() == 0 or not raised_on_all_ranks(error):
            _say(error)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = RankParser(prog="accessory", description="Mixture-of-Experts inference and finetuning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    tiny = commands.add_parser("tiny", help="train a tiny Mixtral on Python's own documentation")
    tiny.add_argument("--out", type=Path, required=True, help="folder to write, e.g. runs/tiny")
    tiny.add_argument("--steps", type=int, default=None, help="optimizer steps (default: the full recipe)")
    tiny.add_argument("--seed", type=int, default=0)
    tiny.set_defaults(run=_tiny)

    split = commands.add_parser("split", help="write a checkpoint as N shards, ready to load")
    split.add_argument("source", type=Path, help="folder with consolidated.00.pth, or with other shards")
    split.add_argument("destination", type=Path, help="folder to write")
    split.add_argument("--mp", type=int, default=8, help="number of shards (default 8)")
    _add_config_argument(split)
    split.set_defaults(run=_split)

    merge = commands.add_parser("merge", help="write a base and its adapter as one plain checkpoint")
    merge.add_argument("base", type=Path, help="checkpoint folder that the adapter was trained on")
    merge.add_argument("adapter", type=Path, help="folder of a finetuning run with llama_type mistral_peft")
    merge.add_argument("destination", type=Path, help="folder to write")
    merge.set_defaults(run=_merge)

    export = commands.add_parser("export-adapter", help="write an adapter as a folder of Hugging Face's peft")
    export.add_argument("adapter", type=Path, help="folder of a finetuning run with llama_type mistral_peft")
    export.add_argument("destination", type=Path, help="folder to write")
    export.set_defaults(run=_export_adapter)

    quantize = commands.add_parser("quantize", help="write a checkpoint with its matrices in 8 or 4 bits")
    quantize.add_argument("source", type=Path, help="checkpoint folder")
    quantize.add_argument("destination", type=Path, help="folder to write")
    add_quant_flags(quantize)
    quantize.add_argument("--calibrate", type=Path, help="text file: int4 is then rounded with an eye on its inputs")
    quantize.set_defaults(run=_quantize)

    inspect = commands.add_parser("inspect", help="say what a checkpoint folder holds")
    inspect.add_argument("folder", type=Path)
    inspect.add_argument("--check-values", action="store_true", help="read all weights; NaN or infinity is an error")
    _add_config_argument(inspect)
    inspect.set_defaults(run=_inspect)

    generate = commands.add_parser("generate", help="complete prompts")
    _add_model_arguments(generate)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to complete; may be repeated")
    prompts.add_argument("--prompt-file", type=Path, help="file with a text to complete on each line")
    generate.add_argument("--dialog", action="store_true", help="prompts are questions to a chat model")
    generate.add_argument("--max-gen-len", type=int, default=512, help="tokens at most (default 512)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    generate.add_argument("--top-p", type=float, default=0.95, help="nucleus of the sampling (default 0.95)")
    generate.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    generate.set_defaults(run=_generate)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pretrained_path", nargs="+", help="checkpoint folder; later ones overlay earlier ones")
    parser.add_argument("--llama_type", "--llama-type", help="architecture, where meta.json does not say")
    _add_config_argument(parser)
    parser.add_argument("--tokenizer_path", "--tokenizer-path", help="tokenizer.model, or folder of tokenizer.json")
    parser.add_argument("--max_seq_len", "--max-seq-len", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="default: as stored")
    add_quant_flags(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    parser.add_argument("--expert_placement", "--expert-placement", default="auto", help="auto, expert or tensor")


def _add_config_argument(parser: argparse.ArgumentParser) -> None:
    help_text = "config files in place of the folder's own, the last rules"
    parser.add_argument("--llama_config", "--llama-config", nargs="+", help=help_text)


def _tiny(arguments: argparse.Namespace) -> None:
    from accessory.tools.tiny import make_tiny

    steps = {} if arguments.steps is None else {"steps": arguments.steps}
    report = make_tiny(arguments.out, seed=arguments.seed, **steps)
    lightest = report.expert_share.min().item()
    sys.stdout.write(
        f"wrote {arguments.out}: {report.parameters:,} parameters, loss {report.loss:.2f}, "
        f"lightest expert {lightest:.1%} of its layer's tokens\n"
    )


def _split(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.convert import split

    split(arguments.source, arguments.destination, mp=arguments.mp, llama_config=arguments.llama_config)
    sys.stdout.write(f"wrote {arguments.destination}\n")


def _merge(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.merge import merge

    report = merge(arguments.base, arguments.adapter, arguments.destination)
    for line in (*report.lines(), f"wrote {arguments.destination}"):
        sys.stdout.write(f"{line}\n")


def _export_adapter(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.adapter_export import export_adapter

    export_adapter(arguments.adapter, arguments.destination)
    sys.stdout.write(f"wrote {arguments.destination}\n")


def _quantize(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.quantize import quantize_checkpoint

    type_ = DEFAULT_FORM if arguments.quant is None else arguments.quant
    quant = QuantArgs(type=type_, group_size=arguments.group_size, head=arguments.quant_head)
    calibration = None
    if arguments.calibrate is not None:
        from accessory.tools.calibration import calibrate

        if quant.type != "int4":
            raise ValueError(f"--calibrate guides the rounding of int4; {quant.type} has none to guide: leave it out")
        calibration = calibrate(arguments.source, arguments.calibrate, group_size=quant.group_size)
    report = quantize_checkpoint(arguments.source, arguments.destination, quant, calibration)
    sys.stdout.write(f"{report}\nwrote {arguments.destination}\n")


def _inspect(arguments: argparse.Namespace) -> None:
    from accessory.checkpoint.report import describe

    for line in describe(arguments.folder, check_values=arguments.check_values, llama_config=arguments.llama_config):
        sys.stdout.write(f"{line}\n")


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from accessory.model.meta import MetaModel
    from accessory.parallel.rendezvous import process_group_of_launcher

    with process_group_of_launcher(arguments.device, say=_say) as mp_group:
        torch.manual_seed(arguments.seed)
        model = MetaModel.from_pretrained(
            arguments.pretrained_path,
            llama_type=arguments.llama_type,
            llama_config=arguments.llama_config,
            tokenizer_path=arguments.tokenizer_path,
            max_seq_len=arguments.max_seq_len,
            mp_group=mp_group,
            dtype=arguments.dtype,
            device=arguments.device,
            quant=quant_of_flags(arguments.quant, group_size=arguments.group_size, head=arguments.quant_head),
            expert_placement=arguments.expert_placement,
        )
        settings = {
            "max_gen_len": arguments.max_gen_len,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "additional_stop_symbols": arguments.stop,
        }
        texts = arguments.prompt or _lines_of(arguments.prompt_file)
        prompts = texts
        if arguments.dialog:
            prompts, end = _open_dialogues(texts)
            settings["additional_stop_symbols"] = [*arguments.stop, end]
        if len(prompts) == 1:
            _print_stream(model.stream_generate(prompts[0], **settings))
        else:
            for text, answer in zip(texts, model.generate(prompts, **settings), strict=True):
                _print(f"{text}\n  {answer.strip()}\n" if arguments.dialog else f"{answer}\n")


def _lines_of(file: Path) -> list[str]:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {file} has no line to complete: write some into it")
    return lines


def _open_dialogues(questions: Sequence[str]) -> tuple[list[str], str]:
    """A prompt for each question, and the text that ends an answer."""
    from accessory.data.conversation import default_conversation

    conversation = default_conversation()
    prompts = []
    for question in questions:
        conversation.load_qas([[question, None]])
        prompts.append(conversation.get_prompt())
    return prompts, conversation.response_end_signal


def _print_stream(stream: Iterator[dict[str, Any]]) -> None:
    start, shown, tokens = time.perf_counter(), 0, 0
    for progress in stream:
        _print(progress["text"][shown:])
        shown, tokens = len(progress["text"]), tokens + 1
    _print("\n")
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.2f s (%.1f tokens/s)", tokens, seconds, tokens / seconds)


def _say(error: Exception) -> None:
    sys.stderr.write(f"error: {error}\n")
    sys.stderr.flush()


def _print(text: str) -> None:
    if global_rank() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()
