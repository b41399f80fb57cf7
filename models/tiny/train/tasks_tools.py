"""Tool calls (calculator, weather, clock and a few everyday ones) and their follow-up turns."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from chat import dumps
from sample import Message, Unit, ends, same, vary
from words import CITIES, COLORS, NOUNS, any_city, any_name, any_word

Tool = dict[str, Any]


@dataclass
class Case:
    """A tool, a request for it, the right arguments, what the tool returns, the final answer."""

    tool: Tool
    prompt: str
    arguments: dict[str, Any]
    result: str
    answer: str


def _tool(name: str, description: str, properties: dict[str, Any]) -> Tool:
    fields = {key: ({"type": value} if isinstance(value, str) else value) for key, value in properties.items()}
    parameters = {"type": "object", "properties": fields, "required": list(fields)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _calculator(rng: random.Random) -> Case:
    name = rng.choice(("calculator", "calculator", "calculate", "calc", "math"))
    field = rng.choice(("expression", "expression", "query", "input"))
    tool = _tool(name, rng.choice(("Evaluate a math expression.", "Do arithmetic.", "Calculate the value of an expression.")),
                 {field: "string"})
    a, b = rng.randint(2, 99999), rng.randint(2, 9999)
    sign, value = rng.choice((("+", a + b), ("-", a - b), ("*", a * b)))
    expression = f"{a} {sign} {b}"
    word = {"+": "plus", "-": "minus", "*": "times"}[sign]
    prompt = rng.choice((f"What is {expression}?", f"Calculate {expression}.", f"What is {a} {word} {b}?",
                         f"Use the calculator: {expression}", f"How much is {expression}?", f"Compute {expression}."))
    result = rng.choice((str(value), dumps({"result": value})))
    return Case(tool, prompt, {field: expression}, result, f"{expression} = {value}.")


def _weather(rng: random.Random) -> Case:
    name = rng.choice(("get_weather", "get_weather", "weather", "current_weather", "get_current_weather"))
    field = rng.choice(("city", "city", "location", "place"))
    tool = _tool(name, rng.choice(("Get the current weather in a city.", "Look up the weather.", "Current weather for a place.")),
                 {field: "string"})
    city = any_city(rng)
    prompt = rng.choice((f"What is the weather in {city}?", f"How is the weather in {city}?", f"What's the weather like in {city}?",
                         f"Is it warm in {city}?", f"Weather in {city}?", f"Tell me the weather in {city}.",
                         f"How warm is it in {city} today?"))
    sky, degrees = rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "clear")), rng.randint(-15, 40)
    result = rng.choice((dumps({"temperature": degrees, "condition": sky}), dumps({field: city, "temperature": degrees, "condition": sky}),
                         f"{sky}, {degrees} degrees"))
    return Case(tool, prompt, {field: city}, result, f"The weather in {city} is {sky} with {degrees} degrees.")


def _clock(rng: random.Random) -> Case:
    name = rng.choice(("get_time", "clock", "clock", "current_time", "get_current_time"))
    field = rng.choice(("city", "city", "location", "timezone"))
    tool = _tool(name, rng.choice(("Get the current time in a city.", "Tell the time.", "Current local time of a place.")),
                 {field: "string"})
    city = any_city(rng)
    prompt = rng.choice((f"What time is it in {city}?", f"What is the time in {city}?", f"Tell me the time in {city}.",
                         f"Time in {city}?", f"Do you know the time in {city}?", f"What's the time in {city} now?"))
    time = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    result = rng.choice((time, dumps({"time": time}), dumps({field: city, "time": time})))
    return Case(tool, prompt, {field: city}, result, f"It is {time} in {city}.")


def _everyday(rng: random.Random) -> Case:
    kind = rng.randrange(7)
    if kind == 0:
        n = rng.randint(1, 90)
        tool = _tool(rng.choice(("set_timer", "start_timer")), "Set a timer.", {"minutes": "integer"})
        prompt = rng.choice((f"Set a timer for {n} minutes.", f"Start a timer of {n} minutes.", f"Timer for {n} minutes please."))
        return Case(tool, prompt, {"minutes": n}, "ok", f"The timer is set for {n} minutes.")
    if kind == 1:
        name, text = any_name(rng), " ".join(any_word(rng) for _ in range(rng.randint(1, 5)))
        tool = _tool("send_message", "Send a message to a person.", {"to": "string", "text": "string"})
        prompt = rng.choice((f"Send a message to {name}: {text}", f"Tell {name}: {text}", f'Send "{text}" to {name}.'))
        return Case(tool, prompt, {"to": name, "text": text}, rng.choice(("sent", "ok")), f"The message to {name} was sent.")
    if kind == 2:
        title = " ".join(any_word(rng) for _ in range(rng.randint(1, 3)))
        tool = _tool(rng.choice(("play_music", "play_song")), "Play a song.", {"title": "string"})
        prompt = rng.choice((f"Play the song {title}.", f"Play {title}.", f"I want to hear {title}."))
        return Case(tool, prompt, {"title": title}, "playing", f"Now playing {title}.")
    if kind == 3:
        room, state = rng.choice(("kitchen", "bedroom", "garage", "hall", "office", "garden")), rng.choice(("on", "off"))
        tool = _tool(rng.choice(("set_light", "switch_light")), "Switch a light on or off.", {"room": "string", "state": "string"})
        prompt = rng.choice((f"Turn {state} the light in the {room}.", f"Switch the {room} light {state}.", f"Light {state} in the {room}, please."))
        return Case(tool, prompt, {"room": room, "state": state}, "ok", f"The light in the {room} is {state}.")
    if kind == 4:
        query = f"{rng.choice(COLORS)} {rng.choice(NOUNS)}"
        tool = _tool(rng.choice(("search", "web_search")), "Search the web.", {"query": "string"})
        prompt = rng.choice((f"Search for {query}.", f"Search the web for {query}.", f"Look up {query}."))
        count = rng.randint(1, 900)
        return Case(tool, prompt, {"query": query}, f"{count} results", f"I found {count} results for {query}.")
    if kind == 5:
        item, count = rng.choice(NOUNS), rng.randint(1, 40)
        tool = _tool(rng.choice(("add_to_cart", "order_item")), "Order an item.", {"item": "string", "quantity": "integer"})
        prompt = rng.choice((f"Order {count} of the item {item}.", f"Add {count} {item} to my cart.", f"Buy {count} x {item}."))
        return Case(tool, prompt, {"item": item, "quantity": count}, "ok", f"I ordered {count} x {item}.")
    start, goal = rng.sample(CITIES, 2)
    tool = _tool(rng.choice(("find_route", "get_distance")), "Find the distance between two cities.", {"start": "string", "end": "string"})
    prompt = rng.choice((f"How far is it from {start} to {goal}?", f"What is the distance from {start} to {goal}?"))
    distance = rng.randint(20, 9000)
    result = rng.choice((f"{distance} km", dumps({"km": distance})))
    return Case(tool, prompt, {"start": start, "end": goal}, result, f"It is {distance} km from {start} to {goal}.")


_MAKERS = [_calculator, _weather, _clock, _everyday]


def case(rng: random.Random) -> Case:
    """A tool with one request for it."""
    return rng.choices(_MAKERS, (28, 26, 22, 24))[0](rng)


def offered(rng: random.Random, needed: list[Tool]) -> list[Tool]:
    """The needed tools among zero to two others, shuffled, no two of the same name."""
    tools = list(needed)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        tools.append(case(rng).tool)
    unique = list({tool["function"]["name"]: tool for tool in reversed(tools)}.values())
    rng.shuffle(unique)
    return unique


def call_message(name: str, arguments: dict[str, Any]) -> Message:
    """An assistant turn that calls one tool."""
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tools(rng: random.Random) -> Unit:
    """A tool call, alone or with the tool's result and the final answer."""
    item = case(rng)
    name = item.tool["function"]["name"]
    messages: list[Message] = [{"role": "user", "content": vary(rng, item.prompt) if item.prompt[-1] in ".?" else item.prompt},
                               call_message(name, item.arguments)]
    check: dict[str, Any] = {"kind": "tool_call", "value": {"name": name, "arguments": item.arguments}}
    if rng.random() < 0.75:
        messages += [{"role": "tool", "content": item.result}, {"role": "assistant", "content": item.answer}]
        check = same(item.answer) if "=" not in item.answer else ends(item.answer.split("= ")[1].rstrip("."))
    return Unit("tools", messages, check, tools=offered(rng, [item.tool]))
