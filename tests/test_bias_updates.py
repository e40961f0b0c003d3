"""--bias_update_rate: routers that are evened out without a loss, by hand, on any ranks, kept, resumed and exported."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from finetuning import Setting, finetune_on_rank, latest_state, layout, log_lines, make_setting, state_tensors
from models import completions, load
from ranks import RankPool, error_of
from test_training import step_rows
from torch import Tensor

from accessory.checkpoint.adapter_export import export_adapter
from accessory.checkpoint.convert import convert
from accessory.checkpoint.merge import merge
from accessory.config import ModelArgs
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.model.router import Router, Routing
from accessory.parallel.ops import local
from accessory.parallel.state import ParallelState
from accessory.train import snapshot
from accessory.train.build import build_for_training
from accessory.train.metrics import expert_shares, max_violation
from accessory.train.optim import adamw
from accessory.train.sharding import device_mesh
from accessory.train.trainer import train_step

Pools = Callable[[int], RankPool]
EXPERTS = 8


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose routers see a constant, for which they like one expert best."""
    config = small_config()
    tensors = random_tensors(config, 5)
    tensors["tok_embeddings.weight"][:, 0] = 2.0
    for name, tensor in tensors.items():
        if name.endswith(("wo.weight", "w2.weight")):
            tensor[0] = 0
        elif name.endswith("gate.weight"):
            tensor[:, 0] = 0
            tensor[1, 0] = 1.0
    path = tmp_path_factory.mktemp("bias") / "base"
    return write_folder(path, tensors, config, files=1, tokenizer=small_tokenizer)


def built(folder: Path, mp_size: int = 1, ep_size: int = 1) -> MetaModel:
    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
    pretrained = Pretrained.resolve(folder, max_seq_len=64).with_corrections()
    pretrained = replace(pretrained, args=pretrained.args.replace(load_balancing_weight=0.0))
    kinds: dict[str, Any] = {"data_parallel": "fsdp", "compute_dtype": torch.float32}
    llma = build_for_training(pretrained, state, device_mesh(state), **kinds)
    return MetaModel(llma, pretrained.tokenizer).train()


def biases_of(model: MetaModel) -> Tensor:
    """(layers, experts), a copy."""
    own = [local(each.correction_bias) for each in model.modules() if isinstance(each, Router)]
    return torch.stack(own).detach().clone()


def steps_on_rank(folder: Path, mp_size: int, ep_size: int, steps: int, rate: float) -> tuple[list[Tensor], list[Any]]:
    """The biases after each step, of two micro-batches, and MaxVio."""
    model = built(folder, mp_size, ep_size)
    optimizer = adamw(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    state, found, violations = model.llma.state, [], []
    for step in range(steps):
        rows = [(part.chunk(2), state) for part in step_rows(step % 4)]
        own = [[half.chunk(state.dp_size)[state.dp_rank] for half in halves] for halves, _ in rows]
        result = train_step(
            model, optimizer, list(zip(*own, strict=True)), lr=1e-3, clip_grad=1.0, bias_update_rate=rate
        )
        found.append(biases_of(model))
        violations.append(max_violation(expert_shares(result.pairs_LE)))
    kept = {id(own) for group in optimizer.param_groups for own in group["params"]}
    assert not any(id(own) in kept for name, own in model.named_parameters() if name.endswith("correction_bias"))
    return found, violations


def by_hand_on_rank(folder: Path, steps: int, rate: float) -> list[Tensor]:
    """The same in one process, with loads that are counted at the routers and biases that a plain loop moves."""
    model = built(folder)
    optimizer = adamw(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    routers = [each for each in model.modules() if isinstance(each, Router)]
    chosen: list[list[Tensor]] = [[] for _ in routers]
    for router, own in zip(routers, chosen, strict=True):
        router.register_forward_hook(lambda _, __, routing, own=own: own.append(routing.experts_TK))
    bias, found = torch.zeros(len(routers), EXPERTS), []
    for step in range(steps):
        examples, labels = step_rows(step % 4)
        micro_batches = list(zip(examples.chunk(2), labels.chunk(2), strict=True))
        train_step(model, optimizer, micro_batches, lr=1e-3, clip_grad=1.0)
        for layer, (router, own) in enumerate(zip(routers, chosen, strict=True)):
            load = [0] * EXPERTS
            tokens = torch.cat([part.flatten() for part, _ in micro_batches])
            for token, experts in zip(tokens.tolist(), torch.cat(own).tolist(), strict=True):
                for expert in experts if token else ():
                    load[expert] += 1
            own.clear()
            for expert in range(EXPERTS):
                gap = sum(load) / EXPERTS - load[expert]
                bias[layer, expert] += rate * ((gap > 0) - (gap < 0))
            assert router.correction_bias is not None
            local(router.correction_bias).data.copy_(bias[layer])
        found.append(bias.clone())
    return found


def test_three_steps_by_hand_and_on_any_ranks(folder: Path, ranks: Pools) -> None:
    (truth,) = ranks(1).run(by_hand_on_rank, folder, 3, 0.1)
    assert len({tuple(own.flatten().tolist()) for own in truth}) == 3
    for size, mp_size, ep_size in ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2)):
        for found, _ in ranks(size).run(steps_on_rank, folder, mp_size, ep_size, 3, 0.1):
            assert all(map(torch.equal, found, truth)), (size, mp_size, ep_size)


def test_a_skewed_router_is_evened_out(folder: Path, ranks: Pools) -> None:
    """With the balance loss off; without updates it stays as skewed as it was."""
    ((_, moved),) = ranks(1).run(steps_on_rank, folder, 1, 1, 120, 0.01)
    ((_, still),) = ranks(1).run(steps_on_rank, folder, 1, 1, 40, 0.0)
    assert moved[0] == still[0] > 2
    assert min(still) > 1.5
    assert max(moved[-20:]) < 1


def test_all_that_infer_obey(folder: Path) -> None:
    """Prompts and new tokens alike go to the experts that a bias lifts above all others."""
    model = load(folder)
    args = model.llma.args.with_corrections()
    lifted = type(model.llma)(args, model.llma.state)
    missing = lifted.load_state_dict(model.llma.state_dict(), strict=False).missing_keys
    routers = [each for each in lifted.modules() if isinstance(each, Router)]
    assert len(missing) == len(routers)
    met: list[Routing] = []
    for router in routers:
        assert router.correction_bias is not None
        router.correction_bias.data.copy_(torch.tensor([0.0] * 6 + [3.0, 2.0]))
        router.register_forward_hook(lambda _, __, routing: met.append(routing))
    with torch.inference_mode():
        completions(lifted.eval(), [[5, 6, 7], [8, 9]], max_gen_len=4)
    assert len(met) > 2 * len(routers)
    for routing in met:
        assert (routing.experts_TK == torch.tensor([6, 7])).all()
        shares = routing.probs_TE[:, 6:] / routing.probs_TE[:, 6:].sum(-1, keepdim=True)
        torch.testing.assert_close(routing.weights_TK, shares)


# -- runs


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("bias runs"), small_tokenizer, examples=24)


def corrections(path: Path) -> dict[str, Tensor]:
    """Of a run's last training state."""
    return {name: own for name, own in state_tensors(latest_state(path)).items() if "correction_bias" in name}


def test_a_run_begins_with_it_goes_on_without_and_is_merged(
    setting: Setting, ranks: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter alone: of two steps without, two with, and one more without on other ranks."""
    run, base = tmp_path / "run", setting.model
    given: dict[str, Any] = {"lora_rank": 2, "only_save_trainable": True, "auto_resume": True, "save_interval": 1}

    def go(end: int, size: int = 1, mp_size: int = 1, ep_size: int = 1, **more: Any) -> None:
        options = given | layout(size // mp_size, mp_size, ep_size=ep_size) | {"max_steps": end, **more}
        ranks(size).run(finetune_on_rank, setting, setting.arguments(run, **options))

    go(2)
    assert corrections(run) == {}
    go(4, bias_update_rate=0.01)
    moved = corrections(run)
    assert {name.rpartition(".")[2] for name in moved} == {"correction_bias"}
    assert all(own.dtype == torch.float32 and own.any() and own.abs().max() < 0.0201 for own in moved.values())
    go(5, size=2, mp_size=2)
    go(6, size=2, ep_size=2)
    assert all(torch.equal(own, moved[name]) for name, own in corrections(run).items())
    said = (run / "output.log").read_text()
    assert len(re.findall("--bias_update_rate is 0.01 and was 0: the correction biases begin to move", said)) == 1
    assert len(re.findall("--bias_update_rate is 0 and was 0.01: the correction biases stay as they are", said)) == 1
    assert all(line["max_vio"] > 0 and line["dead_experts"] >= 0 for line in log_lines(run))

    adapter = max(run.glob("epoch*"), key=lambda path: path.stat().st_mtime_ns)
    config = json.loads((adapter / "config.json").read_text())
    assert config["moe"]["router"]["correction"] is config["balance_tuning"] is True
    both = load([base, adapter])
    assert {f"model.llma.{name}" for name, _ in both.llma.named_parameters() if "correction" in name} == moved.keys()
    for name, own in both.llma.named_parameters():
        if "correction" in name:
            assert torch.equal(own, moved[f"model.llma.{name}"])
    merge(base, adapter, whole := tmp_path / "whole")
    for name, own in load(whole).llma.named_parameters():
        if "correction" in name:
            assert torch.equal(own, moved[f"model.llma.{name}"])
    convert(whole, tmp_path / "sparse", to="accessory-sparse", mp=2)

    able = "take one of accessory, accessory-sparse"
    for form in ("hf", "mistral", "gguf"):
        for attempt in (
            lambda form=form: merge(base, adapter, tmp_path / "no", to=form),
            lambda form=form: convert(whole, tmp_path / "no", to=form),
        ):
            with pytest.raises(ValueError, match=rf"{form} cannot say .*moe\.router\.correction.*{able}"):
                attempt()
    with pytest.raises(ValueError, match="has correction biases of its own"):
        export_adapter(adapter, tmp_path / "no")


def earlier_on_rank(setting: Setting, arguments: list[str]) -> None:
    """A run of a version whose states took biases that move for frozen ones."""
    with mock.patch.object(snapshot, "is_moved", return_value=False):
        finetune_on_rank(setting, arguments)


def test_a_state_that_leaves_out_what_is_frozen_goes_on_as_a_whole_one(
    setting: Setting, ranks: Pools, tmp_path: Path
) -> None:
    """What it has not is read from the checkpoint again, wherever the run saves all from now on."""
    config = json.loads((setting.model / "config.json").read_text())
    config["moe"]["router"] = {"correction": True}
    (weights,) = setting.model.glob("consolidated.*.pth")
    tensors = {key.removeprefix("llma."): own for key, own in torch.load(weights)["model"].items()}
    frozen = {f"layers.{layer}.feed_forward.gate.correction_bias": torch.rand(EXPERTS) for layer in range(2)}
    frozen |= {key: own for key, own in tensors.items() if key.endswith("gate.weight")}
    base = write_folder(tmp_path / "base", tensors | frozen, config, files=1)
    given = {"pretrained_path": base, "tokenizer_path": setting.model, "train_router": "no", "batch_size": 8}
    given |= {"output_dir": tmp_path / "run", "auto_resume": True, "save_interval": 1}

    def arguments(end: int, **more: Any) -> list[str]:
        return setting.arguments(tmp_path / "run", **given | more | {"max_steps": end})

    ranks(1).run(earlier_on_rank, setting, arguments(1, only_save_trainable=True))
    assert not any(f"model.llma.{name}" in state_tensors(latest_state(tmp_path / "run")) for name in frozen)
    ranks(1).run(finetune_on_rank, setting, arguments(2))
    found = state_tensors(latest_state(tmp_path / "run"))
    for name, own in frozen.items():
        assert torch.equal(found[f"model.llma.{name}"], own), name


def refused_on_rank(setting: Setting, arguments: list[str]) -> tuple[str, str]:
    return error_of(finetune_on_rank, setting, arguments)


def test_a_run_whose_models_could_not_hold_it_is_refused(setting: Setting, ranks: Pools, tmp_path: Path) -> None:
    arguments = setting.arguments(tmp_path, bias_update_rate=0.01, export_form="hf", batch_size=8)
    ((kind, text),) = ranks(1).run(refused_on_rank, setting, arguments)
    assert kind == "ValueError"
    told = r"--export_form hf cannot say the routers' correction biases .*: take one of accessory, or leave --bias_upd"
    assert re.match(told, text), "and no form that a run cannot write"
    assert "\n" not in text


def test_the_sizes_of_models_that_have_it() -> None:
    """What they compute is said; models without it are written as before."""
    plain = ModelArgs(dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    balanced = plain.with_corrections()
    assert ModelArgs.from_dict(balanced.to_dict()) == balanced
    assert balanced.without_corrections() == plain
    assert balanced.owns_corrections
    assert not balanced.computes_as_mixtral
