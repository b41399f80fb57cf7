"""Tool calls: the bundled model was trained on them, the server turns its text into calls."""

import json

from offered_tools import QUESTION, WEATHER

def test_a_call_is_parsed_out_of_the_answer(chat):
    choice = chat(QUESTION, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id
    assert call.function.name == "get_weather"
    assert list(json.loads(call.function.arguments)) == ["city"]


def test_a_call_and_its_result_are_part_of_the_prompt(chat):
    first = chat(QUESTION, tools=[WEATHER])
    message = first.choices[0].message
    result = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": "sunny, 21 degrees",
    }
    second = chat([*QUESTION, message, result], tools=[WEATHER])
    assert second.choices[0].finish_reason == "stop"
    assert second.choices[0].message.tool_calls is None
    assert second.choices[0].message.content
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_a_streamed_call_adds_up_to_the_whole_one(chat):
    (whole,) = chat(QUESTION, tools=[WEATHER]).choices[0].message.tool_calls
    name, call_id, arguments, content, reason, num_deltas = None, None, "", "", None, 0
    for chunk in chat(QUESTION, tools=[WEATHER], stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reason = choice.finish_reason or reason
        for delta in choice.delta.tool_calls or []:
            assert delta.index == 0
            if num_deltas == 0:
                name, call_id = delta.function.name, delta.id
                assert delta.type == "function"
            else:
                assert delta.id is None and delta.function.name is None
            num_deltas += 1
            arguments += delta.function.arguments or ""
    assert (name, arguments) == (whole.function.name, whole.function.arguments)
    assert call_id and content == "" and reason == "tool_calls"
    assert num_deltas > 1, "arguments must arrive as they are written"


def test_tools_can_be_offered_and_forbidden(chat):
    message = chat(QUESTION, tools=[WEATHER], tool_choice="none", max_tokens=40).choices[0].message
    assert message.tool_calls is None
    assert message.content


def test_a_call_cut_off_by_the_limit_says_so(chat):
    whole = chat(QUESTION, tools=[WEATHER])
    limit = whole.usage.completion_tokens - 5
    assert chat(QUESTION, tools=[WEATHER], max_tokens=limit).choices[0].finish_reason == "length"
