"""The notebook: what it shows of a small checkpoint, and the copy that is kept."""

import ast
import re
import shlex
import shutil

import nbformat
import pytest
import torch
from helpers import (
    LONG,
    QUICK,
    README,
    REPOSITORY,
    TINY,
    main,
    shrink_nets,
    write_fashion,
    write_idx,
)
from nbclient import NotebookClient
from PIL import Image

import net

NOTEBOOK = REPOSITORY / "reconstruction_visualization.ipynb"
IMAGES = sorted((REPOSITORY / "images").glob("*.png"))
START = """%reset -f
import os
import net
net.MNIST_SHA256.clear()  # the files of MNIST are small ones
os.environ.update({})
os.chdir({!r})
net.CapsNet.__init__.__kwdefaults__.update({})"""
KEPT = (
    *("figure_3", "figure_4", "shown", "deltas", "named", "mistakes", "gallery"),
    *("easy", "ambiguous", "routed", "votes", "pairs", "classes", "read", "pictures"),
)
KEEP = "import torch\ntorch.save({{name: globals().get(name) for name in {}}}, {!r})"
SLIDE = """pictures = [picture.value.hex()]
with torch.enable_grad():  # as in a widget's callback
    sliders["n0"].value = 0.3
pictures.append(picture.value.hex())"""


@pytest.fixture(scope="module")
def tiny():
    """Every CapsNet is tiny."""
    with pytest.MonkeyPatch.context() as patch:
        shrink_nets(patch)
        yield


@pytest.fixture(scope="module")
def checkpoint(tiny, fashion, tmp_path_factory):
    """A pretrained file of a tiny CapsNet, trained for two epochs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    flags = f"{QUICK} --epochs 2 --with_reconstruction"
    assert main(flags, "--data-dir", fashion, "--output-dir", folder / "run") == 0
    net.save_pretrained(folder / "run", folder / "pretrained.pt", fashion)
    return folder / "pretrained.pt"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A data folder with a small FashionMNIST and the same as MNIST. Do not change it."""
    folder = write_fashion(tmp_path_factory.mktemp("data"))
    shutil.copytree(folder / "FashionMNIST", folder / "MNIST")
    return folder


@pytest.fixture(scope="module")
def run_on_pairs(tiny, data_dir, tmp_path_factory):
    """The folder of a short run on MultiMNIST."""
    folder = tmp_path_factory.mktemp("pairs")
    flags = f"{QUICK} --dataset MultiMNIST --with_reconstruction --lr 0.003"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "MNIST_SHA256", {})
        assert main(flags, "--data-dir", data_dir, "--output-dir", folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(checkpoint):
    return net.load_checkpoint(checkpoint)[0].eval()


@pytest.fixture(scope="module")
def test_images(fashion):
    data = net.load_data("FashionMNIST", fashion, train=False)
    images, _, labels = next(net.batches(data, len(data)))
    return images, labels.squeeze(1)


def parameters(**values):
    """The environment variables that set the notebook's parameters."""
    own_image = REPOSITORY / "tests" / "five.jpg"
    names = {"IMAGES": "", "MULTIMNIST": "", "RESULTS": "results", "OWN_IMAGE": own_image, **values}
    return {f"CAPSNET_{name}": str(value) for name, value in names.items()}


@pytest.fixture(scope="module")
def kernel():
    """The client of one kernel, which has imported what the notebook imports."""
    limits = {"timeout": LONG, "startup_timeout": LONG, "shutdown_kernel": "immediate"}
    client = NotebookClient(nbformat.v4.new_notebook(), **limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        with client.setup_kernel():
            yield client


def execute(kernel, folder, **values):
    """(notebook, variables) after its cells have run, in `folder`, with a tiny CapsNet."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = START.format(parameters(**values), str(folder), TINY)
    keep = KEEP.format(KEPT, str(folder / "kept.pt"))
    new = nbformat.v4.new_code_cell
    notebook.cells = [new(start), *notebook.cells, new(SLIDE), new(keep)]
    kernel.nb = notebook
    for place, cell in enumerate(notebook.cells):
        kernel.execute_cell(cell, place)
    kernel.set_widgets_metadata()
    return notebook, torch.load(folder / "kept.pt")


def fail_in_a_cell(folder, checkpoint, data_dir):
    """(source of the cell that raises an error, the error), without a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in parameters(CHECKPOINT=checkpoint, DATA_DIR=data_dir).items():
            patch.setenv(name, value)
        patch.chdir(folder)
        names = {}
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if cell.cell_type == "code":
                try:
                    exec(cell.source, names)
                except net.Failure as failure:
                    return cell.source, str(failure)


@pytest.fixture(scope="module")
def executed(kernel, checkpoint, run_on_pairs, data_dir, tmp_path_factory):
    """(notebook, its variables, folder) of a run that is not complete, with several mistakes."""
    folder = tmp_path_factory.mktemp("executed")
    content = torch.load(checkpoint)
    content["args"]["epochs"] = 5
    for key in ("test_error", "test_wrong", "test_loss"):  # as with --test-interval 2
        del content["history"][0][key]
    torch.save(content, folder / "unfinished.pt")
    data = {"CHECKPOINT": folder / "unfinished.pt", "DATA_DIR": data_dir}
    data["MULTIMNIST"] = run_on_pairs
    places = {"IMAGES": folder / "images", "RESULTS": REPOSITORY / "results"}
    return *execute(kernel, folder, **data, **places), folder


@pytest.fixture(scope="module")
def flawless(kernel, model, checkpoint, test_images, tmp_path_factory):
    """(notebook, folder) for test images that are labelled as the model classifies them.

    No folder is named for the figures, none of runs is there, and the own image is a text file.
    """
    folder = tmp_path_factory.mktemp("flawless")
    data = write_fashion(folder / "data")
    labels = model(test_images[0]).lengths.argmax(dim=1)
    raw = data / "FashionMNIST" / "raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", labels.to(torch.uint8))
    (folder / "text.txt").write_text("not an image")
    values = {"CHECKPOINT": checkpoint, "DATA_DIR": data, "OWN_IMAGE": "text.txt"}
    notebook, _ = execute(kernel, folder, **values)
    return notebook, folder


def printed(notebook):
    """All text in its outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def without_pictures(notebook):
    """The notebook as text, but for the pictures in its outputs and widgets."""
    return re.sub(r'"(image/png|data)": "[^"]*"', "", nbformat.writes(notebook))


def has_warnings(notebook):
    streams = [o.get("name") for cell in notebook.cells for o in cell.get("outputs", [])]
    return "stderr" in streams or "warning" in printed(notebook).lower()


# ---- executed on a small checkpoint ----------------------------------------------------------


def test_it_draws_the_images_that_are_kept(executed):
    names = {file.name for file in (executed[2] / "images").iterdir()}
    assert names == {file.name for file in IMAGES}


def test_it_writes_no_file_unless_asked(flawless):
    names = {file.name for file in flawless[1].iterdir()}
    assert names == {"data", "text.txt", "kept.pt"}  # what the test itself puts there


def test_it_gives_no_warnings(executed):
    assert not has_warnings(executed[0])


def test_error_is_measured_again(executed, model, test_images):
    images, labels = test_images
    wrong = int((model(images).lengths.argmax(dim=1) != labels).sum())
    assert f"({wrong} of {len(labels)} wrong)" in printed(executed[0])


def test_unfinished_run_is_called_not_complete(executed):
    assert "not complete: of its 5 epochs 3 are missing" in printed(executed[0])


def test_mistakes_in_figure_3_are_errors(executed, model, test_images):
    images, labels = test_images
    predictions = model(images).lengths.argmax(dim=1)
    shown = [n for n, _ in executed[1]["figure_3"]["mistakes"]]
    assert shown and all(predictions[n] != labels[n] for n in shown)


def test_mistaken_image_is_drawn_from_its_label_and_from_its_prediction(
    executed, model, test_images
):
    images, labels = test_images
    predictions = model(images).lengths.argmax(dim=1)
    columns = executed[1]["figure_3"]["mistakes"]
    expected = [(n, int(k[n])) for n, _ in columns[::2] for k in (labels, predictions)]
    assert columns == expected


def test_correct_images_in_figure_3_are_classified_as_labelled(executed, model, test_images):
    images, labels = test_images
    predictions = model(images).lengths.argmax(dim=1)
    columns = executed[1]["figure_3"]["correct"]
    assert columns and all(predictions[n] == labels[n] == target for n, target in columns)


def test_figure_4_has_11_columns_from_minus_to_plus_a_quarter(executed):
    deltas, shape = executed[1]["deltas"], executed[1]["figure_4"].shape
    expected = torch.tensor([k * 5 / 100 for k in range(-5, 6)])
    torch.testing.assert_close(deltas, expected)
    assert shape[:2] == (TINY["digit_dim"], 11)


@torch.no_grad()
def test_zero_column_of_figure_4_is_the_plain_reconstruction(executed, model, test_images):
    shown, rows = executed[1]["shown"], executed[1]["figure_4"]
    images, labels = (part[shown : shown + 1] for part in test_images)
    plain = model(images, labels.unsqueeze(1)).reconstruction.squeeze(1)
    torch.testing.assert_close(rows[:, 5], plain.expand_as(rows[:, 5]), rtol=0, atol=1e-5)


def test_no_class_has_two_named_rows(executed, test_images):
    classes = [int(test_images[1][n]) for n, _ in executed[1]["named"].values()]
    assert len(classes) == 5 and len(set(classes)) == 5


def test_slider_redraws_the_picture(executed):
    before, after = executed[1]["pictures"]
    assert before != after and before[:8] == after[:8] == b"\x89PNG".hex()


@torch.no_grad()
def test_routing_is_shown_after_1_2_and_3_iterations(executed, model, test_images):
    routed = executed[1]["routed"]
    for (n, r), (lengths, couplings) in routed.items():
        v, c = net.routing(model.primary(test_images[0][n : n + 1]), model.digit_caps.weight, r)
        torch.testing.assert_close(lengths, v[0].norm(dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(couplings, c[0], rtol=1e-4, atol=1e-5)
    assert set(routed) == {(executed[1][k], r) for k in ("easy", "ambiguous") for r in (1, 2, 3)}


@torch.no_grad()
def test_votes_for_a_capsule_add_up_to_the_product_of_the_lengths_of_s_and_v(executed, model):
    assert set(executed[1]["votes"]) == {executed[1]["easy"], executed[1]["ambiguous"]}
    for n, votes in executed[1]["votes"].items():
        v = executed[1]["routed"][n, model.digit_caps.routing_iterations][0]
        s = (v / (1 - v)).sqrt()  # Eq. 1: v = s**2 / (1 + s**2)
        torch.testing.assert_close(votes.sum(dim=(0, 1)), s * v, rtol=1e-3, atol=1e-5)


def test_pairs_in_figure_5_are_right_then_mistakes_then_drawn_from_an_absent_class(executed):
    classes, read = executed[1]["classes"], executed[1]["read"]
    kinds = []
    for n, drawn, _ in executed[1]["pairs"]:
        right = torch.equal(classes[n], read[n])
        absent = drawn[1] not in classes[n]
        kinds.append("absent" if right and absent else "right" if right else "mistake")
        assert torch.equal(drawn, read[n]) or kinds[-1] == "absent"
    assert kinds == 4 * ["right"] + 2 * ["mistake"] + 2 * ["absent"]


def test_without_a_run_on_pairs_figure_5_is_not_drawn(flawless):
    assert "not drawn: CAPSNET_MULTIMNIST names no run" in printed(flawless[0])


def test_every_mistake_is_shown(executed):
    assert sorted(executed[1]["gallery"]) == executed[1]["mistakes"]


def test_model_without_mistakes_is_drawn_too(flawless):
    assert "(0 of 40 wrong)" in printed(flawless[0]) and not has_warnings(flawless[0])


def test_complete_run_is_not_called_unfinished(flawless):
    assert "not complete" not in printed(flawless[0])


def test_own_file_that_is_no_image_is_named_in_a_line(flawless):
    assert "text.txt" in printed(flawless[0])


def test_folder_without_runs_is_named_in_a_line(flawless):
    assert "no runs on MNIST in results" in printed(flawless[0])


def test_error_that_differs_from_the_recorded_one_is_said(flawless):
    assert "The two differ" in printed(flawless[0])


def trains_a_usable_model(text):
    """Whether `text` has a command that trains a CapsNet with a decoder."""
    line = re.search(r"`python net\.py (.*?)`", text)
    return line and net.build_parser().parse_args(shlex.split(line[1])).with_reconstruction


def test_missing_checkpoint_stops_with_the_command_that_makes_one(tmp_path, fashion):
    cell, error = fail_in_a_cell(tmp_path, tmp_path / "missing.pt", fashion)
    assert "load_checkpoint" in cell
    assert "missing.pt" in error and trains_a_usable_model(error)


def test_checkpoint_without_a_decoder_stops_with_that_command(finished, tiny, tmp_path, fashion):
    cell, error = fail_in_a_cell(tmp_path, finished, fashion)
    assert "load_checkpoint" in cell
    assert "no decoder" in error and trains_a_usable_model(error)


def test_checkpoint_on_pairs_stops_with_that_command_too(run_on_pairs, tmp_path, fashion):
    cell, error = fail_in_a_cell(tmp_path, run_on_pairs, fashion)
    assert "load_checkpoint" in cell
    assert "is of MultiMNIST" in error and trains_a_usable_model(error)


# ---- the copy that is kept -------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def tree(kept):
    cells = [cell.source for cell in kept.cells if cell.cell_type == "code"]
    return ast.parse("\n".join(cells))


def test_kept_copy_was_executed_once_from_top_to_bottom(kept):
    counts = [cell.execution_count for cell in kept.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_kept_copy_has_no_warnings(kept):
    assert not has_warnings(kept)


def test_kept_copy_is_below_1_mb():
    assert NOTEBOOK.stat().st_size < 1e6


def test_kept_images_are_below_200_kb():
    assert all(file.stat().st_size < 200e3 for file in IMAGES)


def test_kept_copy_names_no_absolute_path(kept):
    path = r"(?<![\w.:/])/(home|root|work|tmp|usr|opt|mnt|var|data|Users)/|\b[A-Z]:\\\\"
    assert not re.search(path, without_pictures(kept))


def test_it_defines_no_class_and_no_function_that_calls_torch(tree):
    kinds = (ast.FunctionDef, ast.Lambda)
    inside = [part for f in ast.walk(tree) if isinstance(f, kinds) for part in ast.walk(f)]
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert not [node for node in inside if isinstance(node, ast.Name) and node.id == "torch"]


def test_it_trains_nothing(tree):
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"backward", "optim", "train", "train_step", "train_epoch", "Run", "main"}


def test_kept_copy_shows_the_pretrained_file(kept):
    content = torch.load(REPOSITORY / "results" / "pretrained.pt", weights_only=True)
    assert f"({content['measured_wrong']} of 10000 wrong)" in printed(kept)
    assert all(f"commit {start['commit']}" in printed(kept) for start in content["starts"])


def test_first_picture_comes_with_the_second_code_cell(kept):
    first, second, *_ = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert not first.outputs
    assert "image/png" in second.outputs[0].data


def test_lines_of_prose_are_within_100_columns(kept):
    prose = [cell.source for cell in kept.cells if cell.cell_type == "markdown"]
    assert [line for text in prose for line in text.splitlines() if len(line) > 100] == []


# ---- how it names the rows of Figure 4 -------------------------------------------------------


@pytest.fixture(scope="module")
def measure(kept):
    """The notebook's measures of images (C, 28, 28), taken from its cell."""
    cell = next(cell.source for cell in kept.cells if "def measure" in cell.source)
    names = {"torch": torch, "images": torch.zeros(1, 1, 28, 28)}
    exec(cell, names)
    return names["measure"]


def bar(width=4, height=16, top=6):
    """An image (1, 28, 28) of an upright bar."""
    image = torch.zeros(1, 28, 28)
    image[:, top : top + height, 10 : 10 + width] = 1
    return image


def test_bar_of_twice_the_breadth_has_a_thicker_stroke(measure):
    thin, thick = (measure(bar(width))["stroke thickness"] for width in (2, 4))
    assert 1.5 * thin < thick < 2.1 * thin


def test_fainter_bar_has_the_same_stroke_thickness(measure):
    strong, faint = (measure(bar() * ink)["stroke thickness"] for ink in (1, 0.3))
    torch.testing.assert_close(faint, strong)


def test_bar_of_twice_the_breadth_has_twice_the_width(measure):
    narrow, wide = (measure(bar(width))["width"] for width in (4, 8))
    torch.testing.assert_close(wide, 2 * narrow, rtol=0.05, atol=0)


def test_bar_of_twice_the_height_has_twice_the_height(measure):
    low, high = (measure(bar(height=height))["height"] for height in (8, 16))
    torch.testing.assert_close(high, 2 * low, rtol=0.05, atol=0)


def test_diagonal_that_leans_to_the_right_has_a_slant_of_45_degrees(measure):
    image = torch.eye(28).flip(1).unsqueeze(0)
    torch.testing.assert_close(measure(image)["slant"], torch.tensor(45.0))


def test_slant_changes_no_width(measure):
    image = torch.zeros(1, 28, 28)
    for row in range(12):
        image[:, 6 + row, 14 - row : 18 - row] = 1
    upright = measure(bar(height=12))["width"]
    torch.testing.assert_close(measure(image)["width"], upright, rtol=1e-4, atol=0)


def test_bar_that_is_moved_down_by_3_pixels_has_a_position_greater_by_3(measure):
    above, below = (measure(bar(top=top))["position"] for top in (2, 5))
    torch.testing.assert_close(below, above + 3)


# ---- the pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", IMAGES, ids=lambda file: file.name)
def test_background_of_a_picture_is_transparent(file):
    assert Image.open(file).convert("RGBA").getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("text, place", re.findall(r"!\[(.*?)\]\((.*?)\)", README, re.DOTALL))
def test_picture_in_readme_is_there_and_has_an_alternative_text(text, place):
    assert (REPOSITORY / place).is_file() and len(text.split()) > 5


def test_command_of_readme_writes_to_no_tracked_file():
    lines = [line for line in README.splitlines() if "jupyter execute" in line]
    assert lines and all("CAPSNET_IMAGES=runs/" in line for line in lines)
    assert not any("--inplace" in line for line in lines)
