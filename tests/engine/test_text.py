"""Text of answers as it streams, and chat templates: the same text however tokens arrive, and no way out of Jinja."""

import builtins
import datetime
import json

import pytest
from hypothesis import given, settings, strategies as st

from fp4jax.engine import ChatTemplate, TextStream


class Bytes:
    """Tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Pieces:
    """Tokens are the pieces of a SentencePiece vocabulary: ▁ is a space, <0x..> a byte, a special token no text."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        tokenizers = pytest.importorskip("tokenizers")
        decoders = tokenizers.decoders
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        return decoders.Sequence(parts).decode([self.pieces[i] for i in ids if self.pieces[i] != "<special>"])


def streamed(tokenizer, ids, stop=(), step=1):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
    return "".join([*pieces, stream.finish()]), stream


@given(st.binary(max_size=40) | st.text(max_size=12).map(str.encode), st.integers(1, 9))
@settings(max_examples=15)
def test_text_is_that_of_all_tokens(data, step):
    text, stream = streamed(Bytes(), list(data), step=step)
    assert text == data.decode(errors="replace")
    assert stream.num_tokens == len(data) and not stream.stopped


@given(st.text("abé€", max_size=20), st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3), st.integers(1, 9))
def test_the_first_complete_stop_string_ends_the_text(whole, stop, step):
    text, stream = streamed(Bytes(), list(whole.encode()), stop, step)
    ends = [end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(stop))] if stop else []
    if not ends:
        assert text == whole and not stream.stopped
        return
    longest = max(len(s) for s in stop if whole[: ends[0]].endswith(s))
    assert text == whole[: ends[0] - longest]
    assert stream.stopped and stream.num_tokens == len(whole[: ends[0]].encode())


def test_what_is_returned_is_final():
    stream = TextStream(Bytes(), ["\n\n", "END"])
    assert [stream.push([byte]) for byte in "a\nbé€".encode()] == ["a", "", "\nb", "", "é", "", "", "€"]
    assert [stream.push(list(text)) for text in (b"E", b"N", b"N\n", b"EN")] == ["", "", "ENN", "\n"]
    assert stream.push(b"D and more") == "" and stream.stopped
    assert stream.push(b"even more") == "" and stream.finish() == ""
    assert stream.num_tokens == len("a\nbé€ENN\nEND".encode())


def test_what_stays_incomplete_comes_at_the_end():
    stream = TextStream(Bytes(), ["ab"])
    assert stream.push(b"xa") == "x"
    assert stream.finish() == "a"
    stream = TextStream(Bytes(), ["a\N{REPLACEMENT CHARACTER}"])
    assert stream.push(b"xa\xe2\x82") == "x" and stream.finish() == "" and stream.stopped


def test_noise_is_not_held_forever():
    stream = TextStream(Bytes())
    assert len(stream.push(b"\xff" * 100)) >= 64
    assert stream.push(b"a") == "\N{REPLACEMENT CHARACTER}" * 36 + "a"


def test_spaces_at_the_start_of_pieces_and_bytes_of_characters():
    tokenizer = Pieces("▁Hello", "▁wor", "ld", "<special>", "<0xE2>", "<0x82>", "<0xAC>", "▁", "é")
    ids = [0, 1, 2, 3, 1, 4, 5, 6, 4, 5, 6, 7, 8, 3, 3, 0]
    assert tokenizer.decode(ids) == "Hello world wor€€ é Hello"
    for step in (1, 3, 20):
        assert streamed(tokenizer, ids, step=step)[0] == tokenizer.decode(ids)
        assert streamed(tokenizer, ids, ["€ é"], step)[0] == "Hello world wor€"
    assert streamed(tokenizer, [3, 0, 1])[0] == tokenizer.decode([3, 0, 1]) == "Hello wor"


@pytest.mark.parametrize("stop", ["text", [""], ["a", ""]])
def test_stop_strings_are_a_list_of_texts(stop):
    with pytest.raises(ValueError, match="stop must be a list of texts"):
        TextStream(Bytes(), stop)


# --- chat templates ---

SOURCE = """\
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'tool' %}
        {{ raise_exception('no tools here') }}
    {% endif %}
<|{{ message['role'] }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
<|assistant|>
{%- endif %}
"""
CHAT = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": "Hi <you> & me"}]
RENDERED = "<s>\n<|system|>Be brief.</s>\n<|user|>Hi <you> & me</s>\n"


def folder_with(folder, config=None, template=None):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "pad_token": None}


@pytest.mark.parametrize(
    ("chat_template", "template"),
    [
        (SOURCE, None),
        (None, SOURCE),
        ("the file wins", SOURCE),
        ([{"name": "tool_use", "template": "other"}, {"name": "default", "template": SOURCE}], None),
    ],
)
def test_a_template_has_several_homes(tmp_path, chat_template, template):
    folder = folder_with(tmp_path, {**TOKENS, "chat_template": chat_template}, template)
    chat = ChatTemplate.of_folder(folder)
    assert chat.render(CHAT) == RENDERED + "<|assistant|>"
    assert chat.render(CHAT, add_generation_prompt=False) == RENDERED


def test_a_folder_may_have_no_template(tmp_path):
    assert ChatTemplate.of_folder(tmp_path) is None
    assert ChatTemplate.of_folder(folder_with(tmp_path, TOKENS)) is None


def test_what_templates_expect_to_find():
    one = [{"role": "user", "content": "é <b>"}]
    assert ChatTemplate("{{ messages | tojson }}").render(one) == json.dumps(one, ensure_ascii=False)
    assert ChatTemplate("{{ messages[0] | tojson(indent=2) }}").render(one) == json.dumps(
        one[0], indent=2, ensure_ascii=False
    )
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(one) in {str(datetime.datetime.now().year), "2026"}
    assert ChatTemplate("{% for m in messages %}{% break %}{% endfor %}{{ tools is none }}").render(one) == "True"
    assert ChatTemplate("{{ tools }}{{ thinking }}").render(one, tools=3, thinking=True) == "3True"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "fails on these messages"),
        ("{{ nothing.at_all }}", "undefined"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source).render(CHAT)


def test_a_template_sees_no_attributes_of_python():
    assert ChatTemplate("<{{ ''.__class__ }}{{ messages.__len__ }}>").render(CHAT) == "<>"


@pytest.mark.parametrize("messages", [[], [{"content": "a"}], ["a"], [{"role": 1}]])
def test_messages_have_roles(messages):
    with pytest.raises(ValueError, match="at least one message with a role"):
        ChatTemplate("a").render(messages)


@pytest.mark.parametrize("config", [{"chat_template": "{% for %}"}, {"chat_template": 3}])
def test_a_broken_template_is_named(tmp_path, config):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: "):
        ChatTemplate.of_folder(folder_with(tmp_path, config))


def test_a_missing_jinja_is_named(monkeypatch):
    import_module = builtins.__import__

    def without_jinja(name, *rest, **more):
        if name.startswith("jinja2"):
            raise ImportError(name)
        return import_module(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_jinja)
    with pytest.raises(ImportError, match=r"pip install 'fp4jax\[serve\]'"):
        ChatTemplate("a")
