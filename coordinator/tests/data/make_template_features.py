"""Writes template_features.json: what transformers renders for templates that use one feature each.

Run with transformers 5.x and jinja2 >= 3.1.6 installed:  python make_template_features.py
"""

import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

USER = [{"role": "user", "content": "Hi"}]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What's \"it\"?\n"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "y": [1.5, None, True], "z": "ä<&>'"}}}]},
    {"role": "tool", "content": "42"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<b> & 'q' \"d\" é 漢 😀 \u007f\u0001\b\f\n\t\\",
          "parameters": {"type": "object", "properties": {"items": {"type": "array", "items": {"type": "string"}}},
                         "required": []}}}]
NUMBERS = [0, 1, -1, 2**53, 2**63 - 1, 2**64 - 1, 0.0, -0.0, 1.0, 0.1, 1e15, 1e16, 123456789012345680.0, 1e22, 1e-4,
           1e-5, 1.5e-7, 3.141592653589793, 1e100, 5e-324, 1.7976931348623157e308]

# (template, variables, messages, tools)
CASES = [
    # printing
    ("{{ v }}", {"v": [True, False, None, 1, 1.0, "a", "it's", 'say "x"', "both ' and \"", "\n\t\r\\\x00\x7f\u00a0\u200b\u0301é漢😀\U000e0001"]}, USER, None),
    ("{{ v }}", {"v": {"a": {"b": []}, "c": {}, "d": [[]], "k": (1)}}, USER, None),
    ("{{ v }}", {"v": NUMBERS}, USER, None),
    ("{% for x in v %}{{ x }} {% endfor %}", {"v": NUMBERS}, USER, None),
    ("{{ true }} {{ none }} {{ True }} {{ None }} {{ False }} {{ missing }}|", {}, USER, None),
    ("{{ messages }}{{ messages[1:] }}{{ messages[::-1] }}", {}, CHAT, None),
    ("{{ (1, 2) }}{{ (1,) }}{{ () }}{{ [1, 'a'] }}{{ {'a': 1, 'b': 'c'} }}", {}, USER, None),
    ("{{ 'a' ~ 1 ~ true ~ none ~ 1.5 ~ [1, 'x'] }}", {}, USER, None),
    ("{{ messages[0] | string }}{{ 1.0 | string }}{{ none | string }}", {}, USER, None),
    # tojson
    ("{{ tools | tojson }}", {}, USER, TOOLS),
    ("{{ tools | tojson(indent=2) }}", {}, USER, TOOLS),
    ("{{ tools | tojson(indent=4, sort_keys=true) }}", {}, USER, TOOLS),
    ("{{ tools | tojson(ensure_ascii=True) }}", {}, USER, TOOLS),
    ("{{ tools | tojson(ensure_ascii=False, separators=(',', ':')) }}", {}, USER, TOOLS),
    ("{{ tools | tojson(true, 1) }}", {}, USER, TOOLS),
    ("{{ v | tojson }}", {"v": NUMBERS}, USER, None),
    ("{{ v | tojson(indent='\t') }}", {"v": {"a": [], "b": {}, "c": [1, {"d": 2}]}}, USER, None),
    ("{{ {2: 1, true: 3, none: 4, 1.5: 5} | tojson }}", {}, USER, None),
    ("{{ messages[2].tool_calls[0].function.arguments | tojson }}", {}, CHAT, None),
    ("{{ none | tojson }}{{ 'x' | tojson }}{{ (1, 2) | tojson }}{{ messages[::-1] | tojson }}", {}, USER, None),
    ("{{ missing | tojson }}", {}, USER, None),
    ("{% for k, v in messages[2].tool_calls[0].function.arguments | items %}{{ k }}={{ v | tojson }};{% endfor %}", {}, CHAT, None),
    ("{% for k, v in messages[2].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", {}, CHAT, None),
    ("{% for k, v in tools[0].function.parameters.properties.items() %}{{ k }}={{ v }}{% for a, b in v.items() %}{{ a }}:{{ b }}{% endfor %}{% endfor %}", {}, USER, TOOLS),
    ("{{ tools[0].function.parameters.properties['items']['type'] }}", {}, USER, TOOLS),
    # whitespace control
    ("a\n  {% if true %}  \n  b\n  {% endif %}\nc\n", {}, USER, None),
    ("a\n  {%- if true -%}  \n  b\n  {%- endif -%}\nc\n\n", {}, USER, None),
    ("a\n  {%+ if true +%}\n  b\n  {% endif %}\nc", {}, USER, None),
    ("a\n  {# comment #}\n  b {# x #}\n{#- y -#}\n c", {}, USER, None),
    ("a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc\r\n", {}, USER, None),
    ("{{ 'x' }}\n", {}, USER, None),
    ("{{ 'x' }}\n\n", {}, USER, None),
    ("{{- 'x' -}}\n\n  y", {}, USER, None),
    ("{% raw %}{{ x }}{% endraw %}\n z", {}, USER, None),
    # generation blocks
    ("{% for m in messages %}{% generation %}{{ m.role }}{% set x = 1 %}{% endgeneration %}\n{% endfor %}", {}, CHAT, None),
    ("{% for m in messages %}  {%- generation -%}  {{ m.content }}\n  {%- endgeneration %}\n\n{% endfor %}", {}, CHAT, None),
    # loops and namespaces
    ("{% set ns = namespace(a=0, found=false) %}{% for m in messages[::-1] %}{% set i = (messages|length - 1) - loop.index0 %}{% if not ns.found and m.role == 'user' %}{% set ns.found = true %}{% set ns.a = i %}{% endif %}{% endfor %}{{ ns.a }}{{ ns.found }}", {}, CHAT, None),
    ("{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if not loop.last }};{% endfor %}", {}, CHAT, None),
    ("{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}", {}, CHAT, None),
    ("{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }}{% else %}none{% endfor %}", {}, CHAT, None),
    ("{% for m in [] %}x{% else %}empty{% endfor %}", {}, USER, None),
    ("{% set x = 1 %}{% for m in messages %}{% set x = x + 1 %}{% endfor %}{{ x }}", {}, CHAT, None),
    ("{% for x in range(3) %}{{ x }}{% endfor %}{{ range(2, 8, 3) | list }}{{ range(3)[1] }}", {}, USER, None),
    ("{% macro f(a, b=2) %}[{{ a }}{{ b }}{{ caller is defined }}]{% endmacro %}{{ f(1) }}{{ f(1, b='x') }}{% call f(3) %}c{% endcall %}", {}, USER, None),
    ("{%- macro r(v, d) %}{{ d }}{% if v is mapping %}{% for k in v %}{{ k }}({{ r(v[k], d + 1) }}){% endfor %}{% endif %}{% endmacro %}{{ r(tools[0], 0) }}", {}, USER, TOOLS),
    ("{% set x %}a{{ 1 }}b{% endset %}{{ x | upper }}{% filter upper %}q{% endfilter %}", {}, USER, None),
    ("{% with a = 1 %}{{ a }}{% endwith %}{{ a }}", {}, USER, None),
    # tests
    ("{{ 'a' is string }}{{ [] is sequence }}{{ 'a' is sequence }}{{ {} is sequence }}{{ 1 is number }}{{ true is number }}{{ 1.5 is float }}{{ true is boolean }}{{ none is none }}{{ x is defined }}{{ {} is mapping }}{{ [] is iterable }}{{ 'a' is iterable }}{{ 1 is iterable }}{{ true is integer }}{{ 1 is integer }}", {}, USER, None),
    ("{{ messages[1:] is sequence }}{{ messages[0].tool_calls is defined }}{{ messages[2].content is string }}{{ messages[0].x is none }}", {}, CHAT, None),
    ("{{ 2 is odd }}{{ 2 is even }}{{ 4 is divisibleby 2 }}{{ 'a' is in ['a'] }}{{ 'a' in 'cat' }}{{ 'role' in messages[0] }}{{ 'x' not in messages[0] }}{{ 1 is sameas 1 }}{{ 'A' is upper }}", {}, USER, None),
    ("{{ 1 == 1.0 }}{{ 'a' == 1 }}{{ none == false }}{{ 1 < 2 < 3 }}{{ not none }}{{ [] == [] }}{{ 0 or 'x' }}{{ 1 and '' }}|", {}, USER, None),
    # undefined
    ("{{ missing is undefined }}{{ missing | default('d') }}{{ '' | default('d', true) }}{{ missing | length }}{% for x in missing %}x{% endfor %}{{ messages[0].nothing }}{{ missing or 'o' }}|", {}, USER, None),
    ("{{ missing.attribute }}", {}, USER, None),
    ("{{ 'a' + missing }}", {}, USER, None),
    ("{{ messages[9] }}|{{ messages[-1].role }}|{{ messages[9].role is defined }}", {}, USER, None),
    ("{{ missing | trim }}|{{ none | trim }}|{{ 5 | trim }}|{{ missing | upper }}|", {}, USER, None),
    ("{{ 'x' if false }}|{{ ('x' if false) is defined }}", {}, USER, None),
    ("{{ enable_thinking is defined and enable_thinking is false }}{{ enable_thinking | default(true) }}", {"enable_thinking": False}, USER, None),
    ("{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ not tools }}", {}, USER, None),
    ("{{ raise_exception('bad ' ~ 1) }}", {}, USER, None),
    ("{{ 'a' + 1 }}", {}, USER, None),
    ("{{ messages.append(1) }}", {}, USER, None),
    ("{{ 1 / 0 }}", {}, USER, None),
    # strings
    ("{{ s.strip() }}|{{ s.lstrip() }}|{{ s.rstrip() }}|{{ s | trim }}|{{ s.strip(' \\n') }}|{{ 'xxaxx'.strip('x') }}|", {"s": " \n\t\u001f\u00a0\u3000a b\u2028 \r\n"}, USER, None),
    ("{{ s.split() }}{{ s.split(' ') }}{{ s.split(None, 1) }}{{ s.split('b') }}{{ s.split('b', 1) }}{{ s.rsplit(' ', 1) }}{{ s.rsplit(None, 1) }}{{ s.rsplit(maxsplit=1) }}{{ s.split(sep='a', maxsplit=0) }}{{ ''.split() }}{{ ''.split('x') }}", {"s": "  a b  c b "}, USER, None),
    ("{{ s.splitlines() }}{{ s.splitlines(True) }}{{ ''.splitlines() }}{{ 'a\\n'.splitlines() }}", {"s": "a\nb\r\nc\rd\u2028e\u0085f\u000bg\u001ch\n\n"}, USER, None),
    ("{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abc'.find('c') }}{{ 'abc'.find('z') }}{{ 'äbc'.index('c') }}{{ 'a-b-c'.partition('-') }}{{ 'a-b-c'.rpartition('-') }}{{ 'abc'.partition('x') }}{{ 'abc'.rpartition('x') }}", {}, USER, None),
    ("{{ 'abab'.replace('a', 'x') }}{{ 'abab'.replace('a', 'x', 1) }}{{ 'a b'.title() }}{{ 'aBC'.capitalize() }}{{ 'aB'.upper() }}{{ 'aB'.lower() }}{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('bc') }}{{ '7'.zfill(3) }}{{ '-7'.zfill(3) }}{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '*') }}{{ 'a'.isspace() }}{{ ' '.isspace() }}{{ '12'.isdigit() }}{{ 'ab'.isalpha() }}", {}, USER, None),
    ("{{ '{} {}'.format(1, 'x') }}{{ '%s-%s' | format('a', 2) }}{{ ', '.join(['a', 'b']) }}{{ [1, 'a', none, true] | join('-') }}{{ messages | map(attribute='role') | join(',') }}{{ messages | join(',', attribute='role') }}", {}, CHAT, None),
    ("{{ 'abc'[1] }}{{ 'abc'[-1] }}{{ 'abc'[1:] }}{{ 'abc'[:-1] }}{{ 'abc'[::-1] }}|{{ [1][::-1] }}{{ [1,2,3][::2] }}{{ [1,2,3][-2:] }}{{ 'äöü'[:2] }}", {}, USER, None),
    ("{{ 'ab' * 2 }}{{ [1] + [2] }}{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 % 3 }}{{ -7 % 3 }}{{ 2 ** 3 }}{{ 1 / 2 }}{{ 4 / 2 }}{{ 1 + 1.5 }}{{ -3 }}{{ 3 - 5 }}", {}, USER, None),
    # filters
    ("{{ [3, 1, 2] | sort }}{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [1, 2] | reverse | list }}{{ 'abc' | reverse }}{{ [1, 2] | sum }}{{ [1, 1] | unique | list }}{{ [1, 5] | max }}{{ 'x' | upper }}{{ -1 | abs }}{{ '3' | int }}{{ 3.7 | int }}{{ 3.456 | round(1) }}{{ 'abc' | length }}{{ {'a': 1} | length }}{{ 'a b' | title }}{{ 'abc' | replace('b', 'x') }}", {}, USER, None),
    ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | list }}{{ messages | selectattr('tool_calls', 'defined') | list | length }}{{ [1, 2, 3] | select('odd') | list }}", {}, CHAT, None),
    ("{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2}.keys() | list }}{{ {'b': 1}.values() | list }}{{ {'b': 1}.get('b') }}{{ {'b': 1}.get('x') }}{{ {'b': 1}.get('x', 5) }}{{ dict(a=1) }}{{ {'a': 1} | items | list }}", {}, USER, None),
    ("{{ 'a\\nb\\n\\nc' | indent }}|{{ 'a\\nb' | indent(2, true) }}|{{ 'a\\nb' | indent(width=2, first=True) }}", {}, USER, None),
    ("{{ 'caf\u00e9' | capitalize }}{{ '<a>' }}{{ '<a>' | e }}{{ '<a>' | safe }}", {}, USER, None),
    # reasoning under its other names, nulls
    ("{{ messages }}", {}, [{"role": "assistant", "content": "x", "reasoning_content": "r"}], None),
    ("{{ messages }}", {}, [{"role": "assistant", "content": "x", "thinking": "t"}], None),
    # precedence and literals
    ("{{ 'a' 'b' }}{{ 1_000 }}{{ 1e3 }}{{ 'a\\tb\\\\n\\u00e9' }}{{ 'x' if 1 > 2 else 'y' }}{{ 'a' ~ 'b' | upper }}{{ (1, 2)[0] }}{{ not 1 == 2 }}", {}, USER, None),
    ("{{ '\\n\\n' }}{{- \"it's\" }}{{ 'a' in ['a'] and 'b' not in 'abc' }}", {}, USER, None),
]


def main():
    out = []
    for template, variables, messages, tools in CASES:
        case = {"template": template, "variables": variables, "messages": messages, "tools": tools}
        try:
            rendered, _ = render_jinja_template(
                conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=True, **variables)
            case["expected"] = rendered[0]
        except Exception as error:  # every failure counts as one
            case["error"] = type(error).__name__
        out.append(case)
    path = pathlib.Path(__file__).with_name("template_features.json")
    path.write_text(json.dumps(out, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
