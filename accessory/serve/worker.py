"""A rank that a `Driver` has started: ``python -m accessory.serve.worker FD``, with the driver at the other end of FD.

It ends as soon as the driver is gone, whatever it is doing.
"""

import logging
import os
import queue
import signal
import socket
import sys
import threading
from datetime import timedelta
from typing import Any

from accessory.log import global_rank, setup_logging

logger = logging.getLogger(__name__)

# How often a rank looks whether its driver lives: another process may hold the driver's end of the connection open.
_LOOK_EVERY = 2.0


def main() -> None:
    """Serve or follow until told to end."""
    # Ctrl-C goes to every process of a terminal; what it ends is the driver's affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    setup_logging()
    from accessory.errors import out_of_memory
    from accessory.serve.messages import Failed, Link, sendable
    from accessory.serve.request import RankLost

    link = Link(socket.socket(fileno=int(sys.argv[1])))
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, inbox, os.getppid()), name="driver", daemon=True).start()

    def say(error: Exception) -> None:
        link.send(Failed(sendable(out_of_memory(error) or error)))

    try:
        _work(link, inbox, say)
    except Exception as error:
        if not isinstance(error, OSError | ValueError | RankLost) and out_of_memory(error) is None:
            logger.exception("rank %d has failed", global_rank())
        say(error)
        sys.exit(1)


def _work(link: Any, inbox: "queue.SimpleQueue[Any]", say: Any) -> None:
    setup = inbox.get()
    setup_logging(level=setup.log_level)
    from accessory.launch.rendezvous import process_group_of_launcher
    from accessory.model.meta import MetaModel
    from accessory.serve.messages import Ready
    from accessory.serve.ranks import follow_first, serve_first

    limit = None if setup.timeout is None else timedelta(seconds=setup.timeout)
    with process_group_of_launcher(setup.settings.get("device"), say=say, timeout=limit) as group:
        model = MetaModel.from_pretrained(mp_group=group, **setup.settings)
        if model.llma.state.is_first:
            serve_first(
                model,
                setup.slots,
                inbox=inbox,
                report=link.send,
                prefill_tokens=setup.prefill_tokens,
                ready=lambda: link.send(Ready(model.llma.args)),
            )
        else:
            follow_first(model, setup.slots)


def _listen(link: Any, inbox: "queue.SimpleQueue[Any]", parent: int) -> None:
    """Take what the driver sends; end this process with the driver."""
    try:
        while True:
            if link.wait(_LOOK_EVERY):
                inbox.put(link.receive())
            elif os.getppid() != parent:
                os._exit(1)
    except EOFError:
        os._exit(1)
    except BaseException:
        logger.exception("rank %d cannot hear its driver", global_rank())
        os._exit(1)


if __name__ == "__main__":
    main()
