"""The built pages in a browser that reaches nothing but this machine: math, images, search, narrow screens.

Skipped, with the reason, where no page has been built or no Chromium with its driver is installed.
"""

import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTML = next((p for p in (ROOT / "_build/committed", ROOT / "_build/html") if (p / "index.html").exists()), None)
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
PAGES = sorted(p.relative_to(HTML).as_posix() for p in HTML.glob("book/*.html")) if HTML else ["none"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

pytestmark = [
    pytest.mark.skipif(HTML is None, reason="no pages are built; `make test` builds them first"),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def browser():
    """`browser(path, width, theme)` opens a page of the book and waits until its math is set."""
    from selenium import webdriver

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=HTML))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(60)
    driver.set_script_timeout(60)

    def visit(page, width=1300, theme="light"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = [{"name": "prefers-color-scheme", "value": theme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        driver.get_log("browser")  # what earlier pages left there
        driver.get(f"http://127.0.0.1:{server.server_port}/{page}")
        driver.execute_async_script("""
            const done = arguments[0], math = window.MathJax && MathJax.startup && MathJax.startup.promise;
            document.querySelectorAll('img').forEach(image => image.loading = 'eager');
            Promise.all([math, ...[...document.images].map(image => image.decode().catch(() => 0))])
                .then(() => done(), () => done());""")
        return driver

    yield visit
    driver.quit()
    server.shutdown()


def visible(driver, selector):
    return driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()"
        " && e.getBoundingClientRect().width > 0).length", selector)


def test_front_page_leads_to_the_index(browser):
    driver = browser("index.html")
    assert driver.current_url.endswith("/book/index.html")
    assert driver.title


@pytest.mark.parametrize("page", PAGES)
def test_math_is_set_without_the_network(browser, page):
    driver = browser(page)
    written = len(re.findall(r'class="[^"]*\bmath\b[^"]*"', (HTML / page).read_text()))
    assert driver.execute_script("return document.querySelectorAll('mjx-container svg').length") >= written
    # MathJax marks what it cannot parse, and draws macros that it does not know in red
    errors = "return document.querySelectorAll('mjx-container :is([data-mjx-error], [fill=red])').length"
    assert driver.execute_script(errors) == 0


@pytest.mark.parametrize("page", PAGES)
def test_page_asks_for_nothing_beyond_the_book(browser, page):
    driver = browser(page)
    loaded = "return performance.getEntriesByType('resource').map(e => e.name)"
    base = driver.execute_script("return location.origin")
    assert [url for url in driver.execute_script(loaded) if not url.startswith((base, "data:"))] == []
    severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []


@pytest.mark.parametrize("page", PAGES)
def test_images_load_and_are_described(browser, page):
    driver = browser(page)
    images = driver.execute_script(
        "return [...document.querySelectorAll('article img, main img')]"
        ".map(i => [i.src.slice(-60), i.naturalWidth, i.alt])")
    assert [image for image in images if not image[1] or not image[2].strip()] == []


@pytest.mark.parametrize("page", PAGES)
def test_there_is_one_search_bar(browser, page):
    driver = browser(page)
    assert visible(driver, ".search-button__button, .search-button-field, form.bd-search") == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_narrow_page_does_not_scroll_sideways(browser, page, theme):
    driver = browser(page, 390, theme)
    width = driver.execute_script("return document.documentElement.scrollWidth")
    widest = driver.execute_script(
        "return [...document.querySelectorAll('article *')].filter(e => e.getBoundingClientRect().right > 391)"
        ".slice(0, 3).map(e => e.tagName + '.' + e.className)")
    assert width <= 391, widest
    assert driver.execute_script("return document.documentElement.dataset.theme") == theme


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_text_stands_out_from_its_background(browser, page, theme):
    """WCAG 2.1's contrast of 4.5 for paragraphs, captions and links of the article."""
    driver = browser(page, theme=theme)
    pairs = driver.execute_script("""
        const behind = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; }
            return 'rgb(255, 255, 255)'; };
        return [...document.querySelectorAll('article p, article figcaption, article a:not(.headerlink)')]
            .filter(e => e.checkVisibility() && e.textContent.trim())
            .map(e => [getComputedStyle(e).color, behind(e), e.textContent.trim().slice(0, 40)]);""")
    assert [pair for pair in pairs if contrast(pair[0], pair[1]) < 4.5] == []


def contrast(one, other):
    def luminance(colour):
        channels = [float(c) / 255 for c in re.findall(r"[\d.]+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)
