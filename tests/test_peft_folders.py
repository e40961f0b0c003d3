"""Adapters that peft has written: loaded above a base and merged into it. peft's own logits are the truth."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import random_mixtral, random_prompts
from ranks import error_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.adapter_export import export_adapter
from accessory.checkpoint.convert import convert
from accessory.checkpoint.merge import merge
from accessory.checkpoint.report import describe
from accessory.errors import CheckpointError
from accessory.model.meta import MetaModel

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore:.*pattern keys did not match", "ignore:Setting `save_embedding_layers`"
)

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 4, "lora_alpha": 6},
    "two of four": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "some layers": {"target_modules": ["k_proj", "o_proj"], "r": 2, "layers_to_transform": [1]},
    "fused experts": {"target_modules": ["q_proj"], "target_parameters": FUSED, "r": 3, "lora_alpha": 5},
    "down before gate_up": {"target_modules": [], "target_parameters": FUSED[::-1], "r": 2},
    "gate_up alone": {"target_modules": ["o_proj"], "target_parameters": FUSED[:1], "r": 2},
    "experts as transformers 4": {"target_modules": ["v_proj", "w1", "w2", "w3"], "r": 4},
    "ranks of their own": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"k_proj": 2, r".*layers\.1\.self_attn\.q_proj": 6},
        "alpha_pattern": {"o_proj": 3},
    },
    "router and head": {
        "target_modules": ["q_proj", "lm_head"],
        "target_parameters": ["mlp.gate.weight"],
        "r": 5,
        "alpha_pattern": {"mlp.gate.weight": 3},
        "rank_pattern": {"lm_head": 7},
    },
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 5, "lora_alpha": 7, "use_rslora": True},
    "norms": {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["norm", "input_layernorm"]},
}


def adapted(folder: Path, **config: Any) -> Any:
    """A random model with an adapter that does something, which peft has saved."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(random_mixtral(7), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "modules_to_save" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def base(small_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "m"
    random_mixtral(7).save_pretrained(folder)
    shutil.copyfile(small_tokenizer, folder / "tokenizer.model")
    return folder


def logits_of(folders: list[Path], prompt: list[int]) -> Tensor:
    model = MetaModel.from_pretrained(folders, max_seq_len=64, dtype="fp32", mp_group=dist.group.WORLD)
    with torch.inference_mode():
        return model.llma(torch.tensor([prompt]))[0][0]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_loads_above_its_base(name, base, ranks, tmp_path):
    peft = adapted(tmp_path / "adapter", **CONFIGS[name])
    (prompt,) = random_prompts(3, (9,))
    with torch.no_grad():
        truth = peft(torch.tensor([prompt])).logits[0]
    assert (truth - random_mixtral(7)(torch.tensor([prompt])).logits[0]).abs().max() > 0.01
    for size in (1, 2):
        for logits in ranks(size).run(logits_of, [base, tmp_path / "adapter"], prompt):
            torch.testing.assert_close(logits[:, :384], truth, rtol=1e-4, atol=1e-4)
    merge(base, tmp_path / "adapter", tmp_path / "merged", to="hf")
    (logits,) = ranks(1).run(logits_of, [tmp_path / "merged"], prompt)
    torch.testing.assert_close(logits[:, :384], truth, rtol=1e-4, atol=1e-4)
    assert "behind the folder of its base" in "\n".join(describe(tmp_path / "adapter"))


@pytest.mark.parametrize("name", ["attention", "fused experts", "norms", "rslora"])
def test_what_was_read_is_written_for_peft_again(name, base, ranks, tmp_path):
    """By way of our own folder: merged and read are the same, so is what export-adapter makes of a run's adapter."""
    adapted(tmp_path / "adapter", **CONFIGS[name])
    model = MetaModel.from_pretrained([base, tmp_path / "adapter"], max_seq_len=64, dtype="fp32")
    from accessory.train.export import export_checkpoint

    export_checkpoint(model, tmp_path / "own", dtype=torch.float32, only_trainable=True)
    export_adapter(tmp_path / "own", tmp_path / "again")
    given, made = (json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("adapter", "again"))
    for key in ("r", "lora_alpha", "use_rslora"):
        assert made.get(key, False) == given[key], key
    (prompt,) = random_prompts(3, (9,))
    first, second = (ranks(1).run(logits_of, [base, tmp_path / folder], prompt)[0] for folder in ("adapter", "again"))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_lies_alone_knows_its_base(base, small_tokenizer, tmp_path):
    """Its base in any dtype and form, plain or quantized, and no other model of the same sizes."""
    adapted(tmp_path / "adapter", **CONFIGS["attention"])
    model = MetaModel.from_pretrained([base, tmp_path / "adapter"], max_seq_len=64, dtype="fp32")
    from accessory.train.export import export_checkpoint

    export_checkpoint(model, own := tmp_path / "own", dtype=torch.bfloat16, only_trainable=True)
    for dtype, form in ((torch.bfloat16, "accessory"), (torch.float16, "mistral")):
        convert(base, tmp_path / form, to=form, dtype=dtype)
        MetaModel.from_pretrained([tmp_path / form, own], max_seq_len=64, quant="int8")
    merge(tmp_path / "mistral", own, tmp_path / "merged")
    random_mixtral(8).save_pretrained(other := tmp_path / "other")
    shutil.copyfile(small_tokenizer, other / "tokenizer.model")
    for put_together in (
        lambda: MetaModel.from_pretrained([other, own], max_seq_len=64),
        lambda: merge(other, own, tmp_path / "x"),
    ):
        with pytest.raises(CheckpointError, match=f"{own} is an adapter of another base than {other}, .*: give the"):
            put_together()
    assert not (tmp_path / "x").exists()


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def set_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


PREFIX = "base_model.model.model.layers.0"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "dora": (set_config(use_dora=True), "use_dora is True"),
    "alora": (set_config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens is [1, 2]"),
    "replicated layers": (set_config(layer_replication=[[0, 1], [0, 1]]), "layer_replication"),
    "trained tokens": (set_config(trainable_token_indices=[5]), "trainable_token_indices"),
    "pissa": (set_config(init_lora_weights="pissa_niter_16"), "let peft convert it"),
    "olora": (set_config(init_lora_weights="olora"), "let peft convert it"),
    "biases": (set_config(bias="all"), "bias is 'all'"),
    "another method": (set_config(peft_type="IA3"), "peft_type is 'IA3'"),
    "no alpha": (set_config(lora_alpha=None), "lora_alpha is None"),
    "patterns": (set_config(alpha_pattern=[1]), "alpha_pattern must be an object"),
    "no config": (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "half an update": (
        set_tensors(lambda tensors: tensors.pop(f"{PREFIX}.self_attn.q_proj.lora_A.weight")),
        "q_proj.lora_B.weight but not model.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    "a head": (
        set_tensors(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(384, 32)})),
        "lm_head.weight that the model does not have",
    ),
    "of the embedding": (
        set_tensors(
            lambda tensors: tensors.update(
                {
                    "base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 384),
                    "base_model.model.model.embed_tokens.lora_B.weight": torch.ones(32, 4),
                }
            )
        ),
        "embed_tokens.lora_A.weight",
    ),
    "another width": (
        set_tensors(lambda tensors: tensors.update({f"{PREFIX}.self_attn.q_proj.lora_A.weight": torch.ones(4, 31)})),
        "has shape (4, 31)",
    ),
    "nothing": (set_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors)[1:]]), "but not"),
}


@pytest.fixture(scope="module")
def plain_adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    adapted(folder, **CONFIGS["attention"])
    return folder


@pytest.mark.parametrize("name", SPOILT)
def test_what_has_no_place_is_refused_by_name(name, base, plain_adapter, tmp_path):
    spoil, says = SPOILT[name]
    folder = shutil.copytree(plain_adapter, tmp_path / "a")
    spoil(folder)
    kind, message = error_of(MetaModel.from_pretrained, [base, folder], max_seq_len=64)
    assert kind == "CheckpointError", message
    assert re.search(re.escape(says), message), message
    assert str(folder) in message
    assert error_of(merge, base, folder, tmp_path / "out")[0] == "CheckpointError"
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_asks_for_its_base(plain_adapter):
    kind, message = error_of(MetaModel.from_pretrained, plain_adapter, max_seq_len=64)
    assert (kind, "give the folder of its base before it" in message) == ("CheckpointError", True)
