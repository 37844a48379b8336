"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A problem with the user's input, told in one line that names the remedy.

    The command turns it into ``error: <line>`` on stderr and exit code 2, without a traceback.
    """


def told(problem: BaseException) -> str:
    """What an exception says, in one line of at most 300 characters; its name if it says nothing."""
    return " ".join(str(problem).split())[:300] or type(problem).__name__
