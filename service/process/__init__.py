"""The processes of the service: sockets, signals, workers."""
