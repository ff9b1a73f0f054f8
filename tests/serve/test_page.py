"""The page in a real browser: what a person does on it, and that what a model writes stays text."""

import json
import os
import shutil
from pathlib import Path

import pytest
from server import ATTACK, CHINESE, COUNT, Server, serving

BROWSERS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")
# Pictures go here, where it is set: SCREENSHOTS=DIR pytest tests/serve/test_page.py
SCREENSHOTS = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs: pip install playwright")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser, server: Server):
    """Return a function that opens the page as new; the test fails where anything came from elsewhere, or broke."""
    contexts, wrong = [], []

    def open_it(address: str = server.address, **how):
        own = (address.split("#")[0].rstrip("/") + "/", "blob:", "data:")
        context = browser.new_context(**{"locale": "en-US", **how})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if is_fault(line) else None)
        page.on("request", lambda request: None if request.url.startswith(own) else wrong.append(request.url))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.set_default_timeout(120_000)
        page.goto(address)
        page.locator("#model:not(:text-is('jgpt'))").wait_for()  # the server has said which model it has
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert wrong == []


def is_fault(line) -> bool:
    """Tell an error of the page, such as one of its policy, from the note that a request was refused."""
    return line.type == "error" and not line.text.startswith("Failed to load resource")


def ask(page, question: str) -> str:
    """Ask as a person does; return the answer when it is whole."""
    n = page.locator(".assistant").count()
    page.fill("#question", question)
    page.press("#question", "Enter")
    return answer(page, n)


def answer(page, n: int) -> str:
    """Return the nth answer when it is whole."""
    page.locator(".assistant").nth(n).wait_for()
    page.locator(".waiting").wait_for(state="detached")
    page.wait_for_selector("#send:not([hidden])")
    return page.locator(".assistant .body").nth(n).text_content()


def greedy(page) -> None:
    page.click("#open-settings")
    page.fill("#temperature", "0")
    page.click("#settings .primary")


def shoot(page, name: str) -> None:
    if SCREENSHOTS:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1100, 760), (390, 780)], ids=["desktop", "phone"])
def test_what_a_model_writes_stays_text(open_page, scheme: str, size: tuple[int, int]):
    how = dict(color_scheme=scheme, viewport=dict(width=size[0], height=size[1]), device_scale_factor=2)
    page = open_page(**how, locale="zh-CN" if scheme == "dark" else "en-US")
    greedy(page)
    found = ask(page, CHINESE[0])
    assert found == CHINESE[1].replace("\n```python\n", "").replace("\n```\n", "")  # the code is in a box of its own
    assert page.locator(".assistant pre").text_content() == "print('你好，世界')"
    assert ask(page, ATTACK[0]) == ATTACK[1]
    assert page.locator("#log script, #log img").count() == 0 and "stolen" not in page.title()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shoot(page, f"chat-{scheme}-{size[0]}")
    page.click("#open-settings")
    shoot(page, f"settings-{scheme}-{size[0]}")


def test_a_conversation_is_edited_retried_saved_and_begun_again(open_page, tmp_path: Path):
    page = open_page()
    greedy(page)
    assert ask(page, COUNT[0]) == COUNT[1]
    assert "tokens" in page.locator(".meta").text_content()
    page.locator(".assistant button", has_text="Retry").click()
    assert answer(page, 0) == COUNT[1] and page.locator(".message").count() == 2
    page.locator(".user button", has_text="Edit").click()
    page.locator(".user textarea").fill(ATTACK[0])
    page.locator(".user .primary").click()
    assert answer(page, 0) == ATTACK[1] and page.locator(".message").count() == 2
    with page.expect_download() as download:
        page.click("#save")
    saved = json.loads(Path(download.value.path()).read_text(encoding="utf-8"))
    assert [message["content"] for message in saved["messages"]] == list(ATTACK)
    page.reload()  # the conversation is still there, the settings too
    assert page.locator(".assistant .body").text_content() == ATTACK[1]
    page.click("#new")
    assert page.locator(".message").count() == 0 and ask(page, COUNT[0]) == COUNT[1]


def test_errors_are_said_and_old_turns_make_room(open_page):
    page = open_page()
    greedy(page)
    page.fill("#question", "word " * 400)
    page.press("#question", "Enter")
    page.wait_for_selector("#notice.wrong")
    assert "which leaves one for the answer" in page.text_content("#notice")
    page.click("#new")
    page.click("#open-settings")
    page.fill("#max_tokens", "30")
    page.click("#settings .primary")
    for n in range(12):
        ask(page, f"{COUNT[0]} Count. {n}")
    assert "were left out" in page.text_content("#notice") and page.locator(".message").count() == 24


def test_a_text_goes_on_behind_a_token_and_is_stopped(open_page, parrot: Path, tmp_path: Path):
    """A model without a chat template; the token comes with the address, and leaves it."""
    run = shutil.copytree(parrot, tmp_path / "run")
    settings = json.loads((run / "tokenizer" / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (run / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    with serving(run, JGPT_SERVE_TOKEN="open sesame") as server:
        page = open_page(server.address + "/#token=open+sesame")
        page.wait_for_selector("#text:not([hidden])")
        assert "token" not in page.url and page.is_hidden("#question")

        def settings_of(most: int) -> None:
            page.click("#open-settings")
            page.fill("#temperature", "0")
            page.fill("#max_tokens", str(most))
            page.click("#settings .primary")

        settings_of(5)
        page.fill("#text", "one two")
        page.click("#send")
        page.wait_for_selector("#notice:has-text('5 tokens')")
        assert page.input_value("#text").startswith("one two") and len(page.input_value("#text")) > 7
        shoot(page, "text")
        page.click("#undo")
        assert page.input_value("#text") == "one two"
        settings_of(4096)
        page.click("#send")
        while len(page.input_value("#text")) < 20:
            page.wait_for_timeout(10)
        page.click("#stop")
        page.wait_for_selector("#send:not([hidden])")
        assert page.text_content("#notice") == "stopped"
        server.wait_until_idle()
