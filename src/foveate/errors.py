"""The exceptions of Foveate.

A mistake of the user raises a `FoveateError` whose message is one line: what was asked, the value that was found,
the limit, and the way out. The command line prints that line and exits with code 2.

    FoveateError
    ├── UnknownNameError     a name that no registry holds (with the nearest names)
    ├── InputError           a picture, clip, prompt or sample that cannot be used
    ├── CheckpointError      files of a model that are missing, of another shape, or of another layout
    ├── RecipeError          a recipe that does not parse or does not fit the model
    ├── UnsupportedError     a method that cannot work on this model or device
    └── BudgetError          more tokens, memory or time than allowed
"""

from __future__ import annotations


class FoveateError(Exception):
    """Base class: a mistake that the user can mend. `exit_code` is what the command line returns."""

    exit_code = 2


class UnknownNameError(FoveateError):
    """A name that no registry holds."""


class InputError(FoveateError):
    """A picture, clip, prompt or data sample that cannot be used."""


class CheckpointError(FoveateError):
    """A model's files are missing, of another shape, or in a layout that is not known."""


class RecipeError(FoveateError):
    """A recipe that does not parse, or that does not fit the model."""


class UnsupportedError(FoveateError):
    """A method that cannot work on this model, device or library version."""


class BudgetError(FoveateError):
    """More tokens, memory or time than the limit allows."""
