"""The first rank's loop: it takes requests, lets every rank run the next step, and reports what came of it."""

import queue
from collections.abc import Callable

import torch
from torch import Tensor

from accessory.generation.sampling import not_finite, sample_each
from accessory.launch.peers import HOW_RANKS_GO
from accessory.parallel.state import raised_on_all_ranks
from accessory.serve.batch import Batch, Reading, Sequence, Writing
from accessory.serve.messages import (
    Answer,
    Call,
    Cancel,
    Close,
    Command,
    Freed,
    Invoke,
    Link,
    Lost,
    Order,
    Read,
    Report,
    Step,
    Stop,
    Submit,
    Write,
    sendable,
)
from accessory.serve.request import Event, RankLost, TokenScore
from accessory.serve.runner import Runner
from accessory.serve.scores import score_prompt, token_scores
from accessory.serve.tally import Tally, newest_routes


class Desk:
    """Serves requests one step at a time.

    Without work it waits for an order and costs nothing; it takes all new orders between two steps. The ranks learn
    each step from a command, so that no collective is ever pending while there is nothing to do.

    Args:
        followers: the connections to the other ranks, which `follow`.
        inbox: where orders arrive.
        report: is given what is to be told.
    """

    def __init__(
        self,
        runner: Runner,
        followers: list[Link],
        *,
        inbox: "queue.SimpleQueue[Order]",
        report: Callable[[Report], None],
        prefill_tokens: int,
    ) -> None:
        self._runner, self._followers, self._inbox, self._report = runner, followers, inbox, report
        slots = runner.cache.slots
        self._batch = Batch(slots, max(prefill_tokens, slots))
        self._sequences: dict[int, Sequence] = {}
        self._freed = Freed()  # for the next command
        self._events: list[tuple[int, Event | Exception]] = []
        self._tally = Tally(runner.cache)

    def run(self) -> None:
        """Serve until told to close.

        Raises:
            RankLost: another rank is gone.
        """
        while self._take_orders():
            step = self._batch.next()
            if isinstance(step, Reading):
                self._read(step)
            elif isinstance(step, Writing):
                self._write(step)
            # While prompts are read there may be nothing to tell for a while, but how busy the ranks are.
            if self._events or isinstance(step, Reading):
                self._report(Step(self._events, self._tally.load(self._batch)))
                self._events = []
        self._command(Stop())

    def _take_orders(self) -> bool:
        """Take what has arrived; without work, wait for it. False: it is time to end."""
        while True:
            try:
                order = self._inbox.get(block=self._batch.idle and not self._events)
            except queue.Empty:
                return True
            match order:
                case Submit(number, request):
                    self._sequences[number] = Sequence(number, request, self._runner.model.tokenizer)
                    self._batch.add(self._sequences[number])
                case Cancel(number):
                    if (sequence := self._sequences.get(number)) is not None:
                        self._tally.cancelled += 1
                        self._end(sequence, Event(finish="cancelled"))
                case Call():
                    self._report(self._call(order))
                case Lost(reason):
                    raise RankLost(reason)
                case Close():
                    return False

    def _read(self, step: Reading) -> None:
        """Read pieces of prompts; the first token of those that end, and one more for every running answer."""
        tokens = [
            token
            for sequence, count in step.rows
            for token in sequence.request.tokens[sequence.read : sequence.read + count]
        ]
        self._tally.prompt_tokens += len(tokens)
        # To the model a running answer is a prompt with one token to read.
        tokens += [sequence.last_token for sequence in step.answers]
        lengths = [count for _, count in step.rows] + [1] * len(step.answers)
        sequences = [sequence for sequence, _ in step.rows] + step.answers
        slots = [sequence.slot for sequence in sequences if sequence.slot is not None]
        scored = any(sequence.request.prompt_logprobs is not None for sequence, _ in step.rows)
        command = Read(tokens, lengths, slots, self._take_freed(), all_logits=scored)
        self._command(command)
        logits = self._runner.read(command)
        pieces = list(logits.split(lengths)) if scored else list(logits.split(1))
        ready, finals = [], []
        for (sequence, count), piece_TV in zip(step.rows, pieces[: len(step.rows)], strict=True):
            if scored and sequence.request.prompt_logprobs is not None:
                score_prompt(sequence, piece_TV)
            sequence.read += count
            if not sequence.unread:
                ready.append(sequence)
                finals.append(piece_TV[-1:])
        finals += pieces[len(step.rows) :]
        if finals:
            self._advance(ready + step.answers, torch.cat(finals), newest_routes(self._runner.cache, step.answers))

    def _write(self, step: Writing) -> None:
        """One more token for every answer that is being written."""
        rows = step.rows
        slots = [sequence.slot for sequence in rows if sequence.slot is not None]
        command = Write([sequence.last_token for sequence in rows], slots, self._take_freed())
        self._command(command)
        logits_RV = self._runner.write(command)
        self._advance(rows, logits_RV, newest_routes(self._runner.cache, rows))

    def _advance(
        self,
        rows: list[Sequence],
        logits_RV: Tensor,
        routes: dict[int, tuple[tuple[int, ...], ...]],
    ) -> None:
        """Choose the next token of each sequence, and tell what came of it.

        Args:
            routes: of the tokens that the logits stand behind, by number, where they are told.
        """
        samplings = [sequence.request.sampling for sequence in rows]
        tokens = sample_each(logits_RV, samplings, [sequence.draw() for sequence in rows]).tolist()
        for row, (sequence, token) in enumerate(zip(rows, tokens, strict=True)):
            if token < 0:
                self._end(sequence, not_finite())
                continue
            asked = sequence.request
            scores: tuple[TokenScore, ...] = ()
            prompt_scores: tuple[TokenScore | None, ...] = ()
            if asked.logprobs is not None:
                scores = tuple(token_scores(logits_RV[row : row + 1], [token], asked.logprobs))
            if asked.prompt_logprobs is not None and not sequence.written:
                prompt_scores, sequence.prompt_scores = tuple(sequence.prompt_scores), []
            if asked.reads_only:
                self._tally.finished += 1
                self._end(sequence, Event(prompt_scores=prompt_scores, finish="length"))
                continue
            text = sequence.push(token)
            event = Event(
                text=text,
                tokens=(token,),
                scores=scores,
                prompt_scores=prompt_scores,
                routes=(routes[sequence.number],) if sequence.number in routes else (),
                finish=sequence.finish,
            )
            self._tally.generated_tokens += 1
            if sequence.finish:
                self._tally.finished += 1
                self._end(sequence, event)
            else:
                self._events.append((sequence.number, event))

    def _end(self, sequence: Sequence, last: Event | Exception) -> None:
        del self._sequences[sequence.number]
        if (slot := self._batch.leave(sequence)) is not None:
            self._freed.slots.append(slot)
            # Masked positions still enter a product: NaN must not be left to the slot's next sequence.
            if isinstance(last, Exception) or not sequence.written:
                self._freed.unclean.append(slot)
        self._events.append((sequence.number, last))

    def _call(self, call: Call) -> Answer:
        """Let every rank call a method of the model.

        Raises:
            Exception: one that was not raised on all ranks alike: they may be out of step now.
        """
        command = Invoke(call.method, call.args, call.kwargs)
        self._command(command)
        state = self._runner.model.llma.state
        try:
            return Answer(call.number, _on_cpu(self._runner.invoke(command)))
        except Exception as error:
            if state.mp_size > 1 and not raised_on_all_ranks(error):
                raise
            return Answer(call.number, error=sendable(error))

    def _take_freed(self) -> Freed:
        freed, self._freed = self._freed, Freed()
        return freed

    def _command(self, command: Command) -> None:
        for number, follower in enumerate(self._followers, start=1):
            try:
                follower.send(command)
            except EOFError:
                raise RankLost(lost(number)) from None


def lost(rank: int) -> str:
    """What is said of a rank that went without a word."""
    return f"rank {rank} is gone ({HOW_RANKS_GO})"


def _on_cpu(result: object) -> object:
    """The same with its tensors on the CPU, as the asking process may use no other device."""
    if isinstance(result, Tensor):
        return result.cpu()
    if isinstance(result, list):
        return [_on_cpu(part) for part in result]
    if isinstance(result, dict):
        return {key: _on_cpu(part) for key, part in result.items()}
    return result
