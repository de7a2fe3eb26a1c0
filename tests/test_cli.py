"""The command line: its flags, what each changes, what it refuses and what it prints."""

import argparse
import errno
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
import torch
from helpers import (
    README,
    REPOSITORY,
    SmallBaseline,
    argv,
    checkpoint,
    files_in,
    log,
    main,
    write_fashion,
    write_idx,
)
from PIL import Image
from torch import nn

import net

FLAGS = {
    # the nine flags of the earlier PyTorch implementation, and hyphens for two of them
    "--batch-size": 128,
    "--test-batch-size": 1000,
    "--epochs": 250,
    "--lr": 0.001,
    "--no-cuda": False,
    "--seed": 1,
    "--log-interval": 10,
    "--routing_iterations": 3,
    "--routing-iterations": 3,
    "--with_reconstruction": False,
    "--with-reconstruction": False,
    # new here
    "--model": "capsnet",
    "--reconstruction-weight": 0.0005,
    "--lr-decay": 0.05,
    "--warm-up": 100,
    "--dataset": "MNIST",
    "--data-dir": "data",
    "--validation": 0,
    "--test-interval": 1,
    "--output-dir": None,
    "--resume": None,
    "--evaluate": None,
    "--predict": None,
    "--precision": "auto",
    "--compile": False,
}


def shown(capsys, word):
    """What a run shows beside the word at the head of a line."""
    (text,) = re.findall(rf"^{word} +(.+)$", capsys.readouterr().out, re.MULTILINE)
    return text


# ---- The list of flags -----------------------------------------------------------------------


def test_flags_and_their_defaults_are_frozen():
    parser = net.build_parser()
    defaults = vars(parser.parse_args([]))
    options = [(option, a.dest) for a in parser._actions[1:] for option in a.option_strings]
    assert {option: defaults[name] for option, name in options} == FLAGS  # [0] is --help


@pytest.mark.parametrize("flag", ["--epoch=3", "--no-cud", "--with", "--routing=1"])
def test_flags_cannot_be_abbreviated(flag):
    with pytest.raises(SystemExit, match="2"):
        net.build_parser().parse_args([flag])


def test_help_shows_every_default():
    text = " ".join(net.build_parser().format_help().split())
    flags = {flag.replace("_", "-"): str(default) for flag, default in FLAGS.items()}
    defaults = [default for default in flags.values() if default not in ("None", "False")]
    assert sorted(re.findall(r"\(default: (\S+)\)", text)) == sorted(defaults)


def test_help_is_grouped():
    titles = re.findall(r"^(\w+):$", net.build_parser().format_help(), re.MULTILINE)
    assert titles == ["options", "model", "optimisation", "data", "run", "speed", "examples"]


# ---- Every flag changes what it claims -------------------------------------------------------


@pytest.mark.parametrize(("size", "steps"), [(16, 4), (24, 3), (1000, 1)])
def test_batch_size_sets_the_number_of_steps(train, size, steps):
    assert checkpoint(train("--batch-size", size))["step"] == steps


def test_test_batch_size_is_the_number_of_images_tested_at_a_time(train, spy):
    sizes = spy(net.CapsNet, "losses", lambda _, model, output, digits, labels: len(labels))
    train("--test-batch-size 15")
    assert sizes == [16, 16, 16, 16, 15, 15, 10]


def test_epochs_is_the_number_of_epochs(train):
    assert [entry["epoch"] for entry in log(train("--epochs 3"))] == [1, 2, 3]


def test_lr_is_how_far_the_first_step_of_adam_moves_a_weight(train):
    saved = checkpoint(train("--lr 0.01 --batch-size 64"))
    torch.manual_seed(saved["args"]["seed"])
    first = net.make_model(argparse.Namespace(**saved["args"])).state_dict()
    moves = [(saved["model"][name] - first[name]).abs().max().item() for name in first]
    assert max(moves) == pytest.approx(0.01, rel=1e-3)


def test_lr_decay_is_the_part_of_the_rate_that_is_left_at_the_end(train):
    saved = checkpoint(train("--lr-decay 0.01"))
    rate = saved["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(0.001 * 0.01 ** (3 / 4))


def test_warm_up_is_the_number_of_steps_in_which_the_rate_rises(train):
    saved = checkpoint(train("--warm-up 8 --lr-decay 1"))
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.001 * 4 / 8)


def test_no_cuda_computes_on_the_cpu_where_there_is_a_gpu(trained, fashion, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main("--evaluate", trained, "--data-dir", fashion) == 0
    assert shown(capsys, "device").startswith("cpu")


def test_seed_changes_the_initial_weights(train):
    one, other = (checkpoint(train("--lr 1e-12 --seed", s, name=str(s))) for s in (1, 2))
    assert not torch.allclose(one["model"]["conv1.weight"], other["model"]["conv1.weight"])


@pytest.fixture
def shifted(spy):
    """(images, shifts) of every batch, in training and in testing."""
    return spy(net, "random_shift", lambda _, images, shifts: (images, shifts))


def test_seed_changes_the_order_and_the_shifts(train, shifted):
    for seed in (1, 2):
        train("--batch-size 64 --seed", seed, name=str(seed))
    (one, one_shifts), _, (other, other_shifts), _ = shifted
    assert not torch.equal(one, other) and not torch.equal(one_shifts, other_shifts)


def test_interval_leaves_out_tests_but_never_the_last(train, capsys):
    folder = train("--epochs 5 --test-interval 2")
    assert [entry["epoch"] for entry in log(folder) if "test_wrong" in entry] == [2, 4, 5]
    assert all("train_wrong" in entry for entry in log(folder))
    said = re.findall(r"^epoch .* loss .* s.*$", capsys.readouterr().out, re.MULTILINE)
    assert ["test error" in line for line in said] == [False, True, False, True, True]
    often = log(train("--epochs 5", name="often"))
    assert often[-1]["test_loss"] == log(folder)[-1]["test_loss"]


def test_each_epoch_has_its_own_order_and_shifts(train, shifted):
    train("--epochs 2 --batch-size 64")
    (one, one_shifts), _, (other, other_shifts), _ = shifted
    assert not torch.equal(one, other) and not torch.equal(one_shifts, other_shifts)


@pytest.mark.parametrize(("interval", "lines"), [(1, 16), (5, 3), (100, 0)])
def test_log_interval_is_the_number_of_steps_from_report_to_report(train, capsys, interval, lines):
    train("--batch-size 4 --log-interval", interval)
    assert capsys.readouterr().out.count("images/s") == lines


@pytest.mark.parametrize("flag", ["--routing_iterations", "--routing-iterations"])
def test_routing_iterations_are_those_of_the_model(train, flag):
    model, _ = net.load_checkpoint(train(flag, 2))
    assert model.digit_caps.routing_iterations == 2


def test_routing_iterations_change_the_result(train):
    one, other = (train("--routing_iterations", r, name=str(r)) for r in (1, 3))
    assert log(one)[0]["train_loss"] != log(other)[0]["train_loss"]


@pytest.mark.parametrize("flag", ["--with_reconstruction", "--with-reconstruction"])
def test_with_reconstruction_adds_the_decoder(train, flag):
    model, _ = net.load_checkpoint(train(flag))
    assert model.decoder is not None


def test_without_reconstruction_there_is_no_decoder(trained):
    model, _ = net.load_checkpoint(trained)
    assert model.decoder is None


def test_reconstruction_weight_is_that_of_the_loss_in_the_total(train):
    (entry,) = log(train("--with_reconstruction --reconstruction-weight 0.25"))
    total = entry["train_margin_loss"] + 0.25 * entry["train_reconstruction_loss"]
    assert entry["train_loss"] == pytest.approx(total)


def test_model_chooses_the_baseline(train, small_baseline):
    model, _ = net.load_checkpoint(train("--model baseline"))
    assert isinstance(model, SmallBaseline)


def test_dataset_chooses_the_data(train, fashion, tmp_path, capsys):
    shutil.copytree(fashion / "FashionMNIST", tmp_path / "KMNIST")
    train("--dataset KMNIST --data-dir", tmp_path)
    assert shown(capsys, "data").startswith("KMNIST: 64 training and 40 test images")


def test_data_dir_is_where_the_data_lie(train, tmp_path, capsys):
    train("--data-dir", write_fashion(tmp_path / "data", train=32, test=10))
    assert "32 training and 10 test images" in shown(capsys, "data")


def test_validation_trains_on_the_other_images(train, capsys):
    train("--validation 10")
    assert "54 training and 10 valid images" in shown(capsys, "data")


@pytest.mark.parametrize("validation", ["1", "63"])
def test_classes_are_those_of_all_training_images(train, validation):
    assert checkpoint(train("--validation", validation))["args"]["num_classes"] == 10


def test_validation_is_logged_as_such(train):
    entry = log(train("--validation 10"))[0]
    assert [name for name in entry if name.endswith("_wrong")] == ["train_wrong", "valid_wrong"]


def test_output_dir_is_the_run_folder(train, tmp_path):
    train("--output-dir", tmp_path / "deep" / "folder")
    assert files_in(tmp_path / "deep" / "folder").keys() == {"args.json", "last.pt", "log.jsonl"}


@pytest.mark.parametrize(
    "flags",
    [
        "--dataset KMNIST",
        "--routing_iterations 1",
        "--with_reconstruction",
        "--seed 2",
        "--validation 10",
    ],
)
def test_output_dir_is_by_default_named_after_the_run(small, fashion, tmp_path, monkeypatch, flags):
    for name in ("FashionMNIST", "KMNIST"):
        shutil.copytree(fashion / "FashionMNIST", tmp_path / "data" / name)
    monkeypatch.chdir(tmp_path)
    run = "--dataset FashionMNIST --epochs 1"
    assert main(run) == main(run, flags) == 0
    assert len(list(Path("runs").glob("*/last.pt"))) == 2


def test_predict_prints_the_longest_class_and_every_length(trained, tmp_path, capsys):
    file = tmp_path / "a square.png"
    Image.linear_gradient("L").save(file)
    assert main("--evaluate", trained, "--predict", file) == 0
    model, _ = net.load_checkpoint(trained)
    lengths = model(net.read_image(file, 1, 28)).lengths[0].tolist()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{file}: {lengths.index(max(lengths))}"
    printed = re.findall(r"(\d):(\d\.\d\d)", lines[-1])
    assert printed == [(str(label), f"{length:.2f}") for label, length in enumerate(lengths)]


def test_predict_drops_no_unit_of_the_baseline(train, small_baseline, tmp_path, capsys):
    folder, file, said = train("--model baseline"), tmp_path / "gradient.png", set()
    Image.linear_gradient("L").save(file)
    for _ in range(3):
        capsys.readouterr()
        assert main("--evaluate", folder, "--predict", file) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1


def test_precision_changes_the_result(train):
    one, other = (train("--precision", name, name=name) for name in ("fp32", "bf16"))
    assert log(one)[0]["train_loss"] != log(other)[0]["train_loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_leaves_the_weights_in_fp32(train, precision):
    weights = checkpoint(train("--precision", precision))["model"].values()
    assert {weight.dtype for weight in weights} == {torch.float32}


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_bf16_where_the_hardware_has_it(train, monkeypatch, native, expected):
    monkeypatch.setattr(net, "has_bf16", lambda device: native)
    assert checkpoint(train("--precision auto"))["args"]["precision"] == expected


@pytest.mark.parametrize("feature", ["amx_bf16", "avx512_bf16", "avx2"])
def test_cpu_has_bf16_if_it_has_one_of_two_features(monkeypatch, feature):
    features = {"amx_bf16": False, "avx512_bf16": False, feature: True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert net.has_bf16(torch.device("cpu")) == (feature != "avx2")


@pytest.mark.parametrize("native", [True, False])
def test_gpu_that_only_emulates_bf16_has_none(monkeypatch, native):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert net.has_bf16(torch.device("cuda")) == native


def test_precision_fp32_means_no_tf32_and_convolutions_that_repeat(train, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    torch.set_float32_matmul_precision("high")
    train()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def pretend_compiler(monkeypatch):
    """Every program is there but git, which would be called."""
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "git" else name)


@pytest.mark.parametrize(("flags", "part"), [("", "DigitCaps"), ("--model baseline", "Objective")])
def test_compile_compiles_the_part_that_gains_on_a_cpu(train, monkeypatch, flags, part):
    seen = []
    pretend_compiler(monkeypatch)
    monkeypatch.setattr(nn.Module, "compile", lambda *args, **options: seen.append((args, options)))
    train("--compile", flags)
    (((module,), options),) = seen
    assert type(module).__name__ == part
    assert options["options"].keys() <= set(torch._inductor.list_options())


def test_compile_without_a_compiler_is_refused_in_one_line(train, monkeypatch, capsys):
    asked = []
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr(shutil, "which", asked.append)  # it finds nothing
    train("--compile", status=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "C++ compiler" in line and "my-c++" in asked


def test_compiled_training_learns_what_eager_training_learns(train, monkeypatch):
    compile = nn.Module.compile

    def trace(module, dynamic, options):
        """Trace and differentiate as for Inductor, whose C++ would take a minute to compile."""
        compile(module, dynamic=dynamic, backend="aot_eager_decomp_partition")

    pretend_compiler(monkeypatch)
    monkeypatch.setattr(nn.Module, "compile", trace)
    flags = "--batch-size 24 --with_reconstruction"  # 64 images: the last batch is of 16
    (eager,) = log(train(flags, name="eager"))
    (traced,) = log(train(flags, "--compile", name="compiled"))
    for key in ("train_loss", "train_wrong", "test_loss", "test_wrong"):
        assert traced[key] == pytest.approx(eager[key], rel=1e-5)


# ---- Resume and evaluate ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "last.pt"])
def test_resume_takes_a_run_folder_or_its_checkpoint(trained, fashion, name):
    assert main("--resume", trained / name, "--data-dir", fashion, "--epochs 2") == 0
    assert log(trained)[-1]["epoch"] == 2


CONTRADICTIONS = [
    "--batch-size 8",
    "--lr 0.1",
    "--lr-decay 0.1",
    "--warm-up 5",
    "--seed 2",
    "--dataset KMNIST",
    "--validation 10",
    "--model baseline",
    "--with_reconstruction",
    "--reconstruction-weight 0.1",
    "--precision bf16",
]


def refused(capsys, *parts):
    """What argparse says of a wrong command line."""
    with pytest.raises(SystemExit) as error:
        net.parse_args(argv(*parts))
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].replace("_", "-")


def name_of(flags):
    """How an error names the first of some flags."""
    return flags.split()[0].strip("-").replace("_", "-")


@pytest.mark.parametrize("flags", [*CONTRADICTIONS, "--routing_iterations 1"])
def test_resume_refuses_to_contradict_the_checkpoint(trained, capsys, flags):
    assert name_of(flags) in refused(capsys, "--resume", trained, flags)


@pytest.mark.parametrize("flags", [*CONTRADICTIONS, "--epochs 2"])
def test_evaluate_refuses_to_contradict_the_checkpoint(trained, capsys, flags):
    assert name_of(flags) in refused(capsys, "--evaluate", trained, flags)


@pytest.mark.parametrize("flags", [f for f in CONTRADICTIONS if "--lr-decay" not in f])
def test_more_epochs_let_nothing_else_contradict_the_checkpoint(trained, capsys, flags):
    assert name_of(flags) in refused(capsys, "--resume", trained, "--epochs 2", flags)


def test_resume_takes_the_flags_of_the_run(train):
    folder = train("--lr 0.01 --routing_iterations 2")
    args, _, _ = net.parse_args(argv("--resume", folder))
    assert (args.lr, args.routing_iterations) == (0.01, 2)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_precision_auto_is_that_of_the_run(train, flag):
    args, _, _ = net.parse_args(argv(flag, train("--precision bf16"), "--precision auto"))
    assert args.precision == "bf16"


def test_resume_may_change_place_test_batch_and_reports(trained, fashion, tmp_path):
    shutil.copytree(fashion, tmp_path / "moved")
    free = "--test-batch-size 7 --log-interval 1 --test-interval 2"
    free = (free, "--data-dir", tmp_path / "moved")
    assert main("--resume", trained, *free) == 0


@pytest.mark.parametrize("flags", ["--epochs 3", "--lr-decay 0.1"])
def test_resume_may_change_the_schedule_only_when_the_run_is_complete(trained, capsys, flags):
    torch.save({**checkpoint(trained), "epoch": 0}, trained / "last.pt")
    assert name_of(flags) in refused(capsys, "--resume", trained, flags)


def test_resume_may_change_the_device(trained):  # it was trained with --no-cuda
    args, _, _ = net.parse_args(argv("--resume", trained))
    assert not args.no_cuda


def test_resume_cannot_shorten_a_complete_run(train, capsys):
    assert "epochs" in refused(capsys, "--resume", train("--epochs 2"), "--epochs 1")


def test_resume_with_more_epochs_may_change_the_decay(train, fashion):
    folder = train("--lr-decay 0.01")
    more = "--epochs 2 --lr-decay 0.0001"
    assert main("--resume", folder, "--data-dir", fashion, more) == 0
    expected = [0.001 * 0.01 ** (3 / 4), 0.001 * 0.0001 ** (7 / 8)]
    assert [entry["lr"] for entry in log(folder)] == pytest.approx(expected)


def test_resume_with_more_epochs_stretches_the_schedule_of_a_complete_run(train, fashion):
    folder = train("--lr-decay 0.01")
    assert main("--resume", folder, "--data-dir", fashion, "--epochs 3") == 0
    last_steps = [(1, 3 / 4), (2, 7 / 12), (3, 11 / 12)]  # 4 steps an epoch
    expected = [(epoch, 0.001 * 0.01**done) for epoch, done in last_steps]
    assert [(entry["epoch"], pytest.approx(entry["lr"])) for entry in log(folder)] == expected


def test_resume_of_a_complete_run_trains_no_more(trained, fashion):
    before = (trained / "last.pt").read_bytes()
    assert main("--resume", trained, "--data-dir", fashion) == 0
    assert (trained / "last.pt").read_bytes() == before


@pytest.mark.parametrize(("flags", "name"), [("", "test"), ("--validation 10", "valid")])
def test_evaluate_prints_the_wrong_count_of_the_last_epoch(train, fashion, capsys, flags, name):
    folder = train("--epochs 8 --lr 0.01 --lr-decay 0.005", flags)
    wrong = log(folder)[-1][f"{name}_wrong"]
    assert 0 < wrong < 36
    capsys.readouterr()
    assert main("--evaluate", folder, "--data-dir", fashion) == 0
    assert f"({wrong} wrong)" in shown(capsys, "result")


def test_evaluate_shows_the_images_it_tests_on(trained, fashion, capsys):
    assert main("--evaluate", trained, "--data-dir", fashion) == 0
    assert shown(capsys, "data") == "FashionMNIST: 40 test images of 1 x 28 x 28"


def test_resume_shows_where_it_goes_on(trained, fashion, capsys):
    assert main("--resume", trained, "--data-dir", fashion, "--epochs 2") == 0
    assert shown(capsys, "run") == f"{trained}, from epoch 2, step 4"


def test_evaluate_changes_nothing_in_the_run_folder(trained, fashion):
    before = files_in(trained)
    assert main("--evaluate", trained, "--data-dir", fashion) == 0
    assert files_in(trained) == before


def test_evaluate_may_change_the_routing_iterations(trained, fashion, spy):
    used = spy(net, "routing", lambda _, u, weight, iterations: iterations)
    assert main("--evaluate", trained, "--data-dir", fashion, "--routing_iterations 1") == 0
    assert set(used) == {1}


# ---- Refused ---------------------------------------------------------------------------------

COUNTS = ("--batch-size", "--test-batch-size", "--epochs", "--routing_iterations")
COUNTS += ("--log-interval", "--test-interval", "--warm-up")
BAD_VALUES = [
    *[f"{flag} {value}" for flag in COUNTS for value in ("0", "-1", "1.5", "nan", "inf", "many")],
    *[f"{flag} {value}" for flag in ("--seed", "--validation") for value in ("-1", "1.5", "nan")],
    *[f"{flag} {v}" for flag in ("--lr", "--lr-decay") for v in ("0", "-1", "nan", "inf", "much")],
    *[f"--reconstruction-weight {value}" for value in ("-1", "nan", "inf")],
    "--lr 1e39",  # no float32
    "--lr-decay 1.5",
    f"--seed {'9' * 30}",
    "--dataset ImageNet",
    "--model transformer",
    "--precision fp64",
    "--predict digit.png",
    "--evaluate",
]
BAD_COMBINATIONS = [
    "--resume a --output-dir b",
    "--resume a --evaluate b",
    "--model baseline --with_reconstruction",
    "--evaluate a --compile",
    "--learning-rate 0.1",
]


@pytest.mark.parametrize("flags", BAD_VALUES)
def test_bad_value_is_refused_by_the_name_of_its_flag(capsys, flags):
    assert name_of(flags) in refused(capsys, flags)


@pytest.mark.parametrize("flags", BAD_COMBINATIONS)
def test_bad_combination_is_refused(capsys, flags):
    assert refused(capsys, flags)


@pytest.mark.parametrize(
    "flags", ["--seed 0", "--validation 0", "--reconstruction-weight 0", "--lr-decay 1"]
)
def test_value_at_the_border_is_allowed(flags):
    net.build_parser().parse_args(argv(flags))


@pytest.fixture
def said(capsys):
    """Call it to have the only line on stderr, which ends a failed command."""

    def said(*args):
        assert main(*args) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return said


def test_missing_data_are_said_in_one_line(offline, said, tmp_path):
    line = said("--data-dir", tmp_path, "--output-dir", tmp_path / "run")
    assert "cannot load MNIST" in line and "no network" in line


def test_validation_of_all_images_is_said_in_one_line(said, fashion, tmp_path):
    run = ("--dataset FashionMNIST --data-dir", fashion, "--output-dir", tmp_path)
    assert "--validation 64" in said(*run, "--validation 64")


MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


def fail_with(error):
    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize("error", MEMORY, ids=repr)
def test_out_of_memory_names_the_batch_size(train, capsys, monkeypatch, error):
    monkeypatch.setattr(net, "train_step", fail_with(error))
    train("--batch-size 32", status=1)
    assert "--batch-size 32: lower it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution"),
    ],
    ids=repr,
)
def test_gpu_that_cannot_be_used_is_said_in_one_line(said, fashion, tmp_path, monkeypatch, error):
    monkeypatch.setattr(net, "fit_to_data", fail_with(error))
    line = said("--dataset FashionMNIST --data-dir", fashion, "--output-dir", tmp_path)
    assert str(error) in line


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "a .grad tensor is allocated during CUDAGraph capture",
    ],
)
def test_other_error_is_not_called_out_of_memory(train, monkeypatch, text):
    monkeypatch.setattr(net, "train_step", fail_with(RuntimeError(text)))
    with pytest.raises(RuntimeError, match=text):
        train()


@pytest.mark.parametrize(
    ("flag", "function"), [("--batch-size 1", "train_step"), ("--test-batch-size 1", "evaluate")]
)
def test_out_of_memory_with_one_image_gives_no_advice(train, capsys, monkeypatch, flag, function):
    monkeypatch.setattr(net, function, fail_with(MemoryError()))
    train(flag, status=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{flag}: " in line and "lower" not in line


def test_out_of_memory_in_evaluate_names_the_test_batch_size(trained, fashion, said, monkeypatch):
    monkeypatch.setattr(net, "evaluate", fail_with(MemoryError()))
    flags = ("--data-dir", fashion, "--test-batch-size 40")
    assert "--test-batch-size 40: lower it" in said("--evaluate", trained, *flags)


@pytest.fixture
def own_data(tmp_path):
    """Call it to make a data folder of images of this size and of so many classes."""

    def own_data(size, classes):
        folder = write_fashion(tmp_path / "own")
        for prefix, count in (("train", 64), ("t10k", 40)):
            raw = folder / "FashionMNIST" / "raw"
            write_idx(raw / f"{prefix}-images-idx3-ubyte", torch.zeros(count, *size).byte())
            write_idx(raw / f"{prefix}-labels-idx1-ubyte", (torch.arange(count) % classes).byte())
        return folder

    return own_data


@pytest.mark.parametrize(("size", "words"), [((16, 16), "too small"), ((28, 20), "square")])
def test_images_that_cannot_be_used_are_said_in_one_line(said, own_data, tmp_path, size, words):
    run = ("--dataset FashionMNIST --output-dir", tmp_path / "run")
    assert words in said(*run, "--data-dir", own_data(size, 10))


@pytest.mark.parametrize(("size", "classes"), [((32, 32), 10), ((28, 28), 11)], ids=str)
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_data_that_do_not_fit_the_checkpoint_are_refused(
    trained, said, own_data, flag, size, classes
):
    line = said(flag, trained, "--data-dir", own_data(size, classes))
    assert "1 x 28 x 28 and 10 classes" in line


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_command_to_resume_compiles_again(flag):
    args = net.build_parser().parse_args(["--compile"])
    assert ("--compile" in net.command(args, flag, "run")) == (flag == "--resume")


def test_compile_can_be_dropped_on_resume(trained):
    saved = checkpoint(trained)
    saved["args"]["compile"] = True
    torch.save(saved, trained / "last.pt")
    args, _, _ = net.parse_args(argv("--resume", trained))
    assert not args.compile


def test_local_rank_without_torchrun_is_left_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = net.build_parser().parse_args(argv("--precision fp32"))
    assert net.set_up(args) == torch.device("cuda:0")


@pytest.fixture
def two_gpus(monkeypatch):
    """Call it with LOCAL_RANK and flags to set up a process of torchrun where there are two GPUs.

    It returns the device, what CUDA is told it is, and how the processes reach each other.
    """
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(net.dist, "init_process_group", told.append)
    monkeypatch.setenv("MASTER_ADDR", "localhost")

    def set_up(local_rank, *flags):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        return [net.set_up(net.build_parser().parse_args(["--precision", "fp32", *flags])), *told]

    return set_up


def test_each_process_of_torchrun_takes_its_own_gpu(two_gpus):
    both = "cpu:gloo,cuda:nccl"  # what stops a run is agreed on by the CPUs
    assert two_gpus(1) == [torch.device("cuda:1"), torch.device("cuda:1"), both]


def test_processes_on_the_cpu_need_no_gpu_to_reach_each_other(two_gpus):
    assert two_gpus(1, "--no-cuda") == [torch.device("cpu"), "gloo"]


def test_more_processes_than_gpus_are_refused(two_gpus):
    with pytest.raises(net.Failure, match="more processes than GPUs"):
        two_gpus(2)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_empty_name_of_a_checkpoint_is_refused(said, fashion, flag):
    assert "no checkpoint" in said(f"{flag} ''", "--data-dir", fashion)


def test_name_with_blanks_is_shown_as_it_is(trained, said, tmp_path):
    name = tmp_path / "two  blanks.png"
    assert str(name) in said("--evaluate", trained, "--predict", name)


# ---- Output ----------------------------------------------------------------------------------


def test_first_lines_tell_what_runs(train, capsys):
    train()
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert words[:7] == ["device", "precision", "torch", "data", "model", "training", "run"]


def test_first_lines_have_precision_and_size(train, capsys):
    weights = checkpoint(train("--precision bf16"))["model"].values()
    said, count = capsys.readouterr().out, sum(weight.numel() for weight in weights)
    assert "precision  bf16 in training, fp32 in testing\n" in said
    assert f"model      capsnet, r = 3: {count:,} parameters\n" in said


def test_line_of_an_epoch_has_its_numbers():
    entry = {"epoch": 3, "train_loss": 0.5, "test_loss": 0.25, "seconds": 100}
    entry |= {"test_error": 1.5, "test_wrong": 3}
    said = "epoch 3/5  loss 0.5000, test loss 0.2500  1.50% test error (3 wrong)  100.0 s"
    assert net.epoch_line(entry, 5, "test") == f"{said}, 03:20 to train"
    assert net.epoch_line(entry, 3, "test") == said.replace("3/5", "3/3")


def test_report_after_the_last_step_has_the_loss_of_the_log(train, capsys):
    (entry,) = log(train("--with_reconstruction --log-interval 4"))
    said = f"epoch 1/1  loss {entry['train_loss']:.4f}  64/64 images"
    assert said in capsys.readouterr().out


def test_resumed_run_is_called_complete_only_if_it_is(trained, fashion, capsys):
    for flags, complete in (("", True), ("--epochs 2", False)):
        assert main("--resume", trained, "--data-dir", fashion, flags) == 0
        assert ("this run is complete" in capsys.readouterr().out) == complete


def test_command_that_tests_the_result_is_shown(train, capsys):
    train()
    command = shown(capsys, "test it").removeprefix("python net.py ")
    assert main(command) == 0


def test_command_that_uses_the_result_is_shown(train, capsys):
    train()
    command = shown(capsys, "use it").removeprefix("python net.py ")
    assert main(command.replace("IMAGE", str(REPOSITORY / "tests" / "five.jpg"))) == 0


def test_output_names_the_checkpoint(train, capsys):
    assert str(train() / "last.pt") == shown(capsys, "saved to")


def one_wrong_of_ten_thousand(*args):
    return torch.tensor([0, 0, 0, 1, 10_000], dtype=torch.float64)


def test_one_wrong_of_10000_is_shown_as_an_error_of_a_hundredth(
    train, fashion, monkeypatch, capsys
):
    monkeypatch.setattr(net, "evaluate", one_wrong_of_ten_thousand)
    assert main("--evaluate", train(), "--data-dir", fashion) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if "wrong)" in line]  # epoch, result, evaluation
    assert len(lines) == 3 and all(re.search(r" 0\.01%.* \(1 wrong\)", line) for line in lines)
    assert not re.search(r"\b100(\.0*)? ?%", said)


def result(capsys, **changes):
    """What is printed at the end of a run with these arguments."""
    defaults = vars(net.build_parser().parse_args([]))
    args = argparse.Namespace(**{**defaults, **changes})
    entry = {"epoch": 3, "test_error": 0.25, "test_wrong": 25}
    entry |= {"valid_error": 0.25, "valid_wrong": 25}
    run = argparse.Namespace(args=args, history=[entry], folder=Path("runs", "x"))
    net.print_result(run)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("dataset", "variable"), [("MNIST", "CAPSNET_CHECKPOINT"), ("MultiMNIST", "CAPSNET_MULTIMNIST")]
)
def test_notebook_is_named_for_a_run_with_a_decoder(capsys, dataset, variable):
    said = result(capsys, dataset=dataset, with_reconstruction=True)
    assert f"with {variable} set to it" in said
    assert "ipynb" in said and "ipynb" not in result(capsys, dataset=dataset)


TABLE_1 = [
    ({"model": "baseline"}, "0.39"),
    ({"routing_iterations": 1}, "0.34 +- 0.032"),
    ({"routing_iterations": 1, "with_reconstruction": True}, "0.29 +- 0.011"),
    ({}, "0.35 +- 0.036"),
    ({"with_reconstruction": True}, "0.25 +- 0.005"),
    ({"dataset": "MultiMNIST", "model": "baseline"}, "8.1"),
    ({"dataset": "MultiMNIST", "routing_iterations": 1, "with_reconstruction": True}, "7.5"),
    ({"dataset": "MultiMNIST", "with_reconstruction": True}, "5.2"),
]


@pytest.mark.parametrize(("changes", "number"), TABLE_1, ids=str)
def test_result_stands_beside_its_row_of_table_1(capsys, changes, number):
    assert f"paper      {number}%" in result(capsys, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": "KMNIST"},
        {"routing_iterations": 2},
        {"dataset": "MultiMNIST"},
        {"validation": 9},
    ],
    ids=str,
)
def test_result_that_is_not_in_table_1_stands_alone(capsys, changes):
    assert "Table 1" not in result(capsys, **changes)


@pytest.mark.parametrize(("changes", "_"), TABLE_1, ids=str)
def test_headline_alone_stands_beside_the_earlier_implementation(capsys, changes, _):
    is_headline = changes == {"with_reconstruction": True}
    assert ("99.65%" in result(capsys, **changes)) == is_headline


@pytest.mark.parametrize(("data_dir", "no_cuda"), [("data", False), ("my data", True)])
def test_printed_command_keeps_the_data_folder_and_the_device(data_dir, no_cuda):
    args = argparse.Namespace(data_dir=data_dir, no_cuda=no_cuda, compile=False)
    printed = shlex.split(net.command(args, "--resume", Path("my run")))
    assert printed[:3] == ["python", "net.py", "--resume"]
    parsed = net.build_parser().parse_args(printed[2:])
    assert (parsed.resume, parsed.data_dir, parsed.no_cuda) == (Path("my run"), data_dir, no_cuda)


def test_printed_command_suits_the_shell_of_windows(monkeypatch):
    monkeypatch.setattr(net.os, "sep", "\\")
    args = argparse.Namespace(data_dir=r"all my\data", no_cuda=False, compile=False)
    printed = net.command(args, "--resume", PureWindowsPath(r"runs\x"))
    assert printed == 'python net.py --resume runs/x --data-dir "all my/data"'


def test_printed_command_calls_the_script_as_it_was_called(monkeypatch):
    monkeypatch.setattr("sys.argv", ["../capsnet/net.py", "--epochs", "1"])
    args = argparse.Namespace(data_dir="data", no_cuda=False, compile=False)
    assert net.command(args, "--resume", "x") == "python ../capsnet/net.py --resume x"


def test_printed_command_in_a_notebook_names_the_script(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    args = argparse.Namespace(data_dir="data", no_cuda=False, compile=False)
    assert net.command(args, "--resume", "x") == "python net.py --resume x"


def test_run_without_any_output_stream_trains(train, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it if the streams are closed
    monkeypatch.setattr(sys, "stderr", None)
    assert checkpoint(train())["epoch"] == 1


def test_name_that_the_output_cannot_show_is_escaped_and_the_next_image_read(tmp_path):
    shutil.copy(REPOSITORY / "tests" / "five.jpg", tmp_path / "ü.jpg")
    command = [sys.executable, "net.py", "--no-cuda", "--evaluate", "results/pretrained.pt"]
    command += ["--predict", tmp_path / "ü.jpg", "tests/five.jpg"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    child = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert re.findall(r"(\S+): 5$", child.stdout, re.M) == [
        str(tmp_path / r"\xfc.jpg"),
        "tests/five.jpg",
    ]
    assert (child.returncode, child.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_output_that_takes_nothing_is_named_in_one_line():
    command = [sys.executable, "net.py", "--no-cuda", "--evaluate", "results/pretrained.pt"]
    command += ["--predict", "tests/five.jpg"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        options = {"cwd": REPOSITORY, "env": environment, "stderr": subprocess.PIPE, "text": True}
        child = subprocess.run(command, stdout=full, **options)
    assert (child.returncode, child.stderr.count("\n")) == (1, 1)
    assert os.strerror(errno.ENOSPC) in child.stderr


def test_script_exits_with_the_status_of_main(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(sys, "argv", ["net.py", "--evaluate", "missing.pt"])
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to have it back
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPOSITORY / "net.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 1


# ---- Commands in the texts -------------------------------------------------------------------


def commands(text):
    """The arguments of every command in a text that starts net.py."""
    found = re.findall(r"\b(?:python|torchrun\b[^\n`]*) net\.py((?: [^\s`]+)*)", text)
    return [shlex.split(arguments) for arguments in found]


def test_every_command_in_the_readme_parses():
    for arguments in commands(README.replace("\\\n", "")):
        net.build_parser().parse_args(arguments)


def test_every_command_in_the_docstring_parses():
    for arguments in commands(net.__doc__):
        net.build_parser().parse_args(arguments)


def test_commands_are_found_in_a_text():
    text = "`python net.py --lr 1` or\n    torchrun --x 2 net.py --seed 3   # three\n"
    assert commands(text) == [["--lr", "1"], ["--seed", "3"]]
