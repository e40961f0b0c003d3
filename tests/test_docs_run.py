"""Every page of the docs runs from top to bottom, as a reader types it, behind those that it goes on from."""

import functools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MadeOnce
from documented import ROOT, Reader, all_blocks, blocks, clone, pages
from ranks import free_port

from accessory.tools.tiny import TinyReport

# What a page shows and nobody can run here, by its reason; a page that gets one more has to say so here.
NOT_RUN = Counter(
    {
        "README.md: installs": 1,
        "docs/checkpoints.md: downloads gigabytes": 1,
        "docs/serving.md: downloads a task": 1,
        "docs/serving.md: measures for minutes": 1,
        "docs/finetune.md: downloads gigabytes": 1,
        "docs/finetune.md: needs GPUs and the weights of Mixtral-8x7B": 2,
        "docs/peft.md: needs GPUs and the weights of Mixtral-8x7B": 2,
        "docs/peft.md: needs the weights of Mixtral-8x7B": 1,
        "docs/quantization.md: measures for minutes": 2,
        "docs/benchmarks.md: measures for minutes": 10,
        "docs/benchmarks.md: needs a GPU": 1,
        "docs/scaling.md: computes for seconds, of a model that is not there": 1,
    }
)

# What makes the walk short: a tiny model that is there already, little of each training, one rank in place of two, and
# no second time of what has been run with other ranks. Each is used somewhere; `make soak` runs all as it stands.
SHORTER = (
    (r"(?m)^make demo$", "true"),
    (r"(?m)^torchrun .* -m accessory generate .*$", "true"),
    (r"(?m)^accessory generate .* (--nproc 2|--raw) .*$", "true"),
    (r"(?m)^accessory serve .* --(chat-template|cors) .*$", "true"),
    (r"(?m)^torchrun .*--signals-to-handle (.*\\\n)*.*$", "true"),
    (r"(?m)^timeout --signal INT (.*\\\n)*.*$", "true"),
    # The same as of other folders, which tests of their own read.
    (r"(?m)^accessory (generate|inspect) runs/(stopped|small|tiny-hf|tiny-gguf|tiny-in-2)\S*( --.*)?$", "true"),
    (r"(?m)^accessory tiny .*$", "mkdir runs/small && cp runs/tiny/*.* runs/small/"),
    (r" --nproc 2 ", " "),
    (r"--nproc-per-node([ =])2", r"--nproc-per-node\g<1>1"),
    (r"--n_gpus 2", "--n_gpus 1"),
    (r"--epochs \d+", "--epochs 1"),
    (r"--save_interval \d+", "--save_interval 1"),
    (r"/epoch\d+", "/epoch0"),
    (r"python -m accessory.tools.docstring_dialogues (\S+) .*", r"cp -r runs/dialogues \1"),
    (r"(?m)^make finetune-demo$", "python -m accessory.tools.docstring_dialogues runs/dialogues --limit 24"),
    (r"runs/finetuned/", "runs/answers/"),
    (r"cat docs/\*\.md", "head -c 8000 docs/finetune.md"),
    (r"--max-gen-len \d+", "--max-gen-len 8"),
    (r"max_gen_len=\d+", "max_gen_len=8"),
    (r"\"temperature\": 0", '"temperature": 0, "max_tokens": 8'),  # after so little training no answer ends by itself
)
VARIABLES = ("LORA_EPOCHS=1", "DIALOGUES=24")

# What pages go on with in runs/, by the pages that make it; all go on with what README.md's do.
AFTER = {
    "README.md": (),
    "docs/inference.md": ("docs/quickstart.md",),
    "docs/demos.md": ("docs/quickstart.md",),
    "docs/peft.md": ("docs/quickstart.md", "docs/checkpoints.md"),
    "docs/quantization.md": ("docs/quickstart.md",),
    "docs/reliability.md": ("docs/finetune.md",),
}
RUN = list(dict.fromkeys(block.page for block in all_blocks() if block.not_run is None))


def ports() -> list[tuple[str, str]]:
    """Ports that are free in place of those that pages name, since other tests run at the same time."""
    api, page, meeting, master = (str(free_port()) for _ in range(4))
    return [
        (r" --port 8000", ""),
        (r"accessory serve ", f"accessory serve --port {api} "),
        (r"127\.0\.0\.1:8000", f"127.0.0.1:{api}"),
        (r"(demos/\w+\.py) ", rf"\1 --server_port {page} "),
        (r"127\.0\.0\.1:23560", f"127.0.0.1:{meeting}"),
        (r"--master-port=\d+", f"--master-port={master}"),
    ]


def walk(reader: Reader, page: str, seconds: float) -> None:
    """The blocks of a page; a server stays until the page ends, or another one begins."""
    for block in all_blocks():
        if block.page == page and block.not_run is None:
            reader.type(block, seconds)
    reader.stop_server()


@pytest.fixture
def walked(tiny: tuple[Path, TinyReport], made_once: MadeOnce) -> Callable[[str], Path]:
    """``walked(page)``: a clone in which those before a page and the page itself were run, by the shorter way."""

    def walk_to(page: str, folder: Path) -> Path:
        place, before = folder / "clone", AFTER.get(page, ("README.md",))
        shutil.rmtree(place, ignore_errors=True)  # of a walk that failed
        clone(place)
        for other in before:
            shutil.copytree(get(other), place, ignore=shutil.ignore_patterns(".venv"), dirs_exist_ok=True)
        if not before:
            shutil.copytree(tiny[0], place / "runs" / "tiny")
        with Reader(place, folder, substitutions=[*SHORTER, *ports()], variables=VARIABLES) as reader:
            walk(reader, page, 300)
        return place

    def get(page: str) -> Path:
        return made_once(page.replace("/", "-"), functools.partial(walk_to, page))

    return get


def test_every_page_with_commands_stands_in_readme_s_list() -> None:
    written = {
        f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if list(blocks(path.name, path.read_text()))
    }
    assert written <= set(pages())


def test_what_is_not_run_is_a_short_list() -> None:
    assert Counter(f"{block.page}: {block.not_run}" for block in all_blocks() if block.not_run) == NOT_RUN


def test_a_block_knows_its_page_line_mark_and_what_is_typed() -> None:
    text = "# A\n\n```bash\na\n```\n\n<!-- not run: needs 8 GPUs -->\n```python\nb\n```\n\n```text\n> c\nd\n```\n"
    first, second = blocks("a.md", text)
    assert (first.place, first.language, first.code, first.not_run, first.typed) == ("a.md:3", "bash", "a\n", None, ())
    assert (second.place, second.not_run, second.typed) == ("a.md:8", "needs 8 GPUs", ("c",))


@pytest.mark.parametrize(
    ("language", "code", "says"),
    [
        ("bash", "true\nfalse\ntrue\n", "exit code 1"),
        ("bash", "cat | false | cat\n", "exit code 1"),
        ("bash", "mkdir deeper && cd deeper\n", "leaves its reader in"),
        ("python", "model = MetaModel()\n", "name 'MetaModel' is not defined"),
        ("bash", "echo curl '{\"error\": 1}'\n", '"error"'),
    ],
)
def test_what_would_stop_a_reader_is_found_and_named(language: str, code: str, says: str, tmp_path: Path) -> None:
    (folder := tmp_path / "clone").mkdir()
    (block,) = blocks("docs/a.md", f"\n```{language}\n{code}```\n")
    with Reader(folder, tmp_path) as reader, pytest.raises(AssertionError, match=re.escape(says)) as caught:
        reader.type(block, 60)
    assert str(caught.value).startswith("docs/a.md:2 fails:")


def test_what_shortens_a_walk_is_used() -> None:
    code = "".join(block.code for block in all_blocks() if block.not_run is None)
    unused = [pattern for pattern, _ in [*SHORTER, *ports()] if not re.search(pattern, code)]
    assert not unused, "no page has these any more"


@pytest.mark.timeout(900)  # with the pages before it
@pytest.mark.parametrize("page", RUN)
def test_a_page_runs_with_little_of_each_training(page: str, walked: Callable[[str], Path]) -> None:
    walked(page)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_pages_run_as_they_stand(tmp_path: Path) -> None:
    clone(folder := tmp_path / "clone")
    with Reader(folder, tmp_path, threads=2) as reader:
        for page in pages():
            walk(reader, page, 900)
        # The quickstart's model says what it was taught, though its records resemble one another.
        records = [json.loads(line) for line in (folder / "capitals.jsonl").read_text().splitlines()]
        (folder / "asked.txt").write_text("".join(f"{record['instruction']}\n" for record in records))
        told = reader.run("accessory generate runs/capitals/epoch59 --prompt-file asked.txt --json 2>/dev/null", 300)
    answers = [json.loads(line)["completion"] for line in told.splitlines()]
    wrong = [(record, said) for record, said in zip(records, answers, strict=True) if said != record["output"]]
    assert len(wrong) <= 1, wrong
