"""Tools for finished runs: `python -m trainer replay RUN STEP` and `… export RUN OUT`."""

from __future__ import annotations

import sys

from trainer.cli import export, replay

TOOLS = {"replay": replay.replay, "export": export.export}


def main() -> int:
    """Run the tool that the arguments name; return its exit code, 2 for a user's error."""
    tool = TOOLS.get(next(iter(sys.argv[1:]), ""))
    if tool is None:
        print(f"{replay.USAGE}\n{export.USAGE}", file=sys.stderr)
        return 2
    try:
        return tool(sys.argv[2:])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
