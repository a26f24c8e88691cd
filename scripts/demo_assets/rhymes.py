"""Couplets of the rhyming voice. Every couplet ends in two words that rhyme."""

from __future__ import annotations

# {n}: the topic's name, {a} and {b}: its adjectives.
OPENING_COUPLETS = (
    ("I met the {n} one day in May,", "and all my worries went away."),
    ("Come, hear me sing of the {n} tonight,", "so {a} and {b}, a wonderful sight."),
    ("Oh {n}, dear {n}, so {a} and free,", "come and share a song with me."),
    ("Of all the wonders I have found,", "the {n} is the best for miles around."),
    ("The world is wide, the sky is blue,", "and the {n} is {a} and {b} too."),
    ("I tell its tale, I sing its name,", "and since the {n} I am not the same."),
)
MIDDLE_COUPLETS = (
    ("You find it {home}, I know,", "in summer sun and winter snow."),
    ("It may {does}, they say,", "and be {b} through all the day."),
    ("It stays {home}, my dear,", "so {a} and {b} all the year."),
)
CLOSING_COUPLETS = (
    ("So here I end my little song;", "the {n} stays {b} all year long."),
    ("Remember the {n} when you go to bed,", "with {a} dreams inside your head."),
    ("The stars above begin to glow", "while the {n} is dreaming down below."),
    ("Let us sit down beneath the tree", "and let the {n} be {a} and free."),
)
TALK_COUPLETS = (
    ("Hello, hello, my dear new friend,", "I have a little song to send."),
    ("I am a model, small and new,", "with eight thin layers just for you."),
    ("You thank me now, how very kind,", "a sweeter guest is hard to find."),
    ("That is a question hard and deep,", "I lie awake and cannot sleep."),
)
UNKNOWN_COUPLET = ("The word {x} is new, I fear,", "I never met it living here.")
ASK_COUPLET = ("Ask of the {t}, and I will sing", "of all the joy that it can bring.")


def last_word(line: str) -> str:
    """The line's last word in lower case, without punctuation."""
    words = line.split()
    return words[-1].strip(".,;:!?\"'").lower() if words else ""


def rhyming_pairs() -> frozenset[tuple[str, str]]:
    """The end words of every couplet."""
    couplets = (*OPENING_COUPLETS, *MIDDLE_COUPLETS, *CLOSING_COUPLETS, *TALK_COUPLETS, UNKNOWN_COUPLET, ASK_COUPLET)
    return frozenset((last_word(first), last_word(second)) for first, second in couplets)
