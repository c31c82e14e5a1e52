from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from edgeglm.serve.page_routes import page as served_page
from scripts.fixtures.colours import picture
from tests.serve.browsing import EVIL, SCRIPT, browser, fetched, index, names, site, until, visit
from tests.serve.conftest import TOKEN, Server, running, serve_command

__all__ = ["browser", "index", "site", "visit"]
pytestmark = pytest.mark.system


def test_words_find_pictures_with_scores_and_the_time_it_took(site: Server, visit: Callable[..., Page]):
    page = visit(site)
    page.get_by_role("searchbox").fill("blue")
    expect(page.locator(".hit")).to_have_count(24)
    assert names(page)[0] == "blue.png"
    expect(page.get_by_role("button", name="1: blue.png score 1.000 find pictures like it")).to_be_visible()
    expect(page.locator("#status")).to_have_text(re.compile(r"^24 of 25 pictures for “blue” in [\d.]+ ms$"))
    until(page, "[...document.querySelectorAll('.hit img')].every((image) => image.naturalWidth > 0)")
    assert re.search(
        r"Embedding [\d.]+ ms, search [\d.]+ ms", page.locator("#split").get_attribute("aria-label") or ""
    )
    assert page.url.endswith("?q=blue")


def test_a_link_with_words_searches_at_once(site: Server, visit: Callable[..., Page]):
    page = visit(site, "/?q=red")
    expect(page.locator(".hit").first).to_contain_text("red.png")


@pytest.mark.parametrize("way", ["file", "drop", "paste"])
def test_a_picture_finds_pictures(site: Server, visit: Callable[..., Page], way: str):
    page = visit(site)
    data = picture((0, 0, 240))
    if way == "file":
        page.set_input_files("#file", {"name": "my blue.png", "mimeType": "image/png", "buffer": data})
    else:
        page.evaluate(
            """([way, data]) => {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                const held = new DataTransfer();
                held.items.add(new File([bytes], "my blue.png", { type: "image/png" }));
                const event = way === "drop"
                    ? new DragEvent("drop", { dataTransfer: held, bubbles: true, cancelable: true })
                    : new ClipboardEvent("paste", { clipboardData: held, bubbles: true, cancelable: true });
                document.body.dispatchEvent(event);
            }""",
            [way, b64encode(data).decode()],
        )
    expect(page.locator(".hit").first).to_contain_text("blue.png")
    expect(page.locator("#asked")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("like your picture")
    page.get_by_role("button", name="Take it away").click()
    expect(page.locator(".hit")).to_have_count(0)
    expect(page.get_by_role("searchbox")).to_be_focused()


def test_nothing_in_a_file_name_or_a_caption_runs(site: Server, visit: Callable[..., Page]):
    page = visit(site, "/?q=red")
    expect(page.locator(".hit")).to_have_count(24)
    shown = names(page)
    assert f"{EVIL}.png" in shown
    assert f"{SCRIPT}/script>" in shown
    page.locator(".hit", has_text="onerror").click()
    expect(page.locator("#asked-name")).to_have_text(f"{EVIL}.png")
    assert page.evaluate("window.pwned") is None
    assert page.locator("#results script, #results img[onerror]").count() == 0
    words = visit(site, "/?q=red%20%3Cimg%20src%3Dx%20onerror%3Dwindow.pwned%3D1%3E")
    expect(words.locator("#status")).to_contain_text("“red <img src=x onerror")
    assert words.evaluate("window.pwned") is None


def test_its_policy_lets_nothing_else_run_and_nobody_frame_it(site: Server, visit: Callable[..., Page]):
    _, headers, text = fetched(site.http + "/")
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"].startswith("'sha256-")
    assert "unsafe" not in headers["content-security-policy"]
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"""(src|href)=["'](https?:)?//""", text)
    assert not re.search(r"\son\w+=", re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL))
    assert fetched(site.http + "/", **{"if-none-match": headers["etag"]})[0] == 304
    page = visit(site)
    blocked = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            const script = document.createElement("script");
            try { script.text = "window.pwned = 1"; } catch (error) { done("trusted types"); }
            document.head.append(script);
        })"""
    )
    assert blocked in ("trusted types", "require-trusted-types-for", "script-src-elem")
    assert page.evaluate("window.pwned") is None


def test_a_filter_narrows_what_is_shown_and_a_wrong_one_says_what_to_do(
    site: Server, visit: Callable[..., Page]
):
    page = visit(site, "/?q=red")
    page.get_by_label("Filter").fill("price<10")
    page.keyboard.press("Enter")
    expect(page.locator(".hit")).to_have_count(1)
    page.get_by_label("Filter").fill("prize<10")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("did you mean 'price'")
    page.get_by_label("Filter").fill("")
    page.get_by_label("Show").select_option("12")
    expect(page.locator(".hit")).to_have_count(12)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_file_that_is_no_picture_is_told_and_the_page_goes_on(site: Server, visit: Callable[..., Page]):
    page = visit(site)
    page.set_input_files("#file", {"name": "x.png", "mimeType": "image/png", "buffer": b"not a picture"})
    expect(page.get_by_role("alert")).to_contain_text("give a PNG, JPEG or WebP")
    page.get_by_role("searchbox").fill("green")
    expect(page.locator(".hit").first).to_contain_text("green")
    expect(page.get_by_role("alert")).to_be_empty()


def test_the_page_says_what_answers_so_that_a_bug_report_explains_itself(
    site: Server, visit: Callable[..., Page], bundles: Path
):
    manifest = json.loads((bundles / "colours" / "manifest.json").read_text())
    page = visit(site)
    facts = page.locator("#facts")
    expect(facts).to_contain_text("shop.index")
    for text in ("colours", "fp32", "cpu", "ONNX Runtime", manifest["edgeglm"]):
        expect(facts).to_contain_text(text)
    digests = page.eval_on_selector_all("#facts dd[title]", "all => all.map((one) => one.title)")
    assert manifest["content_digest"] in digests
    assert manifest["files"]["models/fp32/text.onnx"]["sha256"] in digests
    assert manifest["files"]["precision_plan.json"]["sha256"] in digests


def test_the_charts_follow_what_the_server_does(site: Server, visit: Callable[..., Page]):
    page = visit(site, "/?q=red")
    until(page, "document.querySelector('#latency .line').getAttribute('d')?.includes('L')")
    until(page, "document.querySelector('#rate .line').getAttribute('d')?.includes('L')")
    expect(page.locator("#latency-now")).to_have_text(re.compile(r"[\d.]+ ms, 99 % in [\d.]+ ms"))
    expect(page.locator("#latency")).to_have_attribute("aria-label", re.compile("median [\\d.]+ ms"))


def test_a_server_that_was_stopped_is_told(bundles: Path, visit: Callable[..., Page], tmp_path: Path):
    with running(tmp_path / "log", serve_command(bundles / "colours", "--no-grpc")) as server:
        page = visit(server)
        expect(page.locator("#which")).to_contain_text("colours")
        expect(page.locator("#filter-label")).to_be_hidden()  # a gallery has no metadata
        page.route("**/v1/*", lambda route: route.abort())  # what a browser sees of a dead server
        page.get_by_role("searchbox").fill("red")
        expect(page.get_by_role("alert")).to_contain_text("does not answer")
        page.unroute("**/v1/*")
        page.get_by_role("button", name="Search", exact=True).click()
        expect(page.locator(".hit").first).to_contain_text("a red thing")
        page.goto("about:blank")


def test_a_token_is_asked_for_once_and_pictures_come_with_it(
    bundles: Path, index: Path, visit: Callable[..., Page], tmp_path: Path
):
    command = serve_command(bundles / "colours", "--index", str(index), "--no-grpc")
    with running(tmp_path / "log", command, EDGEGLM_TOKEN=TOKEN) as server:
        assert fetched(server.http + "/v1/search?q=red")[0] == 401
        assert fetched(server.http + "/v1/pictures/shop/red.png")[0] == 401
        page = visit(server, "/?q=red")
        page.get_by_label("Token", exact=True).fill("wrong" * 5)
        page.get_by_role("button", name="Go on").click()
        page.get_by_label("Token", exact=True).fill(TOKEN)
        page.get_by_role("button", name="Go on").click()
        expect(page.locator(".hit").first).to_contain_text("red.png")
        until(page, "document.querySelector('.hit img')?.naturalWidth > 0")
        page.locator(".hit").first.click()  # the picture itself is asked for with the token
        expect(page.locator("#status")).to_contain_text("like your picture")
        page.goto("about:blank")


def test_the_page_is_small_and_whole():
    body, _ = served_page()
    assert len(body) < 64_000
    assert b"/*STYLE*/" not in body
    assert b"/*SCRIPT*/" not in body
