"""What providers accept and reject, with their own messages: members, limits, and the shape of errors."""

import base64
import json
import re
import struct

# The context window, the output limit, and whether the model reasons. A name with a date or a fault at its end means the same model.
OPENAI = {
    "gpt-4o": (128_000, 16_384, False),
    "gpt-4o-mini": (128_000, 16_384, False),
    "gpt-4.1": (1_047_576, 32_768, False),
    "gpt-5-mini": (400_000, 128_000, True),
    "o4-mini": (200_000, 100_000, True),
}
ANTHROPIC = {
    "claude-sonnet-4-5": (200_000, 64_000, False),
    "claude-haiku-4-5": (200_000, 64_000, False),
    "claude-3-5-haiku": (200_000, 8_192, False),
}
EMBEDDINGS = {"text-embedding-3-small": (8_192, 0, False)}

# The members of the SDKs' own types (openai 3.57, anthropic 2.14). test_model.py compares them.
CHAT = set(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages metadata modalities model "
    "moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options prompt_cache_retention "
    "reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools "
    "top_logprobs top_p user verbosity web_search_options".split()
)
RESPONSES = set(
    "access_programs background background_options context_management conversation image include input instructions max_output_tokens "
    "max_tool_calls metadata model moderation parallel_tool_calls previous_response_id prompt prompt_cache_key prompt_cache_options "
    "prompt_cache_retention reasoning safety_identifier service_tier store stream stream_options temperature text tool_choice tools "
    "top_logprobs top_p truncation user".split()
)
# Codex sends this member with each request. The SDKs do not know it.
RESPONSES.add("client_metadata")
MESSAGES = set(
    "cache_control container diagnostics inference_geo max_tokens messages metadata model output_config service_tier speed stop_sequences "
    "stream system thinking tool_choice tools user_profile_id workspace_id temperature top_p top_k".split()
)
# The header `anthropic-beta` allows these members, too.
MESSAGES_BETA = MESSAGES | set(
    "billing_policy compaction context_management fallback_credit_token fallbacks mcp_servers thread output_format".split()
)
COUNT = set("cache_control messages model output_config speed system thinking tool_choice tools user_profile_id workspace_id".split())
COUNT_BETA = COUNT | {"context_management", "mcp_servers", "output_format"}
EMBED = set("dimensions encoding_format input model user".split())
MODERATE = set("input model".split())
CLIENT_TOOLS = {"bash", "text_editor", "computer", "memory"}


class Refused(Exception):
    """A request that the provider rejects."""

    def __init__(self, status, message, param=None, code=None, kind="invalid_request_error", details=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind, self.details = status, message, param, code, kind, details


def error(api, status, message, param=None, code=None, kind="invalid_request_error", details=None):
    """Returns the body of an error, in the API's shape."""
    if api in ("messages", "count_tokens"):
        kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 529: "overloaded_error"}
        kind = kinds.get(status, "api_error" if status >= 500 else "invalid_request_error")
        inner = {"type": kind, "message": message} | ({"details": details} if details else {})
        return {"type": "error", "error": inner, "request_id": "req_011Cmodel"}
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def model_of(api, body):
    """Returns the limits of the request's model."""
    name = body.get("model")
    if not isinstance(name, str):
        raise Refused(400, "model: Field required" if api == "messages" else "you must provide a model parameter")
    tables = {"messages": ANTHROPIC, "count_tokens": ANTHROPIC, "embeddings": EMBEDDINGS}
    table = tables.get(api, OPENAI)
    plain = re.sub(r"-fault-.*", "", name)
    plain = re.sub(r"-(20\d{6}|20\d\d-\d\d-\d\d|latest|0)$", "", plain)
    if plain not in table:
        if table is ANTHROPIC:
            raise Refused(404, f"model: {name}")
        message = f"The model `{name}` does not exist or you do not have access to it."
        raise Refused(404, message, code="model_not_found")
    return table[plain]


def members(api, body, known):
    """Rejects members that the API does not know."""
    for name in body:
        if name in known:
            continue
        if api in ("messages", "count_tokens"):
            raise Refused(400, f"{name}: Extra inputs are not permitted")
        if api == "responses":
            raise Refused(400, f"Unknown parameter: '{name}'.", name, "unknown_parameter")
        raise Refused(400, f"Unrecognized request argument supplied: {name}")


def output_limit(api, body, most, reasons, model):
    """Returns the limit for the output of this request."""
    if api == "messages":
        limit = body.get("max_tokens")
        if limit is None:
            raise Refused(400, "max_tokens: Field required")
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise Refused(400, "max_tokens: Input should be a valid integer")
        if limit < 1:
            raise Refused(400, "max_tokens: Input should be greater than or equal to 1")
        if limit > most:
            raise Refused(400, f"max_tokens: {limit} > {most}, which is the maximum allowed number of output tokens for {model}")
        return limit
    names = ("max_output_tokens",) if api == "responses" else ("max_completion_tokens", "max_tokens")
    set_ = [(name, body[name]) for name in names if body.get(name) is not None]
    if len(set_) == 2:
        message = "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported."
        raise Refused(400, message, "max_tokens", "invalid_parameter_combination")
    for name, limit in set_:
        if not isinstance(limit, int) or isinstance(limit, bool):
            raise Refused(400, f"Invalid type for '{name}': expected an integer, but got something else instead.", name, "invalid_type")
        if reasons and name == "max_tokens":
            message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            raise Refused(400, message, name, "unsupported_parameter")
        least = 16 if api == "responses" else 1
        if limit < least:
            message = f"Invalid '{name}': integer below minimum value. Expected a value >= {least}, but got {limit} instead."
            raise Refused(400, message, name, "integer_below_min_value")
        if limit > most:
            message = (
                f"{name} is too large: {limit}. This model supports at most {most} completion tokens, whereas you provided {limit}."
            )
            raise Refused(400, message, name, "invalid_value")
    return set_[0][1] if set_ else most


def strict_schema(schema, where):
    """Checks what OpenAI requires of a schema with `strict: true`."""
    if not isinstance(schema, dict) or not schema:
        return
    if schema.get("type") == "object" or "properties" in schema:
        if schema.get("additionalProperties") is not False:
            message = f"Invalid schema for {where}: In context=(), 'additionalProperties' is required to be supplied and to be false."
            raise Refused(400, message, where, "invalid_json_schema")
        names = set(schema.get("properties", {}))
        if names != set(schema.get("required", [])):
            message = (
                f"Invalid schema for {where}: In context=(), 'required' is required to be supplied and to be an array including every "
                "key in properties."
            )
            raise Refused(400, message, where, "invalid_json_schema")
    for word in ("properties", "$defs"):
        for one in schema.get(word, {}).values():
            strict_schema(one, where)
    for one in [schema.get("items", {})] + schema.get("anyOf", []):
        strict_schema(one, where)


def tool_name(api, name):
    longest = 128 if api == "messages" else 64
    if not isinstance(name, str) or not re.fullmatch(rf"[a-zA-Z0-9_-]{{1,{longest}}}", name):
        if api == "messages":
            raise Refused(400, f"tools.0.custom.name: String should match pattern '^[a-zA-Z0-9_-]{{1,{longest}}}$'")
        raise Refused(400, "Invalid 'tools[0].name': string does not match pattern. Expected '^[a-zA-Z0-9_-]+$'.", "tools", "invalid_value")


def answered(called, results):
    """Returns the tool calls that have no result. Each API rejects a request with such calls."""
    return [call for call in called if call not in results]


def picture(data):
    """Returns the tokens of a picture by OpenAI's tiles of 512 pixels. The size is the one in the PNG's header."""
    try:
        raw = base64.b64decode(data[:64] + "=" * (-len(data[:64]) % 4))
        wide, high = struct.unpack(">II", raw[16:24]) if raw[:4] == b"\x89PNG" else (1024, 1024)
    except ValueError:
        wide, high = 1024, 1024
    return 85 + 170 * -(-min(wide, 2048) // 512) * -(-min(high, 768) // 512)


def prompt_tokens(value):
    """Returns what the provider charges for a prompt (a token for five bytes of text, and pictures by their size), and the URLs in it."""
    total = 0
    fetched = []

    def walk(one):
        nonlocal total
        if isinstance(one, dict):
            url = one.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            source = one.get("source") if isinstance(one.get("source"), dict) else {}
            if isinstance(url, str):
                total += picture(url.partition(",")[2]) if url.startswith("data:") else 765
                fetched.extend([] if url.startswith("data:") else [url])
            elif source.get("type") == "base64":
                total += picture(source.get("data", ""))
            elif source.get("type") == "url":
                total += 765
                fetched.append(source.get("url"))
            else:
                for name, inner in one.items():
                    total += len(name) // 5
                    walk(inner)
        elif isinstance(one, list):
            for inner in one:
                walk(inner)
        elif isinstance(one, str):
            total += -(-len(one.encode("utf-8", "replace")) // 5)

    walk(value)
    return max(total, 1), fetched


def loads(raw):
    """Parses the body of a request. Rejects a body that is not a JSON object, as providers do."""
    try:
        body = json.loads(raw)
    except ValueError:
        raise Refused(400, "We could not parse the JSON body of your request.") from None
    if not isinstance(body, dict):
        raise Refused(400, "We could not parse the JSON body of your request.")
    return body
