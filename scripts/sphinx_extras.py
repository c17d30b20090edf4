"""A Sphinx extension: what the theme leaves undone. Math becomes MathML while the pages are built, so that they carry
no script for it, and every page is mended where the theme's HTML is heavy or cannot be used without a mouse."""

from __future__ import annotations

import json
import re
from pathlib import Path

from docutils import nodes
from math_core import LatexToMathML
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator

CONVERTER = LatexToMathML(fancy_error=False)  # raises where it does not know a command


def mathml(latex: str, block: bool = False) -> str:
    """LaTeX as MathML."""
    latex = re.sub(r"(?<=\\\\)\[[\d.]+(?:ex|em|pt)\]", "", latex)  # a distance between rows, which would be printed
    if "\\\\" in latex and "\\begin" not in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    return CONVERTER.convert_with_local_state(latex, displaystyle=block)


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write a formula within a sentence."""
    self.body.append(mathml(node.astext()))
    raise nodes.SkipNode


def display(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula that stands alone, with its number if it has one."""
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    self.body.append(mathml(node.astext().strip(), block=True))
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


MENDED = [
    # the icons are there as web fonts as well
    (r'<script [^>]*src="[^"]*fontawesome[^"]*\.js[^"]*"></script>', ""),
    (r'<link rel="preload" as="script" href="[^"]*fontawesome[^"]*"\s*/?>', ""),
    # lists that are none to a screen reader: entries linked from before their text, and parameters without terms
    (r'<div role="list" class="citation-list">', '<div class="citation-list">'),
    # lines end neither between a number and its per cent, outside code, nor between a formula and the comma behind it
    (r"(?s)<(pre|script|style|title)\b.*?</\1>|(?<=\d) (?=%)", lambda found: found[0] if found[1] else "\u00a0"),
    (r"(<math>(?:(?!<math).)*?</math>[,.;:)]+)", r'<span class="tied">\1</span>'),
    (r"<dl>\n((?:<dd>.*</dd>\n)+)</dl>",
     lambda found: found[1].replace("<dd>", '<div class="sig-line">').replace("</dd>", "</div>")),
]


def mend(app: Sphinx, error: Exception | None) -> None:
    """Apply MENDED to the pages, and drop the script that nothing loads any more."""
    if error:
        return
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for pattern, new in MENDED:
            text = re.sub(pattern, new, text)
        path.write_text(text, encoding="utf-8")
    for path in Path(app.outdir).glob("_static/vendor/fontawesome/*/js/*"):
        path.unlink()


def references(app: Sphinx, error: Exception | None) -> None:
    """Write what every role may refer to: the text of a link and its address among the pages, by role and target."""
    if error:
        return
    env, numbers = app.env, app.env.toc_fignumbers
    std, py = env.get_domain("std"), env.get_domain("py")

    def number(doc: str, kind: str, label: str) -> str:
        return ".".join(map(str, numbers.get(doc, {}).get(kind, {}).get(label, ())))

    def address(doc: str, label: str = "") -> str:
        return app.builder.get_target_uri(doc) + (f"#{label}" if label else "")

    found: dict[str, dict[str, list[str]]] = {role: {} for role in ("doc", "numref", "ref", "eq", "term", "py")}
    for doc, title in env.titles.items():
        found["doc"][doc.rsplit("/", 1)[-1]] = [title.astext(), address(doc)]
    for name, (doc, label) in std.anonlabels.items():
        found["numref"][name] = [f"Figure {number(doc, 'figure', label)}", address(doc, label)]
    for name, (doc, label, title) in std.labels.items():
        found["ref"][name] = [str(title), address(doc, label)]
    for name, (doc, _) in env.get_domain("math").equations.items():
        label = f"equation-{name}"
        found["eq"][name] = [f"({number(doc, 'displaymath', label)})", address(doc, label)]
    for (kind, name), (doc, label) in std.objects.items():
        if kind == "term":
            found["term"][name.lower()] = [name, address(doc, label)]
    for name, entry in py.objects.items():
        for short in (name, name.rsplit(".", 1)[-1]):
            found["py"].setdefault(short, [f"`{short}`", address(entry.docname, entry.node_id)])
    (Path(app.outdir) / "references.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.connect("build-finished", mend)
    app.connect("build-finished", references)
    return {"parallel_read_safe": True}
