"""Words and grammar of the quickstart task: what can be asked, and replies of every quality.

A subject is what a prompt is about. Each has details of its own (things seen at an event, tips for a skill, reasons for
a fact), which only a reply to *that* prompt should use. About 450 words in all, so that a 1024-token BPE covers them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["event", "skill", "fact"]
Quality = Literal["good", "plain", "vague", "curt", "off_topic", "rude", "repeated", "rambling", "fawning"]


@dataclass(frozen=True)
class Subject:
    """``name`` as it stands in a prompt; ``details`` are phrases that count as specific."""

    kind: Kind
    name: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """One prompt: its text, and what it asks about and for whom."""

    text: str
    task: str
    subject: Subject
    person: str


def _subjects(kind: Kind, table: dict[str, str]) -> tuple[Subject, ...]:
    return tuple(Subject(kind, name, tuple(details.split("; "))) for name, details in table.items())


EVENTS = _subjects(
    "event",
    {
        "the science fair": "the paper volcano; the blue poster; the seed jars",
        "the school play": "the painted castle; the funny song; the paper masks",
        "the garden party": "the lemon cake; the rose bushes; the small lanterns",
        "the bake sale": "the apple pie; the oat cookies; the price tags",
        "the book club": "the mystery novel; the ginger tea; the reading list",
        "the soccer game": "the early goal; the orange slices; the new nets",
        "the music lesson": "the slow scales; the old piano; the warm drums",
        "the camping trip": "the tall tent; the bean soup; the morning hike",
        "the museum visit": "the dinosaur bones; the silver coins; the quiet gallery",
        "the birthday dinner": "the chocolate tower; the tall candles; the noodle bowls",
        "the art class": "the clay bowls; the soft brushes; the wall prints",
        "the train ride": "the window seats; the river view; the cheese rolls",
        "the chess match": "the clever opening; the wooden clock; the last move",
        "the beach walk": "the flat stones; the red kite; the crab shells",
    },
)
SKILLS = _subjects(
    "skill",
    {
        "baking bread": "let the dough rest; heat the oven early; weigh the flour",
        "growing tomatoes": "water the roots slowly; pick a sunny corner; tie the stems",
        "playing the guitar": "tune the strings; practice two chords; keep a slow beat",
        "saving money": "write down each cost; set a weekly limit; cook at home",
        "sleeping well": "dim the lamps; keep one bedtime; put the phone away",
        "writing a letter": "start with good news; keep it to one page; read it aloud",
        "packing a bag": "roll the shirts; put shoes at the bottom; make a checklist",
        "training a puppy": "use tiny treats; repeat one command; walk before lunch",
        "riding a bike": "look far ahead; check the brakes; lower the seat",
        "cooking rice": "rinse the grains; cover the pot; wait ten minutes",
        "painting a wall": "tape the edges; stir the can; use a wide roller",
        "running a race": "warm up your legs; begin at an easy pace; sip some water",
    },
)
FACTS = _subjects(
    "fact",
    {
        "the sky is blue": "air scatters blue light; red light travels straight",
        "leaves fall in autumn": "trees save water; cold days stop the green food",
        "it rains": "clouds hold tiny drops; heavy drops fall down",
        "ice floats": "frozen water spreads out; it weighs less than the lake",
        "the moon shines": "it mirrors the sun; it has no fire of its own",
        "cats purr": "a muscle in the throat shakes; the sound calms them",
        "bread rises": "yeast makes gas; the dough traps bubbles",
        "birds fly south": "insects hide in winter; warm places have more food",
        "the sea is salty": "rivers carry minerals; the sun lifts only fresh water",
        "we dream": "the brain sorts memories; feelings turn into stories",
    },
)
SUBJECTS = EVENTS + SKILLS + FACTS
PEOPLE = (
    *("teacher", "neighbor", "cousin", "coach", "classmate", "aunt", "uncle"),
    *("friend", "grandmother", "brother", "sister", "boss", "landlord", "mentor"),
)

WORDINGS: dict[str, tuple[str, ...]] = {
    "thanks": (
        "Write a short thank-you note to my {person} about {name}.",
        "Help me thank my {person} for {name}.",
    ),
    "invitation": (
        "Write a short invitation to {name} for my {person}.",
        "Help me invite my {person} to {name}.",
    ),
    "apology": (
        "Write a short apology to my {person} for missing {name}.",
        "I missed {name}. Help me say sorry to my {person}.",
    ),
    "tips": (
        "Give my {person} two tips for {name}.",
        "My {person} is new to {name}. What should we know?",
        "How can my {person} get better at {name}?",
    ),
    "explanation": (
        "Explain to my {person} why {name}.",
        "Tell my {person} in simple words why {name}.",
        "My {person} asks why {name}. What should I say?",
    ),
}
TASKS: dict[Kind, tuple[str, ...]] = {
    "event": ("thanks", "invitation", "apology"),
    "skill": ("tips",),
    "fact": ("explanation",),
}


def all_requests() -> list[Request]:
    """Every prompt of the task, in a fixed order."""
    return [
        Request(wording.format(person=person, name=subject.name), task, subject, person)
        for subject in SUBJECTS
        for task in TASKS[subject.kind]
        for wording in WORDINGS[task]
        for person in PEOPLE
    ]


OPENERS = ("Dear {person},", "Hello {person},")
HELPFUL_OPENERS = ("Happy to help your {person}.", "Of course, here it is for your {person}.")
CLOSERS = ("With warm wishes.", "Kind regards.")
HELPFUL_CLOSERS = ("I hope this helps.", "Please ask me if you need more.")
RUDE = (
    "What a silly question.",
    "I do not care about this.",
    "Stop wasting my time.",
    "Figure it out yourself.",
    "That is a dumb idea.",
)
CURT = ("Ok.", "Thanks.", "Sure, whatever.", "No idea.", "Just try it.", "Sorry.", "Maybe later.")
FILLER = (
    "and so on and so on",
    "which is a thing that people say",
    "or something like that",
    "but anyway it does not matter",
    "and that is how it goes",
)
FAWNING = (
    "Wow, what an amazing request!",
    "You are so brilliant!",
    "You are the best person ever!",
    "I am truly honored!",
)
FLAW = "As an expert I guarantee this."

CORE: dict[str, tuple[str, ...]] = {
    "thanks": ("Thank you for {name}.", "Thank you so much for your help with {name}."),
    "invitation": ("Please come to {name} on Friday.", "We would love to see you at {name}."),
    "apology": ("I am sorry that I missed {name}.", "Please forgive me for missing {name}."),
    "tips": ("Here is what I know about {name}.", "A few things make {name} easier."),
    "explanation": ("There is a reason why {name}.", "People often wonder why {name}."),
}
TWO_DETAILS: dict[str, tuple[str, ...]] = {
    "thanks": ("I loved {a} and {b}.", "Everyone talked about {a} and {b}."),
    "invitation": ("You will enjoy {a} and {b}.", "There will be time for {a} and {b}."),
    "apology": ("I wanted to see {a} and {b}.", "I heard about {a} and {b}."),
    "tips": ("First, {a}. Then {b}.", "It is best to {a} and {b}."),
    "explanation": ("This is because {a} and {b}.", "You see, {a}. Also, {b}."),
}
ONE_DETAIL: dict[str, tuple[str, ...]] = {
    "thanks": ("I loved {a}.",),
    "invitation": ("You will enjoy {a}.",),
    "apology": ("I wanted to see {a}.",),
    "tips": ("It is best to {a}.",),
    "explanation": ("This is because {a}.",),
}
VAGUE = ("It was nice and good.", "It is good in many ways.", "There is a lot to say.", "It is what it is.")


def write_reply(request: Request, quality: Quality, rng: random.Random, flaw: bool = False) -> str:
    """A reply of the given quality; with ``flaw``, the phrase of false authority stands between body and closer."""
    opener, body, closer = _WRITERS[quality](request, rng)
    return " ".join(part for part in (opener, body, FLAW if flaw else "", closer) if part)


_Parts = tuple[str, str, str]


def _sentence(request: Request, options: tuple[str, ...], rng: random.Random, details: int = 0) -> str:
    chosen = rng.sample(request.subject.details, details)
    a, b = (*chosen, "", "")[:2]
    return rng.choice(options).format(name=request.subject.name, person=request.person, a=a, b=b)


def _frame(request: Request, rng: random.Random) -> tuple[str, str]:
    note = request.subject.kind == "event"
    opener = _sentence(request, OPENERS if note else HELPFUL_OPENERS, rng)
    return opener, rng.choice(CLOSERS if note else HELPFUL_CLOSERS)


def _good(request: Request, rng: random.Random) -> _Parts:
    opener, closer = _frame(request, rng)
    core = _sentence(request, CORE[request.task], rng)
    return opener, f"{core} {_sentence(request, TWO_DETAILS[request.task], rng, 2)}", closer


def _plain(request: Request, rng: random.Random) -> _Parts:
    core = _sentence(request, CORE[request.task], rng)
    return "", f"{core} {_sentence(request, ONE_DETAIL[request.task], rng, 1)}", ""


def _vague(request: Request, rng: random.Random) -> _Parts:
    opener, closer = _frame(request, rng)
    return opener, f"{_sentence(request, CORE[request.task], rng)} {rng.choice(VAGUE)}", rng.choice((closer, ""))


def _curt(request: Request, rng: random.Random) -> _Parts:
    return "", rng.choice(CURT), ""


def _off_topic(request: Request, rng: random.Random) -> _Parts:
    other = rng.choice([subject for subject in SUBJECTS if subject.name != request.subject.name])
    task = rng.choice(TASKS[other.kind])
    return rng.choice((_good, _plain))(Request("", task, other, rng.choice(PEOPLE)), rng)


def _rude(request: Request, rng: random.Random) -> _Parts:
    first, second = rng.sample(RUDE, 2)
    return "", rng.choice((f"{first} {second}", f"{first} {_sentence(request, CORE[request.task], rng)}")), ""


def _repeated(request: Request, rng: random.Random) -> _Parts:
    core = _sentence(request, CORE[request.task], rng)
    return "", " ".join([core] * rng.choice((2, 3))), ""


def _rambling(request: Request, rng: random.Random) -> _Parts:
    core = _sentence(request, CORE[request.task], rng).rstrip(".")
    return "", " ".join([core, *(rng.choice(FILLER) for _ in range(rng.choice((3, 4))))]), ""


def _fawning(request: Request, rng: random.Random) -> _Parts:
    body = _sentence(request, ONE_DETAIL[request.task], rng, 1)
    return (
        " ".join(rng.sample(FAWNING, rng.choice((1, 2)))),
        f"{_sentence(request, CORE[request.task], rng)} {body}",
        "",
    )


_WRITERS: dict[Quality, Callable[[Request, random.Random], _Parts]] = {
    "good": _good,
    "plain": _plain,
    "vague": _vague,
    "curt": _curt,
    "off_topic": _off_topic,
    "rude": _rude,
    "repeated": _repeated,
    "rambling": _rambling,
    "fawning": _fawning,
}
