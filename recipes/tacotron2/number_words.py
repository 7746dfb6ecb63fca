"""Numbers in English texts as words: what is surely read in one way; all else is refused by name.

The grammars of the library wetext read "the 1990s" as seconds, "1,234" without its one, and the Sun
as a Sunday.

A rule takes the whole of what stands between two spaces, but for the marks of a sentence around it:
"1990s" is no 1990 with an s behind it, and "192.168.0.1" not two decimals.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from unicodedata import category

from recipes.common.sentences import MONTHS, ORDINALS, TENS, spelled

START = r"(?:(?<![^\s(\[—])|(?<=--)|(?<=mid-)|(?<=pre-)|(?<=post-)|(?<=early-)|(?<=late-))"
END = r"(?=[.,;:!?)\]]*(?:[\s—]|--|$))"
# Behind it is no other number (a telephone number?), and no word without a vowel (a unit?).
ALONE = r"(?! \d)(?! [b-df-hj-np-tv-xzB-DF-HJ-NP-TV-XZ]+\b)"
WHOLE = r"(?:0|[1-9]\d{0,2}(?:,\d{3}){1,4}|[1-9]\d{0,14})"  # Below 10^15.
NUMBER = rf"({WHOLE}(?:\.\d+)?|\.\d+)"
THINGS = r" (?:people|men|women|children|[a-z]{3,}s)\b"  # Which a number may count.
DAY = r"([12]\d|3[01]|[1-9])"
MONTH = rf"({'|'.join(name.title() for name in MONTHS)})"
SHORT = {name[:3].title(): name.title() for name in MONTHS} | {"Sept": "September"}
COINS = {"$": ("dollar", "cent"), "€": ("euro", "cent"), "£": ("pound", "penny")}
PERIODS = {
    each: each for each in ("hour", "day", "night", "week", "month", "year", "person")
} | {"hr": "hour", "h": "hour", "wk": "week", "mo": "month", "yr": "year"}  # fmt: skip
UNITS = {
    "%": "percent", "°": "degree", "°C": "degree Celsius", "°F": "degree Fahrenheit",
    "GHz": "gigahertz", "Hz": "hertz", "MHz": "megahertz", "cm": "centimeter", "dB": "decibel",
    "ft": "foot", "hrs": "hour", "kHz": "kilohertz", "kg": "kilogram", "km": "kilometer",
    "km/h": "kilometer per hour", "min": "minute", "mins": "minute", "sec": "second",
    "secs": "second", "hr": "hour", "lb": "pound", "lbs": "pound", "mg": "milligram", "mi": "mile",
    "ml": "milliliter", "mm": "millimeter", "mph": "mile per hour", "ms": "millisecond",
    "oz": "ounce", "yd": "yard",
}  # fmt: skip
FIXED = {
    "1/2": "one half", "1/3": "one third", "1/4": "one quarter", "2/3": "two thirds",
    "3/4": "three quarters", "24/7": "twenty four seven", "50/50": "fifty fifty",
    "9/11": "nine eleven", "2D": "two D", "3D": "three D",
}  # fmt: skip
SIGNS = {"+": "plus", "=": "equals", "@": "at"}
# Words before a Roman number: those that it counts, and names of kings and popes.
COUNTED = "War|Act|Appendix|Article|Book|Chapter|Part|Phase|Scene|Section|Volume"
NAMED = (
    "Alexander|Benedict|Charles|Edward|Elizabeth|Francis|Frederick|George|Gregory|Henry|Innocent|"
    "Ivan|James|John|Leo|Louis|Mary|Napoleon|Nicholas|Paul|Peter|Philip|Pius|Richard|William"
)
ROMAN = r"(?=[IVX])X{0,3}(?:IX|IV|V?I{0,3})"
LONGER = r"(?=[IVX]{2}|[CIVXL]{3})C{0,3}(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})"

# Before the decade of a century that is not told, or of somebody's life.
DECADE = (
    r"(?i)(?:\b(?:the|my|your|his|her|its|our|their|early|mid|late)[ -]|0'?s(?:,| and| or| to) )"
    r"(?:early |mid-?|late )?$"
)

Match = re.Match[str]


def cardinal(number: int) -> str:
    """A whole number in words."""
    for power, word in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= power:
            many, rest = divmod(number, power)
            joint = " and " if rest < 100 else " "
            return f"{cardinal(many)} {word}" + (f"{joint}{cardinal(rest)}" if rest else "")
    return spelled(number)


def nth(number: int) -> str:
    """An ordinal number above 0 in words."""
    *words, last = cardinal(number).split()
    small = [spelled(each) for each in range(1, 20)]
    ends = ORDINALS[small.index(last)] if last in small else last + "th"
    return " ".join([*words, ends if last not in TENS else last[:-1] + "ieth"])


def year(number: int) -> str:
    """A year in words, such as 1990, 1905, 1900, 2005 and 2024."""
    century, rest = divmod(number, 100)
    if century % 10 == 0 and rest < 10:
        return cardinal(number)
    if rest == 0:
        return f"{spelled(century)} hundred"
    return f"{spelled(century)} {'oh ' if rest < 10 else ''}{spelled(rest)}"


def digits(text: str) -> str:
    """The digits of a text, one by one, with a pause where something else is between them."""
    groups = re.findall(r"\d+", text)
    return ", ".join(" ".join(spelled(int(each)) for each in group) for group in groups)


def amount(text: str) -> str:
    """A number in words, with commas and decimals as they are written."""
    whole, point, decimals = text.replace(",", "").partition(".")
    words = [cardinal(int(whole))] if whole else []
    return " ".join([*words, *(["point", *map(digits, decimals)] if point else [])])


def several(text: str, unit: str, describes: bool = False) -> str:
    """So many of a unit in words, such as "mile per hour"; "five mile" where it describes a run."""
    first, *rest = unit.split()
    one = text == "1" or (describes and unit != "penny")
    if not one and not first.endswith(("hertz", "percent")):
        first = {"foot": "feet", "inch": "inches", "penny": "pence"}.get(first, f"{first}s")
    return " ".join([amount(text), first, *rest])


def _describes(found: Match) -> bool:
    """The number is part of what one thing is called: "a $5 bill"."""
    return bool(re.search(r"(?:\ba|\ban|(?:^|[.!?] )An?) $", found.string[: found.start()]))


def _feet(found: Match) -> str:
    one = _describes(found)
    return f"{several(found[1], 'foot', one)} {several(found[2], 'inch', one)}"


def _ordinal(found: Match) -> str:
    number = int(found[1].replace(",", ""))
    end = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th") if number % 100 // 10 != 1 else "th"
    return nth(number) if found[2] == end else found[0]


def _decade(found: Match) -> str:
    century, tens = found[1], int(found[2])
    if not tens:  # Thousands of something?
        return f"{year(int(century) * 100)}s" if century and 11 <= int(century) < 30 else found[0]
    told = re.search(DECADE, found.string[: found.start()]) or re.match(" of ", _behind(found))
    if not century and "'" not in found[0][:1] and not told:
        return found[0]  # In seconds?
    word = TENS[tens - 2][:-1] + "ies" if tens > 1 else "tens"
    return f"{spelled(int(century))} {word}" if century else word


def _money(found: Match) -> str:
    coin, text, size, period = found.groups()
    whole, _, decimals = text.replace(",", "").partition(".")
    if decimals and len(decimals) != 2 and not size:
        return found[0]
    parts = [
        (str(int(n or 0)), unit) for n, unit in zip((whole, decimals), COINS[coin], strict=True)
    ]
    one = _describes(found)
    said = " and ".join(several(*each, one) for each in parts if each[0] != "0")
    said = said or several(*parts[0], one)
    if size:
        said = f"{amount(text)} {size} {COINS[coin][0]}{'' if one else 's'}"
    return f"{said} per {PERIODS[period]}" if period else said


def _clock(found: Match) -> str:
    hour, minutes, half = int(found[1]), int(found[2] or 0), found[3]
    said = spelled(hour)
    if minutes:
        said += f" {'oh ' if minutes < 10 else ''}{spelled(minutes)}"
    elif not half:
        return f"{said} o'clock" if hour <= 12 else found[0]
    at_end = found[0].endswith(".") and found.end() == len(found.string)
    return said + (f" {half[0].lower()} m" + "." * at_end if half else "")


def _years(found: Match) -> str:
    first, last = int(found[1]), int(found[2])
    if len(found[2]) == 2:  # "2001-11" may be a month.
        good = last > max(12, first % 100)
        return f"{year(first)} to {spelled(last)}" if good else found[0]
    return f"{year(first)} to {year(last)}" if first < last < 2100 else found[0]


def _range(found: Match) -> str:
    one, other = int(found[1]), int(found[2])
    return f"{cardinal(one)} to {cardinal(other)}" if one < other else found[0]


def _roman(found: Match) -> str:
    values = [{"I": 1, "V": 5, "X": 10}[each] for each in found[2]]
    pairs = zip(values, [*values[1:], 0], strict=True)
    number = sum(-one if one < after else one for one, after in pairs)
    counts = re.fullmatch(COUNTED, found[1])
    return f"{found[1]} {cardinal(number) if counts else f'the {nth(number)}'}"


def _plain(found: Match) -> str:
    text, before, behind = found[1], found.string[: found.start()], _behind(found)
    if behind.startswith("'s") and re.fullmatch(r"\d0|\d+00", text):
        return found[0]  # Tens or hundreds of something?
    if re.fullmatch(r"1[0-3]\d\d", text) and not re.match(THINGS, behind):
        dated = re.search(r"(?i)\b(?:in|since|until|before|after|by|year|AD|A\.D\.) $", before)
        return year(int(text)) if dated else amount(text)
    if re.fullmatch(r"1[4-9]\d\d|20[1-9]\d", text):
        counts = re.match(THINGS, behind) and not text.endswith("00")
        dates = re.search(r"(?i)\b(?:the|in|since|until|during|before|after) $", before)
        return found[0] if counts and not dates else year(int(text))
    # A telephone number, as long ones may be? A continental ten thousand?
    unsure = re.fullmatch(r"911|\d{7,}(?<!000)|\d{1,3}\.\d00", text)
    return found[0] if unsure else amount(text)


def _behind(found: Match) -> str:
    return found.string[found.end() :]


def _compiled(
    *rules: tuple[str, Callable[[Match], str]],
) -> list[tuple[re.Pattern[str], Callable[[Match], str]]]:
    return [(re.compile(pattern, re.ASCII), said) for pattern, said in rules]


def _any(names: dict[str, object]) -> str:
    return "|".join(re.escape(each) for each in sorted(names, key=len, reverse=True))


RULES = _compiled(
    (rf"\b({_any(SHORT)})\.? (?=\d)", lambda m: f"{SHORT[m[1]]} "),
    (rf"(?<=\d )({_any(SHORT)})\b\.?", lambda m: SHORT[m[1]]),
    (
        rf"{MONTH} {DAY}(?:st|nd|rd|th)?(?:{END}(?! \d|{THINGS})|(?= (?:1\d{{3}}|20\d\d){END}))",
        lambda m: f"{m[1]} {nth(int(m[2]))}",
    ),
    (
        rf"{START}(?:the )?{DAY}(?:st|nd|rd|th)? (?:of )?{MONTH}\b",
        lambda m: f"the {nth(int(m[1]))} of {m[2]}",
    ),
    (rf"{START}(?:No\. ?|#)(?={WHOLE}{END})", lambda m: "number "),
    (rf"{START}(?:1-)?(?:\(\d{{3}}\) ?|\d{{3}}-)?\d{{3}}-\d{{4}}{END}", lambda m: digits(m[0])),
    (
        rf"{START}\+\d{{1,3}}(?:[ -]\(?\d{{2,4}}\)?){{2,4}}{END}",
        lambda m: f"plus {digits(m[0])}",
    ),
    (
        rf"{START}([{''.join(COINS)}]){NUMBER}(?: (thousand|million|billion|trillion)\b)?"
        rf"(?:/({_any(PERIODS)}))?{END}",
        _money,
    ),
    (
        rf"{START}(1[0-2]|[1-9])(?::([0-5]\d))? ?([ap]m\b|[AP]M\b|[ap]\.m\.|[AP]\.M\.)"
        rf"{END}",
        _clock,
    ),
    (rf"{START}(1\d|2[0-3]|[1-9]):([0-5]\d)(){END}", _clock),
    (rf"{START}'?([1-9]\d)?(\d)0'?s{END}", _decade),
    (rf"{START}({WHOLE})(st|nd|rd|th)(?:{END}|(?=-[a-z]))", _ordinal),
    (rf"{START}(1\d{{3}}|20\d\d)[-–](\d{{4}}|\d\d){END}", _years),
    (rf"{START}([1-9]\d{{0,2}})–([1-9]\d{{0,2}}){END}{ALONE}", _range),
    (
        rf"{START}({WHOLE}) (1/2|1/4|3/4){END}",
        lambda m: f"{amount(m[1])} and {FIXED[m[2]]}",
    ),
    (rf"{START}({_any(FIXED)}){END}", lambda m: FIXED[m[1]]),
    (
        rf"(?<!\d ){START}([-−]?){NUMBER} ?({_any(UNITS)}){END}",
        lambda m: "minus " * bool(m[1]) + several(m[2], UNITS[m[3]], _describes(m)),
    ),
    (rf"{START}([1-9]\d?\d?)(?=-[a-z]+(?:-[a-z]+)*{END})", lambda m: spelled(int(m[1]))),
    (rf"{START}{NUMBER}(?:{END}{ALONE}|(?='s{END}))", _plain),
    (rf"\b({COUNTED}) ({ROMAN}){END}", _roman),
    (rf"\b({NAMED}) (?!I\b)({ROMAN})(?:{END}|(?='s{END}))", _roman),
)


FEET = re.compile(
    rf"{START}([1-9])(?:['’′] ?| ?ft\.? )(\d|1[01])(?:[\"”″]|''| ?in\b\.?){END}", re.ASCII
)
# Groups of digits: one that begins with a zero is no number of its own.
GROUPS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}(?: \d{3})* 0\d\d(?: \d{3})*(?!\w| \d)", re.ASCII)
THIN = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}(?!\d))", re.ASCII)  # As in 10 000.
TYPED = str.maketrans({"’": "'", "‘": "'", "“": "", "”": "", "…": "..."})


def in_words(text: str) -> str:
    """A text with its numbers and signs in words, single spaces, and no quotation marks.

    Raises:
        ValueError: for a number or a sign of which it is not sure how it is read.
    """
    text = FEET.sub(_feet, text)
    text = " ".join(THIN.sub(",", text).translate(TYPED).split())
    text = GROUPS.sub(lambda found: found[0].replace(" ", ","), text)
    quoted = text.split('"')
    for part in quoted[:-1:2]:  # Each but the last is before a mark that opens a quotation.
        if part[-1:].isdigit():
            inches = part.split()[-1] + '"'
            raise ValueError(f"{inches!r}, which cannot be spelled out: is it in inches?")
    text = "".join(quoted)
    for pattern, said in RULES:
        text = pattern.sub(said, text)
    text = re.sub(r" ?& ?", " and ", text).strip()
    text = re.sub(r"(?<= )[+=@](?= )", lambda found: SIGNS[found[0]], text)
    for word in text.split():
        roman = re.fullmatch(rf"\W*{LONGER}(?:'s)?\W*", word)
        if roman or any(category(each)[0] in "NS" or each in "#%*/@\\_" for each in word):
            shown = word.strip(".,;:!?()[]")[:80]
            raise ValueError(f"{shown!r}, which cannot be spelled out for sure: write it in words")
    return text


TITLES = {
    "Capt.": "captain", "Col.": "colonel", "Dr.": "doctor", "Drs.": "doctors", "Gen.": "general",
    "Gov.": "governor", "Hon.": "honorable", "Jr.": "junior", "Lt.": "lieutenant", "Maj.": "major",
    "Mr.": "mister", "Mrs.": "missus", "Ms.": "miz", "Mt.": "mount", "Prof.": "professor",
    "Rev.": "reverend", "Sen.": "senator", "Sgt.": "sergeant", "Sr.": "senior",
}  # fmt: skip
ABBREVIATIONS = TITLES | {
    "Ave.": "avenue", "Blvd.": "boulevard", "Bros.": "brothers", "Corp.": "corporation",
    "Dept.": "department", "Esq.": "esquire", "Inc.": "incorporated", "Ltd.": "limited",
    "approx.": "approximately", "etc.": "et cetera", "vs.": "versus",
}  # fmt: skip
SHORTENED = re.compile(rf"(?<!\w)({_any(ABBREVIATIONS)})(?!\w)")
WITHOUT_DOT = re.compile(
    r"(?<!\w)(Mr|Mrs|Ms|Dr)(?= [A-Z])|(?<!\w)(MR|MRS|DR)\.?(?= [A-Z])"
    r"|(?<!\w)(mr|mrs)\.(?= \w)"
)
# Between a name and no name it is a street; before a name, a saint or a doctor.
STREET = re.compile(
    rf"((?<!\w)(?:[A-Z][\w']+|{'|'.join(ORDINALS)}|\w+ieth) )?(?<!\w)(St|Dr)\.(?!\w)(?: (?=[A-Z]))?"
)
SMALL = [
    "And", "As", "At", "But", "By", "For", "From", "He", "In", "It", "Near", "Of", "On", "Or",
    "She", "The", "They", "To", "We", "When", "With",
]  # fmt: skip


def abbreviations_in_words(text: str) -> str:
    """A text with its titles, such as "Dr.", and other usual abbreviations in words.

    Raises:
        ValueError: for one of which it is not sure how it is read.
    """
    text = STREET.sub(_street, text)
    text = WITHOUT_DOT.sub(lambda found: TITLES[f"{found[found.lastindex or 0].title()}."], text)
    return SHORTENED.sub(lambda found: _dotted(ABBREVIATIONS[found[1]], found), text)


def _dotted(said: str, found: Match) -> str:
    """A word in place of an abbreviation; its dot is also that of a sentence at the end."""
    return said + "." * (found[0].endswith(".") and not _behind(found).strip())


def _street(found: Match) -> str:
    name, short = found[1] or "", found[2]
    named, follows = bool(name) and name.strip() not in SMALL, found[0].endswith(" ")
    if short == "St" and named == follows:
        raise ValueError(f"{found[0].strip()!r}, which is a saint or a street: write it in words")
    if follows or not named:
        return f"{name}{'doctor' if short == 'Dr' else 'saint'}{' ' * follows}"
    return _dotted(f"{name}{'drive' if short == 'Dr' else 'street'}", found)
