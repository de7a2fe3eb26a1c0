"""Several processes compute what one does (gloo, on the CPU)."""

import json
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import REPOSITORY, TINY, relative_error, run_net, start_net

import net

ARGUMENTS = [
    "--dataset",
    "FashionMNIST",
    "--epochs",
    "2",
    "--batch-size",
    "10",
    "--with_reconstruction",
]
ARGUMENTS += ["--precision", "fp32", "--log-interval", "2"]


def parameters_after(steps, batch_size, K):
    """A tiny CapsNet's float64 parameters after some steps on 35 digits, K in an image.

    The last batch is short.
    """
    torch.manual_seed(0)
    args = {"lr": 0.001, "lr_decay": 0.5, "epochs": 1, "precision": "fp32", "compile": False}
    model = net.CapsNet(with_reconstruction=True, digits_per_image=K, **TINY).double()
    run = net.Run(None, Namespace(**args), model, steps_per_epoch=steps)
    data = net.Digits(torch.randint(256, (35, 1, 28, 28)).byte(), torch.arange(35) % 10, K)
    batches = list(net.batches(data, batch_size, net.draw_epoch(data, 1, 0)))
    for images, digits, labels in batches[-steps:]:
        net.train_step(run.objective, run.optimizer, images.double(), digits.double(), labels)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def one_of_two(rank, rendezvous, result, *what):
    """What each process does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    torch.save(parameters_after(*what), f"{result}{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("batch_size", "K"), [(8, 2), (1, 1)], ids=["uneven last batch of pairs", "empty share"]
)
def test_two_processes_train_as_one_does(tmp_path, batch_size, K):
    alone = parameters_after(5, batch_size, K)
    arguments = (tmp_path / "rendezvous", tmp_path / "result", 5, batch_size, K)
    mp.spawn(one_of_two, arguments, nprocs=2)
    for rank in range(2):
        assert relative_error(torch.load(tmp_path / f"result{rank}"), alone) < 1e-9


def test_signal_that_comes_while_the_processes_agree_is_not_lost(monkeypatch):
    stop = net.Stop()
    stop.signal = 0
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        dist, "all_reduce", lambda *_: stop.signal or stop.note(signal.SIGTERM, None)
    )
    assert [stop.agreed(), stop.agreed()] == [0, signal.SIGTERM]


def start_two(*arguments, **kwargs):
    """The two processes that torchrun would start."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank, **place} for rank in "01")
    return [start_net(*arguments, env=rank, **kwargs) for rank in ranks]


def finish(processes):
    """Wait; (exit statuses, what each printed)."""
    printed = [process.communicate(timeout=120)[0] for process in processes]
    return [process.returncode for process in processes], printed


def history(folder):
    """The log without what differs from run to run."""
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    times = ("seconds", "images_per_second")
    return [{key: value for key, value in entry.items() if key not in times} for entry in entries]


@pytest.fixture(scope="module")
def alone(fashion, tmp_path_factory):
    """The log of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_net(*ARGUMENTS, "--data-dir", fashion, "--output-dir", folder)
    return history(folder)


def test_only_the_first_process_prints(fashion, tmp_path):
    _, printed = finish(start_two(*ARGUMENTS, "--data-dir", fashion, "--output-dir", tmp_path))
    assert "result" in printed[0] and not printed[1]


def test_two_processes_log_what_one_logs(fashion, tmp_path, alone):
    finish(start_two(*ARGUMENTS, "--data-dir", fashion, "--output-dir", tmp_path))
    for ours, theirs in zip(history(tmp_path), alone, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_signal_to_one_process_stops_both_and_one_process_resumes(fashion, tmp_path, alone):
    long = ["--epochs", 2000, "--lr-decay", 1]
    place = ["--data-dir", fashion, "--output-dir", tmp_path]
    processes = start_two(*ARGUMENTS, *long, *place)
    while not (tmp_path / "last.pt").exists():
        assert processes[0].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    assert finish(processes)[0] == [143, 143]
    before = torch.load(tmp_path / "last.pt")["step"]
    resumed = start_net("--resume", tmp_path, "--data-dir", fashion)
    while not resumed.stdout.readline().startswith("epoch"):
        assert resumed.poll() is None
    resumed.send_signal(signal.SIGTERM)
    assert finish([resumed])[0] == [143]
    assert torch.load(tmp_path / "last.pt")["step"] > before


def test_failure_of_one_process_ends_both(fashion, tmp_path):
    (tmp_path / "args.json").mkdir()  # the first process, which writes, cannot
    processes = start_two(*ARGUMENTS, "--data-dir", fashion, "--output-dir", tmp_path)
    statuses, _ = finish(processes)
    assert statuses[0] == 1 and statuses[1] != 0


def test_torchrun_trains_two_processes(fashion, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", "net.py", "--dataset", "FashionMNIST"]
    command += ["--epochs", "1", "--data-dir", fashion, "--output-dir", tmp_path / "run"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("result") == 1
    assert history(tmp_path / "run")[0]["step"] == 1
