"""Who speaks the embedded speech: intelligible voices of espeak-ng that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Voice:
    """One synthetic speaker."""

    name: str
    accent: str  # a language of espeak-ng, as "en-us"
    variant: str  # one of its voice variants, as "f1"
    gender: str  # "female" or "male"
    rate: int  # words per minute
    pitch: int  # 0 to 99; 50 is the variant's own
    range: int = 50  # of the intonation, 0 (a monotone) to 99

    @property
    def label(self) -> str:
        """What espeak-ng calls this accent and variant together."""
        return f"{self.accent}+{self.variant}"


TRAIN = (
    Voice("f1", "en-us", "f1", "female", 150, 44),
    Voice("f2", "en", "f2", "female", 157, 49),
    Voice("f3", "en-us", "f3", "female", 164, 54),
    Voice("f4", "en-gb-scotland", "f4", "female", 171, 46),
    Voice("annie", "en-us", "Annie", "female", 178, 51),
    Voice("andrea", "en-gb-x-rp", "Andrea", "female", 185, 56),
    Voice("anika", "en-us", "anika", "female", 152, 48),
    Voice("belinda", "en-029", "belinda", "female", 159, 53),
    Voice("steph", "en-gb-x-gbclan", "steph", "female", 166, 45),
    Voice("grandma", "en-us", "grandma", "female", 173, 50),
    Voice("m1", "en-gb-x-gbcwmd", "m1", "male", 180, 55),
    Voice("m2", "en-us", "m2", "male", 187, 47),
    Voice("m3", "en", "m3", "male", 154, 52),
    Voice("m4", "en-us", "m4", "male", 161, 44),
    Voice("m5", "en-gb-scotland", "m5", "male", 168, 49),
    Voice("m6", "en-us", "m6", "male", 175, 54),
    Voice("m7", "en-gb-x-rp", "m7", "male", 182, 46),
    Voice("m8", "en-us", "m8", "male", 189, 51),
    Voice("alex", "en-029", "Alex", "male", 156, 56),
    Voice("andy", "en-gb-x-gbclan", "Andy", "male", 163, 48),
    Voice("denis", "en-us", "Denis", "male", 170, 53),
    Voice("gene2", "en-gb-x-gbcwmd", "Gene2", "male", 177, 45),
    Voice("henrique", "en-us", "Henrique", "male", 184, 50),
    Voice("jacky", "en", "Jacky", "male", 151, 55),
    Voice("lee", "en-us", "Lee", "male", 158, 47),
    Voice("marco", "en-gb-scotland", "Marco", "male", 165, 52),
    Voice("michael", "en-us", "Michael", "male", 172, 44),
    Voice("mike", "en-gb-x-rp", "Mike", "male", 179, 49),
)
VALID = (
    Voice("shelby", "en-us", "shelby", "female", 186, 54),
    Voice("alicia", "en-029", "Alicia", "female", 153, 46),
    Voice("nguyen", "en-gb-x-gbclan", "Nguyen", "male", 160, 51),
    Voice("reed", "en-us", "Reed", "male", 167, 56),
    Voice("storm", "en-gb-x-gbcwmd", "Storm", "male", 174, 48),
    Voice("antonio", "en-us", "antonio", "male", 181, 53),
)
TEST = (
    Voice("f5", "en", "f5", "female", 188, 45),
    Voice("aunty", "en-us", "aunty", "female", 155, 50),
    Voice("david", "en-gb-scotland", "david", "male", 162, 55),
    Voice("ed", "en-us", "ed", "male", 169, 47),
    Voice("edward2", "en-gb-x-rp", "edward2", "male", 176, 52),
    Voice("john", "en-us", "john", "male", 183, 44),
)

VOICES: dict[str, tuple[Voice, ...]] = {"train": TRAIN, "valid": VALID, "test": TEST}
READER = TRAIN[0]
