"""The exception for errors that the user can correct, and the checks that raise it."""


class UserError(Exception):
    """An error that the user can correct: its message is one line that says what is wrong, then what to do.

    `status` is the exit status: 2 for bad usage of the command line, otherwise 1.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def require(condition: bool, message: str) -> None:
    """Raises UserError with exit status 2 (bad usage) unless the condition holds."""
    if not condition:
        raise UserError(message, status=2)


def require_at_least(minimum: float, config: object, *names: str) -> None:
    """Raises UserError with exit status 2 if one of the named options is less than the minimum; None is allowed."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= minimum, f"--{name.replace('_', '-')} must be at least {minimum}")


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error says that the memory of the machine, or of its GPU, is full."""
    signs = ("out of memory", "allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED", "NVML_SUCCESS == r")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
