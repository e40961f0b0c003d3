"""Every family beside transformers: logits, greedy tokens, gradients, folders there and back. A new one adds a row."""

import itertools
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from ask_llama import says_as_transformers
from checkpoints import hf_greedy, hf_logits, random_prompts
from finetuning import Setting, finetune_on_rank, log_lines, make_setting
from models import assembled, completions, load
from ranks import RankPool, alike, assert_same, on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from accessory.checkpoint.adapter_export import export_adapter
from accessory.checkpoint.blocks import Blocks, open_gguf
from accessory.checkpoint.convert import convert
from accessory.checkpoint.diff import diff
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.layouts import load_args, written_layout
from accessory.checkpoint.layouts.gguf import sizes as sizes_of_gguf
from accessory.checkpoint.layouts.hf import config_of
from accessory.checkpoint.layouts.hf import sizes as sizes_of_config
from accessory.checkpoint.merge import merge
from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.checkpoint.report import describe
from accessory.cli import main
from accessory.config import DenseArgs, ModelArgs, MoEArgs, QuantArgs, RopeArgs, RouterArgs
from accessory.data.collate import Batch
from accessory.errors import CheckpointError
from accessory.generation.sampling import Sampling
from accessory.gguf_header import header_bytes, read_header
from accessory.kernels import route
from accessory.model.balance import RouterStats, load_balancing_loss
from accessory.model.LLM import FAMILIES
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.model.rope import RotaryTable
from accessory.model.router import routed
from accessory.parallel.state import ParallelState, all_ranks
from accessory.quant import QuantizedParameter
from accessory.serve.ranks import serve_on_ranks
from accessory.serve.request import Engine
from accessory.serve.web.experts import heatmap
from accessory.train import checkpointer
from accessory.train.build import build_for_training
from accessory.train.checkpointer import Checkpointer
from accessory.train.export import export_checkpoint
from accessory.train.flops import flops_per_token
from accessory.train.heatmap import draw
from accessory.train.metrics import expert_shares
from accessory.train.optim import adamw
from accessory.train.options import DataParallel
from accessory.train.recompute import recompute_activations
from accessory.train.sharding import device_mesh
from accessory.train.snapshot import tensors_of
from accessory.train.trainer import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]
NEW_TOKENS = 24


@dataclass(frozen=True)
class Case:
    """A small model: transformers' classes and settings of it, beside those that all have."""

    classes: str
    settings: dict[str, Any]


SHARED = {
    "vocab_size": 384,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 3,
    "experts_implementation": "eager",
}
# Beyond the original length from early on.
SLOWED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
YARN = {**SLOWED, "rope_type": "yarn", "beta_fast": 4.0, "truncate": False}
LLAMA3 = {
    **SLOWED,
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "partial_rotary_factor": 0.5,
}
QWEN3 = {"num_experts": 8, "head_dim": 12, "moe_intermediate_size": 24, "intermediate_size": 40}
GLM = {
    "n_routed_experts": 8,
    "head_dim": 12,
    "moe_intermediate_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "pad_token_id": None,
}
MINIMAX = {"num_local_experts": 12, "head_dim": 10, "intermediate_size": 16}
OLMOE = {"num_experts": 16, "intermediate_size": 20, "eos_token_id": None, "pad_token_id": None}
GPT_OSS = {
    "num_local_experts": 8,
    "head_dim": 8,
    "intermediate_size": 32,
    "sliding_window": 8,
    "swiglu_limit": 0.6,
    "eos_token_id": None,
    "pad_token_id": None,
}
CASES = {
    "mixtral": Case("Mixtral", {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8}),
    "qwen3_moe": Case("Qwen3Moe", {**QWEN3, "norm_topk_prob": True}),
    "qwen3_moe, as probable as they are": Case("Qwen3Moe", {**QWEN3, "norm_topk_prob": False}),
    "qwen3_moe, with dense layers": Case(
        "Qwen3Moe",
        {**QWEN3, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "rope_parameters": YARN},
    ),
    "glm4_moe": Case(
        "Glm4Moe", {**GLM, "attention_bias": True, "routed_scaling_factor": 1.5, "rope_parameters": LLAMA3}
    ),
    "glm4_moe, in groups": Case(
        "Glm4Moe",
        {
            **GLM,
            "partial_rotary_factor": 1.0,
            "n_group": 4,
            "topk_group": 2,
            "use_qk_norm": True,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
        },
    ),
    "minimax_m2": Case("MiniMaxM2", {**MINIMAX, "rotary_dim": 6}),
    "minimax_m2, 2 kv heads": Case("MiniMaxM2", {**MINIMAX, "num_key_value_heads": 2}),
    "gpt_oss": Case("GptOss", GPT_OSS),
    "gpt_oss, 2 kv heads": Case(
        "GptOss",
        {
            **GPT_OSS,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 21,
            "attention_bias": False,
            "swiglu_alpha": 1.2,
            "rope_parameters": {**YARN, "truncate": True, "attention_factor": 1.3},
        },
    ),
    "olmoe": Case("Olmoe", {**OLMOE, "num_key_value_heads": 8}),
    "olmoe, clipped, 2 kv heads": Case(
        "Olmoe", {**OLMOE, "num_key_value_heads": 2, "clip_qkv": 0.9, "norm_topk_prob": True}
    ),
}


@dataclass(frozen=True)
class Made:
    """A case's model by transformers, and its folder."""

    hf: Any
    folder: Path


def write_folder_of(case: Case, tokenizer: Path, folder: Path, seed: int) -> Made:
    """A case's model with weights, norms and biases all drawn."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{case.classes}Config")(**(SHARED | case.settings))
    hf = getattr(transformers, f"{case.classes}ForCausalLM")(config).eval().float()
    with torch.no_grad():
        for own, parameter in hf.named_parameters():
            # Biases so large that limits of gated units are met.
            std = 0.6 * config.swiglu_limit if own.endswith("gate_up_proj_bias") else 0.15
            parameter.uniform_(0.5, 1.5) if own.endswith("norm.weight") else parameter.normal_(std=std)
        for own, buffer in hf.named_buffers():
            if own.endswith("correction_bias"):
                buffer.normal_(std=0.2)
    hf.save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return Made(hf, folder)


@pytest.fixture(scope="module")
def made(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def of(name: str) -> Made:
        return write_folder_of(CASES[name], small_tokenizer, tmp_path_factory.mktemp("families") / "folder", 3)

    return of


def test_a_family_of_ours_that_nobody_knows_is_refused(
    made: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(made("olmoe").folder, tmp_path / "own")
    path = tmp_path / "own" / "config.json"
    for family in ("olmo", 5, ["olmoe"]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "family": family}))
        assert main(["convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to", "hf"]) == 1
        assert f"{path}: family" in capsys.readouterr().err


def test_every_family_has_a_row_in_every_table() -> None:
    for table in (CASES, TARGETS):
        assert {name.partition(",")[0] for name in table} == {*FAMILIES}
    assert {f"{classes}ForCausalLM" for classes in DRAWN} == {family.architecture for family in FAMILIES.values()}
    # Of Mixtral other files have these.
    others = {*FAMILIES} - {"mixtral"}
    assert {name.partition(",")[0] for name in QUANTIZED} == others
    assert {name.partition(",")[0] for name in IN_GGUF} == {name for name in others if FAMILIES[name].gguf is not None}


# --- logits and greedy tokens


def said_on_rank(folder: Path, placement: str, prompts: list[list[int]], examples: list[list[int]]) -> Any:
    model = load(folder, placement)
    return model.compute_logits(examples), completions(model.llma, prompts, max_gen_len=NEW_TOKENS)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    name: str, size: int, made: Callable[[str], Made], ranks: Pools
) -> None:
    own = made(name)
    prompts = random_prompts(5, (1, 7, 19))
    greedy = [hf_greedy(own.hf, prompt, NEW_TOKENS) for prompt in prompts]
    examples = [prompt + tokens for prompt, tokens in zip(prompts, greedy, strict=True)]
    for placement in ("expert", "tensor"):
        logits, tokens = alike(on_ranks(ranks, size, said_on_rank, own.folder, placement, prompts, examples))
        for ours, example in zip(logits, examples, strict=True):
            torch.testing.assert_close(ours, hf_logits(own.hf, example), atol=1e-4, rtol=0)
        assert tokens == greedy


@pytest.mark.parametrize("name", CASES)
def test_a_server_s_answers_are_generate_s(name: str, made: Callable[[str], Made]) -> None:
    """Prompts read in pieces of 16 tokens, through two slots."""
    folder = made(name).folder
    texts = ["The list method", "a", "def f(x):\n    return x", "one two three four five six seven eight nine ten"]
    expected = load(folder).generate(texts, max_gen_len=NEW_TOKENS)
    answers: list[str] = []

    def program(engine: Engine) -> None:
        sampling = Sampling(max_gen_len=NEW_TOKENS)
        streams = [engine.submit(engine.tokenizer.encode(text, True, False), sampling) for text in texts]
        answers.extend("".join(event.text for event in stream) for stream in streams)

    serve_on_ranks(program, folder, max_seq_len=128, dtype="fp32", device="cpu", slots=2, prefill_tokens=16)
    assert answers == expected


# What of each family's settings is drawn beside the sizes.
DRAWN: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "Mixtral": lambda rng: {"num_local_experts": rng.choice([4, 6, 8]), "intermediate_size": 4 * rng.randint(1, 9)},
    "Qwen3Moe": lambda rng: {
        "num_experts": rng.choice([4, 8, 16]),
        "moe_intermediate_size": 4 * rng.randint(1, 9),
        "intermediate_size": 4 * rng.randint(1, 9),
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.choice([1, 2]),
        "mlp_only_layers": rng.sample([1, 2, 4], rng.randint(0, 2)),
        "num_hidden_layers": 5,
    },
    "Olmoe": lambda rng: {
        "num_experts": rng.choice([4, 8, 16]),
        "intermediate_size": 4 * rng.randint(1, 9),
        "clip_qkv": rng.choice([None, 0.5, 2.0]),
        "norm_topk_prob": rng.random() < 0.5,
        "eos_token_id": None,
        "pad_token_id": None,
    },
    "Glm4Moe": lambda rng: {
        **GLM,
        "moe_intermediate_size": 4 * rng.randint(1, 9),
        "intermediate_size": 4 * rng.randint(1, 9),
        "first_k_dense_replace": rng.randint(0, 2),
        "n_group": (groups := rng.choice([1, 2, 4])),
        "topk_group": rng.randint(-(-groups // 2), groups),
        "use_qk_norm": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.5,
        "n_shared_experts": rng.randint(1, 2),
        "norm_topk_prob": rng.random() < 0.5,
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "partial_rotary_factor": rng.choice([0.5, 1.0]),
    },
    "MiniMaxM2": lambda rng: {
        "num_local_experts": rng.choice([4, 8, 12]),
        "intermediate_size": 4 * rng.randint(1, 9),
        "rotary_dim": rng.choice([4, 8]),
    },
    "GptOss": lambda rng: {
        **GPT_OSS,
        "num_local_experts": rng.choice([4, 8, 12]),
        "intermediate_size": 4 * rng.randint(1, 9),
        "sliding_window": rng.choice([1, 5, 16, 40]),
        "num_hidden_layers": (count := rng.randint(1, 3)),
        "layer_types": rng.choices(["sliding_attention", "full_attention"], k=count),
        "attention_bias": rng.random() < 0.5,
        "swiglu_limit": rng.choice([0.3, 7.0]),
        "rope_parameters": rng.choice([None, LLAMA3 | {"partial_rotary_factor": 1.0}, {**YARN, "truncate": True}]),
    },
}


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("classes", DRAWN)
def test_drawn_models_are_those_of_transformers(
    classes: str, seed: int, small_tokenizer: Path, ranks: Pools, tmp_path: Path
) -> None:
    rng = random.Random(f"{classes} {seed}")
    heads = rng.choice([2, 4, 8])
    settings = {
        "hidden_size": 8 * rng.randint(2, 8),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([own for own in (1, 2, 4, 8) if heads % own == 0]),
        "head_dim": 8 * rng.randint(1, 3),
        "num_experts_per_tok": rng.randint(1, 4),
        "rope_theta": rng.choice([1e4, 1e6]),
        **DRAWN[classes](rng),
    }
    if classes == "Olmoe":  # which takes it from the others
        settings["hidden_size"], _ = heads * settings["head_dim"], settings.pop("head_dim")
    own = write_folder_of(Case(classes, settings), small_tokenizer, tmp_path / "folder", seed)
    prompts = random_prompts(seed, (1, 9, 30))
    greedy = [hf_greedy(own.hf, prompt, NEW_TOKENS) for prompt in prompts]
    examples = [prompt + tokens for prompt, tokens in zip(prompts, greedy, strict=True)]
    for size, placement in ((1, "expert"), (2, "tensor"), (2, "expert")):
        logits, _ = alike(on_ranks(ranks, size, said_on_rank, own.folder, placement, prompts, examples))
        for ours, example in zip(logits, examples, strict=True):
            torch.testing.assert_close(ours, hf_logits(own.hf, example), atol=2e-4, rtol=0, msg=str(settings))


# --- the router


def test_the_router_by_hand() -> None:
    """Scores 0.2, 0.5, 0.6, 0.1 and, for the choice, 0.9, 0.5, 0.6, 0.5: two of the better pair, or the two best."""
    logits_TE, bias_E = torch.tensor([[0.2, 0.5, 0.6, 0.1]]).logit(), torch.tensor([0.7, 0.0, 0.0, 0.4])
    for settings, experts, weights in (
        ({"groups": 2, "groups_chosen": 1, "scale": 3.5}, [0, 1], [1.0, 2.5]),
        ({}, [0, 2], [0.25, 0.75]),
        ({"eps": 0.2}, [0, 2], [0.2, 0.6]),
    ):
        args = MoEArgs(num_experts=4, router=RouterArgs(score="sigmoid", correction=True, **settings))
        routing = routed(logits_TE, bias_E, args)
        assert routing.experts_TK.tolist() == [experts]
        torch.testing.assert_close(routing.weights_TK, torch.tensor([weights]))
    # Shares of the scores 1/7, 5/14, 3/7, 1/14; both pairs of the one token fell to the first and the third:
    # 4 / (1 * 2) * (1 * 1/7 + 1 * 3/7) = 8/7.
    torch.testing.assert_close(routing.probs_TE, torch.tensor([[2, 5, 6, 1]]) / 14)
    loss = load_balancing_loss(RouterStats.stacked([routing.stats(None)]), top_k=2)
    assert loss.item() == pytest.approx(8 / 7)


def test_the_reference_is_what_the_kernels_compute() -> None:
    logits_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    active_T = torch.arange(50) % 3 > 0
    for ours, theirs in zip(routed(logits_TE, None, MoEArgs(), active_T), route(logits_TE, 2, active_T), strict=True):
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


# --- layers that are not alike


def test_only_layers_with_experts_are_counted(made: Callable[[str], Made]) -> None:
    """Of four layers the second alone has experts, 8 of which each token visits 3."""
    llma = load(made("qwen3_moe, with dense layers").folder).llma
    assert llma.args.moe_layers == (1,)
    cache = llma.new_cache(2, 64, routes=True)
    llma.prefill(torch.arange(3, 13), [7, 3], [0, 1], cache)
    counts = cache.by_layer(cache.expert_counts.tolist())
    assert [sum(layer) for layer in counts] == [0, 3 * 10, 0, 0]
    assert cache.routes is not None
    routes = [cache.by_layer(layers) for layers in cache.routes[:, 0, :7].transpose(0, 1).tolist()]
    assert {tuple(map(len, route)) for route in routes} == {(0, 3, 0, 0)}
    table = heatmap(routes, 8)
    assert re.findall(r"scope='row'>(\d+)<", table) == ["1"]
    tokens = torch.arange(3, 13).repeat(2, 1)
    losses = MetaModel(llma, None).training_losses(tokens, tokens)
    assert losses.counts_LE.sum(-1).tolist() == [0, 3 * 20, 0, 0]
    assert 1 < losses.extras["load_balancing"][0].item() < 8
    shares_LE = expert_shares(losses.counts_LE)
    assert draw(shares_LE) != draw(shares_LE.roll(1, 0)), "each row is where its layer is"


@pytest.mark.parametrize("setting", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_that_predict_further_tokens_are_left_out_by_name(
    setting: str, made: Callable[[str], Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = made("glm4_moe")
    (folder := tmp_path / "folder").mkdir()
    tensors = load_file(own.folder / "model.safetensors")
    further = {key.replace(".2.", ".3."): value.clone() for key, value in tensors.items() if ".layers.2." in key}
    save_file({**tensors, **further, "model.layers.3.eh_proj.weight": torch.ones(48, 96)}, folder / "model.safetensors")
    shutil.copyfile(own.folder / "tokenizer.model", folder / "tokenizer.model")
    config = json.loads((own.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(CheckpointError, match=re.escape("model.layers.3.eh_proj.weight")):
        load(folder)
    del config["num_nextn_predict_layers"]
    (folder / "config.json").write_text(json.dumps({**config, setting: 1}))
    prompt = random_prompts(2, (9,))
    with caplog.at_level("INFO"):
        said = load(folder).compute_logits(prompt)
    assert torch.equal(said[0], load(own.folder).compute_logits(prompt)[0])
    assert "model.layers.3.*, if there, are left out" in caplog.text


# --- gradients


LENGTHS = (21, 13, 17, 8, 1)  # beyond a window; those of the data-parallel ranks together learn unequally many tokens


def ragged_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 384, (len(LENGTHS), max(LENGTHS)), generator=generator)
    tokens[torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]] = 0
    return Batch(tokens, tokens * (torch.rand(tokens.shape, generator=generator) < 0.7))


def gradients_on_rank(
    folders: list[Path], mp_size: int, placement: str, data_parallel: DataParallel, ep_size: int, policy: Any
) -> list[tuple[float, dict[str, Tensor]]]:
    """Of each folder's model: a step's loss, and on the first rank the whole gradients, as the optimizer finds them."""
    state, batch, found = ParallelState.init(mp_size, "cpu", ep_size=ep_size), ragged_batch(), []
    mesh = device_mesh(state)
    for folder in folders:
        pretrained = Pretrained.resolve(folder, max_seq_len=64)
        llma = build_for_training(
            replace(pretrained, args=pretrained.args.replace(load_balancing_weight=0.0)),
            state,
            mesh,
            data_parallel=data_parallel,
            compute_dtype=torch.float32,
            expert_placement=placement,
            before_sharding=lambda llma: recompute_activations(llma, policy),
        )
        model = MetaModel(llma, pretrained.tokenizer).train()
        gradients: dict[str, Tensor] = {}

        def keep(*_: Any, llma: Any = llma, kept: dict[str, Tensor] = gradients) -> None:
            for name, parameter in llma.named_parameters():
                if parameter.requires_grad:
                    kept[name] = parameter.grad.full_tensor()

        optimizer = adamw(model.named_parameters(), lr=0.0, weight_decay=0.0)
        optimizer.register_step_pre_hook(keep)
        own = Batch(batch.examples[state.dp_rank :: state.dp_size], batch.labels[state.dp_rank :: state.dp_size])
        loss = train_step(model, optimizer, [own], lr=0.0, clip_grad=0).loss
        found.append((loss, gradients if dist.get_rank() == 0 else {}))
    return found


@pytest.fixture(scope="module")
def of_autograd(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loss and gradients, these as a folder of weights: reading does to them what it does to weights."""
    batch, found = ragged_batch(), {}
    for name in CASES:
        own, folder = made(name), tmp_path_factory.mktemp("gradients")
        hf = deepcopy(own.hf)
        loss = hf(batch.examples, labels=batch.labels.masked_fill(batch.labels == 0, -100)).loss
        loss.backward()
        for parameter in hf.parameters():
            parameter.data = parameter.grad
        hf.save_pretrained(folder)
        shutil.copyfile(own.folder / "tokenizer.model", folder / "tokenizer.model")
        theirs = dict(load(folder).llma.named_parameters())
        found[name] = loss.item(), {key: own for key, own in theirs.items() if not key.endswith("correction_bias")}
    return found


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement", "data_parallel", "ep_size", "policy"),
    [
        (1, 1, "auto", "fsdp", 1, "none"),
        (2, 1, "auto", "fsdp", 1, "none"),
        (2, 1, "auto", "ddp", 1, "none"),
        (1, 2, "expert", "fsdp", 1, "none"),
        (1, 2, "tensor", "fsdp", 1, "none"),
        (2, 2, "expert", "fsdp", 1, "none"),
        (2, 2, "tensor", "sdp", 1, "none"),
        (2, 2, "tensor", "fsdp", 2, "none"),
        (4, 1, "auto", "ddp", 2, "moe"),
    ],
)
def test_gradients_are_those_of_transformers_on_any_ranks(
    dp_size: int,
    mp_size: int,
    placement: str,
    data_parallel: DataParallel,
    ep_size: int,
    policy: str,
    made: Callable[[str], Made],
    of_autograd: dict[str, Any],
    ranks: Pools,
) -> None:
    """All families in one process group; of every parameter."""
    folders = [made(name).folder for name in CASES]
    where = (mp_size, placement, data_parallel, ep_size, policy)
    by_rank = ranks(dp_size * mp_size).run(gradients_on_rank, folders, *where)
    for name, *found in zip(CASES, *by_rank, strict=True):
        expected, theirs = of_autograd[name]
        assert [loss for loss, _ in found] == pytest.approx([expected] * len(found), rel=1e-5), name
        ours = found[0][1]
        assert ours.keys() == theirs.keys(), name
        largest = max(value.abs().max().item() for value in theirs.values())
        for parameter, value in theirs.items():
            limit = 3e-5 * max(value.abs().max().item(), 1e-3 * largest)
            assert (ours[parameter] - value).abs().max().item() <= limit, (name, parameter)


# --- training


ADAPTED = {"lora_rank": 3, "lora_alpha": 12, "norm_tuning": True, "only_save_trainable": True}
EVERYWHERE = {
    "lora_targets": ("attention", "experts", "router", "head"),
    "lora_ranks": "attention=4,router=2,head=5",
}
# Matrices and their ranks as each row says it, or as all do.
TARGETS: dict[str, dict[str, Any]] = {
    "mixtral": EVERYWHERE,
    "qwen3_moe, with dense layers": EVERYWHERE
    | {"lora_targets": ("dense", "router", "attention")}
    | {"lora_ranks": "attention=4,dense=5,router=2", "rslora": True},
    "olmoe": EVERYWHERE | {"lora_alpha": None},
    "glm4_moe": EVERYWHERE | {"lora_ranks": "attention=4,shared=2,dense=5,router=1"},
    "glm4_moe, in groups": {"lora_targets": "shared"},
    "minimax_m2": {"lora_targets": ("routed", "head")},
    "gpt_oss": EVERYWHERE,
}


def trained_on_rank(folder: Path, base: Path, output: Path, options: dict[str, Any]) -> None:
    setting = Setting(folder)
    options = {"pretrained_path": base, "epochs": 1, "lr": 3e-2, "batch_size": 8, "save_interval": 1, **options}
    finetune_on_rank(setting, setting.arguments(output, **options))


def backward_on_rank(folders: list[Path], placement: str, tokens: Tensor) -> dict[str, Tensor]:
    model = load(folders, placement)
    model(tokens, tokens)[0].backward()
    trained = ((name, parameter) for name, parameter in model.llma.named_parameters() if parameter.requires_grad)
    return {name: parameter.grad for name, parameter in trained}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any targeted module")
@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_trained_on_two_ranks_is_the_same_merged_and_in_peft(
    name: str, made: Callable[[str], Made], small_tokenizer: Path, ranks: Pools, tmp_path: Path
) -> None:
    from peft import PeftModel

    own = made(name)
    make_setting(tmp_path / "data", small_tokenizer, examples=16)
    options = {**ADAPTED, "model_parallel_size": 2, **TARGETS[name]}
    ranks(2).run(trained_on_rank, tmp_path / "data", own.folder, tmp_path / "run", options)
    adapter, prompt = tmp_path / "run" / "epoch0", random_prompts(4, (15,))[0]
    expected = load([own.folder, adapter]).compute_logits([prompt])[0]
    assert (expected - hf_logits(own.hf, prompt)).abs().max() > 0.05, "the adapter changes nothing"
    tokens = torch.randint(3, 384, (2, 13), generator=torch.Generator().manual_seed(1))
    grads = []
    for size, placement in ((1, "expert"), (2, "expert"), (2, "tensor")):
        found = on_ranks(ranks, size, backward_on_rank, [own.folder, adapter], placement, tokens)
        grads.append(assembled(found, load([own.folder, adapter]).llma.args, placement))
        for parameter, value in grads[0].items():
            torch.testing.assert_close(grads[-1][parameter], value, atol=1e-6, rtol=1e-4)
    merge(own.folder, adapter, tmp_path / "merged", to="hf")
    merged = getattr(transformers, f"{CASES[name].classes}ForCausalLM").from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(hf_logits(merged, prompt), expected, atol=1e-4, rtol=1e-4)
    export_adapter(adapter, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(deepcopy(own.hf), str(tmp_path / "peft"))
    torch.testing.assert_close(hf_logits(theirs, prompt), expected, atol=1e-4, rtol=1e-4)
    again = load([own.folder, tmp_path / "peft"]).compute_logits([prompt])[0]
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match any targeted module")
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
def test_peft_s_updates_of_fused_experts_load(
    name: str, made: Callable[[str], Made], ranks: Pools, tmp_path: Path
) -> None:
    """Of the rank of their own that gate and up have together, on two ranks, merged, and written for peft again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    own, prompt = made(name), random_prompts(4, (15,))[0]
    fused = [f"mlp.experts.{part}" for part in ("gate_up_proj", "down_proj")]
    settings = {"r": 3, "lora_alpha": 5, "rank_pattern": {"down_proj": 2}, "target_parameters": fused}
    settings |= {"use_rslora": name == "gpt_oss"}
    theirs = get_peft_model(deepcopy(own.hf), LoraConfig(target_modules=["k_proj"], **settings)).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for part, parameter in theirs.named_parameters():
            if "lora_" in part:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = hf_logits(theirs, prompt)
    assert (expected - hf_logits(own.hf, prompt)).abs().max() > 0.05
    for (found,) in on_ranks(ranks, 2, said_of_prompts, [own.folder, tmp_path / "adapter"], "tensor", [prompt]):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    merge(own.folder, tmp_path / "adapter", tmp_path / "merged", to="hf")
    merged = getattr(transformers, f"{CASES[name].classes}ForCausalLM").from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(hf_logits(merged, prompt), expected, atol=1e-4, rtol=1e-4)
    model = load([own.folder, tmp_path / "adapter"])
    export_checkpoint(model, tmp_path / "own", dtype=torch.float32, only_trainable=True)
    export_adapter(tmp_path / "own", tmp_path / "again")
    theirs = PeftModel.from_pretrained(deepcopy(own.hf), str(tmp_path / "again"))
    torch.testing.assert_close(hf_logits(theirs, prompt), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "elsewhere"), [("glm4_moe", True), ("minimax_m2", True), ("gpt_oss", False)])
def test_biases_that_balancing_has_moved(
    name: str, elsewhere: bool, made: Callable[[str], Made], small_tokenizer: Path, ranks: Pools, tmp_path: Path
) -> None:
    """They go with the adapter, and merged into whatever form knows them."""
    own = made(name)
    make_setting(tmp_path / "data", small_tokenizer, examples=16)
    options = {**ADAPTED, "bias_update_rate": 0.02}
    ranks(1).run(trained_on_rank, tmp_path / "data", own.folder, tmp_path / "run", options)
    adapter, prompt = tmp_path / "run" / "epoch0", random_prompts(4, (15,))[0]
    both = load([own.folder, adapter])
    expected = both.compute_logits([prompt])[0]
    before = {} if not elsewhere else dict(load(own.folder).llma.named_parameters())
    for parameter, value in both.llma.named_parameters():
        if parameter.endswith("correction_bias"):
            moved = value - before.get(parameter, 0.0)
            assert moved.any(), parameter
            torch.testing.assert_close(moved * 50, (moved * 50).round(), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="has correction biases of its own"):
        export_adapter(adapter, tmp_path / "peft")
    if elsewhere:
        merge(own.folder, adapter, tmp_path / "merged", to="hf")
        merged = getattr(transformers, f"{CASES[name].classes}ForCausalLM").from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(hf_logits(merged, prompt), expected, atol=1e-4, rtol=1e-4)
        return
    with pytest.raises(ValueError, match=r"hf cannot say the routers' correction biases .* gpt_oss does not have"):
        merge(own.folder, adapter, tmp_path / "merged", to="hf")
    merge(own.folder, adapter, tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged").compute_logits([prompt])[0], expected, atol=1e-4, rtol=1e-4)


def test_what_no_gradient_reaches_is_after_training_what_it_was(
    made: Callable[[str], Made], small_tokenizer: Path, ranks: Pools, tmp_path: Path
) -> None:
    """On two data-parallel ranks, in bfloat16, begun again after an epoch."""
    base = made("glm4_moe").folder
    make_setting(tmp_path / "data", small_tokenizer, examples=16)
    for epochs, first in ((1, 0), (2, 1)):
        output = tmp_path / f"run{first}"
        resume = {"resume": tmp_path / "run0"} if first else {}
        ranks(2).run(
            trained_on_rank, tmp_path / "data", base, output, {"epochs": epochs, "precision": "bf16", **resume}
        )
    paths = base, tmp_path / "run0" / "epoch0", tmp_path / "run1" / "epoch1"
    before, *after = (dict(load(path).llma.named_parameters()) for path in paths)
    for trained in after:
        same = {name for name in before if torch.equal(before[name], trained[name])}
        assert same == {f"layers.{layer}.feed_forward.gate.correction_bias" for layer in (1, 2)}


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_a_run_over_data_parallel_ranks_goes_on_over_model_parallel_ones(
    name: str, made: Callable[[str], Made], small_tokenizer: Path, ranks: Pools, tmp_path: Path
) -> None:
    """With sinks and biases, and with norms that all heads share; its losses and gradient norms are one rank's."""
    make_setting(tmp_path / "data", small_tokenizer, examples=16)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for output, steps, dp_size, mp_size in ((whole, 4, 1, 1), (parts, 2, 2, 1), (parts, 4, 1, 2)):
        spread = {"batch_size": 4 // dp_size, "model_parallel_size": mp_size, "max_steps": steps}
        options = {**spread, "export_form": "hf", "auto_resume": True, "lr": 1e-2}
        ranks(dp_size * mp_size).run(trained_on_rank, tmp_path / "data", made(name).folder, output, options)
    for line, expected in zip(log_lines(parts), log_lines(whole), strict=True):
        for value in ("step", "loss", "grad_norm"):
            assert line[value] == pytest.approx(expected[value], rel=1e-4), value
    (model,) = (path.parent.name for path in parts.glob("epoch*/config.json") if (whole / path.parent.name).exists())
    ours, theirs = (load_file(output / model / "model.safetensors") for output in (parts, whole))
    before = load_file(made(name).folder / "model.safetensors")
    assert ours.keys() == theirs.keys() == before.keys()
    for key, value in theirs.items():
        assert not torch.equal(value, before[key]), key
        torch.testing.assert_close(ours[key], value, atol=2e-4, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


LAYOUTS = [(2, 1, 2), (4, 1, 4), (4, 1, 2), (2, 2, 2), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 1)]
TRAINED: list[dict[str, Any]] = [
    {},
    {"train_router": "no", "only_save_trainable": True, "bias_update_rate": 0.02},
    {"accum_iter": 2, "optimizer": "muon"},
    ADAPTED | EVERYWHERE,
    {"lora_rank": 3, "lora_targets": ("experts", "router"), "bias_tuning": True, "quant": "int8"},
    ADAPTED | {"quant": "int4", "bias_update_rate": 0.02},
    {"lora_rank": 2, "lora_targets": "experts", "quant": "nf4", "accum_iter": 2},
]


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", DRAWN)
def test_drawn_runs_go_on_over_drawn_ranks(
    classes: str, seed: int, small_tokenizer: Path, ranks: Pools, tmp_path: Path
) -> None:
    """Of every family, experts spread or not, adapters and quantized bases too: three legs are one run of one rank."""
    rng = random.Random(f"{classes} {seed}")
    # Sizes of which quantized weights of two model-parallel ranks have whole groups.
    wide = {"hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "intermediate_size": 128}
    settings = DRAWN[classes](rng) | wide | {"num_experts_per_tok": rng.randint(1, 3)}
    settings |= {"Mixtral": {"num_local_experts": 8}}.get(classes, {"moe_intermediate_size": 128})
    base = write_folder_of(Case(classes, settings), small_tokenizer, tmp_path / "folder", seed).folder
    make_setting(tmp_path / "data", small_tokenizer, examples=20)
    trained = rng.choice(TRAINED)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    legs = [(parts, 2 * leg + 2, *rng.choice(LAYOUTS)) for leg in range(3)]
    for output, steps, dp_size, mp_size, ep_size in (*legs, (whole, 6, 1, 1, 1)):
        spread = {"model_parallel_size": mp_size, "expert_parallel_size": ep_size, "max_steps": steps}
        spread["batch_size"] = 8 // dp_size // trained.get("accum_iter", 1)
        if output is parts:
            spread["data_parallel"] = rng.choice(["fsdp", "sdp", "ddp"])
            spread["grad_ckpt_policy"] = rng.choice(["none", "moe", "full"])
            spread["expert_placement"] = rng.choice(["auto", "tensor"])
        options = {**trained, **spread, "auto_resume": True, "lr": 2e-3, "epochs": 3}
        ranks(dp_size * mp_size).run(trained_on_rank, tmp_path / "data", base, output, options)
    for line, expected in zip(log_lines(parts), log_lines(whole), strict=True):
        for value in ("step", "loss", "grad_norm"):
            assert line[value] == pytest.approx(expected[value], rel=3e-4), value
    name = max(whole.glob("epoch*"), key=lambda path: path.stat().st_mtime_ns).name
    before = [base] if trained.keys() & {"lora_rank", "only_save_trainable"} else []
    prompt = random_prompts(seed, (20,))
    (ours, theirs) = (load([*before, output / name]).compute_logits(prompt)[0] for output in (parts, whole))
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def norms_on_rank(folder: Path, output: Path, mp_size: int, saves: bool) -> dict[str, Tensor]:
    """Of each head's norms the weights and moments, after a step that is saved, or as a state gives them."""
    state = ParallelState.init(mp_size, "cpu")
    pretrained = Pretrained.resolve(folder, max_seq_len=128)
    settings: Any = {"data_parallel": "fsdp", "compute_dtype": torch.float32}
    llma = build_for_training(pretrained, state, device_mesh(state), **settings)
    model = MetaModel(llma, pretrained.tokenizer).train()
    optimizer = adamw(model.named_parameters(), lr=1e-2, weight_decay=0.0)
    store = Checkpointer(output, state, all_ranks())

    def of_heads() -> dict[str, Tensor]:
        tensors = {name: own for name, own in tensors_of(model, optimizer).items() if "q_norm" in name}
        return {name: own.full_tensor() if isinstance(own, DTensor) else own for name, own in tensors.items()}

    def in_copies(*given: Any, **settings: Any) -> dict[str, Tensor]:
        heads = {name: own.repeat(mp_size) for name, own in of_heads().items() if own.dim()}
        return tensors_of(*given, **settings) | heads

    if saves:
        tokens = torch.randint(3, 384, (2, 9), generator=torch.Generator().manual_seed(2))
        train_step(model, optimizer, [(tokens, tokens)], lr=1e-2, clip_grad=0)
        with mock.patch.object(checkpointer, "tensors_of", in_copies):
            store.save(model, optimizer, {}, "old", asynchronous=False)
    else:
        store.load(output / "old", model, optimizer)
    return of_heads()


def test_norms_that_were_saved_once_for_each_rank(made: Callable[[str], Made], ranks: Pools, tmp_path: Path) -> None:
    """As earlier versions did with those that all heads share; they are one, at any number of ranks."""
    folder = made("qwen3_moe").folder
    saved = alike(ranks(2).run(norms_on_rank, folder, tmp_path, 2, True))
    assert {tensor.shape for tensor in saved.values()} == {(QWEN3["head_dim"],), ()}
    assert any(name.endswith("exp_avg") for name in saved)
    for mp_size in (1, 2):
        assert_same(alike(ranks(2).run(norms_on_rank, folder, tmp_path, mp_size, False)), saved)


QUANTIZED = ("qwen3_moe, with dense layers", "olmoe", "glm4_moe", "minimax_m2", "gpt_oss")


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_copy_says_what_quantizing_while_reading_does(
    name: str, made: Callable[[str], Made], ranks: Pools, tmp_path: Path
) -> None:
    own, prompts = made(name), random_prompts(6, (3, 9))
    quantize_checkpoint(own.folder, tmp_path / "copy", QuantArgs(type="int8"))
    copy = alike(on_ranks(ranks, 2, quantized_on_rank, tmp_path / "copy", None, prompts))
    read = alike(on_ranks(ranks, 2, quantized_on_rank, own.folder, "int8", prompts))
    assert_same(copy, read)


def quantized_on_rank(folder: Path, quant: str | None, prompts: list[list[int]]) -> list[Tensor]:
    return load(folder, quant=quant).compute_logits(prompts)


def matrices_on_rank(folder: Path, placement: str, quant: str | None) -> dict[str, Tensor]:
    """A rank's quantized matrices as their own tensors, and what they stand for; the others as they are, float32."""
    found: dict[str, Tensor] = {}
    for name, module in load(folder, placement, quant=quant).llma.named_modules():
        if isinstance(module, QuantizedParameter):
            weight = module.to_local()
            found |= {f"{name}.{own}": tensor.float() for own, tensor in weight.tensors().items()}
            found[name] = weight.dequantize()
        else:
            own = module.named_parameters(prefix=name, recurse=False)
            found |= {name: value.float() for name, value in own if "weight" in name or "w13" in name or "w2" in name}
    return found


# --- folders


@pytest.mark.parametrize("name", CASES)
def test_folders_there_and_back(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    """To our shards of both forms and back: transformers' own bytes, names and settings."""
    own = made(name)
    convert(own.folder, tmp_path / "base", mp=1)
    convert(tmp_path / "base", tmp_path / "sparse", to="accessory-sparse", mp=2)
    convert(tmp_path / "sparse", tmp_path / "hf", to="hf")
    assert diff(own.folder, tmp_path / "sparse").same
    # A word of our own folders.
    assert ["llama_type" in "".join(describe(folder)) for folder in (own.folder, tmp_path / "base")] == [False, True]
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (own.folder, tmp_path / "hf"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    again = getattr(transformers, f"{CASES[name].classes}ForCausalLM").from_pretrained(tmp_path / "hf")
    prompt = random_prompts(2, (12,))[0]
    torch.testing.assert_close(hf_logits(again, prompt), hf_logits(own.hf, prompt), atol=1e-5, rtol=0)


def test_gpt_oss_without_windows_is_written_as_transformers_takes_it(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    shutil.copytree(made("gpt_oss").folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_types": ["full_attention"] * 2}))
    convert(tmp_path / "m", tmp_path / "hf", to="hf")
    theirs, (prompt,) = transformers.GptOssForCausalLM.from_pretrained(tmp_path / "hf"), random_prompts(2, (19,))
    torch.testing.assert_close(
        load(tmp_path / "m").compute_logits([prompt])[0], hf_logits(theirs, prompt), atol=1e-4, rtol=0
    )


def test_forms_that_cannot_say_what_a_family_computes_are_refused(
    made: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, to, says in (
        *((name, "mistral", f"what {name} computes") for name in FAMILIES if name != "mixtral"),
        ("gpt_oss", "gguf", "moe.clamp.limit 0.6 (llama.cpp's gpt-oss has 7.0)"),
        ("gpt_oss, 2 kv heads", "gguf", "attention.qkv_bias False (llama.cpp's gpt-oss has True), attention.o_bias"),
        ("gpt_oss, 2 kv heads", "gguf", "attention.windowed (1, 2) (llama.cpp's gpt-oss has (0, 2))"),
        ("qwen3_moe, as probable as they are", "gguf", "moe.norm_topk_prob False (llama.cpp's qwen3moe has True)"),
        ("qwen3_moe, with dense layers", "gguf", "dense.layers [0, 2, 3] (llama.cpp's qwen3moe has None)"),
        ("olmoe, clipped, 2 kv heads", "gguf", "attention.clip 0.9 (llama.cpp's olmoe has None)"),
    ):
        assert main(["convert", str(made(name).folder), str(tmp_path / "out"), "--to", to]) == 1
        error = capsys.readouterr().err
        assert f"{to} cannot say " in error
        assert says in error
        assert "take one of accessory, accessory-sparse, hf" in error
    assert list(tmp_path.iterdir()) == []
    olmoe = load_args([made("olmoe").folder / "config.json"])
    with pytest.raises(ValueError, match=r"gguf cannot say n_kv_heads \* head_dim 24 beside dim 48"):
        written_layout("gguf", olmoe.replace(n_kv_heads=4))
    glm = load_args([made("glm4_moe").folder / "config.json"]).replace(rope=None)
    for changes, says in (
        ({"dense": DenseArgs(layers=(1,), hidden_dim=40)}, "glm4_moe has the first ones alone"),
        ({"moe": replace(glm.moe, shared_hidden_dim=17)}, "moe.shared_hidden_dim 17"),
        ({"attention": replace(glm.attention, clip=2.0)}, "attention.clip 2.0"),
        ({"rope": RopeArgs(kind="llama3", factor=4.0)}, "rope.kind llama3 (llama.cpp's glm4moe has None)"),
        ({"family": "mixtral"}, "attention.qkv_bias True (llama.cpp's llama has False), attention.rotary_dim 6"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            written_layout("gguf", glm.replace(**changes))


# Of sizes that blocks divide, and what else is drawn otherwise there. llama.cpp has of rotary scalings linear, and yarn
# whose bounds are whole places, and one limit alone.
WIDE = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "intermediate_size": 32}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
ROUNDED = {**YARN, "truncate": True}
IN_GGUF: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"rope_parameters": ROUNDED},
    "glm4_moe": {"rope_parameters": LINEAR},
    "glm4_moe, in groups": {},
    "minimax_m2": {},
    "olmoe": {},
    "gpt_oss": {"rope_parameters": {**ROUNDED, "attention_factor": 1.3}, "swiglu_limit": 7.0, "num_hidden_layers": 3},
}


@pytest.fixture(scope="module")
def made_wide(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @cache
    def of(name: str) -> Made:
        case = CASES[name]
        wide = {own: value for own, value in WIDE.items() if own in SHARED | case.settings} | IN_GGUF[name]
        folder = tmp_path_factory.mktemp("wide") / "folder"
        return write_folder_of(Case(case.classes, case.settings | wide), small_tokenizer, folder, 3)

    return of


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_there_and_back_and_in_llama_cpp(name: str, made_wide: Callable[[str], Made], tmp_path: Path) -> None:
    """Which also shows in which order an architecture has the rows of q and k."""
    own = made_wide(name)
    convert(own.folder, tmp_path / "own", mp=2, dtype=torch.bfloat16)
    for first, type, dtype, atol in (
        (own.folder, "F32", None, 0),
        (tmp_path / "own", "BF16", torch.bfloat16, 0),
        (own.folder, "Q8_0", None, 4e-3),
    ):
        convert(first, tmp_path / type, to="gguf", type=type)
        convert(tmp_path / type, tmp_path / f"{type}-back", to="accessory-sparse", mp=2, dtype=dtype)
        assert diff(first, tmp_path / f"{type}-back", atol=atol).same
        assert Folder(tmp_path / type).stored_args() == Folder(own.folder).stored_args()
    assert not diff(own.folder, tmp_path / "Q8_0", atol=1e-4).same
    prompts = random_prompts(5, (4, 17))
    assert says_as_transformers(tmp_path / "F32" / "model.gguf", own.hf, prompts=prompts, count=8) > 12


def test_a_set_with_a_layer_that_predicts_further_tokens_is_read_as_llama_cpp_does(
    made_wide: Callable[[str], Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Written by the package: its first file has none of the tensors, of which some say settings."""
    own, kind = made_wide("glm4_moe"), gguf.GGUFValueType
    convert(own.folder, tmp_path / "one", to="gguf", type="F32")
    reader = gguf.GGUFReader(tmp_path / "one" / "model.gguf")
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    tensors |= {name.replace(".2.", ".3."): tensor + 1 for name, tensor in tensors.items() if name.startswith("blk.2.")}
    tensors |= {f"blk.3.nextn.{name}.weight": np.ones(64, np.float32) for name in ("enorm", "hnorm")}
    tensors["blk.3.nextn.eh_proj.weight"] = np.ones((64, 128), np.float32)
    changes = {"glm4moe.block_count": 4, "glm4moe.nextn_predict_layers": 1}
    (folder := tmp_path / "set").mkdir()
    for file, held in enumerate(({}, tensors)):
        writer = gguf.GGUFWriter(folder / f"m-{file + 1:05d}-of-00002.gguf", "glm4moe")
        for name, field in reader.fields.items():
            if file == 0 and not name.startswith(("GGUF.", "general.architecture")):
                value = changes.get(name, field.contents())
                writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for name, count in (("no", file), ("count", 2)):
            writer.add_key_value(f"split.{name}", count, kind.UINT16)
        writer.add_key_value("split.tensors.count", len(tensors), kind.INT32)
        for name, tensor in held.items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with caplog.at_level("INFO"):
        assert diff(own.folder, folder).same
    assert Folder(folder).stored_args() == Folder(own.folder).stored_args()
    assert "blk.3.*, if there, are left out" in caplog.text
    first = folder / "m-00001-of-00002.gguf"
    assert says_as_transformers(first, own.hf, prompts=random_prompts(5, (9,)), count=8) > 5


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("qwen3_moe", {"expert_weights_norm": False}, "qwen3moe.expert_weights_norm is False"),
        ("qwen3_moe", {"expert_feed_forward_length": None}, "qwen3moe.expert_feed_forward_length is missing"),
        ("qwen3_moe", {"rope.dimension_count": 8}, "qwen3moe.rope.dimension_count is 8, and heads of 16"),
        ("olmoe", {"attention.clamp_kqv": 8.0}, "olmoe.attention.clamp_kqv is 8.0"),
        ("minimax_m2", {"expert_gating_func": 1}, "minimax-m2.expert_gating_func is 1"),
        ("minimax_m2", {"leading_dense_block_count": 1}, "minimax-m2.leading_dense_block_count is 1"),
        ("glm4_moe", {"expert_gating_func": 3}, "glm4moe.expert_gating_func is 3"),
        ("glm4_moe", {"expert_shared_count": 0}, "n_shared_experts must be a whole number from 1 on, not 0"),
        ("glm4_moe", {"leading_dense_block_count": 2**32 - 1}, "dense.layers names all layers"),
        ("glm4_moe", {"nextn_predict_layers": 3}, "n_layers must be"),
        ("glm4_moe", {"rope.dimension_sections": np.array([8, 8, 0, 0])}, "positions of several kinds"),
        ("glm4_moe", {"expert_group_count": 3}, "8 experts do not make 3 groups"),
        ("glm4_moe", {"expert_weights_norm": None}, {"moe": {"norm_topk_prob": False}}),
        ("glm4_moe", {"expert_weights_scale": 0.0}, {"moe": {"router": {"scale": 1.0}}}),
        ("glm4_moe", {"nextn_predict_layers": 1}, {"n_layers": 2}),
        ("minimax_m2", {"rope.dimension_count": None}, {"attention": {"rotary_dim": None}}),
        ("gpt_oss", {"attention.sliding_window_pattern": 3}, "gpt-oss.attention.sliding_window_pattern is 3"),
        ("gpt_oss", {"attention.sliding_window_pattern": np.array([True])}, "sliding_window_pattern is array([ True])"),
        ("gpt_oss", {"attention.sliding_window": 0}, "sliding_window must be a whole number from 1 on"),
        ("gpt_oss", {"attention.sliding_window": 9}, {"attention": {"window": 9}}),
        ("gpt_oss", {"rope.scaling.yarn_beta_fast": 8.0}, {"rope": {"beta_fast": 8.0}}),
        ("gpt_oss", {"rope.scaling.attn_factor": None}, {"rope": {"attention_factor": 1 + 0.1 * math.log(4)}}),
        ("gpt_oss", {"rope.scaling.yarn_attn_factor": 2.0}, {"rope": {"attention_factor": 2.6}}),
        ("qwen3_moe", {"rope.scaling.yarn_ext_factor": 0.5}, "qwen3moe.rope.scaling.yarn_ext_factor is 0.5"),
        ("qwen3_moe", {"rope.scaling.yarn_log_multiplier": 0.1}, "qwen3moe.rope.scaling.yarn_log_multiplier is 0.1"),
        (
            "qwen3_moe",
            {"rope.scaling.type": "longrope"},
            "qwen3moe.rope.scaling.type is 'longrope': only linear and yarn",
        ),
        ("qwen3_moe", {"rope.scaling.factor": 0.0}, "qwen3moe.rope.scaling.factor must be a number above 0, not 0.0"),
        ("qwen3_moe", {"rope.scaling.original_context_length": None}, {"rope": {"original": 256}}),
        ("qwen3_moe", {"rope.scaling.type": "none"}, {"rope": None}),
        ("glm4_moe", {"rope.scaling.attn_factor": 2.0}, "attn_factor is 2.0, which 'linear' scaling has not"),
    ],
)
def test_keys_of_gguf_mean_what_llama_cpp_takes_them_for(
    name: str, changes: dict[str, Any], says: Any, made_wide: Callable[[str], Made], tmp_path: Path
) -> None:
    convert(made_wide(name).folder, tmp_path / "g", to="gguf")
    header = read_header(tmp_path / "g" / "model.gguf")
    kind = header.values["general.architecture"]
    values = {**header.values, **{f"{kind}.{key}": value for key, value in changes.items()}}
    changed = replace(header, values={key: value for key, value in values.items() if value is not None})
    if isinstance(says, str):
        with pytest.raises(ValueError, match=re.escape(says)):
            ModelArgs.from_dict(sizes_of_gguf(changed))
    else:
        before, after = (asdict(ModelArgs.from_dict(sizes_of_gguf(own))) for own in (header, changed))
        assert after == put_into(before, says) != before


def test_gpt_oss_as_it_is_released_is_what_its_gguf_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whose yarn rounds no bounds, as llama.cpp does."""
    (path := tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt-oss-20b"][0]))
    args = load_args([path])
    assert args.rope is not None
    assert not args.rope.truncate
    with caplog.at_level("WARNING"):
        values = written_layout("gguf", args).metadata(args, torch.bfloat16, "m")  # type: ignore[misc]
    assert "llama.cpp rounds the bounds of yarn's frequencies, which this model does not" in caplog.text
    (path := tmp_path / "m.gguf").write_bytes(header_bytes({**values, "split.count": 1}, {})[0])
    assert load_args([path]) == args


def put_into(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return old | {key: put_into(old[key], value) if isinstance(value, dict) else value for key, value in new.items()}


def in_scaled_blocks(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in 8-bit floats, block by block of 128 x 128; its factors; and what both stand for, in bfloat16."""
    codes = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    factors = torch.empty(*(-(-size // 128) for size in matrix.shape))
    values = torch.empty_like(matrix, dtype=torch.bfloat16)
    for row, column in itertools.product(*map(range, factors.shape)):
        block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
        factors[row, column] = matrix[block].float().abs().max() / 448
        codes[block] = (matrix[block].float() / factors[row, column]).to(codes.dtype)
        values[block] = (codes[block].float() * factors[row, column]).bfloat16()
    return codes, factors, values


def test_8_bit_floats_in_blocks_are_read_as_what_they_stand_for(
    small_tokenizer: Path, ranks: Pools, tmp_path: Path
) -> None:
    """Of 144 x 160 matrices, with 2 x 2 factors each, on two ranks that cut them within a block."""
    torch.manual_seed(5)
    sizes = {**SHARED, **MINIMAX, "hidden_size": 144, "intermediate_size": 160, "num_local_experts": 4}
    hf = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**sizes)).bfloat16()
    hf.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    coded = {**plain}
    for key in [key for key in plain if re.search(r"(proj|w[123])\.weight$", key)]:
        coded[key], factors, plain[key] = in_scaled_blocks(coded[key])
        coded |= {f"{key}_scale_inv": factors}
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    for name, tensors, more in (("plain", plain, {}), ("coded", coded, {"quantization_config": said})):
        (folder := tmp_path / name).mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        shutil.copyfile(small_tokenizer, folder / "tokenizer.model")
    in_shards(coded, tmp_path / "coded")
    convert(tmp_path / "coded", tmp_path / "own", mp=2)
    assert diff(tmp_path / "plain", tmp_path / "own").same
    for placement in ("expert", "tensor"):
        prompts = random_prompts(6, (3, 9))
        both = (
            alike(on_ranks(ranks, 2, said_of_prompts, tmp_path / name, placement, prompts))
            for name in ("plain", "coded")
        )
        assert_same(*both)
    key = "model.layers.0.self_attn.q_proj.weight_scale_inv"  # of 80 x 144
    in_shards({**coded, key: torch.ones(2, 2)}, tmp_path / "coded")
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} has shape \(2, 2\), and .* asks for \(1, 2\)"):
        load(tmp_path / "coded")


def test_8_bit_floats_in_blocks_stay_what_they_are(small_tokenizer: Path, ranks: Pools, tmp_path: Path) -> None:
    """Quantized to fp8, codes and factors are the release's own, at every cut; what is plain there is rounded."""
    torch.manual_seed(6)
    sizes = {**SHARED, **MINIMAX, "hidden_size": 256, "intermediate_size": 256, "num_local_experts": 4, "head_dim": 32}
    hf = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**sizes)).bfloat16()
    hf.save_pretrained(tmp_path / "coded")
    coded = load_file(tmp_path / "coded" / "model.safetensors")
    released = {}
    for key in [key for key in coded if re.search(r"([kvo]_proj|w[123])\.weight$", key)]:
        codes, factors, _ = in_scaled_blocks(coded[key] * torch.rand_like(coded[key], dtype=torch.float32))
        coded |= {key: codes, f"{key}_scale_inv": factors}
        released[key] = codes.float(), factors.repeat_interleave(128, 0)[: codes.shape[0]]
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    (tmp_path / "coded" / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    shutil.copyfile(small_tokenizer, tmp_path / "coded" / "tokenizer.model")
    in_shards(coded, tmp_path / "coded")
    quantize_checkpoint(tmp_path / "coded", tmp_path / "kept", QuantArgs(type="fp8"))
    layer = "model.layers.1.block_sparse_moe.experts"
    for folder, quant in (("coded", "fp8"), ("kept", None)):
        for placement in ("expert", "tensor"):
            found = on_ranks(ranks, 2, matrices_on_rank, tmp_path / folder, placement, quant)
            for name, axis in (("codes", -2), ("scale", -2)):
                both = [own[f"layers.1.feed_forward.experts.w13.{name}"] for own in found]
                whole = torch.cat(both, dim=0 if placement == "expert" else axis)
                for expert, (place, matrix) in itertools.product(range(4), enumerate(("w1", "w3"))):
                    own = released[f"{layer}.{expert}.{matrix}.weight"][name == "scale"]
                    assert torch.equal(whole[expert, place], own)
            both = [own["layers.1.attention.wo.weight.codes"] for own in found]
            assert torch.equal(torch.cat(both, dim=-1), released["model.layers.1.self_attn.o_proj.weight"][0])
    answers = on_ranks(ranks, 2, said_of_prompts, tmp_path / "kept", "expert", random_prompts(6, (3, 9)))
    truth = load(tmp_path / "coded").compute_logits(random_prompts(6, (3, 9)))
    for ours, theirs in zip(alike(answers), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def in_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """As three files with an index, numbered from 0, that part codes from their factors."""
    files = {key: f"model-{number % 3:05d}-of-00002.safetensors" for number, key in enumerate(sorted(tensors))}
    for file in {*files.values()}:
        save_file({key: tensors[key] for key, own in files.items() if own == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink(missing_ok=True)


def said_of_prompts(folder: Path, placement: str, prompts: list[list[int]]) -> list[Tensor]:
    return load(folder, placement).compute_logits(prompts)


def test_mxfp4_is_read_as_transformers_decodes_it(small_tokenizer: Path, ranks: Pools, tmp_path: Path) -> None:
    """Codes and exponents drawn, on four ranks that cut down's matrices of 2 blocks within these."""
    sizes = {
        **SHARED,
        **GPT_OSS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "swiglu_limit": 7.0,
    }
    torch.manual_seed(5)
    hf = transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).bfloat16()
    for name, parameter in hf.named_parameters():
        if name.endswith(("bias", "sinks")):
            parameter.data.normal_(std=0.2)
    hf.save_pretrained(tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    coded = {**plain}
    for key in [key for key in plain if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = coded.pop(key).shape
        codes = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        exponents = torch.randint(118, 125, codes.shape[:-1], dtype=torch.uint8)
        coded |= {f"{key}_blocks": codes, f"{key}_scales": exponents}
        plain[key] = convert_moe_packed_tensors(codes, exponents).contiguous()
        assert plain[key].shape == (experts, inputs, outputs)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    said = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    for name, tensors, more in (("plain", plain, {}), ("coded", coded, said)):
        (folder := tmp_path / name).mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        shutil.copyfile(small_tokenizer, folder / "tokenizer.model")
    in_shards(coded, tmp_path / "coded")
    convert(tmp_path / "coded", tmp_path / "own", mp=2)
    assert diff(tmp_path / "plain", tmp_path / "own").same
    convert(tmp_path / "own", tmp_path / "hf", to="hf")
    again = load_file(tmp_path / "hf" / "model.safetensors")
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert any("MXFP4" in line for line in describe(tmp_path / "coded"))
    convert(tmp_path / "coded", tmp_path / "gguf", to="gguf", type="MXFP4")
    blocks, both = open_gguf(tmp_path / "gguf" / "model.gguf"), plain["model.layers.1.mlp.experts.gate_up_proj"]
    wanted = {"gate": both[..., ::2], "up": both[..., 1::2], "down": plain["model.layers.1.mlp.experts.down_proj"]}
    for name, matrices in wanted.items():
        found = blocks[f"blk.1.ffn_{name}_exps.weight"]
        assert isinstance(found, Blocks)
        torch.testing.assert_close(found[:], matrices.float().mT, rtol=0, atol=0)
        assert str(found.coding) == "MXFP4", name
    assert str(getattr(blocks["blk.0.attn_q.weight"], "coding", "")) == "Q8_0"
    for size, placement in ((2, "expert"), (4, "tensor")):
        prompts = random_prompts(6, (3, 9))
        both = (
            alike(on_ranks(ranks, size, said_of_prompts, tmp_path / name, placement, prompts))
            for name in ("plain", "coded")
        )
        assert_same(*both)
    both = (
        alike(on_ranks(ranks, 2, quantized_on_rank, tmp_path / name, "int8", prompts)) for name in ("plain", "coded")
    )
    assert_same(*both)
    quantize_checkpoint(tmp_path / "coded", tmp_path / "kept", QuantArgs(type="mxfp4"))
    for folder, quant, placement in (("coded", "mxfp4", "expert"), ("kept", None, "tensor")):
        expected = on_ranks(ranks, 2, matrices_on_rank, tmp_path / "plain", placement, None)
        for whole, own in zip(
            expected, on_ranks(ranks, 2, matrices_on_rank, tmp_path / folder, placement, quant), strict=True
        ):
            assert sum(name.endswith(".scale") for name in own) == 4, "of experts alone"
            assert all(torch.equal(value, own[name]) for name, value in whole.items()), "as they were released"
    key = "model.layers.0.mlp.experts.down_proj"
    for scales, says in (
        ({}, f"{key}_blocks is there without {key}_scales"),
        ({f"{key}_scales": torch.ones(4, 64, 3, dtype=torch.uint8)}, f"{key}_scales has shape (4, 64, 3)"),
    ):
        kept = {name: value for name, value in coded.items() if name != f"{key}_scales"}
        in_shards({**kept, **scales}, tmp_path / "coded")
        with pytest.raises(CheckpointError, match=re.escape(says)):
            load(tmp_path / "coded")


# --- windows


def test_a_cache_holds_no_more_of_a_layer_than_its_window(made: Callable[[str], Made]) -> None:
    """Texts read piece by piece and token by token, in slots that are used again, beyond a window of 21."""
    own = made("gpt_oss, 2 kv heads")
    llma = load(own.folder).llma
    cache = llma.new_cache(3, 96)
    assert cache.k.shape[:3] == (1, 3, 96)
    assert cache.near_k.shape[:3] == cache.near_v.shape[:3] == (2, 3, 21)
    texts = [torch.tensor(prompt) for prompt in random_prompts(7, (70, 33, 50))]
    wanted = [hf_logits(own.hf, text.tolist()) for text in texts]
    places = [0, 0, 0]
    for pieces in ([10, 1, 30], [1, 1, 0], [25, 22, 1], [0, 1, 4], [30, 1, 1]):
        asked = [(slot, count) for slot, count in enumerate(pieces) if count]
        parts = [texts[slot][places[slot] : places[slot] + count] for slot, count in asked]
        slots, counts = zip(*asked, strict=True)
        logits = llma.prefill(torch.cat(parts), counts, slots, cache, all_logits=True)
        for (slot, count), found in zip(asked, logits.split(counts), strict=True):
            expected = wanted[slot][places[slot] : places[slot] + count]
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
            places[slot] += count
    active = torch.tensor([False, True, True])
    for _ in range(5):  # what is written for the slot that is not asked may not harm it
        tokens = torch.stack([text[place] for text, place in zip(texts, places, strict=True)])
        logits = llma.decode(tokens, cache, active)
        for slot in (1, 2):
            torch.testing.assert_close(logits[slot], wanted[slot][places[slot]], atol=1e-4, rtol=0)
            places[slot] += 1
        cache.extend([1, 2], [1, 1])
    logits = llma.prefill(texts[0][places[0] :], [70 - places[0]], [0], cache)
    torch.testing.assert_close(logits[0], wanted[0][-1], atol=1e-4, rtol=0)


# --- configs


PUBLISHED = {
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "rope_theta": 1000000.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "max_window_layers": 48,
            "sliding_window": None,
            "rope_scaling": None,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        },
        (30.53, 3.35),
    ),
    "Qwen3-235B-A22B": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 4096,
            "moe_intermediate_size": 1536,
            "intermediate_size": 12288,
            "num_hidden_layers": 94,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        (235.09, 22.2),
    ),
    "GLM-4.5-Air": (
        {
            "model_type": "glm4_moe",
            "attention_bias": True,
            "head_dim": 128,
            "hidden_size": 4096,
            "partial_rotary_factor": 0.5,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": True,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "routed_scaling_factor": 1.0,
            "num_experts_per_tok": 8,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 46,
            "num_nextn_predict_layers": 1,
            "use_qk_norm": False,
            "vocab_size": 151552,
        },
        (106.85, 13.4),
    ),
    "MiniMax-M2": (
        {
            "model_type": "minimax_m2",
            "head_dim": 128,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_hidden_layers": 62,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "attn_type_list": [1] * 62,
            "qk_norm_type": "per_layer",
            "use_qk_norm": True,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "shared_intermediate_size": 0,
            "rope_theta": 5000000,
            "rotary_dim": 64,
            "vocab_size": 200064,
        },
        (228.69, 11.0),
    ),
    "gpt-oss-20b": (
        {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "attention_bias": True,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "quantization_config": {"quant_method": "mxfp4"},
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "vocab_size": 201088,
        },
        (20.91, 4.19),
    ),
    "OLMoE-1B-7B": (
        {
            "model_type": "olmoe",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 50304,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "rope_theta": 10000.0,
            "rope_scaling": None,
        },
        (6.92, 1.28),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_config_leaves_out_is_as_transformers_has_it(name: str) -> None:
    """Or is asked for; each setting by itself, in a config in which none has the value that is the default."""
    family, case = FAMILIES[name], CASES[name]
    odd = {"num_attention_heads": 64, "num_key_value_heads": 16, "hidden_size": 512, "rms_norm_eps": 1e-4}
    config = getattr(transformers, f"{case.classes}Config")
    full = config(**(SHARED | case.settings | odd)).to_dict() | {"model_type": name}
    settings = {*family.sizes.values(), *family.experts.values(), *family.defaults, *family.fixed, *family.read}
    settings = settings & full.keys() - {"vocab_size", "max_position_embeddings", "num_hidden_layers"}
    asked = {family.sizes[own] for own in ("dim", "n_heads", "hidden_dim")} - family.defaults.keys()
    assert {"num_key_value_heads", "num_experts_per_tok", "rms_norm_eps"} <= settings - asked
    for setting in settings:
        rest = {key: value for key, value in full.items() if key != setting}
        if setting in asked:
            with pytest.raises(ValueError, match="missing: add them"):
                ModelArgs.from_dict(sizes_of_config(rest))
            continue
        expected = sizes_of_config(config(**rest).to_dict() | {"model_type": name})
        assert ModelArgs.from_dict(sizes_of_config(rest)) == ModelArgs.from_dict(expected), setting
    assert "n_kv_heads" not in sizes_of_config(full | {"num_key_value_heads": None})  # as many as of queries


LONG = {"original_max_position_embeddings": 64}
# Drawn beside a factor, a base and a width of the heads.
ROPES: dict[str, dict[str, tuple[Any, ...]]] = {
    "linear": {},
    "yarn": {
        "beta_fast": (None, 32.0, 8.0),
        "beta_slow": (None, 1.0, 2.5),
        "truncate": (True, False),
        "attention_factor": (None, 0.8),
        "mscale": (None, 0.7),
        "mscale_all_dim": (None, 0.4),
    },
    "llama3": {"low_freq_factor": (1.0, 2.0), "high_freq_factor": (4.0, 9.0)},
}


@pytest.mark.parametrize("kind", ROPES)
def test_the_rotary_embedding_of_drawn_configs_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    """At positions beyond the original length, of whole heads and parts of them, there and back."""
    draw = random.Random(f"{kind} 1")
    for _ in range(25):
        said = {name: value for name, values in ROPES[kind].items() if (value := draw.choice(values)) is not None}
        said |= {"rope_type": kind, "rope_theta": draw.choice((1e4, 1.5e5)), "factor": draw.choice((1.0, 2.5, 32.0))}
        said |= {} if kind == "linear" else {"original_max_position_embeddings": draw.choice((40, 512, 4096))}
        part = draw.choice((0.5, 1.0))
        sizes = SHARED | {"head_dim": draw.choice((16, 64)), "n_routed_experts": 8, "moe_intermediate_size": 8}
        config = transformers.Glm4MoeConfig(**sizes, rope_parameters={**said, "partial_rotary_factor": part})
        frequencies, longer = ROPE_INIT_FUNCTIONS[kind](deepcopy(config), torch.device("cpu"))
        config.architectures = ["Glm4MoeForCausalLM"]
        config.save_pretrained(tmp_path / "theirs")
        args = load_args([tmp_path / "theirs" / "config.json"])
        (tmp_path / "ours.json").write_text(json.dumps(config_of(args, torch.float32)[1]))
        again = load_args([tmp_path / "ours.json"])
        assert again == ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args
        rotary = RotaryTable(
            args.head_dim,
            200,
            turned=args.rotary_dim,
            theta=args.rope_theta,
            scaling=args.rope_scaling,
            slowed=args.rope,
            device=torch.device("cpu"),
        )
        angles = torch.arange(200)[:, None].double() * frequencies.double()
        turned = args.rotary_dim
        assert turned == 2 * angles.shape[1]
        for ours, theirs in ((rotary.cos, angles.cos()), (rotary.sin[:, 1::2].repeat_interleave(2, 1), angles.sin())):
            wanted = (theirs * longer).float().repeat_interleave(2, 1)
            torch.testing.assert_close(ours[:, :turned], wanted, atol=3e-5, rtol=0)
        assert (rotary.cos[:, turned:] == 1).all()
        assert (rotary.sin[:, turned:] == 0).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_names_family_and_parameters(name: str, tmp_path: Path) -> None:
    content, (total, active) = PUBLISHED[name]
    (path := tmp_path / "config.json").write_text(json.dumps(content))
    lines = list(describe(path))
    assert any(line.split()[:2] == ["family", content["model_type"]] for line in lines), lines
    counts = next(line for line in lines if line.startswith("parameters")).replace(",", "").split()
    assert (round(int(counts[1]) / 1e9, 2), int(counts[4]) / 1e9) == (total, pytest.approx(active, abs=0.05))
    args = load_args([path])
    by_class = {**content, "model_type": None, "architectures": [FAMILIES[content["model_type"]].architecture]}
    path.write_text(json.dumps(by_class))
    assert load_args([path]) == args
    # A product has a matrix, and looking up the embedding is none.
    products = flops_per_token(args, 0) / 6 + args.vocab_size * args.dim
    assert products / 1e9 == pytest.approx(active, abs=0.05)
    assert ModelArgs.from_dict(json.loads(json.dumps(args.to_dict()))) == args


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "qwen3_moo"}, "model_type 'qwen3_moo' is unknown (did you mean qwen3_moe?)"),
        ({"model_type": "llama"}, "model_type 'llama' is unknown"),
        ({"hidden_size": None}, "key(s) dim missing: add them (in that file dim is hidden_size)"),
        (
            {"num_key_value_heads": 5},
            "(in that file n_heads is num_attention_heads, n_kv_heads is num_key_value_heads)",
        ),
        ({"model_type": None, "architectures": ["OlmoForCausalLM"]}, "architectures 'OlmoForCausalLM' is unknown (did"),
        (
            {"model_type": None, "architectures": []},
            "it says no model_type, so its family is not known: give one of mix",
        ),
        ({"mlp_only_layers": 0}, "mlp_only_layers must be a list of layers' numbers, not 0"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be a whole number from 1 on, not 0"),
        ({"decoder_sparse_step": 49}, "dense.layers names all layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"model_type": "glm4_moe", "partial_rotary_factor": 0.2}, "attention.rotary_dim is 25"),
        ({"model_type": "glm4_moe", "n_routed_experts": 8, "n_group": 3}, "8 experts do not make 3 groups"),
        ({"model_type": "glm4_moe", "n_group": 32}, "8, and 1 of 32 groups have fewer experts"),
        ({"model_type": "glm4_moe", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"model_type": "minimax_m2", "scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"model_type": "minimax_m2", "use_routing_bias": False}, "use_routing_bias is False"),
        ({"model_type": "minimax_m2", "qk_norm_type": "per_head"}, "qk_norm_type is 'per_head'"),
        ({"model_type": "minimax_m2", "attn_type_list": [1, 0]}, "attn_type_list is [1, 0]"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantized by another program"),
        ({"model_type": "gpt_oss", "layer_types": ["full_attention"]}, "layer_types must name each of 48 layers"),
        ({"model_type": "gpt_oss", "layer_types": ["chunked_attention"] * 48}, "layer_types must name each of 48"),
        ({"model_type": "gpt_oss", "sliding_window": 0}, "sliding_window must be a whole number from 1 on"),
        ({"model_type": "gpt_oss", "swiglu_limit": -7}, "moe.clamp.limit must be a number above 0, not -7"),
        ({"model_type": "gpt_oss", "attention_bias": "no"}, "attention_bias must be true or false, not 'no'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type is 'longrope'"),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 4}},
            "rope_parameters {'rope_theta': 1000000.0} and rope_scaling {'factor': 4, 'type': 'linear'} do not say",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "factor of yarn rope scaling must be a number above 0"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0, **LONG, "low_freq_factor": 8}}, "low_freq_factor 8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **LONG, "beta_slow": "1"}}, "rope.beta_slow must be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **LONG, "mscale": "1"}}, "mscale and mscale_all_dim"),
        ({"norm_topk_prob": "yes"}, "moe.norm_topk_prob must be true or false, not 'yes'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized by another program"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, "quantized by another"),
        ({"model_type": "olmoe", "clip_qkv": -1}, "attention.clip must be null or a number above 0, not -1"),
    ],
)
def test_a_setting_that_is_not_followed_is_refused_by_name(
    changes: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {**PUBLISHED["Qwen3-30B-A3B"][0], **changes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert main(["inspect", str(tmp_path / "config.json")]) == 1
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("ERROR: ")]
    assert len(errors) == 1
    assert says in errors[0]
