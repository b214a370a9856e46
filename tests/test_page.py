"""The page of a report: all is on it, nothing of a run's text becomes markup, and a browser shows it as meant."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from browser import Browser
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import distilled, recipe, write

from hetero_kt import report
from hetero_kt.report import charts, page
from hetero_kt.report.comparison import Arm, Experiment

EVIL = "<script>alert(1)</script>"
LONG = "a_recipe_with_a_name_that_is_longer_than_a_narrow_screen_is_wide_and_has_no_space_in_it"
COMMAND = (
    f"python launchers/cifar_mergenet.py --compare noise --seeds 0 1 2 --output-dir '\"><img src=x onerror={EVIL}>'"
)


def log_transfers(folder: Path, steps: int = 20) -> None:
    """What a transfer logs, and where a result came from."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(1, steps + 1):
            values: dict[str, Any] = {
                "to_cnn/gate": 0.12 - step / 400,
                "to_cnn/sensitivity": None,
                "to_cnn/change": 0.01,
            }
            values |= {"to_cnn/sensitivity": step / 1000} if step > 2 else {}
            values |= {f"to_cnn/omega{layer}.{i}": 0.25 for layer in range(2) for i in range(4)}
            file.write(json.dumps({"step": step, **values}) + "\n")


def note_origin(folder: Path) -> None:
    file = folder / "result.json"
    told = {"world_size": 2, "device": "cpu", "zero_stage": {"cnn": 1}, "versions": {"torch": "2.15.0"}}
    told |= {"commit": "0123456789ab+", "command": COMMAND, "wall_seconds": 12.5}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four arms of three seeds with transfers in them, names that look like markup, one recipe of a long name, a
    damaged run, and a published table."""
    root = tmp_path_factory.mktemp("report") / "runs"
    for seed in range(3):
        for arm, gain in (("none", 0), ("transfer", 1 + seed), ("noise", 0.5 - seed), ("shuffled", -seed)):
            folder = write(root, recipe(arm, seed, 20, "toy"), 50 + seed + gain)
            note_origin(folder)
            if arm != "none":
                log_transfers(folder)
        for objective, gain in (("none", 0), ("kd", 3), ("ofa", 2)):
            one = distilled(objective, seed)
            note_origin(write(root, type(one)(**vars(one) | {"name": LONG}), 50 + seed + gain * (1 + seed / 9)))
    evil = recipe("none", 0, 20, f"x{EVIL}".replace("/", "|"))
    note_origin(write(root, evil, 50))
    (write(root, recipe("frozen", 0), 9) / "result.json").write_text('{"recipe": ')
    path = root.parent / "new" / "report.html"
    page.write(report.gather([root], tables=["mergenet-1"]), path)
    return path


class Outline(HTMLParser):
    """Elements with their attributes, and the text below headings and captions."""

    VOID = ("meta", "link", "img", "br", "line", "circle", "polygon", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_the_page_has_all_of_the_report(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for part in (
        *(
            "toy: cnn",
            "MergeNet, Table 1",
            "66.23 (+2.36)",
            "+2.00",
            "[-0.48, +4.48]",
            "gate",
            "omega of layer 2",
        ),
        *("source sensitivity", "row &lt;- column", "0123456789ab+", "torch 2.15.0", "2 x cpu, ZeRO-1", "12 s"),
        *("toy/frozen/seed0 has a result.json that cannot be read", "toy, transfer, seeds 0, 1, 2"),
    ):
        assert part in text, part


def test_every_form_of_a_transfer_shows_what_its_adapter_weighs() -> None:
    forms = (("transfer", "transfer"), ("transfer (rank 8)", "transfer"), ("noise", "noise"))
    arms = tuple(Arm(label, name, {0: SimpleNamespace(folder=Path(label))}) for label, name in forms)
    logs = {Path(label): {"to_cnn/omega0.0": {1: 0.25, 2: 0.5}} for label, _ in forms}
    found = page._omega(Experiment("toy", arms), logs, "to_cnn")
    said = [chart.caption.split(", weights")[0] for chart in found]
    assert said == ["omega of layer 1, transfer", "omega of layer 1, transfer (rank 8)"]
    (alone,) = page._omega(Experiment("toy", arms[::2]), logs, "to_cnn")
    assert alone.caption.startswith("omega of layer 1, weights of")


def test_text_of_runs_never_becomes_markup(file: Path) -> None:
    outline = Outline(file.read_text(encoding="utf-8"))
    names = {name for name, _ in outline.found}
    assert not names & {"script", "img", "iframe", "object", "link", "base", "form"}
    assert not [key for _, attributes in outline.found for key in attributes if key.startswith("on")]
    assert EVIL.replace("/", "|").replace("<", "&lt;").replace(">", "&gt;") in file.read_text(encoding="utf-8")


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_any_label_is_escaped_in_charts(label: str) -> None:
    steps = np.arange(3.0)
    chart = charts.lines(label, label, [charts.Curve(label, 0, steps, steps, steps * 0)])
    assert chart is not None
    assert {name for name, _ in Outline(str(chart.svg)).found} <= {
        "svg",
        "line",
        "text",
        "polygon",
        "polyline",
        "circle",
    }


def test_nothing_is_loaded_from_elsewhere(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    outline = Outline(text)
    assert not [a for _, a in outline.found if a.keys() & {"src", "srcset", "data", "action"}]
    assert all((a["href"] or "").startswith("#") for a in outline.all("a"))
    assert "url(" not in text
    assert "@import" not in text


def test_headings_tables_and_charts_can_be_heard(file: Path) -> None:
    outline = Outline(file.read_text(encoding="utf-8"))
    levels = [int(name[1]) for name, _ in outline.found if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(outline.all("caption")) == len(outline.all("table")) > 4
    assert all(a["scope"] in ("col", "row") for a in outline.all("th"))
    drawn = [a for a in outline.all("svg") if a.get("aria-hidden") != "true"]
    assert len(drawn) == len(outline.all("figcaption")) > 10
    assert all(a["role"] == "img" and a["aria-label"] for a in drawn)
    targets = {a["id"] for _, a in outline.found if "id" in a}
    assert {(a["href"] or "")[1:] for a in outline.all("a")} <= targets


def test_a_report_of_nothing_finished_is_a_page_too(tmp_path: Path) -> None:
    (write(tmp_path, recipe(), 1) / "result.json").unlink()
    text = page.html(report.gather([tmp_path], tables=()))
    assert "No recipes" in text
    assert "is not finished: it does not count." in text
    Outline(text)


@pytest.mark.parametrize("told", [{"versions": 3, "zero_stage": [], "wall_seconds": "x", "command": None}, {}])
def test_a_result_that_tells_little_about_itself(tmp_path: Path, told: dict[str, Any]) -> None:
    result = write(tmp_path, recipe(), 50) / "result.json"
    result.write_text(json.dumps(json.loads(result.read_text()) | told))
    assert "50.00" in page.html(report.gather([tmp_path], tables=()))


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    high = low + max(span, 1e-6 * abs(low))
    span = high - low
    found = charts.ticks(low, high)
    assert 2 <= len(found) <= 12
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)


def test_a_curve_without_a_change_has_an_axis_that_says_so() -> None:
    steps = np.arange(5.0)
    level = np.full(5, 53.18)
    chart = charts.lines("x", "", [charts.Curve("a", 0, steps, level + 1e-12 * steps, level * 0)])
    assert chart is not None
    labels = re.findall(r'text-anchor="end">([^<]*)<', chart.svg)
    assert len(set(labels)) == len(labels) > 1


def test_arms_of_one_experiment_look_different() -> None:
    arms = tuple(Arm(name, name, {}) for name in ("none", "fbt", "kd", "ofa", "transfer", "shuffled"))
    styles = page._styles(Experiment("x", arms))
    assert len(set(styles.values())) == len(arms)
    assert (styles["none"], styles["transfer"], styles["shuffled"]) == (0, 1, 3)


def test_a_single_evaluation_is_no_curve() -> None:
    one = np.ones(1)
    assert charts.lines("x", "", [charts.Curve("a", 0, one, one, one)]) is None


# --- in a browser ---

WIDER = """
[...document.querySelectorAll("body *")].filter(e => {
    const box = e.getBoundingClientRect();
    return box.right > innerWidth + 1 && !e.closest(".scroll, .unseen");
}).map(e => e.tagName + " " + e.className).slice(0, 5)
"""
CUT = """
[...document.querySelectorAll("figure > svg")].filter(svg => {
    const outer = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].some(t => {
        const box = t.getBoundingClientRect();
        return box.left < outer.left - 1 || box.right > outer.right + 1 || box.bottom > outer.bottom + 1;
    });
}).map(svg => svg.getAttribute("aria-label").slice(0, 80))
"""
FAINT = """
(() => {
    const light = c => { c = c / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    const parse = s => (s.match(/[\\d.]+/g) || []).map(Number);
    const level = c => 0.2126 * light(c[0]) + 0.7152 * light(c[1]) + 0.0722 * light(c[2]);
    const paper = e => {
        for (; e; e = e.parentElement) {
            const c = parse(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] === 1) return c;
        }
        return [255, 255, 255];
    };
    const faint = new Set();
    for (const e of document.querySelectorAll("body *")) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const style = getComputedStyle(e);
        const ink = parse(e instanceof SVGElement ? style.fill : style.color);
        const [a, b] = [level(ink), level(paper(e))].sort((x, y) => y - x);
        if ((a + 0.05) / (b + 0.05) < 4.5) faint.add(e.tagName + "." + (e.getAttribute("class") || ""));
    }
    return [...faint];
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    started = Browser()
    yield started
    started.close()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390, 320])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_without_the_network(browser: Browser, file: Path, width: int, dark: bool) -> None:
    browser.open(file, width, dark=dark)
    assert browser.requests() == [file.as_uri()]
    assert browser.complaints() == []
    assert browser.evaluate("document.querySelectorAll('table').length") > 4
    assert browser.evaluate("[...document.querySelectorAll('figure > svg')].every(e => e.clientHeight > 60)")
    assert browser.evaluate("document.querySelectorAll('figure > svg polyline').length") > 20
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(WIDER) == []
    assert browser.evaluate(CUT) == []
    assert browser.evaluate(FAINT) == []
    boxes = browser.evaluate("[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth > e.clientWidth)")
    assert any(boxes) or width > 600, "wide tables scroll in their own box"
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (not dark)


@pytest.mark.slow
@pytest.mark.browser
def test_the_same_text_is_no_script_to_a_browser(browser: Browser, file: Path) -> None:
    browser.open(file, 800)
    assert browser.evaluate("document.querySelectorAll('script, img').length") == 0
    assert EVIL in browser.evaluate("document.querySelector('.commands').textContent")


@pytest.mark.slow
@pytest.mark.browser
def test_it_can_be_printed(browser: Browser, file: Path) -> None:
    browser.open(file, 718, dark=True)  # A4 between its margins, at 96 dots an inch
    printed = browser.pdf()
    assert printed.startswith(b"%PDF")
    assert printed.count(b"/Type /Page\n") > 1 or printed.count(b"/Type /Page") > 2
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("document.documentElement.scrollWidth") <= 718
    browser.call("Emulation.setEmulatedMedia", media="")


@pytest.mark.slow
@pytest.mark.browser
def test_the_browser_would_notice(browser: Browser, tmp_path: Path) -> None:
    """A page that is too wide, asks the network and throws."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<body style='color: #999; background: #fff'><p>faint</p><div style='width: 3000px'>wide</div>"
        "<img src='https://example.org/x.png'><script>throw new Error('no')</script>"
    )
    browser.open(bad, 390)
    assert len(browser.requests()) == 2
    assert len(browser.complaints()) >= 2
    assert "DIV " in browser.evaluate(WIDER)
    assert "P." in browser.evaluate(FAINT)
