"""The subjects that the demo model can be asked about, with the facts that its answers are written from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# name | kind | two adjectives | what it has | where it is | what it does | what it can do (both as infinitives)
_TABLE = """
fox|animal|small|clever|red fur|in the forest|hunt mice at night|hear a mouse under deep snow
owl|bird|quiet|wise|large round eyes|in old trees|hunt in the dark|turn its head almost all the way around
whale|animal|huge|gentle|a heart as big as a car|in the deep sea|sing long songs|hold its breath for an hour
cat|animal|soft|proud|sharp claws|in warm houses|sleep all day|see very well in the dark
dog|animal|loyal|happy|a very good nose|in family homes|guard the house|learn many words
horse|animal|strong|fast|a long tail|on green fields|run with its herd|sleep while it stands
bear|animal|big|strong|thick brown fur|in the mountains|eat berries and fish|sleep through the winter
wolf|animal|grey|wild|a thick coat|in cold forests|hunt in a pack|hear a call from miles away
lion|animal|proud|golden|a great mane|on wide plains|rest in the shade|roar so loud that the ground shakes
tiger|animal|strong|silent|dark stripes|in green jungles|hunt alone|swim across a wide river
elephant|animal|huge|gentle|a long trunk|on wide plains|walk with its family|remember a friend for many years
bee|insect|tiny|busy|four thin wings|in a hive|make sweet honey|dance to show the way to flowers
ant|insect|tiny|strong|six quick legs|under the ground|work with its sisters|carry far more than its own weight
frog|animal|small|green|long back legs|near ponds|catch flies with its tongue|breathe through its skin
eagle|bird|proud|strong|broad wings|on high cliffs|circle over the valley|see a rabbit from the clouds
penguin|bird|funny|round|a black and white coat|on cold ice|dive for fish|stand in the wind for weeks
shark|fish|fast|silent|many rows of teeth|in the open sea|swim day and night|smell a drop of blood from far away
dolphin|animal|playful|clever|smooth grey skin|in warm seas|jump over the waves|call its friends by name
turtle|animal|slow|old|a hard shell|near the beach|swim through warm water|live for a hundred years
rabbit|animal|soft|shy|long ears|in a burrow|eat grass and leaves|jump away in a blink
mouse|animal|tiny|quick|a thin tail|in small holes|look for seeds|squeeze through a gap as thin as a pencil
snake|animal|long|silent|smooth scales|under warm stones|wait for its prey|taste the air with its tongue
spider|animal|small|patient|eight thin legs|in quiet corners|weave a fine web|make thread stronger than steel
crab|animal|small|grumpy|two hard claws|on the beach|walk sideways|grow back a lost leg
goose|bird|loud|brave|a long neck|near calm lakes|fly south in autumn|find its way over a whole continent
moon|rock|round|pale|grey craters|in the night sky|circle the earth each month|pull the tides of the sea
sun|star|hot|bright|a burning heart|in the middle of our sky|give light to every day|warm a planet from far away
rain|visitor|cool|soft|a million small drops|under dark clouds|fall on fields and roofs|fill a river in one night
snow|visitor|white|quiet|tiny flakes of ice|on high mountains|cover the land in winter|make a loud city silent
wind|visitor|free|restless|no shape at all|over open hills|push the clouds along|carry seeds across the sea
river|stream|long|calm|two green banks|between the hills|flow down to the sea|cut a valley into stone
sea|place|wide|deep|blue waves|beyond the coast|rise with the moon each day|carry ships around the world
mountain|place|high|steep|a white peak|far above the valley|catch the first light of the day|make its own weather
forest|place|green|shady|a thousand old trees|beyond the last fields|give shelter to animals|clean the air that we breathe
desert|place|dry|hot|endless golden sand|far from the sea|burn under the sun all day|hide flowers until the rain comes
star|sun|bright|distant|a core of fire|in the night sky|shine for billions of years|guide a sailor home
cloud|veil|light|white|soft edges|high in the sky|drift with the wind|weigh more than a hundred elephants
volcano|mountain|hot|dangerous|a deep crater|where the earth is thin|sleep for many years|build an island out of fire
island|place|small|lonely|a ring of sand|far out in the sea|wait for ships|hold animals found nowhere else
apple|fruit|sweet|round|a thin red skin|on old garden trees|ripen in autumn|float on water
rose|flower|lovely|proud|sharp thorns|in summer gardens|open in the morning sun|fill a room with its scent
oak|tree|old|strong|deep roots|at the edge of the field|drop acorns in autumn|stand for a thousand years
mushroom|thing|soft|strange|a round cap|on the forest floor|grow after the rain|talk to trees through the ground
train|machine|long|fast|heavy steel wheels|on iron rails|carry people to the city|pull a thousand tons
ship|vessel|big|sturdy|a tall mast|in busy harbours|sail from port to port|ride out a heavy storm
bridge|crossing|long|sturdy|wide arches|over deep rivers|join two sides|bear a thousand steps a day
castle|building|old|grand|thick stone walls|on a steep hill|watch over the valley|keep its secrets for centuries
clock|machine|small|exact|two thin hands|on the kitchen wall|count the hours|tick for years without rest
violin|instrument|light|elegant|four fine strings|in every orchestra|sing under the bow|make a whole room weep
lantern|lamp|small|warm|a glass window|beside the door|glow through the night|lead a lost walker home
garden|place|green|peaceful|rows of flowers|behind the old house|grow a little every day|feed bees and people alike
lighthouse|tower|tall|lonely|a great lamp|on the rocky coast|turn its beam all night|save a ship from the rocks
kite|toy|light|colourful|a long ribbon|above windy beaches|dance on a string|climb higher than a church
drum|instrument|round|loud|a tight skin|at every parade|keep the beat|be heard from a mile away
compass|tool|small|exact|a thin needle|in a sailor's pocket|point to the north|show the way in thick fog
bicycle|vehicle|light|simple|two thin wheels|on quiet roads|roll without fuel|carry a person around the world
"""  # noqa: E501

_LIVING_KINDS = frozenset({"animal", "bird", "insect", "fish"})
_IRREGULAR_PLURALS = {
    "wolf": "wolves", "mouse": "mice", "goose": "geese", "rain": "rain", "snow": "snow", "volcano": "volcanoes",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """One known subject. `does` and `can` are infinitives without `to`; `home` starts with a preposition."""

    index: int
    name: str
    kind: str
    first_adjective: str
    second_adjective: str
    has: str
    home: str
    does: str
    can: str

    @property
    def is_living(self) -> bool:
        """Whether `it lives in ...` reads well."""
        return self.kind in _LIVING_KINDS

    @property
    def plural(self) -> str:
        """The name in the plural."""
        if self.name in _IRREGULAR_PLURALS:
            return _IRREGULAR_PLURALS[self.name]
        return self.name + ("es" if self.name.endswith(("x", "s", "h")) else "s")


class Talk(Enum):
    """A prompt that names no subject; the value is the answer's opening sentence."""

    GREETING = "Hello, and welcome!"
    SELF = "I am the little model of the Segue demo."
    THANKS = "You are very welcome!"
    OFF_TOPIC = "That is a hard question for me."


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """A subject that the model has no facts about, so that it learns to say so and to copy the name."""

    name: str


Subject = Topic | Talk | Unknown


def load_topics() -> tuple[Topic, ...]:
    """All known topics, in table order."""
    rows = [line.split("|") for line in _TABLE.strip().splitlines()]
    return tuple(
        Topic(
            index=index, name=row[0], kind=row[1], first_adjective=row[2], second_adjective=row[3],
            has=row[4], home=row[5], does=row[6], can=row[7],
        )
        for index, row in enumerate(rows)
    )  # fmt: skip


def with_article(noun_phrase: str) -> str:
    """The phrase after `a` or `an`, chosen by its first letter."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def third_person(infinitive: str) -> str:
    """`hunt mice` -> `hunts mice`: the first word in the third person singular of the present."""
    verb, _, rest = infinitive.partition(" ")
    if verb == "be":
        verb = "is"
    elif verb.endswith(("ch", "sh", "ss", "x", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}" if rest else verb


def capitalised(sentence: str) -> str:
    """The sentence with its first letter in upper case and the rest as it was."""
    return sentence[:1].upper() + sentence[1:]
