"""The chat page as a user has it: in a real browser, before a real gateway and scheduler, with a worker that says what
the test tells it to.
"""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Error, expect
from transformers import PreTrainedTokenizerFast

from tests.contract.gateway.browser import ChatPage, chromium
from tests.contract.services import MODEL, Services, model_info
from tests.support.chats import QWEN3_TEMPLATE
from tests.support.gateway import Gateway
from tests.support.programs import require_programs
from tests.support.scripted_runner import ScriptedRunner
from tests.support.tokenizers import EMBEDDED

pytestmark = pytest.mark.asyncio(loop_scope="module")

EOS = 1017
PHONE = {"width": 360, "height": 640}
HOSTILE = '<img src=x onerror="window.isBroken = 1"><script>window.isBroken = 1</script><b>bold</b> &lt;i&gt; a < b'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    require_programs("chromium")
    async with chromium() as browser:
        yield browser


@dataclass(frozen=True)
class Site:
    """A page that is open, and what is behind it: the worker takes a permit of the gate for each step."""

    page: ChatPage
    gateway: Gateway
    services: Services
    runner: ScriptedRunner
    gate: threading.Semaphore


@pytest_asyncio.fixture(loop_scope="module")
async def site(browser: Browser, folder: Path) -> AsyncIterator[Site]:
    async with open_site(browser, folder) as site:
        yield site
        assert site.page.complaints == []
        hosts = {urlsplit(url).netloc for url in site.page.requests if not url.startswith("data:")}
        assert hosts == {f"127.0.0.1:{site.gateway.port}"}


@asynccontextmanager
async def open_site(
    browser: Browser, folder: Path, *, has_worker: bool = True, **options: object
) -> AsyncIterator[Site]:
    """options: of the browser's tab."""
    gate = threading.Semaphore(0)
    runner = ScriptedRunner(model_info(eos_token_ids=(EOS,)), gate)
    services = Services(runner, tokenizer=str(folder))
    await services.start(has_worker=has_worker)
    try:
        async with Gateway(services.address) as gateway:
            context = await browser.new_context(**options)
            page = ChatPage(await context.new_page())
            await page.page.goto(f"http://127.0.0.1:{gateway.port}/")
            yield Site(page, gateway, services, runner, gate)
            await context.close()
    finally:
        # Steps that still wait would keep the worker from ending.
        gate.release(100_000)
        await services.stop()


def rendered(messages: list[dict[str, str]], **options: bool) -> str:
    """The prompt of a conversation as transformers renders it."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED))
    text = tokenizer.apply_chat_template(
        messages, chat_template=QWEN3_TEMPLATE, tokenize=False, add_generation_prompt=True, **options
    )
    return str(text)


async def test_a_conversation(site: Site) -> None:
    page, script = site.page, "But, soft! what light through yonder window breaks?"
    site.runner.scripts = [script, "It is the east."]
    await expect(page.page.locator("#model")).to_have_text(MODEL)
    await page.ask("Who are you?")
    # The text grows with the steps that the worker is allowed.
    seen = [""]
    for _ in range(3):
        site.gate.release(3)
        await expect(page.said).not_to_have_text(seen[-1])
        seen.append(await page.said.inner_text())
        assert script.startswith(seen[-1]) and len(seen[-2]) < len(seen[-1]) < len(script)
    await expect(page.send).to_be_hidden()
    site.gate.release(1000)
    await page.wait_for_end(1)
    assert await page.said.inner_text() == script
    assert await page.questions.all_inner_texts() == ["Who are you?"]
    num_tokens = len(PreTrainedTokenizerFast(tokenizer_file=str(EMBEDDED)).encode(script))
    # The token that ends the output counts too.
    await expect(page.note).to_contain_text(f"{num_tokens + 1} tokens, ")
    await expect(page.note).to_contain_text("tokens/s")

    await page.ask("And then?")
    await page.wait_for_end(2)
    assert await page.said.inner_text() == "It is the east."
    first, second = ({"role": "user", "content": text} for text in ("Who are you?", "And then?"))
    history = [first, {"role": "assistant", "content": script}, second]
    assert site.runner.prompts == [rendered([first]), rendered(history)]


async def test_thoughts_stand_apart_and_are_not_sent_again(site: Site) -> None:
    page = site.page
    site.runner.scripts = ["<think>\nWhere does the sun rise?\n</think>\n\nIn the east.", "Yes."]
    site.gate.release(15)
    await page.ask("Where?")
    thought = page.answers.last.locator("details.thought")
    await expect(thought.locator("p")).to_be_visible()
    site.gate.release(1000)
    await page.wait_for_end(1)
    assert await page.said.inner_text() == "In the east."
    await expect(thought.locator("p")).to_be_hidden()
    await thought.get_by_text("Thoughts").click()
    assert await thought.locator("p").inner_text() == "Where does the sun rise?"
    await page.page.get_by_text("Settings").click()
    await page.page.get_by_label("Let the model think").uncheck()
    await page.ask("Sure?")
    await page.wait_for_end(2)
    history = [
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "In the east."},
        {"role": "user", "content": "Sure?"},
    ]
    assert site.runner.prompts[1] == rendered(history, enable_thinking=False)


@pytest.mark.parametrize("how", ["button", "Escape"])
async def test_an_answer_that_is_stopped_stays_and_its_request_is_aborted(site: Site, how: str) -> None:
    page = site.page
    site.runner.scripts = ["la " * 1000, "Yes."]
    await page.ask("Sing.")
    site.gate.release(10)
    await expect(page.said).to_contain_text("la la")
    assert (await site.services.load()).num_running_sequences == 1
    if how == "button":
        await page.stop.click()
    else:
        await page.page.keyboard.press("Escape")
    await page.wait_for_end(1)
    await site.services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
    await expect(page.note).to_have_text("stopped")
    await expect(page.text).to_be_focused()
    text = (await page.said.inner_text()).strip()
    site.gate.release(1000)
    await page.ask("More?")
    await page.wait_for_end(2)
    assert f"<|im_start|>assistant\n{text}" in site.runner.prompts[1]
    await expect(page.problem).to_have_count(0)


async def test_a_new_chat_forgets_the_old_one_also_while_it_answers(site: Site) -> None:
    page = site.page
    site.runner.scripts = ["la " * 1000, "Yes."]
    await page.ask("Sing.")
    site.gate.release(10)
    await expect(page.said).to_contain_text("la la")
    await page.page.get_by_role("button", name="New chat").click()
    await expect(page.log).to_be_empty()
    await expect(page.text).to_be_focused()
    await site.services.wait_load(lambda load: load.num_used_blocks == 0, "its blocks are free")
    site.gate.release(1000)
    await page.ask("Sure?")
    await page.wait_for_end(1)
    assert await page.said.inner_text() == "Yes."
    assert site.runner.prompts[1] == rendered([{"role": "user", "content": "Sure?"}])


async def test_the_log_follows_an_answer_unless_its_reader_looks_back(site: Site) -> None:
    page = site.page
    site.runner.scripts = ["la\n" * 300]
    await page.ask("Sing.")
    site.gate.release(300)
    await page.page.wait_for_function("() => log.scrollHeight > 2 * log.clientHeight")
    # Half a line is a rounding.
    assert await page.page.evaluate("log.scrollHeight - log.scrollTop - log.clientHeight") < 12
    place = await page.page.evaluate("() => { log.scrollTop -= 30; return log.scrollTop }")
    site.gate.release(1000)
    await page.wait_for_end(1)
    assert await page.page.evaluate("log.scrollTop") == place


async def test_settings_reach_the_request(site: Site) -> None:
    page = site.page
    site.runner.scripts = ["But, soft! what light?"]
    site.gate.release(1000)
    await page.settings(System_prompt="You are ROMEO.", Max_tokens=3, Temperature=0.5, Top_p=0.9, API_key="secret")
    async with page.page.expect_request("**/chat/completions") as request:
        await page.ask("Who are you?")
    sent = await request.value
    await page.wait_for_end(1)
    assert (sent.post_data_json["temperature"], sent.post_data_json["top_p"]) == (0.5, 0.9)
    assert sent.headers["authorization"] == "Bearer secret"
    conversation = [{"role": "system", "content": "You are ROMEO."}, {"role": "user", "content": "Who are you?"}]
    assert site.runner.prompts == [rendered(conversation)]
    await expect(page.note).to_contain_text("cut off at the token limit, 3 tokens")


async def test_tags_are_text(site: Site) -> None:
    page = site.page
    site.runner.scripts = [f"<think>\n{HOSTILE}\n</think>\n\n{HOSTILE}"]
    site.gate.release(1000)
    await page.ask(HOSTILE)
    await page.wait_for_end(1)
    assert await page.said.text_content() == HOSTILE
    assert await page.answers.last.locator("details.thought p").text_content() == HOSTILE
    assert await page.questions.all_inner_texts() == [HOSTILE]
    assert await page.log.locator("img, script, b, i").count() == 0
    assert await page.page.evaluate("window.isBroken") is None


async def test_the_headers_forbid_what_a_mistake_in_the_page_could_do(site: Site) -> None:
    page = site.page
    with pytest.raises(Error, match="TrustedHTML"):
        await page.page.evaluate("document.body.innerHTML = '<b>x</b>'")
    with pytest.raises(Error, match="TrustedScript"):
        await page.page.add_script_tag(content="window.isBroken = 1")
    with pytest.raises(Error, match="Failed to fetch"):
        await page.page.evaluate("fetch('http://localhost:1/', {mode: 'no-cors'})")
    assert any("connect-src 'self'" in text for text in page.complaints)
    page.complaints.clear()


async def test_errors_are_said_in_words(site: Site) -> None:
    page = site.page
    await page.settings(Temperature=-1)
    await page.ask("Who are you?")
    await expect(page.problem).to_contain_text("temperature")
    # The question is there to be asked again.
    await expect(page.text).to_have_value("Who are you?")
    await page.page.get_by_label("Temperature").fill("")

    site.runner.scripts = ["la " * 1000]
    site.gate.release(10)
    await page.text.focus()
    await page.page.keyboard.press("Enter")
    await expect(page.said).to_contain_text("la la")
    await site.services.service.stop(0)
    site.gate.release(1000)
    await page.wait_for_end(2)
    await expect(page.problem.last).to_have_text("the server is stopping")
    assert [text for text in page.complaints if "400 (Bad Request)" not in text] == []
    page.complaints.clear()


async def test_a_server_that_is_gone_is_said_in_words(site: Site) -> None:
    page = site.page
    await site.gateway.__aexit__(None, None, None)
    await page.ask("Who are you?")
    await expect(page.problem).to_have_text("the connection to the server failed")
    await expect(page.text).to_have_value("Who are you?")
    page.complaints.clear()


async def test_a_server_that_is_starting_is_waited_for(browser: Browser, folder: Path) -> None:
    async with open_site(browser, folder, has_worker=False) as site:
        model = site.page.page.locator("#model")
        await expect(model).to_have_text("no worker has been seen yet")
        await site.services.start_worker()
        await expect(model).to_have_text(MODEL)


async def test_keys_are_enough(site: Site) -> None:
    page, keyboard = site.page, site.page.page.keyboard
    site.runner.scripts = ["Yes."]
    site.gate.release(1000)
    # The field has the focus from the start.
    await keyboard.type("One")
    await keyboard.press("Shift+Enter")
    await keyboard.type("Two")
    await keyboard.press("Tab")
    await expect(page.send).to_be_focused()
    await keyboard.press("Enter")
    await page.wait_for_end(1)
    assert await page.questions.all_inner_texts() == ["One\nTwo"]
    await page.text.focus()
    reached = []
    for _ in range(12):
        await keyboard.press("Tab")
        if await page.page.evaluate("document.activeElement.tagName") == "SUMMARY":
            await keyboard.press("Enter")
        reached.append(await page.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"send", "Settings", "system", "temperature", "top_p", "max_tokens", "key", "think"} <= set(reached)


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_phone_shows_all_of_it(browser: Browser, folder: Path, scheme: str) -> None:
    async with open_site(browser, folder, viewport=PHONE, color_scheme=scheme) as site:
        page = site.page
        site.runner.scripts = ["x" * 300]
        site.gate.release(1000)
        await page.ask("y" * 60)
        await page.wait_for_end(1)
        await page.settings(System_prompt="z" * 100)
        everything = "[...document.querySelectorAll('body, body *')].map(e => [e.outerHTML, e.getBoundingClientRect()])"
        for html, box in await page.page.evaluate(everything):
            assert box["left"] >= 0 and box["right"] <= PHONE["width"], html
        assert await page.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        for place in (page.send, page.text, page.page.get_by_role("button", name="New chat")):
            await expect(place).to_be_in_viewport()
        light = await page.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert light == (scheme == "light")
