"""The Transformer's parts and promises: parameters and their slices, rotary embedding, cache, compiled decoding."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import random_mixtral, random_prompts, write_checkpoint
from models import completions, load
from ranks import RankPool
from torch import Tensor
from torch._subclasses import FakeTensorMode

from accessory.config import ModelArgs, MoEArgs, PeftArgs, QuantArgs
from accessory.kernels.steps import rotate_reference
from accessory.kernels.triton import products
from accessory.model import graphs
from accessory.model.cache import KVCache
from accessory.model.factory import build_transformer
from accessory.model.norm import RMSNorm
from accessory.model.rope import RotaryTable
from accessory.model.transformer import Transformer
from accessory.parallel.placement import resolve_placement, supported_sizes
from accessory.parallel.plan import TABLE, Box, local_box, local_boxes, parameter_shapes, split_of
from accessory.parallel.state import ParallelState, Place, Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]
CPU = torch.device("cpu")


def args_of(**changes: Any) -> ModelArgs:
    sizes: dict[str, Any] = {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 24,
        "n_kv_heads": 8,
        "head_dim": 6,
        "hidden_dim": 72,
        "vocab_size": 96,
        "max_seq_len": 64,
        "moe": MoEArgs(num_experts=8, num_experts_per_tok=2),
    }
    return ModelArgs(**{**sizes, **changes})


# --- parameters


def state_of(rank: int, size: int) -> ParallelState:
    """A rank's place among others that do not exist: enough to build its part of a model."""
    return ParallelState(mp=Ranks(None, rank, size), device=torch.device("cpu"))


def test_names_of_the_parameters_are_frozen() -> None:
    """A checkpoint's keys and the plan's rows hang on them."""
    model = Transformer(args_of(n_layers=1), state_of(0, 1), device=torch.device("meta"))
    assert list(model.state_dict()) == [
        "tok_embeddings.weight",
        "layers.0.attention.wq.weight",
        "layers.0.attention.wk.weight",
        "layers.0.attention.wv.weight",
        "layers.0.attention.wo.weight",
        "layers.0.feed_forward.gate.weight",
        "layers.0.feed_forward.experts.w13",
        "layers.0.feed_forward.experts.w2",
        "layers.0.attention_norm.weight",
        "layers.0.ffn_norm.weight",
        "norm.weight",
        "output.weight",
    ]


SPLITS = {
    "mixtral": (args_of(), (1, 2, 3, 4, 6, 8, 12, 24)),
    "one kv head": (args_of(n_kv_heads=1), (1, 2, 3, 4, 6, 8)),
    "all kv heads": (args_of(n_kv_heads=24, moe=MoEArgs(num_experts=6, num_experts_per_tok=3)), (1, 2, 3, 4, 6, 8)),
    "prime experts": (args_of(moe=MoEArgs(num_experts=7, num_experts_per_tok=1)), (1, 2, 4, 8)),
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_rank_holds_what_the_plan_says(name: str) -> None:
    args, counts = SPLITS[name]
    shapes = dict(parameter_shapes(args))
    for size in counts:
        for placement in ("expert", "tensor"):
            if size not in supported_sizes(args, placement):
                continue
            covered = {key: torch.zeros(shape, dtype=torch.int32) for key, shape in shapes.items()}
            for rank in range(size):
                model = Transformer(args, state_of(rank, size), expert_placement=placement, device=torch.device("meta"))
                held = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
                boxes = {
                    key: local_box(key, shape, args, placement=placement, rank=rank, size=size)  # type: ignore[arg-type]
                    for key, shape in shapes.items()
                }
                assert held == {key: box.size for key, box in boxes.items()}
                for key, box in boxes.items():
                    covered[key][box.within(Box.whole(shapes[key]))] += 1
            for key, times in covered.items():
                # Each element lies on one rank, replicated ones on all, and a kv head on as many as share it.
                expected = copies(key, args, size, placement)
                assert (times == expected).all(), (key, size, placement)


def copies(key: str, args: ModelArgs, size: int, placement: str) -> int:
    """On how many ranks an element of a parameter lies, by the design's table."""
    if "norm" in key or ".gate." in key:
        return size
    if ".wk." in key or ".wv." in key:
        return max(1, size // args.n_kv_heads)
    return 1


def test_the_splits_counts_are_what_the_plan_supports() -> None:
    assert supported_sizes(args_of()) == [1, 2, 4, 8, 24]
    assert supported_sizes(args_of(), "expert") == [1, 2, 4, 8]
    assert supported_sizes(args_of(), "tensor") == [1, 2, 4, 8, 24]
    assert supported_sizes(args_of(n_kv_heads=1, hidden_dim=71), "auto") == [1, 2, 4, 8]
    assert supported_sizes(args_of(n_kv_heads=24, moe=MoEArgs(num_experts=6)), "expert") == [1, 2, 3, 6]


@pytest.mark.parametrize(
    ("placement", "cut"),
    # The part of w13, (8 experts, 2, hidden 64, dim 48), at each place along (ep, mp).
    [
        ("expert", {(0, 0): ([0, 2], [0, 64]), (0, 1): ([2, 4], [0, 64]), (1, 0): ([4, 6], [0, 64])}),
        ("tensor", {(0, 0): ([0, 4], [0, 32]), (0, 1): ([0, 4], [32, 64]), (1, 0): ([4, 8], [0, 32])}),
    ],
)
def test_experts_are_cut_along_two_axes_of_the_mesh(placement: Any, cut: dict[tuple[int, int], Any]) -> None:
    args, name = args_of(n_layers=1, hidden_dim=64), "layers.0.feed_forward.experts.w13"
    for (ep, mp), (experts, hidden) in cut.items():
        state = ParallelState(mp=Ranks(None, mp, 2), ep=Ranks(None, ep, 2), device=torch.device("cpu"))
        boxes = local_boxes(args, state, placement=placement)
        assert [[start, start + size] for start, size in zip(boxes[name].start, boxes[name].size, strict=True)] == [
            experts,
            [0, 2],
            hidden,
            [0, 48],
        ]
        model = Transformer(args, state, expert_placement=placement, device=torch.device("meta"))
        assert {key: tuple(own.shape) for key, own in model.named_parameters()} == {
            key: box.size for key, box in boxes.items()
        }
    for row in TABLE:
        assert row.mesh == (("efsdp", "ep", "mp") if ".experts." in row.pattern else ("dp", "mp"))
        assert (row.axis(placement, "ep") == 0) == (".experts." in row.pattern)


def test_a_parameter_without_a_row_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"no row for parameter layers\.0\.attention\.wz\.weight"):
        split_of("layers.0.attention.wz.weight")


@pytest.mark.parametrize(
    ("changes", "placement", "size", "message"),
    [
        ({}, "auto", 3, r"over 3 ranks: n_kv_heads 8 and 3 do not divide one another.*work: 1, 2, 4, 8, 24$"),
        ({}, "auto", 5, r"dim 48 is not a multiple of 5; n_heads 24 is.*work: 1, 2, 4, 8, 24$"),
        ({}, "expert", 24, r'8 experts are not a multiple of 24 \(expert_placement "expert"\).*work: 1, 2, 4, 8$'),
        ({"hidden_dim": 6}, "tensor", 4, r"hidden_dim 6 is not a multiple of 4.*work: 1, 2$"),
        ({"hidden_dim": 6}, "auto", 24, r"neither 8 experts nor hidden_dim 6 are a multiple of 24.*work: 1, 2, 4, 8$"),
        ({"vocab_size": 97}, "auto", 2, r"vocab_size 97 is not a multiple of 2.*work: 1$"),
        ({}, "somewhere", 2, r"expert_placement 'somewhere' is unknown: choose from auto, expert, tensor$"),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_can(
    changes: dict[str, Any], placement: str, size: int, message: str
) -> None:
    args = args_of(**changes)
    with pytest.raises(ValueError, match=message):
        resolve_placement(args, placement, size)
    with pytest.raises(ValueError, match=message):
        Transformer(args, state_of(0, size), expert_placement=placement, device=torch.device("meta"))


@pytest.mark.parametrize(
    ("changes", "placement", "sizes", "message"),
    [
        ({}, "auto", (1, 3), "expert_parallel_size 3 does not divide the 8 experts of a layer: give one of 1, 2, 4, 8"),
        ({}, "tensor", (2, 16), "expert_parallel_size 16 does not divide the 8 experts of a layer: give one of 1, 2, "),
        ({}, "expert", (4, 4), r"size 4 x model_parallel_size 4 does not divide .*, or expert_placement \"tensor\"$"),
        ({"hidden_dim": 6}, "auto", (4, 4), "nor model_parallel_size 4 their hidden_dim 6: give others$"),
    ],
)
def test_experts_that_cannot_be_spread(
    changes: dict[str, Any], placement: str, sizes: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_placement(args_of(**changes), placement, sizes[0], ep_size=sizes[1])


def test_auto_prefers_whole_experts() -> None:
    assert [resolve_placement(args_of(), "auto", 4, ep_size=size) for size in (2, 4)] == ["expert", "tensor"]
    assert [resolve_placement(args_of(), "auto", size) for size in (1, 2, 8, 24)] == ["expert"] * 3 + ["tensor"]
    six = args_of(n_kv_heads=24, moe=MoEArgs(num_experts=6))
    assert [resolve_placement(six, "auto", size) for size in (3, 4, 6)] == ["expert", "tensor", "expert"]


# --- rotary embedding and norm


@pytest.mark.parametrize(("theta", "scaling"), [(1e6, None), (1e4, 0.25), (1e4, 2.0), (2**64, None)])
def test_rotation_is_a_complex_product(theta: float, scaling: float | None) -> None:
    """Channel pair i of a token at position p turns by p * scaling * theta ** (-2i / h)."""
    tokens, heads, width = 7, 3, 10
    positions = torch.tensor([0, 1, 2, 50, 999, 3, 3])
    x = torch.randn(tokens, heads, width, generator=torch.Generator().manual_seed(0))
    table = RotaryTable(width, 1000, theta=theta, scaling=scaling, device=CPU)
    angles = torch.outer(
        positions.double() * (scaling or 1), float(theta) ** (-torch.arange(0, width, 2).double() / width)
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(rotate_reference(x, table(positions)), expected.float(), atol=1e-5, rtol=1e-5)
    # In bfloat16 the turning itself is still done in float32.
    turned = rotate_reference(x.bfloat16(), table(positions))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate_reference(x.bfloat16().float(), table(positions)).bfloat16())


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 8, generator=generator)
    table = RotaryTable(8, 200, theta=1e4, scaling=None, device=CPU)

    def score(query_at: int, key_at: int) -> float:
        turned = (rotate_reference(x[None], table(torch.tensor([at]))) for x, at in ((q[0], query_at), (k[0], key_at)))
        a, b = turned
        return float((a * b).sum())

    assert score(13, 4) == pytest.approx(score(113, 104), abs=1e-4)
    assert score(13, 4) != pytest.approx(score(13, 5), abs=1e-3)


def test_norm_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(4, 1e-5, Place(torch.float32, CPU))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        # Squares 1, 1, 49, 49: mean 25, root 5.
        torch.testing.assert_close(
            norm(torch.tensor([1.0, -1.0, 7.0, -7.0])), torch.tensor([0.2, -0.4, 4.2, -5.6]), atol=1e-5, rtol=0
        )


# --- cache


def cache_of(slots: int, max_seq_len: int) -> KVCache:
    return KVCache(
        layers=1, slots=slots, max_seq_len=max_seq_len, kv_heads=1, head_dim=2, dtype=torch.float32, device=CPU
    )


def test_bound_is_the_least_block_that_holds_the_next_token() -> None:
    cache = cache_of(3, 1000)
    assert cache.bound == 64
    cache.extend([0, 2], [5, 9])
    assert cache.bound == 64
    cache.extend([1], [63])  # the next token goes to place 63, the last of the block
    assert cache.bound == 64
    cache.extend([1], [1])
    assert cache.bound == 128
    cache.free(1)
    assert cache.bound == 64
    cache.extend([2], [951])
    assert cache.bound == 1000  # not 1024: the cache ends there
    cache.extend([2], [40])
    assert (cache.length(2), cache.bound) == (1000, 1000)


def test_a_cache_shorter_than_a_block_is_read_whole() -> None:
    assert cache_of(1, 10).bound == 10


def test_a_model_makes_a_cache_of_its_own_heads() -> None:
    for size, kv_heads in ((1, 8), (2, 4), (8, 1), (24, 1)):
        model = Transformer(args_of(), state_of(0, size), dtype=torch.bfloat16, device=torch.device("meta"))
        cache = model.new_cache(3, 20)
        assert cache.k.shape == cache.v.shape == (2, 3, 20, kv_heads, 6)
        assert cache.k.dtype == torch.bfloat16


def test_an_inactive_slot_keeps_its_tokens() -> None:
    """Also a full one, but for the last."""
    model = small_model(max_seq_len=8)
    cache = model.new_cache(3, 8)
    with torch.inference_mode():
        model.prefill(torch.arange(1, 16), [8, 4, 3], [0, 1, 2], cache)
        before = cache.k.clone()
        with_others = model.decode(torch.tensor([5, 6, 7]), cache, torch.tensor([False, True, False]))
        assert torch.equal(cache.k[:, 0, :7], before[:, 0, :7])
        assert torch.equal(cache.k[:, 2, :3], before[:, 2, :3])
        assert torch.equal(cache.k[:, 1, :4], before[:, 1, :4])
        # And what it holds does not reach the active one.
        alone = model.new_cache(1, 8)
        model.prefill(torch.arange(9, 13), [4], [0], alone)
        torch.testing.assert_close(
            with_others[1:2], model.decode(torch.tensor([6]), alone, torch.tensor([True])), atol=1e-5, rtol=0
        )


def test_the_first_slots_alone_decode_as_among_all() -> None:
    model = small_model(max_seq_len=8)
    whole, other = (model.new_cache(4, 8, routes=True) for _ in range(2))
    tokens, active = torch.tensor([5, 6, 0, 0]), torch.tensor([True, True, False, False])
    with torch.inference_mode():
        for cache in (whole, other):
            model.prefill(torch.arange(1, 8), [4, 3], [0, 1], cache)
        among_all = model.decode(tokens, whole, active)
        alone = model.decode(tokens[:2], other.first(2), active[:2])
    torch.testing.assert_close(alone, among_all[:2], atol=1e-5, rtol=0)
    for name in ("k", "v", "routes"):
        torch.testing.assert_close(getattr(other, name)[:, :2], getattr(whole, name)[:, :2])
    assert torch.equal(other.expert_counts, whole.expert_counts)
    assert not other.k[:, 2:].any()


@pytest.mark.parametrize("tokens", [4, 40])
def test_inactive_tokens_go_to_no_expert(tokens: int) -> None:
    """Through the product of few tokens and through that of many."""
    moe = small_model().layers[0].feed_forward
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(2))
    active = torch.arange(tokens) % 3 != 0
    with torch.inference_mode():
        everywhere, routing = moe(x)
        masked, same_routing = moe(x, active)
        nowhere, _ = moe(x, torch.zeros(tokens, dtype=torch.bool))
    assert torch.equal(routing.experts_TK, same_routing.experts_TK)
    assert (masked[~active] == 0).all()
    assert (nowhere == 0).all()
    assert (masked[active].abs().amax(-1) > 0).all()
    torch.testing.assert_close(masked[active], everywhere[active])


# --- compiled decoding


def small_model(dtype: torch.dtype = torch.float32, **changes: Any) -> Transformer:
    sizes = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "hidden_dim": 16, "max_seq_len": 600}
    model = Transformer(args_of(**{**sizes, **changes}), state_of(0, 1), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model


def compiled_against_eager(model: Transformer, slots: int, script: list[dict[int, int]]) -> tuple[list[Tensor], int]:
    """Run `decode` compiled into one graph beside the plain one, each on its own cache.

    Args:
        script: what to do before each step: {slot: tokens of a new prompt, or 0 to free it}.

    Returns:
        The differences of the active logits, and how often it was compiled.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.decode, fullgraph=True, backend=counter)
    caches = [model.new_cache(slots, model.args.max_seq_len) for _ in range(2)]
    generator, active = torch.Generator().manual_seed(1), [False] * slots
    differences = []
    # Compiled code attends through PyTorch: in bfloat16 a key may be rounded to the next number.
    tolerance = 1e-5 if model.dtype == torch.float32 else 2**-5
    with torch.inference_mode():
        for changes in script:
            for slot, length in changes.items():
                active[slot] = length > 0
                prompt = torch.randint(1, 96, (length,), generator=generator)
                for cache in caches:
                    cache.free(slot)
                    if length:
                        model.prefill(prompt, [length], [slot], cache)
            tokens, mask = torch.randint(1, 96, (slots,), generator=generator), torch.tensor(active)
            eager, ours = (
                step(tokens, cache, mask) for step, cache in zip((model.decode, compiled), caches, strict=True)
            )
            differences.append((eager - ours)[mask])
            for cache in caches:
                cache.extend([slot for slot in range(slots) if active[slot]], [1] * sum(active))
            assert (caches[0].k - caches[1].k).abs().max() < tolerance
    return differences, counter.frame_count


# Slots come and go and another becomes the longest; then further blocks of the cache are read, and the first again.
SCRIPT: list[dict[int, int]] = [{0: 5, 2: 9}, {}, {1: 30}, {1: 0}, {0: 40}, {}, {1: 252}, {}, {}, {}, {}, {1: 0}]


@pytest.mark.parametrize("placement", ["expert", "tensor"])
def test_compiled_decoding_is_one_graph_and_equals_the_plain_one(placement: str) -> None:
    model = small_model(max_seq_len=600)
    differences, compilations = compiled_against_eager(model, 3, SCRIPT)
    for difference in differences:
        assert difference.abs().max() < 1e-5
    assert compilations == 2  # one for each block of the cache


def test_compiled_decoding_of_many_slots() -> None:
    """More pairs than the product of few tokens takes. (torch compiles grouped_mm in bfloat16 alone.)"""
    differences, compilations = compiled_against_eager(small_model(torch.bfloat16), 20, SCRIPT[:6])
    for difference in differences:
        assert difference.abs().max() < 0.05
    assert compilations == 1


def compiled_on_rank(folder: Path, placement: str, prompts: list[list[int]]) -> list[list[list[int]]]:
    llma = load(folder, placement).llma
    plain = completions(llma, prompts, max_gen_len=6)
    torch._dynamo.reset()
    llma.decode = torch.compile(llma.decode, fullgraph=True, backend="eager")  # type: ignore[method-assign]
    return [plain, completions(llma, prompts, max_gen_len=6)]


def test_compiled_decoding_on_ranks(ranks: Pools, small_tokenizer: Path, tmp_path: Path) -> None:
    """The collectives are part of the one graph."""
    hf = random_mixtral(6, num_hidden_layers=1)
    folder = write_checkpoint(tmp_path / "checkpoint", hf, small_tokenizer, files=1)
    for placement in ("expert", "tensor"):
        for plain, compiled in ranks(2).run(compiled_on_rank, folder, placement, random_prompts(0, (4, 9))):
            assert compiled == plain


# --- captured decoding

BF16, FP32 = torch.bfloat16, torch.float32
RANK_8 = PeftArgs(lora_rank=8)
BIASES = PeftArgs(bias_tuning=True)


@pytest.mark.parametrize(
    ("dtype", "quant", "peft", "triton", "capability", "slots"),
    [
        # Up to 64 pairs go to a kernel of ours, and in bfloat16 more of them to PyTorch's, where it has one.
        (BF16, None, None, True, (9, 0), {32: True, 33: True}),
        (BF16, None, None, True, (10, 0), {32: True, 33: True}),
        (BF16, None, None, True, (8, 0), {32: True, 33: False}),
        (BF16, None, None, True, (12, 0), {32: True, 33: False}),
        (torch.float16, None, None, True, (9, 0), {32: True, 33: False}),
        (FP32, None, None, True, (9, 0), {32: True, 33: False}),
        # Without Triton few pairs go to PyTorch's batched product, but in bfloat16.
        (FP32, None, None, False, (9, 0), {16: True, 17: False}),
        (BF16, None, None, False, (9, 0), {1: True, 33: True}),
        (BF16, None, None, False, (8, 0), {1: False}),
        # For quantized weights there are kernels for any number of pairs; for an adapter's beside them there are not.
        (FP32, "nf4", None, True, (8, 0), {1: True, 33: True}),
        (BF16, "int4", None, False, (9, 0), {1: False}),
        (FP32, "nf4", BIASES, True, (8, 0), {33: True}),
        (FP32, "nf4", RANK_8, True, (9, 0), {32: True, 33: False}),
        (BF16, "nf4", RANK_8, True, (9, 0), {33: True}),
    ],
)
def test_a_step_is_captured_where_it_does_not_wait_for_the_gpu(
    dtype: torch.dtype,
    quant: str | None,
    peft: PeftArgs | None,
    triton: bool,
    capability: tuple[int, int],
    slots: dict[int, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "available", lambda: triton)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    sizes = {"dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 64, "n_layers": 1}
    args = args_of(**sizes, quant=quant and QuantArgs(type=quant), peft=peft)
    with FakeTensorMode(), torch.no_grad():
        model = build_transformer(args, state_of(0, 1), dtype=dtype, device=torch.device("cuda")).eval()
        tokens = {count: torch.zeros(count, dtype=torch.int64, device="cuda") for count in slots}
    with torch.no_grad():
        assert {count: model._captures(own) for count, own in tokens.items()} == slots


def test_a_step_is_captured_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current one. Recorded, not run: that needs two."""
    entered: list[tuple[str, Any]] = []

    @contextmanager
    def device(where: torch.device) -> Iterator[None]:
        entered.append(("device", where))
        yield
        entered.pop()

    @contextmanager
    def graph(_: Any, *, pool: Any, stream: Any, **settings: Any) -> Iterator[None]:
        entered.append(("stream", stream))
        yield
        entered.pop()

    def step(tokens_S: Tensor, active_S: Tensor) -> Tensor:
        seen.append(list(entered))
        return tokens_S + active_S

    seen: list[list[tuple[str, Any]]] = []
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: f"stream of {where}")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    graphs._capture_stream.cache_clear()
    ours = graphs.DecodeGraphs()
    for _ in range(5):
        ours.run("key", step, torch.ones(2), torch.ones(2))
    graphs._capture_stream.cache_clear()
    assert seen == [[], [], [], [("device", CPU), ("stream", "stream of cpu")]]
    assert len(ours) == 1


# --- bfloat16


def test_bfloat16_stays_near_float32(small_tokenizer: Path, tmp_path: Path) -> None:
    """In scoring, prefill and decoding; with more and with fewer tokens than the product of few tokens takes."""
    hf = random_mixtral(7, hidden_size=64, intermediate_size=96, initializer_range=0.1)
    folder = write_checkpoint(tmp_path / "checkpoint", hf, small_tokenizer, files=1)
    exact, rounded = load(folder), load(folder, dtype="bf16")
    assert rounded.llma.dtype == torch.bfloat16
    for lengths in ((40, 25), (3, 1)):
        prompts = random_prompts(9, lengths)
        wide, narrow = (step_by_step(model.llma, prompts) for model in (exact, rounded))
        scores = rounded.compute_logits(prompts)
        assert [tuple(logits.shape) for logits in scores] == [(length, 384) for length in lengths]
        near(torch.cat(scores), torch.cat(exact.compute_logits(prompts)))
        for ours, theirs in zip(narrow, wide, strict=True):
            near(ours.float(), theirs)


def step_by_step(llma: Transformer, prompts: list[list[int]]) -> list[Tensor]:
    """Logits of a prefill and of three decoding steps."""
    cache, slots = llma.new_cache(len(prompts), 64), list(range(len(prompts)))
    active = torch.ones(len(prompts), dtype=torch.bool)
    with torch.inference_mode():
        lengths = [len(prompt) for prompt in prompts]
        logits = [llma.prefill(torch.tensor([t for prompt in prompts for t in prompt]), lengths, slots, cache)]
        for token in (7, 8, 9):
            logits.append(llma.decode(torch.full((len(prompts),), token), cache, active))
            cache.extend(slots, [1] * len(prompts))
    return logits


def near(ours: Tensor, theirs: Tensor) -> None:
    """A fifth of the logits' own spread on average at most: rounding alone, but a token may take another expert."""
    assert ours.isfinite().all()
    assert (ours - theirs).abs().mean() < 0.2 * theirs.std()
