"""Models that are quantized while they load, against transformers' Mixtral with the values that quantization leaves."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from checkpoints import (
    accessory_config,
    hf_greedy,
    hf_logits,
    random_prompts,
    random_tensors,
    small_config,
    write_checkpoint,
    write_folder,
)
from models import completions
from quantized import mixtral_to_quantize, quantized_by_hand
from ranks import RankPool, alike, error_of, on_ranks
from torch import Tensor

from accessory.checkpoint.convert import convert, split
from accessory.checkpoint.folder import Folder
from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.checkpoint.report import describe
from accessory.cli import main
from accessory.config import QuantArgs
from accessory.model.meta import MetaModel
from accessory.model.scoring import score_tokens
from accessory.quant import InputMoments, format_of
from accessory.tools import calibration
from accessory.tools.calibration import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]
PROMPTS = random_prompts(4, [5, 17, 40])
LAYOUTS = [(1, "auto"), (2, "expert"), (2, "tensor"), (4, "expert"), (4, "tensor"), (8, "expert")]
QUANTS = {
    "int8": QuantArgs(type="int8"),
    "int8 with head": QuantArgs(type="int8", head=True),
    "int4": QuantArgs(type="int4"),
    "int4 in 32": QuantArgs(type="int4", group_size=32),
    "nf4": QuantArgs(type="nf4"),
}


class Case(NamedTuple):
    """A plain folder in each form, and transformers' models with what each quantization leaves of its weights."""

    folders: dict[str, Path]
    truths: dict[str, Any]
    plain: Any


@pytest.fixture(scope="module")
def case(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("quant")
    hf = mixtral_to_quantize(5)
    folders = {
        form: write_checkpoint(folder / form, hf, small_tokenizer, files=files, form=form)
        for form, files in (("base", 2), ("sparse", 4), ("released", 1))
    }
    return Case(folders, {name: quantized_by_hand(hf, quant) for name, quant in QUANTS.items()}, hf)


def load(paths: Any, quant: Any, placement: str = "auto", dtype: str = "fp32", **settings: Any) -> MetaModel:
    group = dist.group.WORLD if dist.is_initialized() else None
    placed = {"max_seq_len": 128, "expert_placement": placement, "mp_group": group}
    return MetaModel.from_pretrained(paths, quant=quant, dtype=dtype, device="cpu", **placed, **settings)


def answers_on_rank(paths: Any, quant: Any, placement: str) -> tuple[list[Tensor], list[list[int]]]:
    model = load(paths, quant, placement)
    with torch.no_grad():
        return score_tokens(model.llma, PROMPTS), completions(model.llma, PROMPTS, max_gen_len=24)


def assert_says(found: list[Any], truth: Any) -> None:
    logits, generated = alike(found)
    for prompt, own in zip(PROMPTS, logits, strict=True):
        torch.testing.assert_close(own, hf_logits(truth, prompt), atol=1e-4, rtol=1e-4)
    assert generated == [hf_greedy(truth, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("name", QUANTS)
@pytest.mark.parametrize(("size", "placement"), LAYOUTS)
def test_a_quantized_model_says_what_its_dequantized_weights_say(
    size: int, placement: str, name: str, case: Case, ranks: Pools
) -> None:
    if size == 8 and format_of(QUANTS[name].type, QUANTS[name].group_size).group > 32:
        error = on_ranks(ranks, size, refused_on_rank, case.folders["base"], QUANTS[name], placement)[0]
        assert "32 inputs of attention.wo.weight on a rank are not whole groups of 64" in error
        return
    form = ["base", "sparse", "released"][(size + len(placement)) % 3]
    found = on_ranks(ranks, size, answers_on_rank, case.folders[form], QUANTS[name], placement)
    assert_says(found, case.truths[name])


def refused_on_rank(paths: Any, quant: Any, placement: str) -> str:
    return error_of(load, paths, quant, placement)[1]


@pytest.mark.parametrize("name", QUANTS)
def test_a_quantized_folder_loads_without_the_originals(name: str, case: Case, ranks: Pools, tmp_path: Path) -> None:
    stored = tmp_path / "quantized"
    quantize_checkpoint(case.folders["sparse"], stored, QUANTS[name])
    for size, placement in ((1, "auto"), (2, "expert"), (4, "tensor")):
        assert_says(on_ranks(ranks, size, answers_on_rank, stored, None, placement), case.truths[name])


def test_a_format_without_kernels_is_one_as_the_others_are(case: Case, ranks: Pools, tmp_path: Path) -> None:
    quant, stored = QuantArgs(type="fp8"), tmp_path / "fp8"
    truth = quantized_by_hand(case.plain, quant)
    assert main(["quantize", str(case.folders["sparse"]), str(stored), "--quant", "fp8"]) == 0
    for folder, own, size, placement in (
        (stored, None, 1, "auto"),
        (stored, None, 2, "tensor"),
        (case.folders["released"], quant, 2, "expert"),
    ):
        assert_says(on_ranks(ranks, size, answers_on_rank, folder, own, placement), truth)
    assert "quantized   fp8: matrices" in "\n".join(describe(stored, check_values=True))
    error = on_ranks(ranks, 4, refused_on_rank, stored, None, "expert")[0]
    assert "64 inputs of attention.wo.weight on a rank are not whole groups of 128 (fp8)" in error


def test_the_command_takes_a_folder_of_weights_alone(case: Case, tmp_path: Path) -> None:
    source, text = case.folders["base"], tmp_path / "text"
    text.write_text("The list method returns the number of words.")
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("config.json", "meta.json"))
    given = ["--quant", "int4", "--llama_config", str(source / "config.json")]
    quantize_checkpoint(source, tmp_path / "theirs", QUANTS["int4"])
    assert main(["quantize", str(bare), str(tmp_path / "ours"), *given]) == 0
    assert main(["quantize", str(bare), str(tmp_path / "calibrated"), *given, "--calibrate", str(text)]) == 0
    theirs, ours, calibrated = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("theirs", "ours", "calibrated")
    )
    assert ours == theirs
    assert calibrated.keys() == theirs.keys()
    assert calibrated != theirs


def test_a_quantized_folder_is_as_small_as_its_bits(case: Case, tmp_path: Path) -> None:
    config = accessory_config(case.plain.config)
    layer = 2 * config["dim"] * 12 * config["head_dim"] + 8 * 3 * config["dim"] * config["hidden_dim"]
    matrices = config["n_layers"] * layer
    whole = case.folders["released"] / "consolidated.00.pth"
    for name, share in (("int8", 0.53), ("int4", 0.31), ("int4 in 32", 0.31), ("nf4", 0.31)):
        quantize_checkpoint(case.folders["base"], tmp_path / name, QUANTS[name])
        size = sum(path.stat().st_size for path in (tmp_path / name).glob("*.pth"))
        rest = whole.stat().st_size - matrices * 4  # of float32
        assert size - rest <= share * 2 * matrices * 1.02 + 100_000, name


def state_on_rank(paths: Any, quant: Any) -> dict[str, Tensor]:
    return {name: own.detach().clone() for name, own in load(paths, quant).llma.named_parameters()}


@pytest.mark.parametrize("name", QUANTS)
def test_quantizing_while_loading_and_beforehand_are_one(name: str, case: Case, ranks: Pools, tmp_path: Path) -> None:
    stored = tmp_path / "quantized"
    quantize_checkpoint(case.folders["base"], stored, QUANTS[name])
    for size in (1, 4):
        now = on_ranks(ranks, size, state_on_rank, case.folders["released"], QUANTS[name])
        before = on_ranks(ranks, size, state_on_rank, stored, QUANTS[name])
        for ours, theirs in zip(now, before, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_embedding_the_norms_and_the_gate_stay(case: Case) -> None:
    model = load(case.folders["base"], "int4", dtype="bf16")
    dtypes = {re.sub(r"layers\.\d+\.", "", name): own.dtype for name, own in model.llma.named_parameters()}
    floating = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
    assert floating == {
        *("tok_embeddings.weight", "norm.weight", "output.weight"),
        *("attention_norm.weight", "ffn_norm.weight", "feed_forward.gate.weight"),
    }
    assert load(case.folders["base"], QuantArgs(type="int4", head=True)).llma.output.weight.format.name == "int4"
    assert load(case.folders["base"], True).llma.layers[0].attention.wq.weight.format.name == "nf4"
    assert isinstance(load(case.folders["base"], False).llma.layers[0].attention.wq.weight, torch.nn.Parameter)


def test_a_folder_that_overlays_is_quantized_too(case: Case, small_tokenizer: Path, tmp_path: Path) -> None:
    """One expert's w3 of another model, over a plain base: of the stacked matrix that piece alone is replaced."""
    other = mixtral_to_quantize(6)
    write_checkpoint(tmp_path / "other", other, small_tokenizer, files=1)
    shard = tmp_path / "other" / "consolidated.00-of-01.model.pth"
    key = "llma.layers.1.feed_forward.experts.3.w3.weight"
    torch.save({"model": {key: torch.load(shard)["model"][key]}}, shard)
    hf = mixtral_to_quantize(5)
    half = hf.config.intermediate_size
    with torch.no_grad():
        theirs = other.model.layers[1].mlp.experts.gate_up_proj[3, half:]
        hf.model.layers[1].mlp.experts.gate_up_proj[3, half:] = theirs
    found = [answers_on_rank([case.folders["base"], tmp_path / "other"], "nf4", "auto")]
    assert_says(found, quantized_by_hand(hf, QUANTS["nf4"]))


def test_an_expert_of_another_dtype_does_not_round_the_others(small_tokenizer: Path, tmp_path: Path) -> None:
    hf = mixtral_to_quantize(5, num_hidden_layers=1, num_local_experts=2)
    with torch.no_grad():
        first = hf.model.layers[0].mlp.experts.gate_up_proj[0, : hf.config.intermediate_size]
        first.copy_(first.bfloat16())
    folder = write_checkpoint(tmp_path / "plain", hf, small_tokenizer, files=1, form="released")
    tensors = torch.load(folder / "consolidated.00.pth")
    name = "layers.0.feed_forward.experts.0.w1.weight"
    tensors[name] = tensors[name].bfloat16()
    torch.save(tensors, folder / "consolidated.00.pth")
    quantize_checkpoint(folder, tmp_path / "quantized", QUANTS["int8"])
    truth = quantized_by_hand(hf, QUANTS["int8"])
    for model in (load(folder, "int8"), load(tmp_path / "quantized", None)):
        (logits,) = score_tokens(model.llma, PROMPTS[:1])
        torch.testing.assert_close(logits, hf_logits(truth, PROMPTS[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", QUANTS)
def test_in_bfloat16_the_answers_stay_near(case: Case, form: str) -> None:
    """Activations of so few tokens have 8 bits there. The median of the tokens: a rounding may turn a close choice of
    experts into another one, with plain weights as well."""
    prompt = PROMPTS[0]
    truth = hf_logits(case.truths[form], prompt)
    model = load(case.folders["base"], QUANTS[form], dtype="bf16")
    with torch.no_grad():
        (logits,) = score_tokens(model.llma, [prompt])
    errors = (logits - truth).norm(dim=-1) / truth.norm(dim=-1)
    assert errors.median() < 0.04


# --- bad input


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        ("int3", "quant 'int3' is unknown (did you mean int8?): choose from int8, int4, nf4, fp8, mxfp4"),
        ("", "quant '' is unknown"),
        (8, "quant 8 is unknown"),
    ],
)
def test_an_unknown_quantization_is_refused(quant: Any, words: str, case: Case) -> None:
    kind, text = error_of(load, case.folders["base"], quant)
    assert (kind, text[: len(words)]) == ("ValueError", words)


def test_group_sizes_are_checked() -> None:
    for settings, words in (
        ({"type": "int4", "group_size": 48}, "must be 32 or 64, not 48"),
        ({"type": "int4", "group_size": 64.0}, "must be 32 or 64, not 64.0"),
        ({"type": "nf4", "group_size": 32}, "group size 32 is for int4"),
        ({"type": "int4", "head": 1}, "must be true or false"),
    ):
        with pytest.raises(ValueError, match=words):
            QuantArgs(**settings)


def test_sizes_that_groups_do_not_divide_are_refused(small_tokenizer: Path, tmp_path: Path) -> None:
    hf = mixtral_to_quantize(1, hidden_size=96, intermediate_size=96)
    folder = write_checkpoint(tmp_path / "odd", hf, small_tokenizer, files=1)
    for refuses in (
        lambda: load(folder, "int4"),
        lambda: quantize_checkpoint(folder, tmp_path / "to", QuantArgs(type="int4")),
    ):
        with pytest.raises(ValueError, match=r"96 inputs of attention.wq.weight .*groups of 64"):
            refuses()
    assert not (tmp_path / "to").exists()
    load(folder, QuantArgs(type="int4", group_size=32))


def test_what_is_quantized_stays_as_it_is(case: Case, tmp_path: Path) -> None:
    stored = tmp_path / "int8"
    quantize_checkpoint(case.folders["base"], stored, QUANTS["int8"])
    load(stored, "int8")
    for refuses in (lambda: load(stored, "nf4"), lambda: quantize_checkpoint(stored, tmp_path / "to", QUANTS["nf4"])):
        with pytest.raises(ValueError, match=f"{stored}.* is quantized already"):
            refuses()


def test_a_given_config_does_not_change_what_is_quantized(case: Case, tmp_path: Path) -> None:
    source, stored = case.folders["base"], tmp_path / "int8"
    quantize_checkpoint(source, stored, QUANTS["int8"])
    plain, quantized = ([str(folder / "config.json")] for folder in (source, stored))
    assert main(["split", str(stored), str(tmp_path / "again"), "--mp", "2", "--llama_config", *plain]) == 0
    assert main(["split", str(stored), str(tmp_path / "same"), "--mp", "2"]) == 0
    for file in (tmp_path / "same").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match=f"{stored} is quantized already"):
        quantize_checkpoint(stored, tmp_path / "to", QUANTS["int4"], llama_config=plain)
    for refuses in (
        lambda: split(source, tmp_path / "to", mp=2, llama_config=quantized),
        lambda: list(describe(source, llama_config=quantized)),
    ):
        with pytest.raises(ValueError, match=f"{quantized[0]} sets quant .*{source} is not quantized: leave quant out"):
            refuses()
    assert not (tmp_path / "to").exists()


def test_damaged_quantized_folders_are_refused(case: Case, tmp_path: Path) -> None:
    stored = tmp_path / "int4"
    quantize_checkpoint(case.folders["released"], stored, QUANTS["int4"])
    (shard,) = stored.glob("*.pth")
    whole = torch.load(shard)["model"]
    key = "llma.layers.0.attention.wq.weight.int4_scale"
    for damaged, words in (
        ({**whole, key: whole[key].float()}, r"wq.weight.int4_scale is torch.float32, not torch.bfloat16"),
        ({name: own for name, own in whole.items() if name != key}, r"lacks tensor layers.0.attention.wq.weight.int4"),
        ({**whole, key: whole[key][:-1]}, r"int4_scale has shape"),
    ):
        torch.save(damaged, shard)
        with pytest.raises(ValueError, match=words):
            load(stored, None)
    torch.save(whole, shard)
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(json.dumps({**config, "quant": {"type": "int4", "groups": 3}}))
    with pytest.raises(ValueError, match=r"config.json: unknown key\(s\) in quant: groups"):
        load(stored, None)


def test_a_matrix_with_nan_is_named(case: Case, tmp_path: Path, small_tokenizer: Path) -> None:
    hf = mixtral_to_quantize(5)
    with torch.no_grad():
        hf.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    folder = write_checkpoint(tmp_path / "nan", hf, small_tokenizer, files=1)
    moments = InputMoments(256, 64)
    moments.add(torch.ones(1, 256))
    moments_of = {("layers.1.feed_forward.experts.w2", (2,)): moments}
    for refuses in (
        lambda: load(folder, "nf4"),
        lambda: quantize_checkpoint(folder, tmp_path / "to", QUANTS["int8"]),
        lambda: quantize_checkpoint(folder, tmp_path / "to", QUANTS["int4"], moments_of),
    ):
        with pytest.raises(ValueError, match=r"nan: layers.1.feed_forward.experts.w2, \(2,\): .*NaN cannot be quant"):
            refuses()
    moments.add(torch.full((1, 256), torch.nan))
    moments_of = {("layers.1.attention.wo.weight", ()): moments}
    with pytest.raises(ValueError, match=r"nan: layers.1.attention.wo.weight: its inputs in the calibration have inf"):
        quantize_checkpoint(folder, tmp_path / "to", QUANTS["int4"], moments_of)
    (text := tmp_path / "text").write_text("As easy as it gets. " * 50)
    with pytest.raises(ValueError, match=r"nan: layers.1.feed_forward.experts.w2 has infinities or NaN"):
        calibrate(folder, text, QuantArgs(type="int4"))
    assert not (tmp_path / "to").exists()


@pytest.fixture
def files_to_refuse(case: Case, tmp_path: Path, small_tokenizer: Path) -> dict[str, Path]:
    hf = mixtral_to_quantize(1, hidden_size=96, intermediate_size=96)
    found = {name: tmp_path / name for name in ("full", "absent", "latin", "blank", "text", "new", "int8")}
    (found["full"]).mkdir()
    (found["full"] / "file").touch()
    found["latin"].write_bytes("Blätter\n".encode("latin-1"))
    found["blank"].write_text("\n\n")
    found["text"].write_text("As easy as it gets.\n")
    quantize_checkpoint(case.folders["base"], found["int8"], QUANTS["int8"])
    odd = write_checkpoint(tmp_path / "odd", hf, small_tokenizer, files=1)
    return {**found, "odd": odd, "base": case.folders["base"]}


@pytest.mark.parametrize(
    ("source", "destination", "text", "quant", "says"),
    [
        ("odd", "new", "text", "int4", "odd: 96 inputs of attention.wq.weight on a rank are not whole groups of 64"),
        ("odd", "new", "text", "int4", "(int4) and 4 more: int8 has no groups, and int4 those of 32, too"),
        ("int8", "new", "text", "int4", "int8 is quantized already (int8): give the weights it was made of"),
        ("base", "full", "text", "int4", "full exists already: remove it first or choose another destination"),
        ("base", "new", "absent", "int4", "absent"),
        ("base", "new", "latin", "int4", "latin is not UTF-8 (invalid continuation byte): convert it first"),
        ("base", "new", "blank", "int4", "blank has no text: give some like that which the model will meet"),
        (
            "base",
            "new",
            "text",
            "int8",
            "--calibrate guides the rounding of int4; int8 has none to guide: leave it out",
        ),
    ],
)
def test_calibration_is_refused_before_the_model_is_loaded(
    source: str,
    destination: str,
    text: str,
    quant: str,
    says: str,
    files_to_refuse: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(MetaModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    paths = [str(files_to_refuse[name]) for name in (source, destination, text)]
    assert main(["quantize", *paths[:2], "--quant", quant, "--calibrate", paths[2]]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not files_to_refuse["new"].exists()


def test_calibration_reads_the_beginning_of_a_text_alone(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "MOST_CHARACTERS", 1000)
    (text := tmp_path / "text").write_bytes(b"As easy as it gets. " * 5000 + b"\xff")
    found = calibrate(case.folders["base"], text, QuantArgs(type="int4"))
    (beginning := tmp_path / "beginning").write_bytes(text.read_bytes()[:1000])
    expected = calibrate(case.folders["base"], beginning, QuantArgs(type="int4"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].sums, expected[key].sums) for key in expected)


def test_calibration_sees_the_inputs_of_every_matrix(case: Case, tmp_path: Path) -> None:
    (text := tmp_path / "text").write_text("As easy as it gets. " * 500)
    found = calibrate(case.folders["base"], text, QuantArgs(type="int4"))
    visited = {(name, place[0]) for name, place in found if name.endswith(".w2")}
    for name, expert in visited:
        for half in (0, 1):
            assert (name.removesuffix("w2") + "w13", (expert, half)) in found
    layers = {name.split(".feed_forward")[0] for name, _ in visited}
    assert len(layers) == case.plain.config.num_hidden_layers
    dense = {name for name, place in found if place == ()}
    assert dense == {f"{layer}.attention.{matrix}.weight" for layer in layers for matrix in ("wq", "wk", "wv", "wo")}


def test_whatever_form_the_weights_have_they_become_the_same_bytes(small_tokenizer: Path, tmp_path: Path) -> None:
    config = small_config(n_layers=1, dim=64, hidden_dim=64, n_heads=4, n_kv_heads=2, head_dim=16)
    config["moe"] = {"num_experts": 2, "num_experts_per_tok": 2}
    base = tmp_path / "accessory"
    write_folder(base, random_tensors(config, 4), config, files=1, tokenizer=small_tokenizer)
    forms = ("accessory", "hf", "mistral", "gguf")
    for form in forms[1:]:
        convert(base, tmp_path / form, to=form)
    (tmp_path / "text").write_text("some words to look at, and some more of them. " * 20)
    for words in (["int8"], ["nf4"], ["int4"], ["int4", "--calibrate", str(tmp_path / "text")]):
        found = []
        for form in forms:
            out = tmp_path / f"{form}-{len(words)}-{words[0]}"
            assert main(["quantize", str(tmp_path / form), str(out), "--quant", *words]) == 0
            found.append((out / "consolidated.00-of-01.model.pth").read_bytes())
            assert Folder(out).stored_args().quant == QuantArgs(type=words[0])
        assert [own == found[0] for own in found] == [True] * len(forms), words
