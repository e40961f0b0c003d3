"""accessory merge and export-adapter: what they write says what base and adapter say together."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from adapters import PEFT, SCALE, add_by_hand, random_adapter, write_adapter
from checkpoints import (
    accessory_config,
    hf_logits,
    random_mixtral,
    random_prompts,
    random_tensors,
    small_config,
    whole_tensors,
    write_checkpoint,
    write_folder,
)
from ranks import error_of
from safetensors.torch import load_file
from torch import Tensor

from accessory.checkpoint.adapter_export import export_adapter
from accessory.checkpoint.merge import merge
from accessory.checkpoint.report import describe
from accessory.cli import main
from accessory.model.meta import MetaModel
from accessory.model.scoring import score_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = random_prompts(4, [5, 17, 40])


class Folders(NamedTuple):
    """A base, an adapter with biases and norms, and one of matrices alone."""

    config: dict[str, Any]
    base: Path
    adapter: Path
    plain: Path
    tensors: dict[str, Tensor]


def plain_peft() -> dict[str, Any]:
    return {**PEFT, "bias_tuning": False, "norm_tuning": False}


@pytest.fixture(scope="module")
def folders(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("tools")
    hf = random_mixtral(3)
    config = accessory_config(hf.config)
    base = write_checkpoint(folder / "base", hf, small_tokenizer, files=2)
    tensors = random_adapter(config, 8)
    # As --only_save_trainable writes it, the norms that trained are in it as well.
    norms = {name: tensor * 1.5 for name, tensor in whole_tensors(hf).items() if "norm" in name}
    whole = {**tensors, **norms}
    adapter = write_adapter(folder / "adapter", whole, config, files=4, tokenizer=small_tokenizer)
    alone = random_adapter(config, 8, biases=False)
    plain = write_adapter(folder / "plain", alone, config, files=1, tokenizer=small_tokenizer, peft=plain_peft())
    return Folders(config, base, adapter, plain, whole)


def logits(paths: Any, **settings: Any) -> list[Tensor]:
    model = MetaModel.from_pretrained(paths, dtype="fp32", device="cpu", max_seq_len=64, **settings)
    with torch.no_grad():
        return score_tokens(model.llma, PROMPTS)


def assert_logits(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4)


# --- merge


def test_merged_is_unmerged(folders: Folders, tmp_path: Path) -> None:
    report = merge(folders.base, folders.plain, tmp_path / "merged")
    assert_logits(logits(tmp_path / "merged"), logits([folders.base, folders.plain]))
    assert json.loads((tmp_path / "merged" / "meta.json").read_text()) == {"llama_type": "mistral"}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not [key for key in config if "lora" in key or "tuning" in key]
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "consolidated.00-of-02.model.pth",
        "consolidated.01-of-02.model.pth",
        "config.json",
        "manifest.json",
        "meta.json",
        "tokenizer.model",
    }
    assert not report.biases
    assert {name for name, change in report.changes.items() if change.moved} == {
        *("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    }


def test_merge_says_how_far_each_group_moved(folders: Folders, tmp_path: Path) -> None:
    report = merge(folders.base, folders.adapter, tmp_path / "merged")
    base = whole_tensors(random_mixtral(3))
    for group in ("wk", "w2", "w3", "norm"):
        moved = before = 0.0
        for name, tensor in base.items():
            if group not in name:
                continue
            matrix = name.removesuffix(".weight")
            if group == "norm":
                change = folders.tensors[name] - tensor
            else:
                lora_a, lora_b = (folders.tensors[f"{matrix}.lora_{half}.weight"] for half in "ab")
                change = SCALE * lora_b @ lora_a
            moved, before = moved + change.square().sum().item(), before + tensor.square().sum().item()
        assert report.changes[group].share == pytest.approx((moved / before) ** 0.5, rel=1e-4), group
    lines = "\n".join(report.lines())
    assert "norm            moved by 50.000%" in lines
    assert "biases          kept beside the weights: llama_type mistral_peft, lora_rank -1" in lines
    assert "gate" not in lines


def test_trained_biases_stay(folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    merge(folders.base, folders.adapter, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["lora_rank"], config["bias_tuning"], config["norm_tuning"]) == (-1, True, False)
    assert json.loads((tmp_path / "merged" / "meta.json").read_text()) == {"llama_type": "mistral_peft"}
    assert_logits(logits(tmp_path / "merged"), logits([folders.base, folders.adapter]))
    # And another adapter can be trained on it and merged again: its biases take their place.
    second = random_adapter(folders.config, 9)
    write_adapter(tmp_path / "second", second, folders.config, files=1, tokenizer=small_tokenizer)
    merge(tmp_path / "merged", tmp_path / "second", tmp_path / "twice")
    assert_logits(logits(tmp_path / "twice"), logits([tmp_path / "merged", tmp_path / "second"]))


def test_merge_into_the_dtype_and_form_of_any_base(small_tokenizer: Path, tmp_path: Path) -> None:
    config = small_config(dim=32, hidden_dim=48, moe={"num_experts": 4, "num_experts_per_tok": 2})
    tensors = random_tensors(config, 1, torch.bfloat16)
    base = write_folder(tmp_path / "base", tensors, config, files=8, form="sparse", tokenizer=small_tokenizer)
    alone = random_adapter(config, 2, biases=False)
    adapter = write_adapter(tmp_path / "adapter", alone, config, files=2, tokenizer=small_tokenizer, peft=plain_peft())
    merge(base, adapter, tmp_path / "merged")
    (file,) = (tmp_path / "merged").glob("*.pth")  # four experts do not fit eight files
    merged = torch.load(file, weights_only=True)["model"]
    assert len(merged) == len(tensors)
    for name, tensor in tensors.items():
        expected = tensor.float()
        matrix = name.removesuffix(".weight")
        if f"{matrix}.lora_a.weight" in alone:
            expected = expected + SCALE * alone[f"{matrix}.lora_b.weight"] @ alone[f"{matrix}.lora_a.weight"]
        ours = merged[f"llma.{name}"]
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), expected, rtol=2**-8, atol=1e-6)


def assert_same_weights(ours: Path, theirs: Path, files: int) -> None:
    for file in range(files):
        name = f"consolidated.{file:02d}-of-{files:02d}.model.pth"
        own, others = (torch.load(folder / name, weights_only=True)["model"] for folder in (ours, theirs))
        assert own.keys() == others.keys()
        assert all(torch.equal(own[key], others[key]) for key in others)


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "with frozen weights"])
def test_an_untrained_adapter_is_said(
    whole: bool, folders: Folders, small_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {
        name: tensor if "lora_a" in name else torch.zeros_like(tensor)
        for name, tensor in folders.tensors.items()
        if "norm" not in name
    }
    tensors |= frozen_in_bfloat16(3) if whole else {}
    write_adapter(tmp_path / "new", tensors, folders.config, files=1, tokenizer=small_tokenizer)
    report = merge(folders.base, tmp_path / "new", tmp_path / "merged")
    assert report.untrained
    assert "the adapter is untrained" in caplog.text
    assert_same_weights(tmp_path / "merged", folders.base, 2)


def frozen_in_bfloat16(seed: int) -> dict[str, Tensor]:
    """As a run with --precision bf16 and without --only_save_trainable exports them; here one expert's are left out."""
    frozen = whole_tensors(random_mixtral(seed)).items()
    return {name: tensor.bfloat16() for name, tensor in frozen if ".experts.5." not in name}


def test_frozen_weights_stay_the_bases(folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    settings = {"files": 4, "tokenizer": small_tokenizer, "peft": plain_peft()}
    alone = random_adapter(folders.config, 8, biases=False)
    write_adapter(tmp_path / "whole", {**frozen_in_bfloat16(3), **alone}, folders.config, **settings)
    report = merge(folders.base, tmp_path / "whole", tmp_path / "merged")
    merge(folders.base, folders.plain, tmp_path / "expected")
    assert_same_weights(tmp_path / "merged", tmp_path / "expected", 2)
    assert not any(report.changes[group].moved for group in ("tok_embeddings", "gate", "norm", "output"))

    other = frozen_in_bfloat16(3)
    other["layers.1.feed_forward.experts.2.w1.weight"] *= 1.02
    write_adapter(tmp_path / "other", {**other, **alone}, folders.config, **settings)
    kind, message = error_of(merge, folders.base, tmp_path / "other", tmp_path / "no")
    assert kind == "CheckpointError"
    key = "layers.1.feed_forward.experts.2.w1.weight"
    assert f"{tmp_path / 'other'}: {key}, which it has frozen, differs from that of {folders.base}" in message
    assert not (tmp_path / "no").exists()


def test_what_rounding_takes_from_an_update_is_said(small_tokenizer: Path, tmp_path: Path) -> None:
    config = small_config(dim=32, hidden_dim=48)
    base = random_tensors(config, 1, torch.bfloat16)
    write_folder(tmp_path / "base", base, config, files=1, tokenizer=small_tokenizer)
    small = random_adapter(config, 2, biases=False)
    for name, tensor in small.items():
        if name.endswith("lora_b.weight"):
            tensor *= 1e-9 if ".attention." in name else 1e-2
    write_adapter(tmp_path / "small", small, config, files=1, tokenizer=small_tokenizer, peft=plain_peft())
    report = merge(tmp_path / "base", tmp_path / "small", tmp_path / "merged")
    assert not report.untrained
    (file,) = (tmp_path / "merged").glob("*.pth")
    merged = torch.load(file, weights_only=True)["model"]
    lost = moved = 0.0
    for name, tensor in base.items():
        if not name.endswith("w2.weight"):
            continue
        matrix = name.removesuffix(".weight")
        update = SCALE * small[f"{matrix}.lora_b.weight"] @ small[f"{matrix}.lora_a.weight"]
        moved += update.square().sum().item()
        lost += (merged[f"llma.{name}"].float() - tensor.float() - update).square().sum().item()
    assert 0 < lost < moved
    assert report.changes["w2"].lost_share == pytest.approx((lost / moved) ** 0.5, rel=1e-4)
    assert report.changes["wq"].moved > 0
    assert torch.equal(merged["llma.layers.0.attention.wq.weight"], base["layers.0.attention.wq.weight"])
    lines = list(report.lines())
    assert "wq              moved by 0.000%, of which rounding to bfloat16 lost 100.0%" in lines


def test_merge_refuses_what_does_not_belong_together(folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    config = small_config()
    other = write_folder(tmp_path / "o", random_tensors(config, 1), config, files=1, tokenizer=small_tokenizer)
    kind, message = error_of(merge, other, folders.adapter, tmp_path / "merged")
    assert kind == "CheckpointError"
    assert "is an adapter of another model" in message
    assert "dim 32 and 64" in message
    fewer = config | {"moe": {"num_experts": 4, "num_experts_per_tok": 2}}
    other = write_folder(tmp_path / "f", random_tensors(fewer, 1), fewer, files=1, tokenizer=small_tokenizer)
    assert "moe.num_experts 8 and 4" in error_of(merge, other, folders.adapter, tmp_path / "merged")[1]
    kind, message = error_of(merge, folders.base, folders.base, tmp_path / "merged")
    assert "holds no adapter: its meta.json says 'mistral', not 'mistral_peft'" in message
    kind, message = error_of(merge, folders.adapter, folders.adapter, tmp_path / "merged")
    assert "has LoRA of its own" in message
    merge(folders.base, folders.adapter, tmp_path / "biased")
    kind, message = error_of(merge, tmp_path / "biased", folders.plain, tmp_path / "merged")
    assert kind == "CheckpointError"
    assert f"{tmp_path / 'biased'} has biases (layers.0.attention.wk.bias and 11 more), and {folders.plain}" in message
    assert not (tmp_path / "merged").exists()


# --- export-adapter


# Neither is about the folder: peft does go by the patterns that it makes itself for stacked parameters.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any targeted module")
@pytest.mark.parametrize("norms", [True, False], ids=["with norms", "matrices alone"])
def test_the_exported_adapter_in_peft(norms: bool, folders: Folders, small_tokenizer: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    source = folders.plain
    if norms:
        tensors = {name: tensor for name, tensor in folders.tensors.items() if not name.endswith("bias")}
        tensors |= {name: torch.zeros_like(bias) for name, bias in folders.tensors.items() if name.endswith("bias")}
        source = write_adapter(tmp_path / "n", tensors, folders.config, files=2, tokenizer=small_tokenizer)
    export_adapter(source, tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    theirs = PeftModel.from_pretrained(random_mixtral(3), str(tmp_path / "hf"))
    ours = logits([folders.base, source])
    for prompt, own in zip(PROMPTS, ours, strict=True):
        torch.testing.assert_close(own, hf_logits(theirs, prompt), atol=1e-4, rtol=1e-4)
    for own, base in zip(ours, logits(folders.base), strict=True):
        assert (own - base).abs().max() > 0.1, "the adapter changes nothing"


def test_peft_and_the_tests_own_adapter_agree(folders: Folders) -> None:
    truth = add_by_hand(random_mixtral(3), random_adapter(folders.config, 8, biases=False))
    for prompt, own in zip(PROMPTS, logits([folders.base, folders.plain]), strict=True):
        torch.testing.assert_close(own, hf_logits(truth, prompt), atol=1e-4, rtol=1e-4)


# Names of tensors behind "base_model.model.", and of target_modules, that other programs load above a Mixtral; from
# their sources of 2026. peft: utils/transformers_weight_conversion.py (experts of transformers 4 become those of 5),
# utils/save_and_load.py. vLLM: lora/lora_model.py, lora/utils.py, lora/peft_helper.py (no modules_to_save), and
# get_expert_mapping of models/mixtral.py. SGLang: lora/utils.py, whose target modules have no w1, w2, w3, and
# lora/mem_pool.py, which passes over what is no target module's.
ATTENTION = r"model\.layers\.\d+\.self_attn\.(?P<{0}>[qkvo]_proj)\.lora_[AB]\.weight"
EXPERTS = r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.(?P<{0}>w[123])\.lora_[AB]\.weight"
NORMS = r"model\.(?P<{0}>norm|layers\.\d+\.(input|post_attention)_layernorm)\.weight"
LOADED = {"peft": (ATTENTION, EXPERTS, NORMS), "vLLM": (ATTENTION, EXPERTS), "SGLang": (ATTENTION,)}


@pytest.mark.parametrize(
    ("targets", "norms", "loaded_by"),
    [
        (["attention"], False, {"peft", "vLLM", "SGLang"}),
        (["attention", "experts"], False, {"peft", "vLLM"}),
        (["experts"], False, {"peft", "vLLM"}),
        (["attention"], True, {"peft"}),
    ],
)
def test_exported_names_are_those_that_others_load(
    targets: list[str], norms: bool, loaded_by: set[str], folders: Folders, small_tokenizer: Path, tmp_path: Path
) -> None:
    tensors = random_adapter(folders.config, 8, biases=False)
    tensors = {name: tensor for name, tensor in tensors.items() if any(f".{one}" in name for one in targets)}
    if norms:
        tensors |= {name: tensor for name, tensor in folders.tensors.items() if "norm" in name}
    peft = {**PEFT, "bias_tuning": False, "norm_tuning": norms, "lora_targets": targets}
    source = write_adapter(tmp_path / "a", tensors, folders.config, files=1, tokenizer=small_tokenizer, peft=peft)
    export_adapter(source, tmp_path / "hf")
    names = [
        name.removeprefix("base_model.model.") for name in load_file(tmp_path / "hf" / "adapter_model.safetensors")
    ]
    assert len(names) == len(tensors)
    said = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    found = set()
    for program, rows in LOADED.items():
        pattern = re.compile("|".join(row.format(f"row{number}") for number, row in enumerate(rows)))
        matches = [pattern.fullmatch(name) for name in names]
        if all(matches):
            found.add(program)
            ends = {match[match.lastgroup].rpartition(".")[2] for match in matches if match and match.lastgroup}
            asked = {*said["target_modules"], *(name.rpartition(".")[2] for name in said["modules_to_save"] or ())}
            assert ends == asked, "peft would make modules that the file has no tensors of, or none for those it has"
    assert found == loaded_by


def test_export_refuses_what_has_no_place_there(folders: Folders, tmp_path: Path) -> None:
    kind, message = error_of(export_adapter, folders.adapter, tmp_path / "hf")
    assert kind == "ValueError"
    assert "layers.0.attention.wq.bias and 55 more is not zero" in message
    kind, message = error_of(export_adapter, folders.base, tmp_path / "hf")
    assert "has no LoRA (its config has no lora_rank)" in message
    assert not (tmp_path / "hf").exists()


# --- what all refuse


def poisoned(source: Path, copy: Path, key: str, value: float) -> Path:
    """A copy of a folder of one shard with a value changed."""
    shutil.copytree(source, copy)
    (path,) = copy.glob("*.pth")
    held = torch.load(path)["model"]
    held[f"llma.{key}"].view(-1)[3] = value
    torch.save({"model": held}, path)
    return copy


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_infinities_and_nan_are_not_handed_on(value: float, folders: Folders, tmp_path: Path) -> None:
    key, out = "layers.1.feed_forward.experts.5.w2", tmp_path / "out"
    adapter = poisoned(folders.plain, tmp_path / "adapter", f"{key}.lora_b.weight", value)
    for refuses, tensor in (
        (lambda: merge(folders.base, adapter, out), f"{key}.weight"),
        (lambda: export_adapter(adapter, out), f"{key}.lora_b.weight"),
    ):
        kind, message = error_of(refuses)
        assert (kind, f"{adapter}: {tensor} has infinities or NaN" in message) == ("CheckpointError", True), message
    whole = write_checkpoint(tmp_path / "whole", random_mixtral(3), folders.base / "tokenizer.model", files=1)
    base = poisoned(whole, tmp_path / "base", f"{key}.weight", value)
    assert f"{base}: {key}.weight has infinities or NaN" in error_of(merge, base, folders.plain, out)[1]
    assert not out.exists()


def test_a_sum_that_the_bases_dtype_cannot_hold_is_named(folders: Folders, tmp_path: Path) -> None:
    hf = random_mixtral(3).half()
    base = write_checkpoint(tmp_path / "half", hf, folders.base / "tokenizer.model", files=1)
    key = "layers.0.attention.wo"
    adapter = poisoned(folders.plain, tmp_path / "adapter", f"{key}.lora_b.weight", 1e7)
    kind, message = error_of(merge, base, adapter, tmp_path / "out")
    assert kind == "CheckpointError"
    assert f"{adapter}: {key}.weight has infinities or NaN, or gets them in torch.float16" in message


READERS = {
    "loading": lambda base, adapter, output: logits([base, adapter]),
    "merge": merge,
    "export": lambda base, adapter, output: export_adapter(adapter, output),
    "inspect": lambda base, adapter, output: list(describe(adapter)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("left", "lost"),
    [
        ("attention.wk.lora_a.weight", "attention.wk.lora_b.weight"),
        ("attention.wk.lora_b.weight", "attention.wk.lora_a.weight"),
        ("feed_forward.experts.w13_lora_a", "feed_forward.experts.w13_lora_b"),
    ],
)
def test_half_of_an_update(
    left: str, lost: str, reader: str, folders: Folders, small_tokenizer: Path, tmp_path: Path
) -> None:
    gone = re.compile(r"experts\.\d\.w[13]\.lora_b" if "experts" in lost else re.escape(f"layers.0.{lost}"))
    tensors = {name: tensor for name, tensor in folders.tensors.items() if not gone.search(name)}
    half = write_adapter(tmp_path / "half", tensors, folders.config, files=2, tokenizer=small_tokenizer)
    kind, message = error_of(READERS[reader], folders.base, half, tmp_path / "out")
    assert kind == "CheckpointError"
    assert f"{half} holds layers.0.{left} but not layers.0.{lost}: an update needs both" in message
    assert not (tmp_path / "out").exists()


# --- the commands


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bare(source: Path, folder: Path) -> Path:
    """A copy of the weights and the tokenizer, as the original tool's folders are."""
    return Path(shutil.copytree(source, folder, ignore=shutil.ignore_patterns("config.json", "meta.json")))


def with_open_vocabulary(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": -1}))
    return folder


@pytest.mark.parametrize("without", ["base", "adapter", "both"])
def test_the_commands_take_folders_of_weights_alone(without: str, folders: Folders, tmp_path: Path) -> None:
    merge(folders.base, folders.plain, tmp_path / "merged")
    export_adapter(folders.plain, tmp_path / "hf")
    base, adapter = folders.base, folders.plain
    if without != "adapter":
        base = bare(base, tmp_path / "base")
    (tmp_path / "peft.json").write_text(json.dumps(plain_peft()))
    config = []
    if without != "base":
        adapter = bare(adapter, tmp_path / "adapter")
        config = ["--llama_config", str(folders.base / "config.json"), str(tmp_path / "peft.json")]
    assert main(["merge", str(base), str(adapter), str(tmp_path / "ours"), *config]) == 0
    assert main(["export-adapter", str(adapter), str(tmp_path / "our hf"), *config]) == 0
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "merged")
    assert files_of(tmp_path / "our hf") == files_of(tmp_path / "hf")


@pytest.mark.parametrize("both", [False, True], ids=["of the adapter", "of both"])
def test_the_commands_take_a_vocabulary_left_open(
    both: bool, folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(folders.base, folders.adapter, tmp_path / "merged")
    export_adapter(folders.plain, tmp_path / "hf")
    base = with_open_vocabulary(folders.base, tmp_path / "base") if both else folders.base
    adapter = with_open_vocabulary(folders.adapter, tmp_path / "adapter")
    plain = with_open_vocabulary(folders.plain, tmp_path / "plain")
    merge(base, adapter, tmp_path / "ours")
    export_adapter(plain, tmp_path / "our hf")
    assert files_of(tmp_path / "ours") == files_of(tmp_path / "merged")
    assert files_of(tmp_path / "our hf") == files_of(tmp_path / "hf")
    capsys.readouterr()
    assert main(["inspect", str(adapter)]) == 0
    said = capsys.readouterr().out
    assert "vocabulary left to the tokenizer" in said
    assert "an adapter alone" in said
    assert "at mp" not in said


def test_what_is_no_adapter_by_its_config(folders: Folders, tmp_path: Path) -> None:
    config = [folders.base / "config.json"]
    adapter = bare(folders.plain, tmp_path / "adapter")
    kind, message = error_of(merge, folders.base, adapter, tmp_path / "merged", llama_config=config)
    assert kind == "ValueError"
    assert "holds no adapter by its config, and has no meta.json" in message
    whole = with_open_vocabulary(folders.base, tmp_path / "base")
    for shard in whole.glob("*.pth"):
        tensors = torch.load(shard)["model"]
        del tensors["llma.tok_embeddings.weight"]
        torch.save({"model": tensors}, shard)
    kind, message = error_of(merge, whole, folders.adapter, tmp_path / "merged")
    assert kind == "CheckpointError"
    assert "lacks tensor tok_embeddings.weight, and the config does not give vocab_size" in message


def test_the_commands(folders: Folders, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(folders.base), str(folders.plain), str(tmp_path / "merged")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["wq", "wk", "wv", "wo", "w1", "w2", "w3", "wrote"]
    assert main(["export-adapter", str(folders.plain), str(tmp_path / "hf")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'hf'}\n"
    assert main(["export-adapter", str(folders.adapter), str(tmp_path / "no")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ERROR: ")
    assert len(captured.err.splitlines()) == 1
