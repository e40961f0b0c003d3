"""MultiGpuWrapper: MetaModel's answers, from processes that the program does not see."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from models import load
from ranks import error_of, run_command

from accessory.model.meta import MetaModel
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["The list method", "Return the", "a", "a much longer text that is to be completed, as long as it is"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_tokenizer: Path) -> Path:
    config = small_config()
    target = tmp_path_factory.mktemp("wrapper") / "small"
    return write_folder(target, random_tensors(config, 5), config, files=2, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def wrapper(folder: Path) -> Iterator[MultiGpuWrapper]:
    with MultiGpuWrapper(
        pretrained_path=folder, gpu_ids=[4, 5], slots=2, max_seq_len=128, dtype="fp32", device="cpu"
    ) as started:
        yield started


@pytest.fixture(scope="module")
def model(folder: Path) -> MetaModel:
    return load(folder)


def test_generate_gives_metamodels_answers(wrapper: MultiGpuWrapper, model: MetaModel) -> None:
    settings = {"max_gen_len": 20, "additional_stop_symbols": ["e", "("]}
    for prompts in (TEXTS, TEXTS[:1]):
        assert wrapper.generate(prompts, None, **settings) == model.generate(prompts, None, **settings)
    assert wrapper.generate(TEXTS, max_gen_len=12) == model.generate(TEXTS, max_gen_len=12)


def test_stream_generate_shows_what_metamodels_does(wrapper: MultiGpuWrapper, model: MetaModel) -> None:
    ours = list(wrapper.stream_generate(TEXTS[0], max_gen_len=20))
    assert ours == list(model.stream_generate(TEXTS[0], max_gen_len=20))


def test_a_stream_may_be_left(wrapper: MultiGpuWrapper, model: MetaModel) -> None:
    for step in wrapper.stream_generate(TEXTS[0], max_gen_len=100):
        assert not step["end_of_content"]
        break
    assert wrapper.generate(TEXTS[:1], max_gen_len=5) == model.generate(TEXTS[:1], max_gen_len=5)


def test_pytorchs_seed_repeats_a_sample(wrapper: MultiGpuWrapper) -> None:
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(wrapper.generate(TEXTS, max_gen_len=20, temperature=2.0))
    assert samples[0] == samples[1] != samples[2]


def test_a_prompt_that_is_too_long_keeps_its_last_tokens(wrapper: MultiGpuWrapper, model: MetaModel) -> None:
    long = [" ".join(["list"] * 200)]
    assert wrapper.generate(long, max_gen_len=8) == model.generate(long, max_gen_len=8)


def test_scores_are_metamodels(wrapper: MultiGpuWrapper, model: MetaModel) -> None:
    for ours, theirs in zip(wrapper.compute_logits(TEXTS), model.compute_logits(TEXTS), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    examples = ([1, 30, 31, 32], [1, 40])
    contexts = ["The", "Return", "", "a"]
    for arguments in ((TEXTS, contexts), (examples,)):
        ours, theirs = wrapper.evaluate_examples(*arguments), model.evaluate_examples(*arguments)
        assert ours.keys() == theirs.keys()
        assert ours["log_likelihood"] == pytest.approx(theirs["log_likelihood"], rel=1e-4)
        assert ours["ppl"] == pytest.approx(theirs["ppl"], rel=1e-4)
        assert ours["max_equal"] == theirs["max_equal"]


@pytest.mark.parametrize(
    ("method", "arguments", "settings"),
    [
        ("generate", ("text",), {}),
        ("generate", ([],), {}),
        ("generate", ([1],), {}),
        ("generate", (["a"], "image"), {}),
        ("generate", (["a"],), {"max_gen_len": 127}),
        ("generate", (["a"],), {"temperature": -1}),
        ("generate", (["a"],), {"additional_stop_symbols": [""]}),
        ("stream_generate", ("a", "image"), {}),
        ("stream_generate", (1,), {}),
        ("compute_logits", ([[1, 999]],), {}),
        ("compute_logits", (["a"], "image"), {}),
        ("evaluate_examples", (["a"], ["b"]), {}),
    ],
)
def test_errors_are_metamodels(
    wrapper: MultiGpuWrapper, model: MetaModel, method: str, arguments: tuple, settings: dict
) -> None:
    ours = error_of(getattr(wrapper, method), *arguments, **settings)
    assert ours == error_of(getattr(model, method), *arguments, **settings)
    assert ours[0] == "ValueError"


SCRIPT = """
import sys
from accessory.model.multi_gpu_wrapper import MultiGpuWrapper

model = MultiGpuWrapper(pretrained_path=sys.argv[1], gpus=2, max_seq_len=128, dtype="fp32", device="cpu")
print(repr(model.generate(["The list method"], max_gen_len=20)[0]))
for step in model.stream_generate("a", max_gen_len=50):
    break
"""


def test_a_script_needs_no_main_guard_and_no_goodbye(tmp_path: Path, folder: Path, model: MetaModel) -> None:
    script = tmp_path / "evaluate.py"
    script.write_text(SCRIPT)
    (tmp_path / "queue.py").write_text("raise SystemExit('not what the ranks should import')")
    done = run_command([sys.executable, "-P", script, folder], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == repr(model.generate(["The list method"], max_gen_len=20)[0])
    assert "Traceback" not in done.stderr
