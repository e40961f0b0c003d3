"""The options of main_finetune.py: their names, what they accept, and what they do."""

import json
import logging
import math
import random
import re
import shutil
from dataclasses import MISSING, asdict, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from finetuning import PER_EPOCH, Setting, finetune_on_rank, log_lines, losses, make_setting, model_tensors

from accessory.model.meta import MetaModel
from accessory.train.export import model_due
from accessory.train.options import FinetuneOptions
from accessory.train.space import Kind, Plan, models_after, say_space

# Every flag: its default, and for an example of its use the values that it gives. Users' scripts rely on them.
FLAGS: dict[str, tuple[Any, str, Any]] = {
    "llama_type": (None, "mistral", "mistral"),
    "llama_config": ((), "a.json b.json", ("a.json", "b.json")),
    "tokenizer_path": (None, "t.model", "t.model"),
    "pretrained_path": ((), "a b", ("a", "b")),
    "pretrained_type": (..., "consolidated", ...),
    "no_visual": (..., "", ...),
    "quant": (None, "int8", "int8"),
    "group_size": (64, "64", 64),
    "quant_head": (False, None, False),
    "lora_rank": (None, "8", 8),
    "lora_ranks": (None, "attention=64,experts=8", {"attention": 64, "experts": 8}),
    "lora_alpha": (None, "16", 16.0),
    "rslora": (None, "", True),
    "no_rslora": (..., None, ...),
    "lora_dropout": (None, "0.1", 0.1),
    "lora_targets": ((), "experts attention", ("experts", "attention")),
    "bias_tuning": (None, "", True),
    "no_bias_tuning": (..., None, ...),
    "norm_tuning": (None, "true", True),
    "no_norm_tuning": (..., None, ...),
    "data_config": (None, "d.yaml", "d.yaml"),
    "dialog": (False, "", True),
    "max_words": (1024, "4096", 4096),
    "chat_template": (None, "alpaca", "alpaca"),
    "ignore_fields": ((), "notes,score", ("notes", "score")),
    "skip_bad_records": (False, "", True),
    "packing": (False, "", True),
    "cache_ann_on_disk": (..., "", ...),
    "num_workers": (..., "4", ...),
    "pin_mem": (..., "", ...),
    "no_pin_mem": (..., "", ...),
    "batch_size": (4, "2", 2),
    "accum_iter": (1, "8", 8),
    "epochs": (1, "3", 3),
    "max_steps": (None, "5", 5),
    "lr": (2e-5, "5e-6", 5e-6),
    "min_lr": (0.0, "1e-7", 1e-7),
    "warmup_epochs": (0.0, "0.1", 0.1),
    "schedule": ("cosine", "linear", "linear"),
    "decay_steps": (None, None, 5),
    "optimizer": ("adamw", "muon", "muon"),
    "train_router": (None, "no", False),
    "no_train_router": (..., None, ...),
    "lr_router": (None, "1e-4", 1e-4),
    "lr_embeddings": (None, "1e-6", 1e-6),
    "lora_plus": (None, "16", 16.0),
    "weight_decay": (0.0, "0.02", 0.02),
    "clip_grad": (1.0, "-1", -1.0),
    "load_balancing_weight": (None, "0", 0.0),
    "z_loss_weight": (None, "0.001", 0.001),
    "bias_update_rate": (0.0, "0.001", 0.001),
    "seed": (0, "7", 7),
    "model_parallel_size": (1, "8", 8),
    "expert_parallel_size": (1, "auto", "auto"),
    "data_parallel": ("sdp", "fsdp", "fsdp"),
    "expert_placement": ("auto", "tensor", "tensor"),
    "precision": ("bf16", "tf32", "tf32"),
    "checkpointing": (..., "", ...),
    "grad_ckpt_policy": ("none", "moe", "moe"),
    "device": (None, "cpu", "cpu"),
    "threads": (..., "2", ...),
    "eval_data_config": (None, "e.yaml", "e.yaml"),
    "eval_ratio": (None, "0.01", 0.01),
    "eval_interval": (None, None, 50),
    "eval_first": (False, None, True),
    "keep_best": (False, None, True),
    "early_stop": (None, None, 3),
    "output_dir": ("./output_dir", "out", "out"),
    "log_to": (("tensorboard",), "wandb,mlflow", ("wandb", "mlflow")),
    "save_interval": (1, "2", 2),
    "save_iteration_interval": (5000, "100", 100),
    "keep_last": (2, "3", 3),
    "keep_models": (None, "4", 4),
    "export_form": ("accessory", "hf", "hf"),
    "only_save_trainable": (False, "", True),
    "resume": (None, "run", "run"),
    "auto_resume": (False, "", True),
}


def parse(*arguments: str) -> dict[str, Any]:
    return asdict(FinetuneOptions.parse(["--data_config", "d.yaml", *arguments]))


# -- names


def test_the_flags_are_these(capsys):
    with pytest.raises(SystemExit) as caught:
        FinetuneOptions.parse(["--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert "(default: 0.0)" in told
    assert not re.search(r"default:\s+(None|False|\(\))", told), "which say nothing"
    shown = re.findall(r"^  (?:-h, )?--(\w+)", told, re.MULTILINE)
    assert sorted(shown) == sorted([*FLAGS, "help"])


def test_defaults():
    expected = {name: default for name, (default, _, _) in FLAGS.items() if default is not ...}
    assert parse() == {**expected, "data_config": "d.yaml"}


def options_table() -> str:
    """The table of docs/finetune.md."""
    lines = ["| option | default | what it says |", "|---|---|---|"]
    for heading in dict.fromkeys(option.metadata["group"] for option in fields(FinetuneOptions) if option.metadata):
        lines.append(f"| *{heading}* | | |")
        for option in fields(FinetuneOptions):
            if option.metadata.get("group") == heading:
                none = option.default is MISSING or str(option.default) in ("None", "False", "()", "('tensorboard',)")
                told = "" if none else f"`{option.default}`"
                lines.append(f"| `--{option.name}` | {told} | {option.metadata['help']} |")
    return "\n".join(lines) + "\n"


def test_the_docs_have_a_table_of_the_options():
    page = Path(__file__).parent.parent / "docs" / "finetune.md"
    assert options_table() in page.read_text(), f"put this into {page}:\n{options_table()}"


def test_validation_is_asked_for_with_its_data():
    given = "--eval_ratio 0.01 --eval_interval 50 --eval_first --keep_best --early_stop 3"
    names = ("eval_interval", "eval_first", "keep_best", "early_stop")
    assert parse(*given.split()) == {**parse(), "eval_ratio": 0.01, **{name: FLAGS[name][2] for name in names}}


@pytest.mark.parametrize("name", [name for name, (_, example, _) in FLAGS.items() if example is not None])
def test_each_flag_sets_its_value_alone(name):
    _, example, value = FLAGS[name]
    changed = {} if value is ... else {name: value}
    if name == "checkpointing":
        changed = {"grad_ckpt_policy": "full"}
    assert parse(f"--{name}", *example.split()) == {**parse(), **changed}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("data_parallel", ("sdp", "fsdp", "ddp")),
        ("precision", ("bf16", "fp16", "tf32", "fp32")),
        ("grad_ckpt_policy", ("full", "moe", "none")),
        ("device", ("cpu", "cuda")),
        ("optimizer", ("adamw", "adamw8bit", "muon")),
        ("schedule", ("cosine", "linear", "constant", "wsd")),
    ],
)
def test_choices(name, values, capsys):
    for value in values:
        assert parse(f"--{name}", value)[name] == value
    with pytest.raises(SystemExit):
        parse(f"--{name}", f"{values[0]}x")
    told = re.search(r"unknown value '\w+x' \(did you mean \w+\?\): choose from .*", capsys.readouterr().err)
    assert told is not None
    with pytest.raises(ValueError, match=re.escape(f"--{name}: {told[0]}")):
        FinetuneOptions(data_config="d.yaml", **{name: f"{values[0]}x"})


def test_each_way_to_switch_a_tuning_off():
    for given in ("--no_bias_tuning", "--no-bias_tuning", "--bias_tuning False", "--bias_tuning --no_bias_tuning"):
        assert parse(*given.split()) == {**parse(), "bias_tuning": False}, given
    assert parse("--no_norm_tuning", "--norm_tuning", "TRUE") == {**parse(), "norm_tuning": True}


def test_a_policy_rules_over_checkpointing():
    """The experiments pass --checkpointing; what follows may refine it."""
    assert parse("--checkpointing", "--grad_ckpt_policy", "moe")["grad_ckpt_policy"] == "moe"


def test_a_users_script_as_it_is():
    """All arguments that scripts for other trainers of these models pass, at once; the last one of a name rules."""
    text = (
        "--output_dir output/x --epochs 1 --warmup_epochs 0.03 --batch_size 4 --accum_iter 2 --num_workers 4 "
        "--max_words 2048 --lr 0.00002 --min_lr 0.000005 --clip_grad 2 --weight_decay 0.02 --data_parallel sdp "
        "--model_parallel_size 8 --checkpointing --llama_type mistral --llama_config a/config.json b.json --no_visual "
        "--tokenizer_path a/tokenizer.model --pretrained_path a --pretrained_type consolidated --dialog --pin_mem "
        "--data_config c.yaml --cache_ann_on_disk --save_interval 1 --save_iteration_interval 1000 --seed 1 "
        "--only_save_trainable --precision bf16 --batch_size 1 --no_pin_mem"
    )
    options = parse(*text.split())
    assert options["batch_size"] == 1
    assert options["llama_config"] == ("a/config.json", "b.json")
    assert options["grad_ckpt_policy"] == "full"


# -- values out of range


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        *((f"--{name} 0", f"--{name} is 0: give 1 or more") for name in ("batch_size", "accum_iter", "epochs")),
        *((f"--{name} 0", f"--{name} is 0: give 1 or more") for name in ("max_steps", "save_interval", "keep_last")),
        ("--keep_models 0", "--keep_models is 0: give 1 or more"),
        ("--model_parallel_size 0", "--model_parallel_size is 0: give 1 or more"),
        ("--save_iteration_interval -1", "--save_iteration_interval is -1: give 0 or more"),
        ("--max_words 2", "--max_words is 2: give 3 or more"),
        *((f"--{name} -1", f"--{name} is -1.0: give 0 or more") for name in ("lr", "min_lr", "warmup_epochs")),
        ("--weight_decay -0.5", "--weight_decay is -0.5: give 0 or more"),
        *((f"--{name} -1", f"--{name} is -1.0: give 0 or more") for name in ("load_balancing_weight", "z_loss_weight")),
        *((f"--{name} nan", f"--{name} is nan: give a finite number") for name in ("lr", "clip_grad", "weight_decay")),
        *((f"--{name} inf", f"--{name} is inf: give a finite number") for name in ("lr", "clip_grad", "warmup_epochs")),
        ("--bias_update_rate -1", "--bias_update_rate is -1.0: give 0 or more"),
        ("--bias_update_rate nan", "--bias_update_rate is nan: give a finite number"),
        ("--seed -1", "--seed is -1: give 0 or more"),
        (f"--seed {2**64}", f"--seed is {2**64}: give {2**64 - 1} at most"),
        *((f"--{name} {2**49}", f"--{name} is {2**49}: give {2**48} at most") for name in ("max_words", "epochs")),
        (f"--epochs {-(10**400)}", f"--epochs is -1{'0' * 55}...: give 1 or more"),
        (f"--keep_last {10**400}", f"--keep_last is 1{'0' * 56}...: give {2**48} at most"),
        (
            "--log_to wandb,mflow",
            "--log_to: unknown value 'mflow' (did you mean mlflow?): choose from tensorboard, wandb",
        ),
        ("--lr 0 --lr_router 1e-3", "--lr_router follows the schedule of --lr, which is 0: give --lr a rate"),
        ("--decay_steps 5", "--decay_steps is about --schedule wsd, and it is cosine: leave it out"),
        ("--schedule wsd --decay_steps 0", "--decay_steps is 0: give 1 or more"),
        ("--lr 1e-5 --min_lr 2e-5", "--min_lr 2e-05 is above --lr 1e-05"),
        ("--lora_rank 0", "--lora_rank must be a whole number above 0, not 0"),
        ("--lora_ranks gate=4", "--lora_ranks names 'gate': give ranks to attention, experts, routed, shared, dense, "),
        ("--lora_ranks router=0", "--lora_ranks router must be a whole number above 0, not 0"),
        (
            "--lora_targets router --train_router no",
            "--lora_targets router trains updates of routers, and --train_router",
        ),
        ("--lora_alpha 0", "--lora_alpha must be a number above 0, not 0.0"),
        ("--lora_dropout 1", "--lora_dropout must be a number from 0 to below 1, not 1.0"),
        ("--lora_rank 8 --llama_type mistral", "--lora_rank is about adapters, which --llama_type mistral does not"),
        ("--quant fp4", "quant 'fp4' is unknown (did you mean mxfp4?): choose from int8, int4, nf4, fp8, mxfp4"),
        ("--quant nf4 --group_size 32", "group size 32 is for int4: nf4 has none to choose"),
        ("--quant_head", "--group-size and --quant-head say how to quantize"),
        *((f"--{name} ''", f"--{name} is given an empty name") for name in ("data_config", "output_dir", "resume")),
        *((f"--{name} ''", f"--{name} is given an empty name") for name in ("tokenizer_path", "pretrained_path")),
        ("--output_dir run\udcff", r"--output_dir 'run\udcff' is not UTF-8: give another name"),
        ("--llama_config a.json ''", "--llama_config is given an empty name"),
        *((f"--eval_ratio {share}", f"--eval_ratio is {share}") for share in ("0.0", "1.0", "-0.5", "nan")),
        ("--eval_ratio 0.1 --eval_data_config e.yaml", "--eval_ratio holds back records and --eval_data_config names"),
        *((f"--{name} 1", f"--{name} needs held-out data") for name in ("eval_interval", "early_stop")),
        *((f"--{name}", f"--{name} needs held-out data: give --eval_ratio") for name in ("eval_first", "keep_best")),
        ("--eval_ratio 0.1 --early_stop 0", "--early_stop is 0: give 1 or more"),
    ],
)
def test_options_out_of_range(wrong, says):
    arguments = ["" if part == "''" else part for part in wrong.split()]
    with pytest.raises(ValueError, match="^" + re.escape(says)):
        FinetuneOptions.parse(["--data_config", "d.yaml", *arguments])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("--nonsense", "unknown option --nonsense"),
        ("--batch_size four", "argument --batch_size: invalid int value: 'four'"),
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--precision int8", "argument --precision: unknown value 'int8': choose from "),
        ("--data_parallel zero", "argument --data_parallel: unknown value 'zero': choose from "),
        ("--grad_ckpt_policy some", "argument --grad_ckpt_policy: unknown value 'some': choose from "),
        ("--pretrained_type meta_ori", "argument --pretrained_type: unknown value 'meta_ori': choose from "),
        ("--device cuda:1", "argument --device: unknown value 'cuda:1' (did you mean cuda?): choose from "),
        ("--pretrained_path", "argument --pretrained_path: expected at least one argument"),
        ("--expert_parallel_size all", "argument --expert_parallel_size: 'all' given: give a whole number, or auto"),
        ("--lora_rank 1.5", "argument --lora_rank: invalid int value: '1.5'"),
        (
            "--lora_ranks attention",
            "argument --lora_ranks: 'attention' given: give names and ranks, as in attention=64",
        ),
        ("--lora_targets expert", "argument --lora_targets: unknown value 'expert' (did you mean experts?): choose"),
        ("--bias_tuning maybe", "argument --bias_tuning: 'maybe' given: give true or false"),
        ("stray", "stray is one too many: main_finetune.py takes options alone"),
    ],
)
def test_arguments_that_cannot_be_read(wrong, says, capsys):
    with pytest.raises(SystemExit) as caught:
        FinetuneOptions.parse(["--data_config", "d.yaml", *wrong.split()])
    assert caught.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"main_finetune.py: error: {says}")


def test_the_data_are_required(capsys):
    with pytest.raises(SystemExit):
        FinetuneOptions.parse([])
    assert "the following arguments are required: --data_config" in capsys.readouterr().err


# -- what they do


@pytest.fixture(scope="module")
def setting(tmp_path_factory, small_tokenizer) -> Setting:
    return make_setting(tmp_path_factory.mktemp("options"), small_tokenizer, prompt_type="alpaca")


@pytest.fixture
def train(setting, ranks, tmp_path):
    """Run on one process; returns the output folder."""

    def run(name: str, *more: str, **changes: Any) -> Path:
        output = tmp_path / name
        given = setting.arguments(output, **{"max_steps": 3, "batch_size": 8, **changes})
        ranks(1).run(finetune_on_rank, setting, [*given, *more])
        return output

    return run


def column(output: Path, name: str) -> list[float]:
    return [line[name] for line in log_lines(output)]


def exports(output: Path) -> set[str]:
    return {path.parent.name for path in output.glob("*/meta.json")}


def states(output: Path) -> set[str]:
    return {path.parent.name for path in output.glob("checkpoints/*/state.json")}


def test_clip_grad_of_0_or_less_is_off(train):
    off = log_lines(train("off", clip_grad=0))
    assert log_lines(train("less", clip_grad=-1)) == off
    assert log_lines(train("far", clip_grad=1e9)) == off
    norms = [line["grad_norm"] for line in off]
    # The norm is told as it was before it was limited, and a limit that no step reaches changes nothing.
    assert log_lines(train("just above", clip_grad=max(norms) * 1.001)) == off
    near = log_lines(train("near", clip_grad=min(norms) / 1000, max_steps=2))
    assert near[0] == off[0]
    assert near[1]["loss"] != off[1]["loss"]


def test_the_learning_rate_follows_the_formula(train):
    """Linear over the first half epoch, 3.5 steps; then half a cosine down to min_lr at the end of two epochs."""
    output = train("run", epochs=2, warmup_epochs=0.5, lr=1e-3, min_lr=1e-4, max_steps=None)
    warmup, total = 0.5 * PER_EPOCH, 2 * PER_EPOCH
    expected = [1e-3 * (step + 1) / warmup for step in range(3)] + [1e-3 * 1.0]
    for step in range(4, total):
        half = math.pi * (step - warmup) / (total - warmup)
        expected.append(1e-4 + (1e-3 - 1e-4) * (1 + math.cos(half)) / 2)
    assert column(output, "lr") == pytest.approx(expected, rel=1e-9)
    # It would be min_lr with the next step.
    assert 1e-4 < expected[-1] < 1.2e-4


def test_the_last_fall_may_be_run_from_any_state(train):
    """A run at a constant rate, gone on with by another that falls over its last steps, which end with --max_steps."""
    stable = train("stable", schedule="constant", warmup_epochs=0, min_lr=1e-4, max_steps=5, save_iteration_interval=3)
    state = stable / "checkpoints" / "step-00000003"
    fall = {"schedule": "wsd", "decay_steps": 4, "warmup_epochs": 0, "lr": 2e-3, "min_lr": 1e-3, "max_steps": 8}
    falling = train("falling", resume=state, **fall)
    assert column(stable, "lr") == [2e-3] * 5
    assert column(falling, "lr") == pytest.approx([2e-3, 2e-3, 1.75e-3, 1.5e-3, 1.25e-3], rel=1e-12)
    assert column(falling, "loss")[:2] == column(stable, "loss")[3:]
    assert log_lines(train("whole", **fall))[3:] == log_lines(falling)


def test_an_optimizer_without_its_package_is_refused_before_the_model_is_read(train):
    if find_spec("torchao") is not None:
        pytest.skip("torchao is installed")
    with pytest.raises(
        AssertionError, match="--optimizer adamw8bit needs torchao, which is not installed: pip install"
    ):
        train("none", optimizer="adamw8bit", pretrained_path="/nowhere")


def test_a_state_is_gone_on_with_by_its_optimizer(train):
    first = train("muon", optimizer="muon", lr_router=1e-3, max_steps=2)
    assert column(train("further", optimizer="muon", resume=first), "step") == [3]
    with pytest.raises(AssertionError, match="was saved by a run with --optimizer muon: give that, or begin anew"):
        train("another", resume=first)


def test_max_steps_ends_the_run_and_not_the_schedule(train):
    whole, cut = train("whole", epochs=2, max_steps=None), train("cut", epochs=2, max_steps=PER_EPOCH + 2)
    assert len(log_lines(whole)) == 2 * PER_EPOCH
    assert log_lines(cut) == log_lines(whole)[: PER_EPOCH + 2]
    assert exports(whole) == {"epoch1"}, "save_interval is 100: the end of the run alone"
    assert exports(cut) == {"epoch1-iter2"}
    more = train("more", epochs=1, max_steps=1000)
    assert len(log_lines(more)) == PER_EPOCH
    assert exports(more) == {"epoch0"}


def test_save_interval_counts_epochs(train):
    output = train("run", epochs=5, save_interval=2, max_steps=None, keep_last=10)
    assert exports(output) == {"epoch1", "epoch3", "epoch4"}, "the second, the fourth, and the end"
    assert states(output) == {f"step-{PER_EPOCH * epoch:08d}" for epoch in (2, 4, 5)}


@pytest.mark.parametrize(("interval", "steps"), [(6, (3, 6)), (7, (3, 6)), (1, range(1, PER_EPOCH)), (0, ())])
def test_save_iteration_interval_counts_micro_batches_of_an_epoch(interval, steps, train):
    changes = {"accum_iter": 2, "batch_size": 4, "save_interval": 1, "keep_last": 100, "max_steps": None}
    output = train("run", epochs=2, save_iteration_interval=interval, **changes)
    within = {f"epoch{epoch}-iter{2 * step}" for epoch in (0, 1) for step in steps}
    assert exports(output) == within | {"epoch0", "epoch1"}
    assert states(output) == {
        f"step-{PER_EPOCH * epoch + step:08d}" for epoch in (0, 1) for step in (*steps, PER_EPOCH)
    }


def test_an_interval_may_end_with_an_epoch_that_is_not_saved(train):
    output = train("run", epochs=2, save_iteration_interval=PER_EPOCH, save_interval=100, max_steps=None, keep_last=9)
    assert states(output) == {f"step-{PER_EPOCH:08d}", f"step-{2 * PER_EPOCH:08d}"}
    assert exports(output) == {f"epoch0-iter{PER_EPOCH}", "epoch1"}


def test_keep_last_removes_what_is_older_but_for_the_models_of_epochs(train):
    output = train("run", save_iteration_interval=2, save_interval=1, max_steps=2 * PER_EPOCH + 3, keep_last=3)
    assert states(output) == {f"step-{2 * PER_EPOCH + step:08d}" for step in (0, 2, 3)}
    assert exports(output) == {"epoch0", "epoch1", "epoch1-iter6", "epoch2-iter2", "epoch2-iter3"}


def test_keep_models_removes_older_models_of_epochs_also_of_the_run_before(train):
    """Counted over a restart; what somebody has put beside or into a model, or linked, is not the run's."""
    given = {"save_interval": 1, "save_iteration_interval": 3, "keep_models": 2, "epochs": 9, "auto_resume": True}
    output = train("run", **given, max_steps=3 * PER_EPOCH)
    assert exports(output) == {"epoch1", "epoch2", "epoch2-iter3", "epoch2-iter6"}
    (output / "epoch1" / "notes.txt").write_text("mine")
    linked = output.parent / "elsewhere"
    (output / "epoch2").rename(linked)
    (output / "epoch2").symlink_to(linked)
    (output / "epoch0.mine").mkdir()
    output = train("run", **given, max_steps=6 * PER_EPOCH)
    found = {name for name in exports(output) if "-" not in name}
    assert found == {"epoch1", "epoch2", "epoch4", "epoch5"}
    assert linked.is_dir()
    assert (output / "epoch0.mine").is_dir()
    assert not list(output.glob(".*"))
    assert json.loads((output / "options.json").read_text())["keep_models"] == 2


def test_what_a_run_will_write_is_said_and_fits(train):
    """The sizes are those of the folders that it then writes, and no more lies there at any time than was said."""
    output = train("run", epochs=3, save_interval=1, max_steps=None, keep_models=1, keep_last=1)
    (line,) = [line for line in (output / "output.log").read_text().splitlines() if "models to write" in line]
    assert f"models to write in {output}: 3 at epochs' ends (1 stay), " in line
    assert "training states in its checkpoints: 3 (1 stay), " in line
    said = re.findall(r"([\d.]+) ([kM])B(?: each| at most)", line)
    model, state, total = (float(size) * {"k": 1e3, "M": 1e6}[unit] for size, unit in said)
    for said, folder in ((model, output / "epoch2"), (state, output / "checkpoints")):
        assert said == pytest.approx(sum(path.stat().st_size for path in folder.rglob("*.*")), rel=0.25)
    assert total == pytest.approx(2 * model + 2 * state, abs=1e5)


@pytest.mark.parametrize("free", [249_999_999, 250_000_000])
def test_a_disk_that_is_too_small_is_warned_of(free, monkeypatch, caplog):
    epochs = Kind(new=20, there=0, keep=None, size=10**7)
    within, states = Kind(new=30, there=1, keep=2, size=10**7), Kind(new=50, there=2, keep=2, size=3 * 10**7)
    assert (epochs.bytes, within.bytes, states.bytes) == (20 * 10**7, 2 * 10**7, 3 * 10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(logging.getLogger("accessory"), "propagate", True)
    with caplog.at_level(logging.INFO, "accessory"):
        say_space(Plan(epochs, within, states), Path("out"))
    (record,) = caplog.records
    text = "20 at epochs' ends (all stay; --keep_models N keeps the last N), 30 within epochs (2 stay), 10.00 MB each"
    assert text in record.message
    assert "together 250.00 MB at most, and 250.00 MB are free" in record.message
    assert record.levelname == ("WARNING" if free < 250_000_000 else "INFO")
    assert ("give --keep_models N" in record.message) == (free < 250_000_000)


def test_the_models_of_a_run_are_counted_as_they_are_written():
    chance = random.Random(0)
    for _ in range(300):
        per_epoch, epochs = chance.randint(1, 9), chance.randint(1, 6)
        end = chance.randint(1, per_epoch * epochs)
        done = chance.randint(0, end)
        intervals = (chance.choice([0, 1, 2, 3, 7, 8]), chance.randint(1, 3), chance.randint(1, 4))
        options = FinetuneOptions(
            data_config="d",
            **dict(zip(("save_iteration_interval", "accum_iter", "save_interval"), intervals, strict=True)),
        )
        given = {"end": end, "per_epoch": per_epoch}
        names = [name for step in range(done + 1, end + 1) if (name := model_due(options, done=step, **given))]
        inner = sum("-" in name for name in names)
        assert models_after(options, done=done, **given) == (len(names) - inner, inner), (options, done, given)


def test_weights_of_the_router_losses(train, tmp_path):
    """The flag rules over the config, and 0 takes the loss out of the gradient but not out of the log."""
    base = json.loads((Path(train("base") / "epoch0-iter3" / "config.json")).read_text())
    assert base.get("load_balancing_weight", 0.1) == 0.1
    assert "z_loss_weight" not in base
    without = train("without", load_balancing_weight=0)
    assert all(value > 1 for value in column(without, "balance_loss"))
    assert log_lines(without)[0]["loss"] == log_lines(tmp_path / "base")[0]["loss"]
    assert column(without, "grad_norm") != column(tmp_path / "base", "grad_norm")
    assert not any("z_loss" in line for line in log_lines(without))

    heavy = train("heavy", load_balancing_weight=0.5, z_loss_weight=0.01)
    (tmp_path / "weights.json").write_text(json.dumps({"load_balancing_weight": 0.5, "z_loss_weight": 0.01}))
    config = ("--llama_config", f"{tmp_path}/base/epoch0-iter3/config.json", f"{tmp_path}/weights.json")
    assert log_lines(train("by config", *config)) == log_lines(heavy)
    assert all(value > 0 for value in column(heavy, "z_loss"))
    written = json.loads((heavy / "epoch0-iter3" / "config.json").read_text())
    assert (written["load_balancing_weight"], written["z_loss_weight"]) == (0.5, 0.01)


@pytest.mark.parametrize("given", [("--checkpointing",), ("--grad_ckpt_policy", "moe")], ids=["full", "moe"])
def test_recomputing_changes_no_number(given, train):
    assert column(train("again", *given), "loss") == pytest.approx(column(train("kept"), "loss"), rel=1e-6)


def test_the_accepted_flags_change_nothing(train):
    accepted = ("--pretrained_type", "consolidated", "--no_visual", "--cache_ann_on_disk", "--num_workers", "4")
    with_them = train("with", *accepted, "--pin_mem", "--no_pin_mem", "--only_save_trainable")
    without = train("without")
    assert log_lines(with_them) == log_lines(without)
    ours, theirs = (model_tensors(output / "epoch0-iter3") for output in (with_them, without))
    assert ours.keys() == theirs.keys()


def test_later_folders_overlay_earlier_ones(setting, train, tmp_path, small_tokenizer):
    """A second folder that holds a part of the tensors: the model is the first with those in place."""
    config = json.loads((setting.model / "config.json").read_text())
    first, second = random_tensors(config, 5), random_tensors(config, 6)
    part = {name: tensor for name, tensor in second.items() if "attention" in name}
    write_folder(tmp_path / "mixed", first | part, config, files=1, tokenizer=small_tokenizer)
    overlay = write_folder(tmp_path / "part", second, config, files=1, tokenizer=small_tokenizer)
    shard = overlay / "consolidated.00-of-01.model.pth"
    torch.save({"model": {f"llma.{name}": tensor for name, tensor in part.items()}}, shard)
    both = train("both", "--pretrained_path", str(setting.model), str(overlay), pretrained_path=None)
    assert log_lines(both) == log_lines(train("mixed run", pretrained_path=tmp_path / "mixed"))
    assert log_lines(both) != log_lines(train("first"))


def test_training_from_nothing(setting, train, small_tokenizer):
    given = {"pretrained_path": None, "llama_config": setting.model / "config.json", "tokenizer_path": small_tokenizer}
    output = train("run", max_steps=2, **given)
    assert losses(output)[0] == pytest.approx(math.log(384), abs=0.8), "it knows nothing"
    # A step at a learning rate of 0 leaves the weights as --seed has drawn them.
    first, again, other = (
        model_tensors(train(f"{seed} {name}", max_steps=1, lr=0, seed=seed, **given) / "epoch0-iter1")
        for seed, name in ((3, "once"), (3, "again"), (4, "once"))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    assert changed == {name for name in first if "norm" not in name}
    model = MetaModel.from_pretrained(output / "epoch0-iter2", dtype="fp32")
    assert model.generate(["list"], max_gen_len=4)


def test_seed_orders_the_examples(train):
    assert losses(train("one", seed=1))[0] != losses(train("two", seed=2))[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
def test_precision(precision, train, one_thread):
    """The exported weights' dtype, and losses near those of float32."""
    output = train("run", precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    assert {tensor.dtype for tensor in model_tensors(output / "epoch0-iter3").values()} == {dtype}
    assert losses(output) == pytest.approx(losses(train("fp32", precision="fp32")), rel=0.02)
    assert all(("loss_scale" in line) == (precision == "fp16") for line in log_lines(output))


def test_expert_placement_changes_no_number(train):
    assert losses(train("tensor", expert_placement="tensor")) == losses(train("expert", expert_placement="expert"))


def test_a_vocabulary_that_the_config_leaves_open(setting, train, tmp_path, small_tokenizer):
    config = small_config(dim=32, hidden_dim=16, vocab_size=-1)
    (tmp_path / "open.json").write_text(json.dumps(config))
    output = train("run", llama_config=tmp_path / "open.json", tokenizer_path=small_tokenizer)
    assert losses(output) == losses(train("base"))
