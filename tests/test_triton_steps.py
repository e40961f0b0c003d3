"""The Triton kernels between products: in Triton's interpreter and on a GPU, that they compile, where they serve."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import step_cases
import torch
import torch.nn.functional as F
from patience import PATIENCE
from torch._subclasses import FakeTensorMode
from triton_runs import compile_alone, failures_in_the_interpreter, needs_gpu, needs_triton

from accessory import kernels
from accessory.kernels.cpu import steps as on_cpu
from accessory.kernels.triton import steps as on_gpu


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """What failed in the interpreter, by the name of the case."""
    return failures_in_the_interpreter("step_cases.py")


@needs_triton
@pytest.mark.parametrize("name", [name for name, _ in step_cases.cases("cpu")])
def test_in_the_interpreter(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]


@needs_triton
@needs_gpu
@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in step_cases.cases("cuda")])
def test_on_a_gpu(check: Callable[[], None]) -> None:
    check()


FLOATS = {"weights_TK": "*fp32", "probs_TE": "*fp32", "wide_TE": "*fp32", "cos_Th": "*fp32", "sin_Th": "*fp32"}
TYPES = {**FLOATS, "experts_TK": "*i64", "asked_TK": "*i64", "active_T": "*u8", "eps": "fp32"}
VARIANTS: dict[str, list[dict[str, Any]]] = {  # a size of 1 becomes part of a variant
    "normalise": [{"ADDS": True, "WIDTH": 4096}, {"ADDS": False, "WIDTH": 1, "width": 1, "x_token": 1}],
    "turn": [{"HEADS": 8, "PAIRS": 64}, {"HEADS": 1, "PAIRS": 1, "q_heads": 1, "k_heads": 1}],
    "route": [
        {"ACTIVE": True, "TOP_K": 2, "ALL_EXPERTS": 8, "LIBDEVICE": True},
        {"ACTIVE": False, "TOP_K": 1, "ALL_EXPERTS": 1, "LIBDEVICE": True, "experts": 1},
        {"ACTIVE": True, "TOP_K": 256, "ALL_EXPERTS": 256, "LIBDEVICE": True},
    ],
    "silu_gate": [{"WIDTH": 512, "LIBDEVICE": True}, {"WIDTH": 1, "LIBDEVICE": True, "width": 1}],
    "sum_pairs": [{"WIDTH": 512, "TOP_K": 2}, {"WIDTH": 1, "TOP_K": 1, "width": 1, "y_pair": 1}],
}


@needs_triton
@pytest.mark.parametrize("kernel", VARIANTS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_compiles_without_a_gpu_for_one(kernel: str, dtype: str, tmp_path: Path) -> None:
    """Down to machine code: the interpreter accepts more than the compiler."""
    script = f"""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from accessory.kernels.triton.step_kernels import {kernel} as kernel
types = {TYPES}
for constants in {VARIANTS[kernel]}:
    signature = {{name: types.get(name, "*{dtype}" if "_" in name and name[-1].isupper() else "i32")
                  for name in kernel.arg_names}}
    signature |= {{name: "*{dtype}" for name in signature if name.endswith("_THh")}}
    signature |= dict.fromkeys(constants, "constexpr")
    for capability in (80, 90):
        source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", capability, 32)
        assert len(triton.compile(source, target=target).asm["cubin"]) > 1000
"""
    compile_alone(script, tmp_path)


# ---- where the twins serve ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cpu_and_what_has_no_memory_are_the_twins() -> None:
    x = torch.ones(2, 8)
    assert not on_gpu.serves(x)
    with FakeTensorMode():
        assert not on_gpu.serves(torch.empty(2, 8, device="cuda"))


@needs_triton
@needs_gpu
def test_gradients_and_other_dtypes_are_the_twins() -> None:
    x = torch.ones(2, 8, device="cuda")
    assert not on_gpu.serves(x)  # there may be gradients
    with torch.no_grad():
        assert on_gpu.serves(x)
        assert not on_gpu.serves(x.double())
        assert not on_gpu.serves(x, x.half())
        assert not on_gpu.serves(x[:0])
        wide = step_cases.draw(2, 20000, dtype=torch.float32, device="cuda")
        torch.testing.assert_close(kernels.rms_norm(wide, wide[0], 1e-5), F.rms_norm(wide, (20000,), wide[0], 1e-5))


@torch.no_grad()
def test_the_twins_are_what_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, in bfloat16: every operation rounds."""
    monkeypatch.setattr(on_cpu, "serves", lambda _: False)
    x, delta = (step_cases.draw(5, 24, dtype=torch.bfloat16, device="cpu", seed=seed) for seed in (0, 1))
    sums, normed = kernels.add_rms_norm(x, delta, delta[0], 1e-5)
    assert torch.equal(sums, x + delta)
    assert torch.equal(normed, F.rms_norm(x + delta, (24,), delta[0], 1e-5))
    assert torch.equal(kernels.silu_gate(x), F.silu(x[:, :12]) * x[:, 12:])
    active = torch.tensor([True, False, True, True, False])
    weights, experts, probs, logits, asked = kernels.route(x, 3, active)
    assert torch.equal(probs, x.float().softmax(-1))
    assert torch.equal(logits, x.float())
    assert torch.equal(experts, probs.topk(3).indices)
    assert torch.equal(asked, torch.where(active[:, None], experts, -1))
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    y = step_cases.draw(15, 24, dtype=torch.bfloat16, device="cpu")
    expected = (weights[..., None] * y.float().unflatten(0, (5, 3))).sum(1)
    torch.testing.assert_close(kernels.sum_pairs(y, weights), expected.bfloat16())


def test_import_loads_no_triton() -> None:
    script = "import sys, accessory.kernels as k; assert 'accessory.kernels.triton.step_kernels' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)
