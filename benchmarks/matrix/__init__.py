"""Every form of a call, array library, rule and size, on every engine."""
