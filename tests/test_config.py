"""A config is closed, frozen, checked as a whole, and survives a round trip through YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dseqjepa.config import METHODS, Config, differences, flattened, validate
from dseqjepa.errors import InputError
from dseqjepa.methods.dseqjepa import DSeqConfig
from dseqjepa.methods.ijepa import IJepaConfig
from dseqjepa.presets import load_config, preset_names
from dseqjepa.tasks.config import TASKS

PRESETS = tuple(preset_names())
BASE = "dseq_vitb16_in1k"

CONTRACT = [
    f"{section}.{key}"
    for section, keys in {
        "data": "source size image_size batch_size workers cache max_bad",
        "model": "name patch_size class_token",
        "predictor": "width depth attention",
        "target": "blocks",
        "method": "name context prediction order max_steps loss_weighting prediction_weight "
        "regularizer regularizer_over regularizer_weight",
        "method.saliency": "kind query block",
        "method.regions": "source kind count min_area",
        "method.curriculum": "unit start end",
        "optim": "epochs lr warmup_epochs weight_decay",
        "ema": "start end",
        "checkpoint": "every_steps every_epochs keep",
        "runtime": "seed precision devices",
        "probe": "every_epochs",
        "log": "every_steps",
    }.items()
    for key in keys.split()
]
"""The keys that other tools rely on: none may go or change its name."""

CHOICES = {
    "method.context": ("prefix", "causal", "independent"),
    "method.prediction": ("sequential", "flat"),
    "method.order": ("saliency", "inverse", "random", "spatial"),
    "method.saliency.kind": ("cls_similarity", "cls_attention", "grad_cam", "rarity"),
    "method.regions.kind": ("components", "clusters", "bands"),
    "method.blocks.kind": ("blocks", "scattered"),
    "method.blocks.truncate": ("none", "batch"),
    "predictor.attention": ("joint", "cross"),
    "target.centring": ("none", "place"),
    "data.photometric_views": ("shared", "apart"),
    "method.saliency.query": ("state", "parameter"),
    "method.regions.source": ("ranked", "random"),
    "method.curriculum.unit": ("image", "region", "batch"),
    "method.loss_weighting": ("token", "region"),
    "method.regularizer": ("none", "sigreg"),
    "method.regularizer_over": ("pooled", "patches"),
}


def value(config: Config, key: str) -> Any:
    place: Any = config.model_dump()
    for part in key.split("."):
        place = place[part]
    return place


def error(*overrides: str, preset: str = BASE) -> str:
    with pytest.raises(InputError) as raised:
        load_config(preset, overrides)
    message = str(raised.value)
    assert "\n" not in message
    return message


# Presets and the contract


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert load_config(str(path)) == config
    assert yaml.safe_load(path.read_text()).keys() == Config.model_fields.keys()


@pytest.mark.parametrize("key", CONTRACT)
def test_a_key_of_the_contract_exists_and_can_be_set(key: str) -> None:
    kept = value(load_config(BASE), key)
    text = kept if isinstance(kept, str) else json.dumps(kept)
    assert value(load_config(BASE, [f"{key}={text}"]), key) == kept


@pytest.mark.parametrize(("key", "names"), CHOICES.items())
def test_every_choice_of_the_contract_is_taken_and_no_other(
    key: str, names: tuple[str, ...]
) -> None:
    for name in names:
        assert value(load_config(BASE, [f"{key}={name}"]), key) == name
    assert key in error(f"{key}=other")


@pytest.mark.parametrize(
    "backbone", sorted({name.partition("_")[2] for name in PRESETS} - {"vitb16_release"})
)
def test_presets_of_one_backbone_differ_in_the_method_alone(backbone: str) -> None:
    configs = [load_config(f"{method}_{backbone}") for method in METHODS]
    for config, method in zip(configs, METHODS, strict=True):
        assert config.method.name == method
        assert {key.split(".")[0] for key in differences(configs[0], config)} <= {"method"}


def test_the_main_recipe_is_the_published_one() -> None:
    config = load_config(BASE)
    assert config.data.image_size == (224, 224)
    assert config.data.batch_size == 2048
    assert config.data.crop_scale == (0.3, 1.0)
    assert config.data.flip is False
    optim = config.optim
    assert (optim.epochs, optim.warmup_epochs) == (600, 15)
    assert (optim.start_lr, optim.lr, optim.final_lr) == (1e-4, 1e-3, 1e-6)
    assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
    assert (config.ema.start, config.ema.end) == (0.996, 1.0)
    assert config.runtime.precision == "bf16"
    assert (config.model.width, config.model.depth, config.model.heads) == (768, 12, 12)
    assert (config.model.patch_size, config.model.class_token) == (16, True)
    assert (config.predictor.width, config.predictor.depth) == (384, 6)
    method = config.method
    assert isinstance(method, DSeqConfig)
    assert (method.regions.count, method.regions.min_area) == (5, 0.15)
    assert (method.context, method.prediction, method.order) == ("prefix", "sequential", "saliency")
    assert (method.max_steps, method.context_lag) == (0, 0)
    assert (method.saliency.kind, method.saliency.query) == ("cls_similarity", "state")
    assert (method.regions.source, method.regions.kind) == ("ranked", "components")
    assert (method.prediction_weight, config.target.blocks) == (1, 1)
    curriculum = method.curriculum
    assert (curriculum.unit, curriculum.start, curriculum.end) == ("image", 0, 1)
    assert (method.loss_weighting, method.regularizer) == ("token", "none")
    blocks = method.blocks
    assert (blocks.targets, blocks.target_area) == (4, (0.15, 0.2))
    assert (blocks.target_aspect, blocks.context_area) == ((0.75, 1.5), (0.85, 1.0))


@pytest.mark.parametrize(
    ("name", "changed"),
    {
        "dseq_vitl16_in1k": {
            "model.name": "vit_large", "model.width": 1024, "model.depth": 24, "model.heads": 16,
            "predictor.depth": 12, "predictor.heads": 16,
        },
        "dseq_vith16_448_in1k": {
            "model.name": "vit_huge", "model.width": 1280, "model.depth": 32, "model.heads": 16,
            "predictor.depth": 12, "predictor.heads": 16,
            "optim.epochs": 300, "data.image_size": (448, 448),
        },
    }.items(),
)  # fmt: skip
def test_the_larger_recipes_change_the_size_and_the_length_alone(
    name: str, changed: dict[str, Any]
) -> None:
    found = differences(load_config(BASE), load_config(name))
    assert {key: new for key, (_, new) in found.items()} == changed


def test_cjepa_is_ijepa_with_vicreg_on_projected_features() -> None:
    ijepa, cjepa = load_config("ijepa_vitb16_in1k").method, load_config("cjepa_vitb16_in1k").method
    assert (ijepa.regularizer, cjepa.regularizer) == ("none", "vicreg")
    assert cjepa.model_copy(update={"name": "ijepa", "regularizer": "none"}).model_dump() == (
        ijepa.model_dump()
    )
    weights = cjepa.vicreg
    assert (weights.similarity, weights.variance, weights.covariance) == (25, 25, 1)
    assert (weights.projector_width, cjepa.regularizer_weight) == (3072, 0.001)


# Overrides


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=2.5E-4", 2.5e-4),
        ("optim.epochs=70", 70),
        ("optim.epochs=auto", "auto"),
        ("log.to=tensorboard", ("tensorboard",)),
        ("log.to=[wandb, mlflow]", ("wandb", "mlflow")),
        ("optim.warmup_epochs=2.5", 2.5),
        ("data.batch_size=1e2", 100),
        ("data.image_size=64", (64, 64)),
        ("data.image_size=[64, 96]", (64, 96)),
        ("data.crop_scale=[0.5, 0.9]", (0.5, 0.9)),
        ("data.flip=true", True),
        ("model.class_token=true", True),
        ("method.saliency.block=3", 3),
        ("method.blocks.target_area=[0.1, 0.2]", (0.1, 0.2)),
        ("method.vicreg.projector_width=64", 64),
    ],
)
def test_an_override_sets_its_key_and_nothing_else(override: str, expected: Any) -> None:
    key = override.partition("=")[0]
    config = load_config("dseq_vitb16_in1k", [override])
    assert value(config, key) == expected
    assert type(value(config, key)) is type(expected)
    assert differences(load_config(BASE), config).keys() <= {key}


@pytest.mark.parametrize("folder", ["2023", "no", "1e3", "~", "a: b", "[x]", "#1", "x=y", ""])
def test_the_name_of_a_folder_is_taken_as_it_is_written(folder: str) -> None:
    assert load_config(BASE, [f"data.source={folder}"]).data.source == folder


def test_the_last_override_of_a_key_wins() -> None:
    assert load_config(BASE, ["optim.lr=1", "optim.lr=2"]).optim.lr == 2


def test_another_method_starts_from_its_defaults() -> None:
    config = load_config(BASE, ["method.order=inverse", "method.name=ijepa"])
    assert config.method == IJepaConfig()
    back = load_config(BASE, ["method.name=ijepa", "method.name=dseq", "method.order=spatial"])
    assert back.method == DSeqConfig(order="spatial")
    kept = load_config(BASE, ["method.order=inverse", "method.name=dseq"]).method
    assert kept == DSeqConfig(order="inverse")


def test_a_method_refuses_the_keys_of_another() -> None:
    for name in ("ijepa", "cjepa"):
        for key in ("saliency.kind=grad_cam", "order=random", "curriculum.end=0.5"):
            message = error(f"method.name={name}", f"method.{key}")
            assert f"unknown key 'method.{key.partition('=')[0].partition('.')[0]}'" in message


def test_another_encoder_brings_its_sizes_unless_they_are_given() -> None:
    tiny = load_config(BASE, ["model.name=vit_tiny"]).model
    assert (tiny.width, tiny.depth, tiny.heads) == (192, 12, 3)
    shallow = load_config(BASE, ["model.name=vit_tiny", "model.depth=2"]).model
    assert (shallow.width, shallow.depth, shallow.heads) == (192, 2, 3)
    same = load_config(BASE, ["model.depth=2", "model.name=vit_base"]).model
    assert (same.width, same.depth) == (768, 2)


def test_overrides_apply_to_a_file_as_to_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("model: {name: vit_tiny}\nmethod:\n  name: ijepa\noptim:\n  lr: 1e-4\n")
    config = load_config(path, ["optim.epochs=3", "optim.warmup_epochs=0"])
    assert (config.optim.lr, config.optim.epochs, config.method.name) == (1e-4, 3, "ijepa")


# What is refused


@pytest.mark.parametrize(
    ("override", "message"),
    {
        "data.batchsize=8": "unknown key 'data.batchsize'; did you mean 'data.batch_size'?",
        "dat.size=8": "unknown key 'dat'; did you mean 'data'?",
        "method.saliency.king=x": "unknown key 'method.saliency.king'; did you mean "
        "'method.saliency.kind'?",
        "zzz=1": "unknown key 'zzz'; known: checkpoint, data, ema, guard, log, method, model, "
        "optim, predictor, probe, runtime, target",
        "method.name=dsqe": "method.name must be 'dseq' or 'ijepa' or 'cjepa', found 'dsqe'",
        "method=ijepa": "method must be a section, whose keys are set one by one, found 'ijepa'",
        "optim.epochs=many": "optim.epochs must be a whole number or 'auto', found 'many'",
        "optim.epochs=1.5": "optim.epochs must be a whole number or 'auto', found 1.5",
        "optim.lr=quick": "optim.lr must be a number, found 'quick'",
        "optim.lr=nan": "optim.lr must be a finite number, found nan",
        "optim.lr=0": "optim.lr must be greater than 0, found 0",
        "data.workers=": "data.workers must be a whole number, found None",
        "data.flip=maybe": "data.flip must be true or false, found 'maybe'",
        "data.size=true": "data: size must not be True",
        "data.image_size=true": "data: image_size must not be True",
        "data.image_size=wide": "data.image_size must be two numbers in brackets, found 'wide'",
        "data.image_size=[1, 2, 3]": "data.image_size must be two numbers in brackets, "
        "found [1, 2, 3]",
        "data.image_size=[64]": "data.image_size must be two numbers in brackets, found [64]",
        "data.mean=0.5": "data.mean must be three numbers in brackets, found 0.5",
        "data.std=[0.5, 0.5]": "data.std must be three numbers in brackets, found [0.5, 0.5]",
        "log.to=3": "log.to must be words in brackets, found 3",
        "log.to=tensorbord": "log.to must be 'tensorboard', 'wandb' or 'mlflow', "
        "found 'tensorbord'; did you mean 'tensorboard'?",
        "log.to=[mlflow,wandbb]": "log.to must be 'tensorboard', 'wandb' or 'mlflow', "
        "found 'wandbb'; did you mean 'wandb'?",
        "log.to=[wandb,wandb]": "log.to: 'wandb' is named more than once",
        "runtime.precision=fp16": "runtime.precision must be 'auto', 'fp32' or 'bf16', "
        "found 'fp16'; did you mean 'bf16'?",
        "data.size.x=1": "data.size.x: 'size' is a value, not a section",
        "data.workers=[": "data.workers: cannot read the value '[' as YAML",
        "data.workers": "expected section.key=value, found 'data.workers'",
        "=1": "expected section.key=value, found '=1'",
        "optim.epochs=10": "optim: warmup_epochs (15.0) must not exceed epochs (10)",
        "data.image_size=200": "data.image_size (200, 200) must be a multiple of "
        "model.patch_size (16)",
        "data.image_size=16": "data.image_size is a single patch: there is nothing to predict",
        "optim.accumulate=3": "data.batch_size (2048) must be a multiple of optim.accumulate x "
        "runtime.devices (3 x 1)",
        "model.heads=5": "model.width (768) must be a multiple of the heads (5)",
        "predictor.width=42": "predictor.width (42) must be a multiple of the heads (12)",
        "method.regions.features=12": "method.regions.features (12) must be `target` or below "
        "the encoder's depth (12)",
        "method.saliency.block=12": "method.saliency.block (12) must be below the encoder's depth "
        "(12)",
        "method.regions.count=1": "method.regions.count must be greater than or equal to 2, "
        "found 1",
    }.items(),
)
def test_what_is_wrong_is_said_in_one_line(override: str, message: str) -> None:
    assert error(override) == message


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["method.regions.source=random", "method.order=random"], "have no saliency"),
        (["method.prediction=flat", "method.context_lag=1"], "flat has one context"),
        (["model.class_token=false"], "use rarity or grad_cam, or keep the token"),
        (["model.width=30", "model.heads=2"], "multiple of 4"),
        (["method.prediction_weight=0"], "without a regularizer trains nothing"),
        (["method.regularizer=vicreg", "method.regularizer_over=patches"], "vicreg.similarity=0"),
        (["data.crop_scale=[0.9, 0.2]"], "0 < low <= high <= 1, found 0.9, 0.2"),
        (["method.blocks.target_area=[0.2, 0.1]"], "target_area must be an ordered"),
        (["method.blocks.context_area=[0.5, 1.5]"], "context_area must be an ordered"),
        (["runtime.devices=3"], "multiple of optim.accumulate x runtime.devices (1 x 3)"),
    ],
)
def test_a_contradiction_is_named(overrides: list[str], part: str) -> None:
    assert part in error(*overrides)


def test_all_that_is_wrong_is_said_at_once() -> None:
    message = error("data.wokers=1", "optim.lr=-1", "method.saliency.kind=x")
    assert message.count(";") == 3  # two between the three, one before the nearest key
    for key in ("data.wokers", "optim.lr", "method.saliency.kind"):
        assert key in message


@pytest.mark.parametrize(
    ("setting", "message"),
    {
        "sweep.lrs=0.1": "sweep.lrs must be one or more numbers in brackets, found 0.1",
        "sweep.features=last": "sweep.features must be one or more words in brackets, found 'last'",
    }.items(),
)
def test_a_list_is_asked_for_in_the_words_of_its_type(setting: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        TASKS["linear"].from_settings([setting])
    assert str(raised.value) == message


def test_an_encoder_without_class_token_can_look_by_grad_cam() -> None:
    load_config(BASE, ["model.class_token=false", "method.saliency.kind=grad_cam"])
    load_config("ijepa_vitb16_in1k", ["model.class_token=false"])


def test_a_key_that_is_no_text_is_unknown() -> None:
    with pytest.raises(InputError, match=r"^unknown key 'model.3'; known: class_token, depth, "):
        validate({"model": {"name": "vit_tiny", 3: 4}, "method": {"name": "dseq"}})


def test_missing_sections_are_named() -> None:
    with pytest.raises(InputError, match=r"^model is missing; method is missing$"):
        validate({})
    with pytest.raises(InputError, match=r"^method.name must be 'dseq' or .*, found None$"):
        validate({"model": {"name": "vit_tiny"}, "method": {}})


# Values of a config


def test_a_config_cannot_be_changed_in_place() -> None:
    config = load_config(BASE)
    with pytest.raises(ValidationError):
        config.optim.lr = 1.0
    with pytest.raises(ValidationError):
        config.optim = config.optim


def test_with_changes_a_copy_and_checks_it() -> None:
    config = load_config(BASE)
    changed = config.with_(optim={"lr": 0.5}, data=config.data.with_(batch_size=64))
    assert {key: new for key, (_, new) in differences(config, changed).items()} == {
        "data.batch_size": 64,
        "optim.lr": 0.5,
    }
    assert config == load_config(BASE)
    assert config.with_() == config
    for wrong in ({"optim": {"rate": 1}}, {"optimizer": {}}, {"data": {"image_size": (10, 10)}}):
        with pytest.raises(ValidationError):
            config.with_(**wrong)


def test_differences_name_both_values_and_keys_that_one_lacks() -> None:
    one, other = load_config(BASE), load_config(BASE, ["optim.lr=0.5", "data.image_size=448"])
    assert differences(one, one) == {}
    assert differences(one, other) == {
        "optim.lr": (1e-3, 0.5),
        "data.image_size": ((224, 224), (448, 448)),
    }
    methods = differences(one, load_config("ijepa_vitb16_in1k"))
    assert methods["method.name"] == ("dseq", "ijepa")
    assert methods["method.saliency.kind"] == ("cls_similarity", None)


@pytest.mark.parametrize(
    ("override", "grid"),
    [("data.image_size=224", (14, 14)), ("data.image_size=[32, 64]", (2, 4))],
)
def test_the_grid_has_rows_first(override: str, grid: tuple[int, int]) -> None:
    assert load_config(BASE, [override]).grid == grid


@pytest.mark.parametrize(
    ("images", "epochs"),
    [(3_838, 600), (5_000, 600), (50_000, 60), (100_000, 30), (1_300_000, 30), (1, 600)],
)
def test_auto_shows_three_million_images_within_30_to_600_epochs(images: int, epochs: int) -> None:
    optim = load_config("vits16_small").resolved(images).optim
    assert (optim.epochs, optim.warmup_epochs) == (epochs, epochs / 10)


def test_resolving_settles_auto_and_nothing_else() -> None:
    config = load_config("vits16_small")
    resolved = config.resolved(20_000)
    assert differences(config, resolved) == {
        "optim.epochs": ("auto", 150),
        "optim.warmup_epochs": ("auto", 15.0),
    }
    assert resolved.resolved(5) == resolved
    assert "auto" not in resolved.optim.model_dump().values()
    short = load_config("vits16_small", ["optim.epochs=4"]).resolved(20_000).optim
    assert (short.epochs, short.warmup_epochs) == (4, 0.4)


def whole_numbers() -> list[tuple[str, str]]:
    """(method, key) of every setting that is one."""
    found = []
    for method in METHODS:
        values = flattened(load_config(f"{method}_vitt8_64").model_dump())
        found += [(method, key) for key, value in values.items() if type(value) is int]
    return sorted(set(found))


@pytest.mark.parametrize(("method", "key"), whole_numbers())
def test_an_absurd_number_is_refused_before_anything_is_computed(method: str, key: str) -> None:
    for number in (10**12, 10**300):
        with pytest.raises(InputError, match=key.rpartition(".")[2]) as caught:
            load_config(f"{method}_vitt8_64", [f"{key}={number}"])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["2026-05-14", "2026-02-30", "2026-05-14 10:00:00"])
def test_a_date_is_text_like_any_other(text: str) -> None:
    """YAML has dates, and refuses those that do not exist; no setting is one."""
    config = load_config("dseq_vitt_demo", [f"log.project={text}"])
    assert config.log.project == text
