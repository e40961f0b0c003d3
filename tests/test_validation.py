"""Held-out data in training: what is measured, that it changes nothing else, and what follows from it."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from checkpoints import random_tensors, write_folder
from finetuning import (
    PER_EPOCH,
    Setting,
    finetune_on_rank,
    latest_state,
    layout,
    log_lines,
    make_setting,
    model_tensors,
    state_tensors,
)
from ranks import assert_same, error_of

from accessory.cli import main
from accessory.data.cache import CACHE_VARIABLE, load_finetune_data
from accessory.data.finetune_data import FinetuneData
from accessory.data.records import digest_of
from accessory.evaluation import measure as measure_module
from accessory.model.meta import MetaModel
from accessory.text.tokenizer import Tokenizer
from accessory.train import finetune as finetune_module
from accessory.train.output_folder import refuse_earlier_run

WORDS = ("list", "method", "number", "of", "the", "value")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Setting:
    folder = tmp_path_factory.mktemp("validation")
    setting = make_setting(folder, small_tokenizer, prompt_type="alpaca")
    write_eval(folder, "eval", [f"Name {word} {number}" for number, word in enumerate(WORDS + WORDS[:3])])
    return setting


def write_eval(folder: Path, name: str, questions: list[str]) -> Path:
    """Records beside those of the training, with answers of several lengths."""
    records = [{"instruction": text, "output": f"{text} " * (1 + len(text) % 3)} for text in questions]
    (folder / f"{name}.json").write_text(json.dumps(records))
    config = folder / f"{name}.yaml"
    config.write_text(f"META:\n- path: {folder / f'{name}.json'}\n  type: text\n")
    return config


def evaluations(output: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(output) if "eval_loss" in line]


def steps(output: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(output) if "loss" in line]


# -- what is held back


def test_a_record_is_held_back_for_what_it_says(tmp_path: Path, small_tokenizer: Path) -> None:
    """Shape, order, file, bookkeeping and other records play no part; equal records are on one side."""
    tokenizer = Tokenizer(small_tokenizer)
    alpaca = [{"instruction": f"Say {number % 40}", "output": str(number % 40)} for number in range(80)]
    chats = [
        {"id": place, "messages": [{"role": "user", "content": one["instruction"]}, answer]}
        for place, one in enumerate(reversed(alpaca))
        if (answer := {"role": "assistant", "content": one["output"]})
    ]
    held: list[set[str]] = []
    for name, records in (("a", alpaca), ("b", chats), ("c", [{"text": "more"}, *chats])):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        (tmp_path / f"{name}.yaml").write_text(f"META: [{{path: {tmp_path / name}.json}}]")
        data = load_finetune_data(tmp_path / f"{name}.yaml", tokenizer, max_words=400, cache_dir=tmp_path / "cache")
        learned, back = data.held_back(0.3)
        assert len(learned) + len(back) == len(data)
        assert not set(learned.digests) & set(back.digests)
        answers = (labels[labels != 0].tolist() for _, labels in (back[index] for index in range(len(back))))
        held.append({tokenizer.decode(answer).removesuffix("###").strip() for answer in answers} - {"more"})
        assert back.place(0).endswith(f"of {tmp_path / name}.json")
    answers = held[0]
    assert held == [answers] * 3
    assert 4 <= len(answers) <= 20, "about 0.3 of 40"
    assert len(FinetuneData(data.folder).held_back(0.6)[1]) > len(back)
    assert digest_of({"prompt": "a", "completion": "b"}) != digest_of({"text": "ab"})


# -- numbers


def on_small_passes(setting: Setting, arguments: list[str]) -> None:
    """So few tokens in a pass that there are several, and the last one finds no row for a rank."""
    with mock.patch.object(measure_module, "PASS_TOKENS", 200):
        finetune_on_rank(setting, arguments)


def test_numbers_are_alike_at_every_split_and_those_of_the_model(setting: Setting, ranks: Any, tmp_path: Path) -> None:
    found = []
    for dp_size, mp_size, ep_size in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 2)):
        output = tmp_path / f"{dp_size}x{mp_size}"
        changes = {"eval_data_config": setting.folder / "eval.yaml", "eval_interval": 2, "eval_first": True}
        arguments = setting.arguments(output, **layout(dp_size, mp_size, ep_size=ep_size), max_steps=3, **changes)
        ranks(dp_size * mp_size).run(on_small_passes if dp_size > 1 else finetune_on_rank, setting, arguments)
        found.append(evaluations(output))
    assert [line["step"] for line in found[0]] == [0, 2, 3]
    for lines in found[1:]:
        for line, first, close in zip(lines, found[0], (1e-6, 1e-5, 1e-5), strict=True):
            for name in ("eval_loss", "eval_balance_loss", "eval_perplexity"):
                assert line[name] == pytest.approx(first[name], rel=close), (name, line["step"])
            assert line["eval_token_accuracy"] == pytest.approx(first["eval_token_accuracy"], abs=1e-4)
            assert (line["eval_tokens"], line["eval_records"]) == (first["eval_tokens"], 9)
    # By the Python door, example by example.
    model = MetaModel.from_pretrained(setting.model, dtype="fp32", device="cpu")
    with mock.patch.dict(os.environ, setting.environment):
        data = load_finetune_data(setting.folder / "eval.yaml", model.tokenizer, max_words=setting.max_words)
    total, hits, count = 0.0, 0, 0
    for tokens, labels in (data[index] for index in range(len(data))):
        (logits,) = model.compute_logits([tokens.tolist()])
        learned = np.flatnonzero(labels)
        targets = torch.tensor(tokens[learned].astype(np.int64))
        scores = logits[learned - 1].double().log_softmax(-1)
        total -= scores.gather(1, targets[:, None]).sum().item()
        hits += int((scores.argmax(-1) == targets).sum())
        count += len(learned)
    line = found[0][0]
    assert (line["eval_tokens"], line["eval_loss"]) == (count, pytest.approx(total / count, rel=1e-6))
    assert line["eval_token_accuracy"] == hits / count
    assert line["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data_parallel": "sdp", "lora_rank": 4, "lora_dropout": 0.3, "checkpointing": True, "packing": True},
        {"data_parallel": "ddp", "lora_rank": 4, "lora_dropout": 0.3, "quant": "int8"},
    ],
    ids=["full", "adapter", "quantized"],
)
def test_evaluations_change_nothing_else(
    changes: dict[str, Any],
    setting: Setting,
    ranks: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Weights, moments, random states and order of the data are the same to the bit."""
    evaluated = {"eval_data_config": setting.folder / "eval.yaml", "eval_interval": 1, "eval_first": True}
    for name, more in (("without", {}), ("with", {**evaluated, "keep_best": True})):
        given = {**layout(2, 1), "max_steps": 4, "data_parallel": "fsdp", **changes, **more}
        ranks(2).run(finetune_on_rank, setting, setting.arguments(tmp_path / name, **given))
    without, with_them = tmp_path / "without", tmp_path / "with"
    assert steps(with_them) == steps(without) == log_lines(without)
    assert len(evaluations(with_them)) == 5
    assert_same(state_tensors(latest_state(with_them)), state_tensors(latest_state(without)))
    for rng in latest_state(without).glob("rng.*.pt"):
        assert_same(torch.load(latest_state(with_them) / rng.name), torch.load(rng))
    (written,) = (path.parent.name for path in without.glob("epoch*/meta.json"))
    assert_same(model_tensors(with_them / written), model_tensors(without / written))
    # The command says the same of the model that was written.
    quant = changes.get("quant")
    model = [*([setting.model] if quant else []), with_them / written]
    given = ["--data_config", evaluated["eval_data_config"], "--max_seq_len", setting.max_words, "--dtype", "fp32"]
    more = ["--device", "cpu", "--json", *(["--quant", quant] if quant else [])]
    monkeypatch.setenv(CACHE_VARIABLE, setting.environment[CACHE_VARIABLE])
    assert main(["evaluate", *map(str, [*model, *given, *more])]) == 0
    told = {f"eval_{name}": value for name, value in json.loads(capsys.readouterr().out).items()}
    assert told == pytest.approx({name: evaluations(with_them)[-1][name] for name in told}, rel=1e-5)


# -- what follows


def test_the_best_model_is_kept_and_a_run_ends_early_and_goes_on(setting: Setting, ranks: Any, tmp_path: Path) -> None:
    """A rate at which the held-out loss soon rises; the same run in two parts comes to the same."""
    given = {
        "eval_data_config": setting.folder / "eval.yaml",
        "eval_interval": 2,
        "keep_best": True,
        "early_stop": 2,
        "lr": 0.1,
        "batch_size": 8,
        "warmup_epochs": 0,
        "save_iteration_interval": 1,
        "keep_last": 99,
        "auto_resume": True,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks(1).run(finetune_on_rank, setting, setting.arguments(whole, **given))
    found = {line["step"]: line["eval_loss"] for line in evaluations(whole)}
    best = min(found, key=lambda step: found[step])
    assert list(found) == list(range(2, best + 5, 2)), "two evaluations after the best one the run is over"
    assert steps(whole)[-1]["step"] == best + 4 < 5 * PER_EPOCH
    assert f"early end after step {best + 4}" in (whole / "output.log").read_text()
    state = state_tensors(whole / "checkpoints" / f"step-{best:08d}")
    at_best = MetaModel.from_pretrained(whole / "best", dtype="fp32", device="cpu").llma.state_dict()
    assert at_best
    for name, tensor in at_best.items():
        assert torch.equal(tensor, state[f"model.llma.{name}"]), name
    for end in (best + 1, best + 2, None):
        ranks(1).run(finetune_on_rank, setting, setting.arguments(parts, **given, max_steps=end))
    assert steps(parts) == steps(whole)
    later = {line["step"]: line["eval_loss"] for line in evaluations(parts)}
    assert {**later, **found} == later, "beside them that of the last step of a part"
    assert_same(model_tensors(parts / "best"), model_tensors(whole / "best"))
    with pytest.raises(FileExistsError, match=f"a finished run \\(early, after {best + 4} steps"):
        refuse_earlier_run(parts)
    # A run that has ended so does nothing more, unless other data are held out: these have a best loss of their own.
    before = log_lines(parts)
    ranks(1).run(finetune_on_rank, setting, setting.arguments(parts, **given))
    assert log_lines(parts) == before
    given["eval_data_config"] = write_eval(tmp_path, "other", ["Name another", "Name one more"])
    ranks(1).run(finetune_on_rank, setting, setting.arguments(parts, **given, max_steps=best + 6))
    assert "the held-out data are others than before: best loss and" in (parts / "output.log").read_text()
    assert [line["eval_records"] for line in evaluations(parts) if line["step"] > best + 4] == [2]


def test_a_loss_that_is_no_number_is_named_and_the_run_goes_on(
    setting: Setting, ranks: Any, small_tokenizer: Path, tmp_path: Path
) -> None:
    """The embedding of a token that one held-out record alone has is not finite."""
    odd = write_eval(tmp_path, "odd", ["Name it", "Name ZZZ", "Name them"])
    config = json.loads((setting.model / "config.json").read_text())
    tensors = random_tensors(config, 5)
    tokenizer = Tokenizer(small_tokenizer)
    alone = set(tokenizer.encode("Name ZZZ", bos=False, eos=False)) - set(
        tokenizer.encode("Name it them ###" + (setting.folder / "data.json").read_text(), bos=False, eos=False)
    )
    tensors["tok_embeddings.weight"][sorted(alone)] = math.nan
    write_folder(tmp_path / "base", tensors, config, files=1, tokenizer=small_tokenizer)
    arguments = setting.arguments(
        tmp_path / "out",
        pretrained_path=tmp_path / "base",
        eval_data_config=odd,
        eval_interval=1,
        max_steps=2,
        weight_decay=0,
        keep_best=True,
    )
    ranks(1).run(finetune_on_rank, setting, arguments)
    assert [line["eval_loss"] for line in evaluations(tmp_path / "out")] == [None, None]
    assert all(math.isfinite(line["loss"]) for line in steps(tmp_path / "out"))
    said = (tmp_path / "out" / "output.log").read_text()
    assert f"step 1: the held-out loss is not finite at example 2 of {tmp_path / 'odd.json'}: training goes on" in said
    assert not (tmp_path / "out" / "best").exists()


# -- what is refused


def refused_on_rank(setting: Setting, given: list[tuple[str, ...]]) -> list[tuple[str, str]]:
    with mock.patch.object(finetune_module, "build_for_training", side_effect=AssertionError("the model is built")):
        return [error_of(finetune_on_rank, setting, arguments) for arguments in given]


def test_contradictions_are_refused_alike_before_the_model(setting: Setting, ranks: Any, tmp_path: Path) -> None:
    shared = write_eval(tmp_path, "shared", ["Name it"])
    records = json.loads((setting.folder / "data.json").read_text())
    (tmp_path / "shared.json").write_text(json.dumps([{"instruction": "Name it", "output": "it"}, records[4]]))
    empty, chats = write_eval(tmp_path, "empty", []), write_eval(tmp_path, "chats", ["Name it"])
    talk = [{"role": "user", "content": "Name it"}, {"role": "assistant", "content": "it"}]
    (tmp_path / "chats.json").write_text(json.dumps([{"messages": talk}]))
    cases = {
        "--eval_ratio 1e-9": "--eval_ratio 1e-09 holds back none of 53 examples: give a larger one",
        "--eval_ratio 0.9999999": "--eval_ratio 0.9999999 holds back all of 53 examples: give a smaller one",
        f"--eval_data_config {shared}": f"--eval_data_config {shared}: 1 of its 2 examples are of records that "
        f"--data_config trains on, first example 2 of {tmp_path / 'shared.json'}",
        f"--eval_data_config {chats}": "the records of --eval_data_config have the prompt form default, and those of "
        "--data_config alpaca: name one",
        f"--eval_data_config {empty}": f"--eval_data_config: the data file {tmp_path / 'empty.json'} holds no record",
        f"--eval_data_config {tmp_path / 'none.yaml'}": f"--eval_data_config: no data yaml {tmp_path / 'none.yaml'}",
    }
    given = [setting.arguments(tmp_path / "out") + wrong.split() for wrong in cases]
    first, second = ranks(2).run(refused_on_rank, setting, given)
    assert first == second
    for (_, text), says in zip(first, cases.values(), strict=True):
        assert text.startswith(says), text
        assert "\n" not in text


# -- kill -9

_KILLED = """
import os, signal, sys
from unittest import mock
from accessory import files
from accessory.commands.finetune import train
from accessory.data import cache
from accessory.evaluation import measure
from accessory.launch.launcher import Launch
from accessory.train.options import finetune_parser

moment, calls, *arguments = sys.argv[1:]
left = [int(calls)]

def deadly(act, *, before):
    def acting(*given, **more):
        left[0] -= 1
        if before and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        result = act(*given, **more)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return acting

place, name, before = {
    "tokens": (cache, "_finish", True),
    "pass": (measure, "_pass", False),
    "before": (files, "exchange", True),
    "after": (files, "exchange", False),
}[moment]
with mock.patch.object(place, name, deadly(getattr(place, name), before=before)):
    train(finetune_parser().parse_args(arguments), Launch.find())
"""


@pytest.mark.timeout(600)
def test_a_packed_run_survives_kills_in_its_cache_an_evaluation_and_the_renames_of_the_best_model(
    setting: Setting, ranks: Any, tmp_path: Path
) -> None:
    given = {
        "packing": True,
        "eval_ratio": 0.2,
        "eval_interval": 1,
        "keep_best": True,
        "max_steps": 6,
        "batch_size": 8,
        "save_iteration_interval": 2,
        "auto_resume": True,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ranks(1).run(finetune_on_rank, setting, setting.arguments(whole, **given))
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for moment, calls in (("tokens", 1), ("pass", 3), ("before", 1), ("after", 1)):
        command = [sys.executable, "-c", _KILLED, moment, str(calls), *setting.arguments(killed, **given)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        if moment in ("before", "after"):
            assert model_tensors(killed / "best"), "there is always a whole one"
    ranks(1).run(finetune_on_rank, setting, setting.arguments(killed, **given))
    assert log_lines(killed) == log_lines(whole)
    for name in ("best", *(path.parent.name for path in whole.glob("epoch*/meta.json"))):
        assert_same(model_tensors(killed / name), model_tensors(whole / name))
    assert_same(state_tensors(latest_state(killed)), state_tensors(latest_state(whole)))
    assert not list(killed.glob(".best*"))
