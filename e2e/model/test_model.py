"""Tests the model itself: the official SDKs get what their providers would send, and the account has what the SDKs received.

Run it as `python test_model.py`, with a Python that has openai and anthropic (sdks-requirements.txt). Ends with `N passed, N failed`.
"""

import json
import sys
import threading
import typing
import unittest
import urllib.error
import urllib.request

import anthropic
import openai
import pydantic
import rules
import server
from anthropic.types import MessageCountTokensParams, message_create_params
from anthropic.types.beta import message_create_params as beta_create_params
from openai.types import embedding_create_params
from openai.types.chat import completion_create_params
from openai.types.responses import response_create_params

ASK = [{"role": "user", "content": "Use get_weather and get_time for Tokyo."}]
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
NAMES = ["get_weather", "get_time"]
CHAT_TOOLS = [{"type": "function", "function": {"name": name, "strict": True, "parameters": PLACE}} for name in NAMES]
RESPONSES_TOOLS = [{"type": "function", "name": name, "strict": True, "parameters": PLACE} for name in NAMES]
MESSAGES_TOOLS = [{"name": name, "input_schema": PLACE} for name in NAMES]
LONG = [{"role": "user", "content": "write 300 words"}]


class Verdict(pydantic.BaseModel):
    # The members are not in alphabetical order: the reasoning comes before the answer.
    reasoning: str
    answer: typing.Literal["yes", "no"]
    score: int


class Model(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.provider = server.serve(0)
        threading.Thread(target=cls.provider.serve_forever, daemon=True).start()
        cls.url = f"http://127.0.0.1:{cls.provider.server_address[1]}"
        cls.openai = openai.OpenAI(base_url=cls.url + "/v1", api_key="k", max_retries=0)
        cls.anthropic = anthropic.Anthropic(base_url=cls.url, api_key="k", max_retries=0)

    def lines(self):
        """Waits for the accounts of all requests, and returns them."""
        account = self.provider.account
        for _ in range(500):
            if len(account.lines) == account.begun:
                return account.lines
            threading.Event().wait(0.01)
        raise AssertionError("no account")

    def last(self):
        """Waits for the account of the last request, and returns it."""
        return self.lines()[-1]

    def raw(self, path, body, headers=None):
        headers = {"content-type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as reply:
                return reply.status, reply.read(), reply.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    # ----------------------------------------------------------------------------------------------------- replies

    def test_tools_in_parallel(self):
        chat = self.openai.chat.completions.create(model="gpt-4o", messages=ASK, tools=CHAT_TOOLS)
        self.assertEqual([call.function.name for call in chat.choices[0].message.tool_calls], NAMES)
        self.assertEqual(json.loads(chat.choices[0].message.tool_calls[0].function.arguments), {"city": "Tokyo"})
        self.assertEqual(chat.usage.completion_tokens, self.last()["produced"])
        one = self.openai.chat.completions.create(model="gpt-4o", messages=ASK, tools=CHAT_TOOLS, parallel_tool_calls=False)
        self.assertEqual(len(one.choices[0].message.tool_calls), 1)
        response = self.openai.responses.create(model="gpt-4o", input=ASK, tools=RESPONSES_TOOLS)
        self.assertEqual([item.name for item in response.output if item.type == "function_call"], NAMES)
        message = self.anthropic.messages.create(model="claude-haiku-4-5", max_tokens=500, messages=ASK, tools=MESSAGES_TOOLS)
        self.assertEqual([block.name for block in message.content if block.type == "tool_use"], NAMES)
        self.assertEqual(message.stop_reason, "tool_use")

    def test_results_end_the_turn(self):
        chat = self.openai.chat.completions.create(model="gpt-4o", messages=ASK, tools=CHAT_TOOLS).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "22"} for call in chat.tool_calls]
        end = self.openai.chat.completions.create(model="gpt-4o", messages=[*ASK, chat.model_dump(exclude_none=True), *results], tools=CHAT_TOOLS)
        self.assertIn("THE END", end.choices[0].message.content)
        with self.assertRaisesRegex(openai.BadRequestError, "must be followed by tool messages"):
            self.openai.chat.completions.create(model="gpt-4o", messages=[*ASK, chat.model_dump(exclude_none=True), *results[1:]])
        message = self.anthropic.messages.create(model="claude-haiku-4-5", max_tokens=500, messages=ASK, tools=MESSAGES_TOOLS)
        with self.assertRaisesRegex(anthropic.BadRequestError, "without `tool_result` blocks"):
            said = [*ASK, {"role": "assistant", "content": [block.model_dump() for block in message.content]}, {"role": "user", "content": "go on"}]
            self.anthropic.messages.create(model="claude-haiku-4-5", max_tokens=500, messages=said)

    def test_a_conversation_that_the_provider_holds(self):
        @anthropic.beta_tool
        def get_weather(city: str) -> str:
            """The weather."""
            return "sun"

        ask = [{"role": "user", "content": "Use get_weather for Tokyo."}]
        runner = self.anthropic.beta.messages.tool_runner(model="claude-haiku-4-5", max_tokens=500, tools=[get_weather], messages=ask)
        self.assertIn("THE END", runner.until_done().content[0].text)
        self.assertEqual(len(self.last()["request"]["messages"]), 1)
        self.assertGreater(self.last()["prompt"], 30)
        # The provider rejects a conversation that it does not have.
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun"}
        thread = {"type": "continue", "previous_message_id": "msg_lost"}
        messages = [{"role": "user", "content": [result]}]
        with self.assertRaises(anthropic.NotFoundError):
            more = {"thread": thread, "betas": ["message-threads-2026-08-12"]}
            self.anthropic.beta.messages.create(model="claude-haiku-4-5", max_tokens=500, messages=messages, **more)

    def test_streams_say_the_same(self):
        with self.openai.chat.completions.stream(model="gpt-4o", messages=ASK, tools=CHAT_TOOLS) as stream:
            calls = stream.get_final_completion().choices[0].message.tool_calls
        self.assertEqual([(call.function.name, call.function.arguments) for call in calls], [(name, '{"city": "Tokyo"}') for name in NAMES])
        with self.openai.responses.stream(model="gpt-4o", input=ASK, tools=RESPONSES_TOOLS) as stream:
            kinds = [event.type for event in stream]
            response = stream.get_final_response()
        self.assertEqual([item.name for item in response.output if item.type == "function_call"], NAMES)
        self.assertEqual(kinds[:2] + kinds[-1:], ["response.created", "response.in_progress", "response.completed"])
        self.assertEqual(response.usage.output_tokens, self.last()["produced"])
        with self.anthropic.messages.stream(model="claude-haiku-4-5", max_tokens=500, messages=ASK, tools=MESSAGES_TOOLS) as stream:
            kinds = [event.type for event in stream]
            message = stream.get_final_message()
        self.assertEqual([block.name for block in message.content if block.type == "tool_use"], NAMES)
        self.assertEqual([kinds[0], kinds[1], kinds[-1]], ["message_start", "content_block_start", "message_stop"])
        self.assertEqual(message.usage.output_tokens, self.last()["produced"])

    def test_usage_only_where_asked(self):
        def chunks(**more):
            return list(self.openai.chat.completions.create(model="gpt-4o", messages=LONG, stream=True, **more))

        self.assertEqual([one.usage for one in chunks() if one.usage], [])
        with_usage = chunks(stream_options={"include_usage": True})
        self.assertEqual(with_usage[-1].choices, [])
        self.assertEqual(with_usage[-1].usage.completion_tokens, self.last()["produced"])

    def test_structured_output_in_the_schemas_order(self):
        chat = self.openai.chat.completions.parse(model="gpt-4o", messages=ASK, response_format=Verdict)
        self.assertEqual(list(json.loads(chat.choices[0].message.content)), ["reasoning", "answer", "score"])
        response = self.openai.responses.parse(model="gpt-4o", input=ASK, text_format=Verdict)
        self.assertIsInstance(response.output_parsed, Verdict)
        message = self.anthropic.messages.parse(model="claude-haiku-4-5", max_tokens=500, messages=ASK, output_format=Verdict)
        self.assertIsInstance(message.parsed_output, Verdict)

    def test_reasoning_is_accounted_for(self):
        ask = [{"role": "user", "content": "think for 500 tokens"}]
        chat = self.openai.chat.completions.create(model="o4-mini", messages=ask)
        self.assertEqual(chat.usage.completion_tokens_details.reasoning_tokens, 500)
        self.assertGreater(chat.usage.completion_tokens, 500)
        response = self.openai.responses.create(model="gpt-5-mini", input=ask)
        self.assertEqual(response.usage.output_tokens_details.reasoning_tokens, 500)
        thinking = {"type": "enabled", "budget_tokens": 1024}
        message = self.anthropic.messages.create(model="claude-haiku-4-5", max_tokens=2000, messages=ask, thinking=thinking)
        self.assertGreater(message.usage.output_tokens, 500)
        low = self.openai.chat.completions.create(model="o4-mini-fault-low", messages=ask).usage
        self.assertLess(low.completion_tokens, 100)
        self.assertGreater(low.total_tokens - low.prompt_tokens, 500)

    def test_output_ends_at_the_limit(self):
        chat = self.openai.chat.completions.create(model="gpt-4o", messages=LONG, max_completion_tokens=20)
        self.assertEqual((chat.choices[0].finish_reason, chat.usage.completion_tokens), ("length", 20))
        response = self.openai.responses.create(model="gpt-4o", input=LONG, max_output_tokens=20)
        self.assertEqual((response.status, response.usage.output_tokens), ("incomplete", 20))
        message = self.anthropic.messages.create(model="claude-haiku-4-5", max_tokens=20, messages=LONG)
        self.assertEqual((message.stop_reason, message.usage.output_tokens), ("max_tokens", 20))

    def test_other_endpoints(self):
        self.assertIn("gpt-4o", [model.id for model in self.openai.models.list()])
        self.assertEqual(self.openai.models.retrieve("gpt-4o").id, "gpt-4o")
        self.assertIn("claude-haiku-4-5", [model.id for model in self.anthropic.models.list()])
        self.assertEqual(len(self.openai.embeddings.create(model="text-embedding-3-small", input=["a", "b"]).data), 2)
        self.assertFalse(self.openai.moderations.create(input="a").results[0].flagged)
        counted = self.anthropic.messages.count_tokens(model="claude-haiku-4-5", messages=ASK).input_tokens
        charged = self.anthropic.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=ASK).usage.input_tokens
        self.assertEqual(counted, charged)

    # ----------------------------------------------------------------------------------------------------- rejections

    def test_limits_as_the_providers_say_them(self):
        for field in ("max_tokens", "max_completion_tokens"):
            with self.assertRaisesRegex(openai.BadRequestError, "is too large: 16385. This model supports at most 16384"):
                self.openai.chat.completions.create(model="gpt-4o", messages=ASK, **{field: 16385})
        with self.assertRaisesRegex(openai.BadRequestError, "maximum context length is 128000"):
            self.openai.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "word " * 130_000}])
        with self.assertRaisesRegex(openai.BadRequestError, "Use 'max_completion_tokens' instead"):
            self.openai.chat.completions.create(model="o4-mini", messages=ASK, max_tokens=100)
        with self.assertRaisesRegex(openai.BadRequestError, "Expected a value >= 16"):
            self.openai.responses.create(model="gpt-4o", input=ASK, max_output_tokens=5)
        with self.assertRaisesRegex(openai.NotFoundError, "does not exist"):
            self.openai.chat.completions.create(model="gpt-5.9", messages=ASK)
        with self.assertRaisesRegex(anthropic.BadRequestError, "8193 > 8192, which is the maximum"):
            self.anthropic.messages.create(model="claude-3-5-haiku-20241022", max_tokens=8193, messages=ASK)
        version = {"anthropic-version": "2023-06-01", "x-api-key": "k"}
        status, body, _ = self.raw("/v1/messages", {"model": "claude-haiku-4-5", "messages": ASK}, version)
        self.assertEqual((status, json.loads(body)["error"]["message"]), (400, "max_tokens: Field required"))
        status, body, _ = self.raw("/v1/messages", {"model": "claude-haiku-4-5", "messages": ASK})
        self.assertEqual(json.loads(body)["error"]["message"], "anthropic-version: header is required")
        self.assertEqual(self.last()["billed"], 0)

    def test_unknown_members_parts_and_tools(self):
        with self.assertRaisesRegex(openai.BadRequestError, "Unrecognized request argument supplied: best_of"):
            self.openai.chat.completions.create(model="gpt-4o", messages=ASK, extra_body={"best_of": 2})
        with self.assertRaisesRegex(openai.BadRequestError, "Unknown parameter: 'max_tokens'"):
            self.openai.responses.create(model="gpt-4o", input=ASK, extra_body={"max_tokens": 2})
        with self.assertRaisesRegex(anthropic.BadRequestError, "n: Extra inputs are not permitted"):
            self.anthropic.messages.create(model="claude-haiku-4-5", max_tokens=50, messages=ASK, extra_body={"n": 2})
        with self.assertRaises(openai.BadRequestError):
            self.openai.chat.completions.create(model="gpt-4o", messages=ASK, tools=[{"type": "namespace", "name": "x"}])
        with self.assertRaises(openai.BadRequestError):
            loose = {"type": "function", "function": {"name": "t", "strict": True, "parameters": {"type": "object", "properties": {}}}}
            self.openai.chat.completions.create(model="gpt-4o", messages=ASK, tools=[loose])

    def test_members_are_those_of_the_sdks(self):
        def of(kind):
            return set(typing.get_type_hints(kind))

        self.assertEqual(of(completion_create_params.CompletionCreateParamsStreaming), rules.CHAT)
        self.assertEqual(of(response_create_params.ResponseCreateParamsStreaming), rules.RESPONSES - {"client_metadata"})
        self.assertEqual(of(embedding_create_params.EmbeddingCreateParams), rules.EMBED)
        # The SDKs' types also have headers and query parameters, which are not members of the body.
        sampling = {"temperature", "top_p", "top_k"}
        messages = of(message_create_params.MessageCreateParamsStreaming) | sampling
        self.assertEqual(messages - {"workspace_id", "user_profile_id"}, rules.MESSAGES - {"workspace_id", "user_profile_id"})
        beta = of(beta_create_params.MessageCreateParamsStreaming) | sampling | {"output_format"}
        self.assertEqual(beta - {"betas", "workspace_id"}, rules.MESSAGES_BETA - {"workspace_id"})
        self.assertLessEqual(of(MessageCountTokensParams), rules.COUNT)

    # ---------------------------------------------------------------------------------------------------- faults

    def test_statuses(self):
        for status, kind in ((429, openai.RateLimitError), (500, openai.InternalServerError), (503, openai.InternalServerError)):
            with self.assertRaises(kind) as raised:
                self.openai.chat.completions.create(model=f"gpt-4o-fault-{status}", messages=ASK)
            self.assertEqual(raised.exception.response.headers.get("retry-after"), "1" if status != 500 else None)
        with self.assertRaises(anthropic.APIStatusError) as raised:
            self.anthropic.messages.create(model="claude-haiku-4-5-fault-529", max_tokens=50, messages=ASK)
        self.assertEqual(raised.exception.status_code, 529)
        self.assertEqual(raised.exception.body["error"]["type"], "overloaded_error")
        status, body, _ = self.raw("/v1/chat/completions", {"model": "gpt-4o-fault-html-502", "messages": ASK})
        self.assertEqual((status, body[:6]), (502, b"<html>"))
        with self.assertRaises(openai.RateLimitError):
            self.openai.chat.completions.create(model="gpt-4o", messages=ASK, extra_headers={"openai-fault": "429"})

    def test_a_retry_helps_where_it_says_so(self):
        client = self.openai.with_options(max_retries=3)
        chat = client.chat.completions.create(model="gpt-4o-fault-503x2", messages=ASK)
        self.assertIn("THE END", chat.choices[0].message.content)
        self.assertEqual([line["status"] for line in self.lines()[-3:]], [503, 503, 200])

    def test_breaks(self):
        with self.assertRaises(openai.APIConnectionError):
            self.openai.chat.completions.create(model="gpt-4o-fault-drop", messages=ASK)
        self.assertEqual((self.last()["end"], self.last()["billed"]), ("cut", 0))
        for at in (0, 1, 500, 3000):
            with self.assertRaises(Exception):
                list(self.openai.chat.completions.create(model=f"gpt-4o-fault-cut-{at}", messages=LONG, stream=True))
            self.assertEqual((self.last()["end"], self.last()["sent"]), ("cut", at))
            self.assertLess(self.last()["produced"], self.last()["would"])
        with self.assertRaises(openai.APIError):
            list(self.openai.chat.completions.create(model="gpt-4o-fault-error-5", messages=LONG, stream=True))
        events = list(self.openai.responses.create(model="gpt-4o-fault-error-5", input=LONG, stream=True))
        self.assertEqual((events[-1].type, self.last()["end"]), ("error", "error"))
        with self.assertRaises(anthropic.APIError):
            list(self.anthropic.messages.create(model="claude-haiku-4-5-fault-error-5", max_tokens=500, messages=LONG, stream=True))

    def test_who_leaves_is_seen(self):
        with self.openai.chat.completions.create(model="gpt-4o-fault-pace-5", messages=LONG, stream=True) as stream:
            for _, chunk in zip(range(10), stream):
                pass
        line = self.last()
        self.assertEqual(line["end"], "left")
        self.assertTrue(9 <= line["produced"] < line["would"], line)

    def test_accounts_that_are_not_true(self):
        self.assertIsNone(self.openai.chat.completions.create(model="gpt-4o-fault-none", messages=ASK).usage)
        zero = self.anthropic.messages.create(model="claude-haiku-4-5-fault-zero", max_tokens=500, messages=LONG).usage
        self.assertEqual((zero.input_tokens, zero.output_tokens), (0, 0))
        self.assertGreater(self.last()["billed"], 400)

    def test_compressed_though_not_asked_for(self):
        for stream in (False, True):
            body = {"model": "gpt-4o-fault-gzip", "messages": LONG, "stream": stream}
            _, raw, headers = self.raw("/v1/chat/completions", body, {"accept-encoding": "identity"})
            self.assertEqual((headers["content-encoding"], raw[:2]), ("gzip", b"\x1f\x8b"))
        chat = self.openai.chat.completions.create(model="gpt-4o-fault-gzip", messages=ASK)
        self.assertIn("THE END", chat.choices[0].message.content)

    def test_what_it_would_fetch_is_said(self):
        url = {"type": "image_url", "image_url": {"url": "https://elsewhere.test/?secret=1"}}
        self.openai.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": [url]}])
        self.assertEqual(self.last()["fetched"], ["https://elsewhere.test/?secret=1"])


if __name__ == "__main__":
    ran = unittest.main(exit=False, verbosity=2, argv=sys.argv).result
    bad = len(ran.failures) + len(ran.errors)
    print(f"{ran.testsRun - bad} passed, {bad} failed")
    sys.exit(bad > 0 or not ran.testsRun)
