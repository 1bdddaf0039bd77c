"""What a run needs, each with the command that provides it.

`preflight` returns a table of all checks for a notebook; ``python -m helpers.preflight`` prints it.
"""

from helpers.preflight.table import preflight
