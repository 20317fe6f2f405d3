"""The two errors that decinb raises. Each message says what was given, what is allowed, and what to do next."""


class InputError(ValueError):
    """An argument cannot be used. Raised before any work starts."""


class ModelError(OSError):
    """A model cannot be loaded (its folder, files, tensors or source), or its output is NaN."""
