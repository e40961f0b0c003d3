"""Finetuning that is stopped and gone on with: the same losses and the same weights as in one go."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from finetuning import (
    PER_EPOCH,
    PRODUCT,
    Setting,
    finetune_on_rank,
    latest_state,
    layout,
    log_lines,
    losses,
    make_setting,
    model_tensors,
    state_tensors,
)
from ranks import RankPool, assert_same, error_of

from accessory.checkpoint.folder import Folder
from accessory.parallel.box import Box
from accessory.parallel.plan import parameter_shapes
from accessory.train.checkpointer import Checkpointer
from accessory.train.shelf import Shelf

Pools = Callable[[int], RankPool]

# Within an epoch, and at the end of one.
STOPS, END = (13, 3 * PER_EPOCH), 30
LAYOUTS = {"2 x 2": layout(2, 2), "1 x 1": {**layout(1, 1), "bias_update_rate": 0.002}}


@pytest.fixture(scope="module")
def setting(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return make_setting(tmp_path_factory.mktemp("resume"), small_tokenizer)


def train(pools: Pools, setting: Setting, output: Path, options: dict[str, Any], **changes: Any) -> None:
    """Run on as many ranks as the layout in ``options`` needs."""
    options = options | changes
    dp_size = PRODUCT // options["batch_size"] // options["accum_iter"]
    pool = pools(dp_size * options["model_parallel_size"])
    assert set(pool.run(finetune_on_rank, setting, setting.arguments(output, **options))) == {0}


@pytest.fixture(scope="module")
def unbroken(ranks: Pools, setting: Setting) -> Callable[[str], Path]:
    """``unbroken(layout)`` is the output folder of a run in one go, which kept its state at the stops too."""
    done: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in done:
            done[name] = setting.folder / f"unbroken {name}"
            train(ranks, setting, done[name], LAYOUTS[name], max_steps=END)
        return done[name]

    return run


@pytest.fixture(scope="module")
def stopped(ranks: Pools, setting: Setting) -> Path:
    """The output folder of a run at 2 x 2 that ended after step 13, in its second epoch."""
    output = setting.folder / "stopped"
    train(ranks, setting, output, LAYOUTS["2 x 2"], max_steps=STOPS[0])
    return output


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_stopped_twice_ends_at_the_same_bits(
    name: str, ranks: Pools, setting: Setting, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    whole, broken = unbroken(name), tmp_path / "broken"
    for end in (*STOPS, END):
        train(ranks, setting, broken, LAYOUTS[name], max_steps=end, auto_resume=True)
        assert latest_state(broken).name == f"step-{end:08d}"
    assert log_lines(broken) == log_lines(whole)
    assert len(losses(whole)) == END
    assert losses(whole)[-1] < 0.6 * losses(whole)[0]
    model = f"epoch{END // PER_EPOCH}-iter{END % PER_EPOCH * LAYOUTS[name]['accum_iter']}"
    assert_same(model_tensors(broken / model), model_tensors(whole / model))
    assert_same(state_tensors(latest_state(broken)), state_tensors(latest_state(whole)))
    for rng in latest_state(whole).glob("rng.*.pt"):
        assert_same(torch.load(latest_state(broken) / rng.name), torch.load(rng))


@pytest.mark.parametrize(("dp_size", "mp_size", "ep_size"), [(4, 1, 2), (1, 2, 1), (1, 1, 1)])
def test_a_run_goes_on_with_other_ranks(
    dp_size: int,
    mp_size: int,
    ep_size: int,
    ranks: Pools,
    setting: Setting,
    stopped: Path,
    unbroken: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    output = copy_of(stopped, tmp_path / "run")
    index = latest_state(output) / Shelf.INDEX
    record = json.loads(index.read_text())
    assert record.pop("ep_size") == 1
    index.write_text(json.dumps(record))  # as versions wrote it that did not spread experts
    train(ranks, setting, output, layout(dp_size, mp_size, ep_size=ep_size), max_steps=END, auto_resume=True)
    whole = unbroken("2 x 2")
    assert losses(output) == pytest.approx(losses(whole), rel=1e-4)
    theirs = state_tensors(latest_state(whole))
    for name, tensor in state_tensors(latest_state(output)).items():
        if name.startswith("model."):
            assert (tensor - theirs[name]).abs().max() <= 1e-4 * theirs[name].abs().max(), name


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp"), ("fsdp", "sdp"), ("sdp", "ddp")])
def test_a_run_goes_on_with_another_kind_of_data_parallelism(
    before: str, after: str, ranks: Pools, setting: Setting, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    for end, kind in ((8, before), (16, after)):
        train(ranks, setting, tmp_path, LAYOUTS["2 x 2"], max_steps=end, auto_resume=True, data_parallel=kind)
    assert losses(tmp_path) == pytest.approx(losses(unbroken("2 x 2"))[:16], rel=1e-4)


def test_a_step_of_other_examples_is_refused(ranks: Pools, setting: Setting, stopped: Path, tmp_path: Path) -> None:
    output = copy_of(stopped, tmp_path / "run")
    before = state_tensors(latest_state(output))
    fewer = make_setting(tmp_path / "fewer", setting.model / "tokenizer.model", examples=50)
    for changes, says in (
        ({"batch_size": 3}, "choose the three so that their product is 8"),
        ({"seed": 1}, "keep --seed"),
        (
            {"data_config": fewer.folder / "data.yaml"},
            "give the same data, --max_words, --eval_ratio and --chat_template",
        ),
        (
            {"chat_template": "default", "max_words": 160},
            "give the same data, --max_words, --eval_ratio and --chat_template",
        ),
    ):
        arguments = setting.arguments(output, **{**layout(1, 2), "auto_resume": True, **changes})
        for kind, text in ranks(2).run(error_on_rank, setting, arguments):
            assert kind == "ValueError"
            assert says in text
    assert_same(state_tensors(latest_state(output)), before)


def test_frozen_routers_stay_as_they_are(ranks: Pools, setting: Setting, tmp_path: Path) -> None:
    """To the bit, also where a run goes on from a state without what is frozen."""
    asked = {"train_router": "no", "only_save_trainable": True, "save_interval": 1}
    for end in (PER_EPOCH, 2 * PER_EPOCH):
        train(ranks, setting, tmp_path, LAYOUTS["2 x 2"], max_steps=end, auto_resume=True, **asked)
    train(ranks, setting, whole := tmp_path / "whole", LAYOUTS["2 x 2"], max_steps=2 * PER_EPOCH, **asked)
    assert log_lines(tmp_path) == log_lines(whole)
    assert not any(name.endswith("gate.weight") for name in model_tensors(tmp_path / "epoch1"))
    train(ranks, setting, tmp_path / "all", layout(1, 1), max_steps=3, train_router="no")
    before, after = Folder(setting.model), Folder(next((tmp_path / "all").glob("epoch0-iter*")))
    args = before.stored_args()
    for name, shape in parameter_shapes(args):
        first, second = (folder.weights(args).read(name, Box.whole(shape)).float() for folder in (before, after))
        assert torch.equal(first, second) == name.endswith("gate.weight"), name


def test_a_packed_run_goes_on_with_the_same_rows(ranks: Pools, setting: Setting, tmp_path: Path) -> None:
    for split in ((1, 1), (2, 2)):
        whole, broken = tmp_path / f"whole {split}", tmp_path / f"broken {split}"
        train(ranks, setting, whole, layout(*split), max_steps=7, packing=True)
        for end in (3, 7):
            train(ranks, setting, broken, layout(*split), max_steps=end, packing=True, auto_resume=True)
        assert log_lines(broken) == log_lines(whole)
        assert_same(state_tensors(latest_state(broken)), state_tensors(latest_state(whole)))
    assert losses(whole) == pytest.approx(losses(tmp_path / "whole (1, 1)"), rel=1e-4)
    assert json.loads((whole / "log.jsonl").read_text().splitlines()[0])["epoch"] > 1 / PER_EPOCH  # fewer steps
    arguments = setting.arguments(whole, **{**layout(1, 1), "auto_resume": True})
    kind, text = ranks(1).run(error_on_rank, setting, arguments)[0]
    assert kind == "ValueError"
    assert text.endswith("now it is each example in a row of its own: give its --packing and --max_words")


def error_on_rank(setting: Setting, arguments: list[str]) -> tuple[str, str]:
    return error_of(finetune_on_rank, setting, arguments)


def test_the_loss_scaler_goes_on(ranks: Pools, setting: Setting, tmp_path: Path) -> None:
    # A scale that grows every 2000 steps would be the same on both ways.
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = {"precision": "fp16", **layout(1, 2)}
    for output, end in ((whole, 12), (broken, 7), (broken, 12)):
        given = setting.arguments(output, **arguments, max_steps=end, auto_resume=True)
        ranks(2).run(with_a_moving_scale_on_rank, setting, given)
    scales = [line["loss_scale"] for line in log_lines(whole)]
    assert len(set(scales[:7])) > 2, "it moved before the stop"
    assert log_lines(broken) == log_lines(whole)
    assert_same(state_tensors(latest_state(broken)), state_tensors(latest_state(whole)))


def with_a_moving_scale_on_rank(setting: Setting, arguments: list[str]) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
    with mock.patch("accessory.train.loop.loss_scaler", return_value=scaler):
        finetune_on_rank(setting, arguments)


# -- where a state is looked for


@pytest.mark.parametrize(
    "place", ["", "checkpoints/step-00000013", pytest.param("checkpoints", marks=pytest.mark.soak)]
)
def test_resume_takes_the_state_of_another_run(
    place: str, ranks: Pools, setting: Setting, stopped: Path, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    train(ranks, setting, tmp_path, LAYOUTS["2 x 2"], max_steps=16, resume=stopped / place)
    assert [line["step"] for line in log_lines(tmp_path)] == [14, 15, 16]
    assert log_lines(tmp_path) == log_lines(unbroken("2 x 2"))[13:16]
    # The model of step 13 is the other run's.
    assert [path.name for path in tmp_path.glob("epoch*")] == ["epoch2-iter4"]
    # A restart goes on with its own state.
    train(ranks, setting, tmp_path, LAYOUTS["2 x 2"], max_steps=17, resume=stopped / place, auto_resume=True)
    assert log_lines(tmp_path) == log_lines(unbroken("2 x 2"))[13:17]


def test_a_run_goes_back_to_an_earlier_state_of_its_own(
    ranks: Pools, setting: Setting, stopped: Path, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    output = copy_of(stopped, tmp_path / "run")
    train(ranks, setting, output, LAYOUTS["2 x 2"], max_steps=16, auto_resume=True)
    train(ranks, setting, output, LAYOUTS["2 x 2"], max_steps=15, resume=output / "checkpoints" / "step-00000013")
    assert log_lines(output) == log_lines(unbroken("2 x 2"))[:15]
    assert latest_state(output).name == "step-00000015"


def test_a_run_that_begins_finds_no_other_runs_models(
    ranks: Pools, setting: Setting, stopped: Path, tmp_path: Path
) -> None:
    output = copy_of(stopped, tmp_path / "run")
    before = contents(output)
    for changes in ({}, {"resume": stopped}):
        arguments = setting.arguments(output, **LAYOUTS["2 x 2"], **changes)
        for _, text in ranks(4).run(error_on_rank, setting, arguments):
            assert "holds a finished run (13 steps, newest model epoch1-iter12): choose another --output_dir" in text
    shutil.rmtree(output / "checkpoints")  # without its states a finished run cannot be gone on with
    arguments = setting.arguments(output, **LAYOUTS["2 x 2"], auto_resume=True)
    for _, text in ranks(4).run(error_on_rank, setting, arguments):
        assert "holds models of an earlier run without its training states (newest model epoch1-iter12)" in text
    assert contents(output) == before


def contents(output: Path) -> dict[str, bytes]:
    """The run's files, but for its training states and the text that it prints."""
    files = {str(path.relative_to(output)): path for path in output.rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if not name.startswith("checkpoints/") and name != "output.log"
    }


def cut_short_on_rank(setting: Setting, arguments: list[str]) -> tuple[str, str]:
    """End at the first training state, before which its model was written."""
    with mock.patch.object(Checkpointer, "save", side_effect=OSError("cut short")):
        return error_of(finetune_on_rank, setting, arguments)


def test_a_run_without_its_first_state_begins_anew(
    ranks: Pools, setting: Setting, unbroken: Callable[[str], Path], tmp_path: Path
) -> None:
    options = {**LAYOUTS["2 x 2"], "save_iteration_interval": 6, "auto_resume": True}
    arguments = setting.arguments(tmp_path, **options)
    for _ in range(2):  # and once more at the same place
        assert set(ranks(4).run(cut_short_on_rank, setting, arguments)) == {("OSError", "cut short")}
        assert [path.name for path in tmp_path.glob("epoch*")] == ["epoch0-iter6"]
    train(ranks, setting, tmp_path, options, max_steps=5)
    assert log_lines(tmp_path) == log_lines(unbroken("2 x 2"))[:5]


def test_a_run_at_its_end_takes_no_step(ranks: Pools, setting: Setting, stopped: Path, tmp_path: Path) -> None:
    output = copy_of(stopped, tmp_path / "run")
    model = output / "epoch1-iter12"
    expected = model_tensors(model)
    before = (output / "log.jsonl").read_text()
    train(ranks, setting, output, LAYOUTS["2 x 2"], max_steps=STOPS[0], auto_resume=True)
    # What a run did not come to write, after a signal or a kill, is written first of all.
    shutil.rmtree(model)
    train(ranks, setting, output, LAYOUTS["2 x 2"], max_steps=STOPS[0], auto_resume=True)
    assert_same(model_tensors(model), expected)
    assert (output / "log.jsonl").read_text() == before
    states = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert states == ["latest", "step-00000013"]
    content = json.loads((latest_state(output) / "state.json").read_text())
    assert content["progress"]["step"] == STOPS[0]
