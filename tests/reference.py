"""The oracle: the paper transcribed in plain Python numbers and loops, to be read beside it.

Everything here is for ONE example. Vectors are lists, u[i] is the output of child capsule i, and
W[j][i][d][e] is the matrix W_ij that takes its d-th component to the e-th of parent capsule j.

Every function accepts complex numbers and is analytic in them: comparisons look at the real part
and lengths are not conjugated. So `derivative` can differentiate it by the complex step,
f'(x) = Im f(x + ih) / h, which subtracts nothing and hence is exact to rounding.
"""

import cmath
import math


def exp(x):
    return cmath.exp(x) if isinstance(x, complex) else math.exp(x)


def sqrt(x):
    return cmath.sqrt(x) if isinstance(x, complex) else math.sqrt(x)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def hinge(x):
    """max(0, x)."""
    return x if x.real > 0 else 0.0


def squash(s):
    """Eq. 1: v = |s|^2 / (1 + |s|^2) * s / |s|, and the zero vector stays zero."""
    length = sqrt(dot(s, s))
    if length == 0:
        return [0.0 for _ in s]
    return [length**2 / (1 + length**2) * x / length for x in s]


def predictions(u, W):
    """Eq. 2, right: u_hat_{j|i} = W_ij u_i."""
    return [
        [[dot(u_i, column) for column in zip(*W_j[i], strict=True)] for W_j in W]
        for i, u_i in enumerate(u)
    ]


def weighted_sum(c, u_hat, j):
    """Eq. 2, left: s_j = sum_i c_ij u_hat_{j|i}."""
    children, components = range(len(u_hat)), range(len(u_hat[0][j]))
    return [sum(c[i][j] * u_hat[i][j][e] for i in children) for e in components]


def softmax(b):
    """Eq. 3: c_ij = exp(b_ij) / sum_k exp(b_ik), for one child i over its parents."""
    total = sum(exp(x) for x in b)
    return [exp(x) / total for x in b]


def routing(u, W, r):
    """Procedure 1: returns the parents v[j] and the couplings c[i][j] of the last iteration."""
    children, parents = range(len(u)), range(len(W))
    u_hat = predictions(u, W)
    b = [[0.0 for j in parents] for i in children]
    for _ in range(r):
        c = [softmax(b[i]) for i in children]
        s = [weighted_sum(c, u_hat, j) for j in parents]
        v = [squash(s[j]) for j in parents]
        b = [[b[i][j] + dot(u_hat[i][j], v[j]) for j in parents] for i in children]
    return v, c


def margin_loss(lengths, present):
    """Eq. 4, summed over the classes k, with m+ = 0.9, m- = 0.1 and lambda = 0.5.

    L_k = T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2
    T_k = 1 for the classes that are present: a list of one, or in Sec. 6 of two.
    """
    loss = 0.0
    for k, length in enumerate(lengths):
        T = 1 if k in present else 0
        loss += T * hinge(0.9 - length) ** 2 + 0.5 * (1 - T) * hinge(length - 0.1) ** 2
    return loss


def mask(v, label):
    """Sec. 4.1: all but the capsule of the label are set to zero."""
    return [v[j] if j == label else [0.0 for _ in v[j]] for j in range(len(v))]


def reconstruction_loss(digits, reconstructions):
    """Sec. 4.1: the sum of squared differences, over flat lists of pixel intensities.

    In Sec. 6 an image has two digits: each has a list, and a reconstruction of its own.
    """
    loss = 0.0
    for digit, reconstruction in zip(digits, reconstructions, strict=True):
        loss += sum((x - y) ** 2 for x, y in zip(digit, reconstruction, strict=True))
    return loss


def derivative(f, x, h=1e-30):
    """The gradient of the scalar function f of the flat list x, by the complex step."""
    return [f([*x[:n], x[n] + 1j * h, *x[n + 1 :]]).imag / h for n in range(len(x))]


def nest(flat, *sizes):
    """The flat list as nested lists of the given sizes: nest(range(4), 2, 2) = [[0, 1], [2, 3]]."""
    if len(sizes) == 1:
        return list(flat)
    step = len(flat) // sizes[0]
    return [nest(flat[n * step : (n + 1) * step], *sizes[1:]) for n in range(sizes[0])]
