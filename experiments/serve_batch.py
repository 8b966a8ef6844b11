"""Answers a file of requests with the model of a checkpoint, many of them at a time.

    python experiments/serve_batch.py --model=experiments/checkpoints/tiny_lm --input=in.jsonl --output=out.jsonl

A line of the input is a JSON object with one of `prompt` (text), `ids` (token ids) and `messages` (a chat, for the chat
template of the folder). It may have an `id` (text or a number; default: the number of the line), `max_tokens`,
`temperature`, `top_p`, `top_k`, `min_p`, `seed`, `stop` (a text or several: the answer ends before the first of them)
and `logprobs` (true or false); the flags of these names are for lines without them.

A line of the output has `id`, `request_hash`, `text`, `ids` (with the token that ended the answer), `finish_reason`
("stop" or "length"), `prompt_tokens`, and `logprobs` if asked for. It is written when the answer is finished. A run
that was stopped continues when it is started again with the same arguments: what the output has is not computed again.
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags
from tqdm import tqdm

from experiments.harness import engine_flags, outputs, rates, script
from experiments.harness.engine_flags import EngineOptions
from experiments.harness.interrupts import Interrupts
from experiments.text.answer_lines import AnswerFile
from experiments.text.request_lines import SETTINGS, BadLine, LineReader, Lines, RequestId, RequestLine, check_settings
from experiments.text.tokenizers import tokenizer_of
from fp4jax.engine import ChatTemplate, Engine, TextStream

_MOST_WAITING = 256  # requests that the engine has beyond those that run; the others stay in the input
_MOST_SHOWN = 5  # bad lines

_INPUT = flags.DEFINE_string(
    "input", None, "File of requests, JSON objects in lines; -: standard input.", required=True
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "File of answers, JSON objects in lines; answers that it has are kept.", required=True
)
_BAD_LINES = flags.DEFINE_enum(
    "bad_lines",
    "fail",
    ["fail", "skip"],
    "What to do if a line is not a request: nothing runs, or the output says what is wrong with it.",
)
_DEFAULTS = [
    flags.DEFINE_integer("max_tokens", 256, "Most tokens of an answer.", lower_bound=1),
    flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token; larger values draw tokens."),
    flags.DEFINE_float("top_p", 1.0, "Draw from the fewest most likely tokens whose probabilities sum to this."),
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all."),
    flags.DEFINE_float("min_p", 0.0, "Draw from tokens at least this many times as likely as the likeliest."),
    flags.DEFINE_integer("seed", 0, "Seed of the drawn tokens of each request."),
    flags.DEFINE_multi_string("stop", [], "Text that ends an answer and is not part of it; may be repeated."),
    flags.DEFINE_bool("logprobs", False, "Write the logarithms of the probabilities of the tokens."),
]


class Plan(NamedTuple):
    """What a first reading of the input found.

    Attributes:
      hashes: the ids of the lines that the output has no answer to -> hash of the request.
      finished: lines that it has an answer to.
      draws: whether a request has a temperature above 0.
    """

    hashes: dict[RequestId, str]
    finished: int
    draws: bool


class Answer:
    """An answer that grows.

    Args:
      request: what is answered.
      tokenizer: makes text of its tokens.
    """

    def __init__(self, request: RequestLine, tokenizer: Any):
        self.request = request
        self._stream = TextStream(tokenizer, request.stop)
        self._text: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._reason: str | None = None

    def add(self, tokens: list[int], reason: str | None, logprobs: list[float] | None) -> bool:
        """Take new tokens, as `Generated` has them; whether the answer is finished."""
        self._ids += tokens
        self._logprobs += logprobs or []
        self._text.append(self._stream.push(tokens[:-1] if reason == "stop" else tokens))
        if reason is not None:
            self._text.append(self._stream.finish())
        if self._stream.stopped:
            reason = "stop"
            del self._ids[self._stream.num_tokens :], self._logprobs[self._stream.num_tokens :]
        self._reason = reason
        return reason is not None

    def line(self) -> dict[str, Any]:
        """What the output says about it."""
        found: dict[str, Any] = {
            "id": self.request.id, "request_hash": self.request.hash, "text": "".join(self._text), "ids": self._ids,
            "finish_reason": self._reason, "prompt_tokens": len(self.request.prompt_ids),
        }  # fmt: skip
        return found | {"logprobs": self._logprobs} if self.request.logprobs else found


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    path = outputs.check_file("output", _OUTPUT.value)
    options = engine_flags.engine_options()
    reader = line_reader(options)
    if _INPUT.value != "-" and path.exists() and Path(_INPUT.value).exists() and path.samefile(_INPUT.value):
        raise app.UsageError("--input and --output are the same file")
    lines = Lines("input", _INPUT.value)
    output = AnswerFile("output", path)
    try:
        plan = first_reading(lines, reader, output)
        print(f"{len(plan.hashes)} requests, {plan.finished} more are answered already", flush=True)
        if not plan.hashes:
            return 0
        with Interrupts("Stopping; a second signal ends the run at once.") as interrupts:
            engine = engine_flags.load_engine(options, draws=plan.draws)
            start, total = time.perf_counter(), len(plan.hashes) + plan.finished
            with tqdm(total=total, initial=plan.finished, unit="request") as progress:
                most = options.capacity + _MOST_WAITING
                requests = pending(lines, reader, plan)
                serve(engine, requests, most, output, reader.tokenizer, progress, interrupts)
        print(summary(engine, progress.n - plan.finished, time.perf_counter() - start))
        if interrupts.status:
            left = f"stopped with {total - progress.n} of {total} requests left"
            print(f"{left}; run the same command again to continue {path}", file=sys.stderr)
        return interrupts.status
    finally:
        output.close()


def line_reader(options: EngineOptions) -> LineReader:
    """What checks lines, with the flags as defaults.

    Raises:
      app.UsageError: the value of a flag is not allowed, or the folder's tokenizer cannot be used.
    """
    try:
        defaults = check_settings(dict(zip(SETTINGS, (_flag(name) for name in SETTINGS), strict=True)))
    except ValueError as error:
        raise app.UsageError(f"--{error}") from error

    @functools.cache
    def chat_template() -> ChatTemplate | None:
        try:
            return ChatTemplate.of_folder(options.folder)
        except (ImportError, ValueError, OSError) as error:
            raise app.UsageError(str(error)) from error

    tokenizer, config = tokenizer_of(options.folder, options.config), options.config
    return LineReader(tokenizer, chat_template, config.vocab_size, options.max_length, options.stop_ids, defaults)


def _flag(name: str) -> Any:
    return next(flag.value for flag in _DEFAULTS if flag.name == name)


def first_reading(lines: Lines, reader: LineReader, output: AnswerFile) -> Plan:
    """Check all lines before anything runs.

    Raises:
      app.UsageError: a line is bad and --bad_lines=fail; an id is not unique; or the output has an answer to another
        request of the same id.
    """
    numbers: dict[RequestId, int] = {}
    hashes: dict[RequestId, str] = {}
    bad: list[str] = []
    draws = False
    for number, line in lines:
        request = read(reader, number, line)
        if isinstance(request, BadLine):
            bad.append(f"line {number}: {request}")
        if (other := numbers.setdefault(request.id, number)) != number:
            raise app.UsageError(f"--input={_INPUT.value}: lines {other} and {number} have the same id {request.id!r}")
        found, hash = output.found.get(request.id, (0, None))
        if hash is None:
            hashes[request.id] = request.hash
            draws = draws or (isinstance(request, RequestLine) and request.sampling.temperature > 0)
        elif hash != request.hash:
            raise app.UsageError(
                f"--input={_INPUT.value}: line {number} has id {request.id!r}, as has line {found} of the output, "
                "which answers another prompt or other settings; name another --output"
            )
    if not numbers:
        raise app.UsageError(f"--input={_INPUT.value} has no lines")
    if bad:
        more = f"; {len(bad) - _MOST_SHOWN} more" if len(bad) > _MOST_SHOWN else ""
        said = f"--input={_INPUT.value}: {'; '.join(bad[:_MOST_SHOWN])}{more}"
        if _BAD_LINES.value == "fail":
            raise app.UsageError(f"{said} (--bad_lines=skip answers the others)")
        print(f"skipped: {said}", file=sys.stderr)
    return Plan(hashes, len(numbers) - len(hashes), draws)


def read(reader: LineReader, number: int, line: bytes) -> RequestLine | BadLine:
    """The request of a line, or what is wrong with it."""
    try:
        return reader.read(number, line)
    except BadLine as error:
        return error


def pending(lines: Lines, reader: LineReader, plan: Plan) -> Iterator[RequestLine | BadLine]:
    """Read the lines again, one by one while there is room for them; those without an answer.

    Raises:
      app.UsageError: the input is not what it was.
    """
    for number, line in lines:
        request = read(reader, number, line)
        if request.id in plan.hashes:
            if plan.hashes[request.id] != request.hash:
                raise app.UsageError(f"--input={_INPUT.value}: line {number} has changed while it was read")
            yield request


def serve(
    engine: Engine, requests: Iterator[RequestLine | BadLine], most: int, output: AnswerFile, tokenizer: Any,
    progress: tqdm, interrupts: Interrupts,
) -> None:  # fmt: skip
    """Answer the requests, at most `most` of them at a time, and write each answer when it is finished."""
    running: dict[int, Answer] = {}
    start, tokens = time.perf_counter(), 0

    def write(values: dict[str, Any]) -> None:
        output.append(values)
        progress.update()

    try:
        while not interrupts.status:
            new = list(itertools.islice(requests, most - len(running)))
            if not new and not running:
                return
            for request in new:
                if isinstance(request, BadLine):
                    write({"id": request.id, "request_hash": request.hash, "error": str(request)})
                else:
                    running[submit(engine, request)] = Answer(request, tokenizer)
            for event in engine.step():
                answer = running.get(event.id)
                if answer is None:  # it was cancelled at a stop string
                    continue
                tokens += len(event.tokens)
                if answer.add(event.tokens, event.finish_reason, event.logprobs):
                    engine.cancel(event.id)
                    del running[event.id]
                    write(answer.line())
            progress.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s", refresh=False)
    finally:
        for id in running:
            engine.cancel(id)
        while not engine.is_idle:  # a process that ends while programs run is aborted
            engine.step()


def submit(engine: Engine, request: RequestLine) -> int:
    """Give a request to the engine; its number there."""
    return engine.submit(
        request.prompt_ids, request.max_tokens, logprobs=request.logprobs, **dataclasses.asdict(request.sampling)
    )


def summary(engine: Engine, requests: int, seconds: float) -> str:
    """Two lines of text about a run."""
    report = engine.report()
    rate = rates.tokens_per_s(report.generated_tokens, seconds)
    shared = report.shared_tokens / max(1, report.prompt_tokens)
    return (
        f"{requests} requests: {report.prompt_tokens} prompt tokens, {report.generated_tokens} generated tokens in "
        f"{seconds:.1f} s: {'not measured' if rate is None else f'{rate:.1f} tokens/s'}\n"
        f"found in the prefix cache: {shared:.1%} of the prompt tokens; preemptions: {report.preemptions}"
    )


if __name__ == "__main__":
    script.run(main)
