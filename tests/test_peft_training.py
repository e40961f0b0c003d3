"""Finetuning with adapters: only they train, are stepped as a plain loop steps them, and lie on disk as asked for."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapters import PEFT, add_by_hand, by_base_names, random_adapter, trained_by_hand, write_adapter
from checkpoints import accessory_config, random_mixtral, write_checkpoint
from finetuning import (
    Setting,
    finetune_on_rank,
    latest_state,
    layout,
    losses,
    make_setting,
    model_tensors,
    state_tensors,
)
from ranks import RankPool, assert_same, error_of
from test_gradients import Batch, reference_loss
from test_training import CLIP_GRAD, step_rows
from torch import Tensor

from accessory.checkpoint.adapter_export import export_adapter
from accessory.checkpoint.merge import merge
from accessory.config import PeftArgs
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.parallel.state import ParallelState
from accessory.train.build import build_for_training
from accessory.train.flops import flops_per_token
from accessory.train.optim import adamw
from accessory.train.parameters import describe_trainable
from accessory.train.recompute import recompute_activations
from accessory.train.sharding import device_mesh
from accessory.train.trainer import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]
STEPS, LR, WEIGHT_DECAY = 8, 2e-3, 0.1


# --- the steps, against a plain loop over transformers


class Course(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def paths(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("steps")
    hf = random_mixtral(5)
    config = accessory_config(hf.config)
    base = write_checkpoint(folder / "base", hf, small_tokenizer, files=2)
    adapter = random_adapter(config, 8)
    return [base, write_adapter(folder / "adapter", adapter, config, files=2, tokenizer=small_tokenizer)]


@pytest.fixture(scope="module")
def truth() -> Course:
    """AdamW over what trains, in one process; biases and norms do not decay."""
    hf = random_mixtral(5)
    hf = add_by_hand(hf, random_adapter(accessory_config(hf.config), 8)).train()
    named = trained_by_hand(hf)
    plain = {name for name in named if name.endswith("bias") or "norm" in name}
    groups = [
        {"params": [own for name, own in named.items() if (name in plain) == kind], "weight_decay": decay}
        for kind, decay in ((False, WEIGHT_DECAY), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=False)
    course = Course([], [], {})
    for step in range(STEPS):
        loss, balance = reference_loss(hf, Batch(*step_rows(step)), 0.1)
        (loss + balance).backward()
        for parameter in named.values():  # an expert without tokens has a gradient of zero, and still decays
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        course.losses.append(loss.item())
        course.norms.append(torch.nn.utils.clip_grad_norm_(named.values(), CLIP_GRAD).item())
        optimizer.step()
        optimizer.zero_grad()
    return course._replace(weights={name: parameter.detach() for name, parameter in named.items()})


def built(
    paths: list[Path], state: ParallelState, *, peft: PeftArgs | None = None, policy: Any = "none", **settings: Any
) -> MetaModel:
    pretrained = Pretrained.resolve(paths, max_seq_len=64)
    if peft is not None:
        pretrained = replace(pretrained, args=pretrained.args.replace(peft=peft))
    settings = {"data_parallel": "sdp", "compute_dtype": torch.float32, **settings}
    llma = build_for_training(
        pretrained,
        state,
        device_mesh(state),
        before_sharding=lambda llma: recompute_activations(llma, policy),
        **settings,
    )
    return MetaModel(llma, pretrained.tokenizer, pretrained.llama_type).train()


def train_on_rank(paths: list[Path], mp_size: int, placement: str, data_parallel: str) -> Course:
    state = ParallelState.init(mp_size, "cpu")
    model = built(paths, state, expert_placement=placement, data_parallel=data_parallel)
    optimizer = adamw(model.named_parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    history = []
    for step in range(STEPS):
        own = [part.chunk(state.dp_size)[state.dp_rank] for part in step_rows(step)]
        history.append(train_step(model, optimizer, [(own[0], own[1])], lr=LR, clip_grad=CLIP_GRAD))
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(one) for one in stepped} == {id(one) for one in model.get_trainable_params().values()}
    assert all(own.grad is None for own in model.parameters())
    weights = {name: own.detach().full_tensor() for name, own in model.llma.named_parameters() if own.requires_grad}
    return Course([step.loss for step in history], [step.grad_norm for step in history], by_base_names(weights))


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement", "data_parallel"),
    [(1, 1, "auto", "sdp"), (1, 2, "tensor", "sdp"), (2, 1, "auto", "ddp"), (2, 2, "expert", "fsdp")],
)
def test_training_is_that_of_a_plain_loop(
    dp_size: int, mp_size: int, placement: str, data_parallel: str, paths: list[Path], truth: Course, ranks: Pools
) -> None:
    found = ranks(dp_size * mp_size).run(train_on_rank, paths, mp_size, placement, data_parallel)
    course = found[0]
    assert course.losses == pytest.approx(truth.losses, rel=1e-4)
    assert course.norms == pytest.approx(truth.norms, rel=1e-4)
    assert course.weights.keys() == truth.weights.keys()
    for name, weight in truth.weights.items():
        torch.testing.assert_close(course.weights[name], weight, rtol=1e-4, atol=1e-4, msg=name)
    for other in found[1:]:
        assert_same(other.weights, course.weights)


# --- what trains, and in which dtype


def dtypes_on_rank(paths: list[Path], mp_size: int, placement: str) -> tuple[dict[str, str], list[float], str]:
    state = ParallelState.init(mp_size, "cpu")
    model = built(paths, state, expert_placement=placement, data_parallel="fsdp", compute_dtype=torch.bfloat16)
    optimizer = adamw(model.named_parameters(), lr=LR, weight_decay=0.0)
    found = []
    for step in range(3):
        own = [part.chunk(state.dp_size)[state.dp_rank] for part in step_rows(step)]
        found.append(train_step(model, optimizer, [(own[0], own[1])], lr=LR, clip_grad=CLIP_GRAD).loss)
    dtypes = {name: str(own.dtype) for name, own in model.llma.named_parameters()}
    return dtypes, found, describe_trainable(model)


def test_frozen_weights_are_held_in_the_compute_dtype(paths: list[Path], truth: Course, ranks: Pools) -> None:
    said = set()
    for mp_size, size, placement in ((1, 1, "auto"), (1, 2, "auto"), (2, 4, "expert"), (2, 4, "tensor")):
        for dtypes, found, line in ranks(size).run(dtypes_on_rank, paths, mp_size, placement):
            for name, dtype in dtypes.items():
                trained = any(part in name for part in ("lora_", "bias", "norm"))
                assert dtype == ("torch.float32" if trained else "torch.bfloat16"), name
            assert found == pytest.approx(truth.losses[:3], rel=0.03)
            said.add(line)
    counts = {"LoRA": "lora_", "biases": "bias", "norms": "norm"}
    numbers = {
        group: sum(own.numel() for name, own in truth.weights.items() if part in name) for group, part in counts.items()
    }
    (line,) = said
    assert line.startswith(f"training {sum(numbers.values()):,} of ")
    assert all(f"{group} {number:,}" in line for group, number in numbers.items())


@pytest.mark.parametrize(
    ("peft", "expected"),
    [
        (PeftArgs(bias_tuning=True), {"biases"}),
        (PeftArgs(lora_rank=4, bias_tuning=False, lora_targets=("experts",)), {"experts"}),
        (PeftArgs(lora_rank=4, bias_tuning=False, lora_targets=("attention",)), {"attention"}),
        (PeftArgs(bias_tuning=False, norm_tuning=True), {"norms"}),
    ],
)
def test_each_switch_by_itself(peft: PeftArgs, expected: set[str], paths: list[Path], ranks: Pools) -> None:
    (trained,) = ranks(1).run(trained_on_rank, paths[:1], peft)
    found = set()
    for name in trained:
        if "lora_" in name:
            found.add("experts" if ".experts." in name else "attention")
        else:
            found.add("biases" if name.endswith("bias") else "norms")
    assert found == expected


def trained_on_rank(paths: list[Path], peft: PeftArgs) -> list[str]:
    """Names of the parameters that get a gradient."""
    model = built(paths, ParallelState.init(1, "cpu"), peft=peft)
    model.training_losses(*step_rows(0)).loss.backward()
    return [name for name, own in model.llma.named_parameters() if own.grad is not None]


def dropped_on_rank(paths: list[Path], dropout: float) -> list[tuple[Tensor, list[Tensor]]]:
    """Loss and gradients under each policy of recomputation, from one seed."""
    found = []
    for policy in ("none", "moe", "full"):
        peft = PeftArgs(lora_rank=4, lora_dropout=dropout)
        model = built(paths, ParallelState.init(1, "cpu"), peft=peft, policy=policy)
        torch.manual_seed(1)
        loss = model.training_losses(*step_rows(0)).loss
        loss.backward()
        grads = [own.grad.full_tensor() for own in model.parameters() if own.grad is not None]  # type: ignore[attr-defined]
        found.append((loss.detach(), grads))
        with torch.no_grad():
            again = [model.eval()(*step_rows(0))[0] for _ in range(2)]
        assert torch.equal(*again), "dropout belongs to training"
    return found


def test_dropout_is_the_same_when_computed_again(paths: list[Path], ranks: Pools) -> None:
    (found,) = ranks(1).run(dropped_on_rank, paths, 0.5)
    for other in found[1:]:
        assert_same(other, found[0])
    (kept,) = ranks(1).run(dropped_on_rank, paths, 0.0)
    assert (kept[0][0] - found[0][0]).abs() > 1e-3, "nothing was dropped"


def test_frozen_weights_cost_no_operations_of_a_gradient(paths: list[Path]) -> None:
    adapted = Pretrained.resolve(paths, max_seq_len=64).args
    plain, none = adapted.replace(peft=None), adapted.replace(peft=PeftArgs(bias_tuning=False))
    attention = 12 * plain.n_layers * plain.n_heads * plain.head_dim * 16 / 2
    products = flops_per_token(plain, 16) - attention
    assert flops_per_token(none, 16) - attention == pytest.approx(products * 4 / 6)
    assert flops_per_token(adapted, 16) > flops_per_token(none, 16)


# --- whole runs


EVERYWHERE = {"lora_targets": ["attention", "experts", "router", "head"], "lora_ranks": {"router": 3, "head": 5}}


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = make_setting(tmp_path_factory.mktemp("runs"), small_tokenizer)
    (setting.folder / "peft.json").write_text(json.dumps({**PEFT, "lora_rank": 8, **EVERYWHERE}))
    return setting


def run(pools: Pools, setting: Setting, output: Path, dp_size: int, mp_size: int, **changes: Any) -> None:
    options = {**layout(dp_size, mp_size), "llama_type": "mistral_peft", "auto_resume": True, **changes}
    arguments = setting.arguments(output, **options)
    arguments += ["--llama_config", str(setting.model / "config.json"), str(setting.folder / "peft.json")]
    assert set(pools(dp_size * mp_size).run(finetune_on_rank, setting, arguments)) == {0}


@pytest.fixture(scope="module")
def whole_run(setting: Setting, ranks: Pools) -> Path:
    output = setting.folder / "whole"
    run(ranks, setting, output, 2, 2, max_steps=6)
    return output


@pytest.fixture(scope="module")
def adapter_run(setting: Setting, ranks: Pools) -> Path:
    """The same, stopped in between, with adapters alone on disk."""
    output = setting.folder / "adapter"
    for end in (3, 6):
        run(ranks, setting, output, 2, 2, max_steps=end, only_save_trainable=True)
    return output


MODEL = "epoch0-iter12"
FROZEN = ("tok_embeddings.weight", "output.weight", "gate.weight", ".w1.weight", "wq.weight", "wo.weight")


def test_frozen_weights_stay_as_they_were(whole_run: Path, setting: Setting) -> None:
    model = loaded(whole_run / MODEL)
    base = loaded(setting.model)
    for name, tensor in base.items():
        assert torch.equal(model[name], tensor) == ("norm" not in name), name
    assert all(tensor.any() for name, tensor in model.items() if name not in base)
    assert losses(whole_run)[-1] < losses(whole_run)[0]


def loaded(*folders: Path) -> Mapping[str, Tensor]:
    model = MetaModel.from_pretrained(folders, dtype="fp32", device="cpu", max_seq_len=64)
    return {name: own.detach() for name, own in model.llma.named_parameters()}


def test_adapters_alone_on_disk(whole_run: Path, adapter_run: Path, setting: Setting) -> None:
    """A run that was stopped, and whose states have no frozen weights, ends at the same bits."""
    assert losses(adapter_run) == losses(whole_run)
    whole, alone = model_tensors(whole_run / MODEL), model_tensors(adapter_run / MODEL)
    assert not [name for name in alone if name.endswith(FROZEN)]
    assert all(name in alone for name in whole if any(part in name for part in ("lora", "bias", "norm")))
    assert_same(alone, {name: whole[name] for name in alone})
    assert_same(loaded(setting.model, adapter_run / MODEL), loaded(whole_run / MODEL))
    whole_state, state = state_tensors(latest_state(whole_run)), state_tensors(latest_state(adapter_run))
    assert_same(state, {name: whole_state[name] for name in state})
    left = {name for name in whole_state if name not in state}
    assert left
    assert all(
        name.startswith("model.") and name.endswith((*FROZEN, ".w13", ".w2", "wk.weight", "wv.weight")) for name in left
    )
    form = {"name": "alpaca", "prompt_types": ["None"]}
    meta = json.loads((adapter_run / MODEL / "meta.json").read_text())
    assert len(meta.pop("base_routers")) == 4, "two of each layer"
    assert meta == {"llama_type": "mistral_peft", "prompt_form": form}
    config = json.loads((adapter_run / MODEL / "config.json").read_text())
    assert (config["lora_rank"], config["lora_alpha"], config["norm_tuning"]) == (8, 6, True)


@pytest.mark.parametrize("only", [True, False], ids=["adapters alone", "all"])
def test_a_run_goes_on_with_other_ranks(
    only: bool, whole_run: Path, setting: Setting, ranks: Pools, tmp_path: Path
) -> None:
    run(ranks, setting, tmp_path, 1, 2, max_steps=3, only_save_trainable=only or None, expert_placement="tensor")
    run(ranks, setting, tmp_path, 2, 1, max_steps=6, only_save_trainable=None if only else True)
    assert losses(tmp_path) == pytest.approx(losses(whole_run), rel=1e-4)


@pytest.mark.parametrize(
    "peft", [PEFT, {"bias_tuning": False, "lora_targets": ["attention"]}], ids=["everywhere", "attention"]
)
def test_a_model_whose_experts_fit_no_file_exports_adapters(
    peft: dict[str, Any], ranks: Pools, small_tokenizer: Path, tmp_path: Path
) -> None:
    """Three experts on two ranks: each file holds a slice of every one, and so do the adapters' files."""
    moe = {"num_experts": 3, "num_experts_per_tok": 2}
    setting = make_setting(tmp_path / "three", small_tokenizer, moe=moe)
    (setting.folder / "peft.json").write_text(json.dumps({**peft, "lora_rank": 8}))
    for only in (False, True):
        run(ranks, setting, tmp_path / f"{only}", 1, 2, max_steps=1, only_save_trainable=only or None)
    model = "epoch0-iter2"
    assert_same(loaded(setting.model, tmp_path / "True" / model), loaded(tmp_path / "False" / model))


def by_flags(setting: Setting, output: Path, *flags: str, **changes: Any) -> list[str]:
    return [*setting.arguments(output, **{"max_steps": 1, "only_save_trainable": True, **changes}), *flags]


def config_of(output: Path) -> dict[str, Any]:
    (folder,) = output.glob("epoch*")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_rank_alone_is_lora_alone_and_goes_through_all_tools(setting: Setting, ranks: Pools, tmp_path: Path) -> None:
    """What --lora_rank trains merges, and exports to a library that knows no biases."""
    flags = ("--lora_rank", "4", "--lora_alpha", "8", "--lora_targets", "attention")
    ranks(2).run(finetune_on_rank, setting, by_flags(setting, tmp_path / "out", *flags))
    config = config_of(tmp_path / "out")
    adapters = {name: value for name, value in config.items() if name.startswith("lora") or name.endswith("_tuning")}
    expected = {"lora_rank": 4, "lora_alpha": 8, "lora_targets": ["attention"]}
    assert adapters == {**expected, "bias_tuning": False, "norm_tuning": False}
    log = (tmp_path / "out" / "output.log").read_text()
    assert "INFO: --lora_rank: adapters are trained above frozen weights (llama_type mistral_peft)" in log
    assert "WARNING" not in log
    given = json.loads((tmp_path / "out" / "options.json").read_text())
    assert (given["lora_rank"], given["lora_targets"], given["bias_tuning"]) == (4, ["attention"], None)
    (model,) = (tmp_path / "out").glob("epoch*")
    export_adapter(model, tmp_path / "hf")
    theirs = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert (theirs["r"], theirs["lora_alpha"], "w1" in theirs["target_modules"]) == (4, 8, False)
    merge(setting.model, model, tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "meta.json").read_text())["llama_type"] == "mistral"
    # Going on with another adapter is refused, as it is with another config.
    other = by_flags(setting, tmp_path / "out", "--lora_rank", "8", *flags[2:], auto_resume=True, max_steps=2)
    ((kind, message),) = ranks(1).run(error_on_rank, setting, other)
    assert kind == "CheckpointError"
    assert "holds the state of another model: lora_rank 4 (here 8)" in message


def test_flags_rule_over_config_files(setting: Setting, ranks: Pools, tmp_path: Path) -> None:
    configs = ("--llama_config", str(setting.model / "config.json"), str(setting.folder / "peft.json"))
    flags = ("--llama_type", "mistral_peft", *configs, "--lora_rank", "2", "--no_norm_tuning")
    ranks(1).run(finetune_on_rank, setting, by_flags(setting, tmp_path / "out", *flags))
    config = config_of(tmp_path / "out")
    kept = {name: config.get(name) for name in ("lora_alpha", "bias_tuning")}
    assert kept == {"lora_alpha": PEFT["lora_alpha"], "bias_tuning": True}, "which the file names"
    assert (config["lora_rank"], config["norm_tuning"]) == (2, False)
    # Of an adapter that is trained on, the folder says what it is.
    (model,) = (tmp_path / "out").glob("epoch*")
    more = ("--pretrained_path", str(setting.model), str(model), "--norm_tuning", "--lora_alpha", "12")
    ranks(1).run(finetune_on_rank, setting, by_flags(setting, tmp_path / "more", *more, pretrained_path=None))
    config = config_of(tmp_path / "more")
    named = (config["lora_rank"], config["lora_alpha"], config["bias_tuning"], config["norm_tuning"])
    assert named == (2, 12, True, True)


@pytest.mark.parametrize(
    ("flags", "trains"),
    [
        (("--llama_type", "mistral_peft"), "biases"),
        (("--bias_tuning",), "biases"),
        (("--norm_tuning", "--lora_alpha", "16"), "biases and norms"),
    ],
)
def test_adapters_without_a_matrix_are_warned_of(
    flags: tuple[str, ...], trains: str, setting: Setting, ranks: Pools, tmp_path: Path
) -> None:
    ranks(1).run(finetune_on_rank, setting, by_flags(setting, tmp_path / "out", *flags))
    expected = f"WARNING: no adapter matrix trains (lora_rank is -1), only {trains} do: give --lora_rank 8, or another"
    assert expected in (tmp_path / "out" / "output.log").read_text()


@pytest.mark.parametrize("flags", [("--lora_alpha", "16"), ("--no_bias_tuning",), ("--lora_rank", "-1")])
def test_how_without_what_is_refused(flags: tuple[str, ...], setting: Setting, ranks: Pools, tmp_path: Path) -> None:
    ((kind, message),) = ranks(1).run(error_on_rank, setting, by_flags(setting, tmp_path / "out", *flags))
    name = flags[0].replace("no_", "")
    assert kind == "ValueError"
    assert message.startswith(f"{name} says how adapters are trained, and none are: give --lora_rank R, or leave it")


def test_nothing_to_train_is_an_error(setting: Setting, ranks: Pools, tmp_path: Path) -> None:
    config = {"lora_rank": -1, "bias_tuning": False}
    (tmp_path / "none.json").write_text(json.dumps(config))
    arguments = setting.arguments(tmp_path / "out", llama_type="mistral_peft", max_steps=1)
    arguments += ["--llama_config", str(setting.model / "config.json"), str(tmp_path / "none.json")]
    for kind, message in ranks(2).run(error_on_rank, setting, arguments):
        assert kind == "ValueError"
        assert "nothing would train: lora_rank is below 1" in message


def error_on_rank(setting: Setting, arguments: list[str]) -> tuple[str, str]:
    return error_of(finetune_on_rank, setting, arguments)
