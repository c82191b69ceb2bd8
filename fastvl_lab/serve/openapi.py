"""What each endpoint takes and gives, as JSON schemas: FastAPI makes the OpenAPI description and its page of them.

Bodies are read by `chat` and `completions`, which say in a sentence what is wrong with one; these schemas are for clients and for
tools that make up requests. A schema that knows a field that is not read, or the other way round, fails a test.
"""

from __future__ import annotations

from typing import Any

from fastvl_lab.sampling import MAX_STOP_LENGTH, MAX_STOPS, MAX_TOP_LOGPROBS
from fastvl_lab.serve.chat import PASSING
from fastvl_lab.serve.choosing import MAX_ANSWERS
from fastvl_lab.tools import CHOICES, MAX_TOOLS

Schema = dict[str, Any]


def _maybe(kind: str, **more: Any) -> Schema:
    return {"type": [kind, "null"], **more}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "required": required, "properties": properties}


def _body(required: list[str], **properties: Schema) -> Schema:
    """An object of which no other field is known; a null says nothing, whatever the field."""
    return _object(required, **properties) | {"additionalProperties": {"type": "null"}}


def _passing(name: str, values: tuple[Any, ...]) -> Schema:
    """A field that is no more than let pass."""
    if name in ("typical_p", "best_of", "stop_token_ids"):
        return {"description": "passes where it changes no answer to what else is asked"}
    return {"enum": [*values, None]} if values else {"description": "changes nothing"}


_TEXT_PART = _object(["type", "text"], type={"const": "text"}, text={"type": "string"})
_IMAGE_PART = _object(
    ["type", "image_url"],
    type={"const": "image_url"},
    image_url={
        "anyOf": [
            {"type": "string"},
            _object(["url"], url={"type": "string"}, detail={"enum": ["auto", "high", "low"]}),
        ],
        "description": "a data URI, or an address at a host from which this server fetches",
    },
    min_pixels=_maybe("integer", minimum=1),
    max_pixels=_maybe("integer", minimum=1),
)
_FUNCTION = _object(["name", "arguments"], name={"type": "string"}, arguments={"type": "string"})
_CALL = _object(["id", "type", "function"], id={"type": "string"}, type={"const": "function"}, function=_FUNCTION)
_CALLS = {"type": "array", "minItems": 1, "items": _CALL}
_CONTENT: list[Schema] = [{"type": "string"}, {"type": "array", "items": {"anyOf": [_TEXT_PART, _IMAGE_PART]}}]
_MESSAGE: Schema = {
    "anyOf": [
        _object(
            ["role", "content"],
            role={"type": "string"},
            content={"anyOf": _CONTENT},
            tool_call_id=_maybe("string", description="of the call that a tool answers"),
        ),
        _object(
            ["role"],
            role={"const": "assistant"},
            content={"anyOf": [*_CONTENT, {"type": "null"}]},
            tool_calls={"anyOf": [_CALLS, {"type": "array", "maxItems": 0}, {"type": "null"}]},
            reasoning_content=_maybe("string", description="a thinking assistant's"),
        ),
    ]
}
_MESSAGES = {"type": "array", "minItems": 1, "items": _MESSAGE}
_PIXELS: Schema = {
    "min_pixels": _maybe("integer", minimum=1),
    "max_pixels": _maybe("integer", minimum=1),
    "mm_processor_kwargs": _maybe(
        "object",
        properties={name: _maybe("integer", minimum=1) for name in ("min_pixels", "max_pixels")},
        additionalProperties=False,
    ),
}
_TOOL = _object(
    ["type", "function"],
    type={"const": "function"},
    function=_object(
        ["name"],
        name={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
        description=_maybe("string"),
        parameters=_maybe("object", description="a JSON schema"),
        strict=_maybe("boolean", description="hold the arguments of every call to the schema"),
    ),
)
_NAMED = _object(["type", "function"], type={"const": "function"}, function=_object(["name"], name={"type": "string"}))
_CHOICE: Schema = {"anyOf": [{"enum": [*CHOICES, None]}, _NAMED]}
_TOOLS: Schema = {
    "tools": _maybe("array", maxItems=MAX_TOOLS, items=_TOOL, description="where the chat template shows them to the model"),
    "tool_choice": _CHOICE,
    "parallel_tool_calls": _maybe("boolean", description="false: the answer ends with its first call"),
}
_SCHEMA = _object(["schema"], name=_maybe("string"), schema={"type": "object"}, strict=_maybe("boolean"))
_FORMAT: Schema = {
    "anyOf": [
        _object(["type"], type={"enum": ["text", "json_object"]}),
        _object(["type", "json_schema"], type={"const": "json_schema"}, json_schema=_SCHEMA),
        {"type": "null"},
    ],
    "description": "what the answer must be; of a thinking model, behind the thought",
}
_ANY: Schema = {
    "model": _maybe("string", description="the name under which the model is served"),  # `of_body` says which
    "max_tokens": _maybe("integer", minimum=1, description="by default all that the session has room for"),
    "max_completion_tokens": _maybe("integer", minimum=1, description="the same"),
    "stream": _maybe("boolean"),
    "stream_options": _maybe(
        "object",
        properties={name: _maybe("boolean") for name in ("include_usage", "continuous_usage_stats", "include_obfuscation")},
    ),
    "ignore_eos": _maybe("boolean", description="make exactly max_tokens tokens"),
    "timeout": _maybe("number", exclusiveMinimum=0, description="seconds from arrival to the last chunk"),
    "return_token_ids": _maybe("boolean"),
    "return_trace": _maybe("boolean", description="the last chunk carries the request's own run"),
    "temperature": _maybe("number", minimum=0, maximum=2, description="0 unless something else is asked of a draw, and then 1"),
    "top_p": _maybe("number", minimum=0, maximum=1),
    "top_k": _maybe("integer", minimum=-1, description="0 or -1: all"),
    "min_p": _maybe("number", minimum=0, maximum=1),
    "repetition_penalty": _maybe("number", minimum=0.01, maximum=100),
    "frequency_penalty": _maybe("number", minimum=-2, maximum=2),
    "presence_penalty": _maybe("number", minimum=-2, maximum=2),
    "logit_bias": _maybe(
        "object",
        propertyNames={"pattern": "^[0-9]{1,19}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
    ),
    "seed": _maybe("integer", minimum=-(2**63), maximum=2**63 - 1),
    "stop": {
        "anyOf": [
            {"type": ["string", "null"], "maxLength": MAX_STOP_LENGTH},
            {"type": "array", "maxItems": MAX_STOPS, "items": {"type": "string", "maxLength": MAX_STOP_LENGTH}},
        ]
    },
    "min_tokens": _maybe("integer", minimum=0),
    "min_new_tokens": _maybe("integer", minimum=0, description="the same"),
    "do_sample": _maybe("boolean", description="false: greedy, whatever the temperature"),
    "n": _maybe("integer", minimum=1, maximum=MAX_ANSWERS, description="answers, each with its own draws"),
    "response_format": _FORMAT,
}
_LOGPROBS: Schema = {
    "logprobs": _maybe("boolean"),
    "top_logprobs": _maybe("integer", minimum=0, maximum=MAX_TOP_LOGPROBS, description="beside logprobs"),
}
_LOGPROBS_OF_TEXT: Schema = {"logprobs": _maybe("integer", minimum=0, maximum=MAX_TOP_LOGPROBS)}
_PASSES = {name: _passing(name, values) for name, values in PASSING.items()}
CHAT = _body(["messages"], **(_PASSES | {"messages": _MESSAGES} | _PIXELS | _TOOLS | _ANY | _LOGPROBS))
_TEXT_OWN: Schema = _object(
    ["prompt"],
    prompt={
        "anyOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "maxItems": MAX_ANSWERS, "items": {"type": "string", "minLength": 1}},
        ],
        "description": "of several texts each has its answers, prompt by prompt in the list of choices",
    },
    echo=_maybe("boolean", description="the prompt comes before the answer"),
    suffix={"type": ["string", "null"], "maxLength": 0},
)["properties"]
COMPLETION = _body(["prompt"], **(_PASSES | _TEXT_OWN | _ANY | _LOGPROBS_OF_TEXT))
_STRINGS = {"return_token_strs": _maybe("boolean")}
TOKENIZE: Schema = {
    "anyOf": [
        _body(
            ["prompt"],
            model=_ANY["model"],
            prompt={"type": "string", "minLength": 1},
            add_special_tokens=_maybe("boolean"),
            **_STRINGS,
        ),
        _body(
            ["messages"],
            model=_ANY["model"],
            messages=_MESSAGES,
            add_generation_prompt={"enum": [True, None]},
            tools=_TOOLS["tools"],
            tool_choice=_CHOICE,
            **_PIXELS,
            **_STRINGS,
        ),
    ]
}
DETOKENIZE = _body(["tokens"], model=_ANY["model"], tokens={"type": "array", "items": {"type": "integer", "minimum": 0}})

_ERROR = _object(
    ["error"],
    error=_object(
        ["message", "type", "param", "code"],
        message={"type": "string"},
        type={"type": "string"},
        param=_maybe("string"),
        code=_maybe("string"),
    ),
)
_USAGE = _object(
    ["prompt_tokens", "completion_tokens", "total_tokens"],
    prompt_tokens={"type": "integer"},
    completion_tokens={"type": "integer"},
    total_tokens={"type": "integer"},
)
_REASON = {"enum": ["stop", "length", "tool_calls"]}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_TEXTS: Schema = {"type": "array", "items": {"type": "string"}}
_INTEGERS: Schema = {"type": "array", "items": {"type": "integer"}}
_TOKEN = _object(["token", "logprob", "bytes"], token={"type": "string"}, logprob={"type": "number"}, bytes=_INTEGERS)
_TOLD_IN_CHAT = _maybe(
    "object",
    required=["content", "refusal"],
    properties={
        "content": {
            "type": "array",
            "items": {"allOf": [_TOKEN, _object(["top_logprobs"], top_logprobs={"type": "array", "items": _TOKEN})]},
        },
        "refusal": {"type": "null"},
    },
)
_TOLD_IN_TEXT = _maybe(
    "object",
    required=["tokens", "token_logprobs", "top_logprobs", "text_offset"],
    properties={
        "tokens": _TEXTS,
        "token_logprobs": _NUMBERS,
        "top_logprobs": {"type": "array", "items": _maybe("object", additionalProperties={"type": "number"})},
        "text_offset": _INTEGERS,
    },
)


def _completion(kind: str, **choice: Schema) -> Schema:
    one = _object(["index", "finish_reason", *choice], index={"type": "integer"}, finish_reason=_REASON, **choice)
    one["properties"]["token_ids"] = _INTEGERS | {"description": "where return_token_ids is true"}
    return _object(
        ["id", "object", "created", "model", "choices", "usage"],
        id={"type": "string"},
        object={"const": kind},
        created={"type": "integer"},
        model={"type": "string"},
        choices={"type": "array", "items": one},
        usage=_USAGE,
    )


_ASSISTANT = _object(
    ["role", "content"],
    role={"const": "assistant"},
    content=_maybe("string"),
    tool_calls=_CALLS,
    reasoning_content={"type": "string"},
)
CHAT_ANSWER = _completion("chat.completion", message=_ASSISTANT, logprobs=_TOLD_IN_CHAT)
TEXT_ANSWER = _completion("text_completion", text={"type": "string"}, logprobs=_TOLD_IN_TEXT)
TOKENS = _object(
    ["count", "max_model_len", "tokens", "token_strs"],
    count={"type": "integer"},
    max_model_len={"type": "integer"},
    tokens={"type": "array", "items": {"type": "integer"}},
    token_strs=_maybe("array", items={"type": "string"}),
)
TEXT = _object(["prompt"], prompt={"type": "string"})
MODEL = _object(
    ["id", "object", "created", "owned_by", "max_model_len"],
    id={"type": "string"},
    object={"const": "model"},
    created={"type": "integer"},
    owned_by={"type": "string"},
    max_model_len={"type": "integer"},
)
MODELS = _object(["object", "data"], object={"const": "list"}, data={"type": "array", "items": MODEL})
# Of server-sent events OpenAPI 3.1 describes each, as 3.2 does in `itemSchema`.
EVENT = _object(
    ["data"],
    data={"type": "string", "description": "a JSON object, a chunk as OpenAI has it, or an error; of the last event [DONE]"},
)
HEALTH = _object(["status"], status={"enum": ["ok", "starting"]})
VERSION = _object(["version"], version={"type": "string"})

_ALWAYS = {404: "what is not served here, or a model that is not", 405: "a method that this path has not"}
_OF_BODIES = {
    400: "what cannot be honoured, named in a sentence",
    413: "a body over the limit",
    429: "as many requests wait, or as many bytes are held, as may",
    500: "a fault of the server's own",
    503: "too little memory on the device, or too many connections",
    504: "no time left",
}
_KEYED = {401: "the key is missing or wrong"}


def of_body(takes: Schema, gives: Schema, model: str, *, streams: bool = False) -> dict[str, Any]:
    """What FastAPI is told of an endpoint that takes a JSON body.

    model: the name that is served there. streams: whether it may answer with server-sent events.
    """
    content: Schema = {"application/json": {"schema": gives}}
    if streams:
        content["text/event-stream"] = {"schema": EVENT}
    takes = _of_model(takes, model)
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": takes}}}},
        "responses": {200: {"description": "the answer", "content": content}, **_errors(_ALWAYS | _OF_BODIES | _KEYED)},
    }


def _of_model(takes: Schema, model: str) -> Schema:
    """A body's schema that names the one model which is served."""
    if "anyOf" in takes:
        return takes | {"anyOf": [_of_model(one, model) for one in takes["anyOf"]]}
    named = {"enum": [model, None], "description": _ANY["model"]["description"]}
    return takes | {"properties": takes["properties"] | {"model": named}}


def of_look(gives: Schema, *, keyed: bool = False, fails: dict[int, str] | None = None) -> dict[str, Any]:
    """The same of an endpoint that is looked at; fails: its own statuses besides those of all."""
    told = {200: {"description": "as it is now", "content": {"application/json": {"schema": gives}}}}
    return {"responses": told | _errors(_ALWAYS | (_KEYED if keyed else {}) | (fails or {}))}


def _errors(told: dict[int, str]) -> dict[int | str, Schema]:
    return {status: {"description": why, "content": {"application/json": {"schema": _ERROR}}} for status, why in told.items()}


# The page for Prometheus, and the name in a path.
PAGE: dict[str, Any] = {
    "responses": {
        200: {"description": "for Prometheus", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **_errors(_ALWAYS),
    }
}
NAME: dict[str, Any] = {
    "openapi_extra": {
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
    }
}
