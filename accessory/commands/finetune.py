"""The command finetune, which main_finetune.py is as well: train a checkpoint, on one rank or many."""

import argparse
import logging
import traceback
from typing import Any

from accessory.arguments import add_nproc_argument
from accessory.errors import out_of_memory
from accessory.launch.launcher import Launch, report_failure
from accessory.train.interruption import Interruption
from accessory.train.options import FinetuneOptions, ToldDefaults, add_finetune_flags

logger = logging.getLogger(__name__)

_LESS_MEMORY = (
    "take a smaller --batch_size with more --accum_iter, --checkpointing, a smaller --max_words, --data_parallel fsdp, "
    "more ranks, or an adapter (--lora_rank 8)"
)

_SAME_SIGNAL = 0.2  # seconds


class _Help(ToldDefaults, argparse.RawDescriptionHelpFormatter):
    pass


def add_commands(commands: Any) -> None:
    """Give a parser's subparsers the command."""
    finetune = commands.add_parser(
        "finetune",
        help="train a checkpoint on your own data",
        description="Finetune a Mixture-of-Experts model, or train an adapter of it, on one process or on --nproc.",
        epilog="example: accessory finetune --pretrained_path runs/tiny/converted --data_config data.yaml "
        "--output_dir runs/mine --epochs 3",
        formatter_class=_Help,
    )
    add_finetune_flags(finetune)
    add_nproc_argument(finetune)
    finetune.set_defaults(run=_finetune)


def train(arguments: argparse.Namespace, launch: Launch) -> int:
    """Run with the options that a parser has read; returns the exit code, as docs/reliability.md has it."""
    # The launcher may be gone before the imports are done.
    with Interruption(launch) as interruption:
        try:
            options = FinetuneOptions.of(arguments)
        except ValueError as error:
            return _refuse(error, launch)
        try:
            return _train(options, launch, interruption)
        except SystemExit as error:
            return int(error.code or 0)
        except Exception as error:
            expected = isinstance(error, OSError | ValueError | FloatingPointError)
            if not expected and out_of_memory(error) is None:
                report_failure(traceback.format_exc())
                raise
            say(error)
            return 1


def say(error: Exception) -> None:
    """One line in the run's log, which is on standard error too."""
    text = str(out_of_memory(error, _LESS_MEMORY) or error)
    report_failure(text)
    logger.error("%s", text)


def _finetune(arguments: argparse.Namespace) -> None:
    raise SystemExit(train(arguments, Launch.find()))


def _train(options: FinetuneOptions, launch: Launch, interruption: Interruption) -> int:
    from accessory.launch.rendezvous import process_group_of_launcher
    from accessory.train.finetune import COLLECTIVE_TIMEOUT, finetune

    def say_unless_leaving(error: Exception) -> None:
        # A peer may have gone by the signal that this rank gets next.
        if not interruption.leaves.wait(_SAME_SIGNAL):
            say(error)

    with process_group_of_launcher(
        options.device, say=say_unless_leaving, even_alone=True, timeout=COLLECTIVE_TIMEOUT, watch_launcher=False
    ):
        return finetune(options, launch, interruption).exit_code


def _refuse(error: ValueError, launch: Launch) -> int:
    """Say what is wrong with the arguments, once, and end with the other ranks; returns the exit code."""
    if launch.rank == 0:
        say(error)
    if launch.has_others:
        from accessory.launch.rendezvous import refuse_together

        refuse_together(str(error))
    return 1
