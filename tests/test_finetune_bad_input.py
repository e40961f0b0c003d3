"""What a user of main_finetune.py gets wrong: one line that names it and the way out, on every rank alike."""

import fcntl
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch.distributed as dist
from checkpoints import random_tensors, small_config, write_folder
from finetuning import Setting, finetune_on_rank, losses, make_setting
from ranks import alike

from accessory.files import HOST
from accessory.parallel.state import raised_on_all_ranks
from accessory.train import finetune as finetune_module
from accessory.train import loop as loop_module
from accessory.train import output_folder

# -- what the files hold


class Case(NamedTuple):
    """Something wrong with a run.

    Attributes:
        sizes: the numbers of ranks at which it is tried.
        says: texts that the error must hold; the last is the way out.
        spoil: given a folder of its own and the good setting, returns the arguments to change.
    """

    sizes: tuple[int, ...]
    says: tuple[str, ...]
    spoil: Callable[[Path, Setting], dict[str, Any]]


CASES: dict[str, Case] = {}


def case(name: str, *says: str, sizes: tuple[int, ...] = (1, 2)) -> Callable[[Callable], Callable]:
    def register(spoil: Callable[[Path, Setting], dict[str, Any]]) -> Callable:
        assert name not in CASES
        CASES[name] = Case(sizes, says, spoil)
        return spoil

    return register


def sizes_of(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config that a checkpoint is to be read with."""
    config = small_config(**{"dim": 32, "hidden_dim": 16, **changes})
    (folder / "sizes.json").write_text(json.dumps(config))
    return {"llama_config": folder / "sizes.json"}


def data_of(folder: Path, content: Any, *, name: str = "data.json", **entry: Any) -> dict[str, Any]:
    """A data yaml of one file; its content is text, bytes or what becomes JSON."""
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return yaml_of(folder, json.dumps({"META": [{"path": str(folder / name), **entry}]}))


def yaml_of(folder: Path, text: str) -> dict[str, Any]:
    (folder / "data.yaml").write_text(text)
    return {"data_config": folder / "data.yaml"}


GOOD = {"instruction": "Say list", "output": "list"}


@case("ranks not a multiple", "model_parallel_size 3 does not divide the number of processes, ", "another size")
def _(folder, good):
    return {"model_parallel_size": 3}


@case("expert ranks", "expert_parallel_size 3 does not divide the number of data-parallel ranks, ", "another size")
def _(folder, good):
    return {"expert_parallel_size": 3}


@case(
    "experts over too many ranks",
    "expert_parallel_size 2 does not divide the 3 experts of a layer",
    "give one of 1, 3",
    sizes=(2,),
)
def _(folder, good):
    return {"expert_parallel_size": 2, **sizes_of(folder, moe={"num_experts": 3, "num_experts_per_tok": 2})}


@case(
    "a placement that expert ranks exclude",
    'expert_parallel_size 2 x model_parallel_size 2 does not divide the 2 experts of a layer (expert_placement "exp',
    'expert_placement "tensor"',
    sizes=(4,),
)
def _(folder, good):
    sizes = {"expert_parallel_size": 2, "model_parallel_size": 2, "expert_placement": "expert"}
    return {**sizes, **sizes_of(folder, moe={"num_experts": 2, "num_experts_per_tok": 1})}


@case("a model beyond all memory", "the run cannot fit: weights, gradients and optimizer ", "host ", "ranks that have ")
def _(folder, good):
    """Mixtral-8x22B's sizes."""
    sizes = {"dim": 6144, "hidden_dim": 16384, "n_layers": 56, "n_heads": 48, "n_kv_heads": 8, "vocab_size": 384}
    new = {"pretrained_path": None, "tokenizer_path": good.model / "tokenizer.model"}
    return {**new, **sizes_of(folder, **sizes, moe={"num_experts": 8, "num_experts_per_tok": 2})}


@case("heads", "n_heads 3 is not a multiple of 2", "Rank counts that work: 1", sizes=(2,))
def _(folder, good):
    return {"model_parallel_size": 2, **sizes_of(folder, n_heads=3, n_kv_heads=3, dim=48, vocab_size=384)}


@case("experts", '3 experts are not a multiple of 2 (expert_placement "expert")', "work: 1", sizes=(2,))
def _(folder, good):
    moe = {"num_experts": 3, "num_experts_per_tok": 2}
    return {"model_parallel_size": 2, "expert_placement": "expert", **sizes_of(folder, moe=moe)}


@case("hidden size", 'hidden_dim 15 is not a multiple of 2 (expert_placement "tensor")', "work: 1", sizes=(2,))
def _(folder, good):
    return {"model_parallel_size": 2, "expert_placement": "tensor", **sizes_of(folder, hidden_dim=15)}


@case("neither", "neither 3 experts nor hidden_dim 15 are a multiple of 2", "Rank counts that work: 1", sizes=(2,))
def _(folder, good):
    moe = {"num_experts": 3, "num_experts_per_tok": 2}
    return {"model_parallel_size": 2, **sizes_of(folder, hidden_dim=15, moe=moe)}


@case("more ranks than experts", "1 experts are not a multiple of 2", "Rank counts that work: 1", sizes=(2,))
def _(folder, good):
    moe = {"num_experts": 1, "num_experts_per_tok": 1}
    return {"model_parallel_size": 2, "expert_placement": "expert", **sizes_of(folder, moe=moe)}


@case("experts spread as if anything fitted", "2 model-parallel ranks share 1 key/value heads", "1 at most", sizes=(2,))
def _(folder, good):
    return {"model_parallel_size": 2, "expert_parallel_size": "auto", **sizes_of(folder, n_kv_heads=1)}


@case("more ranks than key/value heads", "2 model-parallel ranks share 1 key/value heads", "1 at most", sizes=(2,))
def _(folder, good):
    return {"model_parallel_size": 2, **sizes_of(folder, n_kv_heads=1)}


@case("placement", "expert_placement 'row' is unknown", "choose from auto, expert, tensor")
def _(folder, good):
    return {"expert_placement": "row"}


@case("no CUDA", "the device cuda was asked for, but PyTorch sees no CUDA device", "give the device cpu")
def _(folder, good):
    return {"device": "cuda"}


@case("a rate of what does not train", "--lora_plus is given, and the run trains no LoRA updates", "leave it out")
def _(folder, good):
    return {"lora_plus": 16}


@case("routers beside adapters", "--train_router is given, and beside adapters the base stays as it is", "leave it out")
def _(folder, good):
    return {"lora_rank": 4, "train_router": True}


@case("a rate of what is frozen", "--lr_router is given, and the run trains no router", "leave it out")
def _(folder, good):
    return {"lora_rank": 4, "lr_router": 1e-3}


# -- the model's files


@case("model missing", "checkpoint folder", "absent does not exist", "check the path")
def _(folder, good):
    return {"pretrained_path": folder / "absent"}


@case("unknown config key", "sizes.json", "unknown key(s) n_experts", "known are")
def _(folder, good):
    return sizes_of(folder, n_experts=8)


@case("config no JSON", "sizes.json cannot be read as JSON", "correct it or copy it again")
def _(folder, good):
    (folder / "sizes.json").write_text("{")
    return {"llama_config": folder / "sizes.json"}


@case("another model's config", "wq.weight", "(64, 32)", "config")
def _(folder, good):
    return sizes_of(folder, n_heads=4, n_kv_heads=4)


@case("llama_type", "llama_type 'llama' is unknown", "choose from mistral")
def _(folder, good):
    return {"llama_type": "llama"}


@case("another tokenizer", "has 384 tokens, the model's vocab_size is only 376", "belong to different models")
def _(folder, good):
    return sizes_of(folder, vocab_size=376)


@case("no tokenizer", "has no tokenizer.model (nor tokenizer.json)", "name it (tokenizer_path)")
def _(folder, good):
    config = small_config(dim=32, hidden_dim=16)
    return {"pretrained_path": write_folder(folder / "m", random_tensors(config, 1), config, files=1)}


@case("no model", "no model is given", "give --pretrained_path FOLDER (or --llama_config FILE and --tokenizer_path")
def _(folder, good):
    return {"pretrained_path": None}


@case("from nothing without a tokenizer", "without --pretrained_path", "give --tokenizer_path FILE as well")
def _(folder, good):
    return {"pretrained_path": None, "llama_config": good.model / "config.json"}


@case("adapters as nobody trains them", "--lora_alpha says how adapters are trained", "give --lora_rank R, or leave it")
def _(folder, good):
    return {"lora_alpha": 8}


@case("updates of what is not there", "lora_targets names shared, and the model has no shared expert: leave it out")
def _(folder, good):
    return {"lora_rank": 4, "lora_targets": ("attention", "shared")}


@case("a rank for what gets no updates", "lora_ranks gives router a rank, and lora_targets does not name router: leave")
def _(folder, good):
    return {"lora_rank": 4, "lora_ranks": "router=2"}


@case("a rank above the sizes", "lora_rank 64 is larger than a matrix", "give 16 at most")
def _(folder, good):
    return {"lora_rank": 64}


@case("a shard cut short", "consolidated.00-of-01.model.pth", "truncated", "Copy it again")
def _(folder, good):
    shutil.copytree(good.model, folder / "m")
    shard = folder / "m" / "consolidated.00-of-01.model.pth"
    shard.write_bytes(shard.read_bytes()[:-100])
    return {"pretrained_path": folder / "m"}


# -- the data


@case("data yaml missing", "no data yaml", "absent.yaml", "check the path")
def _(folder, good):
    return {"data_config": folder / "absent.yaml"}


@case("not yaml", "data.yaml is not valid YAML", "line 1")
def _(folder, good):
    return yaml_of(folder, "META: [{path: data.json")


@case("META empty", "META of", "data.yaml is []", "give a list of entries with a path")
def _(folder, good):
    return yaml_of(folder, "META: []\n")


@case("no META", "data.yaml has no META", "list the data files under it")
def _(folder, good):
    return yaml_of(folder, "- path: data.json\n")


@case("unknown key of an entry", "data.yaml: entry 1 of META: key 'weight' is unknown", "choose from path")
def _(folder, good):
    return data_of(folder, [GOOD], weight=2)


@case("data file missing", "data.yaml is absent", "there is no /", "/absent.json")
def _(folder, good):
    return yaml_of(folder, f"META: [{{path: {folder}/absent.json}}]\n")


@case("data file empty", "data.json is empty", "copy or download it again")
def _(folder, good):
    return data_of(folder, "")


@case("data file malformed", "data.json, line 1: not a valid .json data file", "correct it or copy it again")
def _(folder, good):
    return data_of(folder, json.dumps([GOOD, GOOD])[:-20])


@case(
    "data file malformed, though bad records are skipped",
    "data.json, line 1: not a valid .json data file",
    "correct it or copy it again",
)
def _(folder, good):
    return {**data_of(folder, json.dumps([GOOD, GOOD])[:-20]), "skip_bad_records": True}


@case("data file of one object", "data.json", "list")
def _(folder, good):
    return data_of(folder, GOOD)


@case("an empty list", "data.json holds no record to learn from", "correct it")
def _(folder, good):
    return data_of(folder, [])


@case("data of another kind", "data.txt is of an unknown kind", "take one of .json")
def _(folder, good):
    return data_of(folder, "text", name="data.txt")


@case("bad record", "bad record in", "data.json, record 2", "having ['instruction']", "pass --skip_bad_records")
def _(folder, good):
    return data_of(folder, [GOOD, {"instruction": "a"}])


@case("bad line", "bad record in", "data.jsonl, line 3", "not valid JSON", "pass --skip_bad_records")
def _(folder, good):
    return data_of(folder, f"{json.dumps(GOOD)}\n\n{{\n", name="data.jsonl")


@case("only bad records", "holds no record to learn from (1 bad records", "record 1: ", "give its fields the names")
def _(folder, good):
    return {**data_of(folder, [{"instruction": "a"}]), "skip_bad_records": True}


@case("no answer", "holds no record to learn from (0 bad records, 2 without an answer)", "correct it")
def _(folder, good):
    return data_of(folder, [{**GOOD, "output": ""}, {**GOOD, "output": " \n"}])


@case("no answer within max_words", "data.json has an answer within its first 20 tokens", "raise --max_words")
def _(folder, good):
    return {"max_words": 20}


@case(
    "Alpaca records with --dialog", "bad record in", "an Alpaca record is read without --dialog", "leave --dialog out"
)
def _(folder, good):
    return {"dialog": True}


CHAT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


@case("an unknown field", "data.json, record 2: it has the unknown ['notes']", "pass --ignore_fields notes")
def _(folder, good):
    return {**data_of(folder, [GOOD, {**GOOD, "notes": "a"}]), "skip_bad_records": True}


@case("forms", "several prompt forms, alpaca and default, in ", "data.json: ", "name one for all with --chat_template")
def _(folder, good):
    return data_of(folder, [GOOD, CHAT])


@case("an answer that ends", "record 2", "its answer holds '\\n### Human:', at which answers end", "--skip_bad_records")
def _(folder, good):
    spoilt = {"conversations": [CHAT["conversations"][0], {"from": "gpt", "value": "b\n### Human: c"}]}
    return data_of(folder, [CHAT, spoilt])


@case("form", "chat_template 'vicuna' is no file and unknown as a name", "take a file or one of default, alpaca, ")
def _(folder, good):
    return {"chat_template": "vicuna"}


@case("endless", "--packing: in the form of --chat_template ", "an answer has no end", "or leave --packing out")
def _(folder, good):
    said = "{% generation %}{{ m.content }}{% endgeneration %}"
    source = f"{{% for m in messages %}}{{{{ m.role }}}}: {said}</s>{{% endfor %}}"
    (folder / "endless.jinja").write_text(source)
    return {"chat_template": folder / "endless.jinja", "packing": True}


@case("no template", "chat_template model: no chat template lies in", "base: give a file or a name")
def _(folder, good):
    return {"chat_template": "model"}


@case("a template that is broken", "line 1 of the chat template", "unexpected end of template")
def _(folder, good):
    (folder / "broken.jinja").write_text("{{ messages")
    return {"chat_template": folder / "broken.jinja"}


@case(
    "a chat that the template refuses",
    "bad record in",
    "data.json, record 1",
    "only one, please",
    "(no record near it is usable)",
)
def _(folder, good):
    template = (
        "{% if messages | length > 3 %}{{ raise_exception('only one, please') }}{% endif %}{{ messages[0].content }}"
    )
    (folder / "one.jinja").write_text(template)
    twice = {"conversations": CHAT["conversations"] * 2}
    return {**data_of(folder, [twice]), "chat_template": folder / "one.jinja"}


# -- the folder of the run, and what it goes on from


@case("output_dir a file", "output_dir", "cannot be written to", "choose a folder that you may write to")
def _(folder, good):
    (folder / "file").write_text("")
    return {"output_dir": folder / "file"}


@case("output_dir below no folder", "output_dir /proc/x", "cannot be written to", "that you may write to")
def _(folder, good):
    return {"output_dir": "/proc/x"}


@case("resume nothing", "absent holds no training state", "name a run's output_dir or a folder of its checkpoints")
def _(folder, good):
    return {"resume": folder / "absent"}


@case("resume a model", "base holds no training state", "name a run's output_dir or a folder of its checkpoints")
def _(folder, good):
    return {"resume": good.model}


@pytest.fixture(scope="module")
def good(tmp_path_factory, small_tokenizer) -> Setting:
    return make_setting(tmp_path_factory.mktemp("good"), small_tokenizer, prompt_type="alpaca")


def told_outcome(setting: Setting, arguments: list[str]) -> tuple[tuple[str, str, bool], list[str]]:
    """`outcome` and what the rank logged."""
    told: list[str] = []
    plain = logging.getLogRecordFactory()

    def noting(*given: Any, **more: Any) -> logging.LogRecord:
        record = plain(*given, **more)
        told.append(record.getMessage())
        return record

    logging.setLogRecordFactory(noting)
    try:
        return outcome(setting, arguments), told
    finally:
        logging.setLogRecordFactory(plain)


def outcome(setting: Setting, arguments: list[str]) -> tuple[str, str, bool]:
    """Of one rank: the error's type and text, and whether it is marked as the same on every rank."""
    try:
        finetune_on_rank(setting, arguments)
    except Exception as error:
        return type(error).__name__, str(error), raised_on_all_ranks(error)
    return "", "", False


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for size in (1, 2) for name, case in CASES.items() if size in case.sizes],
)
def test_refused_alike_on_every_rank(name, size, good, ranks, tmp_path):
    case = CASES[name]
    changes = {"output_dir": tmp_path / "out", **case.spoil(tmp_path, good)}
    output = changes.pop("output_dir")
    before = sorted(tmp_path.rglob("*"))
    answers = ranks(size).run(told_outcome, good, good.arguments(output, **changes))
    kind, text, marked = alike([answer for answer, _ in answers])
    print(f"\n{name}: {text}")
    expected = ("ValueError", "TemplateError", "FileNotFoundError", "CheckpointError", "OSError", "FileExistsError")
    assert kind in expected, text
    assert all(part in text for part in case.says), text
    assert text.rfind(case.says[-1]) == max(map(text.rfind, case.says)), "the way out stands last"
    assert "\n" not in text
    assert marked == (size > 1)
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
    told = "\n".join(answers[0][1])
    assert "training" not in told, "the model was built before"
    if "data" not in name:
        assert "examples" not in told, "the data were tokenised before"


def late(setting: Setting, arguments: list[str]) -> tuple[str, str, bool]:
    """`outcome` of a run that fails when it has built its model."""
    with mock.patch.object(finetune_module, "FinetuneLoop", side_effect=MemoryError("no memory")):
        return outcome(setting, arguments)


@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_ends_before_its_first_step_leaves_what_was_there(size, good, ranks, tmp_path):
    """Its own folders go with those that it made for them; the user's stay, and so does what lies in them."""
    mine = tmp_path / "mine"
    mine.mkdir()
    new = tmp_path / "some" / "where" / "new"
    for output in (new, mine):
        for answer in ranks(size).run(late, good, good.arguments(output)):
            assert answer[0] == "MemoryError"
        assert list(tmp_path.rglob("*")) == [mine]
    (mine / "notes.txt").write_text("mine")
    (mine / "output.log").write_text("an earlier one\n")
    ranks(size).run(late, good, good.arguments(mine))
    assert sorted(path.name for path in mine.iterdir()) == ["notes.txt", "output.log"]
    assert (mine / "output.log").read_text().startswith("an earlier one\n")
    # One that has taken a step keeps all of it.
    ranks(size).run(failing_at_step_2, good, good.arguments(new))
    assert {"output.log", "options.json", "log.jsonl"} <= {path.name for path in new.iterdir()}
    assert not (new / output_folder.LOCK).exists()


def failing_at_step_2(setting: Setting, arguments: list[str]) -> tuple[str, str, bool]:
    step = loop_module.train_step

    def failing(*given: Any, **settings: Any) -> Any:
        failing.calls += 1
        if failing.calls == 2:
            raise FloatingPointError("the loss is not finite")
        return step(*given, **settings)

    failing.calls = 0
    with mock.patch.object(loop_module, "train_step", failing):
        return outcome(setting, arguments)


# -- runs that meet an earlier one


@pytest.fixture(scope="module")
def earlier(good, ranks, tmp_path_factory) -> Path:
    """The folder of a run of two steps."""
    output = tmp_path_factory.mktemp("earlier") / "run"
    ranks(1).run(finetune_on_rank, good, good.arguments(output, max_steps=2))
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """What a run has written, but for its text log."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "output.log"
    }


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ("all", "a finished run (2 steps, newest model epoch0-iter2): {anew}"),
        ("all, to the end of its epochs", "a finished run (1 epochs, newest model epoch0): {anew}"),
        ("a model", "models of an earlier run without its training states (newest model epoch0-iter2): {anew}"),
        ("no model", "a run that was stopped (step-00000002, no model): {on}"),
        ("a part", "a run that was stopped (step-00000002, newest model epoch0-iter2): {on}"),
    ],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_folder_of_an_earlier_run_is_left_alone(left, says, size, good, earlier, ranks, tmp_path):
    output = Path(shutil.copytree(earlier, tmp_path / "run"))
    if left == "a model":
        shutil.rmtree(output / "checkpoints")
    elif left == "no model":
        shutil.rmtree(output / "epoch0-iter2")
    elif left != "all":
        options = json.loads((output / "options.json").read_text())
        changes = {"max_steps": 3} if left == "a part" else {"epochs": 1}
        (output / "options.json").write_text(json.dumps(options | changes))
    if left == "all, to the end of its epochs":
        (output / "epoch0-iter2").rename(output / "epoch0")
        (index,) = output.glob("checkpoints/*/state.json")
        state = json.loads(index.read_text())
        state["progress"]["sampler"]["examples"] = 2 * state["progress"]["sampler"]["global_batch"]
        index.write_text(json.dumps(state))
    before = contents(output)
    answers = ranks(size).run(outcome, good, good.arguments(output, max_steps=3, seed=1))
    text = alike([text for _, text, _ in answers])
    anew = "choose another --output_dir, or remove it"
    on = "go on with it by --auto_resume, or choose another --output_dir"
    assert text == f"output_dir {output} holds {says.format(anew=anew, on=on)}"
    assert contents(output) == before


@pytest.mark.parametrize("size", [1, 2])
def test_the_state_of_another_model(size, good, earlier, ranks, tmp_path):
    config = {**json.loads((good.model / "config.json").read_text()), "hidden_dim": 32}
    other = write_folder(
        tmp_path / "other", random_tensors(config, 1), config, files=1, tokenizer=good.model / "tokenizer.model"
    )
    changes = {"pretrained_path": other, "resume": earlier, "max_steps": 3}
    kind, text, _ = alike(ranks(size).run(outcome, good, good.arguments(tmp_path / "out", **changes)))
    assert kind == "CheckpointError"
    assert f"{earlier}/checkpoints/step-00000002 holds the state of another model: hidden_dim 16 (here 32)" in text


def test_half_written_states_are_not_gone_on_from(good, earlier, ranks, tmp_path):
    """One whose writing was cut short, and one whose file was; it goes on from the whole one before."""
    output = Path(shutil.copytree(earlier, tmp_path / "run"))
    states = output / "checkpoints"
    whole = states / "step-00000002"
    left = [states / ".step-00000004.tmp-0a1b2c3d", output / ".epoch0-iter4.exporting", output / ".epoch0.replaced"]
    for folder in left:
        shutil.copytree(whole, folder)
    left.append(output / f".options.json.{HOST}-77.tmp")
    left[-1].touch()
    (output / ".mine.tmp").touch()
    short = Path(shutil.copytree(whole, states / "step-00000003")) / "__0_0.distcp"
    short.write_bytes(short.read_bytes()[:-1])
    (states / "latest").write_text("step-00000003\n")
    (stop,) = ranks(1).run(finetune_on_rank, good, good.arguments(output, max_steps=4, auto_resume=True))
    assert stop == 0
    log = (output / "output.log").read_text()
    assert "INFO: removed what an interrupted run had not finished" in log
    assert all(str(path.relative_to(output)) in log and not path.exists() for path in left)
    assert (output / ".mine.tmp").exists()
    assert f"WARNING: ignoring {states}/step-00000003, which" in log
    assert "__0_0.distcp is cut short" in log
    assert f"resuming {whole} after step 2" in log
    assert len(losses(output)) == 4


def held_elsewhere(setting: Setting, output: Path, arguments: list[str]) -> tuple[str, str, bool]:
    """`outcome` where another process holds the folder and nobody has patience."""
    patience, output_folder.PATIENCE = output_folder.PATIENCE, 0.3
    try:
        with (output / output_folder.LOCK).open("a") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            return outcome(setting, arguments)
    finally:
        output_folder.PATIENCE = patience


def test_two_runs_in_one_folder(good, ranks, tmp_path):
    arguments = good.arguments(tmp_path, max_steps=1)
    ((kind, text, _),) = ranks(1).run(held_elsewhere, good, tmp_path, arguments)
    assert kind == "OSError"
    assert text == f"another run is writing to output_dir {tmp_path}: wait for it, stop it, or choose another"
    assert not (tmp_path / "log.jsonl").exists()


def with_data_of_its_own(setting: Setting, folder: Path, arguments: list[str]) -> tuple[str, str, bool]:
    """`outcome` where the second rank's host has another file under the same name."""
    load = finetune_module.load_finetune_data

    def elsewhere(config: Path, *given: Any, **settings: Any) -> Any:
        return load(folder / "data.yaml" if dist.get_rank() == 1 else config, *given, **settings)

    with mock.patch.object(finetune_module, "load_finetune_data", elsewhere):
        return outcome(setting, arguments)


def test_hosts_with_unlike_data(good, ranks, tmp_path):
    data_of(tmp_path, [GOOD] * 5)
    arguments = good.arguments(tmp_path / "out", max_steps=1, batch_size=2)
    for kind, text, _ in ranks(2).run(with_data_of_its_own, good, tmp_path, arguments):
        assert kind == "ValueError"
        assert re.match(r"rank 1 on \S+ reads other data, or with another tokenizer, than rank 0", text)


# -- bad records that are skipped, and places that cannot be written


@pytest.mark.parametrize("size", [1, 2])
def test_skipped_records_are_counted_and_listed(size, good, ranks, tmp_path):
    records = [GOOD, {"instruction": "a"}, GOOD, 7, {**GOOD, "output": ""}, *[GOOD] * 5, *[None] * 8]
    changes = {**data_of(tmp_path, records), "skip_bad_records": True, "epochs": 1, "batch_size": 4 // size}
    ranks(size).run(finetune_on_rank, good, good.arguments(tmp_path / "out", **changes))
    log = (tmp_path / "out" / "output.log").read_text()
    assert f"{tmp_path}/data.json: 7 examples" in log
    assert f"WARNING: {tmp_path}/data.json: 10 bad records are left out" in log
    assert "WARNING:   record 2: it is of no known shape, having ['instruction']; " in log
    assert "WARNING:   record 4: it is 7, not an object" in log
    assert "WARNING:   and 5 more" in log
    assert f"WARNING: {tmp_path}/data.json: 1 records without an answer to learn are left out" in log
    assert len(losses(tmp_path / "out")) == 2


def with_cache(folder: Path, setting: Setting, arguments: list[str]) -> tuple[str, str, bool]:
    (folder / "cache").write_text("")
    return outcome(Setting(folder), arguments)


def test_the_cache_cannot_be_written(good, ranks, tmp_path):
    ((kind, text, _),) = ranks(1).run(with_cache, tmp_path, good, good.arguments(tmp_path / "out"))
    assert kind in ("OSError", "FileExistsError", "NotADirectoryError")
    assert f"cannot write the data cache in {tmp_path}/cache" in text
    assert text.endswith("or name another folder in $ACCESSORY_DATA_CACHE")
