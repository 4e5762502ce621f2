"""Any wrong input gives one line, exit code 2, and writes nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import dseqjepa as dj
from dseqjepa import ending
from dseqjepa.arguments import as_options
from dseqjepa.cli import TASK_HELP, app, main
from dseqjepa.errors import Stopped
from dseqjepa.presets import load_config
from dseqjepa.tasks.config import TASKS, KnnConfig
from dseqjepa.train.loop import Trainer
from tests.test_docs import commands as documented_commands
from tests.tiny import TINY

PRESET = "dseq_vitt8_64"
SMALL = [*TINY, "optim.epochs=1", "optim.warmup_epochs=0"]
IMAGES = 12

Refuse = Callable[..., str]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of a command, in this process."""
    monkeypatch.setattr("sys.argv", ["dseqjepa", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    """All that lies below a folder; folders and links too."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def pictures(folder: Path, count: int = IMAGES) -> Path:
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (36, 40, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures with a finished run on them."""
    here = tmp_path_factory.mktemp("cli")
    pictures(here / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert run(patch, "pretrain", PRESET, "data=pictures", "out=run", *SMALL) == 0
    return here


@pytest.fixture
def here(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test: a copy of `original` and things that are not in order."""
    here = tmp_path / "here"
    shutil.copytree(original, here, symlinks=True)
    monkeypatch.chdir(here)
    (here / "file").write_text("a file")
    (here / "empty").mkdir()
    (here / "texts").mkdir()
    (here / "texts/a.txt").write_text("no image")
    (here / "broken").mkdir()
    for index in range(IMAGES):
        (here / f"broken/{index}.png").write_bytes(b"no picture at all")
    (here / "full").mkdir()
    (here / "full/mine.txt").write_text("keep me")
    (here / "nowhere").symlink_to(here / "gone")
    damaged = here / "damaged"
    shutil.copytree(here / "run", damaged, symlinks=True)
    weights = damaged / "checkpoints/last/target.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for name, text in {
        "list.yaml": "- model\n- data\n",
        "word.yaml": "vit_tiny\n",
        "broken.yaml": "model: {name: vit_tiny\n",
        "tagged.yaml": "model: !!python/object/apply:os.system ['touch executed']\n",
        "bare.yaml": "optim: {lr: 0.1}\n",
        "typo.yaml": "modle: {name: vit_tiny}\nmodel: {name: vit_tiny}\nmethod: {name: dseq}\n",
        "number.yaml": "3: 4\nmodel: {name: vit_tiny}\nmethod: {name: dseq}\n",
    }.items():
        (here / name).write_text(text)
    (here / "bytes.yaml").write_bytes(b"\xff\xfe\x00model")
    (here / "folder.yaml").mkdir()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    return here


@pytest.fixture
def refuse(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Run a command that has to be refused, and give back the one line that it says."""

    def refuse(*arguments: str, code: int = 2) -> str:
        before = contents(here)
        assert run(monkeypatch, *arguments) == code
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith("dseqjepa: ")
        assert contents(here) == before
        return line

    return refuse


# What is refused

SETTINGS = {
    "data.wokers=2": "unknown key 'data.wokers'; did you mean 'data.workers'?",
    "dat.size=2": "unknown key 'dat'; did you mean 'data'?",
    "data.workers=two": "data.workers must be a whole number, found 'two'",
    "data.workers=-1": "data.workers must be greater than or equal to 0",
    "data.flip=3": "data.flip must be true or false",
    "optim.lr=0": "optim.lr must be greater than 0",
    "optim.epochs=0": "epochs must be at least 1",
    "optim.warmup_epochs=2": "warmup_epochs (2.0) must not exceed epochs (1)",
    "ema.start=1.1": "ema.start must be less than or equal to 1",
    "runtime.seed=-1": "runtime.seed must be greater than or equal to 0",
    "runtime.precision=fp64": "runtime.precision must be 'auto', 'fp32' or 'bf16'",
    "model.name=vit_giant": "model.name must be 'vit_nano', ",
    "method.saliency.kind=cls_attention model.class_token=false": "or keep the token",
    "method.name=mae": "method.name must be 'dseq' or 'ijepa' or 'cjepa'",
    "method.context_lag=1 method.prediction=flat": "context_lag needs prediction=sequential",
    "method.name=ijepa method.saliency.kind=grad_cam": "unknown key 'method.saliency'",
    "method.saliency.kind\nx=1": "unknown key 'method.saliency.kind\\nx'",
    "optim.accumulate=3": "must be a multiple of optim.accumulate",
    "optim.accumulate=4 data.batch_size=4 method.regularizer=sigreg": "make data.batch_size (4) a",
    "data.image_size=36": "must be a multiple of model.patch_size (8)",
    "data.image_size=8": "is a single patch",
    "data.batch_size=64": "pictures has 12 images, fewer than data.batch_size=64: lower it to 12",
    "data.workers": "expected key=value, found 'data.workers'",
    "pictures": "expected key=value, found 'pictures'; did you mean data=pictures?",
    "epochs=3": "unknown key 'epochs'; did you mean optim.epochs?",
    "lr=0.1": "unknown key 'lr'; did you mean optim.lr?",
    "batch_size=4": "unknown key 'batch_size'; did you mean data.batch_size?",
    "every_steps=4": "did you mean checkpoint.every_steps or log.every_steps?",
    "optim.min_area=1": "did you mean method.regions.min_area?",
    "--batch-size 4": "unknown key 'batch_size'; did you mean data.batch_size?",
    "--data.batch_size=64": "fewer than data.batch_size=64: lower it to 12",
    "--data.batch_size 64 --data.workers": "data: workers must not be True",
    "data.workers=100000": "data.workers must be less than or equal to 256, found 100000",
    "model.width=1e9": "model.width must be less than or equal to 65536",
    "predictor.depth=1e6": "predictor.depth must be less than or equal to 1000",
    "model.width=16384 model.depth=900": "available: lower model.width, model.depth or model.mlp",
    "predictor.width=16384 predictor.depth=900": "lower predictor.width or predictor.depth",
    "method.regularizer=vicreg method.regularizer_over=pooled method.vicreg.projector_width=1e6": (
        "lower method.vicreg.projector_width"
    ),
    "runtime.timeout_s=1e300": "runtime.timeout_s must be less than or equal to 1000000",
    "=2": "expected section.key=value, found '=2'",
    "data.workers=[": "cannot read the value '['",
    "data.workers=!!python/object/apply:os.system ['touch executed']": "cannot read the value",
    "runtime.accelerator=cuda": "torch finds no such device; use auto or cpu",
    "runtime.accelerator=mps": "torch finds no such device; use auto or cpu",
    "resume=maybe": "resume must be true or false or auto, or a step, found 'maybe'",
    "resume=[": "resume must be true or false or auto, or a step, found '['",
    "resume=auto overwrite=true": "leave out overwrite",
    "resume=true overwrite=true": "leave out overwrite and init_from",
    "resume=true init_from=run": "leave out overwrite and init_from",
    "resume=true": "new does not exist",
    "allow_changed=data": "allow_changed is for a run that is resumed: add resume=true",
    "out=other": "out is given twice: 'new' and 'other'",
    "init_from=": "init_from= is empty",
    "init_from=nothing": "nothing does not exist: expected a run's folder",
    "init_from=pictures": "pictures holds no checkpoint",
    "init_from=damaged": "target.safetensors is damaged",
    "init_from=run model.width=16": "run/config.yaml as the preset, which has its settings",
    "init_from=run data.image_size=48": "different encoder: data.image_size (32, 32) there, (48, ",
}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "CUDA out of"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB). Tried"), "MPS backend out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "[enforce fail]"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 11.2 TiB for an array. x"), "Unable to allocate 11.2 TiB"),
    ],
)
def test_a_machine_without_memory_is_one_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        ending.run(full, [])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dseqjepa: {said}")
    assert "compute less at a time" in line


def test_any_other_error_of_a_library_is_not_hidden() -> None:
    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        ending.run(wrong, [])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.name=ijepa"], "the demo compares with the regularizer alone"),
        (["method.regularizer=none"], "the demo compares with the regularizer alone"),
        (["data.source=pictures"], "the demo trains on rendered scenes"),
    ],
)
def test_what_the_demo_cannot_show_is_refused(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    said: str,
) -> None:
    assert run(monkeypatch, "demo", "--out", "new", *settings) == 2
    assert said in capsys.readouterr().err
    assert not (here / "new").exists()


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_wrong_setting_is_refused(refuse: Refuse, settings: str) -> None:
    typed = [settings] if "!!" in settings else settings.split(" ")
    line = refuse("pretrain", PRESET, "data=pictures", "out=new", *SMALL, *typed)
    assert SETTINGS[settings] in line


DATA = {
    "picture": "no such folder: picture; did you mean 'pictures'?",
    "file": "expected a folder, found a file: file",
    "empty": "no images found in empty: saw 0 files",
    "texts": "no images found in texts: saw 1 files",
    "broken": "broken: none of 12 images tried can be decoded (broken/0.png: not a known image",
    "": "data= is empty: expected a folder, scenes, scenes:fine or name:path",
    "mnist:pictures": "found the unknown format 'mnist'; did you mean 'fashion-mnist'?",
    "fashion-mnist:pictures": "expected train-images-idx3-ubyte",
    "fashion-mnist:gone": "no such folder: gone",
    "2023": "no such folder: 2023; folders there: ",
    "gone\nthere": "no such folder: gone there",
}


@pytest.mark.parametrize("data", DATA)
def test_data_that_cannot_be_read_is_refused(refuse: Refuse, data: str) -> None:
    assert DATA[data] in refuse("pretrain", PRESET, f"data={data}", "out=new", *SMALL)


def test_scenes_that_are_not_square_are_refused(refuse: Refuse) -> None:
    wide = refuse("pretrain", PRESET, "data=scenes", "out=new", *SMALL, "data.image_size=[32,64]")
    assert "scenes are square" in wide


OUT = {
    "out=": "out= is empty: give a value",
    "out=file": "out=file is a file: give a folder",
    "out=nowhere": "out=nowhere is a file: give a folder",
    "out=file/sub": "out=file/sub cannot be used: Not a directory; give another",
    "out=/proc/new": "out=/proc/new cannot be used: No such file or directory; give another",
    f"out={'x' * 300}": "cannot be used: File name too long; give another",
    "out=run": "out=run is not empty: give another folder, resume=true",
    "out=full": "out=full is not empty",
    "out=full overwrite=true": "it contains 'mine.txt', which is not part of a run",
    "out=run overwrite=true init_from=run": "which init_from names",
    "out=full resume=auto": "full is not empty: give another folder, it contains 'mine.txt', which",
    "out=damaged resume=auto": "target.safetensors is damaged",
    "out=empty resume=true": "empty holds no checkpoint",
    "out=pictures resume=true": "pictures holds no checkpoint",
    "out=file resume=true": "file holds no checkpoint",
    "out=damaged resume=true": "target.safetensors is damaged",
    "out=run resume=true optim.lr=0.5": "another config (optim.lr was 0.001, is 0.5)",
    "out=run resume=true runtime.seed=3": "another config (runtime.seed was 0, is 3)",
    "": "out=DIR is missing",
}


@pytest.mark.parametrize("settings", OUT)
def test_a_folder_that_cannot_take_the_run_is_refused(refuse: Refuse, settings: str) -> None:
    typed = settings.split(" ") if settings else []
    assert OUT[settings] in refuse("pretrain", PRESET, "data=pictures", *SMALL, *typed)


def test_a_run_is_not_resumed_with_other_images(refuse: Refuse, here: Path) -> None:
    (here / "pictures/a/0.png").rename(here / "pictures/a/00.png")
    line = refuse("pretrain", PRESET, "data=pictures", "out=run", "resume=true", *SMALL)
    assert "the images of pictures are not those of the checkpoint" in line


def test_a_folder_without_the_right_to_write_is_refused(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", denied)
    line = refuse("pretrain", PRESET, "data=pictures", "out=empty", *SMALL)
    assert "out=empty cannot be written to: Permission denied; give another" in line


@pytest.mark.parametrize(
    "command",
    [
        "evaluate knn pixels data=pictures image_size=32 out=/proc/new/knn.json",
        "export run --to torch --out /proc/new",
        "embed run pictures out=/proc/new.npy",
        "show run pictures --out /proc/new",
        "report run --out /proc/new.html",
        "scenes export imagenet /proc/new",
        "demo --out /proc/new",
        "shards pack pictures /proc/new",
        f"preflight {PRESET} data=pictures --json /proc/new.json",
    ],
)
def test_where_not_even_root_can_write_is_refused(refuse: Refuse, command: str) -> None:
    """Permissions allow it there, the file system does not."""
    assert "/proc/new" in (line := refuse(*command.split()))
    assert "cannot be written to: No such file or directory; give another" in line


FILES = {
    "missing.yaml": "config file missing.yaml: No such file or directory",
    "folder.yaml": "config file folder.yaml: Is a directory",
    "file": "unknown preset 'file'",
    "broken.yaml": "config file broken.yaml is not plain YAML",
    "bytes.yaml": "config file bytes.yaml is not plain YAML",
    "tagged.yaml": "config file tagged.yaml is not plain YAML: could not determine a constructor",
    "list.yaml": "config file list.yaml: expected sections, found list",
    "word.yaml": "config file word.yaml: expected sections, found str",
    "bare.yaml": "model is missing; method is missing",
    "typo.yaml": "unknown key 'modle'; did you mean 'model'?",
    "number.yaml": "unknown key '3'",
    "vitt8_46": "unknown preset 'vitt8_46'; did you mean 'vitt8_64'?",
    "": "unknown preset ''",
    "pictures": "it is a folder; put a preset before it, such as vitn8_64 data=pictures",
    "vit_tiny": "'vit_tiny': it is an encoder, which the presets vitt8_64, vitt16_in1k have",
}


@pytest.mark.parametrize("name", FILES)
def test_an_unknown_preset_or_a_wrong_file_is_refused(refuse: Refuse, name: str) -> None:
    assert FILES[name] in refuse("pretrain", name, "data=pictures", "out=new")


@pytest.mark.parametrize(
    ("typed", "part"),
    {
        "pretrain": "Missing argument",
        "pretrian x": "No such command 'pretrian'",
        "presets --all": "No such option: --all",
        "pretrain data=pictures out=new": "PRESET|FILE.yaml is missing before 'data=pictures'",
        "evaluate knn data=pictures": "BACKBONE is missing before 'data=pictures'",
        "predict run pictures": "run is a folder: name a classifier saved by an evaluation, such "
        "as run/evaluations/linear-head.safetensors",
        "settings optim.minuts": "no section or setting 'optim.minuts'; did you mean "
        "'optim.minutes'?",
        "presets vitt8_46": "unknown preset 'vitt8_46'; did you mean 'vitt8_64'?",
        "presets a b": "unexpected extra argument",
        "evaluate knn": "Missing argument",
        "evaluate knm run": "unknown task 'knm'; did you mean 'knn'?",
        "evaluate knn nothing": "nothing does not exist",
        "evaluate knn damaged": "target.safetensors is damaged",
        "evaluate knn run workers=100000": "workers must be less than or equal to 256",
        "evaluate knn run k=0": "k must be greater than or equal to 1, found 0",
        "evaluate knn run kk=3": "unknown key 'kk'; did you mean 'k'?",
        "evaluate knn run weights=best": "weights must be 'target' or 'context', found 'best'",
        "evaluate knn run data=gone": "no such folder: gone",
        "evaluate knn run data=": "data= is empty",
        "evaluate knn run task=colour": "expected labels for task 'colour', the data has: class",
        "scenes": "Missing command",
        "scenes export coco": "Missing argument 'DIR'",
        "scenes export coca new": "unknown format 'coca'; did you mean 'coco'?",
        "scenes export coco new count=5": "count must be greater than or equal to 10, found 5",
        "scenes export coco new size=20": "expected scenes of 32 to 512 pixels, found 20",
        "scenes export coco new colour=1": "unknown key 'colour'; did you mean 'count'?",
        "scenes export coco full": "expected a new or empty folder, found full",
        "report": "Missing argument 'RUN...'",
        "report run": "Missing option '--out'",
        "report nothing --out a.html": "no such run: nothing",
        "report run --out empty": "--out empty is a folder: give a file, such as empty/report.html",
        "report run --out file/a.html": "--out file/a.html cannot be written to: Not a directory",
        "report run --out a.html --images 0": "images must be at least 1, found 0",
        "demo --out file": "--out file is a file: give a folder",
        "demo out=file": "--out file is a file: give a folder",
        "demo --out full": "--out full holds 'mine.txt', which is not of a demo",
        "demo data.source=pictures": "leave out data.source=pictures, or use dseqjepa pretrain",
        "demo data.size=0": "data.size must be greater than or equal to 1, found 0",
    }.items(),
)  # fmt: skip
def test_other_commands_refuse_as_well(refuse: Refuse, typed: str, part: str) -> None:
    assert part in refuse(*typed.split(" "))


# What fails, or is stopped, later


def test_a_run_that_fails_ends_with_1_and_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in (4, 6, 8):
        (here / f"pictures/a/{index}.png").write_bytes(b"no picture")
    assert run(monkeypatch, "pretrain", PRESET, "data=pictures", "out=new", *SMALL) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "of 12 images cannot be decoded, more than data.max_bad=0.01 allows" in line


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Stopped(), 143, ""),
        (KeyboardInterrupt(), 130, "dseqjepa: interrupted; resume=true continues from the last"),
        (OSError(28, "No space left on device"), 1, "dseqjepa: [Errno 28] No space left on device"),
    ],
)
def test_a_run_that_is_stopped_says_so_by_its_exit_code(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    def stop(trainer: Trainer) -> None:
        raise error

    monkeypatch.setattr(Trainer, "run", stop)
    assert run(monkeypatch, "pretrain", PRESET, "data=pictures", "out=new", *SMALL) == code
    assert capsys.readouterr().err.startswith(said)
    assert len(said.splitlines()) <= 1


def test_a_demo_that_is_stopped_exits_without_a_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(trainer: Trainer) -> None:
        raise Stopped

    monkeypatch.setattr(Trainer, "run", stop)
    assert run(monkeypatch, "demo", "--out", "new", "data.size=8", "data.batch_size=4") == 143
    assert not capsys.readouterr().err


def test_an_error_of_the_program_is_not_hidden(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "run", lambda trainer: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, "pretrain", PRESET, "data=pictures", "out=new", *SMALL)


# What is done


def test_an_old_run_is_replaced_and_a_home_folder_is_understood(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here))
    (here / "run/log.txt").write_text("the old run")
    typed = ["pretrain", PRESET, "data=~/pictures", "out=~/run", "overwrite=true", *SMALL]
    assert run(monkeypatch, *typed) == 0
    assert "the old run" not in (here / "run/log.txt").read_text()
    assert not (here / "~").exists()


def test_a_run_resumes_with_what_may_change(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = ["log.every_steps=7", "checkpoint.keep=5", "probe.every_epochs=0"]
    typed = ["pretrain", PRESET, "data=pictures", "out=run", "resume=true", *SMALL, *free]
    assert run(monkeypatch, *typed) == 0


def test_a_printed_config_is_the_config(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed, config in (
        (["pretrain", PRESET], load_config(PRESET)),
        (["presets", "vits16_small"], load_config("vits16_small")),
        (["demo"], load_config("dseq_vitt_demo")),
        (
            ["pretrain", "cjepa_vitb16_in1k", "data=a: b", "out=file", "optim.lr=1e-3", *SMALL],
            load_config("cjepa_vitb16_in1k", ["data.source=a: b", "optim.lr=1e-3", *SMALL]),
        ),
    ):
        assert run(monkeypatch, *typed, "--print-config") == 0
        (here / "printed.yaml").write_text(capsys.readouterr().out)
        assert load_config(here / "printed.yaml") == config
    assert run(monkeypatch, "evaluate", "knn", "gone", "k=5", "--print-config") == 0
    lines = capsys.readouterr().out.splitlines()
    settings = [line.replace(": ", "=") for line in lines]
    assert KnnConfig.from_settings(settings) == KnnConfig(k=5)


def test_presets_are_listed_and_described(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "presets") == 0
    listed = capsys.readouterr().out
    assert "dseq_vitb16_in1k" in listed
    assert run(monkeypatch, "presets", "vitb16_in1k") == 0
    assert "dseqjepa pretrain dseq_vitb16_in1k" in capsys.readouterr().out


def test_the_help_names_every_task() -> None:
    assert ", ".join(TASKS) == TASK_HELP


Command = Any


def commands() -> Iterator[tuple[str, Command]]:
    """Every command by what is typed, groups and all."""

    def below(name: str, command: Command) -> Iterator[tuple[str, Command]]:
        yield name, command
        for key, inner in getattr(command, "commands", {}).items():
            yield from below(f"{name} {key}".strip(), inner)

    return below("", typer.main.get_command(app))


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_a_help_text_is_sentences_with_examples_below(name: str, command: Command) -> None:
    texts = {"help": command.help, **{each.name: each.help for each in command.params}}
    assert all(texts.values()), texts
    for text in texts.values():
        for paragraph in text.split("\n\n"):
            assert re.fullmatch(r"[A-Za-z`].*\.", paragraph.strip(), re.DOTALL), paragraph
    lines = [line.strip() for line in command.epilog.split("\n")]
    assert lines[:2] == ["\b", "Examples:"]
    assert len(lines) > 2
    documented = {" ".join(line.split()) for line in documented_commands()}
    for line in lines[2:]:
        assert line.startswith(f"dseqjepa {name}".strip())
        # What is documented is run by a test; the demo is run as `make demo`.
        assert line in documented or line == "dseqjepa demo --out demo", line


def test_the_list_of_commands_cuts_no_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    listed = said.partition("Commands:\n")[2].partition("\n\n")[0].splitlines()
    assert len(listed) > 12
    assert all(re.fullmatch(r"  [a-z-]+ +[A-Z].*[^.]\.", line) for line in listed), listed


def test_the_version_is_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dseqjepa {dj.__version__}\n"


@pytest.mark.parametrize(
    ("typed", "wanted"),
    {
        "dseqjepa ev": "evaluate",
        "dseqjepa evaluate at": "attentive",
        "dseqjepa pretrain cjepa_vits16_s": "cjepa_vits16_small",
        "dseqjepa presets cjepa_vits16_s": "cjepa_vits16_small",
        "dseqjepa export runs/mine --to on": "onnx",
        "dseqjepa settings method.reg": "method.regions",
        "dseqjepa embed runs/mine --neigh": "--neighbours",
        "dseqjepa shards pa": "pack",
    }.items(),
)
def test_a_shell_completes_what_is_typed(typed: str, wanted: str) -> None:
    """As bash asks: what it runs at each Tab, in a process of its own that loads no torch."""
    asked = {
        "_DSEQJEPA_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    script = """
import atexit, sys
atexit.register(lambda: print("torch" in sys.modules))
from dseqjepa.cli import main
sys.argv = ["dseqjepa"]
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True
    )
    assert done.stdout.split() == [wanted, "False"], done.stdout + done.stderr


def test_questions_are_answered_without_torch(here: Path) -> None:
    script = """
import sys
from dseqjepa import ending
from dseqjepa.arguments import as_options
from dseqjepa.cli import TASK_HELP, app, main
for typed in ([], ["--help"], ["--version"], ["pretrain", "--help"], ["presets"],
              ["presets", "vitb16_in1k"], ["pretrain", "vitt8_64", "--print-config"],
              ["demo", "--print-config"], ["evaluate", "knn", "run", "--print-config"],
              ["scenes", "export", "coco", "mini", "--print-config"]):
    sys.argv = ["dseqjepa", *typed]
    main()
for typed in (["pretrain", "vitt8_64", "data.x=1"], ["pretrain", "vitt8_64"],
              ["evaluate", "x", "y"], ["nothing"]):
    sys.argv = ["dseqjepa", *typed]
    try:
        main()
    except SystemExit as stop:
        assert stop.code == 2
    else:
        raise AssertionError(typed)
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)


def test_training_and_evaluations_start_without_what_is_slow_to_import() -> None:
    """scipy.stats and matplotlib, each of which takes longer than all of the package."""
    script = """
import sys
import dseqjepa.tasks.online, dseqjepa.tasks.run, dseqjepa.train.pretrain
assert not {"scipy.stats", "matplotlib", "sklearn", "transformers", "timm"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_process_has_the_exit_code_and_shows_no_traceback(here: Path) -> None:
    for typed, code in ((["presets"], 0), (["pretrain", "vitt8_64", "data=gone", "out=new"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "dseqjepa", *typed], capture_output=True, text=True, check=False
        )
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == (code != 0)
        assert "Traceback" not in done.stderr
    assert not (here / "new").exists()


def test_every_option_is_understood_without_its_dashes() -> None:
    program: Any = typer.main.get_command(app)
    seen = 0
    groups: list[tuple[list[str], Any]] = [([], program)]
    while groups:
        names, command = groups.pop()
        groups += [([*names, name], c) for name, c in getattr(command, "commands", {}).items()]
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.is_flag:
                option, seen = parameter.opts[0], seen + 1
                words = [*names, "first", f"{option[2:].replace('-', '_')}=a=b", "section.out=1"]
                expected = [*names, "first", option, "a=b", "section.out=1"]
                assert as_options(program, words) == expected
                assert as_options(program, expected) == expected
    assert seen > 10


def test_every_setting_is_understood_with_dashes() -> None:
    program = typer.main.get_command(app)
    typed = "pretrain vitt8_64 --data my_pictures --out=a=b --optim.lr 1e-3 --init-from x --resume"
    meant = "pretrain vitt8_64 data=my_pictures out=a=b optim.lr=1e-3 init_from=x resume=true"
    assert as_options(program, typed.split()) == meant.split()
    for same in ("pretrain --help", "pretrain vitt8_64 --print-config data=x", "show --nonsense"):
        assert as_options(program, same.split()) == same.split()
