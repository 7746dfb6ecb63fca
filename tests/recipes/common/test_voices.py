"""The table of speakers keeps its promises to the splits."""

from itertools import combinations

from recipes.common.voices import READER, VOICES


def test_no_timbre_is_in_two_splits() -> None:
    variants = {split: {voice.variant for voice in voices} for split, voices in VOICES.items()}
    assert list(variants) == ["train", "valid", "test"]
    for one, other in combinations(variants.values(), 2):
        assert one
        assert not one & other


def test_names_are_unique_and_no_two_speakers_are_alike() -> None:
    everyone = [voice for voices in VOICES.values() for voice in voices]
    assert len(everyone) >= 40
    assert len({voice.name for voice in everyone}) == len(everyone)
    assert len({voice.label for voice in everyone}) == len(everyone)


def test_each_split_has_women_and_men_and_any_few_speakers_are_mixed() -> None:
    for voices in VOICES.values():
        for few in (voices[:2], voices):
            assert {voice.gender for voice in few} == {"female", "male"}


def test_voices_stay_within_what_the_synthesiser_allows() -> None:
    for voices in VOICES.values():
        for voice in voices:
            assert 130 <= voice.rate <= 190
            assert 4 <= voice.pitch <= 95  # an utterance is said up to 4 higher or lower


def test_the_reader_has_a_timbre_of_training() -> None:
    assert READER.label in {voice.label for voice in VOICES["train"]}
