"""What must hold on the ranks of a run: replicas that stay replicas, and experts without tokens that do no harm."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from finetuning import Setting, finetune_on_rank, layout, log_lines, losses, make_setting, model_tensors
from ranks import RankPool
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from accessory.train import checkpointer
from accessory.train.loop import FinetuneLoop

Pools = Callable[[int], RankPool]


class Replicas(NamedTuple):
    """A rank's place, and its own part of everything that its model-parallel group holds alike."""

    dp_rank: int
    mp_rank: int
    begin: dict[str, Tensor]
    end: dict[str, Tensor]
    moments: dict[str, Tensor]


def replicas_on_rank(setting: Setting, arguments: list[str]) -> Replicas:
    found: list[Replicas] = []
    run = FinetuneLoop.run

    def observed(loop: FinetuneLoop, *given: Any) -> Any:
        state = loop.model.llma.state
        parameters = {
            name: parameter
            for name, parameter in loop.model.named_parameters()
            if isinstance(parameter, DTensor) and isinstance(parameter.placements[-1], Replicate)
        }
        begin = {name: parameter.to_local().detach().clone() for name, parameter in parameters.items()}
        stop = run(loop, *given)
        end = {name: parameter.to_local().detach().clone() for name, parameter in parameters.items()}
        moments = {
            f"{name}.{key}": value.to_local().clone()
            for name, parameter in parameters.items()
            for key, value in loop.optimizer.state[parameter].items()
            if isinstance(value, DTensor)
        }
        found.append(Replicas(state.dp_rank, state.mp_rank, begin, end, moments))
        return stop

    with mock.patch.object(FinetuneLoop, "run", observed):
        finetune_on_rank(setting, arguments)
    return found[0]


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "steps", "options"),
    [
        (1, 2, 100, {"precision": "bf16"}),
        (2, 2, 50, {"expert_placement": "tensor", "data_parallel": "fsdp"}),
        (1, 4, 50, {"expert_placement": "expert", "checkpointing": True}),
        pytest.param(2, 4, 25, {"precision": "bf16"}, marks=pytest.mark.soak),  # eight processes take their time
    ],
)
def test_replicas_are_alike_to_the_bit_after_many_steps(
    dp_size: int, mp_size: int, steps: int, options: dict[str, Any], ranks: Pools, small_tokenizer: Path, tmp_path: Path
) -> None:
    setting = make_setting(tmp_path, small_tokenizer, n_layers=1)
    sizes = {"model_parallel_size": mp_size, "batch_size": 4 // dp_size, "epochs": 100}
    arguments = setting.arguments(tmp_path / "run", **sizes, **options, max_steps=steps)
    results = ranks(dp_size * mp_size).run(replicas_on_rank, setting, arguments)
    for dp_rank in range(dp_size):
        first, *others = (result for result in results if result.dp_rank == dp_rank)
        assert len(others) == mp_size - 1
        names = {name.removeprefix("llma.") for name in first.end}
        layer = "layers.0."
        expected = {"norm.weight", *(f"{layer}{name}.weight" for name in ("attention_norm", "ffn_norm"))}
        assert names == {*expected, f"{layer}feed_forward.gate.weight"}
        assert len(first.moments) == 2 * len(first.end)
        for name, tensor in first.end.items():
            assert tensor.numel()
            assert not torch.equal(tensor, first.begin[name])
        for other in others:
            for ours, theirs in ((first.end, other.end), (first.moments, other.moments)):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


# -- experts without a token

ONE, EXPERTS = 5, 8


def experts_of(tensors: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """The experts' matrices of an export in the base form, by (layer and matrix, expert)."""
    found = {}
    for name, tensor in tensors.items():
        before, marker, after = name.partition(": ")[2].partition(".experts.")
        if marker:
            number, _, matrix = after.partition(".")
            found[f"{before}.{matrix}", int(number)] = tensor
    return found


@pytest.mark.parametrize("policy", ["none", "full", "moe"])
@pytest.mark.parametrize(
    ("dp_size", "mp_size", "options"),
    [(1, 1, {}), (2, 2, {"expert_placement": "expert"}), (4, 1, {}), (1, 4, {"expert_placement": "expert"})],
)
def test_experts_that_get_no_token_anywhere_stay_as_they_are(
    policy: str,
    dp_size: int,
    mp_size: int,
    options: dict[str, Any],
    ranks: Pools,
    small_tokenizer: Path,
    tmp_path: Path,
) -> None:
    moe = {"num_experts": EXPERTS, "num_experts_per_tok": 1}
    setting = make_setting(tmp_path, small_tokenizer, all_to=ONE, moe=moe)
    arguments = setting.arguments(
        tmp_path / "run", **layout(dp_size, mp_size), **options, grad_ckpt_policy=policy, max_steps=4, weight_decay=0
    )
    ranks(dp_size * mp_size).run(finetune_on_rank, setting, arguments)
    lines = log_lines(tmp_path / "run")
    assert [line["heaviest"] for line in lines] == [[[ONE, 1.0]] * 2] * 4
    begin, end = (experts_of(model_tensors(folder)) for folder in (setting.model, tmp_path / "run" / "epoch0-iter8"))
    assert begin.keys() == end.keys()
    assert len(end) == 2 * 3 * EXPERTS
    for (name, expert), tensor in end.items():
        assert torch.equal(tensor, begin[name, expert]) == (expert != ONE), (name, expert)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(("dp_size", "mp_size"), [(2, 2), (4, 1)])
def test_experts_that_get_no_token_on_one_rank_change_no_result(
    dp_size: int, mp_size: int, policy: str, ranks: Pools, small_tokenizer: Path, tmp_path: Path
) -> None:
    """Short examples and many experts: an expert that one rank uses, another does not; one rank has no example."""
    setting = make_setting(tmp_path, small_tokenizer, examples=5, moe={"num_experts": 32, "num_experts_per_tok": 1})
    for output, sizes in (("one", layout(1, 1)), ("run", layout(dp_size, mp_size))):
        given = {"max_steps": 4, "grad_ckpt_policy": policy, "lr": 5e-4}
        arguments = setting.arguments(tmp_path / output, **sizes, **given)
        ranks(1 if output == "one" else dp_size * mp_size).run(finetune_on_rank, setting, arguments)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert any(share == 0 for line in log_lines(tmp_path / "one") for _, share in line["lightest"])


def slow_saves_on_rank(setting: Setting, arguments: list[str]) -> None:
    save = checkpointer.dcp.save

    def slowly(*given: Any, **settings: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(0.3)
        return save(*given, **settings)

    with mock.patch.object(checkpointer.dcp, "save", slowly):
        finetune_on_rank(setting, arguments)


def test_models_are_written_while_an_earlier_state_still_is(
    ranks: Pools, small_tokenizer: Path, tmp_path: Path
) -> None:
    """Two threads of each rank exchange words then; each has its own group of ranks for it."""
    setting = make_setting(tmp_path, small_tokenizer)
    arguments = setting.arguments(tmp_path / "run", **layout(2, 1), max_steps=4, save_iteration_interval=2, keep_last=2)
    ranks(2).run(slow_saves_on_rank, setting, arguments)
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert steps == ["step-00000003", "step-00000004"]
