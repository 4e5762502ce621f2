"""Picture the region lens of a report: python -m tests.report.picture demo/report.html lens.png"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page

from tests.report.browser import opened, running

SIZE = (1200, 900)


def take(page: Page, out: Path) -> None:
    """The first step of the image that has most of them, at the last checkpoint."""
    page.locator("#lens .stage").screenshot(path=out)


if __name__ == "__main__":
    with running() as browser, opened(browser, Path(sys.argv[1]).resolve(), size=SIZE) as (page, _):
        take(page, Path(sys.argv[2]))
