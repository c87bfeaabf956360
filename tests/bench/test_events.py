from __future__ import annotations

import json

import pytest

from benthic.bench.events import AnswerReader, EventReader


def event(**chunk: object) -> bytes:
    return f"data: {json.dumps(chunk)}\n\n".encode()


def text(words: str, **more: object) -> bytes:
    return event(choices=[{"index": 0, "text": words, "finish_reason": None}], **more)


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 9, "completion_tokens": tokens}


DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("cut", range(1, 40))
def test_events_are_whole_wherever_the_bytes_were_cut(cut: int) -> None:
    stream = b'data: {"a": 1}\r\n\r\n: a comment\nevent: x\ndata:[DONE]\n\n'
    reader = EventReader()
    assert [*reader.feed(stream[:cut]), *reader.feed(stream[cut:])] == [b'{"a": 1}', b"[DONE]"]


def test_running_usage_gives_each_delivery_its_number_of_tokens() -> None:
    reader = AnswerReader(0.0)
    reader.feed(1.0, text("a", usage=usage(1)))
    reader.feed(2.0, text("bcd", usage=usage(4)))
    reader.feed(3.0, text("", usage=usage(4)))
    reader.feed(4.0, event(choices=[], usage=usage(4)) + DONE)
    answer = reader.end(4.5)
    assert [(each.at_s, each.tokens) for each in answer.deliveries] == [(1.0, 1), (2.0, 3)]
    assert (answer.output_tokens, answer.prompt_tokens, answer.counted, answer.error) == (4, 9, True, None)


def test_a_token_whose_text_is_held_back_still_has_its_time() -> None:
    reader = AnswerReader(0.0)
    reader.feed(1.0, text("", usage=usage(1)))
    reader.feed(2.0, text("\N{WATER WAVE}", usage=usage(3)) + DONE)
    assert [(each.at_s, each.tokens) for each in reader.end(2.0).deliveries] == [(1.0, 1), (2.0, 2)]


def test_without_running_usage_a_chunk_counts_as_a_token_and_the_total_is_the_servers() -> None:
    reader = AnswerReader(0.0)
    reader.feed(1.0, text("a"))
    reader.feed(2.0, text("bcd"))
    reader.feed(3.0, event(choices=[], usage=usage(4)) + DONE)
    answer = reader.end(3.0)
    assert [each.tokens for each in answer.deliveries] == [1, 1]
    assert (answer.output_tokens, answer.counted) == (4, False)


def test_a_role_without_text_is_no_first_token() -> None:
    reader = AnswerReader(0.0)
    reader.feed(0.1, event(choices=[{"delta": {"role": "assistant", "content": ""}}]))
    reader.feed(0.2, event(choices=[{"delta": {"reasoning_content": "hm"}}]))
    reader.feed(0.3, event(choices=[{"delta": {"content": "yes"}, "finish_reason": "stop"}]) + DONE)
    answer = reader.end(0.4)
    assert [each.at_s for each in answer.deliveries] == [0.2, 0.3]
    assert answer.error is None


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (text("a"), "ended before the answer"),
        (DONE, "no token"),
        (text("a") + b"data: {broken\n\n" + DONE, "not a chunk"),
        (text("a") + event(error={"message": "the engine died", "code": 500}) + DONE, "the engine died"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(stream: bytes, words: str) -> None:
    reader = AnswerReader(0.0)
    reader.feed(1.0, stream)
    assert words in reader.end(2.0).error
