"""What users get wrong: each gives one line that names what is wrong and the way out, on every rank alike."""

import json
import logging
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from checkpoints import base_shard, random_tensors, small_config, write_folder
from ranks import error_of

from accessory.checkpoint.report import describe
from accessory.config import ModelArgs
from accessory.errors import CheckpointError
from accessory.generation.engine import complete
from accessory.generation.sampling import Sampling
from accessory.model.meta import MetaModel
from accessory.parallel.state import raised_on_all_ranks

CONFIG = small_config(n_layers=1)
FILES = 4
EXPERTS = "llma.layers.0.feed_forward.experts"


class Case(NamedTuple):
    """A way of spoiling a good folder of `FILES` shards.

    Attributes:
        kind: type of the exception.
        says: texts that its message must hold; the last one is the way out.
        spoil: changes the folder; may return arguments for from_pretrained (``pretrained_path`` among them).
    """

    kind: type[Exception]
    says: tuple[str, ...]
    spoil: Callable[[Path], dict[str, Any] | None]


LOADING: dict[str, Case] = {}


def case(name: str, kind: type[Exception], *says: str) -> Callable[[Callable], Callable]:
    def register(spoil: Callable[[Path], dict[str, Any] | None]) -> Callable:
        assert name not in LOADING
        LOADING[name] = Case(kind, says, spoil)
        return spoil

    return register


def shard(folder: Path, file: int = 1, files: int = FILES) -> Path:
    return folder / f"consolidated.{file:02d}-of-{files:02d}.model.pth"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a shard's tensors."""
    tensors = torch.load(path, weights_only=True)["model"]
    change(tensors)
    torch.save({"model": tensors}, path)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys; ``...`` removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


class Evil:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


# -- the folder and its files


@case("folder missing", FileNotFoundError, "absent", "does not exist", "check the path")
def _(folder):
    return {"pretrained_path": folder / "absent"}


@case("folder empty", CheckpointError, "nothing", "is empty", "copy")
def _(folder):
    (folder / "nothing").mkdir()
    return {"pretrained_path": folder / "nothing"}


@case("folder a file", CheckpointError, "01-of-04.model.pth is a file", "give the folder")
def _(folder):
    return {"pretrained_path": shard(folder)}


@case("no weights", CheckpointError, "holds no weights", "found config.json, meta.json", "expected consolidated.00-of")
def _(folder):
    for file in range(FILES):
        shard(folder, file).unlink()


@case("no path at all", ValueError, "pretrained_path", "[]", "must be a path or a list of paths")
def _(folder):
    return {"pretrained_path": []}


@case("shard missing", CheckpointError, "lacks consolidated.02-of-04.model.pth", "copy the rest")
def _(folder):
    shard(folder, 2).unlink()


@case(
    "last shards missing", CheckpointError, "lacks consolidated.02-of-04.model.pth, consolidated.03", "2 of 4", "copy"
)
def _(folder):
    shard(folder, 2).unlink()
    shard(folder, 3).unlink()


@case("shard beyond the total", CheckpointError, "consolidated.04-of-04.model.pth", "remove it")
def _(folder):
    shutil.copy(shard(folder), shard(folder, 4))


@case("shard of another total", CheckpointError, "several runs", "of 2 and of 4", "keep the files of one")
def _(folder):
    shutil.copy(shard(folder), shard(folder, 1, 2))


@case("one number twice", CheckpointError, "two files with one shard number", "consolidated.01-of-04", "remove")
def _(folder):
    shutil.copy(shard(folder), folder / "consolidated.1-of-04.model.pth")


@case("two checkpoints", CheckpointError, "both", "consolidated.00.pth", "move the other away")
def _(folder):
    shutil.copy(shard(folder), folder / "consolidated.00.pth")


@case("released with a gap", CheckpointError, "lacks consolidated.01.pth", "copy the rest")
def _(folder):
    for file in (0, 2):
        shard(folder, file).rename(folder / f"consolidated.{file:02d}.pth")
    for file in (1, 3):
        shard(folder, file).unlink()


@case("shard a dangling link", FileNotFoundError, "01-of-04.model.pth", "does not exist", "copy")
def _(folder):
    shard(folder).unlink()
    shard(folder).symlink_to(folder / "gone")


@case("shard a folder", CheckpointError, "01-of-04.model.pth", "Copy it again")
def _(folder):
    shard(folder).unlink()
    shard(folder).mkdir()


@case("shard empty", CheckpointError, "01-of-04.model.pth (0 bytes)", "Copy it again")
def _(folder):
    shard(folder).write_bytes(b"")


@case("shard truncated", CheckpointError, "01-of-04.model.pth", "truncated", "Copy it again")
def _(folder):
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[: len(data) // 2])


@case("shard short of a few bytes", CheckpointError, "01-of-04.model.pth", "truncated", "Copy it again")
def _(folder):
    shard(folder).write_bytes(shard(folder).read_bytes()[:-7])


@case("shard no PyTorch file", CheckpointError, "01-of-04.model.pth", "not a PyTorch file", "Copy it again")
def _(folder):
    shard(folder).write_text("version https://git-lfs.github.com/spec/v1\n")


@case("shard in the old format", CheckpointError, "01-of-04.model.pth", "old format", "torch.save")
def _(folder):
    content = torch.load(shard(folder), weights_only=True)
    torch.save(content, shard(folder), _use_new_zipfile_serialization=False)


# -- what shards hold


@case(
    "shards of a larger run",
    CheckpointError,
    "01-of-04.model.pth",
    "has shape (384, 8)",
    "(384, 16)",
    "check the config",
)
def _(folder):
    # The cuts of a run of 8 under the names of a run of 4.
    narrow = base_shard(random_tensors(CONFIG, 0), 1, 8, experts=8)
    edit(shard(folder), lambda held: held.update({name: narrow.get(name, value) for name, value in held.items()}))


@case(
    "shards renamed to another total",
    CheckpointError,
    "00-of-04",
    "lacks",
    "experts.1.w1",
    "check the config",
)
def _(folder):
    # A run of 8 of which the first 4 files were renamed.
    other = write_folder(folder / "other", random_tensors(CONFIG, 0), CONFIG, files=8)
    for file in range(FILES):
        shard(other, file, 8).rename(shard(folder, file))


@case("a number of shards that cannot be", CheckpointError, "3 shards", "n_heads 8 is not a multiple of 3", "config")
def _(folder):
    for file in range(3):
        shard(folder, file).rename(shard(folder, file, 3))
    shard(folder, 3).unlink()


@case(
    "pickle with code",
    CheckpointError,
    "01-of-04",
    "nothing in it was executed",
    "source that you trust",
)
def _(folder):
    edit(shard(folder), lambda held: held.update(evil=Evil(folder / "executed")))


@case("pickle with code, by itself", CheckpointError, "01-of-04.model.pth", "not a PyTorch file", "Copy it again")
def _(folder):
    shard(folder).write_bytes(pickle.dumps({"model": Evil(folder / "executed")}))


@case("pickle of code, old format", CheckpointError, "01-of-04.model.pth", "old format", "torch.save")
def _(folder):
    torch.save({"model": Evil(folder / "executed")}, shard(folder), _use_new_zipfile_serialization=False)


@case("a list among the tensors", CheckpointError, "01-of-04.model.pth", "'steps' is a list", "remove")
def _(folder):
    edit(shard(folder), lambda held: held.update(steps=[1, 2]))


@case("a number among the tensors", CheckpointError, "01-of-04.model.pth", "'iteration' is a int", "remove")
def _(folder):
    edit(shard(folder), lambda held: held.update(iteration=3))


@case("a key that is no name", CheckpointError, "01-of-04.model.pth", "7 is a Tensor", "remove")
def _(folder):
    edit(shard(folder), lambda held: held.update({7: torch.zeros(2)}))


@case("no dictionary", CheckpointError, "01-of-04.model.pth", "no dictionary of tensors", "copy it again")
def _(folder):
    torch.save([torch.zeros(2)], shard(folder))


@case("an empty dictionary", CheckpointError, "01-of-04.model.pth", "no dictionary of tensors", "copy it again")
def _(folder):
    torch.save({"model": {}}, shard(folder))


@case("an optimizer's state", CheckpointError, "01-of-04.model.pth", "'optimizer' is a dict", "remove")
def _(folder):
    torch.save({"optimizer": {"state": {}}, "epoch": 3}, shard(folder))


@case("a tensor without data", CheckpointError, "01-of-04.model.pth", "output.weight", "meta", "save it as one")
def _(folder):
    edit(shard(folder), lambda held: held.update({"llma.output.weight": torch.empty(96, 64, device="meta")}))


@case("a sparse tensor", CheckpointError, "01-of-04.model.pth", "output.weight", "sparse", "save it as one")
def _(folder):
    edit(shard(folder), lambda held: held.update({"llma.output.weight": torch.eye(96, 64).to_sparse()}))


@case("tensor missing", CheckpointError, "01-of-04.model.pth", "lacks tensor layers.0.ffn_norm", "copy")
def _(folder):
    edit(shard(folder), lambda held: held.pop("llma.layers.0.ffn_norm.weight"))


@case("many tensors missing", CheckpointError, "lacks tensors", "and 3 more", "copy it again")
def _(folder):
    edit(shard(folder), lambda held: [held.pop(name) for name in list(held) if ".experts." in name])


@case("tensor unexpected", CheckpointError, "01-of-04.model.pth", "layers.1.wq", "config is of another")
def _(folder):
    edit(shard(folder), lambda held: held.update({"llma.layers.1.wq.weight": torch.zeros(2, 2)}))


@case("tensor under two names", CheckpointError, "01-of-04.model.pth", "both norm.weight and llma.norm.weight", "once")
def _(folder):
    edit(shard(folder), lambda held: held.update({"norm.weight": torch.zeros(64)}))


@case("expert of another shard", CheckpointError, "01-of-04.model.pth", "experts.7.w1.weight", "another run")
def _(folder):
    edit(shard(folder), lambda held: held.update({f"{EXPERTS}.7.w1.weight": torch.ones(48, 64)}))


@case(
    "tensor of wrong shape",
    CheckpointError,
    "attention.wo",
    "(64, 32)",
    "(64, 16)",
    "check the config",
)
def _(folder):
    edit(shard(folder), lambda held: held.update({"llma.layers.0.attention.wo.weight": torch.zeros(64, 32)}))


@case("tensor transposed", CheckpointError, "experts.2.w1.weight", "(64, 48)", "(48, 64)", "check the config")
def _(folder):
    edit(shard(folder), lambda held: held.update({f"{EXPERTS}.2.w1.weight": torch.zeros(64, 48)}))


@case("tensor of integers", CheckpointError, "01-of-04.model.pth", "torch.int8", "must be floating-point")
def _(folder):
    edit(shard(folder), lambda held: held.update({"llma.output.weight": torch.zeros(96, 64, dtype=torch.int8)}))


@case("tensor of complex numbers", CheckpointError, "01-of-04.model.pth", "complex64", "must be floating-point")
def _(folder):
    edit(shard(folder), lambda held: held.update({"llma.output.weight": torch.zeros(96, 64, dtype=torch.complex64)}))


@case("tensor of bools", CheckpointError, "01-of-04.model.pth", "torch.bool", "must be floating-point")
def _(folder):
    edit(shard(folder), lambda held: held.update({"llma.output.weight": torch.zeros(96, 64, dtype=torch.bool)}))


# -- config.json and meta.json


@case("config absent", CheckpointError, "neither config.json nor params.json", "llama_config=PATH")
def _(folder):
    (folder / "config.json").unlink()


@case("config absent where given", FileNotFoundError, "other.json", "does not exist", "check the path")
def _(folder):
    return {"llama_config": folder / "other.json"}


@case("config no JSON", ValueError, "config.json", "cannot be read as JSON", "line 1", "copy it again")
def _(folder):
    (folder / "config.json").write_text('{"dim": 64,')


@case("config nested without end", ValueError, "config.json", "cannot be read as JSON", "recursion", "copy it again")
def _(folder):
    (folder / "config.json").write_text("[" * 100_000)


@case("config with a number of 5000 digits", ValueError, "config.json", "read as JSON", "5000", "copy it again")
def _(folder):
    (folder / "config.json").write_text('{"dim": 1' + "0" * 4999 + "}")


@case("config no text", ValueError, "config.json", "cannot be read as JSON", "copy it again")
def _(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


@case("config a folder", ValueError, "config.json", "cannot be read as JSON")
def _(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@case("config a list", ValueError, "config.json", "a list", "must hold a JSON object")
def _(folder):
    (folder / "config.json").write_text("[1]")


@case("meta no JSON", ValueError, "meta.json", "cannot be read as JSON")
def _(folder):
    (folder / "meta.json").write_text("mistral")


@case("meta without a type", ValueError, "meta.json", "llama_type is None", '{"llama_type": "mistral"}')
def _(folder):
    (folder / "meta.json").write_text("{}")


@case("llama_type unknown", ValueError, "'llama'", "choose from mistral, mixtral")
def _(folder):
    (folder / "meta.json").write_text('{"llama_type": "llama"}')


@case("llama_type unknown where given", ValueError, "'gpt'", "choose from mistral, mixtral")
def _(folder):
    return {"llama_type": "gpt"}


# Changes of config.json (... removes a key), what the message must hold, the way out last.
CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown key": ({"n_layer": 1}, ("unknown", "n_layer", "known are attention, dense, dim")),
    "two unknown keys": ({"zebra": 1, "apple": 1}, ("unknown", "apple, zebra", "known are attention, dense, dim")),
    "unknown key in moe": ({"moe": {"experts": 8}}, ("moe", "experts", "known are bias, clamp")),
    "key missing": ({"dim": ...}, ("dim", "missing", "add")),
    "keys missing": ({"dim": ..., "n_layers": ...}, ("dim, n_layers", "missing", "add")),
    "dim text": ({"dim": "64"}, ("dim", "'64'", "must be a whole number above 0")),
    "dim a float": ({"dim": 64.0}, ("dim", "64.0", "must be a whole number above 0")),
    "dim true": ({"dim": True}, ("dim", "True", "must be a whole number above 0")),
    "dim beyond 64 bits": ({"dim": 2**63}, ("dim", "9223372036854775808", "give a number below 2^31")),
    "n_layers 0": ({"n_layers": 0}, ("n_layers", "not 0", "must be a whole number above 0")),
    "n_layers negative": ({"n_layers": -1}, ("n_layers", "not -1", "must be a whole number above 0")),
    "hidden_dim null": ({"hidden_dim": None}, ("hidden_dim", "None", "must be a whole number above 0")),
    "n_kv_heads 0": ({"n_kv_heads": 0}, ("n_kv_heads", "not 0", "must be a whole number above 0")),
    "vocab_size negative": ({"vocab_size": -2}, ("vocab_size", "-2", "must be a whole number above 0")),
    "norm_eps text": ({"norm_eps": "1e-5"}, ("norm_eps", "'1e-5'", "must be a number above 0")),
    "norm_eps NaN": ({"norm_eps": float("nan")}, ("norm_eps", "nan", "must be a number above 0")),
    "rope_theta 0": ({"rope_theta": 0}, ("rope_theta", "not 0", "must be a number above 0")),
    "rope_theta infinite": ({"rope_theta": float("inf")}, ("rope_theta", "inf", "must be a number above 0")),
    "rope_scaling an object": ({"rope_scaling": {"factor": 2}}, ("rope_scaling", "factor", "null or a number above 0")),
    "rope_scaling NaN": ({"rope_scaling": float("nan")}, ("rope_scaling", "nan", "null or a number above 0")),
    "balance negative": ({"load_balancing_weight": -1}, ("load_balancing_weight", "-1", "must be 0 or more")),
    "balance NaN": ({"load_balancing_weight": float("nan")}, ("load_balancing_weight", "nan", "must be 0 or more")),
    "z-loss negative": ({"z_loss_weight": -0.5}, ("z_loss_weight", "-0.5", "must be 0 or more")),
    "z-loss true": ({"z_loss_weight": True}, ("z_loss_weight", "True", "must be 0 or more")),
    "moe a number": ({"moe": 8}, ("moe", "8", "must be an object with num_experts")),
    "moe experts text": ({"moe": {"num_experts": "8"}}, ("num_experts", "'8'", "must be a whole number above 0")),
    "no expert chosen": (
        {"moe": {"num_experts_per_tok": 0}},
        ("num_experts_per_tok", "whole number above 0"),
    ),
    "top 9 of 8": (
        {"moe": {"num_experts": 8, "num_experts_per_tok": 9}},
        ("per_tok is 9", "only 8 experts"),
    ),
    "heads and kv heads": ({"n_kv_heads": 3}, ("n_heads 8 is not a multiple of n_kv_heads 3",)),
    "dim and heads": ({"n_heads": 7, "n_kv_heads": 7, "head_dim": ...}, ("dim 64", "n_heads 7", "give head_dim")),
    "head_dim odd": ({"head_dim": 7}, ("head_dim is 7", "must be even")),
}


def _config_case(changes: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


for _name, (_changes, _says) in CONFIGS.items():
    case(f"config: {_name}", ValueError, "config.json", *_says)(_config_case(_changes))


@case("config of a deeper model", CheckpointError, "lacks tensors layers.1.", "check the config")
def _(folder):
    edit_json(folder / "config.json", n_layers=2)


@case("config of a wider model", CheckpointError, "has shape (384, 16)", "ask for (384, 32)", "check the config")
def _(folder):
    edit_json(folder / "config.json", dim=128)


# -- tokenizer


@case("tokenizer absent", FileNotFoundError, "has no tokenizer.model", "name it (tokenizer_path)")
def _(folder):
    (folder / "tokenizer.model").unlink()


@case("tokenizer absent where given", FileNotFoundError, "no tokenizer file", "other.model", "check the path")
def _(folder):
    return {"tokenizer_path": folder / "other.model"}


@case("tokenizer a folder without one", FileNotFoundError, "holds neither tokenizer.model nor tokenizer.json")
def _(folder):
    (folder / "words").mkdir()
    return {"tokenizer_path": folder / "words"}


@case("tokenizer unreadable", ValueError, "tokenizer.model", "not a whole sentencepiece model", "copy")
def _(folder):
    (folder / "tokenizer.model").write_bytes(b"nonsense" * 100)


@case("tokenizer truncated", ValueError, "tokenizer.model", "not a whole sentencepiece model", "copy or download")
def _(folder):
    data = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data[: len(data) // 2])


@case("tokenizer empty", ValueError, "tokenizer.model", "is empty", "copy or download it again")
def _(folder):
    (folder / "tokenizer.model").write_bytes(b"")


@case("tokenizer.json alone and broken", ValueError, "tokenizer.json", "copy or download it again")
def _(folder):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")


@case("tokenizer of another size", ValueError, "384 tokens", "vocab_size is only 376", "different models")
def _(folder):
    edit_json(folder / "config.json", vocab_size=376)


@case(
    "config with more rows than the embedding", CheckpointError, "has shape (384, 16)", "(392, 16)", "check the config"
)
def _(folder):
    edit_json(folder / "config.json", vocab_size=392)


@case("tokenizer larger than the embedding", CheckpointError, "has shape (376, 16)", "(384, 16)", "check the config")
def _(folder):
    # The config leaves the vocabulary to the tokenizer.
    edit_json(folder / "config.json", vocab_size=-1)
    for file in range(FILES):
        edit(shard(folder, file), _fewer_words)


def _fewer_words(held: dict[str, torch.Tensor]) -> None:
    held["llma.tok_embeddings.weight"] = held["llma.tok_embeddings.weight"][:376].clone()
    held["llma.output.weight"] = held["llma.output.weight"][:94].clone()


# -- arguments

ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "images wanted": ({"with_visual": True}, ("with_visual is True", "leave it False")),
    "quantization unknown": ({"quant": "int3"}, ("quant 'int3' is unknown", "choose from int8, int4, nf4, fp8, mxfp4")),
    "quantization in groups": ({"quant": "nf4"}, ("are not whole groups of 64 (nf4)", "none; int8 has no groups")),
    "dtype unknown": ({"dtype": "int8"}, ("dtype 'int8'", "bf16, fp16, fp32, auto")),
    "dtype of integers": ({"dtype": torch.int8}, ("torch.int8", "bf16, fp16, fp32, auto")),
    "dtype a number": ({"dtype": 16}, ("dtype 16", "bf16, fp16, fp32, auto")),
    "placement unknown": (
        {"expert_placement": "data"},
        ("expert_placement 'data'", "auto, expert, tensor"),
    ),
    "max_seq_len 0": ({"max_seq_len": 0}, ("max_seq_len", "not 0", "at least 3")),
    "max_seq_len beyond 64 bits": ({"max_seq_len": 2**63}, ("max_seq_len is 9223372036854775808", "below 2^31")),
    "max_seq_len true": ({"max_seq_len": True}, ("max_seq_len", "not True", "at least 3")),
    "max_seq_len text": ({"max_seq_len": "64"}, ("max_seq_len", "'64'", "at least 3")),
    "path None": ({"pretrained_path": None}, ("pretrained_path", "not None", "a path or a list of paths")),
    "path a number": ({"pretrained_path": 3}, ("pretrained_path", "not 3", "a path or a list of paths")),
    "path empty": ({"pretrained_path": ""}, ("pretrained_path", "not ''", "a path or a list of paths")),
    "a path empty": ({"pretrained_path": [".", ""]}, ("pretrained_path", "not ['.', '']", "a path or a list")),
    "config's content": ({"llama_config": {"dim": 64}}, ("llama_config", "{'dim': 64}", "a path or a list of paths")),
    "config empty": ({"llama_config": ""}, ("llama_config", "not ''", "a path or a list of paths")),
    "tokenizer a number": ({"tokenizer_path": 3}, ("tokenizer_path must be a path, not 3",)),
    "tokenizer no name": ({"tokenizer_path": ""}, ("tokenizer_path must be a path, not ''",)),
    "device unknown": ({"device": "abacus"}, ("device", "abacus", "cuda")),
    "device without a model": ({"device": "meta"}, ("device", "meta", "cuda")),
    "no CUDA": ({"device": "cuda"}, ("device cuda ", "no CUDA device", "give the device cpu")),
    "no CUDA, numbered": ({"device": "cuda:1"}, ("device cuda:1 ", "no CUDA device", "give the device cpu")),
}

for _name, (_given, _says) in ARGUMENTS.items():
    case(f"argument: {_name}", ValueError, *_says)(lambda folder, given=_given: given)


# Tried on two ranks as well.
EVERYWHERE = [
    "folder missing",
    "folder empty",
    "shard missing",
    "shard beyond the total",
    "shard of another total",
    "shard truncated",
    "shard in the old format",
    "shards renamed to another total",
    "pickle with code",
    "a list among the tensors",
    "no dictionary",
    "tensor missing",
    "tensor unexpected",
    "tensor of wrong shape",
    "tensor of integers",
    "config absent",
    "config no JSON",
    "llama_type unknown",
    "config of a deeper model",
    "tokenizer absent",
    "tokenizer unreadable",
    "tokenizer of another size",
    "tokenizer larger than the embedding",
    "config: unknown key",
    "config: heads and kv heads",
    *(name for name in LOADING if name.startswith("argument: ")),
]


@pytest.fixture(scope="module")
def good(small_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "converted"
    return write_folder(folder, random_tensors(CONFIG, 0), CONFIG, files=FILES, tokenizer=small_tokenizer)


def spoilt(name: str, good: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments for from_pretrained that must fail."""
    folder = Path(shutil.copytree(good, tmp_path / "c"))
    return {"pretrained_path": folder, "max_seq_len": 64, "dtype": "fp32", **(LOADING[name].spoil(folder) or {})}


def holds(error: tuple[str, str], kind: type[Exception], says: tuple[str, ...]) -> None:
    """The exception is of this type, and its one line holds these texts."""
    name, message = error
    assert name == kind.__name__, message or "nothing was raised"
    assert "\n" not in message
    missing = [text for text in says if text.lower() not in message.lower()]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", LOADING)
def test_loading_refuses(name, good, tmp_path):
    if "CUDA" in name and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    arguments = spoilt(name, good, tmp_path)
    holds(error_of(MetaModel.from_pretrained, **arguments), LOADING[name].kind, LOADING[name].says)
    assert not (tmp_path / "c" / "executed").exists()


def load_error(arguments: dict[str, Any]) -> tuple[str, str]:
    return error_of(MetaModel.from_pretrained, **arguments, mp_group=dist.group.WORLD)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_loading_refuses_on_every_rank(name, good, tmp_path, ranks):
    if "CUDA" in name and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    first, second = ranks(2).run(load_error, spoilt(name, good, tmp_path))
    holds(first, LOADING[name].kind, LOADING[name].says)
    assert first == second
    assert not (tmp_path / "c" / "executed").exists()


# -- values, sizes and damage beyond a single folder's table


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_check_values_finds_what_is_not_finite(value, good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "c"))

    def poison(held: dict[str, torch.Tensor]) -> None:
        held[f"{EXPERTS}.5.w2.weight"][[3, 0], [7, 0]] = value

    edit(shard(folder, 2), poison)
    assert any("format" in line for line in describe(folder))
    error = error_of(lambda: list(describe(folder, check_values=True)))
    says = ("02-of-04.model.pth", "experts.5.w2.weight", "2 values", "NaN or infinite", "copy it again")
    holds(error, CheckpointError, says)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_check_values_reads_8_bit_floats(dtype, good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "c"))
    name = f"{EXPERTS}.5.w2.weight"
    edit(shard(folder, 2), lambda held: held.update({name: held[name].to(dtype)}))
    assert "values      all finite" in list(describe(folder, check_values=True))
    edit(shard(folder, 2), lambda held: held.update({name: held[name].float().fill_(float("nan")).to(dtype)}))
    error = error_of(lambda: list(describe(folder, check_values=True)))
    holds(error, CheckpointError, ("02-of-04.model.pth", "experts.5.w2.weight", "NaN or infinite", "copy it again"))


def test_check_values_finds_a_shard_of_another_run(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "c"))
    other = write_folder(tmp_path / "other", random_tensors(CONFIG, 1), CONFIG, files=FILES)
    shutil.copy(shard(other, 2), shard(folder, 2))
    error = error_of(lambda: list(describe(folder, check_values=True)))
    says = ("02-of-04.model.pth", "attention_norm.weight", "00-of-04.model.pth", "different runs", "copy the shards")
    holds(error, CheckpointError, says)


@pytest.mark.parametrize("shape", [(), (0, 64), (384,)], ids=str)
def test_a_vocabulary_is_not_read_off_what_is_no_embedding(shape, good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "c"))
    edit_json(folder / "config.json", vocab_size=-1)
    edit(shard(folder, 0), lambda held: held.update({"llma.tok_embeddings.weight": torch.zeros(shape)}))
    error = error_of(lambda: list(describe(folder)))
    holds(error, CheckpointError, ("00-of-04.model.pth", "tok_embeddings.weight", str(shape), "copy the file again"))


# inspect reads the vocabulary off the embedding where the config leaves it to the tokenizer.
INSPECTED = [
    name
    for name, known in LOADING.items()
    if known.kind is CheckpointError and name != "tokenizer larger than the embedding"
]


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_refuses_what_loading_refuses(name, good, tmp_path):
    arguments = spoilt(name, good, tmp_path)
    error = error_of(lambda: list(describe(arguments["pretrained_path"])))
    holds(error, CheckpointError, LOADING[name].says)


UNEVEN = small_config(
    n_layers=1, dim=24, n_heads=3, n_kv_heads=3, hidden_dim=20, moe={"num_experts": 6, "num_experts_per_tok": 2}
)


def test_sizes_that_cannot_be_split_come_before_any_weight(ranks, small_tokenizer, tmp_path):
    folder = write_folder(tmp_path / "c", random_tensors(UNEVEN, 0), UNEVEN, files=1, tokenizer=small_tokenizer)
    shard(folder, 0, 1).write_bytes(b"damaged")
    arguments = {"pretrained_path": folder, "max_seq_len": 64, "dtype": "fp32"}
    errors = ranks(2).run(load_error, arguments)
    for error in errors:
        holds(error, ValueError, ("over 2 ranks", "n_heads 3 is not a multiple of 2", "Rank counts that work: 1, 3"))
    assert errors[0] == errors[1]
    # Placement "tensor" cannot cut a hidden width of 20 in 3: only one rank is left.
    for error in ranks(2).run(load_error, {**arguments, "expert_placement": "tensor"}):
        holds(error, ValueError, ("Rank counts that work: 1",))
        assert not error[1].endswith("3")


def damaged_at(folder: Path, file: int, files: int, how: str) -> None:
    path = shard(folder, file, files)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        edit(path, lambda held: held.update({f"{EXPERTS}.7.w1.weight": torch.zeros(64, 48)}))


@pytest.mark.parametrize("how", ["cut", "transposed"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_shard_that_one_rank_alone_reads(size, how, ranks, small_tokenizer, tmp_path):
    folder = write_folder(tmp_path / "c", random_tensors(CONFIG, 0), CONFIG, files=8, tokenizer=small_tokenizer)
    damaged_at(folder, 7, 8, how)
    errors = ranks(size).run(load_error, {"pretrained_path": folder, "max_seq_len": 64, "dtype": "fp32"})
    assert len(set(errors)) == 1
    advice = "copy it again" if how == "cut" else "check the config"
    holds(errors[0], CheckpointError, ("consolidated.07-of-08.model.pth", advice))


def differing_load_error(folder: Path, changes: dict[int, dict[str, Any]]) -> tuple[str, str]:
    return load_error(
        {"pretrained_path": folder, "max_seq_len": 64, "dtype": "fp32", **changes.get(dist.get_rank(), {})}
    )


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({1: {"max_seq_len": 65}}, ValueError, ("different arguments", "rank(s) [1]", "same call")),
        ({0: {"dtype": "bf16"}}, ValueError, ("different arguments", "same call")),
        ({1: {"expert_placement": "tensor"}}, ValueError, ("different arguments", "rank(s) [1]")),
        ({1: {"dtype": "fp23"}}, ValueError, ("'fp23'", "bf16, fp16, fp32, auto")),
        ({1: {"device": "abacus"}}, ValueError, ("'abacus'", "give cpu")),
        ({0: {"llama_type": "gpt"}}, ValueError, ("'gpt'", "choose from")),
        ({1: {"tokenizer_path": "absent.model"}}, FileNotFoundError, ("absent.model", "check the path")),
        ({1: {"pretrained_path": "absent"}}, FileNotFoundError, ("absent", "check the path")),
        ({1: {"quant": True}, 0: {"with_visual": True}}, ValueError, ("with_visual", "leave it False")),
    ],
)
def test_arguments_that_one_rank_alone_got(changes, kind, says, good, ranks):
    errors = ranks(2).run(differing_load_error, good, changes)
    assert errors[0] == errors[1]
    holds(errors[0], kind, says)


def test_a_file_that_one_rank_may_not_read(good, ranks):
    # As root nothing is forbidden, so the system's refusal is raised by hand.
    errors = ranks(2).run(forbidden_load_error, good)
    assert [kind for kind, _ in errors] == ["OSError", "PermissionError"]
    assert all("tokenizer.model" in message for _, message in errors)


def forbidden_load_error(folder: Path) -> tuple[str, str]:
    import accessory.model.pretrained as pretrained

    def refuse(path: Path, **settings: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    original = pretrained.Tokenizer
    if dist.get_rank() == 1:
        pretrained.Tokenizer = refuse
    try:
        pretrained_error = error_of(
            MetaModel.from_pretrained, folder, tokenizer_path=folder / "tokenizer.model", mp_group=dist.group.WORLD
        )
    finally:
        pretrained.Tokenizer = original
    return pretrained_error


# -- random damage


def places_outside_tensors(path: Path) -> list[range]:
    """Byte ranges of an archive that hold no tensor's values: headers, the pickle and the directory."""
    with zipfile.ZipFile(path) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        start = archive.start_dir
    data, ranges = path.read_bytes(), []
    for entry in entries:
        at = entry.header_offset
        extra = int.from_bytes(data[at + 26 : at + 28], "little") + int.from_bytes(data[at + 28 : at + 30], "little")
        payload = at + 30 + extra
        values = "/data/" in entry.filename
        ranges.append(range(at, payload if values else payload + entry.file_size))
    return [*ranges, range(start, len(data))]


def outcomes(folder: Path, file: Path, damages: list[bytes]) -> list[tuple[str, str]]:
    """What loading and inspecting make of each content of the file."""
    found = []
    for content in damages:
        file.write_bytes(content)
        for attempt in (
            lambda: MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32"),
            lambda: list(describe(folder)),
        ):
            found.append(error_of(attempt))
    return found


def test_random_damage_is_refused_or_harmless(good, ranks, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "c"))
    path = shard(folder)
    data, chance = path.read_bytes(), random.Random(20)
    ranges = places_outside_tensors(path)
    # The pickle comes first and the directory last; they are small, so each gets a third of the damage.
    damages = []
    for index in range(60):
        places = (ranges[0], ranges[-1], chance.choice(ranges))[index % 3]
        at = chance.choice(places)
        damages.append(data[:at] + bytes([data[at] ^ chance.randrange(1, 256)]) + data[at + 1 :])
    damages += [data[: chance.randrange(len(data))] for _ in range(8)]
    damages += [data[: (at := chance.randrange(len(data)))] + data[at + chance.randrange(1, 64) :] for _ in range(8)]
    found = ranks(1).run(outcomes, folder, path, damages)[0]
    assert {kind for kind, _ in found} == {"", "CheckpointError"}, found
    for kind, message in found:
        assert "\n" not in message
        assert not kind or "consolidated.0" in message
    assert sum(kind == "" for kind, _ in found) < len(found) / 2


# -- what a loaded model is asked

CALLS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "prompts a bare string": ("generate", {"prompts": "Hello"}, ("'Hello'", "non-empty list of texts")),
    "prompts a long text": ("generate", {"prompts": "Hello " * 99}, ("not 'Hello Hello", "...")),
    "prompts empty": ("generate", {"prompts": []}, ("prompts", "[]", "non-empty list of texts")),
    "prompts missing": ("generate", {"prompts": None}, ("prompts", "None", "non-empty list of texts")),
    "prompts a number": ("generate", {"prompts": 3}, ("prompts", "3", "non-empty list of texts")),
    "prompts a dict": ("generate", {"prompts": {"a": 1}}, ("prompts", "{'a': 1}", "non-empty list of texts")),
    "a prompt of bytes": ("generate", {"prompts": ["a", b"b"]}, ("prompts[1]", "b'b'", "must be a text")),
    "a prompt of None": ("generate", {"prompts": [None]}, ("prompts[0]", "None", "must be a text")),
    "a prompt of no tokens": ("generate", {"prompts": [[]]}, ("prompts[0]", "has no tokens")),
    "a prompt of other tokens": ("generate", {"prompts": [[1, 10**6]]}, ("prompts[0]", "outside the vocabulary")),
    "a prompt without UTF-8": ("generate", {"prompts": ["a\udce4"]}, ("lone surrogate", "no UTF-8")),
    "stream of a list": ("stream_generate", {"prompt": ["a"]}, ("['a']", "must be a text")),
    "stream of None": ("stream_generate", {"prompt": None}, ("None", "must be a text")),
    "max_gen_len 0": ("generate", {"max_gen_len": 0}, ("max_gen_len", "not 0", "at least 1")),
    "max_gen_len -1": ("generate", {"max_gen_len": -1}, ("max_gen_len", "not -1", "at least 1")),
    "max_gen_len True": ("generate", {"max_gen_len": True}, ("max_gen_len", "not True", "at least 1")),
    "max_gen_len a float": ("generate", {"max_gen_len": 4.0}, ("max_gen_len", "not 4.0", "at least 1")),
    "max_gen_len without room": ("generate", {"max_gen_len": 63}, ("max_gen_len 63", "max_seq_len 64", "at most 62")),
    "max_gen_len default": ("generate", {"max_gen_len": 512}, ("max_gen_len 512", "larger max_seq_len")),
    "temperature negative": ("generate", {"temperature": -0.1}, ("temperature", "-0.1", "0 or a positive number")),
    "temperature NaN": ("generate", {"temperature": float("nan")}, ("temperature", "nan", "0 or a positive number")),
    "temperature infinite": ("generate", {"temperature": float("inf")}, ("temperature", "inf", "0 or a positive")),
    "temperature text": ("generate", {"temperature": "hot"}, ("temperature", "'hot'", "0 or a positive number")),
    "temperature True": ("generate", {"temperature": True}, ("temperature", "True", "0 or a positive number")),
    "temperature huge": ("generate", {"temperature": 10**400}, ("temperature", "inf", "0 or a positive number")),
    "top_p huge": ("generate", {"top_p": -(10**5000)}, ("top_p", "-inf", "between 0 and 1")),
    "top_p negative": ("generate", {"top_p": -0.01}, ("top_p", "-0.01", "between 0 and 1")),
    "top_p above 1": ("generate", {"top_p": 1.01}, ("top_p", "1.01", "between 0 and 1")),
    "top_p NaN": ("generate", {"top_p": float("nan")}, ("top_p", "nan", "between 0 and 1")),
    "top_p None": ("generate", {"top_p": None}, ("top_p", "None", "between 0 and 1")),
    "stop a number": ("generate", {"additional_stop_symbols": 42}, ("stop", "42", "non-empty strings")),
    "stop empty text": ("generate", {"additional_stop_symbols": [""]}, ("stop", "''", "non-empty strings")),
    "stop list of numbers": ("generate", {"additional_stop_symbols": ["a", 3]}, ("stop", "3", "non-empty strings")),
    "stop None": ("generate", {"additional_stop_symbols": None}, ("stop", "None", "non-empty strings")),
    "images": ("generate", {"images": ["cat.png"]}, ("image", "reads text only", "pass None")),
    "image": ("stream_generate", {"image": "cat.png"}, ("image", "reads text only", "pass None")),
    "stream max_gen_len 0": ("stream_generate", {"max_gen_len": 0}, ("max_gen_len", "not 0", "at least 1")),
    "stream stop": ("stream_generate", {"additional_stop_symbols": [""]}, ("stop", "''", "non-empty strings")),
    "examples a bare string": ("compute_logits", {"examples": "Hello"}, ("examples", "'Hello'", "non-empty list")),
    "examples empty": ("compute_logits", {"examples": []}, ("examples", "[]", "non-empty list")),
    "an example of numbers": ("compute_logits", {"examples": [1, 2]}, ("examples[0]", "1", "list of token ids")),
    "an example without tokens": ("compute_logits", {"examples": [[]]}, ("examples[0]", "no tokens", "give")),
    "an unknown token": ("compute_logits", {"examples": [[1, 384]]}, ("examples[0]", "384", "outside the vocabulary")),
    "a negative token": ("compute_logits", {"examples": [[1, -1]]}, ("examples[0]", "outside the vocabulary")),
    "an example too long": ("compute_logits", {"examples": [[5] * 65]}, ("examples[0]", "65", "larger max_seq_len")),
    "images to score": ("compute_logits", {"images": [1]}, ("image", "reads text only", "pass None")),
    "contexts missing": ("evaluate_examples", {"contexts": []}, ("contexts", "[]", "non-empty list")),
    "too few contexts": (
        "evaluate_examples",
        {"examples": ["ab", "cd"], "contexts": ["a"]},
        ("2 examples", "1 contexts", "one for each"),
    ),
    "context elsewhere": ("evaluate_examples", {"contexts": ["xyz"]}, ("contexts[0]", "not the beginning")),
    "nothing to score": ("evaluate_examples", {"examples": [[5]]}, ("examples[0]", "no token to score", "needs one")),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "generate": {"prompts": ["a"], "max_gen_len": 4},
    "stream_generate": {"prompt": "a", "max_gen_len": 4},
    "compute_logits": {"examples": ["a list"]},
    "evaluate_examples": {"examples": ["a list"]},
}


def call_error(model: MetaModel, name: str) -> tuple[str, str]:
    method, arguments, _ = CALLS[name]
    return error_of(getattr(model, method), **{**DEFAULTS[method], **arguments})


@pytest.fixture(scope="module")
def model(good) -> MetaModel:
    return MetaModel.from_pretrained(good, max_seq_len=64, dtype="fp32")


@pytest.mark.parametrize("name", CALLS)
def test_calls_refuse(name, model):
    holds(call_error(model, name), ValueError, CALLS[name][2])


def all_call_errors(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    model = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32", mp_group=dist.group.WORLD)
    errors = [call_error(model, name) for name in CALLS]
    return errors, model.generate(["a list", "the"], max_gen_len=8)


def test_calls_refuse_on_every_rank_and_the_model_goes_on(good, model, ranks):
    expected = model.generate(["a list", "the"], max_gen_len=8)
    for errors, texts in ranks(2).run(all_call_errors, good):
        for name, error in zip(CALLS, errors, strict=True):
            holds(error, ValueError, CALLS[name][2])
        assert texts == expected


DIFFERING: list[tuple[str, dict[int, dict[str, Any]], tuple[str, ...]]] = [
    ("generate", {1: {"prompts": ["b"]}}, ("different arguments", "rank(s) [1]", "same prompts")),
    ("generate", {1: {"prompts": ["a", "a"]}}, ("different arguments", "same prompts")),
    ("generate", {0: {"max_gen_len": 5}}, ("different arguments", "same prompts and settings")),
    ("generate", {1: {"temperature": 0.5}}, ("different arguments", "same prompts and settings")),
    ("generate", {1: {"additional_stop_symbols": ["#"]}}, ("different arguments", "same prompts and settings")),
    ("generate", {0: {"prompts": "a"}}, ("'a'", "non-empty list of texts")),
    ("generate", {1: {"prompts": [3]}}, ("prompts[0]", "must be a text")),
    ("generate", {1: {"prompts": ["\ud800"]}}, ("lone surrogate", "no UTF-8")),
    ("generate", {0: {"prompts": []}, 1: {"top_p": 2}}, ("prompts", "non-empty list of texts")),
    ("generate", {1: {"images": ["cat.png"]}}, ("image", "pass None")),
    ("stream_generate", {1: {"prompt": "b"}}, ("different arguments", "same prompts")),
    ("stream_generate", {1: {"prompt": 7}}, ("7", "must be a text")),
    ("compute_logits", {1: {"examples": ["b"]}}, ("different arguments", "rank(s) [1]")),
    ("compute_logits", {0: {"examples": [[400]]}}, ("outside the vocabulary",)),
    ("evaluate_examples", {1: {"contexts": ["a"]}}, ("different arguments", "rank(s) [1]")),
]


def differing_call_errors(folder: Path) -> tuple[list[tuple[str, str]], list[str]]:
    model = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32", mp_group=dist.group.WORLD)
    errors = []
    for method, changes, _ in DIFFERING:
        arguments = {**DEFAULTS[method], **changes.get(dist.get_rank(), {})}
        errors.append(error_of(getattr(model, method), **arguments))
    return errors, model.generate(["a list", "the"], max_gen_len=8)


def test_ranks_that_are_asked_different_things_refuse_together(good, model, ranks):
    expected = model.generate(["a list", "the"], max_gen_len=8)
    first, second = ranks(2).run(differing_call_errors, good)
    assert first == second
    for (_, _, says), error in zip(DIFFERING, first[0], strict=True):
        holds(error, ValueError, says)
    assert first[1] == expected


def failing_step_error(folder: Path, step: str, rank: int) -> tuple[tuple[str, str], bool, list[str]]:
    """What a call raises where a step of it fails on one rank, whether on all alike; and the next call's texts."""
    model = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32", mp_group=dist.group.WORLD)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError(f"{step} has no memory")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == rank:
            patch.setattr(step, fail)
        with pytest.raises(RuntimeError) as caught:
            model.generate(["a list", "the"], max_gen_len=8)
    error = caught.value
    return (type(error).__name__, str(error)), raised_on_all_ranks(error), model.generate(["a list"], max_gen_len=8)


@pytest.mark.parametrize(
    ("step", "rank"),
    [("accessory.model.transformer.Transformer.new_cache", 1), ("accessory.generation.engine.sample", 0)],
)
def test_a_step_that_fails_on_one_rank_ends_the_call_on_all(step, rank, good, model, ranks):
    expected = model.generate(["a list"], max_gen_len=8)
    found = ranks(2).run(failing_step_error, good, step, rank)
    assert found[rank] == (("OutOfMemoryError", f"{step} has no memory"), True, expected)
    assert found[1 - rank] == (("RuntimeError", f"{step} has no memory"), True, expected)


def test_training_batches_of_wrong_shape(model):
    tokens = torch.ones(2, 8, dtype=torch.int64)
    error = error_of(model.forward, tokens, tokens[:, :7])
    holds(error, ValueError, ("(2, 8)", "(2, 7)", "must both be (batch, length)"))
    holds(error_of(model.forward, tokens[0], tokens[0]), ValueError, ("(8,)", "must both be (batch, length)"))
    long = torch.ones(1, 65, dtype=torch.int64)
    holds(error_of(model.forward, long, long), ValueError, ("65", "max_seq_len is 64"))
    holds(error_of(model.forward, tokens, tokens, images="cat.png"), ValueError, ("image", "pass None"))


def test_a_prompt_too_long_keeps_its_last_tokens(model, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    prompt = "the list method returns a new list of words and numbers " * 8
    tokens = model.tokenizer.encode(prompt, bos=True, eos=False)
    room = 64 - 12
    assert len(tokens) > room
    kept = [tokens[0], *tokens[1:][-(room - 1) :]]
    assert len(kept) == room
    sampling = Sampling(max_gen_len=12)
    expected = [step[0].text for step in complete(model.llma, model.tokenizer, [kept], sampling)][-1]
    with caplog.at_level(logging.WARNING, logger="accessory"):
        texts = model.generate(["a", prompt], max_gen_len=12)
    assert texts == [model.generate(["a"], max_gen_len=12)[0], expected]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert all(text in warned[0] for text in ("prompts[1]", str(len(tokens)), str(room), "only its last"))


def test_config_refuses_by_itself_what_from_pretrained_refuses():
    for name, (changes, says) in CONFIGS.items():
        content = {key: value for key, value in {**CONFIG, **changes}.items() if value is not ...}
        error = error_of(ModelArgs.from_dict, content)
        assert error[0] == "ValueError", name
        assert all(text in error[1] for text in says), error
