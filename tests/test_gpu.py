"""The library on one GPU, beside transformers and beside itself on the CPU; skipped where there is none."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import random_adapter, write_adapter
from checkpoints import accessory_config, hf_greedy, hf_logits, random_mixtral, random_prompts, write_checkpoint
from finetuning import Setting, make_setting
from models import completions
from quantized import mixtral_to_quantize, quantized_by_hand
from torch import Tensor
from triton_runs import needs_gpu

from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.config import QuantArgs
from accessory.generation.sampling import Sampling
from accessory.model.meta import MetaModel
from accessory.model.scoring import score_tokens
from accessory.serve.driver import Driver
from accessory.serve.request import Event

pytestmark = needs_gpu

PROMPTS = random_prompts(4, [5, 17, 40, 1])
SIZES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "one kv head, top 1": {"num_key_value_heads": 1, "num_experts_per_tok": 1, "num_local_experts": 4},
    "odd sizes": {"hidden_size": 33, "intermediate_size": 15, "num_attention_heads": 3, "num_key_value_heads": 3},
    "top 3 of 16": {"num_local_experts": 16, "num_experts_per_tok": 3, "head_dim": 10},
}
QUANTS = {
    "int8": QuantArgs(type="int8", head=True),
    "int4": QuantArgs(type="int4"),
    "int4 in 32": QuantArgs(type="int4", group_size=32),
    "nf4": QuantArgs(type="nf4"),
}


def load(paths: Any, device: str = "cuda", dtype: str = "fp32", **settings: Any) -> MetaModel:
    return MetaModel.from_pretrained(paths, device=device, dtype=dtype, **{"max_seq_len": 128, **settings})


def scores(model: MetaModel, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Tensor]:
    with torch.no_grad():
        return [logits.cpu() for logits in score_tokens(model.llma, prompts)]


@contextmanager
def kernel_by_kernel(model: MetaModel) -> Iterator[None]:
    model.llma.cuda_graphs = False
    yield
    model.llma.cuda_graphs = True


# ---- what it says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_it_says_what_transformers_says(name: str, small_tokenizer: Path, tmp_path: Path) -> None:
    hf = random_mixtral(5, **SIZES[name])
    model = load(write_checkpoint(tmp_path / "base", hf, small_tokenizer, files=1))
    for prompt, logits in zip(PROMPTS, scores(model), strict=True):
        torch.testing.assert_close(logits, hf_logits(hf, prompt), atol=1e-4, rtol=1e-4)
    assert completions(model.llma, PROMPTS, max_gen_len=64) == [hf_greedy(hf, prompt, 64) for prompt in PROMPTS]


@pytest.mark.parametrize("name", QUANTS)
def test_a_quantized_model_says_what_its_dequantized_weights_say(
    name: str, small_tokenizer: Path, tmp_path: Path
) -> None:
    hf = mixtral_to_quantize(5)
    base = write_checkpoint(tmp_path / "base", hf, small_tokenizer, files=2)
    truth = quantized_by_hand(hf, QUANTS[name])
    # Quantized where the truth is: on a GPU PyTorch divides by a number through its inverse, and a weight in
    # the middle between two codes may go to the other one.
    quantize_checkpoint(base, tmp_path / "quantized", QUANTS[name])
    model = load(tmp_path / "quantized")
    for prompt, logits in zip(PROMPTS, scores(model), strict=True):
        torch.testing.assert_close(logits, hf_logits(truth, prompt), atol=1e-4, rtol=1e-4)
    assert completions(model.llma, PROMPTS, max_gen_len=24) == [hf_greedy(truth, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("quant", [None, "int8", "int4", "nf4"])
def test_half_precision_is_as_near_the_truth_as_on_a_cpu(
    dtype: str, quant: str | None, small_tokenizer: Path, tmp_path: Path
) -> None:
    """The truth is float32 with the same weights; 8-bit activations of the CPU's int8 and int4 are no help to it."""
    hf = mixtral_to_quantize(5)
    base = write_checkpoint(tmp_path / "base", hf, small_tokenizer, files=1)
    whole = scores(load(base, "cpu", quant=quant))
    on_cpu, on_gpu = (scores(load(base, device, dtype, quant=quant)) for device in ("cpu", "cuda"))
    off_cpu, off_gpu = (
        torch.cat(
            [(found.float() - true).norm(dim=-1) / true.norm(dim=-1) for found, true in zip(own, whole, strict=True)]
        )
        for own in (on_cpu, on_gpu)
    )
    # The median: where two experts are nearly as probable, a rounding decides between them, and a token is far off.
    assert off_gpu.median() < 1.5 * off_cpu.median() + 1e-3


def test_adapters(small_tokenizer: Path, tmp_path: Path) -> None:
    hf = mixtral_to_quantize(5)
    config = accessory_config(hf.config)
    base = write_checkpoint(tmp_path / "base", hf, small_tokenizer, files=2)
    adapter = write_adapter(tmp_path / "adapter", random_adapter(config, 8), config, files=2, tokenizer=small_tokenizer)
    for quant in (None, "int8", "nf4"):
        on_cpu, on_gpu = (load([base, adapter], device, quant=quant) for device in ("cpu", "cuda"))
        for cpu, gpu in zip(scores(on_cpu), scores(on_gpu), strict=True):
            torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=1e-4)
        answers = [completions(model.llma, PROMPTS, max_gen_len=24) for model in (on_cpu, on_gpu)]
        assert answers[0] == answers[1]


# ---- captured steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("quant", [None, "int4"])
def test_a_captured_step_says_what_its_kernels_say(
    dtype: str, quant: str | None, small_tokenizer: Path, tmp_path: Path
) -> None:
    """More prompts than slots, so that some join late, and answers that reach into a second block of the cache."""
    base = write_checkpoint(tmp_path / "base", mixtral_to_quantize(5), small_tokenizer, files=1)
    model = load(base, dtype=dtype, quant=quant, max_seq_len=400)
    model.llma.args = model.llma.args.replace(max_batch_size=3)
    prompts = random_prompts(9, [5, 17, 200, 1, 40, 2, 3])
    with kernel_by_kernel(model):
        expected = completions(model.llma, prompts, max_gen_len=80)
    assert completions(model.llma, prompts, max_gen_len=80) == expected


@torch.no_grad()
def test_steps_are_captured_once_for_each_shape(small_tokenizer: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", random_mixtral(5), small_tokenizer, files=1)
    llma = load(base, max_seq_len=400).llma
    cache, alone = llma.new_cache(3, 400), llma.new_cache(3, 400)
    prompt = torch.tensor([1, 5, 9], device="cuda")
    active = torch.tensor([True, False, True], device="cuda")
    for own in (cache, alone):
        llma.prefill(torch.cat((prompt, prompt[:2])), [3, 2], [0, 2], own)
    kept = []
    for step in range(300):
        tokens = torch.tensor([step % 380, 0, 7], device="cuda")
        llma.cuda_graphs = True
        logits = llma.decode(tokens, cache, active)
        llma.cuda_graphs = False
        torch.testing.assert_close(logits[active], llma.decode(tokens, alone, active)[active], atol=1e-5, rtol=1e-5)
        kept.append((logits, logits.clone()))
        for own in (cache, alone):
            own.extend([0, 2], [1, 1])
    assert len(cache.graphs) == 2
    assert len(alone.graphs) == 0
    assert all(torch.equal(logits, copy) for logits, copy in kept), "a later step wrote over what was given out"


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_step_that_waits_for_the_gpu_is_not_captured(dtype: str, small_tokenizer: Path, tmp_path: Path) -> None:
    """More pairs than our kernel takes, which only some GPUs multiply without a number on the host."""
    base = write_checkpoint(tmp_path / "base", random_mixtral(5), small_tokenizer, files=1)
    llma = load(base, dtype=dtype).llma
    cache = llma.new_cache(40, 128)
    tokens, active = torch.arange(40, device="cuda"), torch.ones(40, dtype=torch.bool, device="cuda")
    for _ in range(6):
        assert llma.decode(tokens, cache, active).isfinite().all()
        cache.extend(range(40), [1] * 40)
    has_kernel = dtype == "bf16" and torch.cuda.get_device_capability()[0] in (9, 10)
    assert len(cache.graphs) == has_kernel


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_steps_are_captured_on_another_gpu_than_the_current_one(small_tokenizer: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", random_mixtral(5), small_tokenizer, files=1)
    expected = completions(load(base, "cpu").llma, PROMPTS, max_gen_len=40)
    for device in ("cuda:1", "cuda:0"):
        assert completions(load(base, device).llma, PROMPTS, max_gen_len=40) == expected


# ---- serving -----------------------------------------------------------------------------------------------


def tokens_of(events: Sequence[Event]) -> list[int]:
    return [token for event in events for token in event.tokens]


def test_a_server_answers_as_on_a_cpu(small_tokenizer: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", random_mixtral(5), small_tokenizer, files=1)
    model = load(base, "cpu")
    eos = model.tokenizer.eos_id
    expected = completions(model.llma, PROMPTS * 3, max_gen_len=40, eos_id=eos)
    settings = {"max_seq_len": 128, "dtype": "fp32", "device": "cuda"}
    with Driver(base, ranks=1, slots=4, prefill_tokens=16, **settings) as driver:
        sampling = Sampling(max_gen_len=40)
        streams = [driver.submit(prompt, sampling) for prompt in PROMPTS * 3]
        answers = [tokens_of(list(stream)) for stream in streams]
    assert [[token for token in tokens if token != eos] for tokens in answers] == expected


# ---- training ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Setting:
    return make_setting(tmp_path_factory.mktemp("gpu"), small_tokenizer, dim=64, hidden_dim=64)


PEFT = {"llama_type": "mistral_peft"}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "fsdp": {"data_parallel": "fsdp", "grad_ckpt_policy": "full"},
    "ddp": {"data_parallel": "ddp"},
    "recomputed": {"grad_ckpt_policy": "moe", "accum_iter": 2},
    "adapter": PEFT,
    "nf4 and adapter": {**PEFT, "quant": "nf4"},
    "int8 and adapter": {**PEFT, "quant": "int8"},
}


def course(setting: Setting, output: Path, **changes: Any) -> list[dict[str, Any]]:
    """What a run writes into log.jsonl, started as a user starts it."""
    changes = {"batch_size": 8, "max_steps": 12, "max_words": 48, **changes}
    if changes.get("llama_type"):
        config = setting.folder / "peft.json"
        config.write_text(json.dumps({"lora_rank": 8, "bias_tuning": True, "norm_tuning": True}))
        base_config = json.loads((setting.model / "config.json").read_text())
        (setting.folder / "both.json").write_text(json.dumps({**base_config, **json.loads(config.read_text())}))
        changes["llama_config"] = setting.folder / "both.json"
    main = Path(__file__).parent.parent / "accessory" / "main_finetune.py"
    done = subprocess.run(
        [sys.executable, main, *setting.arguments(output, **changes)],
        env={**os.environ, **setting.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_a_cpu(name: str, setting: Setting, tmp_path: Path) -> None:
    on_cpu = course(setting, tmp_path / "cpu", **RUNS[name])
    on_gpu = course(setting, tmp_path / "gpu", **{**RUNS[name], "device": "cuda"})
    for quantity in ("loss", "grad_norm"):
        cpu, gpu = (torch.tensor([line[quantity] for line in lines]) for lines in (on_cpu, on_gpu))
        torch.testing.assert_close(gpu, cpu, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp16"])
def test_a_run_in_less_precision_learns_as_much(precision: str, setting: Setting, tmp_path: Path) -> None:
    whole = course(setting, tmp_path / "whole", device="cuda")
    less = course(setting, tmp_path / "less", device="cuda", precision=precision)
    assert less[-1]["loss"] < whole[0]["loss"] - 0.5 * (whole[0]["loss"] - whole[-1]["loss"])
