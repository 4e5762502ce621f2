"""From a command to a result file that says what was measured, how, on what, and by which code."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dseqjepa.cli import main
from dseqjepa.data.labelled import located
from dseqjepa.methods import build_method
from dseqjepa.tasks import run
from dseqjepa.tasks.config import TASKS
from dseqjepa.tasks.results import write_json
from dseqjepa.tasks.run import run_task
from dseqjepa.train.checkpoint import save_checkpoint
from dseqjepa.train.folder import is_in_use
from dseqjepa.train.pretrain import open_training_source
from tests.children import ends, run_ranks, start
from tests.tiny import tiny_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs that differ in their seed, and pictures of two classes."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 10)):
        for label in ("a", "b"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 128, (36, 40, 3)) + 100 * (label == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "pictures" / "train" / "a" / "5.png").write_bytes(b"no picture")
    for seed in (0, 1):
        config = tiny_config("dseq_vitt8_64", f"runtime.seed={seed}", "data.source=pictures")
        method = build_method(config)
        encoders = {"target": method.target.state_dict(), "context": method.encoder.state_dict()}
        state = {
            "config": config.model_dump(mode="json"),
            "data_fingerprint": open_training_source(config).fingerprint(),
            "data_path": located("pictures"),
        }
        save_checkpoint(tmp_path / f"runs/{seed}/checkpoints", 5, encoders, state, keep=1)
    return tmp_path


def test_without_data_a_run_is_tested_on_its_own_wherever_one_stands(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = here / "other"
    shutil.copytree(here / "pictures", other / "pictures")
    for path in sorted((other / "pictures").rglob("*.png"))[:30]:
        Image.new("RGB", (40, 36)).save(path)
    monkeypatch.chdir(other)
    assert evaluate("knn", "../runs/0") == 0
    found = json.loads((here / "runs/0/evaluations/knn.json").read_text())
    assert found["data"]["source"] == str(here / "pictures")
    assert found["data"]["left_out"] == []

    (here / "pictures").rename(here / "gone")
    (here / "runs/0/evaluations/knn.json").unlink()
    assert evaluate("knn", "../runs/0") == 2  # its namesake here has other files
    said = capsys.readouterr().err
    assert "no such folder" in said
    assert "pictures contains other images than the run saw" in said
    assert "give their path as data=PATH" in said
    shutil.rmtree(other / "pictures")
    shutil.copytree(here / "gone", other / "pictures")
    assert evaluate("knn", "../runs/0") == 0  # moved along with the working directory


def test_what_is_left_out_is_said_and_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "pictures/val/c").mkdir()
    Image.new("RGB", (40, 36)).save(here / "pictures/val/c/[red]1.png")
    Image.new("RGB", (40, 36)).save(here / "pictures/train/stray.png")
    (here / "pictures/train/a/x.heic").write_bytes(b"no image")
    assert evaluate("knn", "runs/0", "data=pictures") == 0
    notes = json.loads((here / "runs/0/evaluations/knn.json").read_text())["data"]["left_out"]
    assert [note.split(" in pictures")[0] for note in notes] == [
        "1 of 50 files",
        "1 of 49 images",
        "1 of 21 images",
    ]
    assert "such as c/[red]1.png: they are left out" in notes[2]
    printed = capsys.readouterr().out
    assert all(note in printed for note in notes)


def evaluate(task: str, *typed: str) -> int:
    """One of the 48 training images cannot be decoded: more than the default allows."""
    is_set = any("max_bad" in word for word in typed)
    settings = typed if is_set else (*typed, "max_bad=0.1")
    sys.argv = ["dseqjepa", "evaluate", task, *settings]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("knn", ["sweep=true"]),
        ("linear", ["epochs=2", "batch_size=8"]),
        ("linear", ["preset=quick", "sweep.epochs=3"]),
        ("lowshot", ["preset=quick", "fraction=0.2", "sweep.epochs=3"]),
        ("clevr", ["task=class", "epochs=2"]),
        ("attentive", ["preset=quick", "epochs=2", "batch_size=8"]),
        ("attentive", ["epochs=1", "batch_size=8", "pooling=mean", "lrs=[0.01]"]),
    ],
)
def test_a_result_says_all_that_is_needed_to_trust_it(
    here: Path, task: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(task, "runs/0", *settings) == 0
    printed = capsys.readouterr().out
    assert f"written: {here}/runs/0/evaluations/{task}.json" in printed
    found = json.loads((here / f"runs/0/evaluations/{task}.json").read_text())
    assert found["task"] == found["protocol"]["task"] == task
    assert set(found["metrics"]) == set(TASKS[task].from_settings(settings).yields)
    quick = "preset=quick" in settings
    assert found["preset"] == found["protocol"]["preset"] == ("quick" if quick else "full")
    assert ("preset=quick" in printed) == quick
    for metric in found["metrics"].values():
        assert 0 <= metric["value"] <= 100
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert (found["n_train"], found["n_test"]) == ({"lowshot": 10, "clevr": 38}.get(task, 47), 20)
    assert found["n_bad"] == 1
    backbone = found["backbone"]
    assert (backbone["name"], backbone["weights"], backbone["seed"]) == (
        "dseq, step 5",
        "target",
        0,
    )
    assert backbone["layers"]
    assert backbone["pooling"]
    assert len(backbone["digest"]) == 64
    assert found["data"]["source"] == str(here / "pictures")
    assert found["protocol"]["data"] == {k: found["data"][k] for k in ("train", "test")}
    config = TASKS[task].from_settings(["max_bad=0.1", *settings])
    assert found["config"] == config.model_dump(mode="json")
    assert found["versions"]["torch"]
    assert found["wall_s"] > 0
    kept = sorted(path.name for path in (here / "runs/0/evaluations").iterdir())
    # Nothing is left of what it would have resumed from.
    encoded_anew = task == "attentive" and not quick
    features = [] if encoded_anew else ["features"]
    heads = [f"{task}-head.safetensors"] if task in ("linear", "lowshot", "attentive") else []
    assert kept == sorted([*features, *heads, f"{task}.json", f"{task}.png"])
    encoders = ["majority", "raw pixels", "untrained", "dseq, step 5"]
    assert [line["encoder"] for line in found["results"]] == encoders
    assert "cannot decode" in printed
    told_in = [(line, m) for line in found["results"] for m in found["metrics"] if m in line]
    value = {(line["encoder"], m): line[m] for line, m in told_in}
    accuracies = [metric for metric in found["metrics"] if "balanced" not in metric]
    for baseline in ("raw pixels", "untrained"):
        gaps = [each for each in found["differences"] if each["minus"] == baseline]
        assert [each["metric"] for each in gaps] == accuracies
        for each in gaps:
            metric = each["metric"]
            wanted = value["dseq, step 5", metric] - value[baseline, metric]
            assert each["value"] == pytest.approx(wanted)
            assert each["low"] <= each["value"] <= each["high"]
        assert f"dseq, step 5 minus {baseline}, on the same images: " in printed
    if task not in ("lowshot", "clevr"):  # which need not come by it
        assert "train images that cannot be decoded: 1 of 24 of a" in printed
        assert found["missing"] == {"train": {"a": [1, 24]}, "test": {}}
    told = found["details"]["by_task"]["class"] if task == "clevr" else found["details"]
    assert sum(each["n_test"] for each in told["per_class"].values()) % 20 == 0
    assert set(told["confusion"]) == {"a", "b"}
    assert evaluate(task, "runs/0", *settings) == 0  # from the kept features
    again = json.loads((here / f"runs/0/evaluations/{task}.json").read_text())
    assert {**again, "wall_s": 0} == {**found, "wall_s": 0}


def test_runs_of_two_seeds_are_one_line_of_the_table(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        assert evaluate("knn", f"runs/{seed}") == 0
        assert evaluate("knn", f"runs/{seed}", "k=5") == 0
    assert len(list((here / "runs/0/evaluations").glob("knn*.json"))) == 2
    capsys.readouterr()
    sys.argv = ["dseqjepa", "results", "runs", "--out", "table.json"]
    main()
    printed = capsys.readouterr().out
    assert "| dseq |" in printed
    assert printed.count("n=2") == 4  # accuracy and balanced accuracy, by two protocols
    table = json.loads((here / "table.json").read_text())
    assert [column["protocol"]["k"] for column in table["columns"]] in (
        [20, 20, 5, 5],
        [5, 5, 20, 20],
    )
    assert [cell["seeds"] for cell in table["lines"][0]["cells"]] == [[0, 1]] * 4


def test_sweeps_of_other_values_are_other_protocols(here: Path) -> None:
    grids = (["sweep=true"], ["sweep=true", "ks=[3]"], ["sweep=true", "temperatures=[0.1]"])
    for number, settings in enumerate(grids):
        assert evaluate("knn", "runs/0", f"out=r/{number}.json", *settings) == 0
    found = [json.loads((here / f"r/{n}.json").read_text())["protocol"] for n in range(len(grids))]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("knn", "ks=[3]", "ks has no effect with sweep=false"),
        ("linear", "preset=quick epochs=100", "epochs has no effect with protocol=sweep"),
        ("linear", "sweep.epochs=3", "sweep has no effect with protocol=paper"),
        ("attentive", "preset=quick flip=true", "flip has no effect with crops=false"),
        ("lowshot", "names=a.txt draws=2", "draws has no effect with names=a.txt"),
        ("dense", "task=depth lrs=[0.1]", "lrs has no effect with task=depth"),
        ("dense", "task=segmentation ridges=[1]", "ridges has no effect with task=segmentation"),
        ("knn", "size=30", "size= is a number of scenes, not of images of"),
    ],
)
def test_a_setting_that_nothing_would_read_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], task: str, settings: str, said: str
) -> None:
    assert evaluate(task, "runs/0", "out=unread/result.json", *settings.split()) == 2
    assert said in capsys.readouterr().err
    assert not (here / "unread").exists()


def test_untrained_encoders_are_measured_on_the_same_samples(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        out = f"out=r/{seed}.json"
        typed = ["lowshot", "random:vitt_demo", "data=pictures", f"init_seed={seed}", out]
        assert evaluate(*typed, "fraction=0.2", "draws=2", "sweep.epochs=2") == 0
    capsys.readouterr()
    sys.argv = ["dseqjepa", "results", "r"]
    main()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| untrained")]
    assert line.count("|") == 4
    assert line.count("n=2") == 2
    first, second = (json.loads((here / f"r/{seed}.json").read_text()) for seed in (0, 1))
    assert first["backbone"]["digest"] != second["backbone"]["digest"]


def test_other_weights_and_backbones(here: Path) -> None:
    assert evaluate("knn", "runs/0", "weights=context") == 0
    assert evaluate("knn", "runs/0", "image_size=[16, 24]") == 0
    assert evaluate("knn", "random:vitt_demo", "data=pictures", "out=r.json", "init_seed=3") == 0
    assert evaluate("linear", "pixels", "data=pictures", "out=p.json", "preset=quick",
                    "image_size=8", "sweep.epochs=2") == 0  # fmt: skip
    context = json.loads((here / "runs/0/evaluations/knn.json").read_text())
    assert context["backbone"]["weights"] == "context"
    random, pixels = (json.loads((here / name).read_text()) for name in ("r.json", "p.json"))
    assert (random["backbone"]["name"], random["backbone"]["seed"]) == ("untrained vitt_demo", 3)
    assert (pixels["backbone"]["name"], pixels["backbone"]["width"]) == ("raw pixels", 192)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            ["knn", "pixels", "data=pictures"],
            "out=FILE.json is missing: pixels is not a run",
        ),
        (["knn", "pixels", "out=a.json"], "data=PATH is missing: pixels does not record"),
        (["knn", "runs/0", "out=runs"], "out=runs is a folder: give a file"),
        (["finetune", "pixels", "data=pictures", "out=a.json"], "no transformer blocks to train"),
        (["linear", "runs/0", "batch_size=64"], "48 training images are fewer than a batch of 64"),
        (["linear", "runs/0", "sweep.lr=1"], "unknown key 'sweep.lr'"),
        (["linear", "runs/0", "preset=fast"], "preset must be 'full' or 'quick', found 'fast'"),
        (["lowshot", "runs/0", "names=gone.txt"], "names=gone.txt cannot be read"),
        (["clevr", "runs/0"], "expected labels for task 'count', the data has: class"),
        (["knn", "runs/0", "features=last+"], "unknown feature ''"),
        (
            ["attentive", "pixels", "data=pictures", "out=a.json"],
            "raw pixels has one patch per image, expected several to attend to",
        ),
        (["attentive", "runs/0", "task=count"], "expected labels for task 'count'"),
        (
            ["attentive", "runs/0", "lrs=[]"],
            "lrs must be one or more numbers in brackets, found []",
        ),
        (["attentive", "runs/0", "crop_scale=[2, 3]"], "crop_scale must satisfy 0 < low <= high"),
        (["attentive", "runs/0", "pooling=max"], "pooling must be 'attention' or 'mean'"),
        (["dense", "runs/0"], "dense needs the class or depth of every pixel, which this data"),
        (["dense", "pixels", "data=scenes", "size=10", "out=a.json"], "dense needs a grid of"),
        (["knn", "runs/0", "center=image"], "center must be 'none' or 'place', found 'image'"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line_and_nothing_is_written(
    here: Path, typed: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.rglob("*.json"))
    assert evaluate(*typed) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert sorted(here.rglob("*.json")) == before


def evaluate_on_ranks(folder: Path, task: str, settings: list[str]) -> None:
    """In a child, as torchrun would."""
    import os

    os.chdir(folder)
    config = TASKS[task].from_settings(["accelerator=cpu", *settings, "max_bad=0.1"])
    run_task(task, "runs/0", config, data=None, out=folder / "two.json")


def look(folder: Path) -> None:
    """In a child: fails unless another process holds the folder."""
    assert is_in_use(folder)


@pytest.mark.parametrize("task", ["attentive", "finetune"])
def test_a_training_is_locked_until_the_result_is_written(
    here: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = here / "runs/0/evaluations"
    found: list[int] = []

    def write(path: Path, values: dict[str, Any]) -> None:
        (folder,) = results.glob(f"{task}-*")
        found.extend(ends([start(look, folder, log=here / "log")], 240))
        write_json(path, values)

    monkeypatch.setattr(run, "write_json", write)
    more = {"attentive": ["baselines=false"], "finetune": ["batch_size=8"]}[task]
    assert evaluate(task, "runs/0", "preset=quick", "epochs=1", *more) == 0
    assert found == [0], (here / "log").read_text()


@pytest.mark.parametrize(
    ("task", "settings", "alone"),
    [
        ("knn", ["sweep=true"], ["cache=none"]),
        ("lowshot", ["fraction=0.2", "sweep.epochs=3"], ["cache=none"]),
        ("finetune", ["preset=quick", "epochs=1", "batch_size=8"], ["accumulate=2"]),
    ],
)
def test_two_ranks_find_what_one_finds(
    here: Path, task: str, settings: list[str], alone: list[str]
) -> None:
    assert evaluate(task, "runs/0", "accelerator=cpu", "out=one.json", *alone, *settings) == 0
    run_ranks(2, evaluate_on_ranks, here, task, settings, log=here / "log")
    one, two = (json.loads((here / name).read_text()) for name in ("one.json", "two.json"))
    assert two["ranks"] == 2
    different: dict[str, Any] = {
        "wall_s": 0,
        "ranks": 0,
        "threads": 0,
        "config": {},
        "versions": {},
    }
    assert {**two, **different} == {**one, **different}


@pytest.mark.parametrize(
    ("task", "settings"),
    [("knn", ["cache=none"]), ("finetune", ["preset=quick", "epochs=2", "batch_size=8"])],
)
def test_a_class_that_cannot_be_read_does_not_vanish_in_silence(
    here: Path, task: str, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (here / "pictures/val/b").iterdir():
        path.write_bytes(b"no picture")
    before = sorted(here.rglob("*.json"))
    sys.argv = ["dseqjepa", "evaluate", task, "runs/0", *settings]
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    told = capsys.readouterr()
    part = {"knn": "train", "finetune": "training"}[task]
    assert f"1 of 48 {part} images cannot be decoded, more than max_bad=0.01 allows" in told.err
    assert "cannot decode" in told.out
    assert sorted(here.rglob("*.json")) == before
    kept = ["resume=auto"] if task == "finetune" else []
    assert evaluate(task, "runs/0", "max_bad=0.6", *settings, *kept) == 0
    printed = capsys.readouterr().out
    assert "test images that cannot be decoded: 10 of 10 of b" in printed
    assert printed.count("cannot decode") == 11  # each is named once
    found = json.loads((here / f"runs/0/evaluations/{task}.json").read_text())
    assert found["missing"] == {"train": {"a": [1, 24]}, "test": {"b": [10, 10]}}
    assert (found["n_train"], found["n_test"], found["n_bad"]) == (47, 10, 11)


def test_a_picture_removed_in_between_costs_no_result(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dseqjepa.tasks import knn

    measure = knn.evaluate

    def and_removed(*arguments: Any) -> Any:
        found = measure(*arguments)
        (here / "pictures/val/b/3.png").unlink()
        return found

    monkeypatch.setattr(knn, "evaluate", and_removed)
    assert evaluate("knn", "runs/0", "baselines=false") == 0
    found = json.loads((here / "runs/0/evaluations/knn.json").read_text())
    (warning,) = found["warnings"]
    assert warning.startswith("warning: the test images changed during the evaluation: cannot")
    assert "pictures/val/b/3.png" in warning
    assert warning in capsys.readouterr().out
    assert [line["encoder"] for line in found["results"]] == ["majority", "dseq, step 5"]
