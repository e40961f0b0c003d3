"""Products with quantized weights beside those with bfloat16 at its best path, and beside other libraries'.

    python benchmarks/quantized.py                 # matrices of the shape 'mid', 2 threads

Every product goes through so many copies of its weight that none is left in the cache from one use to the next. The
sides take turns, one product each, so that a noisy machine slows all; times are medians over all products, ratios are
of medians. torchao and bitsandbytes are measured where they are installed.
"""

import argparse
import importlib.util
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from accessory.kernels import native_variant
from accessory.products import gathered_linear, grouped_linear, linear
from accessory.quant import QuantizedWeight, quantize

DENSE = ((7168, 1024), (1024, 3584))
EXPERTS, CHOSEN = 8, 2
OURS = (("int8", "int8", 64), ("int4", "int4", 64), ("int4, groups of 32", "int4", 32), ("nf4", "nf4", 64))
OURS += (("mxfp4", "mxfp4", 32),)
WORKING_SET = 2**28  # bytes of bfloat16 weights that one round goes through
Run = Callable[[int], Tensor]  # the product with a copy of the weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")  # of the other libraries
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown CPU")
    print(f"{cpu}, {arguments.threads} threads, {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"kernels {native_variant()}, {time.strftime('%Y-%m-%d')}\n")
    with torch.inference_mode():
        for rows, depth in DENSE:
            weight = torch.randn(rows, depth) / depth**0.5
            sides = dense_sides(weight)
            for tokens in arguments.tokens:
                x = torch.randn(tokens, depth).bfloat16()
                number = count(weight.numel()) if tokens <= 64 else 2
                compare(f"{rows} x {depth}, {tokens} tokens", sides, x, arguments.rounds, number)
        for rows, depth in DENSE:
            weight = torch.randn(EXPERTS, rows, depth) / depth**0.5
            sides = expert_sides(weight)
            for tokens in arguments.tokens:
                x = torch.randn(tokens * CHOSEN, depth).bfloat16()
                title = f"{EXPERTS} x {rows} x {depth}, {tokens} tokens to {CHOSEN} each"
                compare(title, sides, x, arguments.rounds, count(weight.numel()))


def dense_sides(weight: Tensor) -> dict[str, Callable[[Tensor], Run]]:
    """For each way a function that makes, of the tokens, the product with copy i."""
    plain = copies(weight.bfloat16(), weight.numel())
    sides: dict[str, Callable[[Tensor], Run]] = {"bfloat16": lambda x: lambda i: linear(x, plain[i])}
    for label, form, group in OURS:
        own = weight_copies(quantize(weight, form, group_size=group))
        sides[label] = lambda x, own=own: lambda i: linear(x, own[i])
    return sides | torch_sides(weight) | torchao_sides(weight) | bitsandbytes_sides(weight)


def expert_sides(weight: Tensor) -> dict[str, Callable[[Tensor], Run]]:
    def product(held: list[Tensor] | list[QuantizedWeight], x: Tensor) -> Run:
        pairs = x.shape[0]
        if pairs <= 32:  # a token's experts differ; tokens choose at random
            expert = torch.cat([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(pairs // CHOSEN)])
            return lambda i: gathered_linear(x, held[i], expert)
        ends = torch.arange(1, EXPERTS + 1, dtype=torch.int32) * (pairs // EXPERTS)
        return lambda i: grouped_linear(x, held[i], ends)

    plain = copies(weight.bfloat16(), weight.numel())
    sides: dict[str, Callable[[Tensor], Run]] = {"bfloat16": lambda x: product(plain, x)}
    for label, form, group in OURS:
        own = weight_copies(quantize(weight, form, group_size=group))
        sides[label] = lambda x, own=own: product(own, x)
    return sides


def torch_sides(weight: Tensor) -> dict[str, Callable[[Tensor], Run]]:
    """PyTorch's own operations, each with groups of its own kind."""
    int8 = quantize(weight, "int8")
    codes8, scale8 = copies(int8.codes, weight.numel()), int8.scale.squeeze(-1).bfloat16()
    unsigned = quantize(weight, "int4").codes
    codes = torch.stack((unsigned >> 4, unsigned & 15), dim=-1).flatten(-2).int()
    codes4 = copies(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), weight.numel())
    groups = torch.rand(weight.shape[1] // 64, weight.shape[0], 2).bfloat16()
    return {
        "torch._weight_int8pack_mm": lambda x: lambda i: torch._weight_int8pack_mm(x, codes8[i], scale8),
        "torch._weight_int4pack_mm_for_cpu": lambda x: (
            lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes4[i], 64, groups)
        ),
    }


def torchao_sides(weight: Tensor) -> dict[str, Callable[[Tensor], Run]]:
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    modules = []
    for _ in range(count(weight.numel())):
        module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
        module.weight.copy_(weight)
        modules.append(module)
        quantize_(module, Int8WeightOnlyConfig())
    return {"torchao int8": lambda x: lambda i: modules[i](x)}


def bitsandbytes_sides(weight: Tensor) -> dict[str, Callable[[Tensor], Run]]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=False)
    held = copies(packed, weight.numel())
    return {"bitsandbytes nf4": lambda x: lambda i: bitsandbytes.matmul_4bit(x, held[i].t(), quant_state=state)}


def count(elements: int) -> int:
    return max(2, WORKING_SET // (2 * elements))


def copies(tensor: Tensor, elements: int) -> list[Tensor]:
    return [tensor.clone() for _ in range(count(elements))]


def weight_copies(weight: QuantizedWeight) -> list[QuantizedWeight]:
    parts = zip(*(copies(tensor, math.prod(weight.shape)) for tensor in weight.tensors().values()), strict=True)
    return [QuantizedWeight(weight.format, *own) for own in parts]


def compare(title: str, sides: dict[str, Callable[[Tensor], Run]], x: Tensor, rounds: int, number: int) -> None:
    """Print median microseconds of each side, and their ratio to the first's.

    Args:
        number: copies of the weight.
    """
    runs = {label: make(x) for label, make in sides.items()}
    times: dict[str, list[float]] = {label: [] for label in runs}
    for turn in range((rounds + 1) * number):
        for label, run in runs.items():
            start = time.perf_counter()
            run(turn % number)
            times[label].append(time.perf_counter() - start)
    medians = {label: statistics.median(taken[number:]) for label, taken in times.items()}  # the first round warms up
    print(title)
    for label, median in medians.items():
        print(f"  {label:36}{median * 1e6:>9.0f} us{median / medians['bfloat16']:>8.2f} x", flush=True)


if __name__ == "__main__":
    main()
