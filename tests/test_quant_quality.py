"""What quantization costs a trained model and a random one, on documents that they were not trained on."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.quantize import quantize_checkpoint
from accessory.config import ModelArgs, QuantArgs
from accessory.config.quant import GROUP_SIZES
from accessory.model.meta import MetaModel
from accessory.model.transformer import Transformer
from accessory.parallel.state import ParallelState
from accessory.tools.calibration import calibrate
from accessory.tools.corpus import documentation_corpus
from accessory.tools.quality import decoding_loss, quantized_copy
from accessory.tools.tiny import HELD_BACK, token_stream
from accessory.train.init import init_weights

LENGTH, ROWS = 128, 16
RANDOM = {"dim": 512, "hidden_dim": 1024, "n_layers": 4, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64}
ALLOWED = {"int8": 0.005, "int4": 0.04, "nf4": 0.05}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return documentation_corpus()


@pytest.fixture(scope="module")
def unseen(tiny: tuple[Path, object], documents: list[str]) -> Tensor:
    """Windows (48, 128) of documents that were held back."""
    tokenizer = MetaModel.from_pretrained(tiny[0], max_seq_len=LENGTH).tokenizer
    stream = token_stream(documents[::HELD_BACK], tokenizer)
    return stream[-3 * ROWS * LENGTH :].view(-1, LENGTH)


@pytest.fixture(scope="module")
def loss_of(tiny: tuple[Path, object], unseen: Tensor) -> Callable[..., float]:
    @cache
    def loss(quant: str | None, folder: Path = tiny[0]) -> float:
        model = MetaModel.from_pretrained(folder, quant=quant, dtype="bf16", device="cpu", max_seq_len=LENGTH)
        return decoding_loss(model.llma, unseen)

    return loss


@pytest.mark.parametrize("quant", ALLOWED)
def test_perplexity_rises_by_no_more_than_is_allowed(quant: str, loss_of: Callable[..., float]) -> None:
    rise = math.exp(loss_of(quant) - loss_of(None)) - 1
    assert abs(rise) <= ALLOWED[quant]
    assert rise != 0, "nothing was quantized"


def test_a_random_model_of_larger_matrices_stays_within_the_same_limits(unseen: Tensor) -> None:
    args = ModelArgs(**RANDOM, vocab_size=int(unseen.max()) + 1, max_seq_len=LENGTH)
    plain = Transformer(args, ParallelState.single("cpu"), dtype=torch.bfloat16).eval()
    init_weights(plain, seed=0)
    before = decoding_loss(plain, unseen[:ROWS])
    for quant, allowed in ALLOWED.items():
        rise = math.exp(decoding_loss(quantized_copy(plain, QuantArgs(type=quant)), unseen[:ROWS]) - before) - 1
        assert 0 != abs(rise) <= allowed, quant


@pytest.mark.parametrize("group_size", GROUP_SIZES["int4"])
def test_calibration_lowers_what_int4_loses(
    group_size: int, tiny: tuple[Path, object], unseen: Tensor, documents: list[str], tmp_path: Path
) -> None:
    """Divergence from the plain model's predictions: by so much the loss rises where these come true. In float32
    compute, where nothing but the weights differs."""
    text = tmp_path / "text"
    text.write_text("\n".join(document for number, document in enumerate(documents[:12]) if number % HELD_BACK))
    quant = QuantArgs(type="int4", group_size=group_size)
    quantize_checkpoint(tiny[0], tmp_path / "nearest", quant)
    quantize_checkpoint(tiny[0], tmp_path / "calibrated", quant, calibrate(tiny[0], text, quant))

    @torch.inference_mode()
    def predictions(folder: Path) -> Tensor:
        model = MetaModel.from_pretrained(folder, dtype="fp32", device="cpu", max_seq_len=LENGTH)
        return model.llma(unseen)[0].log_softmax(-1)

    plain = predictions(tiny[0])
    nearest, calibrated = (
        torch.nn.functional.kl_div(predictions(tmp_path / name), plain, log_target=True, reduction="sum").item()
        for name in ("nearest", "calibrated")
    )
    assert calibrated < 0.9 * nearest
