"""What a decoded token costs, counted and not timed: bytes of weights, calls of the native library, memory."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accessory import kernels
from accessory.config import ModelArgs, MoEArgs, QuantArgs
from accessory.kernels.cpu import library
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState
from accessory.tools.quality import quantized_copy
from accessory.train.init import init_weights

LAYERS, DIM, HIDDEN, VOCAB, HEADS, KV_HEADS, WIDTH, EXPERTS, CHOSEN = 3, 128, 192, 256, 4, 2, 32, 8, 2
ARGS = ModelArgs(
    dim=DIM,
    hidden_dim=HIDDEN,
    n_layers=LAYERS,
    n_heads=HEADS,
    n_kv_heads=KV_HEADS,
    head_dim=WIDTH,
    vocab_size=VOCAB,
    max_seq_len=4096,
    moe=MoEArgs(num_experts=EXPERTS, num_experts_per_tok=CHOSEN),
)
# Of a layer: queries, keys, values and output, the router, and the rows of an expert's three matrices.
MATRICES = [(HEADS * WIDTH, DIM), (KV_HEADS * WIDTH, DIM), (KV_HEADS * WIDTH, DIM), (DIM, HEADS * WIDTH)]
EXPERT = [(2 * HIDDEN, DIM), (DIM, HIDDEN)]
needs_kernels = pytest.mark.skipif(not library.native_available(), reason="the native kernels are not built")


@pytest.fixture(scope="module")
def plain() -> Transformer:
    model = Transformer(ARGS, ParallelState.single("cpu"), dtype=torch.bfloat16).eval()
    init_weights(model, seed=0)
    return model


class Decoding:
    """Sequences that go on token by token."""

    def __init__(self, model: Transformer, slots: int = 1, length: int = 64) -> None:
        self.model, self.slots, self.cache = model, slots, model.new_cache(slots, length)
        self.active = torch.ones(slots, dtype=torch.bool)
        tokens = torch.arange(slots * 3) % VOCAB
        self.tokens = model.prefill(tokens, [3] * slots, list(range(slots)), self.cache).argmax(-1)

    def step(self) -> None:
        self.tokens = self.model.decode(self.tokens, self.cache, self.active).argmax(-1)
        self.cache.extend(list(range(self.slots)), [1] * self.slots)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...]]]:
    """Names and arguments of the native library's calls, from here on."""
    loaded, made = library.native_library(), []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            made.append((name.removeprefix("accessory_"), arguments))
            return function(*arguments)

        return call

    for name, function in [*vars(loaded).items()]:
        if name.startswith("accessory_"):
            monkeypatch.setattr(loaded, name, counted(name, function))
    return made


@needs_kernels
@torch.inference_mode()
def test_each_matrix_is_read_once_and_of_experts_the_chosen_ones(plain: Transformer, request: Any) -> None:
    decoding = Decoding(plain)
    decoding.step()
    calls = request.getfixturevalue("calls")  # once all functions have been asked for
    decoding.step()
    read = 0
    for name, arguments in calls:
        if name in ("gathered_linear", "gathered_gate"):
            expert, _, pairs, _, rows, depth, *_ = arguments[-9:]
            matrices, bf16 = (2, True) if name == "gathered_gate" else (1, arguments[1])
            read += (1 if expert is None else pairs) * matrices * rows * depth * (2 if bf16 else 4)
    own = sum(rows * depth for rows, depth in MATRICES) + EXPERTS * DIM
    own += CHOSEN * sum(rows * depth for rows, depth in EXPERT)
    assert read == 2 * (LAYERS * own + VOCAB * DIM)


@needs_kernels
@pytest.mark.parametrize("quant", [None, "int8", "int4", "nf4"])
@torch.inference_mode()
def test_a_layer_takes_so_many_parallel_regions(plain: Transformer, quant: str | None, request: Any) -> None:
    model = plain if quant is None else quantized_copy(plain, QuantArgs(type=quant))  # type: ignore[arg-type]
    decoding = Decoding(model)
    decoding.step()
    calls = request.getfixturevalue("calls")
    decoding.step()
    counts = Counter(name for name, _ in calls)
    matrices, products = len(MATRICES) + len(EXPERT), {"gathered_linear": 0, "quantized_linear": 0}
    products["gathered_linear" if quant is None else "quantized_linear"] += LAYERS * matrices
    products["gathered_linear"] += LAYERS + 1  # the routers, and the head
    gate = "gate"
    if quant is None and kernels.tiles_serve():  # the gate is part of the product before it
        gate = "gathered_gate"
        products["gathered_linear"] -= LAYERS
    steps = ("choose_experts", "rotate", gate, "weighted_sum", "attend_slots")
    expected = {name: count for name, count in products.items() if count} | dict.fromkeys(steps, LAYERS)
    assert counts == expected | {"rms_norm": 2 * LAYERS + 1}


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@needs_kernels
@torch.inference_mode()
def test_pytorch_adds_little_to_a_layer(plain: Transformer) -> None:
    """Each of its operations takes as long as a kernel of one token."""
    decoding = Decoding(plain)
    decoding.step()
    with _Operations() as operations:
        decoding.step()
    views = {"aten.view", "aten.unsqueeze", "aten.select", "aten.slice", "aten.split", "aten.detach", "aten.alias"}
    views |= {"aten.transpose", "aten.permute", "aten.expand", "aten.as_strided", "aten.flatten", "aten.unflatten"}
    counted = {name: count for name, count in operations.counts.items() if name not in views and "empty" not in name}
    assert sum(counted.values()) <= 5 * LAYERS + 10, str(dict(counted))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
@pytest.mark.parametrize("quant", [None, "int4"])
@torch.inference_mode()
def test_memory_does_not_grow_with_the_tokens(plain: Transformer, quant: str | None) -> None:
    model = plain if quant is None else quantized_copy(plain, QuantArgs(type=quant))  # type: ignore[arg-type]
    decoding = Decoding(model, length=2100)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) << 10

    cache = sum(tensor.nbytes for tensor in (decoding.cache.k, decoding.cache.v))
    for _ in range(100):
        decoding.step()
    before = resident()
    for _ in range(1900):
        decoding.step()
    assert resident() - before < cache + (2 << 20)  # the cache's pages come when they are written
