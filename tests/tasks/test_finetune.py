"""Fine-tuning follows MAE's recipe and is reproducible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dseqjepa.data.images import Subset
from dseqjepa.data.miniatures.export import export
from dseqjepa.data.scenes import Scenes
from dseqjepa.errors import InputError, Stopped
from dseqjepa.tasks import finetune
from dseqjepa.tasks.config import FinetuneConfig
from dseqjepa.tasks.finetune import Augment, Classifier, MixedLoss, Sizes, evaluate
from dseqjepa.tasks.reading import LabelledImage, stacked
from dseqjepa.tasks.run import run_task
from tests.tasks.dense_data import tiny_backbone
from tests.tasks.jobs import job_of, stop_after

QUICK = ["preset=quick", "epochs=1", "batch_size=8", "warmup_epochs=0"]
TRAIN = Scenes(24, size=32, seed=0, split="train")
TEST = Scenes(20, size=32, seed=0, split="val")


def config(*settings: str) -> FinetuneConfig:
    return FinetuneConfig.from_settings([*QUICK, *settings])


def full(*settings: str) -> FinetuneConfig:
    return FinetuneConfig.from_settings([*settings])


@pytest.mark.parametrize("recipe", ["quick", "full"])
def test_the_same_seed_gives_the_same_numbers_to_the_last_digit(
    tmp_path: Path, recipe: str
) -> None:
    """With every kind of randomness that the full recipe has."""
    settings = config() if recipe == "quick" else full("epochs=2", "batch_size=8")
    seen = []
    for name, workers in (("a", 0), ("b", 2)):
        torch.manual_seed(workers)
        run = settings.with_(workers=workers)
        found = evaluate(job_of(tmp_path, TRAIN, TEST, name), run)
        lines = (tmp_path / f"{name}-training" / "metrics.jsonl").read_text()
        seen.append((found.metrics, lines))
    assert seen[0] == seen[1]


def test_a_stopped_evaluation_resumes_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = full("epochs=2", "batch_size=8")
    evaluate(job_of(tmp_path, TRAIN, TEST, "whole"), settings)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            evaluate(job_of(tmp_path, TRAIN, TEST, "cut"), settings)
    evaluate(job_of(tmp_path, TRAIN, TEST, "cut", resume=True), settings)
    weights = [
        (tmp_path / f"{name}-training" / "checkpoints" / "last" / "model.safetensors").read_bytes()
        for name in ("whole", "cut")
    ]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_what_is_trained_can_be_kept(tmp_path: Path, pooling: str) -> None:
    evaluate(job_of(tmp_path, TRAIN, TEST), config(f"pooling={pooling}"))
    assert (tmp_path / "result-training" / "checkpoints" / "last" / "model.safetensors").exists()


def test_parts_of_one_image_are_not_mixed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mixup and cutmix need at least two images"):
        evaluate(job_of(tmp_path, TRAIN, TEST), full("batch_size=8", "accumulate=8"))
    assert not any(tmp_path.iterdir())


def test_it_learns_what_it_is_shown(tmp_path: Path) -> None:
    few = Subset(TRAIN, torch.arange(12).numpy())
    settings = config("epochs=120", "lr=0.003", "crop_scale=[1,1]", "flip=false", "layer_decay=1",
                      "drop_path=0", "label_smoothing=0")  # fmt: skip
    found = evaluate(job_of(tmp_path, few, few), settings)
    assert found.metrics["accuracy"].value > 90
    low, high = found.metrics["accuracy"][1:]
    assert low is not None
    assert high is not None
    assert low <= found.metrics["accuracy"].value <= high


def test_a_constant_classifier_has_its_class_as_often_as_it_occurs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def constant(_model: Classifier, images_BCHW: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(images_BCHW),), 3), 10).float()

    monkeypatch.setattr(
        finetune, "MixedLoss", lambda *_: lambda *_s: {"loss": torch.zeros((), requires_grad=True)}
    )
    monkeypatch.setattr(Classifier, "forward", constant)
    found = evaluate(job_of(tmp_path, TRAIN, TEST), config())
    share = 100 * float((TEST.labels["class"] == 3).mean())
    assert found.metrics["accuracy"].value == pytest.approx(share)


def test_the_full_recipe_is_maes() -> None:
    settings = full()
    wanted = {
        "weight_decay": 0.05, "batch_size": 1024, "warmup_epochs": 5, "mixup": 0.8, "cutmix": 1.0,
        "label_smoothing": 0.1, "rand_augment": 9, "erase": 0.25, "final_lr": 1e-6,
        "crop_scale": (0.08, 1.0), "flip": True, "pooling": "mean",
    }  # fmt: skip
    assert {key: getattr(settings, key) for key in wanted} == wanted
    assert Sizes.of(12) == Sizes(100, 5e-4, 0.65, 0.1)
    assert Sizes.of(24) == Sizes(50, 1e-3, 0.75, 0.2)
    assert Sizes.of(32) == Sizes(50, 1e-3, 0.75, 0.3)


def test_the_result_says_what_auto_came_to(tmp_path: Path) -> None:
    found = evaluate(job_of(tmp_path, TRAIN, TEST), full("epochs=1", "batch_size=8"))
    assert found.protocol["lr"] == pytest.approx(5e-4 * 8 / 256)
    assert found.protocol["layer_decay"] == 0.65
    assert found.protocol["drop_path"] == 0.1
    assert (found.n_train, found.n_test, found.n_bad) == (24, 20, 0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_what_it_says(pooling: str) -> None:
    backbone = tiny_backbone()
    model = Classifier(backbone, 10, pooling, 0.0).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.stack([TRAIN.image(i) for i in range(3)])
    with torch.no_grad():
        encoded = backbone(images)
        x_BLD, _ = backbone.embed(images)
        for block in backbone.blocks:
            x_BLD = block(x_BLD)
        mean_BD = F.layer_norm(x_BLD[:, 1:].mean(1), (backbone.width,), eps=1e-6)
        pooled_BD = {"mean": mean_BD, "cls": encoded.cls_BD}[pooling]
        assert torch.allclose(model(images), model.head(pooled_BD), atol=1e-6)
    assert model(images).shape == (3, 10)


def test_every_trained_parameter_learns() -> None:
    for pooling in ("mean", "cls"):
        model = Classifier(tiny_backbone(), 10, pooling, 0.0)
        model(torch.stack([TRAIN.image(0)])).square().sum().backward()
        still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert still == []


def test_an_augmentation_is_a_function_of_its_key() -> None:
    augment = Augment(full(), tiny_backbone())
    torch.manual_seed(0)
    first = augment(TRAIN, "class", 2, 7)
    torch.manual_seed(1)
    again = augment(TRAIN, "class", 2, 7)
    assert torch.equal(first.image_CHW, again.image_CHW)
    assert first.label == TRAIN.labels["class"][2]
    assert not torch.equal(first.image_CHW, augment(TRAIN, "class", 2, 8).image_CHW)


def test_the_loss_of_what_is_not_mixed_is_smoothed_cross_entropy() -> None:
    model = Classifier(tiny_backbone(), 10, "mean", 0.0).eval()
    torch.nn.init.normal_(model.head.weight)
    samples = [LabelledImage(TRAIN.image(i), int(TRAIN.labels["class"][i])) for i in range(6)]
    label_B = torch.tensor([sample.label for sample in samples])
    logits_BK = model(torch.stack([sample.image_CHW for sample in samples]))
    for smoothing in (0.0, 0.1):
        settings = config(f"label_smoothing={smoothing}")
        (loss,) = MixedLoss(settings, 10)(model, stacked(samples)).values()
        assert torch.allclose(loss, F.cross_entropy(logits_BK, label_B, label_smoothing=smoothing))


def test_mixed_images_have_mixed_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one class each of two pictures: the part of a picture is that of its class."""
    model = Classifier(tiny_backbone(), 10, "mean", 0.0)
    model.backbone.mean, model.backbone.std = (0.0,) * 3, (1 / 255,) * 3
    seen: list[Tensor] = []
    targets: list[Tensor] = []

    def forward(images_BCHW: Tensor) -> Tensor:
        seen.append(images_BCHW)
        return torch.zeros(len(images_BCHW), 10)

    def entropy(_logits: Tensor, target: Tensor, **_settings: float) -> Tensor:
        targets.append(target)
        return torch.zeros(())

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(finetune.F, "cross_entropy", entropy)
    samples = [
        LabelledImage(torch.full((3, 32, 32), 100 * (k % 2), dtype=torch.uint8), k % 2)
        for k in range(8)
    ]
    kinds = set()
    for seed in range(12):
        torch.manual_seed(seed)
        MixedLoss(full("erase=0"), 10)(model, stacked(samples))
        share_B = seen[-1].mean((1, 2, 3)) / 100
        assert torch.allclose(targets[-1][:, 1], share_B, atol=1e-4)
        assert torch.allclose(targets[-1].sum(1), torch.ones(8))
        mixed = (seen[-1] > 1) & (seen[-1] < 99)
        if ((share_B > 0.01) & (share_B < 0.99)).any():
            kinds.add("mixup" if mixed.any() else "cutmix")
    assert kinds == {"mixup", "cutmix"}


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels for task 'species'"):
        evaluate(job_of(tmp_path, TRAIN, TEST), config("task=species"))
    job = job_of(tmp_path, TRAIN, TEST)
    job.backbone.has_cls = False
    with pytest.raises(InputError, match=r"has no \[CLS\]: use pooling=mean"):
        evaluate(job, config("pooling=cls"))
    assert not any(tmp_path.iterdir())


def test_the_command_writes_json_of_the_backbone_as_it_was(tmp_path: Path) -> None:
    """The digest is that of the weights before they are trained: the same for any task."""
    from dseqjepa.tasks.backbone import open_backbone

    spec, out = "random:ijepa_vitt_demo", tmp_path / "fine.json"
    export("pets", tmp_path / "pets", size=64, count=10, val_count=10, seed=0)
    run_task("finetune", spec, config(), data=f"pets:{tmp_path / 'pets'}", out=out)
    values = json.loads(out.read_text())
    assert values["backbone"]["digest"] == open_backbone(spec).digest()
    assert values["metrics"]["accuracy"]["low"] <= values["metrics"]["accuracy"]["high"]
    assert values["preset"] == "quick"
    with pytest.raises(InputError, match="has no transformer blocks to train"):
        run_task("finetune", "pixels", config(), data="scenes", out=tmp_path / "pixels.json")
