"""The ordered, durable record of what each run did, and its live tail."""
