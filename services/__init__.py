"""The four services, each its own process: auth, context, dispatcher, events."""
