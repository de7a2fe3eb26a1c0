"""The numbers in README and in results/README.md are those of the logs in results/."""

import hashlib
import json
import re
import shlex
import statistics

import pytest
import torch
from helpers import LIST, README, REPOSITORY, section, table

import net

RESULTS = REPOSITORY / "results"
# What may differ between the runs of a row.
FREE = {"seed", "log_interval", "test_interval", "test_batch_size", "compile", "epochs"}
FREE |= set(net.NOT_SAVED)


def read(folder):
    """(arguments, starts, history) of a run."""
    content = json.loads((folder / "args.json").read_text())
    content["args"].setdefault("warm_up", 1)  # older runs had none
    lines = (folder / "log.jsonl").read_text().splitlines()
    return content["args"], content["starts"], [json.loads(line) for line in lines]


def rows(text):
    """(cells, commands) of each row of results in a text: commands stand below, in their order."""
    code = text.replace("\\\n", " ").splitlines()
    commands = [line.split("&&") for line in code if line.startswith("    python net.py ")]
    return list(zip(table(text), commands, strict=True))


RUNS = {file.parent.name: read(file.parent) for file in sorted(RESULTS.glob("*/args.json"))}
QUEUE = table(section(LIST, "Queue"))
README_ROWS = rows(section(README, "Results"))
ROWS = README_ROWS + rows(section(LIST, "Rows that are not in the README"))
each_row = pytest.mark.parametrize("row, commands", ROWS, ids=[row[0] for row, _ in ROWS])


def runs_of(row):
    """The runs that a row links to."""
    return {name: RUNS[name] for name in re.findall(r"\]\((?:results/)?([^)]+)/\)", row[-1])}


def arguments(commands):
    """The arguments of a run as each of a row's commands leaves them: all but the first resume."""
    parser, found = net.build_parser(), []
    for command in commands:
        args = parser.parse_args(shlex.split(command)[2:])
        parser.set_defaults(**vars(args))
        found.append(args)
    return found


def is_made_by(run, commands):
    """Whether a run is what a row's commands make, but for the seed: complete, with their flags."""
    args, _, history = run
    stages = arguments(commands)
    wanted = vars(stages[-1])
    free = FREE | ({"precision"} if wanted["precision"] == "auto" else set())
    if any(args.get(name, wanted[name]) != wanted[name] for name in wanted.keys() - free):
        return False
    if not len(history) == args["epochs"] == wanted["epochs"]:
        return False
    rates = []
    for entry in history:
        stage = next(stage for stage in stages if entry["epoch"] <= stage.epochs)
        total = entry["step"] // entry["epoch"] * stage.epochs
        warm_up, decay = args["warm_up"], stage.lr_decay
        rates.append(net.learning_rate(entry["step"] - 1, total, stage.lr, decay, warm_up))
    return [entry["lr"] for entry in history] == pytest.approx(rates, rel=1e-6)


def hardware(run):
    """What a run was trained on, in which precision."""
    args, starts, _ = run
    names = dict.fromkeys(start["hardware"] for start in starts)
    return ", ".join([*names, args["precision"]])


def summary(errors):
    """The errors, from three on their mean and deviation, as the tables write them."""
    if len(errors) < 3:
        return ", ".join(f"{error:.2f}" for error in errors)
    return f"{statistics.mean(errors):.3f} ± {statistics.stdev(errors):.3f}"


def spread(values):
    """How far the values lie apart."""
    return max(values) - min(values)


def last_errors(row):
    """The last epoch's test error of each run of a row, by its seed."""
    return {args["seed"]: history[-1]["test_error"] for args, _, history in runs_of(row).values()}


# ---- The rows --------------------------------------------------------------------------------


@each_row
def test_row_has_the_numbers_of_its_logs(row, commands):
    _, _, ours, n, epochs, _ = row
    histories = [history for _, _, history in runs_of(row).values()]
    assert ours == summary(list(last_errors(row).values()))
    assert int(n) == len(histories)
    assert {int(epochs)} == {len(history) for history in histories}


@each_row
def test_runs_of_a_row_are_made_by_its_command(row, commands):
    assert [name for name, run in runs_of(row).items() if not is_made_by(run, commands)] == []


@each_row
def test_runs_of_a_row_have_the_seeds_that_it_says(row, commands):
    seeds = [args["seed"] for args, _, _ in runs_of(row).values()]
    assert seeds == [int(seed) for seed in re.findall(r"\[seed (\d+)\]", row[-1])]
    assert len(seeds) == len(set(seeds))


@each_row
def test_row_leaves_out_no_run_that_is_like_its_own(row, commands):
    own = runs_of(row)
    like = {hardware(run) for run in own.values()}
    anywhere = (row, commands) in README_ROWS
    for name, run in RUNS.items():
        if name not in own and (anywhere or hardware(run) in like):
            assert not is_made_by(run, commands), name


@each_row
def test_row_has_the_value_of_the_paper(row, commands):
    ((args, _, _), *_) = runs_of(row).values()
    key = (args["dataset"], args["model"], args["routing_iterations"], args["with_reconstruction"])
    assert row[1] == net.TABLE_1[key].replace("+-", "±")


def test_every_complete_run_is_in_one_row():
    named = [name for row, _ in ROWS for name in runs_of(row)]
    complete = [
        name
        for name, (args, _, history) in RUNS.items()
        if len(history) == args["epochs"] and not args["validation"]
    ]
    assert sorted(named) == complete


# ---- The headline ----------------------------------------------------------------------------


def test_headline_is_the_first_row():
    (row, _), *_ = README_ROWS
    found = [100 - error for error in last_errors(row).values()]
    mean, deviation = statistics.mean(found), statistics.stdev(found)
    values = ", ".join(
        f"{100 - history[-1]['test_error']:.2f}%" for _, _, history in runs_of(row).values()
    )
    said = (
        f"**here: {mean:.2f}% ± {deviation:.2f}** (n = {row[3]}: {values}; after {row[4]} epochs)"
    )
    assert said in README.partition("\n## ")[0]


def test_headline_stands_beside_the_paper_and_the_earlier_version():
    top = README.partition("\n## ")[0]
    paper = 100 - float(net.TABLE_1["MNIST", "capsnet", 3, True].split()[0])
    assert f"the paper: {paper:.2f}%" in top and "99.65% (n = 1)" in top


def test_worth_of_routing_and_of_reconstruction_is_that_of_the_rows():
    text = " ".join(section(README, "Results").split())
    said = r"Seed by seed, r = 1 changes .* by (\S+) points, no reconstruction by (\S+) "
    said += r"\(the paper: (\S+), (\S+)\); "
    said += r"seeds differ by up to (\S+), a run's last ten epochs by (\S+):"
    rows = {row[0]: row for row, _ in README_ROWS}
    best = rows["CapsNet, r = 3, reconstruction"]
    others = [rows["CapsNet, r = 1, reconstruction"], rows["CapsNet, r = 3"]]
    worth = []
    for row in others:
        errors, of_best = last_errors(row), last_errors(best)
        shared = [seed for seed in of_best if seed in errors]
        worth.append(statistics.mean(errors[seed] - of_best[seed] for seed in shared))
    worth += [float(row[1].split()[0]) - float(best[1].split()[0]) for row in others]
    of_mnist = [row for row, _ in README_ROWS if "MultiMNIST" not in row[0]]
    worth.append(max(spread(last_errors(row).values()) for row in of_mnist))
    histories = [history for row in of_mnist for _, _, history in runs_of(row).values()]
    worth.append(max(spread([e["test_error"] for e in log[-10:]]) for log in histories))
    numbers = re.search(said, text).groups()
    assert [float(number) for number in numbers] == pytest.approx(worth, abs=5e-4)


def test_best_epochs_are_those_of_the_logs():
    (row, _), *_ = README_ROWS
    logs = [history for _, _, history in runs_of(row).values()]
    best = statistics.mean(min(entry["test_error"] for entry in history) for history in logs)
    text = " ".join(section(README, "Results").split())
    assert f"would give the first row {best:.3f}." in text


def test_text_has_the_errors_of_the_baselines_and_of_pairs_after_30_epochs():
    text = " ".join(section(README, "Results").split())
    cnn, of_pairs = (net.TABLE_1[data, "baseline", 3, False] for data in ("MNIST", "MultiMNIST"))
    said = f"All means are behind the paper and its plain CNNs ({cnn}; MultiMNIST {of_pairs})"
    assert said in text
    for row, _ in README_ROWS:
        plain = of_pairs if "MultiMNIST" in row[0] else cnn
        assert statistics.mean(last_errors(row).values()) > float(plain)
    _, _, history = RUNS["MultiMNIST-capsnet-r3-reconstruction-15then30epochs-seed1"]
    assert f"after 30 r = 3 has {history[-1]['test_error']:.2f}." in text


def test_what_routing_shows_is_that_of_the_logs():
    text = " ".join(section(LIST, "Rows that are not in the README").split())
    wrong, losses = {1: [], 3: []}, {1: [], 3: []}
    for row, _ in README_ROWS:
        for args, _, history in runs_of(row).values():
            if args["dataset"] == "MNIST":
                wrong[args["routing_iterations"]].append(history[-1]["train_wrong"])
                losses[args["routing_iterations"]].append(history[-1]["test_margin_loss"])
    said = "r = 3 errs on {} to {} of 60,000 training images, r = 1 on {} to {}; "
    assert said.format(*(end(wrong[r]) for r in (3, 1) for end in (min, max))) in text
    said = "their margin losses in testing are {:.4f} to {:.4f} and {:.4f} to {:.4f}."
    assert said.format(*(end(losses[r]) for r in (3, 1) for end in (min, max))) in text


def test_what_bf16_costs_is_that_of_the_logs():
    text = " ".join(section(LIST, "Rows that are not in the README").split())
    names = ("bf16-seed1", "spectra-seed1", "seed1")
    last = [RUNS[f"MNIST-capsnet-r3-reconstruction-8epochs-{name}"][2][-1] for name in names]
    said = "ends with {} wrong in bf16 (by spectra {}) and with {} in fp32"
    assert said.format(*(entry["test_wrong"] for entry in last)) in text
    said = "its margin losses in testing are {:.4f} ({:.4f}) and {:.4f}."
    assert said.format(*(entry["test_margin_loss"] for entry in last)) in text


def test_runs_of_the_readme_were_compiled_and_in_the_precision_that_it_says():
    for row, _ in README_ROWS:
        for name, (args, _, _) in runs_of(row).items():
            assert args["compile"], name
            said = "fp32" if f"/{name}/) (fp32)" in row[-1] else "bf16"
            assert args["precision"] == said, name


def test_minutes_of_an_epoch_are_those_of_the_trial():
    trials_text = section(LIST, "Trials")
    minutes, seconds = map(int, re.search(r"(\d+) min (\d+) s with f", trials_text).groups())
    assert f"about {minutes + seconds / 60:.0f} minutes on two CPU cores" in README


# ---- The queue -------------------------------------------------------------------------------


def test_every_run_is_in_the_queue_once():
    named = [line[0].strip("`") for line in QUEUE]
    assert [name for name in RUNS if named.count(name) != 1] == []


@pytest.mark.parametrize("line", QUEUE, ids=lambda line: line[0].strip("`"))
def test_line_of_the_queue_equals_the_log(line):
    name, state, epochs, error, trained_on, remark = line
    if state in ("planned", "running") and name.strip("`") not in RUNS:
        assert (error, trained_on) == ("", "") and remark
        return
    args, _, history = run = RUNS[name.strip("`")]
    part = "valid" if args["validation"] else "test"
    errors = [entry[f"{part}_error"] for entry in history if f"{part}_error" in entry]
    assert epochs == f"{len(history)} of {args['epochs']}"
    assert error == (f"{errors[-1]:.2f}%" if errors else "")
    assert trained_on == hardware(run)
    complete = len(history) == args["epochs"]
    assert state in ({"done"} if complete else {"running", "abandoned"})


def trials(flags):
    """The complete runs that the command of the trials makes with some flags, by their seeds."""
    common = re.search(r"^    (python net\.py .+)$", section(LIST, "Recipe"), re.M)[1]
    found = [run for run in RUNS.values() if is_made_by(run, [f"{common} {flags}"])]
    return sorted(found, key=lambda run: run[0]["seed"])


@pytest.mark.parametrize("line", table(section(LIST, "Recipe")), ids=lambda line: line[0])
def test_trial_of_the_recipe_has_the_numbers_of_its_logs(line):
    flags, wrong, margin_loss = line
    last = [history[-1] for _, _, history in trials(flags.strip("`"))]
    assert wrong == ", ".join(str(entry["valid_wrong"]) for entry in last)
    assert margin_loss == ", ".join(f"{entry['valid_margin_loss']:.4f}" for entry in last)


def test_every_trial_of_the_recipe_is_in_its_table():
    lines = table(section(LIST, "Recipe"))
    named = [run[0] for flags, *_ in lines for run in trials(flags.strip("`"))]
    complete = [args for args, _, log in RUNS.values() if len(log) == args["epochs"]]
    assert len(named) == len([args for args in complete if args["validation"]])


def test_last_epochs_of_the_headline_equal_the_logs():
    (row, _), *_ = README_ROWS
    last = int(row[4])
    lines = table(LIST.split(f"after epochs {last - 4} to {last}:")[1])
    assert lines == [
        [str(args["seed"]), *(str(entry["test_wrong"]) for entry in history[-5:])]
        for args, _, history in runs_of(row).values()
    ]


# ---- The pretrained file ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained():
    return torch.load(RESULTS / "pretrained.pt", weights_only=True)


def test_sum_of_the_pretrained_file_is_stated():
    sha256 = hashlib.sha256((RESULTS / "pretrained.pt").read_bytes()).hexdigest()
    assert f"`{sha256}`" in section(LIST, "Pretrained weights")


def test_output_in_readme_has_the_wrong_count_of_the_pretrained_file(pretrained):
    wrong, error = pretrained["measured_wrong"], pretrained["measured_error"]
    assert f"    result     {error:.2f}% test error ({wrong} wrong)\n" in README
    assert f"    recorded   {wrong} wrong when it was saved\n" in README


def test_pretrained_file_is_the_first_seed_of_the_first_row(pretrained):
    (row, _), *_ = README_ROWS
    assert pretrained["history"] == next(iter(runs_of(row).values()))[2]


def test_output_in_readme_has_the_size_of_the_model(pretrained):
    count = sum(weight.numel() for weight in pretrained["model"].values())
    assert f"    model      capsnet, r = 3: {count:,} parameters\n" in README


def test_output_in_readme_is_what_predict_prints(monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    command = "--evaluate results/pretrained.pt --predict tests/five.jpg --no-cuda"
    assert net.main(command.split()) == 0
    printed, said = (
        re.sub(r"\d\.\d\d", "", text).split()
        for text in (capsys.readouterr().out, README.split("\n    tests/five.jpg:")[1])
    )
    assert printed[1:] == said[: len(printed) - 1] and printed[0] == "tests/five.jpg:"


# ---- Speed -----------------------------------------------------------------------------------


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
