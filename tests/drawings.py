"""Digits drawn by code, as people draw and photograph them: 29 ways, any digit, any seed."""

import math
import random
from functools import partial

import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

# The strokes of each digit: corners in a square of side 1, right and down. They are rounded off.
STROKES = {
    0: [[(0.5, 0), (0.2, 0.1), (0.15, 0.5), (0.2, 0.9), (0.5, 1), (0.8, 0.9), (0.85, 0.5),
         (0.8, 0.1), (0.5, 0)]],
    1: [[(0.35, 0.2), (0.55, 0), (0.5, 1)]],
    2: [[(0.15, 0.25), (0.25, 0), (0.8, 0), (0.8, 0.4), (0.15, 1), (0.15, 1), (0.85, 1)]],
    3: [[(0.2, 0.1), (0.5, -0.05), (0.85, 0.1), (0.75, 0.45), (0.4, 0.45), (0.45, 0.47),
         (0.85, 0.5), (0.9, 0.9), (0.5, 1.05), (0.15, 0.9)]],
    4: [[(0.6, 0), (0.1, 0.65), (0.1, 0.65), (0.95, 0.65)], [(0.7, 0.35), (0.68, 1)]],
    5: [[(0.8, 0), (0.25, 0), (0.25, 0), (0.2, 0.45), (0.2, 0.45), (0.6, 0.35), (0.9, 0.55),
         (0.8, 0.95), (0.4, 1.05), (0.1, 0.9)]],
    6: [[(0.7, 0), (0.35, 0.2), (0.1, 0.6), (0.2, 1), (0.6, 1.05), (0.85, 0.8), (0.7, 0.5),
         (0.35, 0.55), (0.2, 0.75)]],
    7: [[(0.15, 0), (0.85, 0), (0.85, 0), (0.4, 1)]],
    8: [[(0.8, 0.15), (0.5, -0.05), (0.15, 0.1), (0.25, 0.4), (0.75, 0.6), (0.85, 0.9),
         (0.5, 1.05), (0.15, 0.9), (0.25, 0.6), (0.75, 0.4), (0.8, 0.15)]],
    9: [[(0.8, 0.2), (0.5, -0.05), (0.15, 0.15), (0.25, 0.5), (0.6, 0.5), (0.8, 0.2),
         (0.8, 0.2), (0.7, 1)]],
}  # fmt: skip


def rounded(points):
    """Cut the corners of a stroke, three times."""
    for _ in range(3):
        cut = [points[0]]
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            cut.append((0.75 * x0 + 0.25 * x1, 0.75 * y0 + 0.25 * y1))
            cut.append((0.25 * x0 + 0.75 * x1, 0.25 * y0 + 0.75 * y1))
        points = [*cut, points[-1]]
    return points


def draw(digit, seed, side=400, height=0.6, pen=0.08, ink="#202020", paper="white", mode="RGB"):
    """An image of a digit: `height` a part of the side, `pen` a part of the digit's height."""
    hand = random.Random(f"{digit} {seed}")
    slant, turn = hand.uniform(-0.15, 0.15), math.radians(hand.uniform(-8, 8))
    wide, high = side * height * hand.uniform(0.7, 1), side * height
    across, along = (hand.uniform(0.35, 0.65) * side for _ in range(2))  # of the middle
    width = max(1, round(pen * high))
    image = Image.new(mode, (side, side), paper)
    canvas = ImageDraw.Draw(image)
    for stroke in STROKES[digit]:
        points = []
        for x, y in stroke:
            x = wide * (x - 0.5 - slant * (y - 0.5) + hand.uniform(-0.02, 0.02))
            y = high * (y - 0.5 + hand.uniform(-0.02, 0.02))
            x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
            points.append((across + x, along + y))
        points = rounded(points)
        canvas.line(points, fill=ink, width=width, joint="curve")
        if width > 2:  # round ends
            for x, y in (points[0], points[-1]):
                r = width / 2
                canvas.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    return image


def two_digits(second=240):
    """A 1 and a 7 side by side; the 7 on a square of `second` pixels, the 1 on one of 240."""
    image = Image.new("RGB", (440, 400), "white")
    for digit, side, corner in ((1, 240, (0, 40)), (7, second, (200, 60))):
        image.paste(draw(digit, seed=1, side=side), corner)
    return image


def photo(image, light=None, noise=0, seed=0):
    """Light (H, W), 1 where it is full, on an image; and a camera's noise, in steps of 255."""
    values = pil_to_tensor(image.convert("RGB")).float()  # (3, H, W)
    if light is not None:
        values = values * light
    values += noise * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    return to_pil_image(values.round().clamp(0, 255).byte())


def places(side):
    """(down, right) of each pixel, from -1 to 1."""
    line = torch.linspace(-1, 1, side)
    return torch.meshgrid(line, line, indexing="ij")


def chalk(digit, seed):
    """Pale strokes on a blackboard."""
    return photo(draw(digit, seed, ink="#c8d0c8", paper="#2c4838"), None, 8, seed)


def falling(digit, seed):
    """Light that falls to 72% from one side to the other."""
    _, right = places(400)
    return photo(draw(digit, seed), 0.86 + 0.14 * right)


def lamp(digit, seed):
    """A lamp at one corner: the far corner has half of the light."""
    down, right = places(400)
    return photo(draw(digit, seed, pen=0.05), 0.75 - 0.125 * (down + right), 3, seed)


def vignette(digit, seed):
    """A lens that leaves the corners darker."""
    down, right = places(400)
    return photo(draw(digit, seed), 1 - 0.22 * (down**2 + right**2), 3, seed)


def hard_shadow(digit, seed):
    """A shadow with a sharp edge, through the digit."""
    down, right = places(400)
    return photo(draw(digit, seed), 1 - 0.45 * (right + 0.3 * down > 0.1).float(), 3, seed)


def soft_shadow(digit, seed):
    """The photographer's shadow: a dark half with a soft edge."""
    down, right = places(400)
    return photo(draw(digit, seed), 1 - 0.5 * torch.sigmoid(8 * (down - 0.2 * right)), 3, seed)


def ruled(digit, seed, step, across=True):
    """Printed lines, pale blue, on paper; the digit is written over them."""
    image = Image.new("RGB", (400, 400), "white")
    canvas = ImageDraw.Draw(image)
    for place in range(step // 2, 400, step):
        canvas.line((0, place, 399, place), fill=(150, 185, 235), width=2)
        if across:
            canvas.line((place, 0, place, 399), fill=(150, 185, 235), width=2)
    return photo(ImageChops.multiply(image, draw(digit, seed, pen=0.06, ink="#203080")), None, 3)


def pencil(digit, seed, grey="#707070"):
    """Grey strokes on greyish paper with a grain."""
    image = draw(digit, seed, pen=0.05, ink=grey, paper="#d8d8d4")
    return photo(image.filter(ImageFilter.GaussianBlur(1)), None, 9, seed)


def table(digit, seed, colour="#403028", turn=0, grain=0):
    """A sheet of paper on a dark table."""
    sheet = draw(digit, seed, side=300)
    image = photo(Image.new("RGB", (400, 400), colour), None, grain, seed)
    mask = Image.new("L", sheet.size, 255).rotate(turn, expand=True)
    image.paste(sheet.rotate(turn, expand=True), (45, 50), mask)
    return photo(image, None, 3, seed)


def webcam(digit, seed):
    """Small, blurred, noisy, of little contrast."""
    image = draw(digit, seed, side=160, ink="#505058", paper="#a8a49c")
    return photo(image.filter(ImageFilter.GaussianBlur(1.5)), None, 8, seed)


def turned(digit, seed):
    """A phone held sideways, which says so in EXIF."""
    image = draw(digit, seed).transpose(Image.Transpose.ROTATE_90)
    image.getexif()[274] = 6  # turn by 90 degrees clockwise to see it upright
    return image


def with_speck(digit, seed, side=2):
    """A small digit and a speck of side x side pixels, far from it."""
    image = draw(digit, seed, side=200, height=0.2, pen=0.1)
    ImageDraw.Draw(image).rectangle((15, 170, 14 + side, 169 + side), fill="black")
    return image


def framed(digit, seed):
    """A digit in a printed box, as in a form."""
    image = draw(digit, seed, height=0.5)
    ImageDraw.Draw(image).rectangle((30, 30, 370, 370), outline="black", width=3)
    return image


def margins(digit, seed):
    """A scan with black margins at two sides."""
    image = draw(digit, seed)
    ImageDraw.Draw(image).rectangle((0, 0, 12, 399), fill="black")
    ImageDraw.Draw(image).rectangle((0, 392, 399, 399), fill="black")
    return image


WAYS = {
    "a felt pen": draw,
    "white on black": partial(draw, ink="white", paper="black"),
    "chalk": chalk,
    "a thin pen": partial(draw, side=700, pen=0.01),
    "2 px of 200": partial(draw, side=200, height=0.8, pen=0.0125),
    "a hairline": partial(draw, side=700, height=0.7, pen=0),
    "thick": partial(draw, pen=0.16),
    "very thick": partial(draw, height=0.7, pen=0.23),
    "falling light": falling,
    "a lamp": lamp,
    "a vignette": vignette,
    "a hard shadow": hard_shadow,
    "a soft shadow": soft_shadow,
    "squared paper": partial(ruled, step=25),
    "lined paper": partial(ruled, step=50, across=False),
    "a pencil": pencil,
    "a faint pencil": partial(pencil, grey="#a0a0a0"),
    "a dark table": table,
    "a wooden table": partial(table, colour="#705030", turn=5, grain=12),
    "black margins": margins,
    "white on transparency": partial(draw, ink="white", paper=(0, 0, 0, 0), mode="RGBA"),
    "black on transparency": partial(draw, ink="black", paper=(0, 0, 0, 0), mode="RGBA"),
    "far away": partial(draw, side=1000, height=0.08, pen=0.1),
    "a tiny file": partial(draw, side=24, height=0.7, pen=0.12),
    "blue on yellow": partial(draw, ink="#2030a0", paper="#f0e080"),
    "a phone held sideways": turned,
    "a webcam": webcam,
    "a speck beside it": with_speck,
    "a printed box": framed,
}
