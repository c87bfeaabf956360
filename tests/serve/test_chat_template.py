from __future__ import annotations

import pytest

from benthic.errors import ConfigError
from benthic.serve.chat_template import ChatTemplate, TemplateRenderError

USER = [{"role": "user", "content": "<b>hi</b>"}]


def render(source: str, messages=USER, **options) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **options)


def test_templates_see_messages_special_tokens_and_variables() -> None:
    turn = "{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    source = "{{ bos_token }}" + turn + "{{ style }}"
    assert render(source, variables={"style": "!"}) == "<s>[user]<b>hi</b></s>!"


def test_the_generation_prompt_is_the_templates_choice() -> None:
    source = "x{% if add_generation_prompt %}<A>{% endif %}"
    assert render(source) == "x<A>"
    assert render(source, add_generation_prompt=False) == "x"


def test_a_last_message_can_go_on() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{{ eos_token }}{% endfor %}END"

    def told(content: str) -> str:
        messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": content}]
        return render(source, messages, continue_final=True)

    assert told("a b") == "<user>a b</s><assistant>a b"
    assert told(" a b \n") == "<user>a b</s><assistant>a b"
    kept = source.replace(" | trim", "")
    messages = [{"role": "assistant", "content": " so, "}]
    assert render(kept, messages, continue_final=True) == "<assistant> so, "
    with pytest.raises(TemplateRenderError, match="does not show it as it is"):
        render("{{ messages[0].content | upper }}", messages, continue_final=True)


def test_variables_cannot_replace_the_messages() -> None:
    assert render("{{ messages | length }}", variables={"messages": [1, 2, 3]}) == "1"


def test_what_published_templates_use_works() -> None:
    """Loop controls, namespaces, JSON without HTML escapes, the date, and markers of trainable text."""
    source = (
        "{%- set ns = namespace(found=false) -%}"
        "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.found = true -%}{%- break -%}"
        "{%- endif -%}{%- endfor -%}"
        "{{ ns.found }} {{ messages[0] | tojson(indent=none) }} {{ strftime_now('%Y') | length }}"
        " {% generation %}kept{% endgeneration %}"
    )
    assert render(source) == 'True {"role": "user", "content": "<b>hi</b>"} 4 kept'


def test_blocks_leave_no_blank_lines() -> None:
    assert render("{% if true %}\n  a\n{% endif %}\nb") == "  a\nb"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ missing.name }}", "missing"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ().__class__.__bases__ }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange too big"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
    ],
)
def test_a_template_that_fails_or_misbehaves_is_an_error_of_the_request(source: str, words: str) -> None:
    with pytest.raises(TemplateRenderError, match=words):
        render(source)


def test_a_template_that_is_not_jinja_names_the_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        render("a\n{% if %}")
