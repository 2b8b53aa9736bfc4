"""A measurement that is stopped between two of its parts, and gone on with."""


class Stopped:
    """``keep`` for a ``Context``: keeps parts by name, and is interrupted after so many new ones."""

    def __init__(self, after):
        self.after = after
        self.kept = {}

    def __call__(self, name, compute):
        if name not in self.kept:
            if len(self.kept) == self.after:
                raise KeyboardInterrupt
            self.kept[name] = compute()
        return self.kept[name]
