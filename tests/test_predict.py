"""Images of one's own, made like the data set's."""

from types import SimpleNamespace

import drawings
import numpy as np
import pytest
import torch
from helpers import REPOSITORY
from PIL import Image, ImageDraw

import net

STROKES = ((0.7, 1), (0.7, 0), (0, 0.7), (1, 0.7))  # a 4, in the unit square


def draw(file, side=200, paper="black", ink="white", digit=100, at=(50, 50), mode="RGB"):
    """Draw a 4 of `digit` pixels, whose top left corner is `at`, and return the file."""
    image = Image.new(mode, (side, side), paper)
    points = [(at[0] + x * digit, at[1] + y * digit) for x, y in STROKES]
    ImageDraw.Draw(image).line(points, fill=ink, width=max(1, digit // 10), joint="curve")
    image.save(file)
    return file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "digit.png"


@pytest.fixture
def four(file):
    """A 4, read."""
    return net.read_image(draw(file), 1, 28)


def box(image):
    """Height and width of what is not black."""
    rows, columns = image[0, 0].nonzero().unbind(1)
    return (rows.max() - rows.min() + 1).item(), (columns.max() - columns.min() + 1).item()


def centre(image):
    """The centre of mass, (down, right)."""
    mass, places = image[0, 0] / image.sum(), torch.arange(image.shape[-1])
    return (mass.sum(1) @ places.float()).item(), (mass.sum(0) @ places.float()).item()


def difference(a, b):
    """How far two images are apart, as a part of the ink, but for one pixel of place."""
    moved = [a.roll((down, right), (-2, -1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return min(((image - b).abs().sum() / b.sum()).item() for image in moved)


def test_image_becomes_a_batch_of_one(four):
    assert four.shape == (1, 1, 28, 28) and four.dtype == torch.float32


def test_digit_becomes_bright_on_dark(four):
    assert four.min() == 0 and four.max() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("paper", "ink", "mode"),
    [("white", "black", "RGB"), ("#d0d0d0", "#606060", "RGB")]
    + [((0, 0, 0, 0), ink, "RGBA") for ink in ("black", "white", "#f0f0f0")],  # transparent
)
def test_colours_of_paper_and_ink_do_not_matter(file, four, paper, ink, mode):
    image = net.read_image(draw(file, paper=paper, ink=ink, mode=mode), 1, 28)
    assert (image - four).abs().max() < 1e-5


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "i4")])
def test_16_bits_a_pixel_read_like_8(file, four, mode, kind):
    with Image.open(file) as image:
        grey = 20000 + np.asarray(image.convert("L")).astype(kind) * 157  # to 60035, not to 255
    file = file.with_suffix(".tiff")
    Image.frombytes(mode, grey.shape[::-1], grey.astype(kind).tobytes()).save(file)
    assert (net.read_image(file, 1, 28) - four).abs().max() < 0.02


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_grey_and_palette_images_read_like_colour(file, four, mode):
    with Image.open(file) as image:
        image.convert(mode).save(file)
    assert (net.read_image(file, 1, 28) - four).abs().max() < 0.01


@pytest.mark.parametrize("side", [60, 100, 150, 1000])
def test_size_of_the_image_hardly_matters(file, four, side):
    with Image.open(file) as image:
        image.resize((side, side)).save(file)
    assert difference(net.read_image(file, 1, 28), four) < 0.4  # mirrored it is 0.96


@pytest.mark.parametrize("at", [(5, 5), (5, 95), (95, 5), (95, 95)])
def test_place_of_the_digit_does_not_matter(file, four, at):
    assert torch.equal(net.read_image(draw(file, at=at), 1, 28), four)


@pytest.mark.parametrize("size", [28, 32])
def test_centre_of_mass_comes_to_the_middle(file, size):
    middle = (size / 2, size / 2)
    found = centre(net.read_image(draw(file, at=(0, 90)), 1, size))
    assert found == pytest.approx(middle, abs=0.51)


@pytest.mark.parametrize("size", [28, 56])
def test_digit_fills_20_of_28_pixels(file, size):
    assert max(box(net.read_image(draw(file), 1, size))) == size * 20 // 28


def test_proportions_are_kept(file):
    image = Image.new("L", (100, 100))
    ImageDraw.Draw(image).rectangle((20, 30, 79, 59), fill="white")  # 60 wide, 30 high
    image.save(file)
    assert box(net.read_image(file, 1, 28)) == (10, 20)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_digit_that_is_heavy_on_one_side_stays_whole(file, turn):
    image = Image.new("L", (200, 200))
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((60, 20, 139, 59), fill="white")
    canvas.rectangle((98, 60, 101, 179), fill="white")  # 160 high, 80 wide
    image.rotate(turn).save(file)
    assert box(net.read_image(file, 1, 28)) == ((20, 10) if turn in (0, 180) else (10, 20))


def test_line_one_pixel_wide_survives(file):
    image = Image.new("L", (200, 200))
    ImageDraw.Draw(image).line((100, 20, 100, 180), fill="white")
    image.save(file)
    assert box(net.read_image(file, 1, 28)) == (20, 1)


def test_digit_made_like_the_data_set_s_is_left_nearly_as_it_is(file, four):
    Image.fromarray((255 * four[0, 0]).byte().numpy()).save(file)
    assert difference(net.read_image(file, 1, 28), four) < 0.05


def test_colour_image_is_only_scaled(file):
    Image.new("RGB", (50, 70), (255, 0, 51)).save(file)
    expected = torch.tensor([1, 0, 0.2]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    assert torch.allclose(net.read_image(file, 3, 32), expected)


@pytest.mark.parametrize("colour", ["black", "grey", "white"])
def test_empty_image_is_refused_by_name(file, colour):
    Image.new("L", (50, 50), colour).save(file)
    with pytest.raises(net.Failure, match="digit.png is empty"):
        net.read_image(file, 1, 28)


def test_photo_of_blank_paper_is_refused_by_name(file):
    drawings.photo(Image.new("RGB", (400, 400), "#d8d8d4"), None, 8).save(file)
    with pytest.raises(net.Failure, match="digit.png is empty"):
        net.read_image(file, 1, 28)


def test_image_with_only_two_far_specks_is_refused_by_name(file):
    image = Image.new("L", (1000, 1500))
    image.putpixel((100, 100), 255)
    image.putpixel((900, 1400), 255)
    image.save(file)
    with pytest.raises(net.Failure, match="digit.png is empty"):
        net.read_image(file, 1, 28)


@pytest.mark.parametrize("content", [b"", b"This is text.", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_refused_by_name(file, content):
    file.write_bytes(content)
    with pytest.raises(net.Failure, match="digit.png"):
        net.read_image(file, 1, 28)


def test_image_cut_off_is_refused_by_name(file):
    content = draw(file).read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(net.Failure, match="digit.png"):
        net.read_image(file, 1, 28)


def test_without_scikit_image_it_is_named(file, monkeypatch):
    monkeypatch.setattr(net, "skimage", None)
    with pytest.raises(net.Failure, match="scikit-image"):
        net.read_image(draw(file), 1, 28)


def test_missing_image_is_refused_by_name(file):
    with pytest.raises(net.Failure, match="digit.png"):
        net.read_image(file, 1, 28)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
def test_broken_exif_is_tolerated(file, four, exif):
    with Image.open(draw(file)) as image:
        image.save(file, exif=exif)
    assert torch.equal(net.read_image(file, 1, 28), four)


def test_black_speck_beside_a_pale_digit_changes_nothing(file):
    alone = net.read_image(draw(file, paper="#d8d8d8", ink="#b0b0b0"), 1, 28)
    with Image.open(file) as image:
        ImageDraw.Draw(image).rectangle((10, 180, 11, 181), fill="black")
        image.save(file)
    assert (net.read_image(file, 1, 28) - alone).abs().max() < 0.01


def test_one_grey_pixel_changes_nothing(file, four):
    with Image.open(draw(file)) as image:
        image.putpixel((3, 195), (90, 90, 90))
        image.save(file)
    assert torch.equal(net.read_image(file, 1, 28), four)


def test_digit_cut_close_is_read_like_one_with_margins(file, four):
    with Image.open(draw(file)) as image:
        image.crop(image.getbbox()).save(file)
    assert difference(net.read_image(file, 1, 28), four) < 0.2


def test_stroke_that_is_thin_becomes_bright(file):
    drawings.draw(2, seed=1, side=700, pen=0.01).save(file)
    assert net.read_image(file, 1, 28).max() == 1


# ---- What is around the digit ----------------------------------------------------------------


def read(image, file):
    """A drawing, saved and read."""
    image.save(file, exif=image.getexif())
    return net.read_image(file, 1, 28)


@pytest.mark.parametrize("way", ["a hard shadow", "a soft shadow", "a vignette", "falling light"])
def test_shadow_is_no_ink(file, way):
    alone = read(drawings.draw(4, seed=1), file)
    assert difference(read(drawings.WAYS[way](4, seed=1), file), alone) < 0.25


@pytest.mark.parametrize(("way", "turn"), [("a dark table", 0), ("a wooden table", 5)])
def test_table_around_the_paper_is_no_ink(file, way, turn):
    paper = drawings.draw(4, seed=1, side=300).rotate(turn, fillcolor="white")
    table = drawings.WAYS[way](4, seed=1)
    assert difference(read(table, file), read(paper, file)) < 0.25


@pytest.mark.parametrize("way", ["squared paper", "lined paper"])
def test_printed_line_is_no_ink(file, way):
    alone = read(drawings.draw(4, seed=1, pen=0.06), file)
    assert difference(read(drawings.WAYS[way](4, seed=1), file), alone) < 0.3


def test_frame_is_no_ink(file):
    alone = read(drawings.draw(4, seed=1, height=0.5), file)
    assert difference(read(drawings.framed(4, seed=1), file), alone) < 0.01


@pytest.mark.parametrize("side", [2, 4])
def test_speck_is_no_ink(file, side):
    alone = read(drawings.draw(4, seed=1, side=200, height=0.2, pen=0.1), file)
    assert difference(read(drawings.with_speck(4, seed=1, side=side), file), alone) < 0.01


def test_phone_held_sideways_makes_no_difference(file):
    upright = read(drawings.draw(4, seed=1), file)
    assert torch.equal(read(drawings.turned(4, seed=1), file), upright)


def test_stroke_that_reaches_into_the_rest_stays():
    image = Image.new("L", (200, 200), "white")
    canvas = ImageDraw.Draw(image)
    canvas.line((60, 60, 60, 160, 140, 160), fill="black", width=10)
    canvas.line((90, 40, 140, 120), fill="black", width=10)  # into the corner of the other
    ink = net.find_ink(image)
    assert torch.equal(net.find_digits(ink, digits_per_image=1), ink > 0.5)


# ---- What is said of it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The pretrained network's lengths (29, 10) for 29 drawings, and the digits drawn (29,)."""
    file = tmp_path_factory.mktemp("drawn") / "digit.png"
    digits = torch.arange(len(drawings.WAYS)) % 10
    images = [
        read(way(digit, seed=1), file)
        for way, digit in zip(drawings.WAYS.values(), digits.tolist(), strict=True)
    ]
    model, _ = net.load_checkpoint(REPOSITORY / "results" / "pretrained.pt")
    with torch.no_grad():
        return model.eval()(torch.cat(images)).lengths, digits


def test_26_of_29_drawings_are_read_right(drawn):
    lengths, digits = drawn
    assert len(digits) == 29 and (lengths.argmax(dim=1) == digits).sum() >= 26


def test_drawing_read_wrong_is_marked_as_doubtful(drawn):
    lengths, digits = drawn
    longest, prediction = lengths.max(dim=1)
    assert (longest[prediction != digits] < 0.5).all()


@pytest.fixture
def said(file, capsys):
    """What predict says of an image, of which the model says `scores`; and the exit status."""

    def say(*files, scores=(0.9, 0.1), model="capsnet", dataset="MNIST"):
        output = net.Output(None, torch.tensor([scores]), None)
        network = torch.nn.Identity()
        network.forward = lambda image: output
        size = {"in_channels": 1, "image_size": 28}
        args = SimpleNamespace(predict=files or [file], model=model, dataset=dataset, **size)
        status = net.predict(network, args, torch.device("cpu"))
        return *capsys.readouterr(), status

    return say


def test_long_capsule_is_not_doubted(said, file, four):
    assert said(scores=(0.5, 0.1)) == (f"{file}: 0\n    0:0.50 1:0.10\n", "", 0)


def test_short_capsule_is_doubted(said, four):
    assert "not sure" in said(scores=(0.49, 0.1))[0]


def test_logits_of_the_baseline_are_not_doubted(said, four):
    assert "not sure" not in said(scores=(0.49, 0.1), model="baseline")[0]


def test_logits_fit_80_columns(said, file, four):
    lines = said(scores=[-123.45] * 10, model="baseline")[0].splitlines()
    assert max(map(len, lines[1:])) <= 80


def test_refused_image_does_not_end_the_command(said, file, four):
    assert f"{file}: 0" in said("missing.png", file)[0]


def test_refused_image_is_named(said, file, four):
    assert "missing.png" in said("missing.png", file)[1]


def test_refused_image_gives_exit_status_1(said, file, four):
    assert said("missing.png", file)[2] == 1


def test_two_digits_are_warned_of(said, file):
    drawings.two_digits().save(file)
    assert "two digits?" in said()[0]


def test_parts_of_different_heights_are_not_taken_for_two(said, file):
    drawings.two_digits(second=120).save(file)
    assert "two digits?" not in said()[0]


def test_two_parts_are_no_two_digits_in_other_data_sets(said, file):
    drawings.two_digits().save(file)
    assert "two digits?" not in said(dataset="KMNIST")[0]


@pytest.mark.parametrize("digit", range(10))
def test_one_digit_is_not_taken_for_two(said, file, digit):
    drawings.draw(digit, seed=2).save(file)
    assert "two digits?" not in said()[0]


def test_5_with_its_bar_apart_is_not_taken_for_two(said, file):
    image = Image.new("L", (200, 200), "white")
    canvas = ImageDraw.Draw(image)
    canvas.line((80, 40, 75, 90), fill="black", width=10)
    canvas.arc((50, 85, 125, 165), -110, 130, fill="black", width=10)
    canvas.line((135, 38, 170, 36), fill="black", width=10)  # right of all the rest
    image.save(file)
    assert "two digits?" not in said()[0]
