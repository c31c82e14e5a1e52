"""A server with an index and a browser before it, for the tests of the page.

Test files import the fixtures by name, with ``__all__`` to say that they are meant to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from edgeglm.bundle.verify import open_bundle
from edgeglm.core.progress import QuietProgress
from edgeglm.index.opening import FolderSource, built_index
from scripts.fixtures.colours import COLOURS, picture
from tests.serve.conftest import Server, running, serve_command

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
