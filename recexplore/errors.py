"""The exceptions that the command line tells in words."""


class InputError(ValueError):
    """Something given to recexplore is wrong: a file, a row, a gin binding, a work directory.

    The message is one paragraph: what is wrong, where, what was expected, what to do. The command
    line prints it without a traceback and exits with status 2.
    """


def check_field(settings: object, ok: bool, field: str, rule: str) -> None:
    """Refuses a field of settings that gin binds, by its name there.

    Args:
      settings: a dataclass.
      ok: whether the field's value will do.
      field: of it.
      rule: that it breaks otherwise, such as "must be at least 1".

    Raises:
      InputError: it won't do.
    """
    if not ok:
        name = gin_name(type(settings))
        raise InputError(f"{name}.{field} is {getattr(settings, field)!r}; it {rule}.")


def gin_name(kind: type) -> str:
    """What gin files call a class.

    >>> gin_name(InputError)
    'errors.InputError'
    """
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"


class SharedError(InputError):
    """The same, raised by all processes of a program alike."""


class Preempted(Exception):
    """The machine is to be taken away. What was done is saved; the same command goes on."""


class Unfinished(Exception):
    """This process has done its share of the work; others haven't. Nothing is wrong."""
