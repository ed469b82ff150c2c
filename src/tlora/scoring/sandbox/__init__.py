"""A sandbox for programs that a model wrote: `host` starts it, and `inside` runs in it."""

from tlora.scoring.sandbox.host import PROTECTIONS, Limits, Protection, Result, Sandbox

__all__ = ["PROTECTIONS", "Limits", "Protection", "Result", "Sandbox"]
