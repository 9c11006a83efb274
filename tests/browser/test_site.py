"""The pages as their readers see them: nothing sticks out, the filter and the search find, and every link leads on."""

from __future__ import annotations

import itertools
import re
import runpy
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from lightning_optim import REGISTRY
from tests.browser.site import BUILT, Page, pages

#: What is wider than its box: the page, its column, what is meant to fit, and code on a screen with room for it.
_TOO_WIDE = """
    const wide = (node) => node.scrollWidth > node.clientWidth + 1;
    const found = [];
    if (document.scrollingElement.scrollWidth > arguments[0]) found.push("the page");
    if (wide(document.querySelector(".content"))) found.push("its column");
    for (const table of document.querySelectorAll("table.stacked"))
        if (wide(table.parentElement)) found.push("a table: " + table.textContent.trim().slice(0, 40));
    if (arguments[0] >= 1280)
        for (const code of document.querySelectorAll("pre"))
            if (wide(code))
                found.push("code: " + code.textContent.split("\\n").sort((a, b) => b.length - a.length)[0]);
    // furo writes an error over a table of contents that has not this class.
    const mine = "this-will-duplicate-information-and-it-is-still-useful-here";
    if (document.querySelector(`.contents:not(.${mine})`)) found.push("a table of contents without the class " + mine);
    return found;
"""
_COLORS = """
    const light = (color) => color.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 765;
    const style = (query) => getComputedStyle(document.querySelector(query));
    return [light(style("body").backgroundColor), light(style("body").color)];
"""


def _names() -> list[str]:
    return [path.relative_to(BUILT).with_suffix("").as_posix() for path in pages()]


def test_nothing_sticks_out(show: Any, look: Any) -> None:
    found = []
    for name in _names():
        browser = show(name)
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            look(width, scheme)
            found += [f"{name}, {width}, {scheme}: {what}" for what in browser.execute_script(_TOO_WIDE, width)]
            back, text = browser.execute_script(_COLORS)
            if not ((back < 0.2 and text > 0.6) if scheme == "dark" else (back > 0.9 and text < 0.3)):
                found.append(f"{name}, {width}: not {scheme}")
    assert not found, "\n".join(found)


def _visible(browser: Any) -> list[str]:
    rows = browser.execute_script("return [...document.querySelectorAll('table.filtered tbody tr')]")
    return [row.text for row in rows if row.is_displayed()]


def _count(browser: Any) -> str:
    return str(browser.find_element("css selector", ".filter output").text)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_filter_leaves_the_rows_that_have_the_words(show: Any, width: int) -> None:
    browser = show("identifiers", width=width)
    every = len(REGISTRY.plain)
    assert len(_visible(browser)) == every
    assert _count(browser) == f"{every} of {every}"
    box = browser.find_element("css selector", ".filter input")
    assert box.accessible_name == "Filter"

    box.send_keys("Lion")
    shown = _visible(browser)
    lions = [name for name in REGISTRY.plain if "lion" in name]
    assert all(any(re.search(rf"\b{name}\b", row) for row in shown) for name in lions)
    assert all("lion" in row.lower() for row in shown)
    assert len(lions) <= len(shown) < every
    assert _count(browser) == f"{len(shown)} of {every}"
    assert browser.current_url.endswith("identifiers.html#filter=Lion")

    box.send_keys(" flashoptim")
    assert [re.search(r"\w*lion\w*", row)[0] for row in _visible(browser)] == ["flash_lion"]  # type: ignore[index]
    box.send_keys(" nothing has this")
    assert _visible(browser) == []
    assert _count(browser) == f"0 of {every}"


def test_an_address_may_have_a_filter(show: Any) -> None:
    browser = show("identifiers", "#filter=paged%20lion")
    assert len(_visible(browser)) == 2
    assert browser.find_element("css selector", ".filter input").get_attribute("value") == "paged lion"


def test_rows_are_cards_on_a_narrow_screen(show: Any) -> None:
    browser = show("identifiers", "#filter=adamw_8bit", width=390)
    labels = browser.execute_script("""
        const row = [...document.querySelectorAll("table.filtered tbody tr")].find((row) => !row.hidden);
        return [...row.cells].map((cell) => [getComputedStyle(cell, "::before").content, cell.offsetLeft]);
    """)
    headings = [label.strip('"') for label, _ in labels]
    assert headings[0] == "identifier"
    assert "devices" in headings
    assert len({left for _, left in labels}) == 1, "the cells of a card stand below each other"


@pytest.mark.parametrize("target", ["optim-lion-8bit", "optim-lion_8bit"])
def test_a_section_that_moved_is_found_at_its_old_address(show: Any, target: str) -> None:
    browser = show("identifiers", f"#{target}")
    _wait(browser, "return location.pathname.endsWith('/identifiers/lion.html')")
    assert urlsplit(browser.current_url).fragment == "optim-lion-8bit"


def _wait(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda _: browser.execute_script(script))


def _found(browser: Any) -> list[str]:
    # The summary is filled in when all results are there.
    _wait(browser, "return document.querySelector('.search-summary')?.textContent")
    return list(
        browser.execute_script(
            "return [...document.querySelectorAll('ul.search li > a')].map((link) => link.getAttribute('href'))"
        )
    )


@pytest.mark.parametrize(
    ("asked", "first"),
    [
        ("adamw_8bit", "identifiers/adamw-8bit.html#optim-adamw-8bit"),
        ("adamw_torch_fused", "identifiers/adamw.html#optim-adamw-torch-fused"),
        ("lion_8bit", "identifiers/lion.html#optim-lion-8bit"),
        ("galore_adamw", "identifiers/low-rank.html#optim-galore-adamw"),
        ("paged_adamw_8bit", "identifiers/adamw-8bit.html#optim-paged-adamw-8bit"),
        ("optimizer in backward", "layerwise.html"),
        ("optimizer-in-backward", "layerwise.html"),
        ("Gradient release", "layerwise.html"),
        ("7B", "memory.html"),
        ("out of memory", "memory.html"),
        ("muon", "muon.html"),
        ("speed", "bench.html"),
        ("layerwise", "layerwise.html"),
        ("FSDP", "sharded.html"),
        ("install", "quickstart.html"),
        ("weight decay", "param-groups.html#weight-decay"),
    ],
)
def test_the_search_finds(show: Any, asked: str, first: str) -> None:
    found = _found(show("search", f"?q={quote(asked)}"))[0]
    assert found == first or found.partition("#")[0] == first


def test_what_pages_are_searched_by_is_of_pages() -> None:
    searched = runpy.run_path(str(BUILT.parent / "conf.py"))["searched"]
    assert set(searched) <= set(_names())


def test_the_search_is_asked_from_any_page(show: Any) -> None:
    browser = show("identifiers/lion")
    box = browser.find_element("css selector", ".sidebar-search")
    box.send_keys("gradient release")
    box.submit()
    assert _found(browser)[0].startswith("layerwise.html")


@pytest.fixture(scope="module")
def parsed() -> dict[str, Page]:
    return {str(path.resolve()): Page(path) for path in pages()}


def test_every_link_and_anchor_leads_somewhere(parsed: dict[str, Page]) -> None:
    broken = []
    for page in parsed.values():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path.resolve()
            anchor = unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{page.path.relative_to(BUILT)}: no file {link}")
            elif anchor and not anchor.startswith("filter=") and anchor not in parsed[str(target)].ids:
                broken.append(f"{page.path.relative_to(BUILT)}: no anchor {link}")
    assert not broken, "\n".join(sorted(set(broken)))


def test_no_page_needs_the_network(parsed: dict[str, Page]) -> None:
    for page in parsed.values():
        for resource in page.resources:
            assert not urlsplit(resource).netloc, f"{page.path.relative_to(BUILT)} loads {resource}"
            if not resource.startswith("data:"):
                assert (page.path.parent / unquote(urlsplit(resource).path)).exists(), f"{page.path}: no {resource}"
    for sheet in BUILT.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_every_picture_has_a_text(parsed: dict[str, Page]) -> None:
    texts = {
        f"{page.path.relative_to(BUILT)}: {image.get('src')}": (image.get("alt") or "").strip()
        for page in parsed.values()
        for image in page.images
    }
    assert texts, "some page has a picture"
    assert all(texts.values()), "\n".join(where for where, text in texts.items() if not text)
