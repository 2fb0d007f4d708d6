"""The page at /docs holds every call and field, and loads nothing."""

import re
from html.parser import HTMLParser

import httpx

from contract.settings import Settings
from service.app import create_app
from service.reference import page


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in ("script", "link", "img", "iframe") or "src" in found:
            self.loaded.append(tag)
        self.anchors.add(found.get("id") or "")
        self.links.add(found.get("href") or "")


async def test_the_page_is_whole_without_the_internet(client: httpx.AsyncClient) -> None:
    answer = await client.get("/docs")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]+'; frame-ancestors 'none'",
        answer.headers["content-security-policy"],
    )
    tags = Tags(answer.text)
    assert tags.loaded == []
    assert {link[1:] for link in tags.links if link.startswith("#")} <= tags.anchors
    assert (await client.get("/redoc")).status_code == 404


def test_every_call_parameter_and_field_is_there() -> None:
    document = create_app(Settings()).openapi()
    text = page(document)
    for path, calls in document["paths"].items():
        for method, call in calls.items():
            assert f"<code>{method.upper()} {path}</code>" in text
            for parameter in call.get("parameters", ()):
                assert f"<td>{parameter['name']}</td>" in text
    assert "<code>idempotency_mismatch</code>: The Idempotency-Key was used with another body" in text
    for name in ("TextToImage", "InpaintForm", "JobView"):
        for field in document["components"]["schemas"][name]["properties"]:
            assert re.search(rf"<td>{field}\*?</td>", text), (name, field)


def test_what_a_document_says_is_escaped() -> None:
    call = {"summary": "<script>alert(1)</script>", "responses": {"200": {"description": "`a<b>`"}}}
    document = {
        "info": {"title": "a & b", "version": "1", "description": ""},
        "paths": {"/x": {"get": call}},
        "components": {"schemas": {}},
    }
    text = page(document)
    assert "<script>" not in text
    assert "<code>a&lt;b&gt;</code>" in text
    assert "a &amp; b" in text
