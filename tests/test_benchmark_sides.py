"""Comparing with peers: sides answer in processes of their own, in turns, and what one cannot keeps back no other."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from accessory.config import MoEArgs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# A side without a model; what it does depends on how long the prompt is.
TOY = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from protocol import serve

class Toy:
    about, facts = "a toy", {"expert_bytes": 80, "other_bytes": 10}

    def prefill(self, tokens):
        print("what a package says")
        if len(tokens) == 13:
            print("out of luck", file=sys.stderr, flush=True)
            os._exit(3)
        if len(tokens) == 14:
            raise ValueError("no room for 14")
        if len(tokens) == 15:
            time.sleep(60)

    def start(self, prompt, last, steps):
        self.sequences, self.left = {(*prompt, token) for token in last}, steps

    def step(self):
        self.left -= 1

    def stop(self):
        assert self.left == 0
        return {"experts": len(self.sequences)}

serve(lambda asked: Toy())
"""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/peers/compare.py, on a machine whose limits are known."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from peers import compare

    monkeypatch.setattr(compare, "machine_limits", lambda threads: {"read": 1e9, "dense": 1e12})
    return compare


def test_what_a_side_cannot_is_named_and_the_rest_goes_on(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = tmp_path / "toy.py"
    toy.write_text(TOY)
    monkeypatch.setattr(compare, "ANSWER_LIMIT", 2.0)
    find = compare.Comparison._command

    def command(comparison: object, side: object) -> object:
        return find(comparison, side) if side.program == "vllm" else ([sys.executable, toy, BENCHMARKS / "peers"], {})

    monkeypatch.setattr(compare.Comparison, "_command", command)
    monkeypatch.setattr(compare.weights, "written", lambda folder, args: folder)
    rows = [compare.Row("prefill", count=count) for count in (12, 13, 14, 15)]
    rows.append(compare.Row("decode", batch=3, position=20))
    settings = compare.Settings(tmp_path, rounds=2, starts=1, rows=rows)
    sides = [compare.Side("accessory", "bf16"), compare.Side("vllm", "bf16")]
    args = compare.weights.args_of("mid")
    comparison = compare.Comparison("toy", args, "16 bits", settings)
    comparison.run(sides)
    part = json.loads(json.dumps(comparison.results()))

    measured = {row["name"]: row for row in part["rows"] if row["seconds"]}
    assert list(measured) == ["prefill, 12 tokens", "decode, batch 3, position 20"]
    assert all(len(row["seconds"]["accessory bf16"]) == 2 for row in measured.values())
    # 3 of 8 experts, and keys and values of 3 sequences: 8 layers of 4 heads of 64 in 2 bytes.
    cache = 3 * 20 * 2 * 8 * 4 * 64 * 2
    assert measured["decode, batch 3, position 20"]["read"] == {"accessory bf16": 10 + 80 * 3 / 8 + cache}
    reasons = {(name, row.split(",")[-1].strip()): reason for name, row, reason in part["missing"]}
    log = tmp_path / "toy" / "accessory-bf16.log"
    assert reasons == {
        ("vllm bf16", "all"): f"not installed in {tmp_path}: run with --install",
        ("accessory bf16", "13 tokens"): f"ended with 3: out of luck ({log})",
        ("accessory bf16", "14 tokens"): "ValueError: no room for 14",
        ("accessory bf16", "15 tokens"): "no answer to prefill 15 in 2 s",
    }
    lines = "\n".join(compare.tables({**compare.heading(settings), "parts": [part]}))
    assert all(reason in lines for reason in reasons.values())


def test_what_does_not_install_says_why(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peers import environments

    monkeypatch.setattr(sys, "executable", "true")  # makes no environment, so there is no Python to install with
    for name, result in environments.install(tmp_path).items():
        assert re.search(r"ended with 127: .*No such file", result), result
        with pytest.raises(environments.InstallError, match=re.escape(result)):
            environments.python_of(tmp_path, name)


def test_ours_beside_transformers(compare: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    sizes = {"dim": 64, "hidden_dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 32}
    moe = MoEArgs(num_experts=4, num_experts_per_tok=2)
    args = compare.weights.args_of("mid").replace(**sizes, moe=moe)
    rows = [compare.Row("prefill", count=12), compare.Row("decode", batch=2, position=20)]
    settings = compare.Settings(tmp_path, threads=1, rounds=2, starts=0, steps=2, rows=rows)
    sides = [compare.Side("accessory", "bf16"), compare.Side("transformers", "bf16", ("grouped_mm",))]
    comparison = compare.Comparison("tiny", args, "16 bits", settings)
    comparison.run(sides)
    part = comparison.results()
    assert not part["missing"]
    ours, theirs = "accessory bf16", "transformers bf16 grouped_mm"
    for row in part["rows"]:
        assert {name: len(seconds) for name, seconds in row["seconds"].items()} == {ours: 2, theirs: 2}
    assert 2 <= part["rows"][1]["experts"] <= 4
    for side in part["sides"].values():
        assert side["first"][0] > side["load"][0] > 0
        assert side["peak_resident"][0] > side["peak_private"][0] > 2 * args.vocab_size * args.dim * 2
    results = {**compare.heading(settings), "parts": [part]}
    (compared,) = [line for line in compare.tables(results) if line.startswith("| decode") and " x " in line]
    assert compared.split(" | ")[1:3] == [ours, theirs]
    assert compare.draw(results).startswith(b"\x89PNG")
