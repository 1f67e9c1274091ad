"""What a model is: the networks, and the bundle that carries one to the service."""
