#!/usr/bin/env python3
"""The official openai client against hybridserve: openai_client.py BASE_URL [API_KEY]"""
import concurrent.futures, json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key=sys.argv[2] if len(sys.argv) > 2 else "none", max_retries=0)
model = client.models.list().data[0].id
print("model", model, "openai", openai.__version__)

# completions: whole, streamed, several, seeds, stop, logprobs
whole = client.completions.create(model=model, prompt="The file", max_tokens=16, temperature=0)
assert whole.choices[0].finish_reason in ("length", "stop") and whole.usage.completion_tokens <= 16
parts = list(client.completions.create(model=model, prompt="The file", max_tokens=16, temperature=0, stream=True,
                                       stream_options={"include_usage": True}))
assert "".join(p.choices[0].text for p in parts if p.choices) == whole.choices[0].text
assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
several = client.completions.create(model=model, prompt=["The", "A file"], n=2, max_tokens=4, seed=5)
assert [c.index for c in several.choices] == [0, 1, 2, 3]
again = client.completions.create(model=model, prompt=["The", "A file"], n=2, max_tokens=4, seed=5)
assert [c.text for c in several.choices] == [c.text for c in again.choices]
scored = client.completions.create(model=model, prompt="The file", max_tokens=1, temperature=0, logprobs=3, echo=True)
l = scored.choices[0].logprobs
assert len(l.tokens) == len(l.token_logprobs) == len(l.top_logprobs) == len(l.text_offset)
assert l.token_logprobs[0] is None and l.token_logprobs[-1] == max(l.top_logprobs[-1].values())
first = whole.choices[0].text[:4]
if len(whole.choices[0].text) > 6:
    stop = whole.choices[0].text[4:6]
    cut = client.completions.create(model=model, prompt="The file", max_tokens=16, temperature=0, stop=[stop])
    assert cut.choices[0].finish_reason == "stop" and stop not in cut.choices[0].text
print("completions")

# chat: whole, streamed, logprobs, JSON schema
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something."}]
chat = client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2)
assert chat.choices[0].message.role == "assistant" and len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
parts = list(client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0, stream=True))
assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == chat.choices[0].finish_reason
assert "".join(p.choices[0].delta.content or "" for p in parts) == chat.choices[0].message.content
schema = {"type": "object", "properties": {"n": {"type": "integer"}, "colour": {"enum": ["red", "green"]}},
          "required": ["n", "colour"], "additionalProperties": False}
shaped = client.chat.completions.create(model=model, messages=messages, max_tokens=120, seed=1, response_format={
    "type": "json_schema", "json_schema": {"name": "shape", "schema": schema, "strict": True}})
if shaped.choices[0].finish_reason == "stop":
    value = json.loads(shaped.choices[0].message.content)
    assert isinstance(value["n"], int) and value["colour"] in ("red", "green"), value
print("chat")

# errors are the client's own kinds
for wrong, kind in (({"temperature": 9}, openai.BadRequestError), ({"model": "other"}, openai.NotFoundError)):
    try:
        client.completions.create(**{"model": model, "prompt": "x", **wrong})
    except kind as e:
        assert e.body["message"], e
    else:
        raise AssertionError(f"{wrong} was accepted")
print("errors")

# 32 at once are what each is alone; a stream that is closed early disturbs nobody
ask = lambda i: client.completions.create(model=model, prompt=f"number {i}", max_tokens=12, temperature=0).choices[0].text
alone = [ask(i) for i in range(8)]
half = client.completions.create(model=model, prompt="left", max_tokens=200, stream=True)
next(iter(half))
half.close()
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    together = list(pool.map(ask, [i % 8 for i in range(32)]))
assert together == alone * 4
print("concurrency\nall right")
