"""What can go wrong before or during a training, in one class: its message is the line that the user reads."""


class TrainingError(Exception):
    """The user can do something about it. The message names the thing, the found and the expected."""
