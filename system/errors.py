"""The one exception for mistakes that the user can mend, and the checks that raise it."""


class UserError(Exception):
    """A mistake that its user can mend: the message is one line that says what is wrong and what to do.

    `status` is the exit status: 1, or 2 where the command line itself is wrong.
    """

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def require(condition: bool, message: str) -> None:
    """Raises UserError with exit status 2 (bad usage) unless the condition holds."""
    if not condition:
        raise UserError(message, status=2)


def require_at_least(least: int, config: object, *names: str) -> None:
    """Raises UserError with exit status 2 unless these options of a config, where they are given, are large enough."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= least, f"--{name.replace('_', '-')} must be at least {least}")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the machine, or of its GPU, is full."""
    signs = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
