"""GGUF files, in and out. The truths are the `gguf` package, which reads what is written here and writes what is read,
and llama.cpp itself."""

import ctypes
import json
import os
import resource
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from adapters import PEFT, random_adapter, write_adapter
from ask_llama import ask_llama_cpp, says_as_transformers
from checkpoints import hf_logits, random_mixtral, random_prompts, random_tensors, small_config, whole_tensors
from checkpoints import write_folder as write_release
from http_api import ServedApi
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import error_of
from safetensors.torch import load_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from accessory.checkpoint.blocks import CODINGS, Blocks, BlockType, open_gguf
from accessory.checkpoint.convert import convert
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.layouts.gguf import TYPES
from accessory.checkpoint.merge import merge
from accessory.checkpoint.report import describe
from accessory.cli import main
from accessory.config import ModelArgs
from accessory.config.layouts import GGUF_TYPES
from accessory.errors import CheckpointError
from accessory.gguf_header import read_header
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.serve.driver import Driver
from accessory.text import gguf_merges
from accessory.text.form_files import templates_of
from accessory.text.tokenizer import Tokenizer

Kind = gguf.GGMLQuantizationType
Tensors = dict[str, Tensor]

# 256 is what K-quants' blocks have.
CONFIG = small_config(dim=256, hidden_dim=256, head_dim=32, n_kv_heads=4, n_layers=2)
CONFIG["moe"] = {"num_experts": 4, "num_experts_per_tok": 2}
BLOCKS = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")

NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
}
LAYER_NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def gguf_tensors(tensors: Mapping[str, Tensor], *, stacked: bool = True) -> dict[str, Tensor]:
    """The release's tensors by llama.cpp's names."""
    found: dict[str, Tensor] = {theirs: tensors[ours] for ours, theirs in NAMES.items() if ours in tensors}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            continue
        _, layer, rest = name.split(".", 2)
        if ".experts." not in rest:
            found[f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"] = tensor
            continue
        expert, matrix = rest.split(".")[-3:-1]
        if stacked:
            experts.setdefault(f"blk.{layer}.{EXPERT_NAMES[matrix]}_exps.weight", []).append(tensor)
        else:
            found[f"blk.{layer}.{EXPERT_NAMES[matrix]}.{expert}.weight"] = tensor
    return found | {name: torch.stack(several) for name, several in experts.items()}


def quantize_chunk(values: np.ndarray, kind: Kind) -> np.ndarray:
    """What llama.cpp's own quantizer makes of rows of float32."""
    xllamacpp = pytest.importorskip("xllamacpp")
    call = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    call.restype = ctypes.c_size_t
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    call.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    coded = np.zeros((rows.shape[0], rows.shape[1] // size * nbytes), np.uint8)
    assert call(int(kind), rows.ctypes.data, coded.ctypes.data, 0, *rows.shape, None) == coded.nbytes
    return coded.reshape(*values.shape[:-1], -1)


def coded_as(tensor: Tensor, kind: Kind) -> np.ndarray:
    if kind == Kind.BF16:
        return tensor.bfloat16().view(torch.uint8).numpy()
    if kind in (Kind.F32, Kind.F16):
        return tensor.to({Kind.F32: torch.float32, Kind.F16: torch.float16}[kind]).numpy()
    return quantize_chunk(tensor.float().numpy(), kind)


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.embedding_length": config["dim"],
        "llama.feed_forward_length": config["hidden_dim"],
        "llama.block_count": config["n_layers"],
        "llama.attention.head_count": config["n_heads"],
        "llama.attention.head_count_kv": config["n_kv_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["norm_eps"]),
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": float(config["rope_theta"]),
        "llama.expert_count": config["moe"]["num_experts"],
        "llama.expert_used_count": config["moe"]["num_experts_per_tok"],
        "llama.context_length": 512,
    }


def write_gguf(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], kind: Callable[[str], Kind] | Kind = Kind.F32
) -> Path:
    """A file by the package's own writer; a value of None is left out."""
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, values.get("general.architecture") or "llama")
    for key, value in values.items():
        if key == "general.architecture" or value is None:
            continue
        if key == "split.count":
            writer.add_uint16(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    for name, tensor in tensors.items():
        own = kind(name) if callable(kind) else kind
        own = own if tensor.ndim > 1 and "gate_inp" not in name else Kind.F32
        data = coded_as(tensor, own)
        writer.add_tensor(name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_split(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Tensor], count: int) -> None:
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    for file in range(count):
        own = {name: tensors[name] for name in names[file::count]}
        split = {"split.no": file, "split.count": count, "split.tensors.count": len(names)}
        write_gguf(folder / f"m-{file + 1:05d}-of-{count:05d}.gguf", {**(values if not file else {}), **split}, own)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_tensors(CONFIG, 1)


def released(folder: Path, destination: Path) -> Tensors:
    """The release's tensors of a folder of any form."""
    convert(folder, destination, to="mistral")
    return load_file(destination / "consolidated.safetensors")


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].float(), tensor.float()), name


# -- reading


def test_the_table_of_types_is_ggml_s():
    for number, coding in CODINGS.items():
        size, nbytes = gguf.GGML_QUANT_SIZES[Kind(number)]
        if isinstance(coding, BlockType):
            assert (coding.name, coding.size, coding.nbytes) == (Kind(number).name, size, nbytes)
        else:
            assert (size, nbytes) == (1, coding.itemsize)
    for name, (coding, number) in TYPES.items():
        assert CODINGS[Kind[name]] == coding
        assert gguf.LlamaFileType(number).name in (f"ALL_{name}", f"MOSTLY_{name}", f"MOSTLY_{name}_MOE")
    assert set(GGUF_TYPES) == set(TYPES)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "one by one"])
@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_types_are_read_to_the_same_numbers(kind, stacked, tensors, tmp_path):
    theirs = gguf_tensors(tensors, stacked=stacked)
    write_gguf(tmp_path / "m" / "any name.gguf", metadata_of(CONFIG), theirs, kind)
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    found = released(tmp_path / "m", tmp_path / "out")
    exact = {name: value if value.ndim == 1 or "gate" in name else value.to(dtype) for name, value in tensors.items()}
    assert_equal(found, exact)
    assert all(found[name].dtype == value.dtype for name, value in exact.items())


def test_a_split_set_is_one_model(tensors, tmp_path):
    write_split(tmp_path / "m", metadata_of(CONFIG), gguf_tensors(tensors), 3)
    assert [path.name for path in Folder(tmp_path / "m").files] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert_equal(released(tmp_path / "m", tmp_path / "out"), tensors)


def test_an_absent_output_is_the_embedding(tensors, tmp_path):
    theirs = gguf_tensors(tensors)
    del theirs["output.weight"]
    write_gguf(tmp_path / "m" / "m.gguf", metadata_of(CONFIG), theirs)
    tied = {**tensors, "output.weight": tensors["tok_embeddings.weight"]}
    assert_equal(released(tmp_path / "m", tmp_path / "out"), tied)


@pytest.fixture(scope="module")
def coded_matrices() -> dict[str, tuple[Blocks, np.ndarray]]:
    """For each type of block a tensor (3, 5, 512), and all that it stands for, by the package."""
    values = torch.randn(3, 5, 512, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in BLOCKS:
        coded = quantize_chunk(values.numpy(), Kind[name])
        coding = CODINGS[Kind[name]]
        assert isinstance(coding, BlockType)
        whole = gguf.dequantize(coded, Kind[name])
        assert np.abs(whole - values.numpy()).max() < (1 if name == "MXFP4" else 0.5)
        found[name] = Blocks(name, torch.from_numpy(coded).flatten(), (3, 5, 512), coding), whole
    return found


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(BLOCKS),
    st.tuples(*(st.tuples(st.integers(0, size - 1), st.integers(1, size)) for size in (3, 5, 512))),
    st.integers(1, 3),
)
def test_any_box_of_blocks_is_decoded_alone(coded_matrices, name, box, axes):
    blocks, whole = coded_matrices[name]
    index = tuple(slice(begin, begin + length) for begin, length in box[:axes])
    found = blocks[index]
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), whole[index])


@pytest.mark.parametrize("name", BLOCKS)
def test_a_model_in_blocks_loads_as_what_they_stand_for(name, tensors, small_tokenizer, tmp_path):
    theirs = gguf_tensors(tensors)
    write_gguf(tmp_path / "m" / "m.gguf", metadata_of(CONFIG), theirs, Kind[name])
    shutil.copyfile(small_tokenizer, tmp_path / "m" / "tokenizer.model")

    def stored(key: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 1 or "gate" in key:
            return tensor
        return torch.from_numpy(gguf.dequantize(quantize_chunk(tensor.numpy(), Kind[name]), Kind[name]))

    expected = {key: stored(key, tensor) for key, tensor in tensors.items()}
    loaded = MetaModel.from_pretrained(tmp_path / "m", max_seq_len=16, dtype="fp32").llma.state_dict()
    w13 = loaded["layers.1.feed_forward.experts.w13"]
    for expert in range(4):
        for row, matrix in enumerate(("w1", "w3")):
            assert torch.equal(w13[expert, row], expected[f"layers.1.feed_forward.experts.{expert}.{matrix}.weight"])
    for key in ("layers.0.attention.wo.weight", "layers.1.attention.wk.weight", "norm.weight", "output.weight"):
        assert torch.equal(loaded[key], expected[key]), key
    assert f"{name}, float32" in next(line for line in describe(tmp_path / "m", check_values=True) if "dtype" in line)


def logits_of(folder: Path, prompts: list[list[int]]) -> list[Tensor]:
    import torch.distributed as dist

    model = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32", mp_group=dist.group.WORLD)
    with torch.inference_mode():
        return [model.llma(torch.tensor([prompt]))[0][0] for prompt in prompts]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q6_K])
def test_two_ranks_read_their_slices(kind, tensors, small_tokenizer, ranks, tmp_path):
    write_gguf(tmp_path / "m" / "m.gguf", metadata_of(CONFIG), gguf_tensors(tensors), kind)
    shutil.copyfile(small_tokenizer, tmp_path / "m" / "tokenizer.model")
    convert(tmp_path / "m", tmp_path / "plain")
    prompts = random_prompts(1, (5, 9))
    plain = MetaModel.from_pretrained(tmp_path / "plain", max_seq_len=64, dtype="fp32").llma
    with torch.inference_mode():
        truth = [plain(torch.tensor([prompt]))[0][0] for prompt in prompts]
    for found in ranks(2).run(logits_of, tmp_path / "m", prompts):
        for own, expected in zip(found, truth, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


# -- sizes


@pytest.fixture(scope="module")
def read_args(tensors, tmp_path_factory) -> Callable[..., ModelArgs]:
    """The sizes of a file with changed metadata; None takes a key out."""
    theirs = gguf_tensors(tensors)

    def read(**changes: Any) -> ModelArgs:
        path = tmp_path_factory.mktemp("sizes") / "m.gguf"
        values = {**metadata_of(CONFIG), **{key.replace("__", "."): value for key, value in changes.items()}}
        write_gguf(path, values, theirs)
        return Folder(path.parent).stored_args()

    return read


def test_sizes_stand_in_the_metadata(read_args):
    args = read_args()
    expected = ModelArgs.from_dict({**CONFIG, "max_seq_len": 512})
    assert args == expected
    assert args.norm_eps == 1e-5  # written as float32
    assert read_args(llama__attention__key_length=32, llama__rope__dimension_count=None) == expected
    assert read_args(llama__attention__head_count_kv=[4, 4]) == expected
    assert read_args(llama__rope__freq_base=None) == expected  # 10000 in llama.cpp too
    assert read_args(llama__vocab_size=384) == expected
    scaled = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    assert read_args(**scaled) == expected.replace(rope_scaling=0.25)
    assert read_args(llama__rope__scaling__type="none") == expected
    assert read_args(llama__attention__sliding_window=128) == expected.replace(sliding_window=128)
    assert read_args(llama__attention__sliding_window=0) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general__architecture": "grok"}, "general.architecture is 'grok', and only llama, qwen3moe, olmoe"),
        ({"general__architecture": "qwen3moe"}, "qwen3moe.expert_count is absent or 0"),
        ({"llama__expert_count": 0}, "llama.expert_count is absent or 0: the model has no experts"),
        ({"llama__expert_count": None}, "llama.expert_count is absent or 0"),
        ({"llama__expert_used_count": None}, "llama.expert_used_count is missing"),
        ({"llama__expert_used_count": 9}, "num_experts_per_tok is 9 but there are only 4"),
        ({"llama__expert_count": 5}, "llama.expert_count is 5, and routers are for 4"),
        ({"llama__block_count": 3}, "llama.block_count is 3, and there are tensors of 2 layers"),
        ({"llama__block_count": 1 << 31}, "must be 1 to 512"),
        ({"llama__embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama__embedding_length": "wide"}, "dim must be"),
        ({"llama__rope__scaling__type": "longrope"}, "llama.rope.scaling.type is 'longrope': only linear and yarn"),
        ({"llama__rope__dimension_count": 16, "llama__attention__key_length": 32}, "is 16, and heads of 32"),
        ({"llama__attention__key_length": 32, "llama__attention__value_length": 16}, "value_length is 16"),
        ({"llama__attention__head_count_kv": [4, 2]}, "layers have unlike sizes"),
        ({"llama__final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30.0"),
        ({"llama__expert_gating_func": 2}, "llama.expert_gating_func is 2"),
    ],
)
def test_what_is_not_this_computation_is_refused_by_name(changes, says, read_args):
    kind, message = error_of(read_args, **changes)
    assert kind == "CheckpointError"
    assert says in message
    assert "m.gguf" in message


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q5_0, Kind.IQ4_XS])
def test_types_that_are_not_read_are_refused_by_name(kind, tensors, tmp_path):
    write_gguf(tmp_path / "m" / "m.gguf", metadata_of(CONFIG), gguf_tensors(tensors), kind)
    found, message = error_of(lambda: Folder(tmp_path / "m").stored_args())
    assert found == "CheckpointError"
    assert f"token_embd.weight is {kind.name}" in message
    assert "or its plain folder, quantized while it is read" in message


def test_frequencies_of_another_scaling_are_refused(tensors, tmp_path):
    theirs = {**gguf_tensors(tensors), "rope_freqs.weight": torch.ones(16)}
    write_gguf(tmp_path / "m" / "m.gguf", metadata_of(CONFIG), theirs)
    assert "rope_freqs.weight, a scaling of the rotary embedding" in error_of(released, tmp_path / "m", tmp_path)[1]


def test_files_of_several_models_are_listed(tensors, tmp_path):
    values, theirs = metadata_of(CONFIG), gguf_tensors(tensors)
    for name in ("a.gguf", "b.gguf"):
        write_gguf(tmp_path / "m" / name, values, theirs)
    kind, message = error_of(Folder, tmp_path / "m")
    assert kind == "CheckpointError"
    assert "several GGUF files (a.gguf, b.gguf): give the path of one of them" in message
    write_split(tmp_path / "n", values, theirs, 3)
    (tmp_path / "n" / "m-00002-of-00003.gguf").unlink()
    assert "lacks m-00002-of-00003.gguf" in error_of(Folder, tmp_path / "n")[1]
    write_split(tmp_path / "o", values, theirs, 2)
    first, second = (tmp_path / "o" / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    shutil.copyfile(first, second)
    assert "says that it is file 0 (the first is 0) of 2" in error_of(released, tmp_path / "o", tmp_path / "x")[1]


def test_one_of_several_files_is_a_model_by_its_path(tensors, small_tokenizer, tmp_path, capsys):
    """With what is said within it, and what lies beside it; of a set any file stands for all."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (both := tmp_path / "both").mkdir()
    with_tokenizer(tmp_path / "m", small_tokenizer, tmp_path / "one")
    shutil.copyfile(tmp_path / "one" / "model.gguf", both / "own.gguf")
    write_split(both, metadata_of(CONFIG) | {"tokenizer.chat_template": template}, gguf_tensors(tensors), 3)
    (both / "model.safetensors").write_bytes(b"of another form, which a folder's path would name")
    config = small_config()
    assert Folder(both / "own.gguf").stored_args().vocab_size == config["vocab_size"]
    convert(both / "own.gguf", tmp_path / "a", dtype=torch.float32)
    assert Tokenizer(tmp_path / "a").encode("a text", True, True) == Tokenizer(small_tokenizer).encode(
        "a text", True, True
    )
    for number in (1, 3):
        split = both / f"m-0000{number}-of-00003.gguf"
        assert Folder(split).place.name == "m-00001-of-00003.gguf"
        assert_equal(released(split, tmp_path / f"b{number}"), tensors)
        assert (tmp_path / f"b{number}" / "chat_template.jinja").read_text() == template
    for arguments in (["inspect", "--check-values"], ["generate", "--raw", "--prompt", "a", "--max-gen-len", "2"]):
        assert main([arguments[0], str(both / "own.gguf"), *arguments[1:]]) == 0
    shutil.copyfile(small_tokenizer, both / "tokenizer.model")  # rules over the file's own
    assert Pretrained.resolve(both / "own.gguf").tokenizer.path == both / "tokenizer.model"
    kind, message = error_of(Folder, both / "tokenizer.model")
    assert (kind, f"give the folder that holds it, {both}" in message) == ("CheckpointError", True)


def test_hugging_face_s_folder_rules_beside_gguf_files(tensors, tmp_path, caplog):
    random_mixtral(3).save_pretrained(tmp_path / "m")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "m" / name).write_bytes(b"whatever")
    assert Folder(tmp_path / "m").form == "Hugging Face"


# -- tokenizer and template


def with_tokenizer(folder: Path, tokenizer: Path, destination: Path, **beside: Any) -> Tokenizer:
    """The tokenizer of a GGUF file that was written from a folder with these files beside its tokenizer.model."""
    config = small_config(n_layers=1, vocab_size=beside.pop("vocab_size", 384))
    write_release(folder, random_tensors(config, 1), config, files=1, form="released", tokenizer=tokenizer)
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    convert(folder, destination, to="gguf", type="Q8_0")
    for path in destination.iterdir():
        if path.suffix != ".gguf":
            path.unlink()
    return Tokenizer(destination)


@pytest.fixture(scope="module")
def two_tokenizers(small_tokenizer, tmp_path_factory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return Tokenizer(small_tokenizer), with_tokenizer(folder / "r", small_tokenizer, folder / "g")


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("ab \n\t<>s/unk0123\u2581\u4f60"))
def test_its_tokenizer_is_the_original(two_tokenizers, text):
    original, found = two_tokenizers
    ids = original.encode(text, True, True)
    assert found.encode(text, True, True) == ids
    assert found.cont(text) == original.cont(text)
    assert found.encode_with_spans(text) == original.encode_with_spans(text)
    assert found.decode(ids) == original.decode(ids)


def test_its_tokens_are_the_original_s(two_tokenizers):
    original, found = two_tokenizers
    assert [found.name(token) for token in range(384)] == [original.name(token) for token in range(384)]
    for name in ("n_words", "bos_id", "eos_id", "eos_ids", "controls", "gaps", "names"):
        assert getattr(found, name) == getattr(original, name), name


def test_added_tokens_ends_and_padding_rows_come_along(small_tokenizer, tmp_path):
    added = {
        "384": {"content": "<|end|>", "special": True},
        "385": {"content": "two words", "special": False},
        "388": {"content": "<|more|>", "special": True},
    }
    found = with_tokenizer(
        tmp_path / "r",
        small_tokenizer,
        tmp_path / "g",
        vocab_size=392,
        tokenizer_config={"added_tokens_decoder": added},
        generation_config={"eos_token_id": [2, 384]},
    )
    original = Tokenizer(tmp_path / "r")
    assert original.n_words == found.n_words == 389
    assert found.gaps == original.gaps == (386, 387)
    assert found.eos_ids == original.eos_ids == {2, 384}
    assert {name: token for name, token in found.controls.items() if token < 386} == {
        name: token for name, token in original.controls.items() if token < 386
    }
    assert found.controls["<|more|>"] == 388
    text = "a list of two words<|end|> and more"
    assert found.encode(text, True, False) == original.encode(text, True, False)
    assert 385 in found.encode(text, True, False)
    assert found.decode(found.encode(text, True, False)) == original.decode(original.encode(text, True, False))
    convert(tmp_path / "g", tmp_path / "back")
    back = Tokenizer(tmp_path / "back")
    assert back.encode(text, True, True) == original.encode(text, True, True)
    assert back.eos_ids == original.eos_ids


def test_a_chat_template_comes_along(small_tokenizer, tmp_path):
    config = small_config(n_layers=1)
    values = random_tensors(config, 1)
    write_release(tmp_path / "r", values, config, files=1, form="released", tokenizer=small_tokenizer)
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (tmp_path / "r" / "chat_template.jinja").write_text(template)
    (tmp_path / "r" / "additional_chat_templates").mkdir()
    (tmp_path / "r" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    convert(tmp_path / "r", tmp_path / "g", to="gguf")
    path = tmp_path / "g" / "model.gguf"
    assert gguf.GGUFReader(path).get_field("tokenizer.chat_template").contents() == template
    (tmp_path / "alone").mkdir()
    shutil.copyfile(path, tmp_path / "alone" / "m.gguf")
    assert {name: text for name, (text, _) in templates_of(tmp_path / "alone").items()} == {
        "default": template,
        "tool_use": "tools",
    }
    convert(tmp_path / "alone", tmp_path / "back")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == template
    assert (tmp_path / "back" / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert Tokenizer(tmp_path / "back").encode("a list", True, False) == Tokenizer(small_tokenizer).encode(
        "a list", True, False
    )
    own = tmp_path / "alone" / "chat_template.jinja"
    own.write_text("the folder's own")
    assert templates_of(tmp_path / "alone") == {"default": ("the folder's own", own)}


# Of Hugging Face's tokenizer.json of GPT-2 and OLMoE (whose ByteLevel has it of its own), Qwen3, GLM-4.5, Llama 3 (the
# same, with ignore_merges), and gpt-oss.
LETTERS_BY_CASE = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
)
PATTERNS = {
    "gpt-2": None,
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "glm4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "gpt-4o": LETTERS_BY_CASE + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PATTERNS["llama-bpe"] = PATTERNS["glm4"]
MERGED = ["<|begin|>", "<|end|>", "<|user|>", "<think>", "two words"]
PROSE = [
    "It isn't what WE'VE said: 12345 lists, 1,000 URLs/paths of HTTPServer and camelCase.\r\n\n",
    "\tdef f(x): return x ** 2  # two  spaces\n\n    pass ... !!!",
    "Ein süßer Bär kostet 20 €, \u4f60\u597d\u4e16\u754c \u3053\u3093 \u043f\u0440\u0438 \u2603\U0001f600",
] * 3


def of_merges(pre: str, folder: Path) -> Path:
    """A folder with a small tokenizer.json of bytes' merges, parted as those of some models are."""
    made = tokenizers.Tokenizer(models.BPE())
    alphabet, pattern = pre_tokenizers.ByteLevel.alphabet(), PATTERNS[pre]
    made.pre_tokenizer = parting = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is not None:
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, parting])
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    made.train_from_iterator(PROSE, trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(MERGED[:3])
    made.add_tokens(MERGED[3:])
    if pre == "llama-bpe":
        made.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 380)])
    content = json.loads(made.to_str())
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    if pre == "llama-bpe":  # what no merge makes
        content["model"]["merges"] = content["model"]["merges"][:-40]
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|end|>", "unk_token": "<none>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [381, 382]}))
    return folder


@pytest.fixture(scope="module")
def merged_tokenizers(tmp_path_factory) -> dict[str, tuple[Path, Tokenizer]]:
    """For each way of parting a folder, and the tokenizer of the GGUF file that was written of it, which lies alone."""
    found = {}
    config = small_config(n_layers=1, dim=32, hidden_dim=32, n_heads=4, n_kv_heads=4, vocab_size=390)
    tensors = random_tensors(config, 1)
    for pre in PATTERNS:
        folder = of_merges(pre, tmp_path_factory.mktemp(pre) / "hf")
        write_release(folder.parent / "r", tensors, config, files=1, form="released")
        for path in folder.iterdir():
            shutil.copyfile(path, folder.parent / "r" / path.name)
        convert(folder.parent / "r", folder.parent / "g", to="gguf", type="F32")
        (folder.parent / "alone").mkdir()
        shutil.move(folder.parent / "g" / "model.gguf", folder.parent / "alone" / "m.gguf")
        found[pre] = folder, Tokenizer(folder.parent / "alone")
    return found


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_tokenizer_of_merges_is_the_original(pre, merged_tokenizers, tmp_path):
    folder, found = merged_tokenizers[pre]
    original, theirs = Tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    assert read_header(found.path).values["tokenizer.ggml.pre"] == pre
    convert(found.path.parent, tmp_path / "back", to="hf")
    back, again = Tokenizer(tmp_path / "back"), PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    for other in (found, back):
        assert [other.name(token) for token in range(385)] == [original.name(token) for token in range(385)]
        for name in ("n_words", "bos_id", "eos_id", "eos_ids", "controls", "gaps"):
            assert getattr(other, name) == getattr(original, name), name
        assert {**other.names, "unk_token": "<none>"} == original.names  # which is no token
    assert (found.bos_id, found.eos_ids) == (380 if pre == "llama-bpe" else None, {381, 382})

    @settings(max_examples=80, deadline=None)
    @given(st.text() | st.text("aAbÉé \n\r\t'sST0123/.\u4f60\u0301") | st.lists(st.sampled_from(MERGED)).map("".join))
    def alike(text: str) -> None:
        ids = original.encode(text, True, True)
        assert found.encode(text, True, True) == back.encode(text, True, True) == ids
        assert found.cont(text) == original.cont(text)
        assert found.encode_with_spans(text) == original.encode_with_spans(text)
        assert found.decode(ids) == original.decode(ids)
        assert found.split_controls(text) == original.split_controls(text)
        assert theirs(text).input_ids == again(text).input_ids
        if not any(name in text for name in MERGED[:3]):  # whose names are text here
            assert theirs(text).input_ids == original.encode(text, True, False)

    alike()


# Where llama.cpp's own pattern is the same: it knows case of ASCII's letters alone.
ALIKE = {pre: st.characters(codec="utf-8") for pre in PATTERNS}
ALIKE["gpt-4o"] = st.characters(codec="ascii") | st.characters(categories=["Lo", "N", "Zs", "P", "S"])


@pytest.mark.parametrize("pre", PATTERNS)
def test_llama_cpp_reads_merges_alike(pre, merged_tokenizers):
    folder, found = merged_tokenizers[pre]
    texts = [*PROSE[:2], *MERGED, f"a{'b'.join(MERGED)} c"]

    @settings(max_examples=100, deadline=None, database=None)
    @given(st.text(ALIKE[pre]) | st.text("aAb \n\r\t'sST0123/.\u4f60"))
    def draw(text: str) -> None:
        texts.append(text)

    draw()
    _, theirs = ask_llama_cpp(found.path, texts=texts, marked=texts)
    hf = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = [found.encode(text, True, False) for text in texts] + hf(texts).input_ids
    for text, ids, wanted in zip(texts * 2, theirs, expected, strict=True):
        assert ids == wanted, text


def test_a_model_alone_with_a_tokenizer_of_merges_generates_and_serves(merged_tokenizers, tmp_path):
    _, found = merged_tokenizers["gpt-4o"]
    convert(found.path, tmp_path / "plain")
    asked = ["def f(x)", "It isn't \u4f60"]
    said = [
        MetaModel.from_pretrained(place, max_seq_len=64, dtype="fp32").generate(asked, max_gen_len=12, temperature=0)
        for place in (found.path.parent, tmp_path / "plain")
    ]
    assert said[0] == said[1]
    assert all(said[0])
    with Driver(found.path, slots=2, max_seq_len=64, dtype="fp32", device="cpu") as engine, ServedApi(engine) as api:
        answer = api.openai.completions.create(model=engine.name, prompt=asked, max_tokens=12, temperature=0)
    assert [choice.text for choice in answer.choices] == said[0]


def test_what_of_a_tokenizer_of_merges_llama_cpp_has_not(tmp_path):
    content = json.loads((of_merges("qwen2", tmp_path / "t") / "tokenizer.json").read_text())
    model, added = content["model"], content["added_tokens"]
    split, byte_level = content["pre_tokenizer"]["pretokenizers"]
    digits = {"type": "Digits", "individual_digits": True}

    def parted(*parts: Any) -> dict[str, Any]:
        return {**content, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(parts)}}

    removed = {**split, "behavior": "Removed", "invert": True}
    short = {**model, "ignore_merges": True, "merges": model["merges"][:-1]}
    for changed, says in (
        (content, ""),
        (parted(removed, byte_level), ""),
        ({**content, "model": {**short, "merges": model["merges"]}}, ""),  # what no token shows
        ({**content, "model": short}, "parts texts in a way that no tokenizer.ggml.pre is known for"),
        (parted({**split, "pattern": {"Regex": ".+"}}, byte_level), "parts texts"),
        (parted(digits, split, byte_level), "parts texts"),
        (parted({**split, "invert": True}, byte_level), "parts texts"),
        (parted(split, {**byte_level, "add_prefix_space": True}), "parts texts"),
        ({**content, "pre_tokenizer": {"type": "Metaspace"}}, "parts texts"),
        ({**content, "model": {**model, "byte_fallback": True}}, "is no tokenizer of bytes' merges"),
        ({**content, "model": {**model, "type": "Unigram"}}, "is no tokenizer of bytes' merges"),
    ):
        assert says in gguf_merges.unsaid(changed)
        assert bool(gguf_merges.unsaid(changed)) == bool(says)
    assert gguf_merges.unlike(content) == ""
    odd = {"normalizer": {"type": "NFC"}, "added_tokens": [*added, {**added[0], "content": "<x>", "lstrip": True}]}
    expected = "changes texts before it reads them and takes white space around '<x>'"
    assert gguf_merges.unlike({**content, **odd}) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "bert"}, "has the tokenizer 'bert'"),
        ({"pre": "tekken"}, "has tokenizer.ggml.pre 'tekken'"),
        ({"pre": None}, "has tokenizer.ggml.pre None"),
        ({"merges": None}, "has no merges"),
        ({"merges": ["ab"]}, "has merges that are of no two tokens"),
        ({"merges": ["a c"]}, "is not a tokenizer that the tokenizers library reads"),
        ({"tokens": ["a", "b", "a"]}, "has the token 'a' twice"),
        ({"token_type": [1, 9, 1]}, "no tokens with a type each"),
        ({"eos_token_id": 3}, "eos_token_id is 3, and there are 3 tokens"),
        ({"eos_token_id": None}, "does not say its eos_token"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_with_the_way_out(changes, says, tensors, tmp_path):
    own = {"model": "gpt2", "pre": "qwen2", "tokens": ["a", "b", "ab"], "token_type": [1] * 3, "merges": ["a b"]}
    own |= {"eos_token_id": 2, **changes}
    values = {**metadata_of(CONFIG), **{f"tokenizer.ggml.{key}": value for key, value in own.items()}}
    write_gguf(tmp_path / "m" / "m.gguf", values, gguf_tensors(tensors))
    kind, message = error_of(MetaModel.from_pretrained, tmp_path / "m", max_seq_len=16)
    assert kind in ("ValueError", "FileNotFoundError")
    assert "m.gguf" in message
    assert says in message
    assert ("or name their place with --tokenizer_path" in message) == bool({"pre", "model"} & changes.keys())


def test_a_file_without_a_tokenizer_wants_one(tensors, tmp_path):
    write_gguf(tmp_path / "n" / "m.gguf", metadata_of(CONFIG), gguf_tensors(tensors))
    assert not Folder(tmp_path / "n").has_tokenizer
    assert "has no tokenizer.model" in error_of(MetaModel.from_pretrained, tmp_path / "n", max_seq_len=16)[1]


# -- writing


@pytest.fixture(scope="module")
def release(tensors, small_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "r"
    return write_release(folder, tensors, CONFIG, files=1, form="released", tokenizer=small_tokenizer)


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_what_is_written_is_what_the_package_reads(type, tensors, release, small_tokenizer, tmp_path):
    convert(release, tmp_path / "g", to="gguf", type=type)
    assert sorted(path.name for path in (tmp_path / "g").iterdir()) == [
        "manifest.json",
        "model.gguf",
        "tokenizer.model",
    ]
    reader = gguf.GGUFReader(tmp_path / "g" / "model.gguf")
    expected = gguf_tensors(tensors)
    assert {own.name for own in reader.tensors} == set(expected)
    for own in reader.tensors:
        tensor = expected[own.name]
        of_matrices = Kind[type if type != "MXFP4" or "_exps" in own.name else "Q8_0"]
        kind = Kind.F32 if tensor.ndim == 1 or "gate_inp" in own.name else of_matrices
        assert own.tensor_type == kind, own.name
        assert tuple(reversed(own.shape.tolist())) == tuple(tensor.shape)
        coded = coded_as(tensor, kind)
        assert np.array_equal(np.asarray(own.data).view(np.uint8), coded.view(np.uint8)), own.name
    said = {key: own.contents() for key, own in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: said[key] for key in metadata_of(CONFIG)} == {
        **metadata_of(CONFIG),
        "llama.context_length": 2048,  # where a release says none
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    }
    assert gguf.LlamaFileType(said["general.file_type"]).name.removesuffix("_MOE").endswith(type)
    assert (said["general.name"], said["llama.vocab_size"], said["tokenizer.ggml.add_bos_token"]) == ("g", 384, True)
    original = sentencepiece.SentencePieceProcessor(model_file=str(small_tokenizer))
    assert said["tokenizer.ggml.tokens"] == [original.id_to_piece(token) for token in range(384)]
    np.testing.assert_array_equal(
        np.float32(said["tokenizer.ggml.scores"]), np.float32([original.get_score(token) for token in range(384)])
    )
    token_types = gguf.TokenType
    for token, kind in enumerate(said["tokenizer.ggml.token_type"]):
        asked = {
            token_types.UNKNOWN: original.is_unknown,
            token_types.CONTROL: original.is_control,
            token_types.BYTE: original.is_byte,
        }
        assert [own for own, ask in asked.items() if ask(token)] == ([kind] if kind != token_types.NORMAL else [])
    assert {role: said[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "unknown")} == {
        "bos": 1,
        "eos": 2,
        "unknown": 0,
    }


def test_rows_that_blocks_do_not_divide_are_f16(small_tokenizer, tmp_path):
    config = small_config(n_layers=1)  # hidden_dim is 48
    tensors = random_tensors(config, 2)
    write_release(tmp_path / "r", tensors, config, files=1, form="released", tokenizer=small_tokenizer)
    convert(tmp_path / "r", tmp_path / "g", to="gguf", type="Q8_0")
    kinds = {own.name: own.tensor_type for own in gguf.GGUFReader(tmp_path / "g" / "model.gguf").tensors}
    assert {name for name, kind in kinds.items() if kind == Kind.F16} == {"blk.0.ffn_down_exps.weight"}


def test_values_that_blocks_cannot_hold_are_refused(tmp_path):
    config = small_config(n_layers=1)
    tensors = random_tensors(config, 2)
    tensors["layers.0.attention.wk.weight"][3, 5] = float("inf")
    write_release(tmp_path / "r", tensors, config, files=1, form="released")
    kind, message = error_of(convert, tmp_path / "r", tmp_path / "g", to="gguf", type="Q8_0")
    assert kind == "CheckpointError"
    assert "blk.0.attn_k.weight would hold values that are NaN or infinite, which Q8_0 cannot" in message
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_gives_the_bytes_back(dtype, small_tokenizer, tmp_path):
    odd = {"rope_scaling": 0.3, "norm_eps": 1.23456789e-5, "rope_theta": 12345.678, "load_balancing_weight": 0.25}
    config = small_config(n_layers=1, n_kv_heads=2, **odd)
    tensors = random_tensors(config, 4, dtype)
    source = write_release(tmp_path / "s", tensors, config, files=2, form="sparse", tokenizer=small_tokenizer)
    convert(source, tmp_path / "g", to="gguf")
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert gguf.LlamaFileType(read_header(tmp_path / "g" / "model.gguf").values["general.file_type"]).name.endswith(
        name
    )
    convert(tmp_path / "g", tmp_path / "back", to="accessory-sparse", mp=2, dtype=dtype)
    for path in source.glob("*.pth"):
        first, second = (torch.load(folder / path.name)["model"] for folder in (source, tmp_path / "back"))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert tensor.dtype == second[key].dtype
            assert torch.equal(tensor, second[key]), key
    assert Folder(tmp_path / "back").load_args() == Folder(source).load_args()
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == small_tokenizer.read_bytes()


def test_settings_that_float32_does_not_hold_are_said(small_tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("accessory.checkpoint.write.logger.propagate", True)
    config = small_config(n_layers=1, rope_scaling=0.3, load_balancing_weight=0.5)
    write_release(tmp_path / "r", random_tensors(config, 1), config, files=1, tokenizer=small_tokenizer)
    with caplog.at_level("WARNING", logger="accessory.checkpoint.write"):
        convert(tmp_path / "r", tmp_path / "g", to="gguf")
    assert "cannot say rope_scaling 0.3, load_balancing_weight 0.5, which other programs will not know" in caplog.text


def test_an_adapter_is_merged_from_and_into_gguf(small_tokenizer, tmp_path):
    config = small_config(dim=32, hidden_dim=32, n_layers=1)
    peft = {**PEFT, "bias_tuning": False, "norm_tuning": False}
    tensors = random_tensors(config, 1)
    write_release(tmp_path / "r", tensors, config, files=1, form="released", tokenizer=small_tokenizer)
    convert(tmp_path / "r", tmp_path / "g", to="gguf")
    alone = random_adapter(config, 2, biases=False)
    adapter = write_adapter(tmp_path / "adapter", alone, config, files=1, tokenizer=small_tokenizer, peft=peft)
    merge(tmp_path / "r", adapter, tmp_path / "truth", to="mistral")
    merge(tmp_path / "g", adapter, tmp_path / "merged", to="gguf")
    expected = load_file(tmp_path / "truth" / "consolidated.safetensors")
    assert_equal(released(tmp_path / "merged", tmp_path / "out"), expected)
    assert not torch.equal(expected["layers.0.attention.wq.weight"], tensors["layers.0.attention.wq.weight"])


def test_the_command_says_which_of_type_and_dtype(release, tmp_path, capsys):
    assert main(["convert", str(release), str(tmp_path / "g"), "--to", "gguf", "--type", "Q4_0"]) == 0
    assert read_header(tmp_path / "g" / "model.gguf").values["general.file_type"] == 2
    assert main(["convert", str(release), str(tmp_path / "h"), "--to", "gguf", "--dtype", "bf16"]) == 0
    assert read_header(tmp_path / "h" / "model.gguf").values["general.file_type"] == 32
    both = ["--to", "gguf", "--dtype", "bf16", "--type", "F16"]
    assert main(["convert", str(release), str(tmp_path / "i"), *both]) == 1
    assert "gguf takes one of them" in capsys.readouterr().err
    assert main(["convert", str(release), str(tmp_path / "i"), "--to", "hf", "--type", "F16"]) == 1
    assert "type F16 is of gguf, and hf has none" in capsys.readouterr().err


# -- llama.cpp itself


@pytest.fixture(scope="module")
def hf() -> Any:
    return random_mixtral(3, hidden_size=64, intermediate_size=64)


@pytest.fixture(scope="module")
def hf_gguf(hf, small_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    hf.save_pretrained(folder / "hf")
    shutil.copyfile(small_tokenizer, folder / "hf" / "tokenizer.model")
    convert(folder / "hf", folder / "gguf", to="gguf", type="F32")
    return folder / "gguf"


def test_llama_cpp_says_the_same_tokens(hf, hf_gguf):
    """Which also shows that rows of q and k have the order of the release there: this model's are of Hugging Face's."""
    prompts = random_prompts(5, (4, 9, 17, 30))
    assert says_as_transformers(hf_gguf / "model.gguf", hf, prompts=prompts, count=12) > 40


def test_llama_cpp_tokenizes_alike(hf_gguf, small_tokenizer):
    original = Tokenizer(small_tokenizer)
    texts = [
        "a list of things",
        "  two  spaces and\ttab\nline \n\n",
        "<s>[INST] no control </s>",
        "\u4f60\u597d \U0001f600 caf\u00e9 \u00df",
        "x" * 50,
        "def f(x):\n    return x ** 2  # 123456",
        Path(__file__).read_text()[:3000],
    ]
    _, found = ask_llama_cpp(hf_gguf / "model.gguf", texts=texts)
    assert found == [original.encode(text, True, False) for text in texts]


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0", "MXFP4"])
def test_llama_cpp_loads_blocks_and_says_nearly_what_we_do(type, hf_gguf, small_tokenizer, tmp_path):
    convert(hf_gguf, tmp_path / "g", to="gguf", type=type)
    ours = MetaModel.from_pretrained(tmp_path / "g", max_seq_len=64, dtype="fp32").llma
    (prompt,) = random_prompts(6, (11,))
    with torch.inference_mode():
        truth = ours(torch.tensor([prompt]))[0][0, -1].log_softmax(-1)
    [[(_, best)]], _ = ask_llama_cpp(tmp_path / "g" / "model.gguf", prompts=[prompt])
    for token, probability in best.items():
        # llama.cpp rounds the inputs of such products to 8 bits.
        assert abs(probability - truth[token].item()) < 0.1


def test_llama_cpp_loads_a_padded_vocabulary_and_added_tokens(small_tokenizer, tmp_path):
    added = {"384": {"content": "<|end|>", "special": True}}
    with_tokenizer(
        tmp_path / "r",
        small_tokenizer,
        tmp_path / "g",
        vocab_size=392,
        tokenizer_config={"added_tokens_decoder": added},
    )
    text = "a <|end|> b"
    _, found = ask_llama_cpp(tmp_path / "g" / "model.gguf", texts=[text])
    assert found == [Tokenizer(tmp_path / "r").encode(text, True, False)]


def test_a_file_of_its_own_writer_is_the_same_to_us_and_to_llama_cpp(hf, small_tokenizer, tmp_path):
    """Not a byte of the file is written by the library."""
    sizes = {
        **small_config(dim=64, hidden_dim=64, n_kv_heads=4),
        "rope_theta": hf.config.rope_parameters["rope_theta"],
        "norm_eps": hf.config.rms_norm_eps,
    }
    processor = sentencepiece.SentencePieceProcessor(model_file=str(small_tokenizer))
    types = [
        2 if processor.is_unknown(t) else 3 if processor.is_control(t) else 6 if processor.is_byte(t) else 1
        for t in range(384)
    ]
    text = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [processor.id_to_piece(token) for token in range(384)],
        "tokenizer.ggml.scores": [processor.get_score(token) for token in range(384)],
        "tokenizer.ggml.token_type": types,
    }
    path = write_gguf(tmp_path / "m" / "m.gguf", {**metadata_of(sizes), **text}, gguf_tensors(whole_tensors(hf)))
    model = MetaModel.from_pretrained(tmp_path / "m", max_seq_len=64, dtype="fp32")
    original = Tokenizer(small_tokenizer)
    assert model.tokenizer.encode("a list of things", True, True) == original.encode("a list of things", True, True)
    (prompt,) = random_prompts(2, (9,))
    with torch.inference_mode():
        torch.testing.assert_close(
            model.llma(torch.tensor([prompt]))[0][0], hf_logits(hf, prompt), rtol=1e-5, atol=1e-5
        )
    truth = hf_logits(hf, prompt)[-1].log_softmax(-1)
    [[(_, best)]], _ = ask_llama_cpp(path, prompts=[prompt])
    for token, probability in best.items():
        assert abs(probability - truth[token].item()) < 1e-3


# -- damage


@contextmanager
def within(megabytes: float) -> Iterator[None]:
    """What happens takes so much memory at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < megabytes


@pytest.fixture(scope="module")
def small_file(small_tokenizer, tmp_path_factory) -> tuple[bytes, int, Tensors]:
    """A file, where its tensors begin, and what they are."""
    config = small_config(n_layers=1, dim=32, hidden_dim=32, n_heads=4, n_kv_heads=2)
    config["moe"] = {"num_experts": 2, "num_experts_per_tok": 2}
    tensors = random_tensors(config, 1)
    folder = tmp_path_factory.mktemp("small")
    write_release(folder / "r", tensors, config, files=1, form="released", tokenizer=small_tokenizer)
    convert(folder / "r", folder / "g", to="gguf", type="F32")
    path = folder / "g" / "model.gguf"
    begin = min(own.offset for own in read_header(path).tensors)
    return path.read_bytes(), begin, tensors


def read_all(folder: Path) -> Tensors:
    opened = Folder(folder)
    args = opened.stored_args()
    weights = opened.weights(args)
    if Tokenizer.find(folder) is not None:
        assert Tokenizer(folder).n_words <= args.vocab_size
    return {
        source.key: weights.read(source.parameter, source.box)
        for source in weights.layout.sources(args, 1)
        if source.written
    }


def test_damage_anywhere_in_the_header_is_one_line(small_file, tmp_path):
    data, begin, tensors = small_file
    expected = gguf_tensors(tensors)
    chooses = np.random.default_rng(0)
    places = {*range(24), *chooses.integers(0, begin, 150).tolist()}
    names = [data.index(key) for key in (b"llama.block_count", b"llama.expert_count", b"blk.0.attn_q.weight", b"bos_")]
    places |= {place + offset for place in names for offset in range(0, 40, 3)}
    refused = unnamed = 0
    with within(1000):
        for place in sorted(places):
            for value in (data[place] ^ 1 << int(chooses.integers(0, 8)), 255):
                damaged = data[:place] + bytes([value]) + data[place + 1 :]
                (tmp_path / "m.gguf").write_bytes(damaged)
                try:
                    found = read_all(tmp_path)
                except ValueError as error:
                    refused += "m.gguf" in str(error)
                    unnamed += "m.gguf" not in str(error)
                else:
                    assert all(torch.equal(found[key].reshape(value.shape), value) for key, value in expected.items())
    assert not unnamed
    assert refused > len(places) / 4


def test_a_truncated_file_is_one_line(small_file, tmp_path):
    data, begin, _ = small_file
    chooses = np.random.default_rng(1)
    lengths = [0, 3, 4, 7, 23, 24, *chooses.integers(24, begin, 20).tolist(), begin, *range(begin, len(data), 9973)]
    for length in [*lengths, len(data) - 1]:
        (tmp_path / "m.gguf").write_bytes(data[:length])
        kind, message = error_of(lambda: read_all(tmp_path))
        assert kind == "CheckpointError", (length, message)
        assert "m.gguf" in message


def patched(data: bytes, place: int, form: str, *values: int) -> bytes:
    new = struct.pack(form, *values)
    return data[:place] + new + data[place + len(new) :]


def behind(data: bytes, name: bytes, offset: int = 0) -> int:
    return data.index(name) + len(name) + offset


HUGE = (1 << 63) - 1
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "no magic": lambda data: b"GGML" + data[4:],
    "version 1": lambda data: patched(data, 4, "<I", 1),
    "big-endian": lambda data: patched(data, 4, ">I", 3),
    "many tensors": lambda data: patched(data, 8, "<Q", HUGE),
    "more tensors": lambda data: patched(data, 8, "<Q", 200_000),
    "no tensors": lambda data: patched(data, 8, "<Q", 0),
    "many keys": lambda data: patched(data, 16, "<Q", 1 << 40),
    "one key more": lambda data: patched(data, 16, "<Q", struct.unpack_from("<Q", data, 16)[0] + 1),
    "one key less": lambda data: patched(data, 16, "<Q", struct.unpack_from("<Q", data, 16)[0] - 1),
    "a long key": lambda data: patched(data, 24, "<Q", HUGE),
    "a long array": lambda data: patched(data, behind(data, b"tokenizer.ggml.tokens", 8), "<Q", HUGE),
    "a long enough array": lambda data: patched(data, behind(data, b"tokenizer.ggml.scores", 8), "<Q", 1 << 30),
    "nested arrays": lambda data: patched(data, behind(data, b"tokenizer.ggml.tokens", 4), "<I", 9),
    "an unknown type of value": lambda data: patched(data, behind(data, b"llama.block_count"), "<I", 77),
    "many layers": lambda data: patched(data, behind(data, b"llama.block_count", 4), "<I", 0xFFFFFFFF),
    "many experts": lambda data: patched(data, behind(data, b"llama.expert_count", 4), "<I", 1 << 30),
    "no heads": lambda data: patched(data, behind(data, b"llama.attention.head_count", 4), "<I", 0),
    "wide": lambda data: patched(data, behind(data, b"llama.embedding_length", 4), "<I", 1 << 31),
    "no axes": lambda data: patched(data, behind(data, b"token_embd.weight"), "<I", 0),
    "many axes": lambda data: patched(data, behind(data, b"token_embd.weight"), "<I", 1 << 30),
    "a long axis": lambda data: patched(data, behind(data, b"token_embd.weight", 4), "<Q", HUGE),
    "an empty axis": lambda data: patched(data, behind(data, b"token_embd.weight", 4), "<Q", 0),
    "lengths that overflow": lambda data: patched(data, behind(data, b"token_embd.weight", 4), "<QQ", 1 << 32, 1 << 32),
    "an unknown type": lambda data: patched(data, behind(data, b"token_embd.weight", 20), "<I", 999),
    "blocks of odd rows": lambda data: patched(data, behind(data, b"token_embd.weight", 20), "<I", 14),
    "an offset beyond the end": lambda data: patched(data, behind(data, b"token_embd.weight", 24), "<Q", HUGE - 31),
    "an odd offset": lambda data: patched(data, behind(data, b"token_embd.weight", 24), "<Q", 7),
    "an overlap": lambda data: patched(data, behind(data, b"token_embd.weight", 24), "<Q", 64),
    "the same place": lambda data: patched(data, behind(data, b"output.weight", 24), "<Q", 0),
    "a name twice": lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight"),
    "another name": lambda data: data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_p.weight"),
    "no UTF-8": lambda data: data.replace(b"general.architecture", b"general.architectur\xff"),
    "another architecture": lambda data: data.replace(
        b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\5\0\0\0\0\0\0\0lla\nx"
    ),
    "an empty file": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damage_is_named_with_its_file(damage, small_file, tmp_path):
    damaged = DAMAGES[damage](small_file[0])
    assert damaged != small_file[0]
    (tmp_path / "m.gguf").write_bytes(damaged)
    with within(500):
        kind, message = error_of(lambda: read_all(tmp_path))
    assert kind == "CheckpointError", message
    assert "m.gguf" in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("alignment", [0, 1, 3, 33, 1 << 31])
def test_odd_alignments_are_refused(alignment, tensors, tmp_path):
    values = {**metadata_of(CONFIG), "general.alignment": 64}
    path = write_gguf(tmp_path / "m" / "m.gguf", values, gguf_tensors(tensors))
    read_header(path)
    path.write_bytes(patched(path.read_bytes(), behind(path.read_bytes(), b"general.alignment", 4), "<I", alignment))
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        open_gguf(path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    for call in (lambda: Folder(tmp_path).stored_args(), lambda: open_gguf(tmp_path / "m.gguf")):
        kind, message = error_of(call)
        assert kind == "CheckpointError"
        assert "m.gguf is no plain file" in message
    (tmp_path / "m.gguf").unlink()
    (tmp_path / "m.gguf").symlink_to("m.gguf")
    assert error_of(lambda: Folder(tmp_path).stored_args())[0] in ("CheckpointError", "FileNotFoundError")
