"""Models: the networks, and the bundle format that the service loads."""
