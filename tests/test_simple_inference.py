"""The reference page's 'Simple Inference' program, as a user copies it, on every number of processes."""

import re
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensors, small_config, write_folder
from ranks import free_port, run_command

from accessory.model.meta import MetaModel

# As the page prints it, but for blanks at the ends of lines.
PAGE = """from accessory.model.meta import MetaModel

import random
import numpy as np

import torch
import torch.distributed as dist
import multiprocessing as mp

def main(world_size, rank) -> None:
    # specify random seed to ensure consistent token sampling among model parallel ranks
    random.seed(0)
    torch.random.manual_seed(0)
    np.random.seed(0)

    dist.init_process_group(
        backend="nccl", rank=rank, world_size=world_size,
        init_method=f"tcp://127.0.0.1:23560",
    )
    torch.cuda.set_device(rank)

    # mp_group identifies which ranks will work collaboratively through model parallelism
    model = MetaModel.from_pretrained("/path/to/converted", max_seq_len=2048,
                                      mp_group=dist.new_group(ranks=list(range(dist.get_world_size()))))

    prompt = "The best programming language in the world is"

    response = model.generate([prompt], images=None, max_gen_len=512)[0]
    if rank == 0:  # without this filter, the response will be printed for `world_size` times
        print(response)
    # or if you want to generate the response token by token
    response = None
    for response_in_progress in model.stream_generate(prompt, image=None, max_gen_len=512):
        response = response_in_progress['text']
        if rank == 0:
            print(response)


if __name__ == "__main__":
    N_GPU = 8 # 1, 2, 4, or 8
    if N_GPU == 1:
        main(world_size=1, rank=0)
    elif N_GPU > 1:
        # You can use whatever method, e.g. torchrun, slurm, etc. for distributed launch
        # Just be sure to initialize torch distributed (by invoking dist.init_process_group)
        # before creating the model if model parallel size > 1 is used
        mp.set_start_method("spawn")
        for rank in range(N_GPU):
            process = mp.Process(target=main, args=(N_GPU, rank))
            process.start()
    else:
        raise ValueError
"""
# The page's parent does not ask how its children ended; the test does.
ENDED_WELL = """
    children = mp.active_children()
    assert len(children) == N_GPU
    for process in children:
        process.join()
        assert process.exitcode == 0
"""
LENGTH = 12


def program(folder: Path, processes: int, *, dtype: str | None = "torch.float32") -> str:
    """The page's program with a user's own folder, port and number of processes, on CPUs."""
    changes = {
        'backend="nccl"': 'backend="gloo"',
        "    torch.cuda.set_device(rank)\n": "",
        "127.0.0.1:23560": f"127.0.0.1:{free_port()}",
        '"/path/to/converted"': repr(str(folder)),
        "N_GPU = 8 ": f"N_GPU = {processes} ",
        "max_gen_len=512": f"max_gen_len={LENGTH}",
    }
    if dtype is not None:
        changes["max_seq_len=2048,"] = f"max_seq_len=2048, dtype={dtype},"
    return substituted(PAGE, changes) + (ENDED_WELL if processes > 1 else "")


def substituted(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text


def run(text: str, tmp_path: Path, *launcher: str) -> str:
    """Standard output of the program; it and all that it started must have ended well."""
    script = tmp_path / "simple.py"
    script.write_text(text)
    done = run_command([sys.executable, *launcher, script])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Error" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(small_tokenizer, tmp_path_factory) -> Path:
    config = small_config(n_layers=1)
    folder = tmp_path_factory.mktemp("simple") / "converted"
    return write_folder(folder, random_tensors(config, 1), config, files=8, tokenizer=small_tokenizer)


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory) -> str:
    """What one process prints that knows nothing of torch.distributed."""
    text = program(folder, 1)
    start = text.index("    dist.init_process_group(")
    text = text[:start] + text[text.index("    # mp_group identifies") :]
    text = re.sub(r",\s+mp_group=.*\n", ")\n", text)
    assert "mp_group=" not in text
    return run(text, tmp_path_factory.mktemp("plain"))


def test_one_process_without_any_init(folder, plain):
    model = MetaModel.from_pretrained(folder, max_seq_len=2048, dtype=torch.float32)
    stream = model.stream_generate("The best programming language in the world is", max_gen_len=LENGTH)
    texts = [progress["text"] for progress in stream]
    assert 1 < len(texts) <= LENGTH
    assert len(texts[-1]) > 1
    assert plain == "".join(f"{text}\n" for text in (texts[-1], *texts))


@pytest.mark.parametrize("processes", [1, 2, *(pytest.param(n, marks=pytest.mark.soak) for n in (4, 8))])
def test_spawned_processes_print_the_same(processes, folder, plain, tmp_path):
    assert run(program(folder, processes), tmp_path) == plain


def test_torchrun_prints_the_same(folder, plain, tmp_path):
    text = program(folder, 1)
    start, end = text.index("        backend="), text.index("    )\n")
    text = text[:start] + '        backend="gloo",\n' + text[end:]
    text = text[: text.index("    N_GPU = ")] + (
        "    import os\n\n    main(world_size=int(os.environ['WORLD_SIZE']), rank=int(os.environ['RANK']))\n"
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert run(text, tmp_path, *launcher) == plain


def test_default_dtype(folder, tmp_path):
    # Without any change to the model's settings: bfloat16 where the CPU has it, so only the form is known.
    lines = run(program(folder, 1, dtype=None), tmp_path).splitlines()
    assert lines[0]
