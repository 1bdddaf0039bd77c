"""What a run needs, and the command that fixes each missing thing.

`preflight` returns a table of all checks for a notebook; ``python -m helpers.preflight`` prints it.
"""

from helpers.preflight.checks import preflight
