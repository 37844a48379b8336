"""Conversations as calibration text: written out by the model's own chat template."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from calibration.windows import make_windows, read_text
from checkpoint.errors import UserError

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
CHAT = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]


@pytest.fixture
def tokenizer(models):
    found = AutoTokenizer.from_pretrained(models("llama"))
    found.chat_template = TEMPLATE
    return found


def written(tmp_path, *records):
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_conversation_is_written_out_with_its_special_tokens(tokenizer, tmp_path):
    path = written(tmp_path, *[{"messages": CHAT}] * 20)
    assert next(read_text(path, tokenizer)) == "<s>user: two and two?</s><s>assistant: four</s>\n\n"
    windows = make_windows(tokenizer, [path], 64, 32, 0, 272)
    ids = windows.ids.flatten().tolist()
    assert tokenizer.bos_token_id in ids and tokenizer.eos_token_id in ids
    assert "<s>assistant: four</s>" in tokenizer.decode(ids)


def test_a_template_that_writes_the_date_gives_the_same_text_every_day(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }}" + TEMPLATE
    assert next(read_text(written(tmp_path, {"messages": CHAT}), tokenizer)).startswith("01 Jan 2026<s>user")


def test_text_goes_before_messages(tokenizer, tmp_path):
    assert next(read_text(written(tmp_path, {"text": "plain", "messages": CHAT}), tokenizer)) == "plain\n\n"


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (None, CHAT, "no chat template"),
        (TEMPLATE + "{{ raise_exception('no') }}", CHAT, "cannot write out"),
        (TEMPLATE, [3], "no list of"),
        (TEMPLATE, [{"from": "human", "value": "ab"}], "no list of"),
        (TEMPLATE, [CHAT], "no list of"),
    ],
)
def test_what_cannot_be_written_out_is_told_in_one_line(tokenizer, tmp_path, template, messages, reason):
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=reason):
        next(read_text(written(tmp_path, {"messages": messages}), tokenizer))
