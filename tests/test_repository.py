"""What the repository promises of itself."""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
from helpers import REPOSITORY

import net

SOURCE = (REPOSITORY / "net.py").read_text()
README = (REPOSITORY / "README.md").read_text()
FIDELITY = README.split("## Fidelity")[1].split("\n## ")[0]
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"^# ---- (.*?) -+$", re.MULTILINE)
DEFINITIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef | ast.ClassDef)]


def test_net_has_at_most_9500_tokens_of_code():
    tree = ast.parse(SOURCE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    code = io.StringIO(ast.unparse(tree))  # neither comments nor docstrings
    passed_over = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT}
    tokens = [t for t in tokenize.generate_tokens(code.readline) if t.type not in passed_over]
    assert len(tokens) <= 9500


def test_readme_has_less_than_300_lines():
    assert len(README.splitlines()) < 300


def test_function_fits_one_screen():
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in DEFINITIONS}
    functions = {n.name for n in DEFINITIONS if isinstance(n, ast.FunctionDef)}
    assert {name: n for name, n in lengths.items() if name in functions and n > 60} == {}


def test_map_of_the_docstring_equals_the_banners():
    lines = re.findall(r"^    (\S.*)$", net.__doc__, re.MULTILINE)
    assert [line for line in lines if not line.startswith("python")] == BANNER.findall(SOURCE)


def test_readme_names_the_sections_in_their_order():
    places = [README.index(f"| {banner} |") for banner in BANNER.findall(SOURCE)]
    assert places == sorted(places)


def test_choices_in_the_code_equal_the_rows_of_the_readme():
    table = README.split("## Choices")[1].split("\n## ")[0]
    rows = [int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    marks = {int(n) for n in re.findall(r"CHOICE (\d+)", SOURCE)}
    assert rows == sorted(marks) == list(range(1, len(rows) + 1))


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda n: n.name)
def test_public_definition_has_a_docstring(definition):
    nested = definition.name == "parse"
    assert definition.name.startswith("_") or nested or ast.get_docstring(definition)


@pytest.mark.parametrize("name", re.findall(r"`(test_\w+)`", FIDELITY))
def test_proof_that_the_readme_names_exists(name):
    files = (REPOSITORY / "tests").glob("test_*.py")
    assert any(f"def {name}(" in file.read_text() for file in files)


def test_readme_names_every_flag():
    flags = {flag for action in net.build_parser()._actions for flag in action.option_strings}
    hyphenated = {
        "--routing-iterations",
        "--with-reconstruction",
        "-h",
    }  # "also spelt with hyphens"
    assert flags - hyphenated - {"--help"} <= set(re.findall(r"`(--[\w-]+)", README))


def test_importing_net_has_no_side_effects():
    code = (
        "import random, signal, torch; numbers = torch.get_rng_state(), random.getstate(); "
        "state = lambda: [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]; "
        "handlers = state(); import net; "
        "assert torch.equal(torch.get_rng_state(), numbers[0]); "
        "assert random.getstate() == numbers[1]; "
        "assert state() == handlers"
    )
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_results_hold_no_absolute_path():
    for file in (REPOSITORY / "results").glob("**/args.json"):
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(json.loads(file.read_text())))
        assert not [text for text in texts if re.match(r"[/~]|[A-Za-z]:\\", text)]


def test_python_in_readme_runs_and_makes_the_shapes_that_it_says(fashion, tmp_path, monkeypatch):
    (block,) = re.findall("```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.setitem(net.CapsNet.__init__.__kwdefaults__, "conv_channels", 4)
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(fashion)
    run = ("--dataset", "FashionMNIST", "--with_reconstruction", "--epochs", "1", "--no-cuda")
    assert net.main([*run, "--output-dir", "runs/quick"]) == 0
    made = {}
    exec(block.replace('"MNIST"', '"FashionMNIST"'), made)
    assert Path("capsnet.pt").stat().st_size < Path("runs/quick/last.pt").stat().st_size / 5
    checked = []
    for line in block.splitlines():
        names, _, said = line.partition(" = ")
        for shape in re.findall(r"\(\d+,[ \d,]*\)", said.partition("#")[2])[::-1]:
            name = names.replace(",", " ").split().pop()
            names = names.rpartition(name)[0]
            assert tuple(made[name].shape) == ast.literal_eval(shape), line
            checked.append(name)
    assert len(checked) == 8
