"""A sandbox for model-written programs: `host` starts it, and `inside` runs in it."""

from tlora.scoring.sandbox.host import PROTECTIONS, Limits, Protection, Result, Sandbox

__all__ = ["PROTECTIONS", "Limits", "Protection", "Result", "Sandbox"]
