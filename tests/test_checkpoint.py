"""Runs and checkpoints: what is saved, what is refused, and that interrupted runs lose nothing."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
import zlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torchvision
from helpers import (
    LIST,
    QUICK,
    Trap,
    checkpoint,
    files_in,
    finish,
    log,
    main,
    start_child,
    write_fashion,
)
from torch import nn

import net

THREE_EPOCHS = "--epochs 3 --with_reconstruction --test-batch-size 7"  # 12 steps
NOT_COMPARED = {"seconds", "images_per_second", "starts"}


def plain(value):
    """The same with a hash for every tensor and without the times, to be compared by ==."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def outcome(folder):
    """All that a run leaves in its checkpoint and its log, but for the times."""
    return plain({**checkpoint(folder), "log": log(folder)})


# ---- Killed ----------------------------------------------------------------------------------


def die_in_training(step):
    """Have this process killed in a step, counted from 1."""
    original, calls = net.train_step, itertools.count(1)

    def train_step(*args):
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    net.train_step = train_step


def die_while_saving():
    """Have this process killed in the middle of its first checkpoint."""

    def fsync(file):
        if os.fstat(file).st_size > 100_000:  # no other file is as large as a checkpoint
            os.ftruncate(file, 50_000)  # a crash loses what is not yet on the disk
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync


def test_killed_run_resumes_exactly(train, fashion, tmp_path):
    whole = train("--epochs 4", name="whole")  # 16 steps
    steps = random.randint(5, 8), random.randint(1, 8)  # the first epoch is always saved
    print(f"killed in steps {steps}")  # shown if this fails
    killed, data = tmp_path / "run", ("--data-dir", fashion)
    starts = [
        ((QUICK, "--epochs 4 --output-dir", killed), partial(die_in_training, steps[0])),
        (("--resume", killed), die_while_saving),
        (("--resume", killed), partial(die_in_training, steps[1])),
    ]
    for parts, die in starts:
        child = start_child(tmp_path / "output", *parts, *data, prepare=die)
        assert finish(child) == [-signal.SIGKILL]
        assert bool(list(killed.glob("last.pt.*.tmp"))) == (die is die_while_saving)
    assert main("--resume", killed, *data) == 0
    assert outcome(killed) == outcome(whole)


# ---- Stopped by a signal ---------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_is_answered_and_gives_its_exit_status(train, interrupt, capfd, number, status):
    interrupt("train_step", 2, number)
    train(status=status)
    assert "finishing the step, then saving" in capfd.readouterr().err


def test_signal_saves_in_mid_epoch(train, interrupt):
    interrupt("train_step", 6, signal.SIGTERM)
    saved = checkpoint(train(THREE_EPOCHS, status=143))
    totals = saved["totals"]
    assert (saved["epoch"], saved["step"], totals["images"]) == (1, 6, 32)
    total = totals["margin_loss"] + 0.0005 * totals["reconstruction_loss"]
    assert totals["loss"] == pytest.approx(total)


# Nobody reads the output any longer; or it is a file on a disk that is full.
each_end_of_output = pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])


class Closed(io.StringIO):
    """An output that takes nothing any longer."""

    def __init__(self, number=errno.EPIPE):
        super().__init__()
        self.error = OSError(number, os.strerror(number))

    def write(self, text):
        raise self.error


def test_signal_saves_though_it_ended_the_reader_of_the_output_too(
    train, interrupt, monkeypatch, capsys
):
    note = net.Stop.note
    interrupt("train_step", 6, signal.SIGINT)
    with monkeypatch.context() as patch:  # gives the output back before capsys ends

        def note_and_close(stop, *args):
            note(stop, *args)
            patch.setattr(sys, "stdout", Closed())

        patch.setattr(net.Stop, "note", note_and_close)
        folder = train(THREE_EPOCHS, "--log-interval 1", status=130)
    assert checkpoint(folder)["step"] == 6
    assert f"go on with: python net.py --resume {folder}" in capsys.readouterr().err


@each_end_of_output
def test_closed_output_saves_the_steps_that_were_done(train, monkeypatch, number):
    steps, original = itertools.count(1), net.train_step

    def train_step(*args):
        if next(steps) == 6:
            monkeypatch.setattr(sys, "stdout", Closed(number))
        return original(*args)

    monkeypatch.setattr(net, "train_step", train_step)
    assert checkpoint(train(THREE_EPOCHS, "--log-interval 1", status=1))["step"] == 6


@pytest.fixture
def small_memory(monkeypatch):
    """Call it to have no memory for a test, or to have it again."""
    original = net.evaluate

    def evaluate(*args):
        raise MemoryError

    return lambda small: monkeypatch.setattr(net, "evaluate", evaluate if small else original)


def test_out_of_memory_in_the_test_loses_no_training(train, small_memory, fashion):
    whole = train(THREE_EPOCHS, name="whole")
    small_memory(True)
    stopped = train(THREE_EPOCHS, name="stopped", status=1)
    small_memory(False)
    assert main("--resume", stopped, "--data-dir", fashion) == 0
    assert outcome(stopped) == outcome(whole)


@each_end_of_output
def test_signal_saves_though_nobody_reads_the_errors(train, interrupt, monkeypatch, number):
    def write(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", write)
    interrupt("train_step", 6, signal.SIGTERM)
    assert checkpoint(train(THREE_EPOCHS, status=143))["step"] == 6


def test_command_printed_on_a_signal_completes_the_run(train, interrupt, capsys):
    interrupt("train_step", 2, signal.SIGINT)
    folder = train(status=130)
    command = capsys.readouterr().err.splitlines()[-1].split("python net.py ")[1]
    assert main(command) == 0
    assert checkpoint(folder)["epoch"] == 1


@pytest.mark.parametrize(
    ("function", "call", "flags"),
    [
        ("train_step", 1, THREE_EPOCHS),
        ("train_step", 6, THREE_EPOCHS),
        ("train_step", 8, THREE_EPOCHS),
        ("evaluate", 2, THREE_EPOCHS),
        ("epoch_line", 2, THREE_EPOCHS),
        ("train_step", 6, f"{THREE_EPOCHS} --precision bf16"),
        ("train_step", 6, "--model baseline --epochs 3"),  # with dropout
    ],
)
def test_stopped_run_resumes_exactly(
    train, interrupt, fashion, small_baseline, function, call, flags
):
    whole = train(flags, name="whole")
    interrupt(function, call, signal.SIGTERM)
    stopped = train(flags, name="stopped", status=143)
    torch.manual_seed(0)  # as in another process
    assert main("--resume", stopped, "--data-dir", fashion) == 0
    assert outcome(stopped) == outcome(whole)


def test_signal_during_a_test_ends_it_after_a_batch(train, interrupt, spy):
    sizes = spy(net, "tally", lambda _, losses, output, labels: len(labels))
    interrupt("evaluate", 1, signal.SIGTERM)
    train("--test-batch-size 7", status=143)
    assert sizes == [16, 16, 16, 16, 7]  # four steps and a batch of the test


def test_second_signal_ends_at_once(train, interrupt, monkeypatch):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", leave)
    interrupt("train_step", 2, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        train()


def test_signal_handlers_are_put_back_after_the_run(train):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    train()
    assert [signal.getsignal(number) for number in numbers] == before


# ---- What a run folder holds -----------------------------------------------------------------


def test_checkpoint_holds_these_keys(finished):
    keys = {"model", "optimizer", "epoch", "step", "totals", "args", "history", "versions"}
    keys |= {"starts", "data_sum"}
    assert checkpoint(finished).keys() == keys


def test_log_holds_these_keys(finished):
    parts = ("loss", "margin_loss", "reconstruction_loss", "error", "wrong")
    sums = {f"{name}_{part}" for name in ("train", "test") for part in parts}
    rest = {"epoch", "step", "lr", "seconds", "images_per_second"}
    assert log(finished)[0].keys() == sums | rest


def test_readme_of_the_results_names_every_key_of_the_log(finished):
    assert [name for name in log(finished)[0] if f"`{name}`" not in LIST] == []


def test_readme_of_the_results_names_every_key_of_the_checkpoint(finished):
    assert [name for name in checkpoint(finished) if f"`{name}`" not in LIST] == []


def test_log_is_the_history(train):
    folder = train("--epochs 2")
    assert log(folder) == checkpoint(folder)["history"]


def test_log_is_rewritten_whole_on_resume(trained, fashion):
    (trained / "log.jsonl").write_text("another run's\n")
    assert main("--resume", trained, "--data-dir", fashion) == 0
    assert [entry["epoch"] for entry in log(trained)] == [1]


def test_no_absolute_path_is_saved(finished):
    args = json.dumps(checkpoint(finished)["args"])
    assert '"/' not in (finished / "args.json").read_text() + args


def test_args_file_notes_every_start(train, interrupt, fashion):
    interrupt("train_step", 3, signal.SIGTERM)
    folder = train(status=143)
    assert main("--resume", folder, "--data-dir", fashion) == 0
    starts = json.loads((folder / "args.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3]


def test_each_start_notes_commit_hardware_and_versions(finished):
    starts = json.loads((finished / "args.json").read_text())["starts"]
    assert starts[0].keys() == {"step", "commit", "hardware", "versions"}


@pytest.fixture
def slow(monkeypatch):
    """Call it with functions of net and the seconds of a call; nothing else takes any time."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(net, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def lasting(seconds, function):
        def wrapper(*args):
            clock.now += seconds
            return function(*args)

        return wrapper

    def slow(**functions):
        for name, seconds in functions.items():
            monkeypatch.setattr(net, name, lasting(seconds, getattr(net, name)))

    return slow


def test_saving_takes_at_most_a_tenth_of_the_time(train, spy, slow):
    slow(train_step=1, save_checkpoint=1)  # seconds; an epoch has 4 steps
    saved = spy(net.Run, "save", lambda _, run: run.epoch)
    train("--epochs 8")
    assert saved == [1, 4, 7, 8]


def test_seconds_are_those_of_an_epoch_s_training_also_if_it_was_resumed(
    train, interrupt, fashion, slow
):
    slow(train_step=1, evaluate=5)  # seconds; an epoch has 4 steps
    interrupt("train_step", 7, signal.SIGTERM)
    folder = train(THREE_EPOCHS, status=143)
    assert main("--resume", folder, "--data-dir", fashion) == 0
    entries = [(entry["seconds"], entry["images_per_second"]) for entry in log(folder)]
    assert entries == 3 * [(4, 16)]


def test_report_tells_rate_and_time_left_also_after_a_resume(
    train, interrupt, fashion, slow, capsys
):
    slow(train_step=1)
    interrupt("train_step", 1, signal.SIGTERM)
    folder = train(status=143)
    assert main("--resume", folder, "--data-dir", fashion, "--log-interval 3") == 0
    assert "48/64 images, 16 images/s, 00:01 left" in capsys.readouterr().out


def test_file_is_whole_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    net.write_file(tmp_path / "log.jsonl", b"content")
    assert sizes == [7]


def test_checkpoint_of_a_gpu_is_read_onto_the_cpu(trained, monkeypatch):
    saved = checkpoint(trained)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(saved, trained / "last.pt")
    assert b"cuda:0" in (trained / "last.pt").read_bytes()
    model, _ = net.load_checkpoint(trained)
    assert plain(model.state_dict()) == plain(saved["model"])


@pytest.fixture
def plain_git(monkeypatch):
    """No hook and no setting of the user's changes what git does."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_start_notes_the_commit_of_net_py_wherever_it_is_called(tmp_path, monkeypatch, plain_git):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x"]
    (tmp_path / "net.py").write_text("one")
    for words in ("init", "add .", "commit -m x", "tag -a v1 -m x"):
        subprocess.run([*git, *words.split()], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(net, "__file__", str(tmp_path / "net.py"))
    assert re.fullmatch("[0-9a-f]{40}", net.environment(torch.device("cpu"))["commit"])
    (tmp_path / "net.py").write_text("two")
    assert net.environment(torch.device("cpu"))["commit"].endswith("-dirty")


def test_start_is_noted_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert net.environment(torch.device("cpu"))["commit"] is None


def test_start_is_noted_where_git_complains_in_another_encoding(monkeypatch, tmp_path):
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\nprintf 'caf\\351' >&2\nexit 128\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert shutil.which("git")
    assert net.environment(torch.device("cpu"))["commit"] is None


def test_hardware_is_the_cpu_s_name_and_the_threads_in_use(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Ours"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert net.environment(torch.device("cpu"))["hardware"] == "Ours, 3 threads"


def test_versions_are_those_of_their_packages():
    assert net.environment(torch.device("cpu"))["versions"] == {
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": sys.version.split()[0],
    }


@pytest.mark.parametrize("name", ["", "last.pt"])
def test_load_checkpoint_takes_a_folder_or_a_file(trained, name):
    model, _ = net.load_checkpoint(trained / name)
    assert plain(model.state_dict()) == plain(checkpoint(trained)["model"])


# ---- Refused ---------------------------------------------------------------------------------


def refusal(capsys, *args):
    """What net says on stderr, in one line, when it refuses."""
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # as torch's of old pickles
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


def without(whole, part, name):
    content = torch.load(io.BytesIO(whole), weights_only=True)
    del content[part][name]
    return saved(content)


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
    "a weight less": lambda whole: without(whole, "model", "conv1.bias"),
    "no image size": lambda whole: without(whole, "args", "image_size"),
}


@pytest.mark.parametrize("damage", NO_CHECKPOINT.values(), ids=NO_CHECKPOINT)
def test_file_that_is_no_checkpoint_is_refused(trained, damage):
    file = trained / "last.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(net.Failure, match=re.escape(str(file))):
        net.load_checkpoint(file)


def test_flag_that_an_older_checkpoint_does_not_know_is_as_by_default(trained):
    file = trained / "last.pt"
    file.write_bytes(without(file.read_bytes(), "args", "reconstruction_weight"))
    model, _ = net.load_checkpoint(file)
    assert model.reconstruction_weight == 0.0005


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(net.Failure, match=re.escape(str(tmp_path / "last.pt"))):
        net.load_checkpoint(tmp_path)


def test_checkpoint_that_the_memory_cannot_hold_is_not_called_damaged_alone(trained, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(net.Failure, match="too large for the memory"):
        net.load_checkpoint(trained)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_refused_checkpoint_is_named_in_one_line(trained, capsys, flag):
    (trained / "last.pt").write_bytes(b"text")
    assert str(trained / "last.pt") in refusal(capsys, flag, trained)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_checkpoint_whose_name_is_too_long_is_refused(capsys, flag):
    assert "File name too long" in refusal(capsys, flag, "x" * 300)


def test_folder_whose_name_is_too_long_is_refused(fashion, capsys):
    run = ("--dataset FashionMNIST --data-dir", fashion, "--output-dir", "x" * 300)
    assert "File name too long" in refusal(capsys, *run)


@pytest.mark.parametrize(
    ("count", "file", "last"),
    [
        (40, "labels-idx1", 9),  # fewer images
        (128, "labels-idx1", 7),  # more images
        (64, "labels-idx1", 0),  # another last label
        (64, "images-idx3", 0),  # another last pixel
    ],
)
def test_other_training_data_are_refused_on_resume(trained, tmp_path, capsys, count, file, last):
    data = write_fashion(tmp_path / "data", train=count)
    changed = data / "FashionMNIST" / "raw" / f"train-{file}-ubyte"
    changed.write_bytes(changed.read_bytes()[:-1] + bytes([last]))
    said = refusal(capsys, "--resume", trained, "--data-dir", data, "--epochs 4")
    assert "training data" in said


def test_training_data_are_known_by_their_crc_32(finished, fashion):
    images, labels = net.load_data("FashionMNIST", fashion, train=True).tensors
    content = labels.numpy().tobytes() + images.numpy().tobytes()
    assert checkpoint(finished)["data_sum"] == zlib.crc32(content)


def test_resume_takes_a_checkpoint_of_any_name(trained, fashion, tmp_path):
    shutil.copy(trained / "last.pt", tmp_path / "other.pt")
    assert main("--resume", tmp_path / "other.pt", "--data-dir", fashion, "--epochs 2") == 0
    assert checkpoint(tmp_path)["epoch"] == 2


def test_resume_of_another_file_leaves_the_last_checkpoint_as_it_is(trained, fashion, capsys):
    shutil.copy(trained / "last.pt", trained / "first.pt")
    before = files_in(trained)
    again = ("--resume", trained / "first.pt", "--data-dir", fashion, "--epochs 2")
    assert f"{trained / 'last.pt'} would be overwritten" in refusal(capsys, *again)
    assert files_in(trained) == before


def test_resume_of_another_file_leaves_a_log_without_its_checkpoint(trained, fashion, capsys):
    (trained / "last.pt").rename(trained / "of_another_run.pt")
    before = files_in(trained)
    again = ("--resume", trained / "of_another_run.pt", "--data-dir", fashion, "--epochs 2")
    assert f"{trained / 'log.jsonl'} would be overwritten" in refusal(capsys, *again)
    assert files_in(trained) == before


def test_second_run_in_a_folder_is_refused(train, tmp_path, capsys):
    with net.own_folder(tmp_path / "run"):
        train(status=1)
    assert "in use by another run" in capsys.readouterr().err


def test_second_resume_of_a_run_is_refused(trained, fashion, capsys):
    with net.own_folder(trained):
        said = refusal(capsys, "--resume", trained, "--data-dir", fashion, "--epochs 2")
    assert "in use by another run" in said


@pytest.fixture(params=["pickle", "checkpoint"])
def malicious(request, trained, tmp_path):
    """(a malicious file, what it would make)."""
    harm, file = tmp_path / "harm", tmp_path / "malicious.pt"
    if request.param == "pickle":
        file.write_bytes(pickle.dumps(Trap(harm)))
    else:
        torch.save({**checkpoint(trained), "history": Trap(harm)}, file)
    return file, harm


def test_nothing_in_a_malicious_file_is_executed(malicious):
    file, harm = malicious
    with pytest.raises(net.Failure, match=re.escape(str(file))):
        net.load_checkpoint(file)
    assert not harm.exists()


def test_malicious_file_does_harm_elsewhere(malicious):
    file, harm = malicious
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    assert harm.exists()


@pytest.fixture
def full_disk(monkeypatch):
    """There is no room for another checkpoint."""

    def fsync(file):
        if os.fstat(file).st_size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_full_disk_leaves_the_last_checkpoint_and_its_log_whole(
    trained, full_disk, fashion, capsys
):
    before = files_in(trained)
    refusal(capsys, "--resume", trained, "--data-dir", fashion, "--epochs 2")
    after = files_in(trained)
    assert [after[name] == before[name] for name in ("last.pt", "log.jsonl")] == [True, True]


def test_full_disk_is_reported_by_file_and_reason(train, full_disk, capsys):
    folder = train(status=1)
    said = capsys.readouterr().err
    assert str(folder / "last.pt") in said
    assert os.strerror(errno.ENOSPC) in said


def test_failed_save_leaves_no_temporary_file(train, full_disk):
    assert not list(train(status=1).glob("*.tmp"))


@pytest.fixture
def no_training(monkeypatch):
    """Any training step fails the test."""
    monkeypatch.setattr(net, "train_step", lambda *args: pytest.fail("trained"))


def test_existing_run_is_refused(train, no_training, trained, capsys):
    before = files_in(trained)
    train("--seed 2", status=1)
    assert f"(python net.py --resume {trained} " in capsys.readouterr().err
    assert files_in(trained) == before


def test_log_without_its_checkpoint_is_left_as_it_is(train, no_training, trained, capsys):
    (trained / "last.pt").unlink()
    before = files_in(trained)
    train("--seed 2", status=1)
    assert "--resume" not in capsys.readouterr().err
    assert files_in(trained) == before


def test_folder_of_a_run_that_never_saved_is_used(train, trained):
    (trained / "last.pt").unlink()
    (trained / "log.jsonl").write_bytes(b"")
    train()


def test_file_in_place_of_the_run_folder_is_refused(train, no_training, tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    train(status=1)
    assert str(tmp_path / "run") in capsys.readouterr().err


def test_run_folder_that_cannot_be_written_is_refused(
    train, no_training, tmp_path, capsys, monkeypatch
):
    def refuse(file, *args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    monkeypatch.setattr(net, "open", refuse, raising=False)
    train(status=1)
    said = capsys.readouterr().err
    assert str(tmp_path / "run") in said and os.strerror(errno.EACCES) in said


@pytest.mark.parametrize("content", ["", "{"])
def test_damaged_args_file_is_written_anew_on_resume(trained, fashion, content):
    before = json.loads((trained / "args.json").read_text())
    (trained / "args.json").write_text(content)
    assert main("--resume", trained, "--data-dir", fashion) == 0
    written = json.loads((trained / "args.json").read_text())
    assert written["args"] == before["args"] and len(written["starts"]) == 2


# ---- Pretrained ------------------------------------------------------------------------------


@pytest.fixture
def pretrained(trained, fashion):
    """A pretrained file made of a run, which lies beside it."""
    net.save_pretrained(trained, trained / "pretrained.pt", fashion)
    return trained / "pretrained.pt"


def test_pretrained_weights_are_in_half_precision(pretrained):
    weights = torch.load(pretrained, weights_only=True)["model"].values()
    assert {weight.dtype for weight in weights} == {torch.float16}


def test_pretrained_weights_are_the_rounded_weights_of_the_run(pretrained, trained):
    model, _ = net.load_checkpoint(pretrained)
    weights = checkpoint(trained)["model"]
    rounded = {name: weight.half().float() for name, weight in weights.items()}
    assert plain(model.state_dict()) == plain(rounded)


def test_pretrained_file_records_the_evaluation_of_the_rounded_weights(pretrained, fashion):
    model, content = net.load_checkpoint(pretrained)
    _, test = net.load_splits("FashionMNIST", fashion)
    measured = net.averages(net.evaluate(model, test, 1000), "measured")
    assert content.items() >= measured.items()


def test_evaluate_shows_the_wrong_count_that_a_pretrained_file_records(pretrained, fashion, capsys):
    wrong = torch.load(pretrained, weights_only=True)["measured_wrong"]
    assert main("--evaluate", pretrained, "--data-dir", fashion) == 0
    assert f"recorded   {wrong} wrong" in capsys.readouterr().out


def test_pretrained_file_is_a_fifth_of_the_checkpoint_or_less(pretrained, trained):
    assert pretrained.stat().st_size <= (trained / "last.pt").stat().st_size / 5


def test_pretrained_file_tells_where_it_comes_from(pretrained, trained):
    content, whole = torch.load(pretrained, weights_only=True), checkpoint(trained)
    same = ("epoch", "step", "args", "history", "versions")
    assert {name: content[name] for name in same} == {name: whole[name] for name in same}
    assert content["starts"] == json.loads((trained / "args.json").read_text())["starts"]


def test_pretrained_file_of_a_run_with_validation_never_opens_the_test_set(
    train, fashion, tmp_path
):
    data = shutil.copytree(fashion, tmp_path / "data")
    for file in data.rglob("t10k*"):
        file.write_bytes(b"sealed")
    folder = train("--validation 20 --data-dir", data)
    net.save_pretrained(folder, folder / "pretrained.pt", data)
    content = torch.load(folder / "pretrained.pt", weights_only=True)
    assert content["measured_loss"] == pytest.approx(log(folder)[0]["valid_loss"], rel=1e-3)


@pytest.mark.parametrize("part", ["optimizer", "totals", "data_sum"])
def test_file_that_lacks_a_part_of_the_run_cannot_be_resumed(trained, fashion, capsys, part):
    content = checkpoint(trained)
    del content[part]
    torch.save(content, trained / "last.pt")
    said = refusal(capsys, "--resume", trained, "--data-dir", fashion, "--epochs 2")
    assert f"{trained} holds no whole run" in said
