"""The built pages in a browser that reaches nothing but this machine: math, images, search, narrow screens.

Skipped, with the reason, where no page has been built or no Chromium is installed. Nothing is downloaded.
"""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTML = next((p for p in (ROOT / "_build/committed", ROOT / "_build/html") if (p / "index.html").exists()), None)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.glob("book/*.html")) if HTML else ["none"]
ORIGIN = "http://book.test"  # a name that leads nowhere: the route below answers for it

pytestmark = [
    pytest.mark.skipif(HTML is None, reason="no pages are built; `make pages` builds them"),
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium"),
]


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args):
    return {**browser_type_launch_args, "executable_path": CHROMIUM, "args": ["--no-sandbox"]}


@pytest.fixture
def visit(new_context):
    """`visit(path, width, theme)` opens a page of the book and waits until its math is set.

    The page notes in `.foreign` what it asked for beyond the book, and in `.errors` what it complained of.
    """
    def answer(route):
        path = HTML / route.request.url.removeprefix(ORIGIN).split("?")[0].lstrip("/")
        route.fulfill(path=path) if path.is_file() else route.fulfill(status=404)

    def go(path, width=1300, theme="light"):
        context = new_context(viewport={"width": width, "height": 900}, color_scheme=theme, is_mobile=width < 600,
                              service_workers="block")
        foreign, errors = [], []
        context.route("**/*", lambda route: (foreign.append(route.request.url), route.abort()))
        context.route(f"{ORIGIN}/**", answer)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{ORIGIN}/{path}")
        page.wait_for_url(f"{ORIGIN}/book/*.html")  # where the front page leads
        page.evaluate("""() => {
            const math = window.MathJax && MathJax.startup && MathJax.startup.promise;
            document.querySelectorAll('img').forEach(image => image.loading = 'eager');
            const images = [...document.images].map(image => image.decode().catch(() => 0));
            return Promise.all([math, ...images]).then(() => 0); }""")
        page.foreign, page.errors = foreign, errors
        return page

    return go


def test_front_page_leads_to_the_index(visit):
    page = visit("index.html")
    assert page.url == f"{ORIGIN}/book/index.html"
    assert page.title()


@pytest.mark.parametrize("path", PAGES)
def test_math_is_set_without_the_network(visit, path):
    page = visit(path)
    written = len(re.findall(r'class="[^"]*\bmath\b[^"]*"', (HTML / path).read_text()))
    assert page.locator("mjx-container svg").count() >= written
    # MathJax marks what it cannot parse, and draws macros that it does not know in red
    assert page.locator("mjx-container :is([data-mjx-error], [fill=red])").count() == 0


@pytest.mark.parametrize("path", PAGES)
def test_page_asks_for_nothing_beyond_the_book(visit, path):
    page = visit(path)
    assert page.foreign == []
    assert page.errors == []


@pytest.mark.parametrize("path", PAGES)
def test_images_load_and_are_described(visit, path):
    images = visit(path).evaluate(
        "[...document.querySelectorAll('article img, main img')].map(i => [i.src.slice(-60), i.naturalWidth, i.alt])")
    assert [image for image in images if not image[1] or not image[2].strip()] == []


@pytest.mark.parametrize("path", PAGES)
def test_there_is_one_search_bar(visit, path):
    bars = visit(path).locator(".search-button__button, .search-button-field, form.bd-search")
    assert sum(bar.is_visible() for bar in bars.all()) == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_narrow_page_does_not_scroll_sideways(visit, path, theme):
    page = visit(path, 390, theme)
    widest = page.evaluate(
        "[...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > 391)"
        ".slice(0, 3).map(e => e.tagName + '.' + e.className)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 391, widest
    assert page.evaluate("document.documentElement.dataset.theme") == theme


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_text_stands_out_from_its_background(visit, path, theme):
    """WCAG 2.1's contrast of 4.5 for paragraphs, captions and links of the article."""
    pairs = visit(path, theme=theme).evaluate("""() => {
        const behind = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; }
            return 'rgb(255, 255, 255)'; };
        return [...document.querySelectorAll('article p, article figcaption, article a:not(.headerlink)')]
            .filter(e => e.checkVisibility() && e.textContent.trim())
            .map(e => [getComputedStyle(e).color, behind(e), e.textContent.trim().slice(0, 40)]); }""")
    assert [pair for pair in pairs if contrast(pair[0], pair[1]) < 4.5] == []


def contrast(one, other):
    def luminance(colour):
        channels = [float(c) / 255 for c in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
