from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benthic.serve.chat_parts import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    SEPARATOR,
    PartReader,
    PartRules,
    Parts,
)

V3 = (
    f"Let me look.{CALLS_BEGIN}{CALL_BEGIN}function{SEPARATOR}weather\n```json\n"
    f'{{"city": "Köln"}}\n```{CALL_END}\n{CALL_BEGIN}function{SEPARATOR}clock\n```json\n{{}}\n```'
    f"{CALL_END}{CALLS_END}"
)
V31 = (
    f'<think>two calls < three</think>{CALLS_BEGIN}{CALL_BEGIN}weather{SEPARATOR}{{"city": "Köln"}}{CALL_END}'
    f"{CALL_BEGIN}clock{SEPARATOR}{{}}{CALL_END}{CALLS_END}"
)
CALLS = [("weather", '{"city": "Köln"}'), ("clock", "{}")]
V3_RULES = PartRules(tools="deepseek_v3")
V31_RULES = PartRules(tools="deepseek_v31", reasoning=True)


def read(rules: PartRules, pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
    """Reasoning, content and calls of all the pieces."""
    reader = PartReader(rules)
    whole = Parts()
    calls: dict[int, list[str]] = {}
    for parts in (*(reader.push(piece) for piece in pieces), reader.finish()):
        whole.reasoning += parts.reasoning
        whole.content += parts.content
        for call in parts.calls:
            if call.index not in calls:
                assert call.name is not None, "the name comes first"
                calls[call.index] = [call.name, ""]
            else:
                assert call.name is None, "and once"
            calls[call.index][1] += call.arguments
    assert reader.called == bool(calls)
    return whole.reasoning, whole.content, [(name, arguments) for name, arguments in calls.values()]


def test_calls_of_both_formats_are_cut_out_of_the_text() -> None:
    assert read(V3_RULES, [V3]) == ("", "Let me look.", CALLS)
    assert read(V31_RULES, [V31]) == ("two calls < three", "", CALLS)


@given(st.data())
def test_the_pieces_a_text_arrives_in_change_nothing(data: st.DataObject) -> None:
    text, rules = data.draw(st.sampled_from([(V3, V3_RULES), (V31, V31_RULES)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    bounds = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    assert read(rules, pieces) == read(rules, [text])
    assert read(rules, list(text)) == read(rules, [text])


@given(st.text(alphabet="<｜tolca▁s>begin/hk \n`", max_size=60))  # noqa: RUF001
def test_text_without_whole_markers_is_content_to_the_last_character(text: str) -> None:
    if CALLS_BEGIN in text or text.lstrip().startswith("<think>"):
        return
    assert read(V31_RULES, list(text)) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "thinking", "parts"),
    [
        ("all of it", True, ("all of it", "")),
        ("why</think>so", True, ("why", "so")),
        ("\n<think>why</think>\n\nso", False, ("why", "\n\nso")),
        ("no <think>here</think>", False, ("", "no <think>here</think>")),
        ("<thi", False, ("", "<thi")),
    ],
)
def test_reasoning_begins_in_the_prompt_or_at_the_beginning_of_the_answer(
    text: str, *, thinking: bool, parts: tuple[str, str]
) -> None:
    rules = PartRules(reasoning=True, thinking=thinking)
    assert read(rules, [text])[:2] == parts
    assert read(rules, list(text))[:2] == parts


def test_a_call_cut_short_keeps_what_it_has() -> None:
    cut = V3[: V3.index("Köln") + 2]
    assert read(V3_RULES, list(cut))[2] == [("weather", '{"city": "Kö')]


def test_without_a_format_everything_is_content() -> None:
    assert read(PartRules(), [V3]) == ("", V3, [])
