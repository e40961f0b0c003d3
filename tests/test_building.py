"""A training model built piece by piece: the same as one that is loaded first and then sharded, in far less memory."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from checkpoints import random_tensors, small_config, write_folder
from ranks import alike, error_of, free_port
from test_checkpoint import meta_tensors
from test_gradients import released_names
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from accessory.checkpoint.containers import create_tensors
from accessory.config import ModelArgs
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained, load_transformer
from accessory.model.transformer import Transformer
from accessory.parallel.box import Box
from accessory.parallel.plan import parameter_shapes
from accessory.parallel.state import ParallelState, all_ranks
from accessory.tools.corpus import documentation_corpus, train_tokenizer
from accessory.train.build import build_for_training
from accessory.train.checkpointer import Checkpointer
from accessory.train.export import export_checkpoint
from accessory.train.init import ROUTER_STD, init_weights
from accessory.train.optim import adamw
from accessory.train.sharding import device_mesh, set_last_backward, shard_model
from accessory.train.trainer import train_step

# Hardly any axis divides by 3 or 4, and there are fewer experts and key/value heads than ranks.
ODD = small_config(
    dim=14,
    hidden_dim=10,
    head_dim=2,
    n_heads=4,
    n_kv_heads=2,
    vocab_size=386,
    moe={"num_experts_per_tok": 2, "num_experts": 2},
)
LAYOUTS = [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (3, 2, 1), (4, 1, 2), (6, 1, 2)]
KINDS = ("fsdp", "sdp", "ddp")


class Case(NamedTuple):
    """Folders that overlay one another, and the tensors that they hold together by the torrent release's names."""

    folders: list[Path]
    tensors: dict[str, Tensor]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(documentation_corpus(200_000), path, vocab_size=ODD["vocab_size"])
    return path


@pytest.fixture(scope="module")
def cases(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    where = tmp_path_factory.mktemp("building")
    first, other = (random_tensors(ODD, seed) for seed in (3, 4))
    over = {name: tensor for name, tensor in other.items() if "attention." in name or ".experts.1." in name}
    base = write_folder(where / "base", first, ODD, files=2, tokenizer=tokenizer)
    sparse = write_folder(where / "sparse", other, ODD, files=2, form="sparse", tokenizer=tokenizer)
    overlay = write_folder(where / "overlay", over, ODD, files=2, tokenizer=tokenizer)
    return {
        "base": Case([base], first),
        "sparse": Case([sparse], other),
        "overlay": Case([base, overlay], first | over),
    }


def placements_of(mp_size: int) -> tuple[str, ...]:
    return ("auto",) if mp_size == 1 else ("expert", "tensor")


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().full_tensor() for name, parameter in model.named_parameters()}


def build(pretrained: Pretrained, state: ParallelState, **settings: Any) -> Transformer:
    settings = {"data_parallel": "fsdp", "compute_dtype": torch.float32, **settings}
    return build_for_training(pretrained, state, device_mesh(state), **settings)


def compared_on_rank(
    folders: list[Path], mp_size: int, placement: str, ep_size: int
) -> tuple[list[dict[str, Tensor]], list[int]]:
    """Whole parameters as built in each way, and the sizes of this rank's pieces under FSDP."""
    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
    pretrained = Pretrained.resolve(folders, max_seq_len=64)
    found, pieces = [], []
    for kind in KINDS:
        built = build(pretrained, state, data_parallel=kind, expert_placement=placement)
        loaded = load_transformer(pretrained, state, dtype=torch.float32, expert_placement=placement)
        shard_model(loaded, device_mesh(state), data_parallel=kind)
        for (name, ours), (other, theirs) in zip(built.named_parameters(), loaded.named_parameters(), strict=True):
            assert name == other
            assert isinstance(ours, DTensor)
            assert isinstance(theirs, DTensor)
            assert ours.dtype == torch.float32
            assert ours.requires_grad
            assert ours.placements == theirs.placements, name
            assert torch.equal(ours.to_local(), theirs.to_local()), name
            if kind == "fsdp":
                pieces.append(ours.to_local().numel())
        found.append(whole(built))
    return found, pieces


@pytest.mark.parametrize("form", ["base", "sparse", "overlay"])
@pytest.mark.parametrize(("dp_size", "mp_size", "ep_size"), LAYOUTS)
def test_a_built_model_is_the_loaded_one_to_the_bit(
    dp_size: int, mp_size: int, ep_size: int, form: str, ranks: Any, cases: dict[str, Case]
) -> None:
    case = cases[form]
    for placement in placements_of(mp_size):
        results = ranks(dp_size * mp_size).run(compared_on_rank, case.folders, mp_size, placement, ep_size)
        for weights in alike([found for found, _ in results]):
            ours = released_names(weights)
            assert ours.keys() == case.tensors.keys()
            assert all(torch.equal(ours[name], tensor) for name, tensor in case.tensors.items())
        pieces = [sizes for _, sizes in results]
        if dp_size > 2:  # what this test is for
            assert any(len(set(sizes) - {0}) > 1 for sizes in zip(*pieces, strict=True)), "uneven pieces"
            assert any(0 in sizes for sizes in pieces), "empty pieces"


@pytest.mark.parametrize("length", range(6))
@pytest.mark.parametrize("size", range(1, 5))
def test_a_box_is_cut_as_torch_cuts(length: int, size: int) -> None:
    box = Box((7, 2), (length, 3))
    index = torch.arange(7, 7 + length)
    cut = [box.chunk(0, rank=rank, size=size) for rank in range(size)]
    pieces = [index[part.start[0] - 7 :][: part.size[0]] for part in cut]
    assert [piece.tolist() for piece in pieces if len(piece)] == [list(p) for p in index.chunk(size) if len(p)]
    assert all(part.start[1:] == (2,) and part.size[1:] == (3,) for part in cut)


@torch.no_grad()
def drawn(args: ModelArgs, seed: int) -> dict[str, Tensor]:
    """The initial weights as one process has always drawn them: parameter by parameter, in place."""
    model = Transformer(args, ParallelState.single("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0)
            continue
        std = 1.0 if "tok_embeddings" in name else ROUTER_STD if "gate" in name else parameter.shape[-1] ** -0.5
        scale = (2 * args.n_layers) ** -0.5 if name.endswith((".wo.weight", ".w2")) else 1.0
        parameter.normal_(0.0, std * scale, generator=generator)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def untrained(config: Path, tokenizer: Path) -> Pretrained:
    return Pretrained.untrained(llama_config=config, tokenizer_path=tokenizer, max_seq_len=64)


def initial_on_rank(
    config: Path, tokenizer: Path, mp_size: int, placement: str, ep_size: int
) -> list[dict[str, Tensor]]:
    state = ParallelState.init(mp_size, "cpu", ep_size=ep_size)
    pretrained = untrained(config, tokenizer)
    found = [whole(build(pretrained, state, data_parallel=kind, expert_placement=placement, seed=9)) for kind in KINDS]
    # Weights before sharding, of a rank that holds its slices.
    llma = Transformer(pretrained.args, state, expert_placement=placement)
    init_weights(llma, seed=9)
    shard_model(llma, device_mesh(state))
    return [*found, whole(llma)]


@pytest.fixture(scope="module")
def config(cases: dict[str, Case]) -> Path:
    return cases["base"].folders[0] / "config.json"


@pytest.mark.parametrize(("dp_size", "mp_size", "ep_size"), LAYOUTS)
def test_initial_weights_do_not_depend_on_the_ranks(
    dp_size: int, mp_size: int, ep_size: int, ranks: Any, config: Path, tokenizer: Path
) -> None:
    expected = drawn(untrained(config, tokenizer).args, 9)
    for placement in placements_of(mp_size):
        where = (config, tokenizer, mp_size, placement, ep_size)
        for weights in alike(ranks(dp_size * mp_size).run(initial_on_rank, *where)):
            assert weights.keys() == expected.keys()
            assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_initial_weights_of_a_single_process_are_what_they_were(config: Path, tokenizer: Path) -> None:
    args = untrained(config, tokenizer).args
    model = Transformer(args, ParallelState.single("cpu"))
    init_weights(model, seed=5)
    expected = drawn(args, 5)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama_config": None}, "llama_config is not given"),
        ({"tokenizer_path": None}, "tokenizer_path is not given"),
        ({"llama_type": "gpt"}, "'gpt' is unknown"),
        ({"max_seq_len": 2}, "max_seq_len must be"),
    ],
)
def test_what_a_model_without_checkpoint_needs(
    changes: dict[str, Any], message: str, config: Path, tokenizer: Path
) -> None:
    settings = {"llama_config": config, "tokenizer_path": tokenizer, **changes}
    with pytest.raises(ValueError, match=message):
        Pretrained.untrained(**settings)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**ODD, "vocab_size": 384}))
    with pytest.raises(ValueError, match="has 386 tokens, the model's vocab_size is only 384"):
        untrained(config, tokenizer)


def rows_of(state: ParallelState, vocabulary: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    """This rank's part of some examples and labels."""
    examples = torch.randint(3, vocabulary, (rows, 12), generator=torch.Generator().manual_seed(1))
    own = examples.tensor_split(state.dp_size)[state.dp_rank]
    return own, own


def trained_on_rank(folder: Path, mp_size: int, kind: Any) -> list[tuple[Any, ...]]:
    """Loss, norm and weights after a step of a built and of a loaded model."""
    state = ParallelState.init(mp_size, "cpu")
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    loaded = load_transformer(pretrained, state, dtype=torch.float32)
    shard_model(loaded, device_mesh(state), data_parallel=kind)
    found = []
    for llma in (build(pretrained, state, data_parallel=kind), loaded):
        model = MetaModel(llma, pretrained.tokenizer).train()
        optimizer = adamw(model.named_parameters(), lr=1.0, weight_decay=0.1)
        rows = rows_of(state, pretrained.args.vocab_size)
        result = train_step(model, optimizer, [rows, rows], lr=1e-2, clip_grad=0.5)
        found.append((result.loss, result.grad_norm, whole(llma)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_built_model_trains_as_the_loaded_one(kind: str, ranks: Any, cases: dict[str, Case]) -> None:
    for built, loaded in ranks(4).run(trained_on_rank, cases["base"].folders[0], 2, kind):
        alike([built, loaded])


def prepared_on_rank(folder: Path, kind: str) -> tuple[list[str], list[str]]:
    """What before_sharding is given; and the parameters that train behind it."""
    state = ParallelState.init(1, "cpu")
    seen = []

    def freeze(llma: Transformer) -> None:
        for name, parameter in llma.named_parameters():
            seen.append(f"{type(parameter).__name__} on {parameter.device}")
            parameter.requires_grad_(name.endswith("norm.weight"))

    llma = build(Pretrained.resolve(folder, max_seq_len=64), state, data_parallel=kind, before_sharding=freeze)
    logits, _ = llma(rows_of(state, 386)[0])
    logits.square().sum().backward()
    trained = [name for name, parameter in llma.named_parameters() if parameter.grad is not None]
    assert trained == [name for name, parameter in llma.named_parameters() if parameter.requires_grad]
    return seen, trained


@pytest.mark.parametrize("kind", KINDS)
def test_before_sharding_there_are_no_weights_yet(kind: str, ranks: Any, cases: dict[str, Case]) -> None:
    for seen, trained in ranks(2).run(prepared_on_rank, cases["base"].folders[0], kind):
        assert set(seen) == {"Parameter on meta"}
        assert len(trained) == 2 * 2 + 1
        assert all("norm" in name for name in trained)


def refused_on_rank(folders: list[Path], mp_size: int) -> list[tuple[str, str]]:
    """Errors of a folder that is damaged where the last rank reads, and of calls that differ or cannot be served."""
    state, last = ParallelState.init(mp_size, "cpu"), dist.get_rank() == dist.get_world_size() - 1
    pretrained = Pretrained.resolve(folders[last], max_seq_len=64)
    sound = Pretrained.resolve(folders[0], max_seq_len=64)

    def fail(llma: Transformer) -> None:
        if last:
            raise ValueError("not on this rank")

    larger = dataclasses.replace(sound, args=sound.args.replace(hidden_dim=12))
    return [
        error_of(build, pretrained, state),
        error_of(build, larger, state),
        error_of(build, sound, state, before_sharding=fail),
        error_of(build, sound, state, seed=int(last)),
        error_of(build, sound, state, data_parallel="zero"),
    ]


@pytest.mark.parametrize(("dp_size", "mp_size"), [(2, 1), (2, 2)])
def test_what_fails_on_one_rank_fails_on_all_alike(
    dp_size: int, mp_size: int, ranks: Any, cases: dict[str, Case], tmp_path: Path
) -> None:
    folder = cases["base"].folders[0]
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    victim = damaged / "consolidated.01-of-02.model.pth"
    victim.write_bytes(victim.read_bytes()[:-2000])
    results = ranks(dp_size * mp_size).run(refused_on_rank, [folder, damaged], mp_size)
    (kind, text), larger, failing, differing, unknown = alike(results)
    assert kind == "CheckpointError"
    assert f"{victim} " in text
    assert "is damaged" in text
    assert larger[0] == "CheckpointError"
    assert "has shape (10, 14), config and tokenizer ask for (12, 14)" in larger[1]
    assert failing == ("ValueError", "not on this rank")
    assert "different arguments" in differing[1]
    assert unknown == ("ValueError", "data_parallel is 'zero': give one of fsdp, sdp, ddp")


def held_back_on_rank(folder: Path, kind: str, dtype: torch.dtype) -> tuple[list[bool], list[dict[str, Tensor]]]:
    """Whether there are gradients after each of three passes; and those after the last, reduced once and each time."""
    state = ParallelState.init(1, "cpu")
    found, there = [], []
    for once in (True, False):
        llma = build(Pretrained.resolve(folder, max_seq_len=64), state, data_parallel=kind, compute_dtype=dtype)
        for part in range(3):
            if once:
                set_last_backward(llma, last=part == 2)
            tokens = rows_of(state, 386, rows=6)[0][part : part + 1]
            llma(tokens)[0].float().square().sum().backward()
            if once:
                there.append(all(parameter.grad is not None for parameter in llma.parameters()))
        found.append({name: parameter.grad.full_tensor() for name, parameter in llma.named_parameters()})  # type: ignore[union-attr]
    return there, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_step_can_be_reduced_once(
    kind: str, dtype: torch.dtype, ranks: Any, cases: dict[str, Case]
) -> None:
    results = ranks(2).run(held_back_on_rank, cases["base"].folders[0], kind, dtype)
    there, (once, each) = alike(results)
    assert there == [kind != "ddp", kind != "ddp", True]
    for name, gradient in each.items():
        assert (once[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), name


def saved_on_rank(folder: Path, output: Path) -> list[tuple[float, float, dict[str, Tensor]]]:
    """The step after a "ddp" model was saved: of itself, and of models that go on from its state."""
    state = ParallelState.init(2, "cpu")
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    store = Checkpointer(output, state, all_ranks())
    found = []
    for kind in ("ddp", "ddp", "fsdp"):
        llma = build(pretrained, state, data_parallel=kind)
        model = MetaModel(llma, pretrained.tokenizer).train()
        optimizer = adamw(model.named_parameters(), lr=1.0, weight_decay=0.1)
        rows = rows_of(state, pretrained.args.vocab_size)
        if not found:
            train_step(model, optimizer, [rows], lr=1e-2, clip_grad=0.5)
            store.save(model, optimizer, {"step": 1}, "step-1", asynchronous=False)
            export_checkpoint(model, output / "epoch0", dtype=torch.float32)
            exported = Pretrained.resolve(output / "epoch0", max_seq_len=64)
            alone = load_transformer(exported, ParallelState.single("cpu"), dtype=torch.float32)
            assert all(torch.equal(whole(llma)[name], parameter) for name, parameter in alone.named_parameters())
        else:
            assert store.load(output / "step-1", model, optimizer) == {"step": 1}
        result = train_step(model, optimizer, [rows], lr=1e-2, clip_grad=0.5)
        found.append((result.loss, result.grad_norm, whole(llma)))
    return found


def test_a_ddp_model_is_saved_and_exported(ranks: Any, cases: dict[str, Case], tmp_path: Path) -> None:
    itself, again, sharded = alike(ranks(4).run(saved_on_rank, cases["base"].folders[0], tmp_path))
    alike([itself, again])
    assert sharded[:2] == pytest.approx(itself[:2], rel=1e-6)
    for name, weight in itself[2].items():
        assert (sharded[2][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


class Memory(NamedTuple):
    """Bytes: a rank's parameters, and the private memory that building them took at its peak."""

    own: int
    peak: int


def measured_on_rank(rank: int, port: int, pretrained: Pretrained, small: Pretrained, kind: str) -> Memory:
    """Build in a fresh process, one of two; a small model first, for whatever is made once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    state = ParallelState.init(1, "cpu")
    build(small, state, data_parallel=kind)
    start = rss_anon()
    with peak_of(rss_anon) as peak:
        llma = build(pretrained, state, data_parallel=kind)
    own = sum(4 * parameter.to_local().numel() for parameter in llma.parameters())
    dist.destroy_process_group()
    return Memory(own, peak[0] - start)


@contextlib.contextmanager
def peak_of(function: Callable[[], int]) -> Iterator[list[int]]:
    """The largest value that a function gives while the block runs, asked every other millisecond."""
    done, values = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            values[0] = max(values[0], function())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield values
    finally:
        done.set()
        watcher.join()
        values[0] = max(values[0], function())


def rss_anon() -> int:
    """Bytes of this process's private memory, without the pages of mapped files."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


@pytest.fixture(scope="module")
def large(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 300 MB in bfloat16, twice that in float32."""
    sizes: dict[str, Any] = {"dim": 1024, "hidden_dim": 2048, "head_dim": 64, "n_layers": 3, "vocab_size": 386}
    config = small_config(**sizes)
    folder = tmp_path_factory.mktemp("large")
    tensors = {name: (tuple(tensor.shape), torch.bfloat16) for name, tensor in meta_tensors(config).items()}
    create_tensors(folder / "consolidated.00.pth", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("kind", "trained"), [("fsdp", True), ("fsdp", False), ("ddp", True)])
def test_building_takes_little_more_memory_than_what_stays(
    kind: str, trained: bool, large: Path, config: Path, tokenizer: Path
) -> None:
    small = untrained(config, tokenizer)
    pretrained = Pretrained.resolve(large) if trained else untrained(large / "config.json", tokenizer)
    copy = sum(4 * math.prod(shape) for _, shape in parameter_shapes(pretrained.args))
    largest = max(4 * math.prod(shape) for _, shape in parameter_shapes(pretrained.args))
    port = free_port()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        arguments = [(rank, port, pretrained, small, kind) for rank in range(2)]
        ranks = pool.starmap(measured_on_rank, arguments, chunksize=1)
    assert copy > 600e6
    for own, peak in ranks:
        assert own == pytest.approx(copy if kind == "ddp" else copy / 2, rel=0.01)
        # Without a checkpoint a rank draws one whole parameter after another.
        allowed = 1.05 * own + 20e6 + (0 if trained else largest)
        assert peak < allowed, f"{peak / 1e6:.0f} MB for {own / 1e6:.0f} MB of parameters"
        assert kind == "ddp" or allowed < 0.9 * copy
