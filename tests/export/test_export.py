"""What leaves is what was trained: another library computes the same, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageOps

from dseqjepa.commands import ExportConfig
from dseqjepa.config import ENCODER_SIZES
from dseqjepa.data.images import ImageFolder
from dseqjepa.data.scenes import Scenes
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.export import check, formats, reader
from dseqjepa.export.check import compare
from dseqjepa.export.folders import hf_names, hf_settings, timm_settings, write_hf, write_timm
from dseqjepa.export.formats import CENTRE, FORMATS
from dseqjepa.export.traced import TracedEncoder, _resizing, write_torch
from dseqjepa.export.write import export_encoder
from dseqjepa.model.vit import VisionTransformer
from dseqjepa.train.checkpoint import Checkpoint, load_encoder
from tests.test_cli import contents, pictures, run
from tests.tiny import TINY

SMALL = [*TINY, "optim.epochs=1", "optim.warmup_epochs=0"]


def encoder(
    size: tuple[int, int] = (32, 32), *, class_token: bool = True, mlp: int = 0
) -> VisionTransformer:
    """Every number is random, as large as those of a trained encoder."""
    torch.manual_seed(0)
    made = VisionTransformer(
        image_size=size, patch_size=8, width=32, depth=2, heads=2, class_token=class_token, mlp=mlp,
        mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.requires_grad_(False)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other library is asked here: to start a process takes it seconds."""
    monkeypatch.setattr(
        check, "_run_reader", lambda form, folder, data: reader.compare(form, str(folder), data)
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a run on pictures, and what was measured of it."""
    here = tmp_path_factory.mktemp("export")
    pictures(here / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        wide = ["data=pictures", "out=run", *SMALL, "data.image_size=[24,40]"]
        assert run(patch, "pretrain", "dseq_vitt8_64", *wide) == 0
        assert run(patch, "evaluate", "knn", "run", "data=pictures", "preset=quick") == 0
        assert run(patch, "evaluate", "knn", "run", "data=pictures", "weights=context") == 0
    return here


@pytest.fixture
def here(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    here = tmp_path / "here"
    shutil.copytree(run_folder, here, symlinks=True)
    monkeypatch.chdir(here)
    return here


# The same features


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "made",
    [{"mlp": 87}, {"size": (24, 40), "class_token": False}],
    ids=["[CLS], an MLP of any width", "a rectangle without [CLS]"],
)
def test_an_export_computes_the_same(
    form: str, made: dict[str, object], tmp_path: Path, in_this_process: None
) -> None:
    ours = encoder(**made)  # type: ignore[arg-type]
    FORMATS[form].write(ours, tmp_path)
    found = compare(ours, form, tmp_path, Scenes(4, size=64, seed=0, split="val"))
    own = [difference for difference in found if difference.bound is not None]
    assert {difference.feature for difference in own} == (
        {"cls", "patches"} if ours.prefix else {"patches"}
    )
    assert all(difference.value < 5e-6 for difference in own)
    sizes = {difference.image_size for difference in found}
    assert len(sizes) == (1 if form == "hf" and ours.grid[0] != ours.grid[1] else 2)


@pytest.mark.parametrize("form", FORMATS)
def test_the_largest_width_leaves_in_every_format(
    form: str, tmp_path: Path, in_this_process: None
) -> None:
    """One block of a ViT-H/14 on a rectangle, whose grid is odd."""
    width, _, heads = ENCODER_SIZES["vit_huge"]
    torch.manual_seed(0)
    ours = VisionTransformer(
        image_size=(42, 70), patch_size=14, width=width, depth=1, heads=heads, class_token=True
    )
    ours.eval().requires_grad_(False)
    FORMATS[form].write(ours, tmp_path)
    found = compare(ours, form, tmp_path, Scenes(4, size=70, seed=0, split="val"))
    assert all(difference.value < 1e-5 for difference in found if difference.bound is not None)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("name", ENCODER_SIZES)
def test_every_size_has_the_tensors_that_others_build_of_its_settings(
    name: str, class_token: bool
) -> None:
    """The whole depth, in shapes without values."""
    import timm
    import transformers

    width, depth, heads = ENCODER_SIZES[name]
    with torch.device("meta"):
        ours = VisionTransformer(
            image_size=(112, 112), patch_size=14, width=width, depth=depth, heads=heads,
            class_token=class_token,
        )  # fmt: skip
        config = transformers.AutoConfig.for_model(**hf_settings(ours))
        model = transformers.AutoModel.from_config(config)
        told = timm_settings(ours)
        theirs = timm.create_model(told["architecture"], num_classes=0, **told["model_args"])
    assert type(model).__name__ == ("ViTModel" if class_token else "IJepaModel")
    assert config.num_attention_heads == theirs.blocks[0].attn.num_heads == heads
    written = sorted(tuple(value.shape) for value in hf_names(ours).values())
    assert written == sorted(tuple(value.shape) for value in model.state_dict().values())
    shapes = [
        {key: value.shape for key, value in each.state_dict().items()} for each in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("form", FORMATS)
def test_the_command_compares_in_a_process_of_its_own(
    form: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(here))  # is not looked into
    assert run(monkeypatch, "export", "run", "--to", form, "--out", f"new/{form}") == 0
    said = capsys.readouterr().out
    assert f"compared with {FORMATS[form].library} in a separate process" in said
    assert re.search(r"  patches at 24 x 40 px: \d\.\de-0\d \(allowed: \S+\)\n", said)
    assert said.endswith(f"written: new/{form}\n")
    assert [path.name for path in (here / "new").iterdir()] == [form]
    card = (here / "new" / form / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shutil.copy(here / "pictures/a/0.png", here / "new" / form / "picture.jpg")
    monkeypatch.chdir(here / "new" / form)
    names: dict[str, object] = {}
    exec(code, names)
    count = 15 + (form in ("hf", "timm"))
    assert tuple(names["features"].shape) == (1, count, 32)  # type: ignore[attr-defined]


def test_weights_at_another_size_are_those_of_the_context_encoder(
    here: Path, in_this_process: None
) -> None:
    settings = ExportConfig(weights="context", image_size=(48, 48))
    export_encoder("run", "timm", here / "out", settings, data="pictures")
    ours = load_encoder(here / "run", weights="context")
    images_BCHW = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    import timm

    theirs = timm.create_model(f"local-dir:{here / 'out'}", pretrained=True).eval()
    assert tuple(theirs.pos_embed.shape) == (1, 37, 32)
    found = theirs.forward_features(ours.normalized(images_BCHW))[:, 1:]
    torch.testing.assert_close(found, ours(images_BCHW).patches_BND, rtol=0, atol=1e-5)


def test_images_are_prepared_as_an_evaluation_prepares_them(here: Path) -> None:
    """By the image processor, and by timm's transform: a byte's rounding apart."""
    import timm
    from transformers import AutoImageProcessor

    ours = encoder((32, 32))
    for name, write in (("hf", write_hf), ("timm", write_timm)):
        (here / name).mkdir()
        write(ours, here / name)
    processor = AutoImageProcessor.from_pretrained(here / "hf")
    model = timm.create_model(f"local-dir:{here / 'timm'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    source = ImageFolder(here / "pictures")
    for index in range(3):
        wanted_CHW = ours.normalized(EvalTransform((32, 32))(source.image(index))[None])[0]
        picture = Image.open(source.path(index)).convert("RGB")
        found_CHW = processor(picture, return_tensors="pt")["pixel_values"][0]
        for found in (found_CHW, transform(picture)):
            assert found.shape == wanted_CHW.shape
            assert float((found - wanted_CHW).abs().max()) < 1.5 / 255 / min(ours.std)


def test_the_centre_that_a_card_cuts_is_that_of_an_evaluation(tmp_path: Path) -> None:
    ramp_HW = np.add.outer(np.arange(90), np.arange(120)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "picture.jpg"
    Image.fromarray(ramp_HW).convert("RGB").save(path, quality=98, exif=exif)
    wanted_CHW = EvalTransform((32, 32))(ImageFolder(tmp_path).image(0)).float()
    names = {"Image": Image, "ImageOps": ImageOps}
    code = CENTRE.format(width=32, height=32).replace("picture.jpg", str(path))
    found_HWC = np.asarray(eval(code, names))
    assert np.abs(found_HWC.transpose(2, 0, 1) - wanted_CHW.numpy()).max() < 3


@pytest.mark.parametrize(("old", "new"), [(4, 4), (4, 7), (16, 9), (5, 2), (16, 17), (1, 3)])
def test_positions_are_brought_to_a_grid_as_torch_interpolates(old: int, new: int) -> None:
    values_1CHW = torch.randn(1, 3, old, 6)
    wanted_1CHW = F.interpolate(values_1CHW, size=(new, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(_resizing(old, new) @ values_1CHW, wanted_1CHW)


def test_the_traced_encoder_shares_the_weights_and_stays_in_training(tmp_path: Path) -> None:
    ours = encoder().train()
    write_torch(ours, tmp_path)
    assert all(part.training for part in ours.modules())
    traced = TracedEncoder(ours)
    assert {id(p) for p in traced.parameters()} == {id(p) for p in ours.parameters()}
    assert "multiples of 8" in traced.about
    assert "cls, patches" in traced.about


# The card


def test_the_card_says_what_is_known(here: Path, in_this_process: None) -> None:
    export_encoder("run", "hf", here / "out", ExportConfig())
    card = (here / "out/README.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "unknown"
    assert "choose one: https" in front
    assert values["library_name"] == "transformers"
    assert values["pipeline_tag"] == "image-feature-extraction"
    state = json.loads((here / "run/checkpoints/last/state.json").read_text())
    for part in (
        "| preset | dseq_vitt8_64 |",
        "| steps | 1 of 1, 8 images each |",
        f"| data | 12 images, fingerprint {state['data_fingerprint'][:16]} |",
        "kNN accuracy, class, %, quick: accuracy",
        "test images, 95 % interval: bootstrap over test images",
        "interpolate_pos_encoding=True",
        "without keeping their aspect ratio",
        "images of the training data",
    ):
        assert part in body, part
    assert body.count("kNN accuracy") == 1, "that of the context encoder is of other weights"
    assert str(here) not in card
    export_encoder("run", "hf", here / "context", ExportConfig(weights="context"))
    card = (here / "context/README.md").read_text(encoding="utf-8")
    assert card.count("kNN accuracy") == 1
    assert ", quick" not in card


def test_a_file_of_another_project_leaves_as_well(here: Path, in_this_process: None) -> None:
    torch.save(encoder(class_token=False).state_dict(), here / "secret-name.pth")
    said: list[str] = []
    export_encoder("secret-name.pth", "timm", here / "out", ExportConfig(), tell=said.append)
    assert "rendered scenes" in said[0]
    card = (here / "out/README.md").read_text(encoding="utf-8")
    assert "| origin | a weights file of another project |" in card
    assert "None yet; run `dseqjepa evaluate`" in card


def test_what_is_untrained_says_so(here: Path, in_this_process: None) -> None:
    said: list[str] = []
    settings = ExportConfig(image_size=(16, 16))
    export_encoder(
        "random:vitt8_64", "timm", here / "out", settings, data="pictures", tell=said.append
    )
    assert "on images of a data set named by data=" in said[0]
    card = (here / "out/README.md").read_text(encoding="utf-8")
    assert "| origin | untrained: random weights of vitt8_64, seed 0 |" in card
    assert "weights file" not in card
    assert "private" not in card


def test_the_number_of_images_is_known_when_they_are_gone(
    here: Path, in_this_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(checkpoint: Checkpoint) -> str:
        raise InputError("cannot find the images")

    monkeypatch.setattr("dseqjepa.export.write.trained_on", gone)
    export_encoder("run", "hf", here / "out", ExportConfig())
    card = (here / "out/README.md").read_text(encoding="utf-8")
    assert "| data | 12 images, fingerprint " in card
    assert "images of rendered scenes" in card


# Nothing is left of what failed


@pytest.mark.parametrize(
    ("typed", "part"),
    {
        "export run --to hg --out x": "unknown format 'hg'; did you mean 'hf'?",
        "export run --to onxx --out x": "did you mean 'onnx'?",
        "export run --to hf": "Missing option '--out'",
        "export run --out x": "Missing option '--to'",
        "export run --to hf --out run": "--out run is not empty: give a new folder",
        "export run --to hf --out run/config.yaml": "is a file: give a folder",
        "export run --to hf --out run/config.yaml/x": "cannot be written to",
        "export gone --to hf --out x": "gone does not exist",
        "export pixels --to hf --out x": "pixels cannot be exported",
        "export timm:resnet18 --to hf --out x": "timm:resnet18 cannot be exported",
        "export run --to hf --out x size=3": "unknown key 'size'; did you mean 'image_size'?",
        "export run --to hf --out x image_size=30": "not a multiple of the patch size 8",
        "export run --to hf --out x data=gone": "no such folder: gone",
        "export random:vitt8_64 --to torch --out x image_size=8": "--to torch needs at least 2 "
        "patches per side, found 1 x 1: give image_size=[16, 16] or larger",
        "export run --to torch --out x image_size=[8,40]": "give image_size=[16, 40] or larger",
        "export run --to hf --out x weights=best": "weights must be 'target' or 'context'",
    }.items(),
)
def test_a_wrong_word_is_refused(
    typed: str,
    part: str,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(here)
    assert run(monkeypatch, *typed.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert contents(here) == before


def test_what_is_not_installed_and_what_cannot_be_written_to_is_said(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(here)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "find_spec", lambda name: None)
        assert run(monkeypatch, "export", "run", "--to", "onnx", "--out", "x") == 2
        said = capsys.readouterr().err
        assert "needs onnx, onnxscript, onnxruntime: pip install 'dseqjepa[export]'" in said
    assert run(monkeypatch, "export", "run", "--to", "torch", "--out", "/proc/new") == 2
    assert "--out /proc/new cannot be written to" in capsys.readouterr().err
    assert contents(here) == before


@pytest.mark.parametrize("empty", [False, True])
def test_an_export_that_differs_leaves_nothing(
    empty: bool,
    here: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def write(ours: VisionTransformer, folder: Path) -> None:
        other = encoder((24, 40))
        other.load_state_dict(ours.state_dict())
        other.blocks[1].mlp.fc2.bias += 1e-4 * torch.randn(32)  # type: ignore[union-attr,operator]
        write_timm(other, folder)

    monkeypatch.setitem(FORMATS, "timm", FORMATS["timm"]._replace(write=write))
    if empty:
        (here / "out").mkdir()
    before = contents(here)
    assert run(monkeypatch, "export", "run", "--to", "timm", "--out", "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "export discarded: in timm its features differ from the encoder" in line
    assert contents(here) == before


def test_an_export_that_cannot_be_loaded_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(ours: VisionTransformer, folder: Path) -> None:
        (folder / "model.onnx").write_bytes(b"nothing")

    monkeypatch.setitem(FORMATS, "onnx", FORMATS["onnx"]._replace(write=write))
    before = contents(here)
    assert run(monkeypatch, "export", "run", "--to", "onnx", "--out", "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "onnxruntime cannot load it (" in line
    assert contents(here) == before
