"""The products by AMX's tiles against float64, and themselves among other tokens; skipped where the CPU has none."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accessory import kernels
from accessory.config import ModelArgs, MoEArgs, QuantForm
from accessory.kernels import grouped_by_tiles
from accessory.kernels.activations import round_activations
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState
from accessory.products import gathered_linear, grouped_linear, linear
from accessory.quant import QuantizedWeight, quantize
from accessory.train.init import init_weights

needs_tiles = pytest.mark.skipif(not kernels.tiles_serve(), reason="this CPU has no tiles (AMX), or they are off")
Counts = st.lists(st.integers(0, 70), min_size=1, max_size=5)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def truth(x_PD: Tensor, w_ERD: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """The products in float64, and what rounding may make of them."""
    experts = range(len(counts))
    groups = list(zip(x_PD[: sum(counts)].double().split(counts), experts, strict=True))
    exact = torch.cat([x @ w_ERD[e].double().T for x, e in groups])
    terms = torch.cat([x.abs() @ w_ERD[e].double().abs().T for x, e in groups])
    return exact, 2**-8 * exact.abs() + x_PD.shape[1] * 2**-24 * terms + 1e-30


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).int()


@needs_tiles
@settings(max_examples=60, deadline=None)
@given(
    counts=Counts, rows=st.integers(1, 100), depth=st.integers(1, 200), behind=st.integers(0, 3), seed=st.integers(0)
)
def test_each_row_meets_its_experts_matrix(counts: list[int], rows: int, depth: int, behind: int, seed: int) -> None:
    seed %= 2**31
    x_PD = drawn(sum(counts) + behind, depth, seed=seed)
    whole = drawn(len(counts), rows + 3, depth + 5, seed=seed + 1)
    for w_ERD in (whole[:, 3:, 5:], whole[:, 3:, 5:].contiguous()):
        y_PR = grouped_by_tiles(x_PD, w_ERD, ends(counts))
        assert y_PR is not None
        exact, allowed = truth(x_PD, w_ERD, counts)
        assert bool(((y_PR[: sum(counts)].double() - exact).abs() <= allowed).all())


@needs_tiles
@settings(max_examples=60, deadline=None)
@given(
    counts=Counts,
    rows=st.integers(1, 100),
    units=st.integers(1, 8),
    form=st.sampled_from([("int8", 8), ("int4", 32), ("int4", 64), ("nf4", 64), ("mxfp4", 32)]),
    odd=st.integers(0, 2),
    seed=st.integers(0),
)
@torch.no_grad()
def test_quantized_weights_are_multiplied_in_8_bits(
    counts: list[int], rows: int, units: int, form: tuple[QuantForm, int], odd: int, seed: int
) -> None:
    seed, (name, unit) = seed % 2**31, form
    depth = unit * units + (odd if name == "int8" else 0)
    x_PD = drawn(sum(counts) + 1, depth, seed=seed)
    values = drawn(len(counts), rows, depth, seed=seed + 1) * drawn(len(counts), rows, depth, seed=seed + 2) ** 3
    weight = quantize(values, name, group_size=unit if name == "int4" else 64)
    plain = weight.dequantize(torch.float32)
    x = round_activations(x_PD)
    # Rows in 4 bits are rounded once more: by half a step of a 127th of the most that they could hold, and a little for
    # the groups' shares.
    reach = plain.abs().amax(-1) if name == "int8" else _reach(weight)

    def check(y_PR: Tensor, x_PD: Tensor, counts: list[int]) -> None:
        exact, allowed = truth(x_PD, plain, counts)
        if name != "int8":
            sums = [x.abs().double().sum(-1, keepdim=True) for x in x_PD[: sum(counts)].split(counts)]
            allowed += torch.cat([0.6 / 127 * s * reach[e].double() for e, s in enumerate(sums)])
        assert bool(((y_PR[: sum(counts)].double() - exact).abs() <= allowed).all())

    check(grouped_linear(x_PD, weight, ends(counts)), x, counts)
    many = 5 * len(counts)  # pairs from which on the gathered product goes by tiles
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).repeat(
        1 + many // max(1, sum(counts))
    )
    expert_P = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[order]
    mixed = gathered_linear(x_PD[order], weight, expert_P)
    assert torch.equal(mixed, grouped_linear(x_PD, weight, ends(counts))[order])
    many = x.repeat(20, 1)
    check(linear(x_PD.repeat(20, 1), weight[0]), many, [many.shape[0]])


def _reach(weight: QuantizedWeight) -> Tensor:
    """The largest value that each row's codes and scales could stand for."""
    most = torch.full_like(weight.scale, max(weight.format.levels), dtype=torch.float32)
    if weight.zero is not None:
        most = torch.maximum(weight.zero, 240 - weight.zero.int()).float() / 16
    return (weight.scale.float() * most).amax(-1)


@needs_tiles
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 60),
    top_k=st.integers(1, 3),
    hidden=st.integers(1, 70),
    depth=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_the_gate_within_the_product_is_the_one_behind_it(
    tokens: int, top_k: int, hidden: int, depth: int, seed: int
) -> None:
    x_TD, whole = drawn(tokens, depth, seed=seed), drawn(4, 2 * hidden + 2, depth + 3, seed=seed + 1)
    expert_TK = torch.randint(-1, 4, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    for w_EOD in (whole[:, 2:, 3:], whole[:, 2:, 3:].contiguous()):
        x_PD = x_TD.repeat_interleave(top_k, dim=0)
        apart = kernels.silu_gate(kernels.gathered_linear(x_PD, w_EOD, expert_TK.flatten()))
        assert torch.equal(kernels.gathered_gate(x_TD, w_EOD, expert_TK), apart)


@needs_tiles
def test_a_result_depends_on_its_own_token_alone_and_on_no_number_of_threads() -> None:
    x_PD, w_ERD = drawn(700, 1100, seed=0), drawn(2, 200, 1100, seed=1)
    whole = grouped_by_tiles(x_PD, w_ERD, ends([650, 50]))
    assert whole is not None
    for begin, end in ((0, 1), (3, 40), (600, 650)):
        alone = grouped_by_tiles(x_PD[begin:end], w_ERD[:1], ends([end - begin]))
        assert alone is not None
        assert torch.equal(alone, whole[begin:end])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        again = grouped_by_tiles(x_PD, w_ERD, ends([650, 50]))
    finally:
        torch.set_num_threads(threads)
    assert again is not None
    assert torch.equal(again, whole)


@needs_tiles
def test_other_dtypes_and_a_variant_by_name_do_without() -> None:
    x_PD, w_ERD = drawn(40, 64, seed=0), drawn(1, 8, 64, seed=1)
    assert grouped_by_tiles(x_PD.float(), w_ERD.float(), ends([40])) is None
    code = "from accessory import kernels; print(kernels.tiles_serve())"
    named = os.environ | {"ACCESSORY_KERNELS": kernels.native_variant()}
    assert subprocess.run([sys.executable, "-c", code], env=named, capture_output=True, text=True).stdout == "False\n"


@needs_tiles
@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 150),
    start=st.sampled_from([0, 1, 15, 100, 260]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 3), (8, 1)]),
    width=st.sampled_from([32, 64, 96, 256]),
    cut=st.integers(1, 150),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_a_prompt_attends_to_what_is_before_each_token(
    tokens: int, start: int, heads: tuple[int, int], width: int, cut: int, seed: int
) -> None:
    (own, shared), length = heads, start + tokens
    q_LHh = drawn(tokens, own, 2 * width, seed=seed)[..., :width] * 2
    # As a cache's: rows of more than a head, and behind the sequence what is no number.
    k_MKh, v_MKh = (drawn(length + 20, shared + 1, width, seed=seed + i) for i in (1, 2))
    k_MKh[length:], v_MKh[length:] = float("nan"), float("nan")
    k_MKh, v_MKh = k_MKh[:length, 1:], v_MKh[:length, 1:]
    out_LHh = kernels.prompt_attention(q_LHh, k_MKh, v_MKh)
    assert out_LHh is not None
    k, v = (x.double().repeat_interleave(own // shared, 1).transpose(0, 1) for x in (k_MKh, v_MKh))
    seen_LM = torch.arange(length) <= torch.arange(start, length)[:, None]
    logits = (q_LHh.double().transpose(0, 1) @ k.mT * width**-0.5).masked_fill(~seen_LM, float("-inf"))
    shares = logits.softmax(-1)
    exact, reach = (shares @ v).transpose(0, 1), (shares @ v.abs()).transpose(0, 1)
    # The shares and the result are rounded to bfloat16; a logit is a sum in float32.
    assert bool(((out_LHh.double() - exact).abs() <= 2**-8 * exact.abs() + 1.1 * 2**-8 * reach + 1e-6).all())
    last = min(cut, tokens)
    for part, end in ((slice(tokens - last, tokens), length), (slice(0, last), start + last)):
        again = kernels.prompt_attention(q_LHh[part], k_MKh[:end], v_MKh[:end])
        assert again is not None
        assert torch.equal(again, out_LHh[part])


@needs_tiles
@torch.no_grad()
def test_what_the_prompts_tiles_do_not_know_goes_another_way() -> None:
    q, k = drawn(4, 2, 64, seed=0), drawn(4, 1, 64, seed=1)
    assert kernels.prompt_attention(q, k, k) is not None
    assert kernels.prompt_attention(q.float(), k.float(), k.float()) is None
    assert kernels.prompt_attention(q[..., :40], k[..., :40], k[..., :40]) is None
    with torch.enable_grad():
        assert kernels.prompt_attention(q, k, k) is None
    with pytest.raises(ValueError, match="do not fit"):
        kernels.prompt_attention(q, k[:3], k[:3])
    with pytest.raises(ValueError, match="do not fit"):
        kernels.prompt_attention(q[:, :1].expand(4, 3, 64), k.expand(4, 2, 64), k.expand(4, 2, 64))


@needs_tiles
@torch.inference_mode()
def test_a_prompt_may_be_cut_and_have_company() -> None:
    """To the bit: every product, and the attention of a prompt, is the token's own."""
    args = ModelArgs(
        dim=96,
        hidden_dim=80,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        vocab_size=70,
        max_seq_len=512,
        moe=MoEArgs(num_experts=4, num_experts_per_tok=2),
    )
    model = Transformer(args, ParallelState.single("cpu"), dtype=torch.bfloat16).eval()
    init_weights(model, seed=0)
    tokens = torch.randint(0, 70, (300,), generator=torch.Generator().manual_seed(0))
    whole = model.prefill(tokens, [300], [0], model.new_cache(1, 300), all_logits=True)
    cache, cut = model.new_cache(1, 300), []
    for piece in tokens.split([100, 37, 1, 162]):
        cut.append(model.prefill(piece, [len(piece)], [0], cache, all_logits=True))
    assert torch.equal(torch.cat(cut), whole)
    company = torch.cat((tokens[50:], tokens, tokens[:9]))
    among = model.prefill(company, [250, 300, 9], [2, 0, 1], model.new_cache(3, 300), all_logits=True)
    assert torch.equal(among[250:550], whole)
