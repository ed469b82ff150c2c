"""Statistics -> plan -> PeftModel. The only place that knows PEFT's insides."""
