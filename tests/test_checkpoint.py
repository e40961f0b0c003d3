"""Checkpoint folders: recognising, splitting, overlaying, and the sizes in their config files."""

import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import base_shard, random_tensors, small_config, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import error_of

from accessory.checkpoint.containers import create_tensors, lay_out
from accessory.checkpoint.convert import split
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.layouts import load_args
from accessory.checkpoint.report import describe
from accessory.config import ModelArgs, MoEArgs
from accessory.files import HOST
from accessory.model.meta import MetaModel

CONFIG = small_config(n_layers=2)
# What the original tool reads; it refuses keys that it does not know.
ORIGINAL_KEYS = {
    "dim",
    "hidden_dim",
    "head_dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "norm_eps",
    "rope_theta",
    "max_batch_size",
    "max_seq_len",
    "moe",
    "rope_scaling",
    "load_balancing_weight",
}
OWN_KEYS = {"z_loss_weight"}


def shard_names(files: int) -> list[str]:
    return [f"consolidated.{file:02d}-of-{files:02d}.model.pth" for file in range(files)]


def assert_shards(folder: Path, tensors: dict[str, torch.Tensor], files: int) -> None:
    """The folder's shards are the test's own cuts, bit for bit, and nothing else lies there."""
    assert {path.name for path in folder.iterdir()} == {
        *shard_names(files),
        "config.json",
        "meta.json",
        "manifest.json",
        "tokenizer.model",
    }
    for file, name in enumerate(shard_names(files)):
        content = torch.load(folder / name, weights_only=True)
        assert set(content) == {"model"}
        expected = base_shard(tensors, file, files, 8)
        assert set(content["model"]) == set(expected)
        for key, tensor in expected.items():
            written = content["model"][key]
            assert written.dtype == tensor.dtype
            assert written.shape == tensor.shape
            assert torch.equal(written, tensor), f"{name} {key}"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def released(request, small_tokenizer, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = random_tensors(CONFIG, 7, request.param)
    folder = tmp_path_factory.mktemp("released") / "r"
    return write_folder(folder, tensors, CONFIG, files=1, form="released", tokenizer=small_tokenizer), tensors


# -- split


@pytest.mark.parametrize("files", [1, 2, 4, 8])
def test_split_cuts_as_the_format_says(files, released, small_tokenizer, tmp_path):
    source, tensors = released
    split(source, tmp_path / "out", mp=files)
    assert_shards(tmp_path / "out", tensors, files)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config) <= ORIGINAL_KEYS
    assert set(config["moe"]) == {"num_experts", "num_experts_per_tok"}
    assert {key: config[key] for key in CONFIG if not key.startswith("max_")} == {
        key: value for key, value in CONFIG.items() if not key.startswith("max_")
    }
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == {"llama_type": "mistral"}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == small_tokenizer.read_bytes()


def test_split_again_equals_split_once(released, tmp_path):
    source, tensors = released
    split(source, tmp_path / "8", mp=8)
    split(tmp_path / "8", tmp_path / "2", mp=2)
    split(tmp_path / "2", tmp_path / "4", mp=4)
    split(tmp_path / "4", tmp_path / "1", mp=1)
    for files in (2, 4, 1):
        assert_shards(tmp_path / str(files), tensors, files)


@pytest.mark.parametrize("files", [1, 2, 4])
def test_split_of_sparse_shards(files, small_tokenizer, tmp_path):
    tensors = random_tensors(CONFIG, 8)
    source = write_folder(tmp_path / "s", tensors, CONFIG, files=4, form="sparse", tokenizer=small_tokenizer)
    split(source, tmp_path / "out", mp=files)
    assert_shards(tmp_path / "out", tensors, files)


def test_split_of_metas_layout(small_tokenizer, tmp_path):
    # consolidated.NN.pth without prefix and without "model", cut like the base form.
    tensors = random_tensors(CONFIG, 9)
    source = write_folder(tmp_path / "s", tensors, CONFIG, files=2, tokenizer=small_tokenizer)
    for file, name in enumerate(shard_names(2)):
        shard = torch.load(source / name)["model"]
        bare = {key.removeprefix("llma."): value for key, value in shard.items()}
        torch.save(bare, source / f"consolidated.0{file}.pth")
        (source / name).unlink()
    split(source, tmp_path / "out", mp=4)
    assert_shards(tmp_path / "out", tensors, 4)


def test_split_keeps_each_tensors_dtype(small_tokenizer, tmp_path):
    tensors = random_tensors(CONFIG, 10, torch.bfloat16)
    tensors = {name: value.float() if "norm" in name or "gate" in name else value for name, value in tensors.items()}
    # Experts of one stacked parameter: through the first one's float16 the second's would become infinite.
    first, second = (f"layers.1.feed_forward.experts.{expert}.w1.weight" for expert in (0, 1))
    tensors[first], tensors[second] = tensors[first].half(), tensors[second] * 1e6
    source = write_folder(tmp_path / "r", tensors, CONFIG, files=1, form="released", tokenizer=small_tokenizer)
    split(source, tmp_path / "out", mp=2)
    assert_shards(tmp_path / "out", tensors, 2)


@pytest.mark.parametrize(
    ("other", "common"), [(torch.float16, torch.float32), (torch.float8_e4m3fn, torch.bfloat16)], ids=["16", "8"]
)
def test_pieces_of_unlike_dtypes_are_put_together_without_rounding(other, common, small_tokenizer, tmp_path):
    tensors = random_tensors(CONFIG, 10, torch.bfloat16)
    source = write_folder(tmp_path / "s", tensors, CONFIG, files=2, tokenizer=small_tokenizer)
    first, second = (torch.load(source / name)["model"] for name in shard_names(2))
    second = {key: value.to(other) for key, value in second.items()}
    torch.save({"model": second}, source / shard_names(2)[1])
    split(source, tmp_path / "out", mp=1)
    whole = torch.load(tmp_path / "out" / shard_names(1)[0])["model"]
    for name, axis in (("tok_embeddings", 1), ("output", 0), ("layers.1.attention.wo", 1)):
        key = f"llma.{name}.weight"
        assert whole[key].dtype == common
        assert torch.equal(whole[key], torch.cat([first[key].to(common), second[key].to(common)], axis))
    alone = {key for key in first.keys() ^ second.keys() if ".experts." in key}
    assert len(alone) == 2 * 8 * 3
    for key in alone:
        stored = first.get(key, second.get(key))
        assert whole[key].dtype == stored.dtype
        assert torch.equal(whole[key].float(), stored.float())


def test_split_reads_the_vocabulary_off_the_embedding(released, tmp_path):
    source, tensors = Path(shutil.copytree(released[0], tmp_path / "r")), released[1]
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps({**params, "vocab_size": -1, "sliding_window": 4096}))
    split(source, tmp_path / "out", mp=2)
    assert_shards(tmp_path / "out", tensors, 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 384


def test_what_was_split_generates_as_before(released, tmp_path):
    source, _ = released
    split(source, tmp_path / "out", mp=8)
    texts = [
        MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32").generate(["a list", "x"], max_gen_len=8)
        for folder in (source, tmp_path / "out")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("files", [3, 5, 16, 0, -1])
def test_split_refuses_numbers_that_do_not_divide(files, released, tmp_path):
    kind, message = error_of(split, released[0], tmp_path / "out", mp=files)
    assert kind == "ValueError"
    assert f"cannot write {files} shards" in message
    assert "Numbers that work: [1, 2, 4, 8]" in message
    assert list(tmp_path.iterdir()) == []


def test_split_leaves_an_existing_destination_alone(released, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    kind, message = error_of(split, released[0], out, mp=2)
    assert kind == "FileExistsError"
    assert f"{out} exists already: remove it first or choose another destination" in message
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert (out / "mine").read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]
    (tmp_path / "file").write_text("precious")
    assert error_of(split, released[0], tmp_path / "file", mp=2)[0] == "FileExistsError"
    assert (tmp_path / "file").read_text() == "precious"


def test_split_fills_an_empty_destination(released, tmp_path):
    (tmp_path / "out").mkdir()
    split(released[0], tmp_path / "out", mp=2)
    assert_shards(tmp_path / "out", released[1], 2)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failure_in_the_middle_leaves_nothing(error, released, tmp_path, monkeypatch):
    seen: list[Path] = []

    def fail_at_third(path: Path, *what: Any) -> dict[str, int]:
        places = lay_out(path, *what)
        seen.append(path)
        assert seen[-1].stat().st_size > 0
        if len(seen) == 3:
            raise error("in the middle")
        return places

    monkeypatch.setattr("accessory.checkpoint.write.lay_out", fail_at_third)
    with pytest.raises(error):
        split(released[0], tmp_path / "out", mp=4)
    assert len(seen) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing(released, tmp_path, monkeypatch):
    def full(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        split(released[0], tmp_path / "out", mp=2)
    assert caught.value.errno == errno.ENOSPC
    assert "consolidated.00-of-02.model.pth" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class FullDisk(io.StringIO):
    """A text file on a full disk; as the system's own error, this one names no file."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["config.json", "meta.json"])
def test_a_disk_that_is_full_at_the_end_is_said_with_the_file(name, released, tmp_path, monkeypatch):
    plain = Path.open

    def full(path: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        return FullDisk() if "w" in mode and path.name.startswith(f".{name}") else plain(path, mode, *given, **more)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OSError, match=rf"No space left on device \(free some.*{name}'") as caught:
        split(released[0], tmp_path / "out", mp=2)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_by_a_process_of_the_same_number_is_removed(released, tmp_path, caplog, monkeypatch):
    # In a container the processes of the next start have the numbers of those that were killed.
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    out = tmp_path / "a**[1]"  # a name that means something to glob
    left = tmp_path / f".{out.name}.{HOST}-{os.getpid()}.tmp"
    left.mkdir()
    (left / "consolidated.00-of-02.model.pth").write_text("half")
    split(released[0], out, mp=2)
    assert_shards(out, released[1], 2)
    assert list(tmp_path.iterdir()) == [out]
    assert "left by an interrupted run" not in caplog.text


SPLIT_AND_WAIT = """
import sys
from accessory.checkpoint.convert import split
print(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1], flush=True)
input()
split(sys.argv[1], sys.argv[2], mp=int(sys.argv[3]))
"""


def rss_anon(pid: int) -> int:
    """Private memory of a process in kB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


@pytest.mark.parametrize("files", [1, 2])
def test_memory_does_not_grow_with_the_checkpoint(files, tmp_path):
    config = small_config(dim=4096, hidden_dim=8192, n_layers=1, n_heads=8, head_dim=64, vocab_size=2048)
    config["moe"] = {"num_experts": 2, "num_experts_per_tok": 2}
    config["n_kv_heads"] = 4
    shapes = {name: tuple(value.shape) for name, value in meta_tensors(config).items()}
    source = tmp_path / "source"
    source.mkdir()
    create_tensors(source / "consolidated.00.pth", {name: (shape, torch.bfloat16) for name, shape in shapes.items()})
    size = (source / "consolidated.00.pth").stat().st_size
    assert size > 400e6
    (source / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", SPLIT_AND_WAIT, source, tmp_path / "out", str(files)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        baseline = int(process.stdout.readline())
        process.stdin.write(b"\n")
        process.stdin.close()
        peak, deadline = 0, time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            peak = max(peak, rss_anon(process.pid))
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert process.returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.pth")) == shard_names(files)
    # An expert's matrix alone is 67 MB; the whole would be size.
    assert peak - baseline < 0.35 * size / 1024, f"{peak - baseline} kB over {baseline} kB"


def meta_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The names and shapes of a model's tensors, without values."""
    small = random_tensors({**config, "dim": 2, "hidden_dim": 3, "vocab_size": 5, "n_heads": 1, "n_kv_heads": 1}, 0)
    dim = config["dim"]
    heads, kv_heads = (config[name] * config["head_dim"] for name in ("n_heads", "n_kv_heads"))
    shapes = {
        "tok_embeddings": (config["vocab_size"], dim),
        "output": (config["vocab_size"], dim),
        "wq": (heads, dim),
        "wk": (kv_heads, dim),
        "wv": (kv_heads, dim),
        "wo": (dim, heads),
        "gate": (config["moe"]["num_experts"], dim),
        "w1": (config["hidden_dim"], dim),
        "w2": (dim, config["hidden_dim"]),
        "w3": (config["hidden_dim"], dim),
    }
    return {name: torch.empty(shapes.get(name.split(".")[-2], (dim,)), device="meta") for name in small}


# -- several folders, and folders that hold weights only


def test_later_folders_overlay_earlier_ones(small_tokenizer, tmp_path):
    old, new = random_tensors(CONFIG, 1), random_tensors(CONFIG, 2)
    base = write_folder(tmp_path / "base", old, CONFIG, files=4, tokenizer=small_tokenizer)
    changed = {
        "norm.weight",
        "layers.0.attention.wo.weight",
        "layers.1.feed_forward.gate.weight",
        "layers.1.feed_forward.experts.3.w1.weight",
        "layers.1.feed_forward.experts.6.w2.weight",
    }
    part = write_folder(tmp_path / "part", new, CONFIG, files=2, tokenizer=small_tokenizer)
    for name in shard_names(2):
        shard = torch.load(part / name)["model"]
        torch.save({key: value for key, value in shard.items() if key.removeprefix("llma.") in changed}, part / name)
    mixed = {name: new[name] if name in changed else old[name] for name in old}
    whole = write_folder(tmp_path / "whole", mixed, CONFIG, files=1, form="released", tokenizer=small_tokenizer)
    expected = MetaModel.from_pretrained(whole, max_seq_len=64, dtype="fp32").state_dict()
    found = MetaModel.from_pretrained([base, part], max_seq_len=64, dtype="fp32").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # Whole over part: nothing of the part is left.
    found = MetaModel.from_pretrained([str(part), str(whole)], max_seq_len=64, dtype="fp32").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    kind, message = error_of(MetaModel.from_pretrained, part, max_seq_len=64)
    assert kind == "CheckpointError"
    assert "part" in message
    assert "lacks tensors" in message
    kind, message = error_of(MetaModel.from_pretrained, [part, part], max_seq_len=64)
    assert kind == "CheckpointError"
    assert f"{part}, {part}: nothing there fills tensors tok_embeddings.weight" in message


def test_config_and_tokenizer_come_from_the_last_folder(small_tokenizer, tmp_path):
    tensors = random_tensors(CONFIG, 1)
    first = write_folder(tmp_path / "first", tensors, CONFIG, files=2)
    (first / "config.json").write_text("not even JSON")
    last = write_folder(tmp_path / "last", tensors, {**CONFIG, "rope_theta": 123.0}, files=1, tokenizer=small_tokenizer)
    (last / "meta.json").write_text('{"llama_type": "mixtral_sparse"}')
    model = MetaModel.from_pretrained([first, last], max_seq_len=64)
    assert model.llma.args.rope_theta == 123.0
    assert model.tokenizer.path == last / "tokenizer.model"
    assert model.llama_type == "mixtral_sparse"


def test_a_folder_of_weights_alone(small_tokenizer, tmp_path):
    folder = write_folder(tmp_path / "legacy", random_tensors(CONFIG, 1), CONFIG, files=2)
    (folder / "meta.json").unlink()
    (folder / "config.json").unlink()
    sizes, override = tmp_path / "sizes.json", tmp_path / "override.json"
    sizes.write_text(json.dumps({**CONFIG, "rope_theta": 5.0, "norm_eps": 0.5}))
    override.write_text(json.dumps({"rope_theta": 7.0}))
    arguments: dict[str, Any] = {"tokenizer_path": small_tokenizer, "max_seq_len": 64}
    model = MetaModel.from_pretrained(
        folder, llama_type="mixtral", llama_config=[str(sizes), override], dtype="fp32", **arguments
    )
    assert (model.llama_type, model.llma.args.rope_theta, model.llma.args.norm_eps) == ("mixtral", 7.0, 0.5)
    assert model.tokenizer.path == small_tokenizer
    assert MetaModel.from_pretrained(folder, llama_config=sizes, **arguments).llama_type == "mistral"
    reverse = MetaModel.from_pretrained(folder, llama_config=[override, sizes], **arguments)
    assert reverse.llma.args.rope_theta == 5.0
    kind, message = error_of(MetaModel.from_pretrained, folder, llama_config=[override], **arguments)
    assert kind == "ValueError"
    assert "override.json: key(s) dim, hidden_dim, n_heads, n_layers missing" in message


def test_given_config_replaces_the_folders(small_tokenizer, tmp_path):
    folder = write_folder(tmp_path / "c", random_tensors(CONFIG, 1), CONFIG, files=2, tokenizer=small_tokenizer)
    (folder / "config.json").write_text("not even JSON")
    (tmp_path / "good.json").write_text(json.dumps({**CONFIG, "rope_theta": 3.0}))
    model = MetaModel.from_pretrained(folder, llama_config=tmp_path / "good.json", max_seq_len=64)
    assert model.llma.args.rope_theta == 3.0


@pytest.mark.parametrize("stored", ["bare", "prefixed", "float64", "float16", "noncontiguous", "parameters"])
def test_other_ways_of_holding_tensors(stored, small_tokenizer, tmp_path):
    tensors = random_tensors(CONFIG, 4)
    folder = write_folder(tmp_path / "c", tensors, CONFIG, files=1, form="released", tokenizer=small_tokenizer)
    ways = {
        "bare": lambda: dict(tensors),
        "prefixed": lambda: {"model": {f"llma.{name}": value for name, value in tensors.items()}},
        "float64": lambda: {name: value.double() for name, value in tensors.items()},
        "float16": lambda: {name: value.half() for name, value in tensors.items()},
        "noncontiguous": lambda: {name: value.t().contiguous().t() for name, value in tensors.items()},
        "parameters": lambda: {name: torch.nn.Parameter(value) for name, value in tensors.items()},
    }
    torch.save(ways[stored](), folder / "consolidated.00.pth")
    found = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32").llma
    exact = stored != "float16"
    expected = tensors if exact else {name: value.half().float() for name, value in tensors.items()}
    block = found.layers[1]
    assert torch.equal(block.attention.wo.weight, expected["layers.1.attention.wo.weight"])
    assert torch.equal(block.feed_forward.experts.w2[5], expected["layers.1.feed_forward.experts.5.w2.weight"])
    assert torch.equal(block.feed_forward.experts.w13[5, 1], expected["layers.1.feed_forward.experts.5.w3.weight"])
    assert torch.equal(found.output.weight, expected["output.weight"])


# -- folder and report


def test_a_folder_names_what_belongs_to_no_checkpoint(small_tokenizer, tmp_path):
    folder = write_folder(tmp_path / "c", random_tensors(CONFIG, 1), CONFIG, files=2, tokenizer=small_tokenizer)
    opened = Folder(folder)
    assert opened.form == "converted"
    assert [path.name for path in opened.files] == shard_names(2)
    assert (opened.llama_type, opened.config, opened.odd) == ("mistral", folder / "config.json", ())
    for name in ("optimizer.pt", "consolidated.00-of-02.model.pth.part", ".DS_Store", "notes.txt"):
        (folder / name).write_text("x")
    for name in ("README.md", "split.py", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("x")
    (folder / "converted").mkdir()
    (folder / "logs").mkdir()
    odd = (".DS_Store", "consolidated.00-of-02.model.pth.part", "logs", "notes.txt", "optimizer.pt")
    assert Folder(folder).odd == odd
    lines = list(describe(folder))
    assert any(line.startswith("odd") and all(name in line for name in odd) for line in lines)


def test_report_says_what_is_missing(tmp_path):
    folder = write_folder(tmp_path / "c", random_tensors(CONFIG, 1), CONFIG, files=2)
    (folder / "meta.json").unlink()
    missing = [line for line in describe(folder) if line.startswith("missing")]
    assert len(missing) == 2
    assert "tokenizer.model" in missing[0]
    assert "meta.json" in missing[1]


def test_params_json_stands_in_for_config_json(small_tokenizer, tmp_path):
    folder = write_folder(tmp_path / "c", random_tensors(CONFIG, 1), CONFIG, files=2, tokenizer=small_tokenizer)
    (folder / "params.json").write_text("never read")
    assert Folder(folder).config == folder / "config.json"
    (folder / "config.json").rename(folder / "params.json")
    assert Folder(folder).config == folder / "params.json"
    assert Folder(folder).load_args() == ModelArgs.from_dict(CONFIG)


# -- ModelArgs


def test_mixtral_8x7b_reads_as_the_design_lists_it():
    content = {
        "dim": 4096,
        "n_layers": 32,
        "head_dim": 128,
        "hidden_dim": 14336,
        "n_heads": 32,
        "n_kv_heads": 8,
        "norm_eps": 1e-05,
        "vocab_size": 32000,
        "moe": {"num_experts_per_tok": 2, "num_experts": 8},
    }
    args = ModelArgs.from_dict(content)
    assert (args.rope_theta, args.rope_scaling, args.load_balancing_weight) == (1e6, None, 0.1)
    assert args.z_loss_weight == 0
    assert args.moe == MoEArgs(num_experts=8, num_experts_per_tok=2)
    defaults = ModelArgs.from_dict({"dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 8})
    assert (defaults.n_kv_heads, defaults.head_dim, defaults.vocab_size) == (4, 16, -1)
    assert (defaults.norm_eps, defaults.rope_theta, defaults.moe) == (1e-5, 1e6, MoEArgs())
    nulls = {"n_kv_heads": None, "head_dim": None, "vocab_size": None, "moe": None, "rope_scaling": None}
    assert ModelArgs.from_dict({"dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 8, **nulls}) == defaults
    ignored = {"sliding_window": 4096, "max_position_embeddings": 32768, "model_type": "mixtral", "torch_dtype": "x"}
    assert ModelArgs.from_dict({**content, **ignored}) == args.replace(sliding_window=4096)


def test_the_last_file_rules(tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(CONFIG))
    second.write_text(json.dumps({"norm_eps": 1e-6, "moe": {"num_experts": 4}}))
    args = load_args([first, second])
    # A key of the later file replaces the earlier one's whole value.
    assert args == ModelArgs.from_dict({**CONFIG, "norm_eps": 1e-6, "moe": {"num_experts": 4}})
    kind, message = error_of(load_args, [first, tmp_path / "c.json"])
    assert kind == "FileNotFoundError"
    assert "c.json" in message


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Valid contents of a config.json, optional keys present or not."""
    count = st.integers(1, 64)
    kv_heads, group, head_dim = draw(count), draw(st.integers(1, 8)), 2 * draw(st.integers(1, 64))
    experts = draw(count)
    content: dict[str, Any] = {
        "dim": kv_heads * group * head_dim,
        "n_layers": draw(count),
        "n_heads": kv_heads * group,
        "hidden_dim": draw(st.integers(1, 2**20)),
    }
    positive = st.floats(1e-9, 1e9) | st.integers(1, 2**40)
    optional = {
        "n_kv_heads": st.sampled_from([kv_heads, -1, None]),
        "head_dim": st.sampled_from([2, head_dim, -1, None]),
        "vocab_size": st.integers(1, 2**20) | st.sampled_from([-1, None]),
        "norm_eps": positive,
        "rope_theta": positive,
        "rope_scaling": positive | st.none(),
        "max_batch_size": count,
        "max_seq_len": count,
        "load_balancing_weight": st.floats(0, 10),
        "z_loss_weight": st.floats(0, 10) | st.just(0),
        "moe": st.just({"num_experts": experts, "num_experts_per_tok": draw(st.integers(1, experts))}) | st.none(),
    }
    for key in draw(st.sets(st.sampled_from(sorted(optional)))):
        content[key] = draw(optional[key])
    return content


@settings(max_examples=200, deadline=None)
@given(configs())
def test_args_round_trip(content):
    args = ModelArgs.from_dict(content)
    again = ModelArgs.from_dict(json.loads(json.dumps(args.to_dict())))
    assert again == args
    # A key that the original does not know stands there only where it says something.
    assert set(args.to_dict()) - ORIGINAL_KEYS == {key for key in OWN_KEYS if content.get(key)}
    for key, value in content.items():
        if key == "moe":
            assert value is None or args.moe.to_dict() == value
        elif value not in (None, -1):
            assert getattr(args, key) == value
    assert args.n_heads % args.n_kv_heads == 0
    assert args.replace(max_seq_len=5).max_seq_len == 5
    assert args.replace() == args


@settings(max_examples=100, deadline=None)
@given(configs(), st.text(min_size=1).filter(lambda key: key not in ORIGINAL_KEYS | OWN_KEYS))
def test_args_refuse_any_unknown_key(content, key):
    if key in ("sliding_window", "family", "attention", "max_position_embeddings", "model_type", "torch_dtype"):
        return
    kind, message = error_of(ModelArgs.from_dict, {**content, key: 1})
    assert kind == "ValueError"
    assert f"unknown key(s) {key}" in message  # behind it, what may have been meant
    assert "; known are attention, dense, dim, " in message


def test_args_cannot_be_changed_into_nonsense():
    args = ModelArgs.from_dict(CONFIG)
    with pytest.raises(ValueError, match="n_heads 8 is not a multiple of n_kv_heads 3"):
        args.replace(n_kv_heads=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.dim = 5
