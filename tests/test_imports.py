"""The package's architecture, read off its source: who may import whom, and a few bans."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import accessory

ROOT = Path(accessory.__file__).parent
MODULES = {
    ".".join(["accessory", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)
}

# Layers from the ground up; the first pattern that matches a module is its layer. A module imports from layers below
# its own, and within its layer only where the layer is one concern.
LAYERS: list[tuple[str, str]] = [
    ("package", r"accessory"),
    (
        "ground",
        r"accessory\.(config(\..*)?|arguments|log|errors|files|gguf_header|pages|progress|launch|launch\.launcher|launch\.threads)",
    ),
    ("launch", r"accessory\.launch\..*"),
    ("quant", r"accessory\.quant(\..*)?"),
    ("kernels", r"accessory\.kernels(\..*)?"),
    ("products", r"accessory\.products"),
    ("parallel", r"accessory\.parallel(\..*)?"),
    ("text", r"accessory\.text(\..*)?"),
    ("checkpoint", r"accessory\.checkpoint(\..*)?"),
    ("generation", r"accessory\.generation(\..*)?"),
    ("data", r"accessory\.data(\..*)?"),
    ("metamodel", r"accessory\.model\.(meta|requests|scoring|pretrained)"),
    ("families", r"accessory\.model\.LLM(\..*)?"),  # data alone
    ("llm", r"accessory\.model\.(transformer|factory)"),
    ("wrapper", r"accessory\.model\.multi_gpu_wrapper"),
    ("blocks", r"accessory\.model(\..*)?"),
    ("tools", r"accessory\.tools(\..*)?"),
    ("evaluation", r"accessory\.evaluation(\..*)?"),
    ("train", r"accessory\.train(\..*)?"),
    ("serve", r"accessory\.serve(\..*)?"),
    ("programs", r"accessory\.(main_\w+|cli|__main__)|accessory\.(commands|demos|exps|configs)(\..*)?"),
]

BELOW: dict[str, set[str]] = {
    "package": set(),
    "ground": set(),
    "quant": {"ground"},
    "kernels": {"quant"},
    "products": {"kernels", "quant"},
    "parallel": {"kernels", "ground", "quant", "products"},
    "launch": {"ground", "parallel"},
    "text": {"ground"},
    "families": {"ground"},
    "checkpoint": {"ground", "quant", "parallel", "text", "families"},
    "generation": {"ground", "parallel", "text"},  # what a Transformer promises, but no class of the model
    "data": {"ground", "text"},
    "blocks": {"kernels", "ground", "parallel", "quant", "products"},
    "llm": {"ground", "parallel", "quant", "blocks"},
    "metamodel": {"ground", "parallel", "checkpoint", "generation", "text", "quant", "blocks", "llm"},
}
EVERYTHING_ELSE = set(BELOW)
BELOW["evaluation"] = EVERYTHING_ELSE
BELOW["train"] = EVERYTHING_ELSE | {"data", "evaluation"}
BELOW["serve"] = EVERYTHING_ELSE | {"data"}
BELOW["wrapper"] = BELOW["serve"] | {"serve"}
BELOW["tools"] = BELOW["train"] | {"train"}
BELOW["programs"] = BELOW["tools"] | {"serve", "tools"}


def layer_of(module: str) -> str:
    for layer, pattern in LAYERS:
        if re.fullmatch(pattern, module):
            return layer
    raise AssertionError(f"{module} belongs to no layer: say in {__file__} which it is, and what it may import")


def imports_of(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, inside functions and `if TYPE_CHECKING` too."""
    package = module if MODULES.get(module, Path()).name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from accessory.parallel import plan` imports a module, `from ...plan import Split` does not.
                name = f"{origin}.{alias.name}"
                yield node.lineno, name if name in MODULES else origin


def offences(module: str, source: str) -> list[str]:
    """The imports of a module that go upward."""
    own = layer_of(module)
    found = []
    for line, name in imports_of(module, source):
        if name.split(".")[0] != "accessory":
            continue
        theirs = layer_of(name)
        if theirs != own and theirs not in BELOW[own]:
            found.append(f"{module}:{line} ({own}) imports {name} ({theirs})")
    return found


def test_imports_go_one_way() -> None:
    found = [line for module, path in MODULES.items() for line in offences(module, path.read_text())]
    assert not found, "\n".join(found)


def test_layers_have_no_circle() -> None:
    seen: set[str] = set()
    while len(seen) < len(BELOW):
        ready = {layer for layer, below in BELOW.items() if below <= seen and layer not in seen}
        assert ready, f"a circle among {set(BELOW) - seen}"
        seen |= ready


def test_no_module_is_part_of_a_circle() -> None:
    graph = {
        module: {name for _, name in imports_of(module, path.read_text()) if name in MODULES} - {module}
        for module, path in MODULES.items()
    }
    while leaves := {module for module, below in graph.items() if not below & graph.keys()}:
        graph = {module: below for module, below in graph.items() if module not in leaves}
    assert not graph, f"these import one another: {sorted(graph)}"


@pytest.mark.parametrize(
    ("module", "source", "caught"),
    [
        ("accessory.parallel.plan", "from accessory.model.moe import MoE", True),
        ("accessory.parallel.plan", "def f():\n    import accessory.checkpoint.folder", True),
        ("accessory.model.moe", "from ..model import meta", True),
        ("accessory.model.moe", "from .LLM.mistral import Transformer", True),
        ("accessory.model.transformer", "from .meta import MetaModel", True),
        ("accessory.generation.engine", "if TYPE_CHECKING:\n    from accessory.model.LLM import mistral", True),
        ("accessory.checkpoint.folder", "from accessory.model.norm import RMSNorm", True),
        ("accessory.kernels.products", "import accessory.config", True),
        ("accessory.quant.weight", "from accessory.kernels import dequantize", True),
        ("accessory.model.meta", "from accessory.train.trainer import train", True),
        ("accessory.data.alpaca", "from accessory.model.norm import RMSNorm", True),
        ("accessory.data.alpaca", "from accessory.text.tokenizer import Tokenizer", False),
        ("accessory.model.moe", "from accessory.model.balance import RouterStats\nimport torch", False),
        ("accessory.train.trainer", "from accessory.data import conversation", False),
        ("accessory.serve.driver", "from accessory.cli import main", True),
        ("accessory.serve.driver", "from accessory.model.multi_gpu_wrapper import MultiGpuWrapper", True),
        ("accessory.model.meta", "from accessory.serve.driver import Driver", True),
        ("accessory.model.multi_gpu_wrapper", "from accessory.serve.driver import Driver", False),
        ("accessory.cli", "from accessory.tools.tiny import make_tiny", False),
    ],
)
def test_this_test_catches_upward_imports(module: str, source: str, caught: bool) -> None:
    assert bool(offences(module, source)) is caught


def test_training_alone_imports_distributed_tensors() -> None:
    """They take longer to import than anything of ours, and every command and every rank would pay for it."""
    importers = {
        layer_of(module)
        for module, path in MODULES.items()
        for _, name in imports_of(module, path.read_text())
        if re.match(r"torch\.distributed\.(tensor|fsdp|checkpoint)", name)
    }
    assert importers == {"train"}


def test_fairscale_has_one_importer() -> None:
    importers = {
        module
        for module, path in MODULES.items()
        for _, name in imports_of(module, path.read_text())
        if name.split(".")[0] == "fairscale"
    }
    assert importers == {"accessory.parallel.state"}


def test_nothing_prints() -> None:
    """Text that is the product goes to sys.stdout.write, everything else to logging."""
    found = [
        f"{module}:{node.lineno}"
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert not found


def test_no_file_of_the_package_hides_a_module_of_python() -> None:
    """Started as `python accessory/main_finetune.py`, a program finds its own folder first."""
    names = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not names & set(sys.stdlib_module_names)
    assert not names & {
        "gguf",
        "matplotlib",
        "numpy",
        "sentencepiece",
        "tensorboard",
        "tokenizers",
        "torch",
        "tqdm",
        "transformers",
        "yaml",
    }
