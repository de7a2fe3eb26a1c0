"""The numbers in README are those of the logs in results/."""

import hashlib
import json
import math
import re
import shlex
import statistics

import pytest
import torch
from helpers import REPOSITORY

import net

RESULTS = REPOSITORY / "results"
README = (REPOSITORY / "README.md").read_text()
LIST = (RESULTS / "README.md").read_text()
# What may differ between the trials of a row.
FREE = {"seed", "log_interval", "test_batch_size", "compile", "epochs", *net.NOT_SAVED}


def cells(line):
    """The cells of a Markdown table's line."""
    return [cell.strip(" *") for cell in line.strip("|").split("|")]


def read(folder):
    """(arguments, starts, history) of a run."""
    content = json.loads((folder / "args.json").read_text())
    lines = (folder / "log.jsonl").read_text().splitlines()
    return content["args"], content["starts"], [json.loads(line) for line in lines]


RUNS = {file.parent.name: read(file.parent) for file in sorted(RESULTS.glob("*/args.json"))}
SECTION = README.split("## Results\n")[1].split("\n## ")[0]
ROWS = [cells(line) for line in SECTION.splitlines() if "`python net.py" in line]


def lengths(args, history):
    """The numbers of epochs that a run was started for: more than one if it was lengthened."""
    found = []
    for entry in history:
        done = math.log(entry["lr"] / args["lr"]) / math.log(args["lr_decay"])  # of the schedule
        found.append(round((entry["step"] - 1) / entry["step"] * entry["epoch"] / done))
    return list(dict.fromkeys(found))


def trials(row):
    """The complete runs that are trials of a row of README's table: what its commands make."""
    first, *later = re.findall("`([^`]+)`", next(cell for cell in row if "python net.py" in cell))
    wanted = vars(net.build_parser().parse_args(shlex.split(first)[2:]))
    epochs = [wanted["epochs"], *(int(command.split("--epochs ")[1]) for command in later)]
    return {
        name: (args, starts, history)
        for name, (args, starts, history) in RUNS.items()
        if len(history) == args["epochs"]
        and lengths(args, history) == epochs
        and all(
            args.get(key, value) == value or value == "auto"  # the precision, if it is not said
            for key, value in wanted.items()
            if key not in FREE
        )
    }


def summary(errors):
    """Mean and deviation of the errors, as README writes them."""
    if len(errors) == 1:
        return f"{errors[0]:.2f}"
    return f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_row_of_the_results_equals_its_logs(row):
    _, _, ours, n, epochs, _, hardware, logs = row
    runs = trials(row)
    assert len({args["seed"] for args, _, _ in runs.values()}) == len(runs)
    if not runs:
        assert (ours, n, epochs, hardware, logs) == ("not run", "", "", "", "")
        return
    histories = [history for _, _, history in runs.values()]
    assert ours == summary([history[-1]["test_error"] for history in histories])
    assert (int(n), {int(epochs)}) == (len(runs), {len(history) for history in histories})
    trained = {
        f"{start['hardware']}, {args['precision']}"
        for args, starts, _ in runs.values()
        for start in starts
    }
    assert trained == {hardware}
    assert re.findall(r"\(results/([^)]+)/\)", logs) == list(runs)


def test_every_complete_run_on_mnist_is_a_trial_of_one_row():
    for name, (args, _, history) in RUNS.items():
        if len(history) == args["epochs"] and args["dataset"] == "MNIST" and not args["validation"]:
            assert sum(name in trials(row) for row in ROWS) == 1, name


@pytest.mark.parametrize("name", RUNS)
def test_run_is_listed_with_its_epochs_and_its_last_error(name):
    args, _, history = RUNS[name]
    part = "valid" if args["validation"] else "test"
    line = next(cells(line) for line in LIST.splitlines() if line.startswith(f"| `{name}`"))
    assert line[1] == f"{len(history)} of {args['epochs']}"
    assert line[2] == f"{history[-1][f'{part}_error']:.2f}%"
    assert len(history) == args["epochs"] or line[3].startswith("abandoned: ")


def test_readme_states_the_sum_and_the_wrong_count_of_the_pretrained_file():
    file = RESULTS / "pretrained.pt"
    content = torch.load(file, weights_only=True)
    assert hashlib.sha256(file.read_bytes()).hexdigest() in README
    assert f"{content['measured_wrong']} of 10,000 wrong" in README
    assert content["history"] in [history for _, _, history in trials(ROWS[-1]).values()]


def speed_lines(found):
    """README's lines of speed and memory, from a file that tests/benchmark.py wrote."""
    times = {(row["what"], row["r"], row["name"]): row for row in found["times"]}
    peaks = {(row["what"], row["name"]): row["mib"] for row in found["peaks"]}
    for name in dict.fromkeys(row["name"] for row in found["times"]):
        train = [times["train", r, name] for r in (1, 3)]
        line = [name, *(f"{row['ms']:.0f} ({row['ratio']:.2f})" for row in train)]
        line += [f"{times['test', 3, name]['ratio']:.2f}"]
        yield "| " + " | ".join([*line, *(f"{peaks[what, name]}" for what in ("train", "test"))])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("speed-*.json")), ids=lambda file: file.stem)
def test_table_of_speed_equals_the_file_of_the_benchmark(file):
    page = README if f"(results/{file.name})" in README else LIST
    assert f"{file.name})" in page
    for line in speed_lines(json.loads(file.read_text())):
        assert line in page
