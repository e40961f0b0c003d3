"""hf:// paths, against a stand-in of the Hub on this machine that serves what huggingface_hub asks for."""

import errno
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from checkpoints import random_tensors, small_config, write_folder
from finetuning import Setting, finetune_on_rank, make_setting
from huggingface_hub import _tree_cache, constants
from patience import PATIENCE
from ranks import RankPool, alike, error_of, run_command
from safetensors.torch import save_file

from accessory.checkpoint import hub
from accessory.checkpoint.convert import convert
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.hub import Place, local_path
from accessory.cli import main
from accessory.errors import CheckpointError
from accessory.model.meta import MetaModel
from accessory.serve.driver import Driver
from accessory.serve.ranks import name_of
from accessory.serve.request import RankLost

MAIN, TAGGED = "a" * 40, "b" * 40
TOKEN = "hf_of_the_tests"
SIZES = small_config(dim=32, hidden_dim=16, n_heads=4, n_kv_heads=4, moe={"num_experts_per_tok": 2, "num_experts": 4})
PROMPT = [1, 5, 9, 200, 30]


class HubStandIn:
    """The Hub's endpoints for models.

    Attributes:
        repos: the files of each commit, by repository.
        refs: commits by the names of branches and tags.
        asked: how often each file's content was asked for, by its path.
        bytes: how many of it were sent.
        ranges: of requests for a part of a file, by its path.
        gated, private: repositories for which a token is wanted.
        cut: bytes after which the next answer with a file breaks off, by the file's path.
        breaks: files of which no byte arrives.
        pause: seconds before each 64 kB of a file.
        heads: how often it was asked about each file.
        together: of how many that ask about a file none gets it before all have asked.
        broken: whether it answers nothing but errors.
        sizes: what the list says of a file where it is not true.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Mapping[str, bytes]]] = {}
        self.refs = {"main": MAIN, "v1": TAGGED}
        self.asked: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.ranges: dict[str, str] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.cut: dict[str, int] = {}
        self.breaks: set[str] = set()
        self.pause = 0.0
        self.heads: Counter[str] = Counter()
        self.together = 1
        self._news = threading.Condition()
        self.broken = False
        self.sizes: dict[str, int] = {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                stand_in.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        huggingface_hub.close_session()  # a connection that is open would still be served
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, repo: str, folder: Path, commit: str = MAIN, **more: bytes) -> None:
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repos.setdefault(repo, {})[commit] = {**files, **more}

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if self.broken or match is None:
            return _refuse(request, 500 if self.broken else 404, "")
        repo = match[1]
        trusted = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo in self.private and not trusted:
            return _refuse(request, 401, "")
        if repo not in self.repos:
            return _refuse(request, 404, "RepoNotFound")
        if repo in self.gated and file and not trusted:
            return _refuse(request, 403, "GatedRepo")
        revision = (api[3] if api else match[2]) or "main"
        commit = self.refs.get(revision, revision)
        if commit not in self.repos[repo]:
            return _refuse(request, 404, "RevisionNotFound")
        files = self.repos[repo][commit]
        if file:
            return self._send(request, files, file[3], commit)
        return _json(request, self._tree(files) if match[2] == "tree" else {"id": repo, "sha": commit, "siblings": []})

    def _tree(self, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": self.sizes.get(name, len(data)), "oid": _tag(data)}
            for name, data in files.items()
        ]

    def _send(self, request: BaseHTTPRequestHandler, files: Mapping[str, bytes], name: str, commit: str) -> None:
        if name not in files:
            return _refuse(request, 404, "EntryNotFound")
        data, start = files[name], 0
        if found := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "")):
            start, self.ranges[name] = int(found[1]), found[0]
        request.send_response(206 if start else 200)
        request.send_header("ETag", f'"{_tag(data)}"')
        request.send_header("X-Repo-Commit", commit)
        request.send_header("Content-Length", str(len(data) - start))
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        with self._news:
            if request.command == "HEAD":
                self.heads[name] += 1
                self._news.notify_all()
                return None
            assert self._news.wait_for(lambda: self.heads[name] >= self.together, timeout=PATIENCE)
        self.asked[name] += 1
        end = start if name in self.breaks else self.cut.pop(name, len(data))
        for begin in range(start, end, 1 << 16):
            time.sleep(self.pause)
            part = data[begin : min(begin + (1 << 16), end)]
            self.bytes[name] += len(part)
            request.wfile.write(part)
        request.close_connection = end < len(data)
        return None


def _tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _json(request: BaseHTTPRequestHandler, content: Any) -> None:
    body = json.dumps(content).encode()
    request.send_response(200)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str) -> None:
    request.send_response(status)
    if code:
        request.send_header("X-Error-Code", code)
    request.send_header("Content-Length", "0")
    request.end_headers()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """A Hub without repositories, to which this process is sent, with an empty cache."""
    served = HubStandIn()
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    changes = {"ENDPOINT": served.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
    for name, value in {**changes, "HF_HUB_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub._downloaded.cache_clear()
    yield served
    hub._downloaded.cache_clear()
    served.close()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    """A tiny random model as a release."""
    folder = tmp_path_factory.mktemp("hub") / "released"
    return write_folder(folder, random_tensors(SIZES, 0), SIZES, files=1, form="released", tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def plain(released: Path) -> Path:
    """The same as Hugging Face's folder, in two files with an index, and what else a repository has."""
    convert(released, folder := released.parent / "hf", to="hf")
    tensors = {name: tensor.clone() for name, tensor in Folder(folder).tensors(0).items()}
    (folder / "model.safetensors").unlink()
    index = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "manifest.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0].content }}!")
    return folder


# What nobody needs of a repository that has Hugging Face's files.
UNWANTED = {
    "README.md": b"#",
    ".gitattributes": b"*",
    "picture.png": b"png",
    "onnx/model.onnx": b"onnx",
    "consolidated.00.pth": b"PK",
    "pytorch_model.bin": b"PK",
    "pytorch_model.bin.index.json": b"{}",
    "other/config.json": b"{}",
    "tf_model.h5": b"h5",
    "runs/events": b"1",
    "model_of_another.safetensors": b"{}",
}


def logits_of(path: Any, **settings: Any) -> torch.Tensor:
    model = MetaModel.from_pretrained(path, dtype="fp32", device="cpu", max_seq_len=64, **settings)
    (logits,) = model.compute_logits([PROMPT])
    return torch.as_tensor(logits)


def said(path: Any) -> tuple[type[Exception], str]:
    """The error of a path, which is one line."""
    with pytest.raises((OSError, ValueError)) as caught:
        Folder(path)
    text = str(caught.value)
    assert "\n" not in text
    return type(caught.value), text


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("hf://org/name", Place("org/name")),
        ("hf://org/name/", Place("org/name")),
        ("hf://org/name@v1", Place("org/name", revision="v1")),
        ("hf://org/name@refs/pr/3", Place("org/name", revision="refs/pr/3")),
        ("hf://org/na.me-2/sub/folder@v1", Place("org/na.me-2", "sub/folder", "v1")),
        (Path("hf://org/name/sub@v1"), Place("org/name", "sub", "v1")),
        ("hf://org/name/config.json", Place("org/name", file="config.json")),
        ("hf://org/name/sub/m.gguf@v1", Place("org/name", "sub", "v1", "m.gguf")),
        ("models/hf", None),
        (Path("/hf:/org/name"), None),
        ("hfx", None),
    ],
)
def test_a_path_names_repository_folder_and_revision(path: str | Path, place: Place | None) -> None:
    assert Place.of(path) == place
    if place is not None:
        assert Place.of(str(place)) == place


@pytest.mark.parametrize("text", ["", "org", "org/", "/org/name", "org/name@", "org@v1/name", "org/name/../up", "a//b"])
def test_a_malformed_path_is_refused_with_its_forms(text: str) -> None:
    with pytest.raises(CheckpointError, match="names no folder of a repository: give hf://org/name, ") as caught:
        local_path(f"hf://{text}")
    assert f"'hf://{text}'" in str(caught.value)


def test_a_path_of_this_machine_stays_and_the_library_is_not_imported() -> None:
    code = "from accessory.checkpoint.hub import local_path as f; import sys; print(f('a/b'), f('hf'))"
    done = run_command([sys.executable, "-c", f"{code}; print('huggingface_hub' in sys.modules)"])
    assert done.stdout.split() == ["a/b", "hf", "False"]


@pytest.mark.parametrize(("path", "name"), [("hf://org/name@v1", "name"), (["base", "hf://org/name/sub@v1"], "sub")])
def test_a_model_is_called_by_its_folder_without_the_revision(path: Any, name: str) -> None:
    assert name_of(path) == name


def test_what_is_read_of_a_repository_is_what_is_downloaded(stand_in: HubStandIn, plain: Path) -> None:
    stand_in.add("org/name", plain, MAIN, **{"config.json": b"not this one"})
    stand_in.add("org/name", plain, TAGGED, **UNWANTED)
    ours = logits_of("hf://org/name@v1")
    assert torch.equal(ours, logits_of(plain))
    files = {str(file.relative_to(plain)) for file in plain.rglob("*") if file.is_file()}
    assert stand_in.asked == dict.fromkeys(files, 1)
    assert {"model.safetensors.index.json", "additional_chat_templates/short.jinja", "tokenizer.model"} <= files
    assert Folder(plain).odd == ()
    # What is there is not asked for again.
    hub._downloaded.cache_clear()
    folder = local_path(Path("hf://org/name@v1"))
    assert (stand_in.asked.total(), folder.name) == (len(files), TAGGED)


def test_a_release_is_downloaded_where_there_is_nothing_else(stand_in: HubStandIn, released: Path) -> None:
    stand_in.add("org/name", released, **{"notes.txt": b"?", "sub/params.json": b"{}"})
    assert Folder("hf://org/name").form == "consolidated"
    assert set(stand_in.asked) == {"consolidated.00.pth", "params.json", "tokenizer.model"}


def test_a_folder_of_a_repository(stand_in: HubStandIn, released: Path, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "deep[1]").symlink_to(released, target_is_directory=True)
    files = {f"deep[1]/x/{file.name}": file.read_bytes() for file in released.iterdir()}
    stand_in.repos["org/name"] = {MAIN: {**files, "config.json": b"{}", "deep1/x/config.json": b"{}"}}
    assert torch.equal(logits_of("hf://org/name/deep[1]/x@main"), logits_of(released))
    assert set(stand_in.asked) == set(files)
    kind, text = said("hf://org/name/deeper")
    assert kind is CheckpointError
    assert "org/name has no folder deeper: it has" in text
    assert "deep1/x" in text


def test_an_adapter_above_a_base_and_a_tokenizer_alone(
    stand_in: HubStandIn, released: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stand_in.add("org/name", released)
    records = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "data.yaml").write_text(json.dumps({"META": [{"path": str(tmp_path / "data.json"), "type": "text"}]}))
    assert main(["show", str(tmp_path / "data.yaml"), "--model", "hf://org/name"]) == 0
    assert "learned" in capsys.readouterr().out
    assert set(stand_in.asked) == {"params.json", "tokenizer.model"}, "no weights"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/name"}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({key.format("A"): torch.ones(2, 32), key.format("B"): torch.ones(32, 2)}, tmp_path / "a.safetensors")
    adapter = (tmp_path / "a.safetensors").read_bytes()
    named = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": adapter}
    stand_in.repos["me/adapter"] = {MAIN: {**named, "README.md": b"#", "optimizer.pt": b"PK"}}
    with_adapter = logits_of(["hf://org/name", "hf://me/adapter"])
    assert not torch.equal(with_adapter, logits_of("hf://org/name"))
    assert set(stand_in.asked) == {"params.json", "tokenizer.model", "consolidated.00.pth", *named}


def test_commands_take_such_a_path(
    stand_in: HubStandIn, plain: Path, released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in.add("org/name", plain)
    assert main(["inspect", "hf://org/name", "--check-values"]) == 0
    assert "Hugging Face" in capsys.readouterr().out
    assert main(["convert", "hf://org/name", str(tmp_path / "made"), "--to", "mistral"]) == 0
    assert main(["diff", "hf://org/name", str(tmp_path / "made")]) == 0
    assert main(["quantize", "hf://org/name", str(tmp_path / "int8"), "--quant", "int8"]) == 0
    arguments = ["generate", "hf://org/name", "--prompt", "a", "--raw", "--max-gen-len", "2", "--device", "cpu"]
    assert main(arguments) == 0
    for name in ("params.json", "meta.json", "tokenizer.model"):
        (tmp_path / "made" / name).unlink(missing_ok=True)
    arguments[1] = str(tmp_path / "made")
    for config, tokenizer in (("/config.json", "/tokenizer.model@main"), ("", "")):
        said = ["--llama_config", f"hf://org/name{config}", "--tokenizer_path", f"hf://org/name{tokenizer}"]
        assert main([*arguments, *said]) == 0
    assert main(["inspect", "hf://org/name/config.json"]) == 0
    assert all(count == 1 for count in stand_in.asked.values())
    capsys.readouterr()
    assert main(["inspect", "hf://org/absent"]) == 1
    assert capsys.readouterr().err == (
        "ERROR: hf://org/absent does not exist: check the name; of a private one, log in with `hf auth login`, or set "
        "HF_TOKEN\n"
    )
    with pytest.raises(SystemExit):
        main(["convert", str(plain), "hf://me/mine"])
    assert "the Hub is only read" in capsys.readouterr().err


def test_ranks_that_are_brought_back_load_the_same_commit(
    stand_in: HubStandIn, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def load_ranks(driver: Driver) -> None:
        begun.append(driver)
        raise RankLost("none was started")

    monkeypatch.setattr(Driver, "_load_ranks", load_ranks)
    stand_in.add("org/name", released)
    with pytest.raises(RankLost, match="none was started"):
        Driver("hf://org/name@main", device="cpu", max_seq_len=64)
    (driver,) = begun
    assert driver.name == "name"
    assert [path.name for path in driver._setup.settings["pretrained_path"]] == [MAIN]


def test_a_download_that_breaks_off_goes_on_where_it_was(
    stand_in: HubStandIn, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)  # what it has of a chunk is lost
    stand_in.add("org/name", released)
    whole = (released / "consolidated.00.pth").read_bytes()
    stand_in.cut["consolidated.00.pth"] = half = 5 << 12
    folder = local_path("hf://org/name")
    assert (folder / "consolidated.00.pth").read_bytes() == whole
    assert stand_in.ranges == {"consolidated.00.pth": f"bytes={half}-"}
    assert stand_in.bytes["consolidated.00.pth"] == len(whole), "each byte once"


def test_what_is_whole_stays_where_a_download_broke_off(
    stand_in: HubStandIn, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr("huggingface_hub.file_download.time", at_once)
    stand_in.add("org/name", plain)
    stand_in.breaks.add("model-00002-of-00002.safetensors")
    kind, text = said("hf://org/name")
    assert kind is OSError
    assert re.match(r"the download of hf://org/name broke off \(.+\): start again, files that are whole stay$", text)
    stand_in.breaks.clear()
    before = stand_in.asked.copy()
    assert torch.equal(logits_of("hf://org/name"), logits_of(plain))
    assert before["model-00001-of-00002.safetensors"] == 1
    assert stand_in.asked - before == {"model-00002-of-00002.safetensors": 1}


def test_ctrl_c_ends_a_download_and_leaves_no_part_of_a_file(
    stand_in: HubStandIn, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 12)
    stand_in.add("org/name", released)
    stand_in.pause = 0.5
    cache = Path(constants.HF_HUB_CACHE)

    def interrupt() -> None:
        while not stand_in.bytes["consolidated.00.pth"] or not list(cache.rglob("params.json")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    (thread := threading.Thread(target=interrupt)).start()
    with pytest.raises(KeyboardInterrupt):
        local_path("hf://org/name")
    thread.join()
    assert stand_in.bytes["consolidated.00.pth"] < (released / "consolidated.00.pth").stat().st_size
    assert not list(cache.rglob("*.incomplete"))
    stand_in.pause = 0.0
    assert torch.equal(logits_of("hf://org/name"), logits_of(released))
    assert stand_in.asked["params.json"] == 1, "what was whole has stayed"


def test_what_is_not_there_or_not_for_everyone_is_one_line(
    stand_in: HubStandIn, released: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in.add("org/name", released)
    stand_in.add("org/gated", released)
    stand_in.add("org/private", released)
    stand_in.gated, stand_in.private = {"org/gated"}, {"org/private"}
    assert said("hf://org/absent") == (
        FileNotFoundError,
        "hf://org/absent does not exist: check the name; of a private one, log in with `hf auth login`, or set "
        "HF_TOKEN",
    )
    for revision in ("v9", "c" * 40):
        assert said(f"hf://org/name@{revision}") == (
            FileNotFoundError,
            f"hf://org/name@{revision}: org/name has no revision {revision}: give a branch, a tag or a whole commit",
        )
    assert said("hf://org/private") == (
        OSError,
        "hf://org/private is not there, or not for everyone (401): check the name, or log in with `hf auth login`, or "
        "set HF_TOKEN",
    )
    assert said("hf://org/gated") == (
        OSError,
        f"hf://org/gated is gated: ask for access at {stand_in.url}/org/gated, and log in with `hf auth login`, or set "
        "HF_TOKEN",
    )
    assert said("hf://or--g/name")[0] is CheckpointError
    assert not stand_in.asked
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert Folder("hf://org/private").files[0].name == Folder("hf://org/gated").files[0].name == "consolidated.00.pth"


def test_a_repository_without_weights_that_are_known(stand_in: HubStandIn, released: Path, plain: Path) -> None:
    files = dict.fromkeys(("model.onnx", "config.json", "README.md"), b"")
    stand_in.repos["org/none"] = {MAIN: files}
    shards = {"model-00001-of-00002.safetensors": b"{}", "config.json": b"{}"}
    stand_in.repos["org/half"] = {MAIN: shards}
    index = (plain / "model.safetensors.index.json").read_bytes()
    stand_in.repos["org/indexed"] = {MAIN: {**shards, "model.safetensors.index.json": index}}
    own = {f"consolidated.00-of-01.model.{ending}": b"" for ending in ("pth", "safetensors")}
    stand_in.repos["org/both"] = {MAIN: {**own, "consolidated.00.pth": b""}}
    stand_in.repos["org/empty"] = {MAIN: {}}
    for name, what in {
        "none": "holds no weights: expected consolidated.00-of-NN.model.pth",
        "half": "lacks model-00002-of-00002.safetensors (1 of 2 shards found)",
        "indexed": "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names",
        "both": "holds shards that end in .pth and in .safetensors",
        "empty": "org/empty has no folder with files: it has none",
    }.items():
        kind, text = said(f"hf://org/{name}")
        assert kind is CheckpointError
        assert text.startswith(f"hf://org/{name}")
        assert what in text
    assert set(stand_in.asked) == {"model.safetensors.index.json"}, "no weights before all is known to be there"


def test_of_gguf_files_one_model_is_downloaded(stand_in: HubStandIn) -> None:
    split = {f"m-Q8_0-0000{number}-of-00002.gguf": bytes(number) for number in (1, 2)}
    stand_in.repos["org/one"] = {MAIN: {"README.md": b"#", "m.imatrix": b"?", "Q8_0/x": b"", **split}}
    stand_in.repos["org/many"] = {MAIN: {"m-Q8_0.gguf": b"GGUF", "m-Q4_0.gguf": b"GGUF"}}
    assert sorted(file.name for file in local_path("hf://org/one").iterdir()) == sorted(stand_in.asked) == [*split]
    kind, text = said("hf://org/many")
    assert kind is CheckpointError
    assert text.startswith("hf://org/many holds several GGUF files (")
    assert text.endswith("; give one of them, hf://org/many/FILE.gguf")
    assert "m-Q8_0.gguf" not in stand_in.asked
    stand_in.repos["org/many"][MAIN] |= {**split, "config.json": b"{}", "tokenizer.model": b"?", "x.bin": b"?"}
    for repository, cached in list(stand_in.repos.items()):  # whose list of files the cache has
        stand_in.repos[repository.replace("many", "more")] = cached
    stand_in.asked.clear()
    found = local_path("hf://org/more/m-Q8_0-00002-of-00002.gguf")
    assert found.name == "m-Q8_0-00001-of-00002.gguf"
    wanted = {*split, "config.json", "tokenizer.model"}
    assert set(stand_in.asked) == {file.name for file in found.parent.iterdir()} == wanted
    kind, text = said("hf://org/more/m-Q5.gguf")
    assert (kind, text) == (CheckpointError, "hf://org/more/m-Q5.gguf: org/more has no such file: check its name")


def test_the_cache_serves_without_a_network(
    stand_in: HubStandIn, plain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in.add("org/name", plain)
    cache = constants.HF_HUB_CACHE

    def offline_says(path: str) -> str:
        hub._downloaded.cache_clear()
        return said(path)[1]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused = f"hf://org/name is not whole in {cache}, and HF_HUB_OFFLINE is set: unset it, or fill the cache where "
    assert offline_says("hf://org/name").startswith(refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    expected = logits_of("hf://org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub._downloaded.cache_clear()
    assert torch.equal(logits_of("hf://org/name"), expected)
    # As earlier versions of the library leave it: without a list of the files.
    hub._downloaded.cache_clear()
    (listed,) = Path(cache).glob("*/trees/*.json")
    text = listed.read_text()
    listed.unlink()
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()
    assert torch.equal(logits_of("hf://org/name"), expected)
    listed.write_text(text)
    assert not caplog.records
    # The server is gone, and nobody said that there is no network.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stand_in.close()
    hub._downloaded.cache_clear()
    assert torch.equal(logits_of("hf://org/name"), expected)
    # One file is missing.
    folder = local_path("hf://org/name")
    (folder / "tokenizer.model").unlink()
    unreachable = f"hf://org/name is not whole in {cache}, and {stand_in.url} cannot be reached (ConnectError"
    assert offline_says("hf://org/name").startswith(unreachable)
    assert offline_says("hf://org/other").startswith(unreachable.replace("name", "other"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert offline_says("hf://org/name").startswith(refused)


def test_a_hub_that_is_down_is_one_line(stand_in: HubStandIn, released: Path) -> None:
    stand_in.broken = True
    assert "cannot be downloaded: " in said("hf://org/name")[1]


def test_a_full_disk_is_one_line_and_foreseen(
    stand_in: HubStandIn, released: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", write)
    stand_in.add("org/name", released)
    stand_in.sizes["consolidated.00.pth"] = 10**18
    with caplog.at_level("WARNING", "accessory"):
        kind, text = said("hf://org/name")
    assert kind is OSError
    assert text == (
        f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}: hf://org/name finds no place here, free some or name "
        f"another one by HF_HOME=FOLDER: '{constants.HF_HUB_CACHE}'"
    )
    assert "hf://org/name: 1000000.00 TB are to be downloaded, and" in caplog.text


def test_a_cache_that_may_not_be_written_is_one_line(
    stand_in: HubStandIn, released: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in.add("org/name", released)
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    kind, text = said("hf://org/name")
    assert kind is OSError or issubclass(kind, OSError)
    assert "hf://org/name finds no place here, free some or name another one by HF_HOME=FOLDER" in text


def test_how_far_a_download_is_stands_in_the_log(
    stand_in: HubStandIn, released: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("accessory.progress.INTERVAL", 0.0)
    monkeypatch.setattr(hub, "_MEGABYTE", 1000)
    stand_in.add("org/name", released)
    with caplog.at_level("INFO", "accessory"):
        local_path("hf://org/name")
    size = sum(file.stat().st_size for file in released.iterdir())
    said_last = [record.message for record in caplog.records if "downloading" in record.message][-1]
    assert re.match(rf"downloading hf://org/name: {size // 1000:,} of {-(-size // 1000):,} MB", said_last)


def _point_at(url: str, cache: str) -> None:
    """Send a rank, which has no fixtures, to the stand-in."""
    constants.ENDPOINT = url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = cache, False
    hub._downloaded.cache_clear()


def _on_a_rank(url: str, cache: str, path: str) -> Any:
    """On one of several ranks: the logits, or how loading fails."""
    _point_at(url, cache)
    group = dist.group.WORLD
    failure = error_of(MetaModel.from_pretrained, path, mp_group=group, device="cpu", dtype="fp32", max_seq_len=64)
    return failure if failure[0] else logits_of(path, mp_group=group)


def test_two_ranks_at_once_download_each_byte_once(
    stand_in: HubStandIn, plain: Path, ranks: Callable[[int], RankPool]
) -> None:
    stand_in.add("org/name", plain, **UNWANTED)
    stand_in.together = 2
    call = (stand_in.url, constants.HF_HUB_CACHE)
    logits = alike(ranks(2).run(_on_a_rank, *call, "hf://org/name"))
    torch.testing.assert_close(logits, logits_of(plain), atol=1e-4, rtol=1e-4)
    wanted = {str(file.relative_to(plain)): file.stat().st_size for file in plain.rglob("*") if file.is_file()}
    assert stand_in.heads == dict.fromkeys(wanted, 2)
    assert stand_in.asked == dict.fromkeys(wanted, 1)
    assert stand_in.bytes == wanted
    assert alike(ranks(2).run(_on_a_rank, *call, "hf://org/name@v9"))[0] == "FileNotFoundError"


def test_one_rank_that_fails_alone_ends_both(
    stand_in: HubStandIn, plain: Path, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    stand_in.add("org/name", plain)
    (tmp_path / "file").touch()
    results = ranks(2).run(_with_a_cache_of_its_own, stand_in.url, str(tmp_path), "hf://org/name")
    assert "hf://org/name finds no place here" in alike([text for _, text in results])


def _with_a_cache_of_its_own(url: str, folder: str, path: str) -> Any:
    return _on_a_rank(url, f"{folder}/{('cache', 'file')[dist.get_rank()]}/hub", path)


def test_a_run_finetunes_what_is_on_the_hub(
    stand_in: HubStandIn, small_tokenizer: Path, ranks: Callable[[int], RankPool], tmp_path: Path
) -> None:
    setting = make_setting(tmp_path, small_tokenizer, examples=8)
    template = b"{% for message in messages %}{{ message.content }}{% endfor %}"
    stand_in.add("org/base", setting.model, **{"chat_template.jinja": template})
    changes = {"chat_template": "model", "lora_rank": 2, "max_steps": 1, "epochs": 1}
    arguments = setting.arguments(tmp_path / "run", pretrained_path="hf://org/base", **changes)
    ranks(2).run(_finetunes_on_a_rank, stand_in.url, constants.HF_HUB_CACHE, setting, arguments)
    assert all(count == 1 for count in stand_in.asked.values())
    (made,) = (tmp_path / "run").glob("epoch*")
    assert (made / "chat_template.jinja").read_bytes() == template
    trained = logits_of(["hf://org/base", made])
    assert trained.shape == (len(PROMPT), 384)
    options = json.loads((tmp_path / "run" / "options.json").read_text())
    assert options["pretrained_path"] == ["hf://org/base"]


def _finetunes_on_a_rank(url: str, cache: str, setting: Setting, arguments: list[str]) -> Any:
    _point_at(url, cache)
    return finetune_on_rank(setting, arguments)
