"""Code that runs inside the sandbox, in processes started by `tlora.scoring.sandbox.host`.

It is loaded from its folder without the rest of tlora, so every import in it is relative or from
the standard library. Order: `launch` reads the program, creates the namespaces with `isolate`
(which calls Linux through `kernel`), blocks the system calls in `calls` that evade the limits, and
forks the untrusted process, `candidate`; the parent, `examiner`, runs the tests and asks the
candidate for values over `wire`.
"""
