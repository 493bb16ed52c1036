"""The report as a browser shows it: light and dark, wide and narrow, by keyboard."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.image import imread
from playwright.sync_api import Browser, Page, sync_playwright

from shared.report import write_report
from tests.unit.report_pages import central_run, federated_run, federation_with_silos, make_run

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    " --disable-quic"
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium"
)

# The contrast of each text's colour with the nearest background below it (WCAG 2.2, 1.4.3).
LOWEST_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3)
    .map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement)
        layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, layer) =>
      below.map((v, i) => v + (layer[i] - v) * layer[3] / 255), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("style, .unseen, [aria-hidden]")) continue;
    const style = getComputedStyle(element);
    const text = luminance(rgba(element.closest("svg") ? style.fill : style.color));
    const below = luminance(ground(element));
    const contrast = (Math.max(text, below) + 0.05) / (Math.min(text, below) + 0.05);
    found.push([contrast, node.data.trim().slice(0, 40)]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    sample = {"prompt": "The ", "text": "import statement " * 20}
    runs = [
        central_run(folder / "a_run_of_a_rather_long_name_indeed", accuracy=0.5),
        federated_run(
            folder / "b",
            model__options="units = [64, 32]\\ndropout_rate = 0.25\\nactivation = 'gelu'",
        ),
        federation_with_silos(folder / "c"),
        make_run(
            folder / "d",
            [],
            {"runtime": "single", "world_size": 1, "metrics": {}, "sample": sample},
        ),
    ]
    write_report(runs, folder / "page.html")
    return folder / "page.html"


def shown(browser: Browser, report: Path, width: int, scheme: str) -> Page:
    page = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 800}
    ).new_page()
    page.goto(report.as_uri())
    return page


def test_nothing_is_fetched_and_nothing_complained_of(browser: Browser, report: Path):
    page = browser.new_page()
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("request", lambda request: heard.append(request.url))
    page.goto(report.as_uri())
    page.wait_for_load_state("networkidle")
    assert heard == [report.as_uri()]


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_the_page_is_as_wide_as_the_screen_and_wide_tables_scroll_by_themselves(
    browser: Browser, report: Path, width: int
):
    page = shown(browser, report, width, "light")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('.wide')].map(e => e.scrollWidth))"
    )
    assert width == 1280 or widest > width


def test_a_phone_shows_metrics_without_scrolling(browser: Browser, report: Path):
    page = shown(browser, report, 375, "light")
    results = page.get_by_role("table", name="Results at the end of each run")
    box = results.get_by_role("columnheader", name="test loss").bounding_box()
    assert box is not None
    assert box["x"] + box["width"] <= 375


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_goes_on_beyond_the_screen_is_shaded_there_until_it_is_scrolled(
    browser: Browser, report: Path, scheme: str
):
    def edge(width: int, scroll: bool) -> set[bytes]:
        """The colours at the right edge of the table of results, in its caption's line."""
        page = shown(browser, report, width, scheme)
        table = page.locator(".wide").first
        if scroll:
            table.evaluate("e => { e.scrollLeft = e.scrollWidth }")
        box = table.bounding_box()
        assert box is not None
        clip = {"x": box["x"] + box["width"] - 3, "y": box["y"] + 2, "width": 2, "height": 2}
        pixels = imread(io.BytesIO(page.screenshot(clip=clip)))
        return {pixel.tobytes() for pixel in pixels.reshape(-1, pixels.shape[-1])}

    (plain,) = edge(1800, scroll=False)
    assert edge(375, scroll=True) == {plain}
    assert plain not in edge(375, scroll=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(browser: Browser, report: Path, scheme: str):
    page = shown(browser, report, 1280, scheme)
    for details in page.locator("summary").all():
        details.click()
    contrast, text = page.evaluate(LOWEST_CONTRAST)
    assert contrast >= 4.5, text
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 24, 29)"}[scheme]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_stand_out_from_the_page(browser: Browser, report: Path, scheme: str):
    """WCAG 2.2, 1.4.11: 3 to 1 for what must be seen."""
    page = shown(browser, report, 1280, scheme)
    page.evaluate(
        "document.querySelectorAll('[aria-hidden]').forEach(e => e.removeAttribute('aria-hidden'))"
    )
    assert page.locator(".legend b").count() == 4
    page.evaluate("document.body.replaceChildren(document.querySelector('.legend'))")
    contrast, _ = page.evaluate(LOWEST_CONTRAST)
    assert contrast >= 3.0


def test_the_keyboard_reaches_sections_and_wide_tables_and_opens_what_is_folded(
    browser: Browser, report: Path
):
    page = shown(browser, report, 375, "light")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("[document.activeElement.tagName, document.activeElement.ariaLabel]")
        )
        if reached[-1][0] == "SUMMARY" and page.locator("details[open]").count() == 0:
            page.keyboard.press("Enter")
    assert ["A", None] in reached
    assert ["DIV", "Results at the end of each run"] in reached
    assert page.locator("details[open]").count() == 1


def test_a_screen_reader_has_names_for_everything(browser: Browser, report: Path):
    page = shown(browser, report, 1280, "light")
    assert page.locator("table").count() == page.locator("table > caption").count() > 4
    assert page.locator("th").count() == page.locator("th[scope]").count()
    assert page.locator("svg").count() == page.locator("svg[role=img][aria-label]").count() > 4
    assert (
        page.locator("main > section[aria-labelledby] > h2").count()
        == page.locator("nav a").count()
        > 5
    )
    assert page.get_by_role("navigation", name="Sections").count() == 1
    assert (
        page.get_by_role("table", name="Silos of c").get_by_role("rowheader", name="south").count()
        == 1
    )
