"""What runs inside of the sandbox, in processes that `tlora.scoring.sandbox.host` starts.

It is loaded by its folder, without the rest of tlora, so every import in it is relative or of the
standard library. One datum's walk: `launch` reads the program, makes the namespaces with
`isolate` (which speaks to Linux through `kernel`), has `calls` refused that slip the limits, and
forks the untrusted process, `candidate`; the process it forked from, `examiner`, runs the tests and
asks the candidate for values by `wire`.
"""
