"""Groups and ranks of a model, and how its ranks agree on failures."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import random_tensors, small_config, write_folder
from ranks import error_of
from torch.distributed.device_mesh import DeviceMesh

from accessory.errors import CheckpointError
from accessory.model.meta import MetaModel
from accessory.parallel.state import ParallelState, check_device, pick_device, raised_on_all_ranks


def test_single():
    state = ParallelState.single("cpu")
    assert (state.mp_group, state.mp_rank, state.mp_size) == (None, 0, 1)
    assert (state.dp_group, state.dp_rank, state.dp_size) == (None, 0, 1)
    assert state.is_first
    assert state.device == torch.device("cpu")
    assert ParallelState.from_group(None, "cpu") == state


def test_a_process_alone_raises_its_own_error():
    state = ParallelState.single("cpu")
    state.agree(None, "anything")
    failure = CheckpointError("broken")
    with pytest.raises(CheckpointError, match="broken") as caught:
        state.agree(failure)
    assert caught.value is failure
    assert not raised_on_all_ranks(failure)


def test_pick_device():
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    if not torch.cuda.is_available():
        assert pick_device() == torch.device("cpu")
        for device in ("cuda", "cuda:3", torch.device("cuda", 1)):
            with pytest.raises(ValueError, match="PyTorch sees no CUDA device"):
                pick_device(device)
    for device in ("abacus", "meta", 1.5):
        with pytest.raises(ValueError, match="is unknown: give cpu, cuda or cuda:N"):
            pick_device(device)


@pytest.mark.parametrize(("cards", "known"), [(1, "cuda:0"), (3, "cuda:0 to cuda:2")])
def test_a_card_beyond_those_of_the_host(cards: int, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    assert check_device(f"cuda:{cards - 1}") == torch.device("cuda", cards - 1)
    for device in (f"cuda:{cards}", torch.device("cuda", cards)):
        with pytest.raises(ValueError, match=f"device cuda:{cards} was asked for, but PyTorch sees only {known}: give"):
            pick_device(device)


# -- ParallelState.init


def layout(mp_size: int) -> dict[str, Any]:
    """This rank's place, sums over its groups, and the same groups through a mesh."""
    state = ParallelState.init(mp_size, "cpu", timeout=timedelta(minutes=50))
    assert state.mp_group is not None
    assert state.dp_group is not None
    for group in (state.mp_group, state.dp_group):
        assert group._get_backend(state.device).options._timeout == timedelta(minutes=50)
    rank = dist.get_rank()
    ranks_of = {"mp": dist.get_process_group_ranks(state.mp_group), "dp": dist.get_process_group_ranks(state.dp_group)}
    sums = {}
    for name, group in (("mp", state.mp_group), ("dp", state.dp_group)):
        total = torch.tensor(10**rank)
        dist.all_reduce(total, group=group)
        sums[name] = int(total)
    world = dist.get_world_size()
    whole = torch.arange(world).view(world // mp_size, mp_size)
    mesh = DeviceMesh.from_group([state.dp_group, state.mp_group], "cpu", mesh=whole, mesh_dim_names=("dp", "mp"))
    total = torch.tensor(10**rank)
    dist.all_reduce(total, group=mesh["mp"].get_group())
    return {
        "place": (state.dp_rank, state.dp_size, state.mp_rank, state.mp_size),
        "coordinate": tuple(mesh.get_coordinate()),
        "groups": ranks_of,
        "sums": sums,
        "mesh_sum": int(total),
        "first": state.is_first,
    }


@pytest.mark.parametrize("mp_size", [1, 2, 4])
def test_init_lays_out_groups(mp_size, ranks):
    world, dp_size = 4, 4 // mp_size
    for rank, found in enumerate(ranks(world).run(layout, mp_size)):
        dp_rank, mp_rank = divmod(rank, mp_size)
        peers = {"mp": [dp_rank * mp_size + i for i in range(mp_size)], "dp": list(range(mp_rank, world, mp_size))}
        assert found["place"] == (dp_rank, dp_size, mp_rank, mp_size)
        assert found["coordinate"] == (dp_rank, mp_rank)
        assert found["groups"] == peers
        assert found["sums"] == {name: sum(10**peer for peer in group) for name, group in peers.items()}
        assert found["mesh_sum"] == found["sums"]["mp"]
        assert found["first"] == (mp_rank == 0)


def unflattened(mp_size: int, ep_size: int) -> tuple[tuple[int, ...], dict[str, list[int]]]:
    """This rank's place along (efsdp, ep, mp), and its peers along each axis of more than one rank."""
    state = ParallelState.init(mp_size, "cpu", timeout=timedelta(minutes=50), ep_size=ep_size)
    axes = {"efsdp": state.efsdp, "ep": state.ep, "mp": state.mp}
    peers = {}
    for name, axis in axes.items():
        if axis.size > 1:
            assert axis.group is not None
            assert axis.group._get_backend(state.device).options._timeout == timedelta(minutes=50)
            peers[name] = dist.get_process_group_ranks(axis.group)
            assert (axis.rank, axis.size) == (peers[name].index(dist.get_rank()), len(peers[name]))
    assert state.dp.rank == state.efsdp.rank * ep_size + state.ep.rank
    return tuple(axis.rank for axis in axes.values()), peers


def test_experts_have_a_mesh_of_three_axes(ranks):
    """The picture in ParallelState's docstring is that of eight ranks."""
    found = ranks(4).run(unflattened, 1, 2)
    assert [place for place, _ in found] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert found[1][1] == {"efsdp": [1, 3], "ep": [0, 1]}
    assert found[2][1] == {"efsdp": [0, 2], "ep": [2, 3]}
    found = ranks(4).run(unflattened, 2, 2)
    assert [place for place, _ in found] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert found[1][1] == {"ep": [1, 3], "mp": [0, 1]}
    found = ranks(8).run(unflattened, 2, 2)
    assert [place for place, _ in found] == [(i, j, k) for i in range(2) for j in range(2) for k in range(2)]
    assert found[6][1] == {"efsdp": [2, 6], "ep": [4, 6], "mp": [6, 7]}


def init_error(mp_size: int, ep_size: int = 1) -> tuple[str, str]:
    return error_of(ParallelState.init, mp_size, "cpu", ep_size=ep_size)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        *(((size,), f"model_parallel_size {size} does not divide the number of processes, 4") for size in (3, 8, 0)),
        *(((1, size), f"expert_parallel_size {size} does not divide the number of data-") for size in (3, 8, 0)),
        (
            (2, 4),
            "expert_parallel_size 4 does not divide the number of data-parallel ranks, 2 (processes: 4, ",
        ),
    ],
)
def test_init_refuses_sizes_that_do_not_divide(sizes, message, ranks):
    for kind, text in ranks(4).run(init_error, *sizes):
        assert kind == "ValueError"
        assert message in text


# -- from_group


def place_in_pair(pair: list[int]) -> tuple[Any, ...]:
    group = dist.new_group(pair)
    if dist.get_rank() not in pair:
        return error_of(ParallelState.from_group, group)
    state = ParallelState.from_group(group)
    return state.mp_rank, state.mp_size, state.dp_rank, state.dp_size, state.device.type


def test_from_group_refuses_strangers(ranks):
    found = ranks(4).run(place_in_pair, [1, 3])
    assert [found[1], found[3]] == [(0, 2, 0, 1, "cpu"), (1, 2, 0, 1, "cpu")]
    for kind, message in (found[0], found[2]):
        assert kind == "ValueError"
        assert "mp_group does not contain this rank: only its members may load the model" in message


# -- agree


class OwnError(CheckpointError):
    """A type that peers do not know by name, but whose base they do."""


def unreadable_json() -> Exception:
    try:
        json.loads("{")
    except ValueError as error:
        return error
    raise AssertionError


FAILURES: dict[str, dict[int, Exception]] = {
    "none": {},
    "one of its kind": {2: CheckpointError("file 2 is broken")},
    "file": {0: FileNotFoundError("no such file")},
    "the first rank's": {1: ValueError("first"), 3: CheckpointError("second")},
    "with an errno": {3: OSError(28, "No space left on device")},
    "a known base": {1: PermissionError(13, "Permission denied", "x.pth"), 2: KeyError("y")},
    "a base of ours": {3: OwnError("own")},
    "a base of theirs": {0: unreadable_json()},
    "unknown": {2: ZeroDivisionError("division by zero")},
}


def agreed_error(name: str) -> tuple[str, str, bool]:
    state = ParallelState.from_group(dist.group.WORLD)
    own = FAILURES[name].get(dist.get_rank())
    try:
        state.agree(own, "same request")
    except Exception as error:
        return type(error).__name__, str(error), raised_on_all_ranks(error)
    return "", "", False


@pytest.mark.parametrize(
    ("name", "failing", "own", "others", "message"),
    [
        ("none", None, "", "", ""),
        ("one of its kind", 2, "CheckpointError", "CheckpointError", "file 2 is broken"),
        ("file", 0, "FileNotFoundError", "FileNotFoundError", "no such file"),
        ("the first rank's", 1, "ValueError", "ValueError", "first"),
        ("with an errno", 3, "OSError", "OSError", "[Errno 28] No space left on device"),
        ("a known base", 1, "PermissionError", "OSError", "[Errno 13] Permission denied: 'x.pth'"),
        ("a base of ours", 3, "OwnError", "CheckpointError", "own"),
        ("a base of theirs", 0, "JSONDecodeError", "ValueError", "Expecting property name"),
        ("unknown", 2, "ZeroDivisionError", "RuntimeError", "division by zero"),
    ],
)
def test_all_ranks_raise_what_the_first_failing_one_met(name, failing, own, others, message, ranks):
    found = ranks(4).run(agreed_error, name)
    for rank, (kind, text, together) in enumerate(found):
        assert kind == (own if rank == failing else others)
        assert text.startswith(message)
        assert together == bool(kind)
    assert len({text for _, text, _ in found}) == 1


def differing_error(requests: list[Any]) -> tuple[str, str]:
    state = ParallelState.from_group(dist.group.WORLD)
    return error_of(state.agree, None, requests[dist.get_rank()])


def test_requests_that_differ(ranks):
    for error in ranks(4).run(differing_error, ["a", "b", "a", "c"]):
        assert error[0] == "ValueError"
        assert "the ranks were given different arguments: rank(s) [1, 3] differ from rank 0" in error[1]
        assert "same call with the same prompts and settings" in error[1]
    # What is written differently is different: 1 and 1.0, "1" and 1.
    for requests in ([1, 1.0, 1, 1], ["1", 1, "1", "1"], [("a",), ["a"], ("a",), ("a",)]):
        assert {kind for kind, _ in ranks(4).run(differing_error, requests)} == {"ValueError"}
    same: dict[str, Any] = {"prompts": ["a"], "top_p": 0.5}
    assert set(ranks(4).run(differing_error, [dict(same) for _ in range(4)])) == {("", "")}


# -- a whole model on each rank


def whole_model(folder: Path) -> tuple[int, str]:
    """Each rank loads by itself; rank 1 generates more often than rank 0, which would hang if they were a group."""
    model = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32", mp_group=None)
    for _ in range(dist.get_rank()):
        model.generate(["something else"], max_gen_len=3)
    text = model.generate([["a list", "the"][dist.get_rank()]], max_gen_len=8)[0]
    return sum(parameter.numel() for parameter in model.parameters()), text


def test_no_group_means_the_whole_model_in_an_initialised_world(ranks, small_tokenizer, tmp_path):
    config = small_config(n_layers=1)
    tensors = random_tensors(config, 3)
    folder = write_folder(tmp_path / "c", tensors, config, files=2, tokenizer=small_tokenizer)
    alone = MetaModel.from_pretrained(folder, max_seq_len=64, dtype="fp32")
    texts = alone.generate(["a list", "the"], max_gen_len=8)
    count = sum(tensor.numel() for tensor in tensors.values())
    assert ranks(2).run(whole_model, folder) == [(count, texts[0]), (count, texts[1])]
