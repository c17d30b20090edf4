"""The built pages in a browser that reaches nothing but this machine, wide and narrow, light and dark.

Every page is opened once at either width; the tests look at what was found there. Skipped, with the reason, where no
page has been built or no Chromium is installed. Nothing is downloaded. Pictures of all pages lie in _build/screens.
"""

import base64
import functools
import gzip
import io
import json
import re
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.font_manager import FontProperties
from PIL import Image
from pypdf import PdfReader
from test_notebooks import files
from unravelling import plots

ROOT = Path(__file__).resolve().parents[1]
BUILT = [p for p in (ROOT / "_build/html", ROOT / "_build/committed") if (p / "index.html").exists()]
HTML = max(BUILT, key=lambda p: (p / "index.html").stat().st_mtime, default=None)
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.glob("book/*.html")) if HTML else ["none"]
ORIGIN = "http://book.test"  # a name that leads nowhere: the route below answers for it
WIDTHS, THEMES = (1280, 390), ("light", "dark")
SCREENS = ROOT / "_build/screens"
HEIGHT = "document.documentElement.scrollHeight"
TALLEST = 65_000  # pixels: of a taller page, as the reference is, a JPEG holds nothing at all

pytestmark = pytest.mark.skipif(HTML is None, reason="no pages are built; `make pages` builds them")

DECODED = """() => {
    document.querySelectorAll('img').forEach(image => image.loading = 'eager');
    return Promise.all([...document.images].map(image => image.decode().catch(() => 0))).then(() => 0); }"""
IMAGES = """() => [...document.querySelectorAll('article img, main img')]
    .map(i => [i.src.slice(-60), i.naturalWidth, i.alt])"""
FORMULAS = """() => [document.querySelectorAll('.math').length, [...document.querySelectorAll('math')]
    .map(m => [m.getBoundingClientRect().width,
        !!m.querySelector('merror') || /\\[[0-9.]+(ex|em|pt)\\]/.test(m.textContent)])]"""
CLIPPED = """() => {
    const folds = [...document.querySelectorAll('details:not([open])')];
    folds.forEach(fold => fold.open = true);
    const wide = [...document.querySelectorAll('article div.math math')].filter(m => m.scrollWidth > m.clientWidth + 1)
        .map(m => [m.parentElement.id, m.textContent.slice(0, 40), m.scrollWidth, m.clientWidth]);
    folds.forEach(fold => fold.open = false);
    return wide; }"""
WIDEST = """() => [document.documentElement.scrollWidth, [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 3)
    .map(e => e.tagName + '.' + e.className)]"""
CONTRASTS = """() => {
    const behind = e => {  // grounds may be tints of what lies below them
        if (!e) return [255, 255, 255];
        const [r, g, b, a = 1] = getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number);
        return a === 1 ? [r, g, b] : behind(e.parentElement).map((c, i) => (1 - a) * c + a * [r, g, b][i]); };
    return [...document.querySelectorAll('article p, article figcaption, article a:not(.headerlink)')]
        .filter(e => e.checkVisibility() && e.textContent.trim())
        .map(e => [getComputedStyle(e).color, `rgb(${behind(e)})`, e.textContent.trim().slice(0, 40)]); }"""
FIGURES = """() => [...document.querySelectorAll('.cell_output :is(img:not(.tag_photographs *), .unravelling)')]
    .filter(e => e.checkVisibility()).map(e => {
    const r = e.getBoundingClientRect(); return [r.left + scrollX, r.top + scrollY, r.width, r.height]; })"""
DRAWINGS = """() => [[...document.querySelectorAll('article figure img')].filter(e => e.checkVisibility())
    .map(e => [new URL(e.src).pathname, e.getBoundingClientRect().width, e.naturalWidth]),
    [...document.querySelectorAll('article svg text')].filter(e => e.checkVisibility())
    .map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)]"""
SCROLLERS = """() => [...document.querySelectorAll('article *')].filter(e => e.checkVisibility()
    && e.scrollWidth > e.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(e).overflowX) && e.tabIndex < 0
    && !e.querySelector('a, button, input, select, [tabindex="0"]')).map(e => e.tagName + '.' + e.className)"""
AXE = """() => axe.run(document, {resultTypes: ['violations']}).then(found => found.violations
    .filter(v => ['critical', 'serious'].includes(v.impact))
    .map(v => [v.id, v.nodes.length, v.nodes.slice(0, 3).map(n => n.html.slice(0, 160))]))"""


@pytest.fixture(scope="session")
def look(browser):
    """`look(path, width)`: what a browser finds on a page. Colours and pictures are by theme."""
    axe = Path(find_spec("axe_playwright_python").origin).with_name("axe.min.js")
    asked, errors, sizes = [], [], []

    def answer(route):
        path = HTML / route.request.url.removeprefix(ORIGIN).split("?")[0].lstrip("/")
        if path.is_file():
            text = path.suffix in {".html", ".css", ".js", ".svg", ".json"}  # which servers send compressed
            sizes.append(len(gzip.compress(path.read_bytes())) if text else path.stat().st_size)
            route.fulfill(path=path)
        else:
            asked.append(route.request.url)
            route.fulfill(status=404)

    @functools.cache
    def window(width):
        context = browser.new_context(viewport={"width": width, "height": 900}, is_mobile=width < 600,
                                      service_workers="block")
        context.route("**/*", lambda route: (asked.append(route.request.url), route.abort()))
        context.route(f"{ORIGIN}/**", answer)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        return page

    @functools.cache
    def find(path, width):
        for notes in (asked, errors, sizes):
            notes.clear()
        page = window(width)
        page.emulate_media(color_scheme="light")
        page.goto(f"{ORIGIN}/{path}")
        page.wait_for_url(f"{ORIGIN}/book/*.html")  # where the front page leads
        page.evaluate(DECODED)
        bars = page.locator(".search-button__button, .search-button-field, form.bd-search").all()
        found = {"url": page.url, "title": page.title(), "asked": [*asked], "errors": [*errors], "bytes": sum(sizes),
                 "images": page.evaluate(IMAGES), "formulas": page.evaluate(FORMULAS),
                 "search bars": sum(bar.is_visible() for bar in bars), "unreachable": page.evaluate(SCROLLERS),
                 "drawings": page.evaluate(DRAWINGS), "clipped": page.evaluate(CLIPPED)}
        page.evaluate(axe.read_text())
        found["axe"] = page.evaluate(AXE)
        for theme in THEMES:
            page.emulate_media(color_scheme=theme)
            page.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
            picture = SCREENS / f"{Path(path).stem}-{width}-{theme}.jpg"
            box = {"x": 0, "y": 0, "width": width, "height": min(page.evaluate(HEIGHT), TALLEST)}
            drawn = page.screenshot(path=picture, full_page=True, clip=box, type="jpeg", quality=70,
                                    animations="disabled")
            assert drawn, f"{picture.name} is empty"
            found[theme] = {"widest": page.evaluate(WIDEST), "contrasts": page.evaluate(CONTRASTS),
                            "figures": page.evaluate(FIGURES), "picture": drawn}
        return found

    return find


def test_front_page_leads_to_the_index(look):
    found = look("index.html", 1280)
    assert found["url"] == f"{ORIGIN}/book/index.html"
    assert found["title"]


@pytest.mark.parametrize("path", PAGES)
def test_math_is_there_without_a_script(look, path):
    written, formulas = look(path, 1280)["formulas"]
    assert len(formulas) >= written
    assert [wide for wide, _ in formulas if not wide] == []
    assert not any(wrong for _, wrong in formulas)
    assert not re.search(r"<script[^>]*math", (HTML / path).read_text(), flags=re.I)


@pytest.mark.parametrize("path", PAGES)
def test_no_line_ends_before_a_per_cent_or_a_comma_behind_a_formula(path):
    text = re.sub(r"(?s)<(pre|script|style|title)\b.*?</\1>", "", (HTML / path).read_text())
    assert re.findall(r".{20}\d %", text) == []
    assert len(re.findall(r"</math>[,.;:)]", text)) == text.count('<span class="tied"><math>')


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", PAGES)
def test_page_asks_for_nothing_that_is_not_in_the_book(look, path, width):
    found = look(path, width)
    assert found["asked"] == []
    assert found["errors"] == []


@pytest.mark.parametrize("path", PAGES)
def test_page_is_light(look, path):
    assert 10_000 < look(path, 1280)["bytes"] < 1_500_000


@pytest.mark.parametrize("path", PAGES)
def test_images_load_and_are_described(look, path):
    assert [image for image in look(path, 1280)["images"] if not image[1] or not image[2].strip()] == []


@pytest.mark.parametrize("path", PAGES)
def test_there_is_one_search_bar(look, path):
    assert look(path, 1280)["search bars"] == 1


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", PAGES)
def test_accessibility_rules_are_kept(look, path, width):
    assert look(path, width)["axe"] == []


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", PAGES)
def test_what_scrolls_can_be_reached_with_the_keyboard(look, path, width):
    assert look(path, width)["unreachable"] == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("path", PAGES)
def test_narrow_page_does_not_scroll_sideways(look, path, theme):
    width, widest = look(path, 390)[theme]["widest"]
    assert width <= 391, widest


@pytest.mark.parametrize("path", PAGES)
def test_no_formula_is_wider_than_a_phone(look, path):
    """A formula that scrolls looks as if it ended at the edge: such a one is written in two lines."""
    assert look(path, 390)["clipped"] == []


@functools.cache
def smallest_type():
    """Points of the smallest type that figures are drawn with: by the style, in the library, or in a notebook."""
    with plt.rc_context():
        plots.use_style()
        sizes = [value for name, value in plt.rcParams.items() if re.search(r"(font|label|title).*size$", name)]
    texts = [Path(plots.__file__).read_text()]
    for path in ROOT.glob("book/*.ipynb"):
        texts += ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    for text in texts:
        found = re.findall(r"(?:font|label|title)_?size['\"]?[=:] *([\w.'\"]+)", text)
        sizes += [size.strip("\"'") for size in found]
    return min(FontProperties(size=float(size) if str(size)[0].isdigit() else size).get_size_in_points()
               for size in sizes if size is not None)


@pytest.mark.parametrize("path", PAGES)
def test_letters_of_figures_can_be_read_on_a_phone(look, path):
    """At least 9 pixels, of which a phone's page is 390 wide; indices and exponents are smaller than their text."""
    drawn, texts = look(path, 390)["drawings"]
    scales = [wide / natural * Image.open(HTML / name.lstrip("/")).info["dpi"][0] / 72 for name, wide, natural in drawn]
    assert [round(smallest_type() * scale, 1) for scale in scales if smallest_type() * scale < 9] == []
    assert [text for text in texts if text < 9] == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("path", PAGES)
def test_text_stands_out_from_its_background(look, path, theme):
    """WCAG 2.1's contrast of 4.5 for paragraphs, captions and links of the article."""
    pairs = look(path, 1280)[theme]["contrasts"]
    assert pairs
    assert [pair for pair in pairs if contrast(pair[0], pair[1]) < 4.5] == []


def luminance(channels):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in channels)]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    lighter, darker = sorted((luminance([float(c) for c in re.findall(r"[\d.]+", colour)[:3]])
                              for colour in (one, other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def rim(picture, box):
    """Median luminance along the edge of a box of a picture."""
    left, top, wide, high = map(round, box)
    part = Image.open(io.BytesIO(picture)).convert("RGB").crop((left, top, left + wide, top + high))
    edge = [part.getpixel((x, y)) for x in range(2, wide - 2, 4) for y in (2, high - 3)]
    edge += [part.getpixel((x, y)) for x in (2, wide - 3) for y in range(2, high - 2, 4)]
    return sorted(map(luminance, edge))[len(edge) // 2]


@pytest.mark.parametrize("path", PAGES)
def test_figures_have_the_ground_of_their_theme(look, path):
    found = look(path, 1280)
    assert [rim(found["light"]["picture"], box) for box in found["light"]["figures"]] == pytest.approx(
        [1.0] * len(found["light"]["figures"]), abs=0.1)
    assert [rim(found["dark"]["picture"], box) for box in found["dark"]["figures"]] == pytest.approx(
        [0.0] * len(found["dark"]["figures"]), abs=0.1)


def opened(browser, path, theme, **options):
    """A page by itself, to do something with it."""
    page = browser.new_page(color_scheme=theme, **options)
    page.route("**/*", lambda r: r.fulfill(path=HTML / r.request.url.removeprefix(f"{ORIGIN}/").split("?")[0]))
    page.goto(f"{ORIGIN}/{path}")
    if options.get("java_script_enabled", True):
        page.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
    return page


PATCHES = """source => {
    const put = (kind, place) => {
        const cell = document.createElement('div');
        cell.className = 'cell ' + kind;
        cell.innerHTML = `<div class="cell_output"><img alt="A patch." width="32" height="32" src="${source}"></div>`;
        place.prepend(cell);
        return cell.querySelector('img').decode(); };
    const place = document.querySelector('article section');
    return Promise.all([put('tag_photographs', place), put('tag_hide-input', place)]).then(() => 0); }"""


@pytest.mark.parametrize("theme", THEMES)
def test_photographs_keep_their_pixels_where_drawings_are_turned_round(browser, theme):
    """A dull blue patch, once in a cell with the tag and once in one without, in the style of a built page."""
    color, file = (30, 90, 160), io.BytesIO()
    Image.new("RGB", (32, 32), color).save(file, "PNG")
    page = opened(browser, "book/index.html", theme)
    page.evaluate(PATCHES, "data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    seen = {}
    for kind in ("tag_photographs", "tag_hide-input"):
        shot = page.locator(f".{kind} img[alt='A patch.']").screenshot()
        seen[kind] = Image.open(io.BytesIO(shot)).convert("RGB").getpixel((16, 16))
    page.close()
    assert seen["tag_photographs"] == color
    if theme == "light":
        assert seen["tag_hide-input"] == color
    else:
        assert luminance(seen["tag_hide-input"]) > luminance(color) + 0.1


PAPER = """() => {
    const seen = e => getComputedStyle(e), figure = seen(document.querySelector('.cell_output figure img'));
    const inks = [...document.querySelectorAll('article :is(p, td, th, .admonition-title)')]
        .filter(e => e.checkVisibility()).map(e => seen(e).color);
    const grounds = [...document.querySelectorAll('body, article, article *')].filter(e => e.checkVisibility())
        .map(e => seen(e).backgroundColor).filter(c => !c.startsWith('rgba'));
    return [figure.filter, figure.mixBlendMode, [...new Set(inks)], [...new Set(grounds)],
        document.querySelectorAll('details.below-input').length,
        document.querySelectorAll('details.below-input:not([open])').length]; }"""


@pytest.mark.parametrize("theme", THEMES)
def test_paper_is_light_in_either_theme(browser, theme):
    """Figures keep their pixels, ink is dark and grounds are light; what exercises put out is open. All goes back."""
    page = opened(browser, "book/05-deleting-blocks.html", theme)
    page.emulate_media(media="print", color_scheme=theme)
    page.wait_for_function("document.documentElement.dataset.theme == 'light'")
    page.wait_for_function("document.querySelector('details.below-input').open")
    turned, blended, inks, grounds, results, folded = page.evaluate(PAPER)
    assert (turned, blended) == ("none", "normal")
    assert [ink for ink in inks if contrast(ink, "rgb(255, 255, 255)") < 4.5] == []
    assert [ground for ground in grounds if contrast(ground, "rgb(0, 0, 0)") < 9] == []
    assert results > 0
    assert folded == 0
    page.emulate_media(media="screen", color_scheme=theme)
    page.wait_for_function(f"document.documentElement.dataset.theme == '{theme}'")
    page.wait_for_function("!document.querySelector('details.below-input').open")
    page.close()


def test_what_exercises_put_out_is_on_paper_without_a_script(browser):
    page = opened(browser, "book/05-deleting-blocks.html", "light", java_script_enabled=False)
    outputs = page.locator("details.below-input pre").all_text_contents()
    printed = "".join(sheet.extract_text() for sheet in PdfReader(io.BytesIO(page.pdf())).pages)
    page.close()
    assert outputs
    assert [text for text in outputs if "".join(text.split()) not in "".join(printed.split())] == []


TABLES = """() => {
    const put = (width) => {
        const table = document.createElement('table');
        table.className = 'table';
        table.innerHTML = `<tr><td style="min-width: ${width}px; height: 40px"></td></tr>`;
        document.querySelector('article section').prepend(table);
        return table; };
    put(100).id = 'narrow';
    put(900).id = 'wide'; }"""


@pytest.mark.parametrize("theme", THEMES)
def test_a_shadow_says_where_a_table_goes_on(browser, theme):
    page = opened(browser, "book/index.html", theme, viewport={"width": 390, "height": 900})
    page.evaluate(TABLES)

    def shadows(name, place):
        """Whether the left and the right end differ from the middle."""
        page.locator(name).evaluate("(table, place) => { table.scrollLeft = place; }", place)
        picture = Image.open(io.BytesIO(page.locator(name).screenshot())).convert("RGB")
        left, middle, right = (picture.getpixel((x, 20)) for x in (3, picture.width // 2, picture.width - 4))
        return [sum(abs(a - b) for a, b in zip(end, middle, strict=True)) > 60 for end in (left, right)]

    assert shadows("#narrow", 0) == [False, False]
    assert shadows("#wide", 0) == [False, True]
    assert shadows("#wide", 200) == [True, True]
    assert shadows("#wide", 2000) == [True, False]
    page.close()


def test_some_page_has_formulas_and_figures_and_every_page_is_seen(look):
    found = [look(path, 1280) for path in PAGES]
    assert sum(len(each["formulas"][1]) for each in found) > 100
    assert sum(len(each["dark"]["figures"]) for each in found) > 20
    drawings = [look(path, 390)["drawings"] for path in PAGES]
    assert all(sum(map(len, kind)) > 20 for kind in zip(*drawings, strict=True))
    assert len(PAGES) == len(files(ROOT / "book", {".ipynb", ".md"}))
