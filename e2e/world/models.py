"""A scripted model behind the three APIs that agents speak: OpenAI's chat completions and responses, Anthropic's messages.

The models that story.py names tell its story; any other repeats the last message, streamed a word at a time with
`PAUSE` between words. Usage is counted and output limits are kept, as by the real services. The key is checked in front,
by nginx.
"""

import asyncio
import json
import re
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

import story

# Seconds between two streamed words of the echo: long enough to see from outside that a stream streams.
PAUSE = 0.02


def tokens(value):
    """Four characters a token, rounded up."""
    return -(-len(value if isinstance(value, str) else json.dumps(value)) // 4)


def plain(content):
    """The text of a message's or tool result's content, in any of its shapes."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content if isinstance(content, str) else json.dumps(content)


@dataclass
class Reply:
    model: str
    text: str
    tool: str | None = None
    args: str = "{}"
    call: str = ""
    cut: bool = False
    input: int = 0
    output: int = 0

    def words(self):
        return re.findall(r"\s*\S+\s*", self.text)


def answer(body, turns, limit):
    """What the model says to a conversation: `turns` holds ("says", text), ("calls", id, tool, args) and ("result", id, text)."""
    results = {t[1]: t[2] for t in turns if t[0] == "result"}
    called = [story.Called(tool, json.loads(args or "{}"), results.get(i, "")) for k, i, tool, args in (t for t in turns if t[0] == "calls")]
    step = None
    if body["model"] not in story.TELLERS:
        text = next((t[1] for t in reversed(turns) if t[0] == "says"), "")
    elif step := story.next_step(called):
        text = step.say
    else:
        text = story.last_words(called)
    reply = Reply(body["model"], text)
    if step:
        reply.tool, reply.args, reply.call = step.tool, json.dumps(step.args), f"call_{len(called) + 1}"
    reply.input, reply.output = tokens(body), tokens(reply.text) + (tokens(reply.args) if step else 0)
    if limit and reply.output > limit:
        reply = Reply(reply.model, text[: limit * 4], cut=True, input=reply.input, output=limit)
    return reply


class Chat:
    """POST /v1/chat/completions"""

    limits = ("max_completion_tokens", "max_tokens")

    def turns(body):
        for m in body["messages"]:
            if m["role"] == "tool":
                yield "result", m["tool_call_id"], plain(m["content"])
            elif m.get("content"):
                yield "says", plain(m["content"])
            for c in m.get("tool_calls") or []:
                yield "calls", c["id"], c["function"]["name"], c["function"]["arguments"]

    def usage(r):
        return {"prompt_tokens": r.input, "completion_tokens": r.output, "total_tokens": r.input + r.output}

    def calls(r):
        return [{"index": 0, "id": r.call, "type": "function", "function": {"name": r.tool, "arguments": r.args}}]

    def finish(r):
        return "length" if r.cut else "tool_calls" if r.tool else "stop"

    def whole(r):
        message = {"role": "assistant", "content": r.text} | ({"tool_calls": Chat.calls(r)} if r.tool else {})
        choice = {"index": 0, "message": message, "finish_reason": Chat.finish(r)}
        return {"id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": r.model, "choices": [choice], "usage": Chat.usage(r)}

    def events(r, body):
        def chunk(delta, finish=None):
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return None, {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": r.model, "choices": [choice]}

        yield chunk({"role": "assistant", "content": ""})
        for word in r.words():
            yield chunk({"content": word})
        if r.tool:
            yield chunk({"tool_calls": Chat.calls(r)})
        yield chunk({}, Chat.finish(r))
        if (body.get("stream_options") or {}).get("include_usage"):
            yield None, chunk({})[1] | {"choices": [], "usage": Chat.usage(r)}
        yield None, "[DONE]"


class Responses:
    """POST /v1/responses"""

    limits = ("max_output_tokens",)

    def turns(body):
        items = body["input"]
        for i in [{"role": "user", "content": items}] if isinstance(items, str) else items:
            match i.get("type", "message"):
                case "message":
                    yield "says", plain(i["content"])
                case "function_call":
                    yield "calls", i["call_id"], i["name"], i["arguments"]
                case "function_call_output":
                    yield "result", i["call_id"], plain(i["output"])

    def part(text):
        return {"type": "output_text", "text": text, "annotations": []}

    def items(r):
        yield {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [Responses.part(r.text)]}
        if r.tool:
            yield {"id": "fc_1", "type": "function_call", "status": "completed", "call_id": r.call, "name": r.tool, "arguments": r.args}

    def whole(r):
        return {
            "id": "resp_1", "object": "response", "created_at": 0, "model": r.model, "status": "incomplete" if r.cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if r.cut else None, "error": None, "instructions": None,
            "metadata": {}, "parallel_tool_calls": False, "tool_choice": "auto", "tools": [], "output": list(Responses.items(r)),
            "usage": {
                "input_tokens": r.input, "output_tokens": r.output, "total_tokens": r.input + r.output,
                "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
            },
        }  # fmt: skip

    def events(r, body):
        whole, number = Responses.whole(r), iter(range(1000000))

        def event(kind, **fields):
            return kind, {"type": kind, "sequence_number": next(number)} | fields

        yield event("response.created", response=whole | {"status": "in_progress", "output": [], "usage": None})
        for at, item in enumerate(whole["output"]):
            place = {"item_id": item["id"], "output_index": at}
            empty = {"content": []} if item["type"] == "message" else {"arguments": ""}
            yield event("response.output_item.added", output_index=at, item=item | empty | {"status": "in_progress"})
            if item["type"] == "message":
                place |= {"content_index": 0}
                yield event("response.content_part.added", **place, part=Responses.part(""))
                for word in r.words():
                    yield event("response.output_text.delta", **place, delta=word, logprobs=[])
                yield event("response.output_text.done", **place, text=r.text, logprobs=[])
                yield event("response.content_part.done", **place, part=Responses.part(r.text))
            else:
                yield event("response.function_call_arguments.delta", **place, delta=r.args)
                yield event("response.function_call_arguments.done", **place, name=r.tool, arguments=r.args)
            yield event("response.output_item.done", output_index=at, item=item)
        yield event("response.incomplete" if r.cut else "response.completed", response=whole)


class Messages:
    """POST /v1/messages"""

    limits = ("max_tokens",)

    def turns(body):
        for m in body["messages"]:
            blocks = m["content"]
            for b in [{"type": "text", "text": blocks}] if isinstance(blocks, str) else blocks:
                match b["type"]:
                    case "text":
                        yield "says", b["text"]
                    case "tool_use":
                        yield "calls", b["id"], b["name"], json.dumps(b["input"])
                    case "tool_result":
                        yield "result", b["tool_use_id"], plain(b.get("content", ""))

    def blocks(r):
        yield {"type": "text", "text": r.text}
        if r.tool:
            yield {"type": "tool_use", "id": r.call, "name": r.tool, "input": json.loads(r.args)}

    def stop(r):
        return {"stop_reason": "max_tokens" if r.cut else "tool_use" if r.tool else "end_turn", "stop_sequence": None}

    def whole(r):
        usage = {"input_tokens": r.input, "output_tokens": r.output}
        head = {"id": "msg_1", "type": "message", "role": "assistant", "model": r.model}
        return head | {"content": list(Messages.blocks(r)), "usage": usage} | Messages.stop(r)

    def events(r, body):
        def event(kind, **fields):
            return kind, {"type": kind} | fields

        begun = {"content": [], "stop_reason": None, "usage": {"input_tokens": r.input, "output_tokens": 1}}
        yield event("message_start", message=Messages.whole(r) | begun)
        for at, block in enumerate(Messages.blocks(r)):
            if block["type"] == "text":
                empty, deltas = {"text": ""}, [{"type": "text_delta", "text": word} for word in r.words()]
            else:
                empty, deltas = {"input": {}}, [{"type": "input_json_delta", "partial_json": r.args}]
            yield event("content_block_start", index=at, content_block=block | empty)
            for delta in deltas:
                yield event("content_block_delta", index=at, delta=delta)
            yield event("content_block_stop", index=at)
        yield event("message_delta", delta=Messages.stop(r), usage={"output_tokens": r.output})
        yield event("message_stop")


def endpoint(api):
    async def post(request):
        try:
            body = await request.json()
            limit = next((body[k] for k in api.limits if body.get(k)), None)
            reply = answer(body, list(api.turns(body)), limit)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            error = {"type": "invalid_request_error", "message": f"{api.__doc__}: expected a conversation, found {e!r}"}
            return JSONResponse({"type": "error", "error": error}, 400)

        async def stream():
            for kind, data in api.events(reply, body):
                name = f"event: {kind}\n" if kind else ""
                yield f"{name}data: {data if isinstance(data, str) else json.dumps(data)}\n\n"
                if reply.model not in story.TELLERS:
                    await asyncio.sleep(PAUSE)

        if body.get("stream"):
            return StreamingResponse(stream(), media_type="text/event-stream")
        return JSONResponse(api.whole(reply))

    return Route(api.__doc__.removeprefix("POST "), post, methods=["POST"])


app = Starlette(routes=[endpoint(api) for api in (Chat, Responses, Messages)])
