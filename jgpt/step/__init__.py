"""The optimizer step as pure functions: it knows no device."""
