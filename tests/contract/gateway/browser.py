"""The chat page in a headless Chromium of the system's, and what it asks and complains of meanwhile."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from playwright.async_api import Browser, ConsoleMessage, Page, async_playwright, expect

WAIT_S = 30.0
expect.set_options(timeout=WAIT_S * 1000)


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"))
        try:
            yield browser
        finally:
            await browser.close()


class ChatPage:
    """The page in a tab of its own, and the moves of a user."""

    def __init__(self, page: Page) -> None:
        self.page = page
        page.set_default_timeout(WAIT_S * 1000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        self.send = page.get_by_role("button", name="Send")
        self.stop = page.get_by_role("button", name="Stop")
        self.text = page.get_by_role("textbox", name="Message")
        self.log = page.get_by_role("log")
        self.questions = self.log.locator("article.user")
        self.answers = self.log.locator("article.assistant")
        self.said = self.answers.last.locator("p.said")
        self.note = self.answers.last.locator("p.note")
        self.problem = self.page.get_by_role("alert")

    def _note(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    async def ask(self, question: str) -> None:
        """Types a question and sends it with the Enter key."""
        await self.text.click()
        await self.page.keyboard.type(question)
        await self.page.keyboard.press("Enter")

    async def wait_for_end(self, num_answers: int) -> None:
        """Until so many answers are there and none is under way."""
        await self.page.wait_for_function(
            "n => document.querySelectorAll('article.assistant:not([aria-busy])').length === n", arg=num_answers
        )

    async def settings(self, **values: Any) -> None:
        """Opens the settings and fills fields in by their labels."""
        await self.page.get_by_text("Settings").click()
        for label, value in values.items():
            await self.page.get_by_label(label.replace("_", " ")).fill(str(value))
