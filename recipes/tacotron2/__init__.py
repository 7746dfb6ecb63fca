"""Text-to-speech synthesis: torchaudio's Tacotron2.

Attributes:
    BRAIN: the Brain of a run, which trains and evaluates.
    MODEL: the model of a run, which `trainer.load` makes.
    INFER: what infer.py takes after the run folder, for the command that a run ends with.
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
    LIMITS: what its models are not made for, in Markdown, which a model card shows.
"""

BRAIN: str = "train.Synthesiser"
MODEL: str = "speaker.Speaker"
INFER: str = "--text 'Turn left.' -o out.wav"
RUN_NAMES: tuple[str, ...] = (
    "losses.Objective",
    "model.Tacotron",
    "text.Characters",
    "text.Phonemes",
)
YAML_NAMES: tuple[str, ...] = (*RUN_NAMES, "data.embedded", "data.readings")
LIMITS: str = (
    "The synthesiser has the voice of its training data and reads what is written as that: it may "
    "skip, repeat or mispronounce words, most in long or unusual sentences, and a text may be "
    "spoken to the limit of its length. Synthetic speech must be told to be so, and a voice used "
    "with the consent of its speaker."
)
