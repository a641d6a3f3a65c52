"""The page is whole in itself, says everything, repeats to the byte and believes no answer."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from morphoquant import report
from morphoquant.analysis.page import gather, render
from morphoquant.analysis.page.pictures import compact
from morphoquant.analysis.page.render import fixed, kind, signed

VOID = {"meta", "link", "img", "input", "br", "line", "circle"}


class Outline(HTMLParser):
    """Elements with their attributes, ids, and the first element that is closed wrongly."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.wrong = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        if not self.stack or self.stack.pop() != tag:
            self.wrong = self.wrong or f"</{tag}> at {self.getpos()}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def test_it_is_well_formed_and_every_link_has_its_target(outline: Outline) -> None:
    assert outline.wrong == ""
    assert outline.stack == []
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len(set(ids)), "an id stands once"
    targets = {f"#{name}" for name in ids}
    for link in outline.all("a"):
        assert link["href"] in targets
    for _, attrs in outline.elements:
        assert attrs.get("aria-labelledby", ids[0]) in ids


def test_it_refers_to_nothing_outside_itself(page: str, outline: Outline) -> None:
    for _, attrs in outline.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attrs.get(name) or "#").startswith(("#", "data:"))
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    policy = next(m["content"] for m in outline.all("meta") if "http-equiv" in m)
    assert policy
    assert "default-src 'none'" in policy


def test_answers_and_reasons_are_text(page: str, outline: Outline) -> None:
    assert "&lt;script&gt;document.title" in page
    assert "no &lt;b&gt;room&lt;/b&gt;" in page
    assert len(outline.all("script")) == 1, "the page's own"
    assert not outline.all("b")


def test_the_same_directories_give_the_same_bytes(compared: Any, page: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "moved"
    shutil.copytree(compared.root, copy)
    assert render(gather([copy])) == page
    assert str(compared.root) not in page
    assert str(compared.root.parent) not in page


def test_everything_is_there(page: str, outline: Outline) -> None:
    for words in (
        "rtn w4a4",
        "no difference found",
        "method=gptq",
        "interrupted, or still running",
        "cannot rank good methods",
        "effective weight bits are the manifest",
        "python run.py method=rtn",
        "f00d, changed since",
        "model.layers.2.mlp_out_proj",
    ):
        assert words in page
    assert page.count("✗ does not hold") == 0
    pictures = outline.all("img")
    assert len(pictures) == 2 + 6, "bits and depth of all; six of the run with tables"
    for picture in pictures:
        assert len(picture["alt"] or "") > 40
        assert int(picture["width"] or 0) > 300
    assert len(outline.all("article")) == 3
    for header in outline.all("th"):
        assert header["scope"] in ("col", "row")
    assert len(outline.all("caption")) == len(outline.all("table"))


def test_intervals_that_cover_zero_are_marked(page: str) -> None:
    table = page[page.index('id="g1-accuracy-table"') : page.index('id="g1-pairs"')]
    cells = re.findall(r'<td class="num (\w+)" data-sort="[^"]*">(.*?)</td>', table, re.DOTALL)
    covering = [text for name, text in cells if name == "covers"]
    assert len(covering) == 3 + 1, "quarot everywhere, rtn on MMMU"
    assert all("≈ no difference found" in text for text in covering)
    assert [("▼ lower" in text) for name, text in cells if name == "lower"] == [True, True]


def test_figures_can_be_left_out(compared: Any) -> None:
    page = render(gather([compared.root]), most_atlases=0)
    assert "Not drawn: quarot w4a4, rtn w4a4" in page
    assert page.count("<img ") == 1, "bits against accuracy stays"


def test_a_run_that_does_not_bear_out_its_result_is_loud(runs: Any) -> None:
    runs.add("rtn", mean=12.0)
    page = render(gather([runs.root]))
    assert 'role="alert"' in page
    assert "✗ does not hold" in page


def test_runs_that_ask_nothing_have_their_provenance(runs: Any) -> None:
    base = runs.add("fp16", limit=0)
    apart = {"samples": 5, "kl": 0.25, "top1_agreement": 0.8}
    runs.add("rtn", reference=base, limit=0, tables=("errors",), held_out=apart)
    runs.sweep("2026-01-01", [{"overrides": "method=rtn", "began": "here"}])
    page = render(gather([runs.root]), most_atlases=0)
    assert "there is no accuracy to compare" in page
    assert "KL 0.25 nats, top-1 agreement 80.0 % (5 prompts)" in page
    assert "Output SQNR" in page
    assert "1 run or were killed" in page
    assert "does not hold" not in page
    assert Outline(page).wrong == ""


def test_numbers_as_they_are_shown() -> None:
    assert [signed(x) for x in (0.44, -19.06, 0.0, -0.04)] == ["+0.4", "−19.1", "0.0", "0.0"]
    assert [fixed(x, 2) for x in (4.125, float("nan"), None)] == ["4.12", "–", "–"]
    assert kind("lower, not after correction") == "weak"
    assert kind("interval unknown") == "covers"


def test_compact_keeps_what_is_referred_to() -> None:
    svg = """<?xml version="1.0"?><svg><!-- 5 --><g id="unused">
      <path id="long-name" d="M 1.23456 7 L 0.5 2" transform="scale(0.015625)"/>
      <use xlink:href="#long-name" x="3.14159" style="fill: #123456"/></g></svg>"""
    assert compact(svg) == (
        "<svg><g><path id='i0' d='M 1.23 7 L 0.5 2' transform='scale(0.015625)'/>"
        "<use href='#i0' x='3.14' style='fill: #123456'/></g></svg>"
    )


def test_the_command_writes_and_refuses(
    compared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "report.html"
    assert report.main([str(compared.root), "--output", str(target), "--figures", "0"]) == 0
    assert "3 finished runs, 1 unfinished, 1 failed jobs" in capsys.readouterr().out
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert report.main([str(tmp_path / "nowhere"), "--output", str(target)]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert report.main([str(compared.root), "--output", str(tmp_path)]) == 1
    assert "name a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main([str(compared.root), "--figures", "-1"])
    assert "not a number of runs" in capsys.readouterr().err
