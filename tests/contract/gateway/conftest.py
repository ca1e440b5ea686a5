"""Fixtures of the tests of the HTTP gateway."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.services import Services
from tests.support.chats import QWEN3_TEMPLATE
from tests.support.gateway import Gateway
from tests.support.tokenizers import EMBEDDED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").symlink_to(EMBEDDED)
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    return folder


@pytest.fixture
async def services(folder: Path) -> AsyncIterator[Services]:
    async with Services(tokenizer=str(folder)) as services:
        yield services


@pytest.fixture
async def gateway(services: Services) -> AsyncIterator[Gateway]:
    async with Gateway(services.address) as gateway:
        yield gateway
