"""Tools as a client offers them; the bundled model was trained on calls like these."""

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
