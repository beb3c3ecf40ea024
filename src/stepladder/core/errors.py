"""The one kind of error that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave: one sentence that names it and the way out.

    The command line prints it as ``error: <sentence>`` and exits with status 2; nothing else is printed,
    nothing is left half-written. Everything that is *our* mistake is any other exception, with its traceback.
    """
