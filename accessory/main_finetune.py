"""Finetune a Mixtral checkpoint: ``python main_finetune.py``, under torchrun or srun with many ranks.

``--help`` lists the options; docs/finetune.md walks through a run.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and __package__ in (None, ""):
    # Started as a file, Python looks for modules in its folder first; the package is one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.errors import out_of_memory
from accessory.launch.launcher import Launch
from accessory.log import setup_logging
from accessory.train.interruption import Interruption, Stop

logger = logging.getLogger("accessory.main_finetune")  # the file may be run as __main__

_LESS_MEMORY = (
    "take a smaller --batch_size with more --accum_iter, --checkpointing, a smaller --max_words, --data_parallel fsdp, "
    "more ranks, or an adapter (--llama_type mistral_peft)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit code: 0 also after a signal that asked for a checkpoint."""
    setup_logging()
    try:
        launch = Launch.find()
    except ValueError as error:
        _say(error)
        return 1
    # The launcher may be gone before the imports are done.
    with Interruption(launch) as interruption:
        return _run(arguments, launch, interruption)


def _run(arguments: Sequence[str] | None, launch: Launch, interruption: Interruption) -> int:
    from accessory.train.options import FinetuneOptions

    try:
        options = FinetuneOptions.parse(arguments)
    except (ValueError, SystemExit) as error:
        return _refuse(error, launch)
    try:
        from accessory.launch.rendezvous import process_group_of_launcher
        from accessory.train.finetune import COLLECTIVE_TIMEOUT, finetune

        with process_group_of_launcher(options.device, say=_say, even_alone=True, timeout=COLLECTIVE_TIMEOUT):
            stop = finetune(options, launch, interruption)
        return 1 if stop is Stop.LAUNCHER_GONE else 0
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        return int(error.code or 0)
    except (OSError, ValueError, FloatingPointError) as error:
        _say(error)
        return 1
    except (RuntimeError, MemoryError) as error:
        shortage = out_of_memory(error, _LESS_MEMORY)
        if shortage is None:
            raise
        _say(shortage)
        return 1


def _refuse(wrong: ValueError | SystemExit, launch: Launch) -> int:
    """Say what is wrong with the arguments, once, and end with the other ranks; returns the exit code."""
    code = 1 if isinstance(wrong, ValueError) else int(wrong.code or 0)
    if launch.rank == 0 and isinstance(wrong, ValueError):  # argparse has said its own
        _say(wrong)
    if code and launch.world_size > 1:
        from accessory.launch.rendezvous import refuse_together

        refuse_together(str(wrong) if isinstance(wrong, ValueError) else "its arguments are wrong")
    return code


def _say(error: Exception) -> None:
    logger.error("%s", error)


if __name__ == "__main__":
    code = main()
    # Threads that wait for a rank which is gone must not hold this one back.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
