"""Serves the model of a checkpoint over HTTP, with OpenAI's API.

    python experiments/serve.py --model=experiments/checkpoints/tiny_lm
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "tiny_lm", "prompt": "def read_lines(path):", "max_tokens": 32, "temperature": 0}'

It serves /v1/completions, /v1/chat/completions (if the folder has a chat template), /v1/models, /health and /metrics,
and prints one line with its address when it is ready. It needs more packages: pip install 'fp4jax[serve]'.

Only this machine can reach it, unless --host names another address. Clients need a key if --api_key_file names a file
of them. The server has no encryption: where others can listen, put a proxy with TLS in front of it.

SIGTERM or Ctrl-C ends it: it refuses new requests with status 503, finishes those that run, and exits with status 0. A
second signal ends it at once. If the engine fails, it exits with status 1.
"""

from pathlib import Path

from absl import app, flags

from experiments.harness import engine_flags, script
from experiments.text.tokenizers import tokenizer_of
from fp4jax.engine import ChatTemplate

_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to serve on; 0.0.0.0 is every address of this machine.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to serve on; 0 takes a free one.", lower_bound=0, upper_bound=65535)
_API_KEY_FILE = flags.DEFINE_string(
    "api_key_file", None, "File with the keys that clients may use, one per line; default: no key is needed."
)
_SERVED_NAME = flags.DEFINE_string(
    "served_model_name", None, "Name that requests give as model; default: that of the folder."
)
_MAX_WAITING = flags.DEFINE_integer(
    "max_waiting", 256, "Requests that may wait; more are refused with status 429.", lower_bound=1
)
_MAX_BODY_BYTES = flags.DEFINE_integer(
    "max_body_bytes", 4 << 20, "Largest body of a request; larger ones are refused with status 413.", lower_bound=1
)
_MAX_PROMPT_TOKENS = flags.DEFINE_integer(
    "max_prompt_tokens", None, "Longest prompt; default: as long as --max_length allows.", lower_bound=1
)
_DEFAULT_MAX_TOKENS = flags.DEFINE_integer(
    "default_max_tokens", 256, "Most tokens of an answer whose request does not say so.", lower_bound=1
)
_SHUTDOWN_SECONDS = flags.DEFINE_integer(
    "shutdown_seconds", 60, "How long requests may go on after the signal that ends the server.", lower_bound=0
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        from fp4jax.engine.server import ApiServer, ServerOptions
        from fp4jax.engine.serving import GracefulServer, bind
    except ImportError as error:
        raise app.UsageError(str(error)) from error
    keys = api_keys()
    options = engine_flags.engine_options()
    tokenizer = tokenizer_of(options.folder, options.config)
    try:
        template = ChatTemplate.of_folder(options.folder)
    except (ImportError, ValueError, OSError) as error:
        raise app.UsageError(str(error)) from error
    limits = ServerOptions(
        _SERVED_NAME.value or options.folder.resolve().name, keys, _MAX_BODY_BYTES.value, _MAX_PROMPT_TOKENS.value,
        _DEFAULT_MAX_TOKENS.value,
    )  # fmt: skip
    try:
        bound = bind(_HOST.value, _PORT.value)
    except OSError as error:
        raise app.UsageError(f"--host={_HOST.value} --port={_PORT.value}: {error}") from error
    with bound:
        engine = engine_flags.load_engine(options, max_waiting=_MAX_WAITING.value)
        api = ApiServer(engine, tokenizer, limits, template=template, stop_ids=options.stop_ids)
        host, port = bound.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        ready = f"serving {limits.model_name} at {address}" + ("" if keys else ", without keys")
        GracefulServer(api, _SHUTDOWN_SECONDS.value).serve_forever(bound, lambda: print(ready, flush=True))


def api_keys() -> tuple[str, ...]:
    """The keys in --api_key_file; none if the flag is not given.

    Raises:
      app.UsageError: the file cannot be read, or has no keys, or one that cannot stand in a header of HTTP.
    """
    if _API_KEY_FILE.value is None:
        return ()
    name = f"--api_key_file={_API_KEY_FILE.value}"
    try:
        lines = Path(_API_KEY_FILE.value).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise app.UsageError(f"{name}: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise app.UsageError(f"{name} has no keys")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise app.UsageError(f"{name}: keys consist of ASCII letters, digits and signs")
    return keys


if __name__ == "__main__":
    script.run(main)
