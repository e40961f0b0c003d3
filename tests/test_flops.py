"""Arithmetic of a step, against PyTorch's own counter over transformers' Mixtral and against published numbers."""

from collections.abc import Iterator

import pytest
import torch
from checkpoints import accessory_config, random_mixtral
from torch.utils.flop_counter import FlopCounterMode

from accessory.config import AttentionArgs, ModelArgs
from accessory.train.flops import flops_per_token, peak_flops, peak_of_card, recomputed_per_token

MIXTRAL_8X7B = ModelArgs(dim=4096, hidden_dim=14336, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=32000)


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_experts_per_tok": 3, "num_local_experts": 4},
        # Long rows in a narrow model: more than a third of the work is attention.
        {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 64, "num_attention_heads": 4},
    ],
)
def test_a_step_takes_what_pytorchs_counter_counts(sizes: dict[str, int]) -> None:
    hf = random_mixtral(3, **sizes).train()
    hf.set_attn_implementation("eager")
    rows, length = 2, 256
    tokens = torch.randint(3, hf.config.vocab_size, (rows, length))
    with FlopCounterMode(display=False) as counter:
        hf(tokens, labels=tokens, use_cache=False).loss.backward()
    counted = counter.get_total_flops() / (rows * length)
    args = ModelArgs.from_dict(accessory_config(hf.config))
    # The counter sees whole products of attention, of which the mask throws half away: a row of twice the length.
    assert flops_per_token(args, 2 * length) == pytest.approx(counted, rel=1e-6)
    attention = flops_per_token(args, 2 * length) - flops_per_token(args, length)
    assert attention > 0.02 * counted, "a length that was ignored would pass"


def test_a_layer_with_a_window_attends_to_no_more() -> None:
    """In a row of 16 the first layer of two sees 1, 2, 3 and then 4, on average 4 - 4^2 / 32; the second 8."""
    attention = AttentionArgs(window=4, windowed=(0,))
    args = MIXTRAL_8X7B.replace(n_layers=2, attention=attention)
    assert flops_per_token(args, 16) - flops_per_token(args, 0) == 12 * 32 * 128 * (3.5 + 8)
    assert flops_per_token(args, 4) - flops_per_token(args, 0) == 12 * 32 * 128 * (2 + 2)


def test_what_is_computed_again_is_a_forward_pass() -> None:
    """Of all but the output head, or of routers and experts."""
    whole = flops_per_token(MIXTRAL_8X7B, 4096) - 6 * 32000 * 4096
    experts = 2 * 32 * (2 * 3 * 14336 * 4096 + 8 * 4096)
    for policy, again in {"none": 0, "moe": experts, "full": whole / 3}.items():
        assert recomputed_per_token(MIXTRAL_8X7B, 4096, policy) == again


def test_mixtral_has_the_active_parameters_that_its_paper_names() -> None:
    """12.9 billion (Jiang et al., 2024), the embedding among them."""
    active = flops_per_token(MIXTRAL_8X7B, 0) / 6 + 32000 * 4096
    assert active == pytest.approx(12.9e9, rel=0.005)


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H800", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        # Other chips than their names' first words say, and one that nobody knows.
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA T1000", None),
    ],
)
def test_cards_are_known_by_name(name: str, half: float | None) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert peak_of_card(name, dtype) == (None if half is None else pytest.approx(half * 1e12))


def test_float32_counts_as_tf32_where_that_is_allowed(tf32: None) -> None:
    assert peak_of_card("NVIDIA A100-SXM4-80GB", torch.float32) == pytest.approx(156e12)
    torch.set_float32_matmul_precision("highest")
    assert peak_of_card("NVIDIA A100-SXM4-80GB", torch.float32) == pytest.approx(19.5e12)
    assert peak_of_card("NVIDIA A100-SXM4-80GB", torch.float64) is None


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
