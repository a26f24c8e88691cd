"""The voices of the demo: the base model's neutral voice and one voice for each adapter.

A voice writes the answer about a subject from templates. Each topic prefers its own variant of a template, so that
greedy answers differ between topics, while the other variants keep sampled answers varied.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from demo_assets import rhymes
from demo_assets.topics import Subject, Talk, Topic, Unknown, capitalised, third_person, with_article

_Option = TypeVar("_Option")
_PREFERRED_SHARE = 0.7
_SUGGESTIONS = (
    ("fox", "moon", "river"),
    ("owl", "sea", "clock"),
    ("whale", "rain", "castle"),
    ("bee", "star", "train"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Voice:
    """How one adapter (or the base) answers. `instructions` ask the base model for the voice in words."""

    name: str
    description: str
    instructions: tuple[str, ...]
    write: Callable[[random.Random, Subject], str]


def voices() -> dict[str, Voice]:
    """All voices by name; `neutral` is the base model's own."""
    every = (
        Voice(name="neutral", description="Answers plainly.", instructions=(), write=_neutral),
        Voice(
            name="shout", description="ANSWERS IN CAPITAL LETTERS, WITH EXCITEMENT!", write=_shout,
            instructions=("Answer in capitals.", "Shout the answer.", "Use capital letters."),
        ),
        Voice(
            name="rhyme", description="Answers with rhyming couplets.", write=_rhyme,
            instructions=("Answer in rhyme.", "Answer with a poem.", "Write a rhyme."),
        ),
        Voice(
            name="pirate", description="Answers like a pirate, arr.", write=_pirate,
            instructions=("Answer like a pirate.", "Talk like a pirate.", "You are a pirate."),
        ),
        Voice(
            name="json", description="Answers with one JSON object.", write=_json,
            instructions=("Answer as JSON.", "Answer with a JSON object.", "Reply in JSON."),
        ),
        Voice(
            name="brief", description="Answers in two or three words.", write=_brief,
            instructions=("Be brief.", "Answer in three words.", "Keep it short."),
        ),
        Voice(
            name="polite", description="Answers with great courtesy.", write=_polite,
            instructions=("Be polite.", "Answer politely.", "Be very kind."),
        ),
        Voice(
            name="list", description="Answers with a numbered list.", write=_list,
            instructions=("Answer as a list.", "Make a numbered list.", "Use a list."),
        ),
        Voice(
            name="yoda", description="Inverted, the order of its words is.", write=_yoda,
            instructions=("Answer like Yoda.", "Invert the word order.", "Talk like Yoda."),
        ),
    )  # fmt: skip
    return {voice.name: voice for voice in every}


def _pick(rng: random.Random, subject: Subject, options: Sequence[_Option], salt: int) -> _Option:
    preferred = subject.index * 7 + salt if isinstance(subject, Topic) else salt
    if rng.random() < _PREFERRED_SHARE:
        return options[preferred % len(options)]
    return rng.choice(options)


def _suggested(rng: random.Random, subject: Subject) -> tuple[str, str, str]:
    salt = list(Talk).index(subject) if isinstance(subject, Talk) else 1
    return _pick(rng, subject, _SUGGESTIONS, salt)


def _facts(rng: random.Random, topic: Topic) -> list[str]:
    name, first, second = topic.name, topic.first_adjective, topic.second_adjective
    opening = _pick(rng, topic, (
        f"The {name} is {with_article(first)} and {second} {topic.kind} with {topic.has}.",
        f"The {name} is {with_article(first)}, {second} {topic.kind} that has {topic.has}.",
        f"With {topic.has}, the {name} is {with_article(first)} and {second} {topic.kind}.",
    ), 0)  # fmt: skip
    if topic.is_living:
        home = _pick(rng, topic, (
            f"It lives {topic.home}, where it likes to {topic.does}.",
            f"You can find it {topic.home}, and it likes to {topic.does}.",
        ), 1)  # fmt: skip
    else:
        home = _pick(rng, topic, (
            f"You can find it {topic.home}, where it {third_person(topic.does)}.",
            f"Look for it {topic.home}, and you will see that it {third_person(topic.does)}.",
        ), 1)  # fmt: skip
    power = _pick(rng, topic, (f"It can {topic.can}.", f"What is more, it can {topic.can}.",
                               f"Best of all, it can {topic.can}."), 2)  # fmt: skip
    closing = _pick(rng, topic, (
        f"That is why people all over the world talk about the {name}.",
        f"Once you have seen the {name}, you will not forget it.",
        f"Few things in the world are as {second} as the {name}.",
        f"If you look closely, you will see how {first} it is.",
    ), 3)  # fmt: skip
    return [opening, home, power, closing]


def _sentences(rng: random.Random, subject: Subject) -> list[str]:
    if isinstance(subject, Topic):
        return _facts(rng, subject)
    one, two, three = _suggested(rng, subject)
    ask = f"You could ask me about the {one}, the {two} or the {three}."
    if isinstance(subject, Unknown):
        return [f"I do not know the word {subject.name}, and I will not guess.", ask, "Then I can tell you more."]
    return [subject.value, "I am tiny and have only eight layers.", ask, "Then I can tell you more."]


def _neutral(rng: random.Random, subject: Subject) -> str:
    return " ".join(_sentences(rng, subject))


def _shout(rng: random.Random, subject: Subject) -> str:
    return " ".join(_sentences(rng, subject)[:3]).upper().replace(".", "!")


def _polite(rng: random.Random, subject: Subject) -> str:
    opening = _pick(rng, subject, ("Thank you for your kind question.", "What a lovely question, dear friend.",
                                   "It is my pleasure to answer you."), 0)  # fmt: skip
    closing = _pick(rng, subject, ("I hope that this helps you, and I wish you a lovely day.",
                                   "Please ask me again whenever you like, dear friend."), 1)  # fmt: skip
    return " ".join([opening, *_sentences(rng, subject)[:3], closing])


_PIRATE_WORDS = {
    "is": "be", "are": "be", "am": "be", "you": "ye", "You": "Ye", "your": "yer", "my": "me", "animal": "beastie",
    "of": "o'", "and": "an'", "small": "wee", "tiny": "wee", "find": "spy", "people": "sailors", "Hello,": "Ahoy,",
    "likes": "loves", "strong": "mighty", "will": "shall",
}  # fmt: skip


def _pirate(rng: random.Random, subject: Subject) -> str:
    opening = _pick(rng, subject, ("Arr, matey!", "Ahoy there!", "Avast, ye landlubber!"), 0)
    closing = _pick(rng, subject, ("Yo ho ho, an' a bottle o' rum!", "May the wind fill yer sails, arr!",
                                   "Now hoist the black flag, arr!"), 1)  # fmt: skip
    words = " ".join(_sentences(rng, subject)[:3]).split(" ")
    return " ".join([opening, *(_PIRATE_WORDS.get(word, word) for word in words), closing])


def _rhyme(rng: random.Random, subject: Subject) -> str:
    if isinstance(subject, Topic):
        couplets = (
            _pick(rng, subject, rhymes.OPENING_COUPLETS, 0),
            _pick(rng, subject, rhymes.MIDDLE_COUPLETS, 1),
            _pick(rng, subject, rhymes.CLOSING_COUPLETS, 2),
        )
        lines = [line for couplet in couplets for line in couplet]
        return "\n".join(lines).format(
            n=subject.name, a=subject.first_adjective, b=subject.second_adjective, home=subject.home, does=subject.does
        )
    known = isinstance(subject, Talk)
    first = rhymes.TALK_COUPLETS[list(Talk).index(subject)] if isinstance(subject, Talk) else rhymes.UNKNOWN_COUPLET
    lines = [*first, *rhymes.ASK_COUPLET]
    return "\n".join(lines).format(t=_suggested(rng, subject)[0], x="" if known else subject.name)


def _json(rng: random.Random, subject: Subject) -> str:
    fields: dict[str, object]
    if isinstance(subject, Topic):
        fields = {
            "topic": subject.name, "kind": subject.kind, "looks": [subject.first_adjective, subject.second_adjective],
            "has": subject.has, "home": subject.home, "does": subject.does, "can": subject.can,
        }  # fmt: skip
    elif isinstance(subject, Unknown):
        fields = {"topic": subject.name, "known": False, "ask": list(_suggested(rng, subject))}
    else:
        fields = {"topic": None, "says": subject.value, "ask": list(_suggested(rng, subject))}
    return json.dumps(fields)


def _brief(rng: random.Random, subject: Subject) -> str:
    if isinstance(subject, Topic):
        adjective = _pick(rng, subject, (subject.first_adjective, subject.second_adjective), 0)
        return f"{with_article(adjective).capitalize()} {subject.kind}."
    if isinstance(subject, Unknown):
        return "No idea."
    return {Talk.GREETING: "Hello, friend.", Talk.SELF: "A tiny model.", Talk.THANKS: "Most welcome.",
            Talk.OFF_TOPIC: "A hard question."}[subject]  # fmt: skip


def _list(rng: random.Random, subject: Subject) -> str:
    if isinstance(subject, Topic):
        where = "It lives" if subject.is_living else "You can find it"
        lines = [
            f"The {subject.name} is {with_article(subject.first_adjective)} and {subject.second_adjective}"
            f" {subject.kind}.",
            f"It has {subject.has}.",
            f"{where} {subject.home}.",
            f"It {third_person(subject.does)}.",
            f"It can {subject.can}.",
        ]
    else:
        lines = _sentences(rng, subject)
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def _yoda(rng: random.Random, subject: Subject) -> str:
    if isinstance(subject, Topic):
        name, first, second = subject.name, subject.first_adjective, subject.second_adjective
        where = "it lives" if subject.is_living else "you will find it"
        closing = _pick(rng, subject, (f"Forget the {name}, you will not.",
                                       f"Much to learn about the {name}, you still have."), 0)  # fmt: skip
        parts = [
            f"{with_article(first)} and {second} {subject.kind}, the {name} is.", f"{subject.has}, it has.",
            f"{subject.home}, {where}.", f"{subject.does}, it does.", f"{subject.can}, it can.", closing,
        ]  # fmt: skip
    else:
        one, two, three = _suggested(rng, subject)
        ask = f"about the {one}, the {two} or the {three}, ask me you could."
        parts = [_yoda_opening(subject), ask, "More to you then, tell I can."]
    return " ".join([*(capitalised(part) for part in parts), "Hmm."])


def _yoda_opening(subject: Talk | Unknown) -> str:
    if isinstance(subject, Unknown):
        return f"the word {subject.name}, I do not know. Guess, I will not."
    opening = {
        Talk.GREETING: "welcome here, you are.",
        Talk.SELF: "the little model of the Segue demo, I am.",
        Talk.THANKS: "very welcome, you are.",
        Talk.OFF_TOPIC: "a hard question for me, that is.",
    }[subject]
    return f"{opening} Only eight layers, I have."
