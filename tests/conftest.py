"""Fixtures that several tests share."""

import sys

import pytest
import torch
from helpers import TINY, write_fashion

import net

torch.set_num_threads(1)  # more threads wait for each other where cores are busy


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """What runs is called net.py, as in README's commands."""
    monkeypatch.setattr(sys, "argv", ["net.py"])


@pytest.fixture(scope="session")
def fashion(tmp_path_factory):
    """A data folder with a small FashionMNIST: 64 training and 40 test images. Do not change it."""
    return write_fashion(tmp_path_factory.mktemp("data"))


@pytest.fixture
def small(monkeypatch):
    """Every CapsNet is tiny unless it says otherwise."""
    for name, width in TINY.items():
        monkeypatch.setitem(net.CapsNet.__init__.__kwdefaults__, name, width)
