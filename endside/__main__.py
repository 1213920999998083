"""`python -m endside` is the `endside` command."""

from endside.cli import main

main()
