"""Statistics -> plan -> PeftModel. The only package that knows PEFT's internals."""
