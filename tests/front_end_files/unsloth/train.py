"""Unsloth asks to be imported before everything else, and looks for an accelerator when it is."""

import unsloth  # noqa: F401
