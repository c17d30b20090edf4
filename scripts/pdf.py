"""The whole book as one PDF: the articles of the built pages, in their order, joined into one and printed by Chromium.

    pdf.py _build/committed _build/book.pdf

Links between pages become links within the document. The rest is the pages' own style for print.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

from pypdf import PdfReader, PdfWriter
from pypdf.generic import NameObject, TextStringObject

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
logging.getLogger("pypdf").setLevel(logging.ERROR)  # Chromium counts its objects otherwise than pypdf
SECONDS = 600  # for printing; a slow machine needs one or two minutes

PRINT = """
@page { size: A4; margin: 18mm 17mm 20mm; @bottom-center { content: counter(page); font: 9pt sans-serif; } }
@page :first { @bottom-center { content: none; } }
html { font-size: 9.5pt; }
body { background: #fff; line-height: 1.5; font-variant-ligatures: none; }
.bd-article, .cover, .contents { max-width: none; padding: 0; }
article.bd-article, .contents { break-before: page; }
.cover { padding-top: 70mm; text-align: center; }
.cover .name { font-size: 2.6rem; line-height: 1.2; margin-bottom: 2rem; }
.contents p { margin: 1rem 0 0; font-weight: 600; }
.contents ul { list-style: none; margin: 0; padding-left: 1rem; flex-direction: column; }
.contents li, .contents li a { display: flex; justify-content: space-between; width: 100%; text-decoration: none; }
.bd-article .sd-summary-state-marker { display: none; }
"""


class PdfError(Exception):
    """What is wrong and what to do about it; printed without a traceback."""


def browser() -> str:
    """Return the Chromium or Chrome of this machine."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        raise PdfError("a PDF is printed by Chromium or Chrome, and neither is on the PATH: install one of them")
    return found


def part(text: str, pattern: str, what: str) -> str:
    """Return what the pattern's group matches, which is there unless the theme has changed."""
    match = re.search(pattern, text, flags=re.S)
    if not match:
        raise PdfError(f"{what} has no {pattern}: build the pages with the theme that requirements.txt names")
    return match[1]


def within(html: str, page: str, names: set[str], root: Path) -> str:
    """Return HTML of a page whose ids tell the page, whose links lead to them, and whose files are found."""

    def address(found: re.Match[str]) -> str:
        kind, target = found[1], unescape(found[2])
        path, _, anchor = target.partition("#")
        path = path.partition("?")[0]  # stylesheets carry a digest
        name = path.removesuffix(".html") if path else page
        if kind == "href" and name in names and (path.endswith(".html") or not path):
            return f'href="#{name}--{anchor}"' if anchor else f'href="#{name}"'
        if re.match(r"[a-z]+:|//", target):
            return found[0]
        file = os.path.normpath(root / "book" / path)
        return f'{kind}="{Path(file).as_uri()}"' if Path(file).is_file() else found[0]

    html = re.sub(r'<script\b.*?</script>|<a class="headerlink".*?</a>', "", html, flags=re.S)
    html = re.sub(r'(?<=\s)(id|for)="([^"]*)"', rf'\1="{page}--\2"', html)
    html = re.sub(r'(?<=\s)(href|src)="([^"]*)"', address, html)
    # solutions and folded results stand open; folded code is not printed
    return re.sub(r'<details (?=class="(?:sd-|[^"]*above-output))', "<details open ", html)


def join(pages: Path) -> str:
    """Return the whole book as one page: a cover, the contents, and every article in the order of the contents."""
    folder = pages / "book"
    if not (folder / "index.html").is_file():
        raise PdfError(f"{pages} holds no pages of the book: build them first, by make pages")
    first = (folder / "index.html").read_text(encoding="utf-8")
    nav = part(first, r'<nav class="bd-links bd-docs-nav"[^>]*>(.*?)</nav>', "the index")
    order = ["index", *dict.fromkeys(re.findall(r'href="([\w-]+)\.html"', nav))]
    texts = {name: (folder / f"{name}.html").read_text(encoding="utf-8") for name in order}
    names = set(order)
    title = part(part(first, r"(<article\b.*?</article>)", "the index"), r"<h1>(.*?)<a ", "the index")
    footer = part(first, r'<footer class="bd-footer-content">(.*?)</footer>', "the index")
    styles = [within(link, "index", names, pages) for link in re.findall(r"<link [^>]*stylesheet[^>]*>", first)]
    nav = re.sub(r"<input\b[^>]*>|<label\b.*?</label>", "", nav, flags=re.S)
    articles = [f'<div id="{name}">'
                + within(part(text, r"(<article\b.*?</article>)", name), name, names, pages) + "</div>"
                for name, text in texts.items()]
    return "\n".join([
        f'<!DOCTYPE html>\n<html lang="en-GB" data-theme="light">\n<meta charset="utf-8">\n<title>{title}</title>',
        *styles, f"<style>{PRINT}</style>", "<body>",
        f'<div class="cover"><p class="name">{title}</p>{footer}</div>',
        f'<div class="contents"><h1>Contents</h1>{within(nav, "index", names, pages)}</div>', *articles,
        "</body></html>",
    ])


def printed(html: str, folder: Path) -> Path:
    """Print one page of HTML by Chromium; return the PDF."""
    whole, out = folder / "book.html", folder / "book.pdf"
    whole.write_text(html, encoding="utf-8")
    out.unlink(missing_ok=True)
    program = browser()
    command = [program, "--headless", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder}/profile",
               "--no-pdf-header-footer", "--generate-pdf-document-outline", "--allow-file-access-from-files",
               f"--print-to-pdf={out}", whole.as_uri()]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # as root Chromium does not start with it
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PdfError(f"{program} did not print the book within {SECONDS} s") from None
    if done.returncode or not out.is_file():
        raise PdfError(f"{program} did not print the book:\n{done.stderr[-2000:]}")
    return out


def with_numbers(html: str, pdf: Path) -> str:
    """Return the whole book with the page of each chapter in the contents, as a first print tells it."""
    reader = PdfReader(pdf)
    found = {name.lstrip("/"): reader.get_destination_page_number(where) + 1
             for name, where in reader.named_destinations.items()}
    head, contents, rest = re.split(r'(?<=<div class="contents">)(.*?)(?=<article)', html, maxsplit=1, flags=re.S)
    contents = re.sub(r'(<a [^>]*href="#([\w-]+)">.*?)(</a>)',
                      lambda link: f"{link[1]}<span>{found[link[2]]}</span>{link[3]}", contents, flags=re.S)
    return head + contents + rest


def with_outline(html: str, pdf: Path, target: Path) -> None:
    """Copy a PDF, and mend its outline: Chromium writes a heading twice that it had to move to the next page."""
    titles = {}
    for heading in re.findall(r"<(h[1-6])\b[^>]*>(.*?)</\1>", html, flags=re.S):
        pieces = [unescape(piece) for piece in re.split(r"<[^>]+>", heading[1]) if piece]
        titles["".join(2 * piece for piece in pieces)] = "".join(pieces)
    writer = PdfWriter(clone_from=pdf)

    def walk(entry: Any) -> None:
        while entry is not None:
            entry = entry.get_object()
            if title := titles.get(str(entry.get("/Title"))):
                entry[NameObject("/Title")] = TextStringObject(title)
            walk(entry.get("/First"))
            entry = entry.get("/Next")

    walk(writer.root_object["/Outlines"].get_object().get("/First"))
    writer.write(target)


def main(pages: str, target: str) -> None:
    """Print the pages into one file, which appears whole or not at all."""
    out = Path(target).resolve()
    html = join(Path(pages).resolve())
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pdf-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        html = with_numbers(html, printed(html, Path(scratch)))
        with_outline(html, printed(html, Path(scratch)), Path(scratch, "whole.pdf"))
        os.replace(Path(scratch, "whole.pdf"), out)
    print(f"{target}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (PdfError, OSError) as error:
        sys.exit(f"error: {error}")
