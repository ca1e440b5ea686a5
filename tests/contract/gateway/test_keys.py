"""API keys over HTTP: each path with no key, a wrong one, one of the wrong kind, and the right one; where the gateway
checks keys itself, and where the scheduler alone does.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute

from tandem_gateway.app import make_app
from tandem_shared.gateway_settings import GatewaySettings
from tests.contract.gateway.refusal import PROMPT, refusal
from tests.contract.services import MODEL, Services
from tests.support.chats import QWEN3_TEMPLATE, USER
from tests.support.gateway import HOST, Gateway, plain_request, read_answer
from tests.support.tokenizers import EMBEDDED

pytestmark = pytest.mark.asyncio(loop_scope="module")

INFERENCE, CONTROL = "key-for-inference-0001", "key-for-control-000002"
OPEN = ("/", "/health", "/version")
REQUESTS: dict[tuple[str, str], bytes] = {
    ("POST", "/v1/completions"): b'{"prompt": "a", "max_tokens": 2}',
    ("POST", "/v1/chat/completions"): b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}',
    ("POST", "/v1/responses"): b'{"input": "a", "max_output_tokens": 2}',
    ("POST", "/tokenize"): b'{"prompt": "a"}',
    ("POST", "/detokenize"): b'{"tokens": [1]}',
    ("GET", "/v1/models"): b"",
    ("GET", f"/v1/models/{MODEL}"): b"",
    ("GET", "/metrics"): b"",
    **{("GET", path): b"" for path in OPEN},
}


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=[True, False], ids=["both-check", "scheduler-checks"]
)
async def gateway(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "tokenizer.json").symlink_to(EMBEDDED)
    (folder / "chat_template.jinja").write_text(QWEN3_TEMPLATE)
    keys = folder / "keys"
    keys.write_text(f"alice inference {INFERENCE} priority=0..1\nops control {CONTROL}\n")
    own = {"api_key_file": str(keys)} if request.param else {}
    async with (
        Services(tokenizer=str(folder), api_key_file=str(keys)) as services,
        Gateway(services.address, **own) as gateway,
    ):
        yield gateway


async def test_every_path_is_here() -> None:
    routes = [route for route in make_app(GatewaySettings()).routes if isinstance(route, APIRoute)]
    paths = {(method, route.path) for route in routes for method in route.methods}
    named = {(method, path.replace(f"/{MODEL}", "/{name:path}")) for method, path in REQUESTS}
    assert paths == named


@pytest.mark.parametrize("shown", ["none", "malformed", "wrong", "wrong kind", "right"])
@pytest.mark.parametrize(("method", "path"), REQUESTS)
async def test_each_path(gateway: Gateway, method: str, path: str, shown: str) -> None:
    right, other = (CONTROL, INFERENCE) if path == "/metrics" else (INFERENCE, CONTROL)
    value = {
        "none": None,
        "malformed": right,
        "wrong": f"Bearer {right}x",
        "wrong kind": f"Bearer {other}",
        "right": f"Bearer {right}",
    }[shown]
    headers = {} if value is None else {"authorization": value}
    answer = await plain_request(gateway.port, method, path, REQUESTS[method, path], headers)
    if shown == "right" or path in OPEN:
        assert answer.status == 200, answer.body
    elif shown == "wrong kind":
        assert (answer.status, answer.error()["type"]) == (403, "permission_error")
    else:
        assert (answer.status, answer.error()["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer" and answer.headers["x-request-id"]
    assert INFERENCE not in answer.body.decode() and CONTROL not in answer.body.decode()


async def test_openais_client_sees_its_own_errors(gateway: Gateway) -> None:
    for key, kind in (("nothing", openai.AuthenticationError), (CONTROL, openai.PermissionDeniedError)):
        async with gateway.new_client(key) as client:
            for stream in (False, True):
                error = await refusal(client.completions.create(model=MODEL, prompt=PROMPT, stream=stream))
                assert isinstance(error, kind)
    async with gateway.new_client(INFERENCE) as client:
        assert (await client.models.list()).data
        call = client.chat.completions.create(model=MODEL, messages=[USER], max_tokens=2, extra_body={"priority": 2})
        error = await refusal(call)
        assert isinstance(error, openai.PermissionDeniedError) and "priority" in error.message


async def test_a_gateway_that_checks_keys_reads_them_again(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"alice inference {INFERENCE}\n")
    new = tmp_path / "new"
    new.write_text(f"alice inference {INFERENCE}-new\n")
    async with Services() as services, Gateway(services.address, api_key_file=str(keys)) as gateway:

        async def status(key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return (await plain_request(gateway.port, "GET", "/v1/models", headers=headers)).status

        assert await status(INFERENCE) == 200
        new.replace(keys)
        assert await status(INFERENCE) == 401
        assert await status(f"{INFERENCE}-new") == 200


async def test_two_keys_are_none(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(HOST, gateway.port)
    lines = [f"Authorization: Bearer {key}\r\n" for key in (INFERENCE, CONTROL)]
    writer.write(f"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{''.join(lines)}\r\n".encode())
    answer = await read_answer(reader)
    writer.close()
    assert (answer.status, answer.error()["code"]) == (401, "invalid_api_key")


async def test_no_spelling_of_a_path_needs_another_scope(tmp_path: Path) -> None:
    """The scheduler has no keys, so that nobody checks but the gateway."""
    keys = tmp_path / "keys"
    keys.write_text(f"alice inference {INFERENCE}\nops control {CONTROL}\n")
    spellings = ["/metrics", "/metrics%0A", "/%6detrics", "/metrics?a=b", "http://elsewhere/metrics", "//metrics"]
    async with Services() as services, Gateway(services.address, api_key_file=str(keys)) as gateway:
        seen = []
        for path in spellings:
            for key in (INFERENCE, CONTROL):
                headers = {"authorization": f"Bearer {key}"}
                answer = await plain_request(gateway.port, "GET", path, headers=headers)
                seen.append((path, key, b"http_requests_total" in answer.body))
    assert not [path for path, key, is_metrics in seen if is_metrics and key == INFERENCE]
    # Spellings of another path are no attack.
    assert [path for path, key, is_metrics in seen if is_metrics and key == CONTROL] == spellings[:5]
