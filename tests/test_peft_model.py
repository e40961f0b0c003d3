"""Models with adapters against transformers' Mixtral that has the same adapters by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from adapters import PEFT, RANK, add_by_hand, by_base_names, random_adapter, trained_by_hand, write_adapter
from checkpoints import accessory_config, hf_greedy, hf_logits, random_mixtral, random_prompts, write_checkpoint
from models import completions
from ranks import RankPool, alike, on_ranks
from test_gradients import Batch, assert_gradients, random_batch, reference_loss
from torch import Tensor

from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.model.scoring import score_tokens
from accessory.parallel.state import ParallelState
from accessory.train.build import build_for_training
from accessory.train.recompute import recompute_activations
from accessory.train.sharding import device_mesh

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]
PROMPTS = random_prompts(4, [5, 17, 40])
BATCH = random_batch(6, [20, 9, 16, 1], 20)
LAYOUTS = [(1, "expert"), (2, "expert"), (2, "tensor"), (4, "expert"), (4, "tensor")]


class Folders(NamedTuple):
    """A random base, an adapter for it, and transformers' model with both."""

    base: Path
    adapter: Path
    truth: Any


@pytest.fixture(scope="module")
def folders(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("peft")
    hf = random_mixtral(3)
    config = accessory_config(hf.config)
    base = write_checkpoint(folder / "base", hf, small_tokenizer, files=2)
    tensors = random_adapter(config, 8)
    adapter = write_adapter(folder / "adapter", tensors, config, files=4, tokenizer=small_tokenizer)
    return Folders(base, adapter, add_by_hand(hf, tensors))


def load(paths: list[Path], placement: str = "auto", dtype: str = "fp32", **settings: Any) -> MetaModel:
    group = dist.group.WORLD if dist.is_initialized() else None
    placed = {"max_seq_len": 128, "expert_placement": placement, "mp_group": group}
    return MetaModel.from_pretrained(paths, dtype=dtype, device="cpu", **placed, **settings)


# --- inference


def answers_on_rank(paths: list[Path], placement: str) -> tuple[list[Tensor], list[list[int]]]:
    """Logits of the prompts, and what is generated: prefill is grouped, decoding gathered."""
    model = load(paths, placement)
    assert not model.llma.layers[0].attention.wq.weight.requires_grad  # type: ignore[union-attr]
    with torch.no_grad():
        return score_tokens(model.llma, PROMPTS), completions(model.llma, PROMPTS, max_gen_len=24)


@pytest.mark.parametrize(("size", "placement"), LAYOUTS)
def test_an_adapted_model_says_what_transformers_says(
    size: int, placement: str, folders: Folders, ranks: Pools
) -> None:
    found = on_ranks(ranks, size, answers_on_rank, [folders.base, folders.adapter], placement)
    logits, generated = alike(found)
    for prompt, own in zip(PROMPTS, logits, strict=True):
        torch.testing.assert_close(own, hf_logits(folders.truth, prompt), atol=1e-4, rtol=1e-4)
    assert generated == [hf_greedy(folders.truth, prompt, 24) for prompt in PROMPTS]


def untrained_on_rank(folder: Path, configs: list[Path], placement: str, dtype: str) -> None:
    """A base with an untrained adapter is the base, to the bit: scoring, decoding, and the loss in training."""
    base = load([folder], placement, dtype)
    adapted = load([folder], placement, dtype, llama_type="mistral_peft", llama_config=configs)
    shapes = {name: tuple(own.shape) for name, own in adapted.llma.named_parameters()}
    assert any("w13_lora_a" in name for name in shapes)
    assert "layers.1.feed_forward.experts.w2_bias" in shapes
    assert shapes["layers.1.feed_forward.gate.lora_b.weight"] == (8, 3)
    assert shapes["output.lora_a.weight"] == (RANK, 32)
    with torch.no_grad():
        for ours, theirs in zip(score_tokens(adapted.llma, PROMPTS), score_tokens(base.llma, PROMPTS), strict=True):
            assert torch.equal(ours, theirs)
    assert completions(adapted.llma, PROMPTS, max_gen_len=8) == completions(base.llma, PROMPTS, max_gen_len=8)
    losses = [model.train()(BATCH.examples, BATCH.labels) for model in (adapted, base)]
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1]["load_balancing"][0], losses[1][1]["load_balancing"][0])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("size", "placement"), [(1, "expert"), (2, "expert"), (2, "tensor")])
def test_an_untrained_adapter_changes_no_bit(
    size: int, placement: str, dtype: str, folders: Folders, ranks: Pools, tmp_path: Path
) -> None:
    everywhere = {"lora_targets": ["attention", "experts", "router", "head"], "lora_ranks": {"router": 3}}
    (tmp_path / "everywhere.json").write_text(json.dumps(everywhere))
    configs = [folders.base / "config.json", folders.adapter / "config.json", tmp_path / "everywhere.json"]
    on_ranks(ranks, size, untrained_on_rank, folders.base, configs, placement, dtype)


# --- gradients


class Found(NamedTuple):
    loss: float
    balance: float
    grads: dict[str, Tensor]


def gradients_on_rank(
    folders: list[Path], mp_size: int, placement: str, data_parallel: Any, policy: Any, batch: Batch
) -> Found:
    return gradients_of(Pretrained.resolve(folders, max_seq_len=64), mp_size, placement, data_parallel, policy, batch)


def gradients_of(
    pretrained: Pretrained, mp_size: int, placement: str, data_parallel: Any, policy: Any, batch: Batch
) -> Found:
    """Gradients of every parameter that trains, whole; each data-parallel rank has its share of the rows."""
    state = ParallelState.init(mp_size, "cpu")
    llma = build_for_training(
        pretrained,
        state,
        device_mesh(state),
        data_parallel=data_parallel,
        compute_dtype=torch.float32,
        expert_placement=placement,
        before_sharding=lambda llma: recompute_activations(llma, policy),
    )
    model = MetaModel(llma, None).train()  # type: ignore[arg-type]
    own = [part.chunk(state.dp_size)[state.dp_rank] for part in (batch.examples, batch.labels)]
    learned = (own[1][:, 1:] != 0).sum()
    loss, extras, _ = model.training_losses(*own)
    loss = loss * learned / (batch.labels[:, 1:] != 0).sum()
    (loss + sum(value * weight for value, weight in extras.values())).backward()
    dist.all_reduce(loss := loss.detach(), group=state.dp_group)
    grads = {}
    for name, parameter in llma.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.grad is not None:
            grads[name] = parameter.grad.full_tensor()  # type: ignore[attr-defined]
    return Found(loss.item(), extras["load_balancing"][0].item(), by_base_names(grads))


@pytest.fixture(scope="module")
def true_gradients(folders: Folders) -> Found:
    loss, balance = reference_loss(folders.truth, BATCH, 0.1)
    folders.truth.zero_grad()
    (loss + balance).backward()
    grads = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in trained_by_hand(folders.truth).items()
    }
    return Found(loss.item(), balance.item() / 0.1, grads)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement", "data_parallel"),
    [
        (1, 1, "expert", "sdp"),
        (1, 2, "expert", "sdp"),
        (1, 2, "tensor", "sdp"),
        (2, 1, "expert", "fsdp"),
        (2, 2, "expert", "sdp"),
        (2, 2, "tensor", "fsdp"),
        (2, 2, "tensor", "ddp"),
    ],
)
def test_gradients_are_those_of_transformers(
    dp_size: int,
    mp_size: int,
    placement: str,
    data_parallel: str,
    policy: str,
    folders: Folders,
    true_gradients: Found,
    ranks: Pools,
) -> None:
    pool = ranks(dp_size * mp_size)
    paths = [folders.base, folders.adapter]
    found = pool.run(gradients_on_rank, paths, mp_size, placement, data_parallel, policy, BATCH)
    first = found[0]
    assert first.loss == pytest.approx(true_gradients.loss, rel=1e-5)
    assert first.balance == pytest.approx(true_gradients.balance, rel=1e-5)
    assert_gradients(first.grads, true_gradients.grads)
    for other in found[1:]:
        assert all(torch.equal(other.grads[name], grad) for name, grad in first.grads.items())


def test_every_kind_of_adapter_has_a_gradient(true_gradients: Found) -> None:
    """The comparison above says nothing of a gradient that is zero."""
    for kind in ("wq.lora_a", "wo.lora_b", "wo.bias", "w1.lora_a", "w2.lora_b", "w2.bias", "w3.bias", "ffn_norm"):
        assert any(kind in name and grad.abs().max() > 1e-3 for name, grad in true_gradients.grads.items()), kind
    assert PEFT["lora_alpha"] != PEFT["lora_rank"], "the scale must be seen"
