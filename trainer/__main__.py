"""The command `cortex`, also `python -m trainer`."""

from __future__ import annotations

from trainer.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
