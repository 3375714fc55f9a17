"""Lines for the user in the middle of a run."""

import os
import sys

from tqdm import tqdm


def notice(message: str) -> None:
    """A line on standard error, beside the progress bar if there is one; of a machine's processes one prints it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tqdm.write(message, file=sys.stderr)
        sys.stderr.flush()
