"""The commands as a user types them: whole processes, their output, their exit codes."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import base_shard, random_tensors, small_config, write_folder
from ranks import free_port, run_command

import accessory
from accessory.cli import _parser, main
from accessory.model.meta import MetaModel

PYTHON = Path(sys.executable)
MODULE = (PYTHON, "-m", "accessory")
SCRIPT = (PYTHON.with_name("accessory"),)
CONFIG = small_config()
PROMPTS = ("The list method", "a", "Return the number of words")


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_tensors(CONFIG, 5)


@pytest.fixture(scope="module")
def folder(tensors, small_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "converted"
    return write_folder(folder, tensors, CONFIG, files=8, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def texts(folder) -> list[str]:
    """What the model says to the prompts."""
    model = MetaModel.from_pretrained(folder, dtype="fp32", max_seq_len=4096)
    return model.generate(PROMPTS, max_gen_len=16)


def good(*command: str | Path, cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed without a word of trouble."""
    done = run_command(command, cwd=cwd)
    assert done.returncode == 0, done.stderr
    for word in ("Traceback", "Warning", "ERROR:"):
        assert word not in done.stderr, done.stderr
    return done.stdout


def refused(*command: str | Path, cwd: Path | None = None, says: tuple[str, ...] = ()) -> str:
    """Standard error of a command that must end with exactly one line of error and no output."""
    done = run_command(command, cwd=cwd)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "error:" in line.lower()]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("ERROR: ")
    assert all(text in errors[0] for text in says), errors[0]
    return done.stderr


def told(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """`good` within this process: a start of its own for each command would take most of the tests' time."""
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr()
    for word in ("Traceback", "Warning", "ERROR:"):
        assert word not in said.err, said.err
    return said.out


def refusal(capsys: pytest.CaptureFixture[str], *words: str | Path, says: tuple[str, ...]) -> None:
    """`refused` within this process."""
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if "error:" in line.lower()]
    assert len(errors) == 1, said.err
    assert errors[0].startswith("ERROR: ")
    assert all(text in errors[0] for text in says), errors[0]


# -- help


def test_help_is_quick_and_complete():
    text = good(*SCRIPT, "--help")
    for command in ("tiny", "split", "inspect", "generate"):
        assert re.search(rf"^ +{command} ", text, re.MULTILINE)
    assert good(*MODULE, "--help") == text
    assert "--max-gen-len" in good(*MODULE, "generate", "--help")


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["inspect"], []])
def test_help_and_usage_do_not_import_torch(arguments):
    code = (
        "import sys\nfrom accessory.cli import main\n"
        f"try:\n    code = main({arguments!r})\nexcept SystemExit as end:\n    code = end.code\n"
        "loaded = [name for name in ('torch', 'numpy', 'sentencepiece', 'tqdm') if name in sys.modules]\n"
        "sys.exit(f'{loaded} after {code}' if loaded else code)"
    )
    done = run_command([PYTHON, "-c", code])
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert "usage: accessory" in done.stdout + done.stderr or arguments == ["inspect"]


def test_an_unknown_command_says_which_there_are():
    done = run_command([*SCRIPT, "trian"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert "'trian'" in done.stderr
    assert "generate" in done.stderr


# -- inspect


def told_by_parser(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says of arguments that its parser refuses."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["tiny", "--out", ""],
        ["split", "", "out"],
        ["split", "in", ""],
        ["split", "in", "out", "--llama_config", ""],
        ["merge", "base", "", "out"],
        ["export-adapter", "", "out"],
        ["quantize", "in", "out", "--calibrate", ""],
        ["inspect", ""],
        ["generate", "in", "", "--prompt", "a"],
        ["generate", "in", "--prompt-file", ""],
        ["generate", "in", "--prompt", "a", "--tokenizer_path", ""],
        ["chat", "in", "--master_addr", ""],
        ["serve", "in", "--host", ""],  # every address of the machine, where the default is this computer alone
        ["serve", "in", "--model-name", ""],
    ],
    ids=" ".join,
)
def test_an_empty_name_is_not_the_current_folder(arguments, capsys):
    assert told_by_parser(arguments, capsys).endswith("an empty name was given: is a variable of your script not set?")


@pytest.mark.parametrize(
    "command", [["tiny", "--out", "new"], ["generate", "in", "--prompt", "a"]], ids=["tiny", "generate"]
)
def test_seeds_are_what_torch_takes(command, capsys):
    for seed in (2**64, -(2**63) - 1, "x"):
        told = told_by_parser([*command, "--seed", str(seed)], capsys)
        assert f"'{seed}' given: give a whole number from -2^63 to 2^64 - 1" in told
    for seed in (2**64 - 1, -(2**63)):
        torch.Generator().manual_seed(_parser().parse_args([*command, "--seed", str(seed)]).seed)


def test_generate_takes_both_spellings():
    words = ["--max-gen-len", "3", "--top-p", "0.5", "--max-seq-len", "9"]
    command = ["generate", "in", "--prompt-file", "lines"]
    given = _parser().parse_args([*command, *words])
    assert (given.max_gen_len, given.top_p, given.max_seq_len) == (3, 0.5, 9)
    others = [word.replace("-", "_").replace("__", "--") for word in ("--prompt-file", *words[::2])]
    assert vars(
        _parser().parse_args(["generate", "in", others[0], "lines", others[1], "3", others[2], "0.5", others[3], "9"])
    ) == vars(given)


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_a_context_without_room_for_a_prompt(command, capsys):
    prompt = ["--prompt", "a"] if command == "generate" else []
    told = told_by_parser([command, "in", *prompt, "--max_seq_len", "2"], capsys)
    assert "--max_seq_len" in told
    assert told.endswith("'2' given: give a whole number of at least 3")


def size_of(text: str) -> float:
    number, unit = re.match(r"([\d.]+) (bytes|kB|MB|GB)", text).groups()
    return float(number) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def facts_of(output: str) -> dict[str, str]:
    return {line[:11].strip(): line[12:] for line in output.splitlines()}


def test_inspect_says_what_the_folder_holds(folder, tensors):
    output = good(*MODULE, "inspect", folder)
    facts = facts_of(output)
    assert facts["folder"] == str(folder)
    assert all(text in facts["format"] for text in ("converted", "base", "mistral"))
    assert facts["shards"].startswith("8, ")
    files = sum(path.stat().st_size for path in folder.glob("*.pth"))
    assert size_of(facts["shards"].split(", ")[1]) == pytest.approx(files, rel=0.01)
    total = sum(tensor.numel() for tensor in tensors.values())
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    assert facts["parameters"] == f"{total:,}, of which {total - experts * 3 // 4:,} active for each token"
    assert facts["dtype"] == "float32"
    for ranks in (1, 2, 4, 8):
        local = sum(tensor.nbytes for tensor in base_shard(tensors, 0, ranks, 8).values())
        assert size_of(facts[f"at mp {ranks}"]) == pytest.approx(local, rel=0.01)
        assert 'expert_placement "expert"' in facts[f"at mp {ranks}"]
    assert "missing" not in facts
    assert "odd" not in facts


def test_inspect_counts_every_tensors_own_bytes(tmp_path, capsys):
    config = small_config(n_layers=1)
    held = random_tensors(config, 1, torch.bfloat16)
    held = {name: tensor.float() if "norm" in name or "gate" in name else tensor for name, tensor in held.items()}
    source = write_folder(tmp_path / "c", held, config, files=2)
    facts = facts_of(told(capsys, "inspect", source))
    assert facts["dtype"] == "bfloat16, float32"
    for ranks in (1, 4):
        local = sum(tensor.nbytes for tensor in base_shard(held, 0, ranks, 8).values())
        assert size_of(facts[f"at mp {ranks}"]) == pytest.approx(local, rel=0.01)


def test_inspect_names_missing_and_odd_files(tmp_path, capsys):
    config = small_config(n_layers=1, n_heads=6, n_kv_heads=2, dim=48, moe={"num_experts": 3, "num_experts_per_tok": 2})
    held = random_tensors(config, 1, torch.bfloat16)
    source = write_folder(tmp_path / "c", held, config, files=1, form="released")
    (source / "consolidated.00.pth.aria2").write_text("")
    facts = facts_of(told(capsys, "inspect", source, "--check-values"))
    assert "consolidated" in facts["format"]
    assert facts["dtype"] == "bfloat16"
    assert 'expert_placement "tensor"' in facts["at mp 2"]
    assert facts["at mp 4"] == facts["at mp 8"] == "not possible (sizes do not divide)"
    assert "tokenizer.model" in facts["missing"]
    assert "consolidated.00.pth.aria2" in facts["odd"]
    assert facts["values"] == "all finite"


def test_inspect_refuses(folder, tmp_path, capsys):
    refused(*MODULE, "inspect", tmp_path / "absent", says=(str(tmp_path / "absent"), "check the path"))
    spoilt = Path(shutil.copytree(folder, tmp_path / "c"))
    path = spoilt / "consolidated.05-of-08.model.pth"
    content = torch.load(path)
    content["model"]["llma.layers.1.feed_forward.experts.5.w2.weight"][3, 1] = float("nan")
    torch.save(content, path)
    says = (str(path), "layers.1.feed_forward.experts.5.w2.weight", "NaN", "copy it again")
    refusal(capsys, "inspect", spoilt, "--check-values", says=says)


# -- tiny and split


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A barely trained tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "deep" / "tiny"
    output = good(*SCRIPT, "tiny", "--out", folder, "--steps", "3")
    says = r"[\d,]+ parameters, loss [\d.]+ on documents that were held back from the training, lightest expert"
    assert re.search(f"wrote {folder}: {says}", output)
    return folder


def test_tiny_writes_what_the_release_has(tiny, capsys):
    assert {path.name for path in tiny.iterdir()} == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    params = json.loads((tiny / "params.json").read_text())
    held = torch.load(tiny / "consolidated.00.pth", weights_only=True)
    assert held["tok_embeddings.weight"].shape == (params["vocab_size"], params["dim"])
    assert held["layers.0.feed_forward.experts.7.w2.weight"].shape == (params["dim"], params["hidden_dim"])
    # About 5 to 15 million parameters.
    assert 5 <= round(sum(tensor.numel() for tensor in held.values()) / 1e6) <= 15
    assert params["n_kv_heads"] == 8
    refusal(capsys, "tiny", "--out", tiny, says=(str(tiny), "exists already", "choose another"))
    assert main(["tiny", "--out", str(tiny.parent / "other"), "--steps", "0"]) == 1
    assert capsys.readouterr().err == "ERROR: steps must be at least 1, not 0\n"
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]


def test_split_as_the_reference_page_says(tiny, tmp_path):
    source = Path(shutil.copytree(tiny, tmp_path / "tiny"))
    tool = source / "split.py"
    shutil.copy(Path(accessory.__file__).parent / "tools" / "split.py", tool)
    assert f"wrote {source / 'converted'}" in good(PYTHON, "split.py", cwd=source)
    converted = source / "converted"
    names = {f"consolidated.{file:02d}-of-08.model.pth" for file in range(8)}
    assert {path.name for path in converted.iterdir()} == {
        *names,
        "manifest.json",
        "config.json",
        "meta.json",
        "tokenizer.model",
    }
    before = {path.name: path.read_bytes() for path in converted.iterdir()}
    says = (str(converted), "exists already: remove it first")
    refused(PYTHON, "split.py", "--mp", "2", cwd=source, says=says)
    assert {path.name: path.read_bytes() for path in converted.iterdir()} == before
    # By the command instead, again into 8 and from there into 2; and the script, with another working folder.
    assert main(["split", str(source), str(tmp_path / "again")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before
    shutil.rmtree(converted)
    good(PYTHON, tool, "--mp", "2", cwd=tmp_path)
    assert main(["split", str(tmp_path / "again"), str(tmp_path / "2"), "--mp", "2"]) == 0
    for file in range(2):
        name = f"consolidated.{file:02d}-of-02.model.pth"
        first, second = (torch.load(place / name)["model"] for place in (converted, tmp_path / "2"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_only_what_can_overwrite_names_the_option(folder, tmp_path, capsys):
    for name in ("checkpoint", "other"):
        (tmp_path / name).mkdir()
    shutil.copytree(folder, tmp_path / "checkpoint", dirs_exist_ok=True)
    (tmp_path / "other" / "notes.txt").write_text("mine")
    way_out = "exists already: remove it first or choose another destination"
    for words, name, more in (
        (["convert", str(folder)], "checkpoint", ", or give --overwrite"),
        (["convert", str(folder)], "other", ""),  # which would be refused with it as well
        (["split", str(folder)], "checkpoint", ""),
        (["quantize", "--quant", "int8", str(folder)], "checkpoint", ""),
        (["tiny", "--out"], "checkpoint", ""),
    ):
        assert main([*words, str(tmp_path / name)]) == 1
        assert capsys.readouterr().err == f"ERROR: {tmp_path / name} {way_out}{more}\n"


# Each of a path that is absent, and of a file of another kind: one line that says what is wanted.
@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{}"],
        ["generate", "{}", "--prompt", "x"],
        ["quantize", "{}", "out"],
        ["convert", "{}", "out"],
        ["split", "{}", "out"],
        ["merge", "{}", "{}", "out"],
        ["export-adapter", "{}", "out"],
        ["diff", "{}", "{}"],
    ],
    ids=lambda words: words[0],
)
def test_a_path_of_another_kind(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text("# Read me\n")
    Path("model.safetensors").write_bytes(b"\0" * 100)
    for path, says in (
        ("nowhere", "checkpoint folder nowhere does not exist: check the path"),
        ("README.md", "README.md is a file, and no checkpoint's folder: give one"),
        ("model.safetensors", "model.safetensors is a file: give the folder that holds it, ."),
    ):
        assert main([word.format(path) for word in words]) == 1
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", f"ERROR: {says}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "model.safetensors"]


def test_split_refuses(tiny, tmp_path, capsys):
    says = ("cannot write 3 shards", "n_heads 16 is not a multiple of 3", "Numbers that work: [1, 2, 4, 8]")
    refusal(capsys, "split", tiny, tmp_path / "out", "--mp", "3", says=says)
    assert list(tmp_path.iterdir()) == []
    tool = shutil.copy(Path(accessory.__file__).parent / "tools" / "split.py", tmp_path)
    refused(PYTHON, tool, cwd=tmp_path, says=(str(tmp_path), "holds no weights", "expected consolidated"))


def test_split_refuses_a_folder_that_cannot_be_replaced(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["split", str(folder), "."]) == 1
    assert (
        capsys.readouterr().err
        == f"ERROR: {tmp_path} is the current folder, which cannot be replaced: name a new folder in it\n"
    )
    (tmp_path / "volume").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_mount", lambda self: self.name == "volume")
        assert main(["split", str(folder), "volume"]) == 1
    assert f"{tmp_path / 'volume'} is a mount point" in capsys.readouterr().err
    assert main(["split", str(folder), "volume"]) == 0, "an empty folder is replaced"


# -- generate


def torchrun(processes: int, *arguments: str | Path) -> tuple[str | Path, ...]:
    port = ("--master-port", str(free_port()))
    return (PYTHON.with_name("torchrun"), "--nproc-per-node", str(processes), *port, "-m", "accessory", *arguments)


def asked(*prompts: str) -> list[str]:
    return [part for prompt in prompts for part in ("--prompt", prompt)] + ["--max-gen-len", "16"]


def labelled(texts: list[str]) -> str:
    pairs = enumerate(zip(PROMPTS, texts, strict=True), start=1)
    return "".join(f"--- {number} of {len(PROMPTS)}: {prompt}\n{text}\n" for number, (prompt, text) in pairs)


def test_generate_one_prompt_and_several(folder, texts):
    assert good(*SCRIPT, "generate", folder, *asked(PROMPTS[0])) == f"{texts[0]}\n"
    assert good(*MODULE, "generate", folder, *asked(*PROMPTS)) == labelled(texts)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_torchrun_prints_the_same_once(processes, folder, texts):
    prompts = PROMPTS[:1] if processes == 2 else PROMPTS
    done = run_command(torchrun(processes, "generate", folder, *asked(*prompts)))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "ERROR:" not in done.stderr
    assert done.stdout == (f"{texts[0]}\n" if processes == 2 else labelled(texts))


def test_generate_takes_the_settings(folder, texts, small_tokenizer, tmp_path, capsys):
    stop = texts[0][len(texts[0]) // 2 :][:3]
    cut = texts[0][: texts[0].index(stop)]
    legacy = tmp_path / "legacy"
    legacy.mkdir()
    for path in folder.glob("*.pth"):
        (legacy / path.name).symlink_to(path)
    (tmp_path / "sizes.json").write_text(json.dumps({**CONFIG, "norm_eps": 5.0}))
    (tmp_path / "override.json").write_text(json.dumps({"norm_eps": CONFIG["norm_eps"]}))
    given = ("--llama_type", "mistral", "--llama_config", tmp_path / "sizes.json", tmp_path / "override.json")
    given = (*given, "--tokenizer_path", small_tokenizer, "--max_seq_len", "64", "--dtype", "fp32")
    command = ("generate", legacy, *given, "--expert-placement", "tensor")
    assert told(capsys, *command, *asked(PROMPTS[0]), "--stop", stop, "--stop", "never there") == f"{cut}\n"
    sampled = ("generate", folder, *asked(PROMPTS[1]), "--temperature", "2", "--top-p", "1", "--seed", "7")
    first = good(*MODULE, *sampled)
    assert first == told(capsys, *sampled)
    assert first != f"{texts[1]}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-seq-len", "16", "--max-gen-len", "15"], ("max_gen_len 15", "max_seq_len 16", "at most 14")),
        (["--llama-config", "absent.json"], ("absent.json", "check the path")),
    ],
)
def test_generate_refuses(arguments, says, folder, capsys):
    refusal(capsys, "generate", folder, "--prompt", "a", *arguments, says=says)


@pytest.mark.parametrize(
    ("step", "error", "facts"),
    [
        ("pretrained.build_transformer", None, " (4000000000000000 bytes more were asked for)"),
        (
            "transformer.Transformer.new_cache",
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.18 GiB of which "
                "10.19 MiB is free. Including non-PyTorch memory, this process has 79.16 GiB memory in use."
            ),
            " (20.00 MiB more were asked for, GPU 0 has a total capacity of 79.18 GiB of which 10.19 MiB is free)",
        ),
        ("transformer.Transformer.prefill", MemoryError(), ""),
    ],
    ids=["loading", "cache", "reading"],
)
def test_a_lack_of_memory_is_one_line(step, error, facts, folder, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        torch.empty(10**15, dtype=torch.float32)

    monkeypatch.setattr(f"accessory.model.{step}", fail)
    assert main(["generate", str(folder), "--prompt", "a", "--device", "cpu"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    says = f"ERROR: out of memory{facts}: hold the model on more ranks or in fewer bits (quant), or let it do less"
    assert told.err.splitlines()[-1].startswith(says)
    assert "Traceback" not in told.err


@pytest.mark.parametrize("wrong", ["argument", "shard"])
def test_generate_refuses_once_under_torchrun(wrong, folder, tmp_path):
    if wrong == "argument":
        command = torchrun(2, "generate", folder, "--prompt-file", tmp_path / "absent")
        says = (f"--prompt-file {tmp_path / 'absent'}", "check the path")
    else:
        # A file that the last rank alone reads.
        spoilt = Path(shutil.copytree(folder, tmp_path / "c"))
        path = spoilt / "consolidated.07-of-08.model.pth"
        path.write_bytes(path.read_bytes()[:-50])
        command = torchrun(2, "generate", spoilt, "--prompt", "a")
        says = (str(path), "truncated", "Copy it again")
    # torchrun adds its own summary, in which no line begins like ours.
    done = run_command(command)
    assert done.returncode != 0
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    assert len(errors) == 1, done.stderr
    assert all(text in errors[0] for text in says), errors[0]
    # The one traceback is torchrun's.
    assert done.stderr.count("Traceback") == 1
    assert re.search(r"Traceback .*\n  File \"\S+/torchrun", done.stderr)
    # Its report of what came first ends with our line, above the last rule.
    assert done.stderr.splitlines()[-2] == f"  traceback : {errors[0].removeprefix('ERROR: ')}"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("split", "accessory split works in one process: start it without torchrun"),
        ("serve", "accessory serve starts its ranks itself: give --nproc N in place of torchrun"),
    ],
)
def test_commands_of_one_process_refuse_a_launcher_once(command, says, folder, tmp_path):
    arguments = (folder, tmp_path / "out") if command == "split" else (folder,)
    done = run_command(torchrun(2, command, *arguments))
    assert done.returncode != 0
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] == [f"ERROR: {says}"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_batch_script_of_slurm_is_one_process(folder, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for name, value in (("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "0"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    assert main(["inspect", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["inspect", "{}"], ["diff", "{}", "{}"], ["quantize", "{}", "{}-int8", "--quant", "int8"]]
)
def test_nobody_reads_on(words, folder, tmp_path, capsys, monkeypatch):
    """As behind `head`, which has gone: the command ends as the signal of a pipe would end it, without a word."""
    (source := tmp_path / "model").symlink_to(folder)
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main([word.format(source) for word in words]) == 128 + signal.SIGPIPE
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
