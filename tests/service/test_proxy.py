"""Behind proxies: URLs that clients can use, and whose headers are believed."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from broker.worker_side import WorkerBroker
from contract.settings import Settings

Serving = Callable[[Settings], AbstractAsyncContextManager[str]]
BODY = {"prompt": "a pizza"}
AS_PROXY = {"Host": "pictures.example", "X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}


async def test_urls_are_those_by_which_the_client_came(client: httpx.AsyncClient, worker: WorkerBroker) -> None:
    answer = await client.post("/v1/txt2img", json=BODY, headers={"Host": "pictures.example:8080"})
    job = answer.json()
    assert job["urls"]["self"] == f"http://pictures.example:8080/v1/jobs/{job['id']}"
    assert answer.headers["location"] == job["urls"]["self"]


@pytest.mark.parametrize(
    ("trusted", "scheme"),
    [((), "http"), (("127.0.0.1",), "https"), (("127.0.0.0/8",), "https"), (("10.1.1.1",), "http")],
)
async def test_forwarded_headers_count_from_trusted_proxies_alone(
    settings: Settings, serving: Serving, worker: WorkerBroker, trusted: tuple[str, ...], scheme: str
) -> None:
    behind = settings.model_copy(update={"trusted_proxies": trusted, "allow_anonymous": True})
    async with serving(behind) as url, httpx.AsyncClient(base_url=url) as http:
        job = (await http.post("/v1/txt2img", json=BODY, headers=AS_PROXY)).json()
    assert job["urls"]["self"] == f"{scheme}://pictures.example/v1/jobs/{job['id']}"


@pytest.mark.parametrize("sent", ["", "/darkroom"])
async def test_a_proxy_may_strip_the_prefix_or_leave_it(
    settings: Settings, serving: Serving, painter: Any, sent: str
) -> None:
    public = settings.model_copy(update={"public_url": "https://pictures.example/darkroom", "allow_anonymous": True})
    async with serving(public) as url, httpx.AsyncClient(base_url=url, timeout=20) as http:
        answer = await http.post(f"{sent}/v1/txt2img", json=BODY, headers={"Prefer": "wait=15"})
        job = answer.json()
        assert answer.headers["location"] == f"https://pictures.example/darkroom/v1/jobs/{job['id']}"
        shown = job["images"][0]["url"]
        assert shown.startswith("https://pictures.example/darkroom/v1/images/")
        picture = await http.get(sent + shown.removeprefix("https://pictures.example/darkroom"))
        assert picture.headers["content-type"] == "image/png"
        refused = await http.put(f"{sent}/v1/jobs/{job['id']}")
        assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET")
        assert (await http.get(f"{sent}/docs")).status_code == 200


@pytest.mark.parametrize("url", ["pictures.example", "//pictures.example", "https://", "https://a.example/?a=b", "/x"])
def test_what_is_no_public_url_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ValidationError, match="is no base of URLs; expected https://host"):
        Settings(public_url=url)
    for base in ("http://localhost:8000", "https://pictures.example/", "https://[::1]:8000/darkroom"):
        assert Settings(public_url=base).public_url == base


def test_what_is_no_address_is_refused_at_the_start() -> None:
    with pytest.raises(ValidationError, match="does not appear to be an IPv4 or IPv6 network"):
        Settings(trusted_proxies="proxy.example")
