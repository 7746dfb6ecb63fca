"""Speakers of the embedded speech: intelligible voices of espeak-ng that differ from each other.

They were chosen from the 104 variants of espeak-ng 1.52 by measuring each, in American English:

* Repeatable: the same bytes whatever the memory held before. Reed and caleb read memory that nobody
  wrote.
* Voiced: at least 55 % of the frames that are not quiet have a normalised autocorrelation above 0.7
  at some lag of 60 to 400 Hz. Whispers have 3 to 10 %, hoarse voices 14 to 50 %.
* Understood: as spoken here, Whisper tiny.en has a character error rate of at most 25 %. It is a
  strict judge of synthetic speech and of sentences that mean little: over all variants it has 21 %,
  for muffled voices and those with much echo 33 to 50 %.
* Different: no copies and no robots. Between two splits no voices are nearer than 2.7 dB, the
  distance of their mean log-mel spectra with levels removed, where two semitones of pitch add 1 dB
  (as the root of the sum of squares).

The Lancaster, West Midlands, Scottish and Caribbean accents cost Whisper up to three times the
errors of the American one, and are left out. A few variants speak two or three times in one split,
as other people: in another accent, pitch and rate. Behind each voice stand its median pitch, the
share of voiced frames, and the character error rate (of 8 sentences).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Voice:
    """One synthetic speaker."""

    name: str
    accent: str  # a language of espeak-ng: "en-us"
    variant: str  # one of its voice variants: "f1"
    gender: str  # "female" or "male"
    rate: int  # words per minute
    pitch: int  # 0 to 99; 50 is the variant's own
    range: int = 50  # of the intonation, from 0 (a monotone) to 99

    @property
    def label(self) -> str:
        """Return espeak-ng's name of this accent and variant together."""
        return f"{self.accent}+{self.variant}"


# fmt: off
VOICES: dict[str, tuple[Voice, ...]] = {
    "train": (
        Voice("f1-us", "en-us", "f1", "female", 160, 50),                # 182 Hz, 81 %, 18 %
        Voice("m1-us", "en-us", "m1", "male", 160, 50),                  # 95 Hz, 59 %, 11 %
        Voice("steph-us", "en-us", "steph", "female", 150, 57),          # 205 Hz, 91 %, 17 %
        Voice("hugo-us", "en-us", "Hugo", "male", 165, 55),              # 115 Hz, 76 %, 9 %
        Voice("f3-us", "en-us", "f3", "female", 165, 50),                # 216 Hz, 79 %, 16 %
        Voice("robert-us", "en-us", "robert", "male", 155, 53),          # 101 Hz, 65 %, 13 %
        Voice("belinda-us", "en-us", "belinda", "female", 155, 46),      # 219 Hz, 88 %, 17 %
        Voice("iven3-nyc", "en-us-nyc", "iven3", "male", 155, 46),       # 98 Hz, 83 %, 25 %
        Voice("zac-us", "en-us", "zac", "female", 155, 36),              # 314 Hz, 84 %, 23 %
        Voice("m8-rp", "en-gb-x-rp", "m8", "male", 160, 54),             # 89 Hz, 73 %, 11 %
        Voice("f1-en", "en", "f1", "female", 150, 40),                   # 165 Hz, 78 %, 12 %
        Voice("gene2-us", "en-us", "Gene2", "male", 165, 46),            # 111 Hz, 88 %, 13 %
        Voice("anika-us", "en-us", "anika", "female", 150, 40),          # 258 Hz, 90 %, 21 %
        Voice("edward-us", "en-us", "edward", "male", 160, 59),          # 113 Hz, 83 %, 9 %
        Voice("f3-rp", "en-gb-x-rp", "f3", "female", 160, 58),           # 229 Hz, 79 %, 12 %
        Voice("nguyen-us", "en-us", "Nguyen", "male", 160, 50),          # 152 Hz, 81 %, 10 %
        Voice("steph-nyc", "en-us-nyc", "steph", "female", 160, 44),     # 176 Hz, 88 %, 20 %
        Voice("sandro-us", "en-us", "sandro", "male", 150, 47),          # 97 Hz, 70 %, 7 %
        Voice("belinda-rp", "en-gb-x-rp", "belinda", "female", 150, 40), # 205 Hz, 88 %, 21 %
        Voice("pablo-en", "en", "pablo", "male", 155, 50),               # 115 Hz, 67 %, 12 %
        Voice("f1-nyc", "en-us-nyc", "f1", "female", 165, 60),           # 200 Hz, 84 %, 25 %
        Voice("m4-us", "en-us", "m4", "male", 165, 44),                  # 91 Hz, 60 %, 10 %
        Voice("f3-nyc", "en-us-nyc", "f3", "female", 155, 41),           # 200 Hz, 78 %, 23 %
        Voice("ed-us", "en-us", "ed", "male", 155, 52),                  # 130 Hz, 81 %, 21 %
        Voice("david-us", "en-us", "david", "male", 150, 56),            # 80 Hz, 74 %, 13 %
        Voice("klatt3-us", "en-us", "klatt3", "male", 160, 50),          # 103 Hz, 65 %, 9 %
        Voice("mario-us", "en-us", "Mario", "male", 155, 57),            # 115 Hz, 74 %, 18 %
        Voice("travis-us", "en-us", "travis", "male", 150, 50),          # 104 Hz, 78 %, 13 %
    ),
    "valid": (
        Voice("f2-rp", "en-gb-x-rp", "f2", "female", 160, 47),           # 193 Hz, 79 %, 13 %
        Voice("max-us", "en-us", "max", "male", 165, 53),                # 106 Hz, 71 %, 15 %
        Voice("linda-us", "en-us", "linda", "female", 155, 46),          # 219 Hz, 87 %, 19 %
        Voice("paul-us", "en-us", "paul", "male", 155, 54),              # 89 Hz, 77 %, 19 %
        Voice("f2-nyc", "en-us-nyc", "f2", "female", 155, 57),           # 211 Hz, 81 %, 17 %
        Voice("alex-us", "en-us", "Alex", "male", 155, 56),              # 113 Hz, 79 %, 22 %
    ),
    "test": (
        Voice("f5-us", "en-us", "f5", "female", 160, 50),                # 208 Hz, 76 %, 9 %
        Voice("m3-us", "en-us", "m3", "male", 165, 52),                  # 108 Hz, 69 %, 10 %
        Voice("annie-us", "en-us", "Annie", "female", 150, 48),          # 246 Hz, 74 %, 17 %
        Voice("quincy-us", "en-us", "quincy", "male", 155, 54),          # 89 Hz, 72 %, 13 %
        Voice("aunty-us", "en-us", "aunty", "female", 155, 52),          # 182 Hz, 79 %, 22 %
        Voice("victor-us", "en-us", "victor", "male", 160, 47),          # 93 Hz, 64 %, 10 %
    ),
}
# fmt: on

# Of the one-voice reading: a clear voice, slow and in a monotone, which a small network learns
# sooner. Whisper tiny.en mishears 12 % of its words in 20 sentences of prose, and 25 % of f1-us's.
READER = Voice("reader", "en-us", "sandro", "male", 120, 47, 0)
