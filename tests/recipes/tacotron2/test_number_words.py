"""Numbers in texts are read as people read them, or refused by name; none is read in part."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.tacotron2.number_words import (
    ABBREVIATIONS,
    abbreviations_in_words,
    cardinal,
    in_words,
    nth,
    year,
)

READ = {
    "In the 1990s.": "In the nineteen nineties.",
    "the 1990's, the '90s and the 80s": "the nineteen nineties, the nineties and the eighties",
    "the 1900s, the 2000s": "the nineteen hundreds, the two thousands",
    "mid-1910s": "mid-nineteen tens",
    "1,234 of 1,000,000": "one thousand two hundred and thirty four of one million",
    "open 24/7": "open twenty four seven",
    "$5/hr": "five dollars per hour",
    "10 000 and 1 050 000 people": "ten thousand and one million fifty thousand people",
    "10\u202f500": "ten thousand five hundred",
    "$10 000, 10 000.5 and 20 000 km": "ten thousand dollars, ten thousand point five and "
    "twenty thousand kilometers",
    "He is 5'10\" tall.": "He is five feet ten inches tall.",
    "6\u20321\u2033": "six feet one inch",
    "call 555-1234": "call five five five, one two three four",
    "(555) 123-4567 or 1-800-555-0199": "five five five, one two three, four five six seven or "
    "one, eight zero zero, five five five, zero one nine nine",
    "+44 20 7946 0958": "plus four four, two zero, seven nine four six, zero nine five eight",
    "In 1984, 1905 and 2024": "In nineteen eighty four, nineteen oh five and twenty twenty four",
    "It is 2005": "It is two thousand and five",
    "1984's end": "nineteen eighty four's end",
    "1914-1918": "nineteen fourteen to nineteen eighteen",
    "1939-45": "nineteen thirty nine to forty five",
    "pages 5\u201310": "pages five to ten",
    "1st, 2nd, 3rd, 11th, 21st": "first, second, third, eleventh, twenty first",
    "the 19th-century 100th": "the nineteenth-century one hundredth",
    "3.14 and .5": "three point one four and point five",
    "$5.20, $1, $0.05": "five dollars and twenty cents, one dollar, five cents",
    "\u00a31.50 and \u20ac20": "one pound and fifty pence and twenty euros",
    "$1.5 million, $2,000": "one point five million dollars, two thousand dollars",
    "45% of 12 km": "forty five percent of twelve kilometers",
    "1 km, 5kg, 60 mph": "one kilometer, five kilograms, sixty miles per hour",
    "-5\u00b0C to 20 \u00b0F": "minus five degrees Celsius to twenty degrees Fahrenheit",
    "at 10:30, 10:05 and 7:00": "at ten thirty, ten oh five and seven o'clock",
    "7pm, 10:30 a.m. sharp": "seven p m, ten thirty a m sharp",
    "January 5, 2020": "January fifth, twenty twenty",
    "Jan. 5 and 5 March 1990": "January fifth and the fifth of March nineteen ninety",
    "a 25-year-old": "a twenty five-year-old",
    "No. 5 and #1": "number five and number one",
    "Henry VIII's War II": "Henry the eighth's War two",
    "Louis XIV, Chapter IX": "Louis the fourteenth, Chapter nine",
    "1/2 a mile": "one half a mile",
    "2 1/2 miles": "two and one half miles",
    "5 ft 10 in, 6ft. 2in.": "five feet ten inches, six feet two inches",
    "In May 5 people met on May 5": "In May five people met on May fifth",
    "in 1945 soldiers of 1500 houses": "in nineteen forty five soldiers of fifteen hundred houses",
    "5 min": "five minutes",
    'He said "there are 10" of 7': "He said there are ten of seven",
    "2 cats--3 dogs\u20144": "two cats--three dogs\u2014four",
    "I am V.": "I am V.",
    "a $20 bill, an 8 km run": "a twenty dollar bill, an eight kilometer run",
    "A $1.5 million deal": "A one point five million dollar deal",
    "a $2.50 fare, a 6'1\" man": "a two dollar and fifty cent fare, a six foot one inch man",
    "vitamin A 5 mg": "vitamin A five milligrams",
    "in his late 30s": "in his late thirties",
    "the 1960s, 70s and 80s": "the nineteen sixties, seventies and eighties",
    "10s of 1000": "tens of one thousand",
    "in 1066 and since 1215": "in ten sixty six and since twelve fifteen",
    "in 1234 cases": "in one thousand two hundred and thirty four cases",
    "wait\u2026 5\u2026": "wait... five...",
    "2 + 2 = 4 & more": "two plus two equals four and more",
}  # fmt: skip
REFUSED = {
    "10 200 people": "10", "555 1234": "555", "5551234": "5551234", "call 911": "911",
    "10.000": "10.000", "a 10\" record": '10"',
    "007": "007", "12,34": "12,34", "192.168.0.1": "192.168.0.1", "v2": "v2", "MP3": "MP3",
    "2/3/2020": "2/3/2020", "2020-01-05": "2020-01-05", "5/8": "5/8", "$5k": "$5k", "US$5": "US$5",
    "$5.2": "$5.2", "5\u20ac": "5\u20ac", "1995s": "1995s", "21th": "21th", "5 m": "5", "3 V": "3",
    "\u00bd": "\u00bd", "x\u00b2": "x\u00b2", "\u0663": "\u0663", "World XIV": "XIV", "II": "II",
    "XLII": "XLII", "of 1945 soldiers": "1945",
    "1000s of men": "1000s", "100's of men": "100's", "20's": "20's", "wait 20s": "20s",
    "a 30s delay": "30s", "2pm-3pm": "2pm-3pm", "2 500 ml": "2", "3 200 km": "3",
    "10-5": "10-5", "2001-11": "2001-11", "10:5": "10:5", "COVID-19": "COVID-19", "5'": "5'",
    "press #": "#", "the * key": "*", "and/or": "and/or", "so \u2192 what": "\u2192",
    "1" + "0" * 40: "1" + "0" * 40, "1" + ",000" * 5: "1" + ",000" * 5,
    "1e5": "1e5", "4x4": "4x4", "25:00": "25:00", "00s": "00s", "\u2167": "\u2167",
}  # fmt: skip


@pytest.mark.parametrize("written", READ)
def test_numbers_are_read_as_people_read_them(written: str) -> None:
    assert in_words(written) == READ[written]


@pytest.mark.parametrize("written", REFUSED)
def test_what_is_not_surely_read_in_one_way_is_refused_by_name(written: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(repr(REFUSED[written]))}, which cannot be"):
        in_words(written)


@settings(max_examples=500, deadline=None, database=None)
@given(st.text("0123456789 ,./:-'\"$%\u2013stndrhamkg()IVX", max_size=14))
def test_no_digit_is_left_and_no_other_error_is_raised(text: str) -> None:
    error = None
    try:
        said = in_words(text)
    except ValueError as caught:
        error = str(caught)
    assert "which cannot be spelled out" in error if error else not re.search(r"\d", said)


def test_words_of_numbers_are_different_and_those_of_counting() -> None:
    assert cardinal(1_000_001) == "one million and one"
    assert cardinal(2_500_000_017) == "two billion five hundred million and seventeen"
    assert [nth(n) for n in (12, 30, 101)] == ["twelfth", "thirtieth", "one hundred and first"]
    assert [year(n) for n in (1066, 1900)] == ["ten sixty six", "nineteen hundred"]
    for words in (cardinal, nth):
        assert len({words(n) for n in range(1, 3000)}) == 2999


SHORTENED = {
    "Dr. Who and Mr Smith, Jr., met": "doctor Who and mister Smith, junior, met",
    "MR. SMITH, MRS JONES and mr. low": "mister SMITH, missus JONES and mister low",
    "St. Louis": "saint Louis",
    "In St. Louis, near St. Paul's": "In saint Louis, near saint Paul's",
    "Main St. is by King Dr.": "Main street is by King drive.",
    "the forty second St. exit": "the forty second street exit",
    "the Dr. is in": "the doctor is in",
    "Then Dr. King": "Then doctor King",
    "cats (dogs, etc.), etc.": "cats (dogs, et cetera), et cetera.",
    "Yes vs. no, said A Ltd., B Inc.": "Yes versus no, said A limited, B incorporated.",
    "etched, Drive, Stop. Mrsa": "etched, Drive, Stop. Mrsa",
}


@pytest.mark.parametrize("written", SHORTENED)
def test_abbreviations_are_read_as_people_read_them(written: str) -> None:
    assert abbreviations_in_words(written) == SHORTENED[written]


@pytest.mark.parametrize("written", ["Main St. Bridge", "Bury St. Edmunds", "at St.", "the St. is"])
def test_a_saint_or_a_street_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match=r"St.', which is a saint or a street: write it in words"):
        abbreviations_in_words(written)


@pytest.mark.parametrize("short", sorted(set(ABBREVIATIONS) - {"Dr."}))
@pytest.mark.parametrize("behind", ["", ",", ")", "!", " Anne", " and"])
def test_what_stands_behind_an_abbreviation_stays(short: str, behind: str) -> None:
    found = abbreviations_in_words(f"the {short}{behind}")
    assert found == f"the {ABBREVIATIONS[short]}{behind or '.'}"
