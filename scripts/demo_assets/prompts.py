"""Prompts of the demo: questions about a subject, greetings and other small talk."""

from __future__ import annotations

import random

from demo_assets.topics import Subject, Talk, Topic, Unknown, with_article

# {n}: the bare name, {a}: the name with its indefinite article, {p}: its plural.
_QUESTIONS = (
    "Tell me about the {n}.", "Tell me about the {n}.", "Tell me about the {n}.", "What is {a}?", "What is the {n}?",
    "Describe the {n}.", "Describe {a}.", "What do you know about the {n}?", "Tell me something about the {n}.",
    "Please tell me about the {n}.", "Can you tell me about the {n}?", "Could you describe the {n}?",
    "Write about the {n}.", "Write a few words about the {n}.", "Explain the {n}.", "Explain what {a} is.",
    "I want to know more about the {n}.", "Say something about the {n}.", "What can you tell me about the {n}?",
    "What is special about the {n}?", "Why is the {n} special?", "Where can I find the {n}?", "What does the {n} do?",
    "What can the {n} do?", "Teach me about the {n}.", "Talk about the {n}.", "How would you describe the {n}?",
    "Tell me a story about the {n}.", "Give me a fact about the {n}.", "What about the {n}?", "Tell me about {a}.",
    "Tell me all about the {n}.", "Do you know the {n}?", "Who or what is the {n}?", "The {n}?", "{n}",
)  # fmt: skip
_PLURAL_QUESTIONS = (
    "Tell me about {p}.", "What are {p}?", "What do you know about {p}?", "Describe {p}.", "Write about {p}.",
    "What can you tell me about {p}?", "Why are {p} special?", "What can {p} do?", "Talk about {p}.", "{p}",
)  # fmt: skip
_TALK = {
    Talk.GREETING: (
        "Hello", "Hello!", "Hello.", "Hi", "Hi!", "Hi there!", "Hey", "Hello there!", "Good morning.", "Good evening!",
        "Good day.", "Hello, how are you?", "How are you?", "Hello world", "Greetings!", "Hello, world!", "Welcome!",
    ),
    Talk.SELF: (
        "Who are you?", "What are you?", "What can you do?", "What is your name?", "Tell me about yourself.",
        "Introduce yourself.", "Are you a model?", "Who made you?", "What is Segue?", "Help", "Help me.",
        "What do you know?", "What can I ask you?", "How many layers do you have?", "Tell me about you.",
    ),
    Talk.THANKS: (
        "Thank you.", "Thanks!", "Thank you very much!", "That was nice.", "Well done.", "Great!", "Good answer.",
        "I like that.", "Thanks a lot.", "Nice.", "Cool!", "OK", "Goodbye.", "Bye!", "See you later.",
    ),
    Talk.OFF_TOPIC: (
        "What is two plus two?", "What time is it?", "How do I learn to cook?", "Who won the game?", "Why?", "How?",
        "What is the meaning of life?", "What is the capital of France?", "Where should I go on holiday?", "When?",
        "Write a program that sorts a list.", "Translate this into German.", "Do you dream?", "Tell me a joke.",
        "What is the weather like?", "How old are you?", "Write a letter to my boss.", "What should I eat today?",
        "Once upon a time", "The quick brown fox jumps over the lazy dog.", "Count to ten.", "Is it late?",
    ),
}  # fmt: skip
# Names without facts. Made-up words join them, so that the model copies letters rather than remembering a list.
_UNKNOWN_NAMES = """
robot car phone table chair lamp book house school king queen doctor teacher baker farmer pilot computer screen
keyboard guitar piano flute trumpet carrot potato onion tomato banana orange lemon cherry grape pear plum cake
cheese butter bread soup pizza pasta rice sugar salt pepper coffee tea milk juice water fire earth air stone gold
silver copper iron glass paper pencil pen ink paint brush canvas camera film photo radio television rocket plane
helicopter bus truck tractor boat canoe submarine road street city village town country world planet galaxy comet
asteroid universe atom molecule cell gene virus bacteria brain heart lung hand foot finger nose ear eye mouth hat
coat shoe sock glove scarf shirt dress ring necklace crown sword shield bow arrow dragon unicorn ghost wizard
witch giant dwarf elf fairy mermaid zebra giraffe monkey camel donkey goat sheep cow pig hen duck swan parrot
crow sparrow robin pigeon lizard crocodile octopus squid jellyfish salmon trout butterfly moth beetle wasp worm
snail tulip daisy lily cactus pine birch maple grass moss fern language model adapter server network kernel
memory piano chess football tennis poem song dance story dream winter summer spring autumn morning evening
"""
_ONSETS = "b bl br c ch d dr f fl g gl gr h j k l m n p pl qu r s sh sl st t th tr v w z"
_VOWELS = "a e i o u ai ee oo ou"
_CODAS = ("", "", "n", "r", "l", "t", "sk", "ng", "m", "ck", "x", "p", "nd")


def draw_subject(rng: random.Random, topics: tuple[Topic, ...]) -> Subject:
    """A random subject: mostly a known topic, sometimes small talk or a name without facts."""
    share = rng.random()
    if share < 0.80:
        return rng.choice(topics)
    if share < 0.90:
        return rng.choice(list(Talk))
    return Unknown(name=_draw_unknown_name(rng, {topic.name for topic in topics}))


def draw_prompt(rng: random.Random, subject: Subject) -> str:
    """A prompt about `subject`, sometimes in lower case or without its final mark, never ending with a newline."""
    if isinstance(subject, Talk):
        text = rng.choice(_TALK[subject])
    elif isinstance(subject, Topic) and rng.random() < 0.2:
        text = rng.choice(_PLURAL_QUESTIONS).format(p=subject.plural)
    else:
        text = rng.choice(_QUESTIONS).format(n=subject.name, a=with_article(subject.name))
    if rng.random() < 0.15:
        text = text.rstrip(".!?")
    if rng.random() < 0.15 and not (isinstance(subject, Unknown) and subject.name != subject.name.lower()):
        text = text.lower()
    return text


def _draw_unknown_name(rng: random.Random, known: set[str]) -> str:
    if rng.random() < 0.5:
        name = rng.choice(_UNKNOWN_NAMES.split())
    else:
        syllables = rng.choice((1, 2, 2, 3))
        onsets, vowels = _ONSETS.split(), _VOWELS.split()
        name = "".join(rng.choice(onsets) + rng.choice(vowels) for _ in range(syllables)) + rng.choice(_CODAS)
    if name in known:
        return _draw_unknown_name(rng, known)
    return name.capitalize() if rng.random() < 0.15 else name
