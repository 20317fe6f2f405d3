"""The two errors a user of decinb meets. Each message says what was given, what is allowed, and what to do next."""


class InputError(ValueError):
    """An argument that cannot be used, found before any work starts."""


class ModelError(OSError):
    """A model that cannot be loaded: its folder, files, tensors or source. Or one that gives no numbers but NaN."""
