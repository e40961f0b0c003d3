"""Make a tiny real Mixtral: a tokenizer and a model trained on Python's own documentation."""

import hashlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.containers import save_archive
from accessory.checkpoint.layouts import MISTRAL
from accessory.checkpoint.write import cut_out
from accessory.config import ModelArgs, MoEArgs
from accessory.files import check_free, new_folder, write_json
from accessory.model.meta import MetaModel
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState
from accessory.progress import showing
from accessory.text.tokenizer import Tokenizer
from accessory.tools.corpus import documentation_corpus, train_tokenizer
from accessory.tools.unfinished import Unfinished, unfinished
from accessory.train.init import init_weights
from accessory.train.optim import adamw
from accessory.train.schedule import Schedule
from accessory.train.trainer import train_step

logger = logging.getLogger(__name__)

# 16 query heads and 8 key/value heads, so that the model splits over up to 8 ranks as Mixtral-8x7B does.
ARGS = ModelArgs(
    dim=192,
    n_layers=4,
    n_heads=16,
    n_kv_heads=8,
    head_dim=16,
    hidden_dim=192,
    vocab_size=2048,
    rope_theta=1e4,
    max_seq_len=1024,
    moe=MoEArgs(num_experts=8, num_experts_per_tok=2),
)

# Every so manieth document is held back: what is said of the trained model is measured on those.
HELD_BACK = 20

# Optimizer steps: two to three minutes on 2 cores.
STEPS = 1200
RATES = {"lr": 3e-3, "min_lr": 1e-4, "weight_decay": 0.1}
TOKENIZER = "tokenizer.model"

# A share below this means that the load balancing failed.
LEAST_SHARE = 0.03


@dataclass(frozen=True, kw_only=True)
class TinyReport:
    """What came out.

    Attributes:
        loss: cross-entropy on documents that were held back, natural logarithm.
        expert_share: (layers, experts) share of the token-expert pairs there.
    """

    parameters: int
    loss: float
    expert_share: Tensor


def make_tiny(out: str | Path, *, steps: int = STEPS, batch: int = 4, length: int = 128, seed: int = 0) -> TinyReport:
    """Train the tiny model on the CPU and write it as the official release does.

    ``out`` gets consolidated.00.pth (float32), params.json and tokenizer.model. A call that was stopped is gone on with
    by the next one of the same recipe, which ends at the same bits; see `accessory.tools.unfinished`.

    Args:
        steps: optimizer steps of ``batch`` rows of ``length`` tokens.

    Raises:
        FileExistsError: ``out`` is there already and not empty.
        BlockingIOError: another process is making it.
        ValueError: a number of steps, rows or tokens below 1 (2 tokens), or a seed that PyTorch does not take.
    """
    for name, value, least in (("steps", steps, 1), ("batch", batch, 1), ("length", length, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must be from -2^63 to below 2^64, not {seed}")
    path = Path(out).resolve()
    check_free(path)
    with unfinished(path) as progress:
        check_free(path)  # another process may have finished it
        logger.info("collecting Python's documentation and training a tokenizer on it")
        texts = documentation_corpus()
        train_tokenizer(texts, progress.folder / TOKENIZER, vocab_size=ARGS.vocab_size)
        tokenizer = Tokenizer(progress.folder / TOKENIZER)
        held_back = token_stream(texts[::HELD_BACK], tokenizer)
        stream = token_stream([text for i, text in enumerate(texts) if i % HELD_BACK], tokenizer)
        model = MetaModel(Transformer(ARGS, ParallelState.single("cpu")), tokenizer)
        init_weights(model.llma, seed=seed)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        logger.info(
            "training %.1f M parameters on %.1f M tokens of %d documents",
            parameters / 1e6,
            len(stream) / 1e6,
            len(texts),
        )
        recipe = {"steps": steps, "batch": batch, "length": length, "seed": seed, "tokens": _digest(stream)}
        _train(model, random_windows(stream, batch=batch, length=length, seed=seed), recipe | RATES, progress)
        loss, share = evaluate(model, held_back[: len(held_back) // length * length].view(-1, length))
        if share.min() < LEAST_SHARE:
            logger.warning("an expert gets only %.1f %% of its layer's tokens: train longer", 100 * share.min())
        with new_folder(path) as aside:
            shutil.copyfile(progress.folder / TOKENIZER, aside / TOKENIZER)
            _write(model, aside)
    return TinyReport(parameters=parameters, loss=loss, expert_share=share)


def _digest(stream: Tensor) -> str:
    """What tells one corpus, tokenised, from another: they differ between versions of Python."""
    return hashlib.sha256(stream.numpy().tobytes()).hexdigest()


def _train(model: MetaModel, windows: Iterator[Tensor], recipe: dict[str, Any], progress: Unfinished) -> None:
    model.train()
    optimizer = adamw(model.named_parameters(), lr=0.0, weight_decay=recipe["weight_decay"])
    steps, warmup = recipe["steps"], max(1, recipe["steps"] // 20)
    schedule = Schedule(steps=steps, lr=recipe["lr"], min_lr=recipe["min_lr"], warmup=warmup)
    if (state := progress.load(recipe)) is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        logger.info("an earlier training was stopped: going on behind step %d of %d", progress.kept, steps)
    begin = progress.kept
    with showing("training", steps, unit="steps", done=begin) as work, progress.stop.steps():
        # Nothing else is drawn at random, so the windows that were trained on are left out and all is as it was.
        for step, rows in enumerate(islice(windows, begin, steps), begin):
            result = train_step(model, optimizer, [(rows, rows)], lr=schedule(step), clip_grad=1.0)
            work.advance(note=f"training loss {result.loss:.3f}, balance {result.balance_loss:.3f}")
            # The last one too: its model is still to be measured and written.
            if progress.due or step + 1 == steps:
                progress.save(recipe, step + 1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            if progress.stop.asked is not None:
                break


def token_stream(texts: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """The texts' token ids one after another, int64, each text between its begin and end."""
    return torch.tensor([token for text in texts for token in tokenizer.encode(text, bos=True, eos=True)])


def random_windows(stream: Tensor, *, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Batches (batch, length) of consecutive tokens: all windows of the stream in random order, again and again.

    Every pass cuts the stream at another offset, so that the same text does not always start at the same place.
    """
    generator = torch.Generator().manual_seed(seed)
    rest = torch.empty(0, length, dtype=stream.dtype)
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        windows = stream[offset : offset + (len(stream) - offset) // length * length].view(-1, length)
        rest = torch.cat((rest, windows[torch.randperm(len(windows), generator=generator)]))
        while len(rest) >= batch:
            yield rest[:batch]
            rest = rest[batch:]


@torch.no_grad()
def evaluate(model: MetaModel, windows: Tensor) -> tuple[float, Tensor]:
    """Mean cross-entropy over windows (rows, length), and (layers, experts) shares of the token-expert pairs."""
    model.eval()
    losses, counts = [], []
    for rows in windows.split(32):
        losses.append(model(rows, rows)[0] * len(rows))
        counts.append(model.llma(rows)[1].counts_E)
    total = torch.stack(counts).sum(0)
    return (torch.stack(losses).sum() / len(windows)).item(), total / total.sum(-1, keepdim=True)


def _write(model: MetaModel, folder: Path) -> None:
    save_archive(folder / "consolidated.00.pth", cut_out(dict(model.llma.named_parameters()), MISTRAL, ARGS))
    write_json(folder / "params.json", ARGS.to_dict())
