"""A ticket service as an MCP server: the demo's own, so that what it was asked to do can be counted.

Tickets are lines of JSON in the file `$TICKETS`. A ticket is opened once for a title and once for an idempotency key;
asked again, the service answers with the ticket that there is. The key is checked in front, by nginx.
"""

import json
import os
from pathlib import Path

from mcp.server.fastmcp import FastMCP

FILE = Path(os.environ["TICKETS"])
server = FastMCP("tickets", stateless_http=True, json_response=True)


def tickets():
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


@server.tool()
def query_tickets(service: str) -> str:
    """The tickets whose title begins with the service's name."""
    return json.dumps([t for t in tickets() if t["title"].startswith(service)])


@server.tool()
def open_ticket(title: str, severity: str, body: str, idempotency_key: str | None = None) -> str:
    """Opens a ticket, or finds the one that was opened for this title or key."""
    known = tickets()
    for t in known:
        if t["title"] == title or (idempotency_key and t["idempotency_key"] == idempotency_key):
            return json.dumps(t)
    ticket = {"id": f"INC-{len(known) + 1:04}", "title": title, "severity": severity, "body": body, "idempotency_key": idempotency_key}
    with FILE.open("a") as f:
        f.write(json.dumps(ticket) + "\n")
    return json.dumps(ticket)


@server.tool()
def close_ticket(title: str, why: str) -> str:
    """Closes the ticket of this title."""
    known = tickets()
    closed = [t for t in known if t["title"] == title]
    if not closed:
        raise ValueError(f"there is no ticket {title!r}")
    for t in closed:
        t["closed"] = why
    FILE.write_text("".join(json.dumps(t) + "\n" for t in known))
    return json.dumps(closed[0])


app = server.streamable_http_app()
