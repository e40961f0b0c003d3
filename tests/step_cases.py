"""What the kernels between the products have to fulfil, on tensors of any device: cases of tests/test_triton_steps.py.

As a script it runs them all on CPU under Triton's interpreter, as tests/triton_cases.py does. The model may import
Triton before anything here is run, so TRITON_INTERPRET=1 has to be in the environment.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from triton_runs import report_failures

from accessory import kernels
from accessory.config import ModelArgs, MoEArgs
from accessory.kernels.steps import rotate_reference
from accessory.kernels.triton import steps as on_gpu
from accessory.model.rope import RotaryTable
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
WIDTHS = (1, 2, 3, 7, 64, 100, 512, 1000, 1025, 4096, 5000)
TOKENS = (1, 40, 9, 5, 3, 2, 4, 1, 2, 3, 1)


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).to(device)


def assert_near(y: Tensor, truth: Tensor, *, roundings: float = 1, terms: Tensor | None = None) -> None:
    """``y`` is the float64 truth, to within so many roundings to its dtype, and float32's of its ``terms``."""
    assert y.shape == truth.shape
    rounding = torch.finfo(y.dtype).eps / 2 * (1 + 2**-6)  # to the nearest
    if y.dtype == torch.bfloat16 and not y.is_cuda:
        rounding *= 2  # the interpreter cuts to bfloat16
    smallest = torch.finfo(y.dtype).tiny * torch.finfo(y.dtype).eps  # float16 has few exponents
    terms = truth if terms is None else terms
    allowed = roundings * (rounding * truth.abs() + smallest) + 2**-20 * terms.abs() + 2**-40
    off = ((y.double() - truth).abs() / allowed).max().item()
    assert off <= 1, f"{tuple(y.shape)} {y.dtype}: {off:.2f} of what is allowed"


def true_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.double()


def check_norm(x: Tensor, delta: Tensor, weight_D: Tensor) -> None:
    eps = 1e-5
    assert_near(kernels.rms_norm(x, weight_D, eps), true_norm(x, weight_D, eps))
    sums, y = kernels.add_rms_norm(x, delta, weight_D, eps)
    assert (sums.dtype, y.dtype) == (x.dtype, x.dtype)
    if x.is_cuda:
        assert torch.equal(sums, x + delta)
    assert_near(sums, x.double() + delta.double())
    assert_near(y, true_norm(sums, weight_D, eps))  # of the rounded sum


def norm(dtype: torch.dtype, device: str) -> None:
    """Widths of all kinds, with more and fewer axes, views, numbers far from 1, and rows of zeros."""
    for width, tokens in zip(WIDTHS, TOKENS, strict=True):
        wide = draw(tokens, 2 * width + 1, dtype=dtype, device=device)
        weight = draw(width, dtype=dtype, device=device, seed=1)
        check_norm(wide[:, :width].contiguous(), draw(tokens, width, dtype=dtype, device=device), weight)
        check_norm(wide[:, :width], wide[:, width + 1 :], weight)
        check_norm(wide[:, 1::2], draw(width, tokens, dtype=dtype, device=device, seed=2).T, weight)
    check_norm(*(draw(2, 3, 24, dtype=dtype, device=device, seed=seed) for seed in (0, 1)), weight[:24])
    check_norm(*(draw(24, dtype=dtype, device=device, seed=seed) for seed in (0, 1)), weight[:48:2])
    large, zeros = draw(3, 80, dtype=dtype, device=device) * 4096, torch.zeros(3, 80, dtype=dtype, device=device)
    check_norm(large, zeros, weight[:80])
    check_norm(zeros, large / 2**24, weight[:80])
    assert not kernels.rms_norm(zeros, weight[:80], 1e-5).any()


def turned(dtype: torch.dtype, device: str) -> None:
    """Queries and keys by themselves, as parts of one tensor, and with heads before tokens."""
    for tokens, q_heads, k_heads, width in (
        (1, 32, 8, 128),
        (40, 3, 3, 10),
        (5, 24, 8, 6),
        (3, 1, 1, 2),
        (2, 9, 2, 200),
    ):
        table = RotaryTable(width, 5000, theta=1e4, scaling=None, device=torch.device(device))
        at = torch.randint(5000, (tokens,), generator=torch.Generator().manual_seed(width)).to(device)
        both = draw(tokens, q_heads + k_heads + 1, width, dtype=dtype, device=device)
        heads_first = draw(q_heads, tokens, width, dtype=dtype, device=device).transpose(0, 1)
        apart = draw(tokens, k_heads, 2 * width, dtype=dtype, device=device)[..., ::2]
        views = (both[:, :q_heads], both[:, q_heads + 1 :])
        for q, k in (tuple(x.contiguous() for x in views), views, (heads_first, apart)):
            for x, y in zip((q, k), kernels.rotate(q, k, table(at)), strict=True):
                assert y.dtype == dtype
                cos, sin = (part.double() for part in table(at))
                wide = x.double()
                swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
                terms = (wide * cos).abs() + (swapped * sin).abs()
                assert_near(y, wide * cos + swapped * sin, terms=terms)
                if y.is_cuda:
                    assert torch.equal(y, rotate_reference(x, table(at)))


def check_route(logits_TE: Tensor, top_k: int, active_T: Tensor | None) -> None:
    weights, experts, probs, logits, asked = kernels.route(logits_TE, top_k, active_T)
    assert (weights.dtype, experts.dtype, probs.dtype) == (torch.float32, torch.int64, torch.float32)
    torch.testing.assert_close(logits, logits_TE.float(), rtol=0, atol=0, equal_nan=True)
    truth = logits_TE.double().softmax(-1)
    torch.testing.assert_close(probs.double(), truth, rtol=1e-5, atol=1e-9, equal_nan=True)
    order = probs.cpu().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(experts.cpu(), order.indices[:, :top_k])
    best = order.values[:, :top_k]
    expected = best / best.sum(-1, keepdim=True)
    torch.testing.assert_close(weights.cpu(), expected, rtol=1e-5, atol=0, equal_nan=True)
    if active_T is None:
        assert asked is None
    else:
        assert torch.equal(asked, experts.masked_fill(~active_T[:, None], -1))


def routed(dtype: torch.dtype, device: str) -> None:
    """1 to 256 experts, one chosen and all, ties, and logits that are no numbers."""
    for tokens, experts, top_k in ((1, 8, 2), (40, 8, 2), (9, 1, 1), (5, 6, 6), (3, 16, 3), (7, 200, 8), (2, 256, 8)):
        logits = draw(tokens, experts, dtype=dtype, device=device) * 4
        active = torch.arange(2 * tokens, device=device) % 3 != 0
        check_route(logits, top_k, None)
        check_route(logits, top_k, active[:tokens])
        check_route(
            draw(tokens, 2 * experts + 1, dtype=dtype, device=device)[:, 1::2][:, :experts], top_k, active[1::2]
        )
        check_route((logits / 4).round(), top_k, active[tokens:])
    check_route(torch.zeros(3, 7, dtype=dtype, device=device), 7, None)
    check_route(draw(4, 300, dtype=dtype, device=device)[:, 3:103], 100, None)
    strange = draw(6, 8, dtype=dtype, device=device)
    strange[1, 3] = strange[2] = float("nan")
    strange[3, 5] = strange[4, ::2] = strange[5] = float("-inf")
    strange[0, 2] = float("inf")
    check_route(strange, 2, None)
    check_route(strange, 8, torch.tensor([True, False] * 3, device=device))


def gated(dtype: torch.dtype, device: str) -> None:
    for width, pairs in zip((*WIDTHS, 14336), (*TOKENS, 2), strict=True):
        wide = draw(pairs, 2 * width + 3, dtype=dtype, device=device) * 3
        across = draw(2 * width, pairs, dtype=dtype, device=device).T
        for both in (wide[:, : 2 * width].contiguous(), wide[:, 3:], across):
            y = kernels.silu_gate(both)
            assert y.dtype == dtype
            gate, up = both.double().chunk(2, dim=-1)
            assert_near(y, gate * gate.sigmoid() * up, roundings=2.01)
            if y.is_cuda and dtype != torch.float32:
                halves = both.chunk(2, dim=-1)
                differ = y != torch.nn.functional.silu(halves[0]) * halves[1]
                assert differ.sum() <= 1 + y.numel() // 100
    strange = torch.tensor([-100, -20, -0.0, 0, 20, 100, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    both = torch.cat((strange, torch.ones_like(strange)))[None].to(device)
    expected = torch.nn.functional.silu(both[:, :9])
    torch.testing.assert_close(kernels.silu_gate(both), expected, rtol=0.01, atol=0, equal_nan=True)


def summed(dtype: torch.dtype, device: str) -> None:
    for number, (width, tokens) in enumerate(zip(WIDTHS, TOKENS, strict=True)):
        top_k = number % 8 + 1
        weights = draw(tokens, top_k, dtype=torch.float32, device=device).abs()
        wide = draw(tokens * top_k, width + 5, dtype=dtype, device=device)
        across = draw(width, tokens * top_k, dtype=dtype, device=device).T
        for y in (wide[:, :width].contiguous(), wide[:, 5:], across):
            sums = kernels.sum_pairs(y, weights)
            assert sums.dtype == dtype
            terms = weights.double()[..., None] * y.double().unflatten(0, (tokens, top_k))
            assert_near(sums, terms.sum(1), terms=terms.abs().sum(1))


def whole_model(dtype: torch.dtype, device: str) -> None:
    """Prefill and decoding, with a slot that is not active, through the kernels as through their twins."""
    sizes = {"dim": 40, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "head_dim": 10, "hidden_dim": 24}
    args = ModelArgs(**sizes, vocab_size=64, max_seq_len=64, moe=MoEArgs(num_experts=5, num_experts_per_tok=3))
    model = Transformer(args, ParallelState(device=torch.device(device)), dtype=torch.float32)
    model.cuda_graphs = False
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.empty(parameter.shape).normal_("norm" in name, 0.2, generator=generator))

    def logits() -> Tensor:
        cache = model.new_cache(3, 64, routes=True)
        prompt = torch.arange(1, 40, device=device)
        found = [model.prefill(prompt, [30, 9], [0, 2], cache)]
        active = torch.tensor([True, False, True], device=device)
        for token in range(3):
            found.append(model.decode(torch.full((3,), token, device=device), cache, active)[active])
            cache.extend([0, 2], [1, 1])
        return torch.cat([*found, cache.routes[:, 0, :32].float().reshape(-1, 64)])

    with_kernels = logits()
    with serving(False):
        plainly = logits()
    torch.testing.assert_close(with_kernels, plainly, atol=1e-4, rtol=1e-4)


def cases(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    for check in (norm, turned, routed, gated, summed):
        for name, dtype in DTYPES.items():
            yield f"{check.__name__} {name}", partial(run, check, dtype, device)
    yield "whole_model float32", partial(run, whole_model, torch.float32, device)


@torch.no_grad()
def run(check: Callable[[torch.dtype, str], None], dtype: torch.dtype, device: str) -> None:
    if device == "cuda":
        assert on_gpu.serves(torch.ones(1, dtype=dtype, device=device))
        check(dtype, device)
        return
    with serving(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's numpy, of what is not a number
        check(dtype, device)


@contextmanager
def serving(does: bool) -> Iterator[None]:
    """The operations launch their kernels, on CPU as well, or are their twins everywhere."""
    with mock.patch.object(on_gpu, "serves", return_value=does):
        yield


def main() -> None:
    assert os.environ["TRITON_INTERPRET"] == "1"
    report_failures(cases("cpu"))


if __name__ == "__main__":
    main()
