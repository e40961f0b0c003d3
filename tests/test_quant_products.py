"""A Mixtral block through the products for plain and quantized weights, whole and in the slices of every placement.

The truth is transformers' own block, holding the plain values of the quantized weights.
"""

import copy
import functools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralAttention, MixtralSparseMoeBlock

from accessory import kernels
from accessory.config import QuantArgs
from accessory.kernels import quantized
from accessory.kernels.cpu.quantized import native_weight
from accessory.kernels.quantized import quantized_linear_reference, unpacked
from accessory.model import router
from accessory.model.dispatch import Dispatcher
from accessory.products import gathered_linear, grouped_linear, linear
from accessory.quant import QuantizedParameter, QuantizedWeight, quantize

DIM, HIDDEN, EXPERTS, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 8, 8, 4, 64
Weight = Tensor | QuantizedWeight
Routing = tuple[Tensor, Tensor]  # weights and expert numbers, each (T, 2)
FORMS = [("int8", 64), ("int4", 32), ("int4", 64), ("nf4", 64), ("fp8", 128), ("mxfp4", 32)]
forms = pytest.mark.parametrize(("form", "group"), FORMS)
SHAPES = {
    "wq": (HEADS * HEAD_DIM, DIM),
    "wk": (KV_HEADS * HEAD_DIM, DIM),
    "wv": (KV_HEADS * HEAD_DIM, DIM),
    "wo": (DIM, HEADS * HEAD_DIM),
    "w13": (EXPERTS, 2, HIDDEN, DIM),
    "w2": (EXPERTS, DIM, HIDDEN),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def draw_routing(tokens: int) -> Routing:
    """Two experts for each token. Drawn, not computed: close choices would turn a rounding into another expert."""
    probs_TK, chosen_TK = draw(tokens, EXPERTS, seed=1).softmax(-1).topk(2)
    return probs_TK / probs_TK.sum(-1, keepdim=True), chosen_TK


def draw_tokens(tokens: int) -> Tensor:
    return draw(tokens, DIM).bfloat16()


@functools.cache
def weights_of(form: str | None, group: int = 64) -> dict[str, Weight]:
    """In float32, or quantized."""
    plain = {name: draw(*shape) / shape[-1] ** 0.5 for name, shape in SHAPES.items()}
    if form is None:
        return dict(plain)
    return {name: quantize(weight, form, group_size=group) for name, weight in plain.items()}  # type: ignore[arg-type]


def plain(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# ---- transformers' block ---------------------------------------------------------------------------------


def config() -> MixtralConfig:
    return MixtralConfig(
        hidden_size=DIM,
        intermediate_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        attn_implementation="eager",
    )


def true_attention(x_TD: Tensor, weights: dict[str, Weight]) -> Tensor:
    """Without rotation: its angles are all zero."""
    theirs = MixtralAttention(config(), layer_idx=0).eval()
    for name in "qkvo":
        getattr(theirs, f"{name}_proj").weight.copy_(plain(weights[f"w{name}"]))
    tokens = x_TD.shape[0]
    mask = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
    angles = torch.zeros(1, tokens, HEAD_DIM)
    return theirs(x_TD[None], position_embeddings=(angles.cos(), angles.sin()), attention_mask=mask)[0][0]


def true_experts(x_TD: Tensor, routing: Routing, weights: dict[str, Weight]) -> Tensor:
    theirs = MixtralSparseMoeBlock(config()).experts.eval()
    theirs.gate_up_proj.copy_(plain(weights["w13"]).flatten(1, 2))
    theirs.down_proj.copy_(plain(weights["w2"]))
    probs_TK, chosen_TK = routing
    return theirs(x_TD, chosen_TK, probs_TK)


# ---- the same through the products -----------------------------------------------------------------------


def attention(x_TD: Tensor, weights: dict[str, Weight]) -> Tensor:
    q, k, v = (linear(x_TD, weights[name]).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1) for name in ("wq", "wk", "wv"))
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(y.transpose(0, 1).flatten(1), weights["wo"])


def experts(x_TD: Tensor, routing: Routing, weights: dict[str, Weight], *, first: int, grouped: bool) -> Tensor:
    probs_TK, _ = routing
    with mock.patch.object(kernels, "gathering_pays", return_value=not grouped):
        pairs = Dispatcher(first, weights["w13"].shape[0], EXPERTS)(x_TD, router.Routing(*routing, probs_TK, probs_TK))
    gate, up = pairs.product(pairs.rows, weights["w13"]).chunk(2, dim=-1)
    return pairs.combine(pairs.product(F.silu(gate) * up, weights["w2"]).float(), probs_TK)


def slices(weights: dict[str, Weight], placement: str, rank: int, ranks: int) -> dict[str, Weight]:
    """What one of ``ranks`` holds, as parallel/plan.py cuts."""
    tensor = placement == "tensor"
    axes = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w13": 2 if tensor else 0, "w2": 2 if tensor else 0}
    cut = {}
    for name, axis in axes.items():
        part = weights[name].shape[axis] // ranks
        cut[name] = weights[name].narrow(axis, rank * part, part)
    return cut


def block(
    x_TD: Tensor, routing: Routing, weights: dict[str, Weight], placement: str, ranks: int, grouped: bool
) -> Tensor:
    """Attention and experts, the partial results of all ranks added as the all-reduce does."""
    held = [slices(weights, placement, rank, ranks) for rank in range(ranks)]
    y_TD = x_TD + sum(attention(x_TD, part).float() for part in held).to(x_TD.dtype)
    own = EXPERTS // ranks if placement == "expert" else 0
    parts = [
        experts(y_TD, routing, part, first=own * rank, grouped=grouped).to(x_TD.dtype).float()
        for rank, part in enumerate(held)
    ]
    return y_TD.float() + sum(parts)


@functools.cache
def true_block(form: str | None, group: int, tokens: int) -> Tensor:
    """Of the block's input drawn for so many tokens, in bfloat16's numbers."""
    weights, x_TD = weights_of(form, group), draw_tokens(tokens).float()
    y_TD = x_TD + true_attention(x_TD, weights)
    return y_TD + true_experts(y_TD, draw_routing(tokens), weights)


# ---- tests -----------------------------------------------------------------------------------------------

LAYOUTS = [("expert", 1), ("expert", 2), ("expert", 4), ("tensor", 2), ("tensor", 4)]


@pytest.mark.parametrize(("placement", "ranks"), LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@forms
def test_float32_block_is_transformers_at_every_layout(
    form: str, group: int, tokens: int, placement: str, ranks: int
) -> None:
    x, routing, weights = draw_tokens(tokens).float(), draw_routing(tokens), weights_of(form, group)
    y = block(x, routing, weights, placement, ranks, grouped=tokens > 16)
    torch.testing.assert_close(y, true_block(form, group, tokens), rtol=2e-5, atol=2e-5)


def relative(error: Tensor, truth: Tensor) -> float:
    return (error.norm() / truth.norm()).item()


@pytest.mark.parametrize(("placement", "ranks"), LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@forms
def test_bfloat16_block_adds_no_more_than_its_own_rounding(
    form: str, group: int, tokens: int, placement: str, ranks: int
) -> None:
    """Measured in the norm: bfloat16 itself costs up to 0.5 % here, with 8-bit activations up to 1.3 %.

    On AMX's tiles many tokens' activations have 8 bits too, and 4-bit weights are rounded once more.
    """
    x, routing, weights = draw_tokens(tokens), draw_routing(tokens), weights_of(form, group)
    truth = true_block(form, group, tokens)
    y = block(x, routing, weights, placement, ranks, grouped=tokens > 16)
    cast = {name: plain(weight).bfloat16() for name, weight in weights.items()}
    bf16 = block(x, routing, cast, placement, ranks, grouped=tokens > 16)  # type: ignore[arg-type]
    assert relative(bf16 - truth, truth) < 0.006
    in_8_bits = 0.02 if kernels.tiles_serve() and tokens > 4 else 0.015
    assert relative(y - truth, truth) < (0.006 if tokens > 16 and not kernels.tiles_serve() else in_8_bits)


@pytest.mark.parametrize(
    ("form", "group", "most"),
    [
        ("int8", 64, 0.01),
        ("int4", 32, 0.12),
        ("int4", 64, 0.13),
        ("nf4", 64, 0.12),
        ("fp8", 128, 0.06),
        ("mxfp4", 32, 0.2),
    ],
)
def test_error_against_the_unquantized_block_is_the_formats(form: str, group: int, most: float) -> None:
    truth = true_block(None, group, 40)
    y = block(draw_tokens(40).float(), draw_routing(40), weights_of(form, group), "expert", 1, grouped=True)
    assert most / 10 < relative(y - truth, truth) < most


def test_plain_weights_take_the_same_entry() -> None:
    x, routing, weights = draw_tokens(40).float(), draw_routing(40), weights_of(None)
    for grouped in (True, False):
        for placement, ranks in LAYOUTS:
            y = block(x, routing, weights, placement, ranks, grouped=grouped)
            torch.testing.assert_close(y, true_block(None, 64, 40), rtol=2e-5, atol=2e-5)


def test_plain_grouped_products_of_odd_shapes() -> None:
    for inputs, outputs, dtype in ((6, 5, torch.float32), (12, 9, torch.bfloat16), (16, 3, torch.float32)):
        x, w = draw(7, inputs).to(dtype), draw(3, outputs, inputs).to(dtype)
        y = grouped_linear(x, w, torch.tensor([2, 2, 7], dtype=torch.int32))
        truth = torch.cat((x[:2] @ w[0].T, x[2:] @ w[2].T))
        torch.testing.assert_close(y, truth, rtol=2**-7, atol=2**-7)
    nothing = grouped_linear(draw(7, 8)[:0], draw(3, 4, 8), torch.tensor([0, 0, 0], dtype=torch.int32))
    assert nothing.shape == (0, 4)


def test_more_axes_before_the_inputs() -> None:
    weights = weights_of("int4")
    x = draw(2, 3, DIM)
    for weight in (weights["wq"], plain(weights["wq"])):
        assert torch.equal(linear(x, weight), linear(x.flatten(0, 1), weight).view(2, 3, -1))


@forms
def test_gradients_pass_through_frozen_weights(form: str, group: int) -> None:
    weights, ends = weights_of(form, group), torch.tensor([0, 3, 3, 5, 6, 6, 7, 9], dtype=torch.int32)
    for weight, product in (
        (weights["wo"], lambda x, w: linear(x, w)),
        (weights["w2"], lambda x, w: grouped_linear(x, w, ends)),
    ):
        with torch.enable_grad():
            x = draw(9, weight.shape[-1]).requires_grad_()
            other = x.detach().clone().requires_grad_()
            y, truth = product(x, weight), product(other, plain(weight))
            direction = draw(*y.shape, seed=2)
            (y * direction).sum().backward()
            (truth * direction).sum().backward()
        torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
        assert x.grad is not None
        torch.testing.assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_training_keeps_no_plain_copy() -> None:
    weight = weights_of("nf4")["wo"]
    kept: list[int] = []
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        linear(draw(9, weight.shape[-1]).requires_grad_(), weight)
    assert sum(kept) < weight.shape[0] * weight.shape[1] / 4


def test_training_does_not_round_activations() -> None:
    weight, x = weights_of("int4")["wq"], draw(3, DIM).bfloat16()
    assert isinstance(weight, QuantizedWeight)
    with torch.enable_grad():
        y = linear(x, weight)
    assert torch.equal(y, F.linear(x, weight.dequantize(torch.bfloat16)))
    rounded = quantized_linear_reference(x, weight)
    assert not torch.equal(linear(x, weight), y)
    torch.testing.assert_close(linear(x, weight), rounded, rtol=2**-7, atol=1e-3)


# ---- what is kept of a weight from one product to the next ------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("form", "group"), [own for own in FORMS if own[0] != "fp8"])
def test_a_kept_description_gives_the_same_bits(form: str, group: int, dtype: torch.dtype) -> None:
    weights, expert = weights_of(form, group), torch.tensor([3, -1, 0])
    x = draw(3, DIM).to(dtype)
    wq, w13 = weights["wq"], weights["w13"]
    assert isinstance(wq, QuantizedWeight)
    assert isinstance(w13, QuantizedWeight)
    assert native_weight(wq) is not None, "this machine has no kernels, so this test shows nothing"
    for _ in range(2):
        own = torch.ops.accessory.quantized_linear(x, *unpacked(wq), None)
        assert torch.equal(linear(x, wq), own)
        flat = w13.flatten(1, 2)
        own = torch.ops.accessory.gathered_quantized_linear(x, *unpacked(flat), expert)
        assert torch.equal(gathered_linear(x, w13, expert), own)


def parameter_with(weight: QuantizedWeight) -> QuantizedParameter:
    module = QuantizedParameter(weight.shape, QuantArgs(type=weight.format.name), torch.device("cpu"))
    for kept, new in zip(module.to_local().tensors().values(), weight.tensors().values(), strict=True):
        kept.copy_(new)
    return module


@pytest.mark.parametrize("form", ["int8", "int4", "nf4", "fp8", "mxfp4"])
def test_it_follows_the_parameters_of_a_module(form: str) -> None:
    first, second = (quantize(draw(64, DIM, seed=seed), form) for seed in (1, 2))  # type: ignore[arg-type]
    x = draw(2, DIM)
    module = parameter_with(first)
    before = linear(x, module.to_local())
    assert module.to_local() is module.to_local()
    other = parameter_with(second)
    truth = linear(x, other.to_local())
    assert not torch.equal(truth, before)

    copied = copy.deepcopy(module)
    module.load_state_dict(other.state_dict())
    assert torch.equal(linear(x, module.to_local()), truth)
    assert torch.equal(linear(x, copied.to_local()), before)
    module.load_state_dict({name: value.clone() for name, value in copied.state_dict().items()}, assign=True)
    assert torch.equal(linear(x, module.to_local()), before)
    for own, new in zip(module.parameters(), other.parameters(), strict=True):
        own.data = new.data.clone()
    assert torch.equal(linear(x, module.to_local()), truth)
    for own in module.parameters():  # as FSDP frees memory below a parameter, and fills other memory later
        size, values = own.untyped_storage().size(), own.detach().clone()
        own.untyped_storage().resize_(0)
        own.untyped_storage().resize_(size)
        own.copy_(values)
    assert torch.equal(linear(x, module.to_local()), truth)
    weight = copy.deepcopy(module.to_local())
    assert torch.equal(linear(x, weight), truth)


@forms
def test_few_pairs_without_a_kernel_for_them(form: str, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU without Triton does: one matrix at a time, in blocks of rows."""
    monkeypatch.setattr(quantized, "_SCRATCH", 5 * 128)
    weight = quantize(torch.randn(4, 17, 128), form, group_size=group)
    x_PD, expert_P = torch.randn(6, 128), torch.tensor([3, 0, -1, 2, 2, 3])
    expected = quantized_linear_reference(x_PD, weight, expert_P)
    torch.testing.assert_close(quantized._gathered_by_blocks(x_PD, weight, expert_P), expected)


def test_weights_that_do_not_fit_are_refused() -> None:
    weights, x = weights_of("int4"), draw(3, DIM)
    wq, w2 = weights["wq"], weights["w2"]
    assert isinstance(wq, QuantizedWeight)
    assert isinstance(w2, QuantizedWeight)
    with pytest.raises(ValueError, match="stacked experts"):
        linear(draw(3, HIDDEN), w2)
    with pytest.raises(ValueError, match="without stacked experts"):
        gathered_linear(x, wq, torch.tensor([0, 0, 0]))
    for short in (x[:, 1:], x[:, : DIM // 2]):
        with pytest.raises(ValueError, match="does not fit a weight with 256 inputs"):
            linear(short, wq)
    with pytest.raises(ValueError, match="one int64 for each pair"):
        gathered_linear(draw(3, HIDDEN), w2, torch.tensor([0, 0]))
