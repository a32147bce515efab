"""The page in a real browser. Needs Chromium and ``pip install playwright``."""

import shutil

import pytest

from deploy.status import server as server_module
from deploy.status.page import write_page
from deploy.status.server import serve_page
from tests.deploy.status.runs import begin, finished_run, play

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Open a page; an error in its script, or a request to elsewhere, fails the test."""
    wrong = []

    def opened(address, **settings):
        page = browser.new_context(**settings).new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: line.type == "error" and "401" not in line.text and wrong.append(line.text))
        page.on("request", lambda request: request.url.startswith(address[:12]) or wrong.append(request.url))
        page.goto(address)
        return page

    yield opened
    assert wrong == []


def file_of(folder, path):
    write_page(folder, path)
    return path.as_uri()


def test_a_run_is_shown_in_every_size_and_colour(open_page, tmp_path):
    finished_run(tmp_path / "run", "fedcybgd", block=5)
    address = file_of(tmp_path / "run", tmp_path / "page.html")
    backgrounds = set()
    for scheme, width in (("light", 1280), ("dark", 1280), ("light", 360)):
        page = open_page(address, color_scheme=scheme, viewport={"width": width, "height": 800})
        assert page.inner_text("#title") == "run" and page.inner_text("#state") == "✓ finished"
        assert page.evaluate("document.documentElement.scrollWidth") == width, "it scrolls sideways"
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.locator("#loss svg polyline").count() == 2
        assert page.locator("#turns svg .cell").count() == 9
        assert page.locator("#answers li").count() == 3 and page.locator("#answers .same").count() == 3
    assert len(backgrounds) == 2


def test_charts_speak_to_keyboard_and_screen_reader(open_page, tmp_path):
    finished_run(tmp_path / "run")
    page = open_page(file_of(tmp_path / "run", tmp_path / "page.html"))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    cursor = page.get_by_role("slider", name="Loss, nats a token")
    cursor.focus()
    assert cursor.get_attribute("aria-valuetext") == "round 3, held-out 1.000, training 1.000"
    page.keyboard.press("ArrowLeft")
    assert cursor.get_attribute("aria-valuetext") == "round 2, held-out 2.000, training 1.500"
    assert "held-out 2.000" in page.inner_text("#loss .legend").replace("\n", " ")
    page.locator("#loss summary").press("Enter")
    assert page.locator("#loss tbody tr").count() == 4
    page.get_by_role("button", name="Colours: as the system").press("Enter")
    page.get_by_role("button", name="Colours: light").press("Enter")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


def test_what_a_node_calls_itself_stays_text(open_page, tmp_path):
    hostile = "</script><img src=x onerror=document.title='owned'>"
    ledger = begin(tmp_path / "run")
    play(ledger, 1, asked=(hostile,))
    ledger.close()
    page = open_page(file_of(tmp_path / "run", tmp_path / "page.html"))
    assert page.locator("#nodes th", has_text=hostile).count() == 1
    assert page.locator("img").count() == 0 and "owned" not in page.title()


def test_the_served_page_asks_for_its_token_and_follows_the_run(open_page, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "FRESH_SECONDS", 0.0)
    ledger = begin(tmp_path / "run")
    finished_run(tmp_path / "older")
    with serve_page(tmp_path, "sesame") as url:
        page = open_page(url.partition("#")[0])
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#denied:not(:empty)")
        assert not page.is_visible("main")
        page.goto("about:blank")
        page.goto(url)
        page.wait_for_selector("main:not([hidden])")
        assert "sesame" not in page.url, "the token stays in the address bar"
        page.select_option("#runs", "run")
        assert page.inner_text("#place").startswith("Round 0 of 3")
        play(ledger, 1)
        page.locator("#place", has_text="Round 1 of 3").wait_for(timeout=20_000)
        page.close()
    ledger.close()
