"""The pages at `/` and `/docs`: plain files from the folder `static`, which may load from this server alone."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",  # asked again each time, and answered by 304: a new release shows at once
}


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI, folder: Path = STATIC) -> None:
    """An installation may lack the pages; then they are not found, and everything else works."""

    def page(name: str) -> Response:
        if not (folder / name).is_file():
            raise HTTPException(404, "this installation has no page")
        return FileResponse(folder / name, headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def chat() -> Response:
        return page("index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs.html")

    if folder.is_dir():
        app.mount("/static", _Files(directory=folder))
