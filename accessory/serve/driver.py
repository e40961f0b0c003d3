"""One process that owns the ranks of a model: starts them, serves requests through them, notices their end."""

import contextlib
import inspect
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from accessory.config import QuantArgs
from accessory.generation.sampling import Sampling
from accessory.launch.placement import Placement
from accessory.model.meta import MetaModel
from accessory.model.pretrained import Paths, Pretrained
from accessory.parallel.placement import resolve_placement
from accessory.serve.client import Client
from accessory.serve.messages import Failed, Link, Ready, Setup
from accessory.serve.processes import RankProcesses
from accessory.serve.ranks import PREFILL_TOKENS, check_settings, name_of
from accessory.serve.request import Load, OnEvent, RankLost
from accessory.serve.stream import AnswerStream

logger = logging.getLogger(__name__)

# Seconds before the second attempt to bring the ranks back; each further pause is twice as long, up to the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class Driver:
    """An `Engine` that owns its ranks.

    Args:
        pretrained_path: a checkpoint folder, here or as hf://org/name[/sub/folder][@revision], or several of
            which later ones overlay earlier ones.
        ranks: processes that hold the model together; None: one for each of ``gpu_ids``, else one.
        gpu_ids: their cards. On a machine without GPUs the ranks compute on the CPU.
        slots: requests that run at once.
        queue: requests that may wait beside them.
        restart: bring the ranks back when one was lost; requests that ran are lost with it.
        prefill_tokens: tokens of prompts that are read in one step.
        timeout: of the ranks' collectives, in seconds; None: torch's own. Waiting for work is none.
        master_addr, master_port: where the ranks meet; None: a port that is free.
        settings: of `MetaModel.from_pretrained`.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: the model cannot be loaded, or a setting makes no sense.
        TypeError: there is no such setting.
        OSError: the ranks cannot meet at the address.
        RankLost: a rank ended while loading.
    """

    def __init__(
        self,
        pretrained_path: Paths,
        *,
        ranks: int | None = None,
        gpu_ids: Sequence[int] | None = None,
        slots: int = 16,
        queue: int = 64,
        restart: bool = False,
        prefill_tokens: int = PREFILL_TOKENS,
        timeout: float | None = None,
        master_addr: str = "127.0.0.1",
        master_port: int | None = None,
        **settings: Any,
    ) -> None:
        check_settings(slots=slots, queue=queue, prefill_tokens=prefill_tokens, timeout=timeout)
        given = inspect.signature(MetaModel.from_pretrained).bind(pretrained_path, **settings).arguments
        self._place = Placement.of(
            ranks, gpu_ids, device=settings.get("device"), master_addr=master_addr, master_port=master_port
        )
        found = _check_model(given, self._place.size)
        self.tokenizer = found.tokenizer
        self._setup = Setup(
            # Where they lie: ranks that are brought back are to load the same commit of what is on the Hub.
            settings={"pretrained_path": found.paths, **settings},
            slots=slots,
            prefill_tokens=prefill_tokens,
            timeout=timeout,
            log_level=logging.getLogger("accessory").level or logging.INFO,
        )
        self.name = name_of(pretrained_path)
        self._queue, self._restart = queue, restart
        self._lock = threading.Lock()
        self._closed = threading.Event()
        ready = self._load_ranks()
        self.args = ready.args
        self._serve()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ready(self) -> bool:
        return self._client.ready

    @property
    def failure(self) -> str | None:
        return self._client.failure

    @property
    def load(self) -> Load:
        return self._client.load

    def submit(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        *,
        reads_only: bool = False,
        seed: int | None = None,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        routes: bool = False,
        on_event: OnEvent | None = None,
    ) -> AnswerStream:
        """Ask for an answer to a prompt; returns at once.

        Args:
            reads_only, seed, logprobs, prompt_logprobs, routes: as `Request` has them.
            on_event: is given each event, or the exception that ends them, from the engine's thread: it must not
                block. None: the stream is to be iterated.

        Raises:
            ValueError: naming the setting.
            Busy: as many wait as may.
            RankLost: the ranks are gone.
        """
        return self._client.submit(
            tokens,
            sampling,
            reads_only=reads_only,
            seed=seed,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            routes=routes,
            on_event=on_event,
        )

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Let all ranks call compute_logits or evaluate_examples of their MetaModel, between two steps.

        Tensors come back on the CPU. Requests that run wait meanwhile.

        Raises:
            RankLost: the ranks are gone.
            Exception: what the method raises.
        """
        return self._client.call(method, *args, **kwargs)

    def close(self) -> None:
        """End the ranks; requests that are left end with RankLost."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        if self._client.ready:
            self._client.close()
            self._processes.wait()
        self._processes.kill()

    def _load_ranks(self) -> Ready:
        """Start ranks and let them load the model."""
        where = "CPU" if self._place.on_cpu else "GPU"
        logger.info(
            "loading %s on %d %s rank%s", self.name, self._place.size, where, "s" if self._place.size > 1 else ""
        )
        start = time.monotonic()
        processes = RankProcesses(self._place)
        with self._lock:
            self._processes = processes
            closed = self._closed.is_set()
        try:
            if closed:
                raise RankLost("the engine was closed")
            ready = processes.load(self._setup)
        except BaseException:
            processes.kill()
            raise
        logger.info("%s is ready after %.1f s", self.name, time.monotonic() - start)
        return ready

    def _serve(self) -> None:
        """Become a client of the ranks, now that they are loaded, and hear what they report."""
        processes = self._processes
        client = Client(
            tokenizer=self.tokenizer,
            args=self.args,
            name=self.name,
            slots=self._setup.slots,
            queued=self._queue,
            send=processes.links[0].send,
        )
        self._client = client
        for link in processes.links:
            arguments = (link, client, processes)
            threading.Thread(target=self._listen, args=arguments, name="rank", daemon=True).start()

    def _listen(self, link: Link, client: Client, processes: RankProcesses) -> None:
        """Hand on what a rank reports; see to its end."""
        told: Exception | None = None
        with contextlib.suppress(EOFError):
            while told is None:
                report = link.receive()
                if isinstance(report, Failed):
                    told = report.error
                else:
                    client.take(report)
        with self._lock:
            if self._closed.is_set() or processes.over:
                return
            processes.over = True
        cause = processes.cause(told)
        # The program that ends by it says why.
        logger.log(logging.ERROR if self._restart else logging.WARNING, "%s: its requests are lost", cause)
        client.fail(RankLost(cause))
        processes.kill()
        if self._restart:
            self._bring_back()

    def _bring_back(self) -> None:
        """Start the ranks again, now or a little later, until they serve or the engine is closed."""
        pause = _FIRST_PAUSE
        while True:
            try:
                self._load_ranks()
            except Exception as error:
                if self._closed.is_set():
                    return
                logger.error("the ranks do not come back: %s; they are started again in %.0f s", error, pause)
            else:
                self._serve()
                return
            if self._closed.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE)


def _check_model(given: Mapping[str, Any], ranks: int) -> Pretrained:
    """Refuse what so many ranks cannot load, before a process is started for each of them; returns what is found.

    Args:
        given: arguments of `MetaModel.from_pretrained`.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as that would, on all ranks.
    """
    names = ("pretrained_path", "llama_type", "llama_config", "tokenizer_path", "max_seq_len")
    found = Pretrained.resolve(
        **{name: given[name] for name in names if name in given}, quant=QuantArgs.of(given.get("quant"))
    )
    resolve_placement(found.args, given.get("expert_placement", "auto"), ranks)
    return found
