"""The command generate: complete prompts on one rank or many."""

import argparse
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accessory.arguments import given_path, given_seed
from accessory.commands.output import say, show
from accessory.serve.options import add_model_arguments, add_template_argument, form_of, model_settings

logger = logging.getLogger(__name__)


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    generate = commands.add_parser("generate", help="complete prompts")
    add_model_arguments(generate, positional=True)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="text to complete; may be repeated")
    prompts.add_argument(
        "--prompt-file", "--prompt_file", type=given_path, help="file with a text to complete on each line"
    )
    generate.add_argument("--dialog", action="store_true", help="prompts are questions, asked in the model's form")
    add_template_argument(generate)
    generate.add_argument("--max-gen-len", "--max_gen_len", type=int, default=512, help="tokens at most (default 512)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    generate.add_argument("--top-p", "--top_p", type=float, default=0.95, help="nucleus of the sampling (default 0.95)")
    generate.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    generate.add_argument("--seed", type=given_seed, default=0, help="seed of the sampling (default 0)")
    generate.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from accessory.launch.rendezvous import process_group_of_launcher
    from accessory.model.meta import MetaModel
    from accessory.parallel.state import ParallelState, agreed

    with process_group_of_launcher(arguments.device, say=say) as mp_group:
        # Loading a large model takes minutes: what is wrong is said before, and once for all ranks.
        members = ParallelState.from_group(mp_group)
        loading, (texts, prompts, settings) = agreed(members, lambda: (model_settings(arguments), _asked(arguments)))
        torch.manual_seed(arguments.seed)
        model = MetaModel.from_pretrained(arguments.pretrained_path, mp_group=mp_group, **loading)
        if len(prompts) == 1:
            _print_stream(model.stream_generate(prompts[0], **settings))
        else:
            for text, answer in zip(texts, model.generate(prompts, **settings), strict=True):
                show(f"{text}\n  {answer}\n" if arguments.dialog else f"{answer}\n")


def _asked(arguments: argparse.Namespace) -> tuple[list[str], list[str] | list[list[int]], dict[str, Any]]:
    """The texts that were given, the prompts that they become, and the settings of `MetaModel.generate`.

    Raises:
        ValueError, OSError: naming the setting or the file.
    """
    from accessory.generation.sampling import Sampling
    from accessory.text.chat import Ends, Message

    texts = arguments.prompt or _lines_of(arguments.prompt_file)
    how = Sampling.of(arguments.max_gen_len, arguments.temperature, arguments.top_p, arguments.stop)
    how.check(arguments.max_seq_len)
    settings = {"max_gen_len": how.max_gen_len, "temperature": how.temperature, "top_p": how.top_p}
    prompts, ends = texts, Ends()
    if arguments.dialog:
        form = form_of(arguments)
        prompts, ends = [form.prompt([Message("user", text)]) for text in texts], form.ends
    elif arguments.chat_template is not None:
        raise ValueError("--chat_template is about questions: give --dialog as well")
    return texts, prompts, {**settings, "additional_stop_symbols": how.stop, "ends": ends}


def _lines_of(file: Path) -> list[str]:
    """The lines that are not empty. A line ends at a line feed alone: others of Unicode's ends are part of a text."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OSError(f"--prompt-file {file} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {file} is not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {file} has no line to complete: write some into it")
    return lines


def _print_stream(stream: Iterator[dict[str, Any]]) -> None:
    start, shown, tokens = time.perf_counter(), 0, 0
    for progress in stream:
        show(progress["text"][shown:])
        shown, tokens = len(progress["text"]), tokens + 1
    show("\n")
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.2f s (%.1f tokens/s)", tokens, seconds, tokens / seconds)
