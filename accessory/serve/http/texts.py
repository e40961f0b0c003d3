"""An answer's text and the scores of its tokens, as they are shown to a client."""

import codecs
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from accessory.generation.completion import end_ids
from accessory.serve.http.generation import Job
from accessory.serve.request import Event, TokenScore
from accessory.serve.token_texts import TokenText, TokenTexts
from accessory.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True)
class ScoredToken:
    """A token that is shown with its score.

    Attributes:
        score: None for the first of a prompt, which nothing predicts.
        first: no text stands before it, so it has no space.
        lead: what is taken away where its text, or that of another token in its place, begins so.
    """

    token: int
    score: TokenScore | None
    first: bool = False
    lead: bytes = b""

    def text_in_its_place(self, token: int, texts: TokenTexts) -> TokenText:
        """What this token, or another in its place, says there."""
        made = texts.leading(token) if self.first else texts[token]
        if not self.lead or made.data is None or not made.data.startswith(self.lead):
            return made
        rest = made.data[len(self.lead) :]
        return TokenText(rest.decode(errors="replace"), rest, len(rest))


class AnswerText:
    """Follows one answer: its text, and which of its tokens this text shows.

    The tokens of a stop string are not shown, as the string is not, and so are those of the lead and the tail that
    the form of the prompt has; a token whose text is held back is shown with it.

    Args:
        show_end: the token that ends the answer is shown among the scores.
    """

    def __init__(self, texts: TokenTexts, tokenizer: Tokenizer, job: Job, *, show_end: bool) -> None:
        self._texts, self._ends, self._show_end = texts, end_ids(tokenizer, job.sampling), show_end
        self._lead, self._tail = job.sampling.lead.encode(), job.sampling.tail.encode()
        self._begun = not all(tokenizer.is_control(token) for token in job.tokens)
        self._pending: deque[tuple[ScoredToken, int, int]] = deque()  # and the bytes of `_written` that are its own
        self._written = bytearray()  # what all tokens so far say
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
        begin = len(self._written)
        lead = self._lead[begin:] if self._lead[:begin] == self._written else b""
        made = self._texts.leading(token) if not self._begun else self._texts[token]
        own = b"" if token in self._ends else bytes(made.size) if made.data is None else made.data
        if score is not None:
            scored = ScoredToken(token, score, first=not self._begun, lead=lead)
            self._pending.append((scored, begin, begin + len(own)))
        self._begun = self._begun or self._texts[token].size > 0
        self._written += own

    def _release(self, event: Event) -> list[ScoredToken]:
        start = len(self._lead) if self._written.startswith(self._lead) else 0
        stop = start + self._shown
        ended = event.finish == "stop" and bool(event.tokens) and event.tokens[-1] in self._ends
        # An end token may come while text is held back of which a stop string is found only then.
        everything = (ended or event.finish == "length") and stop >= len(self._written)
        if ended and self._tail and self._written.endswith(self._tail, start):
            everything, stop = False, min(stop, len(self._written) - len(self._tail))
        released = []
        while self._pending:
            scored, begin, end = self._pending[0]
            of_lead = begin < end <= start
            if not (everything or of_lead or max(begin, start) < stop):
                break
            self._pending.popleft()
            if not of_lead and (self._show_end or scored.token not in self._ends):
                released.append(scored)
        return released


class CompletionScores:
    """Scores in the form of /v1/completions: four lists, in the text's order; offsets count on over a stream's parts.

    Args:
        lead: the next token with a text is the first of all, and so are the tokens in its place: they have no space.
    """

    def __init__(self, texts: TokenTexts, *, lead: bool) -> None:
        self._texts, self._lead = texts, lead
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The lists for further tokens."""
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for shown in tokens:
            score = shown.score
            text_of = self._place(shown)
            made = text_of(shown.token)
            result["tokens"].append(made.text)
            result["token_logprobs"].append(None if score is None else _finite(score.logprob))
            result["top_logprobs"].append(None if score is None else _top(score, text_of))
            result["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(made.data or b""))
        return result

    def _place(self, shown: ScoredToken) -> Callable[[int], TokenText]:
        """What tokens say in the place of this one."""
        if self._lead:
            self._lead = not self._texts[shown.token].size
            shown = replace(shown, first=True)
        return partial(shown.text_in_its_place, texts=self._texts)


class ChatScores:
    """Scores in the form of /v1/chat/completions, in the order of the text."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def of(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """The entries for further tokens."""
        content = []
        for shown in tokens:
            if (score := shown.score) is None:
                continue
            pairs = ((score.token, score.logprob), *score.top)
            entry, *top = (_entry(shown.text_in_its_place(token, self._texts), logprob) for token, logprob in pairs)
            content.append({**entry, "top_logprobs": top})
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
