"""Brain-style trainer for speech."""
