"""Several processes compute what one does (gloo, on the CPU)."""

import contextlib
import os
import signal
import socket
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from helpers import (
    REPOSITORY,
    TINY,
    argv,
    checkpoint,
    finish,
    fork,
    log,
    main,
    print_to,
    relative_error,
    start_child,
    wait_for,
)
from torch.distributed.run import main as torchrun

import net

RUN = "--dataset FashionMNIST --with_reconstruction --precision fp32 --batch-size 10 --warm-up 1"
RUN += " --test-batch-size 7"  # each process tests three batches, the last one is short


# ---- One step --------------------------------------------------------------------------------


def parameters_after(steps, batch_size, K):
    """A tiny CapsNet's float64 parameters after some steps on 35 digits, K in an image.

    The last batch is short.
    """
    torch.manual_seed(0)
    args = {
        "lr": 0.001,
        "lr_decay": 0.5,
        "warm_up": 1,
        "epochs": 1,
        "precision": "fp32",
        "compile": False,
    }
    model = net.CapsNet(with_reconstruction=True, digits_per_image=K, **TINY).double()
    run = net.Run(None, Namespace(**args), model, steps_per_epoch=steps)
    data = net.Digits(torch.randint(256, (35, 1, 28, 28)).byte(), torch.arange(35) % 10, K)
    batches = list(net.batches(data, batch_size, net.draw_epoch(data, 1, 0)))
    for images, digits, labels in batches[-steps:]:
        net.train_step(run.objective, run.optimizer, images.double(), digits.double(), labels)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


CASES = {"uneven last batch of pairs": (8, 2), "empty share": (1, 1)}  # batch size, K


def one_of_two(rank, folder):
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    parameters = {case: parameters_after(5, *sizes) for case, sizes in CASES.items()}
    torch.save(parameters, folder / f"result{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained_by_two(tmp_path_factory):
    """The parameters that each of two processes has, in every case."""
    folder = tmp_path_factory.mktemp("two")
    assert finish(*(fork(one_of_two, rank, folder) for rank in range(2))) == [0, 0]
    return [torch.load(folder / f"result{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(trained_by_two, case):
    alone = parameters_after(5, *CASES[case])
    for parameters in trained_by_two:
        assert relative_error(parameters[case], alone) < 1e-9


# ---- A run -----------------------------------------------------------------------------------


def start_two(folder, *parts):
    """The two processes that torchrun would start; what they print is in folder/0 and folder/1."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank, **place} for rank in "01")
    return [start_child(folder / rank["RANK"], *parts, **rank) for rank in ranks]


def history(folder):
    """The log without what differs from run to run."""
    times = {"seconds", "images_per_second"}
    return [{key: entry[key] for key in entry.keys() - times} for entry in log(folder)]


@pytest.fixture(scope="module")
def run_of_two(fashion, tmp_path_factory):
    """The folder of a run of two epochs that two processes trained."""
    folder = tmp_path_factory.mktemp("run")
    places = ("--data-dir", fashion, "--output-dir", folder / "run")
    assert finish(*start_two(folder, RUN, "--epochs 2", *places)) == [0, 0]
    return folder


def test_only_the_first_process_prints(run_of_two):
    assert "result" in (run_of_two / "0").read_text()
    assert (run_of_two / "1").read_text() == ""


def test_two_processes_log_what_one_logs(run_of_two, train):
    alone = train(RUN, "--epochs 2")
    for ours, theirs in zip(history(run_of_two / "run"), history(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_signal_to_one_process_stops_both_and_one_process_resumes(
    small, interrupt, fashion, tmp_path
):
    places = ("--data-dir", fashion, "--output-dir", tmp_path / "run")
    processes = start_two(tmp_path, RUN, "--epochs 100000 --lr-decay 1", *places)
    wait_for((tmp_path / "run" / "last.pt").exists, *processes)
    processes[1].terminate()
    assert finish(*processes) == [143, 143]
    before = checkpoint(tmp_path / "run")["step"]
    interrupt("train_step", 3, signal.SIGTERM)
    assert main("--resume", tmp_path / "run", "--data-dir", fashion) == 143
    assert checkpoint(tmp_path / "run")["step"] == before + 3


def test_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch):
    stop = net.Stop()
    stop.signal = 0
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        dist, "all_reduce", lambda *_: stop.signal or stop.note(signal.SIGTERM, None)
    )
    assert [stop.agreed(), stop.agreed()] == [0, signal.SIGTERM]


def test_signal_that_torchrun_passes_on_is_no_second_one(monkeypatch):
    stop = net.Stop()
    stop.signal = signal.SIGTERM  # sent to all processes, torchrun and this one
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(net.os, "_exit", lambda status: pytest.fail("ended at once"))
    stop.note(signal.SIGTERM, None)
    assert stop.signal == signal.SIGTERM


def test_signal_to_all_processes_is_not_added_up(monkeypatch):
    asked, stop = [], net.Stop()
    stop.signal = signal.SIGINT
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *operation: asked.extend(operation))
    assert stop.agreed() == signal.SIGINT and asked == [dist.ReduceOp.MAX]


@pytest.mark.parametrize("rank", [0, 1])
def test_data_are_fetched_by_the_first_process_first(monkeypatch, rank):
    order = []
    monkeypatch.setattr(net, "rank", lambda: rank)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", lambda: order.append("meet"))
    with net.first_process_first():
        order.append("fetch")
    assert order == (["meet", "fetch"] if rank else ["fetch", "meet"])


def test_data_are_loaded_when_the_first_process_has_them(trained, fashion, spy, monkeypatch):
    order = []

    @contextlib.contextmanager
    def turn():
        order.append("begin")
        yield
        order.append("end")

    monkeypatch.setattr(net, "first_process_first", turn)
    spy(net, "load_splits", lambda *_: order.append("load"))
    assert main("--evaluate", trained, "--data-dir", fashion) == 0
    assert order == ["begin", "load", "end"]


def test_other_processes_write_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(net, "rank", lambda: 1)
    net.write_file(tmp_path / "file", b"content")
    assert not list(tmp_path.iterdir())


def test_failure_of_one_process_ends_both(fashion, tmp_path):
    (tmp_path / "run" / "args.json").mkdir(parents=True)  # the first, which writes, cannot
    places = ("--data-dir", fashion, "--output-dir", tmp_path / "run")
    first, second = finish(*start_two(tmp_path, RUN, "--epochs 2", *places))
    assert first == 1 and second not in (None, 0)


def run_torchrun(arguments, output):
    """What `torchrun ARGUMENTS` does, in a process of its own: it changes signal handlers."""
    print_to(output)
    os.chdir(REPOSITORY)
    os.environ["OMP_NUM_THREADS"] = "1"
    torchrun(arguments)


def test_torchrun_trains_two_processes(fashion, tmp_path):
    run = "net.py --no-cuda --dataset FashionMNIST --epochs 1"
    places = ("--data-dir", fashion, "--output-dir", tmp_path / "run")
    arguments = argv("--standalone --nproc-per-node 2", run, *places)
    assert finish(fork(run_torchrun, arguments, tmp_path / "output")) == [0]
    assert (tmp_path / "output").read_text().count("result") == 1
    assert log(tmp_path / "run")[0]["step"] == 1
