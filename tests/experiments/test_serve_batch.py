"""experiments/serve_batch.py: the engine's answers, each once whatever ends a run, and lines that are no requests."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import app
from python_runs import last_json, run_python
from refusals import ROOT, check_refusals

from experiments.text.answer_lines import AnswerFile
from experiments.text.request_lines import SETTINGS, BadLine, LineReader, Lines
from experiments.text.tokenizers import ByteTokenizer
from fp4jax.engine import ChatTemplate

MODEL = ROOT / "experiments" / "checkpoints" / "tiny_lm"
SETTINGS_OF_JAX = {"jax_disable_most_optimizations": True}
SIZES = ("--max_requests=3", "--prefill_buckets=32", "--max_length=96", "--page_size=16")
CODE = "def read_lines(path):\n"
REQUESTS = [
    {"prompt": CODE, "max_tokens": 40},
    {"prompt": CODE, "id": "stopped", "max_tokens": 60, "stop": ["and return", "never"], "logprobs": True},
    {"ids": list(b"import "), "id": "drawn", "temperature": 0.9, "top_k": 40, "top_p": 0.9, "seed": 5},
    {"prompt": "class A", "id": "bad", "max_tokens": 0},
    {"prompt": "import os\n" * 5, "id": 2.5, "min_p": 0.1, "logprobs": True},
    {"prompt": "é", "max_tokens": 1, "temperature": None},
]
BAD = "max_tokens must be at least 1, got 0"


def write_requests(path, requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def command(source, output, *more):
    flags = (f"--model={MODEL}", f"--input={source}", f"--output={output}", "--max_tokens=20", *SIZES, *more)
    return [ROOT / "experiments" / "serve_batch.py", *flags]


def run(source, output, *more, devices=1):
    settings = {**SETTINGS_OF_JAX, "jax_num_cpu_devices": devices}
    done = run_python(*command(source, output, *more), settings=settings, warnings="ignore")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def answers(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {answer["id"]: answer for answer in found}
    assert len(by_id) == len(found)
    return by_id


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing ended: its input, its output, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    source, output = write_requests(folder / "in.jsonl", REQUESTS), folder / "out.jsonl"
    return source, output, run(source, output, "--bad_lines=skip")


# The same programs as those of the script, so that they need not be compiled again.
_DIRECT = """
import json, sys
from fp4jax.checkpoint import load_model
from fp4jax.engine import Engine

engine = Engine(load_model(sys.argv[1])[0], max_requests=3, max_length=96, page_size=16, prefill_buckets=(32,))
code = list(b"def read_lines(path):\\n")
numbers = [
    engine.submit(code, 40),
    engine.submit(code, 60, logprobs=True),
    engine.submit(list(b"import "), 20, temperature=0.9, top_k=40, top_p=0.9, seed=5),
    engine.submit(list(b"import os\\n" * 5), 20, logprobs=True),
    engine.submit(list("é".encode()), 1),
]
found = {number: ([], []) for number in numbers}
while not engine.is_idle:
    for event in engine.step():
        found[event.id][0].extend(event.tokens)
        found[event.id][1].extend(event.logprobs or [])
print(json.dumps(list(found.values())))
"""


def test_answers_are_those_of_the_engine(whole):
    source, output, done = whole
    found = answers(output)
    assert "found in the prefix cache: " in done.stdout and "6 requests: " in done.stdout
    assert f"skipped: --input={source}: line 4: {BAD}" in done.stderr
    bad = found.pop("bad")
    assert bad.keys() == {"id", "request_hash", "error"} and bad["error"] == BAD
    assert (found[1]["prompt_tokens"], found[6]["prompt_tokens"]) == (len(CODE), 2)
    direct = last_json(run_python("-c", _DIRECT, MODEL, settings=SETTINGS_OF_JAX, warnings="ignore"))
    for id, (tokens, logprobs) in zip((1, "stopped", "drawn", 2.5, 6), direct, strict=True):
        answer, text, end = found.pop(id), bytes(tokens).decode(errors="replace"), len(tokens)
        reason = "length"
        if id == "stopped":
            text, reason = text[: text.index("and return")], "stop"
            end = len(text + "and return")
        assert (answer["text"], answer["finish_reason"], answer["ids"]) == (text, reason, tokens[:end])
        assert answer.get("logprobs", []) == pytest.approx(logprobs[:end], abs=1e-3)
    assert found == {}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_a_killed_run_continues(whole, tmp_path, seed):
    source, output, _ = whole
    data, cut = output.read_bytes(), tmp_path / "out.jsonl"
    cut.write_bytes(data[: random.Random(seed).randrange(len(data))])
    kept = cut.read_bytes().count(b"\n")
    done = run(source, cut, "--bad_lines=skip")
    assert f"{6 - kept} requests, {kept} more are answered already" in done.stdout
    assert answers(cut) == answers(output)


def test_a_finished_run_loads_nothing(whole):
    source, output, _ = whole
    before = output.read_bytes()
    assert run(source, output, "--bad_lines=skip").stdout == "0 requests, 6 more are answered already\n"
    assert output.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_a_run_between_steps(tmp_path, number):
    requests = [{"prompt": f"# {i}\n{CODE}", "max_tokens": 60} for i in range(400)]
    source, output = write_requests(tmp_path / "in.jsonl", requests), tmp_path / "out.jsonl"
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *map(str, command(source, output))], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 150
    while not (output.exists() and output.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    left = 400 - len(answers(output))
    assert left > 0
    assert f"stopped with {left} of 400 requests left; run the same command again to continue {output}" in said
    write_requests(source, requests[: 400 - left + 8])  # all of them would take long
    run(source, output)
    other = tmp_path / "other.jsonl"
    run(source, other)
    assert answers(output) == answers(other)


@pytest.mark.slow
def test_two_devices(whole, tmp_path):
    output = tmp_path / "out.jsonl"
    done = run(whole[0], output, "--bad_lines=skip", "--ep=2", "--wire_format=bf16", "--decode_buckets=1,3", devices=2)
    assert answers(output).keys() == answers(whole[1]).keys() and "preemptions: 0" in done.stdout


def test_the_script_refuses(whole, tmp_path):
    source, output, _ = whole
    good = write_requests(tmp_path / "good.jsonl", [{"prompt": "a"}])
    twice = write_requests(
        tmp_path / "twice.jsonl", [{"prompt": "a"}, {"prompt": "b", "id": "x"}, {"ids": [1], "id": 1}]
    )
    many = write_requests(tmp_path / "many.jsonl", [{"prompt": "a", "n": 2}, {"prompt": "a"}, *[{}] * 8])
    other = write_requests(tmp_path / "other.jsonl", [{"prompt": "another", "id": "drawn"}])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "notes.txt").write_text("do not lose this")
    new = f"--output={tmp_path}/new.jsonl"
    model = (f"--model={MODEL}", "--max_tokens=20")
    check_refusals(
        "serve_batch",
        {
            (*model, new, f"--input={source}", "--max_length=96"): f"line 4: {BAD} (--bad_lines=skip",
            (*model, new, f"--input={twice}"): "lines 1 and 3 have the same id 1",
            (*model, new, f"--input={many}"): "line 1: unknown keys: n; line 3: needs one of prompt, ids, ",
            (*model, new, f"--input={many}", "--seed=1"): "; 4 more (--bad_lines",
            (*model, new, f"--input={tmp_path}/empty.jsonl"): "has no lines",
            (*model, new, f"--input={tmp_path}/none.jsonl"): "none.jsonl cannot be read: No such file",
            (*model, new, f"--input={tmp_path}"): "cannot be read: Is a directory",
            (*model, f"--output={good}", f"--input={good}"): "--input and --output are the same file",
            (*model, f"--output={output}", f"--input={other}"): "line 1 has id 'drawn', as has line ",
            (*model, f"--output={output}", f"--input={source}", "--seed=1"): "which answers another prompt or other ",
            (*model, f"--output={tmp_path}/notes.txt", f"--input={good}"): "line 1 is no answer",
            (*model, new, f"--input={good}", "--top_p=2"): "--top_p must be above 0",
            (*model, new, f"--input={good}", "--stop="): "--stop must be text",
            (*model, new, f"--input={good}", "--max_length=5000"): "exceeds max_position_embeddings=2048",
            (*model, new, f"--input={good}", "--num_pages=3"): "a request of --max_length=2048 takes 32",
            (*model, new, f"--input={good}", "--decode_buckets=1,4"): "the largest is 4, not --max_requests=16",
            (*model, new, f"--input={good}", "--prefill_buckets=64,32"): "--prefill_buckets: ",
            (*model, new, f"--input={good}", "--wire_format=fp8"): "with --ep",
            (*model, new, f"--input={good}", "--ep=3"): "does not divide the model's 8 experts",
            (*model, new, f"--input={good}", "--ep=2"): "--ep=2: JAX sees 1 devices",
            (f"--model={tmp_path}", new, f"--input={good}"): "config.json does not exist",
        },
    )  # fmt: skip
    assert (tmp_path / "notes.txt").read_text() == "do not lose this"


# --- lines of the input ---

DEFAULTS = dict(zip(SETTINGS, (20, 0.0, 1.0, 0, 0.0, 0, (), False), strict=True))


def reader(template=None):
    return LineReader(ByteTokenizer(), lambda: template, 256, 96, (2,), DEFAULTS)


def read(line, template=None):
    return reader(template).read(7, line if isinstance(line, bytes) else json.dumps(line).encode())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', "not JSON: "),
        (b'{"prompt": "\xff"}', "not UTF-8 text: byte 0xff"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is no number of JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature must be 0 or a positive finite"),
        (b'{"prompt": "a", "top_p": 1' + b"0" * 400 + b"}", "top_p is too large"),
        (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "not JSON: "),
        ([], "not a JSON object"),
        ({"prompt": ""}, "prompt has 0 tokens; the model knows 256"),
        ({"prompt": 3}, "prompt must be text, got 3"),
        ({"prompt": "a", "ids": [1]}, "needs one of prompt, ids, messages, has prompt and ids"),
        ({"ids": None}, "has none"),
        ({"ids": []}, "ids has 0 tokens"),
        ({"ids": [True]}, "ids must be a list of token ids"),
        ({"ids": [1, 256]}, "ids has 2 tokens, from 1 to 256; the model knows 256"),
        ({"ids": [-1]}, "from -1 to -1"),
        ({"prompt": "a" * 77}, "77 tokens and 20 new ones exceed --max_length=96"),
        ({"prompt": "a", "max_tokens": 2.0}, "max_tokens must be a whole number"),
        ({"prompt": "a", "top_k": True}, "top_k must be a whole number"),
        ({"prompt": "a", "min_p": "0"}, "min_p must be a number"),
        ({"prompt": "a", "top_p": 0}, "top_p must be above 0"),
        ({"prompt": "a", "logprobs": 1}, "logprobs must be true or false"),
        ({"prompt": "a", "stop": ["x", ""]}, "stop must be text or a list"),
        ({"prompt": "a", "stop": {"x": 1}}, "stop must be text or a list"),
        ({"prompt": "a", "id": True}, "id must be text or a number"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no chat template"),
    ],
)
def test_a_bad_line_says_why(line, reason):
    with pytest.raises(BadLine) as error:
        read(line)
    assert reason in str(error.value) and error.value.id == 7


def test_a_bad_line_has_its_own_id():
    with pytest.raises(BadLine) as error:
        read({"id": "mine", "prompt": "a", "n": 2})
    assert error.value.id == "mine"


def test_a_request_has_its_own_settings_and_those_of_flags():
    found = read({"prompt": "ab", "stop": "x", "temperature": 1, "id": 1.5})
    assert (found.id, found.prompt_ids, found.stop, found.max_tokens) == (1.5, [97, 98], ("x",), 20)
    assert found.sampling.temperature == 1.0 and found.sampling.stop_ids == (2,)
    assert read({"prompt": "ab"}).id == 7
    hashes = [{"prompt": "ab"}, {"ids": [97, 98]}, {"prompt": "ab", "seed": 1}, {"prompt": "ab", "stop": ["ab"]}]
    assert len({read(line).hash for line in hashes}) == 4
    assert read({"prompt": "ab", "seed": 0, "id": "x"}).hash == read(b' {"prompt":"ab"}').hash


def test_messages_are_rendered_by_the_template(tmp_path):
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    config = {"chat_template": source + "{% if add_generation_prompt %}[assistant]{% endif %}", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.of_folder(tmp_path)
    found = read({"messages": [{"role": "user", "content": "Hi"}]}, template)
    assert bytes(found.prompt_ids) == b"<s>[user]Hi[assistant]"
    for messages in ([], "Hi", [{"role": "user"}], [{"content": "Hi"}], [["user", "Hi"]]):
        with pytest.raises(BadLine, match="messages must be a list"):
            read({"messages": messages}, template)
    with pytest.raises(BadLine, match="the chat template fails on these messages: no"):
        read({"messages": [{"role": "user", "content": "Hi"}]}, ChatTemplate("{{ raise_exception('no') }}"))


def test_what_can_be_read_once_is_kept(tmp_path, monkeypatch):
    data = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"b": "\x0b\xe2\x80\xa8"}'
    expected = [(1, b'{"a": 1}\r\n'), (4, b'{"b": "\x0b\xe2\x80\xa8"}')]
    (tmp_path / "a").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    for lines in (Lines("input", str(tmp_path / "a")), Lines("input", "-")):
        assert list(lines) == list(lines) == expected
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cp", "a", "pipe"], cwd=tmp_path):
        lines = Lines("input", str(tmp_path / "pipe"))
    assert list(lines) == list(lines) == expected


# --- lines of the output ---


def test_the_output_is_cut_to_whole_lines(tmp_path):
    path = tmp_path / "out.jsonl"
    file = AnswerFile("output", path)
    lines = [{"id": id, "request_hash": "f", "text": "é\n\u2028"} for id in (1, "a", 2.5)]
    for line in lines:
        file.append(line)
    with pytest.raises(app.UsageError, match="another run writes to it"):
        AnswerFile("output", path)
    file.close()
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole = data[:cut].count(b"\n")
        file = AnswerFile("output", path)
        assert file.found == {line["id"]: (i, "f") for i, line in enumerate(lines[:whole], 1)}
        for line in lines[whole:]:
            file.append(line)
        file.close()
        assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "line 1 is no answer"),
        ("[1]\n", "line 1 is no answer"),
        ('{"id": [1], "request_hash": ""}\n', "line 1 is no answer"),
        ('{"id": 1, "request_hash": ""}\nnotes', "line 2 is no answer"),
        ('{"id": 1, "request_hash": ""}\n' * 2, "lines 1 and 2 have the same id 1"),
    ],
)
def test_other_files_are_left_alone(tmp_path, text, message):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(app.UsageError, match=message):
        AnswerFile("output", path)
    assert path.read_text() == text
    with pytest.raises(app.UsageError, match="is no plain file"):
        AnswerFile("output", Path(os.devnull))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = AnswerFile("output", tmp_path / "out.jsonl")
    file.close()
    with Path("/dev/full").open("ab", buffering=0) as full:
        monkeypatch.setattr(file, "_file", full)
        with pytest.raises(app.UsageError, match="could not be written: No space left"):
            file.append({"id": 1})
