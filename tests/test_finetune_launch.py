"""Starting main_finetune.py: by hand, through torchrun, through the experiments under srun, on two hosts."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from finetuning import Setting, finetune_on_rank, log_lines, losses, make_setting, model_tensors
from patience import PATIENCE
from ranks import assert_same, free_port, run_command
from stand_in_srun import install_srun
from two_hosts import ADDRESSES, run_on_two_hosts, why_not

import accessory
from accessory.launch.launcher import Launch
from accessory.model.meta import MetaModel

PYTHON = Path(sys.executable)
TORCHRUN = PYTHON.with_name("torchrun")
PACKAGE = Path(accessory.__file__).resolve().parent
ROOT = PACKAGE.parent
EXPERIMENTS = sorted((ROOT / "exps").glob("finetune/**/*.sh"))
NAMES = [path.stem for path in EXPERIMENTS]

STEPS, BATCH = 3, 8


@pytest.fixture(scope="module")
def setting(tmp_path_factory, small_tokenizer) -> Setting:
    return make_setting(tmp_path_factory.mktemp("launch"), small_tokenizer, prompt_type="alpaca")


@pytest.fixture(scope="module")
def one_process(setting, ranks, tmp_path_factory) -> Path:
    """The folder of a run on one process, which all others must agree with."""
    output = tmp_path_factory.mktemp("launch") / "one"
    ranks(1).run(finetune_on_rank, setting, arguments(setting, output))
    return output


def arguments(setting: Setting, output: Path, **changes: Any) -> list[str]:
    return setting.arguments(output, **{"max_steps": STEPS, "batch_size": BATCH, **changes})


def started(*command: str | Path, environment: Mapping[str, str], cwd: Path) -> str:
    """Standard error of a run that must end well, without a word of trouble, and write nothing into ``cwd``."""
    before = set(cwd.iterdir())
    done = run_command(command, cwd=cwd, env=environment)
    assert_quiet(done)
    assert set(cwd.iterdir()) == before
    return done.stderr


def assert_quiet(done: subprocess.CompletedProcess[str], *, but: str = "INFO: ") -> None:
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for line in done.stderr.splitlines():
        assert line.startswith("INFO: ") or but in line, done.stderr


def errors_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Traceback" not in done.stderr, done.stderr
    return [line for line in done.stderr.splitlines() if "ERROR" in line or "error:" in line]


def exported_loss(folder: Path) -> float:
    """Cross-entropy of one text, as the exported model gives it."""
    model = MetaModel.from_pretrained(folder, dtype="fp32", max_seq_len=64)
    tokens = torch.tensor([model.tokenizer.encode("Say the value of the list method", bos=True, eos=True)])
    with torch.no_grad():
        return model(tokens, tokens)[0].item()


# -- alone


def test_one_process_as_the_reference_page_starts_it(setting, one_process, tmp_path):
    out = tmp_path / "out"
    command = (PYTHON, "main_finetune.py", *arguments(setting, out))
    stderr = started(*command, environment=setting.environment, cwd=PACKAGE)
    assert f"done: {STEPS} of {STEPS} steps" in stderr
    assert log_lines(out) == log_lines(one_process)
    assert exported_loss(out / "epoch0-iter3") == exported_loss(one_process / "epoch0-iter3")


@pytest.mark.parametrize("start", [("accessory/main_finetune.py",), ("-m", "accessory.main_finetune")], ids=" ".join)
def test_other_starts_find_the_package(start, setting, tmp_path):
    """Its first modules, of which options come; the run itself is the same."""
    done = run_command([PYTHON, *start, *arguments(setting, tmp_path / "out", lr="nan")], cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "ERROR: --lr is nan: give a finite number\n")


def test_the_exported_folder_is_a_checkpoint(one_process, setting):
    folder = one_process / "epoch0-iter3"
    names = {path.name for path in folder.iterdir()}
    text = {"tokenizer.model", "chat_template.jinja"}
    assert names == {"consolidated.00-of-01.model.pth", "config.json", "meta.json", "manifest.json", *text}
    assert (folder / "tokenizer.model").read_bytes() == (setting.model / "tokenizer.model").read_bytes()
    form = {"name": "alpaca", "prompt_types": ["alpaca"]}
    assert json.loads((folder / "meta.json").read_text()) == {"llama_type": "mistral", "prompt_form": form}
    before, after = (json.loads((path / "config.json").read_text()) for path in (setting.model, folder))
    assert {key: after[key] for key in before if key != "max_seq_len"} == {
        key: value for key, value in before.items() if key != "max_seq_len"
    }
    done = run_command([PYTHON, "-m", "accessory", "inspect", folder, "--check-values"])
    assert done.returncode == 0, done.stderr
    assert "converted" in done.stdout
    assert "all finite" in done.stdout
    assert abs(exported_loss(folder) - exported_loss(setting.model)) > 1e-3, "three steps have changed nothing"


# -- torchrun


@pytest.mark.parametrize(
    "changes",
    [{"batch_size": BATCH // 2, "expert_parallel_size": "auto"}, {"model_parallel_size": 2}],
    ids=["dp 2", "mp 2"],
)
def test_torchrun(changes, setting, one_process, tmp_path):
    out = tmp_path / "out"
    command = (TORCHRUN, "--nproc-per-node", "2", "--master-port", str(free_port()), "main_finetune.py")
    told = started(*command, *arguments(setting, out, **changes), environment=setting.environment, cwd=PACKAGE)
    ep_size = json.loads((out / "options.json").read_text())["expert_parallel_size"]
    assert ep_size in (1, 2)
    assert (f"--expert_parallel_size auto: {ep_size} (of 1, 2)" in told) == ("expert_parallel_size" in changes)
    assert losses(out) == pytest.approx(losses(one_process), rel=1e-4)
    exported, theirs = (run / "epoch0-iter3" for run in (out, one_process))
    files = {path.name for path in exported.glob("*.pth")}
    mp_size = changes.get("model_parallel_size", 1)
    assert files == {f"consolidated.{rank:02d}-of-{mp_size:02d}.model.pth" for rank in range(mp_size)}
    for name in ("config.json", "meta.json", "tokenizer.model"):
        assert (exported / name).read_bytes() == (theirs / name).read_bytes()
    assert exported_loss(exported) == pytest.approx(exported_loss(theirs), rel=1e-4)
    if mp_size == 1:
        ours = tmp_path / "ours"
        command = (PYTHON, "-m", "accessory", "finetune", "--nproc", "2")
        started(*command, *arguments(setting, ours, **changes), environment=setting.environment, cwd=ROOT)
        assert log_lines(ours) == log_lines(out)
        assert_same(model_tensors(ours / "epoch0-iter3"), model_tensors(exported))


WITHOUT_MEMORY = """
import sys, torch
from accessory.train import loop
loop.train_step = lambda *given, **settings: torch.empty(2**50)
from accessory.main_finetune import main
sys.exit(main())
"""


def test_a_lack_of_memory_is_one_line(setting, tmp_path):
    command = [PYTHON, "-c", WITHOUT_MEMORY, *arguments(setting, tmp_path / "out")]
    done = run_command(command, env=setting.environment)
    assert done.returncode == 1
    (line,) = errors_of(done)
    assert line.startswith("ERROR: out of memory")
    assert "a smaller --batch_size with more --accum_iter" in line


# -- the experiments under srun


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory, small_tokenizer) -> Setting:
    """The same model with dialogues, which the experiments read."""
    setting = make_setting(tmp_path_factory.mktemp("dialogues"), small_tokenizer, prompt_type="alpaca")
    records = json.loads((setting.folder / "data.json").read_text())
    turns = [[("human", record["instruction"]), ("gpt", record["output"])] for record in records]
    content = [{"conversations": [{"from": who, "value": text} for who, text in turn]} for turn in turns]
    (setting.folder / "data.json").write_text(json.dumps(content))
    return setting


def srun_environment(setting: Setting, tmp_path: Path, **more: str) -> dict[str, str]:
    return {**setting.environment, **install_srun(tmp_path / "bin"), "SLURM_JOB_ID": free_job(), **more}


def free_job() -> str:
    """A SLURM job whose port nobody has taken."""
    while True:
        job = str(random.SystemRandom().randrange(10**6))
        variables = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": job}
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", Launch.find(variables).port))
            return job


def experiment_arguments(setting: Setting) -> list[str]:
    """PRETRAINED CONFIG_JSON TOKENIZER and what makes the experiment small."""
    model = setting.model
    small = ("--max_steps", "2", "--max_words", "256", "--batch_size", "1", "--precision", "fp32", "--device", "cpu")
    files = [model, model / "config.json", model / "tokenizer.model", *small]
    return [*map(str, files), "--data_config", str(setting.folder / "data.yaml")]


# What the reference page says of each, as options.json has it; and of the one that is not there, its own head.
EXPECTED: dict[str, dict[str, Any]] = {
    "dialog_ultrachat200kWizardcode_mistral": {"lr": 5e-6, "model_parallel_size": 8, "data_parallel": "sdp"},
    "dialog_ultrachat200kWizardcode_mistralExperts": {"lr": 5e-6, "expert_parallel_size": 8, "data_parallel": "fsdp"},
    "dialog_ultrachat200kWizardcode_mistralPeft": {"lr": 2e-5, "model_parallel_size": 4, "llama_type": "mistral_peft"},
}
SHARED = {"epochs": 1, "accum_iter": 8, "min_lr": 0, "clip_grad": 2, "weight_decay": 0, "dialog": True}
SHARED |= {"warmup_epochs": 0.1, "grad_ckpt_policy": "full", "auto_resume": False}


# Each rank takes seconds to start: `make soak` has those of 8; the first one's settings are looked at below, too.
@pytest.mark.parametrize(
    "script",
    [pytest.param(own, marks=[] if "Peft" in own.stem else [pytest.mark.soak]) for own in EXPERIMENTS],
    ids=NAMES,
)
def test_an_experiment_as_the_reference_page_starts_it(script, dialogues, ranks, tmp_path):
    out = tmp_path / "out"
    expected = {**SHARED, **EXPECTED.get(script.stem, {})}
    size = expected.get("model_parallel_size", 8)  # the page has more; each takes seconds to start
    srun = ("srun", f"-n{size}", "--gres=gpu:8", "--ntasks-per-node=8", "bash", script.relative_to(ROOT))
    given = (*experiment_arguments(dialogues), "--output_dir", out)
    environment = srun_environment(dialogues, tmp_path)
    started(*srun, *given, environment=environment, cwd=PACKAGE)
    options = json.loads((out / "options.json").read_text())
    assert {name: options[name] for name in expected} == expected
    mp_size = options["model_parallel_size"]
    assert len(list((out / "epoch0-iter16").glob(f"consolidated.*-of-{mp_size:02d}.model.pth"))) == mp_size
    assert losses(out) == pytest.approx(
        losses_alone(options, dialogues, ranks, data_parallel=size // mp_size), rel=1e-4
    )


def losses_alone(options: dict[str, Any], setting: Setting, ranks: Callable, *, data_parallel: int) -> list[float]:
    """The same by one process: of the arguments the layout alone is another."""
    output = Path(options["output_dir"]).with_name("alone")
    layout = {"model_parallel_size": 1, "expert_parallel_size": 1, "batch_size": options["batch_size"] * data_parallel}
    ranks(1).run(finetune_on_rank, setting, flags({**options, **layout, "output_dir": output}))
    return losses(output)


def flags(options: Mapping[str, Any]) -> list[str]:
    """Command line of what options.json holds."""
    parts: list[str] = []
    for name, value in options.items():
        if isinstance(value, list):
            parts += [f"--{name}", *value] if value else []
        elif value is not None and value is not False:
            parts += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return parts


# They differ in their settings, and not in how they find the ranks: `make soak` runs the others too.
@pytest.mark.parametrize(
    "script",
    [EXPERIMENTS[0], *(pytest.param(script, marks=pytest.mark.soak) for script in EXPERIMENTS[1:])],
    ids=NAMES,
)
def test_an_experiment_from_the_root_under_an_older_slurm(script, dialogues, ranks, tmp_path):
    out = tmp_path / "out"
    two = ("--model_parallel_size", "2", "--expert_parallel_size", "1")
    given = (*experiment_arguments(dialogues), "--output_dir", out, *two)
    environment = srun_environment(dialogues, tmp_path, STAND_IN_SRUN_NTASKS="SLURM_NPROCS")
    started("srun", "-n2", "bash", script.relative_to(ROOT), *given, environment=environment, cwd=ROOT)
    options = json.loads((out / "options.json").read_text())
    expected = {**SHARED, **EXPECTED.get(script.stem, {}), "model_parallel_size": 2, "expert_parallel_size": 1}
    assert {name: options[name] for name in expected} == expected
    assert losses(out) == pytest.approx(losses_alone(options, dialogues, ranks, data_parallel=1), rel=1e-4)
    assert len(list((out / "epoch0-iter16").glob("consolidated.*-of-02.model.pth"))) == 2


@pytest.mark.parametrize("script", EXPERIMENTS, ids=NAMES)
@pytest.mark.parametrize("given", [("a",), ("a", "b", "--max_steps", "3")], ids=["one", "two and an option"])
def test_an_experiment_without_its_arguments(script, given, dialogues, tmp_path):
    command = ["srun", "-n3", "bash", script, *given]
    done = run_command(command, cwd=tmp_path, env=srun_environment(dialogues, tmp_path))
    assert done.returncode == 2
    assert re.fullmatch(rf"usage: .*{script.name} PRETRAINED CONFIG_JSON TOKENIZER .*\n", done.stderr)


def test_a_rank_without_its_arguments_ends_in_silence():
    """torchrun ends it with all that it has started: what it waits with may be gone first."""
    command = ["bash", EXPERIMENTS[0]]
    environment = {**os.environ, "RANK": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, start_new_session=True) as rank:
        time.sleep(0.5)
        os.killpg(rank.pid, signal.SIGTERM)
        assert rank.communicate(timeout=PATIENCE)[1] == b""
    assert rank.returncode == 2


@pytest.mark.parametrize("script", sorted((ROOT / "exps").rglob("*.sh")), ids=lambda path: path.stem)
def test_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck") is not None:
        assert subprocess.run(["shellcheck", "-x", "-P", "SCRIPTDIR", script]).returncode == 0


@pytest.mark.parametrize(
    ("wrong", "code", "says"),
    [
        (("--lr", "nan"), 1, "ERROR: --lr is nan: give a finite number"),
        (("--xyzzy",), 2, "main_finetune.py: error: unknown option --xyzzy; see main_finetune.py --help"),
        (("--data_config", "/absent.yaml"), 1, "ERROR: no data yaml /absent.yaml: check the path"),
    ],
)
def test_wrong_arguments_are_said_once_under_srun(wrong, code, says, setting, tmp_path):
    """By rank 0, though it is the last to come, and srun ends it with the first that leaves."""
    late = ("bash", "-c", '[ $SLURM_PROCID = 1 ] || sleep 1; exec "$@"', "late")
    command = ("srun", "-n2", *late, PYTHON, "main_finetune.py", *arguments(setting, tmp_path / "out"), *wrong)
    done = run_command(command, cwd=PACKAGE, env=srun_environment(setting, tmp_path))
    (line,) = errors_of(done)
    assert line == says
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_ranks_with_different_arguments(setting, tmp_path):
    """The rank whose arguments are right would wait for the other."""
    given = ("$0 main_finetune.py", *arguments(setting, tmp_path / "out"), "--seed", "-$SLURM_PROCID")
    done = run_command(
        ("srun", "-n2", "bash", "-c", " ".join(given), PYTHON), cwd=PACKAGE, env=srun_environment(setting, tmp_path)
    )
    assert errors_of(done) == ["ERROR: rank 1: --seed is -1: give 0 or more"]


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2', which should be a number from 0 to 1"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_PORT": "99999"}, "MASTER_PORT='99999'"),
    ],
)
def test_wrong_variables_of_a_launcher(variables, says, setting, tmp_path):
    command = (PYTHON, "main_finetune.py", *arguments(setting, tmp_path / "out"))
    done = run_command(command, cwd=PACKAGE, env={**setting.environment, **variables})
    (line,) = errors_of(done)
    assert says in line
    assert "unset RANK and SLURM_PROCID to run alone" in line


def test_a_taken_port_is_said_once(setting, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = ("srun", "-n2", PYTHON, "main_finetune.py", *arguments(setting, tmp_path / "out"))
        done = run_command(command, cwd=PACKAGE, env=srun_environment(setting, tmp_path, MASTER_PORT=port))
    (line,) = errors_of(done)
    assert f"at localhost:{port} (another program has taken the port)" in line
    assert "set MASTER_ADDR and MASTER_PORT" in line


# -- two hosts


@pytest.fixture
def hosts() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize("launcher", ["srun", pytest.param("torchrun", marks=pytest.mark.soak)])
def test_two_hosts(launcher, setting, one_process, tmp_path):
    """Neither knows the other's name; gloo must find the network card that leads to it."""
    out = tmp_path / "out"
    given = ("main_finetune.py", *arguments(setting, out, batch_size=BATCH // 2))
    shared = {**setting.environment, "SLURM_NODELIST": ",".join(ADDRESSES), "SLURM_NTASKS_PER_NODE": "1"}
    if launcher == "srun":
        commands = [(PYTHON, *given)] * 2
        environments = [
            {**shared, "SLURM_PROCID": str(host), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"} for host in range(2)
        ]
    else:
        nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29511")
        commands = [(TORCHRUN, *nodes, "--node-rank", str(host), *given) for host in range(2)]
        environments = [shared] * 2
    done = run_on_two_hosts(commands, environments, cwd=PACKAGE)
    # The namespaces have no server of names.
    assert_quiet(done, but="[c10d] The hostname of the client socket cannot be retrieved")
    assert losses(out) == pytest.approx(losses(one_process), rel=1e-4)
    assert exported_loss(out / "epoch0-iter3") == pytest.approx(exported_loss(one_process / "epoch0-iter3"), rel=1e-4)


def test_the_tests_find_what_they_start() -> None:
    assert (PACKAGE / "exps").resolve() == ROOT / "exps"
    assert EXPECTED.keys() <= set(NAMES)
    assert os.access(TORCHRUN, os.X_OK)
