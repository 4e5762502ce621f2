"""The report in a real browser, from disk, shows what the run's files say, without errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Locator, Page, expect

from dseqjepa.keyed import sample_keys
from dseqjepa.report.lens import choose_images
from dseqjepa.report.page import write_report
from dseqjepa.report.run import read_runs
from dseqjepa.train.checkpoint import load_method
from dseqjepa.viz.trace import Trace, shared_cut, trace
from tests.report.browser import DESKTOP, PHONE, opened, running
from tests.report.hostile import CLASS, PICTURE, RESULT, RUN

Runs = tuple[Path, Path]
ARTIFACTS = Path(__file__).parents[2] / "test-artifacts"
IMAGES = 4


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def single(made: Runs, folder: Path) -> Path:
    return write_report([made[0]], folder / "single.html", images=IMAGES)


@pytest.fixture(scope="module")
def both(made: Runs, folder: Path) -> Path:
    return write_report(made, folder / "both.html", images=IMAGES)


@pytest.fixture
def page(browser: Browser, single: Path) -> Iterator[Page]:
    """The report of one run; a test fails if the page complained or asked for anything."""
    with opened(browser, single) as (page, wrong):
        yield page
        assert wrong == []


@pytest.fixture(scope="module")
def traces(made: Runs) -> list[list[Trace]]:
    """Checkpoint -> image -> what the method does."""
    runs = read_runs(made)
    chosen = choose_images(runs[0].config, IMAGES)
    keys = sample_keys(runs[0].config.runtime.seed, 0, torch.tensor(chosen.indices))
    cut = shared_cut([run.config.method for run in runs])
    return [
        trace(load_method(folder), chosen.images_BCHW, keys, cut=cut)
        for folder in runs[0].checkpoints
    ]


def logged(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def longest(traces: list[Trace]) -> int:
    """The image with most prediction steps."""
    lengths = [len(item.steps) for item in traces]
    assert max(lengths) >= 2
    return lengths.index(max(lengths))


def lens_shows(page: Page, item: Trace, step: int) -> None:
    """The words, the table, and the drawing are those of a step of a trace."""
    truth = item.steps[step]
    target, context = int(truth.target_hw.sum()), int(truth.context_hw.sum())
    words = page.locator("#lens-words").inner_text()
    assert f"({target} patch" in words
    assert f"({context} of 64 patches)" in words
    said = re.search(r"Loss ([0-9.]+)\.", words)
    assert said is not None
    assert float(said[1]) == pytest.approx(truth.loss, abs=2e-4)  # the last digit is rounded
    rows = page.locator("#lens-steps tbody tr")
    assert rows.count() == len(item.steps)
    shown = float(rows.nth(step).locator("td").last.inner_text())
    assert shown == pytest.approx(truth.loss, abs=2e-4)
    assert rows.nth(step).locator("input").is_checked()
    hidden = page.locator("#lens-step rect title", has_text="hidden").count()
    assert hidden == 64 - int((truth.target_hw | truth.context_hw).sum())
    assert page.locator("#lens-step rect title", has_text="predicted").count() == target


def choose_image(page: Page, index: int) -> None:
    page.locator("#lens-images label").nth(index).click()


def test_the_lens_steps_by_mouse_and_by_keys(page: Page, traces: list[list[Trace]]):
    image = longest(traces[-1])
    item = traces[-1][image]
    choose_image(page, image)
    lens_shows(page, item, 0)
    assert page.locator("#lens-back").is_disabled()
    page.locator("#lens-next").click()
    lens_shows(page, item, 1)
    page.locator("#lens-back").click()
    lens_shows(page, item, 0)
    page.locator("#lens-steps tbody tr").nth(1).locator("td").last.click()
    lens_shows(page, item, 1)
    page.locator("#lens-steps input").nth(1).focus()
    page.keyboard.press("ArrowUp")
    lens_shows(page, item, 0)
    page.keyboard.press("ArrowDown")
    lens_shows(page, item, 1)
    assert page.evaluate("document.activeElement.name") == "lens-step"
    for _ in item.steps[2:]:
        page.keyboard.press("ArrowDown")
    lens_shows(page, item, len(item.steps) - 1)
    assert page.locator("#lens-next").is_disabled()


def test_the_lens_scrubs_by_mouse_and_by_keys(page: Page, traces: list[list[Trace]]):
    image = longest(traces[-1])
    choose_image(page, image)
    slider = page.locator("#lens-checkpoint")
    slider.focus()
    for checkpoint in reversed(range(len(traces) - 1)):
        page.keyboard.press("ArrowLeft")
        assert page.locator("#lens-at").inner_text().startswith(f"step {3 * checkpoint},")
        lens_shows(page, traces[checkpoint][image], 0)
    page.keyboard.press("End")
    lens_shows(page, traces[-1][image], 0)
    box = slider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    lens_shows(page, traces[0][image], 0)
    assert slider.get_attribute("aria-valuetext") == "step 0"


def test_images_are_chosen_by_keys_as_well(page: Page, traces: list[list[Trace]]):
    choose_image(page, 0)
    page.keyboard.press("ArrowRight")
    lens_shows(page, traces[-1][1], 0)
    sources = [
        page.locator(f"#lens-{name} image").get_attribute("href") for name in ("regions", "step")
    ]
    assert sources == [page.locator("#lens-images img").nth(1).get_attribute("src")] * 2


def test_saliency_and_the_loss_of_patches_can_be_shown(page: Page, traces: list[list[Trace]]):
    image = longest(traces[-1])
    choose_image(page, image)

    def fills(panel: str) -> set[str]:
        rects = page.locator(f"#lens-{panel} rect")
        return set(rects.evaluate_all("all => all.map(one => one.getAttribute('fill'))"))

    assert len(fills("regions")) == traces[-1][image].count
    page.locator("#lens-saliency").check()
    assert len(fills("regions")) > 20
    assert "saliency" in page.locator("#lens-key").inner_text()
    page.locator("#lens-saliency").focus()
    page.keyboard.press("Space")
    assert len(fills("regions")) == traces[-1][image].count
    before = fills("step")
    page.locator("#lens-loss").check()
    assert len(fills("step")) > len(before)
    assert "loss of a patch" in page.locator("#lens-key").inner_text()


def chart(page: Page, title: str) -> Locator:
    return page.locator(".chart", has=page.get_by_role("heading", name=title, exact=True))


def legend(page: Page, title: str) -> dict[str, str]:
    items = chart(page, title).locator(".legend li[data-step]")
    return {
        item.locator("span").inner_text(): item.locator("b").inner_text() for item in items.all()
    }


def test_the_numbers_of_the_curves_are_those_of_the_metrics(page: Page, made: Runs):
    lines = logged(made[0])
    keys = {
        "prediction": "prediction_loss", "predicting the mean": "mean_prediction_loss",
        "with regularizer": "loss",
    }  # fmt: skip
    at_end = {name: f"{lines[-1][key]:.4g}" for name, key in keys.items()}
    assert legend(page, "Prediction loss") == at_end
    assert legend(page, "Skill") == {"skill": f"{lines[-1]['skill']:.4g}"}
    by_step = lines[-1]["loss_by_step"]
    shown = legend(page, "Loss by prediction step")
    for number, loss in enumerate(by_step, start=1):
        if loss is not None:
            assert shown[f"step {number}"] == f"{loss:.4g}"

    plot = chart(page, "Prediction loss").locator(".plot")
    plot.focus()
    for line in lines:  # the first press is the first logged step
        page.keyboard.press("ArrowRight")
        wanted = {name: f"{line[key]:.4g}" for name, key in keys.items()}
        assert legend(page, "Prediction loss") == wanted
    page.keyboard.press("Home")
    for name, key in keys.items():  # Plotly draws the last of several quick moves a little later
        expect(plot.locator(".hoverlayer")).to_contain_text(f"{name} : {lines[0][key]:.4g}")
    page.keyboard.press("Escape")
    assert legend(page, "Prediction loss") == at_end


def test_pointing_at_a_curve_shows_its_values(page: Page, made: Runs):
    lines = logged(made[0])
    plot = chart(page, "Skill").locator(".plot")
    plot.scroll_into_view_if_needed()
    point = plot.locator(".scatterlayer .point").nth(2)
    box = point.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(plot.locator(".hoverlayer")).to_contain_text(f"skill : {lines[2]['skill']:.4g}")
    assert legend(page, "Skill") == {"skill": f"{lines[2]['skill']:.4g}"}


def test_evaluations_stand_in_the_table(page: Page, made: Runs):
    results = json.loads((made[0] / "evaluations" / "knn.json").read_text())["results"]
    text = page.locator("#evaluations").inner_text()
    for row in results:
        value, low, high = (row[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
        assert f"{value:.1f} ({low:.1f} to {high:.1f})" in text
        if "n_test" in row:  # the commonest answer was not measured on images
            assert f"n_test {row['n_test']}" in text


def test_hostile_names_are_text(browser: Browser, both: Path):
    with opened(browser, both) as (page, wrong):
        page.mouse.move(200, 120)  # over the run's name
        for index in range(IMAGES):
            choose_image(page, index)
        page.get_by_text("All settings").first.click()
        text = page.locator("body").inner_text()
        for name in (RUN, CLASS, RESULT):
            assert name in text
        assert PICTURE in page.locator("#lens-key").inner_text()
        assert page.title().startswith(f"{RUN}, second")
        plot = chart(page, "Skill").locator(".plot")
        plot.focus()
        page.keyboard.press("Home")
        expect(plot.locator(".hoverlayer")).to_contain_text(RUN)
        assert page.evaluate("typeof hacked") == "undefined"
        assert page.locator("b[onmouseover], [onerror], [onload]").count() == 0
        assert page.locator("img[src=x]").count() == 0
        assert wrong == []


def test_runs_are_compared_in_the_lens(browser: Browser, both: Path, made: Runs):
    with opened(browser, both) as (page, wrong):
        page.locator("#lens-runs label").nth(1).click()
        assert "The blocks are random" in page.locator("#lens-words").inner_text()
        assert page.locator("#lens-steps tbody tr").count() == 4
        assert set(legend(page, "This image over training")) == {RUN, "second"}
        wanted = [f"{logged(run)[-1]['skill']:.2f}" for run in made]
        row = page.locator(".compare tr", has=page.get_by_role("rowheader", name="Skill"))
        assert row.locator("td").all_inner_texts() == wanted
        assert wrong == []


def test_colours_follow_the_system_and_the_choice(browser: Browser, single: Path):
    def paper(page: Page) -> str:
        return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    def lines(page: Page) -> str:
        return str(page.locator(".scatterlayer path.js-line").first.get_attribute("style"))

    with opened(browser, single, scheme="dark") as (page, wrong):
        dark, line = paper(page), lines(page)
        page.get_by_label("Light", exact=True).click()
        assert paper(page) == "rgb(255, 255, 255)" != dark
        assert lines(page) != line
        page.keyboard.press("ArrowRight")
        assert (paper(page), lines(page)) == (dark, line)

        wide = page.locator(".main-svg").first.bounding_box()
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert paper(page) == "rgb(255, 255, 255)"
        widths = page.locator(".main-svg").evaluate_all("all => all.map(svg => svg.clientWidth)")
        assert set(widths) == {640}  # fits an A4 page
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert (paper(page), lines(page)) == (dark, line)
        assert page.locator(".main-svg").first.bounding_box() == wide
        assert wrong == []


def test_the_policy_stops_what_is_not_of_the_file(browser: Browser, single: Path):
    """The browser's side of the policy: injected code does not run and nothing can be asked for."""
    with opened(browser, single) as (page, wrong):
        page.evaluate(
            "() => { const s = document.createElement('script'); s.textContent = 'hacked = 1';"
            "document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/a.png';"
            "document.body.append(i); }"
        )
        page.wait_for_timeout(100)
        assert page.evaluate("typeof hacked") == "undefined"
        told = " ".join(wrong)
        assert "Executing inline script violates" in told
        assert "Loading the image 'http://127.0.0.1:9/a.png' violates" in told


def test_every_control_and_picture_has_a_name(page: Page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll(
            "input, button, [role=img], [role=group], [role=region], #lens-images img")]
          .filter(node => !(node.getAttribute("aria-label") || node.alt || node.innerText
            || [...(node.labels || [])].some(label => label.innerText.trim()
              || label.querySelector("img[alt]"))))
          .map(node => node.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(node => node.id)")
    assert len(ids) == len(set(ids))


BROKEN_WORDS = """() => {
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    const parent = node.parentElement;
    if (!parent.checkVisibility() || parent.closest("script, style, svg, pre")) continue;
    for (const token of node.data.matchAll(/\\S+/gu)) {
      if (token[0].length > 20) continue;  // such as a path, which may need more than a line
      for (const word of token[0].matchAll(/[\\p{L}\\p{N}]+/gu)) {
        const range = document.createRange();
        range.setStart(node, token.index + word.index);
        range.setEnd(node, token.index + word.index + word[0].length);
        const boxes = [...range.getClientRects()].filter(box => box.width > 0);
        if (new Set(boxes.map(box => Math.round(box.top))).size > 1) found.push(word[0]);
      }
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def six(made: Runs, folder: Path) -> Path:
    """Two recipes of three seeds each."""
    runs = []
    for run, name in zip(made, ("rarity", "blocks"), strict=True):
        for seed in range(3):
            copy = folder / f"{name}-seed{seed}"
            shutil.copytree(run, copy, symlinks=True)
            config = (copy / "config.yaml").read_text()
            assert config.count("\n  seed: 0\n") == 1
            (copy / "config.yaml").write_text(config.replace("seed: 0", f"seed: {seed}"))
            runs.append(copy)
    return write_report(runs, folder / "six.html", images=IMAGES)


@pytest.mark.parametrize("width", [400, 1200])
def test_no_word_is_broken(browser: Browser, both: Path, six: Path, width: int):
    for file in (both, six):
        with opened(browser, file, size=(width, 900)) as (page, _):
            for folded in page.locator("details").all():
                folded.evaluate("node => node.open = true")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(BROKEN_WORDS) == []


@pytest.mark.parametrize(("width", "most"), [(400, 14_000), (1200, 8_000)])
def test_a_page_of_six_runs_is_short(browser: Browser, six: Path, width: int, most: int):
    with opened(browser, six, size=(width, 900)) as (page, wrong):
        assert page.evaluate("document.documentElement.scrollHeight") < most
        expect(page.locator("h1")).to_have_text("6 runs")
        columns = page.locator("#short table.compare").first.locator("thead th")
        assert columns.all_inner_texts() == [
            ", ".join(f"{name}-seed{seed}" for seed in range(3)) for name in ("rarity", "blocks")
        ]
        told = page.locator("details.told")
        assert told.count() == 6
        assert not told.nth(3).locator("article").is_visible()
        told.nth(3).locator("summary").click()
        expect(told.nth(3).locator("article")).to_be_visible()
        assert wrong == []


@pytest.mark.parametrize(("name", "size"), [("desktop", DESKTOP), ("phone", PHONE)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_is_pictured(
    browser: Browser, both: Path, name: str, size: tuple[int, int], scheme: str
):
    with opened(browser, both, size=size, scheme=scheme) as (page, wrong):
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / f"report-{name}-{scheme}.png", full_page=True)
        assert wrong == []
