"""What `python -m build` packs: a source distribution that can be worked with as a clone."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from patience import PATIENCE

import accessory

ROOT = Path(accessory.__file__).parent.parent
FOLDERS = ("accessory", "benchmarks", "configs", "demos", "docs", "exps", "tests")
FILES = ("MANIFEST.in", "Makefile", "README.md", "constraints.txt", "pyproject.toml", "setup.py")
# Suffixes of what must be there; a working copy may hold other things beside what is tracked.
SUFFIXES = {".py", ".cpp", ".h", ".md", ".png", ".json", ".yaml", ".sh"}


def test_a_source_distribution_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    copy = tmp_path / "copy"
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "output*", "_build", ".*")
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True, timeout=PATIENCE)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as packed:
        held = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {path for path in copy.rglob("*") if path.suffix in SUFFIXES and path.is_file()}
    names = {str(path.relative_to(copy)) for path in wanted} | set(FILES)
    assert names <= held, sorted(names - held)
    assert {"accessory/configs/model/finetune/sg/llamaPeft_normBiasLora.json", "exps/common.sh"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
