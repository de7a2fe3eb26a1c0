"""Sec. 6: images of two digits."""

import math
import re
import signal
from argparse import Namespace
from functools import partial
from itertools import product

import drawings
import pytest
import torch
from helpers import (
    checkpoint,
    leaf,
    log,
    main,
    normal,
    parameters,
    relative_error,
    write_fashion,
)
from PIL import Image, ImageDraw
from torch import nn

import net

ROOM = net.MAX_SHIFT[2]  # pixels around a digit


def digits(labels, size=3, seed=0):
    """Noise as digits of these classes, with room around; no two are the same."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (len(labels), 1, size, size), generator=generator)
    images = torch.nn.functional.pad(images.to(torch.uint8), 4 * (ROOM,))
    return net.Digits(images, torch.as_tensor(labels), digits_per_image=2)


def many(count, classes=10):
    """Digits of random classes, some of them more frequent than others."""
    labels = torch.rand(count, generator=torch.Generator().manual_seed(0)) ** 2 * classes
    return digits(labels.long(), size=1)


@pytest.fixture
def multi(tmp_path, monkeypatch):
    """A data folder with a small MNIST: pixels in training are even, in testing odd, or zero."""
    folder = write_fashion(tmp_path / "data", train=64, test=40)
    (folder / "FashionMNIST").rename(folder / "MNIST")
    for file in (folder / "MNIST" / "raw").iterdir():
        content = bytearray(file.read_bytes())
        if "images" in file.name:
            test = file.name.startswith("t10k")
            content[16:] = bytes(2 * (value // 2) + test for value in content[16:])
        file.write_bytes(content)
    monkeypatch.setattr(net, "MNIST_SHA256", {})
    return folder


@pytest.fixture
def train_multi(train, multi):
    """Call it with flags to train for two epochs of 4 steps; it returns the run folder."""
    return partial(train, "--dataset MultiMNIST --with_reconstruction --epochs 2 --data-dir", multi)


def test_single_class_is_refused(train_multi, capsys):
    train_multi("--validation", 1, status=1)
    assert capsys.readouterr().err.count("pairs need digits of two classes") == 1


# ---- Which digits ----------------------------------------------------------------------------


def test_partner_is_of_another_class():
    data = many(10_000)
    for members, _ in (net.draw_epoch(data, seed=1, epoch=0), net.draw_test(data)):
        labels = data.tensors[1][members]
        assert (labels[:, 0] != labels[:, 1]).all()


def test_every_digit_of_another_class_is_equally_likely_as_a_partner():
    labels = torch.tensor([2, 0, 1, 2, 1, 2, 3, 2])
    for chosen in range(len(labels)):
        generator = torch.Generator().manual_seed(chosen)
        drawn = net.draw_partners(labels, torch.full((20_000,), chosen), generator)
        counts = drawn.bincount(minlength=len(labels))
        others = labels != labels[chosen]
        expected = 20_000 * others / others.sum()
        assert ((counts - expected).abs() <= 5 * expected.sqrt()).all()


def test_epoch_shows_each_digit_over_a_partner():
    data = many(1000)
    members, _ = net.draw_epoch(data, seed=1, epoch=0)
    assert members.shape == (1000, 2) and len(members.unique()) == 1000


def test_each_digit_is_tested_over_10_partners():
    data = many(1000)
    members, _ = net.draw_test(data)
    digit = torch.arange(1000).repeat(10).unsqueeze(1)
    assert members.shape == (10_000, 2) and ((members == digit).sum(dim=1) == 1).all()
    partners = members.sum(dim=1).view(10, 1000)
    assert all(len(column.unique()) >= 8 for column in partners.T)


def test_another_epoch_or_seed_draws_other_pairs_and_shifts():
    drawn = [net.draw_epoch(many(50), *key) for key in product(range(1, 4), repeat=2)]
    for part in zip(*drawn, strict=True):
        assert len({str(numbers.tolist()) for numbers in part}) == 9


def test_all_81_shifts_of_either_digit_are_about_equally_frequent():
    _, shifts = net.draw_epoch(many(60_000), seed=1, epoch=0)
    for own in shifts.unbind(1):
        values, counts = own.unique(dim=0, return_counts=True)
        assert values.tolist() == [list(shift) for shift in product(range(-4, 5), repeat=2)]
        assert (counts - 60_000 / 81).abs().max() < 5 * math.sqrt(60_000 / 81)


def test_digits_of_an_image_are_shifted_independently():
    _, shifts = net.draw_epoch(many(60_000), seed=1, epoch=0)
    same = (shifts[:, 0] == shifts[:, 1]).all(dim=1).sum()
    assert same == pytest.approx(60_000 / 81, abs=5 * math.sqrt(60_000 / 81))


def test_pairs_for_testing_are_those_that_the_results_were_measured_on():
    members, shifts = net.draw_test(digits(torch.arange(100) % 10))
    assert members[:5].tolist() == [[0, 54], [1, 64], [2, 76], [82, 3], [90, 4]]
    assert shifts[:2].tolist() == [[[4, 4], [2, -1]], [[-2, 0], [-4, 4]]]


def test_pairs_are_drawn_on_the_cpu_wherever_the_data_are():
    data = many(50)
    images, labels = data.tensors
    expected = [*net.draw_test(data), *net.draw_epoch(data, 1, 0)]
    data.tensors = (images, Namespace(cpu=lambda: labels))  # with it nothing else works
    drawn = [*net.draw_test(data), *net.draw_epoch(data, 1, 0)]
    assert all(map(torch.equal, drawn, expected))


# ---- The images ------------------------------------------------------------------------------


def test_digits_lie_on_36_pixels_with_4_around(multi):
    data = net.load_data("MultiMNIST", multi, train=True)
    plain = net.load_data("MNIST", multi, train=True)
    assert data.tensors[0].shape == (64, 1, 36, 36)
    assert torch.equal(data.tensors[0][:, :, 4:-4, 4:-4], plain.tensors[0])
    assert data.tensors[0].sum() == plain.tensors[0].sum()


def test_each_digit_has_its_own_shift_and_stays_whole():
    data = digits(range(10))
    members, shifts = net.draw_test(data)
    assert shifts.min() == -4 and shifts.max() == 4
    found = torch.cat([part for _, part, _ in net.batches(data, 7)])
    for digit, member, (down, right) in zip(
        found.flatten(0, 1), members.flatten(), shifts.flatten(0, 1).tolist(), strict=True
    ):
        expected = data.tensors[0][member].roll((down, right), (1, 2))
        assert torch.equal(digit, expected / 255)


def test_image_is_the_sum_of_its_digits_clipped_at_255():
    data = digits(range(10), size=9)  # large enough to overlap
    clipped = 0
    for images, parts, _ in net.batches(data, 7):
        sums = (255 * parts).round().sum(dim=1)
        assert torch.equal(images, sums.clamp(max=255) / 255)
        clipped += (sums > 255).sum()
    assert clipped > 0


def test_label_is_that_of_its_digit():
    images = torch.arange(1, 11).byte().view(10, 1, 1, 1)
    data = net.Digits(torch.nn.functional.pad(images, 4 * (ROOM,)), torch.arange(10), 2)
    for _, parts, labels in net.batches(data, 7, net.draw_epoch(data, 1, 0)):
        assert torch.equal((255 * parts.amax(dim=(2, 3, 4))).round().long() - 1, labels)


def test_labels_of_an_image_ascend_as_predictions_do():
    for _, _, labels in net.batches(many(100), 7):
        lengths = nn.functional.one_hot(labels, 10).sum(dim=1)
        assert torch.equal(net.prediction(lengths, 2), labels)


# ---- Training and test -----------------------------------------------------------------------


@pytest.mark.parametrize(("validation", "count"), [(0, 400), (20, 200)])
def test_no_pair_crosses_from_training_to_test(multi, validation, count):
    train, test = net.load_splits("MultiMNIST", multi, validation)
    assert len(train) == 64 - validation and len(net.draw_test(test)[0]) == count
    whole = net.load_data("MultiMNIST", multi, train=True).tensors[0]
    if validation:
        assert torch.equal(test.tensors[0], whole[-validation:])
    assert torch.equal(train.tensors[0], whole[: len(train)])
    for _, parts, _ in net.batches(train, 16, net.draw_epoch(train, 1, 0)):
        assert not ((255 * parts).round().long() % 2).any()
    for _, parts, _ in net.batches(test, 16):
        odd = ((255 * parts).round().long() % 2).sum(dim=(2, 3, 4))
        assert (odd == (0 if validation else 28 * 28)).all()


@pytest.fixture
def seen_in_testing(monkeypatch):
    """The images that models are tested on."""
    seen, original = [], net.CapsNet.forward

    def spy(model, images, labels=None):
        if not model.training:
            seen.append(images)
        return original(model, images, labels)

    monkeypatch.setattr(net.CapsNet, "forward", spy)
    return seen


def test_test_set_is_the_same_whatever_the_seed_and_the_epoch(train_multi, seen_in_testing):
    for seed in (1, 2):
        train_multi("--seed", seed, name=str(seed))
    assert [images.shape for images in seen_in_testing] == 4 * [(400, 1, 36, 36)]
    assert all(torch.equal(images, seen_in_testing[0]) for images in seen_in_testing)


def test_drawing_test_pairs_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    net.draw_test(many(50))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("step", [2, 6])
def test_run_stopped_and_resumed_ends_as_one_never_stopped(train_multi, interrupt, multi, step):
    whole = train_multi(name="whole")
    interrupt("train_step", step, signal.SIGINT)
    stopped = train_multi(status=130)
    assert main("--resume", stopped, "--data-dir", multi) == 0
    (one, one_log), (other, other_log) = (
        (checkpoint(f)["model"], log(f)) for f in (whole, stopped)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [e["test_loss"] for e in one_log] == [e["test_loss"] for e in other_log]


def test_evaluation_gives_the_error_of_the_log(train_multi, multi, capsys):
    folder = train_multi()
    capsys.readouterr()
    assert main("--evaluate", folder, "--data-dir", multi) == 0
    wrong = log(folder)[-1]["test_wrong"]
    assert f"({wrong} wrong)" in capsys.readouterr().out


def test_header_counts_pairs(train_multi, capsys):
    train_multi()
    assert "MultiMNIST: 64 training and 400 test pairs of 1 x 36 x 36\n" in capsys.readouterr().out


def test_pretrained_file_tells_its_error_on_pairs(train_multi, multi, tmp_path):
    net.save_pretrained(train_multi(), tmp_path / "small.pt", multi)
    _, content = net.load_checkpoint(tmp_path / "small.pt")
    assert content["measured_error"] == 100 * content["measured_wrong"] / 400


# ---- Prediction ------------------------------------------------------------------------------

LENGTHS = torch.tensor([[0.1, 0.9, 0.3, 0.8], [0.7, 0.2, 0.1, 0.6], [0.5, 0.4, 0.3, 0.2]])


def wrong(lengths, labels):
    """How many of the predictions are counted as wrong."""
    output = net.Output(None, lengths, None)
    return net.tally(torch.zeros(3, len(lengths)), output, torch.tensor(labels))[net.WRONG]


def test_prediction_is_the_two_longest_in_ascending_order():
    assert net.prediction(LENGTHS, 2).tolist() == [[1, 3], [0, 3], [0, 1]]


def test_prediction_of_one_digit_is_the_first_of_the_longest():
    lengths = normal(1000, 10).mul(2).round()  # several are equal
    assert torch.equal(net.prediction(lengths, 1), lengths.argmax(dim=1, keepdim=True))


def test_prediction_is_right_only_if_both_are():
    assert wrong(LENGTHS, [[1, 3], [0, 3], [0, 1]]) == 0
    assert wrong(LENGTHS, [[1, 2], [2, 3], [2, 3]]) == 3  # the longest is right, the other, none


def test_order_of_the_labels_does_not_matter_to_prediction_and_margin_loss():
    assert wrong(LENGTHS, [[3, 1], [3, 0], [1, 0]]) == 0
    losses = [net.margin_loss(LENGTHS, torch.tensor(3 * [pair])) for pair in ([1, 3], [3, 1])]
    assert torch.equal(*losses)


# ---- The network -----------------------------------------------------------------------------


def test_capsnet_has_11361808_parameters_and_3200_primary_capsules():
    assert parameters(net.CapsNet, image_size=36, with_reconstruction=True) == 11_361_808
    with torch.device("meta"):
        assert net.CapsNet(image_size=36).digit_caps.weight.shape[1] == 3200


def tiny():
    """A small CapsNet for two digits, the same each time, and what it is trained on."""
    torch.manual_seed(0)
    sizes = {"conv_channels": 8, "primary_types": 2, "decoder_widths": (9, 12)}
    model = net.CapsNet(image_size=20, with_reconstruction=True, digits_per_image=2, **sizes)
    parts = torch.rand(3, 2, 1, 20, 20)
    return model, parts.sum(dim=1).clamp(max=1), parts, torch.tensor([[1, 3], [7, 0], [4, 9]])


def test_each_digit_is_drawn_from_its_own_capsule_alone():
    model, _, _, labels = tiny()
    capsules = normal(3, 10, 16).float()
    drawn = model.decoder(capsules, labels)
    assert drawn.shape == (3, 2, 1, 20, 20)
    for k in range(2):
        alone = model.decoder(capsules, labels[:, k : k + 1])
        assert relative_error(drawn[:, k], alone[:, 0]) < 1e-6
        own = leaf(capsules, torch.float32)
        model.decoder(own, labels)[:, k].sum().backward()
        expected = nn.functional.one_hot(labels[:, k], 10).bool()
        assert torch.equal(own.grad.any(dim=2), expected)


def test_loss_compares_each_drawing_with_its_own_digit():
    model, images, parts, labels = tiny()
    output = model(images, labels)
    squares = (output.reconstruction - parts) ** 2
    expected = squares[:, 0].sum(dim=(1, 2, 3)) + squares[:, 1].sum(dim=(1, 2, 3))
    assert relative_error(model.losses(output, parts, labels)[2], expected) < 1e-6
    swapped = model.losses(output, parts.flip(1), labels)[2]
    assert (swapped != expected).all()


def test_order_of_the_digits_does_not_matter_to_the_losses():
    model, images, parts, labels = tiny()
    one = model.losses(model(images, labels), parts, labels)
    labels, parts = labels.flip(1), parts.flip(1)
    assert relative_error(model.losses(model(images, labels), parts, labels), one) < 1e-6


def test_training_compares_with_the_digits_and_not_with_their_sum():
    model, images, parts, labels = tiny()
    expected = model.losses(model(images, labels), parts, labels)[2].sum()
    _, sums = net.Objective(model, "fp32")(images, parts, labels)
    assert sums[net.RECONSTRUCTION].item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_labels_the_two_longest_capsules_are_drawn():
    model, images, _, _ = tiny()
    output = model(images)
    longest = net.prediction(output.lengths, 2)
    assert torch.equal(output.reconstruction, model(images, longest).reconstruction)


def test_network_of_a_run_on_pairs_draws_two_digits(train_multi):
    model, _ = net.load_checkpoint(train_multi())
    assert model(torch.zeros(3, 1, 36, 36)).reconstruction.shape == (3, 2, 1, 36, 36)


# ---- The baseline ----------------------------------------------------------------------------


def test_baseline_has_24563978_parameters():
    assert parameters(net.MultiBaselineCNN) == 24_563_978


def test_baseline_has_two_convolutions_with_relu_and_pooling_and_a_hidden_layer():
    with torch.device("meta"):
        layers = net.MultiBaselineCNN().layers
    kinds = ["Conv2d", "ReLU", "MaxPool2d"] * 2 + ["Flatten", "Linear", "ReLU", "Linear"]
    assert [type(layer).__name__ for layer in layers] == kinds


def test_loss_of_the_baseline_is_the_cross_entropy_of_a_sigmoid_summed_over_the_classes():
    model, labels = net.MultiBaselineCNN(3, 8, 7), torch.tensor([[6, 0], [1, 2]])
    output = model(torch.rand(2, 3, 8, 8))
    expected = [
        sum(math.log1p(math.exp(-x if k in present else x)) for k, x in enumerate(logits))
        for logits, present in zip(output.lengths.tolist(), labels.tolist(), strict=True)
    ]
    losses = model.losses(output, None, labels)
    assert losses[0].tolist() == pytest.approx(expected, rel=1e-5) and not losses[1:].any()


@pytest.mark.parametrize(
    ("dataset", "name"), [("MNIST", "BaselineCNN"), ("MultiMNIST", "MultiBaselineCNN")]
)
def test_data_set_decides_which_baseline_it_is(dataset, name):
    args = net.build_parser().parse_args(["--model", "baseline", "--dataset", dataset])
    args.in_channels, args.image_size, args.num_classes = 1, 8, 10
    assert type(net.make_model(args)).__name__ == name


# ---- Images of one's own ---------------------------------------------------------------------


@pytest.fixture
def two_digits(tmp_path):
    """An image of a 1 and a 7 side by side."""
    drawings.two_digits().save(tmp_path / "two.png")
    return tmp_path / "two.png"


@pytest.fixture
def said(two_digits, capsys):
    """Call it with what the model says of each class to have what `predict` says."""

    def said(scores):
        network = nn.Identity()
        network.forward = lambda image: net.Output(None, torch.tensor([scores]), None)
        what = {"model": "capsnet", "dataset": "MultiMNIST", "in_channels": 1, "image_size": 36}
        args = Namespace(predict=[two_digits], **what)
        assert net.predict(network, args, torch.device("cpu")) == 0
        return capsys.readouterr().out

    return said


def test_predict_names_both_digits_and_warns_of_none(said, two_digits):
    said_of_both = said([0.1, 0.5, 0.2, 0.9])
    assert said_of_both == f"{two_digits}: 1 and 3\n    0:0.10 1:0.50 2:0.20 3:0.90\n"


def test_second_capsule_that_is_short_is_doubted(said):
    assert "not sure: a length of 0.49" in said([0.1, 0.49, 0.2, 0.9])


def test_digit_around_another_one_is_no_frame(tmp_path):
    image = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(image).ellipse((80, 40, 320, 360), outline=0, width=24)
    ImageDraw.Draw(image).line((200, 140, 200, 260), fill=0, width=24)
    image.save(tmp_path / "nested.png")
    nested = net.read_image(tmp_path / "nested.png", 1, 36, digits_per_image=2)
    middle = nested[0, 0, 18]
    assert middle[:12].any() and middle[18] and middle[24:].any()  # the 0, the 1 in it, the 0
    alone = net.read_image(tmp_path / "nested.png", 1, 28)
    assert alone[0, 0, 14].count_nonzero() < 6  # of one digit the ring is a frame


def test_two_digits_fill_23_of_36_pixels(two_digits):
    image = net.read_image(two_digits, 1, 36, digits_per_image=2)
    rows, columns = image[0, 0].nonzero().unbind(1)
    sides = (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1)
    assert image.shape == (1, 1, 36, 36) and max(sides) == 23


def test_predict_takes_a_run_on_pairs(train_multi, two_digits, capsys):
    folder = train_multi()
    capsys.readouterr()
    assert main("--evaluate", folder, "--predict", two_digits) == 0
    assert re.search(r"two\.png: \d and \d\n", capsys.readouterr().out)
