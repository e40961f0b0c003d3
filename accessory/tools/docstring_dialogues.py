"""Dialogues without a download: questions about Python's standard library, answered by its docstrings.

    python -m accessory.tools.docstring_dialogues runs/dialogues

writes train.json and data.yaml, ready for main_finetune.py --dialog; held_out.json with questions that are not in
train.json, and held_out.yaml for --eval_data_config; and questions.txt: four questions of the first, then two of the
second.
"""

import ast
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from accessory.arguments import Parser, given_path
from accessory.files import new_folder
from accessory.log import say_error
from accessory.tools.corpus import library_trees

Dialogue = dict[str, list[dict[str, str]]]

# Every so manieth dialogue is held back.
HELD_BACK = 20
_LONGEST_ANSWER = 100  # characters


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=given_path, help="folder to write; must not exist, or be empty")
    parser.add_argument("--limit", type=int, default=400, help="dialogues at most (default 400)")
    options = parser.parse_args(arguments)
    try:
        train, held_out = write_dialogues(options.folder, limit=options.limit)
    except (OSError, ValueError) as error:
        say_error(str(error))
        return 1
    sys.stdout.write(f"wrote {options.folder}: {train} dialogues to train on, {held_out} held out\n")
    return 0


def write_dialogues(folder: Path, *, limit: int) -> tuple[int, int]:
    """Write the dialogues; returns how many are in train.json and in held_out.json.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: limit is below 2.
    """
    if limit < 2:
        raise ValueError(f"--limit is {limit}: give 2 or more, one to train on and one to hold out")
    found = list(_dialogues())
    # At even distances, so that a few show the whole library.
    found = [found[index * len(found) // limit] for index in range(limit)] if len(found) > limit else found
    held_out = found[HELD_BACK // 2 :: HELD_BACK] or found[:1]
    train = [dialogue for dialogue in found if dialogue not in held_out]
    with new_folder(folder) as aside:
        for name, config, dialogues in (("train", "data", train), ("held_out", "held_out", held_out)):
            (aside / f"{name}.json").write_text(json.dumps(dialogues, indent=1) + "\n", encoding="utf-8")
            source = {"path": str(folder.absolute() / f"{name}.json"), "type": "text"}
            (aside / f"{config}.yaml").write_text(f"META:\n  - {json.dumps(source)}\n", encoding="utf-8")
        asked = [*train[:: max(1, len(train) // 4)][:4], *held_out[:2]]
        questions = [dialogue["conversations"][0]["value"] for dialogue in asked]
        (aside / "questions.txt").write_text("\n".join(questions) + "\n", encoding="utf-8")
    return len(train), len(held_out)


def _dialogues() -> Iterator[Dialogue]:
    """One for each public function and class at the top of a public module that says what it does in a sentence."""
    for path, tree in library_trees(Path(sysconfig.get_path("stdlib"))):
        parts = [part for part in path.with_suffix("").parts if part != "__init__"]
        if not parts or any(part.startswith("_") or not part.isidentifier() for part in parts):
            continue
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            answer = _first_sentence(ast.get_docstring(node, clean=False) or "")
            if answer:
                name = ".".join([*parts, node.name])
                question = f"What is {name}?" if isinstance(node, ast.ClassDef) else f"What does {name} do?"
                yield {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def _first_sentence(docstring: str) -> str:
    """The docstring's first sentence on one line; empty where it is none or a long one."""
    paragraph = " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())
    match = re.match(r"[A-Z][^.]+\.(?=\s|$)", paragraph)
    sentence = match[0] if match else ""
    return sentence if sentence.isascii() and 20 <= len(sentence) <= _LONGEST_ANSWER else ""


if __name__ == "__main__":
    sys.exit(main())
