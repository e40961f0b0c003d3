"""The products of kernels/triton on one GPU, by the tiles of its programs; run by gpu.py --kernels."""

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

from accessory.kernels.triton import products
from accessory.kernels.triton.products import Tile
from accessory.quant import FORMATS, QuantizedWeight, format_of

Weight = Tensor | QuantizedWeight  # eight experts'
FEW_TILES = [
    Tile(*sizes)
    for sizes in ((64, 128, 2, 4), (64, 64, 2, 4), (64, 64, 2, 6), (128, 64, 4, 4), (128, 128, 4, 3), (64, 64, 4, 4))
]
PROGRAMS = (1024, 4096)
DOT_TILES = ((8, 32), (4, 32), (4, 64), (16, 32))  # rows and chunks of a program of dots.py
DOT_PAIRS = (2, 4, 8, 16)  # up to beyond what it takes
SHAPES = ((28672, 4096), (4096, 14336), (7168, 1024))
QUANTIZED = tuple(dict.fromkeys(own.triton for own in FORMATS.values() if own.triton is not None))
FORMS = ("plain", *QUANTIZED)


def product_rows() -> None:
    """Every form by every tile, first in many processes at once, so that their kernels lie compiled on the disk.

    The fastest tiles over the shapes become those of what is run behind this.
    """
    work = [(form, tile) for form in FORMS for tile in FEW_TILES]
    dots = [(form, tile) for form in QUANTIZED for tile in DOT_TILES]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.starmap(compile_tile, work, chunksize=1)
        pool.starmap(compile_dots, dots, chunksize=1)
    print("compiled", flush=True)
    torch.manual_seed(0)
    default = products.PROGRAMS
    for form in FORMS:
        few: dict[tuple[Tile, int], list[float]] = {(t, n): [] for t in FEW_TILES for n in PROGRAMS}
        for rows, depth in SHAPES:
            weight = random_weight(form, rows, depth)
            for pairs in (2, 16):
                if pairs > 2 or rows != 7168:  # two experts' weights of that shape would stay in the cache
                    few_row(form, weight, pairs, few)
            if form != "plain":
                dots_row(form, weight)
        tiles = products.FEW if form == "plain" else products.INTEGERS
        tiles[form], programs = min(few, key=lambda key: math.prod(few[key]))
        print(form, "few:", tiles[form], programs)
    products.PROGRAMS = default
    for rows, depth in ((4096, 4096), (1024, 4096), (32000, 4096)):
        dense_row(rows, depth)


def few_row(form: str, weight: Weight, pairs: int, found: dict[tuple[Tile, int], list[float]]) -> None:
    """Products on the tensor cores, by every tile."""
    x = inputs(pairs, weight)
    expert = torch.arange(pairs, device="cuda") % 8
    cells = []
    tiles = products.FEW if form == "plain" else products.INTEGERS
    few_dots, products.DOTS["gathered"] = products.DOTS["gathered"], 0
    for (tile, programs), times in found.items():
        tiles[form], products.PROGRAMS = tile, programs
        times.append(attempt(partial(gathered, x, weight, expert)))
        cells.append(f"{short(tile)}/{programs} {rate(weight, pairs, times[-1])}")
    products.DOTS["gathered"] = few_dots
    print(f"{form} {weight.shape[1]}x{x.shape[1]}, {pairs} pairs, GB/s: {', '.join(cells)}", flush=True)


def dots_row(form: str, weight: Weight) -> None:
    """Dot products of bytes, to be read beside `few_row`'s line of as many pairs."""
    from accessory.kernels.triton import dots

    default = (dots._ROWS, dots._CHUNKS)
    few_dots, products.DOTS["gathered"] = products.DOTS["gathered"], max(DOT_PAIRS)
    for pairs in DOT_PAIRS:
        x, expert = inputs(pairs, weight), torch.arange(pairs, device="cuda") % 8
        cells = []
        for tile in DOT_TILES:
            dots._ROWS, dots._CHUNKS = tile
            cells.append(f"{short(tile)} {rate(weight, pairs, attempt(partial(gathered, x, weight, expert)))}")
        size = f"{weight.shape[1]}x{x.shape[1]}"
        print(f"{form} {size}, {pairs} pairs by dots, GB/s: {', '.join(cells)}", flush=True)
    products.DOTS["gathered"] = few_dots
    dots._ROWS, dots._CHUNKS = default


def rate(weight: Weight, pairs: int, seconds: float) -> str:
    """GB/s of the codes that have to be read: each chosen expert's once."""
    codes = weight if isinstance(weight, Tensor) else weight.codes
    return f"{codes.numel() * codes.element_size() / 8 * min(pairs, 8) / seconds / 1e9:.0f}"


def dense_row(rows: int, depth: int) -> None:
    """Eight weights in turn, which do not fit the cache together."""
    weights = [torch.randn(rows, depth, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
    for tokens in (1, 16):
        x = torch.randn(tokens, depth, dtype=torch.bfloat16, device="cuda")
        times = []
        for way in (F.linear, products.few_token_linear):
            times.append(attempt(lambda x=x, way=way: [way(x, weight) for weight in weights]) / 8 * 1e6)
        print(f"dense {rows}x{depth}, {tokens} tokens: F.linear {times[0]:.1f} us, ours {times[1]:.1f} us", flush=True)


def short(tile: tuple[int, ...]) -> str:
    return "-".join(str(number) for number in tile)


def inputs(pairs: int, weight: Weight) -> Tensor:
    return torch.randn(pairs, weight.shape[-1], dtype=torch.bfloat16, device="cuda")


def random_weight(form: str, rows: int, depth: int) -> Weight:
    """Eight experts' codes, scales and zero points; for "plain" the weight alone."""
    if form == "plain":
        return torch.randn(8, rows, depth, dtype=torch.bfloat16, device="cuda") * 0.02
    own = format_of(form)
    if form == "int8":
        codes = torch.randint(-127, 128, (8, rows, depth), dtype=torch.int8, device="cuda")
        return QuantizedWeight(own, codes, torch.rand(8, rows, 1, device="cuda"))
    codes = torch.randint(256, (8, rows, depth // 2), dtype=torch.uint8, device="cuda")
    scale = torch.rand(8, depth // 64, rows, device="cuda").transpose(1, 2)  # as `lay_out_for_gpu` leaves it
    if form == "nf4":
        return QuantizedWeight(own, codes, scale)
    return QuantizedWeight(own, codes, scale.bfloat16(), (scale * 256).to(torch.uint8))  # with the same strides


def gathered(x: Tensor, weight: Weight, expert: Tensor) -> Tensor:
    if isinstance(weight, Tensor):
        return products.gathered_linear(x, weight, expert)
    return products.gathered_quantized_linear(x, weight, expert)


def compile_tile(form: str, tile: Tile) -> None:
    """Compile what `few_row` times of one tile, with and without shares of the depth."""
    (products.FEW if form == "plain" else products.INTEGERS)[form] = tile
    products.DOTS["gathered"] = 0
    for depth, programs in ((1024, 1), (4096, 1 << 20)):
        weight = random_weight(form, 256, depth)
        products.PROGRAMS = programs
        for pairs in (2, 16):
            with suppress(Exception):  # too large for the registers or the shared memory
                gathered(inputs(pairs, weight), weight, torch.arange(pairs, device="cuda") % 8)


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


def compile_dots(form: str, tile: tuple[int, int]) -> None:
    """Compile what `dots_row` times of one tile."""
    from accessory.kernels.triton import dots

    dots._ROWS, dots._CHUNKS = tile
    products.DOTS["gathered"] = max(DOT_PAIRS)
    weight = random_weight(form, 256, 4096)
    with suppress(Exception):  # too large for the registers
        gathered(inputs(2, weight), weight, torch.arange(2, device="cuda"))
