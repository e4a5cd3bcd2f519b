"""Single sites and products as small programs that are timed."""
