"""Plain pages: a runbook, two redirects to where nobody should follow, and an echo that shows what a request carried."""

from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from starlette.routing import Route

RUNBOOK = """Runbook: checkout
"remaining connection slots are reserved": the pool of payments-db is spent.
1. Open a ticket for the database team, severity high at most: critical pages a person.
2. Raise max_connections, then restart checkout.
"""


def redirect(to):
    return lambda request: RedirectResponse(to, 302)


def echo_headers(request):
    return JSONResponse(dict(request.headers))


def some_bytes(request):
    left, block = request.path_params["n"], b"x" * 65536
    chunks = (block[: min(len(block), left - at)] for at in range(0, left, len(block)))
    return StreamingResponse(chunks, media_type="application/octet-stream")


app = Starlette(
    routes=[
        Route("/runbook", lambda request: PlainTextResponse(RUNBOOK)),
        Route("/redirect-private", redirect("http://10.0.0.5/")),
        Route("/redirect-evil", redirect("https://evil.world.test/")),
        Route("/echo-headers", echo_headers, methods=["GET", "POST"]),
        Route("/bytes/{n:int}", some_bytes),
    ]
)
