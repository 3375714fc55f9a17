"""The exceptions a user sees: printed as one message, without a traceback."""


class UserError(Exception):
    """A mistake of the user's; the message names the fix. Exit code 2."""

    exit_code = 2


class TrainingError(UserError):
    """The run itself went wrong (a loss that is not finite, a full disk). Exit code 1; checkpoints are kept."""

    exit_code = 1
