"""What a process knows of its launch, which launches are refused, and who says why a run ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from lorafocal import launch
from lorafocal.errors import InputError
from lorafocal.interrupt import agreed
from lorafocal.model.load import local_device

ENVIRONMENT = [
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_USE_CPU",
    *launch._COUNTS, *launch._ENGINES, *launch._ACCELERATE,
]  # fmt: skip

# As accelerate's launcher sets them for every process; read from what it hands on, see tests/engine.
BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
ALONE = BY_ACCELERATE | {"ACCELERATE_USE_CPU": "False"}
ONE_OF_TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def under(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


# --- which launches are refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ONE_OF_TWO,
        BY_ACCELERATE | ONE_OF_TWO,
        ALONE,
        {"MASTER_ADDR": "10.0.0.1"},  # a cluster's, without a launcher
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", **ONE_OF_TWO},  # srun starts one torchrun a node
    ],
)
def test_launches_that_start_what_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    under(monkeypatch, environment)
    launch.check_launch()


@pytest.mark.row("F8")
@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (ALONE | {"MASTER_ADDR": "127.0.0.1"}, "accelerate launch was asked for more than one process and started one"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "srun started 8 processes that do not know of each other"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes"),
    ],
)
def test_launches_that_silently_train_alone_are_refused_with_the_command_that_works(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], complaint: str
) -> None:
    under(monkeypatch, environment)
    with pytest.raises(InputError, match=complaint) as error:
        launch.check_launch()
    assert "torchrun --standalone --nproc-per-node N -m lorafocal train CONFIG" in str(error.value)
    assert "accelerate launch --multi_gpu --num_processes N -m lorafocal train" in str(error.value)


@pytest.mark.row("F8")
@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),  # on a CPU it would silently be data parallel
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "a DeepSpeed config file"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "model.dtype"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "torch.compile"),
    ],
)
def test_accelerates_settings_are_refused_not_ignored(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, what: str
) -> None:
    under(monkeypatch, BY_ACCELERATE | ONE_OF_TWO | {name: value})
    with pytest.raises(InputError, match=what):
        launch.check_launch()


@pytest.mark.row("F8")
def test_deepspeed_without_zero_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}
    under(monkeypatch, BY_ACCELERATE | ONE_OF_TWO | asked)
    with pytest.raises(InputError, match="zero0 is no engine that lorafocal trains in"):
        launch.check_launch()


def test_fewer_processes_than_launched_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.check_world(1)
    under(monkeypatch, ONE_OF_TWO)
    launch.check_world(2)
    for gpu, remedy in ((False, "there is no GPU here, .* say so by `training.use_cpu=true`"), (True, "torchrun")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(InputError, match=f"2 processes were launched.*{remedy}"):
            launch.check_world(1)


def test_gpus_that_nobody_uses_are_mentioned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.idle_gpus(0) is launch.idle_gpus(1) is None
    assert "one of 4 visible GPUs is used" in (launch.idle_gpus(4) or "")
    assert "--nproc-per-node 4 " in (launch.idle_gpus(4) or "")
    under(monkeypatch, ONE_OF_TWO)
    assert launch.idle_gpus(4) is None


@pytest.mark.row("50")
def test_a_process_takes_the_gpu_of_its_rank_or_the_one_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not another rank's: not even before the ranks have met."""
    under(monkeypatch, ONE_OF_TWO)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for visible, expected in ((2, "cuda:1"), (1, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        assert local_device() == torch.device(expected)


# --- who speaks ---------------------------------------------------------------------------------------------


def test_alone_or_first_speaks_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    launch.last_words("lorafocal: wrong")
    assert capsys.readouterr().err == "lorafocal: wrong\n"
    under(monkeypatch, ONE_OF_TWO | {"RANK": "0"})
    launch.last_words("lorafocal: wrong")
    assert capsys.readouterr().err == "lorafocal: wrong\n"


def test_another_rank_leaves_it_to_the_first_and_says_its_number_where_it_is_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    under(monkeypatch, ONE_OF_TWO)
    monkeypatch.setattr(launch, "FIRST_SPEAKS_S", 10.0)
    asked = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))  # as torchrun does when rank 0 has ended
    asked.start()
    launch.last_words("lorafocal: wrong")
    asked.join()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(launch, "FIRST_SPEAKS_S", 0.1)
    launch.last_words("lorafocal: wrong")
    assert capsys.readouterr().err == "rank 1 of 2: lorafocal: wrong\n"


def test_warnings_come_from_the_first_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logger = logging.getLogger("some.package")
    with warnings.catch_warnings(record=True) as caught:
        try:
            launch.quiet_unless_main()
            logger.warning("from the first")
            under(monkeypatch, ONE_OF_TWO)
            launch.quiet_unless_main()
            logger.warning("from another")
            logger.error("an error of another")
            warnings.warn("from another", UserWarning, stacklevel=1)
        finally:
            logging.disable(logging.NOTSET)
    assert [record.message for record in caplog.records] == ["from the first", "an error of another"]
    assert not caught


# --- together -----------------------------------------------------------------------------------------------


def test_alone_there_is_nobody_to_wait_for() -> None:
    with launch.main_process_first():
        pass
    launch.meet()
    launch.shutdown()
    assert agreed(None, torch.device("cpu")) is None
    assert agreed(signal.SIGINT, torch.device("cpu")) is signal.SIGINT


@pytest.mark.row("F7")
def test_shutdown_leaves_the_process_group() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert agreed(signal.SIGTERM, torch.device("cpu")) is signal.SIGTERM
    assert agreed(None, torch.device("cpu")) is None
    launch.shutdown()
    assert not dist.is_initialized()
    launch.shutdown()


def test_over_nccl_a_process_that_failed_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its farewell would wait for ranks that wait for this one, and the launcher for all of them."""
    ended: list[int] = []

    def end(code: int) -> None:
        ended.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
        for stdout in (sys.stdout, None, SimpleNamespace(flush=Mock(side_effect=BrokenPipeError))):
            patch.setattr(sys, "stdout", stdout)
            with pytest.raises(SystemExit):
                launch.leave(2)
    assert dist.is_initialized()
    with pytest.raises(SystemExit) as over_gloo:
        launch.leave(3)
    assert over_gloo.value.code == 3
    assert not dist.is_initialized()
    assert ended == [2] * 3


@pytest.mark.parametrize(
    ("ended", "code", "said"),
    [
        ({0: 2, 1: -15}, 2, ""),  # its own message said why
        ({1: -9, 0: -15}, 137, "rank 1 was killed by SIGKILL"),
        ({1: 1, 0: -15}, 1, "rank 1 ended first, with exit code 1"),
    ],
)
def test_the_launcher_ends_as_the_process_that_failed_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ended: Mapping[int, int], code: int, said: str
) -> None:
    def run(words: list[str]) -> None:
        failures = {rank: ProcessFailure(rank, 1, exitcode, "<N/A>") for rank, exitcode in ended.items()}
        for after, failure in enumerate(failures.values()):
            failure.timestamp = after
        raise ChildFailedError("lorafocal", failures)

    monkeypatch.setattr("torch.distributed.run.main", run)
    assert launch.torchrun(["-m", "lorafocal"]) == code
    assert said in capsys.readouterr().err


def test_the_launcher_ends_by_the_signal_that_it_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str]) -> None:
        raise SignalException("asked to end", signal.SIGTERM)

    monkeypatch.setattr("torch.distributed.run.main", run)
    assert launch.torchrun([]) == 128 + signal.SIGTERM
    monkeypatch.setattr("torch.distributed.run.main", lambda words: None)
    assert launch.torchrun([]) == 0


def test_the_launcher_leaves_time_for_a_step_and_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    name, found = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", []
    monkeypatch.setattr("torch.distributed.run.main", lambda words: found.append(os.environ[name]))
    monkeypatch.setenv(name, "7")
    launch.torchrun([])
    monkeypatch.delenv(name)
    launch.torchrun([])
    assert found == ["7", launch.STOPPED_WITHIN_S]
