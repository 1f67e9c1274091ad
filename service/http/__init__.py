"""The HTTP API: routes, middleware, errors and access."""
