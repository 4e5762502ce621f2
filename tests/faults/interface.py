"""Interface and hostile input: wrong configs, pickles, YAML tags."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from dseqjepa.presets import load_config
from tests.faults.campaign import Attempts, fault
from tests.faults.commands import PRESET, SMALL, command, pictures, pretrain
from tests.test_hostile import (
    FILES,
    PACKAGE,
    ROOT,
    may_open_tar,
    runs_what_it_reads,
    shells,
    unpacks,
)

WRONG = {
    # unknown keys
    "data.batchsize=4": ("data.batchsize", "batch_size"),
    "data.image_sise=32": ("data.image_sise", "image_size"),
    "model.patchsize=8": ("model.patchsize", "patch_size"),
    "predictor.dept=2": ("predictor.dept", "depth"),
    "method.saliency.querry=state": ("method.saliency.querry", "query"),
    "method.regions.minarea=0.1": ("method.regions.minarea", "min_area"),
    "method.curiculum.unit=image": ("method.curiculum", "curriculum"),
    "optim.learning_rate=1": ("optim.learning_rate", ""),
    "optim.warmup=1": ("optim.warmup", "warmup_epochs"),
    "ema.begin=1": ("ema.begin", ""),
    "guard.patients=3": ("guard.patients", "patience"),
    "checkpoint.every_step=3": ("checkpoint.every_step", "every_steps"),
    "runtime.sed=3": ("runtime.sed", "seed"),
    "logg.every_steps=3": ("logg", "log"),
    "seed=3": ("seed", ""),
    # wrong types
    "data.batch_size=many": ("data.batch_size", "whole number"),
    "data.batch_size=4.5": ("data.batch_size", "whole number"),
    "data.image_size=[1,2,3]": ("data.image_size", "two numbers"),
    "data.flip=yes please": ("data.flip", "true or false"),
    "optim.lr=fast": ("optim.lr", "number"),
    "optim.lr=true": ("optim", "lr must not be True"),
    "optim.epochs=all": ("optim.epochs", "auto"),
    "model.depth=[2]": ("model.depth", "whole number"),
    "method=dseq": ("method", ""),
    "method.name=3": ("method.name", "dseq"),
    # out of range
    "data.batch_size=0": ("data.batch_size", "1"),
    "data.max_bad=1.5": ("data.max_bad", "1"),
    "optim.lr=-1": ("optim.lr", "0"),
    "optim.lr=nan": ("optim.lr", "finite"),
    "ema.start=-0.1": ("ema.start", "0"),
    "ema.end=2": ("ema.end", "1"),
    "guard.patience=0": ("guard.patience", "1"),
    "guard.window=1": ("guard.window", "2"),
    "guard.sigma=-1": ("guard.sigma", "0"),
    "checkpoint.keep=0": ("checkpoint.keep", "1"),
    "log.every_steps=0": ("log.every_steps", "1"),
    "runtime.seed=99999999999": ("runtime.seed", "2147483648"),
    "method.regions.count=1": ("method.regions.count", "2"),
    # contradictions
    "data.crop_scale=[0.9,0.1]": ("crop_scale", "low <= high"),
    "data.image_size=30": ("data.image_size", "patch_size"),
    "model.heads=3": ("model.width", "multiple"),
    "predictor.width=18": ("predictor.width", "multiple"),
    "optim.accumulate=7": ("data.batch_size", "accumulate"),
    "optim.warmup_epochs=99": ("warmup_epochs", "epochs"),
    "method.saliency.block=40": ("method.saliency.block", "depth"),
    "model.class_token=false method.saliency.kind=cls_attention": ("class_token", "grad_cam"),
    "method.regions.source=random method.order=inverse": ("order", "ranked"),
    "method.blocks.target_area=[0.5,0.2]": ("target_area", "range"),
    "resume=true overwrite=true": ("resume", "overwrite"),
}


@fault(22, "Invalid configs: refused by name before any file exists", quick=49, full=49)
def wrong_configs(attempts: Attempts) -> None:
    folder = pictures(attempts.place("pictures"), 12)
    out = attempts.folder / "out"
    for settings, (key, hint) in WRONG.items():
        with attempts.attempt(settings):
            typed = settings.split(" ") if settings.count("=") > 1 else [settings]
            said = pretrain(folder, out, "optim.epochs=1", *typed)
            assert said.code == 2, said
            assert said.out == ""
            assert len(said.err.splitlines()) == 1, said
            assert key in said.err, said
            assert hint in said.err, said
            assert not out.exists()


class Execute:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@fault(23, "A malicious pickle wherever a checkpoint is expected", quick=14, full=14)
def malicious_pickles(attempts: Attempts) -> None:
    folder = pictures(attempts.place("pictures"), 12)
    run, executed = attempts.folder / "run", attempts.folder / "executed"
    assert pretrain(folder, run, "data.batch_size=4").code == 0
    evil = pickle.dumps(Execute(executed))
    torch.save(Execute(executed), attempts.folder / "zip.pt")
    content = {"zip.pt": (attempts.folder / "zip.pt").read_bytes(), "raw.pt": evil}
    for name in ("target", "context", "optimizer", "state.json"):
        for kind, stuff in content.items():
            with attempts.attempt(f"{name} replaced by {kind}"):
                copy = attempts.folder / f"{name}-{kind}"
                shutil.copytree(run, copy, symlinks=True)
                file = name if name == "state.json" else f"{name}.safetensors"
                (copy / "checkpoints/last" / file).write_bytes(stuff)
                for typed in (
                    ["evaluate", "knn", str(copy), f"data={folder}"],
                    ["pretrain", PRESET, f"data={folder}", f"out={copy}", *SMALL,
                     "data.batch_size=4", "resume=true"],
                    ["pretrain", PRESET, f"data={folder}", f"out={attempts.folder}/new", *SMALL,
                     "data.batch_size=4", f"init_from={copy}"],
                ):  # fmt: skip
                    said = command(*typed)
                    assert said.code == 2, said
                    assert not executed.exists()
    for kind, stuff in content.items():
        for name in ("evil.pt", "evil.pth.tar", "evil.safetensors"):
            with attempts.attempt(f"import of {name}, {kind}"):
                file = attempts.folder / name
                file.write_bytes(stuff)
                for typed in (
                    ["import", str(file), f"out={attempts.folder}/imported"],
                    ["evaluate", "knn", str(file)],
                ):
                    said = command(*typed)
                    assert said.code == 2, said
                    assert not executed.exists()
                assert not (attempts.folder / "imported").exists()


TAGS = [
    "!!python/object/apply:os.mkdir [{path}]",
    "!!python/object/new:os.mkdir [{path}]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!include {path}",
    "!ENV {path}",
    "*anchor",
]
IMPORTS = ["os.mkdir", "__import__('os').mkdir('{path}')", "os:mkdir", "${{oc.env:HOME}}"]


@fault(24, "YAML tags and import strings in files and on the command line", quick=24, full=24)
def yaml_tags(attempts: Attempts) -> None:
    folder, out = pictures(attempts.place("pictures"), 12), attempts.folder / "out"
    executed = attempts.folder / "executed"
    plain = load_config(PRESET, SMALL).model_dump(mode="json")
    for number, text in enumerate([*TAGS, *IMPORTS]):
        text = text.format(path=executed)
        quoted = text if number < len(TAGS) else repr(text)
        for where in ("a file", "the command line"):
            with attempts.attempt(f"{text} in {where}"):
                if where == "a file":
                    file = attempts.folder / "config.yaml"
                    broken = yaml.safe_dump({**plain, "method": "HERE"}).replace("HERE", quoted)
                    file.write_text(broken)
                    said = command("pretrain", str(file), f"data={folder}", f"out={out}")
                else:
                    said = pretrain(folder, out, f"model.name={text}")
                assert said.code == 2, said
                assert not executed.exists()
                assert not out.exists()


@fault(26, "Source code free of shells, pickles and archive extraction", quick=100, full=100)
def sources(attempts: Attempts) -> None:
    """Every file of the package, the benchmarks and the tests, by its syntax tree. No code here
    unpacks an archive; what torch's own hold is checked before it is read."""
    for path in FILES:
        with attempts.attempt(str(path)):
            source = (ROOT / path).read_text()
            assert not shells(source)
            if path in PACKAGE:
                assert not runs_what_it_reads(source) + unpacks(source, may_open_tar(path))
