"""The drawn world that the bundled model knows, and the truth about it."""
