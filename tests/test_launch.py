"""Who started a process: the variables of torchrun and of SLURM."""

import pytest

from accessory.launch.launcher import Launch, first_host

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "1234",
}
SLURM = {"SLURM_PROCID": "9", "SLURM_NTASKS": "32", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu[03-06]"}


def test_alone() -> None:
    assert Launch.find({}) == Launch(launcher="alone", rank=0, world_size=1, local_rank=0, local_size=1)
    # The shell of a job that runs nothing in parallel.
    assert Launch.find({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}).launcher == "alone"


def test_torchrun() -> None:
    expected = Launch(launcher="torchrun", rank=5, world_size=8, local_rank=1, local_size=4, address="head", port=1234)
    assert Launch.find(TORCHRUN) == expected
    assert Launch.find(TORCHRUN | SLURM) == expected, "torchrun started by srun rules"


def test_slurm() -> None:
    found = Launch.find(SLURM | {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "4711"})
    assert (found.launcher, found.rank, found.world_size) == ("slurm", 9, 32)
    assert (found.local_rank, found.local_size, found.address) == (1, 8, "gpu03")
    assert 20_000 <= found.port < 32_000
    assert found.run == "4711.0"
    assert found.port != Launch.find(SLURM | {"SLURM_JOB_ID": "4712"}).port
    assert found.port != Launch.find(SLURM | {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1"}).port


def test_slurm_in_its_older_words_and_by_hand() -> None:
    older = {("SLURM_NPROCS" if name == "SLURM_NTASKS" else name): value for name, value in SLURM.items()}
    assert Launch.find(older).world_size == 32
    assert Launch.find(SLURM | {"SLURM_TASKS_PER_NODE": "8(x4)"}).local_size == 8
    # A step may have fewer tasks on a host than were asked for the job, and fewer hosts.
    assert Launch.find(SLURM | {"SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x8)"}).local_size == 4
    assert Launch.find(SLURM | {"SLURM_NTASKS_PER_NODE": "64"}).local_size == 32
    uneven = {"SLURM_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2"}
    assert Launch.find(SLURM | uneven).local_size == 4
    assert Launch.find(SLURM | uneven | {"SLURM_NODEID": "1"}).local_size == 8
    by_hand = Launch.find(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (by_hand.address, by_hand.port) == ("10.0.0.1", 4000)
    one_host = Launch.find({"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_NODELIST": "a"})
    assert one_host.local_size == 2


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu[07-09,12],login1", "gpu07"),
        ("gpu7,gpu8", "gpu7"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
        ("node-3", "node-3"),
        ("rack1-node[001-004]-ib", "rack1-node001-ib"),
        ("rack[2-3]node[01,04-07],login", "rack2node01"),
        ("", "127.0.0.1"),
    ],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("environment", "variable"),
    [
        (TORCHRUN | {"WORLD_SIZE": ""}, "WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "five"}, "WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        (TORCHRUN | {"RANK": "8"}, "RANK"),
        (TORCHRUN | {"RANK": "-1"}, "RANK"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT"),
        (SLURM | {"MASTER_PORT": "65536"}, "MASTER_PORT"),
        (SLURM | {"SLURM_PROCID": "32"}, "SLURM_PROCID"),
        (SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS"),
        (SLURM | {"SLURM_NODELIST": "[1-2]"}, "SLURM_NODELIST"),
    ],
)
def test_a_wrong_variable_is_named(environment: dict[str, str], variable: str) -> None:
    with pytest.raises(ValueError, match=variable):
        Launch.find(environment)
