"""Damaged checkpoints of every form: each is refused in one line that names a file, or read to the right numbers."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from safetensors.torch import load_file, save_file

from accessory.checkpoint.convert import convert
from accessory.checkpoint.report import describe
from accessory.errors import CheckpointError

CONFIG = small_config(n_layers=1, dim=16, hidden_dim=8, head_dim=4, n_heads=4, n_kv_heads=2, vocab_size=24)
CONFIG["moe"] = {"num_experts": 4, "num_experts_per_tok": 2}

Damage = Callable[[Path], Any]


class Executed:
    """Says when its pickle is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The same model in every form; and, as "truth", as one base shard."""
    where = tmp_path_factory.mktemp("forms")
    tensors = random_tensors(CONFIG, 3, torch.bfloat16)
    source = write_folder(where / "release", tensors, CONFIG, files=1, form="released")
    made = {"release": source, "shards": write_folder(where / "shards", tensors, CONFIG, files=2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accessory.checkpoint.write.LARGEST_FILE", 4000)
        convert(source, where / "hf-shards", to="hf")
    convert(source, where / "hf", to="hf")
    convert(source, where / "mistral", to="mistral")
    convert(source, where / "sparse", to="accessory-sparse", mp=2)
    convert(source, where / "own-safetensors", mp=2, safetensors=True)
    convert(source, where / "truth")
    names = ("hf-shards", "hf", "mistral", "sparse", "own-safetensors", "truth")
    made |= {name: where / name for name in names}
    (where / "bin").mkdir()
    shutil.copyfile(where / "hf" / "config.json", where / "bin" / "config.json")
    torch.save(load_file(where / "hf" / "model.safetensors"), where / "bin" / "pytorch_model.bin")
    (where / "splits").mkdir()
    shutil.copyfile(source / "params.json", where / "splits" / "params.json")
    archive = (source / "consolidated.00.pth").read_bytes()
    for part in range(3):
        size = len(archive) // 3 + 1
        (where / "splits" / f"consolidated.00.pth-split{part}").write_bytes(archive[part * size : (part + 1) * size])
    return made | {"bin": where / "bin", "splits": where / "splits"}


FORMS = ("release", "shards", "hf-shards", "hf", "mistral", "sparse", "own-safetensors", "bin", "splits")
WEIGHTS = ("*.safetensors", "*.pth", "*.bin", "*.pth-split*")


def weights_of(folder: Path) -> list[Path]:
    return sorted(path for pattern in WEIGHTS for path in folder.glob(pattern))


def config_of(folder: Path) -> Path:
    return next(path for name in ("config.json", "params.json") if (path := folder / name).exists())


def cut(number: int, share: float) -> Damage:
    def damage(folder: Path) -> None:
        path = weights_of(folder)[number % len(weights_of(folder))]
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return damage


def flipped(seed: int) -> Damage:
    """A byte of the first or the last 600, where the directories of archives and safetensors lie."""

    def damage(folder: Path) -> None:
        rng = random.Random(seed)
        path = rng.choice(weights_of(folder))
        content = bytearray(path.read_bytes())
        place = rng.randrange(min(600, len(content)))
        place = place if seed % 2 else len(content) - 1 - place
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return damage


def replaced(make: Callable[[Path], Any]) -> Damage:
    """The last file of weights is something else."""

    def damage(folder: Path) -> None:
        path = weights_of(folder)[-1]
        path.unlink()
        make(path)

    return damage


def swapped(folder: Path) -> None:
    first, *_, last = [*weights_of(folder), weights_of(folder)[0]] if len(weights_of(folder)) > 1 else [None, None]
    paths = weights_of(folder)
    if len(paths) > 1:
        first, last = paths[0], paths[-1]
        held = first.read_bytes()
        first.write_bytes(last.read_bytes())
        last.write_bytes(held)


def with_tensors(change: Callable[[dict[str, Any], list[str]], Any]) -> Damage:
    """The tensors of the last file, changed."""

    def damage(folder: Path) -> None:
        path = weights_of(folder)[-1]
        if path.suffix.startswith(".pth-"):
            return
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            change(tensors, sorted(tensors))
            save_file(tensors, path)
        else:
            content = torch.load(path, weights_only=True)
            tensors = content.get("model", content)
            change(tensors, sorted(tensors))
            torch.save(content, path)

    return damage


def with_header(change: Callable[[dict[str, Any], list[str]], Any]) -> Damage:
    """A safetensors file's header, changed as no library writes it."""

    def damage(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + size])
            change(header, sorted(key for key in header if key != "__metadata__"))
            text = json.dumps(header).encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
            return

    return damage


def with_index(change: Callable[[dict[str, Any], list[str]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        if path.exists():
            index = json.loads(path.read_text())
            change(index["weight_map"], sorted(index["weight_map"]))
            path.write_text(json.dumps(index))

    return damage


def with_config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = config_of(folder)
        config = json.loads(path.read_text())
        theirs = {"n_layers": "num_hidden_layers", "dim": "hidden_size", "n_heads": "num_attention_heads"}
        for name, value in changes.items():
            config[theirs[name] if "hidden_size" in config else name] = value
        path.write_text(json.dumps(config))

    return damage


def damages() -> Iterator[tuple[str, Damage]]:
    for number, share in enumerate((0, 0.001, 0.05, 0.3, 0.6, 0.9, 0.999)):
        yield f"cut to {share}", cut(number, share)
    for seed in range(24):
        yield f"byte flipped {seed}", flipped(seed)
    yield "a pipe", replaced(os.mkfifo)
    yield "a folder", replaced(lambda path: path.mkdir())
    yield "a link to itself", replaced(lambda path: path.symlink_to(path))
    yield "nothing", replaced(lambda path: None)
    yield "empty", replaced(lambda path: path.write_bytes(b""))
    yield "text", replaced(lambda path: path.write_text("404: Not Found"))
    yield "a pointer of git-lfs", replaced(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"))
    yield "a program", replaced(lambda path: torch.save({"a": Executed(path.parent / "executed")}, path))
    yield "swapped files", swapped
    yield "a tensor less", with_tensors(lambda tensors, keys: tensors.pop(keys[0]))
    yield "a tensor more", with_tensors(lambda tensors, keys: tensors.update(odd=torch.ones(3)))
    yield "renamed", with_tensors(lambda tensors, keys: tensors.update({keys[0] + "x": tensors.pop(keys[0])}))
    yield (
        "exchanged",
        with_tensors(
            lambda tensors, keys: tensors.update(
                {keys[0]: tensors[keys[-1]].clone(), keys[-1]: tensors[keys[0]].clone()}
            )
        ),
    )
    yield "integers", with_tensors(lambda tensors, keys: tensors.update({keys[0]: tensors[keys[0]].long()}))
    yield "transposed", with_tensors(lambda tensors, keys: tensors.update({keys[0]: tensors[keys[0]][None].clone()}))
    yield "empty tensor", with_tensors(lambda tensors, keys: tensors.update({keys[0]: torch.ones(0, 5)}))
    for name, value in (
        ("overlap", [0, 64]),
        ("beyond", [10**12, 10**12 + 64]),
        ("backwards", [64, 0]),
        ("negative", [-64, 0]),
        ("three", [0, 1, 2]),
        ("words", ["a", "b"]),
    ):
        yield f"offsets {name}", with_header(lambda header, keys, v=value: header[keys[-1]].update(data_offsets=v))
    for name, shape in (("huge", [2**40, 2**20]), ("negative", [-1]), ("of words", ["x"]), ("flat", [7])):
        yield f"shape {name}", with_header(lambda header, keys, v=shape: header[keys[0]].update(shape=v))
    yield "dtype unknown", with_header(lambda header, keys: header[keys[0]].update(dtype="F12"))
    yield "no dtype", with_header(lambda header, keys: header[keys[0]].pop("dtype"))
    yield "header of lists", with_header(lambda header, keys: header.update({keys[0]: [1]}))
    yield (
        "index of files that are not there",
        with_index(lambda own, keys: own.update({keys[0]: "model-9.safetensors"})),
    )
    yield "index of tensors that are not there", with_index(lambda own, keys: own.update(odd=own[keys[0]]))
    yield "index of other folders", with_index(lambda own, keys: own.update({keys[0]: "../hf/model.safetensors"}))
    yield "index of numbers", with_index(lambda own, keys: own.update({keys[0]: 3}))
    yield "index of wrong files", with_index(lambda own, keys: own.update({keys[0]: own[keys[-1]]}))
    yield "an empty index", with_index(lambda own, keys: own.clear())
    yield "more layers", with_config(n_layers=3)
    yield "a million layers", with_config(n_layers=10**6)
    yield "many layers", with_config(n_layers=2**15)
    yield "a million heads", with_config(n_heads=2**20)
    yield "another width", with_config(dim=32)
    yield "a huge width", with_config(dim=2**30)
    yield "sizes of words", with_config(dim="wide")
    yield "no JSON", lambda folder: config_of(folder).write_text("{")
    yield "a list", lambda folder: config_of(folder).write_text("[]")
    yield "no config", lambda folder: config_of(folder).unlink()
    yield "config of other bytes", lambda folder: config_of(folder).write_bytes(b"\xff\xfe{}")


DAMAGES = dict(damages())


def test_there_are_enough_of_them() -> None:
    assert len(DAMAGES) * len(FORMS) > 200


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_refused_in_one_line_or_harmless(form, folders, tmp_path):
    truth = torch.load(folders["truth"] / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
    refused, before = 0, peak()
    for number, (name, damage) in enumerate(DAMAGES.items()):
        folder = shutil.copytree(folders[form], tmp_path / str(number))
        damage(folder)
        out = tmp_path / f"{number}-out"
        try:
            convert(folder, out)
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            assert str(folder) in said, (name, said)
            assert "\n" not in said, (name, said)
            refused += isinstance(error, CheckpointError)
            assert not out.exists(), name
        else:
            found = torch.load(out / "consolidated.00-of-01.model.pth", weights_only=True)["model"]
            changed = [key for key in truth if not torch.equal(truth[key], found[key])]
            # A bit of a weight itself is nobody's to know; and shapes alike leave names alone.
            assert not changed or re.match("byte flipped|exchanged|swapped", name), (name, changed)
        assert not (folder / "executed").exists(), name
        assert sorted(path.name for path in tmp_path.glob(f".{number}-*")) == [], name
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    assert refused > 20
    assert peak() - before < 2000


def peak() -> float:
    """The most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("sizes", [{"n_layers": 2**15}, {"n_heads": 2**30}, {"n_layers": 2**9, "dim": 2**30}])
def test_absurd_sizes_are_refused_or_counted_soon(sizes, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(CONFIG | sizes))
    before = peak()
    with contextlib.suppress(ValueError):
        list(describe(tmp_path / "params.json"))
    assert peak() - before < 2000
