"""Twenty steps of a whole run beside transformers' Trainer, with peft or without: same batches, losses and weights."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import random_mixtral
from finetuning import Setting, finetune_on_rank, log_lines, make_setting
from ranks import RankPool
from safetensors.torch import load_file
from torch import Tensor

from accessory.checkpoint.adapter_export import export_adapter
from accessory.data.cache import CACHE_VARIABLE, load_finetune_data
from accessory.data.collate import Example, collate
from accessory.data.sampler import StepSampler
from accessory.model.pretrained import Pretrained

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

BATCH, EPOCHS, STEPS = 8, 4, 20
LR, DECAY, CLIP = 2e-3, 0.1, 1.0
# Without the experts, whose two halves have one lora_A in peft.
LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]}
LORA |= {"target_parameters": ["mlp.gate.weight"]}


class Course(NamedTuple):
    """Losses and rates of the steps, the loss of held-out data before and after, and what has trained."""

    losses: list[float]
    rates: list[float]
    held_out: list[float]
    weights: dict[str, Tensor]


def begun_with() -> Any:
    """Few experts: the gradient of a router's row without tokens is 0 here, and there what rounding makes of 0."""
    return random_mixtral(5, router_aux_loss_coef=0.0, num_local_experts=4)


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("trainer")
    setting = make_setting(folder, small_tokenizer, examples=BATCH * STEPS // EPOCHS)
    begun_with().save_pretrained(folder / "hf")
    (folder / "hf" / "tokenizer.model").write_bytes(small_tokenizer.read_bytes())
    records = [{"instruction": f"Name {word}", "output": f"the {word} of it"} for word in ("list", "value", "number")]
    (folder / "eval.json").write_text(json.dumps(records))
    (folder / "eval.yaml").write_text((folder / "data.yaml").read_text().replace("data.json", "eval.json"))
    return setting


def rows_of(setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch) -> list[list[Example]]:
    """The rows of each step of the run, or all that are held out."""
    monkeypatch.setenv(CACHE_VARIABLE, setting.environment[CACHE_VARIABLE])
    tokenizer = Pretrained.resolve(setting.folder / "hf").tokenizer
    data = load_finetune_data(setting.folder / f"{name}.yaml", tokenizer, max_words=setting.max_words)
    if name == "eval":
        return [[data[index] for index in range(len(data))]]
    sampler = StepSampler(data.lengths, BATCH)
    return [[data[index] for index in step] for epoch in range(EPOCHS) for step in sampler.steps(epoch)]


def by_trainer(model: Any, steps: Sequence[list[Example]], held_out: list[Example], output: Path) -> Course:
    """The same steps in transformers' Trainer, which takes the rows in the order in which they come."""
    from transformers import Trainer, TrainingArguments

    losses, rates = [], []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Iterable[int]:
            return range(BATCH * STEPS)

        def training_step(self, *given: Any, **more: Any) -> Tensor:
            rates.append(self.optimizer.param_groups[0]["lr"])
            loss: Tensor = super().training_step(*given, **more)
            losses.append(loss.item())
            return loss

    def as_batch(rows: list[Example]) -> dict[str, Tensor]:
        tokens, labels, _ = collate([[row] for row in rows])
        lengths = torch.tensor([len(own) for own, _ in rows])
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels.masked_fill(labels == 0, -100)}

    arguments = TrainingArguments(
        str(output),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=len(held_out),
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        adam_beta2=0.95,
        optim="adamw_torch",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        label_names=["labels"],
    )
    rows = [row for step in steps for row in step]
    trainer = InOrder(model, arguments, as_batch, train_dataset=rows, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trained = {name: own.detach() for name, own in model.named_parameters() if own.requires_grad}
    return Course(losses, rates, [before, trainer.evaluate()["eval_loss"]], trained)


def by_accessory(setting: Setting, ranks: Callable[[int], RankPool], output: Path, **changes: Any) -> Path:
    """A run of ours; returns the folder of its last model."""
    options = {
        "pretrained_path": setting.folder / "hf",
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "save_interval": EPOCHS,
        "warmup_epochs": None,
        "lr": LR,
        "weight_decay": DECAY,
        "clip_grad": CLIP,
        "load_balancing_weight": 0,
        "eval_data_config": setting.folder / "eval.yaml",
        "eval_interval": STEPS,
        "eval_first": True,
    }
    ranks(1).run(finetune_on_rank, setting, setting.arguments(output, **options | changes))
    return output / f"epoch{EPOCHS - 1}"


def assert_same_course(output: Path, weights: dict[str, Tensor], theirs: Course) -> None:
    lines = log_lines(output)
    steps = [line for line in lines if "loss" in line]
    assert [line["lr"] for line in steps] == pytest.approx(theirs.rates, rel=1e-6)
    assert [line["loss"] for line in steps] == pytest.approx(theirs.losses, abs=1e-4)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.4, "it must have learned something"
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert found == pytest.approx(theirs.held_out, abs=1e-5)
    assert weights.keys() == theirs.weights.keys()
    for name, weight in theirs.weights.items():
        difference = (weights[name] - weight).abs().max().item()
        assert difference <= 1e-4, f"{name}: {difference}"


def test_whole_models_are_those_of_the_trainer(
    setting: Setting, ranks: Callable[[int], RankPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, (held_out,) = (rows_of(setting, name, monkeypatch) for name in ("data", "eval"))
    theirs = by_trainer(begun_with(), steps, held_out, tmp_path / "theirs")
    folder = by_accessory(setting, ranks, tmp_path / "ours", export_form="hf")
    from transformers import MixtralForCausalLM

    ours = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_course(tmp_path / "ours", dict(ours.named_parameters()), theirs)


def test_adapters_are_those_of_the_trainer_and_peft(
    setting: Setting, ranks: Callable[[int], RankPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    steps, (held_out,) = (rows_of(setting, name, monkeypatch) for name in ("data", "eval"))
    begun = get_peft_model(begun_with(), LoraConfig(task_type="CAUSAL_LM", **LORA))
    begun.save_pretrained(tmp_path / "begun")
    base = begun_with()
    model = PeftModel.from_pretrained(base, str(tmp_path / "begun"), is_trainable=True)
    theirs = by_trainer(model, steps, held_out, tmp_path / "theirs")
    paths = setting.folder / "hf", tmp_path / "begun"
    folder = by_accessory(setting, ranks, tmp_path / "ours", only_save_trainable=True, pretrained_path=paths)
    export_adapter(folder, tmp_path / "ours in peft")
    ours = load_file(tmp_path / "ours in peft" / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): own for name, own in ours.items()}
    assert_same_course(tmp_path / "ours", named, theirs)
