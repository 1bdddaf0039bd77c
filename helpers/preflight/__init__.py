"""Check the requirements of a run, and name the command that provides each missing one.

`preflight` returns the checks as a table for a notebook; ``python -m helpers.preflight`` prints it.
"""

from helpers.preflight.checks import preflight
