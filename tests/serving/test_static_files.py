"""The page's files: what serves them, and what a browser may do with them."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI

from molora.serving.page import add_page


@pytest.fixture
def page(tmp_path):
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "index.html").write_text("<!doctype html><p>hello")
    (tmp_path / "static" / "app.js").write_text("export {};")
    (tmp_path / "secret").write_text("secret")
    app = FastAPI()
    add_page(app, tmp_path / "static")
    return app


def test_the_page_and_its_files(page, call):
    index, script = call(page, "GET", "/"), call(page, "GET", "/static/app.js")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    assert script.headers["content-type"].startswith("text/javascript")
    for response in (index, script):
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert response.headers["cache-control"] == "no-cache"
    again = call(page, "GET", "/static/app.js", headers={"if-none-match": script.headers["etag"]})
    assert again.status_code == 304


def test_nothing_else_is_served(page):
    async def get(path):
        transport = httpx.ASGITransport(page)
        async with httpx.AsyncClient(transport=transport, base_url="http://molora") as client:
            return await client.get(httpx.URL("http://molora", raw_path=path))

    for path in (b"/static/../secret", b"/static/%2e%2e/secret", b"/static//etc/passwd", b"/static/", b"/secret"):
        response = asyncio.run(get(path))
        assert response.status_code in (404, 307), path
        assert "secret" not in response.text.replace("/secret", "")


def test_an_installation_may_lack_the_page(tmp_path, call):
    app = FastAPI()
    add_page(app, tmp_path / "nowhere")
    assert call(app, "GET", "/").status_code == 404
    assert call(app, "GET", "/static/app.js").status_code == 404
