"""The Triton kernels: their results in Triton's interpreter and on a GPU, that they compile, and where they serve."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton_cases
from patience import PATIENCE
from torch._subclasses import FakeTensorMode
from triton_runs import compile_alone, failures_in_the_interpreter, needs_gpu, needs_triton

from accessory import kernels
from accessory.kernels import gathering_pays, quantized
from accessory.kernels.products import gathered_linear_reference
from accessory.kernels.triton import products, ptx

# Types of codes and scales, and what a program takes.
COMPILED: dict[str, tuple[str, str, dict[str, int]]] = {
    "plain": ("*bf16", "*fp32", {"ROWS": 64, "DEPTH": 128}),
    "int8": ("*i8", "*fp32", {"ROWS": 32, "DEPTH": 128}),
    "int4": ("*u8", "*bf16", {"ROWS": 64, "DEPTH": 64}),
    "nf4": ("*u8", "*fp32", {"ROWS": 64, "DEPTH": 64}),
}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What failed in the interpreter, by the name of the case."""
    return failures_in_the_interpreter("triton_cases.py")


@needs_triton
@pytest.mark.parametrize("name", [name for name, _ in triton_cases.cases("cpu")])
def test_in_the_interpreter(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


@needs_triton
@needs_gpu
@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in triton_cases.cases("cuda")])
def test_on_a_gpu(check: Callable[[], None]) -> None:
    check()


@needs_triton
@pytest.mark.parametrize("form", list(COMPILED))
@pytest.mark.parametrize("module", ["multiply", "integers", "dots"])
def test_compiles_without_a_gpu_for_one(module: str, form: str, tmp_path: Path) -> None:
    """Down to machine code: the interpreter accepts more than the compiler, and runs no PTX."""
    if module != "multiply" and form == "plain":
        return
    codes, scale, tile = COMPILED[form]
    group = 32 if form in ("int4", "nf4") else 128
    types = {"w_ERD": codes, "scale_ERG": scale, "zero_ERG": "*u8", "index": "*i64", "y_PR": "*bf16"}
    types |= {"x_scale_PB": "*fp32", "x_sum_PG": "*fp32", "x_sum_PC": "*fp32", "sum_PG": "*fp32"}
    constants = {"WAY": "gathered", "FORM": form, "GROUP": group, "WHOLE_TILES": True, "PTX": "", "PAIRS": 16, **tile}
    if module == "dots":
        types |= {"x_PW": "*i32", "w_ERW": "*i32", "table": "*i32"}
        constants |= {"GROUP": 8, "BLOCK": 16, "PTX": True, "ROWS": 8, "CHUNKS": 32}
        constants = {name: value for name, value in constants.items() if name not in ("PAIRS", "DEPTH")}
    elif module == "integers":
        types |= {"x_PD": "*i8", "table": "*i8"}
        constants |= {"BLOCK": 64 if group == 32 else 128}
        constants |= {"PTX": ptx.to_integers(form)} if group == 32 else {}
    else:
        types |= {"x_PD": "*bf16", "table": "*fp32"}
        constants |= {"ALL_EXPERTS": 1, "FLOAT32": False}
        constants |= {"PTX": ptx.to_floats(form, "bfloat16")} if group == 32 else {}
    script = f"""
from triton.backends.compiler import GPUTarget
import triton
from triton.compiler import ASTSource
from accessory.kernels.triton.{module} import multiply as kernel
types, constants = {types}, {constants}
signature = {{name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}}
for capability in (80, 90):
    source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32)
    assert len(triton.compile(source, target=target).asm["cubin"]) > 1000
"""
    compile_alone(script, tmp_path)


# ---- where Triton is not installed -----------------------------------------------------------------------


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "accessory.kernels.triton.multiply", raising=False)
    monkeypatch.delattr(kernels.triton, "multiply", raising=False)
    products._kernels.cache_clear()
    yield
    products._kernels.cache_clear()


@pytest.fixture
def as_on_gpu() -> Iterator[None]:
    """Every tensor says that it is a GPU's."""
    on_gpu, on_cpu = (mock.patch.object(torch.Tensor, *own) for own in (("is_cuda", True), ("is_cpu", False)))
    with on_gpu, on_cpu, torch.inference_mode():
        yield


@pytest.mark.usefixtures("without", "as_on_gpu")
def test_without_triton_the_references_serve(caplog: pytest.LogCaptureFixture) -> None:
    x = triton_cases.draw(3, 128, dtype=torch.float32, device="cpu")
    weight, expert = torch.randn(2, 5, 128), torch.tensor([1, -1, 0])
    with caplog.at_level(logging.WARNING, logger="accessory.kernels"):
        assert torch.equal(kernels.gathered_linear(x, weight, expert), gathered_linear_reference(x, weight, expert))
        assert torch.equal(kernels.few_token_linear(x, weight[0]), x @ weight[0].T)
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == ["Triton does not load"]
    with pytest.raises(RuntimeError, match="need Triton"):
        products._loaded()


@pytest.mark.parametrize("has_it", [True, False])
@pytest.mark.usefixtures("as_on_gpu")
def test_products_on_a_gpu_go_the_kernels_way_where_there_is_one(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    monkeypatch.setattr(products, "available", lambda: has_it)
    by_triton = ["gathered_linear", "few_token_linear"]
    by_triton += ["quantized_linear", "gathered_quantized_linear", "grouped_quantized_linear", "plain_values"]
    for name in by_triton:
        monkeypatch.setattr(products, name, lambda *_, name=name: taken.append(name) or torch.empty(3, 5))
    for name in ("_by_blocks", "_gathered_by_blocks"):
        monkeypatch.setattr(quantized, name, lambda *_, name=name, **__: taken.append(name) or torch.empty(3, 5))
    x, weight = torch.empty(3, 64), triton_cases.draw_weight("nf4", 2, 5, 64, dtype=torch.float32, device="cpu")
    plain = torch.empty(2, 5, 64)
    kernels.gathered_linear(x, plain, torch.tensor([0, 1, 1]))
    kernels.few_token_linear(x, plain[0])
    kernels.few_token_linear(x.repeat(20, 1), plain[0])  # no few tokens
    quantized.quantized_linear(x, weight[0])
    quantized.gathered_quantized_linear(x, weight, torch.tensor([0, 1, 1]))
    quantized.grouped_quantized_linear(x, weight, torch.tensor([0, 3], dtype=torch.int32))
    quantized.dequantize(weight)
    assert taken == (by_triton if has_it else ["_by_blocks", "_gathered_by_blocks", "_by_blocks"])


@pytest.mark.parametrize("has_it", [True, False])
def test_experts_go_the_kernels_way_where_there_is_one(has_it: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "available", lambda: has_it)
    with FakeTensorMode():
        half, full = (torch.empty(2, 8, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert gathering_pays(half, 4) is has_it
    assert gathering_pays(full, 4)
    assert gathering_pays(half, 64) is has_it
    assert not gathering_pays(half, 65)


def test_import_loads_no_triton() -> None:
    script = "import sys, accessory.kernels as k; assert 'accessory.kernels.triton.multiply' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)
