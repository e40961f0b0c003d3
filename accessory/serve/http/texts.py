"""An answer's text and the scores of its tokens, as they are shown to a client."""

import codecs
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accessory.serve.request import Event, TokenScore
from accessory.serve.token_texts import TokenTexts

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True)
class ScoredToken:
    """A token that is shown with its score; None for the first of a prompt, which nothing predicts."""

    token: int
    score: TokenScore | None


class AnswerText:
    """Follows one answer: its text, and which of its tokens this text shows.

    The tokens of a stop string are not shown, as the string is not; a token whose text is held back is shown with it.

    Args:
        continues: the text goes on from a prompt's, so a space before its first word is kept.
        show_end: the end-of-sequence token is shown among the scores.
    """

    def __init__(self, texts: TokenTexts, eos_id: int, *, continues: bool, show_end: bool) -> None:
        self._texts, self._eos_id, self._show_end = texts, eos_id, show_end
        self._continues = continues
        self._first_space: str | None = None  # of the first token with a text, once there is one
        self._text_begun = False
        self._pending: deque[tuple[ScoredToken, int]] = deque()  # and the byte of the text at which each begins
        self._written = 0  # bytes of all tokens so far
        self._shown = 0  # bytes of the text shown so far
        self.tokens = 0

    def push(self, event: Event) -> tuple[str, list[ScoredToken]]:
        """The text to append, and the tokens that it shows; of those without scores none."""
        self.tokens += len(event.tokens)
        for index, token in enumerate(event.tokens):
            self._note(token, event.scores[index] if event.scores else None)
        text = event.text
        if text and not self._text_begun:
            self._text_begun = True
            if self._continues:
                text = (self._first_space or "") + text
        self._shown += len(text.encode())
        return text, self._release(event)

    def _note(self, token: int, score: TokenScore | None) -> None:
        size = self._texts[token].size
        if self._first_space is None and size:
            self._first_space = self._texts.lost_space(token)
            size -= 0 if self._continues else len(self._first_space)
        if score is not None:
            self._pending.append((ScoredToken(token, score), self._written))
        self._written += size

    def _release(self, event: Event) -> list[ScoredToken]:
        ended = bool(event.tokens) and event.tokens[-1] == self._eos_id
        everything = event.finish == "length" or (event.finish == "stop" and ended)
        released = []
        while self._pending and (everything or self._pending[0][1] < self._shown):
            shown, _ = self._pending.popleft()
            if self._show_end or shown.token != self._eos_id:
                released.append(shown)
        return released


class CompletionScores:
    """Scores in the form of /v1/completions: four lists; offsets count on over the parts of a stream."""

    def __init__(self, texts: TokenTexts, *, lead: bool) -> None:
        self._texts = texts
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lead = lead  # the next token with a text stands first, without its space

    def of(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The lists for further tokens."""
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for shown in tokens:
            made = self._texts[shown.token]
            text, data = made.text, made.data or b""
            if self._lead and made.size:
                lost = len(self._texts.lost_space(shown.token))
                text, data, self._lead = text[lost:], data[lost:], False
            result["tokens"].append(text)
            result["token_logprobs"].append(None if shown.score is None else _finite(shown.score.logprob))
            result["top_logprobs"].append(None if shown.score is None else self._top(shown.score))
            result["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(data))
        return result

    def _top(self, score: TokenScore) -> dict[str, float]:
        # Best first: of two tokens that are written alike the better one stays.
        top: dict[str, float] = {}
        for token, logprob in (*score.top, (score.token, score.logprob)):
            top.setdefault(self._texts[token].text, _finite(logprob))
        return top


def chat_scores(texts: TokenTexts, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    """Scores in the form of /v1/chat/completions."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        made = texts[token]
        return {"token": made.text, "logprob": _finite(logprob), "bytes": None if not made.data else list(made.data)}

    return {
        "content": [
            {**entry(score.token, score.logprob), "top_logprobs": [entry(*alternative) for alternative in score.top]}
            for score in (shown.score for shown in tokens)
            if score is not None
        ],
        "refusal": None,
    }


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
