"""One step: overflow in float16, losses that are not finite, clipping, and the schedule."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from ranks import error_of
from test_training import step_rows

from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.parallel.ops import local
from accessory.parallel.state import ParallelState
from accessory.train.build import build_for_training
from accessory.train.export import drop_older_models
from accessory.train.optim import adamw, clip_gradients
from accessory.train.precision import loss_scaler, matmul_precision
from accessory.train.schedule import Schedule
from accessory.train.sharding import device_mesh
from accessory.train.trainer import train_step


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config()
    tensors = random_tensors(config, 5)
    return write_folder(
        tmp_path_factory.mktemp("trainer") / "base", tensors, config, files=1, tokenizer=small_tokenizer
    )


def built(
    folder: Path,
    mp_size: int,
    dtype: torch.dtype,
    data_parallel: Any = "fsdp",
    *,
    ep_size: int = 1,
    corrections: bool = False,
) -> MetaModel:
    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    pretrained = pretrained.with_corrections() if corrections else pretrained
    llma = build_for_training(pretrained, state, device_mesh(state), data_parallel=data_parallel, compute_dtype=dtype)
    return MetaModel(llma, pretrained.tokenizer).train()


def own_rows(model: MetaModel, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    state = model.llma.state
    examples, labels = (rows.chunk(state.dp_size)[state.dp_rank] for rows in step_rows(step))
    return [(examples, labels)]


def copies(model: MetaModel) -> list[torch.Tensor]:
    return [local(parameter).detach().clone() for parameter in model.parameters()]


def overflow_on_rank(folder: Path, mp_size: int, data_parallel: str, ep_size: int) -> list[Any]:
    """Steps at a loss scale that overflows, then at one that does not; then with weights that always overflow."""
    model = built(folder, mp_size, torch.float16, data_parallel, ep_size=ep_size, corrections=True)
    optimizer = adamw(model.named_parameters(), lr=1e-3, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before, found = copies(model), []
    for step in range(60):
        result = train_step(
            model,
            optimizer,
            own_rows(model, step),
            lr=1e-3,
            clip_grad=1.0,
            scaler=scaler,
            bias_update_rate=0.01,
        )
        unchanged = all(map(torch.equal, before, copies(model)))
        found.append((result.loss_scale, result.skipped, unchanged))
        if not result.skipped:
            break
    with torch.no_grad():
        for parameter in model.llma.layers[0].parameters():
            local(parameter).fill_(6e4)

    def forever() -> None:
        for step in range(60):
            train_step(model, optimizer, own_rows(model, step), lr=1e-3, clip_grad=1.0, scaler=scaler)

    return [found, error_of(forever), scaler.get_scale()]


@pytest.mark.parametrize(
    ("world", "mp_size", "data_parallel", "ep_size"),
    [(1, 1, "sdp", 1), (2, 2, "sdp", 1), (2, 1, "fsdp", 1), (2, 1, "ddp", 1), (2, 1, "fsdp", 2)],
)
def test_float16_that_overflows_skips_the_step(
    world: int, mp_size: int, data_parallel: str, ep_size: int, ranks: Any, folder: Path
) -> None:
    results = ranks(world).run(overflow_on_rank, folder, mp_size, data_parallel, ep_size)
    assert all(result == results[0] for result in results)
    found, (kind, text), scale = results[0]
    *skipped, last = found
    assert len(skipped) >= 5
    assert [scale for scale, _, _ in found] == [2.0 ** (40 - step) for step in range(len(found))]
    assert all(entry[1:] == (True, True) for entry in skipped)
    assert last[1:] == (False, False)
    assert kind == "FloatingPointError"
    assert "--precision bf16" in text
    assert scale < 1


def float16_on_rank(folder: Path, with_scaler: bool, ep_size: int = 1) -> list[float]:
    model = built(folder, 1, torch.float16 if with_scaler else torch.float32, ep_size=ep_size)
    optimizer = adamw(model.named_parameters(), lr=1e-3, weight_decay=0.0)
    scaler = loss_scaler("fp16", torch.device("cpu")) if with_scaler else None
    steps = range(6)
    found = [train_step(model, optimizer, own_rows(model, s), lr=1e-3, clip_grad=0.5, scaler=scaler) for s in steps]
    return [value for result in found for value in (result.loss, result.grad_norm)]


def test_float16_learns_as_float32_does(ranks: Any, folder: Path) -> None:
    half, single, spread = (
        ranks(2).run(float16_on_rank, folder, *given)[0] for given in ((True,), (False,), (True, 2))
    )
    assert half == pytest.approx(single, rel=0.02)
    assert spread == pytest.approx(single, rel=0.02)


def not_finite_on_rank(folder: Path) -> Any:
    model = built(folder, 1, torch.float32)
    optimizer = adamw(model.named_parameters(), lr=1e-3, weight_decay=0.0)
    if model.llma.state.dp_rank == 1:
        with torch.no_grad():
            local(model.llma.norm.weight).fill_(math.nan)
    before = copies(model)
    error = error_of(train_step, model, optimizer, own_rows(model, 0), lr=1e-3, clip_grad=0.0)
    return error, all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, copies(model), strict=True))


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_alike(ranks: Any, folder: Path) -> None:
    results = ranks(2).run(not_finite_on_rank, folder)
    assert results[0] == results[1]
    (kind, text), untouched = results[0]
    assert kind == "FloatingPointError"
    assert "not finite" in text
    assert untouched


def test_clipping_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (2, 2, 2))]
    for limit in (0.5, 100.0, 0.0, -1.0):
        both = [[torch.nn.Parameter(torch.zeros_like(g)) for g in gradients] for _ in range(2)]
        for parameters in both:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
        norm = clip_gradients([*both[0], torch.nn.Parameter(torch.zeros(3))], limit, ParallelState.single("cpu"))
        theirs = torch.nn.utils.clip_grad_norm_(both[1], limit if limit > 0 else math.inf)
        assert norm == pytest.approx(theirs.item(), rel=1e-6)
        for ours, truth in zip(*both, strict=True):
            torch.testing.assert_close(ours.grad, truth.grad)


@pytest.mark.parametrize(
    ("shape", "decay", "rates"),
    [
        # Two steps of warm-up and eight more, from 1 to 0.2.
        ("linear", None, [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]),
        ("constant", None, [0.5, *[1.0] * 11]),
        ("wsd", 4, [0.5, *[1.0] * 6, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ("wsd", None, [0.5, *[1.0] * 9, 0.2, 0.2]),
        ("wsd", 99, [0.5, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.2]),
    ],
)
def test_the_schedules(shape: str, decay: int | None, rates: list[float]) -> None:
    schedule = Schedule(steps=10, lr=1.0, min_lr=0.2, warmup=2, shape=shape, decay=decay)
    assert [schedule(step) for step in range(12)] == pytest.approx(rates, rel=1e-12)


def test_the_schedule_rises_and_falls() -> None:
    schedule = Schedule(steps=100, lr=1.0, min_lr=0.1, warmup=7.5)
    rates = [schedule(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 7.5)
    assert max(rates) == rates[7] == 1.0
    assert rates[:8] == sorted(rates[:8])
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert schedule(100) == pytest.approx(0.1)
    assert Schedule(steps=2, lr=1.0)(0) == 1.0


def test_matmul_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with matmul_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_older_models_of_within_an_epoch_go(tmp_path: Path) -> None:
    for name in ("epoch0-iter5", "epoch0-iter10", "epoch0", "epoch0-iter15", "epoch1-iter5-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
    (tmp_path / "epoch0-iter1").mkdir()  # not a whole model, so not ours to remove
    drop_older_models(tmp_path / "epoch0-iter15", keep_last=1)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["epoch0", "epoch0-iter1", "epoch0-iter15", "epoch1-iter5-best"]
