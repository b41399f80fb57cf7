"""Word lists the corpus generator draws from."""

from __future__ import annotations

import random

ANIMALS = """fox rabbit bear owl mouse wolf cat dog horse sheep duck frog turtle lion tiger
elephant monkey squirrel hedgehog badger deer otter penguin parrot crow goose hen cow pig goat
donkey camel whale dolphin crab snail bee ant spider eagle swan beaver mole seal""".split()

NOUNS = """apple banana orange pear plum grape cherry lemon melon peach bread butter cheese sugar
pepper salt soup rice pasta cake cookie honey table chair window door floor wall roof garden
kitchen mirror lamp candle clock watch bottle basket bucket blanket pillow carpet curtain drawer
pencil paper book letter stamp picture paint brush camera radio phone computer keyboard screen
river lake ocean island mountain valley forest desert beach field meadow bridge road street
village city castle tower temple market school library museum station airport harbor train
plane boat ship car truck bicycle wagon wheel engine ladder hammer nail screw rope chain anchor
shirt jacket coat hat glove scarf shoe sock button pocket belt ring crown jewel coin money
sun moon star planet comet cloud rain snow storm wind thunder rainbow shadow fire smoke ash
stone rock sand clay gold silver iron copper glass wood leaf tree flower grass seed root branch
doctor teacher farmer baker sailor soldier king queen prince pilot singer dancer writer painter
summer winter spring autumn morning evening night week month year minute second hour holiday
music song drum guitar piano violin flute trumpet dance game puzzle ball kite doll robot
dragon giant wizard ghost monster hero story dream secret promise question answer number
circle square triangle line point corner edge middle center planet rocket tunnel canal orchard
friend family mother father sister brother uncle cousin child baby student captain guard""".split()

ADJECTIVES = """happy sad big small old young fast slow warm cold bright dark quiet loud kind brave
clever gentle lazy busy hungry tired proud shy strong weak clean dirty empty full sweet bitter
soft hard smooth rough tall short wide narrow deep early late simple strange famous lucky""".split()

VERBS = """run walk jump swim fly sing dance read write draw paint cook bake build carry climb
catch throw push pull open close wash clean find lose give take bring send show hide wait watch
listen speak laugh smile sleep dream travel visit learn teach plant grow count play rest help""".split()

COLORS = """red blue green yellow orange purple pink brown black white gray silver golden violet""".split()

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paula
Quinn Rosa Sam Tina Victor Wendy Xavier Yara Zoe Adam Bella Carlos Diana Eric Fiona George Hannah
Ivan Julia Kevin Laura Mike Nora Oliver Peter Rachel Simon Tara Uma Vera Walter Alice Bruno Cora
Daniel Elena Frank Gina Hugo Ines Jonas Kate Luis Mona Noah Olga Pablo Rita Stefan Theo Ursula
Viktor Willa Yusuf Amir Chen Dara Emeka Fatima Hiro Ingrid Jamal Keiko Lena Mateo Nadia Omar Priya
Ravi Sofia Tomas Yuki Zara Ahmed Bianca Cyrus Dora Elias Freya Gustav Helga Idris Joanna""".split()

CITIES = """Paris London Berlin Madrid Rome Vienna Lisbon Athens Oslo Dublin Prague Warsaw Tokyo
Cairo Delhi Lima Toronto Boston Chicago Seattle Denver Sydney Nairobi Lagos Seoul Bangkok Hanoi
Mumbai Geneva Zurich Munich Hamburg Milan Naples Venice Porto Seville Valencia Krakow Helsinki
Stockholm Copenhagen Brussels Amsterdam Budapest Istanbul Montreal Vancouver Santiago Bogota
Havana Singapore Shanghai Beijing Osaka Kyoto Dakar Tunis Casablanca Miami Austin Dallas""".split()

PLACES = """forest|garden|village|mountain|river|castle|harbor|meadow|valley|island|desert|market|
orchard|lake|old mill|lighthouse|snowy hill|quiet town|deep wood|sunny farm""".replace("\n", "").split("|")

FOODS = """bread cheese soup honey cake berries apples nuts rice pasta cookies pears plums carrots
pancakes porridge""".split()

OBJECTS = """box key map lamp bag book coin ring hat cup kite drum bell boat coat clock rope basket
bottle chest door locker safe drawer folder ticket letter parcel shelf cabinet""".split()

ITEMS = """pencils notebooks chairs lamps shirts bottles apples oranges candles books plates cups
spoons towels batteries hammers brushes gloves pillows blankets tickets stamps bags boxes
umbrellas cameras clocks baskets buckets ladders""".split()

WORDS = sorted(set(NOUNS + ADJECTIVES + VERBS + ANIMALS + COLORS))

_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr pl st tr sh ch th".split()
_VOWELS = "a e i o u ai ea oo".split()
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "m", "k", "nd", "st"]


def pseudo_word(rng: random.Random, syllables: int | None = None) -> str:
    """An invented, pronounceable lower-case word."""
    count = syllables or rng.choice((1, 2, 2, 3))
    parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count))
    return "".join(parts)


def random_code(rng: random.Random, length: int | None = None) -> str:
    """A short mixed code such as ``K7Q-42``."""
    size = length or rng.randint(3, 6)
    alphabet = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
    return "".join(rng.choice(alphabet) for _ in range(size))


def any_word(rng: random.Random) -> str:
    """A listed word, or now and then an invented one."""
    return pseudo_word(rng) if rng.random() < 0.15 else rng.choice(WORDS)


def any_name(rng: random.Random) -> str:
    """A listed first name, or now and then an invented one."""
    if rng.random() < 0.2:
        return pseudo_word(rng, 2).capitalize()
    return rng.choice(NAMES)


def any_city(rng: random.Random) -> str:
    """A listed city, or now and then an invented one."""
    if rng.random() < 0.15:
        return pseudo_word(rng, 2).capitalize()
    return rng.choice(CITIES)


def a(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun
