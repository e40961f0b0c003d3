"""Adapters above quantized weights (QLoRA): gradients, steps, files, and what a run says of bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import add_by_hand, random_adapter, trained_by_hand, write_adapter
from checkpoints import accessory_config, write_checkpoint
from finetuning import Setting, finetune_on_rank, layout, losses, make_setting, model_tensors
from quantized import mixtral_to_quantize, quantized_by_hand
from ranks import RankPool, assert_same, error_of
from test_gradients import Batch, assert_gradients, random_batch, reference_loss
from test_peft_model import Found, gradients_of

from accessory.checkpoint.convert import split
from accessory.checkpoint.merge import merge
from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.config import QuantArgs
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.quant import QuantizedParameter
from accessory.tools.docstring_dialogues import write_dialogues

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]
QUANTS = {name: QuantArgs(type=name) for name in ("int8", "int4", "nf4")}  # type: ignore[arg-type]
BATCH = random_batch(6, [20, 9, 16, 1], 20)


@pytest.fixture(scope="module")
def paths(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A plain base and an adapter for it."""
    folder = tmp_path_factory.mktemp("qlora")
    hf = mixtral_to_quantize(5)
    config = accessory_config(hf.config)
    base = write_checkpoint(folder / "base", hf, small_tokenizer, files=2)
    adapter = random_adapter(config, 8)
    return [base, write_adapter(folder / "adapter", adapter, config, files=2, tokenizer=small_tokenizer)]


@pytest.fixture(scope="module")
def true_gradients() -> dict[str, Found]:
    """transformers' model with what each quantization leaves of its weights, and the adapter by hand."""
    found = {}
    for name, quant in QUANTS.items():
        hf = mixtral_to_quantize(5)
        truth = add_by_hand(quantized_by_hand(hf, quant), random_adapter(accessory_config(hf.config), 8)).train()
        loss, balance = reference_loss(truth, BATCH, 0.1)
        (loss + balance).backward()
        grads = {
            key: torch.zeros_like(own) if own.grad is None else own.grad for key, own in trained_by_hand(truth).items()
        }
        found[name] = Found(loss.item(), balance.item() / 0.1, grads)
    return found


def gradients_on_rank(
    paths: list[Path], quant: QuantArgs, mp_size: int, placement: str, data_parallel: str, policy: str, batch: Batch
) -> Found:
    pretrained = Pretrained.resolve(paths, max_seq_len=64, quant=quant)
    return gradients_of(pretrained, mp_size, placement, data_parallel, policy, batch)


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize(
    ("dp_size", "mp_size", "placement", "data_parallel", "policy"),
    [
        (1, 1, "expert", "sdp", "none"),
        (1, 2, "tensor", "sdp", "full"),
        (2, 1, "expert", "fsdp", "full"),
        (2, 2, "expert", "sdp", "none"),
        (2, 2, "tensor", "fsdp", "none"),
        (2, 2, "tensor", "ddp", "full"),
    ],
)
def test_gradients_above_quantized_weights_are_those_of_transformers(
    dp_size: int,
    mp_size: int,
    placement: str,
    data_parallel: str,
    policy: str,
    name: str,
    paths: list[Path],
    true_gradients: dict[str, Found],
    ranks: Pools,
) -> None:
    pool = ranks(dp_size * mp_size)
    found = pool.run(gradients_on_rank, paths, QUANTS[name], mp_size, placement, data_parallel, policy, BATCH)
    true = true_gradients[name]
    assert found[0].loss == pytest.approx(true.loss, rel=1e-5)
    assert_gradients(found[0].grads, true.grads, relative=1e-4)  # larger than its other models: sums round more
    for other in found[1:]:
        assert all(torch.equal(other.grads[key], grad) for key, grad in found[0].grads.items())


# --- whole runs


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    sizes = {"dim": 64, "hidden_dim": 128, "head_dim": 16}
    setting = make_setting(tmp_path_factory.mktemp("runs"), small_tokenizer, **sizes)
    peft = {"lora_rank": 8, "lora_targets": ["attention", "experts", "router", "head"], "bias_tuning": True}
    (setting.folder / "peft.json").write_text(json.dumps({**peft, "norm_tuning": True}))
    return setting


def arguments_of(setting: Setting, output: Path, dp_size: int = 1, mp_size: int = 1, **changes: Any) -> list[str]:
    options = {**layout(dp_size, mp_size), "llama_type": "mistral_peft", "auto_resume": True, **changes}
    given = setting.arguments(output, **options)
    if options["llama_type"] == "mistral_peft":
        given += ["--llama_config", str(setting.model / "config.json"), str(setting.folder / "peft.json")]
    return given


def run(pools: Pools, setting: Setting, output: Path, dp_size: int, mp_size: int, **changes: Any) -> None:
    given = arguments_of(setting, output, dp_size, mp_size, **changes)
    assert set(pools(dp_size * mp_size).run(finetune_on_rank, setting, given)) == {0}


STEPS, EXAMPLES_OF_STEP = 50, 2


@pytest.fixture(scope="module")
def tiny_setting(tiny: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """The tiny model, and as many dialogues as it reads in that many steps."""
    folder = tmp_path_factory.mktemp("dialogues")
    write_dialogues(folder / "dialogues", limit=STEPS * EXAMPLES_OF_STEP)
    (folder / "data.yaml").write_text((folder / "dialogues" / "data.yaml").read_text())
    split(tiny[0], folder / "base", mp=1)
    (folder / "peft.json").write_text('{"lora_rank": 16, "bias_tuning": true, "norm_tuning": true}')
    return Setting(folder, 128)


def dialogue_losses(pools: Pools, setting: Setting, output: Path, dp_size: int, mp_size: int, **changes: Any) -> float:
    """Sum of the last ten steps' losses."""
    batch = {"batch_size": EXAMPLES_OF_STEP // dp_size, "accum_iter": 1}
    settings = {"max_steps": STEPS, "epochs": 2, "lr": 1e-3, "dialog": True, **batch, **changes}
    run(pools, setting, output, dp_size, mp_size, **settings)
    found = losses(output)
    assert len(found) == STEPS
    assert sum(found[-10:]) < 0.9 * sum(found[:10]), "it must have learned something"
    return sum(found[-10:])


@pytest.fixture(scope="module")
def plain_loss(tiny_setting: Setting, ranks: Pools) -> float:
    """With adapters above weights that are not quantized."""
    return dialogue_losses(ranks, tiny_setting, tiny_setting.folder / "plain", 1, 1)


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "data_parallel", "quant"),
    [(1, 2, "sdp", "nf4"), pytest.param(2, 1, "fsdp", "nf4", marks=pytest.mark.soak)],
)
def test_a_run_ends_where_one_above_plain_weights_ends(
    dp_size: int,
    mp_size: int,
    data_parallel: str,
    quant: str,
    tiny_setting: Setting,
    plain_loss: float,
    ranks: Pools,
    tmp_path: Path,
) -> None:
    changes = {"quant": quant, "data_parallel": data_parallel}
    found = dialogue_losses(ranks, tiny_setting, tmp_path, dp_size, mp_size, **changes)
    assert found == pytest.approx(plain_loss, rel=0.02)
    assert found != plain_loss, "nothing was quantized"


MODEL = "epoch0-iter12"


@pytest.fixture(scope="module")
def adapter_run(setting: Setting, ranks: Pools) -> Path:
    output = setting.folder / "adapter"
    run(ranks, setting, output, 2, 2, max_steps=6, quant="nf4", data_parallel="fsdp")
    return output


def test_a_stopped_run_ends_at_the_same_bits(adapter_run: Path, setting: Setting, ranks: Pools, tmp_path: Path) -> None:
    for end in (3, 6):
        run(ranks, setting, tmp_path, 2, 2, max_steps=end, quant="nf4", data_parallel="fsdp")
    assert losses(tmp_path) == losses(adapter_run)
    assert_same(model_tensors(tmp_path / MODEL), model_tensors(adapter_run / MODEL))


def test_what_is_written_is_the_adapter_alone(adapter_run: Path, setting: Setting) -> None:
    tensors = model_tensors(adapter_run / MODEL)
    assert all(any(part in name for part in ("lora", "bias", "norm")) for name in tensors)
    assert "quant" not in json.loads((adapter_run / MODEL / "config.json").read_text())
    folders = [setting.model, adapter_run / MODEL]
    for quant in (None, "nf4", QuantArgs(type="int8", head=True)):
        model = MetaModel.from_pretrained(folders, dtype="fp32", device="cpu", max_seq_len=64, quant=quant)
        assert model.llma.layers[0].attention.wq.lora_b.weight.any()  # type: ignore[union-attr,operator]
        assert isinstance(model.llma.layers[0].attention.wq.weight, QuantizedParameter) == (quant is not None)  # type: ignore[union-attr]


def test_training_starts_from_a_quantized_folder(setting: Setting, adapter_run: Path, ranks: Pools) -> None:
    stored = setting.folder / "nf4"
    quantize_checkpoint(setting.model, stored, QUANTS["nf4"])
    output = setting.folder / "from stored"
    run(ranks, setting, output, 2, 2, max_steps=6, data_parallel="fsdp", pretrained_path=stored)
    assert losses(output) == losses(adapter_run)
    (adapter,) = output.glob("epoch0-iter12")
    model = MetaModel.from_pretrained([stored, adapter], dtype="fp32", device="cpu", max_seq_len=64)
    assert isinstance(model.llma.layers[0].attention.wq.weight, QuantizedParameter)  # type: ignore[union-attr]


# --- bad input


def error_on_rank(setting: Setting, arguments: list[str]) -> tuple[str, str]:
    return error_of(finetune_on_rank, setting, arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama_type": None, "quant": "nf4"}, "quantized weights (nf4) cannot train"),
        ({"quant": "fp4"}, "quant 'fp4' is unknown (did you mean mxfp4?): choose from int8, int4, nf4, fp8, mxfp4"),
        ({"quant": "int4", "group_size": 16}, "must be 32 or 64, not 16"),
        ({"group_size": 32}, "give --quant TYPE as well"),
        ({"quant": "nf4", "pretrained_path": None, "tokenizer_path": "TOKENIZER"}, "no weights to quantize"),
    ],
)
def test_bad_quantization_is_refused_on_all_ranks(
    changes: dict[str, Any], words: str, setting: Setting, ranks: Pools, tmp_path: Path
) -> None:
    tokenizer = str(setting.model / "tokenizer.model")
    changes = {name: tokenizer if value == "TOKENIZER" else value for name, value in changes.items()}
    given = arguments_of(setting, tmp_path / "out", **changes)
    for kind, text in ranks(2).run(error_on_rank, setting, given):
        assert kind == "ValueError"
        assert words in text


def test_merging_into_quantized_weights_is_refused(paths: list[Path], tmp_path: Path) -> None:
    quantize_checkpoint(paths[0], tmp_path / "nf4", QUANTS["nf4"])
    with pytest.raises(ValueError, match=r"nf4 is quantized .*merge into the weights that it was made of"):
        merge(tmp_path / "nf4", paths[1], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
