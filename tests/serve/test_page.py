from __future__ import annotations

import json
import re
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.progress import QuietProgress
from edgeglm.index.opening import FolderSource, built_index
from edgeglm.serve.page_routes import page as served_page
from tests.runtime.test_retrieval import COLOURS, picture
from tests.serve.conftest import TOKEN, Server, running, serve_command

pytestmark = pytest.mark.system

EVIL = "<img src=x onerror=window.pwned=1>"
SCRIPT = "'\"><script>window.pwned=1<"
# What the browser says of refusals and violations that a test provokes.
EXPECTED = ("status of 400", "status of 401", "ERR_FAILED", "ERR_CONNECTION_REFUSED", "TrustedScript")
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def index(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the three colours, of shades of green, and of two files named by somebody evil."""
    folder = tmp_path_factory.mktemp("pictures") / "shop"
    folder.mkdir()
    for name, colour in COLOURS.items():
        (folder / f"{name}.png").write_bytes(picture(colour))
    for shade in range(20):
        (folder / f"green {shade:02}.png").write_bytes(picture((5 * shade, 250, 3 * shade)))
    (folder / f"{EVIL}.png").write_bytes(picture((240, 0, 10)))
    (folder / f"{SCRIPT}.png").write_bytes(picture((230, 10, 0)))
    metadata: dict[str, dict[str, Any]] = {
        f"{SCRIPT}.png": {"text": f"{SCRIPT}/script>", "price": 3},
        "red.png": {"price": 30},
    }
    with open_bundle(bundles / "colours") as opened:
        source = FolderSource(folder=folder, metadata=metadata)
        built_index(opened, source, folder.parent / "shop.index", QuietProgress())
    return folder.parent / "shop.index"


@pytest.fixture(scope="module")
def site(bundles: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("site") / "log"
    command = serve_command(bundles / "colours", "--index", str(index), "--no-grpc")
    with running(log, command) as found:
        yield found


@pytest.fixture(scope="module")
def browser(require_system: Callable[[str], str]) -> Iterator[Browser]:
    chromium = require_system("chromium")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page; when the test is over, nothing must have gone wrong in it or asked another host."""
    opened: list[tuple[Page, list[str], set[str], str]] = []

    def open_page(server: Server, path: str = "/", **options: Any) -> Page:
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        page = context.new_page()
        page.set_default_timeout(15_000)
        said: list[str] = []
        asked: set[str] = set()
        page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        opened.append((page, said, asked, server.address))
        page.goto(server.http + path)
        return page

    yield open_page
    for page, said, asked, address in opened:
        page.context.close()
        said = [text for text in said if not any(words in text for words in EXPECTED)]
        assert said == []
        assert asked <= {address, ""}  # blob: and data: have no host


def fetched(url: str, **headers: str) -> tuple[int, Message, str]:
    """GET without a browser: status, headers, text."""
    try:
        with urlopen(Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()


def until(page: Page, expression: str) -> None:
    """Wait for an expression to hold; playwright's own way is eval, which the page's policy forbids."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(expression)


def names(page: Page) -> list[str]:
    return [one.strip() for one in page.locator(".hit .name").all_inner_texts()]


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


def test_the_charts_follow_what_the_server_does(site: Server, visit: Callable[..., Page]):
    page = visit(site, "/?q=red")
    until(page, "document.querySelector('#latency .line').getAttribute('d')?.includes('L')")
    until(page, "document.querySelector('#rate .line').getAttribute('d')?.includes('L')")
    expect(page.locator("#latency-now")).to_have_text(re.compile(r"[\d.]+ ms, 99 % in [\d.]+ ms"))
    expect(page.locator("#latency")).to_have_attribute("aria-label", re.compile("median [\\d.]+ ms"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(site: Server, visit: Callable[..., Page], scheme: str):
    page = visit(site, "/?q=green", viewport=PHONE, is_mobile=True, has_touch=True, color_scheme=scheme)
    expect(page.locator(".hit")).to_have_count(24)
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


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from the npm registry, pinned by its digest."""
    from edgeglm.assets.catalogue import Spec
    from edgeglm.assets.downloads import downloaded_file
    from edgeglm.core.store import verify_file

    folder = tmp_path_factory.mktemp("axe")
    with QuietProgress().task("axe") as task:
        archive = downloaded_file(Spec(kind="npm", name="axe-core", version="4.14.1"), folder, task)
    verify_file(archive, "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745")
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


def test_the_page_is_small_and_whole():
    body, _ = served_page()
    assert len(body) < 64_000
    assert b"/*STYLE*/" not in body
    assert b"/*SCRIPT*/" not in body
