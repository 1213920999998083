"""The one error a user can cause.

Every message names the fact, the place and the fix, in one sentence. The command line prints it and
exits with code 2; a library caller catches it as the `ValueError` it is. Anything else that escapes
is a defect of ours and keeps its traceback.
"""


class UserError(ValueError):
    """The input is wrong: a flag, a file, a configuration value or a request."""
