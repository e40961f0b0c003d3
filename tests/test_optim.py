"""Optimizers and rates: against torch's own, on one rank and on several."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from ranks import error_of
from test_training import step_rows
from torch import Tensor, nn

from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained, load_transformer
from accessory.parallel.state import ParallelState
from accessory.train.muon import orthogonal
from accessory.train.optim import OPTIMIZERS, Rates, kept_bytes, states_of
from accessory.train.sharding import device_mesh, shard_model
from accessory.train.trainer import train_step

DECAY = 0.1
SHAPES = {
    "tok_embeddings.weight": (12, 8),
    "layers.0.attention.wq.weight": (8, 8),
    "layers.0.attention.wk.weight": (4, 8),
    "layers.0.attention.wq.lora_b.weight": (8, 2),
    "layers.0.feed_forward.gate.weight": (3, 8),
    "layers.0.feed_forward.experts.w13": (3, 2, 6, 8),
    "layers.0.feed_forward.experts.w2": (3, 8, 6),
    "layers.0.feed_forward.experts.w2_bias": (3, 8),
    "layers.0.ffn_norm.weight": (8,),
    "output.weight": (12, 8),
}
MATRICES = ("wq", "wk", "experts.w13", "experts.w2")
RATES = Rates(router=3.0, embedding=0.25, lora_b=16.0)
TIMES = {
    "tok_embeddings.weight": 0.25,
    "layers.0.feed_forward.gate.weight": 3.0,
    "layers.0.attention.wq.lora_b.weight": 16.0,
}


def pieces(name: str, tensor: Tensor, optimizer: str) -> list[Tensor]:
    """What torch is to take as parameters of their own: each matrix, where the optimizer is Muon's."""
    if optimizer == "muon" and torch_takes(name):
        return list(tensor.reshape(-1, *tensor.shape[-2:]))
    return [tensor]


def torch_takes(name: str) -> bool:
    return "lora" in name or name.removesuffix(".weight").endswith(MATRICES)


NO_TORCHAO = "no torchao: pip install -e .[adamw8bit]"
TORCHAO = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@TORCHAO
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_are_torchs_with_a_rate_for_each_kind(optimizer: Any) -> None:
    """Every matrix by torch.optim.Muon, in float32, or AdamW, at its own rate, while the schedule falls."""
    if optimizer == "adamw8bit":  # small parameters keep states of float32
        pytest.importorskip("torchao", reason=NO_TORCHAO)
    draw = torch.Generator().manual_seed(1)
    ours = {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in SHAPES.items()}
    theirs = {
        name: [nn.Parameter(part.clone()) for part in pieces(name, own.data, optimizer)] for name, own in ours.items()
    }
    made = OPTIMIZERS[optimizer].build(ours.items(), lr=1.0, weight_decay=DECAY, rates=RATES)
    plain: dict[str, torch.optim.Optimizer] = {}
    for name, parameters in theirs.items():
        decay = 0.0 if "norm" in name or "bias" in name else DECAY
        if optimizer == "muon" and torch_takes(name):
            plain[name] = torch.optim.Muon(parameters, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        else:
            plain[name] = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=decay)
    for lr in (1e-2, 7e-3, 4e-3):
        for group in made.param_groups:
            group["lr"] = lr * group["rate"]
        for name, own in ours.items():
            own.grad = torch.randn(own.shape, generator=draw)
            for parameter, part in zip(theirs[name], pieces(name, own.grad, optimizer), strict=True):
                parameter.grad = part.clone()
            plain[name].param_groups[0]["lr"] = lr * TIMES.get(name, 1.0)
            with mock.patch.object(Tensor, "bfloat16", Tensor.float):
                plain[name].step()
        made.step()
    for name, own in ours.items():
        truth = torch.stack([part.data for part in theirs[name]]).view_as(own)
        torch.testing.assert_close(own.data, truth, rtol=1e-5, atol=1e-6, msg=name)
        kept = {key: state for key, state in made.state[own].items() if key != "step"}
        assert set(kept) == set(states_of(optimizer, name)), name
        assert sum(state.nbytes for state in kept.values()) == own.numel() * kept_bytes(optimizer, name, own.shape)


@TORCHAO
@pytest.mark.parametrize("at_once", [1 << 16, 256])
def test_states_of_a_byte_are_torchaos_own(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, where torchao's step is not compiled; a row's blocks are not cut, so that both have the same."""
    theirs = pytest.importorskip("torchao.optim", reason=NO_TORCHAO)
    monkeypatch.setattr("accessory.train.adamw8bit._AT_ONCE", at_once)
    draw = torch.Generator().manual_seed(1)
    own, other = (nn.Parameter(torch.ones(4, 2, 6, 128)) for _ in range(2))
    made = OPTIMIZERS["adamw8bit"].build([("layers.0.feed_forward.experts.w13", own)], lr=1e-2, weight_decay=DECAY)
    plain = theirs.AdamW8bit([other], lr=1e-2, betas=(0.9, 0.95), weight_decay=DECAY, block_size=64)
    for _ in range(3):
        own.grad = torch.randn(own.shape, generator=draw) * torch.rand(own.shape, generator=draw) ** 8
        other.grad = own.grad.clone()
        made.step()
        with torch.compiler.set_stance("force_eager"):
            plain.step()
    assert torch.equal(own, other)
    for name in ("exp_avg", "exp_avg_sq"):
        codes, scales, moment = made.state[own][name], made.state[own][f"{name}_scale"], plain.state[other][name]
        assert codes.dtype == torch.uint8
        assert torch.equal(codes, moment.codes)
        assert scales.shape == (4, 2, 6, 2)
        assert torch.equal(scales.flatten(), moment.scale)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 2, 6, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonal_matrices(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    found = orthogonal(given, dtype)
    values = torch.linalg.svdvals(found)
    assert found.dtype == torch.float32
    assert 0.6 < values.min() <= values.max() < 1.3
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    assert (u @ v * found).sum() / values.sum() > 0.99, "it is turned as the matrix is"
    assert not orthogonal(torch.zeros(shape)).any()


# -- on ranks


class Course(NamedTuple):
    """Losses of some steps, the weights behind the first and behind the last of them."""

    losses: list[float]
    first: dict[str, Tensor]
    weights: dict[str, Tensor]


LR = 5e-3


def whole_weights(model: MetaModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.llma.named_parameters():
        yield name, parameter.detach().full_tensor().clone()


def steps_on_rank(folder: Path, mp_size: int, placement: str, data_parallel: Any, rates: Rates, name: Any) -> Course:
    state = ParallelState.init(mp_size, "cpu")
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    llma = load_transformer(pretrained, state, dtype=torch.float32, expert_placement=placement)
    shard_model(llma, device_mesh(state), data_parallel=data_parallel)
    model = MetaModel(llma, pretrained.tokenizer).train()
    optimizer = OPTIMIZERS[name].build(model.named_parameters(), lr=1.0, weight_decay=DECAY, rates=rates)
    losses, first = [], {}
    for step in range(4):
        share = len(step_rows(step)[0]) // state.dp_size
        own = slice(state.dp_rank * share, (state.dp_rank + 1) * share)
        examples, labels = (rows[own] for rows in step_rows(step))
        losses.append(train_step(model, optimizer, [(examples, labels)], lr=LR, clip_grad=0).loss)
        first = first or dict(whole_weights(model))
    return Course(losses, first, dict(whole_weights(model)))


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config()
    where = tmp_path_factory.mktemp("optim") / "base"
    return write_folder(where, random_tensors(config, 5), config, files=1, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def alone(ranks: Any, folder: Path) -> Course:
    """Muon on one rank."""
    return ranks(1).run(steps_on_rank, folder, 1, "auto", "fsdp", Rates(), "muon")[0]


LAYOUTS = [
    (2, 1, "auto", "fsdp"),
    (2, 1, "auto", "ddp"),
    (1, 2, "expert", "fsdp"),
    (1, 2, "tensor", "sdp"),
    (2, 2, "expert", "sdp"),
    (2, 2, "tensor", "fsdp"),
]


@pytest.mark.parametrize(("dp_size", "mp_size", "placement", "data_parallel"), LAYOUTS)
def test_muon_is_the_same_however_it_is_spread(
    dp_size: int, mp_size: int, placement: str, data_parallel: str, ranks: Any, folder: Path, alone: Course
) -> None:
    courses = ranks(dp_size * mp_size).run(steps_on_rank, folder, mp_size, placement, data_parallel, Rates(), "muon")
    for course in courses:
        assert course.losses == pytest.approx(alone.losses, rel=1e-4)
        for name, weight in alone.weights.items():
            assert torch.equal(course.weights[name], courses[0].weights[name]), name
            difference = (course.weights[name] - weight).abs().max().item()
            assert difference <= 1e-4 * weight.abs().max().item(), f"{name}: {difference}"


@TORCHAO
def test_ranks_that_would_hold_parts_of_a_block_are_refused(ranks: Any, folder: Path) -> None:
    pytest.importorskip("torchao", reason=NO_TORCHAO)
    arguments = folder, 2, "auto", "sdp", Rates(), "adamw8bit"
    for kind, message in ranks(2).run(error_of, steps_on_rank, *arguments):
        assert kind == "ValueError"
        assert "blocks of 64 numbers, and of a parameter of shape (384, 64) a rank holds rows of 32: give an" in message


def test_a_step_takes_each_groups_own_rate(ranks: Any, folder: Path) -> None:
    """AdamW's first step is as long as its rate, and so is the decay beside it."""
    one, other = (
        ranks(1).run(steps_on_rank, folder, 1, "auto", "fsdp", rates, "adamw")[0].first for rates in (Rates(), RATES)
    )
    before = (
        ranks(1).run(steps_on_rank, folder, 1, "auto", "fsdp", Rates(router=0.0, embedding=0.0), "adamw")[0].weights
    )
    times = {"tok_embeddings.weight": 0.25, **{f"layers.{layer}.feed_forward.gate.weight": 3.0 for layer in (0, 1)}}
    for name, weight in one.items():
        if name not in times:
            assert torch.equal(other[name], weight), name
            continue
        torch.testing.assert_close(
            other[name] - before[name], times[name] * (weight - before[name]), rtol=1e-3, atol=1e-7
        )
