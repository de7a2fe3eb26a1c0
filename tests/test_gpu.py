"""The GPU computes what the CPU computes. Skipped where there is none."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import NEVER, argv, log, normal, relative_error

import net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = "cuda"
BATCH = 24  # of 64 images: the last batch has 16


@pytest.fixture(autouse=True)
def exact(small):
    """CapsNets are tiny, and their convolutions are in float32, as net.py has them."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
        yield


@pytest.fixture
def last_epoch(train):
    """Call it with flags to train for two epochs by the command line; it returns the last one."""

    def last_epoch(*flags, device=""):
        name = "-".join(["run", *argv(*flags, device)])
        run = f"--with_reconstruction --epochs 2 --batch-size {BATCH}"
        return log(train(run, *flags, name=name, device=device))[-1]

    return last_epoch


def images_and_labels():
    """A batch, in float32."""
    return normal(BATCH, 1, 28, 28).sigmoid().float(), torch.arange(BATCH).unsqueeze(1) % 10


@pytest.mark.parametrize("iterations", [1, 3])
def test_routing_and_its_gradients_are_the_same(iterations):
    u, W, direction = normal(8, 12, 8), normal(10, 12, 8, 16, seed=1), normal(8, 10, 16, seed=2)
    found = []
    for device in ("cpu", GPU):
        inputs = [x.float().to(device).requires_grad_() for x in (u, W)]
        v, c = net.routing(*inputs, iterations)
        found.append([v, c, *torch.autograd.grad(v, inputs, direction.float().to(device))])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert relative_error(ours.cpu(), theirs) < 1e-5


def test_losses_and_gradients_of_the_network_are_the_same():
    torch.manual_seed(0)
    model = net.CapsNet(with_reconstruction=True)
    found = []
    for device in ("cpu", GPU):
        images, labels = (x.to(device) for x in images_and_labels())
        model.to(device)
        losses = model.losses(model(images, labels), images.unsqueeze(1), labels)
        found.append([losses, *torch.autograd.grad(losses[0].sum(), list(model.parameters()))])
    for ours, theirs in zip(found[1], found[0], strict=True):
        assert relative_error(ours.cpu(), theirs) < 1e-4


@pytest.mark.parametrize("digits_per_image", [1, 2])
def test_fp32_training_is_the_same(last_epoch, monkeypatch, digits_per_image):
    monkeypatch.setitem(net.DATASETS, "FashionMNIST", digits_per_image)
    gpu, cpu = last_epoch(), last_epoch(device="--no-cuda")
    for key in ("train_loss", "test_loss", "test_reconstruction_loss"):
        assert gpu[key] == pytest.approx(cpu[key], rel=1e-3)


def test_bf16_training_is_nearly_the_same(last_epoch):
    half, full = last_epoch("--precision bf16"), last_epoch()
    assert half["train_loss"] == pytest.approx(full["train_loss"], rel=0.02)
    assert half["train_loss"] != full["train_loss"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.02)])
def test_compiled_training_is_nearly_the_same(last_epoch, precision, tolerance):
    compiled = last_epoch("--compile --precision", precision)
    eager = last_epoch("--precision", precision)
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=tolerance)


def a_run(*flags):
    """(run, its data on the GPU): 64 random images, one epoch."""
    args = net.build_parser().parse_args(argv("--with_reconstruction --epochs 1", *flags))
    torch.manual_seed(args.seed)
    model = net.CapsNet(with_reconstruction=True).to(GPU)
    images = torch.randint(256, (64, 1, 28, 28), dtype=torch.uint8, device=GPU)
    data = net.Digits(images, torch.arange(64, device=GPU) % 10)
    args.batch_size, args.log_interval = BATCH, 10**9
    return net.Run(None, args, model, math.ceil(len(data) / BATCH)), data


def test_identical_runs_end_with_identical_weights():
    ends = []
    for _ in range(2):
        run, data = a_run("--precision fp32")
        net.train_epoch(run, data, NEVER)
        ends.append([parameter.detach() for parameter in run.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_never_waits_for_the_gpu(precision):
    run, data = a_run("--precision", precision)
    last = math.ceil(len(data) / BATCH)

    def agreed():  # asked after every step
        torch.cuda.set_sync_debug_mode("error" if run.step < last else "default")

    try:
        net.train_epoch(run, data, SimpleNamespace(agreed=agreed))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.step == last
