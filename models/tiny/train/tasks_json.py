"""JSON extraction: a sentence and the wanted fields in, one JSON object out."""

from __future__ import annotations

import random
from typing import Any, Callable

from chat import dumps
from facts import MONTHS
from sample import Unit, ask
from words import ADJECTIVES, COLORS, FOODS, ITEMS, NOUNS, any_city, any_name, random_code

_JOBS = """teacher doctor baker farmer sailor painter pilot singer dancer writer nurse lawyer engineer cook
driver gardener plumber librarian student carpenter""".split()
_ROOMS = "kitchen garden library office garage attic hall cellar studio classroom".split()

Record = tuple[str, dict[str, Any], dict[str, str]]


def _person(rng: random.Random) -> Record:
    name, age, city, job = any_name(rng), rng.randint(5, 99), any_city(rng), rng.choice(_JOBS)
    text = rng.choice((f"{name} is {age} years old and lives in {city}, working as a {job}.",
                       f"My friend {name}, a {job} from {city}, turned {age} last week.",
                       f"{name} ({age}) is a {job} in {city}.",
                       f"In {city} I met {name}, who is {age} and works as a {job}.",
                       f"Meet {name}. Age: {age}. Job: {job}. City: {city}."))
    return text, {"name": name, "age": age, "city": city, "job": job}, dict(name="string", age="integer", city="string", job="string")


def _order(rng: random.Random) -> Record:
    item, count, price, name = rng.choice(ITEMS), rng.randint(2, 60), rng.randint(1, 200), any_name(rng)
    text = rng.choice((f"{name} ordered {count} {item} for {price} dollars.",
                       f"Please send {count} {item} to {name}. The price is {price} dollars.",
                       f"An order of {count} {item} came from {name}, and it costs {price} dollars.",
                       f"Customer {name} wants {count} {item} and pays {price} dollars."))
    return text, {"customer": name, "item": item, "quantity": count, "price": price}, \
        dict(customer="string", item="string", quantity="integer", price="integer")


def _event(rng: random.Random) -> Record:
    kind = rng.choice(("meeting", "party", "concert", "lesson", "dinner", "race", "workshop", "picnic"))
    city, month, day = any_city(rng), rng.choice(MONTHS), rng.randint(1, 28)
    hour = f"{rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}"
    text = rng.choice((f"The {kind} takes place in {city} on {month} {day} at {hour}.",
                       f"On {month} {day} there is a {kind} in {city}, starting at {hour}.",
                       f"Join us in {city} for a {kind} at {hour} on {month} {day}!"))
    return text, {"event": kind, "city": city, "month": month, "day": day, "time": hour}, \
        dict(event="string", city="string", month="string", day="integer", time="string")


def _product(rng: random.Random) -> Record:
    noun, color, price, code = rng.choice(NOUNS), rng.choice(COLORS), rng.randint(1, 999), random_code(rng)
    stock = rng.random() < 0.5
    state = "in stock" if stock else "sold out"
    text = rng.choice((f"The {color} {noun} with code {code} costs {price} dollars and is {state}.",
                       f"Item {code}: a {color} {noun}, {price} dollars, {state}.",
                       f"We sell a {color} {noun} for {price} dollars (code {code}). It is {state}."))
    return text, {"product": noun, "color": color, "price": price, "code": code, "in_stock": stock}, \
        dict(product="string", color="string", price="integer", code="string", in_stock="boolean")


def _recipe(rng: random.Random) -> Record:
    dish, minutes, people = rng.choice(FOODS), rng.randint(5, 90), rng.randint(1, 12)
    parts = rng.sample(["salt", "butter", "sugar", "eggs", "milk", "flour", "pepper", "garlic", "oil", "cream"], rng.randint(2, 4))
    listed = ", ".join(parts[:-1]) + " and " + parts[-1]
    text = rng.choice((f"For the {dish} you need {listed}. It takes {minutes} minutes and serves {people}.",
                       f"The {dish} serves {people}, is ready in {minutes} minutes and needs {listed}.",
                       f"Cook the {dish} with {listed} for {minutes} minutes. Enough for {people}."))
    return text, {"dish": dish, "ingredients": parts, "minutes": minutes, "serves": people}, \
        dict(dish="string", ingredients="array", minutes="integer", serves="integer")


def _pet(rng: random.Random) -> Record:
    owner, pet = any_name(rng), any_name(rng)
    kind, color, age = rng.choice(("dog", "cat", "horse", "parrot", "rabbit", "turtle")), rng.choice(COLORS), rng.randint(1, 20)
    text = rng.choice((f"{owner} has a {color} {kind} called {pet}, which is {age} years old.",
                       f"{pet} is the {age}-year-old {color} {kind} of {owner}.",
                       f"A {kind} named {pet} belongs to {owner}. It is {color} and {age} years old."))
    return text, {"owner": owner, "pet": pet, "kind": kind, "color": color, "age": age}, \
        dict(owner="string", pet="string", kind="string", color="string", age="integer")


def _lost(rng: random.Random) -> Record:
    noun, adjective, room, name = rng.choice(NOUNS), rng.choice(ADJECTIVES), rng.choice(_ROOMS), any_name(rng)
    text = rng.choice((f"{name} left a {adjective} {noun} in the {room}.", f"The {adjective} {noun} in the {room} belongs to {name}.",
                       f"In the {room} there is a {adjective} {noun}. Its owner is {name}."))
    return text, {"object": noun, "condition": adjective, "room": room, "owner": name}, \
        dict(object="string", condition="string", room="string", owner="string")


_RECORDS: list[Callable[[random.Random], Record]] = [_person, _order, _event, _product, _recipe, _pet, _lost]


def _schema(keys: list[str], types: dict[str, str]) -> str:
    properties = {key: {"type": types[key]} | ({"items": {"type": "string"}} if types[key] == "array" else {}) for key in keys}
    return dumps({"type": "object", "properties": properties, "required": keys})


def _wish(rng: random.Random, keys: list[str], types: dict[str, str]) -> str:
    listed = ", ".join(keys)
    kind = rng.randrange(6)
    if kind == 0:
        return f"Use this JSON schema: {_schema(keys, types)}"
    if kind == 1:
        return "Schema: " + dumps({key: types[key] for key in keys})
    return rng.choice((f"Return JSON with the keys {listed}.", f"Extract {listed} as JSON.",
                       f"Give me a JSON object with {listed}.", f"Keys: {listed}.", f"Extract these fields as JSON: {listed}",
                       f"Answer in JSON with the fields {listed}."))


def extract(rng: random.Random) -> Unit:
    """Find the wanted fields in a sentence."""
    text, values, types = rng.choice(_RECORDS)(rng)
    keys = rng.sample(list(values), rng.randint(1 if rng.random() < 0.2 else 2, len(values)))
    wish = _wish(rng, keys, types)
    layout = rng.choice(("{w}\n{t}", "{w}\nText: {t}", "{t}\n{w}", "Extract data from the text.\n{w}\nText: {t}",
                         "Text: {t}\n{w}", "{t} {w}", "{w} {t}"))
    if _bare(wish) and "{t} {w}" != layout:
        layout = layout.replace("{w}", "Extract JSON. {w}") if rng.random() < 0.5 else layout
    answer = {key: values[key] for key in keys}
    return ask("json", layout.format(w=wish, t=text), dumps(answer),
               {"kind": "json", "value": answer})


def _bare(wish: str) -> bool:
    """Whether the wish names fields without saying what to do."""
    return wish.startswith(("Keys:", "Schema:", "Use"))
