"""The page in a real browser: Debian's Chromium, headless, driven by Playwright; the model is toybox itself."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from objectcompose.examples.app import launch_page
from objectcompose.examples.app_methods import offered_methods


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
MISSING = [name for name in ("gradio", "playwright") if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(BROWSER is None, reason="no chromium on the path (apt-get install chromium)"),
]

_WAIT = 60_000  # milliseconds: a busy machine paints slowly


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The page on a free port, and the folder of its layouts."""
    folder = tmp_path_factory.mktemp("app")
    page = launch_page("127.0.0.1", 0, folder, "cpu")
    yield page.local_url, folder
    page.close()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(served, chromium):
    """The loaded page; `tab.asked` are the hosts that it asked, `tab.broken` the errors of its scripts."""
    context = chromium.new_context(
        viewport={"width": 1440, "height": 1000}, permissions=["clipboard-read", "clipboard-write"]
    )
    tab = context.new_page()
    tab.set_default_timeout(_WAIT)
    tab.asked, tab.broken = set(), []
    tab.on("request", lambda request: tab.asked.add(request.url.split("/")[2]))
    tab.on("pageerror", lambda error: tab.broken.append(str(error)))
    tab.goto(served[0])
    tab.locator("#drawing [data-object='0'].chosen").wait_for()  # the canvas has drawn itself
    yield tab
    context.close()


def drag(tab, *points):
    """Draw through points given as fractions of the canvas."""
    frame = tab.locator("#drawing canvas").bounding_box()
    places = [(frame["x"] + x * frame["width"], frame["y"] + y * frame["height"]) for x, y in points]
    tab.mouse.move(*places[0])
    tab.mouse.down()
    for place in places[1:]:
        tab.mouse.move(*place, steps=4)
    tab.mouse.up()


def cell(tab, row, column):
    return tab.locator(f"#table [data-testid='cell-{row}-{column}']").last


def wait_for_text(tab, locator, text):
    tab.wait_for_function("([part, text]) => part.innerText.includes(text)", arg=[locator.element_handle(), text])


def message_of(tab, action):
    """What the page says after an action that it cannot follow."""
    action()
    toast = tab.locator(".toast-body").first
    toast.wait_for()
    text = toast.inner_text()
    toast.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")
    return text


def record_progress(tab):
    """Keep in the page what its progress bar shows from now on, however short it is there."""
    tab.evaluate("""() => {
        window.progressShown = [];
        new MutationObserver(() => {
            const bar = document.querySelector("#picture [role=progressbar]");
            if (!bar) return;
            window.progressShown.push([Number(bar.getAttribute("aria-valuenow")), bar.parentElement.innerText]);
        }).observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
    }""")


def copied(tab, name):
    """The text behind a field's copy button."""
    tab.locator(name).get_by_label("Copy").click()
    return tab.evaluate("navigator.clipboard.readText()")


def test_draw_paint_copy_and_repeat(tab, served, tmp_path, monkeypatch):
    tab.locator("#drawing [data-object='1']").click()
    drag(tab, (0.55, 0.2), (0.95, 0.8))
    wait_for_text(tab, cell(tab, 1, 2), "0.55")  # a box goes into the table
    tab.locator("#drawing [data-object='0']").click()
    tab.locator("#drawing [data-tool='brush']").click()
    drag(tab, (0.1, 0.3), (0.35, 0.3), (0.35, 0.7), (0.1, 0.7), (0.1, 0.5), (0.3, 0.5))
    wait_for_text(tab, cell(tab, 0, 2), "0.05")  # a painted mask too, with the box around it

    tab.get_by_label("MIFO", exact=True).check()
    tab.locator("#steps input").fill("6")
    record_progress(tab)
    tab.locator("#paint").click()
    wait_for_text(tab, tab.locator("#message"), "MIFO, 6 steps")
    shares = [share for share, text in tab.evaluate("progressShown") if "painting" in text]
    assert shares == sorted(shares) and any(0 < share < 100 for share in shares)
    tab.locator("#picture [role=progressbar]").wait_for(state="detached")
    address = tab.locator("#picture img").get_attribute("src")
    shown = np.asarray(Image.open(io.BytesIO(tab.request.get(address).body())).convert("RGB"))
    assert tab.locator("#maps img").count() == 2 and tab.locator("#overlay img").count() == 1

    code = copied(tab, "#code")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "lines.py", "exec"), names)
    assert np.array_equal(np.asarray(names["output"].images[0]), shown)
    first, second = names["layout"].objects
    assert first.mask is not None and 0.05 < first.mask.mean() < 0.3 and second.mask is None
    assert second.box == (0.55, 0.2, 0.95, 0.8)

    tab.get_by_role("tab", name="Layout JSON").click()
    wait_for_text(tab, tab.locator("#layout"), '"schema_version"')
    layout = json.loads(copied(tab, "#layout"))
    assert layout == json.loads((served[1] / "layout.json").read_text(encoding="utf-8"))
    assert [item["phrase"] for item in layout["objects"]] == [first.phrase, second.phrase]
    assert tab.asked == {served[0].split("/")[2]} and tab.broken == []


def test_bad_input_is_answered_in_words(tab, tmp_path):
    (tmp_path / "no picture.png").write_text("this is text")
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(6 * 2**20))

    def paint_with_prompt(text):
        tab.locator("#prompt textarea").fill(text)
        tab.locator("#paint").click()

    asked = message_of(tab, lambda: paint_with_prompt("a photo of a pizza"))
    assert "teddy bear" in asked and "Traceback" not in asked
    tab.locator("#load_a_layout > button").click()
    tab.locator("#pasted textarea").fill("{")
    assert "valid JSON" in message_of(tab, lambda: tab.locator("#load").click())
    readers = [method.title for method in offered_methods().values() if method.reads_pictures]
    if not readers:
        pytest.skip("no method that is offered reads pictures: their weights are not in toybox")
    tab.get_by_label(readers[0], exact=True).check()
    upload = tab.locator("#references input[type=file]").last
    assert "5" in message_of(tab, lambda: upload.set_input_files(tmp_path / "large.png"))
    upload.set_input_files(tmp_path / "no picture.png")
    assert "readable" in message_of(tab, lambda: paint_with_prompt("a photo of a teddy bear and an umbrella"))
