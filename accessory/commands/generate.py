"""The command generate: complete prompts, or ask questions, on one rank or many."""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from accessory.arguments import add_nproc_argument, given_path, given_seed
from accessory.commands.output import say, show
from accessory.files import check_writable, growing
from accessory.log import global_rank
from accessory.serve.options import (
    add_model_arguments,
    add_template_argument,
    form_of,
    model_settings,
)

if TYPE_CHECKING:
    from accessory.generation.engine import Progress
    from accessory.generation.sampling import Sampling

logger = logging.getLogger(__name__)

_STANDARD_INPUT = "-"
_JSON_SUFFIXES = (".json", ".jsonl")
_LABEL = 100  # characters of a prompt above its answer


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    generate = commands.add_parser(
        "generate",
        help="complete prompts, or ask questions",
        description="Complete prompts. A model whose folder says in which form it is asked gets them as questions in "
        "that form; any other, and every one with --raw, continues the texts as they are.",
        epilog='example: accessory generate runs/tiny/converted --prompt "The list method" --max-gen-len 64',
    )
    add_model_arguments(generate, positional=True)
    add_nproc_argument(generate)
    prompts = generate.add_argument_group("prompts").add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", help="may be repeated; -: each line of standard input")
    help_text = "file with a prompt on each line; -: standard input"
    prompts.add_argument("--prompt-file", "--prompt_file", type=given_path, metavar="FILE", help=help_text)
    generate.add_argument("--raw", action="store_true", help="continue the prompts as they are, in no form")
    generate.add_argument("--dialog", action="store_true", help="ask in the default form where the folder names none")
    add_template_argument(generate)
    generate.add_argument("--max-gen-len", "--max_gen_len", type=int, default=512, help="tokens at most (default 512)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most probable token")
    generate.add_argument("--top-p", "--top_p", type=float, default=0.95, help="nucleus of the sampling (default 0.95)")
    generate.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    generate.add_argument("--seed", type=given_seed, default=0, help="seed of the sampling (default 0)")
    output = generate.add_argument_group("output")
    help_text = "write a JSON object on a line for each prompt: prompt, completion, finish_reason, tokens"
    output.add_argument("--json", action="store_true", help=help_text)
    help_text = "write into this file; as JSON where its name ends in .json or .jsonl"
    output.add_argument("--output", type=given_path, metavar="FILE", help=help_text)
    generate.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from accessory.generation.engine import complete
    from accessory.launch.rendezvous import process_group_of_launcher
    from accessory.model.meta import MetaModel
    from accessory.model.requests import prompt_tokens
    from accessory.parallel.state import ParallelState, agreed, on_first

    with _unwinding_at_sigterm(), process_group_of_launcher(arguments.device, say=say) as mp_group:
        # Loading a large model takes minutes: what is wrong is said before, and once for all ranks.
        members = ParallelState.from_group(mp_group)
        texts = on_first(members, lambda: _texts(arguments))
        loading, (prompts, sampling) = agreed(members, lambda: (model_settings(arguments), _asked(arguments, texts)))
        torch.manual_seed(arguments.seed)
        model = MetaModel.from_pretrained(arguments.pretrained_path, mp_group=mp_group, **loading)
        tokens = prompt_tokens(model.llma, model.tokenizer, prompts, sampling, images=None)
        as_json = arguments.json or (arguments.output is not None and arguments.output.suffix in _JSON_SUFFIXES)
        with ExitStack() as stack:
            write = agreed(members, lambda: stack.enter_context(_sink(arguments.output)))
            for text in _answers(complete(model.llma, model.tokenizer, tokens, sampling), texts, as_json=as_json):
                write(text)


def _texts(arguments: argparse.Namespace) -> list[str]:
    """The texts that were given, of which there is a place to write the answers to.

    Raises:
        ValueError, OSError: naming the setting or the file.
    """
    if (file := arguments.output) is not None and (file.is_dir() or not file.parent.is_dir()):
        wrong = "is a folder" if file.is_dir() else "lies in no folder that is there"
        raise OSError(f"--output {file} {wrong}: name a file to write")
    if file is not None:
        check_writable(file)
    if arguments.prompt is None:
        return _lines_of(arguments.prompt_file)
    if _STANDARD_INPUT not in arguments.prompt:
        return list(arguments.prompt)
    if len(arguments.prompt) > 1:
        raise ValueError("--prompt - stands for all lines of standard input: give no other prompt beside it")
    return _lines_of(Path(_STANDARD_INPUT))


def _asked(arguments: argparse.Namespace, texts: list[str]) -> "tuple[Sequence[str] | Sequence[list[int]], Sampling]":
    """The prompts that the texts become, and how they go on.

    Raises:
        ValueError, OSError: naming the setting or the file.
    """
    from accessory.generation.sampling import Sampling
    from accessory.text.chat import Message

    sampling = Sampling.of(arguments.max_gen_len, arguments.temperature, arguments.top_p, arguments.stop)
    sampling.check(arguments.max_seq_len)
    wanted = arguments.dialog or arguments.chat_template is not None
    if arguments.raw:
        if wanted:
            raise ValueError("--raw continues the prompts in no form: leave out --dialog and --chat_template")
        return texts, sampling
    form = form_of(arguments)
    if form.assumed and not wanted:
        return texts, sampling
    if not all(text.strip() for text in texts):
        raise ValueError("--prompt is empty, and no question: ask something, or let --raw begin from nothing")
    logger.info('asking in the form "%s"%s', form.name, "" if wanted else "; --raw continues the prompts as they are")
    return [form.prompt([Message("user", text)]) for text in texts], sampling.with_ends(form.ends)


def _lines_of(file: Path) -> list[str]:
    """The lines that are not empty. A line ends at a line feed alone: others of Unicode's ends are part of a text."""
    standard = str(file) == _STANDARD_INPUT
    name = "standard input" if standard else f"--prompt-file {file}"
    if standard and sys.stdin.isatty():
        logger.info("reading prompts from standard input, one on each line; Ctrl-D ends them")
    try:
        text = (sys.stdin.buffer.read() if standard else file.read_bytes()).decode("utf-8-sig")
    except OSError as error:
        raise OSError(f"{name} cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{name} has no line with a prompt: write some into it")
    return lines


def _answers(steps: "Iterator[list[Progress]]", texts: list[str], *, as_json: bool) -> Iterator[str]:
    """What to write, in the prompts' order: answers as they are whole, and a single one to read as it grows."""
    start, tokens, due = time.perf_counter(), 0, 0
    whole: dict[int, Progress] = {}
    shown = 0 if len(texts) == 1 and not as_json else None
    for step in steps:
        tokens += len(step)
        for progress in step:
            if shown is not None:
                yield progress.text[shown:]
                shown = len(progress.text)
            if progress.finish is not None:
                whole[progress.index] = progress
        while due in whole:
            yield _answer(whole.pop(due), texts, as_json=as_json)
            due += 1
    seconds = time.perf_counter() - start
    logger.info("%d tokens in %.2f s (%.1f tokens/s)", tokens, seconds, tokens / seconds)


def _answer(progress: "Progress", texts: list[str], *, as_json: bool) -> str:
    """An answer that is whole; of a single one that was shown as it grew the line's end."""
    from accessory.serve.terminal import printable

    text = texts[progress.index]
    if as_json:
        why = {"finish_reason": progress.finish, "tokens": progress.tokens}
        return json.dumps({"prompt": text, "completion": progress.text, **why}, ensure_ascii=False) + "\n"
    if len(texts) == 1:
        return "\n"
    line = next(iter(text.strip().splitlines()), "")[:_LABEL]
    more = "" if line == text.strip() else " ..."
    return f"--- {progress.index + 1} of {len(texts)}: {printable(line)}{more}\n{progress.text}\n"


@contextmanager
def _sink(file: Path | None) -> Iterator[Callable[[str], object]]:
    """How rank 0 writes: to standard output, or to a file that takes its name, or another's place, when it is whole.

    What was written before an interruption stays beside it.
    """
    if file is None or global_rank() != 0:
        yield show
        return
    with growing(file) as sink:

        def write(text: str) -> None:
            sink.write(text)
            sink.flush()  # a kill -9 takes no answer away

        yield write
    logger.info("wrote %s", file)


@contextmanager
def _unwinding_at_sigterm() -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does, which says where the answers are; a second one ends it at once."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    own_thread = threading.current_thread() is threading.main_thread()
    if not own_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # somebody else has chosen
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
