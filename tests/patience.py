"""How long tests wait for what ends by itself: once for all of them."""

import time
from collections.abc import Callable

# Seconds. Machines may be several times slower than a quiet one, and only a test that fails waits so long.
PATIENCE = 180.0


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until the condition holds.

    Raises:
        AssertionError: it did not in time.
    """
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
