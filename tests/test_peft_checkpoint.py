"""Folders with adapters: what loads over what, what is refused, and the tools that rewrite them."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from adapters import PEFT, RANK, adapter_shard, by_base_names, random_adapter, write_adapter
from checkpoints import random_tensors, small_config, write_folder
from ranks import RankPool, error_of, on_ranks
from torch import Tensor

from accessory.checkpoint.convert import split
from accessory.checkpoint.layouts import load_args
from accessory.checkpoint.merge import merge
from accessory.checkpoint.report import describe
from accessory.config import ModelArgs
from accessory.model.meta import MetaModel
from accessory.parallel.box import Box
from accessory.parallel.plan import is_adapter, local_box, parameter_shapes

Pools = Callable[[int], RankPool]
CONFIG = small_config(dim=32, hidden_dim=16)


class Folders(NamedTuple):
    base: Path
    adapter: Path
    tensors: dict[str, Tensor]
    adapter_tensors: dict[str, Tensor]

    @property
    def configs(self) -> list[Path]:
        return [self.base / "config.json", self.adapter / "config.json"]


@pytest.fixture(scope="module")
def folders(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("folders")
    tensors, adapter = random_tensors(CONFIG, 3), random_adapter(CONFIG, 4)
    return Folders(
        write_folder(folder / "base", tensors, CONFIG, files=2, tokenizer=small_tokenizer),
        write_adapter(folder / "adapter", adapter, CONFIG, files=4, tokenizer=small_tokenizer),
        tensors,
        adapter,
    )


def load(paths: Any, placement: str = "auto", **settings: Any) -> MetaModel:
    group = dist.group.WORLD if dist.is_initialized() else None
    placed = {"max_seq_len": 64, "expert_placement": placement, "mp_group": group}
    return MetaModel.from_pretrained(paths, dtype="fp32", device="cpu", **placed, **settings)


def loaded(paths: Any, **settings: Any) -> dict[str, Tensor]:
    """Whole tensors by the names of the base form, as one process reads them."""
    return by_base_names({name: value.detach() for name, value in load(paths, **settings).llma.named_parameters()})


def assert_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# --- loading


def test_an_adapter_alone_overlays_its_base(folders: Folders) -> None:
    assert_tensors(loaded([folders.base, folders.adapter]), {**folders.tensors, **folders.adapter_tensors})


def test_a_whole_checkpoint_with_adapters_loads(folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    """As the original tool writes it: everything in one folder; config keys of its own alone."""
    whole = {**folders.tensors, **folders.adapter_tensors}
    peft = {"lora_rank": 4, "bias_tuning": True, "norm_tuning": True}
    write_adapter(tmp_path / "whole", whole, CONFIG, files=2, tokenizer=small_tokenizer, peft=peft)
    assert_tensors(loaded(tmp_path / "whole"), whole)
    assert load(tmp_path / "whole").llma.args.peft.scale_of("routed") == 1  # type: ignore[union-attr]


def test_a_second_adapter_replaces_the_first_and_says_so(
    folders: Folders, small_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    second = random_adapter(CONFIG, 5)
    later = write_adapter(tmp_path / "later", second, CONFIG, files=1, tokenizer=small_tokenizer)
    biases = {name: tensor for name, tensor in second.items() if name.endswith("bias")}
    only = {"bias_tuning": True}
    only = {"bias_tuning": True}
    tuned = write_adapter(tmp_path / "tuned", biases, CONFIG, files=1, tokenizer=small_tokenizer, peft=only)
    assert_tensors(loaded([folders.base, tuned, folders.adapter]), {**folders.tensors, **folders.adapter_tensors})
    assert_tensors(loaded([folders.base, folders.adapter, later]), {**folders.tensors, **second})
    said = [(record.levelname, record.getMessage()) for record in caplog.records if "replace" in record.getMessage()]
    assert [level for level, _ in said] == ["INFO", "WARNING"], "biases of a merged base are replaced as a rule"
    assert said[0][1].startswith(f"{folders.adapter}: 12 adapter parameters there (layers.0.attention.wq.bias, ...)")
    assert said[1][1].startswith(f"{later}: 36 adapter parameters there (layers.0.attention.wq.lora_a.weight, ...)")


def test_an_overlay_in_the_sparse_form(folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "b", folders.tensors, CONFIG, files=2, form="sparse", tokenizer=small_tokenizer)
    assert_tensors(loaded([base, folders.adapter]), {**folders.tensors, **folders.adapter_tensors})
    # Adapters of sparse files are cut as their experts are: a slice of every expert in each file.
    cut = tmp_path / "sparse adapter"
    write_adapter(cut, folders.adapter_tensors, CONFIG, files=2, tokenizer=small_tokenizer)
    for file in range(2):
        shard = adapter_shard(folders.adapter_tensors, file, 2, 8)
        shard = {name: tensor for name, tensor in shard.items() if ".experts." not in name}
        for name, tensor in folders.adapter_tensors.items():
            if ".experts." in name:
                rows = re.search(r"\.w[13]\.(lora_b|bias)", name)
                columns = re.search(r"\.w2\.lora_a", name)
                axis = 0 if rows else 1
                shard[f"llma.{name}"] = tensor.chunk(2, axis)[file].clone() if rows or columns else tensor
        torch.save({"model": shard}, cut / f"consolidated.{file:02d}-of-02.model.pth")
    assert_tensors(loaded([base, cut]), {**folders.tensors, **folders.adapter_tensors})


def untrained_on_rank(folder: Path, configs: list[Path], placement: str) -> dict[str, Tensor]:
    model = load(folder, placement, llama_type="mistral_peft", llama_config=configs)
    return {name: value.detach() for name, value in model.llma.named_parameters() if is_adapter(name)}


def test_adapters_begin_alike_at_every_layout(folders: Folders, ranks: Pools) -> None:
    args = load_args(folders.configs)
    whole = untrained_on_rank(folders.base, folders.configs, "auto")
    assert len(whole) == 2 * (4 * 3 + 6)
    for name, tensor in whole.items():
        if "lora_a" in name:
            assert 0.015 < tensor.std().item() < 0.025, name
        else:
            assert not tensor.any(), name
    first = [tensor.flatten()[:64] for name, tensor in whole.items() if "lora_a" in name]
    assert len({tuple(values.tolist()) for values in first}) == len(first), "two matrices begin alike"
    shapes = dict(parameter_shapes(args))
    for size, placement in [(2, "expert"), (2, "tensor"), (4, "tensor")]:
        found = on_ranks(ranks, size, untrained_on_rank, folders.base, folders.configs, placement)
        for rank, own in enumerate(found):
            for name, tensor in own.items():
                box = local_box(name, shapes[name], args, placement=placement, rank=rank, size=size)  # type: ignore[arg-type]
                assert torch.equal(tensor, whole[name][box.within(Box.whole(shapes[name]))]), name


NORMS = ("attention_norm.weight", "ffn_norm.weight", "norm.weight")


@pytest.mark.parametrize(
    ("experts", "files", "hidden"),
    [(3, 2, 16), (8, 8, 16), (4, 2, 15)],
    ids=["the experts do not divide", "both divide", "the hidden dimension does not divide"],
)
@pytest.mark.parametrize("kind", ["attention", "norms"])
def test_an_adapter_that_leaves_the_experts_alone(
    kind: str, experts: int, files: int, hidden: int, small_tokenizer: Path, tmp_path: Path
) -> None:
    """Its files are the same in both forms: there is nothing to tell from which of them it has."""
    moe = {"num_experts": experts, "num_experts_per_tok": 2}
    config = small_config(dim=32, hidden_dim=hidden, moe=moe)
    tensors, peft = random_tensors(config, 3), {"bias_tuning": False, "norm_tuning": kind == "norms"}
    if kind == "attention":
        own = {name: tensor for name, tensor in random_adapter(config, 4, biases=False).items() if "attention" in name}
        peft |= {"lora_rank": RANK, "lora_targets": ["attention"]}
    else:
        own = {name: tensor + 1 for name, tensor in tensors.items() if name.endswith(NORMS)}
    base = write_folder(tmp_path / "base", tensors, config, files=1, tokenizer=small_tokenizer)
    adapter = write_adapter(tmp_path / "own", own, config, files=files, tokenizer=small_tokenizer, peft=peft)
    assert_tensors(loaded([base, adapter]), {**tensors, **own})
    merge(base, adapter, tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    changed = {name for name, tensor in tensors.items() if not torch.equal(merged[name], tensor)}
    assert changed == {name.partition(".lora_")[0] + ".weight" if ".lora_" in name else name for name in own}
    _, message = error_of(load, adapter)
    assert "holds an adapter alone: give the folder of its base before it" in message
    lines = "\n".join(describe(adapter))
    assert "converted, no experts, llama_type mistral_peft" in lines
    assert "an adapter alone: it loads behind the folder of its base" in lines


# --- what is refused


def changed(folders: Folders, folder: Path, tokenizer: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = dict(folders.adapter_tensors)
    change(tensors)
    return write_adapter(folder, tensors, CONFIG, files=4, tokenizer=tokenizer)


EXPERT = "layers.1.feed_forward.experts.5.w3.lora_b.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda own: own.pop(EXPERT), "lacks a part of tensor layers.1.feed_forward.experts.w13_lora_b"),
        (lambda own: own.update({"layers.2.attention.wq.bias": torch.zeros(64)}), "holds tensor layers.2.attention"),
        (lambda own: own.update({EXPERT: torch.zeros(16, 8)}), f"{EXPERT} has shape (16, 8)"),
    ],
    ids=["a part is missing", "another base's names", "another base's sizes"],
)
def test_an_adapter_that_does_not_fit(
    change: Any, says: str, folders: Folders, small_tokenizer: Path, tmp_path: Path
) -> None:
    wrong = changed(folders, tmp_path / "wrong", small_tokenizer, change)
    kind, message = error_of(load, [folders.base, wrong])
    assert kind == "CheckpointError"
    assert says in message
    assert str(wrong) in message


def test_an_adapter_without_its_base(folders: Folders) -> None:
    kind, message = error_of(load, folders.adapter)
    assert kind == "CheckpointError"
    assert "holds an adapter alone: give the folder of its base before it" in message


def test_an_adapter_before_its_base(folders: Folders) -> None:
    kind, message = error_of(load, [folders.adapter, folders.base])
    assert kind == "CheckpointError"
    assert "they are an adapter's: give its folder behind its base's" in message


@pytest.mark.parametrize(
    ("peft", "says"),
    [
        ({"lora_rank": 0}, "lora_rank must be a whole number above 0, not 0"),
        ({"lora_rank": 17}, "lora_rank 17 is larger than a matrix that it is to update (hidden_dim is 16)"),
        ({"lora_rank": 65, "lora_targets": ["attention"]}, "(dim is 32): give 32 at most"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0, not 0"),
        ({"lora_dropout": 1}, "lora_dropout must be a number from 0 to below 1, not 1"),
        (
            {"lora_targets": ["attention", "gate"]},
            "lora_targets must be a list of attention, experts, routed, shared, ",
        ),
        (
            {"lora_targets": "experts"},
            "lora_targets must be a list of attention, experts, routed, shared, dense, router",
        ),
        (
            {"lora_rank": 4, "lora_targets": ["shared"]},
            "lora_targets names shared, and the model has no shared expert: leave",
        ),
        ({"lora_rank": 4, "lora_targets": ["head", "dense"]}, "lora_targets names dense, and the model has no layer "),
        ({"lora_ranks": [1]}, "lora_ranks must be an object of kinds of matrices and their ranks, not [1]"),
        ({"lora_ranks": {"gate": 1}}, "lora_ranks names 'gate': give ranks to attention, experts, routed"),
        (
            {"lora_rank": 4, "lora_ranks": {"head": 1}},
            "lora_ranks gives head a rank, and lora_targets does not name head",
        ),
        (
            {"lora_rank": 4, "lora_ranks": {"experts": 2, "shared": 3}},
            "lora_ranks gives shared a rank, and the model has",
        ),
        ({"lora_rank": 4, "lora_ranks": {"routed": 17}}, "lora_ranks routed 17 is larger than a matrix that it is"),
        ({"lora_rank": -1, "lora_ranks": {"routed": 7}}, "lora_ranks is given and lora_rank, that of all other"),
        ({"lora_rank": 4, "lora_targets": []}, "lora_targets names no matrix"),
        ({"rslora": "yes"}, "rslora must be true or false, not 'yes'"),
        ({"bias_tuning": 1}, "bias_tuning must be true or false, not 1"),
    ],
)
def test_settings_that_make_no_sense(peft: dict[str, Any], says: str) -> None:
    kind, message = error_of(ModelArgs.from_dict, {**CONFIG, **peft})
    assert kind == "ValueError"
    assert says in message


def test_adapters_belong_to_their_llama_type(folders: Folders) -> None:
    kind, message = error_of(load, folders.base, llama_config=folders.configs)
    assert kind == "ValueError"
    assert (
        "the config sets lora_rank, bias_tuning, norm_tuning, lora_alpha, which llama_type mistral does not" in message
    )
    assert load(folders.base, llama_type="mixtral_peft").llma.args.peft is not None


def test_config_json_says_no_more_than_it_must() -> None:
    plain = ModelArgs.from_dict(CONFIG)
    assert plain.peft is None
    assert not {"lora_rank", "bias_tuning", "norm_tuning", "peft"} & plain.to_dict().keys()
    assert plain.for_type("mixtral_peft").to_dict() == {
        **plain.to_dict(),
        "lora_rank": -1,
        "bias_tuning": True,
        "norm_tuning": False,
    }
    shown = {"lora_rank": 8, "bias_tuning": False, "norm_tuning": True}
    more = {"lora_alpha": 16, "rslora": True, "lora_dropout": 0.1, "lora_targets": ["experts"]}
    for peft in (shown, {**shown, **more}):
        args = ModelArgs.from_dict({**CONFIG, **peft})
        assert args.to_dict() == {**plain.to_dict(), **peft}
        assert ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args
    assert ModelArgs.from_dict({**CONFIG, **shown, "lora_alpha": 8}).to_dict() == {**plain.to_dict(), **shown}


# --- split and inspect


@pytest.mark.parametrize("files", [1, 4])
def test_split_keeps_adapters(files: int, folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    whole = {**folders.tensors, **folders.adapter_tensors}
    write_adapter(tmp_path / "whole", whole, CONFIG, files=2, tokenizer=small_tokenizer)
    split(tmp_path / "whole", tmp_path / "out", mp=files)
    for file in range(files):
        written = torch.load(tmp_path / "out" / f"consolidated.{file:02d}-of-{files:02d}.model.pth")["model"]
        assert_tensors(written, adapter_shard(whole, file, files, 8))
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == {"llama_type": "mistral_peft"}
    assert_tensors(loaded(tmp_path / "out"), whole)


def test_inspect_says_what_the_adapters_are(folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    whole = {**folders.tensors, **folders.adapter_tensors}
    write_adapter(tmp_path / "whole", whole, CONFIG, files=2, tokenizer=small_tokenizer)
    count = sum(tensor.numel() for tensor in folders.adapter_tensors.values())
    for folder in (tmp_path / "whole", folders.adapter):
        lines = "\n".join(describe(folder, check_values=True))
        assert f"adapters    {count:,} parameters: lora_rank 4, bias_tuning True, norm_tuning True" in lines
    held = sum(tensor.numel() for name, tensor in folders.adapter_tensors.items())
    assert f"holds       {held:,} parameters, an adapter alone: it loads behind the folder of its base" in lines
    both = [line for line in lines.splitlines() if line.startswith(("parameters", "at mp"))]
    assert len(both) == 5
    assert all(line.endswith("base and adapter together") for line in both)
    assert PEFT["lora_alpha"] == 6
