"""What the repository promises of itself."""

import ast
import importlib
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from helpers import LIST, README, REPOSITORY, finish, fork, main, print_to, section, table

import net

SOURCE = (REPOSITORY / "net.py").read_text()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# ---- (.*?) -+$", re.MULTILINE)
WIDE = re.compile(r"[|!]|.*\]\(https?:")  # a line of a table, a picture, a long address
NO_CODE = {"COMMENT", "NEWLINE", "NL", "INDENT", "DEDENT", "ENDMARKER", "FSTRING_START"}
DEFINITIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef | ast.ClassDef)]


def code_tokens(source):
    """How many tokens of code there are, without comments, docstrings and line ends."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    docstrings = {node.body[0].lineno for node in nodes if ast.get_docstring(node)}
    count = inside = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"  # from Python 3.12 on an f-string is many tokens
        docstring = kind == "STRING" and token.start[0] in docstrings
        count += not inside and kind not in NO_CODE and not docstring
        inside += kind == "FSTRING_START"
    return count


def test_net_stays_below_its_ceiling_of_code():
    assert code_tokens(SOURCE) <= 11_850


def test_comments_docstrings_and_line_ends_are_no_code():
    assert code_tokens('"""Text."""\n\nx = (\n    1\n)  # comment\n') == 5


def test_string_with_values_is_one_token_in_every_python():
    assert code_tokens("x = f'a{f\"{1 + 2}\"}b{3!r:>4}' + 'c'\n") == 5


def test_readme_has_at_most_260_lines():
    assert len(README.splitlines()) <= 260


@pytest.mark.parametrize("page", [README, LIST], ids=["README", "results"])
def test_line_of_a_text_has_at_most_100_columns(page):
    assert [line for line in page.splitlines() if len(line) > 100 and not WIDE.match(line)] == []


def test_headline_and_a_picture_stand_before_the_first_section():
    top = README.partition("\n## ")[0]
    assert 0 < top.index("**here: ") < top.index("![")


@pytest.mark.parametrize("place", re.findall(r"\]\(((?!http)[^)]+)\)", README))
def test_link_in_readme_leads_somewhere(place):
    file, _, anchor = place.partition("#")
    target = REPOSITORY / (file or "README.md")
    assert target.exists()
    if anchor:
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


def test_function_has_at_most_50_lines():
    functions = [n for n in DEFINITIONS if isinstance(n, ast.FunctionDef)]
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in functions}
    del lengths["build_parser"]  # it is a table
    assert {name: length for name, length in lengths.items() if length > 50} == {}


def is_squeezed(node):
    """Whether a statement or product is written shorter than it reads."""
    if isinstance(node, ast.Expr):  # x() if y else z()
        return isinstance(node.value, ast.IfExp)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # "text" * condition
        sides = (node.left, node.right)
        text = (ast.List, ast.JoinedStr)
        return any(isinstance(side, ast.Compare | ast.BoolOp) for side in sides) or any(
            isinstance(side, text) or isinstance(getattr(side, "value", None), str)
            for side in sides
            if not isinstance(side, ast.Attribute)
        )
    return False


@pytest.mark.parametrize(
    "line", ["x() if y else z()", "a = 'text' * flag", "a = [1] * flag", "a = b * (c > d)"]
)
def test_squeezed_line_would_be_seen(line):
    assert any(is_squeezed(node) for node in ast.walk(ast.parse(line)))


def test_no_line_of_net_is_squeezed():
    squeezed = [node.lineno for node in ast.walk(TREE) if is_squeezed(node)]
    assert squeezed == []


def names_used_before_their_definition():
    """Functions and classes of net.py that a function above them uses."""
    places = {n.name: n.lineno for n in TREE.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    used = {(n.id, n.lineno) for n in ast.walk(TREE) if isinstance(n, ast.Name)}
    return {name for name, line in used if line < places.get(name, 0)}


def test_only_the_parser_is_used_before_its_definition():
    assert names_used_before_their_definition() <= {"build_parser"}


def test_paper_s_part_runs_alone_with_torch_only():
    code = "import math, random\nfrom itertools import pairwise\nfrom typing import NamedTuple\n"
    code += "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    code += "from torch.utils.data import TensorDataset\n"
    code += SOURCE[SOURCE.index("# ---- Capsules and routing") :].split("# ==== Here the paper")[0]
    paper = {"__name__": "paper"}
    exec(code, paper)
    model = paper["CapsNet"](conv_channels=8, primary_types=2, with_reconstruction=True)
    data = paper["Digits"](torch.randint(256, (2, 1, 28, 28)).byte(), torch.tensor([3, 5]))
    drawn = paper["draw_epoch"](data, 1, 0)
    images, digits, labels = next(paper["batches"](data, 2, drawn))
    model.losses(model(images, labels), digits, labels)[0].mean().backward()
    assert model.digit_caps.weight.grad.isfinite().all()


def test_map_of_the_docstring_equals_the_banners():
    lines = re.findall(r"^    (\S.*)$", net.__doc__, re.MULTILINE)
    assert [line for line in lines if not line.startswith("python")] == BANNER.findall(SOURCE)


def test_readme_names_the_sections_in_their_order():
    places = [README.index(f"| {banner} |") for banner in BANNER.findall(SOURCE)]
    assert places == sorted(places)


def test_choices_in_the_code_equal_the_rows_of_the_readme():
    rows = [int(line[0]) for line in table(section(README, "Choices"))]
    marks = {int(n) for n in re.findall(r"CHOICE (\d+)", SOURCE)}
    assert rows == sorted(marks) == list(range(1, len(rows) + 1))


def test_words_of_a_choice_in_the_code_are_those_of_the_readme():
    words = {line[0]: line[1] for line in table(section(README, "Choices"))}
    marks = re.findall(r"CHOICE (\d+): (.+)", SOURCE)
    assert [(n, said) for n, said in marks if said != words[n]] == []


def test_cell_of_a_choice_has_at_most_20_words():
    cells = [cell for line in table(section(README, "Choices")) for cell in line]
    assert [cell for cell in cells if len(cell.split()) > 20] == []


@pytest.mark.parametrize("line", table(section(README, "A guided tour")), ids=lambda line: line[0])
def test_names_in_the_tour_are_defined_in_their_section(line):
    _, _, rest = SOURCE.partition(f"# ---- {line[0]} -")
    code = re.split(r"^# ---- ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    names = re.findall(r"`(\w+)`", line[1])
    assert names and [n for n in names if not re.search(rf"^(def|class) {n}\b", code, re.M)] == []


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda n: n.name)
def test_public_definition_has_a_docstring(definition):
    nested = definition.name == "parse"
    assert definition.name.startswith("_") or nested or ast.get_docstring(definition)


@pytest.mark.parametrize("line", table(section(README, "Fidelity")), ids=lambda line: line[0])
def test_code_of_the_fidelity_table_is_used_in_the_files_that_it_names(line):
    names, files = (re.findall("`([^`]+)`", cell) for cell in line[1:])
    tests = [(REPOSITORY / "tests" / file).read_text() for file in files]
    assert names and tests
    assert [name for name in names if not hasattr(net, name)] == []
    calls = [{name for name in names if f"{name}(".lower() in text.lower()} for text in tests]
    assert all(calls) and set().union(*calls) == set(names)


def test_readme_names_every_flag():
    flags = {flag for action in net.build_parser()._actions for flag in action.option_strings}
    hyphenated = {
        "--routing-iterations",
        "--with-reconstruction",
        "-h",
    }  # "hyphens also work"
    assert flags - hyphenated - {"--help"} <= set(re.findall(r"`(--[\w-]+)", README))


def import_net(output):
    """Import net once more, in a process of its own, and fail if that has a side effect."""
    print_to(output)
    del sys.modules["net"]
    signals = (signal.SIGINT, signal.SIGTERM)
    numbers, handlers = random.getstate(), [signal.getsignal(number) for number in signals]
    torch_numbers = torch.get_rng_state()
    importlib.import_module("net")
    assert torch.equal(torch.get_rng_state(), torch_numbers)
    assert random.getstate() == numbers
    assert [signal.getsignal(number) for number in signals] == handlers


def test_importing_net_has_no_side_effects(tmp_path):
    assert finish(fork(import_net, tmp_path / "output")) == [0]
    assert (tmp_path / "output").read_text() == ""


def test_ctrl_c_while_torch_is_imported_ends_without_a_traceback(tmp_path):
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / "torch.py").write_text(code)  # it is found instead of torch
    shutil.copy(REPOSITORY / "net.py", tmp_path)
    child = subprocess.run([sys.executable, "net.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (-signal.SIGINT, "", "")


def test_calls_do_without_the_defaults_that_python_3_10_lacks():
    calls = [ast.unparse(node) for node in ast.walk(TREE) if isinstance(node, ast.Call)]
    orders = [call for call in calls if re.search(r"^[^(]*(\(.*\))?\.(from|to)_bytes\(", call)]
    assert orders and [call for call in orders if not call.endswith("'big')")] == []
    assert [call for call in calls if re.match(r"warnings\.catch_warnings\([^)]", call)] == []


def test_results_hold_no_absolute_path():
    for file in (REPOSITORY / "results").glob("**/args.json"):
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(json.loads(file.read_text())))
        assert not [text for text in texts if re.match(r"[/~]|[A-Za-z]:\\", text)]


def test_python_in_readme_runs_and_makes_the_shapes_that_it_says(fashion, tmp_path, monkeypatch):
    (block,) = re.findall("```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.setitem(net.CapsNet.__init__.__kwdefaults__, "conv_channels", 4)
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(fashion)
    run = "--dataset FashionMNIST --with_reconstruction --epochs 1 --output-dir runs/quick"
    assert main(run) == 0
    made = {}
    exec(block.replace('"MNIST"', '"FashionMNIST"'), made)
    assert Path("runs/small.pt").stat().st_size < Path("runs/quick/last.pt").stat().st_size / 5
    checked = []
    for line in block.splitlines():
        names, _, said = line.partition(" = ")
        for shape in re.findall(r"\(\d+,[ \d,]*\)", said.partition("#")[2])[::-1]:
            name = names.replace(",", " ").split().pop()
            names = names.rpartition(name)[0]
            assert tuple(made[name].shape) == ast.literal_eval(shape), line
            checked.append(name)
    assert len(checked) == 9
