"""`python -m optimum_sab …` is `optimum-sab …`."""

from optimum_sab.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(program="python -m optimum_sab"))
