"""Tool calls: the bundled model was trained on them, the server turns its text into calls."""

import json

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
EXPRESSION = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
}


def tool(name, description, parameters):
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


WEATHER = tool("get_weather", "Get the current weather in a city.", CITY)
CALCULATOR = tool("calculator", "Evaluate a math expression.", EXPRESSION)
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


def test_a_tool_is_called_with_its_arguments(chat):
    choice = chat(QUESTION, tools=[WEATHER]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_the_right_tool_is_chosen(chat):
    question = "What is 36245 times 5861?"
    (call,) = chat(question, tools=[WEATHER, CALCULATOR]).choices[0].message.tool_calls
    assert call.function.name == "calculator"
    assert json.loads(call.function.arguments) == {"expression": "36245 * 5861"}


def test_the_result_of_a_tool_is_answered(chat):
    message = chat(QUESTION, tools=[WEATHER]).choices[0].message
    result = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": "sunny, 21 degrees",
    }
    follow_up = chat([*QUESTION, message, result], tools=[WEATHER]).choices[0]
    assert follow_up.finish_reason == "stop"
    assert follow_up.message.tool_calls is None
    assert "sunny" in follow_up.message.content and "21" in follow_up.message.content


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


def test_a_question_without_need_of_a_tool_is_answered(chat):
    message = chat("What is the capital of France?", tools=[WEATHER]).choices[0].message
    assert message.tool_calls is None
    assert "Paris" in message.content


def test_a_call_cut_off_by_the_limit_says_so(chat):
    whole = chat(QUESTION, tools=[WEATHER])
    limit = whole.usage.completion_tokens - 5
    assert chat(QUESTION, tools=[WEATHER], max_tokens=limit).choices[0].finish_reason == "length"
