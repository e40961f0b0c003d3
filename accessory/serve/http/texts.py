"""An answer's text and the scores of its tokens, as they are shown to a client."""

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from accessory.serve.request import Event, TokenScore
from accessory.serve.token_texts import TokenText, TokenTexts

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
        continues: the text goes on from a prompt's, so its first word has kept its space.
        show_end: the end-of-sequence token is shown among the scores.
    """

    def __init__(self, texts: TokenTexts, eos_id: int, *, continues: bool, show_end: bool) -> None:
        self._texts, self._eos_id, self._show_end = texts, eos_id, show_end
        self._begun = continues
        self._pending: deque[tuple[ScoredToken, int]] = deque()  # and the byte of the text at which each begins
        self._written = 0  # bytes of all tokens so far
        self._shown = 0  # bytes of the text shown so far
        self.tokens = 0

    def push(self, event: Event) -> tuple[str, list[ScoredToken]]:
        """The text to append, and the tokens that it shows; of those without scores none."""
        self.tokens += len(event.tokens)
        for index, token in enumerate(event.tokens):
            self._note(token, event.scores[index] if event.scores else None)
        self._shown += len(event.text.encode())
        return event.text, self._release(event)

    def _note(self, token: int, score: TokenScore | None) -> None:
        made = self._texts[token]
        if made.size and not self._begun:
            self._begun = True
            made = self._texts.leading(token)
        if score is not None:
            self._pending.append((ScoredToken(token, score), self._written))
        self._written += made.size

    def _release(self, event: Event) -> list[ScoredToken]:
        ended = bool(event.tokens) and event.tokens[-1] == self._eos_id
        everything = event.finish == "length" or (event.finish == "stop" and ended)
        released = []
        while self._pending and (everything or self._pending[0][1] < self._shown):
            shown, _ = self._pending.popleft()
            if self._show_end or shown.token != self._eos_id:
                released.append(shown)
        return released


class _Scores:
    """Scores of a text's tokens, in the order of the text.

    Args:
        lead: the next token with a text is the first of all, and so are the tokens in its place: they have no space.
    """

    def __init__(self, texts: TokenTexts, *, lead: bool) -> None:
        self._texts = texts
        self._lead = lead

    def _place(self, token: int) -> Callable[[int], TokenText]:
        """What tokens say in the next place, which is this token's."""
        if not self._lead:
            return self._texts.__getitem__
        self._lead = not self._texts[token].size
        return self._texts.leading


class CompletionScores(_Scores):
    """Scores in the form of /v1/completions: four lists; offsets count on over the parts of a stream."""

    def __init__(self, texts: TokenTexts, *, lead: bool) -> None:
        super().__init__(texts, lead=lead)
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The lists for further tokens."""
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for shown in tokens:
            text_of, score = self._place(shown.token), shown.score
            made = text_of(shown.token)
            result["tokens"].append(made.text)
            result["token_logprobs"].append(None if score is None else _finite(score.logprob))
            result["top_logprobs"].append(None if score is None else _top(score, text_of))
            result["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(made.data or b""))
        return result


class ChatScores(_Scores):
    """Scores in the form of /v1/chat/completions."""

    def __init__(self, texts: TokenTexts) -> None:
        super().__init__(texts, lead=True)

    def of(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The entries for further tokens."""
        content = []
        for score in (shown.score for shown in tokens if shown.score is not None):
            text_of = self._place(score.token)
            entry = _entry(text_of(score.token), score.logprob)
            alternatives = [_entry(text_of(token), logprob) for token, logprob in score.top]
            content.append({**entry, "top_logprobs": alternatives})
        return {"content": content, "refusal": None}


def _top(score: TokenScore, text_of: Callable[[int], TokenText]) -> dict[str, float]:
    # Best first: of two tokens that are written alike the better one stays.
    top: dict[str, float] = {}
    for token, logprob in (*score.top, (score.token, score.logprob)):
        top.setdefault(text_of(token).text, _finite(logprob))
    return top


def _entry(made: TokenText, logprob: float) -> dict[str, Any]:
    return {"token": made.text, "logprob": _finite(logprob), "bytes": list(made.data) if made.data else None}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
