"""Real text without a download, and a tokenizer trained on it.

Python ships about two megabytes of English: its language reference (pydoc's topics) and the docstrings of its
library. It is enough to train a tiny model on that learns something, wherever Python is installed.
"""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import math
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from accessory.files import replacing

# Tests, and what a user installed: neither is the same from one machine to the next, nor good prose.
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
_MIN_CHARACTERS = 80  # shorter documents say little: "Return the length."
# Sentencepiece's training time grows with its text; this much settles a vocabulary of a few thousand.
_MAX_TRAINING_BYTES = 4_000_000


def documentation_corpus(max_bytes: int | None = None) -> list[str]:
    """The documents of Python's own documentation, the same in every call under one Python.

    Each is a topic of the language reference, or the docstring of a module, class or function of the standard
    library, without its common indentation. No module is imported for it. `max_bytes` limits the sum of their
    lengths in UTF-8; documents that would pass it are left out. Raises ValueError where it is negative.
    """
    if max_bytes is not None and max_bytes < 0:
        raise ValueError(f"max_bytes is {max_bytes}: give a number of bytes, or None for all")
    documents: list[str] = []
    left = math.inf if max_bytes is None else max_bytes
    seen: set[str] = set()
    for document in _documents():
        if left < _MIN_CHARACTERS:
            break  # reading the whole library takes seconds
        size = len(document.encode())
        if size <= left and document not in seen:
            seen.add(document)
            documents.append(document)
            left -= size
    return documents


def train_tokenizer(texts: Iterable[str], path: str | Path, *, vocab_size: int) -> None:
    """Train a sentencepiece model on `texts` and write it to `path`, with the conventions of Mixtral's own.

    That is: byte-pair merges, unknown 0, begin 1, end 2, the 256 bytes next, digits one by one, white space
    kept as it is. What is not in the vocabulary, newlines among it, is spelled in bytes, so every text comes
    back from encode and decode unchanged. Of many texts, lines at even distances are taken, so that a call
    takes seconds and gives the same file each time. `path` is written aside, then renamed.

    Raises ValueError for texts without a line, and for a vocab_size that they cannot fill or that cannot hold
    their characters.
    """
    lines = _sample([line for text in texts for line in text.splitlines() if line.strip()])
    if not lines:
        raise ValueError("texts holds no line of text to train a tokenizer on: give some")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.99995,
            max_sentence_length=max(len(line.encode()) for line in lines) + 1,  # a longer one is left out
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            num_threads=2,
            minloglevel=2,
        )
    except Exception as error:  # its type differs between versions of the library
        # The message begins with a place in the library's source and a condition in brackets.
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"no vocab_size {vocab_size} can be had from these texts: {reason}") from error
    with replacing(Path(path)) as aside:
        aside.write_bytes(model.getvalue())


def _sample(lines: list[str]) -> list[str]:
    """At most _MAX_TRAINING_BYTES of the lines, at even distances."""
    step = -(-sum(len(line.encode()) for line in lines) // _MAX_TRAINING_BYTES)
    return lines[:: max(step, 1)]


def _documents() -> Iterator[str]:
    """The documents worth having, in order; some stand there twice."""
    from pydoc_data.topics import topics  # 0.7 MB of source, so not before it is wanted

    reference = (topics[name] for name in sorted(topics))
    for document in itertools.chain(reference, _docstrings(Path(sysconfig.get_path("stdlib")))):
        # A docstring may hold what no UTF-8 text can, a lone surrogate.
        text = inspect.cleandoc(document).encode(errors="replace").decode()
        if len(text) >= _MIN_CHARACTERS:
            yield text


def _docstrings(root: Path) -> Iterator[str]:
    """The docstrings of every .py file under `root`, by path and then by place in the file."""
    for _, tree in library_trees(root):
        for node in _statements(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield ast.get_docstring(node, clean=False) or ""


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """`ast.walk` in its order, without the expressions: nine nodes of ten, which hold no docstring."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        yield (node := todo.popleft())
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            todo.extend(getattr(node, field, ()))


def library_trees(root: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every .py file of the standard library under `root`: its path from there and its syntax tree, by path."""
    files = [file for file in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(file.relative_to(root).parts)]
    for file in sorted(files, key=lambda file: file.relative_to(root).as_posix()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about others' string escapes
                yield file.relative_to(root), ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
