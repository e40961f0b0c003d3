"""The commands evaluate and plot: a model's numbers on records and on a plain text, and runs as a picture."""

import json
import math
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import hf_logits, random_mixtral, random_tensors, small_config, write_folder
from finetuning import PYTHON

from accessory.cli import main
from accessory.data.cache import CACHE_VARIABLE, load_finetune_data
from accessory.evaluation.measure import Measured, name_not_finite
from accessory.evaluation.windows import Windows
from accessory.model.meta import MetaModel
from accessory.text.tokenizer import Tokenizer
from accessory.tools.corpus import documentation_corpus
from accessory.train.metrics import StepMetrics
from accessory.train.plot import draw_runs, read_run
from accessory.train.run_log import RunLog

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = small_config(dim=64, hidden_dim=64)
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    return write_folder(folder, random_tensors(config, 5), config, files=2, tokenizer=small_tokenizer)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records of several shapes, and a cache for their tokens."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    records: list[dict[str, Any]] = [{"instruction": f"Say {n}", "output": "list " * n} for n in range(1, 6)]
    (tmp_path / "data.json").write_text(json.dumps([*records, {"text": "All of the method."}]))
    (tmp_path / "data.yaml").write_text(f"META: [{{path: {tmp_path / 'data.json'}}}]")
    return tmp_path / "data.yaml"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([*map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


# -- records


@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_the_numbers_are_those_of_the_models_logits(
    quant: str | None, folder: Path, config: Path, run: Run, tmp_path: Path
) -> None:
    more = () if quant is None else ("--quant", quant)
    given = ("evaluate", folder, "--data_config", config, "--max_seq_len", 200, "--dtype", "fp32", "--json", *more)
    code, out, err = run(*given, "--per_record", tmp_path / "rows.jsonl")
    assert code == 0, err
    told = json.loads(out)
    model = MetaModel.from_pretrained(folder, dtype="fp32", quant=quant, max_seq_len=200, device="cpu")
    data = load_finetune_data(config, model.tokenizer, max_words=200)
    expected = []
    for tokens, labels in (data[index] for index in range(len(data))):
        (logits,) = model.compute_logits([tokens.tolist()])
        learned = np.flatnonzero(labels)
        targets = torch.tensor(tokens[learned].astype(np.int64))
        scores = logits[learned - 1].double().log_softmax(-1)
        hits = int((scores.argmax(-1) == targets).sum())
        expected.append((-scores.gather(1, targets[:, None]).sum().item(), hits, len(learned)))
    total, hits, count = np.array(expected).sum(0).tolist()
    assert set(told) == {"loss", "perplexity", "token_accuracy", "balance_loss", "tokens", "records"}
    assert (told["tokens"], told["records"], told["token_accuracy"]) == (count, len(data), hits / count)
    # The products of a quantized model round activations to the tokens that are read together.
    assert told["loss"] == pytest.approx(total / count, rel=1e-6 if quant is None else 1e-3)
    assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["record"] for row in rows] == list(range(6))
    assert rows[1]["place"] == f"example 2 of {tmp_path / 'data.json'}"
    assert sum(row["loss"] * row["tokens"] for row in rows) == pytest.approx(told["loss"] * count)
    assert [(row["hits"], row["tokens"]) for row in rows] == [(hits, tokens) for _, hits, tokens in expected]


@pytest.mark.parametrize(("ranks", "together"), [(2, 2), (4, 2)])
def test_more_ranks_say_what_one_does(
    ranks: int, together: int, folder: Path, config: Path, run: Run, tmp_path: Path
) -> None:
    """One model on two of them, and two models on two each that share the records."""
    given = ("evaluate", folder, "--data_config", config, "--max_seq_len", 200, "--dtype", "fp32", "--device", "cpu")
    layout = () if together == ranks else ("--model_parallel_size", str(together))
    command = [PYTHON, "-m", "accessory", *map(str, given), "--nproc", str(ranks), *layout, "--json"]
    told = subprocess.run([*command, "--per_record", tmp_path / "rows.jsonl"], capture_output=True)
    assert told.returncode == 0, told.stderr
    one = json.loads(run(*given, "--json", "--per_record", tmp_path / "one.jsonl")[1])
    assert json.loads(told.stdout) == pytest.approx(one, rel=1e-6)
    rows, own = ([*map(json.loads, (tmp_path / f"{name}.jsonl").read_text().splitlines())] for name in ("rows", "one"))
    for row, expected in zip(rows, own, strict=True):
        assert row == {**expected, "loss": pytest.approx(expected["loss"], rel=1e-5)}
    code, out, _ = run(*given)
    assert (code, out.splitlines()[0]) == (0, f"loss            {one['loss']:.6f}")


def test_a_loss_that_is_no_number_is_null_and_named(config: Path, small_tokenizer: Path) -> None:
    data = load_finetune_data(config, Tokenizer(small_tokenizer), max_words=200)
    scores = np.tile([2.0, 1.0, 2.0], (6, 1))
    scores[[1, 4], 0] = math.nan
    measured = Measured(scores, 1.0)
    assert math.isnan(measured.numbers()["perplexity"])
    where = config.with_suffix(".json")
    assert name_not_finite(measured, data) == (
        f"the held-out loss is not finite at example 2 of {where}, example 5 of {where}"
    )
    assert [json.loads(line)["loss"] for line in measured.per_row(data)] == [1.0, None, 1.0, 1.0, None, 1.0]


# -- a plain text


def test_windows_by_hand() -> None:
    """Ten tokens in windows of four, each two behind the one before: every token but the first is scored once."""
    windows = Windows(list(range(10, 20)), length=4, stride=2)
    shown = [(tokens.tolist(), tokens[scored].tolist()) for tokens, scored in (windows[n] for n in range(4))]
    assert shown == [
        ([10, 11, 12, 13], [10, 11, 12, 13]),  # of which the first has nothing before it
        ([12, 13, 14, 15], [14, 15]),
        ([14, 15, 16, 17], [16, 17]),
        ([16, 17, 18, 19], [18, 19]),
    ]
    assert windows.lengths.tolist() == [4] * 4
    assert Windows(list(range(10)), length=4).lengths.tolist() == [4, 4, 2]
    assert Windows(list(range(3)), length=4).lengths.tolist() == [3]


@pytest.mark.parametrize(("length", "stride"), [(64, 16), (64, 64), (50, 37)])
def test_a_texts_perplexity_is_that_of_transformers(
    length: int, stride: int, run: Run, small_tokenizer: Path, tmp_path: Path
) -> None:
    hf = random_mixtral(3)
    hf.save_pretrained(tmp_path / "model")
    shutil.copy(small_tokenizer, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(documentation_corpus(1500)), encoding="utf-8")
    tokens = Tokenizer(small_tokenizer).encode(text.read_text(encoding="utf-8"), bos=True, eos=False)
    total, count, end = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):  # the loop of transformers' guide
        before, end = end, min(begin + length, len(tokens))
        window = tokens[begin:end]
        targets = torch.tensor(window)
        targets[: len(window) - (end - before)] = -100
        losses = torch.nn.functional.cross_entropy(hf_logits(hf, window)[:-1].double(), targets[1:], reduction="sum")
        total, count = total + losses.item(), count + int((targets[1:] != -100).sum())
        if end == len(tokens):
            break
    given = ("--text", text, "--max_seq_len", length, "--stride", stride, "--dtype", "fp32", "--device", "cpu")
    code, out, err = run("evaluate", tmp_path / "model", *given, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["tokens"] == count
    assert told["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


# -- what is refused


def test_what_cannot_be_evaluated_is_refused_in_one_line(folder: Path, config: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "text.txt").write_text("The list method of the list.")
    text, data = ("--text", tmp_path / "text.txt"), ("--data_config", config)
    for given, says in {
        (*data, "--stride", 4): "--stride is of a plain text",
        (*text, "--dialog"): "--dialog is about records, and --text has none",
        (*text, "--stride", 9, "--max_seq_len", 8): "--stride is 9: give 1 to --max_seq_len, 8",
        ("--text", tmp_path / "none.txt"): f"--text {tmp_path / 'none.txt'} cannot be read",
        ("--text", tmp_path / "empty.txt"): f"--text {tmp_path / 'empty.txt'} is empty",
        ("--text", tmp_path / "latin.txt"): f"--text {tmp_path / 'latin.txt'} is not UTF-8 (at byte 3)",
        (*data, "--model_parallel_size", 2): "--model_parallel_size 2 does not divide the number of ranks, 1: give",
        (*data, "--per_record", tmp_path): f"--per_record {tmp_path} is a folder",
        ("--data_config", tmp_path / "none.yaml"): f"no data yaml {tmp_path / 'none.yaml'}",
    }.items():
        code, out, err = run("evaluate", folder, *given)
        assert (code, out) == (1, ""), err
        assert err.splitlines()[-1].startswith(f"ERROR: {says}"), err


# -- plot


def write_run(folder: Path, *, steps: int, held_out: bool = True) -> Path:
    with RunLog(folder, total_steps=steps, first_step=0, active=True, heatmap_every=10**9) as log:
        for step in range(1, steps + 1):
            log.step(
                StepMetrics(
                    step=step,
                    epoch=step / 9,
                    loss=4 / step,
                    balance_loss=1.0,
                    lr=1e-3,
                    grad_norm=math.nan if step == 2 else 1.0,
                    tokens_per_s=100.0,
                    learned_per_s=50.0,
                    padding=0.0,
                    memory=1.0,
                    pairs_LE=torch.tensor([[1.0, 2, 3, 2], [4.0, 2, 1, 1]]),
                )
            )
            if held_out and step % 2 == 0:
                numbers = ("loss", "perplexity", "token_accuracy", "balance_loss", "tokens", "records")
                log.evaluation(step, step / 9, dict.fromkeys(numbers, 1.5))
    return folder


def test_runs_are_drawn(run: Run, tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one", steps=9), write_run(tmp_path / "two", steps=1100, held_out=False)
    records = read_run(one)
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4, 6, 8]
    assert records[0]["experts"] == pytest.approx([0.3125, 0.25, 0.25, 0.1875]), "the mean of both layers' shares"
    with (one / "log.jsonl").open("a") as log:
        log.write('{"step": 10, "los')  # as a running one has it
    for arguments, output in (
        ((one,), one / "plot.png"),
        ((one, two, "-o", tmp_path / "both.png"), tmp_path / "both.png"),
    ):
        code, _, err = run("plot", *arguments)
        assert code == 0, err
        png = output.read_bytes()
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", png[16:24]) == (1100, 1100)
    assert draw_runs([("one", records)]) != draw_runs([("one", [one for one in records if "eval_loss" not in one])])
    for given, says in (
        ((tmp_path,), f"{tmp_path} has no log.jsonl: name the output_dir"),
        ((one, "-o", tmp_path), f"--output {tmp_path} is a folder"),
    ):
        code, _, err = run("plot", *given)
        assert code == 1
        assert says in err
