"""An agent in forty lines: it asks a model what to do and does it, until there is no more to do. It knows nothing of Belay:
its environment says where the model (OPENAI_BASE_URL), the tools (BELAY_MCP_URL) and the web (HTTPS_PROXY) are."""

import json
import os
import sys
import urllib.request


def post(url, **body):
    """A JSON reply. Who refuses says why, and that is the agent's last word."""
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    try:
        return json.load(urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)))
    except urllib.error.HTTPError as error:
        sys.exit(f"{url}: {error.code}: {error.read().decode()}")


def mcp(method, **params):
    return post(os.environ["BELAY_MCP_URL"], jsonrpc="2.0", id=1, method=method, params=params)


def use(name, arguments):
    """A local tool or one of MCP's; an error is an answer like another."""
    try:
        if name == "look_up":
            return urllib.request.urlopen(arguments["url"], timeout=5).read(1000).decode()
        reply = mcp("tools/call", name=name, arguments=arguments)
        return reply["error"]["message"] if "error" in reply else reply["result"]["content"][0]["text"]
    except OSError as error:
        return f"failed: {error}"


tools = [{"type": "function", "function": {"name": t["name"], "parameters": t["inputSchema"]}} for t in mcp("tools/list")["result"]["tools"]]
model = os.environ.get("MODEL", "stand-in")
messages = [{"role": "user", "content": os.environ["BELAY_OBJECTIVE"]}]
while True:
    reply = post(os.environ["OPENAI_BASE_URL"] + "/chat/completions", model=model, messages=messages, tools=tools)
    message = reply["choices"][0]["message"]
    messages.append(message)
    print("model:", message["content"], flush=True)
    for call in message.get("tool_calls") or []:
        result = use(call["function"]["name"], json.loads(call["function"]["arguments"]))
        print("  " + call["function"]["name"], call["function"]["arguments"], "→", result, flush=True)
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
    if not message.get("tool_calls"):
        break
