"""The real MNIST, fetched if it is not there."""

import hashlib
import os
import re
from contextlib import nullcontext
from itertools import islice

import pytest
import torch
from helpers import REPOSITORY, main
from PIL import Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode

import net


@pytest.fixture(scope="module")
def mnist():
    """Training and test data."""
    return net.load_splits("MNIST", REPOSITORY / "data")


@pytest.mark.parametrize("name", net.MNIST_SHA256)
def test_file_has_the_sum_of_the_original(mnist, name):
    content = (REPOSITORY / "data" / "MNIST" / "raw" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == net.MNIST_SHA256[name]


def test_60000_images_are_for_training_and_10000_for_testing(mnist):
    shapes = [tuple(part.tensors[0].shape) for part in mnist]
    assert shapes == [(60_000, 1, 28, 28), (10_000, 1, 28, 28)]


def test_each_class_is_about_a_tenth_of_either_part(mnist):
    for part in mnist:
        shares = part.tensors[1].bincount(minlength=10) / len(part)
        assert len(shares) == 10
        assert shares.min() > 0.085 and shares.max() < 0.115


def test_first_labels_are_those_of_the_original(mnist):
    assert mnist[0].tensors[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist[1].tensors[1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_pairs_for_testing_are_the_same_for_everybody(mnist):
    _, test = net.load_splits("MultiMNIST", REPOSITORY / "data")
    members, shifts = net.draw_test(test)
    assert members.shape == (100_000, 2) and len(members.unique()) == 10_000
    content = hashlib.sha256(torch.cat([members, shifts.flatten(1)], dim=1).numpy().tobytes())
    for images, digits, _ in net.batches(test, 500, (members[::100], shifts[::100])):
        content.update((255 * images).round().byte().numpy().tobytes())
        content.update((255 * digits).round().byte().numpy().tobytes())
    assert content.hexdigest() == (
        "9209ecfdbf61691f07e30a422e54f753d97bb4d907e7ddb81344fded05eac9a0"
    )


def test_own_image_that_is_mnist_s_is_left_where_it_is(mnist, tmp_path):
    differences = []
    for image in mnist[1].tensors[0][:100]:
        Image.fromarray(image[0].numpy()).save(tmp_path / "digit.png")
        read = net.read_image(tmp_path / "digit.png", 1, 28)[0]
        differences.append((255 * read - image).abs().sum() / image.sum())
    assert torch.stack(differences).median() < 0.05  # moved by a pixel, it is 0.5


def test_predict_reads_digits_drawn_black_on_white(mnist, tmp_path, capsys):
    images, labels = (part[:20] for part in mnist[1].tensors)
    files = [tmp_path / f"{n}.png" for n in range(20)]
    for file, image in zip(files, images, strict=True):
        drawn = Image.fromarray(255 - image[0].numpy()).resize((140, 140))
        ImageOps.expand(drawn, (90, 10, 30, 70), "white").save(file)
    pretrained = REPOSITORY / "results" / "pretrained.pt"
    assert main("--evaluate", pretrained, "--predict", *files) == 0
    said = re.findall(r"\.png: (\d)$", capsys.readouterr().out, re.MULTILINE)
    assert [int(label) for label in said] == labels.tolist()


def test_60_steps_classify_85_percent_of_the_first_1000_test_images(mnist):
    train, test = mnist
    torch.manual_seed(0)
    model = net.CapsNet(conv_channels=32, primary_types=4)
    objective, optimizer = net.Objective(model, "fp32"), torch.optim.Adam(model.parameters(), 0.003)
    drawn = net.draw_epoch(train, seed=0, epoch=0)
    for batch in islice(net.batches(train, 64, drawn), 60):
        net.train_step(objective, optimizer, *batch)
    sums = net.evaluate(model, net.Digits(*test[:1000]), 250)
    assert sums[net.IMAGES] == 1000
    assert sums[net.WRONG] <= 150  # it is about 60


@pytest.fixture
def all_cores():
    """As many threads as this process has cores, unlike in the other tests."""
    affinity = getattr(os, "sched_getaffinity", None)  # on Linux
    torch.set_num_threads(len(affinity(0)) if affinity else os.cpu_count())
    yield
    torch.set_num_threads(1)


def test_pretrained_weights_err_as_often_as_the_file_says(mnist, all_cores):
    model, content = net.load_checkpoint(REPOSITORY / "results" / "pretrained.pt")
    sums = net.evaluate(model, mnist[1], 1000)
    assert sums[net.IMAGES] == 10_000
    assert abs(sums[net.WRONG] - content["measured_wrong"]) <= 2  # borderline, on other hardware


class Products(TorchDispatchMode):
    """Multiplies bf16 as hardware does: sums in float32, the result rounded. Much faster than torch
    on a CPU that has no bf16."""

    NAMES = {"aten::convolution", "aten::bmm", "aten::addmm", "aten::mm"}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        half = [isinstance(arg, torch.Tensor) and arg.dtype == torch.bfloat16 for arg in args]
        if operator.name() not in self.NAMES or not any(half):
            return operator(*args, **(kwargs or {}))
        args = [arg.float() if is_half else arg for arg, is_half in zip(args, half, strict=True)]
        return operator(*args, **(kwargs or {})).bfloat16()


def test_pretrained_weights_give_nearly_the_same_lengths_in_bf16_as_in_fp32(mnist):
    model, _ = net.load_checkpoint(REPOSITORY / "results" / "pretrained.pt")
    batch = next(net.batches(net.Digits(*mnist[1][:500]), 500))
    lengths = []
    model.register_forward_hook(lambda model, inputs, output: lengths.append(output.lengths))
    for precision in ("fp32", "bf16"):
        objective = net.Objective(model, precision)
        with torch.no_grad(), nullcontext() if net.has_bf16(torch.device("cpu")) else Products():
            objective(*batch)
    fp32, bf16 = lengths
    assert 0 < (bf16 - fp32).abs().max() < 0.008  # 0.006; 0.010 if squash were in bf16 too
    assert torch.equal(bf16.argmax(dim=1), fp32.argmax(dim=1))
