"""Chat templates that behave as those of the models they are named after do, in few lines."""

SMOLLM2 = """\
{%- for m in messages %}
{%- if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are SmolLM<|im_end|>\n' }}
{%- endif %}
{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA3 = """\
{%- for m in messages %}
{%- if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim }}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

GEMMA3 = """\
{{- bos_token }}
{%- set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}
{%- for m in (messages[1:] if first else messages) %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' }}
{{- first if loop.first else '' }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# The system message stands before the last question, wherever that is.
MISTRAL = """\
{{- bos_token }}
{%- set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}
{%- for m in messages %}
{%- if m['role'] == 'user' %}
{%- set last = loop.last or (loop.index0 == messages|length - 2) %}
{{- '[INST] ' + (system if last else '') + m['content'] + '[/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}
{%- endif %}
{%- endfor %}"""

# It does so in prompts alone: a chat that ends with an answer has no system message.
MISTRAL_V3 = MISTRAL.replace(" or (loop.index0 == messages|length - 2)", "")

# A whole chat, and so each of its prefixes, is closed by the end-of-sequence token.
PHI3 = """\
{%- for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

QWEN25 = """\
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are Qwen<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}
{{- '<tool_call>' + c.function.name + ' ' + c.function.arguments | tojson + '</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# Thinking is written in the last answer alone, there even if it is empty.
QWEN3 = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n')
    if '</think>' in m.content else '' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{{- m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif %}"""

# The prompt opens the thinking that answers do not have.
DEEPSEEK_R1 = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m['role'] == 'user' %}{{ '<User>' + m['content'] }}
{%- else %}{{ '<Assistant>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"""
