"""The edge: WebSocket frames outside, gRPC inside."""
