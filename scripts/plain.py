"""The plain edition of a notebook: without MyST, which Jupyter, Colab, Binder and GitHub show as it is written.

Roles become links and text, admonitions block quotes, solutions fold, captions stand below their figures, and cells
that the pages hide are folded by each platform's own metadata.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from pybtex.database import parse_file

ROLE = re.compile(r"(\{?)\{(cite|cite:t|cite:p|doc|eq|numref|ref|term|py:\w+)\}\1?\}?`([^`]+)`")
FENCED = re.compile(r"^(?P<fence>`{3,}|~{3,}|:{3,})(?P<open>\{?\{)?(?P<name>[\w-]*)\}{0,2} *(?P<title>[^\n]*)\n"
                    r"(?P<body>.*?)^(?P=fence) *$", flags=re.M | re.S)
QUOTED = {"admonition", "note", "tip", "hint", "important", "warning", "caution", "seealso"}
HIDDEN = {"remove-cell", "remove-input", "hide-cell", "hide-input"}
LEFT = re.compile(r"(?<![`{])\{[a-z:]+\}`(?!`)|^ *(?:`{3,}|:{3,})\{|\[\]\(", flags=re.M)  # MyST unknown here

References = dict[str, dict[str, list[str]]]
"""By role and target: the text of a link, and its address."""


class NotPlain(ValueError):
    """Something has no plain form, or refers to nothing."""


def known(pages: Path, bibliography: Path, site: str) -> References:
    """What roles may refer to: the pages' own list, with addresses on the site, and the works that the book cites."""
    found = json.loads((pages / "references.json").read_text(encoding="utf-8"))
    for targets in found.values():
        for link in targets.values():
            link[1] = f"{site}/{link[1]}"
    found["cite"] = {key: [name(entry), where(entry.fields) or f"{site}/book/bibliography.html"]
                     for key, entry in parse_file(str(bibliography)).entries.items()}
    return found


def name(entry: Any) -> str:
    """Authors and year of a work."""
    people = [" ".join(person.last_names) for person in entry.persons.get("author", entry.persons.get("editor", []))]
    who = f"{people[0]} et al." if len(people) > 2 else " and ".join(people) or entry.fields["title"]
    return f"{who}, {entry.fields['year']}".replace("{", "").replace("}", "")


def where(fields: Any) -> str:
    """The address of a work, if its entry has one."""
    prefixes = {"url": "", "doi": "https://doi.org/", "eprint": "https://arxiv.org/abs/"}
    return next((prefix + fields[key] for key, prefix in prefixes.items() if key in fields), "")


def plain(notebook: NotebookNode, references: References, setup: str) -> NotebookNode:
    """Return the plain edition of an executed notebook, whose Colab cell becomes ``setup``, for all to see."""
    cells = []
    for cell in copy.deepcopy(notebook.cells):
        tags, shown = cell.metadata.get("tags", []), cell.metadata.get("mystnb", {})
        cell.metadata = NotebookNode()
        cells.append(cell)
        if cell.cell_type == "markdown":
            cell.source = text(cell.source, references)
            continue
        cell.source = setup if "colab" in tags else program(cell.source, references)
        cell.outputs = [shown_plainly(output, references) for output in cell.outputs]
        if HIDDEN.intersection(tags) and "colab" not in tags:
            cell.metadata |= {"cellView": "form", "jupyter": {"source_hidden": True}}  # Colab; JupyterLab, VS Code
        if {"hide-output", "remove-output"}.intersection(tags):
            cell.metadata["jupyter"] = {**cell.metadata.get("jupyter", {}), "outputs_hidden": True}
        if "parameters" in tags:
            cell.metadata["tags"] = ["parameters"]
        if figure := shown.get("figure"):
            label = found(references, "numref", figure["name"])[0]
            caption = f"**{label}.** {text(figure['caption'], references)}"
            cells.append(new_markdown_cell(caption, id=f"{cell.id[:50]}-caption"))
    whole = copy.deepcopy(notebook)
    whole.cells = cells
    for cell in cells:
        parts = [cell.source, *("".join(o.get("data", {}).get("text/markdown", "")) for o in cell.get("outputs", []))]
        if left := next(filter(None, map(LEFT.search, parts)), None):
            raise NotPlain(f"no plain form is known of {left[0]} in: {left.string[left.start():][:80]}")
    return whole


def text(markdown: str, references: References) -> str:
    """MyST Markdown as Markdown."""
    parts, end = [], 0
    markdown = re.sub(r" *<!--.*?-->|^\([\w-]+\)=\n", "", markdown, flags=re.M | re.S)
    for block in FENCED.finditer(markdown):
        parts += [prose(markdown[end:block.start()], references), fenced(block, references)]
        end = block.end()
    return "".join([*parts, prose(markdown[end:], references)])


def fenced(block: re.Match[str], references: References) -> str:
    """A directive as a quotation or a fold; code stays as it is."""
    if not block["open"]:
        return block[0]
    options = re.match(r"(?::[\w-]+:[^\n]*\n)*\n*", block["body"])[0]
    body = text(block["body"].removeprefix(options).strip(), references)
    if block["name"] == "dropdown":
        return f"<details>\n<summary>{block['title']}</summary>\n\n{body}\n\n</details>"
    if block["name"] not in QUOTED:
        raise NotPlain(f"no plain form is known of the directive {block['name']}")
    title = text(block["title"], references) or block["name"].capitalize()
    # a formula of several lines would take the marks of the quotation for its own
    body = re.sub(r"\$\$.*?\$\$", lambda formula: " ".join(formula[0].split()), body, flags=re.S)
    return "\n".join(f"> {line}".rstrip() for line in [f"**{title}**", "", *body.splitlines()])


def prose(markdown: str, references: References) -> str:
    """Text between blocks: roles, numbers of equations, links to other pages."""
    def numbered(formula: re.Match[str]) -> str:
        return f"$${formula[1].rstrip()} \\tag{{{found(references, 'eq', formula[2])[0].strip('()')}}}\n$$"

    def page(link: re.Match[str]) -> str:
        title, address = references["doc"].get(re.sub(r"\.(ipynb|md)$", "", link[2]), ["", link[2]])
        return f"{f'[{title}' if link[1] and title else link[1]}]({address})"

    markdown = re.sub(r"\$\$((?:(?!\$\$).)*)\$\$ *\(([\w-]+)\)", numbered, markdown, flags=re.S)
    markdown = re.sub(r"(\[(?=\])|)\]\(([\w.-]+)\)", page, markdown)
    markdown = re.sub(r"^(\S.*)\n: +(?=\S)", r"**\1:** ", markdown, flags=re.M)  # a list of definitions
    return ROLE.sub(lambda role: link(role[2], role[3], references), markdown)


def link(role: str, content: str, references: References) -> str:
    """What stands in place of a role."""
    if role.startswith("cite"):
        works = [found(references, "cite", key.strip()) for key in content.split(",")]
        if role == "cite:t":
            return ", ".join(f"[{name}]({address})" for name, address in works)
        return f"({'; '.join(f'[{name}]({address})' for name, address in works)})"
    named = re.fullmatch(r"(.*?)\s*<(.*)>", content, flags=re.S)
    target = named[2] if named else content
    name, address = found(references, "py" if role.startswith("py:") else role, " ".join(target.lstrip("~").split()))
    return f"[{named[1] if named else name}]({address})"


def found(references: References, role: str, target: str) -> list[str]:
    """Look a target up, terms without regard to their case."""
    known = references[role]
    try:
        return known[target] if role != "term" else [target, known[target.lower()][1]]
    except KeyError:
        raise NotPlain(f"{role} refers to {target}, which is nowhere") from None


def program(source: str, references: References) -> str:
    """Code whose strings hold MyST; targets known only when the code runs are looked up then."""
    looked_up: set[str] = set()

    def inside(role: re.Match[str]) -> str:
        if not (name := re.fullmatch(r"\{([\w.]+)\}", role[3])):
            return link(role[2], role[3], references)
        looked_up.add(role[2])
        return f"{{{role[2]}_link({name[1]})}}"

    pages = references["doc"]["index"][1].rsplit("/", 1)[0]
    source = re.sub(r"\]\(\{([\w.]+)\}\)", lambda page: f"]({pages}/{{{page[1]}}}.html)", source)
    source = FENCED.sub(lambda block: fenced(block, references) if block["open"] else block[0], source)
    source = ROLE.sub(inside, source)
    for role in sorted(looked_up, reverse=True):
        ready = {target: f"[{name}]({address})" for target, (name, address) in references[role].items()}
        source = f"{role}_link = {ready!r}.__getitem__\n{source}"
    return source


def shown_plainly(output: NotebookNode, references: References) -> NotebookNode:
    """An output whose Markdown is plain."""
    data: dict[str, Any] = output.get("data", {})
    if "text/markdown" in data:
        output.data = NotebookNode({**data, "text/markdown": text("".join(data["text/markdown"]), references)})
    return output
