"""An imported encoder computes what the original computes, and nothing else is read."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dseqjepa.commands import ImportConfig
from dseqjepa.config import Config
from dseqjepa.errors import InputError
from dseqjepa.tasks.backbone import open_backbone
from dseqjepa.train.checkpoint import load_encoder
from dseqjepa.train.foreign import import_encoder
from tests.test_cli import contents, pictures, run
from tests.tiny import TINY, float_images

AUTO = ImportConfig()
WIDTH, DEPTH, PATCH, SIZE = 128, 3, 8, (32, 32)


def vit(seed: int, *, size: tuple[int, int] = SIZE, heads: int = 2, **more: Any) -> nn.Module:
    """timm's ViT, whose blocks have the names of I-JEPA's; every number is random."""
    torch.manual_seed(seed)
    settings = {"class_token": False, "global_pool": "", "num_classes": 0, **more}
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=size,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=heads,
        **settings,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def wrapped(model: nn.Module) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in model.state_dict().items()}


def jepa_file(path: Path, target: nn.Module, context: nn.Module) -> Path:
    """What facebookresearch's I-JEPA saves: `.pth.tar`, names as under data parallelism."""
    content = {
        "encoder": wrapped(context),
        "predictor": {"module.predictor_embed.weight": torch.zeros(4, WIDTH)},
        "target_encoder": wrapped(target),
        "opt": torch.optim.AdamW(context.parameters()).state_dict(),
        "scaler": None,
        "epoch": 300,
        "loss": 0.25,
        "batch_size": 128,
        "world_size": 16,
        "lr": 0.001,
    }
    torch.save(content, path)
    return path


def assert_same_features(out: Path, model: nn.Module, weights: str = "target", size=SIZE) -> None:
    encoder = load_encoder(out, weights=weights)
    images_BCHW = float_images(5, size)
    with torch.inference_mode():
        theirs_BLD = model.forward_features(images_BCHW)  # type: ignore[operator]
        ours = encoder(images_BCHW)
    prefix = theirs_BLD.shape[1] - ours.patches_BND.shape[1]
    torch.testing.assert_close(ours.patches_BND, theirs_BLD[:, prefix:], rtol=1e-4, atol=1e-4)
    assert (ours.cls_BD is None) == (prefix == 0)
    if ours.cls_BD is not None:
        torch.testing.assert_close(ours.cls_BD, theirs_BLD[:, 0], rtol=1e-4, atol=1e-4)


def test_ijepa_comes_in_with_both_encoders(tmp_path: Path) -> None:
    target, context = vit(0), vit(1)
    file = jepa_file(tmp_path / "jepa-ep300.pth.tar", target, context)
    config = import_encoder(file, tmp_path / "out", AUTO)
    assert (config.model.width, config.model.depth, config.model.heads) == (WIDTH, DEPTH, 2)
    assert (config.model.patch_size, config.data.image_size) == (PATCH, SIZE)
    assert not config.model.class_token
    assert config.method.name == "ijepa"
    assert_same_features(tmp_path / "out", target)
    assert_same_features(tmp_path / "out", context, "context")
    with pytest.raises(AssertionError):
        assert_same_features(tmp_path / "out", context)


@pytest.mark.parametrize("position_of_class", [False, True])
def test_the_release_comes_in_with_its_class_token(tmp_path: Path, position_of_class: bool) -> None:
    model = vit(0, class_token=True, no_embed_class=not position_of_class)
    assert model.pos_embed.shape[1] == 16 + position_of_class  # type: ignore[union-attr,index]
    file = jepa_file(tmp_path / "dseq.pth.tar", model, model)
    config = import_encoder(file, tmp_path / "out", AUTO)
    assert config.model.class_token
    assert config.method.name == "dseq"
    assert_same_features(tmp_path / "out", model)


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


SAVERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "plain.pth": torch.save,
    "legacy.pt": legacy,
    "half.pth": lambda state, path: torch.save({k: v.half() for k, v in state.items()}, path),
    "model.pth": lambda state, path: torch.save({"model": state, "epoch": 3}, path),
    "lightning.ckpt": lambda state, path: torch.save({"state_dict": state}, path),
    "backbone.pth": lambda state, path: torch.save(
        {f"module.backbone.{k}": v for k, v in state.items()}, path
    ),
    "weights.safetensors": save_file,
}


@pytest.mark.parametrize("name", SAVERS)
def test_the_state_dict_of_a_plain_vit_comes_in(tmp_path: Path, name: str) -> None:
    model = vit(0)
    if name.startswith("half"):
        model.load_state_dict({k: v.half() for k, v in model.state_dict().items()})
    SAVERS[name](model.state_dict(), tmp_path / name)
    import_encoder(tmp_path / name, tmp_path / "out", AUTO)
    assert_same_features(tmp_path / "out", model)
    assert_same_features(tmp_path / "out", model, "context")


def test_what_the_shapes_do_not_say_can_be_given(tmp_path: Path) -> None:
    model = vit(0, size=(16, 64), heads=4)
    torch.save(model.state_dict(), tmp_path / "wide.pth")
    with pytest.raises(InputError, match=r"16 positions .* does not match image_size=\[24, 64\]"):
        import_encoder(tmp_path / "wide.pth", tmp_path / "out", ImportConfig(image_size=(24, 64)))
    settings = ImportConfig(image_size=(16, 64), heads=4)
    config = import_encoder(tmp_path / "wide.pth", tmp_path / "out", settings)
    assert config.data.image_size == (16, 64)
    assert_same_features(tmp_path / "out", model, size=(16, 64))


@pytest.mark.parametrize(
    ("width", "depth", "heads"), [(384, 12, 6), (1280, 32, 16), (128, 4, 2), (192, 3, 3)]
)
def test_heads_are_those_of_the_named_size(
    tmp_path: Path, width: int, depth: int, heads: int
) -> None:
    from dseqjepa.train.foreign import _describe

    state = {
        "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16),
        "pos_embed": torch.zeros(1, 196, width),
        **{f"blocks.{i}.attn.qkv.weight": torch.zeros(1) for i in range(depth)},
    }
    config: Config = _describe(tmp_path, state, AUTO)
    assert (config.model.width, config.model.depth, config.model.heads) == (width, depth, heads)
    assert config.data.image_size == (224, 224)


def refused(tmp_path: Path, content: Any, settings: ImportConfig = AUTO) -> str:
    """What is said of a file; nothing is written."""
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(InputError) as caught:
        import_encoder(tmp_path / "file.pth", tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def test_every_key_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    state = vit(0).state_dict()
    del state["norm.weight"], state["blocks.1.mlp.fc1.bias"]
    state["neck.weight"] = torch.zeros(10, WIDTH)
    state["blocks.2.mlp.fc2.weight"] = torch.zeros(WIDTH, 300)
    said = refused(tmp_path, state)
    for part in (
        "missing norm.weight",
        "missing blocks.1.mlp.fc1.bias",
        "unknown neck.weight",
        "blocks.2.mlp.fc2.weight is (128, 300), expected (128, 512)",
    ):
        assert part in said


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    state = vit(0).state_dict()
    state["norm.bias"][3] = float("nan")
    state["norm.weight"] = torch.zeros(WIDTH, dtype=torch.int64)
    state["pos_embed"] = torch.zeros(1).expand(1, 1 << 40, WIDTH)
    said = refused(tmp_path, state)
    assert "norm.bias has non-finite values" in said
    assert "norm.weight is torch.int64" in said
    assert "pos_embed claims more bytes than the file has" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "holds no state dict: found list"),
        ({}, "holds no state dict: found dict"),
        ({"encoder": 3}, "file.pth holds no state dict: found int"),
        (
            {"a": torch.zeros(2)},
            "not a plain ViT with timm's names: missing patch_embed.proj.weight",
        ),
        (
            {
                "patch_embed.proj.weight": torch.zeros(8, 3),
                "pos_embed": torch.zeros(1, 4, 8),
                "blocks.0.attn.qkv.weight": torch.zeros(8),
            },
            "expected a patch kernel of 4 dimensions",
        ),
    ],
)
def test_what_is_no_encoder_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refused(tmp_path, content)


def plain(**changed: Tensor) -> dict[str, Tensor]:
    return {**vit(0).state_dict(), **{key.replace("__", "."): v for key, v in changed.items()}}


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "float8": (
        lambda: plain(norm__bias=torch.zeros(WIDTH).to(torch.float8_e4m3fn)),
        "norm.bias is torch.float8_e4m3fn",
    ),
    "meta": (lambda: plain(norm__bias=torch.zeros(WIDTH, device="meta")), "norm.bias has no"),
    "sparse": (lambda: plain(norm__bias=torch.zeros(WIDTH).to_sparse()), "norm.bias has no"),
    "zero patch": (
        lambda: plain(patch_embed__proj__weight=torch.zeros(WIDTH, 3, 0, 0)),
        "expected square patches with 3 channels",
    ),
    "no positions": (lambda: plain(pos_embed=torch.zeros(1, 0, WIDTH)), "expected square patches"),
    "very many": (lambda: {f"k{n}": torch.zeros(1) for n in range(5001)}, "holds 5001 tensors"),
}


@pytest.mark.parametrize("odd", ODD)
def test_tensors_that_hold_no_weights_are_refused(tmp_path: Path, odd: str) -> None:
    make, said = ODD[odd]
    assert said in refused(tmp_path, make())


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page in place of weights"),
        (b"<HTML>sign in</HTML>", "a web page in place of weights"),
    ],
)
def test_a_file_that_was_fetched_in_the_wrong_way_says_so(
    tmp_path: Path, ending: str, content: bytes, said: str
) -> None:
    (tmp_path / f"x.{ending}").write_bytes(content)
    with pytest.raises(InputError, match=said):
        import_encoder(tmp_path / f"x.{ending}", tmp_path / "out", AUTO)


def test_no_message_tells_to_run_the_file(tmp_path: Path) -> None:
    for n, content in enumerate((Touch(tmp_path / "executed"), {"model": nn.Linear(2, 2)})):
        torch.save(content, tmp_path / f"{n}.pth")
        with pytest.raises(InputError, match="no code in it was run") as raised:
            import_encoder(tmp_path / f"{n}.pth", tmp_path / "out", AUTO)
        assert "weights_only" not in str(raised.value)
        assert "safe_globals" not in str(raised.value)


# What stands beside an encoder


def test_a_classifier_is_left_out_and_named(tmp_path: Path) -> None:
    model = vit(1, num_classes=5, global_pool="token", class_token=True)
    torch.save({f"_orig_mod.{key}": v for key, v in model.state_dict().items()}, tmp_path / "x.pth")
    said: list[str] = []
    import_encoder(tmp_path / "x.pth", tmp_path / "out", AUTO, tell=said.append)
    assert said[0] == "left out, not part of an encoder: head.bias, head.weight"
    assert said[1].startswith("compared with timm on 4 rendered scenes: ")
    assert_same_features(tmp_path / "out", model)


def test_dino_comes_in_with_teacher_and_student(tmp_path: Path) -> None:
    teacher, student = vit(1, class_token=True), vit(2, class_token=True)
    content = {
        name: {f"module.backbone.{key}": v for key, v in model.state_dict().items()}
        | {"module.head.mlp.0.weight": torch.zeros(3)}
        for name, model in (("teacher", teacher), ("student", student))
    }
    torch.save({**content, "epoch": 3}, tmp_path / "x.pth")
    import_encoder(tmp_path / "x.pth", tmp_path / "out", AUTO)
    assert_same_features(tmp_path / "out", teacher, "target")
    assert_same_features(tmp_path / "out", student, "context")


def test_an_mlp_of_any_width_comes_in(tmp_path: Path) -> None:
    model = vit(1, mlp_ratio=48 / 11)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    config = import_encoder(tmp_path / "x.pth", tmp_path / "out", AUTO)
    assert config.model.mlp == 558
    assert_same_features(tmp_path / "out", model)


def test_images_are_normalised_as_the_encoder_was_trained(tmp_path: Path) -> None:
    model = vit(1)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    half = ImportConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    import_encoder(tmp_path / "x.pth", tmp_path / "out", half)
    images_BCHW = torch.randint(0, 256, (3, 3, *SIZE), dtype=torch.uint8)
    wanted = model.forward_features(images_BCHW / 127.5 - 1)  # type: ignore[operator]
    found = load_encoder(tmp_path / "out")(images_BCHW).patches_BND
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    backbone = open_backbone(str(tmp_path / "out"))
    torch.testing.assert_close(backbone(images_BCHW).patches_BND, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="std must be positive"):
        ImportConfig.from_settings(["std=[0.5,0,0.5]"])


@pytest.mark.parametrize("scale", [1.0, 255.0])
def test_float_images_that_are_not_normalised_are_refused(tmp_path: Path, scale: float) -> None:
    torch.save(vit(1).state_dict(), tmp_path / "x.pth")
    import_encoder(tmp_path / "x.pth", tmp_path / "out", AUTO)
    images_BCHW = torch.rand(2, 3, *SIZE) * scale
    for encoder in (load_encoder(tmp_path / "out"), open_backbone(str(tmp_path / "out"))):
        with pytest.raises(ValueError, match="expected normalized float images, found values"):
            encoder(images_BCHW)
        encoder(images_BCHW / scale * 4 - 2)
        encoder(torch.zeros(1, 3, *SIZE))


# Hostile files


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("saver", [torch.save, legacy])
def test_a_pickle_that_runs_something_runs_nothing(tmp_path: Path, saver: Any) -> None:
    executed = tmp_path / "executed"
    saver({**vit(0).state_dict(), "epoch": Touch(executed)}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"no code in it was run: .*GLOBAL .*posix\.system"):
        import_encoder(tmp_path / "evil.pth", tmp_path / "out", AUTO)
    assert not executed.exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)  # what it would have done
    assert executed.exists()


def test_an_archive_that_grows_or_climbs_out_is_refused(tmp_path: Path) -> None:
    torch.save(vit(0).state_dict(), tmp_path / "good.pth")
    for name, kind, member in (
        ("bomb.pth", zipfile.ZIP_DEFLATED, "good/data/999"),
        ("climber.pth", zipfile.ZIP_STORED, "../../outside"),
        ("absolute.pth", zipfile.ZIP_STORED, "/tmp/outside"),
    ):
        path = tmp_path / name
        path.write_bytes((tmp_path / "good.pth").read_bytes())
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(member, bytes(1 << 24), compress_type=kind)
        with pytest.raises(InputError, match="not an archive written by torch"):
            import_encoder(path, tmp_path / "out", AUTO)


@pytest.mark.parametrize("length", [0, 1, 100, 5000])
@pytest.mark.parametrize("saver", [torch.save, legacy])
def test_a_torn_file_is_refused(tmp_path: Path, saver: Any, length: int) -> None:
    path = tmp_path / "torn.pth"
    saver(vit(0).state_dict(), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match=r"torn\.pth was not read, and no code in it was run"):
        import_encoder(path, tmp_path / "out", AUTO)
    for name in ("random.pth", "random.safetensors"):
        (tmp_path / name).write_bytes(torch.randint(256, (length,)).to(torch.uint8).numpy())
        with pytest.raises(InputError, match="random"):
            import_encoder(tmp_path / name, tmp_path / "out", AUTO)


def test_the_command_imports_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = vit(0)
    jepa_file(tmp_path / "jepa.pth.tar", model, model)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Touch(tmp_path / "executed")))
    before = contents(tmp_path)
    for typed, said in {
        "import jepa.pth.tar": "out=DIR is missing",
        "import none.pth out=x": "none.pth does not exist",
        "import . out=x": ". has no config.json: expected what transformers or timm wrote",
        "import jepa.pth.tar out=x head=2": "unknown key 'head'; did you mean 'heads'?",
        "import jepa.pth.tar out=x heads=3": "model.width (128) must be a multiple of the heads",
        "import jepa.pth.tar out=x heads=0": "heads must be",
        "import jepa.pth.tar out=jepa.pth.tar": "is a file: give a folder",
        "import evil.pth out=x": "no code in it was run",
        "evaluate knn jepa.pth.tar data=scenes": "out=FILE.json is missing",
        "evaluate knn evil.pth data=scenes out=r.json": "no code in it was run",
        "pretrain vitt8_64 data=scenes out=x init_from=evil.pth": "use `dseqjepa import` for",
    }.items():
        assert run(monkeypatch, *typed.split()) == 2
        shown = capsys.readouterr()
        assert said in shown.err
        assert len(shown.err.splitlines()) == 1
        assert contents(tmp_path) == before
    assert run(monkeypatch, "import", "jepa.pth.tar", "out=x") == 0
    compared, _, said = capsys.readouterr().out.partition("\n")
    assert compared.startswith("compared with timm on 4 rendered scenes: ")
    assert said == (
        "imported to x: width 128, depth 3, 2 heads, patches of 8 px, 32 x 32 px, without [CLS]\n"
        "assumed: 2 heads, GELU, LayerNorm with epsilon 1e-6, and images normalized with mean "
        "[0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225]; override with heads=N, "
        "mean=[R,G,B] and std=[R,G,B]\n"
    )
    assert_same_features(tmp_path / "x", model)
    assert run(monkeypatch, "import", "jepa.pth.tar", "out=x") == 2
    assert run(monkeypatch, "import", "jepa.pth.tar", "out=x", "overwrite=true") == 0


def test_a_run_starts_from_an_import_and_none_resumes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pictures")
    model = vit(0)
    jepa_file(tmp_path / "jepa.pth.tar", model, model)
    import_encoder(tmp_path / "jepa.pth.tar", tmp_path / "imported", AUTO)
    shape = [f"model.width={WIDTH}", f"model.depth={DEPTH}", "model.heads=2"]
    same = [*TINY, "model.name=vit_base", *shape, "model.class_token=false"]
    same += ["optim.epochs=1", "optim.warmup_epochs=0", "checkpoint.keep=9"]
    typed = ["pretrain", "ijepa_vitt8_64", "data=pictures", *same]
    assert run(monkeypatch, *typed, "out=next", "init_from=imported") == 0
    assert "start: init_from" in capsys.readouterr().out
    assert_same_features(tmp_path / "next/checkpoints/step-00000000", model)
    assert run(monkeypatch, *typed, "out=imported", "resume=true") == 2
    assert "imported is an imported encoder, not a run: start a run with init_from=imported" in (
        capsys.readouterr().err
    )
    assert run(monkeypatch, *typed, "model.heads=4", "out=other", "init_from=imported") == 2
    assert "different encoder: model.heads 2 there, 4 here" in capsys.readouterr().err
