"""GET /docs: the OpenAPI page as Swagger UI shows it, with nothing from any other host."""

from importlib import resources

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, Response

OPENAPI = "/openapi.json"
_PAGE = "/docs"
_ASSETS = {f"{_PAGE}/{name}": name for name in ("swagger-ui-bundle.js", "swagger-ui.css")}
PATHS = (_PAGE, *_ASSETS, OPENAPI)

# The browser itself sees to it that nothing comes from elsewhere, and that no other page puts this one into a frame.
_POLICY = {
    "default-src": "'none'",
    "connect-src": "'self'",
    "font-src": "data:",
    "frame-ancestors": "'none'",
    "img-src": "'self' data:",
    "script-src": "'self' 'unsafe-inline'",
    "style-src": "'self' 'unsafe-inline'",
}
_HEADERS = {"Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in _POLICY.items())}


def add_docs(app: FastAPI) -> None:
    """Give an app the page and what it loads."""

    async def page(_: Request) -> Response:
        # Addresses are relative to the page's: a proxy may have put it below a path of its own.
        made = get_swagger_ui_html(
            openapi_url=OPENAPI.removeprefix("/"),
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="data:,",
            # Unless told, it shows a badge that another host makes from the address of the OpenAPI page.
            swagger_ui_parameters={"validatorUrl": None},
        )
        made.headers.update(_HEADERS)
        return made

    async def asset(request: Request) -> Response:
        folder = resources.files("fastapi_offline") / "static"
        return FileResponse(str(folder / _ASSETS[request.url.path]))

    app.add_route(_PAGE, page, include_in_schema=False)
    for path in _ASSETS:
        app.add_route(path, asset, include_in_schema=False)
