"""An opened checkpoint folder, whatever form its files have: what it holds, and any part of any parameter of it."""

import dataclasses
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.companions import COMPANIONS, CONFIG_FILES, KNOWN, WEIGHT_SUFFIXES
from accessory.checkpoint.containers import open_tensors
from accessory.checkpoint.hub import local_path
from accessory.checkpoint.layouts import Layout, Parts, Source, choose_weights, load_args, parts_of
from accessory.checkpoint.scaled import Scaled, with_factors
from accessory.config import ModelArgs, QuantArgs, part_of_config, read_json
from accessory.config.checks import is_number
from accessory.errors import CheckpointError, first_of
from accessory.gguf_header import folder_of, set_of
from accessory.parallel.box import Box
from accessory.parallel.plan import changes, is_adapter, matrix_of, other_factor, parameter_shapes
from accessory.quant import TENSOR_DTYPES, as_bits
from accessory.text.form_files import META_NAME, SETTINGS_KEY
from accessory.text.gguf import find_gguf
from accessory.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

BASE_KEY = "base_routers"  # of meta.json


class Folder:
    """A checkpoint folder, recognised by the names in it. Its files are mapped when they are asked for, once.

    Of ``hf://org/name`` it is the folder to which that is downloaded. The path of a GGUF file stands for a folder that
    holds this model alone, with what lies beside it.

    Attributes:
        place: the folder, or the GGUF file (of a set the first).
        path: the folder.
        form: as messages name it: "converted" (our shards), "consolidated" (a release), "Hugging Face".
        files: of its weights, in order; of one that lies cut into several the first.
        paths: of all of them.
        config: the file that says its sizes, if there is one: config.json or params.json, or one of the weights.
        llama_type: what meta.json says, if there is one.
        base_routers: what an adapter's meta.json says of its base, see `base.numbers_of`.
        odd: names of entries that belong to no checkpoint.

    Raises:
        FileNotFoundError: no such folder.
        CheckpointError: no weights in it, or a set of shards with gaps or of several runs.
        ValueError: an unreadable meta.json.
        OSError: it cannot be downloaded.
    """

    def __init__(self, path: str | Path) -> None:
        self.place = local_path(path)
        if not self.place.exists():
            raise FileNotFoundError(f"checkpoint folder {self.place} does not exist: check the path")
        self.path = folder_of(self.place)
        if not self.path.is_dir():
            if self.path.suffix in WEIGHT_SUFFIXES or self.path.name in COMPANIONS:
                raise CheckpointError(f"{self.path} is a file: give the folder that holds it, {self.path.parent}")
            raise CheckpointError(f"{self.path} is a file, and no checkpoint's folder: give one")
        names = sorted(entry.name for entry in self.path.iterdir())
        if self.place != self.path:
            own = set_of(self.place.name, names)
            self.place = self.path / own[0]
            names = own + [name for name in names if name in COMPANIONS]
        self._found = choose_weights(self.path, names)
        self.form, self._parts = self._found.form, [[self.path / name for name in own] for own in self._found.files]
        self.files, self.paths = tuple(first for first, *_ in self._parts), tuple(itertools.chain(*self._parts))
        config = next((name for name in CONFIG_FILES if name in names), self._found.config)
        self.config = None if config is None else self.path / config
        self.llama_type, self._settings, self.base_routers = _meta(self.path / META_NAME)
        known = {*(path.name for path in self.paths), *KNOWN}
        self.odd = tuple(name for name in names if name not in known)
        self._stored: dict[int, dict[str, Tensor]] = {}
        self._tensors: dict[int, dict[str, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stored": {}, "_tensors": {}}  # another process maps the files itself

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer in one of its forms."""
        return Tokenizer.find(self.place) is not None

    def load_args(
        self,
        llama_config: Sequence[str | Path] | None = None,
        llama_type: str | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> ModelArgs:
        """The model's sizes from the given config files, else from the folder's own.

        Args:
            llama_type: in place of what meta.json says; it decides whether there are adapters.
            adapters: keys about adapters, which rule over the files.

        Raises:
            CheckpointError: there is none.
            ValueError: it is unusable; names file and key.
        """
        if llama_config is None and self.is_adapter_of_any:
            raise CheckpointError(f"{self.path} is an adapter: give the folder of its base before it")
        if llama_config is None and self.config is None:
            raise CheckpointError(
                f"{self.path} has neither config.json nor params.json: add it, or pass llama_config=PATH"
            )
        own = llama_config is None and self.config is not None
        files = [self.config] if own and self.config is not None else config_files(llama_config or ())
        return load_args(files, llama_type or self.llama_type, adapters, beside=self._settings if own else None)

    @property
    def is_adapter_of_any(self) -> bool:
        """Whether it is an adapter without sizes of its own, which are those of whatever base it is put above."""
        return self._found.adapter is not None

    def adapter_settings(self, base: ModelArgs) -> dict[str, Any]:
        """The keys of our config about such an adapter; empty for any other folder.

        Raises:
            CheckpointError: it is unusable, or no plain LoRA.
        """
        return {} if self._found.adapter is None else self._found.adapter(self.tensors, base)

    def load_quant(self) -> QuantArgs | None:
        """How the folder's matrices are quantized, as its config says; None: they are not.

        A config that is no JSON says nothing: where it is needed `load_args` refuses it, and where another is given
        in its place it does not count.

        Raises:
            ValueError: what it says of quantization is unusable; names the file.
        """
        try:
            values = {} if self.config is None or self.config in self.files else read_json(self.config)
        except ValueError:
            return None
        try:
            return None if values.get("quant") is None else part_of_config("quant", QuantArgs, values["quant"])
        except ValueError as error:
            raise ValueError(f"{self.config}: {error}") from None

    def stored_args(self, llama_config: Sequence[str | Path] | None = None) -> ModelArgs:
        """The folder's sizes with its vocabulary, and how its matrices are quantized, which its own config says.

        Args:
            llama_config: config files in place of the folder's own.

        Raises:
            ValueError: they say otherwise of quantization.
            CheckpointError: as `with_vocabulary`.
        """
        args, own = self.load_args(llama_config), self.load_quant()
        if args.quant is not None and args.quant != own:
            given = ", ".join(map(str, llama_config or ()))
            raise ValueError(
                f"{given} sets quant {args.quant.to_dict()}, and by its own config {self.path} is "
                f"{'not quantized' if own is None else f'quantized otherwise, {own.to_dict()}'}: leave quant out, or "
                "put the config that was written with the weights beside them"
            )
        return self.with_vocabulary(args.replace(quant=own))

    def with_vocabulary(self, args: ModelArgs) -> ModelArgs:
        """The sizes with the rows of the folder's embedding; of an adapter alone, which has none, it stays open.

        Raises:
            CheckpointError: the embedding is missing, and more than an adapter is there.
        """
        if args.vocab_size != -1:
            return args
        rows = self.embedding_rows(args)
        if rows is not None:
            return args.replace(vocab_size=rows)
        if not self.weights(args, partial=True).is_adapter:
            raise CheckpointError(
                f"{self.files[0]} lacks tensor tok_embeddings.weight, and the config does not give vocab_size: copy "
                "the file again, or give vocab_size in the config"
            )
        return args

    def embedding_rows(self, args: ModelArgs) -> int | None:
        """Rows of the folder's embedding; None where it has no embedding.

        Raises:
            CheckpointError: its shape is not an embedding's.
        """
        layout = self.layout(args)
        keys = {row.key for row in layout.rows(args)["tok_embeddings.weight"]}
        # Files that cut the embedding each have a slice of all its rows.
        for file in range(len(self.files) if layout.cut is None else 1):
            for key in keys & self.tensors(file, layout.strips).keys():
                shape = tuple(self.tensors(file, layout.strips)[key].shape)
                if len(shape) != 2 or not shape[0]:
                    raise CheckpointError(
                        f"{self.files[file]}: {key} has shape {shape}, and not a row for each token: "
                        "copy the file again"
                    )
                return shape[0]
        return None

    def stored_dtype(self) -> torch.dtype:
        """The dtype of the weights on disk (of the first tensor of the first file)."""
        return next(iter(self.tensors(0).values())).dtype

    def layout(self, args: ModelArgs, *, probe: int = 0) -> Layout:
        """The layout of the files; looks into file ``probe`` where several have such names."""
        return self._found.layout(self._as_stored, args, probe)

    def _as_stored(self, file: int) -> dict[str, Tensor]:
        """A file's tensors by their keys, factors of coded ones by their own."""
        if file not in self._stored:
            self._stored[file] = open_tensors(*self._parts[file])
        return self._stored[file]

    def _in_others(self, key: str, file: int) -> Tensor | None:
        """A tensor of this name as another file has it."""
        others = (self._as_stored(other) for other in range(len(self.files)) if other != file)
        return next((tensors[key] for tensors in others if key in tensors), None)

    def tensors(self, file: int, prefix: str = "") -> dict[str, Tensor]:
        """A file's tensors by their keys, mapped; without ``prefix`` where a key has it.

        Raises:
            FileNotFoundError, CheckpointError: as `open_tensors`; a tensor with and without prefix.
        """
        if file not in self._tensors:
            self._tensors[file] = with_factors(self._as_stored(file), functools.partial(self._in_others, file=file))
        own = self._tensors[file]
        tensors = {key.removeprefix(prefix): value for key, value in own.items()}
        if len(tensors) < len(own):
            twice = next(key for key in tensors if key in own and prefix + key in own)
            raise CheckpointError(
                f"{self.files[file]} holds both {twice} and {prefix}{twice}, which is one tensor: save it once"
            )
        return tensors

    def weights(self, args: ModelArgs, *, partial: bool = False, probe: int = 0) -> "Weights":
        """The folder's parameters, as a model of these sizes has them.

        Args:
            args: sizes of the model; whether matrices are quantized in the folder is its own to say.
            partial: the folder may lack parameters, as one that overlays another; adapters always may be missing.
            probe: a file that is opened anyway.

        Raises:
            CheckpointError: a file is unusable, or so many cannot hold such a model.
        """
        args = args.replace(quant=self.load_quant())
        layout = self.layout(args, probe=probe)
        obstacles = layout.obstacles(args, len(self.files))
        if obstacles:
            raise CheckpointError(
                f"{self.path}: {len(self.files)} shards cannot hold this model ({'; '.join(obstacles)}): "
                "check the config, or copy the shards of one run"
            )
        return Weights(self, args, layout, partial=partial, first=probe)


class Weights:
    """A folder's parameters, to be read by the box. Memory is taken by what `read` returns, and by nothing else.

    A file is held against the sizes when it is first looked into: names, shapes and types must be those that they ask
    for, or CheckpointError names the file and the tensor.
    """

    def __init__(self, folder: Folder, args: ModelArgs, layout: Layout, *, partial: bool, first: int = 0) -> None:
        self.folder, self.args, self.layout = folder, args, layout
        self._partial, self._first = partial, first
        count = len(folder.files)
        expected: list[list[Source]] = [[] for _ in range(count)]
        homes = self._homes() if layout.cut is None else {}
        self._anywhere: list[Source] = []
        for source in layout.sources(args, count):
            file = homes.get(source.key) if layout.cut is None else source.file
            if file is not None:
                expected[file].append(dataclasses.replace(source, file=file))
            if layout.cut is None:
                self._anywhere.append(source)
        self._expected = tuple(map(tuple, expected))
        self._checked: dict[int, dict[str, Tensor]] = {}
        if layout.cut is None:
            for file in range(count):
                self.tensors(file)
            self._check_whole(folder.path if count > 1 else folder.files[0], self._anywhere, homes)

    def _homes(self) -> dict[str, int]:
        """In which file each key is, of files that hold different tensors."""
        homes: dict[str, int] = {}
        for file, path in enumerate(self.folder.files):
            for key in self.folder.tensors(file, self.layout.strips):
                if homes.setdefault(key, file) != file:
                    raise CheckpointError(
                        f"{path} holds {key}, and so does {self.folder.files[homes[key]].name}: copy the files of one "
                        "checkpoint"
                    )
        return homes

    def expected(self, file: int) -> tuple[Source, ...]:
        """What a file should hold of the parameters; of files that hold different tensors, what it does hold."""
        return self._expected[file]

    def tensors(self, file: int) -> dict[str, Tensor]:
        """A file's tensors, held against the sizes.

        Raises:
            CheckpointError: naming file and tensor.
        """
        if file not in self._checked:
            tensors = self.folder.tensors(file, self.layout.strips)
            tensors = {key: tensor for key, tensor in tensors.items() if not self.layout.passed_over.fullmatch(key)}
            self._check(file, tensors)
            self._checked[file] = tensors
        return self._checked[file]

    def _check(self, file: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.folder.files[file]
        shapes = {source.key: source.shape for source in self._expected[file]}
        unexpected = [key for key in tensors if key not in shapes]
        if unexpected:
            way_out = "the config is of another model, or the file of another run"
            if self.args.peft is None and any(key.endswith(".lora_a.weight") for key in unexpected):
                way_out = "they are an adapter's: give its folder behind its base's, or llama_type mistral_peft"
            raise CheckpointError(f"{path} holds {some(unexpected)} that the model does not have: {way_out}")
        if self.layout.cut is not None:
            self._check_whole(path, self._expected[file], tensors)
        for key, tensor in tensors.items():
            if tuple(tensor.shape) != shapes[key]:
                where = f" in each of {len(self._expected)} shards" if self.layout.cut is not None else ""
                raise CheckpointError(
                    f"{path}: {key} has shape {tuple(tensor.shape)}, config and tokenizer ask for {shapes[key]}"
                    f"{where}: check the config, or copy the shards of one run"
                )
            wanted = TENSOR_DTYPES.get(key.rpartition(".")[2])
            if wanted is None and not tensor.dtype.is_floating_point:
                raise CheckpointError(f"{path}: {key} is {tensor.dtype}; weights must be floating-point")
            if wanted not in (None, tensor.dtype):
                raise CheckpointError(f"{path}: {key} is {tensor.dtype}, not {wanted}: copy it again")

    def _check_whole(self, place: Path, expected: Sequence[Source], held: Iterable[str]) -> None:
        """See that the tensors which are there make up all parameters that must be, each once."""
        held = frozenset(held)
        found: dict[str, list[Source]] = {}
        for source in expected:
            if source.key in held:
                found.setdefault(source.parameter, []).append(source)
        lacking = [
            source.key
            for source in expected
            if source.written
            and source.key not in held
            and not is_adapter(source.parameter)
            # What one row of a parameter holds is not missing where another row's tensors have it.
            and not any(other.box.intersect(source.box) for other in found.get(source.parameter, ()))
        ]
        if lacking and not self._partial:
            if self.is_adapter:
                raise CheckpointError(
                    f"{place} holds an adapter alone: give the folder of its base before it, or make one of the two: "
                    "accessory merge BASE ADAPTER MERGED"
                )
            raise CheckpointError(f"{place} lacks {some(lacking)}: copy it again, or check the config")
        for name, sources in found.items() if self.layout.cut is None else ():
            first = sources[0]
            twice = next((one for one in sources if one is not first and one.box.intersect(first.box)), None)
            if twice is not None:
                raise CheckpointError(
                    f"{place} holds {name} twice, as {first.key} and as {twice.key}: keep one of them"
                )

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds nothing but what finetuning with adapters trains."""
        own = (source for source in self._expected[0] if changes(source.parameter, self.args))
        trained = {source.key for source in own}
        return self.args.peft is not None and self.folder.tensors(0, self.layout.strips).keys() <= trained

    @functools.cached_property
    def _parts(self) -> dict[str, Parts]:
        return parts_of(itertools.chain(*self._expected))

    @functools.cached_property
    def held(self) -> Set[str]:
        """The parameters of which the folder holds any part."""
        self.check_pieces()
        files = enumerate(self._expected)
        return {source.parameter for file, own in files for source in own if source.key in self.tensors(file)}

    def dtype(self, name: str, box: Box) -> torch.dtype:
        """Of a part of a parameter that the folder holds: where its tensors differ, one that rounds none of them."""
        own = list(self._once(name, box)) or list(self._once(name, self._whole(name)))
        met = {tensor.dtype if source.factor == 1 else torch.float32 for source, _, tensor in own}
        if len(met) > 1:
            # PyTorch promotes no 8-bit floats; bfloat16 holds the values of all of them.
            met = {torch.bfloat16 if dtype.itemsize == 1 else dtype for dtype in met}
        return functools.reduce(torch.promote_types, met)

    def dtype_of(self, target: Source) -> torch.dtype:
        """`dtype` of what another layout's source holds."""
        return self.dtype(target.parameter, target.box)

    def holds(self, name: str, box: Box) -> bool:
        """Whether the folder holds this part of a parameter, whole."""
        if self.layout.pads:
            return name in self.held
        return sum(common.numel for _, common, _ in self._once(name, box)) >= box.numel

    def _once(self, name: str, box: Box) -> Iterator[tuple[Source, Box, Tensor]]:
        """What holds a part of a box, without the copies in other files: from the first that is opened anyway."""
        found = self._parts[name].within(box) if name in self._parts else ()
        met: set[Box] = set()
        for source, common in sorted(found, key=lambda one: ((one[0].file or 0) - self._first) % len(self._expected)):
            if common not in met and (tensor := self.tensors(source.file or 0).get(source.key)) is not None:
                met.add(common)
                yield source, common, tensor

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a parameter that the folder holds."""
        part = torch.empty(box.size, dtype=self.dtype(name, box))
        filled = self.copy(name, box, part)
        assert filled == box.numel, f"{name}: {box.numel - filled} elements have no source"
        return part

    def read_scaled(self, name: str, box: Box) -> tuple[Tensor, Tensor] | None:
        """A part of a parameter that the folder holds in 8-bit floats: these, and what each is multiplied by, float32.

        None where it is stored otherwise.
        """
        own = list(self._once(name, box))
        scaled = [(source, common, tensor) for source, common, tensor in own if isinstance(tensor, Scaled)]
        if len(scaled) < len(own) or any(source.factor != 1 for source, *_ in own):
            return None
        codes, factors = torch.empty(box.size, dtype=torch.float8_e4m3fn), torch.empty(box.size)
        for source, common, tensor in scaled:
            source.copy(tensor.coded, common, codes[common.within(box)])
            source.copy(tensor.factors, common, factors[common.within(box)])
        return codes, factors

    def whole(self, name: str) -> Tensor:
        """A parameter that the folder holds."""
        return self.read(name, self._whole(name))

    def copy(self, name: str, box: Box, part: Tensor) -> int:
        """Write what the folder holds of a part of a parameter into a tensor of the box's size.

        Returns:
            How many elements were filled.
        """
        if self.layout.pads and name in self.held:
            part.zero_()
        quantized, filled = bool(matrix_of(name)[1]), 0
        for source, common, tensor in self._once(name, box):
            target = part[common.within(box)]
            if quantized:
                source.copy(as_bits(tensor), common, as_bits(target))
            else:
                source.copy(tensor, common, target)
            filled += common.numel
        return box.numel if self.layout.pads and name in self.held else filled

    def check_pieces(self) -> None:
        """Refuse a folder of which some files hold their part of a tensor and others lack it, or half of an update.

        As an overlay it would mix two models within one matrix. Of the experts' adapters, which are one parameter,
        all must be there or none.

        Raises:
            CheckpointError: naming the tensor and a file that lacks it, or the missing half.
        """
        holders: dict[str, list[Path]] = {}
        wanted: dict[str, list[Path]] = {}
        for file, path in enumerate(self.folder.files):
            tensors = self.tensors(file)
            for source in self._expected[file]:
                whole = source.parameter if is_adapter(source.parameter) else source.key
                wanted.setdefault(whole, []).append(path)
                if source.key in tensors:
                    holders.setdefault(whole, []).append(path)
        for key, paths in holders.items() if not self.layout.pads else ():
            lacking = list((Counter(wanted[key]) - Counter(paths)).elements())
            if lacking:
                raise CheckpointError(
                    f"{lacking[0]} lacks a part of tensor {key}, of which {paths[0].name} has one: copy the folder "
                    "again, or leave the tensor out of all files"
                )
        for key in holders:
            other = other_factor(key)
            if other is not None and other not in holders:
                raise CheckpointError(
                    f"{self.folder.path} holds {key} but not {other}: an update needs both lora_a and lora_b; "
                    "copy the folder again, or leave both out"
                )

    def _whole(self, name: str) -> Box:
        return Box.whole(self._shapes[name])

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(parameter_shapes(self.args))


def config_files(paths: Iterable[str | Path]) -> list[Path]:
    """The config files that are meant by paths, which may be those of folders, here or on the Hub.

    Raises:
        FileNotFoundError: a folder has no config.
        CheckpointError, OSError: as `local_path`.
    """
    return [_config_of(local_path(path, weights=False)) for path in paths]


def _config_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = next((file for name in CONFIG_FILES if (file := path / name).is_file()), find_gguf(path))
    if found is None:
        raise FileNotFoundError(f"{path} has neither {' nor '.join(CONFIG_FILES)}: give the file that says the sizes")
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither infinities nor NaN."""
    return bool(tensor.float().isfinite().all())  # of some 8-bit floats PyTorch does not ask it


def some(keys: Sequence[str]) -> str:
    """The first of several tensors, for a message."""
    return f"tensor{'s' if len(keys) > 1 else ''} {first_of(keys)}"


def _meta(path: Path) -> tuple[str | None, dict[str, Any], list[float] | None]:
    """What meta.json says: llama_type, settings that the folder's config cannot say, and of an adapter's base."""
    if not path.exists():
        return None, {}, None
    meta = read_json(path)
    kind, settings = meta.get("llama_type"), meta.get(SETTINGS_KEY, {})
    if not isinstance(kind, str):
        raise ValueError(f'{path} must say {{"llama_type": "mistral"}} or the like; llama_type is {kind!r}')
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: {SETTINGS_KEY} must be an object, not {settings!r}")
    base = meta.get(BASE_KEY)
    if base is not None and not (isinstance(base, list) and all(map(is_number, base))):
        raise ValueError(f"{path}: {BASE_KEY} must be a list of numbers, not {base!r}: correct or remove it")
    return kind, settings, base
