"""The documents of Python itself, and tokenizers trained on them."""

from __future__ import annotations

import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accessory.text.tokenizer import Tokenizer
from accessory.tools import corpus
from accessory.tools.corpus import documentation_corpus, train_tokenizer

VOCAB_SIZE = 2048


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return documentation_corpus()


@pytest.fixture(scope="module")
def trained(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    train_tokenizer(documents, path, vocab_size=VOCAB_SIZE)
    return Tokenizer(path)


def test_the_corpus_is_of_useful_size_and_clean(documents: list[str]) -> None:
    assert sum(len(document.encode()) for document in documents) > 1_500_000
    assert len(documents) == len(set(documents))
    assert all(len(document) >= 80 and document == document.strip("\n") for document in documents)


def test_the_corpus_holds_the_reference_and_the_library(documents: list[str]) -> None:
    assert any(document.startswith('The "with" statement') for document in documents)
    assert inspect.getdoc(subprocess.Popen) in documents


def test_the_corpus_is_the_same_each_time_and_imports_nothing(documents: list[str]) -> None:
    """In a fresh process with another hash seed; the library's modules are read, never run."""
    code = (
        "import hashlib, sys\n"
        "from accessory.tools.corpus import documentation_corpus\n"
        "documents = documentation_corpus()\n"
        "print(hashlib.sha256('\\0'.join(documents).encode()).hexdigest(), 'turtle' in sys.modules, "
        "'this' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    assert run.stdout.split() == [digest, "False", "False"]
    assert run.stderr == ""


@pytest.mark.parametrize("limit", [0, 79, 1000, 100_000])
def test_the_corpus_can_be_limited(limit: int, documents: list[str]) -> None:
    some = documentation_corpus(limit)
    assert some == documentation_corpus(max_bytes=limit)
    size = sum(len(document.encode()) for document in some)
    assert max(limit - 100, 0) <= size <= limit  # the last bytes are too few for another document
    order = {document: place for place, document in enumerate(documents)}
    places = [order[document] for document in some]
    assert places == sorted(places)


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes is -1"):
        documentation_corpus(-1)


def test_broken_files_and_skipped_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "A sentence that is long enough to be worth keeping in a corpus of documentation, as it were."
    files: dict[str, str | bytes] = {
        "good.py": f'"""{long}"""\nraise SystemExit\n',
        "sub/also.py": f'class A:\n    """{long[:-1]}!\n\n    one\n        two\n    """\n    x = "\\d"\n',
        "same.py": f'"""{long}"""',
        "broken.py": f'"""{long}?"""\ndef (:',
        "latin.py": f'"""{long} \xe9"""'.encode("latin-1"),
        "null.py": b'"""' + long.encode() + b' null\0"""',
        "test/skipped.py": f'"""{long} skipped"""',
        "sub/tests/skipped.py": f'"""{long} skipped"""',
        "site-packages/skipped.py": f'"""{long} skipped"""',
        "short.py": '"""Short."""',
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(source if isinstance(source, bytes) else source.encode())
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda _name: str(tmp_path))
    library = [document for document in documentation_corpus() if document.startswith(long[:-1])]
    assert library == [long, long[:-1] + "!\n\none\n    two"]


def test_the_conventions_are_mixtrals(trained: Tokenizer) -> None:
    assert (trained.n_words, trained.bos_id, trained.eos_id) == (VOCAB_SIZE, 1, 2)
    processor = trained._backend._processor  # type: ignore[union-attr]
    assert (processor.unk_id(), processor.pad_id()) == (0, -1)
    assert [processor.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == [
        "<unk>",
        "<s>",
        "</s>",
        "<0x00>",
        "<0xFF>",
    ]
    pieces = processor.encode("year 2024\nnext", out_type=str)
    assert "<0x0A>" in pieces
    assert all(sum(character.isdigit() for character in piece.strip("▁")) <= 1 for piece in pieces if piece != "<0x0A>")
    assert processor.encode("the", out_type=str) == ["▁the"]


def test_the_corpus_comes_back_and_is_compressed(trained: Tokenizer, documents: list[str]) -> None:
    tokens = 0
    for document in documents[::7]:
        ids = trained.encode(document, bos=False, eos=False)
        assert trained.decode(ids) == document
        assert 0 not in ids
        tokens += len(ids)
    assert sum(len(document.encode()) for document in documents[::7]) > 2.5 * tokens


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁")) | st.text(" \n\t\r1aé☃😀"))
def test_any_text_comes_back(trained: Tokenizer, text: str) -> None:
    """Newlines, tabs, runs of spaces, characters that the corpus lacks: nothing is normalised away."""
    ids = trained.encode(text, bos=True, eos=True)
    assert trained.decode(ids) == text
    assert 0 not in ids


def test_the_file_is_the_same_each_time_and_nothing_is_left_beside_it(
    trained: Tokenizer, documents: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "again.model"
    path.write_text("what stood there before")
    train_tokenizer(iter(documents), str(path), vocab_size=VOCAB_SIZE)
    assert path.read_bytes() == trained.path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    assert capfd.readouterr() == ("", "")


def test_long_texts_are_sampled_over_their_whole_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_MAX_TRAINING_BYTES", 1000)
    lines = [f"line {number:05d}" for number in range(1000)]
    some = corpus._sample(lines)
    assert 900 <= sum(map(len, some)) <= 1000
    assert some[0] == lines[0]
    assert some[-1] in lines[-20:]


def test_long_lines_count(tmp_path: Path) -> None:
    """Sentencepiece leaves out lines of more than 4192 bytes unless it is told not to."""
    train_tokenizer(["q" * 5000 + " xyzzy" * 1000], tmp_path / "long.model", vocab_size=275)
    assert len(Tokenizer(tmp_path / "long.model").encode("xyzzy xyzzy", False, False)) == 2


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "texts holds no line"),
        (["", " \n"], 300, "texts holds no line"),
        (["a few words only"], 5000, "vocab_size 5000 .* too high"),
        (["a few words only"], 100, "vocab_size 100 .* smaller"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    texts: list[str], vocab_size: int, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, tmp_path / "t.model", vocab_size=vocab_size)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
