"""The report in a real browser: a headless Chromium opens the file from disk.

Skipped where there is none, but not in CI (``make test`` installs it on Debian as root).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
]
PROBE = """<script>addEventListener("load", () => {
  const table = document.querySelector("#g1-questions-table");
  const rows = () => [...table.tBodies[0].rows];
  const ids = () => rows().map((row) => row.cells[0].textContent);
  const before = ids();
  document.querySelector("#g1-questions-table thead th button").click();
  document.querySelector("#g1-questions-table thead th button").click();
  const find = document.querySelector("form.filters input"), after = ids();
  find.value = "clip3-2";
  find.dispatchEvent(new Event("input", { bubbles: true }));
  const box = document.documentElement;
  document.body.append(Object.assign(document.createElement("pre"), { id: "probe", textContent:
    JSON.stringify({
      images: [...document.images].map((image) => [image.naturalWidth, image.naturalHeight]),
      before, after, title: document.title, wide: box.scrollWidth > box.clientWidth,
      found: rows().filter((row) => !row.hidden).map((row) => row.cells[0].textContent),
      told: document.querySelector("form.filters output").textContent,
      requests: performance.getEntriesByType("resource").map((entry) => entry.name)
        .filter((name) => !name.startsWith("data:")),
    }) }));
});</script></body>"""

if not BROWSER and os.environ.get("CI", "").lower() not in ("true", "1"):
    pytest.skip("no Chromium here (Debian: apt-get install chromium)", allow_module_level=True)


def opened(file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Chromium's answer to opening a file, with a profile of its own."""
    assert BROWSER, "CI tests the report in a browser: install chromium"
    profile = file.parent / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    done = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, file.as_uri()],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What the page said to the console, blocked requests and uncaught errors among it."""
    return [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_the_page_opens_without_a_word_and_shows_every_run(page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page)
    done = opened(file, "--dump-dom")
    assert console(done) == []
    dom = done.stdout
    assert dom.count("<table") == page.count("<table")
    table = dom[dom.index('id="g1-accuracy-table"') :]
    table = table[: table.index("</table>")]
    assert re.findall(r'href="#run-\w+">([^<]+)<', table) == [
        "fp16 w16a16",
        "quarot w4a4",
        "rtn w4a4",
    ]
    assert dom.count("<button") > 20, "headers sort: the script was allowed to run"
    assert "<title>Quantization report: 3 runs</title>" in dom, "no answer became a script"


def test_figures_load_tables_sort_and_questions_are_found(page: str, tmp_path: Path) -> None:
    policy = re.search(r"<meta http-equiv[^>]*>", page)
    assert policy
    file = tmp_path / "probed.html"  # the policy forbids any script but the page's own
    file.write_text(page.replace(policy[0], "").replace("</body>", PROBE))
    done = opened(file, "--dump-dom", "--window-size=500,900")
    assert console(done) == []
    told = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told
    seen = json.loads(unescape(told[1]))
    assert len(seen["images"]) == page.count("<img ") == 8
    assert all(width > 300 and height > 100 for width, height in seen["images"])
    assert seen["requests"] == []
    assert seen["after"] == sorted(seen["before"], reverse=True)
    assert seen["found"] == ["videomme/clip3-2"]
    assert seen["told"] == "1 of 12 questions"
    assert not seen["wide"], "on a narrow screen tables scroll, and not the page"


def test_light_and_dark_are_drawn(page: str, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(page)
    brightness = {}
    for name, flags in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
        picture = tmp_path / f"{name}.png"
        opened(file, f"--screenshot={picture}", "--window-size=1300,1600", *flags)
        pixels = np.asarray(Image.open(picture).convert("L"))
        assert pixels.shape == (1600, 1300)
        assert pixels.std() > 10, "not blank"
        brightness[name] = float(np.median(pixels))
    assert brightness["light"] > 230
    assert brightness["dark"] < 60


def test_a_script_of_another_is_refused(page: str, tmp_path: Path) -> None:
    """Should escaping ever fail, the policy holds."""
    file = tmp_path / "attacked.html"
    attack = "<script>document.title = 'broken'</script><img src='http://192.0.2.1/x.png'></body>"
    file.write_text(page.replace("</body>", attack))
    done = opened(file, "--dump-dom")
    assert "<title>Quantization report" in done.stdout
    assert len([line for line in console(done) if "Content Security Policy" in line]) == 2
