"""The commands of `camcal` that serve and inspect bundles."""
