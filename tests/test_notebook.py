"""The notebook: what it shows of a small checkpoint, and the copy that is kept."""

import ast
import json
import re
import shlex

import nbformat
import pytest
import torch
from helpers import REPOSITORY, TINY, write_fashion, write_idx
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import net

NOTEBOOK = REPOSITORY / "reconstruction_visualization.ipynb"
IMAGES = REPOSITORY / "images"
SMALL = f"import net\n\nnet.CapsNet.__init__.__kwdefaults__.update({TINY})"
KEPT = ("figure_3", "figure_4", "shown", "deltas", "mistakes", "easy", "ambiguous", "routed")
KEEP = "torch.save({{name: globals()[name] for name in {}}}, {!r})"


@pytest.fixture(scope="module")
def tiny():
    """Every CapsNet is tiny."""
    with pytest.MonkeyPatch.context() as patch:
        for name, width in TINY.items():
            patch.setitem(net.CapsNet.__init__.__kwdefaults__, name, width)
        yield


@pytest.fixture(scope="module")
def checkpoint(tiny, fashion, tmp_path_factory):
    """A pretrained file of a tiny CapsNet, trained for two epochs."""
    folder = tmp_path_factory.mktemp("checkpoint")
    flags = f"--dataset FashionMNIST --data-dir {fashion} --output-dir {folder / 'run'}"
    flags += " --with_reconstruction --no-cuda --precision fp32 --epochs 2 --batch-size 16"
    assert net.main(shlex.split(flags)) == 0
    net.save_pretrained(folder / "run", folder / "pretrained.pt", fashion)
    return folder / "pretrained.pt"


@pytest.fixture(scope="module")
def model(checkpoint):
    return net.load_checkpoint(checkpoint)[0].eval()


@pytest.fixture(scope="module")
def test_images(fashion):
    data = net.load_data("FashionMNIST", fashion, train=False)
    return next(net.batches(data, len(data)))


def execute(folder, checkpoint, data_dir):
    """(notebook, variables, error) after its cells have run, in `folder`, with a tiny CapsNet."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    keep = KEEP.format(KEPT, str(folder / "kept.pt"))
    new = nbformat.v4.new_code_cell
    notebook.cells = [new(SMALL), *notebook.cells, new(keep)]
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": f"{folder}"}})
    error = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CAPSNET_CHECKPOINT", str(checkpoint))
        patch.setenv("CAPSNET_DATA_DIR", str(data_dir))
        patch.setenv("CAPSNET_IMAGES", str(folder / "images"))
        try:
            client.execute()
        except CellExecutionError as stopped:
            error = stopped
    kept = folder / "kept.pt"
    return notebook, torch.load(kept) if kept.exists() else None, error


@pytest.fixture(scope="module")
def executed(checkpoint, fashion, tmp_path_factory):
    """(notebook, its variables, folder) of a run that is not complete, with several mistakes."""
    folder = tmp_path_factory.mktemp("executed")
    content = torch.load(checkpoint)
    content["args"]["epochs"] = 5
    torch.save(content, folder / "unfinished.pt")
    notebook, variables, error = execute(folder, folder / "unfinished.pt", fashion)
    assert error is None, error
    return notebook, variables, folder


@pytest.fixture(scope="module")
def flawless(model, checkpoint, test_images, tmp_path_factory):
    """The notebook, executed on test images that are labelled as the model classifies them."""
    folder = tmp_path_factory.mktemp("flawless")
    data = write_fashion(folder / "data")
    labels = model(test_images[0]).lengths.argmax(dim=1)
    raw = data / "FashionMNIST" / "raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", labels.to(torch.uint8))
    notebook, _, error = execute(folder, checkpoint, data)
    assert error is None, error
    return notebook


def printed(notebook):
    """All text in its outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def without_pictures(notebook):
    """The notebook as text, but for the pictures in its outputs."""
    notebook = json.loads(nbformat.writes(notebook))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
    return json.dumps(notebook)


def has_warnings(notebook):
    streams = [o.get("name") for cell in notebook.cells for o in cell.get("outputs", [])]
    return "stderr" in streams or "warning" in printed(notebook).lower()


# ---- executed on a small checkpoint ----------------------------------------------------------
def test_it_draws_the_images_that_are_kept(executed):
    names = {file.name for file in (executed[2] / "images").iterdir()}
    assert names == {file.name for file in IMAGES.iterdir()}


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
    plain = model(images, labels).reconstruction
    torch.testing.assert_close(rows[:, 5], plain.expand_as(rows[:, 5]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_routing_is_shown_after_1_2_and_3_iterations(executed, model, test_images):
    routed = executed[1]["routed"]
    for (n, r), (lengths, couplings) in routed.items():
        v, c = net.routing(model.primary(test_images[0][n : n + 1]), model.digit_caps.weight, r)
        torch.testing.assert_close(lengths, v[0].norm(dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(couplings, c[0], rtol=1e-4, atol=1e-5)
    assert set(routed) == {(executed[1][k], r) for k in ("easy", "ambiguous") for r in (1, 2, 3)}


def test_model_without_mistakes_is_drawn_too(flawless):
    assert "(0 of 40 wrong)" in printed(flawless) and not has_warnings(flawless)


def test_complete_run_is_not_called_unfinished(flawless):
    assert "not complete" not in printed(flawless)


def test_error_that_differs_from_the_recorded_one_is_said(flawless):
    assert "The two differ" in printed(flawless)


def stopped_at(notebook):
    """The source of the cell that raised an error."""
    types = ["error" in [o.output_type for o in c.get("outputs", [])] for c in notebook.cells]
    return notebook.cells[types.index(True)].source


def trains_a_usable_model(text):
    """Whether `text` has a command that trains a CapsNet with a decoder."""
    line = re.search(r"`python net\.py (.*?)`", text)
    return line and net.build_parser().parse_args(shlex.split(line[1])).with_reconstruction


def test_missing_checkpoint_stops_at_its_cell_with_the_command_that_makes_one(tmp_path, fashion):
    notebook, _, error = execute(tmp_path, tmp_path / "missing.pt", fashion)
    assert "load_checkpoint" in stopped_at(notebook)
    assert "missing.pt" in error.evalue and trains_a_usable_model(error.evalue)


def test_checkpoint_without_a_decoder_stops_at_its_cell_with_that_command(tiny, tmp_path, fashion):
    model = net.CapsNet()
    args = {"model": "capsnet", "in_channels": 1, "image_size": 28, "num_classes": 10}
    args |= {"routing_iterations": 3, "with_reconstruction": False, "reconstruction_weight": 0}
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "plain.pt")
    notebook, _, error = execute(tmp_path, tmp_path / "plain.pt", fashion)
    assert "load_checkpoint" in stopped_at(notebook)
    assert "no decoder" in error.evalue and trains_a_usable_model(error.evalue)


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
    assert all(file.stat().st_size < 200e3 for file in IMAGES.iterdir())


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


def test_words_under_a_figure_are_of_the_number_that_is_drawn(kept):
    written = re.search(r"In this network it is number (\d+)", without_pictures(kept))
    assert written and f"number drawn: {written[1]}\n" in printed(kept)
