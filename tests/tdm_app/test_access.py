"""Keys, rate limits, origins and hosts: who gets in, and what everybody else is told."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from tdm_app import keys
from tdm_app.auth import Caller, admin_of, caller_of
from tdm_app.errors import SOON_MS, SPREAD, install_error_handlers
from tdm_app.ratelimit import Buckets, Limiter
from tdm_app.refusal import Refused
from tdm_app.request_id import RequestId
from tdm_app.security import HEADERS, install_security
from tdm_app.settings import Settings
from tdm_app.state import State

pytestmark = pytest.mark.anyio
Check = Callable[..., dict[str, Any]]
Serve = Callable[..., Any]
ADMIN_KEY = "an-admin-key-for-the-tests"


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[State]:
    state = State(tmp_path)
    yield state
    state.close()


@pytest.fixture
async def serve(state: State) -> AsyncIterator[Serve]:
    """`serve(auth="on")`: a client of a small app behind the real layers."""
    async with AsyncExitStack() as stack:

        async def start(address: str = "127.0.0.1", **given: Any) -> httpx.AsyncClient:
            app = small_app(state, Settings(**given).bound_to(address == "127.0.0.1"))
            transport = httpx.ASGITransport(app, client=(address, 1))
            return await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://localhost"))

        yield start


def small_app(state: State, settings: Settings) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)
    limiter = install_security(app, settings, state)
    app.add_middleware(RequestId)

    @app.post("/v1/images/generations")
    @app.get("/v1/models")
    async def who(request: Request, n: int = 1) -> dict[str, Any]:
        caller = caller_of(request)
        limiter.pictures(caller, n)
        return {"id": caller.id, "admin": caller.admin, "owner": caller.owner, "share": caller.share}

    @app.get("/v1/feedback")
    async def admins(request: Request) -> dict[str, Any]:
        return {"id": admin_of(request).id}

    async def fine() -> str:
        return "fine"

    for path in ("/", "/metrics", "/healthz", "/readyz", "/docs", "/v1/files/x", "/gradio_api/queue/join"):
        app.add_api_route(path, fine, methods=["GET", "POST"])
    return app


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_without_keys_everybody_is_an_admin_of_this_machine(serve: Serve) -> None:
    answer = (await (await serve()).get("/v1/models")).json()
    assert answer == {"id": "", "admin": True, "owner": None, "share": "127.0.0.1"}


async def test_an_open_service_has_no_admins(serve: Serve, assert_error: Check) -> None:
    client = await serve("203.0.113.7", allow_open=True)
    answer = (await client.get("/v1/models")).json()
    assert answer == {"id": "", "admin": False, "owner": "", "share": "203.0.113.7"}
    assert_error(await client.get("/v1/feedback"), 403, "admin_only")
    assert_error(await client.get("/metrics"), 403, "admin_only")


async def test_a_public_address_asks_for_keys(serve: Serve, assert_error: Check) -> None:
    client = await serve("203.0.113.7")
    error = assert_error(await client.get("/v1/models"), 401, "invalid_api_key")
    assert error["message"] == "an API key is missing or not valid; send one as `Authorization: Bearer KEY`"


async def test_keys_open_and_scopes_hold(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve(auth="on")
    user, user_text = await state.write(keys.create, "me", "user")
    admin, admin_text = await state.write(keys.create, "boss", "admin")
    answer = (await client.get("/v1/models", headers=bearer(user_text))).json()
    assert answer == {"id": user.id, "admin": False, "owner": user.id, "share": user.id}
    assert_error(await client.get("/v1/feedback", headers=bearer(user_text)), 403, "admin_only")
    assert_error(await client.get("/metrics", headers=bearer(user_text)), 403, "admin_only")
    assert (await client.get("/v1/feedback", headers=bearer(admin_text))).json() == {"id": admin.id}
    assert (await client.get("/metrics", headers=bearer(admin_text))).status_code == 200
    answer = (await client.get("/v1/models", headers=bearer(admin_text))).json()
    assert (answer["admin"], answer["owner"]) == (True, None)


async def test_a_revoked_key_opens_nothing(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve(auth="on")
    key, text = await state.write(keys.create, "me", "user")
    assert (await client.get("/v1/models", headers=bearer(text))).status_code == 200
    assert await state.write(keys.revoke, key.id)
    assert not await state.write(keys.revoke, key.id)
    assert_error(await client.get("/v1/models", headers=bearer(text)), 401, "invalid_api_key")


async def test_what_is_no_key(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve(auth="on")
    key, text = await state.write(keys.create, "me", "user")
    other = (await state.write(keys.create, "you", "user"))[1]
    swapped = f"tdm_{key.id}_{other.split('_', 2)[2]}"
    for header in (
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {text[:-1]}",
        f"Bearer {text}A",
        f"Bearer {swapped}",
        f"Bearer tdm_{'0' * 12}_{text.split('_', 2)[2]}",
        f"Token {text}",
        text,
        "Basic !!!",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        "Basic " + base64.b64encode(text.encode()).decode(),  # a name without a password
        "Bearer ' OR 1=1 --",
        "Bearer tdm_\u00e9",
    ):
        response = await client.get("/v1/models", headers={"authorization": header.encode("latin-1")})
        assert_error(response, 401, "invalid_api_key")
        assert response.headers["www-authenticate"] == 'Bearer realm="tdm-serve"'


async def test_a_browser_is_asked_for_its_key(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve(auth="on")
    text = (await state.write(keys.create, "me", "user"))[1]
    response = await client.get("/")
    assert_error(response, 401, "invalid_api_key")
    assert response.headers["www-authenticate"] == 'Basic realm="tdm-serve"'
    assert (await client.get("/", auth=("anything", text))).status_code == 200
    assert (await client.post("/gradio_api/queue/join", auth=("", text))).status_code == 200
    assert (await client.post("/gradio_api/queue/join")).status_code == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/v1/files/x"])
async def test_what_needs_no_key(serve: Serve, path: str) -> None:
    assert (await (await serve(auth="on")).get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/files", "/healthz/", "/docs/x", "/nothing", "/v1/../docs/../v1/models"])
async def test_nothing_else_is_open(serve: Serve, assert_error: Check, path: str) -> None:
    assert_error(await (await serve(auth="on")).get(path), 401, "invalid_api_key")


async def test_the_admin_key_of_the_settings(serve: Serve) -> None:
    client = await serve(auth="on", admin_key=ADMIN_KEY)
    answer = (await client.get("/v1/models", headers=bearer(ADMIN_KEY))).json()
    assert (answer["id"], answer["admin"]) == ("admin_key", True)
    assert (await client.get("/v1/models", headers=bearer(ADMIN_KEY + "x"))).status_code == 401


async def test_keys_are_kept_as_hashes_only(state: State) -> None:
    key, text = await state.write(keys.create, "me", "user")
    await state.empty_log()
    secret = text.split("_", 2)[2]
    assert len(secret) == 43  # 256 bits
    held = b"".join(path.read_bytes() for path in state.folder.iterdir())
    assert key.id.encode() in held
    assert secret.encode() not in held
    assert text not in repr(await state.read(keys.listed))


async def test_no_key_is_logged(serve: Serve, state: State, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    client = await serve(auth="on", admin_key=ADMIN_KEY)
    text = (await state.write(keys.create, "me", "user"))[1]
    for key in (text, ADMIN_KEY, "tdm_wrong_key"):
        await client.get("/v1/models", headers=bearer(key))
        assert key not in caplog.text


async def test_requests_are_limited_per_key(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve(auth="on", requests_per_minute=2)
    one, other = [(await state.write(keys.create, name, "user"))[1] for name in ("one", "other")]
    statuses = [(await client.post("/v1/images/generations", headers=bearer(one))).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    response = await client.post("/v1/images/generations", headers=bearer(one))
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"].startswith("the limit is 2 requests a minute; the next fits in ")
    wait_ms = int(response.headers["retry-after-ms"])
    assert 25_000 < wait_ms <= 30_000 * (1 + SPREAD)
    assert int(response.headers["retry-after"]) == math.ceil(wait_ms / 1000)
    assert (await client.get("/v1/models", headers=bearer(one))).status_code == 200  # reading is free
    assert (await client.post("/v1/images/generations", headers=bearer(other))).status_code == 200


async def test_pictures_are_limited(serve: Serve, assert_error: Check) -> None:
    client = await serve(pictures_per_minute=5)
    url = "/v1/images/generations"
    assert [(await client.post(url, params={"n": n})).status_code for n in (4, 2, 1, 1)] == [200, 429, 200, 429]
    error = assert_error(await client.post(url, params={"n": 6}), 400, "invalid_value", "n")
    assert error["message"] == "n is 6; allowed: at most 5, as pictures are limited to that a minute"


async def test_buckets_fill_again() -> None:
    now = 0.0
    buckets = Buckets(60, lambda: now)
    assert [buckets.take("a", 30) for _ in range(3)] == [0, 0, 30]
    now = 10.0
    assert buckets.take("a", 11) == pytest.approx(1.0)
    assert buckets.take("a", 10) == 0
    now = 1e6
    assert buckets.take("a", 60) == 0
    assert buckets.take("a") == pytest.approx(1.0)


async def test_full_buckets_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdm_app.ratelimit.MANY", 100)
    now = 0.0
    buckets = Buckets(60, lambda: now)
    for number in range(1000):
        now += 1.0
        buckets.take(f"client {number}")
    assert len(buckets._buckets) <= 101


async def test_a_limit_that_is_off_counts_nothing() -> None:
    limiter = Limiter(Settings())
    assert limiter.request(Caller("a")) is None
    limiter.pictures(Caller("a"), 10**6)
    with pytest.raises(Refused):
        Limiter(Settings(pictures_per_minute=1)).pictures(Caller("a"), 2)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.nip.example:80", 421),
        ("[::1", 421),
        ("", 421),
    ],
)
async def test_hosts_on_loopback(serve: Serve, assert_error: Check, host: str, status: int) -> None:
    response = await (await serve()).get("/v1/models", headers={"host": host})
    assert response.status_code == status
    if status == 421:
        message = assert_error(response, 421, "unknown_host")["message"]
        assert message == f"host is {host!r}; allowed: 127.0.0.1, ::1, localhost (setting allowed_hosts)"


async def test_hosts_of_a_public_service(serve: Serve) -> None:
    client = await serve("203.0.113.7", allow_open=True)
    assert (await client.get("/v1/models", headers={"host": "draw.example"})).status_code == 200
    client = await serve("203.0.113.7", allow_open=True, allowed_hosts=("draw.example",))
    assert (await client.get("/v1/models", headers={"host": "draw.example"})).status_code == 200
    assert (await client.get("/v1/models", headers={"host": "other.example"})).status_code == 421


SAME, OTHER = "http://localhost", "https://evil.example"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": SAME}, 200),
        ({"origin": SAME, "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "http://behind.a.proxy", "sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": OTHER}, 403),
        ({"origin": OTHER, "sec-fetch-site": "cross-site"}, 403),
        ({"origin": "http://localhost:3000", "sec-fetch-site": "same-site"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
    ],
)
async def test_pages_of_other_origins_change_nothing(
    serve: Serve, assert_error: Check, headers: dict[str, str], status: int
) -> None:
    client = await serve()
    for path in ("/v1/images/generations", "/gradio_api/queue/join"):
        response = await client.post(path, headers=headers)
        assert response.status_code == status
        if status == 403:
            assert_error(response, 403, "foreign_origin")
    reading = await client.get("/v1/models", headers=headers)
    assert reading.status_code == 200
    assert "access-control-allow-origin" not in reading.headers  # so a browser does not show it to that page


async def test_cors_for_named_origins(serve: Serve, state: State, assert_error: Check) -> None:
    client = await serve(auth="on", cors_origins="https://app.example")
    text = (await state.write(keys.create, "me", "user"))[1]
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    flight = await client.options("/v1/images/generations", headers={"origin": "https://app.example"} | asked)
    assert flight.status_code == 200
    assert flight.headers["access-control-allow-origin"] == "https://app.example"
    origin = {"origin": "https://app.example", "sec-fetch-site": "cross-site"}
    response = await client.post("/v1/images/generations", headers=origin | bearer(text))
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "retry-after-ms" in response.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in response.headers
    refused = await client.post("/v1/images/generations", headers=origin)
    assert_error(refused, 401, "invalid_api_key")
    assert refused.headers["access-control-allow-origin"] == "https://app.example"  # so that the page can read it
    response = await client.post("/v1/images/generations", headers={"origin": OTHER} | bearer(text))
    assert_error(response, 403, "foreign_origin")
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/healthz"])
async def test_security_headers(serve: Serve, path: str) -> None:
    response = await (await serve(auth="on")).get(path)
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


@asynccontextmanager
async def slow_client(
    state: State, settings: Settings
) -> AsyncIterator[tuple[FastAPI, httpx.AsyncClient, asyncio.Event]]:
    app, go = small_app(state, settings), asyncio.Event()

    @app.get("/slow")
    async def slow() -> str:
        await go.wait()
        return "done"

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield app, client, go


async def test_draining(state: State, assert_error: Check) -> None:
    async with slow_client(state, Settings()) as (app, client, go):
        running = asyncio.create_task(client.get("/slow"))
        await asyncio.sleep(0.02)
        assert app.state.drain.running == 1
        finished = asyncio.create_task(app.state.drain.finish(10))
        await asyncio.sleep(0.02)
        refused = await client.post("/v1/images/generations")
        assert_error(refused, 503, "unavailable")
        assert SOON_MS <= int(refused.headers["retry-after-ms"]) <= SOON_MS * (1 + SPREAD)
        assert_error(await client.get("/readyz"), 503, "unavailable")
        assert (await client.get("/healthz")).status_code == 200
        assert not finished.done()
        go.set()
        assert (await running).text == '"done"'
        assert await finished


async def test_draining_does_not_wait_for_ever(state: State) -> None:
    async with slow_client(state, Settings()) as (app, client, go):
        running = asyncio.create_task(client.get("/slow"))
        await asyncio.sleep(0.02)
        assert not await app.state.drain.finish(0.05)
        go.set()
        await running
