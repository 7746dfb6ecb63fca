"""Text-to-speech synthesis: torchaudio's Tacotron2.

Attributes:
    BRAIN: the Brain of a run, which trains and evaluates.
    MODEL: the model of a run, which `trainer.load` makes.
    INFER: what infer.py takes after the run folder, for the command that a run ends with.
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
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
