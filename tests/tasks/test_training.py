"""An interrupted training resumes exactly, and each parameter group has its own rate."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dseqjepa.data.scenes import Scenes
from dseqjepa.data.source import BadImage
from dseqjepa.data.transforms import TrainTransform
from dseqjepa.errors import InputError, RunError, Stopped
from dseqjepa.ranks import Ranks
from dseqjepa.tasks.backbone import Backbone, open_backbone
from dseqjepa.tasks.maps import DropPath
from dseqjepa.tasks.reading import (
    Crops,
    LabelledImage,
    Samples,
    Shuffled,
    in_order,
    read_ahead,
    seeded,
    stacked,
)
from dseqjepa.tasks.training import Place, Recipe, adamw, fit, parameter_groups, trained_state
from dseqjepa.train.checkpoint import holds_checkpoint, save_checkpoint
from tests.children import ends, run_ranks, start
from tests.tasks.dense_data import tiny_backbone

RECIPE = Recipe(
    steps=6, batch_size=4, lr=1e-3, weight_decay=0.1, warmup_steps=2, schedule="cosine", clip=1.0
)
QUIET = Console(file=io.StringIO())


class Model(nn.Module):
    """With all that draws at random and all that remembers beside its weights."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.drop_path = DropPath(backbone, 0.3)
        self.norm = nn.BatchNorm1d(backbone.width)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(backbone.width, 1)

    def losses(self, samples: list[Tensor]) -> dict[str, Tensor]:
        images_BCHW = torch.stack(samples)
        self.drop_path.draw(len(images_BCHW))
        pooled_BD = self.backbone(images_BCHW).patches_BND.mean(1)
        logit_B = self.head(self.dropout(self.norm(pooled_BD)))[:, 0]
        return {"loss_mean": (logit_B - images_BCHW.float().mean((1, 2, 3)) / 255).square().mean()}


def fit_on_ten(model: Model, reader: Any, losses: Any, place: Place, start: Any) -> dict[str, str]:
    return fit_by(RECIPE, model, reader, losses, place, start)


def fit_by(
    recipe: Recipe, model: Model, reader: Any, losses: Any, place: Place, start: Any
) -> dict[str, str]:
    optimizer = adamw(parameter_groups(model, model.backbone, recipe), place.device)
    parts = place.parts_of(Ten(), reader, recipe)
    return fit(model, optimizer, recipe, parts, losses, place, start)


class Ten(Scenes):
    """Ten places; what lies there the readers below say."""

    def __init__(self) -> None:
        super().__init__(10, size=32, seed=0, split="train")

    def name(self, index: int) -> str:
        return str(index)


def read(index: int, key: int) -> Tensor:
    with seeded(key):
        noise = torch.randint(0, 200, (3, 32, 32))
    return (noise + index).to(torch.uint8)


def trained(
    folder: Path, recipe: Recipe = RECIPE, reader: Any = read, **settings: Any
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Model(tiny_backbone())
    place = Place(folder, {"config": {"pair": (1, 2)}}, console=QUIET, **settings)
    fit_by(recipe, model, reader, model.losses, place, place.start())
    return model.state_dict()


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_stopped_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(tmp_path / "cut", stop_after=3)
    torch.manual_seed(99)  # whatever was drawn in between
    assert_equal(trained(tmp_path / "cut", resume=True), whole)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    other = trained(tmp_path / "other", Recipe(**{**RECIPE.__dict__, "seed": 1}))
    assert not torch.equal(other["head.weight"], whole["head.weight"])


def test_processes_that_read_ahead_change_nothing(tmp_path: Path) -> None:
    assert_equal(trained(tmp_path / "two", workers=2), trained(tmp_path / "none"))


def train_on_ranks(folder: Path, **settings: Any) -> None:
    """In a child, as torchrun would. Whichever rank meets the torn image, both know of it."""
    from dseqjepa.config import RuntimeConfig
    from dseqjepa.train.runtime import join

    ranks = join(RuntimeConfig(accelerator="cpu"), {}).ranks

    def reader(index: int, key: int) -> Tensor:
        if index == 3:
            raise BadImage("torn")
        return read(index, key)

    torch.manual_seed(0)
    model = Independent(tiny_backbone())
    place = Place(folder, {}, console=QUIET, ranks=ranks, **settings)
    bad = fit_on_ten(model, reader, model.losses, place, place.start())
    assert bad == {"3": "torn"}
    save_file(model.state_dict(), folder / f"{ranks.rank}.safetensors")


class Independent(Model):
    """No image changes what another one gives."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.norm = nn.LayerNorm(backbone.width)  # type: ignore[assignment]


def test_two_ranks_do_what_one_does_in_two_parts(tmp_path: Path) -> None:
    train_on_ranks(tmp_path / "one", accumulate=2)
    whole = load_file(tmp_path / "one" / "0.safetensors")
    run_ranks(2, train_on_ranks, tmp_path / "two", log=tmp_path / "log")
    found = [load_file(tmp_path / "two" / f"{rank}.safetensors") for rank in (0, 1)]
    assert_equal(*found)
    for key in whole:
        torch.testing.assert_close(found[0][key], whole[key], rtol=1e-4, atol=1e-6)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(lines[0]) == len(lines[1]) == RECIPE.steps
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(*lines, strict=True))
    torch.manual_seed(0)
    before = Independent(tiny_backbone()).state_dict()
    assert not torch.equal(before["head.weight"], whole["head.weight"])


def stop_on_ranks(folder: Path) -> None:
    with pytest.raises(Stopped):
        train_on_ranks(folder, stop_after=3)


def resume_on_ranks(folder: Path) -> None:
    train_on_ranks(folder, resume=True)


def test_a_stopped_training_resumes_on_ranks(tmp_path: Path) -> None:
    run_ranks(2, train_on_ranks, tmp_path / "whole", log=tmp_path / "log")
    run_ranks(2, stop_on_ranks, tmp_path / "cut", log=tmp_path / "log")
    run_ranks(2, resume_on_ranks, tmp_path / "cut", log=tmp_path / "log")
    whole, cut = (load_file(tmp_path / name / "0.safetensors") for name in ("whole", "cut"))
    assert_equal(cut, whole)
    said = (tmp_path / "cut" / "log.txt").read_text()
    assert said.count("stopped at step 3") == said.count("from step 3") == 1


def test_every_part_of_every_step_draws_its_own(tmp_path: Path) -> None:
    drawn: list[float] = []
    model = Model(tiny_backbone())

    def losses(samples: list[Tensor]) -> dict[str, Tensor]:
        drawn.append(float(torch.rand(())))
        return model.losses(samples)

    place = Place(tmp_path, {}, console=QUIET, accumulate=2)
    fit_on_ten(model, read, losses, place, None)
    assert len(drawn) == len(set(drawn)) == 2 * RECIPE.steps


def start_there(folder: Path, overwrite: bool) -> None:
    Place(folder, {}, overwrite=overwrite, console=QUIET).start()


def test_a_second_evaluation_is_refused_while_the_first_trains_in_the_folder(
    tmp_path: Path,
) -> None:
    folder, log = tmp_path / "knn-training", tmp_path / "log"
    place = Place(folder, {}, console=QUIET)
    place.start()
    save_checkpoint(folder / "checkpoints", 1, {}, {}, 1)
    for overwrite in (False, True):
        assert ends([start(start_there, folder, overwrite, log=log)], 240) == [2]
        assert f"the training in {folder} is in use by process {os.getpid()}" in log.read_text()
    assert holds_checkpoint(folder)
    place.held.close()  # the result is written
    assert ends([start(start_there, folder, True, log=log)], 240) == [0], log.read_text()


def test_sigterm_leaves_a_checkpoint(tmp_path: Path) -> None:
    def reader(index: int, key: int) -> Tensor:
        if (tmp_path / "asked").exists():
            return read(index, key)
        (tmp_path / "asked").touch()
        signal.raise_signal(signal.SIGTERM)
        return read(index, key)

    with pytest.raises(Stopped):
        trained(tmp_path / "run", reader=reader)
    assert (tmp_path / "run" / "checkpoints" / "last").resolve().name == "step-00000001"
    assert "stopped at step 1; resume=true" in (tmp_path / "run" / "log.txt").read_text()
    assert_equal(trained(tmp_path / "run", resume=True), trained(tmp_path / "whole"))


def test_a_stop_that_is_asked_for_in_the_last_step_is_not_lost(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        trained(tmp_path / "run", stop_after=RECIPE.steps)
    assert_equal(trained(tmp_path / "run", resume=True), trained(tmp_path / "whole"))


def test_a_training_is_not_overwritten_or_taken_for_another(tmp_path: Path) -> None:
    first = trained(tmp_path)
    with pytest.raises(InputError, match="resume=true to continue it, overwrite=true"):
        trained(tmp_path)
    assert_equal(trained(tmp_path, resume=True), first)  # finished: nothing is left to do
    with pytest.raises(InputError, match="another config: use overwrite=true"):
        Place(tmp_path, {"config": {"pair": (1, 3)}}, resume=True, console=QUIET).start()
    assert_equal(trained(tmp_path, overwrite=True), first)


def test_a_checkpoint_is_gone_on_from_even_where_nothing_points_to_it(tmp_path: Path) -> None:
    """As a kill just after its folder was renamed leaves it."""
    whole = trained(tmp_path / "whole")
    with pytest.raises(Stopped):
        trained(tmp_path / "cut", stop_after=3)
    (tmp_path / "cut" / "checkpoints" / "last").unlink()
    assert_equal(trained(tmp_path / "cut", resume=True), whole)
    assert "from step 3" in (tmp_path / "cut" / "log.txt").read_text()


def test_every_sample_once_an_epoch_and_each_in_its_own_way() -> None:
    seen: list[tuple[int, int]] = []
    samples = Samples(Ten(), lambda index, key: seen.append((index, key)), size=4, seed=0)
    for part in range(5):
        assert samples[part] == ([None] * 4, {})
    first, second = [i for i, _ in seen[:10]], [i for i, _ in seen[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert len({key for _, key in seen}) == 20


def test_crops_drawn_together_are_those_drawn_one_by_one() -> None:
    """Also where one cannot be decoded, and another is read in its place."""

    class Broken(Ten):
        def image(self, index: int) -> Tensor:
            if index == 3:
                raise BadImage("broken")
            return super().image(index)

    crops = Crops(Broken(), "class", TrainTransform((16, 16), flip=True))
    together = Samples(crops.source, crops, size=10, seed=0)
    alone = Samples(crops.source, lambda index, key: crops(index, key), size=10, seed=0)
    for part in range(2):
        (found, bad), (wanted, _) = together[part], alone[part]
        assert bad == {"3": "broken"}
        assert [one.label for one in found] == [one.label for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one.image_CHW, other.image_CHW)


def test_an_epoch_may_leave_out_what_fills_no_step() -> None:
    seen: list[int] = []
    samples = Samples(Ten(), lambda index, _: seen.append(index), size=4, seed=0, epoch=8)
    whole = Samples(Ten(), lambda index, _: seen.append(index), size=10, seed=0)
    for part in range(4):
        samples[part]
    for epoch in range(2):
        whole[epoch]
    assert seen[:8] == seen[16:24]
    assert seen[8:16] == seen[26:34]


def test_a_part_of_many_images_is_few_tensors_between_processes() -> None:
    """1,024 open files are the usual limit, and each tensor on its way takes one."""

    class Many(Ten):
        def __len__(self) -> int:
            return 200

    def read(index: int, key: int) -> LabelledImage:
        return LabelledImage(torch.full((3, 2, 2), index, dtype=torch.uint8), index)

    samples = Samples(Many(), read, size=200, seed=0, join=stacked)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, hard))
    try:
        parts = list(read_ahead(samples.__getitem__, range(4), 2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for (images_BCHW, label_B), bad in parts:
        assert bad == {}
        assert sorted(label_B.tolist()) == list(range(200))
        assert torch.equal(images_BCHW[:, 0, 0, 0].long(), label_B)


def test_rows_in_memory_come_once_an_epoch_the_last_batch_being_smaller() -> None:
    rows = Shuffled(10, 4, seed=0)
    batches = [rows[step][0].tolist() for step in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = [*chain(*batches[:3])], [*chain(*batches[3:])]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


class Probe(nn.Module):
    """A head on a backbone that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny_backbone().requires_grad_(False)
        self.head = nn.Linear(self.backbone.width, 1)

    def losses(self, samples: list[Tensor]) -> dict[str, Tensor]:
        assert self.training
        assert not self.backbone.training
        return {"loss": self.head(self.backbone(torch.stack(samples)).cls_BD).square().mean()}


def test_a_frozen_backbone_stays_as_it_is_and_is_not_saved(tmp_path: Path) -> None:
    model, recipe, before = Probe(), replace(RECIPE, steps=2), Probe().backbone.state_dict()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0)
    for steps in (1, None):
        place = Place(tmp_path, console=QUIET, resume=True, stop_after=steps)
        parts = place.parts_of(Ten(), read, recipe)
        with pytest.raises(Stopped) if steps else nullcontext():
            fit(model, optimizer, recipe, parts, model.losses, place, place.start())
            assert not model.backbone.training
    assert_equal(model.backbone.state_dict(), before)
    saved = load_file(tmp_path / "checkpoints" / "last" / "model.safetensors")
    assert saved.keys() == trained_state(model).keys() == {"head.weight", "head.bias"}


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = Model(tiny_backbone())
    fit_on_ten(model, read, model.losses, Place(console=QUIET), None)
    assert list(tmp_path.iterdir()) == []


def test_bad_images_are_replaced_and_named(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def reader(index: int, key: int) -> Tensor:
        if index in (2, 7):
            raise BadImage("torn")
        seen.append((index, key))
        return read(index, key)

    torch.manual_seed(0)
    model = Model(tiny_backbone())
    place = Place(tmp_path, {}, console=QUIET)
    bad = fit_on_ten(model, reader, model.losses, place, None)
    assert bad == {"2": "torn", "7": "torn"}
    assert len(seen) == len(set(seen)) == RECIPE.steps * RECIPE.batch_size
    lines = (tmp_path / "bad_files.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in lines} == {"2", "7"}

    place = replace(place, folder=tmp_path / "few", max_bad=0.1)
    with pytest.raises(RunError, match=r"2 of 10 training images .* more than max_bad=0.1 allows"):
        fit_on_ten(model, reader, model.losses, place, place.start())
    lines = (tmp_path / "few/bad_files.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in lines} == {"2", "7"}

    def broken(index: int, key: int) -> Tensor:
        raise BadImage("torn")

    with pytest.raises(
        RunError, match=r"step 0: 9 consecutive images cannot be decoded, such as .: torn"
    ):
        trained(tmp_path / "none", reader=broken)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_set_is_read_once_in_its_order(workers: int) -> None:
    def reader(index: int) -> int:
        if index == 4:
            raise BadImage("torn")
        return 10 * index

    bad = {"before": "torn too"}
    found = list(in_order(Ten(), reader, workers, bad, QUIET, Ranks(60)))
    assert found == [(i, 10 * i) for i in range(10) if i != 4]
    assert bad == {"before": "torn too", "4": "torn"}


def test_a_loss_that_is_not_finite_ends_it_before_anything_is_saved(tmp_path: Path) -> None:
    recipe = Recipe(**{**RECIPE.__dict__, "lr": 1e30, "clip": None})
    with pytest.raises(RunError, match="non-finite at step"):
        trained(tmp_path, recipe)
    assert not (tmp_path / "checkpoints").exists()


def test_schedules_rise_and_fall_as_they_say() -> None:
    poly = Recipe(10, 1, 2.0, 0.0, 2, "poly")
    assert [poly.lr_at(step) for step in range(10)] == pytest.approx(
        [1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]
    )
    cosine = Recipe(10, 1, 2.0, 0.0, 2, "cosine", final_lr=0.5)
    assert cosine.lr_at(2) == 2.0
    assert cosine.lr_at(6) == pytest.approx(1.25)
    assert cosine.lr_at(10) == pytest.approx(0.5)
    stepped = Recipe(10, 1, 2.0, schedule="milestones", milestones=(2, 5))
    assert [stepped.lr_at(step) for step in (0, 1, 2, 4, 5, 9)] == pytest.approx(
        [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]
    )


@pytest.mark.parametrize("spec", ["own", "timm:test_vit"])
def test_lower_layers_learn_slower_and_vectors_do_not_decay(spec: str) -> None:
    backbone = tiny_backbone() if spec == "own" else open_backbone(spec, trainable=True)
    model = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(backbone.width, 3)})
    recipe = Recipe(1, 1, 1.0, 0.05, 0, "cosine", layer_decay=0.5)
    found = {
        id(p): (group["scale"], group["weight_decay"])
        for group in parameter_groups(model, backbone, recipe)
        for p in group["params"]
    }
    trained_parameters = [p for p in model.parameters() if p.requires_grad]
    assert found.keys() == {id(p) for p in trained_parameters}
    depth = backbone.depth
    for name, parameter in model.named_parameters():
        scale, decay = found[id(parameter)]
        number = depth + 1
        if name.startswith("backbone.stem"):
            number = 0
        elif name.startswith("backbone.blocks."):
            number = 1 + int(name.split(".")[2])
        assert scale == 0.5 ** (depth + 1 - number), name
        decays = parameter.ndim > 1 and "token" not in name and "pos_embed" not in name
        assert decay == (0.05 if decays else 0.0), name
