"""Chats that several tests render."""

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
THOUGHT = [
    CHAT[0],
    {"role": "assistant", "content": "<think>\ngreet\n</think>\n\nhello"},
    CHAT[2],
    {"role": "assistant", "content": "<think>\npart\n</think>\n\nso long"},
]
ASKED = {"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}
CALLS = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": None, "tool_calls": [ASKED]},
    {"role": "tool", "content": "sun"},
    {"role": "assistant", "content": "sunny"},
]
