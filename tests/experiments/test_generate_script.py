"""experiments/generate.py as users run it: the serving system's own command line, a tokenizer, bytes, devices."""

import io
import json
import os
import shutil
import sys

import pytest
from absl import app
from python_runs import ROOT, run_python
from quantization_sections import REFERENCE
from quantized_folders import make_folder, plain_folder
from refusals import check_refusals
from small_folders import add_tokenizer

from experiments.harness import rates
from experiments.text.files import check_text, read_text
from experiments.text.tokenizers import tokenizer_of

__all__ = ["make_folder", "plain_folder"]  # fixtures


def run(*arguments, devices=1):
    settings = {"jax_num_cpu_devices": devices, "jax_disable_most_optimizations": True}
    command = [ROOT / "experiments" / "generate.py", *arguments]
    done = run_python(*command, settings=settings, warnings="ignore", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_command_line_of_the_serving_system(make_folder, tmp_path_factory):
    folder, _ = make_folder("modelopt")
    add_tokenizer(folder)
    out = tmp_path_factory.mktemp("out")
    (out / "prompt.txt").write_text("w3 w1 w30\n")
    common = (f"--model={folder}", f"--quantization={REFERENCE}", f"--prompt_file={out}/prompt.txt")
    options = (f"--json={out}/a.json", "--block_graph_sizes=4,8", "--block_graph_debug", "--max_new_tokens=4")
    text = run(*common, *options)
    assert "linear layers BlockFP8Linear, experts NVFP4Tensor" in text
    report = json.loads((out / "a.json").read_text())
    assert report["prompt_ids"] == [3, 1, 30] and len(report["ids"]) == 4
    assert report["text"].split() == [f"w{i}" for i in report["ids"]]
    # Four tokens are too few for a rate.
    assert report["prefill_tokens_per_s"] is None and report["decode_tokens_per_s"] is None
    assert "prefill: not measured, decoding: not measured" in text
    assert "ran in blocks compiled ahead of time, ep=1\n" in text
    assert report["ran"] == "in blocks compiled ahead of time"
    assert (report["ep"], report["wire_format"]) == (1, None)


@pytest.mark.slow
def test_a_program_store_makes_the_second_start_short(make_folder, tmp_path):
    folder, _ = make_folder("modelopt")
    add_tokenizer(folder)
    command = [ROOT / "experiments" / "generate.py", f"--model={folder}", "--prompt=w3 w1 w30", "--max_new_tokens=4"]
    command += ["--block_graph_sizes=4", "--block_graph_debug", f"--program_store={tmp_path / 'programs'}"]
    settings = {"jax_disable_most_optimizations": True, "jax_enable_compilation_cache": False}
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    runs = [run_python(*command, f"--json={file}", settings=settings, warnings="ignore") for file in files]
    for done, word, other in zip(runs, ("compiled", "found"), ("found", "compiled"), strict=True):
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{word} layers for 4 tokens in" in done.stderr and f" {other} layers for" not in done.stderr
    first, second = (json.loads(file.read_text())["ids"] for file in files)
    assert first == second and len(first) == 4


@pytest.mark.slow
def test_a_cache_in_fp8_has_a_line_and_a_flag(make_folder):
    """The folder asks for it; one flag turns it off, and the same flag asks for it without the folder."""
    folder, _ = make_folder("modelopt")
    add_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    common = (f"--model={folder}", "--prompt=w3 w1 w30", "--max_new_tokens=2", "--block_graph_sizes=4")
    usual = config["dtype"] if "dtype" in config else config["torch_dtype"]
    assert "keys and values are cached in FP8 (e4m3), as asked\n" in run(*common, "--cache_format=fp8")
    config["quantization_config"]["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "dynamic": False}
    (folder / "config.json").write_text(json.dumps(config))
    assert "FP8 (e4m3), as the folder asks; --cache_format=compute turns it off\n" in run(*common)
    assert f"keys and values are cached in {usual}\n" in run(*common, "--cache_format=compute")


@pytest.mark.parametrize(
    ("tokens", "prefill", "whole", "expected"),
    [
        (64, 0.5, 1.0, (32.0, 126.0)),
        (1, 0.5, 0.5, (32.0, None)),  # no step at all
        (8, 0.5, 1.0, (32.0, None)),  # 7 steps
        (9, 0.5, 1.0, (32.0, 16.0)),
        (64, 0.5, 0.5, (32.0, None)),  # no time at all
        (64, 0.5, 0.4, (32.0, None)),
        (64, 0.5, 0.55, (32.0, None)),  # the difference of two times that are ten times as long
        (64, 0.0009, 0.0012, (None, None)),
    ],
)
def test_rates_are_measured_or_none(tokens, prefill, whole, expected):
    found = rates.of_run(16, tokens, prefill, whole, 2.0)
    assert (found["prefill_tokens_per_s"], found["decode_tokens_per_s"]) == expected
    text = rates.as_text({"ran": "as one program", "ep": 2, "wire_format": "fp8"}, found)
    assert text.count("not measured") == expected.count(None)
    assert text.endswith("ran as one program, ep=2, tokens cross in fp8")


@pytest.mark.slow
def test_bytes_and_devices(tmp_path):
    """The committed model, its experts quantized while loading, on two devices with tokens in NVFP4 between them."""
    mixed = '{"quantization": "mix_quant", "moe_quant_type": "modelopt_fp4"}'
    common = (
        f"--model={ROOT}/experiments/checkpoints/tiny_lm",
        "--prompt=def read_lines(path):\n",
        f"--json={tmp_path}/a.json",
    )
    run(*common, f"--quantization={mixed}", "--ep=2", "--max_new_tokens=12", devices=2)
    report = json.loads((tmp_path / "a.json").read_text())
    assert bytes(report["ids"]).decode(errors="replace") == report["text"]
    assert report["text"].startswith("    ")  # a function's body
    assert (report["ep"], report["wire_format"]) == (2, "nvfp4")
    run(*common, f"--quantization={mixed}", "--noblock_graph", "--max_new_tokens=12")
    assert json.loads((tmp_path / "a.json").read_text())["ids"][:4] == report["ids"][:4]
    said = run(*common, "--temperature=0.7", "--seed=3", "--max_new_tokens=5")
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["ids"]) == 5 and "ran in blocks compiled ahead of time" in said
    run(*common, "--temperature=0.7", "--seed=3", "--max_new_tokens=5", "--top_p=0.9", "--top_k=50")
    assert len(json.loads((tmp_path / "a.json").read_text())["ids"]) == 5


def test_a_broken_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(app.UsageError, match=r"tokenizer\.json is not a tokenizer: "):
        tokenizer_of(tmp_path, None)


def bytes_tokenizer(folder, *, dropout=None, **state):
    """A tokenizer.json that makes a token of every byte, but for pairs of `a`, with what a tool left in it."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, "aa"])}
    model = tokenizers.models.BPE(vocab=vocab, merges=[("a", "a")], dropout=dropout)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([tokenizers.AddedToken("<pad>", special=True)])
    (folder / "tokenizer.json").write_text(json.dumps({**json.loads(tokenizer.to_str()), **state}))
    return tokenizer_of(folder, None)


CUT = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
FILL = {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 257, "pad_type_id": 0,
        "pad_token": "<pad>"}  # fmt: skip


@pytest.mark.parametrize("state", [{"truncation": CUT}, {"padding": FILL}, {"truncation": CUT, "padding": FILL}])
def test_how_a_tool_cut_and_padded_is_no_concern_of_a_prompt(tmp_path, state):
    text = "The quick brown fox."
    expected = bytes_tokenizer(tmp_path).encode(text)
    assert len(expected) == len(text)
    assert bytes_tokenizer(tmp_path, **state).encode(text) == expected


def test_tokens_are_not_drawn(tmp_path):
    tokenizer = bytes_tokenizer(tmp_path, dropout=0.5)
    assert {tuple(tokenizer.encode("aa" * 20)) for _ in range(5)} == {(256,) * 20}


def test_what_the_file_adds_to_every_text_stays(tmp_path):
    begin = {"SpecialToken": {"id": "<pad>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [257], "tokens": ["<pad>"]}},
    }  # fmt: skip
    plain = bytes_tokenizer(tmp_path).encode("fox")
    tokenizer = bytes_tokenizer(tmp_path, post_processor=processor, truncation=CUT)
    assert tokenizer.encode("fox") == [257, *plain]
    assert tokenizer.encode("<pad>fox", special_tokens=False) == [257, *plain]  # a chat has its own


@pytest.mark.parametrize("token", ["<pad>", {"content": "<pad>", "special": True}])
def test_a_begin_token_has_two_homes(tmp_path, token):
    """tokenizer_config.json may want one that tokenizer.json does not add; it is never added twice."""
    plain = bytes_tokenizer(tmp_path).encode("fox")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"add_bos_token": True, "bos_token": token}))
    assert bytes_tokenizer(tmp_path).encode("fox") == [257, *plain]
    assert bytes_tokenizer(tmp_path).encode("fox", special_tokens=False) == plain
    begin = {"SpecialToken": {"id": "<pad>", "type_id": 0}}
    processor = {
        "type": "TemplateProcessing", "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [257], "tokens": ["<pad>"]}},
    }  # fmt: skip
    assert bytes_tokenizer(tmp_path, post_processor=processor).encode("fox") == [257, *plain]
    for other in ({"add_bos_token": False, "bos_token": token}, {"bos_token": token}, {"add_bos_token": True}):
        config.write_text(json.dumps(other))
        assert bytes_tokenizer(tmp_path).encode("fox") == plain
    for bad in (5, ["<pad>"], {"content": 5}):
        config.write_text(json.dumps({"add_bos_token": True, "bos_token": bad}))
        with pytest.raises(app.UsageError, match=r"bos_token .* must be text"):
            bytes_tokenizer(tmp_path)
    config.write_text(json.dumps({"add_bos_token": True, "bos_token": "<none>"}))
    with pytest.raises(app.UsageError, match=r"bos_token '<none>' is no token"):
        bytes_tokenizer(tmp_path)


def test_text_of_a_file_or_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffé w1\r\n".encode())
    assert read_text("prompt_file", str(file)) == "é w1\n"  # without the byte order mark
    assert read_text("prompt_file", str(file), 2) == "é "
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("w3 é".encode())))
    assert read_text("prompt_file", "-") == "w3 é"


def test_bad_text_is_refused_in_a_sentence(tmp_path):
    latin, blank = tmp_path / "latin.txt", tmp_path / "blank.txt"
    latin.write_bytes("plain é".encode("latin-1") + b" and more")
    blank.write_text(" \n\t\n")
    for name, message in (
        (latin, "is not UTF-8 text: byte 0xe9, "),
        (blank, "has no text"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / "none.txt", "cannot be read: No such file or directory"),
        ("a\0b", "cannot be read: embedded null byte"),
    ):
        with pytest.raises(app.UsageError) as raised:
            read_text("calibration", str(name))
        assert str(raised.value).startswith(f"--calibration={name} {message}")
    with pytest.raises(app.UsageError, match=r"--prompt is not UTF-8 text: byte 0xe9 at character 2"):
        check_text("prompt", os.fsdecode(b"ab\xe9c"))
    with pytest.raises(app.UsageError, match="--prompt is empty"):
        check_text("prompt", "")


def test_bad_flags_are_refused(tmp_path):
    """Before any weight is read: the folder has none."""
    source = ROOT / "experiments" / "checkpoints" / "tiny_lm"
    (tmp_path / "empty").mkdir()
    shutil.copy(source / "config.json", tmp_path)
    model = f"--model={tmp_path}"
    (tmp_path / "text").write_bytes(b"\xff\xfet\0")
    below_a_file = f"{tmp_path}/config.json/a.json"
    clash = "tokens are drawn in blocks, with a --temperature above 0"
    check_refusals(
        "generate",
        {
            (f"--model={tmp_path}/empty",): "config.json does not exist",
            (f"--model={tmp_path}/config.json",): "config.json does not exist",
            (f"--model={source}", "--quantization={"): "not JSON",
            (f"--model={source}", "--quantization=wint2"): "quantization='wint2' is not supported",
            (model, "--ep=1000"): "--ep=1000: JAX sees",
            (model, "--ep=3"): "--ep=3 does not divide the model's 8 experts",
            (model, "--low_latency"): "--low_latency is about decode steps across devices",
            (model, "--prompt="): "--prompt is empty",
            (model, "--prompt_file=-", "--prompt=a"): "--prompt and --prompt_file exclude each other",
            (model, f"--prompt_file={tmp_path}/text"): "/text is not UTF-8 text: byte 0xff",
            (model, f"--prompt_file={tmp_path}"): f"--prompt_file={tmp_path} cannot be read: Is a directory",
            (model, "--max_new_tokens=100000"): "exceed max_position_embeddings",
            (model, "--top_k=3", "--min_p=0.1"): f"--top_k and --min_p: {clash}",
            (model, "--temperature=1", "--top_p=0.5", "--noblock_graph"): f"--top_p: {clash}",
            (model, "--temperature=1", "--top_p=0"): "top_p must be above 0 and at most 1",
            (model, "--noblock_graph", "--block_graph_sizes=8"): "--noblock_graph contradict each other",
            (model, "--wire_format=fp8"): "--wire_format says how tokens cross between devices: with --ep",
            (model, "--temperature=nan"): "--temperature=nan must be finite",
            (model, f"--json={below_a_file}"): f"--json={below_a_file}: there is no folder {tmp_path}/config.json",
            (model, f"--json={tmp_path}"): f"--json={tmp_path} is a folder",
            (model, "--seed=-1"): "--seed",
            (model, "stray"): "unexpected arguments",
            (): "--model",
        },
        devices=4,
    )
