"""A finetuning run from its options to its last checkpoint."""

import contextlib
import dataclasses
import logging
import socket
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from accessory.checkpoint.folder import Folder
from accessory.checkpoint.layouts import written_layout
from accessory.config import PEFT_TYPES, ModelArgs
from accessory.config.layouts import EXPORT_FORMS
from accessory.data.cache import load_finetune_data
from accessory.data.finetune_data import FinetuneData
from accessory.data.packing import PackedSampler
from accessory.data.sampler import StepSampler
from accessory.files import write_json
from accessory.launch.launcher import Launch
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Pretrained
from accessory.model.transformer import Transformer
from accessory.parallel.placement import refuse_shared_heads, resolve_placement
from accessory.parallel.plan import rows_of_model, split_of, trains
from accessory.parallel.state import ParallelState, Ranks, agreed, all_ranks, on_first, pick_device
from accessory.text.form_files import form_for_training, trained_form
from accessory.text.forms import Form
from accessory.train.allocator import return_freed_memory
from accessory.train.build import build_for_training, refuse_nothing_to_train
from accessory.train.checkpointer import Checkpointer
from accessory.train.fit import ask_memory, chosen_ep_size
from accessory.train.interruption import Interruption, Stop
from accessory.train.loop import FinetuneLoop
from accessory.train.optim import make_optimizer, refuse_absent_optimizer
from accessory.train.options import FinetuneOptions
from accessory.train.output_folder import OPTIONS, held, refuse_earlier_run
from accessory.train.parameters import describe_trainable, warning_without_matrix
from accessory.train.precision import COMPUTE_DTYPES, matmul_precision
from accessory.train.recompute import recompute_activations
from accessory.train.run_log import RunLog
from accessory.train.sharding import device_mesh
from accessory.train.shelf import Shelf
from accessory.train.snapshot import seed_rank
from accessory.train.space import say_space
from accessory.train.trackers import refuse_absent
from accessory.train.validation import split_held_out

logger = logging.getLogger(__name__)

# How long all ranks together wait for one another: one may be reading a large checkpoint.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
# A rank that has written its part, or needs no tokenising, waits for the slowest one; a death is noticed at once.
_PATIENCE = timedelta(hours=8)


def finetune(options: FinetuneOptions, launch: Launch, interruption: Interruption | None = None) -> Stop:
    """Run to the end, or until asked to stop; collective over all ranks of an initialised torch.distributed.

    Args:
        interruption: entered already; None: one for the time of this call.

    Returns:
        Why it stopped before its end, or Stop.NO.

    Raises:
        ValueError, FileNotFoundError, CheckpointError, OSError, FloatingPointError: naming the option, file or
            tensor, on every rank alike.
    """
    with contextlib.ExitStack() as stack:
        interruption = interruption or stack.enter_context(Interruption(launch))
        stack.enter_context(matmul_precision(options.precision))
        return_freed_memory()
        # 1. Ranks with the same options, and a folder that they can all write to.
        everyone = all_ranks()
        agreed(everyone, partial(_refuse_no_model, options), options)
        on_first(everyone, partial(refuse_absent, options.log_to))
        agreed(everyone, partial(refuse_absent_optimizer, options.optimizer))
        if options.expert_parallel_size == "auto":
            ep_size = on_first(everyone, partial(_chosen_ep_size, options, everyone, launch))
            options = dataclasses.replace(options, expert_parallel_size=ep_size)
        layout = partial(
            ParallelState.init,
            options.model_parallel_size,
            options.device,
            timeout=COLLECTIVE_TIMEOUT,
            ep_size=int(options.expert_parallel_size),
        )
        state = agreed(everyone, layout)
        # The folder is held until the last save is on disk.
        output = Path(options.output_dir).absolute()
        folder = agreed(everyone, lambda: stack.enter_context(held(output)) if everyone.is_first else None)
        if folder is not None:
            interruption.at_the_end = folder.tidy_before_the_end
        world = all_ranks(dist.new_group(backend="gloo", timeout=_PATIENCE))
        stack.callback(dist.destroy_process_group, world.group)
        store = Checkpointer(
            options.checkpoints, state, world, keep_last=options.keep_last, without_frozen=options.only_save_trainable
        )
        stack.callback(store.wait)
        store.check_folder()
        resumed = _state_to_resume(options, store)
        on_first(world, partial(_begin, options, output, resumed))
        # 2. All that can be wrong with model and data, before long work.
        saved = None if resumed is None else store.sizes(resumed)
        pretrained = agreed(world, lambda: _resolve(options, state.mp_size, state.ep.size, saved))
        if resumed is None:
            agreed(world, lambda: _check_weights(pretrained))
        ask_memory(options, pretrained.args, state, world, per_host=launch.local_size)
        progress = None if resumed is None else store.check(resumed, pretrained.args)["progress"]
        asked = agreed(world, lambda: _asked_form(options, pretrained))
        data, held_out = _data(options, launch, pretrained, asked, world)
        sampler = agreed(world, partial(_sampler, options, data, world))
        form = agreed(world, lambda: trained_form(pretrained.tokenizer, pretrained.paths, asked, data.prompt_form))
        if progress is not None:
            agreed(world, lambda: sampler.resume(progress["sampler"]))
            agreed(world, lambda: _refuse_another_form(form, progress.get("form"), resumed))
            agreed(world, lambda: _refuse_another_optimizer(options, progress.get("optimizer", "adamw"), resumed))
        # 3. The model, its parameters sharded over all ranks.
        seed_rank(options.seed, world.rank)
        adapted = pretrained.args.peft is not None
        # A training state may leave out what was frozen; correction biases too, in an earlier version.
        partial_state = resumed is None or adapted or not store.is_whole(resumed, pretrained.stored_args)
        model = _build(options, pretrained, state, fill=partial_state)
        optimizer = agreed(world, partial(make_optimizer, model, options))
        loop = FinetuneLoop(options, model, optimizer, data, held_out, sampler, store, form)
        logger.info("%s", describe_trainable(model))
        without_matrix = warning_without_matrix(pretrained.args)
        if without_matrix is not None and world.is_first:
            logger.warning("%s", without_matrix)
        # 4. Steps, from where an earlier run stopped.
        if resumed is not None:
            loop.resume(resumed)
        told = dataclasses.asdict(options)
        on_first(world, partial(write_json, output / OPTIONS, told))
        logger.info("%s", loop.describe())
        if folder is not None:
            say_space(loop.plan(output), output)
        interruption.begin(store.last_saved)
        if folder is not None:
            folder.begun = True
        log = RunLog(
            output,
            total_steps=loop.end,
            first_step=loop.done,
            active=world.is_first,
            log_to=options.log_to,
            settings=told,
        )
        return loop.run(stack.enter_context(log), interruption)


def _refuse_no_model(options: FinetuneOptions) -> None:
    """Raise ValueError where there is nothing to start from, or not all that a new model takes."""
    if options.pretrained_path:
        return
    if not options.llama_config:
        raise ValueError(
            "no model is given: give --pretrained_path FOLDER (or --llama_config FILE and --tokenizer_path FILE, to "
            "train one from nothing)"
        )
    if options.tokenizer_path is None:
        raise ValueError(
            "a model is trained from nothing without --pretrained_path: give --tokenizer_path FILE as well"
        )


def _chosen_ep_size(options: FinetuneOptions, everyone: Ranks, launch: Launch) -> int:
    """What "auto" stands for; where something is wrong with the sizes, what is said of a run without."""
    mp_size, device = options.model_parallel_size, pick_device(options.device, everyone.group)
    if everyone.size % mp_size:
        return 1
    args = _resolve(options, mp_size, 1, None).args
    return chosen_ep_size(options, args, device, ranks=everyone.size, per_host=launch.local_size)


def _begin(options: FinetuneOptions, output: Path, resumed: Path | None) -> None:
    """What rank 0 does first: see that nothing of another run is in the way."""
    shelf = Shelf(options.checkpoints)
    if resumed is None or shelf.folder.resolve() not in resumed.resolve().parents:
        # A run that was killed before its first state is complete may have left models.
        if not (options.auto_resume and shelf.is_begun):
            refuse_earlier_run(output)
        shelf.begin()


def _state_to_resume(options: FinetuneOptions, store: Checkpointer) -> Path | None:
    found = store.latest() if options.auto_resume else None
    say = logger.warning if store.world.is_first else logger.debug
    if found is not None and options.resume is not None:
        say("--auto_resume goes on from %s, not from --resume %s", found, options.resume)
    if found is None and options.resume is not None:
        found = store.locate(options.resume)
    if found is None and options.auto_resume:
        say("--auto_resume finds no training state in %s: beginning anew", store.folder)
    return found


def _resolve(options: FinetuneOptions, mp_size: int, ep_size: int, saved: ModelArgs | None) -> Pretrained:
    """Checkpoint, sizes and tokenizer, with the options' weights of the losses.

    Args:
        saved: sizes of the model that is resumed; correction biases that it has stay, even where they move no more.
    """
    settings: dict[str, Any] = {
        "llama_type": _llama_type(options),
        "llama_config": options.llama_config or None,
        "tokenizer_path": options.tokenizer_path,
        "max_seq_len": options.max_words,
        "adapters": options.adapters,
    }
    if options.pretrained_path:
        found = Pretrained.resolve(options.pretrained_path, **settings, quant=options.quant_args)
    else:
        found = Pretrained.untrained(**settings, quant=options.quant_args)
    weights = {
        name: value
        for name in ("load_balancing_weight", "z_loss_weight")
        if (value := getattr(options, name)) is not None
    }
    if options.bias_update_rate or (saved is not None and saved.owns_corrections):
        found = found.with_corrections()
    refuse_nothing_to_train(found.args)
    _refuse_parts(options, found.args)
    _refuse_rates(options, found.args)
    refuse_shared_heads(found.args, mp_size)
    resolve_placement(found.args, options.expert_placement, mp_size, ep_size=ep_size)
    return dataclasses.replace(found, args=found.args.replace(**weights))


def _refuse_parts(options: FinetuneOptions, args: ModelArgs) -> None:
    """Raise ValueError where the models of the run have no place in the form in which they are to be written."""
    form = f"--export_form {options.export_form}"
    try:
        layout = written_layout(options.export_form, args, EXPORT_FORMS)
    except ValueError as error:  # it begins with the form's name
        adds = ", or leave --bias_update_rate out" if options.bias_update_rate else ""
        raise ValueError(f"--export_form {error}{adds}") from None
    if not layout.plain:
        return
    if args.peft is not None:
        raise ValueError(f"{form} takes whole models, and adapters are trained: leave it out, and merge afterwards")
    if args.quant is not None or options.only_save_trainable:
        raise ValueError(f"{form} takes whole models: leave --only_save_trainable and --quant out")


def _refuse_rates(options: FinetuneOptions, args: ModelArgs) -> None:
    """Raise ValueError where a rate is given to what does not train."""
    trained = {row.kind for row in rows_of_model(args) if trains(row.pattern, args)}
    if options.train_router and "router" not in trained:
        raise ValueError("--train_router is given, and beside adapters the base stays as it is: leave it out")
    for name, kind, what in (
        ("lr_router", "router", "router"),
        ("lr_embeddings", "embedding", "token embeddings"),
        ("lora_plus", "lora", "LoRA updates"),
    ):
        if getattr(options, name) is not None and kind not in trained:
            raise ValueError(f"--{name} is given, and the run trains no {what}: leave it out")


def _llama_type(options: FinetuneOptions) -> str | None:
    """The architecture to train: whoever asks for an adapter gets one, whatever the checkpoint's meta.json says.

    Raises:
        ValueError: it is said how to train adapters, and not that they are to be trained.
    """
    if options.llama_type is not None or not options.adapters:
        return options.llama_type
    stored = Folder(options.pretrained_path[-1]).llama_type if options.pretrained_path else None
    if stored in PEFT_TYPES:
        return stored
    if not options.asks_for_adapters:
        raise ValueError(
            f"--{next(iter(options.adapters))} says how adapters are trained, and none are: give --lora_rank R, or "
            "leave it out to train all weights"
        )
    asked = next(f"--{name}" for name in ("lora_rank", "bias_tuning", "norm_tuning") if getattr(options, name))
    logger.info("%s: adapters are trained above frozen weights (llama_type %s)", asked, PEFT_TYPES[0])
    return PEFT_TYPES[0]


def _check_weights(pretrained: Pretrained) -> None:
    """See that the shards' names and shapes fit: they are read after the data are tokenised, which takes a while."""
    for folder in pretrained.folders:
        weights = folder.weights(pretrained.stored_args, partial=len(pretrained.folders) > 1)
        for file in range(len(folder.files)):
            weights.tensors(file)


def _asked_form(options: FinetuneOptions, pretrained: Pretrained) -> Form | None:
    """The form that --chat_template names; None: the records' own."""
    if options.chat_template is None:
        return None
    form = form_for_training(pretrained.tokenizer, pretrained.paths, options.chat_template)
    if options.packing and not form.ends_answers():
        raise ValueError(
            f"--packing: in the form of --chat_template {options.chat_template} an answer has no end, and a model "
            "would not learn to stop: give a template that ends answers, or leave --packing out"
        )
    return form


def _refuse_another_form(form: Form | None, saved: str | None, resumed: Path | None) -> None:
    """The same number of tokens in each example does not make them the same."""
    if saved is not None and (form is None or form.digest != saved):
        raise ValueError(
            f"{resumed} was saved by a run with another prompt form: give its --chat_template, or begin anew"
        )


def _refuse_another_optimizer(options: FinetuneOptions, saved: str, resumed: Path | None) -> None:
    """What one optimizer has kept of the steps before is not what another one needs."""
    if saved != options.optimizer:
        raise ValueError(f"{resumed} was saved by a run with --optimizer {saved}: give that, or begin anew")


def _data(
    options: FinetuneOptions, launch: Launch, pretrained: Pretrained, form: Form | None, world: Ranks
) -> tuple[FinetuneData, FinetuneData | None]:
    """The examples to learn from, and those that are held out."""

    def load(name: str) -> FinetuneData:
        try:
            return load_finetune_data(
                getattr(options, name),
                pretrained.tokenizer,
                dialog=options.dialog,
                form=form,
                ignore_fields=options.ignore_fields,
                max_words=options.max_words,
                seed=options.seed,
                skip_bad_records=options.skip_bad_records,
                progress=launch.rank == 0,
            )
        except (FileNotFoundError, ValueError) as error:
            if name == "data_config":
                raise
            raise type(error)(f"--{name}: {error}") from None

    def load_alike(name: str) -> FinetuneData:
        # One process of each host tokenises, and finds what is wrong; the others map its files.
        first = agreed(world, lambda: load(name) if launch.local_rank == 0 else None)
        data = agreed(world, lambda: first or load(name))
        agreed(world, partial(_see_that_data_are_alike, data, world))
        return data

    # The smaller one first: what is wrong with it is said before long work.
    other = None if options.eval_data_config is None else load_alike("eval_data_config")
    data = load_alike("data_config")
    return agreed(world, partial(split_held_out, data, other, options, pretrained.tokenizer))


def _sampler(options: FinetuneOptions, data: FinetuneData, world: Ranks) -> StepSampler:
    global_batch = options.batch_size * options.accum_iter * (world.size // options.model_parallel_size)
    if options.packing:
        packed = PackedSampler(data.lengths, global_batch, room=options.max_words, seed=options.seed)
        logger.info(
            "%d examples share %d rows of %d tokens, %.1f%% of them filled",
            *(len(data), len(packed.lengths), options.max_words, 100 * packed.filled),
        )
    sampler = packed if options.packing else StepSampler(data.lengths, global_batch, seed=options.seed)
    if (count := len(sampler.lengths)) < global_batch:
        logger.warning(
            "a step takes %d %s (--batch_size x data-parallel ranks x --accum_iter), and there are %d: an epoch is one "
            "smaller step",
            *(global_batch, "rows" if options.packing else "examples", count),
        )
    return sampler


def _see_that_data_are_alike(data: FinetuneData, world: Ranks) -> None:
    """Each host may read files of its own; the name of the cache is a digest of data, template and tokenizer."""
    if world.first_ones(data.folder.name) != data.folder.name:
        raise ValueError(
            f"rank {world.rank} on {socket.gethostname()} reads other data, or with another tokenizer, than rank 0: "
            "give all hosts the same files"
        )


def _settle_training(options: FinetuneOptions, llma: Transformer) -> None:
    recompute_activations(llma, options.grad_ckpt_policy)
    for name, parameter in llma.named_parameters() if options.train_router is False else ():
        if split_of(name).kind == "router" or split_of(name).part == "router_bias":
            parameter.requires_grad_(False)


def _build(options: FinetuneOptions, pretrained: Pretrained, state: ParallelState, *, fill: bool) -> MetaModel:
    llma = build_for_training(
        pretrained,
        state,
        device_mesh(state),
        data_parallel=options.data_parallel,
        compute_dtype=COMPUTE_DTYPES[options.precision],
        expert_placement=options.expert_placement,
        before_sharding=partial(_settle_training, options),
        seed=options.seed,
        fill=fill,
    )
    return MetaModel(llma, pretrained.tokenizer, pretrained.llama_type).train()
