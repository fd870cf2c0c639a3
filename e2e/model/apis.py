"""The three APIs: how each one reads a request, and the exact bodies and event sequences of its replies.

Each API has these methods: `read` rejects what the provider rejects. `whole` returns the reply in one piece. `events` yields the reply as a
stream, in pairs of an event's bytes and the number of output tokens in it.
"""

import itertools
import json
import re
from dataclasses import dataclass

import rules
from rules import Refused
from script import Asked, Call, Text, Tool, Turn, decide, pieces, thinks

NUMBERS = itertools.count(1)


def fresh(prefix):
    return f"{prefix}{next(NUMBERS):08d}"


@dataclass
class Reply:
    """The model's reply to a request, cut at the output limit."""

    body: dict
    model: str
    prompt: int
    reasoning: int
    items: list
    stop: str  # "end", "tools" or "length"
    choices: int = 1
    # What the reported usage leaves out: "" for nothing, "low" (reasoning), "zero" (all tokens), "none" (there is no usage).
    lie: str = ""

    @property
    def output(self):
        """The output tokens of all choices, with reasoning: what the provider bills."""
        return self.choices * (self.reasoning + sum(map(cost, self.items)))


def cost(item):
    return len(pieces(item.text)) if isinstance(item, Text) else 1 + len(pieces(item.arguments))


def reply_to(asked, body, limit, prompt, reasoning, choices=1):
    """Returns the model's reply within the output limit."""
    left = limit - min(reasoning, limit)
    items, stop = [], "end"
    for item in decide(asked):
        if cost(item) > left:
            if isinstance(item, Text) and left:
                items.append(Text("".join(pieces(item.text)[:left])))
            stop = "length"
            break
        items.append(item)
        left -= cost(item)
        if isinstance(item, Call):
            stop = "tools"
    if reasoning > limit:
        stop = "length"
    return Reply(body, body["model"], prompt, min(reasoning, limit), items, stop, choices)


def data(event, name=None):
    return ((f"event: {name}\n" if name else "") + "data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False) + "\n\n").encode()


def text_of(content):
    """Returns the text of a message's content, in the form of any API."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content or [] if isinstance(part, dict))


# ---------------------------------------------------------------------------------------------------------------- chat completions


class Chat:
    members = rules.CHAT
    roles = {"system", "developer", "user", "assistant", "tool", "function"}
    parts = {"text", "image_url", "input_audio", "file", "refusal"}

    def read(self, body, headers, limit, reasons):
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "Missing required parameter: 'messages'.", "messages", "missing_required_parameter")
        if body.get("stream_options") is not None and not body.get("stream"):
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise Refused(400, message, "stream_options")
        if body.get("n", 1) not in range(1, 129):
            raise Refused(400, "Invalid 'n': integer above maximum value. Expected a value <= 128.", "n", "integer_above_max_value")
        if reasons and body.get("temperature", 1) != 1:
            message = f"Unsupported value: 'temperature' does not support {body['temperature']} with this model. Only the default (1) value is supported."
            raise Refused(400, message, "temperature", "unsupported_value")
        turns, open_calls = [], []
        for at, one in enumerate(messages):
            role = one.get("role") if isinstance(one, dict) else None
            if role not in self.roles:
                message = f"Invalid value: '{role}'. Supported values are: 'system', 'assistant', 'user', 'function', 'tool', and 'developer'."
                raise Refused(400, message, f"messages[{at}].role", "invalid_value")
            for part in one.get("content") if isinstance(one.get("content"), list) else []:
                if part.get("type") not in self.parts:
                    raise Refused(400, f"Invalid value: '{part.get('type')}'.", f"messages[{at}].content[0].type", "invalid_value")
            if role == "tool":
                if one.get("tool_call_id") not in open_calls:
                    message = "Invalid parameter: messages with role 'tool' must be a response to a preceeding message with 'tool_calls'."
                    raise Refused(400, message, f"messages.[{at}].role")
                open_calls.remove(one["tool_call_id"])
                continue
            self.all_answered(open_calls)
            calls = one.get("tool_calls") or []
            open_calls = [call["id"] for call in calls]
            names = [(call.get("function") or call.get("custom") or {}).get("name") for call in calls]
            turns.append(Turn("system" if role == "developer" else role, text_of(one.get("content")), names))
        self.all_answered(open_calls)
        tools = []
        for tool in body.get("tools") or []:
            inner = tool.get(tool.get("type")) if tool.get("type") in ("function", "custom") else None
            if not isinstance(inner, dict):
                raise Refused(400, f"Invalid value: '{tool.get('type')}'. Supported values are: 'function' and 'custom'.", "tools[0].type", "invalid_value")
            rules.tool_name("chat", inner.get("name"))
            if inner.get("strict"):
                rules.strict_schema(inner.get("parameters") or {}, f"function '{inner['name']}'")
            tools.append(Tool(inner["name"], inner.get("parameters") or {}, tool["type"]))
        choice = body.get("tool_choice")
        if choice == "none":
            tools = []
        forced = "any" if choice == "required" else (choice.get("function", {}).get("name") if isinstance(choice, dict) else None)
        schema = None
        shape = body.get("response_format") or {}
        if shape.get("type") == "json_schema":
            schema = shape["json_schema"].get("schema") or {}
            if shape["json_schema"].get("strict"):
                rules.strict_schema(schema, f"response_format '{shape['json_schema'].get('name')}'")
        elif shape.get("type") == "json_object":
            schema = {"type": "object", "properties": {"answer": {"type": "string"}}}
            if not any("json" in turn.text.lower() for turn in turns):
                message = "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'."
                raise Refused(400, message, "messages")
        prompt, fetched = rules.prompt_tokens([messages, body.get("tools"), body.get("response_format")])
        asked = Asked(turns, tools, forced, body.get("parallel_tool_calls") is not False, schema)
        return reply_to(asked, body, limit, prompt, thinks(asked, 64) if reasons else 0, body.get("n") or 1), fetched

    @staticmethod
    def all_answered(calls):
        if calls:
            message = (
                "An assistant message with 'tool_calls' must be followed by tool messages responding to each 'tool_call_id'. The following "
                f"tool_call_ids did not have response messages: {', '.join(calls)}"
            )
            raise Refused(400, message, "messages")

    @staticmethod
    def usage(reply):
        output = reply.output - (reply.choices * reply.reasoning if reply.lie == "low" else 0)
        prompt, total = reply.prompt, reply.prompt + reply.output
        if reply.lie == "zero":
            prompt = output = total = 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 0 if reply.lie == "zero" else reply.choices * reply.reasoning,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    stops = {"end": "stop", "tools": "tool_calls", "length": "length"}

    def whole(self, reply):
        choices = []
        for index in range(reply.choices):
            message = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
            for item in reply.items:
                if isinstance(item, Text):
                    message["content"] = (message["content"] or "") + item.text
                else:
                    inner = {"name": item.tool.name, "arguments": item.arguments}
                    call = {"id": fresh("call_"), "type": "function", "function": inner}
                    if item.tool.kind == "custom":
                        call = {"id": fresh("call_"), "type": "custom", "custom": {"name": item.tool.name, "input": item.arguments}}
                    message.setdefault("tool_calls", []).append(call)
            choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": self.stops[reply.stop]})
        whole = {"id": fresh("chatcmpl-"), "object": "chat.completion", "created": 1764400000, "model": reply.model, "choices": choices}
        if reply.lie != "none":
            whole["usage"] = self.usage(reply)
        return whole | {"service_tier": "default", "system_fingerprint": "fp_model"}

    def events(self, reply):
        base = {
            "id": fresh("chatcmpl-"),
            "object": "chat.completion.chunk",
            "created": 1764400000,
            "model": reply.model,
            "service_tier": "default",
            "system_fingerprint": "fp_model",
        }
        asked = (reply.body.get("stream_options") or {}).get("include_usage")

        def chunk(index, delta, stop=None):
            one = base | {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": stop}]}
            return data(one | ({"usage": None} if asked else {}))

        for index in range(reply.choices):
            # The reasoning counts as output, but its text is not in the reply.
            yield chunk(index, {"role": "assistant", "content": "", "refusal": None}), reply.reasoning
            at = itertools.count()
            for item in reply.items:
                if isinstance(item, Text):
                    for piece in pieces(item.text):
                        yield chunk(index, {"content": piece}), 1
                    continue
                number = next(at)
                head = {"index": number, "id": fresh("call_"), "type": "function", "function": {"name": item.tool.name, "arguments": ""}}
                yield chunk(index, {"tool_calls": [head]}), 1
                for piece in pieces(item.arguments):
                    yield chunk(index, {"tool_calls": [{"index": number, "function": {"arguments": piece}}]}), 1
            yield chunk(index, {}, self.stops[reply.stop]), 0
        if asked and reply.lie != "none":
            yield data(base | {"choices": [], "usage": self.usage(reply)}), 0
        yield b"data: [DONE]\n\n", 0

    @staticmethod
    def broken():
        return data(rules.error("chat", 500, "The server had an error while processing your request. Sorry about that!", kind="server_error"))


# ---------------------------------------------------------------------------------------------------------------------- Responses


class Responses:
    members = rules.RESPONSES
    # The items of earlier replies by their ids, which `store` keeps.
    memory = {}
    hosted = {"web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation", "mcp", "tool_search"}
    clients = {"local_shell", "shell", "apply_patch", "computer", "computer_use_preview"}
    items = set(
        "message function_call function_call_output custom_tool_call custom_tool_call_output local_shell_call local_shell_call_output "
        "shell_call shell_call_output apply_patch_call apply_patch_call_output computer_call computer_call_output reasoning "
        "additional_tools compaction".split()
    )

    def read(self, body, headers, limit, reasons):
        given = body.get("input", [])
        if isinstance(given, str):
            given = [{"role": "user", "content": given}]
        if not isinstance(given, list):
            raise Refused(400, "Invalid type for 'input': expected one of an array of objects or string.", "input", "invalid_type")
        turns, called, results = [], [], []
        given = [self.remembered(one) if one.get("type") == "item_reference" else one for one in given]
        given = [one for one in given if one.get("type") != "additional_tools"]
        for at, one in enumerate(given):
            kind = one.get("type", "message")
            if kind not in self.items:
                raise Refused(400, f"Invalid value: '{kind}'.", f"input[{at}].type", "invalid_value")
            if kind == "message":
                role = one.get("role")
                if role not in ("system", "developer", "user", "assistant"):
                    raise Refused(400, f"Invalid value: '{role}'.", f"input[{at}].role", "invalid_value")
                self.turn(turns, "system" if role == "developer" else role).text += text_of(one.get("content"))
            elif kind.endswith("_call_output"):
                if one.get("call_id") not in called:
                    raise Refused(400, f"No tool call found for function call output with call_id {one.get('call_id')}.", "input")
                results.append(one["call_id"])
                turns.append(Turn("tool"))
            elif kind.endswith("_call"):
                called.append(one.get("call_id"))
                self.turn(turns, "assistant").calls.append(one.get("name") or kind.removesuffix("_call"))
        missing = rules.answered(called, results)
        if missing:
            raise Refused(400, f"No tool output found for function call {missing[0]}.", "input")
        tools = []
        for tool in body.get("tools") or []:
            self.tool(tools, tool, None)
        choice = body.get("tool_choice")
        if choice == "none":
            tools = []
        forced = "any" if choice == "required" else (choice.get("name") if isinstance(choice, dict) else None)
        shape = (body.get("text") or {}).get("format") or {}
        schema = shape.get("schema") if shape.get("type") == "json_schema" else None
        if schema and shape.get("strict"):
            rules.strict_schema(schema, f"response_format '{shape.get('name')}'")
        prompt, fetched = rules.prompt_tokens([body.get("instructions"), given, body.get("tools"), body.get("text")])
        asked = Asked(turns, tools, forced, body.get("parallel_tool_calls") is not False, schema)
        return reply_to(asked, body, limit, prompt, thinks(asked, 64) if reasons else 0), fetched

    def remembered(self, reference):
        """Returns an item of an earlier reply. The provider keeps items unless the request sets `store` to false."""
        item = self.memory.get(reference.get("id"))
        if item is None:
            message = f"Item with id '{reference.get('id')}' not found. Items are not persisted when `store` is set to false."
            raise Refused(404, message, "input")
        return item

    @staticmethod
    def turn(turns, role):
        """Returns the turn of an item. Consecutive items of the assistant are one turn."""
        if role != "assistant" or not turns or turns[-1].role != "assistant":
            turns.append(Turn(role))
        return turns[-1]

    def tool(self, tools, tool, namespace):
        kind = tool.get("type")
        if kind == "namespace":
            for inner in tool.get("tools", []):
                self.tool(tools, inner, tool.get("name"))
        elif kind == "function":
            rules.tool_name("responses", tool.get("name"))
            if tool.get("strict"):
                rules.strict_schema(tool.get("parameters") or {}, f"function '{tool['name']}'")
            tools.append(Tool(tool["name"], tool.get("parameters") or {}, "function", namespace))
        elif kind == "custom":
            tools.append(Tool(tool.get("name"), {"properties": {"input": {"type": "string"}}}, "custom", namespace))
        elif kind == "local_shell":
            tools.append(Tool("local_shell", {"properties": {"command": {"type": "array"}}}, kind))
        elif kind == "shell":
            tools.append(Tool("shell", {"properties": {"commands": {"type": "array"}}}, kind))
        elif kind not in self.hosted | self.clients:
            raise Refused(400, f"Invalid value: '{kind}'.", "tools[0].type", "invalid_value")

    @staticmethod
    def usage(reply):
        output = reply.output - (reply.reasoning if reply.lie == "low" else 0)
        prompt, total, reasoning = reply.prompt, reply.prompt + reply.output, reply.reasoning
        if reply.lie == "zero":
            prompt = output = total = reasoning = 0
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": total,
        }

    @staticmethod
    def item(item, done):
        """Returns an output item, as it is when it begins or when it is done."""
        status = "completed" if done else "in_progress"
        if isinstance(item, Text):
            part = {"type": "output_text", "text": item.text, "annotations": [], "logprobs": []}
            return {"id": fresh("msg_"), "type": "message", "status": status, "role": "assistant", "content": [part] if done else []}
        if item.tool.kind in ("local_shell", "shell"):
            commands = next(iter(json.loads(item.arguments).values()))
            if item.tool.kind == "shell":
                action = {"commands": commands[-1:], "timeout_ms": None, "max_output_length": None}
            else:
                action = {"type": "exec", "command": commands, "env": {}, "timeout_ms": None, "user": None, "working_directory": None}
            return {"id": fresh("sh_"), "type": f"{item.tool.kind}_call", "status": status, "call_id": fresh("call_"), "action": action}
        if item.tool.kind == "custom":
            return {
                "id": fresh("ctc_"),
                "type": "custom_tool_call",
                "status": status,
                "call_id": fresh("call_"),
                "name": item.tool.name,
                "input": json.loads(item.arguments).get("input", "") if done else "",
            }
        call = {
            "id": fresh("fc_"),
            "type": "function_call",
            "status": status,
            "arguments": item.arguments if done else "",
            "call_id": fresh("call_"),
            "name": item.tool.name,
        }
        return call | ({"namespace": item.tool.namespace} if item.tool.namespace else {})

    def response(self, reply, items):
        """Returns the object `response`, as it is at the end of the reply."""
        body = reply.body
        incomplete = reply.stop == "length"
        output = list(items)
        if reply.reasoning:
            output.insert(0, {"id": fresh("rs_"), "type": "reasoning", "summary": []})
        if body.get("store") is not False:
            self.memory.update((item["id"], item) for item in output)
        return {
            "id": fresh("resp_"),
            "object": "response",
            "created_at": 1764400000,
            "status": "incomplete" if incomplete else "completed",
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if incomplete else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "max_tool_calls": None,
            "model": reply.model,
            "output": output,
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.get("prompt_cache_key"),
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": None,
            "service_tier": "default",
            "store": body.get("store", True),
            "temperature": 1.0,
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_logprobs": 0,
            "top_p": 1.0,
            "truncation": "disabled",
            "usage": None if reply.lie == "none" else self.usage(reply),
            "user": None,
            "metadata": body.get("metadata") or {},
        }

    def whole(self, reply):
        return self.response(reply, [self.item(item, True) for item in reply.items])

    def events(self, reply):
        number = itertools.count()
        done = [self.item(item, True) for item in reply.items]
        response = self.response(reply, done)

        def event(kind, **more):
            return data({"type": kind, "sequence_number": next(number)} | more, kind)

        begun = response | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
        yield event("response.created", response=begun), 0
        yield event("response.in_progress", response=begun), 0
        at = itertools.count()
        if reply.reasoning:
            index, thought = next(at), response["output"][0]
            yield event("response.output_item.added", output_index=index, item=thought), 0
            yield event("response.output_item.done", output_index=index, item=thought), reply.reasoning
        for item, whole in zip(reply.items, done):
            index = next(at)
            if isinstance(item, Text):
                part = whole["content"][0]
                where = {"item_id": whole["id"], "output_index": index, "content_index": 0}
                yield event("response.output_item.added", output_index=index, item=whole | {"status": "in_progress", "content": []}), 0
                yield event("response.content_part.added", **where, part=part | {"text": ""}), 0
                for piece in pieces(item.text):
                    yield event("response.output_text.delta", **where, delta=piece, logprobs=[]), 1
                yield event("response.output_text.done", **where, text=item.text, logprobs=[]), 0
                yield event("response.content_part.done", **where, part=part), 0
            elif item.tool.kind in ("local_shell", "shell"):
                yield event("response.output_item.added", output_index=index, item=whole | {"status": "in_progress"}), cost(item)
            else:
                name, kind = ("input", "custom_tool_call_input") if item.tool.kind == "custom" else ("arguments", "function_call_arguments")
                where = {"item_id": whole["id"], "output_index": index}
                yield event("response.output_item.added", output_index=index, item=whole | {"status": "in_progress", name: ""}), 1
                for piece in pieces(whole[name]):
                    yield event(f"response.{kind}.delta", **where, delta=piece), 1
                more = {"name": whole["name"]} if name == "arguments" else {}
                yield event(f"response.{kind}.done", **where, **{name: whole[name]}, **more), 0
            yield event("response.output_item.done", output_index=index, item=whole), 0
        end = "response.incomplete" if reply.stop == "length" else "response.completed"
        yield event(end, response=response), 0

    @staticmethod
    def broken():
        error = {"type": "error", "code": "server_error", "message": "An error occurred while processing your request.", "param": None}
        return data(error | {"sequence_number": 999}, "error")


# ----------------------------------------------------------------------------------------------------------------------- Messages


class Messages:
    members = rules.MESSAGES
    # The conversations that the provider stores, by the id of their last reply.
    threads = {}
    parts = set(
        "text image document tool_use tool_result thinking redacted_thinking search_result server_tool_use web_search_tool_result".split()
    )

    def resumed(self, body):
        """Returns the request with the whole conversation. A request that continues a stored conversation has only the new messages."""
        thread = body.get("thread") or {}
        if thread.get("type") != "continue":
            return body
        held = self.threads.get(thread.get("previous_message_id"))
        if held is None:
            raise Refused(404, "thread: not found", details={"error_code": "thread_not_found"})
        return held | body | {"messages": held["messages"] + body["messages"]}

    def read(self, body, headers, limit, reasons):
        if not isinstance(body.get("messages"), list):
            raise Refused(400, "messages: Field required")
        body = self.resumed(body)
        messages = body["messages"]
        if not messages:
            raise Refused(400, "messages: at least one message is required")
        turns, open_calls = [], []
        for at, one in enumerate(messages):
            role, content = one.get("role"), one.get("content")
            if role not in ("user", "assistant", "system"):
                raise Refused(400, f"messages.{at}.role: Input should be 'user' or 'assistant'")
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
            for number, part in enumerate(content):
                if part.get("type") not in self.parts:
                    message = f"messages.{at}.content.{number}: Input tag '{part.get('type')}' found using 'type' does not match any of the expected tags"
                    raise Refused(400, message)
            results = [part["tool_use_id"] for part in content if part["type"] == "tool_result"]
            missing = rules.answered(open_calls, results)
            if missing:
                message = (
                    f"messages.{at}: `tool_use` ids were found without `tool_result` blocks immediately after: {', '.join(missing)}. "
                    "Each `tool_use` block must have a corresponding `tool_result` block in the next message."
                )
                raise Refused(400, message)
            unknown = [one for one in results if one not in open_calls]
            if unknown:
                message = (
                    f"messages.{at}.content.0: unexpected `tool_use_id` found in `tool_result` blocks: {unknown[0]}. Each `tool_result` block "
                    "must have a corresponding `tool_use` block in the previous message."
                )
                raise Refused(400, message)
            calls = [part for part in content if part["type"] == "tool_use"]
            open_calls = [call["id"] for call in calls]
            if results:
                turns.append(Turn("tool"))
            texts = [part["text"] for part in content if part["type"] == "text"]
            if texts or not results:
                # Clients put reminders before the user's text. The reminders do not come from the user.
                person = [text for text in texts if not text.lstrip().startswith("<system-reminder>")]
                turns.append(Turn(role, "\n".join(person), [call["name"] for call in calls]))
        if open_calls:
            message = f"messages.{len(messages) - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: {open_calls[0]}."
            raise Refused(400, message)
        tools = []
        for tool in body.get("tools") or []:
            kind = re.sub(r"_20\d{6}$", "", tool.get("type") or "custom")
            if kind == "custom":
                rules.tool_name("messages", tool.get("name"))
                tools.append(Tool(tool["name"], tool.get("input_schema") or {}))
            elif kind in rules.CLIENT_TOOLS:
                tools.append(Tool(tool["name"], {"properties": {"command": {"type": "string"}}, "required": ["command"]}, kind))
            elif kind not in ("web_search", "web_fetch", "code_execution", "tool_search_tool_regex", "tool_search_tool_bm25"):
                raise Refused(400, f"tools.0: Input tag '{tool.get('type')}' found using 'type' does not match any of the expected tags")
        choice = body.get("tool_choice") or {}
        if choice.get("type") == "none":
            tools = []
        forced = "any" if choice.get("type") == "any" else (choice.get("name") if choice.get("type") == "tool" else None)
        shape = (body.get("output_config") or {}).get("format") or body.get("output_format") or {}
        schema = shape.get("schema") if shape.get("type") == "json_schema" else None
        prompt, fetched = rules.prompt_tokens([body.get("system"), messages, body.get("tools"), shape])
        asked = Asked(turns, tools, forced, not choice.get("disable_parallel_tool_use"), schema)
        thinking = body.get("thinking") or {}
        reasoning = 0
        if thinking.get("type") == "enabled":
            if thinking.get("budget_tokens", 0) < 1024:
                raise Refused(400, "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
            if thinking["budget_tokens"] >= limit:
                raise Refused(400, "`max_tokens` must be greater than `thinking.budget_tokens`.")
            reasoning = min(thinks(asked, 64), thinking["budget_tokens"])
        return reply_to(asked, body, limit, prompt, reasoning), fetched

    @staticmethod
    def usage(reply, output=None):
        prompt = reply.prompt
        output = reply.output if output is None else output
        if reply.lie == "low":
            output = max(1, output - reply.reasoning)
        if reply.lie == "zero":
            prompt = output = 0
        return {
            "input_tokens": prompt,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "output_tokens": output,
            "service_tier": "standard",
        }

    stops = {"end": "end_turn", "tools": "tool_use", "length": "max_tokens"}

    def blocks(self, reply):
        if reply.reasoning:
            yield {"type": "thinking", "thinking": "hmm " * reply.reasoning, "signature": "c2lnbmVk"}
        for item in reply.items:
            if isinstance(item, Text):
                yield {"type": "text", "text": item.text}
            else:
                yield {"type": "tool_use", "id": fresh("toolu_"), "name": item.tool.name, "input": json.loads(item.arguments)}

    def whole(self, reply):
        whole = {
            "model": reply.model,
            "id": fresh("msg_"),
            "type": "message",
            "role": "assistant",
            "content": list(self.blocks(reply)),
            "stop_reason": self.stops[reply.stop],
            "stop_sequence": None,
        }
        if reply.lie != "none":
            whole["usage"] = self.usage(reply)
        if reply.body.get("thread"):
            said = {"role": "assistant", "content": whole["content"]}
            self.threads[whole["id"]] = reply.body | {"messages": [*reply.body["messages"], said]}
        return whole

    def events(self, reply):
        def event(kind, **more):
            return data({"type": kind} | more, kind)

        whole = self.whole(reply)
        begun = whole | {"content": [], "stop_reason": None}
        if "usage" in whole:
            begun["usage"] = self.usage(reply, 1)
        yield event("message_start", message=begun), 0
        for index, block in enumerate(whole["content"]):
            kind = block["type"]
            empty = {"thinking": {"thinking": "", "signature": ""}, "text": {"text": ""}, "tool_use": {"input": {}}}[kind]
            yield event("content_block_start", index=index, content_block=block | empty), 0
            if index == 0:
                yield event("ping"), 0
            if kind == "tool_use":
                parts = [("input_json_delta", "partial_json", piece) for piece in [""] + pieces(json.dumps(block["input"]))]
            elif kind == "thinking":
                parts = [("thinking_delta", "thinking", "hmm ")] * reply.reasoning + [("signature_delta", "signature", block["signature"])]
            else:
                parts = [("text_delta", "text", piece) for piece in pieces(block["text"])]
            for delta, name, piece in parts:
                tokens = 0 if delta == "signature_delta" else 1
                yield event("content_block_delta", index=index, delta={"type": delta, name: piece}), tokens
            yield event("content_block_stop", index=index), 0
        end = {"usage": self.usage(reply)} if "usage" in whole else {}
        yield event("message_delta", delta={"stop_reason": whole["stop_reason"], "stop_sequence": None}, **end), 0
        yield event("message_stop"), 0

    @staticmethod
    def broken():
        return data({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, "error")


APIS = {"chat": Chat(), "responses": Responses(), "messages": Messages()}
