"""The exceptions that the command line tells in words."""


class InputError(ValueError):
    """Something given to recexplore is wrong: a file, a row, a gin binding, a work directory.

    The message is one paragraph: what is wrong, where, what was expected, what to do. The command
    line prints it without a traceback and exits with status 2.
    """


class SharedError(InputError):
    """The same, raised by all processes of a program alike."""


class Preempted(Exception):
    """The machine is to be taken away. What was done is saved; the same command goes on."""
