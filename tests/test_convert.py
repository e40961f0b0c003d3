"""Forms of checkpoints: read where they lie, and written exactly. transformers' own folders are the truth."""

import contextlib
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    base_shard,
    hf_logits,
    random_mixtral,
    random_prompts,
    random_tensors,
    small_config,
    sparse_shard,
    whole_tensors,
    write_folder,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import error_of, run_command
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.convert import convert, split
from accessory.checkpoint.diff import diff
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.layouts import WRITTEN
from accessory.checkpoint.layouts.hf import sizes
from accessory.checkpoint.manifest import check_manifest
from accessory.checkpoint.report import describe
from accessory.checkpoint.write import AT_ONCE
from accessory.config import ModelArgs
from accessory.config.layouts import EXPORT_FORMS, LAYOUT_NAMES
from accessory.errors import CheckpointError, shown_bytes
from accessory.model.meta import MetaModel
from accessory.parallel.box import Box

Tensors = dict[str, Tensor]


def contents(folder: Path) -> dict[str, Tensors]:
    """The tensors of each of a folder's files."""
    found = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    for path in folder.glob("*.pth"):
        loaded = torch.load(path, weights_only=True)
        found[path.name] = loaded.get("model", loaded)
    return found


def assert_same(first: dict[str, Tensors], second: dict[str, Tensors]) -> None:
    """The same files, keys, dtypes, shapes and bytes."""
    assert first.keys() == second.keys()
    for name, tensors in first.items():
        assert tensors.keys() == second[name].keys(), name
        for key, tensor in tensors.items():
            other = second[name][key]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), key
            assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), key


# -- Hugging Face's folders


def saved(model: Any, folder: Path, **settings: Any) -> None:
    model.save_pretrained(folder, **settings)


def fused(model: Any, folder: Path) -> None:
    """The keys as transformers 5 holds them in memory."""
    model.config.save_pretrained(folder)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(model: Any, folder: Path) -> None:
    """Two pytorch_model files with an index, and a buffer that old releases keep."""
    saved(model, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(tensors)
    weight_map = {}
    for file, keys in enumerate((names[::2], names[1::2]), start=1):
        name = f"pytorch_model-0000{file}-of-00002.bin"
        torch.save({key: tensors[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def of_transformers_4(model: Any, folder: Path) -> None:
    """config.json with rope_theta and torch_dtype, and null where a size follows from others."""
    saved(model, folder)
    config = json.loads((folder / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    del config["dtype"]
    config |= {"rope_theta": theta, "torch_dtype": "float32", "rope_scaling": None, "unsloth_version": "2024.1"}
    (folder / "config.json").write_text(json.dumps(config))


SAVED: dict[str, Callable[[Any, Path], None]] = {
    "one file": saved,
    "shards": lambda model, folder: saved(model, folder, max_shard_size="40KB"),
    "fused": fused,
    "pickles": pickled,
    "transformers 4": of_transformers_4,
}


@pytest.fixture(scope="module")
def hf() -> Any:
    return random_mixtral(3)


@pytest.fixture(scope="module", params=list(SAVED))
def hf_folder(request, hf, small_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "m"
    folder.mkdir()
    SAVED[request.param](hf, folder)
    shutil.copyfile(small_tokenizer, folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_folder_of_transformers_loads_where_it_lies(size, hf, hf_folder, ranks):
    prompts = random_prompts(1, (5, 9))
    for found in ranks(size).run(logits_of, hf_folder, prompts):
        for prompt, logits in zip(prompts, found, strict=True):
            torch.testing.assert_close(logits[:, :384], hf_logits(hf, prompt), rtol=1e-5, atol=1e-5)


def logits_of(folder: Path, prompts: list[list[int]]) -> list[Tensor]:
    import torch.distributed as dist

    model = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32", mp_group=dist.group.WORLD)
    with torch.inference_mode():
        return [model.llma(torch.tensor([prompt]))[0][0] for prompt in prompts]


def test_what_is_written_for_transformers_is_what_it_writes(hf, hf_folder, tmp_path):
    convert(hf_folder, tmp_path / "out", to="hf")
    written = contents(tmp_path / "out")
    hf.save_pretrained(tmp_path / "truth")
    assert_same(written, contents(tmp_path / "truth"))
    from transformers import MixtralForCausalLM

    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    own, theirs = dict(loaded.named_parameters()), dict(hf.named_parameters())
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    for name in ("hidden_size", "num_local_experts", "rms_norm_eps", "rope_parameters", "sliding_window", "head_dim"):
        assert getattr(loaded.config, name) == getattr(hf.config, name), name


def test_shards_of_hugging_face_s_form_have_an_index(hf, small_tokenizer, tmp_path, monkeypatch):
    from transformers import MixtralForCausalLM

    monkeypatch.setattr("accessory.checkpoint.write.LARGEST_FILE", 40_000)
    source = tmp_path / "m"
    hf.save_pretrained(source)
    shutil.copyfile(small_tokenizer, source / "tokenizer.model")
    convert(source, tmp_path / "out", to="hf")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 60_000 for name in files)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in hf.parameters())
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), hf.parameters(), strict=True))


def test_a_tied_head_is_the_embedding(small_tokenizer, tmp_path):
    """Whichever of the two lies in the folder; where both do, each is read, as transformers does."""
    hf = random_mixtral(5, tie_word_embeddings=True)
    hf.save_pretrained(tmp_path / "m")
    tensors = load_file(path := tmp_path / "m" / "model.safetensors")
    shutil.copyfile(small_tokenizer, tmp_path / "m" / "tokenizer.model")
    (prompt,) = random_prompts(2, (7,))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    matrix = tensors.pop(embedding)
    assert head not in tensors
    for own in ({embedding: matrix}, {head: matrix}, {head: matrix.flip(0), embedding: matrix}):
        save_file({**tensors, **own}, path, {"format": "pt"})
        theirs = type(hf).from_pretrained(tmp_path / "m", experts_implementation="eager")
        model = MetaModel.from_pretrained(tmp_path / "m", max_seq_len=64, dtype="fp32")
        said = model.llma(torch.tensor([prompt]))[0][0]
        torch.testing.assert_close(said, hf_logits(theirs, prompt), rtol=1e-5, atol=1e-5)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert(tmp_path / "m", tmp_path / "out", to="hf")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
        written = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(written[embedding], matrix)
        assert torch.equal(written[head], own.get(head, matrix))


def test_a_linear_rope_scaling_goes_both_ways(small_tokenizer, tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    hf = random_mixtral(6, rope_parameters=rope)
    hf.save_pretrained(tmp_path / "m")
    shutil.copyfile(small_tokenizer, tmp_path / "m" / "tokenizer.model")
    assert Folder(tmp_path / "m").load_args().rope_scaling == 0.25
    (prompt,) = random_prompts(2, (9,))
    model = MetaModel.from_pretrained(tmp_path / "m", max_seq_len=64, dtype="fp32")
    torch.testing.assert_close(model.llma(torch.tensor([prompt]))[0][0], hf_logits(hf, prompt), rtol=1e-5, atol=1e-5)
    convert(tmp_path / "m", tmp_path / "out", to="hf")
    from transformers import MixtralForCausalLM

    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    torch.testing.assert_close(hf_logits(loaded, prompt), hf_logits(hf, prompt))


# Folders of the Hub's users: keys of training, of exports and of other programs stand in their config.json.
HUB = {
    "architectures": ["MixtralForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "head_dim": None,
    "hidden_act": "silu",
    "hidden_size": 960,
    "intermediate_size": 2560,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "mixtral",
    "num_attention_heads": 15,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 5,
    "num_local_experts": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_parameters": {"rope_theta": 100000, "rope_type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "lora_rank": 16,
    "use_lora": True,
    "vocab_size": 49152,
}


def test_a_config_of_the_hub_says_the_sizes():
    args = ModelArgs.from_dict(sizes(HUB))
    assert (args.dim, args.hidden_dim, args.head_dim, args.n_layers) == (960, 2560, 64, 32)
    assert (args.n_heads, args.n_kv_heads, args.vocab_size, args.max_seq_len) == (15, 5, 49152, 8192)
    assert (args.moe.num_experts, args.moe.num_experts_per_tok) == (4, 2)
    assert (args.rope_theta, args.rope_scaling, args.sliding_window, args.peft) == (100000, None, None, None)


def test_keys_that_nobody_knows_are_named_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HUB))
    for _ in range(2):
        list(describe(path))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: passed over, as transformers does: lora_rank, use_lora"
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is unknown"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"lm_head_bias": True}, "lm_head_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e6}}, "rope_type is 'longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_parameters": 3}, "rope_parameters must be an object"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantize it while it is read"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantized by another program"),
        ({"hidden_size": "many"}, "dim"),
        ({"num_local_experts": 1}, "num_experts"),
    ],
)
def test_a_config_that_would_compute_otherwise_is_refused_by_name(change, says, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**HUB, **change}))
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        list(describe(path))
    assert str(caught.value).startswith(f"{path}: ")


def test_a_window_refuses_a_longer_context(hf, small_tokenizer, tmp_path):
    hf.save_pretrained(tmp_path / "m")
    shutil.copyfile(small_tokenizer, tmp_path / "m" / "tokenizer.model")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 48}))
    MetaModel.from_pretrained(tmp_path / "m", max_seq_len=48)
    with pytest.raises(ValueError, match=r"sliding_window is 48.*max_seq_len of 48 at most"):
        MetaModel.from_pretrained(tmp_path / "m", max_seq_len=49)


# -- all pairs of forms


def stacked(tensors: Tensors, experts: int) -> Tensors:
    """Mistral's stacked experts, spelled out from the format's description."""
    found = {key: value for key, value in tensors.items() if "feed_forward" not in key}
    for layer in {key.split(".")[1] for key in tensors if key.startswith("layers.")}:
        room = f"layers.{layer}"
        found[f"{room}.block_sparse_moe.gate.weight"] = tensors[f"{room}.feed_forward.gate.weight"]
        for matrix in ("w1", "w2", "w3"):
            parts = [tensors[f"{room}.feed_forward.experts.{expert}.{matrix}.weight"] for expert in range(experts)]
            rows = [part.T if matrix == "w2" else part for part in parts]
            found[f"{room}.block_sparse_moe.{matrix}"] = torch.cat(rows).contiguous()
    return found


@st.composite
def models(draw: Callable[..., Any]) -> tuple[dict[str, Any], int, torch.dtype]:
    """A config that so many files can hold in both of our layouts, and the dtype of its weights."""
    files = draw(st.sampled_from([1, 2, 3]))
    kv_heads = files * draw(st.integers(1, 2))
    heads = kv_heads * draw(st.integers(1, 2))
    experts = files * draw(st.integers(1, 3))
    config = small_config(
        dim=files * draw(st.integers(1, 4)) * 2,
        hidden_dim=files * draw(st.integers(1, 5)),
        head_dim=2 * draw(st.integers(1, 4)),
        n_layers=draw(st.integers(1, 2)),
        n_heads=heads,
        n_kv_heads=kv_heads,
        vocab_size=files * draw(st.integers(3, 9)),
        rope_theta=draw(st.sampled_from([1e4, 1e6, 5e5])),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
    )
    config["moe"] = {"num_experts": experts, "num_experts_per_tok": draw(st.integers(1, min(2, experts)))}
    for name, value in (("load_balancing_weight", 0.02), ("rope_scaling", 0.5), ("sliding_window", 64)):
        if draw(st.booleans()):
            config[name] = value
    return config, files, draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))


@settings(max_examples=12, deadline=None)
@given(model=models(), route=st.permutations(sorted(WRITTEN)), at_once=st.sampled_from([50, AT_ONCE]))
def test_a_round_trip_over_all_forms_loses_nothing(model, route, at_once, tmp_path_factory):
    config, files, dtype = model
    folder = tmp_path_factory.mktemp("trip")
    tensors = random_tensors(config, 1, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accessory.checkpoint.write.AT_ONCE", at_once)
        for form, cut in (("accessory", base_shard), ("accessory-sparse", sparse_shard)):
            source = write_folder(
                folder / f"from-{form}", tensors, config, files=files, form="base" if cut is base_shard else "sparse"
            )
            truth = contents(source)
            before = source
            for number, step in enumerate(route):
                mp = files if WRITTEN[step].cut is not None else None
                convert(before, folder / f"{form}-{number}", to=step, mp=mp)
                before = folder / f"{form}-{number}"
                check_manifest(before)
                assert Folder(before).stored_args() == Folder(source).stored_args(), step
            # GGUF's vectors and routers are float32.
            convert(before, folder / f"{form}-back", to=form, mp=files, dtype=dtype)
            assert_same(contents(folder / f"{form}-back"), truth)
            assert Folder(folder / f"{form}-back").load_args() == Folder(source).load_args()
    shutil.rmtree(folder)


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("parts", ["one by one", "stacked"])
def test_mistral_s_releases_are_read_to_the_same_bytes(parts, ending, tmp_path):
    config = small_config()
    tensors = random_tensors(config, 4, torch.bfloat16)
    write_folder(tmp_path / "truth", tensors, config, files=2)
    own = tensors if parts == "one by one" else stacked(tensors, 8)
    keys = sorted(own)
    (folder := tmp_path / "release").mkdir()
    params = {key: value for key, value in config.items() if not key.startswith("max_")}
    (folder / "params.json").write_text(json.dumps(params))
    for file in range(3):
        disjoint = {key: own[key].contiguous() for key in keys[file::3]}
        path = folder / f"consolidated.{file:02d}{ending}"
        save_file(disjoint, path) if ending == ".safetensors" else torch.save(disjoint, path)
    split(folder, tmp_path / "out", mp=2)
    assert_same(contents(tmp_path / "out"), contents(tmp_path / "truth"))


@pytest.mark.parametrize("cuts", [1, 2, 10])
def test_the_torrent_is_read_in_its_splits(cuts, tmp_path):
    config = small_config(n_layers=1)
    tensors = random_tensors(config, 4, torch.bfloat16)
    whole = write_folder(tmp_path / "whole", tensors, config, files=1, form="released")
    (folder := tmp_path / "cut").mkdir()
    shutil.copyfile(whole / "params.json", folder / "params.json")
    archive = (whole / "consolidated.00.pth").read_bytes()
    size = len(archive) // cuts + 1  # an odd place of a tensor as often as not
    for part in range(cuts):
        (folder / f"consolidated.00.pth-split{part}").write_bytes(archive[part * size : (part + 1) * size])
    split(folder, tmp_path / "out", mp=2)
    assert_same(contents(tmp_path / "out"), contents(write_folder(tmp_path / "truth", tensors, config, files=2)))
    assert f"{shown_bytes(len(archive))} in all" in "\n".join(describe(folder, check_values=True))
    for lost in {0, cuts // 2, cuts - 1}:
        broken = shutil.copytree(folder, tmp_path / f"without-{lost}")
        (broken / f"consolidated.00.pth-split{lost}").unlink()
        with pytest.raises(CheckpointError, match=f"{re.escape(str(broken))}.*(split|holds no weights)"):
            split(broken, tmp_path / "never", mp=1)
    if cuts > 1:
        names = [folder / f"consolidated.00.pth-split{part}" for part in (0, 1)]
        swapped = [path.read_bytes() for path in names]
        for path, own in zip(names, reversed(swapped), strict=True):
            path.write_bytes(own)
        with pytest.raises(CheckpointError, match="pth-split0"):
            split(folder, tmp_path / "never", mp=1)


# Of each tensor of Mistral's releases name and shape; mistral_inference (transformer.py, transformer_layers.py, moe.py,
# args.py) loads the first list strictly, and has no name beside them. Some of the releases stack the experts.
OF_MODEL = {"tok_embeddings.weight": "VD", "norm.weight": "D", "output.weight": "VD"}
OF_LAYER = {
    "attention.wq.weight": "HD",
    "attention.wk.weight": "KD",
    "attention.wv.weight": "KD",
    "attention.wo.weight": "DH",
    "attention_norm.weight": "D",
    "ffn_norm.weight": "D",
}
ONE_BY_ONE = {
    "feed_forward.gate.weight": "ED",
    "feed_forward.experts.{E}.w1.weight": "FD",
    "feed_forward.experts.{E}.w2.weight": "DF",
    "feed_forward.experts.{E}.w3.weight": "FD",
}
STACKED = {"block_sparse_moe.gate.weight": "ED", **{f"block_sparse_moe.w{number}": "SD" for number in (1, 2, 3)}}
PARAMS = {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size", "moe"}


def test_mistral_s_form_has_the_names_of_its_releases(tmp_path):
    config = small_config(n_layers=2, dim=24, hidden_dim=20, head_dim=4, n_heads=4, n_kv_heads=2, vocab_size=28)
    config["moe"] = {"num_experts": 3, "num_experts_per_tok": 2}
    sizes = {"V": 28, "D": 24, "H": 16, "K": 8, "E": 3, "F": 20, "S": 60}
    tensors = random_tensors(config, 4, torch.bfloat16)
    convert(write_folder(tmp_path / "m", tensors, config, files=1), tmp_path / "out", to="mistral")
    written = load_file(tmp_path / "out" / "consolidated.safetensors")
    # The second is what the tests of reading are made of.
    for found, of_experts in ((written, ONE_BY_ONE), (stacked(tensors, 3), STACKED)):
        listed = dict(OF_MODEL)
        for layer in (0, 1):
            for name, shape in (OF_LAYER | of_experts).items():
                listed |= {f"layers.{layer}.{name.format(E=expert)}": shape for expert in range(3)}
        shapes = {name: tuple(sizes[letter] for letter in shape) for name, shape in listed.items()}
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
    assert_same(contents(tmp_path / "out"), {"consolidated.safetensors": tensors})
    params = json.loads((tmp_path / "out" / "params.json").read_text())
    assert params == {key: value for key, value in config.items() if not key.startswith("max_")}
    assert params.keys() - {"rope_theta"} == PARAMS


@pytest.mark.parametrize("files", [2, 4])
@pytest.mark.parametrize("form", ["accessory", "accessory-sparse"])
def test_shards_may_be_safetensors(form, files, small_tokenizer, tmp_path):
    config = small_config(n_layers=1)
    tensors = random_tensors(config, 4, torch.bfloat16)
    source = write_folder(tmp_path / "m", tensors, config, files=1, form="released", tokenizer=small_tokenizer)
    convert(source, tmp_path / "out", to=form, mp=files, safetensors=True)
    cut = base_shard if form == "accessory" else sparse_shard
    assert_same(
        contents(tmp_path / "out"),
        {
            f"consolidated.{file:02d}-of-{files:02d}.model.safetensors": cut(tensors, file, files, 8)
            for file in range(files)
        },
    )
    assert diff(source, tmp_path / "out").same
    MetaModel.from_pretrained(tmp_path / "out", max_seq_len=64)


@pytest.mark.parametrize(("before", "after"), [(8, 6), (4, 3), (3, 4), (6, 4), (2, 5), (1, 7)])
def test_numbers_of_files_need_not_divide_one_another(before, after, tmp_path):
    both = before * after
    config = small_config(
        dim=both, hidden_dim=3, head_dim=2, n_layers=1, n_heads=both, n_kv_heads=both, vocab_size=both
    )
    config["moe"] = {"num_experts": both, "num_experts_per_tok": 2}
    tensors = random_tensors(config, 4, torch.bfloat16)
    split(write_folder(tmp_path / "m", tensors, config, files=before), tmp_path / "out", mp=after)
    truth = write_folder(tmp_path / "truth", tensors, config, files=after)
    assert_same(contents(tmp_path / "out"), contents(truth))


def test_a_dtype_is_that_of_all_weights(tmp_path):
    config = small_config(n_layers=1)
    tensors = random_tensors(config, 4)
    source = write_folder(tmp_path / "m", tensors, config, files=2)
    convert(source, tmp_path / "out", to="hf", dtype=torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert torch.equal(written["lm_head.weight"], tensors["output.weight"].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_the_command_lists_what_can_be_written():
    assert set(LAYOUT_NAMES) == set(WRITTEN)
    assert set(EXPORT_FORMS) < set(WRITTEN)


def test_settings_that_a_form_cannot_say_are_warned_of_and_kept_beside(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    config = small_config(n_layers=1, load_balancing_weight=0.02, rope_scaling=0.5)
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2)
    convert(source, tmp_path / "mistral", to="mistral")
    assert "rope_scaling 0.5, load_balancing_weight 0.02" in caplog.text
    caplog.clear()
    convert(source, tmp_path / "hf", to="hf")
    assert "cannot say load_balancing_weight 0.02" in caplog.text
    for name in ("mistral", "hf"):
        assert Folder(tmp_path / name).load_args() == Folder(source).load_args()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"to": "hff"}, "did you mean hf?"),
        ({"to": "hf", "mp": 2}, "leave mp out"),
        ({"mp": 3}, "Numbers that work: [1, 2, 4, 8]"),
        ({"to": "accessory-sparse", "mp": 5}, "cannot write 5 shards"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is(asked, says, tmp_path):
    config = small_config(n_layers=1)
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2)
    with pytest.raises(ValueError, match=re.escape(says)):
        convert(source, tmp_path / "out", **asked)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_run_s_folder_names_its_newest_model(tmp_path):
    for name in ("epoch2", "epoch10", "epoch9-iter500", "checkpoints"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"such as {re.escape(str(tmp_path))}/epoch10$"):
        Folder(tmp_path)


def test_two_forms_in_a_folder_give_hugging_face_s_and_say_so(hf, small_tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    hf.save_pretrained(tmp_path)
    torch.save(whole_tensors(random_mixtral(9)), tmp_path / "consolidated.00.pth")
    assert Folder(tmp_path).form == "Hugging Face"
    assert "holds both model.safetensors and consolidated.00.pth" in caplog.text


def test_experts_are_not_held_against_one_another(tmp_path, monkeypatch):
    """Reading a part of one expert looks at that expert's tensors, however many others there are."""
    config = small_config(dim=8, hidden_dim=2, head_dim=2, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=8)
    config["moe"] = {"num_experts": 512, "num_experts_per_tok": 2}
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2)
    looks = 0
    plain = Box.intersect

    def counted(own: Box, other: Box) -> Box | None:
        nonlocal looks
        looks += 1
        return plain(own, other)

    monkeypatch.setattr(Box, "intersect", counted)
    split(source, tmp_path / "out", mp=1)
    assert looks < 20 * 3 * 512


# -- overwriting, verifying, comparing


def test_an_old_folder_stays_until_the_new_one_is_whole(tmp_path):
    config = small_config(n_layers=1)
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2)
    split(source, tmp_path / "out", mp=4)
    before = contents(tmp_path / "out")
    kind, message = error_of(convert, source, tmp_path / "out", to="hf")
    assert (kind, "exists already" in message) == ("FileExistsError", True)
    broken = shutil.copytree(source, tmp_path / "broken")
    path = broken / "consolidated.01-of-02.model.pth"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        convert(broken, tmp_path / "out", to="hf", overwrite=True)
    assert_same(contents(tmp_path / "out"), before)
    convert(source, tmp_path / "out", to="hf", overwrite=True)
    assert list(contents(tmp_path / "out")) == ["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "m", "out"]
    convert(tmp_path / "out", tmp_path / "out", mp=4, overwrite=True)  # onto itself
    assert_same(contents(tmp_path / "out"), before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    """Both are the same model; each conversion is killed somewhere between its beginning and its end."""
    config = small_config(n_layers=1)
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2)
    out, forms, rng = tmp_path / "out", ("hf", "accessory"), random.Random(5)
    begin = time.monotonic()
    convert(source, out)
    whole = time.monotonic() - begin
    seen = set()
    for number in range(12):
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                convert(source, out, to=forms[number % 2], overwrite=True)
            os._exit(0)
        time.sleep(1.5 * whole * rng.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert diff(source, out).same
        check_manifest(out)
        seen.add(Folder(out).form)
    convert(source, out, to="hf", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out"], "leavings go with the next one"
    assert seen <= {"Hugging Face", "converted"}


def test_only_a_checkpoint_is_overwritten(tmp_path):
    config = small_config(n_layers=1)
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2)
    (mine := tmp_path / "mine").mkdir()
    (mine / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        convert(source, mine, overwrite=True)
    split(source, tmp_path / "out", mp=1)
    (tmp_path / "out" / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt too"):
        convert(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "precious"


def test_verify_finds_what_has_changed_since(small_tokenizer, tmp_path):
    config = small_config(n_layers=1)
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2, tokenizer=small_tokenizer)
    convert(source, tmp_path / "out", to="hf")
    assert check_manifest(tmp_path / "out") == 4
    path = tmp_path / "out" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not as it was written"):
        check_manifest(tmp_path / "out")
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"has {len(whole) - 1} bytes and was written with {len(whole)}"):
        check_manifest(tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.safetensors"):
        check_manifest(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        check_manifest(source)


def test_diff_names_what_differs_and_by_how_much(tmp_path):
    config = small_config(n_layers=1)
    tensors = random_tensors(config, 4)
    source = write_folder(tmp_path / "m", tensors, config, files=2)
    changed = dict(tensors)
    key = "layers.0.feed_forward.experts.5.w3.weight"
    changed[key] = tensors[key].clone()
    changed[key][3, 7] += 0.5
    other = write_folder(tmp_path / "o", changed, config, files=1, form="released")
    found = diff(source, other)
    assert found.groups["w3"] == pytest.approx(0.5, rel=1e-6)
    assert [group for group, value in found.groups.items() if value] == ["w3"]
    assert not found.same
    assert diff(source, other, atol=0.6).same
    changed[key] = torch.full_like(tensors[key], torch.nan)
    assert diff(source, write_folder(tmp_path / "n", changed, config, files=4)).groups["w3"] == torch.inf
    sized = write_folder(tmp_path / "s", tensors, {**config, "norm_eps": 1e-6}, files=2)
    assert diff(source, sized).settings == ["norm_eps: 1e-05 and 1e-06"]


@pytest.mark.parametrize(("second", "code"), [("same", 0), ("other", 1)])
def test_the_commands_convert_inspect_and_diff(second, code, small_tokenizer, tmp_path):
    config = small_config(n_layers=1)
    source = write_folder(tmp_path / "m", random_tensors(config, 4), config, files=2, tokenizer=small_tokenizer)
    if second == "other":
        source = write_folder(tmp_path / "o", random_tensors(config, 5), config, files=2, tokenizer=small_tokenizer)
    accessory, out = [sys.executable, "-m", "accessory"], tmp_path / "out"
    done = run_command([*accessory, "convert", tmp_path / "m", out, "--to", "hf", "--dtype", "fp32"])
    assert (done.returncode, done.stdout) == (0, f"wrote {out}\n"), done.stderr
    inspected = run_command([*accessory, "inspect", out, "--verify"])
    assert inspected.stdout.startswith("verified    4 files are as they were written\n"), inspected.stderr
    assert "Hugging Face" in inspected.stdout
    compared = run_command([*accessory, "diff", source, out])
    assert compared.returncode == code, compared.stderr
    assert compared.stdout.endswith("the same model\n")


@pytest.mark.parametrize(
    ("content", "parameters", "at_8"),
    [
        (
            {
                "model_type": "mixtral",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 32000,
                "num_local_experts": 8,
            },
            "46,702,792,704, of which 12,879,925,248 active",
            "bf16 11.68 GB, int8 5.88 GB, int4 3.24 GB, nf4 3.33 GB, fp8 6.05 GB, mxfp4 3.57 GB",
        ),
        (
            {
                "dim": 6144,
                "n_layers": 56,
                "head_dim": 128,
                "hidden_dim": 16384,
                "n_heads": 48,
                "n_kv_heads": 8,
                "norm_eps": 1e-5,
                "vocab_size": 32768,
                "moe": {"num_experts_per_tok": 2, "num_experts": 8},
            },
            "140,630,071,296, of which 39,161,468,928 active",
            "bf16 35.16 GB, int8 17.65 GB, int4 9.69 GB, nf4 9.97 GB, fp8 18.18 GB, mxfp4 10.85 GB",
        ),
    ],
    ids=["8x7B", "8x22B"],
)
def test_a_config_alone_says_parameters_and_bytes(content, parameters, at_8, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    lines = list(describe(path))
    assert any(parameters in line for line in lines)
    assert lines[-1] == f"at mp 8     each rank {at_8}"
    with pytest.raises(CheckpointError, match=rf"holds no weights: .*; accessory inspect {path} says its sizes$"):
        list(describe(tmp_path))
    other = path.rename(tmp_path / "other.json")
    other.write_text('{"dim": 3}')
    with pytest.raises(ValueError, match="takes a checkpoint's folder, or its config"):
        list(describe(other))


@settings(max_examples=60, deadline=None)
@given(
    corner=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    most=st.integers(1, 400),
)
def test_pieces_of_a_box_are_small_and_cover_it_in_order(corner: list[int], sizes: list[int], most: int) -> None:
    shape = tuple(sizes[: len(corner)])
    box = Box(tuple(corner), shape)
    numbers = torch.arange(box.numel).view(shape)
    pieces = list(box.pieces(most))
    assert max(piece.numel for piece in pieces) <= most
    assert torch.cat([numbers[piece.within(box)].flatten() for piece in pieces]).tolist() == list(range(box.numel))
