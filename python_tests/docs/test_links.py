"""Links of the pages lead somewhere; those of docs/ to other pages and headings are the site's to check."""

import re
from urllib.parse import urlsplit

import pytest
from markdown_it import MarkdownIt
from pages import ROOT, label, pages

MARKDOWN = MarkdownIt("commonmark").enable("table")


def targets(text):
    """Every link's and image's target."""
    for token in MARKDOWN.parse(text):
        for inline in token.children or ():
            yield from (inline.attrs[name] for name in ("href", "src") if name in inline.attrs)


def anchors(text):
    """The headings' anchors, as GitHub makes them."""
    tokens = MARKDOWN.parse(text)
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong(page):
    """Targets that are no address, no file and no heading."""
    found = []
    for target in targets(page.read_text()):
        parts = urlsplit(target)
        if parts.scheme:
            well_formed = parts.scheme in ("http", "https") and re.fullmatch(r"[\w.-]+\.\w+", parts.netloc)
            if not well_formed or "//" in parts.path:
                found.append(target)
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        inside = file.exists() and ROOT in file.parents
        named = inside and parts.fragment and file.suffix == ".md"
        if not inside or (named and parts.fragment not in anchors(file.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("page", pages(), ids=label)
def test_links_lead_somewhere(page):
    assert wrong(page) == []


def test_a_wrong_link_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("test_links.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A title, and `code`\n")
    good = "[a](other.md#a-title-and-code) [b](#here) ![c](other.md) [d](https://arxiv.org/abs/2309.17400)"
    bad = ["other.md#title", "#there", "missing.png", "https:/arxiv.org", "http://localhost name", "../../etc/hosts"]
    page = tmp_path / "page.md"
    page.write_text(f"# Here\n\n{good}\n" + "".join(f"[x](<{target}>)\n" for target in bad))
    assert len(wrong(page)) == len(bad)
