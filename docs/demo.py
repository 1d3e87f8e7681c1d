"""Pictures of the demo page in docs/service.md, from real runs: python docs/demo.py (needs Playwright, Chromium)."""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

DOCS = Path(__file__).parent
STORIES = ("worn", "hand")
TIMEOUT = 300
"""Seconds in which a story ends."""


def play(page: Page, story: str) -> None:
    """Play a story to its end. The page forbids scripts as text, so its status is read again and again."""
    page.click(f"#presets [data-preset={story}]")
    end = time.monotonic() + TIMEOUT
    while "ended" not in page.inner_text("#status"):
        if time.monotonic() > end:
            raise SystemExit(f"story {story!r} has not ended after {TIMEOUT} seconds")
        time.sleep(0.5)


def picture(page: Page, path: Path) -> None:
    """The table of the rules, and the charts of accuracy and rotation."""
    boxes = [page.locator(f"section[aria-labelledby={name}]").bounding_box() for name in ("h-rules", "h-rotation")]
    top, bottom = boxes
    assert top is not None
    assert bottom is not None
    height = bottom["y"] + bottom["height"] - top["y"]
    clip = {"x": top["x"] - 8, "y": top["y"] - 8, "width": top["width"] + 16, "height": height + 16}
    with Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True))) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)


def main() -> None:
    """Start the page, play the stories and write their pictures."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    command = [sys.executable, "-m", "fedbn", "demo", "hapt", "--no-browser", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(m[1] for line in server.stdout if (m := re.search(r"open (http\S+)", line)))
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1000, "height": 900}, color_scheme="light")
                for story in STORIES:
                    page.goto(url)
                    page.locator("#play:not([disabled])").wait_for()
                    play(page, story)
                    picture(page, DOCS / f"demo-{story}.png")
                browser.close()
        finally:
            server.send_signal(signal.SIGINT)


if __name__ == "__main__":
    main()
