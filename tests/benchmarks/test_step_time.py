"""The sides of the step benchmarks compute the same, and every kind of benchmark runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sides import Bench, typical_saliency
from step_time import benchmarks
from torch import Tensor
from truncated import Cut, draw

from dseqjepa.plans.plan import from_candidates, steps_of_ranks
from dseqjepa.plans.regions import rank_regions
from tests.children import run_script
from tests.tiny import tiny_config

FOLDER = Path(__file__).parents[2] / "benchmarks"


def gradients(bench: Bench, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in bench.method.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: v for n, v in zip(named, values, strict=True) if v is not None}


@pytest.mark.parametrize(
    ("preset", "other"),
    [
        ("dseq_vitt8_64", "dense_loss"),
        ("ijepa_vitt8_64", "dense_loss"),
        ("ijepa_vitt8_64", "padded_loss"),
    ],
)
def test_both_sides_give_the_same_loss_and_gradients(preset: str, other: str):
    config = tiny_config(preset, "method.regularizer=none", "data.image_size=64")
    bench = Bench(config, 6)
    results = []
    for compute in (bench.packed_loss, getattr(bench, other)):
        loss = compute()
        results.append((loss, gradients(bench, loss)))
    (ours, mine), (theirs, yours) = results
    assert abs(ours - theirs) < 1e-4 * abs(theirs)
    assert mine.keys() == yours.keys()
    for name, value in mine.items():
        assert (value - yours[name]).norm() <= 1e-4 * yours[name].norm() + 1e-9, name


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_both_sides_follow_the_curriculum(progress: float):
    bench = Bench(tiny_config("dseq_vitt8_64", "method.regularizer=none", "data.image_size=64"), 6)
    at_end = bench.packed_loss()
    bench.progress = progress
    assert bench.packed_loss() != at_end
    torch.testing.assert_close(bench.packed_loss(), bench.dense_loss(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("progress", "contexts"), [(0.0, 1), (1.0, 4)])
def test_the_dense_side_computes_every_patch_of_every_context(progress: float, contexts: int):
    """As the release does: four contexts per image on ranked regions, one on random blocks, each of
    16 patches and [CLS]; the predictor's sequences are four in both cases."""
    bench = Bench(tiny_config("dseq_vitt8_64", "method.regularizer=none"), 3)
    bench.progress = progress
    seen: dict[str, set[int]] = {"encoder": set(), "predictor": set()}
    for name, part in seen.items():
        for block in getattr(bench.method, name).blocks:
            block.norm1.register_forward_hook(
                lambda _m, inputs, _o, part=part: part.add(inputs[0].shape[0])
            )
    bench.dense_loss()
    assert seen == {"encoder": {3 * contexts}, "predictor": {3 * 4}}


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_dense_side_has_the_loss_of_the_packed_one_all_along(progress: float):
    bench = Bench(tiny_config("dseq_vitt8_64", "method.regularizer=none"), 8)
    bench.progress = progress
    torch.testing.assert_close(bench.packed_loss(), bench.dense_loss(), rtol=1e-4, atol=0)


def test_a_context_cut_to_the_shortest_keeps_its_first_patches():
    blocks = tiny_config("ijepa_vitt8_64").method.blocks
    cut = draw(blocks, 16, (8, 8), seed=3)
    (length,) = {len(set(row)) for row in cut.context_BC.tolist()}
    assert cut.kept == 16 * length < cut.drawn
    assert all(row == sorted(row) for row in cut.context_BC.tolist())
    for context_C, target_MQ in zip(cut.context_BC, cut.target_BMQ, strict=True):
        assert not set(context_C.tolist()) & set(target_MQ.flatten().tolist())
    sizes = {len(set(row)) for image in cut.target_BMQ.tolist() for row in image}
    assert sizes == {cut.target_BMQ.shape[2]}


def test_of_one_image_nothing_is_cut_and_the_loss_is_the_packed_one():
    """Then both sides compute the same, on the same blocks."""
    config = tiny_config("ijepa_vitt8_64", "method.regularizer=none", "data.image_size=64")
    bench = Bench(config, 1)
    look = bench.method.look(bench.images_BCHW)
    plan = bench.method.draw(look, bench.grid, 1.0, bench.keys_B).plan
    _, size_M = plan.target_SN.nonzero()[:, 0].unique(return_counts=True)
    context_1C = plan.context_SN[:1].nonzero()[None, :, 1]
    losses = []
    for step in range(4):
        target_11Q = plan.target_SN[step].nonzero()[None, None, :, 0]
        cut = Cut(context_1C, target_11Q, context_1C.numel())
        losses.append(bench.truncated_loss(cut) * size_M[step])
    whole = torch.stack(losses).sum() / size_M.sum()
    assert torch.isclose(whole, bench.packed_loss(), rtol=1e-4)
    predicted = int(plan.target_SN.sum())
    assert bench.tokens() == {"context": context_1C.numel(), "predicted": predicted}


def test_a_typical_batch_has_nearly_the_mean_number_of_context_patches():
    def patches(saliency_BN: Tensor) -> float:
        rank_BN = rank_regions(saliency_BN, (8, 8), 5, 0.15).rank_BN
        plan = from_candidates(*steps_of_ranks(rank_BN, 4))
        return float(plan.counts.context_S.sum()) / len(saliency_BN)

    many = patches(typical_saliency(512, (8, 8), 5, 0.15))
    assert patches(typical_saliency(8, (8, 8), 5, 0.15)) == pytest.approx(many, rel=0.1)


def test_the_benchmarks_have_the_names_that_others_rely_on():
    names = benchmarks()
    for model in ("vitt8_64", "vits16_224", "vitb16_224"):
        for precision in ("fp32", "bf16"):
            base = f"{model}_{precision}"
            assert {base, f"{base}_a05", f"{base}_a05_causal", f"ijepa_{base}"} <= set(names)
            assert {f"ijepa_truncated_{base}", f"ijepa_token_{base}"} <= set(names)
            assert f"curriculum_{base}" in names


@pytest.mark.parametrize(
    ("script", "names"),
    [
        (
            "step_time.py",
            ["vitt8_64_bf16_a05_causal", "ijepa_vitt8_64_fp32", "ijepa_token_vitt8_64_fp32",
             "ijepa_cut_vitt8_64_fp32", "curriculum_vitt8_64_fp32",
             "curriculum_cross_vitt8_64_fp32", "overhead_vitt8_64_fp32"],
        ),
        ("peak.py", ["vitt8_64_bf16", "memory_vitt8_64_fp32"]),
        ("regions.py", ["share_of_step", "against_opencv"]),
        ("scaling.py", ["image_size", "regions", "batch"]),
        ("sharded.py", ["build", "step", "save"]),
        ("start.py", ["help", "first_step"]),
    ],
)  # fmt: skip
def test_a_benchmark_runs_and_writes_its_rows(script: str, names: list[str], tmp_path: Path):
    """That it runs, never how quickly."""
    file = tmp_path / "rows.json"
    only = [word for name in names for word in ("--only", name)]
    command = [FOLDER / script, "--smoke", "--json", str(file), *only]
    done = run_script(*command, log=tmp_path / "log")
    assert done.code == 0, done.said
    rows = json.loads(file.read_text())
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert {"name", "ours", "other", "ratio", "unit"} <= row.keys()
        assert row["ours"] > 0
        assert row["name"] in done.said


def test_a_name_that_is_none_is_refused(tmp_path: Path):
    done = run_script(FOLDER / "step_time.py", "--only", "vitx", log=tmp_path / "log")
    assert done.code == 2
    assert "vitx" in done.said
