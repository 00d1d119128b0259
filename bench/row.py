"""What a row is."""


class Outcome:
    """A value in the row's unit, bytes moved, and what else is worth showing."""

    def __init__(self, value, moved=0, extra="", seconds=None):
        self.value, self.moved, self.extra, self.seconds = value, moved, extra, seconds


class Row:
    """A row runs on a mount, and where it makes sense by the direct clients."""
    unit = ""
    higher_is_better = True
    # What a value is of which less is better.
    measure = "time"
    # Columns that this row is for; None: all that its kind is for.
    only = None
    # Whether it also runs on a mount that throws the bytes away.
    discards = False
    # The row that this one is compared with, column by column.
    beside = None
    # Seconds one measurement may take; None: the --limit.
    limit = None

    def mount(self, mount, server, size):
        """Measures through a mount → Outcome."""
        raise NotImplementedError

    def sdk(self, server, size, signed=False):
        """Measures the SDK → (Outcome, CPU seconds per GiB), or None."""

    def s5cmd(self, server, size):
        """Measures s5cmd → (Outcome, CPU seconds per GiB), or None."""
