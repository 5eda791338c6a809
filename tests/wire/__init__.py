"""The gateway's socket against RFC 6455, byte by byte, with a client that can do everything wrong."""
