"""Carrying out commands: every rank has a runner, and all run the same commands in the same order."""

from typing import Any

import torch
from torch import Tensor

from accessory.model.cache import KVCache
from accessory.model.meta import MetaModel
from accessory.parallel.state import agreed, raised_on_all_ranks
from accessory.serve.messages import Command, Freed, Invoke, Link, Read, Stop, Write


class Runner:
    """A model with a cache of so many slots; the first rank's cache remembers who took each token."""

    def __init__(self, model: MetaModel, slots: int) -> None:
        self.model = model
        llma = model.llma

        def new_cache() -> KVCache:
            return llma.new_cache(slots, llma.args.max_seq_len, routes=llma.state.is_first)

        self.cache = agreed(llma.state, new_cache)  # one rank may be out of memory

    def warm_up(self) -> None:
        """Read and write a token for nobody, so that no request waits for what a first one sets in motion."""
        self.read(Read([0], [1], [0], Freed()))
        self.write(Write([0], [0], Freed()))
        self._free(Freed(slots=[0], unclean=[0]))
        if self.cache.routes is not None:
            self.cache.expert_counts.zero_()

    @torch.no_grad()
    def read(self, command: Read) -> Tensor:
        """Logits (R, V) of each row's last token, or (T, V) of all tokens."""
        self._free(command.freed)
        llma = self.model.llma
        tokens_T = torch.tensor(command.tokens, device=llma.state.device)
        return llma.prefill(tokens_T, command.lengths, command.slots, self.cache, all_logits=command.all_logits)

    @torch.no_grad()
    def write(self, command: Write) -> Tensor:
        """Logits (R, V) of each slot's next token, in the command's order."""
        self._free(command.freed)
        llma, slots = self.model.llma, command.slots
        # Requests take the lowest free slots, so where few run only these are computed; doubling, since whatever is
        # compiled or captured for a number of slots should serve again.
        count = min(1 << max(slots).bit_length(), self.cache.slots)
        last, active = [0] * count, [False] * count
        for slot, token in zip(slots, command.tokens, strict=True):
            last[slot], active[slot] = token, True
        device = llma.state.device
        cache = self.cache.first(count)
        logits_SV = llma.decode(torch.tensor(last, device=device), cache, torch.tensor(active, device=device))
        self.cache.extend(slots, [1] * len(slots))
        return logits_SV[slots]

    def invoke(self, command: Invoke) -> Any:
        """What a method of the model returns, and raises."""
        return getattr(self.model, command.method)(*command.args, **command.kwargs)

    def _free(self, freed: Freed) -> None:
        for slot in freed.unclean:
            self.cache.clear(slot)
        for slot in freed.slots:
            self.cache.free(slot)


def follow(runner: Runner, first: Link) -> None:
    """Do what the first rank says, until it says that this is all.

    Raises:
        EOFError: the first rank is gone.
    """
    while True:
        command: Command = first.receive()
        match command:
            case Read():
                runner.read(command)
            case Write():
                runner.write(command)
            case Invoke():
                try:
                    runner.invoke(command)
                except Exception as error:
                    if not raised_on_all_ranks(error):
                        raise
            case Stop():
                first.send(command)  # tells an end from a loss
                return
