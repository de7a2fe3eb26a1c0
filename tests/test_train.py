"""Training and evaluation."""

import io
import math
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import NEVER, argv, checkpoint, log, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode

import net


@pytest.fixture
def data(fashion):
    """(64 training images, 40 test images)."""
    return net.load_splits("FashionMNIST", fashion)


@pytest.fixture
def start(small, tmp_path):
    """Call it with training data and flags: a run that is about to begin."""

    def start(data, *flags):
        args = net.build_parser().parse_args(argv("--no-cuda --precision fp32 --warm-up 1", *flags))
        args.in_channels, args.image_size, args.num_classes = 1, 28, 10
        torch.manual_seed(args.seed)
        model = net.make_model(args)
        return net.Run(tmp_path, args, model, math.ceil(len(data) / args.batch_size))

    return start


def train_epochs(run, data):
    """All epochs of a run, without tests and saves."""
    while run.epoch < run.args.epochs:
        net.train_epoch(run, data, NEVER)
        run.epoch += 1


def weights(folder):
    return checkpoint(folder)["model"]


def equal(a, b):
    """Whether two state dicts are the same, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def copied(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@pytest.fixture
def losses(spy):
    """The training loss of every step, as it is computed, and how many examples it is of."""

    def note(result, model, output, digits, labels):
        return result[0].mean().item(), len(labels), model.training

    return spy(net.CapsNet, "losses", note)


# ---- Learning --------------------------------------------------------------------------------


def test_32_examples_are_learned_without_an_error(start, data):
    few = net.Digits(*data[0][:32])
    run = start(few, "--batch-size 16 --lr 0.01 --epochs 40")
    train_epochs(run, few)
    assert net.averages(net.evaluate(run.model, few, 32), "train")["train_wrong"] == 0


def test_first_losses_are_the_golden_ones(start, data, losses):
    """After a change that is meant to change them, copy what this prints when it fails."""
    flags = "--batch-size 12 --lr 0.001 --lr-decay 0.005 --with_reconstruction"
    net.train_epoch(start(data[0], flags), data[0], NEVER)
    golden = [0.870216, 0.864560, 0.839104, 0.787216, 0.706899]
    assert [loss for loss, _, _ in losses[:5]] == pytest.approx(golden, rel=1e-4)


def test_identical_runs_end_with_identical_weights(train):
    one, other = (train("--epochs 2 --with_reconstruction", name=name) for name in "ab")
    assert equal(weights(one), weights(other))


def test_training_leaves_no_weight_as_it_was(start, data):
    run = start(data[0], "--batch-size 16 --with_reconstruction")
    before = copied(run.model)
    net.train_epoch(run, data[0], NEVER)
    assert all(not torch.equal(before[name], w) for name, w in run.model.state_dict().items())


def test_step_follows_the_gradient_of_the_mean_loss(start, data):
    run = start(data[0], "--with_reconstruction")
    images, digits, labels = batch = next(net.batches(data[0], 24))
    losses = run.model.losses(run.model(images, labels), digits, labels)
    expected = torch.autograd.grad(losses[0].mean(), list(run.model.parameters()))
    net.train_step(run.objective, run.optimizer, *batch)
    for weight, gradient in zip(run.model.parameters(), expected, strict=True):
        assert relative_error(weight.grad, gradient) < 1e-5


def test_adam_has_the_constants_of_its_paper(start, data):
    (group,) = start(data[0]).optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)


def test_loss_in_the_log_is_the_mean_over_the_examples(train, losses):
    (entry,) = log(train("--batch-size 24 --with_reconstruction"))
    of_training = [(loss, count) for loss, count, training in losses if training]
    assert [count for _, count in of_training] == [24, 24, 16]
    mean = sum(loss * count for loss, count in of_training) / 64
    assert entry["train_loss"] == pytest.approx(mean, rel=1e-6)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Call it with Digits to have them on a GPU, where tensors have sizes but no numbers.

    Mixing its tensors with the CPU's fails, and so does reading a number, which would wait for it.
    """
    make_model = net.make_model

    def on_gpu(args):
        with torch.device("cuda"):
            return make_model(args)

    idle = SimpleNamespace(zero_grad=lambda: None, step=lambda: None, param_groups=[{}])
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: idle)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # wants a real one
    monkeypatch.setattr(net, "environment", lambda device: {})
    monkeypatch.setattr(net.Run, "check_finite", lambda run: None)
    monkeypatch.setattr(net, "make_model", on_gpu)
    with FakeTensorMode() as mode:
        yield lambda *data: [
            net.Digits(*(mode.from_tensor(part).to("cuda") for part in split.tensors))
            for split in data
        ]


@pytest.mark.parametrize("flags", ["--with_reconstruction", "--model baseline"])
def test_no_step_waits_for_a_gpu_or_mixes_it_with_the_cpu(start, data, pretended_gpu, flags):
    training, test = pretended_gpu(*data)
    run = start(training, "--batch-size 24 --log-interval 1000", flags)
    net.train_epoch(run, training, NEVER)
    sums = net.evaluate(run.model, test, 24)
    for tensor in (run.sums, run.bad_steps, sums):
        assert tensor.device.type == "cuda"
    assert run.step == 3


def test_restored_state_of_adam_lies_in_memory_as_the_weight_does(small, tmp_path):
    args = net.build_parser().parse_args(argv("--precision fp32"))
    run = net.Run(tmp_path, args, net.CapsNet(in_channels=3), steps_per_epoch=1)
    images = torch.rand(2, 3, 28, 28)
    batch = (images, images.unsqueeze(1), torch.tensor([[0], [1]]))
    net.train_step(run.objective, run.optimizer, *batch)
    run.save()
    saved = checkpoint(tmp_path)
    again = net.Run(tmp_path, args, net.CapsNet(in_channels=3), steps_per_epoch=1, checkpoint=saved)
    weight = again.model.conv1.weight
    for name in ("exp_avg", "exp_avg_sq"):
        state = again.optimizer.state[weight][name]
        assert torch.equal(state, saved["optimizer"]["state"][0][name])
        assert state.stride() == weight.stride()
    assert not weight.is_contiguous()


# ---- Learning rate ---------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "rate"), [(0, 0.1), (500, 0.01), (1000, 0.001)])
def test_learning_rate_falls_exponentially(step, rate):
    assert net.learning_rate(step, 1000, 0.1, 0.01, warm_up=1) == pytest.approx(rate)


@pytest.mark.parametrize(("step", "rate"), [(0, 0.01), (4, 0.05), (9, 0.1), (10, 0.1), (99, 0.1)])
def test_learning_rate_rises_in_the_first_steps(step, rate):
    assert net.learning_rate(step, 100, 0.1, 1, warm_up=10) == pytest.approx(rate)


def test_learning_rate_falls_also_while_it_rises():
    rate = net.learning_rate(4, 100, 0.1, 0.01, warm_up=10)
    assert rate == pytest.approx(0.1 * 0.5 * 0.01**0.04)


@pytest.fixture
def steps(spy):
    """(learning rate, seed) of every training step."""

    def note(result, objective, optimizer, *batch):
        return optimizer.param_groups[0]["lr"], torch.initial_seed()

    return spy(net, "train_step", note)


def test_every_step_has_its_learning_rate(start, data, steps):
    run = start(data[0], "--batch-size 16 --epochs 2 --lr-decay 0.01")
    train_epochs(run, data[0])
    rates = [rate for rate, _ in steps]
    assert rates == pytest.approx([0.001 * 0.01 ** (step / 8) for step in range(8)])


def test_every_step_of_every_process_and_run_has_its_own_dropout(start, data, steps, monkeypatch):
    for rank, seed in ((0, 1), (1, 1), (0, 5)):
        monkeypatch.setattr(net, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(net, "process_count", lambda: 2)
        train_epochs(start(data[0], "--batch-size 16 --epochs 2 --seed", seed), data[0])
    assert len({seed for _, seed in steps}) == len(steps) == 3 * 8


LEARNING = "--epochs 8 --lr 0.01"  # enough for the test error to fall


@pytest.fixture
def wrong_test_set(fashion, tmp_path):
    """A data folder with the same training images, where each test image has the next label."""
    shutil.copytree(fashion, tmp_path / "data")
    file = tmp_path / "data" / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    header, labels = file.read_bytes()[:8], file.read_bytes()[8:]
    file.write_bytes(header + bytes((label + 1) % 10 for label in labels))
    return tmp_path / "data"


@pytest.fixture
def two_runs(train, wrong_test_set):
    """Two runs that differ in their test sets alone."""
    return train(LEARNING), train(LEARNING, "--data-dir", wrong_test_set, name="other")


def test_test_set_has_no_influence_on_training(two_runs):
    ours, others = two_runs
    assert equal(weights(ours), weights(others))


def test_influence_of_the_test_set_would_be_seen(two_runs):
    ours, others = ([entry["test_wrong"] for entry in log(folder)] for folder in two_runs)
    assert ours[-1] < ours[0] and others[-1] >= others[0]


# ---- Evaluation ------------------------------------------------------------------------------


@pytest.fixture
def model(start, data):
    return start(data[0], "--with_reconstruction").model


def test_evaluation_changes_no_weight(model, data):
    before = copied(model)
    net.evaluate(model, data[1], 16)
    assert equal(before, model.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_keeps_the_training_mode(model, data, training):
    net.evaluate(model.train(training), data[1], 16)
    assert all(module.training == training for module in model.modules())


def test_evaluation_is_done_in_evaluation_mode(model, data):
    modes = []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    net.evaluate(model.train(), data[1], 40)
    assert modes == [False]


def test_evaluation_draws_no_random_number(model, data):
    before = torch.get_rng_state()
    net.evaluate(model, data[1], 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_keeps_no_graph(model, data):
    outputs = []
    model.register_forward_hook(lambda module, images, output: outputs.append(output))
    net.evaluate(model, data[1], 40)
    assert not any(tensor.requires_grad for tensor in outputs[0])


def test_evaluation_is_in_fp32_under_autocast(model, data):
    expected = net.evaluate(model, data[1], 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.evaluate(model, data[1], 16), expected)


def test_autocast_would_be_seen(model, data):
    expected = model(data[1].tensors[0] / 255).lengths
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(model(data[1].tensors[0] / 255).lengths, expected)


def test_autocast_is_asked_for_on_the_device_of_the_images(start, data, pretended_gpu, monkeypatch):
    training, test = pretended_gpu(*data)
    run = start(training, "--batch-size 64 --precision bf16")
    asked, original = [], torch.autocast

    def autocast(device, *args, **options):
        asked.append(device)
        return original("cpu", enabled=False)

    monkeypatch.setattr(torch, "autocast", autocast)
    net.train_epoch(run, training, NEVER)
    net.evaluate(run.model, test, 40)
    assert asked == ["cuda", "cuda"]


def test_half_precision_is_bfloat16_where_the_default_is_another(start, data):
    run, seen = start(data[0], "--precision bf16"), []
    run.model.conv1.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    torch.set_autocast_dtype("cpu", torch.float16)  # as a GPU's is
    try:
        run.objective(*next(net.batches(data[0], 4)))
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)
    assert seen == [torch.bfloat16]


def test_run_in_bf16_is_tested_in_fp32(train, data):
    folder = train("--precision bf16 --with_reconstruction")
    model, _ = net.load_checkpoint(folder)
    loss = net.averages(net.evaluate(model, data[1], 1000), "test")["test_loss"]
    assert log(folder)[-1]["test_loss"] == pytest.approx(loss, rel=1e-6)  # 2e-4 in bf16


def test_wrong_count_is_that_of_each_example_alone(model, data):
    wrong = 0
    for image, label in data[1]:
        wrong += model(image[None] / 255).lengths.argmax().item() != label.item()
    assert net.averages(net.evaluate(model, data[1], 7), "test")["test_wrong"] == wrong


def test_losses_are_means_whatever_the_batch_size(model, data):
    one, other = (net.averages(net.evaluate(model, data[1], n), "test") for n in (40, 7))
    assert one == pytest.approx(other, rel=1e-5)


def test_error_is_in_percent():
    sums = torch.tensor([0, 0, 0, 25, 10_000], dtype=torch.float64)
    assert net.averages(sums, "test")["test_error"] == 0.25


# ---- Progress --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """An output that is a terminal."""

    def isatty(self):
        return True


def test_bar_on_a_terminal_shows_loss_and_place(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    progress = net.Progress("epoch 1/1", total=64, done=16)
    progress.advance(16)
    progress.report(0.5)
    shown = str(progress.bar)
    progress.bar.close()
    assert shown.startswith("epoch 1/1  loss 0.5000  ") and shown.endswith(" 32/64")


@pytest.mark.parametrize(("digits_per_image", "images"), [(1, 40), (2, 400)])
def test_bar_of_a_test_counts_the_images_of_all_processes(
    model, data, monkeypatch, spy, digits_per_image, images
):
    monkeypatch.setattr(net, "process_count", lambda: 2)
    bars = spy(net.Progress, "advance", lambda _, bar, more: (bar.done, bar.bar.total))
    net.evaluate(model, net.Digits(*data[1].tensors, digits_per_image), 10)
    assert bars[-1] == (images, images)


# ---- A loss that is not finite ---------------------------------------------------------------


@pytest.fixture
def break_step(monkeypatch):
    """Call it to make the loss of one step, counted from 0, and of all that follow, NaN."""

    def break_step(step):
        original, calls = net.train_step, iter(range(1000))

        def wrapper(*args):
            added = original(*args)
            return added * math.nan if next(calls) >= step else added

        monkeypatch.setattr(net, "train_step", wrapper)

    return break_step


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_step_and_rate_of_a_loss_that_is_not_finite_are_named(train, break_step, capsys, interval):
    break_step(5)
    train("--epochs 2 --lr-decay 0.01 --log-interval", interval, status=1)
    assert f"step 5 (learning rate {0.001 * 0.01 ** (5 / 8):.3g})" in capsys.readouterr().err


def test_loss_that_is_not_finite_leaves_the_last_good_checkpoint(train, break_step):
    break_step(4)
    folder = train("--epochs 2", status=1)
    assert checkpoint(folder)["epoch"] == 1
    assert all(weight.isfinite().all() for weight in weights(folder).values())


def test_signal_after_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    train, interrupt, break_step
):
    interrupt("train_step", 6, signal.SIGTERM)
    break_step(5)
    folder = train("--epochs 2", status=1)
    assert checkpoint(folder)["step"] == 4
    assert all(weight.isfinite().all() for weight in weights(folder).values())


def test_loss_that_is_not_finite_ends_the_run_at_the_next_report(train, break_step, steps):
    break_step(0)
    train("--batch-size 4 --log-interval 3", status=1)  # 16 steps an epoch
    assert len(steps) == 3


def test_exploding_run_saves_nothing(train):
    assert not (train("--lr 1e30", status=1) / "last.pt").exists()


def test_weights_that_are_not_finite_after_the_last_step_are_not_saved(train, capsys):
    assert not (train("--lr 1e30 --batch-size 64", status=1) / "last.pt").exists()
    assert "at step 0 " in capsys.readouterr().err


def test_exploding_run_says_that_a_lower_learning_rate_may_help(train, capsys):
    train("--lr 1e30", status=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "a new run with a lower --lr may help" in line
