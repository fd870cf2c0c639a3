#!/usr/bin/env python3
"""Writes `published.json`: the request types of the Python SDKs of OpenAI and Anthropic. Tests compare `src/policy/model/requests` with
them. `e2e/model/publish` runs this script with pinned versions. A type is its members. A form is a name ("string"), or an object with one
member: `ref` (a type), `any` (one of several forms), `list`, `map`, or `literal` (these values)."""
import collections.abc
import importlib
import json
import sys
import typing
from typing import get_args, get_origin, get_type_hints
import typing_extensions as te

types = {}

def name_of(t):
    return t.__module__.replace(".types.", ".").removesuffix("_param").removesuffix("_params") + "." + t.__qualname__

def expr(t):
    if t is None or t is type(None): return "null"
    if t is typing.Any or t is object: return "any"
    if isinstance(t, typing.NewType) or hasattr(t, "__supertype__"): return expr(t.__supertype__)
    if te.is_typeddict(t):
        add(t); return {"ref": name_of(t)}
    o = get_origin(t)
    if o in (te.Required, te.NotRequired, te.Annotated, typing.Annotated): return expr(get_args(t)[0])
    if o is typing.Union or str(o) == "<class 'types.UnionType'>":
        out = []
        for a in get_args(t):
            e = expr(a)
            for x in (e["any"] if isinstance(e, dict) and "any" in e else [e]):
                if x not in out: out.append(x)
        return out[0] if len(out) == 1 else {"any": out}
    if o is typing.Literal or o is te.Literal: return {"literal": list(get_args(t))}
    if o in (list, collections.abc.Iterable, collections.abc.Sequence, tuple): return {"list": expr(get_args(t)[0])}
    if o in (dict, collections.abc.Mapping): return {"map": expr(get_args(t)[1])}
    if t in (str, bytes): return "string"
    if t is bool: return "boolean"
    if t is int: return "integer"
    if t is float: return "number"
    m = getattr(t, "__module__", "")
    n = getattr(t, "__name__", str(t))
    if n.endswith("SequenceNotStr") or o is not None and getattr(o, "__name__", "") == "SequenceNotStr": return {"list": expr(get_args(t)[0])}
    if n in ("datetime", "date"): return "string"
    # Objects of responses, which the SDK accepts in place of dicts.
    if hasattr(t, "model_fields"): return "skip"
    if n in ("PathLike", "IOBase", "IO") or o is typing.IO or str(o).endswith("PathLike'>"): return "string"
    if isinstance(t, typing.ForwardRef): return {"forward": t.__forward_arg__}
    raise SystemExit(f"do not know {t!r} {o!r}")

def add(t):
    n = name_of(t)
    if n in types: return
    types[n] = {}
    hints = get_type_hints(t, include_extras=True, localns={**vars(sys.modules[t.__module__])})
    fields = {}
    for f, h in hints.items():
        e = expr(h)
        if isinstance(e, dict) and "any" in e:
            e["any"] = [x for x in e["any"] if x != "skip"]
            if len(e["any"]) == 1: e = e["any"][0]
        fields[f] = e
    needed = lambda h: get_origin(h) is te.Required or t.__total__ and get_origin(h) is not te.NotRequired
    required = sorted(f for f, h in hints.items() if needed(h))
    types[n] = {"fields": fields, "required": required}

def params(module, *names):
    m = importlib.import_module(module)
    out = []
    for n in names:
        t = getattr(m, n); add(t); out.append(name_of(t))
    return out

import openai, anthropic
apis = {
    "chat_completions": params("openai.types.chat.completion_create_params", "CompletionCreateParamsNonStreaming", "CompletionCreateParamsStreaming"),
    "responses": params("openai.types.responses.response_create_params", "ResponseCreateParamsNonStreaming", "ResponseCreateParamsStreaming"),
    "response_input_tokens": params("openai.types.responses.input_token_count_params", "InputTokenCountParams"),
    "embeddings": params("openai.types.embedding_create_params", "EmbeddingCreateParams"),
    "moderations": params("openai.types.moderation_create_params", "ModerationCreateParams"),
    "messages": params("anthropic.types.message_create_params", "MessageCreateParamsNonStreaming", "MessageCreateParamsStreaming")
        + params("anthropic.types.beta.message_create_params", "MessageCreateParamsNonStreaming", "MessageCreateParamsStreaming"),
    "count_tokens": params("anthropic.types.message_count_tokens_params", "MessageCountTokensParams") + params("anthropic.types.beta.message_count_tokens_params", "MessageCountTokensParams"),
}
doc = {"source": {"openai": openai.__version__, "anthropic": anthropic.__version__}, "apis": apis}

# One type a line, so that a diff is readable.
lines = [f"{json.dumps(name)}:{json.dumps(form, separators=(',', ':'))}" for name, form in sorted(types.items())]
print('{"source":' + json.dumps(doc["source"]) + ',\n"apis":' + json.dumps(apis) + ',\n"types":{\n' + ",\n".join(lines) + "\n}}")
