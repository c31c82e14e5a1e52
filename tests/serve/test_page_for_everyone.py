"""If these fail, a part of those who come to the page cannot use it: by keyboard, on a phone, by ear."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from edgeglm.core.progress import QuietProgress
from tests.serve.browsing import DESKTOP, PHONE, browser, index, site, until, visit
from tests.serve.conftest import Server

__all__ = ["browser", "index", "site", "visit"]
pytestmark = pytest.mark.system


def test_the_whole_page_works_by_keyboard(site: Server, visit: Callable[..., Page]):
    page = visit(site)
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("red")
    page.keyboard.press("Enter")
    expect(page.locator(".hit").first).to_contain_text("red.png")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".hit").nth(0)).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".hit").nth(1)).to_be_focused()
    page.keyboard.press("ArrowDown")
    below = page.evaluate(
        "[...document.querySelectorAll('.hit')].findIndex((hit) => hit === document.activeElement)"
    )
    assert below > 2
    page.keyboard.press("Enter")  # others like this one
    expect(page.locator("#status")).to_contain_text("like your picture")
    expect(page.locator(".hit:focus")).to_have_count(1)  # new results leave one's place in them
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"file", "go", "forget", "count", "filter", "hit", "copy", "theme"} <= reached


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(site: Server, visit: Callable[..., Page], scheme: str):
    page = visit(site, "/?q=green", viewport=PHONE, is_mobile=True, has_touch=True, color_scheme=scheme)
    expect(page.locator(".hit")).to_have_count(24)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    page.get_by_role("searchbox").fill("green https://example.org/" + "a" * 300)
    expect(page.locator(".status")).to_contain_text("example.org")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    tops = page.eval_on_selector_all(".hit", "all => all.slice(0, 4).map((one) => one.offsetTop)")
    assert tops[0] == tops[1] < tops[2] == tops[3]
    small = page.eval_on_selector_all(
        "button, .file, select, #filter, #words",
        "all => all.filter((one) => one.offsetParent && one.offsetHeight < 36).map((one) => one.id)",
    )
    assert small == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")
    page.locator("#theme").click()
    expect(page.locator("#theme")).to_have_text("Theme: light")
    page.reload()
    expect(page.locator("#theme")).to_have_text("Theme: light")


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from the npm registry, pinned by its digest."""
    from edgeglm.assets.catalogue import Spec
    from edgeglm.assets.downloads import downloaded_file
    from edgeglm.core.digest import sha256_file

    folder = tmp_path_factory.mktemp("axe")
    with QuietProgress().task("axe") as task:
        archive = downloaded_file(Spec(kind="npm", name="axe-core", version="4.14.1"), folder, task)
    assert sha256_file(archive) == "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
    return subprocess.run(
        ["tar", "-xzOf", archive, "package/axe.min.js"], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.assets
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("path", ["/", "/?q=red"])
def test_axe_finds_no_barrier_for_anyone(
    site: Server, visit: Callable[..., Page], axe: str, scheme: str, size: str, path: str
):
    viewport = PHONE if size == "phone" else DESKTOP
    page = visit(site, path, viewport=viewport, color_scheme=scheme, bypass_csp=True)
    if "q=" in path:
        expect(page.locator(".hit")).to_have_count(24)
    until(page, "document.querySelector('#facts dd')")
    page.evaluate(axe)
    found = page.evaluate("axe.run()")
    violations = {one["id"]: [node["html"] for node in one["nodes"]][:3] for one in found["violations"]}
    assert violations == {}
    assert len(found["passes"]) > 20


def test_every_control_has_a_name_and_changes_are_announced(site: Server, visit: Callable[..., Page]):
    page = visit(site, "/?q=red")
    expect(page.locator(".hit")).to_have_count(24)
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    expect(page.locator("#status")).to_have_attribute("aria-live", "polite")
    tree = page.locator("body").aria_snapshot()
    assert "- searchbox" in tree
    assert not re.search(r"- (button|textbox|searchbox|combobox|img)(:|$)", tree, re.MULTILINE), tree
