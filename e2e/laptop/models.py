"""The scripted model of e2e/world with other stories, on 127.0.0.1:$PORT, with TLS if there is a certificate: `models.py STORY [CERTIFICATE
KEY]`. Every model name gets the story. If $KEY is set, a request needs that key."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "world"))
import models
import story
import uvicorn
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse

STORIES = {
    "shop": [
        story.Step("First I look at the order.", "read_order", {"id": "A-7"}),
        story.Step("All of it back, to be kind.", "refund", {"id": "A-7", "amount": 80}),
        story.Step("Then what I am allowed to give.", "refund", {"id": "A-7", "amount": 50}),
    ],
    "shell": [
        story.Step("Who am I?", "shell", {"command": "id -u; uname -s"}),
        story.Step("May I change this machine?", "shell", {"command": "echo x >> /etc/passwd"}),
        story.Step("May I leave something here?", "shell", {"command": "touch /workspace/x /tmp/x"}),
        story.Step("Is there a network?", "shell", {"command": "curl -sS -m 3 --noproxy '*' http://93.184.215.14/"}),
        story.Step("And by the proxy?", "shell", {"command": "curl -sS -m 3 https://example.com/"}),
        story.Step("My report.", "shell", {"command": "echo all walls hold > /scratch/report && cat /scratch/report"}),
    ],
}


class Everybody:
    def __contains__(self, model):
        return True


class Keyed(BaseHTTPMiddleware):
    """Checks the key as providers do."""

    async def dispatch(self, request, call_next):
        keys = {request.headers.get("authorization"), request.headers.get("x-api-key")}
        if keys.isdisjoint({"Bearer " + os.environ["KEY"], os.environ["KEY"]}):
            return JSONResponse({"error": {"message": "expected a key", "type": "authentication_error"}}, 401)
        return await call_next(request)


name, *tls = sys.argv[1:]
certificate, key = tls or (None, None)
story.STORY = STORIES[name]
story.TELLERS = Everybody()
story.last_words = lambda called: "THE END"
if "KEY" in os.environ:
    models.app.add_middleware(Keyed)
uvicorn.run(models.app, host="127.0.0.1", port=int(os.environ["PORT"]), ssl_certfile=certificate, ssl_keyfile=key, log_level="warning")
