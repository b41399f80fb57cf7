"""Templated stories of 200 to 600 tokens about an asked-for hero."""

from __future__ import annotations

import random

from sample import Unit, vary
from words import ADJECTIVES, ANIMALS, COLORS, FOODS, NAMES, OBJECTS, PLACES, a

_HEROES = ANIMALS + """robot dragon wizard princess king queen pirate knight farmer baker teacher ghost giant
astronaut boy girl sailor tree star cloud train boat snowman unicorn""".split()
_TRAITS = "kind brave clever gentle curious small shy cheerful patient young".split()

_ASK = ["Tell me a story about {h}.", "Tell me a story about {h}.", "Write a story about {h}.", "Write a short story about {h}.",
        "Tell me a short story about {h}.", "Can you tell me a story about {h}?", "I want a story about {h}.",
        "Please tell me a story about {h}.", "A story about {h}, please.", "Tell a story about {h}.",
        "Make up a story about {h}.", "Story about {h}"]
_ASK_NAMED = ["Tell me a story about {h} called {n}.", "Write a story about {h} named {n}.",
              "Tell me a story about {h} called {n} who lives in the {p}.", "Write a story about {h} in the {p}.",
              "Tell me a story about {h} in the {p}.", "Tell me a story about {h} who finds {o}.",
              "Write a story about {h} and {o}."]
_ASK_ANY = ["Tell me a story.", "Tell me a story", "Write a story.", "Can you tell me a story?", "I want to hear a story.",
            "Tell me a short story.", "A story please", "Write a short story.", "Tell me a bedtime story.", "Another story please"]

_OPEN = ["Once upon a time, there was {a_t} {h} named {n}. {n} lived in the {p}.",
         "Long ago, in the {p}, there lived {a_t} {h} named {n}.",
         "In the {p} there lived {a_t} {h}. Everyone called the little {h} {n}.",
         "There once was {a_t} {h} named {n}, who lived near the {p}."]
_DAILY = ["Every morning, {n} walked around the {p} and said hello to everyone.", "{n} loved to eat {f} and to watch the {c} sky.",
          "Every day {n} shared some {f} with the neighbors.", "{n} had a warm little house with a {c} door.",
          "When the sun was shining, {n} liked to sing and dance.", "At night, {n} looked at the stars and dreamed of a great adventure."]
_EVENT = ["One day, {n} found {a_adj} {o} under a tree. \"Who could have lost this {o}?\" asked {n}.",
          "One morning, {n} saw {a_adj} {o} lying on the path. \"This {o} must belong to someone,\" said {n}.",
          "One day, something shiny lay on the ground. It was {a_adj} {o}! {n} picked it up and wondered whose {o} it was."]
_TROUBLE = ["Suddenly a big storm came. The wind was loud and the rain was cold, and {n} was a little afraid.",
            "But the way was long, and soon {n} was lost. All the trees looked the same.",
            "Then {n} came to a wide river, and there was no bridge to cross it.",
            "But it was getting dark, and {n} could not see the path any more."]
_FRIEND = ["Just then, {a_adj2} {k} named {m} came by. \"Do not worry,\" said {m}. \"I can help you.\"",
           "Then {n} met {a_adj2} {k} named {m}. \"Why are you here all alone?\" asked {m}.",
           "\"Hello!\" called a voice. It was {m}, {a_adj2} {k}. \"Can I help you?\" asked {m}."]
_TALK = ["{n} told {m} about the {o}. {m} listened and smiled.", "\"I found this {o},\" said {n}, \"and I want to bring it back.\"",
         "\"I am looking for the owner of this {o},\" said {n}. {m} thought for a while."]
_TOGETHER = ["Together they walked through the {p2}. They sang songs and shared some {f}.",
             "So the two went on together, past the {p2} and over a little hill.",
             "{m} knew a secret way through the {p2}, and soon they were safe and warm."]
_CLIMB = ["They asked everyone they met, but nobody knew the {o}.", "On the way they helped an old woman carry her basket of {f}.",
          "They rested under a tall tree and told each other stories.", "A little bird showed them the right way.",
          "They crossed a small bridge and looked at the fish in the water."]
_END = ["At last they met an old man. \"My {o}!\" he cried. \"I looked for it everywhere. Thank you!\" He gave them a big bag of {f}.",
        "In the evening they found a little girl who was crying. \"That is my {o}!\" she said, and she laughed again.",
        "At the end of the path stood a small house. The owner of the {o} lived there and was very happy to have it back."]
_HOME = ["{n} and {m} went home together and became best friends.", "From that day on, {n} and {m} were the best of friends.",
         "{n} was tired but happy, and {m} stayed for dinner. They ate {f} until late."]
_MORAL = ["{n} learned that a good friend is worth more than gold.", "And {n} learned that it is good to help others.",
          "{n} knew now that even a small {h} can do great things.", "And {n} never forgot that being kind makes everyone happy."]


def _plot(rng: random.Random, hero: str, name: str, place: str, item: str) -> str:
    friend, pal = rng.choice([x for x in ANIMALS if x != hero]), rng.choice([x for x in NAMES if x != name])
    adjective, second = rng.choice(ADJECTIVES), rng.choice(_TRAITS)
    slots = dict(h=hero, n=name, p=place, o=item, k=friend, m=pal, f=rng.choice(FOODS), c=rng.choice(COLORS),
                 p2=rng.choice([x for x in PLACES if x != place]), a_t=a(rng.choice(_TRAITS)),
                 a_adj=a(adjective), a_adj2=a(second))
    first = [rng.choice(_OPEN)] + rng.sample(_DAILY, rng.randint(1, 3))
    middle = [rng.choice(_EVENT), rng.choice(_TROUBLE)]
    meeting = [rng.choice(_FRIEND), rng.choice(_TALK)]
    journey = [rng.choice(_TOGETHER)] + rng.sample(_CLIMB, rng.randint(0, 3))
    last = [rng.choice(_END), rng.choice(_HOME), rng.choice(_MORAL), "The end."]
    return "\n\n".join(" ".join(part) for part in (first, middle, meeting, journey, last)).format(**slots)


def story(rng: random.Random) -> Unit:
    """A story about the hero the user asks for, or any hero."""
    hero, name, place, item = rng.choice(_HEROES), rng.choice(NAMES), rng.choice(PLACES), rng.choice(OBJECTS)
    kind = rng.random()
    if kind < 0.12:
        prompt, words = rng.choice(_ASK_ANY), []
    else:
        template = rng.choice(_ASK if kind < 0.6 else _ASK_NAMED)
        described = a(hero) if rng.random() < 0.8 else a(f"{rng.choice(_TRAITS)} {hero}")
        prompt = template.format(h=described, n=name, p=place, o=a(item))
        words = [hero] + [word for slot, word in (("{n}", name), ("{p}", place), ("{o}", item)) if slot in template]
    reply = _plot(rng, hero, name, place, item)
    messages = [{"role": "user", "content": vary(rng, prompt)}, {"role": "assistant", "content": reply}]
    return Unit("story", messages, {"kind": "story", "mentions": words, "min_words": 90, "last": "The end."})
