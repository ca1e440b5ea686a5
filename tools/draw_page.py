"""Takes docs/images/page-light.png and page-dark.png: the chat page after two turns with the embedded model.

Needs Chromium. Usage: python -m tools.draw_page
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from tandem.processes import Services
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.gateway_settings import GatewaySettings

IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTIONS = ("Who are you?", "What light through yonder window breaks?")
SYSTEM = "You are JULIET."


def main() -> None:
    settings = (WorkerSettings(port=0), SchedulerSettings(port=0))
    with Services(*settings, gateway=GatewaySettings(http_port=0)) as services, sync_playwright() as playwright:
        services.wait_until_ready(60)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 720, "height": 540}, device_scale_factor=1.5)
        page.goto(f"http://{services.http_address}/")
        page.get_by_text("Settings").click()
        page.get_by_label("System prompt").fill(SYSTEM)
        page.get_by_text("Settings").click()
        for number, question in enumerate(QUESTIONS, start=1):
            page.get_by_role("textbox", name="Message").fill(question)
            page.keyboard.press("Enter")
            page.wait_for_function(
                "n => document.querySelectorAll('article.assistant:not([aria-busy])').length === n", arg=number
            )
        page.screenshot(path=IMAGES / "page-light.png")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=IMAGES / "page-dark.png")
        browser.close()


if __name__ == "__main__":
    main()
