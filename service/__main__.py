"""`python -m service`: the serving commands without the training ones."""

from service.cli import app

app(prog_name="python -m service")
