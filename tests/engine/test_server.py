"""The HTTP server through OpenAI's own client and through plain HTTP, before the committed model of bytes."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from http_servers import running_server, wait_until
from prometheus_client.parser import text_string_to_metric_families
from python_runs import ROOT, run_python
from small_folders import CONFIG

from experiments.text.tokenizers import ByteTokenizer
from fp4jax.checkpoint import load_model
from fp4jax.engine import ChatTemplate, Engine, EngineReport, Generated

pytestmark = pytest.mark.usefixtures("quick_compile")

TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}def {% endif %}"
)
KEY, MOST_PROMPT, MOST_BYTES = "secret-2", 100, 20_000
PROMPTS = ["def read_lines(path):\n", "import ", "class Reader:\n    def ", "for i in range("]
CHAT = [{"role": "user", "content": "read a file"}]
CHAT_TEXT = "# user: read a file\ndef "
NEW = 16  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The committed checkpoint, with a chat template."""
    copy = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(ROOT / "experiments" / "checkpoints" / "tiny_lm", copy)
    (copy / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return copy


@pytest.fixture(scope="module")
def engine(folder):
    model, _ = load_model(folder, dtype="float32")  # which compiles faster on a CPU
    engine = Engine(
        model, max_requests=4, max_length=256, page_size=16, num_pages=32, prefill_buckets=(64,), decode_steps=2
    )
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def alone(engine):
    """What the engine generates without a server: text -> `NEW` tokens, with their logprobs."""
    ids = {engine.submit(list(p.encode()), NEW, logprobs=True): p for p in [*PROMPTS, CHAT_TEXT]}
    found = {p: ([], []) for p in ids.values()}
    while not engine.is_idle:
        for event in engine.step():
            tokens, logprobs = found[ids[event.id]]
            tokens += event.tokens
            logprobs += event.logprobs
    return found


@pytest.fixture(scope="module")
def server(engine, alone, folder):
    with running_server(
        engine, ByteTokenizer(), template=ChatTemplate.of_folder(folder), api_keys=("secret-1", KEY),
        max_body_bytes=MOST_BYTES, max_prompt_tokens=MOST_PROMPT, default_max_tokens=8,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def client(server):
    with server.client(KEY) as client:
        yield client


def complete(client, prompt=PROMPTS[0], max_tokens=NEW, **options):
    options = {"temperature": 0, **options}
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=max_tokens, **options)


def post(server, body, path="/v1/completions", key=KEY, **options):
    headers = {"Authorization": f"Bearer {key}"}
    content = body if isinstance(body, bytes | str) else json.dumps(body)
    return httpx.post(server.url + path, content=content, headers=headers, timeout=60, **options)


def metrics(server):
    """Name and outcome -> value."""
    families = text_string_to_metric_families(httpx.get(server.url + "/metrics").text)
    return {(s.name, s.labels.get("outcome")): s.value for f in families for s in f.samples}


def text_of(tokens):
    return bytes(tokens).decode(errors="replace")


# --- answers ---


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_completion_is_what_the_engine_generates(client, alone, prompt):
    answer = complete(client, prompt)
    assert answer.choices[0].text == text_of(alone[prompt][0])
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", "tiny", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), NEW)
    assert complete(client, list(prompt.encode())).choices[0].text == answer.choices[0].text


def test_a_chat_is_a_completion_of_the_template(client, alone):
    parts = [{"role": "user", "content": [{"type": "text", "text": "read "}, {"type": "text", "text": "a file"}]}]
    for messages in (CHAT, parts):
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=NEW, temperature=0
        )
        message = answer.choices[0].message
        assert (message.role, message.content) == ("assistant", text_of(alone[CHAT_TEXT][0]))
        assert answer.object == "chat.completion" and answer.usage.prompt_tokens == len(CHAT_TEXT)


def test_pieces_of_a_stream_make_the_whole_answer(client, alone):
    pieces = list(complete(client, stream=True, stream_options={"include_usage": True}))
    *texts, usage = pieces
    assert "".join(p.choices[0].text for p in texts) == text_of(alone[PROMPTS[0]][0]) and len(texts) > 2
    assert [p.choices[0].finish_reason for p in texts] == [None] * (len(texts) - 1) + ["length"]
    assert usage.choices == [] and usage.usage.completion_tokens == NEW and texts[0].usage is None
    assert len({p.id for p in pieces}) == 1


def test_pieces_of_a_chat_make_the_whole_answer(client, alone):
    pieces = list(
        client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=NEW, temperature=0, stream=True)
    )
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[0].object == "chat.completion.chunk"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == text_of(alone[CHAT_TEXT][0])
    assert pieces[-1].choices[0].finish_reason == "length"


def test_a_stream_is_server_sent_events(server):
    answer = post(server, {"model": "tiny", "prompt": "import ", "max_tokens": 2, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last = answer.text.split("\n\n")[:-1]
    assert last == "data: [DONE]" and all(json.loads(e.removeprefix("data: "))["choices"] for e in events)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer_and_are_not_part_of_it(client, alone, stream):
    text = text_of(alone[PROMPTS[0]][0])
    stop = text[9:12]
    before = text[: text.index(stop)]
    answer = complete(client, stop=["\0 never", stop], stream=stream, max_tokens=3 * NEW)
    pieces = list(answer) if stream else [answer]
    assert "".join(p.choices[0].text for p in pieces) == before
    assert pieces[-1].choices[0].finish_reason == "stop"
    if not stream:
        assert answer.usage.completion_tokens == len(before) + len(stop)


def test_stop_tokens_end_an_answer(client, alone):
    prompt, at = next((p, i) for p, (tokens, _) in alone.items() for i in range(3, NEW) if tokens[i] not in tokens[:i])
    tokens = alone[prompt][0]
    answer = complete(client, prompt, extra_body={"stop_token_ids": [tokens[at]]})
    assert answer.choices[0].text == text_of(tokens[:at]) and answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == at + 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(client, alone, stream):
    tokens, expected = alone[PROMPTS[0]]
    answer = complete(client, logprobs=1, stream=stream)
    parts = [p.choices[0].logprobs for p in (answer if stream else [answer]) if p.choices[0].logprobs]
    assert "".join(t for p in parts for t in p.tokens) == text_of(tokens)
    assert [v for p in parts for v in p.token_logprobs] == pytest.approx(expected, abs=1e-3)
    assert [o for p in parts for o in p.text_offset] == list(range(NEW))
    assert all(list(top) == [t] for p in parts for t, top in zip(p.tokens, p.top_logprobs, strict=True))
    assert complete(client, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_logprobs_of_a_chat(client, alone):
    tokens, expected = alone[CHAT_TEXT]
    answer = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=NEW, temperature=0, logprobs=True)
    found = answer.choices[0].logprobs.content
    assert [t.logprob for t in found] == pytest.approx(expected, abs=1e-3)
    assert [t.bytes for t in found] == [[token] for token in tokens] and found[0].top_logprobs == []


def test_a_seed_draws_the_same_tokens_and_no_seed_others(client):
    options = dict(temperature=1.5, top_p=0.95, extra_body={"top_k": 50, "min_p": 0.001})
    first, second = (complete(client, seed=-(2**40) + 7, **options).choices[0].text for _ in range(2))
    assert first == second
    assert len({complete(client, **options).choices[0].text for _ in range(3)}) > 1


def test_without_max_tokens_the_default_of_the_server_counts(server):
    answer = post(server, {"model": "tiny", "prompt": "import ", "suffix": None, "n": 1}).json()
    assert answer["usage"]["completion_tokens"] == 8


# --- what is refused ---

GOOD = {"model": "tiny", "prompt": "import "}
REFUSED = {
    "unknown": ({"nonsense": 1}, 400, "nonsense"),
    "long name": ({"o" * 1000: 1}, 400, "o" * 500),
    "several answers": ({"n": 2}, 400, "n"),
    "echo": ({"echo": True}, 400, "echo"),
    "penalty": ({"presence_penalty": 0.5}, 400, "presence_penalty"),
    "no text": ({"prompt": ""}, 400, "prompt"),
    "several prompts": ({"prompt": ["a", "b"]}, 400, "prompt"),
    "no token": ({"prompt": [1, 256]}, 400, "prompt"),
    "half a character": ({"prompt": "\ud800"}, 400, None),
    "long prompt": ({"prompt": "x" * (MOST_PROMPT + 1)}, 400, "prompt"),
    "long answer": ({"max_tokens": 250}, 400, "max_tokens"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "temperature": ({"temperature": -1}, 400, None),
    "not a number": ({"temperature": float("nan")}, 400, None),
    "text as number": ({"top_p": "1"}, 400, "top_p"),
    "huge number": ({"min_p": 10**400}, 400, "min_p"),
    "top_k": ({"top_k": 2**31}, 400, None),
    "seed": ({"seed": 1.5}, 400, "seed"),
    "stop": ({"stop": ["a", ""]}, 400, "stop"),
    "many stops": ({"stop": list("abcde")}, 400, "stop"),
    "stop token": ({"stop_token_ids": [2**40]}, 400, "stop_token_ids"),
    "many stop tokens": ({"stop_token_ids": list(range(17))}, 400, "stop_token_ids"),
    "logprobs": ({"logprobs": 5, "temperature": 0}, 400, "logprobs"),
    "likeliest while drawing": ({"logprobs": 1}, 400, "logprobs"),
    "stream": ({"stream": "yes"}, 400, "stream"),
    "usage without stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "model": ({"model": "other"}, 404, "model"),
    "no model": ({"model": None}, 400, "model"),
    "large body": ({"prompt": "x" * MOST_BYTES}, 413, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_not_served_is_an_error_that_names_the_option(server, name):
    changes, status, param = REFUSED[name]
    answer = post(server, GOOD | changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)
    assert 10 < len(error["message"]) <= 500 and (param is None or param[:400] in error["message"] or status == 404)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 20_000, b'{"model": 1' + b"0" * 5000 + b"}"])
def test_a_body_that_is_no_object_of_json_is_an_error(server, body):
    answer = post(server, body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize(
    "messages",
    [[], "hi", [{"content": "a"}], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}],
     [{"role": "assistant", "content": "a", "tool_calls": []}], [{"role": "user", "content": "x" * MOST_PROMPT}]],
)  # fmt: skip
def test_messages_that_are_not_served_are_errors(server, messages):
    answer = post(server, {"model": "tiny", "messages": messages}, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")


def test_two_limits_of_a_chat_must_agree(server):
    body = {"model": "tiny", "messages": CHAT, "max_tokens": 2, "max_completion_tokens": 3}
    answer = post(server, body, "/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_completion_tokens")
    assert post(server, body | {"max_tokens": 3}, "/v1/chat/completions").json()["usage"]["completion_tokens"] == 3


def test_a_folder_without_a_template_has_no_chats(engine):
    with running_server(engine, ByteTokenizer()) as other:
        answer = post(other, {"model": "tiny", "messages": CHAT}, "/v1/chat/completions")
        assert answer.status_code == 400 and "/v1/completions" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "missing", ["starlette", *(pytest.param(name, marks=pytest.mark.slow) for name in ("uvicorn", "prometheus_client"))]
)
def test_a_missing_package_is_an_error_that_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import fp4jax.engine; import fp4jax.engine.serving"
    done = run_python("-c", code)
    assert done.returncode == 1 and "ImportError: the HTTP server needs more packages" in done.stderr
    assert "pip install 'fp4jax[serve]'" in done.stderr


def test_a_larger_body_is_refused_before_it_is_read_to_its_end(server):
    answer = post(server, b"x" * (MOST_BYTES * 3))
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_keys(server):
    for key in ("wrong", "secret-", "secret-2x", "sécret"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        answer = httpx.post(server.url + "/v1/completions", json=GOOD, headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    assert [m.id for m in server.client("secret-1").models.list()] == ["tiny"]
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_unknown_paths_and_methods_are_errors_in_json(server):
    for path, status in (("/v1/embeddings", 404), ("/v1/completions", 405)):
        answer = httpx.get(server.url + path)
        assert answer.status_code == status and path in answer.json()["error"]["message"]


# --- many clients ---


@pytest.mark.slow
def test_parallel_clients_get_the_answers_of_the_engine_alone(server, client, alone):
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(64)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt, 4).choices[0].text, prompts))
    assert answers == [text_of(alone[prompt][0][:4]) for prompt in prompts]


def busy(engine):
    return engine.report().running > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_pages(server, client, engine, stream):
    before = metrics(server)["fp4jax_requests_total", "cancelled"]
    body = {**GOOD, "max_tokens": 240, "stream": stream}
    generated = engine.report().generated_tokens
    with httpx.Client(timeout=60) as http:
        request = http.build_request(
            "POST", server.url + "/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}
        )
        if stream:
            answer = http.send(request, stream=True)
            next(answer.iter_lines())
            assert busy(engine)
            answer.close()
        else:
            request.extensions["timeout"] = {"connect": 5, "write": 5, "pool": 5, "read": 0.1}
            with pytest.raises(httpx.ReadTimeout):
                http.send(request)
    wait_until(lambda: not busy(engine))
    assert engine.report().pages_in_use == 0
    assert engine.report().generated_tokens - generated < 200
    wait_until(lambda: metrics(server)["fp4jax_requests_total", "cancelled"] == before + 1)


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(server, client, engine):
    streams = [complete(client, max_tokens=200, stream=True) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert (engine.report().running, engine.report().waiting) == (4, 0)
    with pytest.raises(openai.APITimeoutError):
        complete(client.with_options(timeout=0.1), max_tokens=200)
    wait_until(lambda: engine.report().waiting == 0)
    assert engine.report().running == 4
    for stream in streams:
        stream.close()
    wait_until(lambda: not busy(engine))
    assert engine.report().pages_in_use == 0


def test_a_full_queue_is_an_error_that_asks_to_try_again(server, client, engine, monkeypatch):
    monkeypatch.setattr(engine, "_max_waiting", 0)
    with pytest.raises(openai.RateLimitError) as refused:
        complete(client)
    assert refused.value.code == "queue_full" and refused.value.response.headers["retry-after"] == "1"
    monkeypatch.undo()
    complete(client, max_tokens=1)


def test_metrics_count_what_happened(server, client, engine):
    before = metrics(server)
    complete(client, max_tokens=6)
    post(server, {"model": "other"})
    after = metrics(server)
    grown = {key: value - before[key] for key, value in after.items() if value != before[key]}
    assert grown["fp4jax_requests_total", "length"] == 1 and grown["fp4jax_requests_total", "refused"] == 1
    assert grown["fp4jax_generated_tokens_total", None] == 6
    assert grown["fp4jax_prompt_tokens_total", None] == len(PROMPTS[0])
    assert grown["fp4jax_time_to_first_token_seconds_count", None] == 1
    assert grown["fp4jax_time_per_output_token_seconds_count", None] == 1
    assert after["fp4jax_pages", None] == engine.report().pages and after["fp4jax_pages_in_use", None] == 0
    assert after["fp4jax_requests_waiting", None] == after["fp4jax_requests_running", None] == 0
    assert 0 <= after["fp4jax_prefix_hit_rate", None] < 1


# --- the end ---


def test_after_a_signal_what_runs_is_finished_and_the_rest_refused(server, engine):
    with running_server(engine, ByteTokenizer()) as other, other.client() as client:
        stream = complete(client, max_tokens=90, stream=True, stream_options={"include_usage": True})
        next(stream)
        other.send_signal()
        wait_until(lambda: httpx.get(other.url + "/health").status_code == 503)
        refused = post(other, GOOD)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert [piece.usage for piece in stream][-1].completion_tokens == 90
        other.join()
        assert other.error is None


class EndlessEngine(Engine):
    """An engine whose requests never end, and whose steps fail when there are two."""

    def __init__(self, error=None):
        self.config, self.max_length, self.error, self.count, self.cancelled = CONFIG, 64, error, 0, set()

    def submit(self, *_, **__):
        self.count += 1
        return self.count

    def cancel(self, id):
        self.cancelled.add(id)

    @property
    def is_idle(self):
        return len(self.cancelled) == self.count

    def step(self):
        time.sleep(0.01)
        if self.error is not None and self.count == 2:
            raise self.error
        return [Generated(1, [10], None, None)]

    def report(self):
        return EngineReport(0, 0, 0, 0, waiting=0, running=self.count, decoding=0, pages_in_use=0, pages=1, programs=0)


IDS = {"model": "tiny", "prompt": [1]}


def test_when_time_is_up_a_server_that_ends_gives_up_what_runs():
    with running_server(EndlessEngine(), ByteTokenizer(), shutdown_seconds=0.3) as other, other.client() as client:
        stream = complete(client, [1], stream=True)
        next(stream)
        with ThreadPoolExecutor() as pool:
            whole = pool.submit(post, other, IDS)
            wait_until(lambda: metrics(other)["fp4jax_requests_running", None] == 2)
            other.send_signal()
            with pytest.raises(openai.APIError, match="has shut down"):
                list(stream)
            assert whole.result().status_code == 503
        other.join()
        assert other.error is None


def test_an_engine_that_fails_ends_its_requests_and_the_server():
    error = FloatingPointError("the device is gone")
    with running_server(EndlessEngine(error), ByteTokenizer()) as other, other.client() as client:
        stream = complete(client, [1], stream=True)
        next(stream)
        answer = post(other, IDS)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        with pytest.raises(openai.APIError, match="the engine has failed: FloatingPointError"):
            list(stream)
        other.join()
        assert other.error is error
