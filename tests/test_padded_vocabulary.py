"""Vocabularies padded beyond the tokenizer: the rows beyond are kept, and never sampled, counted or scored.

Those of the output head are filled with large weights, so that one that leaks is the most probable token at once.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from adapters import PEFT, random_adapter, write_adapter
from checkpoints import accessory_config, hf_logits, random_mixtral, whole_tensors, write_checkpoint
from http_api import ServedApi, assert_error
from models import completions, load
from ranks import RankPool, alike, on_ranks
from test_gradients import Batch, assert_gradients, last_token, reference_loss, released_names
from test_training import whole_gradients
from torch import Tensor

from accessory.checkpoint.convert import split
from accessory.checkpoint.merge import merge
from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.config import QuantArgs
from accessory.errors import CheckpointError
from accessory.generation.sampling import Sampling, sample, sample_each
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.model.scoring import score_tokens
from accessory.parallel.state import ParallelState
from accessory.serve.driver import Driver
from accessory.text.tokenizer import Tokenizer
from accessory.tools.corpus import documentation_corpus, train_tokenizer
from accessory.tools.quality import quantized_copy
from accessory.train.build import build_for_training
from accessory.train.export import export_checkpoint
from accessory.train.optim import adamw
from accessory.train.sharding import device_mesh
from accessory.train.trainer import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

Pools = Callable[[int], RankPool]

TOKENS = 371
# Of a vocabulary to which a token is added that lies further on.
LAST = TOKENS + 5
GAPS = list(range(TOKENS, LAST))
NEW_TOKENS = 12
LOGITS = {"atol": 1e-4, "rtol": 0.0}


class Padded(NamedTuple):
    """A random Mixtral of transformers with more rows than its tokenizer has tokens, and its checkpoint."""

    hf: Any
    folder: Path
    rows: int

    def logits(self, tokens: list[int]) -> Tensor:
        return hf_logits(self.hf, tokens)[:, :TOKENS]

    def prompts(self) -> list[list[int]]:
        random = Random(self.rows)
        return [[1, *random.choices(range(3, TOKENS), k=length)] for length in (0, 4, 11)]

    def greedy(self, prompt: list[int]) -> list[int]:
        tokens = list(prompt)
        for _ in range(NEW_TOKENS):
            best = self.logits(tokens)[-1].topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "a near tie: choose another seed"
            tokens.append(int(best.indices[0]))
        return tokens[len(prompt) :]


class Gapped(Padded):
    """One whose tokenizer has ids that are no tokens."""

    def logits(self, tokens: list[int]) -> Tensor:
        return without_gaps(hf_logits(self.hf, tokens))


def without_gaps(logits: Tensor) -> Tensor:
    ids = torch.arange(LAST + 1)
    return logits[..., : LAST + 1].masked_fill((ids >= TOKENS) & (ids < LAST), float("-inf"))


class Limited:
    """A transformers model of whose logits the plain loop takes those of tokens."""

    def __init__(self, hf: Any, limit: Callable[[Tensor], Tensor] = lambda logits: logits[..., :TOKENS]) -> None:
        self.hf, self.config, self.limit = hf, hf.config, limit

    def __call__(self, tokens: Tensor, **settings: Any) -> Any:
        output = self.hf(tokens, **settings)
        output.logits = self.limit(output.logits)
        return output


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(documentation_corpus(100_000), path, vocab_size=TOKENS)
    return path


def padded_model(seed: int, where: Path, tokenizer: Path, added: int | None = None) -> Padded:
    """One of random sizes; ``added`` is a token among the rows behind the tokenizer's."""
    random = Random(seed)
    multiple = random.choice([64, 128])
    rows = -(-TOKENS // multiple) * multiple + random.choice([0, multiple])
    sizes = {
        "vocab_size": rows,
        "hidden_size": random.choice([16, 24, 40]),
        "intermediate_size": random.choice([12, 32]),
        "num_local_experts": random.choice([2, 4]),
        "num_experts_per_tok": random.choice([1, 2]),
    }
    hf = random_mixtral(seed, **sizes)
    with torch.no_grad():
        # Of both signs, so that some of their logits are large whatever comes in.
        beyond = [row for row in range(TOKENS, rows) if row != added]
        hf.lm_head.weight[beyond] *= 100
        hf.model.embed_tokens.weight[beyond] = 1e4
    form = random.choice(["base", "sparse"])
    return Padded(hf, write_checkpoint(where, hf, tokenizer, files=random.choice([1, 2]), form=form), rows)


SEEDS = range(4)


@pytest.fixture(scope="module")
def models(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Padded]:
    folder = tmp_path_factory.mktemp("padded")
    found = [padded_model(seed, folder / str(seed), tokenizer) for seed in SEEDS]
    assert len({model.rows for model in found}) > 1
    for model in found:
        assert hf_logits(model.hf, [1, 5, 9]).argmax(-1).min() >= TOKENS, "a leak would not show"
    return found


@pytest.fixture(scope="module")
def gapped(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Gapped:
    case = Gapped(*padded_model(7, tmp_path_factory.mktemp("gapped") / "model", tokenizer, LAST))
    added = {str(LAST): {"content": "<added>", "special": False}}
    (case.folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    assert hf_logits(case.hf, [1, 5, 9])[:, GAPS].amax(-1).min() > case.logits([1, 5, 9]).max(), "a leak would not show"
    assert case.rows > LAST + 1
    return case


class Outcome(NamedTuple):
    """What a rank makes of prompts."""

    logits: list[Tensor]
    forward: Tensor
    first: Tensor
    greedy: list[list[int]]
    wild: list[list[int]]
    scores: dict[str, list]
    loss: float


def of_tokens(logits: Tensor, count: int) -> Tensor:
    """Training's, from which what pads the vocabulary is not cut off."""
    assert logits[..., count:].eq(float("-inf")).all()
    return logits[..., :count]


@torch.no_grad()
def outcome_on_rank(folder: Path, placement: str, prompts: list[list[int]], batch: Batch) -> Outcome:
    model = load(folder, placement)
    longest = prompts[-1]
    cache = model.llma.new_cache(1, 64)
    torch.manual_seed(3)
    return Outcome(
        model.compute_logits(prompts),
        of_tokens(model.llma(torch.tensor([longest]))[0][0], model.llma.n_tokens),
        model.llma.prefill(torch.tensor(longest), [len(longest)], [0], cache)[0],
        completions(model.llma, prompts, max_gen_len=NEW_TOKENS),
        completions(model.llma, prompts * 4, max_gen_len=NEW_TOKENS, temperature=2.0, top_p=1.0),
        model.evaluate_examples(prompts[1:]),
        model(batch.examples, batch.labels)[0].item(),
    )


def batch_of(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    examples = torch.randint(3, TOKENS, (2, 12), generator=generator)
    examples[1, 8:] = 0
    return Batch(examples, examples * (torch.rand(examples.shape, generator=generator) < 0.7))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_everything_that_reads_logits_sees_the_tokens_alone(
    seed: int, size: int, models: list[Padded], ranks: Pools
) -> None:
    case, batch = models[seed], batch_of(seed)
    prompts = case.prompts()
    truth = [case.logits(prompt) for prompt in prompts]
    with torch.no_grad():
        loss, _ = reference_loss(Limited(case.hf), batch, 0.0)
    for placement in ("auto", "tensor")[:size]:
        outcome = alike(on_ranks(ranks, size, outcome_on_rank, case.folder, placement, prompts, batch))
        for ours, theirs in zip(outcome.logits, truth, strict=True):
            torch.testing.assert_close(ours, theirs, **LOGITS)
        torch.testing.assert_close(outcome.forward, truth[-1], **LOGITS)
        torch.testing.assert_close(outcome.first, truth[-1][-1], **LOGITS)
        assert outcome.greedy == [case.greedy(prompt) for prompt in prompts]
        assert max(token for answer in outcome.wild for token in answer) < TOKENS
        for ours, tokens, logits in zip(outcome.scores["log_likelihood"], prompts[1:], truth[1:], strict=True):
            theirs = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None]).sum()
            assert ours == pytest.approx(theirs.item(), abs=1e-3)
        assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)


def test_chance_never_reaches_a_row_beyond(models: list[Padded]) -> None:
    torch.manual_seed(0)
    for case in models:
        llma = load(case.folder).llma
        assert llma.n_tokens == TOKENS
        assert llma.args.vocab_size == case.rows
        with torch.inference_mode():
            logits = llma.score(torch.tensor([1, 7, 9]), [3])
        many = logits.repeat(2000, 1)
        for top_p in (0.9, 1.0):
            sampling = Sampling(temperature=2.0, top_p=top_p)
            tokens = [
                sample(many, 2.0, top_p),
                sample_each(many, [sampling] * len(many), torch.rand(len(many)).tolist()),
            ]
            assert torch.cat(tokens).max() < TOKENS
            assert torch.cat(tokens).min() >= 0
        last = sample_each(logits, [Sampling(temperature=2.0, top_p=1.0)] * 3, [1 - 2**-53] * 3)
        assert last.max() < TOKENS


@pytest.mark.parametrize("size", [1, 2])
def test_ids_that_are_no_tokens_have_no_chance(size: int, gapped: Gapped, ranks: Pools) -> None:
    prompts, batch = gapped.prompts(), batch_of(0)
    truth = [gapped.logits(prompt) for prompt in prompts]
    with torch.no_grad():
        loss, _ = reference_loss(Limited(gapped.hf, without_gaps), batch, 0.0)
    outcome = alike(on_ranks(ranks, size, outcome_on_rank, gapped.folder, "auto", prompts, batch))
    for ours, theirs in zip(outcome.logits, truth, strict=True):
        torch.testing.assert_close(ours, theirs, **LOGITS)
    torch.testing.assert_close(outcome.forward, truth[-1], **LOGITS)
    torch.testing.assert_close(outcome.first, truth[-1][-1], **LOGITS)
    assert outcome.greedy == [gapped.greedy(prompt) for prompt in prompts]
    assert not {token for answer in outcome.wild for token in answer}.intersection(GAPS)
    for ours, tokens, logits in zip(outcome.scores["log_likelihood"], prompts[1:], truth[1:], strict=True):
        theirs = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None]).sum()
        assert ours == pytest.approx(theirs.item(), abs=1e-3)
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-5)


# --- training


class Step(NamedTuple):
    """One step of training on a rank."""

    loss: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def step_on_rank(folder: Path, mp_size: int, kind: Any, batch: Batch, output: Path) -> Step:
    """Also exports the model as it is behind the step, to ``output``."""
    state = ParallelState.init(mp_size, "cpu")
    pretrained = Pretrained.resolve(folder, max_seq_len=64)
    llma = build_for_training(pretrained, state, device_mesh(state), data_parallel=kind, compute_dtype=torch.float32)
    model = MetaModel(llma, pretrained.tokenizer).train()
    optimizer = adamw(model.named_parameters(), lr=1.0, weight_decay=0.1)
    gradients: dict[str, Tensor] = {}

    def keep_gradients(*_: Any) -> None:
        for name, parameter in llma.named_parameters():
            gradients[name] = parameter.grad.full_tensor().clone()  # type: ignore[union-attr]

    optimizer.register_step_pre_hook(keep_gradients)
    examples, labels = (rows.chunk(state.dp_size)[state.dp_rank] for rows in (batch.examples, batch.labels))
    with warnings.catch_warnings(action="error"):  # FSDP warns of an output that is a view
        result = train_step(model, optimizer, [(examples, labels)], lr=1e-2, clip_grad=0)
    export_checkpoint(model, output, dtype=torch.float32)
    weights = {name: parameter.detach().full_tensor() for name, parameter in llma.named_parameters()}
    return Step(result.loss, gradients, weights)


@pytest.mark.parametrize(
    ("dp_size", "mp_size", "kind"), [(1, 1, "sdp"), (1, 2, "sdp"), (2, 1, "fsdp"), (2, 1, "sdp"), (2, 1, "ddp")]
)
def test_a_step_is_that_of_a_plain_loop_over_the_tokens(
    dp_size: int, mp_size: int, kind: str, models: list[Padded], ranks: Pools, tmp_path: Path
) -> None:
    for seed in (SEEDS[0], SEEDS[-1]):
        case, batch, output = models[seed], batch_of(seed), tmp_path / str(seed)
        step = alike(ranks(dp_size * mp_size).run(step_on_rank, case.folder, mp_size, kind, batch, output))
        case.hf.zero_grad()
        loss, balance = reference_loss(Limited(case.hf), batch, 0.1)
        (loss + balance).backward()
        truth = whole_gradients(case.hf)
        assert step.loss == pytest.approx(loss.item(), rel=1e-5)
        assert_gradients(released_names(step.gradients), truth)
        ours = step.gradients["output.weight"]
        assert ours[TOKENS:].eq(0).all()
        assert ours[:TOKENS].ne(0).any(-1).all()
        assert step.gradients["tok_embeddings.weight"][TOKENS:].eq(0).all()
        # Without a gradient there is weight decay alone.
        before = whole_tensors(case.hf)["output.weight"][TOKENS:]
        torch.testing.assert_close(step.weights["output.weight"][TOKENS:], before * (1 - 1e-2 * 0.1))
        assert_same_rows(output, case.rows)
        assert torch.equal(dict(load(output).llma.named_parameters())["output.weight"], step.weights["output.weight"])


@pytest.mark.parametrize(("dp_size", "mp_size", "kind"), [(1, 1, "sdp"), (1, 2, "sdp"), (2, 1, "fsdp"), (2, 1, "ddp")])
def test_a_step_teaches_ids_that_are_no_tokens_nothing(
    dp_size: int, mp_size: int, kind: str, gapped: Gapped, ranks: Pools, tmp_path: Path
) -> None:
    batch, output = batch_of(1), tmp_path / "output"
    step = alike(ranks(dp_size * mp_size).run(step_on_rank, gapped.folder, mp_size, kind, batch, output))
    gapped.hf.zero_grad()
    loss, balance = reference_loss(Limited(gapped.hf, without_gaps), batch, 0.1)
    (loss + balance).backward()
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    assert_gradients(released_names(step.gradients), whole_gradients(gapped.hf))
    ours = step.gradients["output.weight"]
    assert ours[GAPS].eq(0).all()
    assert ours[LAST].ne(0).any()
    assert load(output).llma.gaps == load(gapped.folder).llma.gaps == tuple(GAPS)


def test_the_batch_has_rows_that_are_padded() -> None:
    assert [last_token(row) for row in batch_of(0).examples] == [11, 7]


def test_a_model_from_nothing_may_be_padded(tokenizer: Path, models: list[Padded], ranks: Pools) -> None:
    config = models[0].folder / "config.json"
    for shape in ranks(1).run(shape_from_nothing, config, tokenizer):
        assert shape == (3, TOKENS)


def shape_from_nothing(config: Path, tokenizer: Path) -> tuple[int, ...]:
    state = ParallelState.init(1, "cpu")
    pretrained = Pretrained.untrained(llama_config=config, tokenizer_path=tokenizer, max_seq_len=64)
    llma = build_for_training(pretrained, state, device_mesh(state), data_parallel="sdp", compute_dtype=torch.bfloat16)
    return tuple(of_tokens(llma(torch.tensor([[1, 2, 3]]))[0][0], llma.n_tokens).shape)


# --- what is written keeps the rows


def assert_same_rows(folder: Path, rows: int) -> MetaModel:
    """A folder says its rows, whose model has logits of the tokens."""
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == rows
    model = load(folder)
    assert model.llma.args.vocab_size == rows
    assert model.compute_logits([[1, 2, 3]])[0].shape == (3, TOKENS)
    return model


def test_tools_keep_the_rows(models: list[Padded], tokenizer: Path, tmp_path: Path) -> None:
    case = models[1]
    config = accessory_config(case.hf.config)
    peft = {**PEFT, "lora_rank": 4}
    adapter = write_adapter(
        tmp_path / "adapter", random_adapter(config, 1), config, files=1, tokenizer=tokenizer, peft=peft
    )
    merge(case.folder, adapter, tmp_path / "merged")
    split(case.folder, tmp_path / "split", mp=2)
    for quant in (QuantArgs(type="int8", head=True), QuantArgs(type="int8")):
        quantize_checkpoint(case.folder, tmp_path / f"int8 {quant.head}", quant)
    for folder in ("merged", "split", "int8 True", "int8 False"):
        assert_same_rows(tmp_path / folder, case.rows)
    tokens = [case.prompts()[-1]]
    plain = load(case.folder).llma
    assert torch.equal(*(score_tokens(llma, tokens)[0] for llma in (plain, load(tmp_path / "split").llma)))
    copy = quantized_copy(plain, QuantArgs(type="int8", head=True))
    ours = score_tokens(load(tmp_path / "int8 True").llma, tokens)[0]
    torch.testing.assert_close(ours, score_tokens(copy, tokens)[0])
    # Adapters behind their base, which the merged folder is made of.
    both = MetaModel.from_pretrained([case.folder, adapter], dtype="fp32", device="cpu", max_seq_len=64)
    merged = score_tokens(load(tmp_path / "merged").llma, tokens)[0]
    torch.testing.assert_close(score_tokens(both.llma, tokens)[0], merged, **LOGITS)


@pytest.mark.parametrize("unset", [-1, None])
def test_rows_that_the_config_leaves_open_are_the_embeddings(
    unset: int | None, models: list[Padded], tmp_path: Path
) -> None:
    for number, case in enumerate(models):
        folder = copy_with(case.folder, tmp_path / str(number), vocab_size=unset)
        model = load(folder)
        assert model.llma.args.vocab_size == case.rows
        prompt = case.prompts()[-1]
        torch.testing.assert_close(model.compute_logits([prompt])[0], case.logits(prompt), **LOGITS)


def copy_with(folder: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **changes}))
    return to


# --- what is refused


def test_fewer_rows_than_tokens_are_refused(models: list[Padded], tokenizer: Path, tmp_path: Path) -> None:
    folder = copy_with(models[0].folder, tmp_path / "fewer", vocab_size=TOKENS - 1)
    with pytest.raises(ValueError, match=f"has {TOKENS} tokens, the model's vocab_size is only {TOKENS - 1}"):
        load(folder)
    fewer = write_checkpoint(tmp_path / "open", random_mixtral(0, vocab_size=TOKENS - 2), tokenizer, files=1)
    config = json.loads((fewer / "config.json").read_text())
    (fewer / "config.json").write_text(json.dumps({**config, "vocab_size": -1}))
    with pytest.raises(CheckpointError, match=rf"\({TOKENS - 2}, 32\), config and tokenizer ask for \({TOKENS}, 32\)"):
        load(fewer)


def test_ids_beyond_the_tokens_are_refused(models: list[Padded]) -> None:
    model = load(models[0].folder)
    for call in (model.compute_logits, model.evaluate_examples):
        with pytest.raises(ValueError, match=f"outside the vocabulary of {TOKENS}"):
            call([[1, TOKENS]])


@pytest.mark.parametrize("size", [1, 2])
def test_a_server_names_tokens_alone(size: int, models: list[Padded]) -> None:
    case = models[2]
    prompt = case.prompts()[-1]
    names = Tokenizer(case.folder)
    with Driver(case.folder, ranks=size, slots=4, dtype="fp32", device="cpu", max_seq_len=64) as engine:
        settings = Sampling(max_gen_len=NEW_TOKENS, temperature=2.0, top_p=1.0)
        stream = engine.submit(prompt, settings, seed=1, logprobs=20, prompt_logprobs=20)
        seen = [score for event in stream for score in (*event.scores, *event.prompt_scores) if score]
        assert {token for score in seen for token, _ in score.top} <= set(range(TOKENS))
        with pytest.raises(ValueError, match=f"outside the vocabulary of {TOKENS}"):
            engine.submit([1, TOKENS], settings)
        with ServedApi(engine) as api:
            answer = api.complete(prompt=prompt, max_tokens=1, temperature=0, logprobs=5).json()
            expected = case.logits(prompt)[-1].log_softmax(-1).topk(5)
            found = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            assert list(found.values()) == pytest.approx(expected.values.tolist(), abs=1e-4)
            assert len(found) == len({names.name(token) for token in expected.indices.tolist()})
            assert_error(api.complete(prompt=[1, TOKENS], max_tokens=1), 400, str(TOKENS))


def test_a_server_never_names_what_is_no_token(gapped: Gapped) -> None:
    prompt = gapped.prompts()[-1]
    with Driver(gapped.folder, ranks=1, slots=4, dtype="fp32", device="cpu", max_seq_len=64) as engine:
        settings = Sampling(max_gen_len=40, temperature=2.0, top_p=1.0)
        events = list(engine.submit(prompt, settings, seed=1, logprobs=20, prompt_logprobs=20))
        seen = [score for event in events for score in (*event.scores, *event.prompt_scores) if score]
        named = {token for score in seen for token, _ in score.top} | {score.token for score in seen}
        assert named
        assert not named.intersection(GAPS)
        with ServedApi(engine) as api:
            answer = api.complete(prompt=prompt, max_tokens=5, temperature=1, logprobs=5).json()
            assert "<unused" not in json.dumps(answer)
