"""The cost forecast for other hardware, against measurements and torch's counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sides import Bench
from typer.testing import CliRunner

from dseqjepa.cli import app
from dseqjepa.config import Config
from dseqjepa.errors import InputError
from dseqjepa.forecast import DEVICES, forecast
from dseqjepa.methods import build_method
from dseqjepa.model.flops import Tokens, count_tokens
from dseqjepa.model.vit import set_attention
from dseqjepa.presets import load_config
from dseqjepa.train.rehearsal import KEPT, activations, state_bytes
from tests.tiny import PAPER, float_images, tiny_config

MEASURED = {
    # images at a time, GFLOP per image, GiB at the peak, images/s: docs/gpu.md
    ("dseq_vits16_in1k", ()): (256, 0.116 * 778e3 / 3438, 7.4, 3438),
    ("dseq_vitt16_in1k", (
        "data.image_size=64", "model.patch_size=8", "method.regions.min_area=0.05",
    )): (
        1024, 0.045 * 778e3 / 14930, 5.3, 14930,
    ),
    ("ijepa_vitb16_in1k", ()): (128, 0.232 * 778e3 / 1568, 12.4, 1568),
}  # fmt: skip


def measured_plans(config: Config, _seed: int) -> tuple[Tokens, Tokens]:
    """Tokens of the plans that the benchmark draws: regions of random maps, at lambda 1."""
    bench = Bench(config.with_(data={"batch_size": 64}), 64)
    plan = bench.method.plan(bench.images_BCHW, progress=1.0, keys_B=bench.keys_B)
    encoder, predictor = bench.method.encoder, bench.method.predictor
    tokens = count_tokens(plan, 64, bench.method.context_mode, encoder, predictor)
    return tokens, tokens


@pytest.mark.parametrize("preset", MEASURED, ids=lambda key: key[0])
def test_it_foretells_what_was_measured_on_one_gpu(
    preset: tuple[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
):
    """Of the plans measured there: FLOPs within 5 %, memory within 15 %, images/s within 5 %."""
    batch, flops, gib, rate = MEASURED[preset]
    monkeypatch.setattr("dseqjepa.forecast.plans", measured_plans)
    found = forecast(load_config(preset[0], [*preset[1], f"data.batch_size={batch}"]), "h200", 1)
    assert found.flops / 1e9 == pytest.approx(flops, rel=0.05)
    assert found.memory_ddp / 2**30 == pytest.approx(gib, rel=0.15)
    assert found.images_per_s == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_bytes_that_autograd_keeps_are_counted(precision: str):
    """Of a wide model, where blocks are nearly all of it: within a fifth, on a CPU, which pads the
    sequences of a bucket to one length."""
    config = tiny_config(
        "dseq_vitt8_64", "method.regularizer=none", *PAPER,
        "model.width=192", "model.depth=6", "model.heads=3", "data.image_size=128",
    )  # fmt: skip
    method = build_method(config)
    set_attention(method, "sdpa")
    images_BCHW, keys_B = float_images(8, (128, 128)), torch.arange(8)
    kept: dict[int, int] = {}
    # Weights are no activations, nor are their copies in bf16.
    weights = {shape for p in method.parameters() for shape in (p.shape, p.shape[::-1])}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.shape not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.no_grad():
        plan = method.plan(images_BCHW, progress=1.0, keys_B=keys_B)
    tokens = count_tokens(plan, 8, method.context_mode, method.encoder, method.predictor)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cast:
        step = method(images_BCHW, progress=1.0, keys_B=keys_B)
    target = KEPT[precision] * (method.encoder.grid[0] * method.encoder.grid[1] + 1) * 192
    counted = activations(method, tokens, precision) - target
    assert sum(kept.values()) / 8 == pytest.approx(counted, rel=0.2)
    step.loss.backward()


def test_more_devices_share_the_work_and_the_state():
    config = load_config("ijepa_vitt16_in1k")
    one, many = forecast(config, "h100", 1), forecast(config, "h100", 64)
    assert many.hours == pytest.approx(one.hours / 64)
    assert many.device_hours == pytest.approx(one.device_hours)
    assert many.batch * 64 == one.batch
    assert one.sent_ddp == one.sent_fsdp == 0
    assert many.memory_fsdp < many.memory_ddp < one.memory_ddp
    with torch.device("meta"):
        method = build_method(config)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert many.sent_ddp == pytest.approx(2 * 63 / 64 * 4 * trained)
    assert many.state == state_bytes(method)


def test_images_may_be_smaller_and_larger_than_scenes():
    """16 patches cost the more the larger they are, at any side of an image."""
    flops = []
    for side in (16, 128, 1024):
        settings = [f"data.image_size={side}", f"model.patch_size={side // 4}"]
        flops.append(forecast(load_config("ijepa_vitt16_in1k", settings), "h100", 8).flops)
    assert flops == sorted(flops)
    assert flops[0] > 0


def test_a_control_without_predictions_has_a_cost():
    config = load_config("cjepa_vitt16_in1k", ["method.prediction_weight=0"])
    usual = load_config("cjepa_vitt16_in1k")
    assert forecast(config, "h100", 8).flops == forecast(usual, "h100", 8).flops


@pytest.mark.parametrize(
    ("on", "devices", "setting", "message"),
    [
        ("h10", 1, "runtime.seed=0", "did you mean 'h100'"),
        ("h100", 3, "runtime.seed=0", "cannot be divided among 3 devices"),
        ("h100", 1, "runtime.precision=fp32", "runtime.precision=bf16"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(on: str, devices: int, setting: str, message: str):
    with pytest.raises(InputError, match=message):
        forecast(load_config("ijepa_vitt16_in1k", [setting]), on, devices)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--devices", "8"], "--devices is for --on"),
        (["--on", "h100", "--out", "regions.png"], "leave out --out and init_from"),
        (["--on", "h100", "init_from=runs/mine"], "leave out --out and init_from"),
        (["--on", "h100", "--json", "gone/found.json"], "there is no folder gone"),
        (["--on", "h100", "data=my_pictures"], "epochs of ImageNet-1k: leave out data"),
        (["--on", "h100", "optim.minutes=5"], "epochs of ImageNet-1k: leave out optim.minutes"),
    ],
)
def test_what_would_be_ignored_is_refused(more: list[str], message: str):
    done = CliRunner().invoke(app, ["preflight", "ijepa_vitt16_in1k", *more])
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    assert done.output == ""


def test_the_command(tmp_path: Path):
    file = tmp_path / "found.json"
    command = ["preflight", "ijepa_vitt16_in1k", "--on", "a100", "--devices", "8"]
    done = CliRunner().invoke(app, [*command, "--json", str(file)])
    assert done.exit_code == 0, done.output
    for word in ("8 x a100", "device-hours", "fsdp", "checkpoint", "image files read"):
        assert word in done.output
    found = json.loads(file.read_text())
    assert found["memory_there"] == DEVICES["a100"].memory
    assert found["read_per_s"] > 1e6
