"""Sentences of the embedded speech, drawn from two small grammars.

``commands``: numbers, dates and orders to a house, from about a hundred words, for recognition.
``prose``: in the past tense, from some 330 words, for synthesis, separation, enhancement.
Lower-case letters, apostrophes and single spaces only; numbers are spelled out. No word sounds like
another of its grammar, and none has two pronunciations, so that text and sound say the same.

A sentence belongs to train, valid or test by its own hash, so the splits share no sentence.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping

from trainer.seed import derive

SPLITS = {"train": range(0, 80), "valid": range(80, 90), "test": range(90, 100)}  # of 100 hashes

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBER_WORDS = frozenset([*ONES, *TENS, "hundred", "thousand", "and"])
ORDINALS = [
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth",
    "eighteenth", "nineteenth", "twentieth",
]  # fmt: skip

MONTHS = {
    "january": 31, "february": 29, "march": 31, "april": 30, "may": 31, "june": 30, "july": 31,
    "august": 31, "september": 30, "october": 31, "november": 30, "december": 31,
}  # fmt: skip

Rule = str | Callable[[random.Random], str]


def spelled(number: int) -> str:
    """Return a whole number below a million in words.

    >>> spelled(7642)
    'seven thousand six hundred and forty two'
    """
    if not 0 <= number < 1_000_000:
        raise ValueError(f"can spell 0 to 999999, not {number}")
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f" {ONES[ones]}" if ones else "")
    size, word = (1000, "thousand") if number >= 1000 else (100, "hundred")
    many, rest = divmod(number, size)
    joint = " and " if rest < 100 else " "
    return f"{spelled(many)} {word}" + (f"{joint}{spelled(rest)}" if rest else "")


def ordinal(day: int) -> str:
    """Return the day of a month, 1 to 31, in words."""
    if day <= 20:
        return ORDINALS[day - 1]
    return "thirtieth" if day == 30 else f"{TENS[day // 10 - 2]} {ORDINALS[day % 10 - 1]}"


def _below(rng: random.Random, limit: int) -> int:
    # Python promises the same sequence in every version for `random()` alone, not for `choice`.
    return int(rng.random() * limit)


def _number(rng: random.Random) -> str:
    return spelled(_below(rng, 10 ** (1 + _below(rng, 4))))


def _month(rng: random.Random) -> str:
    return list(MONTHS)[_below(rng, 12)]


def _date(rng: random.Random) -> str:
    month = _month(rng)
    day = ordinal(1 + _below(rng, MONTHS[month]))
    return (f"{month} the {day}", f"the {day} of {month}")[_below(rng, 2)]


def _year(rng: random.Random) -> str:
    return f"{('nineteen', 'twenty')[_below(rng, 2)]} {spelled(10 + _below(rng, 90))}"


def _digits(rng: random.Random) -> str:
    return " ".join(ONES[_below(rng, 10)] for _ in range(3 + _below(rng, 4)))


COMMANDS: Mapping[str, Rule] = {
    "sentence": "<order>|<order>|<date>|<date>|<count>|<count>|<order> and <order>",
    "order": "turn the <thing> <level>|turn <onoff> the <thing>|set the <thing> at <small> percent"
    "|<open> the <way>|call <digits>|wake me at <clock>|start the timer at <minutes> minutes"
    "|play number <small>|stop the <thing> after <minutes> minutes",
    "thing": "light|fan|radio|heater|music|timer",
    "level": "on|off|up|down",
    "onoff": "on|off",
    "open": "open|lock|check",
    "way": "door|gate|window|garage",
    "date": "<weekday> <day>|<day>|<day> <year>|<weekday> at <clock>|<month> <year>",
    "weekday": "monday|tuesday|wednesday|thursday|friday|saturday|sunday",
    "count": "number <number>|add <number> and <number>|<number> point <digits>|number <digits>"
    "|<small> percent of <number>",
    "month": _month,
    "day": _date,
    "year": _year,
    "clock": lambda rng: f"{spelled(1 + _below(rng, 12))} {spelled(10 + _below(rng, 50))}",
    "minutes": lambda rng: spelled(2 + _below(rng, 58)),
    "small": lambda rng: spelled(_below(rng, 100)),
    "number": _number,
    "digits": _digits,
}

PROSE: Mapping[str, Rule] = {
    "sentence": "<when> <clause>|<clause> <when>|<clause> and <clause>|<clause> because <clause>"
    "|<clause> while <clause>|when <clause> <clause>|<clause> but <clause>"
    "|<who> said that <clause>",
    "clause": "<who> <moved> <where>|<who> <did> <what>|<who> <did> <what> <where>"
    "|<what> <was> <state>|<who> <how> <did> <what>|<who> <felt> <mood>",
    "when": "in the morning|late at night|last winter|after the storm|on a quiet afternoon"
    "|every summer|at noon|before breakfast|one cold evening|during the long journey"
    "|early in the spring|for many years|at the end of the week|shortly before dawn",
    "who": "the <person>|the <manner> <person>|an old <person>|my <relative>|his <relative>"
    "|her <relative>|our <person>|the <animal>|a <manner> <animal>",
    "person": "baker|captain|doctor|farmer|teacher|painter|judge|nurse|sailor|shepherd|singer"
    "|soldier|student|tailor|driver|gardener|fisherman|carpenter|stranger|visitor|mayor|pilot"
    "|watchmaker|librarian|musician|prisoner|author|queen|village priest|young engineer",
    "relative": "mother|father|brother|sister|uncle|aunt|cousin|grandfather|daughter|nephew",
    "animal": "dog|fox|horse|cat|owl|goose|rabbit|donkey|goat|sparrow|wolf|squirrel|badger|pony",
    "moved": "walked|wandered|hurried|travelled|climbed|ran|rode|marched|drifted|swam|jumped"
    "|crawled|turned back|went away|stayed behind",
    "where": "across the <place>|behind the <place>|near the <adjective> <place>|into the <place>"
    "|along the <place>|beyond the <place>|above the <place>|through the <place>|by the <place>",
    "place": "bridge|river|valley|forest|harbour|market|church|castle|garden|meadow|mountain"
    "|station|kitchen|library|village|island|desert|beach|cellar|courtyard|factory|orchard|shore"
    "|tower|railway|hospital|theatre|museum|lighthouse|waterfall|narrow street|frozen lake",
    "did": "found|carried|bought|painted|repaired|lost|followed|watched|remembered|described"
    "|forgot|discovered|measured|washed|borrowed|noticed|admired|broke|buried|brought|chose"
    "|drew|covered|examined|finished|gathered|heard|imagined|kept|loved|moved|needed|offered"
    "|picked up|reached|showed|sold|touched|understood|visited|wanted|gave away|sent back",
    "what": "the <thing>|a <adjective> <thing>|the <adjective> <thing>|another <thing>"
    "|that <thing>|every <thing>|his <thing>|her <thing>|their <thing>",
    "thing": "letter|basket|clock|lantern|ladder|mirror|picture|blanket|bottle|bucket|candle"
    "|chair|coat|feather|hammer|jacket|kettle|key|knife|map|necklace|novel|orange|parcel|pencil"
    "|piano|ribbon|ring|rope|shovel|spoon|table|ticket|trumpet|umbrella|violin|wagon|wheel"
    "|photograph|newspaper|telescope|engine|garment|treasure|garden chair"
    "|glass of water|fishing boat",
    "adjective": "ancient|beautiful|broken|brown|cheap|dark|dusty|enormous|fresh|golden|green"
    "|heavy|huge|little|modern|narrow|red|rough|round|sharp|simple|smooth|thin|thick|tiny|useful"
    "|warm|white|wooden|yellow",
    "manner": "careful|clever|curious|famous|foolish|gentle|happy|lonely|nervous|patient|pleasant"
    "|polite|proud|quiet|silent|strange",
    "how": "slowly|quickly|gladly|suddenly|carefully|secretly|always|never|often|finally|gently"
    "|bravely|usually|hardly ever|easily|quietly|soon|almost",
    "was": "was|seemed|looked|became|remained",
    "felt": "felt|was|seemed|became|grew",
    "state": "very <adjective>|quite <adjective>|too <adjective>|rather <adjective>"
    "|as <adjective> as before|<adjective> but expensive",
    "mood": "very <manner>|quite <manner>|too <manner>|rather <manner>|as <manner> as before"
    "|<manner> and tired|<manner> but hungry",
}

GRAMMARS = {"commands": COMMANDS, "prose": PROSE}


def _expand(rule: Rule, grammar: Mapping[str, Rule], rng: random.Random) -> str:
    if not isinstance(rule, str):
        return rule(rng)
    choices = rule.split("|")
    chosen = choices[_below(rng, len(choices))]
    return re.sub(r"<(\w+)>", lambda name: _expand(grammar[name[1]], grammar, rng), chosen)


def belongs(sentence: str) -> str:
    """Return the split that a sentence belongs to."""
    number = derive(0, "split", sentence) % 100
    return next(split for split, numbers in SPLITS.items() if number in numbers)


def sentences(split: str, style: str, seed: int = 0) -> Iterator[str]:
    """Yield different sentences of a split, without end.

    Args:
        split: "train", "valid" or "test".
        style: "commands" or "prose".
        seed: random seed of the order.

    Raises:
        ValueError: the split or style is unknown.
    """
    for name, value, allowed in (("split", split, SPLITS), ("style", style, GRAMMARS)):
        if value not in allowed:
            raise ValueError(
                f"{name} of the embedded speech is {value!r}, not one of {list(allowed)}"
            )
    grammar = GRAMMARS[style]
    rng = random.Random(derive(seed, "sentences", split, style))
    said: set[str] = set()
    while True:
        sentence = _expand(grammar["sentence"], grammar, rng)
        sentence = re.sub(r"\ba (?=[aeio])", "an ", sentence)
        if sentence not in said and belongs(sentence) == split:
            said.add(sentence)
            yield sentence


def vocabulary(style: str) -> frozenset[str]:
    """Return every word that the grammar can say; raise ``ValueError`` for an unknown style."""
    if style not in GRAMMARS:
        raise ValueError(f"vocabulary of {style!r}; allowed: {', '.join(GRAMMARS)}")
    words = set()
    if style == "commands":  # the one grammar with rules that count
        words = {*NUMBER_WORDS, *ORDINALS, "thirtieth", *MONTHS, "the", "of"}
    for rule in GRAMMARS[style].values():
        if isinstance(rule, str):
            words |= set(re.findall(r"[a-z']+", re.sub(r"<\w+>", " ", rule)))
    return frozenset(words)
