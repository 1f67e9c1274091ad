"""`make fuzz`: mutated and crafted images, fuzzed parsers, and requests made from openapi.yaml."""
