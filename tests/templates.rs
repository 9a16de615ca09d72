//! Chat templates: those of well-known families, the parts of Jinja that they use, and those of strangers.
#![cfg(feature = "tokenizer")]

use std::time::{Duration, Instant, SystemTime};

use hymba::lm::{ChatOptions, ChatTemplate, Message, Tokenizer};
use serde_json::json;

/// Renders with the special tokens `<s>` and `</s>`, on 26 July 2024.
fn render(template: &str, messages: &[Message], options: ChatOptions) -> hymba::Result<String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy("tests/data/hymba-1.5b-base/tokenizer.json", folder.path().join("tokenizer.json")).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), template).unwrap();
    let options = options.now(SystemTime::UNIX_EPOCH + Duration::from_secs(1_722_000_000));
    Tokenizer::from_dir(folder.path()).unwrap().render_chat(messages, &options)
}

fn talk() -> Vec<Message> {
    vec![Message::system("Be brief."), Message::user(" Hi! "), Message::assistant("Hello."), Message::user("Bye")]
}

/// Written after the published formats, as their templates are: each with the constructs that it is known for.
#[test]
fn templates_of_families() {
    let chatml = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let llama_2 = "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";
    let llama_3 = r#"{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"#;
    let mistral = r#"{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if message == user_messages[-1] and system_message is defined %}
            {{- "[INST]" + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST]" + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}
"#;
    let gemma = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}";
    let gemma_3 = r#"{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '
' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is iterable and message['content'] is not string -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
"#;
    let phi = "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}";
    let qwen = r#"{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"#;
    let zephyr = "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}";
    let deepseek = "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + eos_token}}{%- endif %}{%- endfor %}{% if add_generation_prompt %}{{'<|Assistant|>'}}{% endif %}";
    let trl = "{%- for message in messages %}\n    {%- if message.role == 'assistant' %}\n        {{- '<|im_start|>assistant\\n' }}\n        {%- generation %}\n        {{- message.content + '<|im_end|>' }}\n        {%- endgeneration %}\n        {{- '\\n' }}\n    {%- else %}\n        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n";
    let added_system = "{% if messages[0].role != 'system' %}{% set messages = [{'role': 'system', 'content': 'You help.'}] + messages %}{% endif %}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}";
    let merged = "{% set ns = namespace(turns=[], text='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.text = ns.text + m['content'] %}{% else %}{% set ns.turns = ns.turns + [{'role': m.role, 'content': ns.text + m.content}] %}{% set ns.text = '' %}{% endif %}{% endfor %}{% for t in ns.turns %}{{ t.role + t.content }}|{% endfor %}{{ ns.turns|length }}";

    let system = &talk()[..];
    let plain = &talk()[1..];
    let thinking = [
        Message::user("1+1?"),
        Message::assistant("<think>\neasy\n</think>\n\n2"),
        Message::tool("a"),
        Message::tool("b"),
    ];
    let im = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi! <|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n";
    for (name, template, messages, expected) in [
        ("ChatML", chatml, system, im),
        (
            "Llama 2",
            llama_2,
            system,
            "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi! [/INST] Hello. </s><s>[INST] Bye [/INST]",
        ),
        ("Llama 2", llama_2, plain, "<s>[INST] Hi! [/INST] Hello. </s><s>[INST] Bye [/INST]"),
        ("Llama 2", llama_2, &plain[1..], "error: Roles must alternate"),
        (
            "Llama 3",
            llama_3,
            system,
            "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("Mistral", mistral, system, "<s>[INST] Hi! [/INST] Hello.</s>[INST]Be brief.\n\nBye[/INST]"),
        ("Mistral", mistral, plain, "<s>[INST] Hi! [/INST] Hello.</s>[INST]Bye[/INST]"),
        ("Mistral", mistral, &plain[1..], "error: roles must alternate"),
        (
            "Gemma",
            gemma,
            plain,
            "<s><start_of_turn>user\nHi!<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        ),
        ("Gemma", gemma, system, "error: System role not supported"),
        (
            "Gemma 3",
            gemma_3,
            system,
            "<s><start_of_turn>user\nBe brief.\n\nHi!<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        ),
        (
            "Phi",
            phi,
            system,
            "<|system|>\nBe brief.<|end|>\n<|user|>\n Hi! <|end|>\n<|assistant|>\nHello.<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
        ),
        ("Qwen", qwen, system, im),
        (
            "Qwen",
            qwen,
            &thinking,
            "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<think>\neasy\n</think>\n\n2<|im_end|>\n<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "Zephyr",
            zephyr,
            system,
            "<|system|>\nBe brief.</s>\n<|user|>\n Hi! </s>\n<|assistant|>\nHello.</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        ),
        ("DeepSeek", deepseek, system, "<s>Be brief.<|User|> Hi! <|Assistant|>Hello.</s><|User|>Bye<|Assistant|>"),
        ("DeepSeek", deepseek, &thinking[..2], "<s><|User|>1+1?<|Assistant|>\n\n2</s><|Assistant|>"),
        ("TRL", trl, system, im),
        (
            "a system message of its own",
            added_system,
            plain,
            "system: You help.\nuser:  Hi! \nassistant: Hello.\nuser: Bye\n",
        ),
        ("a list that grows", merged, system, "userBe brief. Hi! |assistantHello.|userBye|3"),
    ] {
        match render(template, messages, ChatOptions::new()) {
            Ok(prompt) => assert_eq!(prompt, expected, "{name}"),
            Err(error) => {
                let reason = expected.strip_prefix("error: ").unwrap_or_else(|| panic!("{name}: {error}"));
                assert!(error.to_string().contains(reason), "{name}: {error}");
            }
        }
    }
}

/// Lists and dicts that a template makes are those of Python.
#[test]
fn lists_are_built() {
    let tools = ChatOptions::new().tools([json!({"name": "clock", "parameters": {"a": [1, {"b": null}]}})]);
    for (template, expected) in [
        (
            "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
            "systemBe brief.user Hi! assistantHello.userBye",
        ),
        (
            "{% set m = messages + [{'role': 'user', 'content': messages[0].content}] %}{{ m|length }}{{ m[-1].content }}",
            "5Be brief.",
        ),
        (
            "{% set m = [1] + [2, 3] %}{{ m }}{{ m[1:] }}{{ m[::-1] }}{{ m * 2 }}",
            "[1, 2, 3][2, 3][3, 2, 1][1, 2, 3, 1, 2, 3]",
        ),
        (
            "{% set x = 2 %}{{ [x, [x, {'a': x}]] }}{{ {'k': [x]}['k'][0] + 1 }}{{ {'k': x}.items()|list }}",
            "[2, [2, {'a': 2}]]3[['k', 2]]",
        ),
        (
            "{% set ns = namespace(l=[]) %}{% for i in range(120) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l|tojson|length }} {{ ns.l|string|length }}",
            "242 242",
        ),
        ("{{ dict(a=1, b=[messages[3].role])|tojson }}", r#"{"a": 1, "b": ["user"]}"#),
        (
            "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.role] %}{% endfor %}{{ ns.l|join('-') }}",
            "system-user-assistant-user",
        ),
        (
            "{% set ns = namespace(d={}) %}{% for m in messages %}{% set ns.d = dict(ns.d, **{m.role: m.content}) %}{% endfor %}{{ ns.d.user }}{{ ns.d|length }}",
            "Bye3",
        ),
        ("{{ messages|map(attribute='role')|unique|sort|join(',') }}", "assistant,system,user"),
        (
            "{{ messages|join('/', attribute='role') }}{{ ['a', 1, none]|join }}{{ 'abc'|join('.') }}",
            "system/user/assistant/usera1Nonea.b.c",
        ),
        ("{{ tools[0].parameters.a[1] }}{{ (tools + [1])|length }}{{ tools == [tools[0]] }}", "{'b': None}2True"),
        (
            "{{ messages[0] in messages }}{{ {'a': 1} in [{'a': 1}] }}{{ [1, 2] == [1, 2] }}{{ messages[1:] == messages }}",
            "TrueTrueTrueFalse",
        ),
        (
            "{% set a, b = ['x' ~ 1, [messages[0].role]] %}{{ a }}{{ b[0] }}{% for k, v in {'q': messages}.items() %}{{ k }}{{ v|length }}{% endfor %}",
            "x1systemq4",
        ),
        (
            "{% if messages is sequence and {'a': messages} is mapping and messages is iterable %}ok{% endif %}{{ [] or 'empty' }}",
            "okempty",
        ),
        ("{% macro f(l, sep=', ') %}{{ l|join(sep) }}{% endmacro %}{{ f(['a'] + ['b']) }}", "a, b"),
        ("{% set ns = namespace(r=messages[-1], t=tools) %}{{ ns.r.content }}{{ ns.t[0].name }}", "Byeclock"),
        (
            "{% for r in [1, 2] recursive %}{{ r }}{% if loop.depth0 < 1 %}({{ loop([r + 1]) }}){% endif %}{% endfor %}",
            "1(2)2(3)",
        ),
        ("{{ strftime_now('%Y-%m-%d %H:%M, %B %-d') }}", "2024-07-26 13:20, July 26"),
        (
            "{%- generation -%}  a {% endgeneration %}\n{% generation %}\n{% set b = 'b' %}\n{% endgeneration %}{{ b }}",
            "a b",
        ),
        ("{% raw %}{% generation %}{% endraw %}{{ '{% generation %}' }}", "{% generation %}{% generation %}"),
    ] {
        let rendered = render(template, &talk(), tools.clone()).unwrap_or_else(|error| panic!("{template}: {error}"));
        assert_eq!(rendered, expected, "{template}");
    }
}

/// Long chats do not come near the limits.
#[test]
fn lists_of_long_chats_are_built() {
    let template = "{% set ns = namespace(l=[], t='') %}{% for m in messages %}{% set ns.l = ns.l + [m] %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.l|length }} {{ ns.t|length }}";
    let messages = vec![Message::user("ten letters".repeat(5)); 1000];
    assert_eq!(ChatTemplate::new(template).unwrap().render(&messages, &ChatOptions::new()).unwrap(), "1000 55000");
    let template = "{% set ns = namespace(l=[]) %}{% for m in messages %}{% set ns.l = ns.l + [m.content] %}{% endfor %}{{ ns.l|join|length }}";
    let messages = vec![Message::user("ten letters".repeat(500)); 300];
    assert_eq!(ChatTemplate::new(template).unwrap().render(&messages, &ChatOptions::new()).unwrap(), "1650000");
}

/// The templates of other chat models use these.
#[test]
fn templates_do_what_jinja_does() {
    let messages = [Message::system(" S "), Message::user("U"), Message::assistant("A")];
    for (template, expected) in [
        (
            "{% for m in messages %}\n  {% if loop.first %}\nfirst {% endif %}\n{{ m.role }}\n{% endfor %}",
            "first system\nuser\nassistant\n",
        ),
        ("{{ missing }}|{{ messages[9] }}|{{ messages[0].missing }}|{% if missing %}x{% endif %}", "|||"),
        (
            "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.content %}{% endfor %}{{ ns.n }}{{ ns.last }}",
            "3A",
        ),
        ("{% set n = messages|length - 1 %}{% set ns = namespace(i=0) %}{% set ns.i = n %}{{ ns.i }}", "2"),
        ("{% for m in messages[1:] %}{{ loop.index0 + 1 }}{{ m['content'].lower() }}{% endfor %}", "1u2a"),
        ("{{ messages[0]['content'].strip() }}{{ 'a,b'.split(',')[1] }}{{ ', '.join(['x', 'y']) }}", "Sbx, y"),
        ("{{ '\u{1c} a \u{1f}'.strip() }}{{ '\u{1c} a'|trim }}{{ 'xax'.strip('x') }}{{ 'xax'|trim('x') }}", "aaaa"),
        (
            "{{ messages|tojson }}",
            r#"[{"role": "system", "content": " S "}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]"#,
        ),
        ("{{ messages[1]|tojson(indent=2) }}", "{\n  \"role\": \"user\",\n  \"content\": \"U\"\n}"),
        ("{{ messages[1]|tojson(sort_keys=true, separators=(',', ':')) }}", r#"{"content":"U","role":"user"}"#),
        ("{{ 'é😀<&\"'|tojson }}{{ 'é😀'|tojson(ensure_ascii=true) }}", "\"é😀<&\\\"\"\"\\u00e9\\ud83d\\ude00\""),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ f(1) }}", "[a][1]"),
        (
            "{% for m in messages if m.role != 'user' %}{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}",
            " S A.",
        ),
        ("{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        (
            "{%- set x = 'a' -%}  {{- x if true else 'b' }}{{ none is none }}{{ tools is none }}{{ contexts is defined }}",
            "aTrueTrueFalse",
        ),
        (
            "{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'eq', 'user')|list|length }}",
            "system,user,assistant1",
        ),
        ("{% nonsense %}", "error"),
        ("{{ raise_exception('roles must alternate') }}", "error"),
    ] {
        let rendered = ChatTemplate::new(template).and_then(|ready| ready.render(&messages, &ChatOptions::new()));
        match rendered {
            Ok(text) => assert_eq!(text, expected, "{template}"),
            Err(error) => assert_eq!(expected, "error", "{template}: {error}"),
        }
    }
}

#[test]
fn templates_of_strangers() {
    let doubled = "{% set l = l + l %}".repeat(60);
    let wrapped = "{% set l = [l] %}".repeat(3000);
    let twice =
        format!("{{% set l = 'a' %}}{{% set m = 'a' %}}{}", "{% set l = [l, l] %}{% set m = [m, m] %}".repeat(50));
    let nested = |what: &str| what.repeat(5000);
    let rows = [
        "{% for i in range(10000000) %}x{% endfor %}".to_owned(),
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".to_owned(),
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".to_owned(),
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}".to_owned(),
        "{% for x in range(5) recursive %}{{ loop(range(6)) }}{% endfor %}".to_owned(),
        "{{ 'x' * 1000000000 }}".to_owned(),
        "{% set n = 1000000000 %}{{ 'x' * n }}".to_owned(),
        "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}".to_owned(),
        "{% for i in range(90000) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' }}{% endfor %}".to_owned(),
        "{{ '{:1000000000}'.format(1) }}".to_owned(),
        "{{ '%1000000000d'|format(1) }}".to_owned(),
        "{{ 'x'.replace('', 'y' * 100000).replace('y', 'z' * 100000) }}".to_owned(),
        "{% set y = 'y' * 1000000 %}{{ y.join((',' * 100000).split(',')) }}".to_owned(),
        "{{ ('x' * 1000)|indent(100000000) }}".to_owned(),
        format!("{{% set l = 'a,b'.split(',') %}}{doubled}{{{{ l }}}}"),
        format!("{{% set l = 'a,b' %}}{wrapped}{{{{ l }}}}"),
        format!("{twice}{{{{ l == m }}}}"),
        format!("{twice}{{{{ l }}}}"),
        format!("{twice}{{{{ l|tojson }}}}"),
        format!("{twice}{{{{ l|tojson(sort_keys=true) }}}}"),
        format!("{twice}{{{{ {{l: 1}}[m] }}}}"),
        format!("{twice}{{{{ [l, m]|unique|list|length }}}}"),
        format!("{twice}{{{{ [l, m]|sort|length }}}}"),
        format!("{twice}{{{{ l in [m] }}}}"),
        format!("{twice}{{{{ l|join }}}}"),
        format!("{twice}{{{{ l|string }}}}"),
        format!("{twice}{{{{ l ~ l }}}}"),
        format!("{{% set ns = namespace(l=[]) %}}{}{{{{ ns.l }}}}", "{% set ns.l = [ns.l] %}".repeat(1000)),
        "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}".to_owned(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(90000) %}{% set ns.l = ns.l + [1] %}{% endfor %}{{ ns.l }}".to_owned(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(90000) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}".to_owned(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(90000) %}{% set ns.l = {'a': ns.l}.items()|list %}{% endfor %}{{ ns.l }}".to_owned(),
        "{% macro f(l) %}{{ f([l]) }}{% endmacro %}{{ f(1) }}".to_owned(),
        "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1) }}".to_owned(),
        "{% for l in [[1]] recursive %}{{ loop([[l]]) }}{% endfor %}".to_owned(),
        "{% set s = 'x' * 1000000 %}{{ [s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s]|join }}".to_owned(),
        "{% set s = ['x' * 1000000] * 1000 %}{{ s|join }}".to_owned(),
        "{% set s = ['x' * 1000000] * 1000 %}{{ s|tojson }}".to_owned(),
        "{% set s = ['x' * 1000000] * 1000 %}{{ s|tojson(sort_keys=true) }}".to_owned(),
        "{% set s = ['x' * 1000000] * 1000 %}{{ s }}".to_owned(),
        "{% set s = ['x' * 1000000] * 1000 %}{% set t = ['x' * 1000000] * 1000 %}{% for i in range(90000) %}{{ s == t }}{% endfor %}".to_owned(),
        "{% set s = ['x' * 1000000] * 1000 %}{% for i in range(90000) %}{% set t = s|sort %}{% endfor %}".to_owned(),
        "{{ [1] * 1000000000 }}".to_owned(),
        "{% set l = (range(9000)|list) * 9000 %}{{ l }}".to_owned(),
        "{% set ns = namespace(x=1) %}{{ [ns] }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% set ns.x = {'a': ns} %}{{ ns }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}{{ f(ns) }}{{ ns }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x, y = varargs %}{% endmacro %}{{ f(ns, 1) }}{{ ns }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% macro f() %}{% with ns.x = ns %}{% endwith %}{% endmacro %}{{ f() }}{{ ns }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% macro f() %}{% for ns.x in varargs %}{% endfor %}{% endmacro %}{{ f(ns) }}{{ ns }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% macro f() %}x{% endmacro %}{% set ns.x = f %}".to_owned(),
        "{% set ns = namespace(x=1) %}{% for i in [1] %}{% set ns.x = loop %}{% endfor %}".to_owned(),
        "{% set ns = namespace(x=1) %}{% set ns.x = ns %}{{ ns }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% set ns.x = ns if ns else 1 %}{{ ns }}".to_owned(),
        "{% set ns = namespace(x=1) %}{% set ns.x = missing|default(ns) %}{{ ns }}".to_owned(),
        "{% set a = namespace(x=1) %}{% set b = namespace(x=a) %}{{ b }}".to_owned(),
        "{% set a = namespace(x=1) %}{% set x = a %}{% set a.x = x %}{{ a }}".to_owned(),
        "{{ 9 ** 9 ** 9 ** 9 }}".to_owned(),
        "{{ messages|batch(1) }}".to_owned(),
        "{{ messages|zip(messages) }}".to_owned(),
        "{{ messages|nonsense }}".to_owned(),
        "{{ messages is nonsense }}".to_owned(),
        "{{ nonsense() }}".to_owned(),
        "{{ messages[0].missing.strip() }}".to_owned(),
        "{{ messages[0].content.nonsense() }}".to_owned(),
        "{% include 'tokenizer.json' %}".to_owned(),
        "{% extends 'x' %}".to_owned(),
        "{{ raise_exception('x' * 100000) }}".to_owned(),
        format!("{{{{ x{} }}}}", nested("~x")),
        format!("{{{{ x{} }}}}", nested("|trim")),
        format!("{{{{ x{} }}}}", nested(".x")),
        format!("{{{{ {}x{} }}}}", nested("("), nested(")")),
        format!("{{{{ {}x }}}}", nested("not ")),
        format!("{{{{ {}x }}}}", nested("-")),
        nested("{% if x %}"),
        nested("{% for x in y %}"),
        format!("{{% if x %}}{}{{% endif %}}", nested("{% elif x %}")),
        nested("{{ '"),
        "x".repeat(1 << 20),
        "{% if %}".to_owned(),
        "{{".to_owned(),
        "{#".to_owned(),
        "{% raw %}".to_owned(),
    ];
    let messages = [Message::user("a")];
    for template in rows {
        let start: String = template.chars().take(100).collect();
        let begin = Instant::now();
        let rendered = ChatTemplate::new(&template).and_then(|ready| ready.render(&messages, &ChatOptions::new()));
        let error = rendered.expect_err(&start).to_string();
        assert!(error.starts_with("chat template cannot be used: "), "{start}: {error}");
        assert!(error.len() < 600 && !error.contains(char::is_control), "{start}: {error}");
        assert!(begin.elapsed() < Duration::from_secs(10), "{start}: {:?}", begin.elapsed());
    }
}
