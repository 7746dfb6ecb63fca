"""SpeechBrain's function names, and import paths of earlier versions."""
