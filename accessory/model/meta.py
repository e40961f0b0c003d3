"""MetaModel: the Python door to a model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.config import QuantArgs
from accessory.generation.engine import complete
from accessory.generation.sampling import Sampling
from accessory.model.balance import RouterStats, TrainingLosses, not_padding, router_losses
from accessory.model.cross_entropy import cross_entropy
from accessory.model.dtypes import settle_dtype
from accessory.model.pretrained import Paths, Pretrained, load_transformer
from accessory.model.requests import Examples, example_tokens, prompt_tokens, refuse_images
from accessory.model.scoring import evaluate, score_tokens
from accessory.model.transformer import Transformer
from accessory.parallel.placement import refuse_shared_heads, resolve_placement
from accessory.parallel.state import ParallelState, agreed, pick_device
from accessory.quant import lay_out_for_gpu
from accessory.text.chat import Ends
from accessory.text.tokenizer import Tokenizer

_NO_ENDS = Ends()


class MetaModel(nn.Module):
    """A model with its tokenizer: loads checkpoints, generates, scores and gives the training loss.

    Where several ranks hold the model, every rank makes the same calls with the same arguments in the same order;
    arguments are checked on all of them before the first collective, and an error on one is raised on all.

    Attributes:
        llma: the Transformer (or this rank's part of it).
        tokenizer: its tokenizer.
        llama_type: the name of the architecture.
    """

    def __init__(self, llma: Transformer, tokenizer: Tokenizer, llama_type: str = "mistral") -> None:
        super().__init__()
        self.llma, self.tokenizer, self.llama_type = llma, tokenizer, llama_type

    @classmethod
    def from_pretrained(
        cls,
        pretrained_path: Paths,
        llama_type: str | None = None,
        llama_config: Paths | None = None,
        tokenizer_path: str | Path | None = None,
        with_visual: bool = False,
        max_seq_len: int = 4096,
        mp_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        quant: bool | str | QuantArgs | None = None,
        expert_placement: str = "auto",
    ) -> Self:
        """Load a checkpoint onto the ranks of ``mp_group``, each reading only the slices that it owns.

        Args:
            pretrained_path: a checkpoint folder, here or as hf://org/name[/sub/folder][@revision], or several of
                which later ones overlay earlier ones.
            llama_type, llama_config, tokenizer_path: where the last folder does not say, or to overrule it;
                several config files are merged, the last wins.
            with_visual: must be False; these models read no images.
            max_seq_len: longest prompt and completion together, in tokens.
            mp_group: ranks that hold the model together; None: this process holds all of it.
            dtype: torch dtype, or "bf16", "fp16", "fp32", or "auto" for the dtype on disk. None: bfloat16, or
                float32 on a CPU without native bfloat16 products.
            device: None: the current GPU if there is one, else the CPU.
            quant: "int8", "int4", "nf4" (True) or "fp8" quantizes the matrices of attention and experts while they
                are read, "mxfp4" those of experts; a QuantArgs says more. None (False): as the checkpoint is.
            expert_placement: "expert" (whole experts on each rank), "tensor" (a slice of every expert on each),
                or "auto".

        Raises:
            FileNotFoundError, CheckpointError, ValueError: naming the file, tensor or setting and what to do; the
                same on every rank.
            OSError: what lies on the Hub cannot be downloaded; the same.
        """
        members = ParallelState.from_group(mp_group)

        def settle() -> tuple[ParallelState, Pretrained, torch.dtype]:
            if with_visual:
                raise ValueError("with_visual is True: there is no image encoder; leave it False")
            state = replace(members, device=pick_device(device, mp_group))
            found = Pretrained.resolve(
                pretrained_path,
                llama_type=llama_type,
                llama_config=llama_config,
                tokenizer_path=tokenizer_path,
                max_seq_len=max_seq_len,
                quant=QuantArgs.of(quant),
            )
            resolve_placement(found.args, expert_placement, state.mp_size)
            return state, found, settle_dtype(dtype, found.stored_dtype, state)

        state, pretrained, chosen_dtype = agreed(members, settle)
        llma = load_transformer(pretrained, state, dtype=chosen_dtype, expert_placement=expert_placement)
        if state.device.type == "cuda":
            lay_out_for_gpu(llma)
        return cls(llma, pretrained.tokenizer, pretrained.llama_type).eval()

    def get_trainable_params(self) -> dict[str, nn.Parameter]:
        """The parameters that finetuning updates, by name."""
        named = self.llma.named_parameters()
        return {f"llma.{name}": parameter for name, parameter in named if parameter.requires_grad}

    def forward(
        self, examples: Tensor, labels: Tensor, images: None = None
    ) -> tuple[Tensor, dict[str, tuple[Tensor, float]]]:
        """Cross-entropy of the labels, each predicted from the tokens before it.

        Args:
            examples: int64 (batch, length) token ids; trailing zeros are padding.
            labels: int64, same shape; the label of a token stands at the token's own place, 0 is not learned.

        Returns:
            The mean loss over the learned tokens (0 where there are none), and in training mode the extra losses
            as {name: (value, weight)}, to be added as value * weight; see `training_losses`.
        """
        refuse_images(images)
        if self.training:
            loss, extras, _ = self.training_losses(examples, labels)
            return loss, extras
        return self._cross_entropy(examples, labels)[0], {}

    def training_losses(self, examples: Tensor, labels: Tensor, lengths: Sequence[int] | None = None) -> TrainingLosses:
        """The losses of a micro-batch as `forward` takes it, in any mode, and what its tokens were routed to.

        The extra losses and the counts are those of the tokens of all data-parallel ranks, which must all call.

        Args:
            lengths: of the texts that share rows, row by row and padding included, each of which sees itself alone;
                its first token must not be learned. None: each row is one.
        """
        args, state = self.llma.args, self.llma.state
        refuse_shared_heads(args, state.mp_size)
        loss, stats = self._cross_entropy(examples, labels, lengths)
        # Not linear in the batch: every data-parallel rank takes the losses of all their tokens together.
        stats = stats.summed(state.dp_group)
        counts_LE = stats.counts_E.new_zeros(args.n_layers, args.moe.num_experts)
        counts_LE[list(args.moe_layers)] = stats.counts_E
        return TrainingLosses(loss, router_losses(stats, args), counts_LE)

    def _cross_entropy(
        self, examples: Tensor, labels: Tensor, lengths: Sequence[int] | None = None
    ) -> tuple[Tensor, RouterStats]:
        """Mean over this rank's learned tokens, and the router's statistics of its tokens."""
        if examples.shape != labels.shape or examples.dim() != 2:
            raise ValueError(
                "examples and labels must both be (batch, length), "
                f"not {tuple(examples.shape)} and {tuple(labels.shape)}"
            )
        if examples.shape[1] > self.llma.args.max_seq_len:
            raise ValueError(
                f"examples are {examples.shape[1]} tokens long, the model's max_seq_len is {self.llma.args.max_seq_len}"
            )
        logits, stats = self.llma(examples, not_padding(examples), lengths)
        targets = F.pad(labels[:, 1:], (0, 1)).flatten()  # nothing follows a row's last token
        losses = cross_entropy(logits.flatten(0, 1), targets)
        return losses / (targets != 0).sum().clamp(min=1), stats

    def generate(
        self,
        prompts: Examples,
        images: None = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        ends: Ends = _NO_ENDS,
    ) -> list[str]:
        """Complete any number of prompts; only the completions are returned, in order.

        A completion is what the model adds to the prompt's text: mostly it begins with the space before a word.

        Args:
            prompts: a list of texts, or of lists of token ids that are taken as they are.
            max_gen_len: tokens of a completion at most.
            temperature: 0 takes the most probable token; higher is more random.
            top_p: sample among the most probable tokens that reach this sum; 0 keeps the best one, 1 keeps all.
            additional_stop_symbols: strings that end a completion; they are cut off.
            ends: of the form that the prompts have, see `Form` in accessory.text.forms: where an answer ends, and what
                of the model's text is the form's. Without it the text goes on as it is.

        Raises:
            ValueError: naming the argument; on every rank alike.
        """
        sampling = Sampling.of(max_gen_len, temperature, top_p, additional_stop_symbols).with_ends(ends)
        tokens = prompt_tokens(self.llma, self.tokenizer, prompts, sampling, images=images)
        texts = [""] * len(tokens)
        for step in complete(self.llma, self.tokenizer, tokens, sampling):
            for progress in step:
                if progress.finish:
                    texts[progress.index] = progress.text
        return texts

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        image: None = None,
        max_gen_len: int = 512,
        temperature: float = 0.0,
        top_p: float = 0.95,
        additional_stop_symbols: Iterable[str] = (),
        ends: Ends = _NO_ENDS,
    ) -> Iterator[dict[str, Any]]:
        """Complete one prompt, yielding {"text": all so far, "end_of_content": bool} after every token.

        The last dictionary has end_of_content True. Text that was shown is never taken back. Arguments are those
        of `generate`; errors are raised by the call itself, before the first token is asked for. Where several
        ranks hold the model, all of them must take equally many steps: one that leaves early leaves the others
        waiting for it.
        """
        sampling = Sampling.of(max_gen_len, temperature, top_p, additional_stop_symbols).with_ends(ends)
        tokens = prompt_tokens(self.llma, self.tokenizer, [prompt], sampling, images=image)
        return (
            {"text": progress.text, "end_of_content": progress.finish is not None}
            for step in complete(self.llma, self.tokenizer, tokens, sampling)
            for progress in step
        )

    def compute_logits(
        self, examples: Examples, images: None = None, bos: bool = True, eos: bool = False
    ) -> list[Tensor]:
        """Float32 logits (tokens, vocab) of each example, whole on every rank.

        Args:
            examples: texts, or lists of token ids that are taken as they are.
            bos, eos: whether texts get a beginning- and an end-of-sequence token.
        """
        tokens, _ = example_tokens(self.llma, self.tokenizer, examples, images=images, bos=bos, eos=eos)
        return score_tokens(self.llma, tokens)

    def evaluate_examples(
        self,
        examples: Examples,
        contexts: Examples | None = None,
        images: None = None,
        bos: bool = True,
        eos: bool = False,
    ) -> dict[str, list]:
        """Likelihood of examples, or of what follows their contexts.

        Args:
            examples, bos, eos: as in `compute_logits`.
            contexts: for each example a text (or token list) with which it begins and which is not scored. A token
                that reaches beyond a text's end is scored.

        Returns:
            Lists under log_likelihood, ppl (exponential of the mean negative log-likelihood), max_equal (would
            greedy decoding say the same) and non_context_logits.
        """
        tokens, context_lengths = example_tokens(
            self.llma,
            self.tokenizer,
            examples,
            images=images,
            bos=bos,
            eos=eos,
            contexts=contexts,
            scored=True,
        )
        return evaluate(score_tokens(self.llma, tokens), tokens, context_lengths)
