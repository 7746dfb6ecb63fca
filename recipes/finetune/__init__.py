"""Fine-tuning of pretrained speech models: recognition, sequence to sequence, classification.

Attributes:
    BRAIN: the Brain of a run, by the object that its YAML builds; it trains and evaluates.
    MODEL: the model of a run, by the same, which `trainer.load` makes.
    RUN_NAMES: names of this package that the hyperparams.yaml of a run folder may build: what using
        a trained model needs.
    YAML_NAMES: names of this package that a YAML may build: these, and what only a training needs.
    LIMITS: what its models are not made for, in Markdown, which a model card shows.
"""

BRAIN: dict[str, str] = {
    "ctc.CTC": "train.Recogniser",
    "pooling.Embedding": "train_classifier.Classifier",
    "pretrain.MaskedPrediction": "train.Pretrainer",
    "whisper.Whisper": "train.Transcriber",
}
MODEL: dict[str, str] = {
    "ctc.CTC": "transcriber.CTCTranscriber",
    "pooling.Embedding": "classify.SoundClassifier",
    "pretrain.MaskedPrediction": "embedder.EncoderFeatures",
    "whisper.Whisper": "transcriber.WhisperTranscriber",
}
RUN_NAMES: tuple[str, ...] = (
    "classify.Labels",
    "ctc.CTC",
    "model.PretrainedEncoder",
    "pooling.AttentiveStatistics",
    "pooling.CosineHead",
    "pooling.Embedding",
    "pooling.LinearHead",
    "pooling.MeanPooling",
    "pooling.StatisticsPooling",
    "tdnn.TDNN",
    "pretrain.MaskedPrediction",
    "text.Vocabulary",
    "whisper.Whisper",
)
YAML_NAMES: tuple[str, ...] = (*RUN_NAMES, "labelled.folders", "labelled.table")
LIMITS: str = (
    "What is recognised or told apart is what the data of the fine-tuning had: other languages, "
    "accents, microphones and noise were not measured. A classifier always chooses one of its "
    "labels. A voice can be imitated or replayed: similarity of voices is no proof of who speaks. "
    "The pretrained model brings the biases of its own data, and its licence."
)
