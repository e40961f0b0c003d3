"""The products of triton_products on one GPU, by the tiles of its programs; run by gpu.py --kernels."""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.config import QUANT_FORMS
from accessory.kernels import triton_products
from accessory.kernels.triton_products import Tile

Weight = tuple[Tensor, Tensor | None, Tensor | None]  # eight experts' codes, scales and zero points
FEW_TILES = [
    Tile(*sizes)
    for sizes in (
        *((32, 128, 2, 4), (32, 64, 2, 4), (32, 64, 2, 6), (32, 128, 2, 3), (32, 128, 4, 4)),
        *((64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 4, 4), (16, 128, 1, 4), (16, 64, 1, 6)),
    )
]
MANY_TILES = [
    (pairs, Tile(*sizes))
    for pairs in (64, 128)
    for sizes in ((128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 8, 4), (64, 128, 4, 3))
]
SHAPES = ((28672, 4096), (4096, 14336), (7168, 1024))
FORMS = ("plain", *QUANT_FORMS)


def product_rows() -> None:
    """Every form by every tile, first in many processes at once, so that their kernels lie compiled on the disk.

    The fastest tiles over the shapes become those of what is run behind this.
    """
    work = [(form, number) for form in FORMS for number in range(max(len(FEW_TILES), len(MANY_TILES)))]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.starmap(compile_tile, work, chunksize=1)
    print("compiled", flush=True)
    torch.manual_seed(0)
    for form in FORMS:
        few: dict[Tile, list[float]] = {tile: [] for tile in FEW_TILES}
        many: dict[tuple[int, Tile], list[float]] = {tile: [] for tile in MANY_TILES}
        for rows, depth in SHAPES:
            weight = random_weight(form, rows, depth)
            for pairs in (2, 16, 64):
                if pairs > 2 or rows != 7168:  # two experts' weights of that shape would stay in the cache
                    few_row(form, weight, pairs, few)
            if rows != 7168:
                many_row(form, weight, many)
        triton_products.FEW[form] = min(few, key=lambda tile: math.prod(few[tile]))
        print(form, "few:", triton_products.FEW[form])
        if form != "plain":
            pairs, triton_products.MANY[form] = min(many, key=lambda tile: math.prod(many[tile]))
            print(form, "many:", pairs, triton_products.MANY[form])
    triton_products.MANY_PAIRS = 64
    for rows, depth in ((4096, 4096), (1024, 4096), (32000, 4096)):
        dense_row(rows, depth)


def few_row(form: str, weight: Weight, pairs: int, found: dict[Tile, list[float]]) -> None:
    codes = weight[0]
    size = codes.numel() * codes.element_size() / 8 * min(pairs, 8)
    x = inputs(pairs, weight)
    expert = torch.arange(pairs, device="cuda") % 8
    cells = []
    for tile, times in found.items():
        triton_products.FEW[form] = tile
        times.append(attempt(partial(gathered, x, weight, expert)))
        cells.append(f"{short(tile)} {size / times[-1] / 1e9:.0f}")
    print(f"{form} {codes.shape[1]}x{x.shape[1]}, {pairs} pairs, GB/s: {', '.join(cells)}", flush=True)


def many_row(form: str, weight: Weight, found: dict[tuple[int, Tile], list[float]]) -> None:
    x = inputs(1024, weight)
    ends = (torch.arange(1, 9, device="cuda") * 128).to(torch.int32)
    label = f"{form} {weight[0].shape[1]}x{x.shape[1]}, 1,024 sorted pairs, ms:"
    if form == "plain":
        theirs = attempt(partial(F.grouped_mm, x, weight[0].transpose(1, 2), offs=ends))
        print(label, f"grouped_mm {theirs * 1e3:.3f}", flush=True)
        return
    cells = []
    for (pairs, tile), times in found.items():
        triton_products.MANY[form], triton_products.MANY_PAIRS = tile, pairs
        times.append(attempt(partial(triton_products.grouped_quantized_linear, x, *weight, ends)))
        cells.append(f"{pairs}/{short(tile)} {times[-1] * 1e3:.3f}")
    plain = attempt(partial(triton_products.plain_values, *weight, torch.bfloat16))
    print(label, ", ".join(cells), f"plain values alone {plain * 1e3:.3f}", flush=True)


def dense_row(rows: int, depth: int) -> None:
    """Eight weights in turn, which do not fit the cache together."""
    weights = [torch.randn(rows, depth, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
    for tokens in (1, 16):
        x = torch.randn(tokens, depth, dtype=torch.bfloat16, device="cuda")
        times = []
        for way in (F.linear, triton_products.few_token_linear):
            times.append(attempt(lambda x=x, way=way: [way(x, weight) for weight in weights]) / 8 * 1e6)
        print(f"dense {rows}x{depth}, {tokens} tokens: F.linear {times[0]:.1f} us, ours {times[1]:.1f} us", flush=True)


def short(tile: Tile) -> str:
    return "-".join(str(number) for number in tile)


def inputs(pairs: int, weight: Weight) -> Tensor:
    codes = weight[0]
    depth = codes.shape[-1] * (2 if codes.dtype == torch.uint8 else 1)
    return torch.randn(pairs, depth, dtype=torch.bfloat16, device="cuda")


def random_weight(form: str, rows: int, depth: int) -> Weight:
    """Eight experts' codes, scales and zero points; for "plain" the weight alone."""
    if form == "plain":
        return torch.randn(8, rows, depth, dtype=torch.bfloat16, device="cuda") * 0.02, None, None
    if form == "int8":
        return (
            torch.randint(-127, 128, (8, rows, depth), dtype=torch.int8, device="cuda"),
            torch.rand(8, rows, 1, device="cuda"),
            None,
        )
    codes = torch.randint(256, (8, rows, depth // 2), dtype=torch.uint8, device="cuda")
    scale = torch.rand(8, rows, depth // 64, device="cuda")
    if form == "nf4":
        return codes, scale, None
    return codes, scale.bfloat16(), torch.randint(256, scale.shape, dtype=torch.uint8, device="cuda")


def gathered(x: Tensor, weight: Weight, expert: Tensor) -> Tensor:
    codes, scale, zero = weight
    if scale is None:
        return triton_products.gathered_linear(x, codes, expert)
    return triton_products.gathered_quantized_linear(x, codes, scale, zero, expert)


def compile_tile(form: str, number: int) -> None:
    """Compile what `kernel_rows` times of one tile."""
    weight = random_weight(form, 256, 1024)
    if number < len(FEW_TILES):
        triton_products.FEW[form] = FEW_TILES[number]
        for pairs in (2, 16, 64):
            x = torch.randn(pairs, 1024, dtype=torch.bfloat16, device="cuda")
            with suppress(Exception):  # too large for the registers or the shared memory
                gathered(x, weight, torch.arange(pairs, device="cuda") % 8)
    if number < len(MANY_TILES) and form != "plain":
        triton_products.MANY_PAIRS, triton_products.MANY[form] = MANY_TILES[number]
        x = torch.randn(1024, 1024, dtype=torch.bfloat16, device="cuda")
        with suppress(Exception):
            ends = (torch.arange(1, 9, device="cuda") * 128).to(torch.int32)
            triton_products.grouped_quantized_linear(x, *weight, ends)


def attempt(run: Callable[[], Any], times: int = 10) -> float:
    """Seconds of one call, launched from a graph; infinite where it does not run."""
    try:
        run()
    except Exception:
        return math.inf
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    graph.replay()
    return statistics.median(seconds(graph.replay) for _ in range(5)) / times


def seconds(run: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start
