"""Each request is followed from its arrival to its end: it is counted, and the log gets one line of it."""

import logging
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from accessory.serve.http.gate import OPEN_PATHS
from accessory.serve.http.generation import ClientGone
from accessory.serve.http.metrics import Account, Metrics

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
_ACCOUNT = "accessory.account"  # its name in a request's scope
_LONGEST_PATH, _LONGEST_METHOD = 120, 16


class Followed:
    """Counts requests by path and status, and logs each when it is over: what was asked, and what it took.

    A stream's status is known when it begins, and counted then. Its line in the log says how it ended.

    Args:
        paths: those of the routes, with names in braces for what varies. Others are counted together: whoever asks
            for them must not make up labels.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Sequence[str]) -> None:
        self._app, self._metrics = app, metrics
        self._paths = [(re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(path))), path) for path in paths]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start = time.perf_counter()
        account = scope[_ACCOUNT] = Account()
        path = next((name for pattern, name in self._paths if pattern.fullmatch(scope["path"])), "other")
        status: int | None = None
        whole = False

        async def note(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                self._metrics.count_request(path, message["status"])
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        broken = CLIENT_LEFT
        try:
            with suppress(ClientGone):
                await self._app(scope, receive, note)
        except Exception:
            broken = 500  # whoever is outside says so
            raise
        finally:
            if status is None:
                self._metrics.count_request(path, broken)
            ended = status if status is not None and whole else broken
            _log(scope, account.failure or ended, account, time.perf_counter() - start)


def account_of(scope: Scope) -> Account:
    """Where the tokens of a request are noted."""
    account: Account = scope[_ACCOUNT]
    return account


def _log(scope: Scope, status: int, account: Account, seconds: float) -> None:
    """One line, of words without spaces: no texts, no key, and no query, in which there might be either."""
    level = logging.DEBUG if scope["path"] in OPEN_PATHS else logging.INFO  # monitors come every few seconds
    if not logger.isEnabledFor(level):
        return
    words = [_word(scope["method"], _LONGEST_METHOD), _word(scope["path"], _LONGEST_PATH), str(status)]
    if account.prompt_tokens is not None:
        words += [f"prompt_tokens={account.prompt_tokens}", f"completion_tokens={account.completion_tokens}"]
    logger.log(level, "%s seconds=%.3f", " ".join(words), seconds)


def _word(text: str, longest: int) -> str:
    """What a client sent, as it may stand in a log: ASCII without spaces or control characters, and bounded."""
    safe = quote(text[: longest + 1], safe="/:@!$&'()*+,;=~", errors="replace")
    return safe if len(safe) <= longest else f"{safe[:longest]}..."
