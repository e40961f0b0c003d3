"""A model in training, exported: the folder gives the same model back, at any number of ranks."""

import errno
import json
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from checkpoints import random_prompts, random_tensors, small_config, write_folder
from ranks import alike, error_of
from test_training import CLIP_GRAD, SCHEDULE, step_rows
from torch import Tensor

from accessory.checkpoint.containers import open_tensors
from accessory.checkpoint.manifest import check_manifest
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained, load_transformer
from accessory.parallel.state import ParallelState
from accessory.text.forms import DefaultForm
from accessory.train.export import export_checkpoint, export_name
from accessory.train.optim import adamw
from accessory.train.sharding import device_mesh, shard_model
from accessory.train.trainer import train_step

# The keys that the original's ModelArgs knows; it refuses any other.
KNOWN_KEYS = {
    *("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "head_dim", "norm_eps", "rope_theta"),
    *("max_batch_size", "max_seq_len", "rope_scaling", "load_balancing_weight", "moe"),
}


class Exported(NamedTuple):
    """A model in training and what its export gave back on the same ranks."""

    weights: dict[str, Tensor]
    trained: Tensor
    loaded: Tensor


def trained_model(folder: Path, mp_size: int, placement: str, ep_size: int = 1) -> MetaModel:
    """A sharded model that has taken a step."""
    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    llma = load_transformer(pretrained, state, dtype=torch.float32, expert_placement=placement)
    shard_model(llma, device_mesh(state), data_parallel="sdp")
    model = MetaModel(llma, pretrained.tokenizer)
    optimizer = adamw(model.named_parameters(), lr=1.0, weight_decay=0.0)
    examples, labels = (rows.tensor_split(state.dp_size)[state.dp_rank] for rows in step_rows(0))
    train_step(model.train(), optimizer, [(examples, labels)], lr=SCHEDULE(0), clip_grad=CLIP_GRAD)
    return model.eval()


@torch.no_grad()
def logits_of(model: MetaModel) -> Tensor:
    examples = step_rows(1)[0]
    return model.llma(examples, examples != 0)[0]


def export_on_rank(folder: Path, output: Path, mp_size: int, placement: str, ep_size: int = 1) -> Exported:
    model = trained_model(folder, mp_size, placement, ep_size)
    trained = logits_of(model)  # leaves parameters gathered
    export_checkpoint(model, output / export_name(0), dtype=torch.float32)
    export_checkpoint(model, output / export_name(0, 5), dtype=torch.bfloat16)
    loaded = MetaModel.from_pretrained(
        output / "epoch0",
        max_seq_len=64,
        mp_group=model.llma.state.mp_group,
        dtype="auto",
        device="cpu",
        expert_placement=placement,
    )
    weights = {name: parameter.detach().full_tensor() for name, parameter in model.llma.named_parameters()}
    return Exported(weights, trained, logits_of(loaded))


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config()
    where = tmp_path_factory.mktemp("export") / "base"
    return write_folder(where, random_tensors(config, 6), config, files=1, tokenizer=small_tokenizer)


def assert_exported(results: list[Exported], output: Path, files: int, *, spread: bool = False) -> None:
    """The folders hold the trained weights to the bit, and nothing beside what the page lists."""
    alike(list(results))
    # Where experts were spread, their products were of more rows.
    torch.testing.assert_close(results[0].loaded, results[0].trained, rtol=0, atol=1e-5 if spread else 0)
    for name, dtype in (("epoch0", torch.float32), ("epoch0-iter5", torch.bfloat16)):
        shards = [f"consolidated.{file:02d}-of-{files:02d}.model.pth" for file in range(files)]
        assert sorted(path.name for path in (output / name).iterdir()) == [
            "config.json",
            *shards,
            "manifest.json",
            "meta.json",
            "tokenizer.model",
        ]
        assert check_manifest(output / name) == files + 3
        whole = MetaModel.from_pretrained(output / name, max_seq_len=64, dtype=dtype, device="cpu")
        for parameter, value in whole.llma.named_parameters():
            assert torch.equal(value, results[0].weights[parameter].to(dtype)), parameter
        for shard in shards:
            assert {tensor.dtype for tensor in open_tensors(output / name / shard).values()} == {dtype}
    assert sorted(path.name for path in output.iterdir()) == ["epoch0", "epoch0-iter5"]
    config = json.loads((output / "epoch0" / "config.json").read_text())
    assert config.keys() <= KNOWN_KEYS
    assert config["moe"].keys() == {"num_experts", "num_experts_per_tok"}


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement", "ep_size"),
    [
        (1, 1, "auto", 1),
        (2, 1, "auto", 1),
        (1, 2, "expert", 1),
        (1, 2, "tensor", 1),
        (2, 2, "expert", 1),
        (2, 2, "tensor", 1),
        (1, 4, "tensor", 1),
        (4, 1, "auto", 2),
        (2, 2, "expert", 2),
        (2, 2, "tensor", 2),
    ],
)
def test_an_export_loads_as_the_trained_model(
    dp_size: int, mp_size: int, placement: str, ep_size: int, ranks: Any, folder: Path, tmp_path: Path
) -> None:
    results = ranks(dp_size * mp_size).run(export_on_rank, folder, tmp_path, mp_size, placement, ep_size)
    assert_exported(results, tmp_path, mp_size, spread=ep_size > 1)
    assert json.loads((tmp_path / "epoch0" / "meta.json").read_text()) == {"llama_type": "mistral"}
    names = open_tensors(tmp_path / "epoch0" / f"consolidated.00-of-{mp_size:02d}.model.pth")
    assert "llma.layers.0.feed_forward.experts.0.w1.weight" in names, "base form"


def export_for_others(folder: Path, output: Path, mp_size: int, placement: str) -> dict[str, torch.Tensor]:
    model = trained_model(folder, mp_size, placement)
    form = DefaultForm(model.tokenizer)
    with mock.patch("accessory.checkpoint.write.LARGEST_FILE", 100_000):
        for _ in range(2):  # the second takes the first one's place
            export_checkpoint(model, output / "epoch0", dtype=torch.float32, form=form, to="hf")
    export_checkpoint(model, output / "epoch1", dtype=torch.bfloat16, to="mistral")
    return {name: parameter.detach().full_tensor() for name, parameter in model.llma.named_parameters()}


@pytest.mark.parametrize(("dp_size", "mp_size", "placement"), [(1, 1, "auto"), (2, 2, "expert"), (1, 4, "tensor")])
def test_a_model_is_exported_for_others(
    dp_size: int, mp_size: int, placement: str, ranks: Any, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    size = dp_size * mp_size
    weights = ranks(size).run(export_for_others, folder, tmp_path, mp_size, placement)[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "epoch0", experts_implementation="eager")
    assert len(list((tmp_path / "epoch0").glob("model-*.safetensors"))) > size
    (prompt,) = random_prompts(1, (9,))
    own = MetaModel.from_pretrained(tmp_path / "epoch0", max_seq_len=64, dtype="fp32", device="cpu")
    for name, value in own.llma.named_parameters():
        assert torch.equal(value, weights[name]), name
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt])).logits[0], own.llma(torch.tensor([prompt]))[0][0]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    said = json.loads((tmp_path / "epoch0" / "generation_config.json").read_text())
    assert said == {"bos_token_id": 1, "eos_token_id": 2, "stop_strings": ["\n### Human:"]}
    assert (tmp_path / "epoch0" / "chat_template.jinja").is_file()
    mistral = MetaModel.from_pretrained(tmp_path / "epoch1", max_seq_len=64, dtype="bf16", device="cpu")
    for name, value in mistral.llma.named_parameters():
        assert torch.equal(value, weights[name].bfloat16()), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch0", "epoch1"]


def test_experts_that_do_not_divide_are_exported_sparse(
    ranks: Any, small_tokenizer: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = small_config(moe={"num_experts": 3, "num_experts_per_tok": 2})
    where = tmp_path_factory.mktemp("three") / "base"
    write_folder(where, random_tensors(config, 6), config, files=1, tokenizer=small_tokenizer)
    results = ranks(4).run(export_on_rank, where, tmp_path, 2, "tensor")
    assert_exported(results, tmp_path, 2)
    assert json.loads((tmp_path / "epoch0" / "meta.json").read_text()) == {"llama_type": "mistral_sparse"}


def uneven_on_rank(folder: Path, output: Path) -> Exported:
    return export_on_rank(folder, output, 1, "auto")


def test_uneven_slices_of_the_data_parallel_ranks(ranks: Any, folder: Path, tmp_path: Path) -> None:
    """Three ranks divide hardly any axis."""
    assert_exported(ranks(3).run(uneven_on_rank, folder, tmp_path), tmp_path, 1)


def failing_on_rank(folder: Path, output: Path) -> list[tuple[str, str]]:
    model = trained_model(folder, 1, "auto")
    first = model.llma.state.dp_rank == 0
    if first:
        (output / "epoch0").mkdir()
        (output / "epoch0" / "notes.txt").write_text("mine")
        (output / ".epoch1.exporting").mkdir()  # of a run that was killed
    found = [error_of(export_checkpoint, model, output / "epoch0", dtype=torch.float32)]
    for path in ("checkpoint.write.create_tensors", "files.sync"):
        full = OSError(errno.ENOSPC, "No space left on device")
        with mock.patch(f"accessory.{path}", side_effect=full):
            found.append(error_of(export_checkpoint, model, output / "epoch1", dtype=torch.float32))
    for dtype in (torch.float32, torch.bfloat16):  # the second replaces the first
        found.append(error_of(export_checkpoint, model, output / "epoch1", dtype=dtype))
    return found


def test_a_failed_export_leaves_nothing_and_is_the_same_on_all_ranks(ranks: Any, folder: Path, tmp_path: Path) -> None:
    ours, theirs = ranks(2).run(failing_on_rank, folder, tmp_path)
    assert [text for _, text in ours] == [text for _, text in theirs]
    foreign, unmade, unsynced, *fine = ours
    assert foreign[0] == "FileExistsError"
    assert "epoch0" in foreign[1]
    assert "No space left" in unmade[1]
    assert "No space left" in unsynced[1]
    assert fine == [("", ""), ("", "")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch0", "epoch1"]
    assert (tmp_path / "epoch0" / "notes.txt").read_text() == "mine"
    written = open_tensors(tmp_path / "epoch1" / "consolidated.00-of-01.model.pth")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
