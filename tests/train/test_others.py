"""Models of other libraries come in exactly, or are read through their own library, or are refused
by what does not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from dseqjepa.commands import ImportConfig
from dseqjepa.data.images import ImageFolder
from dseqjepa.data.transforms import EvalTransform
from dseqjepa.errors import InputError
from dseqjepa.tasks.backbone import open_backbone
from dseqjepa.train.checkpoint import load_encoder
from dseqjepa.train.foreign import import_encoder
from tests.test_cli import pictures, run

AUTO = ImportConfig()
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 56,
    "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-6,
}  # fmt: skip
FITTING: dict[str, tuple[str, dict[str, Any]]] = {
    "I-JEPA": ("IJepa", {}),
    "a rectangle": ("IJepa", {"image_size": [24, 40]}),
    "ViT": ("ViT", {}),
    "ViT without biases": ("ViT", {"qkv_bias": False}),
    "MAE": ("ViTMAE", {"mask_ratio": 0.75}),
    "DINOv2": ("Dinov2", {"mlp_ratio": 3, "layerscale_value": 0.3}),
}
FOREIGN: dict[str, tuple[str, dict[str, Any]]] = {
    "registers": ("Dinov2WithRegisters", {"mlp_ratio": 2}),
    "SwiGLU": ("Dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 2}),
    "DINOv3": ("DINOv3ViT", {"num_register_tokens": 3}),
    "DINOv3, gated": ("DINOv3ViT", {"use_gated_mlp": True}),
    "CLIP": ("CLIPVision", {}),
    "BEiT": ("Beit", {"use_relative_position_bias": True}),
}
WORDS = {
    "registers": r"register tokens \(embeddings.register_tokens\)",
    "SwiGLU": r"gated MLPs \(SwiGLU\)",
    "DINOv3": "register tokens .* and rotary positions",
    "DINOv3, gated": "rotary positions",
    "CLIP": "missing .*pos_embed|a norm before its blocks",
    "BEiT": "relative positions",
}


def written(folder: Path, kind: str, more: dict[str, Any]) -> nn.Module:
    """A folder as transformers writes it, every number of the model random."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **more})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    said = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    return model


def images(folder: Path, size: tuple[int, int] = (32, 32)) -> Tensor:
    """Real pictures, as bytes."""
    source = ImageFolder(pictures(folder))
    return torch.stack([EvalTransform(size)(source.image(index)) for index in range(3)])


def normal(images_BCHW: Tensor) -> Tensor:
    mean_C11, std_C11 = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images_BCHW / 255 - mean_C11) / std_C11


def close(found: Tensor, wanted: Tensor) -> None:
    """The same but for how bytes are normalised."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def theirs(model: Any, images_BCHW: Tensor, **more: Any) -> Any:
    if model.config.model_type == "vit_mae":
        model.config.mask_ratio = 0.0
        more["noise"] = torch.arange(16).expand(len(images_BCHW), -1).float()
    with torch.no_grad():
        return model(normal(images_BCHW), **more)


@pytest.mark.parametrize("name", FITTING)
def test_what_transformers_wrote_comes_in_exactly(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, more = FITTING[name]
    model = written(tmp_path / "theirs", kind, more)
    size = (24, 40) if name == "a rectangle" else (32, 32)
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "import", "theirs", "out=ours") == 0
    said = capsys.readouterr().out
    assert "compared with transformers on 4 rendered scenes: " in said
    assert "6, 4 heads" in said
    images_BCHW = images(tmp_path / "pictures", size)
    encoder = load_encoder(tmp_path / "ours")
    assert (encoder.mean, encoder.std, encoder.image_size) == (MEAN, STD, size)
    wanted_BLD = theirs(model, images_BCHW).last_hidden_state
    close(encoder.forward_features(images_BCHW), wanted_BLD)
    for spec in ("theirs", "hf:theirs"):  # without importing it
        backbone = open_backbone(spec)
        found = backbone(images_BCHW)
        prefix = wanted_BLD.shape[1] - found.patches_BND.shape[1]
        assert backbone.has_cls == (prefix == 1)
        close(found.patches_BND, wanted_BLD[:, prefix:])


def test_a_file_with_the_names_of_transformers_comes_in(tmp_path: Path) -> None:
    model = written(tmp_path / "theirs", "ViT", {})
    settings = ImportConfig(heads=4, mean=MEAN, std=STD)
    said: list[str] = []
    import_encoder(
        tmp_path / "theirs/model.safetensors", tmp_path / "ours", settings, tell=said.append
    )
    assert "compared with timm" in said[-1]
    images_BCHW = images(tmp_path / "pictures")
    found = load_encoder(tmp_path / "ours").forward_features(images_BCHW)
    wanted = theirs(model, images_BCHW).last_hidden_state
    close(found, wanted)


def test_a_model_in_several_files_comes_in(tmp_path: Path) -> None:
    model = written(tmp_path / "one", "ViT", {})
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")  # type: ignore[operator]
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    import_encoder(tmp_path / "theirs", tmp_path / "ours", ImportConfig(mean=MEAN, std=STD))
    images_BCHW = images(tmp_path / "pictures")
    found = load_encoder(tmp_path / "ours").forward_features(images_BCHW)
    wanted = theirs(model, images_BCHW).last_hidden_state
    close(found, wanted)


# timm, and the names that DINOv2's and MAE's own files share with it


def timm_vit(**more: Any) -> Any:
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    model = timm.models.VisionTransformer(num_classes=0, **{**shape, **more}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def timm_folder(folder: Path, model: Any, architecture: str, args: dict[str, Any]) -> None:
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": args,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": MEAN, "std": STD},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}


def test_what_timm_wrote_comes_in_exactly(tmp_path: Path) -> None:
    model = timm_vit(init_values=0.5)
    timm_folder(tmp_path / "theirs", model, "vit_base_patch16_224", {**ARGS, "init_values": 0.5})
    said: list[str] = []
    import_encoder(tmp_path / "theirs", tmp_path / "ours", AUTO, tell=said.append)
    assert said[-1].startswith("compared with timm on 4 rendered scenes: ")
    images_BCHW = images(tmp_path / "pictures")
    wanted_BLD = model.forward_features(normal(images_BCHW))
    found_BLD = load_encoder(tmp_path / "ours").forward_features(images_BCHW)
    torch.testing.assert_close(found_BLD, wanted_BLD, rtol=0, atol=5e-6)
    backbone = open_backbone(f"timm:{tmp_path}/theirs", trainable=True)  # nothing is fetched for it
    torch.testing.assert_close(
        backbone(images_BCHW).patches_BND, wanted_BLD[:, 1:], rtol=0, atol=5e-6
    )
    assert backbone.weights == "pretrained"
    assert backbone.untrained is not None
    assert backbone.untrained().digest() != backbone.digest()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_of_dinov2_or_mae_comes_in(wrapped: bool, tmp_path: Path) -> None:
    """DINOv2's has LayerScale and a mask token; MAE's a decoder, under `model`."""
    model = timm_vit(init_values=None if wrapped else 0.5)
    state = {**model.state_dict(), "mask_token": torch.zeros(1, 32)}
    if wrapped:
        state |= {"decoder_pos_embed": torch.zeros(1, 17, 8), "decoder_embed.bias": torch.zeros(8)}
    torch.save({"model": state} if wrapped else state, tmp_path / "x.pth")
    said: list[str] = []
    settings = ImportConfig(heads=4, mean=MEAN, std=STD)
    import_encoder(tmp_path / "x.pth", tmp_path / "ours", settings, tell=said.append)
    assert "mask_token" in said[0]
    assert "compared with timm" in said[1]
    images_BCHW = images(tmp_path / "pictures")
    found_BLD = load_encoder(tmp_path / "ours").forward_features(images_BCHW)
    wanted_BLD = model.forward_features(normal(images_BCHW))
    torch.testing.assert_close(found_BLD, wanted_BLD, rtol=0, atol=5e-6)


# What does not fit


@pytest.mark.parametrize("name", FOREIGN)
def test_what_does_not_fit_is_named_and_read_through_its_library(name: str, tmp_path: Path) -> None:
    kind, more = FOREIGN[name]
    model = written(tmp_path / "theirs", kind, more)
    with pytest.raises(InputError, match=WORDS[name]) as raised:
        import_encoder(tmp_path / "theirs", tmp_path / "ours", AUTO)
    assert f"hf:{tmp_path}/theirs" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "ours").exists()
    backbone = open_backbone(f"hf:{tmp_path}/theirs")
    images_BCHW = images(tmp_path / "pictures")
    found = backbone(images_BCHW, 3)
    wanted = theirs(model, images_BCHW, output_hidden_states=True)
    prefix = wanted.last_hidden_state.shape[1] - 16
    assert (backbone.prefix, backbone.patch_size, backbone.depth) == (prefix, 8, 6)
    close(found.patches_BND, wanted.last_hidden_state[:, prefix:])
    assert found.cls_BD is not None
    close(found.cls_BD, wanted.last_hidden_state[:, 0])
    assert len(found.layers) == 3
    norm = getattr(model, "layernorm", getattr(model, "norm", nn.Identity()))
    for layer, state in zip(found.layers[:-1], wanted.hidden_states[-3:-1], strict=True):
        close(layer, norm(state)[:, prefix:])
    with pytest.raises(InputError, match="has no transformer blocks to train"):
        open_backbone(f"hf:{tmp_path}/theirs", trainable=True)


@pytest.mark.parametrize(
    ("kind", "config", "side"),
    [
        ("ConvNext", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, 32),
        (
            "Swin",
            {
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [1, 2],
                "window_size": 4,
                "patch_size": 4,
            },
            8,
        ),
    ],
)
def test_stages_of_transformers_are_read_as_a_grid(
    kind: str, config: dict[str, Any], side: int, tmp_path: Path
) -> None:
    model = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(image_size=64, **config)
    )
    model.save_pretrained(tmp_path)
    said = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said), encoding="utf-8")
    backbone = open_backbone(f"hf:{tmp_path}")
    assert (backbone.patch_size, backbone.prefix) == (side, 0)
    images_BCHW = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    wanted = theirs(model.eval(), images_BCHW).last_hidden_state
    wanted_BND = wanted.flatten(2).mT if wanted.ndim == 4 else wanted
    close(backbone(images_BCHW).patches_BND, wanted_BND)


def test_settings_that_no_shape_shows_are_found_by_comparing(tmp_path: Path) -> None:
    for number, more in enumerate(({"hidden_act": "relu"}, {"layer_norm_eps": 0.1})):
        folder = tmp_path / str(number)
        written(folder, "ViT", more)
        said = f"differ by .* is allowed .*{next(iter(more))}={next(iter(more.values()))}"
        for opened in (
            lambda f=folder: import_encoder(f, tmp_path / "x", AUTO),
            lambda f=folder: open_backbone(str(f)),
        ):
            with pytest.raises(InputError, match=said):
                opened()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"reg_tokens": 2}, r"register tokens \(reg_token\)"),
        ({"mlp_layer": timm.layers.SwiGLUPacked}, r"gated MLPs \(SwiGLU\)"),
        ({"mlp_layer": timm.layers.SwiGLU}, r"gated MLPs \(SwiGLU\)"),
        ({"qk_norm": True}, "norms of queries and keys"),
        ({"pre_norm": True}, "a norm before its blocks"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    more: dict[str, Any], word: str, tmp_path: Path
) -> None:
    torch.save(timm_vit(**more).state_dict(), tmp_path / "x.pth")
    with pytest.raises(InputError, match=word + ".*hf:FOLDER or timm:FOLDER"):
        import_encoder(tmp_path / "x.pth", tmp_path / "ours", AUTO)


def test_registers_of_timm_are_read_through_timm(tmp_path: Path) -> None:
    model = timm_vit(reg_tokens=2, init_values=0.5)
    args = {**ARGS, "reg_tokens": 2, "init_values": 0.5}
    timm_folder(tmp_path / "theirs", model, "vit_base_patch16_224", args)
    with pytest.raises(InputError, match=f"register tokens.*timm:{tmp_path}/theirs"):
        import_encoder(tmp_path / "theirs", tmp_path / "ours", AUTO)
    images_BCHW = images(tmp_path / "pictures", (32, 48))
    backbone = open_backbone(f"timm:{tmp_path}/theirs", image_size=(32, 48), trainable=True)
    assert (backbone.prefix, backbone.has_cls) == (3, True)
    assert backbone(images_BCHW).patches_BND.shape == (3, 24, 32)


def test_a_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, said in (("broken", "{"), ("other", "{}"), ("gone", '{"model_type": "nothing"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(said, encoding="utf-8")
    written(tmp_path / "plain", "ViT", {})
    (tmp_path / "plain/preprocessor_config.json").unlink()
    written(tmp_path / "short", "ViT", {})
    state = {"layernorm.weight": torch.ones(32)}
    save_file(state, tmp_path / "short/model.safetensors", {"format": "pt"})
    for spec, message in {
        "hf:nowhere": "nowhere is no folder",
        f"hf:{tmp_path}/empty": "has no config.json",
        f"hf:{tmp_path}/broken": "cannot be read as JSON",
        f"hf:{tmp_path}/other": "names neither a model_type",
        f"hf:{tmp_path}/gone": "transformers cannot load .*: .*nothing",
        f"hf:{tmp_path}/plain": "preprocessor_config.json with image_mean and image_std",
        f"hf:{tmp_path}/short": "lacks weights",
        f"timm:{tmp_path}/plain": "is for transformers: use hf:",
    }.items():
        with pytest.raises(InputError, match=message) as raised:
            open_backbone(spec)
        assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="use `dseqjepa import` for files"):
        load_encoder(tmp_path / "plain")


HF_ODD: list[tuple[str, str, Any, str]] = [
    ("config.json", "num_attention_heads", 0, "num_attention_heads must be a whole number from 1"),
    ("config.json", "num_attention_heads", [2, 4], "found [2, 4]"),
    ("config.json", "image_size", [0], "image_size must be a side, or a height and a width"),
    ("config.json", "image_size", [32, 0], "image_size must be"),
    ("config.json", "image_size", True, "image_size must be"),
    ("preprocessor_config.json", "image_mean", ["a", 0, 0], "image_mean must be three finite"),
    ("preprocessor_config.json", "image_mean", [0.5], "image_mean must be three finite numbers"),
    ("preprocessor_config.json", "image_mean", [float("nan")] * 3, "image_mean must be"),
    ("preprocessor_config.json", "image_std", [0, 0, 0], "image_std must be three finite numbers"),
    ("preprocessor_config.json", "image_std", 1, "numbers above 0, found 1"),
]
TIMM_ODD: list[tuple[str, str, Any, str]] = [
    ("", "model_args", 3, "model_args must be an object, found 3"),
    ("", "model_args", None, "timm cannot make"),
    ("", "pretrained_cfg", [], "pretrained_cfg must be an object, found []"),
    ("model_args", "num_heads", 0, "model_args.num_heads must be a whole number from 1, found 0"),
    ("model_args", "img_size", "32", "model_args.img_size must be a side"),
    ("pretrained_cfg", "mean", ["a", 0, 0], "pretrained_cfg.mean must be three finite numbers"),
    ("pretrained_cfg", "std", [0, 0, 0], "pretrained_cfg.std must be three finite numbers above 0"),
]


@pytest.mark.parametrize(("file", "key", "value", "part"), HF_ODD)
def test_an_odd_setting_of_transformers_is_named(
    file: str,
    key: str,
    value: Any,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written(tmp_path / "theirs", "ViT", {})
    path = tmp_path / "theirs" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    monkeypatch.chdir(tmp_path)
    typed = [["import", "theirs", "out=ours"]]
    if file == "preprocessor_config.json":
        typed.append(["embed", "hf:theirs", "data=scenes", "size=4", "out=x.csv"])
    elif key == "image_size":  # transformers may refuse it first
        with pytest.raises(InputError):
            open_backbone("hf:theirs")
    capsys.readouterr()
    for words in typed:
        assert run(monkeypatch, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"theirs/{file}: " in line
        assert part in line
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(("section", "key", "value", "part"), TIMM_ODD)
def test_an_odd_setting_of_timm_is_named(
    section: str,
    key: str,
    value: Any,
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timm_folder(tmp_path / "theirs", timm_vit(), "vit_base_patch16_224", ARGS)
    path = tmp_path / "theirs/config.json"
    said = json.loads(path.read_text())
    (said[section] if section else said)[key] = value
    path.write_text(json.dumps(said))
    monkeypatch.chdir(tmp_path)
    for words in (
        ["import", "theirs", "out=ours"],
        ["export", "theirs", "--to", "timm", "--out", "ours"],
        ["embed", "timm:theirs", "data=scenes", "size=4", "out=x.csv"],
    ):
        assert run(monkeypatch, *words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert part in line or (words[0] == "embed" and "timm cannot make" in line)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_a_library_cannot_run_is_one_line(tmp_path: Path) -> None:
    written(tmp_path / "theirs", "ViT", {})
    path = tmp_path / "theirs/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_dropout_prob": "none"}))
    with pytest.raises(InputError, match="transformers cannot") as raised:
        import_encoder(tmp_path / "theirs", tmp_path / "ours", AUTO)
    assert "\n" not in str(raised.value)


def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "theirs", "ViT", {})
    torch.save(timm_vit().state_dict(), tmp_path / "x.pth")
    for name in ("transformers", "timm", "timm.models.vision_transformer"):
        monkeypatch.setitem(sys.modules, name, None)
    for opened in (
        lambda: open_backbone(f"hf:{tmp_path}/theirs"),
        lambda: import_encoder(tmp_path / "theirs", tmp_path / "ours", AUTO),
    ):
        with pytest.raises(InputError, match=r"pip install 'dseqjepa\[export\]'"):
            opened()
    with pytest.raises(InputError, match=r"pip install 'dseqjepa\[eval\]'"):
        open_backbone("timm:test_vit")
    assert not (tmp_path / "ours").exists()
    said: list[str] = []
    import_encoder(tmp_path / "x.pth", tmp_path / "ours", ImportConfig(heads=4), tell=said.append)
    assert said == ["not compared with timm, which is not installed"]


# Through every frozen evaluation


def test_a_foreign_model_goes_through_all_that_reads_frozen_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "theirs", "DINOv3ViT", {"num_hidden_layers": 2})
    small = {
        "knn": [], "linear": ["preset=quick", "sweep.features=[last,cls]", "sweep.epochs=2"],
        "lowshot": ["draws=2", "fraction=0.5", "sweep.epochs=2"],
        "attentive": ["preset=quick", "epochs=1"], "discovery": ["images=6"],
        "dense": ["preset=quick", "patches_seen=500", "bank=200"],
        "clevr": ["task=count", "epochs=1"],
    }  # fmt: skip
    pictures(tmp_path / "pictures")
    for task, more in small.items():
        of_pixels = task in ("discovery", "dense", "clevr")
        data = ["data=scenes", "size=24"] if of_pixels else ["data=pictures"]
        common = [*data, f"out={task}.json"]
        assert run(monkeypatch, "evaluate", task, "hf:theirs", *common, *more) == 0, task
        found = json.loads((tmp_path / f"{task}.json").read_text())
        assert found["backbone"]["name"] == "hf:theirs"
        if task == "discovery":
            mine, untrained = (
                {**row, "encoder": ""}
                for row in found["details"]["maps"]
                if row["encoder"] in ("hf:theirs", "untrained")
            )
            assert mine != untrained, "the folder's weights were taken for untrained ones"
        else:
            assert {"raw pixels", "untrained"} <= {row["encoder"] for row in found["results"]}
    assert run(monkeypatch, "evaluate", "finetune", "hf:theirs", "data=scenes", "out=f.json") == 2
    assert "has no transformer blocks to train" in capsys.readouterr().err
    assert run(monkeypatch, "embed", "hf:theirs", "pictures", "out=t.csv", "--neighbours", "2") == 0
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 13
