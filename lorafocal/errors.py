"""The one exception that a user's input can cause."""


class InputError(ValueError):
    """Wrong input: the message says what is wrong, where (file, row or key), and the way out.

    The command line prints the message alone and exits with code 2; Python callers may catch it as a `ValueError`.
    """
