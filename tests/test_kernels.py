"""The native products against float64, their PyTorch twin, and themselves in other batches."""

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.config import QuantArgs
from accessory.kernels import (
    FEW_TOKENS,
    few_token_linear,
    gathered_linear,
    native_variant,
)
from accessory.kernels.cpu import library, products
from accessory.kernels.products import gathered_linear_reference
from accessory.parallel.state import Place

DTYPES = (torch.bfloat16, torch.float32)
BF16_VARIANTS = [*library.runnable_variants(), *["tiles"] * library.tiles_serve()]
variants = pytest.mark.parametrize(
    ("variant", "dtype"),
    [
        (variant, dtype)
        for variant, dtype in product(BF16_VARIANTS, DTYPES)
        if variant != "tiles" or dtype != torch.float32
    ],
    ids=lambda value: str(value),
)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def draw_experts(pairs: int, experts: int, seed: int = 0) -> Tensor:
    """Expert numbers from -1, for none, on."""
    return torch.randint(-1, experts, (pairs,), generator=torch.Generator().manual_seed(seed))


def assert_true(y_PR: Tensor, x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> None:
    """y is the float64 product to within float32 sums of 16 lanes and the rounding to y's dtype."""
    assert y_PR.dtype == x_PD.dtype
    x, w = x_PD.double(), w_ERD.double()
    truth = gathered_linear_reference(x, w, expert_P)
    terms = gathered_linear_reference(x.abs(), w.abs(), expert_P)
    rounding = 2**-8 if y_PR.dtype == torch.bfloat16 else 2**-24
    allowed = rounding * truth.abs() + (x_PD.shape[1] / 16 + 16) * 2**-24 * terms
    assert bool(((y_PR.double() - truth).abs() <= allowed).all())


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For tests that change the choice of variant, which is made once per process."""
    library.native_variant.cache_clear()
    library.tiles_serve.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    library.native_variant.cache_clear()
    library.tiles_serve.cache_clear()


@pytest.fixture
def said() -> Iterator[list[logging.LogRecord]]:
    """Records of the kernels' logger, whatever another test has set up above it."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment]
    library.logger.addHandler(handler)
    yield records
    library.logger.removeHandler(handler)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- the kernel ------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("depth", [1, 7, 33, 127, 128, 129, 300, 1024])
def test_product_is_the_float64_one(variant: str, dtype: torch.dtype, depth: int) -> None:
    for pairs, experts, rows in ((1, 1, 1), (2, 3, 5), (3, 2, 17), (8, 4, 31), (13, 8, 64), (64, 5, 9)):
        x, w = draw(pairs, depth, dtype=dtype), draw(experts, rows, depth, dtype=dtype)
        expert = draw_experts(pairs, experts)
        assert_true(products.gathered_linear(x, w, expert, variant=variant), x, w, expert)


@variants
def test_dense_product_is_the_first_expert(variant: str, dtype: torch.dtype) -> None:
    x, w = draw(5, 200, dtype=dtype), draw(1, 333, 200, dtype=dtype)
    y = products.gathered_linear(x, w, None, variant=variant)
    assert_true(y, x, w, torch.zeros(5, dtype=torch.int64))


@variants
def test_weights_may_be_a_view(variant: str, dtype: torch.dtype) -> None:
    whole = draw(9, 40, 150, dtype=dtype)
    x, expert = draw(6, 77, dtype=dtype), draw_experts(6, 4, seed=1)
    for w in (
        whole[1::2, 3:, 20:97],
        whole.view(9, 20, 300)[:4, ::3, 1:78],
        whole[:1, :, :77].expand(4, 40, 77),
    ):
        assert_true(products.gathered_linear(x, w, expert, variant=variant), x, w, expert)


@variants
def test_tokens_may_be_a_view(variant: str, dtype: torch.dtype) -> None:
    x, w, expert = draw(40, 12, dtype=dtype).T[::2], draw(3, 21, 40, dtype=dtype), draw_experts(12, 3)[::2]
    assert_true(products.gathered_linear(x, w, expert, variant=variant), x, w, expert)


@variants
def test_nothing_to_do(variant: str, dtype: torch.dtype) -> None:
    w = draw(3, 6, 10, dtype=dtype)
    none = torch.empty(0, dtype=torch.int64)
    assert products.gathered_linear(draw(0, 10, dtype=dtype), w, none, variant=variant).shape == (0, 6)
    away = products.gathered_linear(draw(4, 10, dtype=dtype), w, torch.full((4,), -1), variant=variant)
    assert torch.equal(away, torch.zeros(4, 6, dtype=dtype))
    x, expert = draw(2, 10, dtype=dtype), torch.tensor([0, 2])
    without_depth = products.gathered_linear(x[:, :0], w[:, :, :0], expert, variant=variant)
    assert torch.equal(without_depth, torch.zeros(2, 6, dtype=dtype))
    assert products.gathered_linear(x, w[:, :0], expert, variant=variant).shape == (2, 0)


@variants
def test_a_pair_does_not_depend_on_its_batch(variant: str, dtype: torch.dtype) -> None:
    pairs, experts, rows, depth = 23, 3, 70, 389
    x, w = draw(pairs, depth, dtype=dtype), draw(experts, rows, depth, dtype=dtype)
    expert = draw_experts(pairs, experts)
    y = products.gathered_linear(x, w, expert, variant=variant)
    for first, size in product(range(pairs), (1, 2, 3, 4, 5, 9)):
        part = slice(first, first + size)
        alone = products.gathered_linear(x[part], w, expert[part], variant=variant)
        assert torch.equal(alone, y[part])
    together = products.gathered_linear(x, w, torch.zeros_like(expert), variant=variant)
    assert torch.equal(together[expert == 0], y[expert == 0])


@variants
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same(variant: str, dtype: torch.dtype) -> None:
    x, w = draw(9, 260, dtype=dtype), draw(4, 83, 260, dtype=dtype)
    expert = torch.tensor([3, 3, 3, 0, -1, 3, 1, 3, 3])  # uneven, expert 2 idle
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(products.gathered_linear(x, w, expert, variant=variant))
    assert all(torch.equal(result, results[0]) for result in results)


@variants
def test_rows_longer_than_a_block_of_them(variant: str, dtype: torch.dtype) -> None:
    x, w, expert = (
        draw(7, 70_000, dtype=dtype),
        draw(2, 3, 70_000, dtype=dtype),
        torch.tensor([0, 1, 0, 0, 0, 0, 0]),
    )
    assert_true(products.gathered_linear(x, w, expert, variant=variant), x, w, expert)


@pytest.mark.parametrize("variant", BF16_VARIANTS)
def test_rounding_to_bf16_is_pytorchs(variant: str) -> None:
    x = draw(5000, 2, dtype=torch.bfloat16) * torch.tensor([1.0, 300.0], dtype=torch.bfloat16)
    x[:3, 0] = torch.tensor([float("inf"), float("nan"), 3.38e38])
    x[:3, 1] = torch.tensor([1.0, 1.0, 3.38e38])
    y = products.gathered_linear(x, torch.ones(1, 1, 2, dtype=torch.bfloat16), None, variant=variant)
    torch.testing.assert_close(y, x.float().sum(1, keepdim=True).bfloat16(), rtol=0, atol=0, equal_nan=True)


@variants
def test_unused_weights_and_other_tokens_do_not_leak(variant: str, dtype: torch.dtype) -> None:
    x, w = draw(3, 45, dtype=dtype), draw(3, 8, 45, dtype=dtype)
    w[1], x[1] = float("nan"), float("nan")
    y = products.gathered_linear(x, w, torch.tensor([0, 0, 2]), variant=variant)
    assert y.isnan().any(dim=1).tolist() == [False, True, False]
    away = products.gathered_linear(x, w, torch.tensor([-1, -1, 2]), variant=variant)
    assert torch.equal(away[:2], torch.zeros(2, 8, dtype=dtype))


# ---- the operations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
def test_gathered_linear_is_its_twin(dtype: torch.dtype) -> None:
    x, w, expert = (
        draw(FEW_TOKENS, 65, dtype=dtype),
        draw(8, 33, 65, dtype=dtype),
        draw_experts(FEW_TOKENS, 8),
    )
    tolerance = 3 * torch.finfo(dtype).eps * 65**0.5
    twin = gathered_linear_reference(x, w, expert)
    assert bool((twin[expert < 0] == 0).all())
    torch.testing.assert_close(gathered_linear(x, w, expert), twin, rtol=tolerance, atol=tolerance)
    across = w.transpose(1, 2).contiguous().transpose(1, 2)  # no unit stride: the twin serves
    torch.testing.assert_close(gathered_linear(x, across, expert), twin, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [False, True])
def test_few_token_linear_for_any_number(dtype: torch.dtype, off: bool, choose: pytest.MonkeyPatch) -> None:
    if off:
        choose.setenv("ACCESSORY_KERNELS", "off")
    w = draw(37, 90, dtype=dtype)
    for tokens in (0, 1, 2, 7, 8, 9, 16, 17, 40):
        x = draw(tokens, 90, dtype=dtype)
        assert_true(few_token_linear(x, w), x, w[None], torch.zeros(tokens, dtype=torch.int64))


def test_a_rank_without_experts() -> None:
    x, expert = draw(2, 5, dtype=torch.float32), torch.full((2,), -1)
    w = torch.empty(0, 4, 5)
    for result in (gathered_linear(x, w, expert), gathered_linear_reference(x, w, expert)):
        assert torch.equal(result, torch.zeros(2, 4))


def test_an_expert_that_does_not_exist_is_refused() -> None:
    x, w = draw(3, 5, dtype=torch.float32), draw(2, 4, 5, dtype=torch.float32)
    with pytest.raises(IndexError):
        gathered_linear(x, w, torch.tensor([0, 2, 1]))


def test_tensors_that_do_not_fit_are_refused() -> None:
    x, w, expert = draw(3, 5, dtype=torch.float32), draw(2, 4, 5, dtype=torch.float32), draw_experts(3, 2)
    for arguments in ((x[:, 1:], w, expert), (x.double(), w, expert), (x, w[0], expert)):
        with pytest.raises(ValueError, match="does not fit w_ERD"):
            gathered_linear(*arguments)
    for wrong in (expert[1:], expert.int(), expert[:, None]):
        with pytest.raises(ValueError, match="must hold one int64"):
            gathered_linear(x, w, wrong)
    for pair in ((x[:, 1:], w[0]), (x.double(), w[0]), (x, w)):
        with pytest.raises(ValueError, match="does not fit w_RD"):
            few_token_linear(*pair)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_keep_their_promises_to_pytorch(dtype: torch.dtype) -> None:
    x, w, expert = draw(3, 24, dtype=dtype), draw(4, 10, 24, dtype=dtype), torch.tensor([2, -1, 0])
    torch.library.opcheck(torch.ops.accessory.gathered_linear.default, (x, w, expert))
    torch.library.opcheck(torch.ops.accessory.few_token_linear.default, (x, w[0]))
    meta = gathered_linear(x.to("meta"), w.to("meta"), expert.to("meta"))
    assert (meta.shape, meta.dtype, meta.device.type) == ((3, 10), dtype, "meta")


@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_compile_into_one_graph(dtype: torch.dtype) -> None:
    def step(x_PD: Tensor, w_ERD: Tensor, expert_P: Tensor) -> Tensor:
        return gathered_linear(x_PD, w_ERD, expert_P).relu() + few_token_linear(x_PD * 2, w_ERD[0])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, w, expert = draw(3, 24, dtype=dtype), draw(4, 10, 24, dtype=dtype), torch.tensor([2, -1, 0])
    with torch.inference_mode():
        assert torch.equal(compiled(x, w, expert), step(x, w, expert))


# ---- the choice of a variant -----------------------------------------------------------------------------


def test_switched_off_is_said_once_and_gives_the_same(
    choose: pytest.MonkeyPatch, said: list[logging.LogRecord]
) -> None:
    choose.setenv("ACCESSORY_KERNELS", "off")
    x, w, expert = (
        draw(5, 50, dtype=torch.bfloat16),
        draw(4, 20, 50, dtype=torch.bfloat16),
        draw_experts(5, 4),
    )
    for _ in range(2):
        assert_true(gathered_linear(x, w, expert), x, w, expert)
    assert (library.native_available(), native_variant()) == (False, "none")
    assert [(record.name, record.levelname) for record in said] == [("accessory.kernels", "WARNING")]


def test_a_missing_library_is_said_once(choose: pytest.MonkeyPatch, said: list[logging.LogRecord]) -> None:
    choose.delenv("ACCESSORY_KERNELS", raising=False)
    choose.setattr(library, "_load", lambda: (None, "no library beside the package"))
    x, w = draw(1, 50, dtype=torch.float32), draw(20, 50, dtype=torch.float32)
    for _ in range(2):
        torch.testing.assert_close(few_token_linear(x, w), x @ w.T)
    assert [record.levelname for record in said] == ["WARNING"]
    assert "not built" in said[0].getMessage()
    assert "C++ compiler with OpenMP (GCC, or clang and libomp) and a reinstall" in said[0].getMessage()


def test_float16_does_not_ask_for_the_library(choose: pytest.MonkeyPatch, said: list[logging.LogRecord]) -> None:
    choose.setenv("ACCESSORY_KERNELS", "off")
    few_token_linear(draw(1, 8, dtype=torch.float16), draw(4, 8, dtype=torch.float16))
    assert not said


def test_an_unknown_variant_is_refused_with_the_known_ones(choose: pytest.MonkeyPatch) -> None:
    choose.setenv("ACCESSORY_KERNELS", "sse9")
    with pytest.raises(ValueError, match="sse9 is unknown: it may be auto, off, avx512_bf16, avx512, avx2, portable"):
        native_variant()


def test_a_variant_beyond_this_cpu_is_refused(choose: pytest.MonkeyPatch) -> None:
    choose.setattr(library, "_load", lambda: (object(), ""))
    choose.setattr(library, "runnable_variants", lambda: ["portable"])
    choose.setenv("ACCESSORY_KERNELS", "avx2")
    with pytest.raises(ValueError, match="this CPU runs only portable"):
        native_variant()


@pytest.mark.parametrize("variant", library.runnable_variants())
def test_a_variant_can_be_asked_for(variant: str, choose: pytest.MonkeyPatch) -> None:
    choose.setenv("ACCESSORY_KERNELS", variant)
    assert (library.native_available(), native_variant()) == (True, variant)
    x, w, expert = (
        draw(3, 24, dtype=torch.bfloat16),
        draw(4, 10, 24, dtype=torch.bfloat16),
        torch.tensor([2, -1, 0]),
    )
    expected = products.gathered_linear(x, w, expert, variant=variant)
    assert torch.equal(gathered_linear(x, w, expert), expected)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no large pages here")
@pytest.mark.parametrize("quant", [None, QuantArgs(type="int8")], ids=["plain", "int8"])
def test_a_models_large_matrices_ask_for_large_pages(quant: QuantArgs | None) -> None:
    place = Place(torch.bfloat16, torch.device("cpu"), quant)
    matrix = place.matrix(8, 2048, 1024)
    parameter = next(iter(matrix.parameters())) if isinstance(matrix, torch.nn.Module) else matrix
    middle, asked = parameter.data_ptr() + parameter.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            own = int(area[1], 16) <= middle < int(area[2], 16)
        elif own and line.startswith("VmFlags:"):
            asked = "hg" in line.split()
    assert asked


def test_import_loads_nothing_and_never_fails() -> None:
    script = (
        "import accessory.kernels as k; from accessory.kernels.cpu import library;"
        "assert library._load.cache_info().currsize == 0;"
        "assert library.native_variant.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"ACCESSORY_KERNELS": "nonsense"})


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang")
@pytest.mark.parametrize("source", ["attention", "products", "steps", "quantized"])
def test_clang_compiles_the_kernels_too(source: str, tmp_path: Path) -> None:
    """It has names of its own for shuffles and for what a function is compiled for."""
    (tmp_path / "omp.h").write_text('extern "C" int omp_get_num_threads(), omp_get_thread_num();')  # may be missing
    folder = Path(library.__file__).parent
    flags = ["-std=c++17", "-O0", "-fopenmp", "-Wall", "-Werror", f"-I{tmp_path}", "-c", "-o", os.devnull]
    subprocess.run(["clang++", *flags, folder / f"{source}.cpp"], check=True)
