"""Memory of ranks that serve a model, before anything is loaded, and how fast they may answer.

Weights are those of the plan's rows, the cache is the server's own, without memory, and a step that reads prompts is
traced on the very model (`train.trace`). Experts lie as in generation: on the model-parallel ranks alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from accessory.config import QUANT_FORMS, ModelArgs, QuantArgs
from accessory.generation.engine import PREFILL_TOKENS
from accessory.model.cache import new_cache
from accessory.parallel.placement import resolve_placement
from accessory.parallel.plan import Placement, dtype_of, parameter_shapes, rank_bytes, share_of_tokens, split_of
from accessory.train.trace import planned_state, trace_prefill


@dataclass(frozen=True, kw_only=True)
class Server:
    """How one server holds a model.

    Attributes:
        mp_size: its ranks.
        quant: of its weights; None: as they are.
        slots, length: of its cache.
    """

    mp_size: int
    placement: Placement
    quant: QuantArgs | None
    dtype: torch.dtype
    slots: int
    length: int
    gpu: bool = True


class ServingMemory(NamedTuple):
    """Bytes of the fullest rank.

    Attributes:
        cache: of keys and values, and of who took each token.
        activations: the most that reading prompts needs besides.
    """

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class ServingRates:
    """Bytes a second that a device reads of its memory, and sends to others of its host."""

    read: float = 3000e9
    fast: float = 300e9


class PlannedServer(NamedTuple):
    """One way to serve a model from some devices.

    Attributes:
        servers: that so many devices are enough for, each with a model of its own.
        sent: bytes that a rank sends while every slot gets a token.
        seconds: that this takes, with half the cache filled.
    """

    server: Server
    servers: int
    memory: ServingMemory
    sent: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.servers * self.server.slots / self.seconds


def serving_memory(args: ModelArgs, server: Server) -> ServingMemory:
    """Of the first rank, whose cache alone remembers the experts of each token."""
    args = args.replace(quant=server.quant, max_seq_len=server.length)
    cache = new_cache(
        args, planned_state(server.mp_size, 1), server.slots, server.length, dtype=server.dtype, routes=True
    )
    reading = trace_prefill(
        args,
        mp_size=server.mp_size,
        placement=server.placement,
        dtype=server.dtype,
        rows=_rows(server),
        gpu=server.gpu,
    )
    return ServingMemory(_weights(args, server), cache.nbytes, reading)


def _rows(server: Server) -> tuple[int, ...]:
    """Prompts that a step reads: in every slot its share of the tokens."""
    tokens = min(max(PREFILL_TOKENS, server.slots), server.slots * server.length)
    return tuple(tokens // server.slots + (slot < tokens % server.slots) for slot in range(server.slots))


def _weights(args: ModelArgs, server: Server) -> int:
    return rank_bytes(args, server.placement, server.mp_size, lambda name: dtype_of(name, server.dtype).itemsize)


def plan_serving(
    args: ModelArgs,
    devices: int,
    limit: float,
    *,
    slots: int,
    length: int,
    dtype: torch.dtype,
    per_host: int,
    rates: ServingRates,
) -> list[PlannedServer]:
    """The ways that fit devices of ``limit`` bytes, those first that write most tokens a second.

    Raises:
        ValueError: none does; names what the one that needs the least would take.
    """
    every = [
        Server(mp_size=mp_size, placement=placement, quant=quant, dtype=dtype, slots=slots, length=length)
        for mp_size in range(1, min(devices, per_host) + 1)
        for quant in _formats(args)
        for placement in _placements(args.replace(quant=quant), mp_size)
    ]
    found = [(serving_memory(args, server), server) for server in every]
    planned = [_planned(args, server, memory, devices, rates) for memory, server in found if memory.total <= limit]
    if not planned:
        least, server = min(found, key=lambda own: own[0].total)
        raise ValueError(
            f"no server fits {limit / 2**30:.2f} GiB: the smallest ({described(server)}) takes "
            f"{least.total / 2**30:.2f} GiB a device; give more devices of a host, fewer --slots, or fewer --max_words"
        )
    return sorted(planned, key=lambda own: (-own.tokens_per_s, own.memory.total))


def _formats(args: ModelArgs) -> list[QuantArgs | None]:
    return [None, *(QuantArgs(type=form) for form in QUANT_FORMS)] if args.quant is None else [args.quant]


def _placements(args: ModelArgs, mp_size: int) -> Iterator[Placement]:
    for placement in ("expert", "tensor") if mp_size > 1 else ("auto",):
        try:
            yield resolve_placement(args, placement, mp_size)
        except ValueError:
            continue


def _planned(
    args: ModelArgs, server: Server, memory: ServingMemory, devices: int, rates: ServingRates
) -> PlannedServer:
    """Writing is bound by what is read: the weights that some token meets, once for all of them, and the cache."""
    quantized = args.replace(quant=server.quant)
    met = {name: _met(args, name, server.slots) for name, _ in parameter_shapes(quantized)}
    weights = rank_bytes(
        quantized,
        server.placement,
        server.mp_size,
        lambda name: met[name] * dtype_of(name, server.dtype).itemsize,
    )
    row = server.slots * args.dim * server.dtype.itemsize
    sent = 2 * args.n_layers * 2 * row * (server.mp_size - 1) / server.mp_size  # as a reduction and a gathering
    seconds = (weights + memory.cache / 2) / rates.read + sent / rates.fast
    return PlannedServer(server, devices // server.mp_size, memory, sent, seconds)


def _met(args: ModelArgs, name: str, tokens: int) -> float:
    """Which part of a parameter some of so many tokens meets; of the embedding they look up a row each."""
    row = split_of(name)
    if row.kind == "embedding":
        return 0.0
    return 1 - (1 - share_of_tokens(row, args)) ** tokens


def described(server: Server) -> str:
    placed = f" {server.placement}" if server.mp_size > 1 else ""
    ranks = "1 rank" if server.mp_size == 1 else f"{server.mp_size} ranks"
    return f"{ranks}{placed}, {server.quant.type if server.quant else 'not quantized'}"


def serve_options(server: Server) -> dict[str, object]:
    """What the command serve is told."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    told: dict[str, object] = {"nproc": server.mp_size, "slots": server.slots, "max_seq_len": server.length}
    told |= {"dtype": names[server.dtype], "expert_placement": server.placement}
    return told if server.quant is None else told | {"quant": server.quant.type}
