"""Runs and checkpoints: what is saved, what is refused, and that interrupted runs lose nothing."""

import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shlex
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY, run_net, start_net, write_fashion
from torch import nn

import net

FLAGS = ("--dataset", "FashionMNIST", "--precision", "fp32", "--with_reconstruction")
TIMES = {"seconds", "images_per_second"}
NOT_COMPARED = TIMES | {"starts"}


def main(*args):
    """The command with these arguments in this process."""
    return net.main(["--no-cuda", *map(str, args)])


@pytest.fixture
def train(small, fashion, tmp_path):
    """Call it to train for 3 epochs of 4 steps; it returns the run folder."""

    def train(*flags, name="run", status=0):
        sizes = ("--epochs", 3, "--batch-size", 16)
        places = ("--data-dir", fashion, "--output-dir", tmp_path / name)
        assert main(*FLAGS, *sizes, *places, *flags) == status
        return tmp_path / name

    return train


@pytest.fixture
def interrupt(monkeypatch):
    """Call it to have a call of one of net's functions send this process signals."""

    def interrupt(function, call, *numbers):
        original, calls = getattr(net, function), itertools.count(1)

        def wrapper(*args):
            if next(calls) == call:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(*args)

        monkeypatch.setattr(net, function, wrapper)

    return interrupt


def plain(value):
    """The same with a hash for every tensor and without the times, to be compared by ==."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def outcome(folder):
    """All that a run leaves in its checkpoint and its log, but for the times."""
    return plain({**checkpoint(folder), "log": log(folder)})


# ---- Killed ----------------------------------------------------------------------------------

DIE_WHILE_SAVING = """
import os, signal

def fsync(file):
    if os.fstat(file).st_size > 100_000:  # no other file is as large as a checkpoint
        os.ftruncate(file, 50_000)  # a crash loses what is not yet on the disk
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = fsync
"""


def kill(lines, *args):
    """Start net and kill it when it has printed that many lines."""
    with start_net(*args, pipesize=4096) as child:  # it waits when 4096 bytes are not yet read
        for _ in itertools.islice(child.stdout, lines):
            pass
        child.kill()
    assert child.returncode == -signal.SIGKILL, f"not killed after {lines} lines"


def test_run_killed_twice_in_training_and_once_in_saving_ends_as_one_never_killed(
    train, fashion, tmp_path
):
    killed, data = tmp_path / "killed", ("--no-cuda", "--data-dir", fashion)
    sizes = ("--epochs", 8, "--batch-size", 1, "--log-interval", 1)
    (tmp_path / "sitecustomize.py").write_text(DIE_WHILE_SAVING)
    path = f"{tmp_path}{os.pathsep}{Path(net.__file__).parent}"

    whole = train(*sizes, name="whole")
    lines = random.randint(75, 200), random.randint(1, 40)
    print(f"killed after {lines} lines")  # shown if this fails
    kill(lines[0], *FLAGS, *data, *sizes, "--output-dir", killed)  # saved once
    assert run_net("--resume", killed, *data, env={"PYTHONPATH": path}).returncode == -9
    assert list(killed.glob("last.pt.*.tmp"))
    kill(lines[1], "--resume", killed, *data)
    assert main("--resume", killed, *data) == 0
    assert outcome(killed) == outcome(whole)


# ---- Stopped by a signal ---------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_status_is_128_and_the_signal(train, interrupt, number, status):
    interrupt("train_step", 6, number)
    train(status=status)


def test_signal_saves_in_mid_epoch(train, interrupt):
    interrupt("train_step", 6, signal.SIGTERM)
    saved = checkpoint(train(status=143))
    assert (saved["epoch"], saved["step"], saved["totals"]["images"]) == (1, 6, 32)


class Closed(io.StringIO):
    """An output that nobody reads any longer."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_signal_saves_though_it_ended_the_reader_of_the_output_too(
    train, interrupt, monkeypatch, capsys
):
    note = net.Stop.note

    def note_and_close(stop, *args):
        note(stop, *args)
        monkeypatch.setattr(sys, "stdout", Closed())

    monkeypatch.setattr(net.Stop, "note", note_and_close)
    interrupt("train_step", 6, signal.SIGINT)
    assert checkpoint(train("--log-interval", 1, status=1))["step"] == 6
    assert capsys.readouterr().err == "net.py: [Errno 32] Broken pipe\n"


def test_closed_output_saves_the_steps_that_were_done(train, monkeypatch, capsys):
    steps, original = itertools.count(1), net.train_step

    def train_step(*args):
        if next(steps) == 6:
            monkeypatch.setattr(sys, "stdout", Closed())
        return original(*args)

    monkeypatch.setattr(net, "train_step", train_step)
    assert checkpoint(train("--log-interval", 1, status=1))["step"] == 6


@pytest.fixture
def small_memory(monkeypatch):
    """Call it to have no memory for a test, or to have it again."""
    original = net.evaluate

    def evaluate(*args):
        raise MemoryError

    return lambda small: monkeypatch.setattr(net, "evaluate", evaluate if small else original)


def test_out_of_memory_in_the_test_loses_no_training(train, small_memory, fashion):
    whole = train(name="whole")
    small_memory(True)
    stopped = train(name="stopped", status=1)
    small_memory(False)
    assert main("--resume", stopped, "--data-dir", fashion) == 0
    assert outcome(stopped) == outcome(whole)


def test_command_printed_on_a_signal_completes_the_run(train, interrupt, capsys):
    interrupt("train_step", 6, signal.SIGINT)
    folder = train(status=130)
    command = capsys.readouterr().out.splitlines()[-1].partition("python net.py ")[2]
    assert main(*shlex.split(command)) == 0
    assert checkpoint(folder)["epoch"] == 3


@pytest.mark.parametrize(
    ("function", "call"),
    [("train_step", 1), ("train_step", 6), ("train_step", 8), ("evaluate", 2), ("epoch_line", 2)],
)
def test_run_stopped_anywhere_and_resumed_ends_as_one_never_stopped(
    train, interrupt, fashion, function, call
):
    whole = train(name="whole")
    interrupt(function, call, signal.SIGTERM)
    stopped = train(name="stopped", status=143)
    assert main("--resume", stopped, "--data-dir", fashion) == 0
    assert outcome(stopped) == outcome(whole)


class SmallBaseline(net.BaselineCNN):
    """The baseline's losses with one layer and its dropout."""

    def __init__(self, in_channels, image_size, num_classes):
        nn.Module.__init__(self)
        pixels = in_channels * image_size**2
        self.layers = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(pixels, num_classes))


def test_run_with_dropout_resumes_with_the_same_dropout(train, interrupt, fashion, monkeypatch):
    monkeypatch.setattr(net, "BaselineCNN", SmallBaseline)
    monkeypatch.setattr(f"{__name__}.FLAGS", ("--model", "baseline", *FLAGS[:-1]))
    whole = train(name="whole")
    interrupt("train_step", 6, signal.SIGTERM)
    stopped = train(name="stopped", status=143)
    torch.manual_seed(0)  # as in another process
    assert main("--resume", stopped, "--data-dir", fashion) == 0
    assert outcome(stopped) == outcome(whole)


def test_run_in_bf16_resumes_exactly(train, interrupt, fashion):
    whole = train("--precision", "bf16", name="whole")
    interrupt("train_step", 6, signal.SIGTERM)
    stopped = train("--precision", "bf16", name="stopped", status=143)
    assert main("--resume", stopped, "--data-dir", fashion) == 0
    assert outcome(stopped) == outcome(whole)


def test_run_saved_before_taps_lay_first_resumes_exactly(train, interrupt, fashion):
    whole = train(name="whole")
    interrupt("train_step", 6, signal.SIGTERM)
    stopped = train(name="stopped", status=143)
    saved = checkpoint(stopped)
    moments = saved["optimizer"]["state"][2]
    for name in ("exp_avg", "exp_avg_sq"):
        moments[name] = moments[name].permute(3, 2, 0, 1).clone()
    weights = {}
    for name, weight in saved["model"].items():  # in their order
        if name == "primary_caps.weight":
            weight = weight.permute(3, 2, 0, 1).clone()
        weights[name.replace("primary_caps.", "primary_caps.conv.")] = weight
    torch.save({**saved, "model": weights}, stopped / "last.pt")
    assert main("--resume", stopped, "--data-dir", fashion) == 0
    assert outcome(stopped) == outcome(whole)


def test_second_signal_ends_at_once(train, interrupt, monkeypatch):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    interrupt("train_step", 6, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        train()


def test_signal_handlers_are_put_back_after_the_run(train):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    train()
    assert [signal.getsignal(number) for number in numbers] == before


# ---- What a run folder holds -----------------------------------------------------------------


def test_checkpoint_holds_these_keys(train):
    keys = {"model", "optimizer", "epoch", "step", "totals", "args", "history", "versions"}
    keys |= {"starts", "data_sum"}
    assert checkpoint(train()).keys() == keys


def test_log_holds_these_keys(train):
    parts = ("loss", "margin_loss", "reconstruction_loss", "error", "wrong")
    sums = {f"{name}_{part}" for name in ("train", "test") for part in parts}
    rest = {"epoch", "step", "lr", "seconds", "images_per_second"}
    assert log(train())[0].keys() == sums | rest


def test_readme_of_the_results_names_every_key_of_the_log(train):
    readme = (REPOSITORY / "results" / "README.md").read_text()
    assert [name for name in log(train())[0] if f"`{name}`" not in readme] == []


def test_readme_of_the_results_names_every_key_of_the_checkpoint(train):
    readme = (REPOSITORY / "results" / "README.md").read_text()
    assert [name for name in checkpoint(train()) if f"`{name}`" not in readme] == []


def test_log_is_the_history(train):
    folder = train()
    assert log(folder) == checkpoint(folder)["history"]


def test_log_is_rewritten_whole_on_resume(train, fashion):
    folder = train()
    (folder / "log.jsonl").write_text("another run's\n")
    assert main("--resume", folder, "--data-dir", fashion) == 0
    assert [entry["epoch"] for entry in log(folder)] == [1, 2, 3]


def test_no_absolute_path_is_saved(train):
    folder = train()
    assert '"/' not in (folder / "args.json").read_text() + json.dumps(checkpoint(folder)["args"])


def test_args_file_notes_every_start(train, interrupt, fashion):
    interrupt("train_step", 6, signal.SIGTERM)
    folder = train(status=143)
    assert main("--resume", folder, "--data-dir", fashion) == 0
    starts = json.loads((folder / "args.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 6]


def test_each_start_notes_commit_hardware_and_versions(train):
    starts = json.loads((train() / "args.json").read_text())["starts"]
    assert starts[0].keys() == {"step", "commit", "hardware", "versions"}


def test_saving_takes_at_most_a_tenth_of_the_time(train, monkeypatch):
    clock, saved = SimpleNamespace(now=0.0), []

    def lasting(seconds, function):
        def wrapper(*args):
            clock.now += seconds
            return function(*args)

        return wrapper

    def save(run):
        saved.append(run.epoch)

    monkeypatch.setattr(net, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(net, "train_step", lasting(1, net.train_step))  # an epoch: 4 seconds
    monkeypatch.setattr(net.Run, "save", lasting(1, save))
    train("--epochs", 8)
    assert saved == [1, 4, 7, 8]


@pytest.mark.parametrize("name", ["", "last.pt"])
def test_load_checkpoint_takes_a_folder_or_a_file(train, name):
    folder = train()
    model, _ = net.load_checkpoint(folder / name)
    assert plain(model.state_dict()) == plain(checkpoint(folder)["model"])


# ---- Refused ---------------------------------------------------------------------------------


def refusal(capsys, *args):
    """What net says on stderr, in one line, when it refuses."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True, action="always") as warned:
        assert main(*args) == 1
    assert not warned
    (line,) = capsys.readouterr().err.splitlines()
    return line


def another_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes/data.txt", "epoch 3\n")
    return buffer.getvalue()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def another_model(whole):
    content = torch.load(io.BytesIO(whole), weights_only=True)
    return saved({**content, "args": {**content["args"], "num_classes": 7}})


NO_CHECKPOINT = {
    "empty": lambda whole: b"",
    "1 byte": lambda whole: whole[:1],
    "1000 bytes": lambda whole: whole[:1000],
    "half": lambda whole: whole[: len(whole) // 2],
    "all but a byte": lambda whole: whole[:-1],
    "text": lambda whole: b"epoch 3, step 12\n" * 100,
    "pickle": lambda whole: pickle.dumps({"epoch": 3}),
    "another zip": lambda whole: another_zip(),
    "a list": lambda whole: saved([1, 2]),
    "weights alone": lambda whole: saved(nn.Linear(2, 3).state_dict()),
    "another model": another_model,
}


@pytest.mark.parametrize("damage", NO_CHECKPOINT)
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_file_that_is_no_checkpoint_is_refused_by_name(train, capsys, flag, damage):
    file = train("--epochs", 1) / "last.pt"
    file.write_bytes(NO_CHECKPOINT[damage](file.read_bytes()))
    assert str(file) in refusal(capsys, flag, file)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate", "--output-dir"])
def test_name_that_the_system_refuses_is_reported(fashion, capsys, flag):
    places = ("--dataset", "FashionMNIST", "--data-dir", fashion)[: 4 * (flag == "--output-dir")]
    assert "File name too long" in refusal(capsys, flag, "x" * 300, *places)


@pytest.mark.parametrize("change", ["fewer", "more", "labels"])
def test_resume_with_other_training_data_is_refused(train, tmp_path, capsys, change):
    folder = train()
    write_fashion(tmp_path / "data", train={"fewer": 40, "more": 128, "labels": 64}[change])
    if change == "labels":
        file = tmp_path / "data" / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
    said = refusal(capsys, "--resume", folder, "--data-dir", tmp_path / "data", "--epochs", 4)
    assert "training data" in said


def test_resume_takes_a_checkpoint_of_any_name(train, fashion):
    folder = train()
    (folder / "last.pt").rename(folder / "other.pt")
    assert main("--resume", folder / "other.pt", "--data-dir", fashion, "--epochs", 4) == 0
    assert checkpoint(folder)["epoch"] == 4


@pytest.mark.skipif(net.fcntl is None, reason="this system cannot lock a folder")
def test_second_run_in_a_folder_is_refused_within_the_first_epoch(train, tmp_path, capsys):
    with net.own_folder(tmp_path / "run"):
        train(status=1)
    assert "in use by another run" in capsys.readouterr().err


@pytest.mark.skipif(net.fcntl is None, reason="this system cannot lock a folder")
def test_second_resume_of_a_run_is_refused(train, fashion, capsys):
    folder = train()
    with net.own_folder(folder):
        said = refusal(capsys, "--resume", folder, "--data-dir", fashion, "--epochs", 4)
    assert "in use by another run" in said


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_missing_checkpoint_is_refused_by_name(tmp_path, capsys, flag):
    assert str(tmp_path / "last.pt") in refusal(capsys, flag, tmp_path)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.file))}",)


@pytest.fixture(params=["pickle", "checkpoint"])
def malicious(request, train, tmp_path):
    """(a malicious file, what it would make)."""
    harm, file = Malicious(tmp_path / "harm"), tmp_path / "malicious.pt"
    if request.param == "pickle":
        file.write_bytes(pickle.dumps(harm))
    else:
        torch.save({**checkpoint(train("--epochs", 1)), "history": harm}, file)
    return file, harm.file


def test_nothing_in_a_malicious_file_is_executed(malicious, capsys):
    file, harm = malicious
    refusal(capsys, "--evaluate", file)
    assert not harm.exists()


def test_malicious_file_is_refused_by_name(malicious, capsys):
    file, _ = malicious
    assert str(file) in refusal(capsys, "--evaluate", file)


def test_malicious_files_of_these_tests_do_harm_elsewhere(tmp_path):
    pickle.loads(pickle.dumps(Malicious(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()


@pytest.fixture
def full_disk(monkeypatch):
    """Call it to have no room for another checkpoint."""

    def fsync(file):
        if os.fstat(file).st_size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(os, "fsync", fsync)


def test_full_disk_leaves_the_last_checkpoint_whole(train, full_disk, fashion, capsys):
    file = train("--epochs", 1) / "last.pt"
    before = file.read_bytes()
    full_disk()
    refusal(capsys, "--resume", file, "--data-dir", fashion, "--epochs", 2)
    assert file.read_bytes() == before


def test_full_disk_is_reported_by_file_and_reason(train, full_disk, capsys):
    full_disk()
    folder = train("--epochs", 1, status=1)
    said = capsys.readouterr().err
    assert str(folder / "last.pt") in said
    assert os.strerror(errno.ENOSPC) in said


def test_failed_save_leaves_no_temporary_file(train, full_disk):
    full_disk()
    assert not list(train("--epochs", 1, status=1).glob("*.tmp"))


@pytest.fixture
def no_training(monkeypatch):
    """Any training step fails the test."""
    monkeypatch.setattr(net, "train_step", lambda *args: pytest.fail("trained"))


def test_taken_run_folder_is_refused_before_training_with_the_command_that_resumes(
    train, no_training, tmp_path, capsys
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pt").write_bytes(b"precious")
    train(status=1)
    assert f"(python net.py --resume {tmp_path / 'run'} " in capsys.readouterr().err


def test_taken_run_folder_is_left_as_it_is(train, capsys):
    folder = train()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    train("--seed", 2, status=1)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_log_without_its_checkpoint_is_left_as_it_is(train, capsys):
    folder = train()
    (folder / "last.pt").unlink()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    train("--seed", 2, status=1)
    assert "--resume" not in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_folder_of_a_run_that_never_saved_is_used(train):
    folder = train()
    (folder / "last.pt").unlink()
    (folder / "log.jsonl").write_bytes(b"")
    train()


def test_file_in_place_of_the_run_folder_is_reported_before_training(
    train, no_training, tmp_path, capsys
):
    (tmp_path / "run").write_text("a file")
    train(status=1)
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_run_folder_that_cannot_be_written_is_reported_before_training(
    train, no_training, tmp_path, capsys, monkeypatch
):
    def refuse(file, *args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(net, "open", refuse, raising=False)
    train(status=1)
    assert str(tmp_path / "run") in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{"])
def test_damaged_args_file_is_written_anew_when_the_run_goes_on(train, fashion, content):
    folder = train()
    before = (folder / "args.json").read_bytes()
    (folder / "args.json").write_text(content)
    assert main("--resume", folder, "--data-dir", fashion) == 0
    written = json.loads((folder / "args.json").read_text())
    assert written["args"] == json.loads(before)["args"] and len(written["starts"]) == 2


# ---- Pretrained ------------------------------------------------------------------------------


@pytest.fixture
def pretrained(train, fashion, tmp_path):
    """A pretrained file made of a run."""
    net.save_pretrained(train(), tmp_path / "pretrained.pt", fashion)
    return tmp_path / "pretrained.pt"


def test_pretrained_weights_are_in_half_precision(pretrained):
    weights = torch.load(pretrained, weights_only=True)["model"].values()
    assert {weight.dtype for weight in weights} == {torch.float16}


def test_pretrained_weights_are_the_rounded_weights_of_the_run(pretrained):
    model, _ = net.load_checkpoint(pretrained)
    weights = checkpoint(pretrained.parent / "run")["model"]
    rounded = {name: weight.half().float() for name, weight in weights.items()}
    assert plain(model.state_dict()) == plain(rounded)


def test_pretrained_file_records_the_evaluation_of_the_rounded_weights(pretrained, fashion):
    model, content = net.load_checkpoint(pretrained)
    _, test = net.load_splits("FashionMNIST", fashion)
    measured = net.averages(net.evaluate(model, test, 1000), "measured")
    assert content.items() >= measured.items()


def test_evaluate_confirms_the_wrong_count_of_a_pretrained_file(pretrained, fashion, capsys):
    wrong = torch.load(pretrained, weights_only=True)["measured_wrong"]
    assert main("--evaluate", pretrained, "--data-dir", fashion) == 0
    assert f"({wrong} wrong)" in capsys.readouterr().out


def test_pretrained_file_is_a_fifth_of_the_checkpoint_or_less(pretrained):
    size = (pretrained.parent / "run" / "last.pt").stat().st_size
    assert pretrained.stat().st_size <= size / 5


def test_pretrained_file_tells_where_it_comes_from(pretrained):
    content, folder = torch.load(pretrained, weights_only=True), pretrained.parent / "run"
    whole = checkpoint(folder)
    same = ("epoch", "step", "args", "history", "versions")
    assert {name: content[name] for name in same} == {name: whole[name] for name in same}
    assert content["starts"] == json.loads((folder / "args.json").read_text())["starts"]


def test_pretrained_file_cannot_be_resumed(pretrained, fashion, capsys):
    said = refusal(capsys, "--resume", pretrained, "--data-dir", fashion)
    assert str(pretrained) in said
