"""The search page of the index's benchmark: first paint and queries in headless Chromium."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PAGE_QUERIES = 15
_QUIET = ("--port", "0", "--no-grpc", "--json")


def page_measured(bundle: Path, index: Path) -> dict[str, Any]:
    """Serve the index and time first paint and queries in headless Chromium."""
    from playwright.sync_api import sync_playwright

    with tempfile.NamedTemporaryFile() as log:
        server = subprocess.Popen(
            [Path(sys.executable).with_name("edgeglm"), "serve", bundle, "--index", index, *_QUIET],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert server.stdout is not None
        try:
            text = ""
            while not text.endswith("\n}\n"):
                text += server.stdout.readline()
            url = json.loads(text)["http"]
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path="/usr/bin/chromium", args=["--no-sandbox"]
                )
                paints, queries, shares = [], [], []
                for number in range(PAGE_QUERIES + 2):
                    page = browser.new_page(viewport={"width": 1280, "height": 800})
                    page.goto(url)
                    page.wait_for_timeout(1000)  # nobody has typed earlier
                    paint, query, share = page.evaluate(_IN_PAGE, _WORDS[number % len(_WORDS)])
                    paints.append(paint)
                    queries.append(query)
                    shares.append([float(part) for part in re.findall(r"[\d.]+(?= ms)", share)])
                    page.close()
                browser.close()
        finally:
            server.terminate()
            server.wait()
    paints, queries, shares = paints[2:], queries[2:], shares[2:]  # the first two warm the browser up
    embed, scan, way = (round(statistics.median(column), 1) for column in zip(*shares, strict=True))
    return {
        "first_paint_ms": round(statistics.median(paints), 1),
        "first_paint_high_ms": round(max(paints), 1),
        "query_to_pictures_ms": round(statistics.median(queries), 1),
        "query_to_pictures_high_ms": round(max(queries), 1),
        "queries": len(queries),
        "of_it_ms": {"embedding": embed, "search": scan, "pictures and way": way},
    }


_WORDS = ("red apple", "dog", "blue car", "birthday cake", "sun", "happy face", "tree", "musical notes")
_IN_PAGE = """async (words) => {
    const paint = performance.getEntriesByName("first-contentful-paint")[0].startTime;
    const root = document.documentElement, before = root.dataset.shown;
    document.getElementById("words").value = words;
    const began = performance.now();
    document.getElementById("search").requestSubmit();
    await new Promise((done) => {
        const changed = new MutationObserver(() => root.dataset.shown !== before && done());
        changed.observe(root, { attributes: true });
    });
    const visible = [...document.querySelectorAll(".hit img")]
        .filter((one) => one.getBoundingClientRect().top < innerHeight);
    await Promise.all(visible.map((one) => one.decode()));
    return [paint, performance.now() - began, document.getElementById("split").getAttribute("aria-label")];
}"""
