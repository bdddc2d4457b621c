"""`python -m optimum_sab`: the command line, where the program `optimum-sab` is not on the path."""

from optimum_sab.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(program="python -m optimum_sab"))
